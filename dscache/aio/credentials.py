"""The credentials of a cache on an event loop: the configuration's, or those of a provider."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..config import Options
from ..net.credentials import NOTHING, Hidden, Login, checked, hidden, provider_failed
from ..net.foreign_errors import is_of_handler

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

_logger = logging.getLogger("dscache")


class Credentials:
    """The credentials of one cache, on the event loop that runs."""

    def __init__(self, options: Options, provider: CredentialProvider | None) -> None:
        self._options = options
        self._provider = provider
        self._loop = asyncio.get_running_loop()
        self._call: asyncio.Future[tuple[str, ...]] | None = None

    async def current(self) -> Login:
        """Return the username and password to log in with now.

        Raises ConnectError if the provider fails.
        """
        provider = self._provider
        if provider is None:
            return self._options.username, hidden(self._options.password)
        try:
            return checked(await self._fetch(provider))
        except Exception as error:  # whatever the provider raises, the next attempt may succeed
            if is_of_handler(error):
                raise
            failure = provider_failed(error)
        # Raised here, without the text and the frames of the provider's: both may hold a token.
        raise failure

    def on_renewal(self, renewed: Callable[[list[str | Hidden]], None], address: str) -> None:
        """Call ``renewed`` on the loop with the words of an AUTH whenever there is a new token.

        Providers call back in any thread, and some of them await the result. ``address`` is for
        the log.
        """

        # The token is of a class of the provider's own.
        def on_next(token: Any) -> Awaitable[None]:
            try:
                username = token.try_get("oid")
                words = [*([username] if username else []), Hidden(token.get_value())]
            except Exception as error:
                return on_error(error)
            # A loop in debug mode logs the arguments of its callbacks: this one has none. The
            # loop may be closed by now, and the cache with it.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(lambda: renewed(words))
            return NOTHING

        def on_error(error: Exception) -> Awaitable[None]:
            _logger.warning("no new credentials for %s: %s", address, type(error).__name__)
            return NOTHING

        if (register := getattr(self._provider, "on_next", None)) is not None:
            register(on_next)
        if (register := getattr(self._provider, "on_error", None)) is not None:
            register(on_error)

    async def _fetch(self, provider: CredentialProvider) -> tuple[str, ...]:
        from redis.credentials import CredentialProvider

        if type(provider).get_credentials_async is not CredentialProvider.get_credentials_async:
            return await provider.get_credentials_async()
        # The provider is a blocking one, which may ask a service elsewhere. A call that outlasts
        # an attempt to connect is awaited by the next one: a second call beside it would take one
        # more thread of the executor, which the program needs too.
        if self._call is None:
            self._call = self._loop.run_in_executor(None, provider.get_credentials)
            self._call.add_done_callback(_retrieve)
        call = self._call
        try:
            return await asyncio.shield(call)
        finally:
            if call.done():
                self._call = None


def _retrieve(call: asyncio.Future[tuple[str, ...]]) -> None:
    """Retrieve the result of a call that no attempt may await any more.

    Asyncio would log an exception that is never retrieved.
    """
    if not call.cancelled():
        call.exception()
