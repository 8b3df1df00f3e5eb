"""Logins, sans-IO: passwords that are never shown, and the answers of credential providers.

A provider is redis-py's ``CredentialProvider``; a streaming one also announces renewals. Errors of
a provider are shown by their type alone: their text may hold a token.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, quote_plus

from ..errors import ConnectError, DscacheError, ReplyError, clean

if TYPE_CHECKING:
    from ..core.pure import Pipeline

Login = tuple[str | None, "Hidden | None"]
"""A username and a password."""

# First words of replies to a handshake: the code decides what happens next.
_CODES: Final = frozenset(
    (
        "DENIED",
        "ERR",
        "LOADING",
        "MASTERDOWN",
        "NOAUTH",
        "NOPERM",
        "NOPROTO",
        "READONLY",
        "WRONGPASS",
    )
)


class Hidden:
    """A text that is shown nowhere: not by ``repr``, and not as a local in a traceback's frame."""

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


Word = str | bytes | int | Hidden
"""A word of a command."""


def hidden(text: str | None) -> Hidden | None:
    """Return a password as a hidden text; None stays None."""
    return None if text is None else Hidden(text)


def packed(pipeline: Pipeline, commands: Iterable[Iterable[Word]], waiters: list[Any]) -> bytes:
    """Return the bytes of commands, and append the waiters for their replies.

    Keep the bytes in no variable that a traceback may show: a password may be among them.
    """

    def texts() -> Iterator[bytes]:
        for command in commands:
            words = (word.reveal() if isinstance(word, Hidden) else word for word in command)
            text, waiter = pipeline.command(*words)
            waiters.append(waiter)
            yield text

    return b"".join(texts())


def masked(text: str, secrets: Iterable[Hidden | None]) -> str:
    """Return a server's text with ``***`` for each secret that the server repeats.

    A secret is looked for in the forms in which ``clean`` shows it, and at the end of a text that
    was cut also in part.
    """
    # A password may equal one of these codes; the server's own code is then no secret.
    code, space, rest = text.partition(" ")
    if code not in _CODES:
        code, space, rest = "", "", text
    for shown in _forms(secrets):
        rest = rest.replace(shown, "***")
        head, ellipsis, tail = rest.rpartition("…")
        if ellipsis:
            part = next((n for n in range(len(shown) - 1, 0, -1) if head.endswith(shown[:n])), 0)
            rest = f"{head[: len(head) - part]}{'***' if part else ''}{ellipsis}{tail}"
    return code + space + rest


def _forms(secrets: Iterable[Hidden | None]) -> list[str]:
    """Return the forms in which a server may repeat secrets, the longest first.

    They are the text itself, as ``repr`` escapes it, and as a URL does.
    """
    forms: set[str] = set()
    for secret in secrets:
        text = "" if secret is None else secret.reveal()
        if text:
            given = text.encode(errors="surrogatepass")
            quoted = (quote(given), quote(given, safe=""), quote_plus(given))
            low = [re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), one) for one in quoted]
            forms.update(map(clean, (text, repr(text)[1:-1], *quoted, *low)))
    return sorted(forms, key=len, reverse=True)


def without(error: DscacheError, secrets: Iterable[Hidden | None]) -> DscacheError:
    """Return an error of a handshake without the secrets, and without the frames it went through.

    The locals of those frames hold the commands that were sent.
    """
    secrets = tuple(secrets)
    text = str(error)
    if isinstance(error, ReplyError):
        message = masked(error.message, secrets)
        if message != error.message:
            return type(error)(message)
    elif (shown := masked(text, secrets)) != text:
        return type(error)(shown)
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def checked(given: Iterable[Any]) -> Login:
    """Return the username and password that a provider has given; raises TypeError."""
    words = tuple(given)
    if len(words) not in (1, 2) or not all(type(word) is str for word in words):
        raise TypeError("it must return (password,) or (username, password)")
    return (None if len(words) == 1 else words[0]), Hidden(words[-1])


def provider_failed(error: Exception) -> ConnectError:
    """Return the error to raise for a provider that has raised ``error``."""
    return ConnectError(f"the credential provider failed: {type(error).__name__}")


class _Nothing:
    """An awaitable that does nothing."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


NOTHING: Final = _Nothing()
