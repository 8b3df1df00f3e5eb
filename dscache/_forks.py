"""What a forked child puts right before anything of its parent's is used there."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

_alive: WeakKeyDictionary[Any, Callable[[Any], object]] = WeakKeyDictionary()


def after_fork_in_child(it: T, renew: Callable[[T], object]) -> None:
    """Have ``renew(it)`` called in each forked child, as long as there is such a thing."""
    _alive[it] = renew


def _renew_all() -> None:
    for it, renew in _alive.items():
        renew(it)


os.register_at_fork(after_in_child=_renew_all)
