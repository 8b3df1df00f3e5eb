"""New credentials of streaming providers, announced to all caches and connections that use them.

A provider may keep only the latest callback that it was given. redis-py's CredentialsListener does,
and so does each provider that is made with it. Therefore a provider is given one pair of callbacks,
which call all listeners.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from .credentials import NOTHING

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

_logger = logging.getLogger("dscache")

# By the ids of their providers. A provider may be equal to another one, or have no hash.
_known: Final[dict[int, _Listeners]] = {}


def listen(
    provider: CredentialProvider | None,
    owner: Callable[[], object],
    on_token: Callable[[Any], object],
    address: str,
) -> None:
    """Have ``on_token`` called, in any thread, with each token that a provider announces.

    ``owner`` is a weak reference: once it returns None, nothing is called any more. ``address`` is
    for the log, which tells when a provider announces that it has no new token.
    """
    if hasattr(provider, "on_next") or hasattr(provider, "on_error"):
        _listeners_of(provider).add(owner, on_token, address)


class _Listeners:
    """The listeners of one provider. Any thread may add one."""

    def __init__(self) -> None:
        self.provider: Callable[[], object] = lambda: None
        self._present: list[tuple[Callable[[], object], Callable[[Any], object], str]] = []

    def add(self, owner: Callable[[], object], on_token: Callable[[Any], object], at: str) -> None:
        self._find()  # so that those that are gone don't pile up
        self._present.append((owner, on_token, at))

    def on_next(self, token: Any) -> Awaitable[None]:
        for _, on_token, _ in self._find():
            on_token(token)
        return NOTHING

    def on_error(self, error: Exception) -> Awaitable[None]:
        for address in dict.fromkeys(address for *_, address in self._find()):
            failed(address, error)
        return NOTHING

    def _find(self) -> list[tuple[Callable[[], object], Callable[[Any], object], str]]:
        """Return the listeners whose owners are there, and forget the others."""
        for one in list(self._present):
            if one[0]() is None:
                with suppress(ValueError):  # another thread was first
                    self._present.remove(one)
        return list(self._present)


def failed(address: str, error: Exception) -> None:
    """Log that a provider has no new credentials for an address; the error's text may hold one."""
    _logger.warning("no new credentials for %s: %s", address, type(error).__name__)


def _listeners_of(provider: Any) -> _Listeners:
    """Return the listeners of a provider, which has their callbacks."""
    key = id(provider)
    mine = _Listeners()
    try:
        mine.provider = ref(provider, lambda _: _forget(key, mine))
        # One step: two threads that come at once get the same.
        found = _known.setdefault(key, mine)
        if found.provider() is not provider:  # of an object that had this id before
            found = _known[key] = mine
    except TypeError:
        found = mine  # of an object without weak references, which gets callbacks for each
    if found is mine:
        for name in ("on_next", "on_error"):
            if (register := getattr(provider, name, None)) is not None:
                register(getattr(mine, name))
    return found


def _forget(key: int, listeners: _Listeners) -> None:
    if _known.get(key) is listeners:
        del _known[key]
