"""Logins, sans-IO: passwords that are never shown, and the answers of credential providers.

A provider is redis-py's ``CredentialProvider``; a streaming one also announces renewals. Errors of
a provider are shown by their type alone: their text may hold a token.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Generator, Iterable, Iterator
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING, Any, Final

from ..config import Options
from ..errors import ConfigError, ConnectError, DscacheError, ReplyError, clean
from .foreign_errors import is_of_handler

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

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

# Texts of Redis that repeat nothing. If a password were one of their words, its mask would give it
# away.
_FIXED: Final = frozenset(
    (
        "NOAUTH Authentication required.",
        "WRONGPASS invalid username-password pair or user is disabled.",
        "ERR invalid password",
        "ERR Client sent AUTH, but no password is set",
        "ERR AUTH <password> called without any password configured for the default user. "
        "Are you sure your configuration is correct?",
        "ERR max number of clients reached",
    )
)
# Secrets of fewer characters are looked for as words.
_SHORT: Final = 4
# A part of so many characters gives a secret away, also in the middle of a text.
_TELLING: Final = 8
# Ends of a text or an argument that was cut off.
_CUT: Final = re.compile(r"$|['\"`]|\.\.")
# The end of a text that ``clean`` has cut, maybe in the middle of an escape.
_CLEANED: Final = re.compile(r"(?:[\\%&]\w{,9})?…")
_NAMED: Final = {"\a": r"\a", "\b": r"\b", "\f": r"\f", "\v": r"\v", "\0": r"\0"}


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


# The number of a provider's latest tokens that no text may show.
_MAX_GIVEN: Final = 4

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
            text, waiter = pipeline.command(
                *[word.reveal() if isinstance(word, Hidden) else word for word in command]
            )
            waiters.append(waiter)
            yield text

    return b"".join(texts())


def masked(text: str, secrets: Iterable[Hidden | None]) -> str:
    """Return a server's text with ``***`` for each secret that the server repeats.

    A secret is found in each escaped or encoded form that servers and proxies use, and in part if
    the server has cut it off. One of fewer than four characters is found only as a whole word:
    ``***`` in the middle of a word would give it away.
    """
    if text in _FIXED:
        return text
    # A password may equal one of these codes; the server's own code is then no secret.
    code, space, rest = text.partition(" ")
    if code not in _CODES:
        code, space, rest = "", "", text
    given = [one.reveal()[: len(rest) + 1] for one in secrets if one is not None]
    patterns = [[_spellings(char) for char in one] for one in dict.fromkeys(given)]
    for one in dict.fromkeys(given):
        patterns += _encodings(one)
    shown = []
    at = 0
    while at < len(rest):
        end = max((_end_of_secret(rest, at, one) for one in patterns), default=at)
        shown.append("***" if end > at else rest[at])
        at = max(end, at + 1)
    return code + space + "".join(shown)


def _end_of_secret(text: str, start: int, pattern: list[frozenset[str]]) -> int:
    """Return the end of the secret that a text has at ``start``, or ``start`` if it has none there.

    ``pattern`` has the spellings of each character of the secret.
    """
    ends = {start}
    count = 0
    for spellings in pattern:
        after = {end + len(one) for end in ends for one in spellings if text.startswith(one, end)}
        if not after:
            break
        ends = after
        count += 1
    end = max(ends)
    if end == start:
        return start
    is_whole = count == len(pattern)
    if is_whole or count < _TELLING:
        following = text[end:]
        is_cut = _CLEANED.match(following) or (count >= _SHORT and _CUT.match(following))
        if not (is_whole or is_cut):
            return start
        before = text[start - 1 : start]
        is_word = not (before.isalnum() or following[:1].isalnum())
        return end if is_word or len(pattern) >= _SHORT else start
    return end


@lru_cache(2048)
def _spellings(char: str) -> frozenset[str]:
    """Return the ways in which servers and proxies show a character of an argument.

    They are the character itself, the escapes of C, Redis, JSON, URLs and HTML, and the characters
    that stand for one that is not shown.
    """
    given = char.encode(errors="surrogatepass")
    units = char.encode("utf-16-be", "surrogatepass")
    code = ord(char)
    hexes = [f"{byte:02x}" for byte in given]
    pairs = [units[at : at + 2].hex() for at in range(0, len(units), 2)]
    forms = {
        *(char, char.lower(), char.upper(), escape(char), f"&#{code};"),
        *("".join(f"{mark}{one}" for one in hexes) for mark in ("\\x", "%")),
        *("".join(f"{mark}{one.upper()}" for one in hexes) for mark in ("\\x", "%")),
        *("".join(f"\\u{one}" for one in pairs), "".join(f"\\u{one.upper()}" for one in pairs)),
        *(f"\\U{code:08x}", f"\\u{{{code:x}}}", f"&#x{code:x};", f"\\x{code:02x}"),
        "".join(f"\\{byte:03o}" for byte in given),
    }
    if not (char.isascii() and char.isalnum()):
        forms |= {f"\\{char}", char * 2, "\ufffd", "\ufffd" * len(given), given.decode("latin-1")}
        forms |= {char.encode("unicode_escape", "surrogatepass").decode(), _NAMED.get(char, char)}
    if not char.isascii():
        forms.add("?")
    if char.isspace():
        forms.add("+")
    if not char.isprintable():
        forms.add(" ")
    return frozenset((*forms, *map(clean, forms)))


def _encodings(secret: str) -> Iterator[list[frozenset[str]]]:
    """Yield patterns of a secret in hexadecimal digits and in Base64.

    A login may be encoded as one text, so that the secret begins at any of three places in a group
    of Base64. The characters that the secret shares with its neighbours are left out.
    """
    given = secret.encode(errors="surrogatepass")
    if len(given) < _SHORT:
        return
    yield [frozenset((digit, digit.upper())) for digit in given.hex()]
    for before, shared in enumerate((0, 2, 3)):
        text = b64encode(bytes(before) + given).decode()
        whole = text[shared : (before + len(given)) * 8 // 6]
        yield [frozenset((char, {"+": "-", "/": "_"}.get(char, char))) for char in whole]


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


class Logins:
    """The logins of one cache: of the options, or of a provider. Any thread may use it."""

    def __init__(self, provider: CredentialProvider | None) -> None:
        self.provider = provider
        self.given = Tokens()

    def current(self, options: Options) -> Login:
        """Return the username and password to log in with now.

        Raises ConnectError if the provider, which is a blocking one, fails.
        """
        if self.provider is None:
            return login_of(options)
        try:
            return self.given.login(self.provider.get_credentials())
        except Exception as error:  # whatever the provider raises, the next attempt may succeed
            failure = provider_failed(error)
        # Raised here, without the text and the frames of the provider's: both may hold a token.
        raise failure


class Tokens:
    """The latest passwords of a provider: a server may repeat one that it was given earlier."""

    def __init__(self) -> None:
        # Assigned as a whole, since another thread may be reading them.
        self._latest: tuple[Hidden | None, ...] = ()

    def __iter__(self) -> Iterator[Hidden | None]:
        return iter(self._latest)

    def note(self, token: Hidden | None) -> None:
        """Add a token, in place of the oldest one."""
        if token not in self._latest:
            self._latest = (*self._latest[1 - _MAX_GIVEN :], token)

    def login(self, given: Iterable[Any]) -> Login:
        """Return the username and password that a provider has given; raises TypeError."""
        words = tuple(given)
        if len(words) not in (1, 2) or not all(type(word) is str for word in words):
            raise TypeError("it must return (password,) or (username, password)")
        secret = Hidden(words[-1])
        self.note(secret)
        return (None if len(words) == 1 else words[0]), secret


def login_of(options: Options) -> Login:
    """Return the username and password of the options."""
    return options.username, hidden(options.password)


def check_provider(provider: object) -> None:
    """Raise ConfigError for credentials that are no provider. It may be a password: not shown."""
    if provider is None:
        return
    if isinstance(provider, type) and hasattr(provider, "get_credentials"):
        raise ConfigError(
            f"credentials must be a redis.CredentialProvider, not the class {provider.__name__}; "
            f"write {provider.__name__}(...)"
        )
    if not callable(getattr(provider, "get_credentials", None)):
        remedy = "a fixed login is username=... and password=..."
        if isinstance(provider, int):
            remedy = "a port is part of the source, as in localhost:6379"
        raise ConfigError(
            f"credentials must be a redis.CredentialProvider, not {type(provider).__name__}; "
            f"{remedy}"
        )


def provider_failed(error: Exception) -> ConnectError:
    """Return the error to raise for an exception of a provider; raises one of a signal handler."""
    if is_of_handler(error):
        raise error
    return ConnectError(f"the credential provider failed: {type(error).__name__}")


class _Nothing:
    """An awaitable that does nothing."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


NOTHING: Final = _Nothing()
