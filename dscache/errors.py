"""Every error that dscache raises, in one tree.

DscacheError
├── ConfigError        bad configuration; names the place, the value and the remedy
├── UsageError         use that can't work: closed, another event loop, a forked child
├── RecordError        bad name, version, ttl or data; names the record
│   └── RecordDamaged  stored value that isn't a record, or doesn't fit the type
├── RecordMissing      update of a record that doesn't exist, without a default
├── MessageError       bad topic, message or addressee
├── BulkError          some records of a bulk failed; has the results of the others
├── LoadError          the load of a fetch failed; has its exception as the cause
├── RPCError           a remote procedure call failed; has the reason and the provider's data
│   └── RPCTimeout     no acceptance or response in time
├── ConnectError       no connection; nothing was sent
├── ConnectionLost     connection lost, or the cache closed, before the reply
├── DeadlineExceeded   no reply within commandTimeout
├── Overloaded         a bounded queue is full; nothing was sent
├── ReplyError         error reply of Redis; ``code`` is its first word
└── ProtocolError      invalid reply; the connection was closed

The errors down to RPCTimeout come from the caller, the data, a load or a provider. The next four
come from the way to the server, and the last two from the server. No text contains a password.
Every error can be pickled and copied.
"""

from __future__ import annotations

import copy
import errno
import pickle
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, Self, TypeVar

from ._interruptions import raise_interruption

_Error = TypeVar("_Error", bound="DscacheError")


class DscacheError(Exception):
    """Base of every error that dscache raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Unpickling skips the constructors, because their arguments differ from ``args``. A
        # private class may move to another module; its public base doesn't.
        kind = next(
            one
            for one in type(self).__mro__
            if one.__module__ == __name__ or one.__module__.partition(".")[0] != __package__
        )
        state = {name: _portable(value) for name, value in vars(self).items()}
        # Pickled separately: a cause that can't be pickled or unpickled is left out.
        state["__cause__"] = _pickled(self.__cause__)
        # After the cause, as setting that sets this too.
        state["__suppress_context__"] = self.__suppress_context__
        return (_empty, (kind, *self.args), state)

    def __setstate__(self, state: dict[str, Any] | None) -> None:
        state = state or {}
        cause = state.get("__cause__")
        super().__setstate__({**state, "__cause__": cause and pickle.loads(cause)})

    def __copy__(self) -> Self:
        copied = _empty(type(self), *self.args)
        vars(copied).update(vars(self))
        copied.__cause__ = self.__cause__
        copied.__suppress_context__ = self.__suppress_context__
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = copy.copy(self)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        with suppress(Exception):  # another library's exception may raise anything
            copied.__cause__ = copy.deepcopy(self.__cause__, memo)
        copied.__suppress_context__ = self.__suppress_context__
        return copied


def _empty(kind: type[_Error], *args: Any) -> _Error:
    """Return an error with its arguments alone. Pickles refer to this function by name."""
    return kind.__new__(kind, *args)


def _pickled(value: object) -> bytes | None:
    """Return a pickle of a value, or None if it can't be pickled or unpickled."""
    with suppress(Exception):  # another library's type may raise anything
        text = pickle.dumps(value)
        pickle.loads(text)
        return text
    return None


def _portable(value: object) -> object:
    """Return the value if it can be pickled, or its shortened ``repr``."""
    return value if _pickled(value) else shorten(value)


class ConfigError(DscacheError):
    """Bad configuration; the text names the place, the value and the remedy."""


class UsageError(DscacheError, RuntimeError):
    """Use of a cache, message node or peer that can't work, such as after its close."""


class RecordError(DscacheError, ValueError):
    """Bad name, version, ttl or data of a record.

    ``name`` is the record's name as the caller passed it, of any type.
    """

    def __init__(self, message: str, *, name: object = None) -> None:
        super().__init__(message)
        self.name = name


class RecordDamaged(RecordError):
    """Stored value that isn't a record, or doesn't fit the type that the caller requests.

    ``name`` is the record's name.
    """


class RecordMissing(DscacheError, KeyError):
    """Update of a record that doesn't exist, without a default.

    ``name`` is the record's name.
    """

    def __init__(self, message: str, *, name: object = None) -> None:
        super().__init__(message)
        self.name = name

    __str__ = Exception.__str__  # a KeyError's text is in quotes


class MessageError(DscacheError, ValueError):
    """Bad topic, data or addressee of a message, or a received message that isn't JSON."""


class BulkError(DscacheError):
    """Failure of some records of a bulk operation.

    ``errors`` is a dict that maps the names of the failed records to their exceptions. ``result``
    is the result of the operation for all other records.
    """

    def __init__(self, operation: str, errors: Mapping[str, Exception], result: Any) -> None:
        name, error = next(iter(errors.items()))
        more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
        super().__init__(
            f"{operation}: {len(errors)} of the records failed ({shorten(name)}{more}): {error}; "
            "the result of the others is in .result"
        )
        self.errors = dict(errors)
        self.result = result


class LoadError(DscacheError):
    """Failure of the load of a missing record.

    The load failed just now, or a moment ago in any process, or two loads wait for each other.
    ``name`` is the record's name. ``__cause__`` is the exception of the load, or None if there is
    none.
    """

    def __init__(self, message: str, *, name: object = None) -> None:
        super().__init__(message)
        self.name = name


class RPCError(DscacheError):
    """Failure of a remote procedure call among deepstream's servers.

    ``reason`` is CLOSED if the peer was closed, or else deepstream's word: NO_RPC_PROVIDER,
    REQUEST_ERROR, ACCEPT_TIMEOUT or RESPONSE_TIMEOUT. ``data`` is the error that the provider sent,
    or None. A handler of ``peer.rpc`` that raises this error sends its ``data``.
    """

    def __init__(self, message: str, *, reason: str = "REQUEST_ERROR", data: Any = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.data = data


class RPCTimeout(RPCError, TimeoutError):
    """No acceptance or response of a remote procedure call in time.

    ``reason`` is ACCEPT_TIMEOUT or RESPONSE_TIMEOUT.
    """

    def __new__(cls, *args: Any, **_: Any) -> Self:
        # An OSError whose class has an ``__init__`` alone would have no args until that is called.
        return super().__new__(cls, *args)


class ConnectError(DscacheError, ConnectionError):
    """No connection to the server; the operation was not sent."""


class ConnectionLost(DscacheError, ConnectionError):
    """Connection lost, or the cache closed, before the reply.

    The text says so if a write or message may have arrived.
    """


class DeadlineExceeded(DscacheError, TimeoutError):
    """No reply within ``commandTimeout``, in milliseconds from the call.

    The text says so if a write may have happened. An operation that wasn't sent by then is never
    sent.
    """


class Overloaded(DscacheError):
    """A bounded queue is full, and ``whenFull`` or ``overflow`` lets nothing wait.

    An operation that raises it was not sent.
    """


class ReplyError(DscacheError):
    """Error reply of Redis.

    ``code`` is its first word, a str: ``OOM``, ``READONLY``, ``NOAUTH``, ``WRONGTYPE`` and the
    like. ``message`` is its text: at most 500 characters, without control characters, and without
    the command's arguments, which may contain a password.
    """

    def __init__(self, message: str, *, context: str = "") -> None:
        message = clean(message)
        super().__init__(f"{message} ({context})" if context else message)
        self.message = message
        self.code = message.split(" ", 1)[0]


class ProtocolError(DscacheError):
    """Invalid reply; the connection was closed at once."""


MAX_TEXT: Final = 500
# A command's arguments, as servers and proxies repeat them: behind words that announce them, or
# behind the name of a command that they don't know or allow. Kept are the groups, and the length
# of a text that was cut.
_REPEATED: Final = re.compile(
    r"""
    (?: [\s,;.(]* \b (?:with\s+|and\s+)? (?:the\s+)? (?:args?|arguments?|param(?:eter)?s?|argv)
        \s+ (?:that\s+|which\s+)? (?:begin|start)
    | (\b (?:args?|arguments|params|parameters|argv)) \s* [:=]
    | (\b (?:unknown?|unsupported|not\ supported|unrecogni[sz]ed|unimplemented|invalid|disabled
            |illegal|forbidden|denied|bad|no\ such)
        \s+ (?:redis\s+)? (?:command|cmd|request) s? \b \s* :? \s*)
        (?: (['"`]) ([\w.|-]{,40}) | ((?-i:[A-Z]{2}[A-Z.|_]{,30})) \b)
    )
    .*? (?= (?:…\ \(\d+\ characters\))? \Z)
    """,
    re.DOTALL | re.IGNORECASE | re.VERBOSE,
)
# Each match of the above has one of these words.
_TELLTALE: Final = re.compile("arg|param|command|cmd|request", re.IGNORECASE)


def clean(text: str) -> str:
    """Return a server's text in a form that is safe to show: one line of at most 500 characters.

    Control characters, and characters that change the direction of text, are escaped. The
    command's arguments are cut off, as they may contain a password or a record's data. A clean
    text is returned unchanged.
    """
    if len(text) > MAX_TEXT:
        ending = f"… ({len(text)} characters)"
        text = _printable(_unrepeated(text[:MAX_TEXT]))[: MAX_TEXT - len(ending)] + ending
    elif _TELLTALE.search(text) or not text.isprintable():
        text = _printable(_unrepeated(text))
        if len(text) > MAX_TEXT:
            text = text[: MAX_TEXT - 1] + "…"
    return text


def _unrepeated(text: str) -> str:
    """Return a server's text without the arguments that it repeats."""

    def kept(found: re.Match[str]) -> str:
        announced, refused, quote, quoted, name = (group or "" for group in found.groups())
        return f"{announced}{refused}{quote}{quoted}{quote}{name}"

    return _REPEATED.sub(kept, text)


def _printable(text: str) -> str:
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


def shorten(value: object, limit: int = 80) -> str:
    """Return the ``repr`` of a value, cut to about ``limit`` characters."""
    try:
        text = repr(value[: limit + 1]) if isinstance(value, (str, bytes)) else repr(value)
    except Exception as error:  # nested too deeply, or raised by the caller's own type
        raise_interruption(error)
        text = f"a {type(value).__name__} that can't be shown ({type(error).__name__})"
    return text if len(text) <= limit + 2 else f"{text[:limit]}…"


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reason_of(error: OSError) -> str:
    """Return why a file or stream can't be written, and for a full disk the remedy."""
    reason = str(error.strerror or error)
    return f"{reason}; make room, or write elsewhere" if error.errno in _FULL else reason
