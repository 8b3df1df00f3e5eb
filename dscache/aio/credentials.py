"""The credentials of a cache on an event loop: configured, or from a provider."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

from ..config import Options
from ..net.credentials import Hidden, Login, Tokens, login_of, provider_failed
from ..net.renewals import failed, listen
from .resolver import Threads

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider


class Credentials:
    """The credentials of one cache, on the event loop that runs."""

    def __init__(self, provider: CredentialProvider | None) -> None:
        self._provider = provider
        self.given = Tokens()
        self._loop = asyncio.get_running_loop()
        self._thread = Threads(1, "dscache fetches credentials")

    async def current(self, options: Options) -> Login:
        """Return the username and password to log in with now, by default from the options.

        Raises ConnectError if the provider fails.
        """
        provider = self._provider
        if provider is None:
            return login_of(options)
        try:
            return self.given.login(await self._fetch(provider))
        except Exception as error:  # whatever the provider raises, the next attempt may succeed
            failure = provider_failed(error)
        # Raised here, without the text and the frames of the provider's: both may hold a token.
        raise failure

    def on_renewal(self, renewed: Callable[[list[str | Hidden]], None], address: str) -> None:
        """Call ``renewed`` on the loop with the words of an AUTH whenever there is a new token.

        ``renewed`` is a bound method, whose object isn't kept alive. ``address`` is for the log.
        """
        method = WeakMethod(renewed)

        def log_in(words: list[str | Hidden]) -> None:
            if (call := method()) is not None:
                call(words)

        # The token is of a class of the provider's own.
        def on_token(token: Any) -> None:
            try:
                username = token.try_get("oid")
                secret = Hidden(token.get_value())
                words = [*([username] if username else []), secret]
                self.given.note(secret)
            except Exception as error:
                failed(address, error)
                return
            # A loop in debug mode logs the arguments of its callbacks: this one has none. The
            # loop may be closed by now, and the cache with it.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(lambda: log_in(words))

        listen(self._provider, method, on_token, address)

    async def _fetch(self, provider: CredentialProvider) -> tuple[str, ...]:
        from redis.credentials import CredentialProvider

        if type(provider).get_credentials_async is not CredentialProvider.get_credentials_async:
            return await provider.get_credentials_async()
        # The provider is a blocking one, which may ask a service elsewhere.
        return await self._thread.run("credentials", provider.get_credentials)
