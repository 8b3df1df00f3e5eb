"""Constants, scripts and error texts that both cores share, and their code off the hot path.

The twins ``_fast`` and ``core.pure`` import this module and nothing of each other, so that no
constant and no error text stands twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from copy import copy
from functools import lru_cache
from typing import Any, Final, NoReturn, Protocol

import hiredis
import msgspec

# Re-exported, so that both cores find every constant in this module.
from .._limits import MAX_PENDING as MAX_PENDING
from .._limits import MAX_PENDING_BYTES as MAX_PENDING_BYTES
from .._limits import MAX_REPLY_BYTES as MAX_REPLY_BYTES
from .._limits import MAX_TTL as MAX_TTL
from .._limits import NEAR_BYTES as NEAR_BYTES
from .._limits import NEAR_RECORDS as NEAR_RECORDS
from ..errors import (
    BulkError,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    Overloaded,
    ProtocolError,
    RecordError,
    ReplyError,
    shorten,
)
from . import tolerant_json
from .models import decode_model, encode_model, is_model

VERSION_SUFFIX: Final = b"_v"
DATA_SUFFIX: Final = b"_d"

# Under the key layout "hashtag" a record's keys are {<name>}_v and {<name>}_d. A name that
# begins with "}" would make the tag empty, and its two keys would lie in different slots: its
# keys start with "}" instead, which no other key of the layout does, and share one fixed tag.
TAG_OPEN: Final = b"{"
TAG_CLOSE: Final = b"}"
TAG_FOR_BRACE: Final = b"}{0}"

MAX_VERSION: Final = 2**63 - 1
# Of the name of a host, in characters.
MAX_HOST: Final = 255

# Records in one MGET or MSET, and about as many in one write to the socket, so that the server has
# begun, and answers come, while the next are encoded and those before are parsed. Bulks of 1000 and
# of 20,000 take 0.90 to 0.95 of the time that they took with 512 and all of it in one write, and
# 1000 reads of one tick 0.90. With 128 it is the same. The cost per record hardly depends on it,
# while the server answers no other client until the command is done.
COMMAND_RECORDS: Final = 256
FLUSH_RECORDS: Final = 256
# Records of one tick with which the server may begin before the tick is over, if it has nothing
# else to do. Else it and the client take turns: with 100 tasks on uvloop, a read took 3.05 us in
# place of 3.72, and a write 4.2 in place of 5.4. With 48 it was the same, with 16 a read took 3.55.
EARLY_RECORDS: Final = 32
# A script costs the server three to ten times as much per record.
SCRIPT_RECORDS: Final = 128
# Text in one write command; also what one flush hands to the transport before it looks up.
COMMAND_BYTES: Final = 1024 * 1024
# Records sent and not yet answered. At three million records a second it covers a round trip
# of 5 ms, and it bounds what a bulk of any size has under way.
WINDOW_RECORDS: Final = 16_384
# An operation during which the server has cut the connection so often is a suspect, which is sent
# alone; and if it is cut so often, it fails.
SUSPECT_LOSSES: Final = 2
FATAL_LOSSES: Final = 3
READ_BUFFER_BYTES: Final = 256 * 1024
# Elements that one reply may announce, in all its incomplete arrays together: hiredis allocates
# room for each when it is announced. The longest reply needed has 1024, and an invalidation of
# many keys some thousands. MAX_DEPTH limits the nesting of arrays; CLUSTER SLOTS needs four levels.
MAX_ELEMENTS: Final = 2**20
MAX_DEPTH: Final = 32
# A length has at most 19 digits; a longer header has no length.
HEADER_BYTES: Final = 64
# Errors that hiredis raises for invalid RESP. The last ones are for a member of a map or set that
# isn't hashable, and for invalid numbers. A signal handler may raise the same classes.
NO_RESP: Final = (hiredis.HiredisError, TypeError, ValueError, ArithmeticError)
# Number of names with a fence, which marks their last write. A fence matters only to reads in
# flight that are older. At the limit, such reads are merely not cached.
NEAR_FENCES: Final = 4096
# The longest bulk read whose names later reads may join. It costs the bulk 0.3 µs for each name,
# too much for a longer one.
NEAR_SHARED: Final = 1024

# The kinds of batch. Those below SET read and may be repeated at will.
GET: Final = 0
HEAD: Final = 1
SET: Final = 2
SET_TTL: Final = 3
SET_IF_NEWER: Final = 4  # any write with a condition
DELETE_IF: Final = 5
DELETE: Final = 6
COMMAND: Final = 7
# One key of a record whose two keys lie on different nodes.
READ_KEY: Final = 8
WRITE_KEY: Final = 9
# A message. Its name is {<topic>}<number>: no two are the same, and its slot is its channel's.
PUBLISH: Final = 10
OPERATIONS: Final = (
    *("get", "head", "set", "set", "set", "delete", "delete"),
    *("command", "read", "write", "send"),
)

# Errors of a node that can't be reached; they say nothing about the record.
AWAY: Final = (ConnectError, ConnectionLost, DeadlineExceeded)

# Upper bounds of the latency buckets, in seconds; one more bucket has the longer ones.
LATENCY_BOUNDS: Final = (
    *(0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)
# The operations with latencies, in the order of the rows that count them.
TIMED: Final = (
    *("get", "head", "set", "delete"),
    *("get_bulk", "head_bulk", "set_bulk", "delete_bulk"),
)

MAX_REDIRECTIONS: Final = 16
# The slots of a cluster: CRC16 of a key's hash tag, in 14 bits.
SLOTS: Final = 16384
ASKING: Final = b"*1\r\n$6\r\nASKING\r\n"
# Error codes of a cluster's node that send a command to another node, or to a later moment.
# The fleeting ones may be over by the very next command; a slot that has left stays away.
FLEETING: Final = frozenset(("CLUSTERDOWN", "READONLY", "MASTERDOWN", "LOADING", "BUSY"))
REDIRECTIONS: Final = FLEETING | {"MOVED", "ASK", "TRYAGAIN"}
# Error codes of a server that is no longer the right one, with the reason to look for another.
LEFT_FOR: Final = {
    "READONLY": "the server has become a replica (READONLY)",
    "MASTERDOWN": "the server is a replica that has lost its primary (MASTERDOWN)",
}
# Error codes of a server that does nothing for now, and soon will.
PASSING: Final = frozenset(("LOADING", "BUSY"))
# The pause before such a server is asked again, in seconds: up to the first, doubled up to the
# other.
PUT_OFF_FIRST: Final = 0.02
PUT_OFF_CAP: Final = 0.25

_IN_SCRIPTS: Final = ("READONLY", "NOREPLICAS")

# The guard argument of each record in the set script.
UNGUARDED: Final = b"0"
GUARDED: Final = b"1"
# A repeated guarded write finds its own first attempt and must not take it for another writer's.
GUARDED_REPEAT: Final = b"2"
# Before the version that a write or removal expects; with none behind it, it expects no record.
EXPECTED: Final = b"="
# In its place in a repeat, whose first attempt may have been done and be overwritten since.
EXPECTED_REPEAT: Final = b"~"
OR_NONE: Final = ", or None if there must be no record"

NOT_NEWER: Final = 0
WRITTEN: Final = 1
DAMAGED: Final = -1
# A repeat finds a record that doesn't tell whether its first attempt was done.
UNTOLD: Final = -2

# Replies to TYPE for a key that may hold a record's data.
STRING: Final = b"string"
NO_STRING: Final = (b"none", b"list", b"set", b"zset", b"hash", b"stream")

# KEYS: _v, _d of each record. ARGV: version, data, ttl in seconds or 0, guard. Without data, the
# record is removed.
# Lua's numbers are doubles and lose versions beyond 2^53, so versions are compared as text.
# Lifetimes end at a point in time that is computed once: of two SET ... EX in a script, Redis
# 7.0 lets every 400th pair expire at different milliseconds.
SET_SCRIPT: Final = b"""
local answers = {}
local now
local function expiry(ttl)
  if not now then
    local time = redis.call('TIME')
    now = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  return string.format('%.0f', now + ttl * 1000)
end
local function present(key)
  local length = redis.pcall('STRLEN', key)
  return type(length) == 'number' and (length > 0 or redis.call('EXISTS', key) == 1)
end
local function check(k, version, data, guard)
  local stored = redis.pcall('GET', KEYS[k])
  if type(stored) == 'table' then
    return string.find(stored.err, 'WRONGTYPE', 1, true) and -1 or stored
  end
  local mode, expected = string.sub(guard, 1, 1), string.sub(guard, 2)
  if not stored or not present(KEYS[k + 1]) then
    if mode == '~' then return -2 end
    return (mode ~= '=' or expected == '') and 1 or 0
  end
  local digits = string.match(stored, '^0*(%d+)$')
  if not digits or #digits > 19 or (#digits == 19 and digits > '9223372036854775807') then
    return -1
  end
  if mode == '=' then return digits == expected and 1 or 0 end
  if mode == '~' then
    local own = data ~= '' and digits == version
    if own and redis.call('GET', KEYS[k + 1]) == data then return 1 end
    return (digits == expected and not own) and 1 or -2
  end
  if #digits < #version or (#digits == #version and digits < version) then return 1 end
  if guard == '2' and digits == version and redis.call('GET', KEYS[k + 1]) == data then
    return 1
  end
  return 0
end
for k = 1, #KEYS, 2 do
  local a = 2 * k - 1
  local version, data, ttl, guard = ARGV[a], ARGV[a + 1], ARGV[a + 2], ARGV[a + 3]
  local answer = 1
  if guard ~= '0' then answer = check(k, version, data, guard) end
  if answer == 1 then
    if data == '' then
      redis.call('DEL', KEYS[k], KEYS[k + 1])
    elseif ttl == '0' then
      redis.call('MSET', KEYS[k], version, KEYS[k + 1], data)
    else
      local at = expiry(ttl)
      redis.call('SET', KEYS[k], version, 'PXAT', at)
      redis.call('SET', KEYS[k + 1], data, 'PXAT', at)
    end
  end
  answers[(k + 1) / 2] = answer
end
return answers
"""

SET_SCRIPT_SHA: Final = hashlib.sha1(SET_SCRIPT, usedforsecurity=False).hexdigest().encode()


class Waiter(Protocol):
    """The receiver of an operation's outcome: ``asyncio.Future``, or an object with its methods."""

    def set_result(self, result: Any, /) -> None: ...
    def set_exception(self, error: Exception, /) -> None: ...


ErrorOf = Callable[[str], Exception]
"""Makes an operation's error from its description: every waiter gets an error of its own."""


def copy_error(error: Exception) -> Exception:
    """Return a copy of an error, for another caller."""
    other = copy(error)
    other.__cause__ = error.__cause__
    return other


def join_address(host: str, port: int) -> str:
    """Return ``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_address(host: object, port: object) -> bool:
    """Return whether a host and port are valid. Servers may announce invalid ones.

    A host with control characters would forge lines of a log.
    """
    return (
        type(host) is str
        and 0 < len(host) <= MAX_HOST
        and host.isprintable()
        and " " not in host
        and type(port) is int
        and 0 < port < 65536
    )


def read_address(host: object, port: object) -> tuple[str, int]:
    """Return the host and port that a Sentinel states as text. Raises ValueError for no such."""
    number = int(port) if type(port) is str and port.isdecimal() and len(port) < 6 else -1
    if type(host) is not str or not is_address(host, number):
        raise ValueError(f"it names {shorten((host, port))} as host and port")
    return host, number


def read_epoch(text: object) -> int:
    """Return the epoch that a Sentinel states as text, or -1 if that is none."""
    is_number = type(text) is str and text.isdecimal() and len(text) < 20
    return int(text) if is_number else -1  # type: ignore[call-overload]


# -- counters


def latency_of(rows: Mapping[str, tuple[float, list[int]]]) -> dict[str, Any]:
    """Return the latencies of ``stats()``: the seconds and buckets of each operation."""
    return {
        "bounds": list(LATENCY_BOUNDS),
        "operations": {
            operation: {"count": sum(buckets), "sum": seconds, "buckets": buckets}
            for operation, (seconds, buckets) in rows.items()
        },
    }


def mean_batch(counts: Mapping[str, Any]) -> float:
    """Return how many records a batch has brought on its way, on average; 0.0 without any."""
    mean: float = counts["sent"] / counts["batches"] if counts["batches"] else 0.0
    return mean


# -- errors of the caller


def bad_name(name: object) -> RecordError:
    """Return the error for a name that can't be a record's name."""
    if not isinstance(name, str):
        why = f"a name must be a str, not {type(name).__name__}"
    elif not name:
        why = "a name must not be empty"
    else:
        why = "a name must be valid Unicode, and this one has a lone surrogate"
    return RecordError(f"record {shorten(name)}: {why}", name=name)


def bad_names(operation: str, names: object) -> RecordError:
    """Return the error for names that are one text, which would be read letter by letter."""
    return RecordError(
        f"{operation} takes an iterable of names, not one {type(names).__name__}; "
        f"write {operation}([{shorten(names)}])"
    )


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
    """Return the error for a version that is no integer from 0 to 2^63-1."""
    return RecordError(
        f"record {shorten(name)}: version must be an int from 0 to {MAX_VERSION}, "
        f"not {shorten(version)}",
        name=name,
    )


def check_ttl(name: str, ttl: object) -> int:
    """Return a ttl that is whole seconds, or raise RecordError."""
    if not isinstance(ttl, int) or isinstance(ttl, bool) or not 0 <= ttl <= MAX_TTL:
        raise RecordError(
            f"record {shorten(name)}: ttl must be whole seconds from 1 to {MAX_TTL}, 0 for none "
            f"or None for the configured default, not {shorten(ttl)}",
            name=name,
        )
    return int(ttl)


def overloaded(address: str, operations: int, size: int) -> Overloaded:
    """Return the error for an operation that a full pipeline refuses."""
    return Overloaded(
        f"{address}: {operations} operations and {size} bytes of writes are pending, which is "
        "all that maxPending and maxPendingBytes allow; the operation was not sent"
    )


def too_long(address: str, announced: int, limit: int) -> ProtocolError:
    """Return the error for a text or array that is announced as longer than allowed."""
    return ProtocolError(
        f"{address} announced a reply of length {announced}, and {limit} is allowed"
        f"{' (maxReplyBytes)' if limit != MAX_ELEMENTS else ''}"
    )


def too_deep(address: str) -> ProtocolError:
    """Return the error for arrays that are nested deeper than any reply of Redis."""
    return ProtocolError(f"{address} sent a reply of more than {MAX_DEPTH} nested arrays")


# -- JSON where msgspec alone does not do

encode_json_into: Final = msgspec.json.Encoder(enc_hook=encode_model).encode_into


def encode_json(value: object) -> bytes:
    """Return the JSON text of a value; raises whatever msgspec or the value's own type raises.

    Into a buffer: where memory ends, msgspec 0.20's ``encode`` crashes the process.
    """
    text = bytearray()
    encode_json_into(value, text)
    return bytes(text)


def encode_tolerantly(name: str, data: object) -> bytes:
    """Return the JSON text of data that msgspec's encoder refused.

    Raises RecordError that names the record and the path of the part that can't be encoded.
    """
    try:
        return tolerant_json.encode(data)
    except Exception as error:  # whatever a user's own type raises belongs to this record
        raise RecordError(
            f"record {shorten(name)}: data can't be encoded: {error}", name=name
        ) from error


def empty_raw(name: str) -> RecordError:
    """Return the error for a ``msgspec.Raw`` without text."""
    return RecordError(f"record {shorten(name)}: data is an empty msgspec.Raw", name=name)


def decode_tolerantly(name: str, version: int, raw: bytes) -> Any:
    """Return the value of JSON text that msgspec's decoder refused.

    Raises RecordError if it is no JSON.
    """
    try:
        return tolerant_json.decode(raw)
    except ValueError as error:
        raise RecordError(
            f"record {shorten(name)}, version {version}: stored data is no JSON: {error}",
            name=name,
        ) from error


def _new_decoder(type_: Any) -> Callable[[bytes], Any]:
    if is_model(type_):
        return type_.model_validate_json  # type: ignore[no-any-return]
    return msgspec.json.Decoder(type_, dec_hook=decode_model).decode


_known_decoder = lru_cache(maxsize=256)(_new_decoder)


def decoder_of(type_: Any) -> Callable[[bytes], Any]:
    """Return a function that decodes JSON text into a type.

    Raises TypeError if msgspec doesn't know the type.
    """
    try:
        return _known_decoder(type_)
    except TypeError:
        # The type, or an annotation in it, has no hash; or msgspec refuses it, as it does here.
        return _new_decoder(type_)


def decode_as(name: str, version: int, raw: bytes, type_: Any) -> Any:
    """Return JSON text decoded into ``type_``, which msgspec knows.

    Raises RecordError, with the path of the part that doesn't fit, or for invalid JSON, and
    TypeError if msgspec doesn't know the type.
    """
    decode = decoder_of(type_)
    try:
        return decode(raw)
    except MemoryError:
        raise
    except Exception:  # msgspec passes on any exception of a user's own type
        value = decode_tolerantly(name, version, raw)
    try:
        # In JSON, the keys of a dict[int, ...] are text.
        return msgspec.convert(value, type_, str_keys=True, dec_hook=decode_model)
    except MemoryError:
        raise
    except Exception as error:
        reason = error if isinstance(error, msgspec.ValidationError) else shorten(error)
        raise RecordError(
            f"record {shorten(name)}, version {version}: {reason}", name=name
        ) from error


# -- outcomes


def keys_apart(name: str) -> RecordError:
    """Return the error for a write by script whose two keys may be on two servers of a proxy."""
    return RecordError(
        f"record {shorten(name)}: a proxy may keep its two keys on two servers, and no script "
        "writes both; set keyLayout: hashtag, or proxied: false if the proxy hides one server",
        name=name,
    )


def is_across_slots(message: str) -> bool:
    """Return whether an error reply says that a command has keys of several slots."""
    return message.startswith("CROSSSLOT") or "same slot" in message.lower()


def damaged_version(name: str, stored: bytes | None = None) -> RecordError:
    """Return the error for a stored version that is no integer from 0 to 2^63-1."""
    found = f", but {shorten(stored)}" if stored is not None else ""
    return RecordError(
        f"record {shorten(name)}: its stored version is no integer from 0 to {MAX_VERSION}"
        f"{found}; set or delete the record to repair it",
        name=name,
    )


def bulk_failure(
    operation: str, errors: Mapping[str, Exception], total: int, result: object
) -> Exception:
    """Return the error of a bulk operation of ``total`` records, of which some failed.

    If Redis refused every single one, that is no partial failure but its refusal.
    """
    first = next(iter(errors.values()))
    if len(errors) == total and all(isinstance(error, ReplyError) for error in errors.values()):
        return first
    return BulkError(operation, errors, result)


def too_many_redirections(
    message: str, redirections: tuple[str, ...], limit: int, context: str
) -> ReplyError:
    """Return the error of an operation that was redirected too often."""
    path = "; ".join(redirections)
    # As the context, of which nothing is left out.
    redirected = f"redirected {len(redirections)} times, and maxRedirections is {limit}: {path}"
    return ReplyError(message, context=f"{redirected}) ({context}")


def has_text(kind: int) -> bool:
    """Return whether the entries of that kind are a Write or Command, with text and a waiter."""
    return SET <= kind <= DELETE_IF or kind >= READ_KEY


def is_write(kind: int) -> bool:
    """Return whether a batch of that kind changes records, or sends messages."""
    return SET <= kind <= DELETE or kind >= WRITE_KEY


def describe(kind: int, name: str) -> str:
    """Return an operation as error messages show it, such as ``get 'user/1'``."""
    if kind == PUBLISH:
        return f"send on topic {name[1 : name.index('}')]}"
    return f"{OPERATIONS[kind]} {shorten(name)}"


def _doubt_of(operation: str) -> str:
    """Return the end of an error text about a sent operation that may or may not have happened."""
    if operation.startswith("send "):
        return "; the message may have been delivered"
    return "; the write may have happened"


def no_answer_in_time(address: str, timeout: float, in_flight: int, operation: str) -> Exception:
    """Return the error of an operation that was sent and not answered in time."""
    harmless = operation.startswith(("get", "head", "read"))
    written = "" if harmless else _doubt_of(operation)
    return DeadlineExceeded(
        f"{operation}: no answer from {address} within {timeout * 1000:.0f} ms "
        f"(sent; {in_flight} records in flight){written}"
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
            f"({in_flight} records in flight before it); nothing was done"
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
    """Raise the error for bytes that hiredis refuses with one of ``NO_RESP``.

    An error that a signal handler has raised while hiredis was called is raised as it is. It has a
    frame of Python below that of the call, and an error of hiredis has none.
    """
    if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
        raise error
    raise ProtocolError(f"{address} sent no valid reply: {error}") from error


def is_push(push: list[Any]) -> bool:
    """Return whether a push begins with its kind, as each does.

    An array with one wrong bit looks like a push, and all replies behind it would be others'.
    """
    return bool(push) and type(push[0]) is bytes and push[0][:1].isalpha()


def no_push(address: str, push: list[Any]) -> ProtocolError:
    """Return the error for a push that has no kind."""
    return ProtocolError(f"{address} sent a push without a kind: {shorten(push)}")


def repeat_of(guard: bytes) -> bytes:
    """Return the guard of a repeat of a write whose first attempt may have been done."""
    if guard == GUARDED:
        return GUARDED_REPEAT
    return EXPECTED_REPEAT + guard[1:]


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
    written = _doubt_of(operation) if is_write(kind) else ""
    return ConnectionLost(
        f"{operation}: {address} has cut the connection {FATAL_LOSSES} times while it was under "
        f"way, the last time while nothing else was: {reason} (it may exceed a limit of the "
        f"server, such as client-query-buffer-limit or client-output-buffer-limit){written}"
    )


def lost(address: str, reason: Exception, kind: int, operation: str) -> Exception:
    """Return the error of an operation whose connection ended before the answer.

    ``reason`` is a ProtocolError if dscache ended it, else the error that ended it.
    """
    written = _doubt_of(operation) if is_write(kind) else ""
    if isinstance(reason, ProtocolError):
        return ProtocolError(f"{operation}: {reason}{written}")
    return ConnectionLost(f"{operation}: connection to {address} lost: {reason}{written}")
