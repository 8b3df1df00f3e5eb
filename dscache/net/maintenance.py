"""Announcements of maintenance by Redis Cloud and Redis Software: the request for them, and pushes.

A server that was asked by ``CLIENT MAINT_NOTIFICATIONS ON`` pushes to each connection:

* ``MOVING serial seconds host:port`` before its address changes. A null in place of the address
  means the usual one, which leads to the new server later.
* ``MIGRATING serial seconds`` and ``FAILING_OVER serial seconds`` before it may be slow for a
  while, which ``MIGRATED serial`` and ``FAILED_OVER serial`` end.
* ``SMIGRATING serial slots`` before slots of a cluster move, and behind it
  ``SMIGRATED serial [[source, target, slots], ...]``. Source and target are ``host:port``, and
  slots are like ``1,5-10``.

Source: redis-py 8.1. ``redis/_parsers/base.py`` has the shapes of the pushes;
``redis/maint_notifications.py`` and ``redis/connection.py`` have the request and the course. There,
too, the end of any maintenance ends the longer deadlines, an announcement that arrives over several
connections is followed once, and MOVING moves no connection to a node of a cluster.

This module does no I/O. ``aio/maintenance.py`` and ``blocking/maintenance.py`` act on it.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, Final

from .._locks import make_lock
from ..config import Options
from ..config.address import is_address
from ..core.constants import PASSING, SLOTS
from ..errors import shorten
from .credentials import Word
from .foreign_errors import foreign

_logger = logging.getLogger("dscache")

# The deadline of operations, and the longest silence of a server, during maintenance, in seconds.
RELAXED: Final = 10.0
# Maintenance of which no end is announced is over this long after it was to begin, in seconds.
LASTS: Final = 60.0
# Moving to the new address is tried for at least this many seconds, as long as the old server
# serves.
LEAST: Final = 5.0
# The pause before another attempt to connect to the new address, and its longest form, in seconds.
MOVE_PAUSE: Final = 0.05
MOVE_PAUSE_CAP: Final = 1.0
# The longest time that an announcement may state, in seconds.
_MOST_SECONDS: Final = 3600
# The longest number of a port, in digits.
_PORT_DIGITS: Final = 5
# A server that has refused the request is not asked again for this long, in seconds.
_REFUSED_FOR: Final = 3600.0
# An announcement that arrives again within this time, in seconds, is the same one.
_KNOWN_FOR: Final = 120.0
# The most announcements that are remembered.
_MOST_KNOWN: Final = 1000
# Refusals that say nothing about the command.
_UNTOLD: Final = (*PASSING, "NOAUTH")
# A slot, or a range of slots.
_SLOTS: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")

MOVING: Final = b"MOVING"
SLOTS_MOVED: Final = b"SMIGRATED"
BEGINNINGS: Final = (b"MIGRATING", b"FAILING_OVER", b"SMIGRATING")
ENDINGS: Final = (b"MIGRATED", b"FAILED_OVER", SLOTS_MOVED)
KINDS: Final = (MOVING, *BEGINNINGS, *ENDINGS)
# The kinds that all nodes of a cluster announce with the same serial number.
_OF_ALL_NODES: Final = (b"SMIGRATING", SLOTS_MOVED)

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class SlotMove:
    """Slots that have moved from one node to another, as ranges ``(first, last)``."""

    source: Address
    target: Address
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Notice:
    """One announcement.

    ``seconds`` is the time until it happens. ``endpoint`` is the new address of a server that
    moves; None if the configured one leads there. ``moves`` are the slots that have moved.
    """

    kind: bytes
    serial: int
    seconds: int = 0
    endpoint: Address | None = None
    moves: tuple[SlotMove, ...] = ()

    @property
    def patience(self) -> int | float:
        """How many seconds moving to the new address is tried."""
        return max(self.seconds, LEAST)


class Announcements:
    """The request for announcements of a server or of the nodes of a cluster, and the counters.

    With ``maintNotifications: auto`` it is only sent where the service could be a hosted one: not
    to this machine, not behind Sentinels, and not to a known proxy. A refusal is remembered. All
    connections of a cache share one of these, in any thread.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        # Until when each IP address isn't asked again.
        self._refused_until: dict[str, float] = {}
        self._complained = False
        self._lock = make_lock()
        self._known: dict[tuple[Notice, str], float] = {}
        # Until when each server may be slow, by ``time.monotonic()``.
        self._slow_until: dict[str, float] = {}
        self._counts = dict.fromkeys((kind.decode() for kind in KINDS), 0)
        self._moves = self._slots = self._relaxed = 0

    @property
    def are_wanted(self) -> bool:
        """Whether any server is asked for announcements."""
        return self._options.maint_notifications != "off"

    @property
    def are_required(self) -> bool:
        """Whether a server without announcements is refused."""
        return self._options.maint_notifications == "on"

    def request(self, host: str, peer: str) -> list[Word] | None:
        """Return the command for a connection to ``host``, at the IP address ``peer``, or None."""
        mode = self._options.maint_notifications
        if mode == "off":
            return None
        if mode == "auto" and (self._is_plain(peer) or self._has_refused(peer)):
            return None
        kind = _endpoint_type(host, peer)
        return ["CLIENT", "MAINT_NOTIFICATIONS", "ON", "moving-endpoint-type", kind]

    def _is_plain(self, peer: str) -> bool:
        options = self._options
        if options.path or options.sentinels or options.proxied:
            return True
        found = _ip(peer)
        return found is None or found.is_loopback

    def _has_refused(self, peer: str) -> bool:
        return time.monotonic() < self._refused_until.get(peer, -math.inf)

    def note(self, code: str | None, peer: str) -> None:
        """Note the reply from an IP address: None for consent, or the code of an error."""
        if code is not None and code not in _UNTOLD:
            now = time.monotonic()
            still = {one: until for one, until in self._refused_until.items() if until > now}
            self._refused_until = {**still, peer: now + _REFUSED_FOR}

    def read(self, push: list[Any], address: str) -> Notice | None:
        """Return the announcement in a push; None for any other, or one that is malformed.

        The first malformed one is logged. ``address`` is that of the server.
        """
        if push[0] not in KINDS:
            return None
        try:
            notice = parse(push)
        except (ValueError, UnicodeDecodeError) as error:
            if foreign(error) is not None:
                raise
            if not self._complained:
                self._complained = True
                _logger.warning(
                    "%s has announced maintenance in an unknown form, which is ignored: %s",
                    address,
                    shorten(list(push)),
                )
            return None
        if notice.kind in BEGINNINGS:
            self._slow_until[address] = time.monotonic() + notice.seconds + LASTS
        elif notice.kind in ENDINGS:
            self._slow_until.pop(address, None)
        return notice

    def is_new(self, notice: Notice, address: str) -> bool:
        """Return whether an announcement hasn't arrived before, and count it then.

        The server at ``address`` sends it over each connection.
        """
        now = time.monotonic()
        # A repeated one states the time that is left.
        same = replace(notice, seconds=0)
        key = same, "" if notice.kind in _OF_ALL_NODES else address
        # A move that hasn't succeeded within its time may be announced again.
        seconds = notice.patience if notice.kind == MOVING else _KNOWN_FOR
        with self._lock:
            if self._known.get(key, now) > now:
                return False
            self._known.pop(key, None)
            if len(self._known) >= _MOST_KNOWN:
                # A faulty server announces without end: the older half is forgotten.
                self._known = dict(list(self._known.items())[_MOST_KNOWN // 2 :])
            self._known[key] = now + seconds
            self._counts[notice.kind.decode()] += 1
            return True

    def slow_until(self, address: str) -> float:
        """Return until when a server may be slow, by ``time.monotonic()``."""
        return self._slow_until.get(address, -math.inf)

    def count_move(self) -> None:
        """Count a server that was followed to another address."""
        with self._lock:
            self._moves += 1

    def count_slots(self, number: int) -> None:
        """Count slots that were given to another node."""
        with self._lock:
            self._slots += number

    def count_relaxed(self) -> None:
        """Count a connection whose operations were given more time."""
        with self._lock:
            self._relaxed += 1

    def stats(self) -> dict[str, Any]:
        """Return the counters, for the key ``maintenance`` of ``stats()``."""
        return {
            "notifications": dict(self._counts),
            "moves": self._moves,
            "moved_slots": self._slots,
            "relaxed": self._relaxed,
        }

    def reset_after_fork(self) -> None:
        """Begin again in a forked child."""
        self._lock = make_lock()


class NewAddress:
    """The address to which a server has moved, until the configured one leads there.

    After a failed attempt to connect to one of the two, the other one is tried next. Any thread may
    use it. Times are those of ``time.monotonic()``.
    """

    def __init__(self) -> None:
        self._latest: tuple[Address | None, float] = None, -math.inf
        self._has_failed = False

    def set(self, address: Address | None, until: float) -> None:
        """Use another address until then; None for the configured one."""
        self._latest = address, until
        self._has_failed = False

    def get(self) -> Address | None:
        """Return the address to use now; None for the configured one."""
        address, until = self._latest
        return None if self._has_failed or time.monotonic() >= until else address

    def note_failure(self, tried: Address | None) -> None:
        """Note a failed attempt to connect to the address that ``get`` had returned before it."""
        self._has_failed = tried is not None and tried == self._latest[0]


class Leeway:
    """The time that operations over one connection have: ``usual`` seconds, or more for a while.

    Its methods return the timeout in seconds if it changes, and None if it doesn't. Times are those
    of ``time.monotonic()``.
    """

    __slots__ = ("_usual", "until")

    def __init__(self, usual: float) -> None:
        self._usual = usual
        self.until: float | None = None
        """When the maintenance is over at the latest; None outside it."""

    @property
    def seconds(self) -> float:
        """The timeout during maintenance."""
        return max(self._usual, RELAXED)

    def follow(self, notice: Notice, now: float) -> float | None:
        """Follow an announcement."""
        if notice.kind in BEGINNINGS:
            return self.begin(now + notice.seconds + LASTS)
        return self.end() if notice.kind in ENDINGS else None

    def begin(self, until: float) -> float | None:
        """Give more time, until then at most."""
        is_new, self.until = self.until is None, until
        return self.seconds if is_new else None

    def end(self) -> float | None:
        """Give the usual time."""
        if self.until is None:
            return None
        self.until = None
        return self._usual

    def end_if_over(self, now: float) -> float | None:
        """Give the usual time if the maintenance is over without an announcement."""
        return self.end() if self.until is not None and now >= self.until else None


def parse(push: list[Any]) -> Notice:
    """Return the announcement in a push of a kind that is known. Raises ValueError."""
    kind, serial = push[0], push[1] if len(push) > 1 else None
    if type(serial) is not int:
        raise ValueError("no serial number")
    if kind == SLOTS_MOVED:
        return Notice(kind, serial, moves=_moves(push[2] if len(push) > 2 else None))
    if kind in ENDINGS or kind == b"SMIGRATING":
        return Notice(kind, serial)
    seconds = push[2] if len(push) > 2 else None
    if type(seconds) is not int or not 0 <= seconds <= _MOST_SECONDS:
        raise ValueError("no time")
    if kind in BEGINNINGS:
        return Notice(kind, serial, seconds)
    endpoint = push[3] if len(push) > 3 else None
    return Notice(kind, serial, seconds, None if endpoint is None else _endpoint(endpoint))


def _moves(value: Any) -> tuple[SlotMove, ...]:
    if type(value) is not list or len(value) > SLOTS:
        raise ValueError("no moves")
    moves = []
    for move in value:
        if type(move) is not list or len(move) != 3:
            raise ValueError("no move")
        source, target, slots = move
        moves.append(SlotMove(_endpoint(source), _endpoint(target), tuple(_ranges(slots))))
    # Each takes a while, so that a faulty node could stop the program for minutes.
    if sum(last - first + 1 for move in moves for first, last in move.ranges) > SLOTS:
        raise ValueError("too many slots")
    return tuple(moves)


def _ranges(value: Any) -> Iterable[tuple[int, int]]:
    texts = value.decode().split(",") if type(value) is bytes else [""]
    if len(texts) > SLOTS:
        raise ValueError("too many slots")
    for text in texts:
        found = _SLOTS.fullmatch(text.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if not first <= last < SLOTS:
            raise ValueError("no slots")
        yield first, last


def _endpoint(value: Any) -> Address:
    host, colon, digits = value.decode().rpartition(":") if type(value) is bytes else ("", "", "")
    is_number = digits.isascii() and digits.isdigit() and len(digits) <= _PORT_DIGITS
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not is_number or not is_address(host, int(digits)):
        raise ValueError("no address")
    return host, int(digits)


def _endpoint_type(host: str, peer: str) -> str:
    """Return the kind of address that is wanted: like the configured one, and its network."""
    found = _ip(peer)
    if found is None:
        return "none"
    where = "internal" if found.is_private else "external"
    return f"{where}-{'fqdn' if _ip(host) is None else 'ip'}"


def _ip(text: str) -> Any:
    try:
        return ip_address(text.partition("%")[0])
    except ValueError as error:
        if foreign(error) is not None:
            raise  # a signal handler has raised it
        return None
