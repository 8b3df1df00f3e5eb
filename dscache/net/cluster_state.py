"""What all lines of a blocking cache know of their cluster: its nodes, and who serves which slot.

Nothing runs in the background here. Who finds that the map may be outdated says so
(``record_stale``); who next has time for it, and ``claim``s it, asks the nodes anew beside an
operation of its own, while the others go on with what is known. A claim ends by itself, since an
exception may strike whoever holds it.

A Table is never changed but for slots that were redirected since, which only become more. So
a line sees by two comparisons, without a lock, whether its own tables are as new.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from math import inf
from typing import Any, Final

from ..config import Config
from ..core import stats as counters
from ..core.constants import ErrorOf, join_address
from ..errors import ConfigError, ConnectError, ReplyError
from .backoff import full_jitter, half_jitter
from .seeds import AT_ONCE, Seeds
from .slot_table import NodeInfo, Shard, SlotTable
from .slots import ASKED, GAP, GAP_CAP, GAP_GROWTH, VIEWS_TO_LEAVE, Address, View

_logger = logging.getLogger("dscache")

# A replica that was lost is not read for so long, in seconds, and for twice as long each time.
_AVOID_FIRST: Final = 0.5
_AVOID_CAP: Final = 8.0
# How much longer a claim lasts than the nodes have to answer.
_CLAIM_GRACE: Final = 0.25


class ClusterState:
    """The nodes and slots of a cluster; any thread may use it."""

    def __init__(self, config: Config) -> None:
        options = config.options
        self.source = config.source
        self.address = options.address
        self.timeout = options.slots_refresh_timeout
        """How long the nodes have to answer, in milliseconds."""
        self.table = SlotTable()
        self.known = False
        """Whether any node has told its view yet."""
        self.refresh_at = 0.0
        """When the slots are to be asked for again; while that is under way, when to give it up."""
        self.trouble: Exception = ConnectError("still connecting")
        """Why there is nobody to serve some slot."""
        self.refusal: ErrorOf | None = None
        """How operations fail at once, if no node can be used."""
        self.past: dict[str, Any] = {}
        """What nodes that are no more have counted, and lines of no node."""
        self.departures = 0
        self.redirections = 0
        self.refreshes = 0
        self.last_loss = ""
        self.places: dict[str, NodeInfo] = {}
        self.lock = threading.RLock()
        self._options = options
        self._interval = (options.slots_refresh_interval or 0) / 1000 or inf
        self._view = View(-1, ())
        self._claim = 0.0
        self._is_stale = False
        self._asked_at = -inf
        self._fruitless = 0
        self._failures = 0
        self._seeds = Seeds(options)
        self._complained = ""
        self._open_seeds()

    # -- when it is asked for again

    def record_stale(self) -> None:
        """Have the slots asked for again, as soon as may be."""
        with self.lock:
            if self._claim:
                self._is_stale = True
            else:
                self.refresh_at = min(self.refresh_at, self._asked_at + self._gap())

    def start_refresh(self, now: float) -> float:
        """Take it on to ask for the slots; returns 0 if it isn't due or somebody else does it."""
        with self.lock:
            if now < self.refresh_at:
                return 0.0
            self._claim = self.refresh_at = now + self.timeout / 1000 + _CLAIM_GRACE
            self._is_stale = False
            return self._claim

    def abandon_refresh(self, claim: float) -> None:
        """Give up a claim without an answer."""
        with self.lock:
            if claim == self._claim:
                self._is_stale = True
                self._done(time.monotonic())

    def _done(self, now: float) -> None:
        self._claim, self._asked_at = 0.0, now
        self.refresh_at = now + (self._gap() if self._is_stale else self._interval)

    def _gap(self) -> float:
        return half_jitter(GAP, GAP_CAP, self._fruitless, GAP_GROWTH)

    # -- what nodes have told

    def place(self, address: Address) -> NodeInfo:
        """Return the node at an address."""
        shown = join_address(*address)
        found = self.places.get(shown)
        if found is None:
            with self.lock:
                place = NodeInfo(self._seeds.options_at(address))
                found = self.places.setdefault(shown, place)
        return found

    def announced(self, address: Address) -> NodeInfo:
        """Return the node that others name by an address."""
        return self.place(self._options.mapped(*address))

    def place_at(self, shown: str) -> NodeInfo:
        """Return the node at an address as it is shown, which may be needed for the first time."""
        found = self.places.get(shown)
        if found is None:
            host, _, port = shown.rpartition(":")
            found = self.place((host.strip("[]"), int(port)))
        return found

    def primaries(self) -> list[NodeInfo]:
        """Return the nodes that serve slots; of very many those that were needed, or else one."""
        all_of_them = self.table.primaries
        known = [place for one in all_of_them if (place := self.places.get(one))]
        return known or [self.place_at(one) for one in list(all_of_them)[:1]]

    def keep_counts(self, place: NodeInfo | None, counts: Mapping[str, Any]) -> None:
        """Keep what was counted by lines that are no more, of a node or of none."""
        with self.lock:
            known = place is not None and self.places.get(place.shown) is place
            kept = place.counts if known and place is not None else self.past
            counters.add(kept, counts, lasting=True)

    def record_moved(self, slot: int, place: NodeInfo) -> None:
        """Note that a node was named as the one that serves a slot."""
        with self.lock:
            self.redirections += 1
            self.table.moved.append((slot, place.shown))
        self.record_stale()

    def record_redirected(self) -> None:
        """Count an operation that was sent away, or put off."""
        with self.lock:
            self.redirections += 1

    def apply(self, view: View, since: SlotTable, moved: int) -> None:
        """Take over a view; it was asked for when ``since`` had so many slots that moved."""
        mapped = self._options.mapped
        now = time.monotonic()
        with self.lock:
            self.refreshes += 1
            changed = view.ranges != self._view.ranges
            self._view = view
            stayed = self._is_stale and not changed
            self._fruitless = self._fruitless + 1 if stayed else 0
            self._failures = 0
            self.known = True
            self.refusal = None
            self.trouble = ConnectError("no node of the cluster serves this slot")
            shards = []
            announced = {one.primary for one in view.ranges}
            for one in sorted(view.ranges, key=lambda one: one.first):
                primary = join_address(*mapped(*one.primary))
                if len(announced) <= AT_ONCE:
                    self.place_at(primary)
                replicas = [mapped(*replica) for replica in one.replicas]
                shards.append(Shard(one.first, one.last, primary, self._readers(primary, replicas)))
            # Of slots that moved meanwhile, the view may be the older one; the next will tell.
            kept = self.table.moved[moved if self.table is since else 0 :]
            table = SlotTable(tuple(shards), kept)
            if table != self.table:
                self.table = table
            self._let_leave()
            self._done(now)
            self._include_replica_at(now)

    def record_failure(self, error: Exception) -> None:
        """Note that no node has told its view, and why."""
        retry = self._options.cluster_retry_strategy
        with self.lock:
            self.trouble = error
            self._open_seeds()
            self._done(time.monotonic())
            pause = full_jitter(retry.first / 1000, retry.cap / 1000, self._failures)
            self._failures += 1
            untried = any(not one.is_tried for one in self.places.values())
            self.refresh_at = self._asked_at + (0 if untried else pause)
            self.refusal = None if self.known else self._refusal_of(error)
            if self.refusal is not None and str(error) != self._complained:
                self._complained = str(error)
                _logger.warning("can't use the cluster %s: %s", self.address, error)

    def _refusal_of(self, error: Exception) -> ErrorOf | None:
        """Return how operations fail if waiting for another answer is no use."""
        if isinstance(error, ConfigError):
            message = str(error)
            return lambda operation: ConfigError(message)
        if isinstance(error, ReplyError):
            said = error.message
            return lambda operation: ReplyError(said, context=operation)
        refusals = [one.refusal for one in self.places.values()]
        return refusals[0] if all(refusals) else None

    def _let_leave(self) -> None:
        """Forget the nodes that two views in a row leave out."""
        present = self.in_use()
        for shown, place in list(self.places.items()):
            if shown in present:
                place.absences = 0
                continue
            place.absences += 1
            if place.absences >= VIEWS_TO_LEAVE:
                del self.places[shown]
                self.departures += 1
                counters.add(self.past, place.counts)
                counters.add(self.past, place.connections())
            else:
                self._is_stale = True

    def in_use(self) -> dict[str, None]:
        """Return the addresses of all who serve slots, or are read."""
        table = self.table
        readers = (reader for shard in table.shards for reader in shard.readers)
        return dict.fromkeys((*table.primaries, *readers))

    # -- whom to ask

    def to_ask(self, ready: Iterable[str]) -> list[NodeInfo]:
        """Return whom to ask for their view: of those who are ``ready`` the first come first."""
        chosen = [place for shown in ready if (place := self.places.get(shown))][:ASKED]
        self._name_seeds()
        with self.lock:
            others = [one for one in self.places.values() if one not in chosen]
        random.shuffle(others)
        # First those of whom nothing bad is known.
        others.sort(key=lambda one: one.trouble is not None)
        # A look-up may take long: no two of them, and none where there are others to ask.
        alone = not chosen and all(one.is_named for one in others)
        look_ups = 1 if alone or self._failures else 0
        for one in others:
            if len(chosen) == ASKED:
                break
            if one.is_named:
                look_ups -= 1
            if look_ups >= 0 or not one.is_named:
                chosen.append(one)
        return chosen

    def _open_seeds(self) -> None:
        for address in self._seeds.addresses:
            self.place(address)

    def _name_seeds(self) -> None:
        """Look up which addresses the configured nodes with credentials of their own have."""
        for seed in self._seeds.to_look_up(time.monotonic()):
            with suppress(socket.gaierror, UnicodeError):
                self._seeds.looked_up(seed, socket.getaddrinfo(seed.host, seed.port))

    # -- reads from replicas

    def _readers(self, primary: str, replicas: list[Address]) -> tuple[str, ...]:
        """Return who is read of a shard, if it isn't the primary alone."""
        if self._options.scale_reads == "master":
            return ()
        now = time.monotonic()
        shown = [join_address(*one) for one in replicas]
        readers = [one for one in shown if self._may_be_read(one, now)]
        if self._options.scale_reads == "all" and readers:
            readers.append(primary)
        return tuple(readers)

    def _may_be_read(self, shown: str, now: float) -> bool:
        place = self.places.get(shown)
        return place is None or place.avoid_until <= now

    def exclude_replica(self, place: NodeInfo) -> None:
        """Read from others for a while, if that is a replica that can't be read."""
        with self.lock:
            table = self.table
            if place.shown in table.primaries:
                return
            now = time.monotonic()
            shards = []
            for shard in table.shards:
                readers = tuple(one for one in shard.readers if one != place.shown)
                alone = readers == (shard.primary,)
                shards.append(
                    Shard(shard.first, shard.last, shard.primary, () if alone else readers)
                )
            if tuple(shards) == table.shards:
                return
            again = now < place.avoid_until + _AVOID_CAP
            place.avoid_for = min(2 * place.avoid_for, _AVOID_CAP) if again else _AVOID_FIRST
            place.avoid_until = now + place.avoid_for
            self.table = SlotTable(tuple(shards), table.moved.copy())
            self._include_replica_at(now)

    def _include_replica_at(self, now: float) -> None:
        """Have the slots asked for again when a replica may be read again."""
        ends = [one.avoid_until for one in self.places.values() if one.avoid_until > now]
        if ends and not self._claim:
            self.refresh_at = min(self.refresh_at, *ends)

    # -- connections

    def record_connected(self, place: NodeInfo, server: str, again: bool) -> None:
        """Note that a node was connected to, be it ``again`` by the same line."""
        with self.lock:
            place.connects += 1
            place.reconnections += again
            place.is_tried = True
            place.server = server
            place.trouble = place.refusal = None
        _logger.info("connected to %s (%s)", place.shown, server or "server unknown")

    def record_unreachable(self, place: NodeInfo, said: Exception, refusal: ErrorOf | None) -> None:
        """Note that a node could not be connected to."""
        if str(said) != str(place.trouble):
            _logger.warning("can't connect to %s: %s", place.shown, said)
        place.is_tried, place.trouble, place.refusal = True, said, refusal
        self._record_lost(place, str(said))

    def record_loss(self, place: NodeInfo, reason: str) -> None:
        """Note that a connection was lost: another node may have its slots by now."""
        _logger.info("connection to %s lost: %s", place.shown, reason)
        self._record_lost(place, reason)

    def _record_lost(self, place: NodeInfo, reason: str) -> None:
        place.last_loss = self.last_loss = reason
        self.exclude_replica(place)
        self.record_stale()

    def errors_by_node(self) -> str:
        """Return what keeps the nodes from being ready, each in a few words."""
        down = {shown: place.trouble for shown, place in list(self.places.items())}
        return "; ".join(f"{shown}: {why}" for shown, why in down.items() if why) or str(
            self.trouble
        )

    def reset_after_fork(self) -> None:
        """Begin anew in a forked child, with what is known; nobody asks for it yet."""
        self.lock = threading.RLock()
        self._claim = self.refresh_at = 0.0
