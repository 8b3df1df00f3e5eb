"""A scan of all names of a prefix, for both caches: the commands, their order and the slots done.

It does no I/O: ``steps`` yields requests and pauses, and takes the replies.

Theory of operation
-------------------
SCAN returns every key that is at its server all the time, but a slot can move meanwhile. So the
scan covers slots. A pass over one server covers each slot that the server owned completely at the
beginning and at the end of the pass, if it stayed the same server. Passes go on until every slot is
covered. A server outside a cluster owns all slots.

A slot that is moving is open: some of its keys are at its owner, and some at its target. Keys go
only from the owner to the target. So a pass over the owner, and then one over the target, cover the
slot, however long it stays open.

After the first pass over a server, few slots are left, and GETKEYSINSLOT reads their keys without
the others. Where they have too many keys for that, SCAN reads them again.
"""

from __future__ import annotations

import logging
import os
import re
import time
import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain
from typing import Any, Final, Literal

import msgspec

from ..config import Options
from ..config.address import join_address
from ..core.constants import SLOTS, VERSION_SUFFIX
from ..core.failures import remedy_of
from ..core.keys import KeyLayout, is_version_key, names_with, slot_of_key
from ..errors import (
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    ProtocolError,
    ReplyError,
    UsageError,
    shorten,
)
from .backoff import half_jitter
from .slots import parse_info

_logger = logging.getLogger("dscache")

# Seconds without any progress after which a scan fails, beside connectTimeout.
_PATIENCE: Final = 10.0
_PAUSE, _LONGEST_PAUSE = 0.02, 0.5
# A request isn't repeated if so many connections in a row have ended during it, as at a proxy. With
# each connection, it cuts off the operations of the cache.
_MOST_CUTS: Final = 5
# Error replies that end by themselves.
_PASSING: Final = frozenset(("LOADING", "MASTERDOWN", "CLUSTERDOWN", "BUSY", "TRYAGAIN"))
_LOST: Final = (ConnectError, ConnectionLost, DeadlineExceeded, ProtocolError)
# The most keys that one GETKEYSINSLOT returns, and that all of one request return together.
_MOST_KEYS: Final = 10_000
# The most slots of a pass of GETKEYSINSLOT.
_MOST_SLOTS: Final = 256
_SUFFIX: Final = len(VERSION_SUFFIX)
# A slot may get some more keys between its count and its read.
_MARGIN: Final = 100
# The cursor behind the last key, in place of the 0 that would begin anew.
_END: Final = b"end"
_ALL: Final = (1 << SLOTS) - 1
_VERSION: Final = 1
_LONGEST_CURSOR: Final = 1 << 22
# A line of CLUSTER NODES has this many words before the slots.
_NODE_WORDS: Final = 8
_OPEN_SLOT: Final = re.compile(r"\[(\d{1,5})-([<>])-(\w+)\]")


@dataclass(frozen=True, slots=True)
class Request:
    """Commands to send together to the node at an address, as ``owner`` returned it.

    Send back a Reply, or throw the error that has lost the connection.
    """

    node: str
    commands: Sequence[Sequence[bytes | str | int]]


@dataclass(frozen=True, slots=True)
class Reply:
    """The replies to a Request; ``socket`` is another object once the node has another socket."""

    socket: object
    replies: list[Any]


@dataclass(frozen=True, slots=True)
class Pause:
    """A wait, in seconds, before the next step."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Names:
    """Names that were found, or keys, each once in this step; it may have none."""

    names: list[Any]


Steps = Generator[Request | Pause | Names, Reply | None, None]


@dataclass(frozen=True, slots=True)
class _State:
    """How far a scan has come; sets of slots are integers, with a bit for each slot.

    ``covered`` slots are done. ``handed`` are open slots whose owner is done, with their targets.
    The other fields describe the pass of SCAN under way. It is at the node ``node``, whose identity
    was ``identity``. It covers the slots ``wanted``, of which ``opened`` were open when it began.
    ``at`` is the cursor of SCAN, empty while no pass is under way.
    """

    covered: int = 0
    handed: dict[int, str] = field(default_factory=dict)
    node: str = ""
    identity: str = ""
    wanted: int = 0
    opened: int = 0
    at: bytes = b""

    def encoded(self, scan: str) -> str:
        """Return an opaque text; ``scan`` identifies the arguments of the scan."""
        sets = [_bytes(one) for one in (self.covered, self.wanted, self.opened)]
        return pack(scan, [sets, self.handed, self.node, self.identity, self.at])

    @classmethod
    def decoded(cls, cursor: str, scan: str) -> _State:
        """Return the state in a cursor; raises UsageError if it isn't of this scan."""
        kind = tuple[tuple[bytes, bytes, bytes], dict[int, str], str, str, bytes]
        sets, handed, node, identity, at = unpack(cursor, scan, kind)
        covered, wanted, opened = (int.from_bytes(one, "little") & _ALL for one in sets)
        return cls(covered, handed, node, identity, wanted, opened, at)


@dataclass(frozen=True, slots=True)
class _Claim:
    """The slots of a node, as the node itself sees them, and the server's identity.

    ``outgoing`` and ``incoming`` are the open slots: the address of each one's target, and all
    that are arriving here.
    """

    identity: str
    owned: int
    outgoing: Mapping[int, str]
    incoming: int


class KeyScan:
    """A scan of the keys that match a pattern, and perhaps of others, of one server or a cluster.

    ``owner`` returns the address of the node that serves a slot, or None if none is known; it is
    None itself outside a cluster. ``look_again`` asks for a fresh view of the slots. ``cursor`` is
    of an earlier scan with the same arguments. Raises UsageError for a cursor of another one.
    """

    def __init__(
        self,
        options: Options,
        pattern: bytes,
        count: int,
        cursor: str | None = None,
        owner: Callable[[int], str | None] | None = None,
        look_again: Callable[[], object] = lambda: None,
        *,
        prefix: str = "",
    ) -> None:
        self._count = count
        self._pattern = pattern
        self._owner = owner
        self._look_again = look_again
        self._clustered = owner is not None
        self._patience = max(_PATIENCE, options.connect_timeout / 1000)
        self._id = scan_id(options, prefix)
        self._state = _State.decoded(cursor, self._id) if cursor is not None else _State()
        # The nodes that SCAN has read whole, so that few slots of them are left.
        self._scanned: set[str] = set()
        self._options = options
        self._nonce = os.urandom(8).hex()
        self._socket: object = None
        self._sockets = 0
        self._failures = 0
        self._cuts = 0
        self._progress_at = 0.0
        self._behind = self._state
        self.visited = 0
        """About how many keys the servers have looked at, of any name."""
        self.skipped = 0
        """How many keys had names that are no UTF-8."""

    def cursor(self) -> str:
        """Return the cursor of the items before those of the last step."""
        return self._state.encoded(self._id)

    def cursor_behind(self) -> str:
        """Return the cursor of the items so far, with those of the last step if possible."""
        return self._behind.encoded(self._id)

    def steps(self) -> Steps:
        """Yield the steps of the scan; raises ReplyError, ConnectError and ConnectionLost."""
        self._note_progress()
        while self._state.covered != _ALL:
            try:
                yield from self._cover_next()
            except _LOST as error:
                self._check_cuts(error)
                yield self._pause_after(error)
            except ReplyError as error:
                if error.code not in _PASSING:
                    raise
                yield self._pause_after(error)

    def _note_progress(self) -> None:
        self._failures = 0
        self._progress_at = time.monotonic()

    def _check_cuts(self, error: Exception) -> None:
        """Raise ConnectionLost if a single server ends the connection at each request."""
        self._cuts += isinstance(error, ConnectionLost) and not self._clustered
        if self._cuts >= _MOST_CUTS:
            raise ConnectionLost(
                f"scan: the connection was lost {self._cuts} times in a row while a request was "
                f"under way: {error} (a proxy may not know INFO and SCAN: scan its servers)"
            ) from error

    def _pause_after(self, error: Exception) -> Pause:
        """Return the pause before the next attempt; raises the error if no progress was made."""
        if time.monotonic() > self._progress_at + self._patience:
            raise error
        self._look_again()
        self._failures += 1
        return Pause(half_jitter(_PAUSE, _LONGEST_PAUSE, self._failures))

    def _cover_next(self) -> Steps:
        """Make one pass, at the node of the first slot that is left."""
        state = self._state
        left = _ALL & ~state.covered
        if state.at and self._place(_first(state.wanted)) != state.node:
            state = self._state = replace(state, at=b"")  # that node has lost its slots
        node = state.node if state.at else self._place(_first(left))
        before, socket = yield from self._claim(node)
        at = b"0"
        if state.at and before.identity == state.identity:
            wanted, opened, at = state.wanted, state.opened, state.at
        else:
            handed = _mask(state.handed)
            given = _mask(slot for slot, target in state.handed.items() if target == node)
            wanted = left & ((before.owned & ~handed) | ((before.owned | before.incoming) & given))
            opened = _mask(before.outgoing)
            if lacking := given & ~wanted:
                # Their move was given up: they begin anew.
                self._state = replace(state, at=b"", handed=_without(state.handed, lacking))
            if not wanted:
                raise ConnectionLost(f"{node or 'the server'} has none of the slots left to scan")
        some = None
        if at == b"0" and self._clustered and node in self._scanned:
            some = yield from self._few(node, wanted)
        if some is None:
            self._scanned.add(node)
            crowd = wanted if wanted != before.owned or before.incoming else 0
            self._state = replace(
                self._state, node=node, identity=before.identity, wanted=wanted, opened=opened
            )
            yield from self._scan_keys(node, socket, at, _slots(crowd))
        else:
            wanted = _mask(some)
            yield from self._read_slots(node, some)
        after, _ = yield from self._claim(node)
        self._conclude(before, opened, after, wanted)

    def _conclude(self, before: _Claim, opened: int, after: _Claim, wanted: int) -> None:
        """Note the slots that a pass has covered, and the ones that go on at a target."""
        state = self._state
        handed = {**state.handed}
        covered = 0
        if before.identity == after.identity:
            stayed = wanted & (after.owned | after.incoming)
            for slot in _slots(stayed & _mask(after.outgoing)):
                if after.outgoing[slot]:
                    handed[slot] = after.outgoing[slot]
            covered = stayed & ~_mask(after.outgoing) & ~opened
            handed = _without(handed, covered)
        self._state = _State(state.covered | covered, handed)
        if covered or handed != state.handed:
            self._note_progress()
        if wanted & ~covered:
            self._look_again()

    def _place(self, slot: int) -> str:
        """Return the node to ask for a slot; raises ConnectError if none is known."""
        if self._owner is None:
            return ""
        node = self._state.handed.get(slot) or self._owner(slot)
        if node is None:
            raise ConnectError(f"scan: no node of the cluster serves slot {slot}")
        return node

    # -- one server

    def _ask(
        self, node: str, *commands: Sequence[bytes | str | int]
    ) -> Generator[Request | Pause | Names, Reply | None, Reply]:
        """Return the replies of a node; raises the first error reply."""
        reply = yield Request(node, commands)
        assert reply is not None
        self._cuts = 0
        for command, one in zip(commands, reply.replies, strict=True):
            if isinstance(one, ReplyError):
                words = " ".join(map(str, command[:2] if command[0] == "CLUSTER" else command[:1]))
                place = f"{words} at {node}" if node else words
                raise ReplyError(one.message, context=f"scan: {place}{remedy_of(one.message)}")
        return reply

    def _claim(
        self, node: str
    ) -> Generator[Request | Pause | Names, Reply | None, tuple[_Claim, object]]:
        """Return the facts that a server states of itself, and the socket over which it did."""
        if not self._clustered:
            # Without the right to INFO, a server is the same as long as its socket lasts.
            asked = yield Request(node, [("INFO", "server"), ("INFO", "replication")])
            assert asked is not None
            self._cuts = 0
            facts = {**parse_info(asked.replies[0]), **parse_info(asked.replies[1])}
            known = [facts.get(name, "") for name in ("run_id", "role", "master_replid")]
            if asked.socket is not self._socket:
                self._socket = asked.socket
                self._sockets += 1
            unknown = "" if known[0] else f"{self._nonce} {self._sockets}"
            return _Claim(" ".join([*known, unknown]), _ALL, {}, 0), asked.socket
        asked = yield from self._ask(node, ("INFO", "server"), ("CLUSTER", "NODES"))
        info, nodes = asked.replies
        run_id = parse_info(info).get("run_id", "")
        try:
            return _claim_of(nodes, run_id, node, self._options.mapped), asked.socket
        except (ValueError, IndexError) as error:  # numbers that are none, or too high
            raise ProtocolError(f"scan: bad reply to CLUSTER NODES at {node}: {error}") from None

    def _scan_keys(self, node: str, socket: object, at: bytes, of: Collection[int]) -> Steps:
        """Read a server's keys from a cursor on, and yield the names of some slots.

        Raises ConnectionLost if the node has another socket by now. The caller then finds out
        whether that leads to the same server.
        """
        slots = frozenset(of)
        while at != _END:
            command = ("SCAN", at, "MATCH", self._pattern, "COUNT", self._count)
            asked = yield from self._ask(node, command)
            if asked.socket is not socket:
                raise ConnectionLost(f"the connection to {node or 'the server'} was replaced")
            reply = asked.replies[0]
            if not isinstance(reply, list) or len(reply) != 2 or type(reply[0]) is not bytes:
                raise _unexpected("SCAN", reply)
            at = reply[0]
            keys = _keys_in(reply[1], "SCAN")
            self._note_progress()
            if slots:
                keys = [key for key in keys if slot_of_key(key) in slots]
            if at == b"0":
                at = _END
            self.visited += self._count
            self._behind = replace(self._state, at=at)
            yield from self._found(keys, is_matched=True)
            self._state = replace(self._state, at=at)

    def _few(
        self, node: str, wanted: int
    ) -> Generator[Request | Pause | Names, Reply | None, dict[int, int] | None]:
        """Return some slots with the numbers of their keys; None if the first has too many."""
        slots = _slots(wanted)[:_MOST_SLOTS]
        asked = yield from self._ask(node, *(("CLUSTER", "COUNTKEYSINSLOT", one) for one in slots))
        some: dict[int, int] = {}
        rest = _MOST_KEYS
        for slot, count in zip(slots, asked.replies, strict=True):
            if type(count) is not int:
                raise _unexpected("CLUSTER COUNTKEYSINSLOT", count)
            rest -= count
            if rest < 0:
                break
            some[slot] = count
        return some or None

    def _read_slots(self, node: str, some: dict[int, int]) -> Steps:
        """Read the keys of some slots; slots that have grown much meanwhile leave ``some``."""
        commands = [
            ("CLUSTER", "GETKEYSINSLOT", slot, count + _MARGIN) for slot, count in some.items()
        ]
        asked = yield from self._ask(node, *commands)
        keys: list[bytes] = []
        for slot, reply in zip(list(some), asked.replies, strict=True):
            found = _keys_in(reply, "CLUSTER GETKEYSINSLOT")
            if len(found) >= some[slot] + _MARGIN:
                del some[slot]
            keys += found
        self.visited += len(keys)
        self._behind = self._state
        yield from self._found(keys, is_matched=False)

    def _found(self, keys: list[bytes], *, is_matched: bool) -> Steps:
        """Yield what is to be found in keys; ``is_matched`` if they match the pattern."""
        yield Names(list(dict.fromkeys(keys)))


class NameScan(KeyScan):
    """A scan of the names that begin with a prefix; the other arguments are those of a KeyScan."""

    def __init__(
        self, options: Options, prefix: str, count: int, cursor: str | None = None, *of_cluster: Any
    ) -> None:
        self._layout = KeyLayout(options.key_prefix, options.hash_tag)
        self._prefix = prefix
        pattern = self._layout.pattern(prefix)
        super().__init__(options, pattern, count, cursor, *of_cluster, prefix=prefix)

    def _found(self, keys: list[bytes], *, is_matched: bool) -> Steps:
        if not is_matched:
            keys = [key for key in keys if is_version_key(key)]
        names: list[str] | None = None
        if is_matched and not self._layout.hash_tag:
            first = len(self._layout.prefix)
            # A third of the time of decoding key by key. Other clients' keys may be no UTF-8.
            with suppress(UnicodeDecodeError):
                names = [key[first:-_SUFFIX].decode() for key in keys]
        if names is None:
            self._note_skipped(keys)
        found = dict.fromkeys(map(self._layout.name_of, keys) if names is None else names)
        found.pop("", None)
        yield Names(names_with(self._prefix, found))

    def _note_skipped(self, keys: list[bytes]) -> None:
        """Count the keys of names that are no UTF-8, which no operation can read."""
        starts = tuple(self._layout.starts(self._prefix))
        skipped = [key for key in keys if key.startswith(starts) and self._layout.is_no_text(key)]
        if skipped and not self.skipped:
            _logger.warning(
                "scan: the name in key %s is no UTF-8, so that no operation can read its record; "
                "scan leaves such names out, and counts them in skipped",
                shorten(skipped[0]),
            )
        self.skipped += len(skipped)


# -- replies


def _unexpected(command: str, reply: object) -> ProtocolError:
    return ProtocolError(f"scan: unexpected reply to {command}: {shorten(reply)}")


def _keys_in(reply: object, command: str) -> list[bytes]:
    """Return the keys that a reply lists; raises ProtocolError for a reply of another shape."""
    if not isinstance(reply, list) or not {bytes}.issuperset(map(type, reply)):
        raise _unexpected(command, reply)
    return reply


def _claim_of(
    nodes: object, run_id: str, asked: str, mapped: Callable[[str, int], tuple[str, int]]
) -> _Claim:
    """Return the claim in a node's reply to CLUSTER NODES; raises ProtocolError for another one.

    ``asked`` is the node's address: a node that doesn't know its own host leaves it out.

    Source: the Redis page of CLUSTER NODES.
    """
    if not isinstance(nodes, bytes):
        raise ProtocolError(f"scan: unexpected reply to CLUSTER NODES: {shorten(nodes)}")
    addresses: dict[str, str] = {}
    own: list[str] = []
    for line in nodes.decode(errors="replace").splitlines():
        words = line.split()
        if len(words) < _NODE_WORDS:
            continue
        host, _, port = words[1].partition("@")[0].rpartition(":")
        host = host.strip("[]") or asked.rpartition(":")[0].strip("[]")
        addresses[words[0]] = join_address(*mapped(host, int(port or 0)))
        if "myself" in words[2].split(","):
            own = words
    if not own:
        raise ProtocolError("scan: CLUSTER NODES without the node itself")
    incoming = 0
    ranges: list[range] = []
    outgoing: dict[int, str] = {}
    for word in own[_NODE_WORDS:]:
        if moving := _OPEN_SLOT.fullmatch(word):
            slot, arrow, other = int(moving[1]), moving[2], moving[3]
            if slot >= SLOTS:
                raise IndexError(f"slot {slot}")
            if arrow == "<":
                incoming |= 1 << slot
            else:
                outgoing[slot] = addresses.get(other, "")
        else:
            first, _, last = word.partition("-")
            ranges.append(range(int(first), int(last or first) + 1))
    owned = _mask(chain.from_iterable(ranges))
    if "master" not in own[2].split(","):
        owned = incoming = 0
    return _Claim(f"{run_id} {own[0]} {own[6]}", owned, outgoing, incoming)


# -- sets of slots


def _mask(slots: Iterable[int]) -> int:
    mask = bytearray(SLOTS // 8)
    for slot in slots:
        mask[slot >> 3] |= 1 << (slot & 7)
    return int.from_bytes(mask, "little")


def _slots(mask: int) -> list[int]:
    return [slot for slot, bit in enumerate(reversed(f"{mask:b}")) if bit == "1"]


def _first(mask: int) -> int:
    return (mask & -mask).bit_length() - 1


def _without(handed: Mapping[int, str], mask: int) -> dict[int, str]:
    return {slot: node for slot, node in handed.items() if not mask >> slot & 1}


def _bytes(mask: int) -> bytes:
    return mask.to_bytes(SLOTS // 8, "little")


# -- cursors


def scan_id(options: Options, prefix: str) -> str:
    """Return a text that tells scans apart whose cursors don't fit each other."""
    said = f"{options.address} {options.db} {options.key_prefix} {options.hash_tag} {prefix}"
    return blake2b(said.encode(), digest_size=8).hexdigest()


def pack(scan: str, state: object) -> str:
    """Return a cursor: the state of a scan as an opaque text."""
    return urlsafe_b64encode(
        zlib.compress(msgspec.msgpack.encode([_VERSION, scan, state]))
    ).decode()


def unpack(cursor: str, scan: str, kind: Any) -> Any:
    """Return the state in a cursor; raises UsageError if it isn't of this scan."""
    try:
        reader = zlib.decompressobj()
        text = reader.decompress(urlsafe_b64decode(cursor), _LONGEST_CURSOR)
        if not reader.eof:
            raise ValueError("it is cut")
        _, said, state = msgspec.msgpack.decode(text, type=tuple[Literal[1], str, kind])
    except (ValueError, zlib.error, msgspec.MsgspecError):
        raise UsageError(
            f"scan: {shorten(cursor)} isn't a cursor; pass the cursor of an earlier scan"
        ) from None
    if said != scan:
        raise UsageError(
            "scan: this cursor is of a scan of another prefix or cache; scan from the beginning"
        )
    return state
