"""What a cache logs in with: the configuration's user and password, or those of a provider.

A provider is redis-py's ``CredentialProvider``, and a streaming one also tells of renewals. Its
errors are shown by their type alone: their words are not ours, and may hold a token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..config import Options
from ..errors import ConnectError, DscacheError, ReplyError, clean

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

_logger = logging.getLogger("dscache")

Login = tuple[str | None, "Hidden | None"]
"""A username and a password."""


class Hidden:
    """A text that is shown nowhere: neither by ``repr``, nor as a local of a traceback's frame."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "***"

    def reveal(self) -> str:
        """Return the text; keep it in no variable."""
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hidden) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


def hidden(text: str | None) -> Hidden | None:
    """Return a password as one that is shown nowhere."""
    return None if text is None else Hidden(text)


def revealed(command: Iterable[Any]) -> Iterator[Any]:
    """Yield the words of a command, those that are hidden as they are."""
    for word in command:
        yield word.reveal() if type(word) is Hidden else word


def packed(pipeline: Any, commands: Iterable[Iterable[Any]], waiters: list[Any]) -> bytes:
    """Return the bytes of commands, and append the waiters for their replies.

    Keep the bytes in no variable that a traceback may show: a password may be among them.
    """

    def texts() -> Iterator[bytes]:
        for command in commands:
            text, waiter = pipeline.command(*revealed(command))
            waiters.append(waiter)
            yield text

    return b"".join(texts())


def masked(text: str, secrets: Iterable[Hidden | None]) -> str:
    """Return what a server said without the secrets that it repeats.

    It is masked as it would be shown, and at the end of a text that was cut also in part.
    """
    # A password that is one of these words is no less a secret because a server says the word.
    code, space, rest = text.partition(" ")
    if code not in _CODES:
        code, space, rest = "", "", text
    for secret in secrets:
        shown = "" if secret is None else clean(secret.reveal())
        if not shown:
            continue
        rest = rest.replace(shown, "***")
        said, cut, told = rest.rpartition("…")
        if cut:
            part = next((n for n in range(len(shown) - 1, 0, -1) if said.endswith(shown[:n])), 0)
            rest = f"{said[: len(said) - part]}{'***' if part else ''}{cut}{told}"
    return code + space + rest


def without(error: DscacheError, secrets: Iterable[Hidden | None]) -> DscacheError:
    """Return an error of a handshake without the secrets, and without the frames it went through.

    Their locals hold what was sent.
    """
    secrets = tuple(secrets)
    text = str(error)
    if isinstance(error, ReplyError):
        message = masked(error.message, secrets)
        if message != error.message:
            return ReplyError(message)
    elif (shown := masked(text, secrets)) != text:
        return type(error)(shown)
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


# The first words of what servers say to a handshake: they decide what is done.
_CODES = frozenset(
    ("ERR", "LOADING", "MASTERDOWN", "NOAUTH", "NOPERM", "NOPROTO", "WRONGPASS", "READONLY")
)


def checked(given: Iterable[Any]) -> Login:
    """Return the username and password that a provider has given; raises TypeError."""
    words = tuple(given)
    if len(words) not in (1, 2) or not all(type(word) is str for word in words):
        raise TypeError("it must return (password,) or (username, password)")
    return (None if len(words) == 1 else words[0]), Hidden(words[-1])


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

    async def current(self) -> Login:
        """Return the username and password to log in with now.

        Raises ConnectError if the provider fails.
        """
        provider = self._provider
        if provider is None:
            return self._options.username, hidden(self._options.password)
        try:
            return checked(await self._ask(provider))
        except Exception as error:  # whatever it raises, the next attempt may succeed
            failure = failed(error)
        # Without its words and its frames, either of which may hold a token.
        raise failure

    def listen(self, renewed: Callable[[list[str | Hidden]], None], address: str) -> None:
        """Call ``renewed`` with the words of an AUTH, on the loop, whenever there is a new token.

        Providers call back in whatever thread they have, and some of them await the outcome.
        """

        def on_next(token: Any) -> Awaitable[None]:
            try:
                username = token.try_get("oid")
                words = [*([username] if username else []), Hidden(token.get_value())]
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
