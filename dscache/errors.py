"""Every error that dscache raises, in one tree.

DscacheError
├── ConfigError        the configuration is wrong; names the place, the value and the remedy
├── UsageError         the cache is used in a way it can't serve: another loop, a forked child
├── RecordError        a name, version, ttl or JSON text is bad; names the record
├── MessageError       a topic or message is bad, or a server's name
├── BulkError          some records of a bulk failed; has the result of all the others
├── ConnectError       no connection could be made; nothing was sent
├── ConnectionLost     the connection ended before the answer came
├── DeadlineExceeded   no answer within commandTimeout
├── Overloaded         a bounded queue is full
├── ReplyError         Redis said no; ``code`` is the first word of what it said
└── ProtocolError      what arrived is not what Redis would send

The first five blame the caller or the data, the next four the way to the server, the last
two the server. No message ever holds a password. Each can be pickled and copied.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Mapping
from typing import Any, Final, Self, TypeVar

_CAUSE: Final = "__cause__"
_SUPPRESSED: Final = "__suppress_context__"

_Error = TypeVar("_Error", bound="DscacheError")


class DscacheError(Exception):
    """Base of every error that dscache raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the constructors, whose arguments are not those of the exception. A class that
        # dscache keeps for itself may move; its public base does not.
        kind = next(
            one
            for one in type(self).__mro__
            if one.__module__ == __name__ or one.__module__.partition(".")[0] != __package__
        )
        state = {name: _portable(value) for name, value in vars(self).items()}
        # As bytes, so that a cause which can't be pickled, or not be read again, is left out.
        state[_CAUSE] = _pickled(self.__cause__)
        state[_SUPPRESSED] = self.__suppress_context__
        return (_empty, (kind, *self.args), state)

    def __setstate__(self, state: dict[str, Any] | None) -> None:
        state = dict(state or {})
        cause = state.pop(_CAUSE, None)
        if cause is not None:
            self.__cause__ = pickle.loads(cause)
        self.__suppress_context__ = state.pop(_SUPPRESSED, False)
        vars(self).update(state)

    def __copy__(self) -> Self:
        return self._filled(vars(self), self.__cause__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = self._filled({}, None)
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        try:
            copied.__cause__ = copy.deepcopy(self.__cause__, memo)
        except Exception:  # of another library, it may refuse in any way
            copied.__cause__ = self.__cause__
        copied.__suppress_context__ = self.__suppress_context__
        return copied

    def _filled(self, state: dict[str, Any], cause: BaseException | None) -> Self:
        made = _empty(type(self), *self.args)
        vars(made).update(state)
        made.__cause__ = cause
        made.__suppress_context__ = self.__suppress_context__
        return made


def _empty(kind: type[_Error], *args: Any) -> _Error:
    """Return an error with its text alone. Pickles name this function: it stays here."""
    return kind.__new__(kind, *args)


def _pickled(value: object) -> bytes | None:
    """Return a pickle of a value, or None if there is none that can be read again."""
    if value is None:
        return None
    try:
        text = pickle.dumps(value)
        pickle.loads(text)
    except Exception:  # whatever another's type raises
        return None
    return text


def _portable(value: object) -> object:
    """Return a value that can be pickled: the same, or else how it is shown."""
    if type(value) in (str, bytes, int, float, bool, type(None)):
        return value
    return value if _pickled(value) else shorten(value)


class ConfigError(DscacheError):
    """The configuration is wrong: the message names the place, the value and the remedy."""


class UsageError(DscacheError, RuntimeError):
    """The cache is used in a way that it can't serve, such as from another event loop."""


class RecordError(DscacheError, ValueError):
    """A record's name, version, ttl or JSON text is bad.

    ``name`` is the record's name as it was given, which may be of any type.
    """

    def __init__(self, message: str, *, name: object = None) -> None:
        super().__init__(message)
        self.name = name


class MessageError(DscacheError, ValueError):
    """A message's topic, JSON text or addressee is bad."""


class BulkError(DscacheError):
    """Some records of a bulk operation failed; the others' outcome is in ``result``.

    ``errors`` maps the name of each failed record to its error. ``result`` is what the call
    would have returned for all the other records.
    """

    def __init__(self, operation: str, errors: Mapping[str, Exception], result: Any) -> None:
        name, error = next(iter(errors.items()))
        more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
        super().__init__(
            f"{operation}: {len(errors)} of the records failed ({shorten(name)}{more}): {error}; "
            "the others' result is in .result"
        )
        self.errors = dict(errors)
        self.result = result


class ConnectError(DscacheError, ConnectionError):
    """No connection could be made; the operation was not sent."""


class ConnectionLost(DscacheError, ConnectionError):
    """The connection ended before the answer came, or the cache is closed."""


class DeadlineExceeded(DscacheError, TimeoutError):
    """The answer did not come within ``commandTimeout``."""


class Overloaded(DscacheError):
    """A bounded queue is full; the operation was not sent."""


class ReplyError(DscacheError):
    """Redis answered with an error.

    ``code`` is its first word (``OOM``, ``READONLY``, ``NOAUTH``, ``WRONGTYPE``, ...). ``message``
    is what it said: at most 500 characters, without control characters, and without the arguments
    that it may repeat, of which one may be a password.
    """

    def __init__(self, message: str, *, context: str = "") -> None:
        message = clean(message)
        super().__init__(f"{message} ({context})" if context else message)
        self.message = message
        self.code = message.split(" ", 1)[0]


class ProtocolError(DscacheError):
    """What arrived is not what Redis would send; the connection was closed at once."""


MAX_SAID: Final = 500
_REPEATED: Final = re.compile(r",? *with args beginning with:.*", re.DOTALL | re.IGNORECASE)


def clean(text: str) -> str:
    """Return what a server said as errors, logs and terminals may show it: short and in one line.

    Control characters, and those that change the direction of text, are escaped. Arguments that
    it repeats are left out: a password may be among them, or a record's data. What is clean stays
    as it is.
    """
    if len(text) > MAX_SAID:
        told = f"… ({len(text)} characters)"
        text = _printable(_REPEATED.sub("", text[:MAX_SAID]))[: MAX_SAID - len(told)] + told
    elif " args beginning " in text.lower() or not text.isprintable():
        text = _printable(_REPEATED.sub("", text))
        if len(text) > MAX_SAID:
            text = text[: MAX_SAID - 1] + "…"
    return text


def _printable(text: str) -> str:
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


def shorten(value: object, limit: int = 80) -> str:
    """Return the ``repr`` of a name or value, cut to about ``limit`` characters."""
    try:
        text = repr(value[: limit + 1]) if isinstance(value, (str, bytes)) else repr(value)
    except Exception as error:  # nested too deeply, or what a caller's own type raises
        text = f"a {type(value).__name__} that can't be shown ({type(error).__name__})"
    return text if len(text) <= limit + 2 else f"{text[:limit]}…"
