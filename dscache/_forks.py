"""Hooks run in a forked child before it uses inherited objects."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

_hooks: WeakKeyDictionary[Any, Callable[[Any], object]] = WeakKeyDictionary()


def after_fork_in_child(target: T, reset: Callable[[T], object]) -> None:
    """Call ``reset(target)`` in each forked child; ``target`` is referenced weakly."""
    _hooks[target] = reset


def _reset_all() -> None:
    for target, reset in _hooks.items():
        reset(target)


os.register_at_fork(after_in_child=_reset_all)
