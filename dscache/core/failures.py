"""Errors of operations, with the texts of both cores, and the meaning of error replies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from datetime import timedelta
from typing import Any, Final, NoReturn

from .._interruptions import raise_interruption
from .._seconds import whole_seconds
from ..errors import (
    BulkError,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    Overloaded,
    ProtocolError,
    RecordDamaged,
    RecordError,
    ReplyError,
    UsageError,
    shorten,
)
from . import constants as c
from .keys import NOTE_SUFFIX
from .markers import KEEP

# Errors that hiredis raises for invalid RESP, beside its own: for a member of a map or set that
# isn't hashable, and for invalid numbers. A signal handler may raise the same classes.
NO_RESP: Final = (TypeError, ValueError, ArithmeticError)
# Errors of a node that can't be reached; they say nothing about the record.
AWAY: Final = (ConnectError, ConnectionLost, DeadlineExceeded)
# Codes of errors that servers before Redis 7 report within another error.
_IN_SCRIPTS: Final = ("READONLY", "NOREPLICAS")
# An error reply names a refused command within so many characters, before any argument.
_NAMED: Final = 80
# The beginning of a refusal that names the user, whose name follows.
_OF_USER: Final = "NOPERM User "
# The first words of descriptions of operations.
_STEPS: Final = ("get", "head", "set", "delete", "read", "update")

ErrorOf = Callable[[str], Exception]
"""Makes an operation's error from its description: every waiter gets an error of its own."""


def copy_error(error: Exception) -> Exception:
    """Return a copy of an error, for another caller."""
    other = copy(error)
    other.__cause__ = error.__cause__
    return other


def closed(owner: str) -> UsageError:
    """Return the error for the use of an object that the program has closed."""
    return UsageError(f"the {owner} is closed; open another one")


def bad_name(name: object) -> RecordError:
    """Return the error for a name that can't be a record's name."""
    if not isinstance(name, str):
        why = f"a name must be a str, not {type(name).__name__}"
    elif not name:
        why = "a name must not be empty"
    else:
        why = "a name must be valid Unicode, and this one has a lone surrogate"
    return RecordError(f"record {shorten(name)}: {why}", name=name)


def check_prefix(operation: str, prefix: object) -> None:
    """Raise UsageError for a prefix of names that no name can begin with."""
    if not isinstance(prefix, str):
        raise UsageError(f"{operation}: prefix must be a str, not {shorten(prefix)}")
    if not prefix.isascii() and prefix.encode(errors="ignore").decode() != prefix:
        raise UsageError(
            f"{operation}: prefix {shorten(prefix)} has a lone surrogate, which no name may have"
        )


def bad_names(operation: str, names: object) -> RecordError:
    """Return the error for names that are one text, which would be read letter by letter."""
    name = names.decode(errors="replace") if isinstance(names, bytes) else names
    return RecordError(
        f"{operation} takes an iterable of names, not one {type(names).__name__}; "
        f"write {operation}([{shorten(name)}])"
    )


def check_iterable(operation: str, names: object, error: TypeError) -> None:
    """Raise RecordError if an operation raised ``error`` because its names are no iterable."""
    raise_interruption(error)
    if not (hasattr(type(names), "__iter__") or hasattr(type(names), "__getitem__")):
        raise RecordError(f"{operation} takes an iterable of names, not {shorten(names)}") from None


def bad_records(records: object) -> RecordError:
    """Return the error for a ``set_bulk`` of something that is no mapping."""
    return RecordError(
        f"set_bulk takes a mapping of name to (version, data), not {type(records).__name__}"
    )


def bad_pair(name: str, pair: object) -> RecordError:
    """Return the error for an item of ``set_bulk`` that is no (version, data)."""
    return RecordError(
        f"record {shorten(name)}: set_bulk takes (version, data) for each name, "
        f"not {shorten(pair)}",
        name=name,
    )


def bad_version(name: str, version: object) -> RecordError:
    """Return the error for a version that isn't an integer from 0 to 2^63-1."""
    return RecordError(
        f"record {shorten(name)}: version must be an int from 0 to {c.MAX_VERSION}, "
        f"not {shorten(version)}",
        name=name,
    )


def bad_if_newer(subject: str, if_newer: object) -> RecordError:
    """Return the error for an ``if_newer`` that is true, as any text is, and not True."""
    return RecordError(f"{subject}: if_newer must be True or False, not {shorten(if_newer)}")


def check_switch(operation: str, option: str, value: object) -> None:
    """Raise UsageError for an option that is true, as any text is, and not True."""
    if value and value != 1:
        raise UsageError(f"{operation}: {option} must be True or False, not {shorten(value)}")


def check_ttl(name: str, ttl: object, conditional: bool) -> int:
    """Return a ttl in whole seconds, or KEPT_TTL for ``KEEP``; raises RecordError.

    Only a conditional write can keep the lifetime of its record.
    """
    if ttl is KEEP and conditional:
        return c.KEPT_TTL
    seconds = ttl if type(ttl) is int else whole_seconds(ttl)
    if seconds is None or not 0 <= seconds <= c.MAX_TTL:
        raise RecordError(f"record {shorten(name)}: {_bad_ttl(ttl)}", name=name)
    return seconds


def bad_ttl(operation: str, ttl: object) -> RecordError:
    """Return the error for the ttl of an operation on many records."""
    return RecordError(f"{operation}: {_bad_ttl(ttl)}")


def _bad_ttl(ttl: object) -> str:
    remedy = ""
    if ttl == timedelta(0):
        remedy = "; write 0 for no lifetime"
    elif ttl is KEEP:
        remedy = "; update, or a set with if_newer or if_version, can keep a lifetime"
    return (
        f"ttl must be whole seconds from 1 to {c.MAX_TTL} as an int or a timedelta, 0 for none or "
        f"None for the configured default, not {shorten(ttl)}{remedy}"
    )


def overloaded(address: str, operations: int, size: int) -> Overloaded:
    """Return the error for an operation that a full pipeline refuses."""
    return Overloaded(
        f"{address}: {operations} operations and {size} bytes of writes are pending, which is "
        "all that maxPending and maxPendingBytes allow; the operation was not sent"
    )


def too_long(address: str, announced: int, limit: int, of_text: bool = False) -> ProtocolError:
    """Return the error for a text or array that is announced as longer than allowed."""
    return ProtocolError(
        f"{address} announced a reply of length {announced}, and {limit} is allowed"
        f"{' (maxReplyBytes)' if of_text else ''}"
    )


def too_deep(address: str) -> ProtocolError:
    """Return the error for arrays that are nested deeper than any reply of Redis."""
    return ProtocolError(f"{address} sent a reply of more than {c.MAX_DEPTH} nested arrays")


def empty_raw(name: str) -> RecordError:
    """Return the error for a ``msgspec.Raw`` without text."""
    return RecordError(f"record {shorten(name)}: data is an empty msgspec.Raw", name=name)


def keys_apart(name: str) -> RecordError:
    """Return the error for a write by script whose two keys may be on two servers of a proxy."""
    return RecordError(
        f"record {shorten(name)}: a proxy may keep its two keys on two servers, and no script "
        "writes both; set keyLayout: hashtag, or proxied: false if the proxy hides one server",
        name=name,
    )


def refuses(command: str, error: ReplyError) -> bool:
    """Return whether a server or proxy refuses a command to everybody or to this user.

    Redis and Valkey name the command, in the client's spelling if they don't know it; so do the
    proxies that refuse it by a reply. An error about a key or argument doesn't. The name of the
    user, which may be long or like a command's, doesn't count.
    """
    said = error.message
    if said.startswith(_OF_USER):
        said = said[len(_OF_USER) :].partition(" ")[2]
    return error.code in ("NOPERM", "ERR") and command in said[:_NAMED].lower()


def is_across_slots(message: str) -> bool:
    """Return whether an error reply says that a command has keys of several slots."""
    return message.startswith("CROSSSLOT") or "same slot" in message.lower()


def damaged_version(name: str, stored: bytes | None = None) -> RecordDamaged:
    """Return the error for a stored version that isn't an integer from 0 to 2^63-1."""
    found = f", but {shorten(stored)}" if stored is not None else ""
    return RecordDamaged(
        f"record {shorten(name)}: its stored version isn't an integer from 0 to {c.MAX_VERSION}"
        f"{found}; set or delete the record to repair it",
        name=name,
    )


# By the code of a server's error, or words in it. Redis names neither a remedy nor its own option.
_REMEDIES: Final = {
    "WRONGPASS": "check username and password",
    "NOAUTH": "set password, and username if the server has users",
    "NOPERM": "let ACL SETUSER give this user the command and the keys",
    "ACL failure in script": "let ACL SETUSER give this user the command",
    "OOM": "raise maxmemory of the server, or choose a maxmemory-policy that evicts",
    "MOVED": "it is a node of a cluster, so give nodes in place of host and port",
    "CROSSSLOT": (
        "give nodes in place of host and port if it is a node of a cluster, or set proxied: true "
        "if it is a proxy"
    ),
    "invalid bulk length": "write less data, or raise proto-max-bulk-len of the server",
    "DB index": (
        "choose a smaller db, or raise the server's number of databases, which is 16 by default"
    ),
}


def remedy_of(message: str) -> str:
    """Return what to do about a server's error, behind a semicolon, or an empty text."""
    for said, remedy in _REMEDIES.items():
        if message.startswith(said) or (" " in said and said in message):
            return f"; {remedy}"
    return ""


def bulk_failure(
    operation: str, errors: Mapping[str, Exception], total: int, result: object
) -> Exception:
    """Return the error of a bulk operation of ``total`` records, of which some failed.

    If Redis refused every single one, that is no partial failure but its refusal.
    """
    first = next(iter(errors.values()))
    if len(errors) == total and all(isinstance(error, ReplyError) for error in errors.values()):
        of_call(first, operation, next(iter(errors)))
        return first
    return BulkError(operation, errors, result)


def too_many_redirections(
    message: str, redirections: tuple[str, ...], moves: int, limit: int, context: str
) -> ReplyError:
    """Return the error of an operation that was sent to other nodes too often."""
    path = "; ".join(redirections)
    # As the context, of which nothing is left out.
    redirected = f"redirected {moves} times, and maxRedirections is {limit}: {path}"
    return ReplyError(message, context=f"{redirected}) ({context}")


def describe(kind: int, name: str) -> str:
    """Return an operation as error messages show it, such as ``get 'user/1'``."""
    if kind == c.PUBLISH:
        return f"send on topic {name[1 : name.index('}')]}"
    return f"{c.OPERATIONS[kind]} {shorten(name)}"


def of_call(error: Exception, call: str, name: str | None = None) -> None:
    """Let the error of an operation name the program's call, of which the operation was a step.

    ``call`` is such as ``update``, and ``name`` its record, or None of a bulk.
    """
    if not error.args or not isinstance(error.args[0], str) or not isinstance(name, str | None):
        return
    text = error.args[0]
    start = 0
    if isinstance(error, ReplyError):  # its context, which may begin with redirections
        start = text.find("(", len(error.message)) + 1
        if text.startswith("redirected ", start):
            start = text.rfind(") (") + len(") (")
    subjects = ["_bulk"]
    if name is not None:
        call = f"{call} {shorten(name)}"
        names = [shorten(one) for one in (name, name + NOTE_SUFFIX)]
        subjects += [f"{form} {one}" for one in names for form in ("", "_bulk")]
    for subject in subjects:
        for word in _STEPS:
            end = start + len(word) + len(subject)
            if text.startswith(word + subject, start) and text.startswith((": ", " at "), end):
                error.args = (text[:start] + call + text[end:], *error.args[1:])
                return


def _doubt_of(operation: str) -> str:
    """Return the end of an error text about a sent operation that may or may not have happened."""
    if operation.startswith("send "):
        return "; the message may have been delivered"
    return "; the write may have happened"


def _records(count: int) -> str:
    return f"{count} record" if count == 1 else f"{count} records"


def no_answer_in_time(address: str, timeout: float, in_flight: int, operation: str) -> Exception:
    """Return the error of an operation that was sent and not answered in time."""
    harmless = operation.startswith(("get", "head", "read"))
    written = "" if harmless else _doubt_of(operation)
    return DeadlineExceeded(
        f"{operation}: no answer from {address} within {timeout * 1000:.0f} ms "
        f"(sent; {_records(in_flight)} in flight){written}"
    )


def never_sent(
    address: str,
    timeout: float,
    in_flight: int,
    down: Exception | None,
    redirections: tuple[str, ...],
    operation: str,
) -> Exception:
    """Return the error of an operation that could not be sent in time, and now never will.

    ``down`` is the reason why there is no connection, or None if there is one. ``redirections``
    are the redirections on the way there.
    """
    limit = f"within {timeout * 1000:.0f} ms"
    if redirections:
        limit += f" (redirected: {'; '.join(redirections)})"
    error: Exception
    if isinstance(down, ReplyError):
        error = ReplyError(down.message, context=f"{operation} at {address}, {limit}")
    elif down is not None:
        said = f"{operation}: no connection to {address} {limit}: {down}"
        # Of a message it is one kind of error, which says whether it was sent.
        is_message = operation.startswith("send ")
        error = ConnectionLost(f"{said}; it was not sent") if is_message else ConnectError(said)
    else:
        error = DeadlineExceeded(
            f"{operation}: not sent to {address} {limit} "
            f"({_records(in_flight)} in flight before it); nothing was done"
        )
    error.__cause__ = down
    return error


def refused_in_time(address: str, timeout: float, words: str, operation: str) -> Exception:
    """Return the error of an operation that the server has refused until its deadline."""
    context = f"{operation} at {address}, within {timeout * 1000:.0f} ms"
    return ReplyError(words, context=context)


def code_of(error: ReplyError) -> str:
    """Return the code of an error reply, or of the error within it.

    Before Redis 7, an error in a script is reported within another one.
    """
    if error.code == "ERR":
        for code in _IN_SCRIPTS:
            if f"-{code} " in error.message:
                return code
    return error.code


def not_sent_again(
    address: str, timeout: float, down: Exception | None, operation: str
) -> Exception:
    """Return the error of a write that was sent, and in time neither answered nor sent again."""
    limit = f"within {timeout * 1000:.0f} ms"
    error: Exception
    if down is not None:
        error = ConnectionLost(
            f"{operation}: connection to {address} lost, and no other {limit}: {down}"
            f"{_doubt_of(operation)}"
        )
    else:
        error = DeadlineExceeded(
            f"{operation}: no answer from {address} {limit} (sent in part, or on a connection "
            f"that was lost){_doubt_of(operation)}"
        )
    error.__cause__ = down
    return error


def in_doubt(error_of: ErrorOf, operation: str) -> Exception:
    """Return the error of a write that was sent, in place of one that says nothing of that."""
    said = error_of(operation)
    error = ConnectionLost(f"{said}{_doubt_of(operation)}")
    error.__cause__ = said
    return error


def raise_invalid_resp(address: str, error: Exception) -> NoReturn:
    """Raise the error for bytes that hiredis refuses with its own error or one of ``NO_RESP``.

    An error that a signal handler has raised while hiredis was called is raised as it is. It has a
    frame of Python below that of the call, and an error of hiredis has none.
    """
    if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
        raise error
    raise invalid_reply(address, error) from error


def invalid_reply(address: str, why: object) -> ProtocolError:
    """Return the error for bytes that are no RESP."""
    return ProtocolError(f"{address} sent no valid reply: {why}")


def is_push(push: list[Any]) -> bool:
    """Return whether a push begins with its kind, as each does.

    An array with one wrong bit looks like a push, and all replies behind it would be others'.
    """
    return bool(push) and type(push[0]) is bytes and push[0][:1].isalpha()


def no_push(address: str, push: list[Any]) -> ProtocolError:
    """Return the error for a push that has no kind."""
    return ProtocolError(f"{address} sent a push without a kind: {shorten(push)}")


def untold(address: str, operation: str) -> Exception:
    """Return the error of a repeat that can't tell whether its first attempt was done."""
    return ConnectionLost(
        f"{operation}: the connection to {address} was lost while it was under way, and what is "
        f"stored now doesn't tell whether it was done{_doubt_of(operation)}"
    )


def stray_reply(address: str, reply: object) -> ProtocolError:
    """Return the error for a reply that no operation waits for.

    Its texts are not shown: they may be a password that the server repeats, or others' data.
    """
    shown = shorten(reply)
    if isinstance(reply, bytes):
        shown = f"a text of {len(reply)} bytes"
    elif isinstance(reply, (list, dict, set)):
        shown = f"{len(reply)} elements"
    return ProtocolError(f"{address} sent a reply that no operation waits for: {shown}")


class EndedHere(ConnectionLost):
    """The connection ended by a decision of this side, for no fault of the operations under way."""


def cut_again(address: str, reason: Exception, kind: int, operation: str) -> Exception:
    """Return the error of an operation during which the server has cut every connection."""
    written = _doubt_of(operation) if c.is_write(kind) else ""
    return ConnectionLost(
        f"{operation}: {address} has cut the connection {c.FATAL_LOSSES} times while it was under "
        f"way, the last time while nothing else was: {reason} (it may exceed a limit of the "
        f"server, such as client-query-buffer-limit or client-output-buffer-limit){written}"
    )


def lost(address: str, reason: Exception, kind: int, operation: str) -> Exception:
    """Return the error of an operation whose connection ended before the answer.

    ``reason`` is a ProtocolError if dscache ended it, else the error that ended it.
    """
    written = _doubt_of(operation) if c.is_write(kind) else ""
    if isinstance(reason, ProtocolError):
        return ProtocolError(f"{operation}: {reason}{written}")
    return ConnectionLost(f"{operation}: connection to {address} lost: {reason}{written}")
