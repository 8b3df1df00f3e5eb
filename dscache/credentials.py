"""What a cache logs in with: the configuration's user and password, or those of a provider.

A provider is redis-py's ``CredentialProvider``, and a streaming one also tells of renewals. Its
errors are shown by their type alone: their words are not ours, and may hold a token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .config import Options
from .errors import ConnectError

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

_logger = logging.getLogger("dscache")


def checked(given: Iterable[Any]) -> tuple[str | None, str]:
    """Return the username and password that a provider has given; raises TypeError."""
    words = tuple(given)
    if len(words) not in (1, 2) or not all(type(word) is str for word in words):
        raise TypeError("it must return (password,) or (username, password)")
    return (None, words[0]) if len(words) == 1 else (words[0], words[1])


def failed(error: Exception) -> ConnectError:
    """Return what to tell of a provider that raised ``error``."""
    return ConnectError(f"the credential provider failed: {type(error).__name__}")


class Credentials:
    """The credentials of one cache, on the event loop that runs."""

    def __init__(self, options: Options, provider: CredentialProvider | None) -> None:
        self._options = options
        self._provider = provider
        self._loop = asyncio.get_running_loop()
        self._asked: asyncio.Future[Any] | None = None

    async def current(self) -> tuple[str | None, str | None]:
        """Return the username and password to log in with now.

        Raises ConnectError if the provider fails.
        """
        provider = self._provider
        if provider is None:
            return self._options.username, self._options.password
        try:
            return checked(await self._ask(provider))
        except Exception as error:  # whatever it raises, the next attempt may succeed
            raise failed(error) from error

    def listen(self, renewed: Callable[[list[str]], None], address: str) -> None:
        """Call ``renewed`` with the words of an AUTH, on the loop, whenever there is a new token.

        Providers call back in whatever thread they have, and some of them await the outcome.
        """

        def on_next(token: Any) -> Awaitable[None]:
            try:
                username = token.try_get("oid")
                words = [*([username] if username else []), token.get_value()]
            except Exception as error:
                return on_error(error)
            # A loop in debug mode logs what it calls with which arguments: here it is none. And
            # the loop may be closed by now, and the cache with it.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(lambda: renewed(words))
            return NOTHING

        def on_error(error: Exception) -> Awaitable[None]:
            _logger.warning("no new credentials for %s: %s", address, type(error).__name__)
            return NOTHING

        if (tell := getattr(self._provider, "on_next", None)) is not None:
            tell(on_next)
        if (tell := getattr(self._provider, "on_error", None)) is not None:
            tell(on_error)

    async def _ask(self, provider: CredentialProvider) -> tuple[str, ...]:
        from redis.credentials import CredentialProvider

        if type(provider).get_credentials_async is not CredentialProvider.get_credentials_async:
            return await provider.get_credentials_async()
        # It knows the blocking way alone, which may ask a service elsewhere. A call that takes
        # longer than one attempt to connect is waited for in the next: a second one beside it
        # would take one more thread of those that also look up hosts.
        if self._asked is None:
            self._asked = self._loop.run_in_executor(None, provider.get_credentials)
            self._asked.add_done_callback(_retrieve)
        asked = self._asked
        try:
            given: tuple[str, ...] = await asyncio.shield(asked)
        finally:
            if asked.done():
                self._asked = None
        return given


class _Nothing:
    """What may be awaited, and need not be."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


NOTHING = _Nothing()


def _retrieve(asked: asyncio.Future[Any]) -> None:
    """Look at the outcome of what nobody may wait for any more, so that nobody complains."""
    if not asked.cancelled():
        asked.exception()
