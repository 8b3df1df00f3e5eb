"""The credentials of a blocking cache: the configuration's, or those of a provider."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakMethod

from ..config import Options
from ..net.credentials import NOTHING, Login, checked, hidden, provider_failed
from ..net.foreign_errors import is_of_handler

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider


def current_login(options: Options, provider: CredentialProvider | None) -> Login:
    """Return the username and password to log in with now.

    Raises ConnectError if the provider fails.
    """
    if provider is None:
        return options.username, hidden(options.password)
    try:
        return checked(provider.get_credentials())
    except Exception as error:  # whatever the provider raises, the next attempt may succeed
        if is_of_handler(error):
            raise
        failure = provider_failed(error)
    # Raised here, without the text and the frames of the provider's: both may hold a token.
    raise failure


def on_renewal(provider: CredentialProvider | None, renewed: Callable[[], None]) -> None:
    """Have a bound method called, in any thread, whenever a provider has new credentials.

    The provider keeps no reference to the method's object.
    """
    if (register := getattr(provider, "on_next", None)) is None:
        return
    method = WeakMethod(renewed)

    def on_next(token: object) -> Awaitable[None]:
        if (call := method()) is not None:
            with suppress(RuntimeError):
                call()
        return NOTHING

    register(on_next)
