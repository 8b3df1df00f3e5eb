"""A Redis Cluster: its nodes, which of them serves which slot, and the way from one to another.

The slot map is asked of the nodes themselves, over the connections that are there anyway: they
are logged in, encrypted and watched already. It is asked again when a node redirects or is lost,
and from time to time. ``_masters`` is what is known of it; the router's table is where operations
go right now, which is a Room while it is uncertain that nothing would be overtaken.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import UNSET

from . import _backend, _common, _counters
from ._apart import RecordsApart
from ._opened import check_loop, check_process
from ._room import Room
from .config import Config, Node
from .connection import Connection
from .errors import ConfigError, ConnectError, ConnectionLost, DscacheError, ReplyError
from .slots import (
    ASKED,
    GAP,
    GAP_CAP,
    GAP_GROWTH,
    NAMES_LAST,
    QUESTIONS,
    RETRY_CAP,
    RETRY_FIRST,
    VIEWS_TO_LEAVE,
    Address,
    SlotRange,
    View,
    newest,
    parse_redirection,
    read_view,
)

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

_logger = logging.getLogger("dscache")

# How often a cache that closes looks whether all is done, in seconds.
_DRAIN_STEP = 0.005
_OWNER = "an AsyncCache"
_CLOSED = "the cache was closed before the answer came"


@dataclass(frozen=True, slots=True)
class NodeState:
    """One node, as the topology knows it."""

    address: str
    role: str
    """``primary`` or ``replica``."""
    primary: str
    """The address of its primary; its own if it is one."""
    slots: tuple[tuple[int, int], ...]
    """The ranges of slots that its shard serves."""


class Follower(Protocol):
    """Who wants to know of the nodes' comings and goings."""

    def became_ready(self, node: Connection, /) -> None:
        """A node can be asked."""

    def became_lost(self, node: Connection, /) -> None:
        """A node was lost, or could not be reached."""

    def slots_moved(self) -> None:
        """Some slots have another owner."""


class Cluster:
    """The nodes of a cluster, opened on the running event loop.

    ``inbox`` takes the messages that its nodes push, and ``follower`` is told what becomes of them.
    """

    def __init__(
        self,
        config: Config,
        credentials: CredentialProvider | None,
        *,
        inbox: Any = None,
        follower: Follower | None = None,
    ) -> None:
        options = config.options
        self._config = config
        self._options = options
        self._inbox = inbox
        self._follower = follower
        self._credentials = credentials
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._closed = False
        # What holds for every node, whichever it is.
        first = options.seeds[0]
        self._shared = options.for_node(first.host, first.port, first)
        self._holders: dict[Any, Connection | Room] = {}
        core = _backend.core
        self._apart = RecordsApart(
            core, self._loop.create_future, key_prefix=options.key_prefix, ttl=options.ttl or 0
        )
        # Where operations wait on slots that no node is known to serve.
        self._limbo = self._new_room()
        self._limbo.pipeline.down = ConnectError("still connecting")
        self.pipeline = core.Router(
            self._loop.create_future,
            self._limbo.pipeline,
            self._apart,
            key_prefix=options.key_prefix,
            hash_tag=options.hash_tag,
        )
        self._apart.router = self.pipeline
        self._near: Any = None
        if options.near_cache is not None:
            self._near = core.NearCache(
                self._loop.create_future, self.pipeline, **options.for_near_cache()
            )
        self._nodes: dict[str, Connection] = {}
        self._addresses: dict[Connection, Address] = {}
        self._masters: list[Connection | None] = [None] * _common.SLOTS
        # Slots of which a node has told the owner since the view was asked for.
        self._moved: set[int] = set()
        self._view: tuple[SlotRange, ...] = ()
        self._rooms: dict[int, Room] = {}
        self._opener: asyncio.TimerHandle | None = None
        self._shut: set[Room] = set()
        self._spare_rooms: list[Room] = []
        self._reading: dict[Connection, list[Connection]] = {}
        self._absences: Counter[Connection] = Counter()
        self._named: dict[Address, Node] = {}
        self._name_again_at = 0.0
        self._leaving: dict[Connection, asyncio.Task[None]] = {}
        self._past: dict[str, Any] = {}
        self._redirections = 0
        self._refreshes = 0
        self._last_loss = ""
        self._refusal: Exception | None = None
        self._discovered = asyncio.Event()
        self._stale = asyncio.Event()
        self._stale.set()
        self._node_ready = asyncio.Event()
        self._open_seeds()
        self._task = self._loop.create_task(self._run(), name=f"dscache {options.address}")

    # -- what a cache wants of its topology

    @property
    def front(self) -> Any:
        """Where operations go: the router, or a near cache before it."""
        return self.pipeline if self._near is None else self._near

    @property
    def is_ready(self) -> bool:
        """Whether every slot has a node that is ready."""
        masters = set(self._masters)
        return not self._closed and all(one is not None and one.is_ready for one in masters)

    @property
    def server(self) -> str:
        """The kind and version of the servers, as far as it is known."""
        known = sorted({node.server for node in self._nodes.values() if node.server})
        return f"cluster of {', '.join(known)}" if known else ""

    async def when_ready(self) -> None:
        """Wait until the slots are known and their nodes ready.

        Raises ConfigError if the server is no cluster, what the nodes say if they all refuse,
        and ConnectError if no node can be reached within ``connectTimeout``. Where others are
        ready, a shard that is down is only logged: its operations fail by themselves.
        """
        self._check_usable()
        timeout = self._shared.connect_timeout
        try:
            async with asyncio.timeout(timeout / 1000):
                await self._discovered.wait()
                if self._refusal is not None:
                    raise self._refusal
                waiting = [node.when_ready() for node in set(self._masters) if node is not None]
                outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        except TimeoutError:
            if any(node is not None and node.is_ready for node in self._masters):
                return
            raise ConnectError(
                f"no node of the cluster {self._options.address} is ready within {timeout} ms: "
                f"{self._troubles()}"
            ) from None
        self._check_usable()
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if len(failures) == len(outcomes) and failures:
            raise failures[0]
        for failure in failures:
            _logger.warning("the cluster serves without one of its shards: %s", failure)

    async def close(self) -> None:
        """Finish what was issued, within ``closeTimeout``, and close every node."""
        if self._closed:
            return
        self._check_owner()
        self._closed = True
        if self._near is not None:
            self._near.close()
        end = self._loop.time() + self._shared.close_timeout / 1000
        # First all is answered, since what is in flight may be redirected from one to another.
        while self._is_busy() and self._loop.time() < end:  # noqa: ASYNC110
            await asyncio.sleep(_DRAIN_STEP)
        self._task.cancel()
        for pipeline in self._holders:
            # What is left has had its time, and the nodes need no more for their part.
            pipeline.fail_all(lambda operation: ConnectionLost(f"{operation}: {_CLOSED}"))
        closing = [node.close() for node in self._nodes.values()]
        await asyncio.gather(*closing, *self._leaving.values())
        await asyncio.wait([self._task])
        self._give_up(_CLOSED)

    def stats(self) -> dict[str, Any]:
        """Return the counters of all nodes together, and of each under ``nodes``."""
        # Lists, as it may be asked from another thread, such as that of a monitoring system.
        nodes = {address: node.stats() for address, node in list(self._nodes.items())}
        of_nodes = [self._past, *nodes.values(), *(node.stats() for node in list(self._leaving))]
        of_none = [*(room.pipeline.stats() for room in self._all_rooms()), self._apart.stats()]
        stats = {
            **_counters.told([*of_nodes, *of_none, self.pipeline.stats()]),
            "connections": sum(one["connections"] for one in nodes.values()),
            "connects": sum(one.get("connects", 0) for one in of_nodes),
            "reconnections": sum(one.get("reconnections", 0) for one in of_nodes),
            "last_loss": self._last_loss,
            "redirections": self._redirections,
            "refreshes": self._refreshes,
            "nodes": nodes,
        }
        if self._near is not None:
            stats["near_cache"] = self._near.stats()
        return stats

    def nodes(self) -> list[NodeState]:
        """Return the nodes as the last view of the cluster had them, primaries first."""
        shards: dict[str, tuple[list[tuple[int, int]], list[str]]] = {}
        for one in self._view:
            ranges, replicas = shards.setdefault(self._address(one.primary), ([], []))
            ranges.append((one.first, one.last))
            replicas.extend(self._address(each) for each in one.replicas)
        states = [
            NodeState(address, "primary", address, tuple(ranges))
            for address, (ranges, _) in shards.items()
        ]
        for address, (ranges, replicas) in shards.items():
            for replica in dict.fromkeys(replicas):
                states.append(NodeState(replica, "replica", address, tuple(ranges)))
        return states

    def look_again(self) -> None:
        """Have the slots asked for again, as somebody has reason to think that they have moved."""
        self._stale.set()

    def _is_busy(self) -> bool:
        nodes = (node.pipeline for node in self._leaving)
        return any(one.queued or one.in_flight for one in (*self._holders, *nodes))

    # -- what the connections tell

    def redirected(self, source: Connection) -> None:
        """Send on what a node has redirected."""
        redirected = source.pipeline.redirected
        source.pipeline.redirected = []
        now_waiting: set[Room] = set()
        batches: dict[Room, list[Any]] = {}
        for words, slot, batch in redirected:
            self._redirections += 1
            source.redirections += 1
            room = self._room_for(slot, source, now_waiting)
            code = words.partition(" ")[0]
            address = None
            if code in ("MOVED", "ASK"):
                address = parse_redirection(words, slot, self._addresses[source])
            target = None
            if self._reading and source is not self._masters[slot]:
                self._stop_reading(source)
            if address is not None:
                target = self._node(self._options.mapped(*address))
                if code == "MOVED":
                    self._masters[slot], target = target, None
                    self._forget([slot])
                    self._moved.add(slot)
                    self._stale.set()
            else:
                tries = len(batch.trail)
                room.wait(random.uniform(0.5, 1) * min(RETRY_FIRST * 2**tries, RETRY_CAP))
                if code != "TRYAGAIN":
                    self._stale.set()
            room.note(slot, batch, target)
            batches.setdefault(room, []).append(batch)
        for room, waiting in batches.items():
            self._hand_over(room, waiting)
        self._move(source.pipeline)
        self._open_rooms()

    def progressed(self, source: Connection) -> None:
        """Look whether a node has answered what a room waits for."""
        self._open_rooms()
        source.watched = any(source in room.sources for room in self._shut)

    def became_ready(self, node: Connection) -> None:
        """Note that a node can be asked."""
        self._node_ready.set()
        if self._options.scale_reads != "master":
            self._assign_readers()
        if self._follower is not None:
            self._follower.became_ready(node)

    def became_lost(self, node: Connection) -> None:
        """Note that a node was lost: another one may have its slots by now."""
        self._last_loss = node.last_loss
        self._stale.set()
        if node.refusal is not None:
            self._node_ready.set()  # to tell of it, if all refuse
        if self._options.scale_reads != "master":
            self._assign_readers()
            self._move(node.pipeline)
        self._open_rooms()
        if self._follower is not None:
            self._follower.became_lost(node)

    def owner(self, slot: int) -> Connection | None:
        """Return the node that is known to serve a slot."""
        return self._masters[slot]

    # -- rooms

    def _room_for(self, slot: int, source: Connection, fresh: set[Room]) -> Room:
        """Return the room in which operations on a slot wait from now on."""
        room = self._rooms.get(slot)
        if room is None:
            room = next(iter(fresh), None) or self._take_room()
            fresh.add(room)
            self._shut.add(room)
            room.slots.add(slot)
            self._rooms[slot] = room
            self.pipeline.owners[slot] = room.pipeline
            self.pipeline.readers[slot] = room.pipeline
        if source not in room.sources:
            room.fence(source)
            source.watched = True
        return room

    def _open_rooms(self) -> None:
        """Let what waits go on where it may."""
        for room in list(self._shut):
            if room.may_open():
                self._open_room(room)
        due = [when for room in self._shut if (when := room.due) is not None]
        if due and (self._opener is None or self._opener.when() > min(due)):
            self._stop_opener()
            self._opener = self._loop.call_at(min(due), self._open_due_rooms)

    def _open_due_rooms(self) -> None:
        self._opener = None
        self._open_rooms()

    def _stop_opener(self) -> None:
        if self._opener is not None:
            self._opener.cancel()
            self._opener = None

    def _open_room(self, room: Room) -> None:
        for slot in list(room.slots):
            if not room.next_turn(slot):
                room.slots.discard(slot)
                del self._rooms[slot]
                self._route(slot)
        if not room.slots:
            self._shut.discard(room)
            self._spare_rooms.append(room)
        self._move(room.pipeline)

    def _take_room(self) -> Room:
        return self._spare_rooms.pop() if self._spare_rooms else self._new_room()

    def _new_room(self) -> Room:
        room = Room(self._shared, self._check_usable, self._options.address)
        self._holders[room.pipeline] = room
        return room

    def _all_rooms(self) -> Iterable[Room]:
        return (self._limbo, *self._shut, *self._spare_rooms)

    def _route(self, slot: int) -> None:
        """Send operations on a slot to the node that is known to serve it."""
        master = self._masters[slot]
        pipeline = self._limbo.pipeline if master is None else master.pipeline
        self.pipeline.owners[slot] = pipeline
        if master is not None and (candidates := self._reading.get(master)):
            # By the slot, so that reads of one record come from one node and seldom go back.
            pipeline = candidates[slot % len(candidates)].pipeline
        self.pipeline.readers[slot] = pipeline

    def _move(self, pipeline: Any) -> None:
        """Hand over what waits in a pipeline and belongs elsewhere by now."""
        batches: dict[Any, list[Any]] = {}
        for target, batch in pipeline.release(self.pipeline.target_of):
            batches.setdefault(target, []).append(batch)
        for target, waiting in batches.items():
            self._hand_over(self._holders.get(target, self._limbo), waiting)

    def _forget(self, slots: list[int]) -> None:
        """Let the near cache forget what it has of slots that another node serves by now."""
        if self._near is not None:
            self._near.slots_moved(slots)
        if self._follower is not None and slots:
            self._loop.call_soon(self._follower.slots_moved)

    def _hand_over(self, holder: Connection | Room, batches: list[Any]) -> None:
        try:
            holder.adopt(batches)
        except ConnectionLost:
            # The node was closed just now. What is in limbo finds another, or ends in time.
            self._limbo.adopt(batches)
            self._stale.set()

    # -- the nodes

    def _node(self, address: Address) -> Connection:
        """Return the connection to a node, opened if it is a new one."""
        host, port = address
        shown = _common.join_address(host, port)
        node = self._nodes.get(shown)
        if node is None:
            options = self._options.for_node(host, port, self._named.get(address))
            node = Connection(
                options,
                self._credentials,
                cluster=self,
                read_only=self._options.scale_reads != "master",
                near=self._near,
                inbox=self._inbox,
            )
            self._nodes[shown] = node
            self._addresses[node] = address
            self._holders[node.pipeline] = node
        return node

    def _open_seeds(self) -> None:
        for seed in self._options.seeds:
            self._node((seed.host, seed.port))

    def _leave(self, node: Connection) -> None:
        """Close a node that is no part of the cluster any more, after what it has in flight."""
        del self._nodes[_common.join_address(*self._addresses[node])]
        del self._holders[node.pipeline]
        self._absences.pop(node, None)
        self._move(node.pipeline)
        if self._follower is not None:
            self._follower.became_lost(node)

        async def close() -> None:
            await node.close()
            del self._addresses[node], self._leaving[node]
            _counters.add(self._past, node.stats())

        self._leaving[node] = self._loop.create_task(close(), name=f"dscache {node.address}")

    def _address(self, announced: Address) -> str:
        return _common.join_address(*self._options.mapped(*announced))

    # -- the view

    async def _run(self) -> None:
        """Keep the slot map up to date until cancelled: by ``close``, or by a loop that ends."""
        interval = self._options.slots_refresh_interval
        retry = self._options.cluster_retry_strategy
        failures = unready = 0
        try:
            while True:
                try:
                    async with asyncio.timeout(interval / 1000 if interval else None):
                        await self._stale.wait()
                except TimeoutError:
                    pass
                self._stale.clear()
                try:
                    self._apply(await self._look())
                except Exception as error:
                    # Whatever it is: without a next attempt the cache would never be well again.
                    known = isinstance(error, DscacheError)
                    self._note_failure(error if known else ConnectError(repr(error)))
                    longest = min(retry.cap, retry.first * 2**failures) / 1000
                    failures = min(failures + 1, 30)
                    self._stale.set()
                    await self._pause(random.uniform(0, longest))
                    continue
                failures = 0
                gap = min(GAP * GAP_GROWTH**unready, GAP_CAP)
                await asyncio.sleep(random.uniform(gap / 2, gap))
                unready = 0 if self.is_ready else min(unready + 1, 30)
                if unready:
                    self._stale.set()
        finally:
            self._closed = True
            if not self._loop.is_closed():
                self._give_up(_CLOSED)

    def _ready_nodes(self) -> list[Connection]:
        return [node for node in self._nodes.values() if node.is_ready]

    async def _pause(self, seconds: float) -> None:
        """Wait so long, or until another node can be asked."""
        self._node_ready.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._node_ready.wait()
        except TimeoutError:
            return

    async def _look(self) -> tuple[SlotRange, ...]:
        """Return the newest view that some nodes have; raises what keeps all of them from it."""
        await self._name_seeds()
        if not self._ready_nodes():
            self._open_seeds()
            await self._pause(self._options.slots_refresh_timeout / 1000)
        ready = self._ready_nodes()
        if not ready:
            raise ConnectError(f"no node can be reached: {self._troubles()}")
        asked = random.sample(ready, min(ASKED, len(ready)))
        self._moved.clear()
        answers = await asyncio.gather(*map(self._view_of, asked), return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        views = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not views:
            raise failures[0]
        view = newest(views).ranges
        self._refreshes += 1
        return view

    async def _view_of(self, node: Connection) -> View:
        """Return what a node knows of the cluster."""
        timeout = self._options.slots_refresh_timeout
        try:
            async with asyncio.timeout(timeout / 1000):
                slots, info = await node.ask(*map(list, QUESTIONS))
        except TimeoutError:
            raise ConnectError(
                f"{node.address}: no answer to CLUSTER SLOTS in {timeout} ms"
            ) from None
        return read_view(slots, info, self._addresses[node], self._config.source)

    def _note_failure(self, error: Exception) -> None:
        """Tell those who wait for the slots why there are none."""
        self._limbo.pipeline.down = error
        refusing = isinstance(error, ConfigError | ReplyError)
        if not refusing and self._nodes:
            refusals = [node.refusal for node in self._nodes.values()]
            if all(refusals):
                refusing, error = True, refusals[0]  # type: ignore[assignment]
        if self._view:
            return
        if refusing and str(error) != str(self._refusal):
            _logger.warning("can't use the cluster %s: %s", self._options.address, error)
        self._refusal = error if refusing else None
        if refusing:
            self._discovered.set()
            message = str(error)
            self._limbo.refuse(lambda operation: ConnectError(f"{operation}: {message}"))
        else:
            self._discovered.clear()
            self._limbo.refuse(None)

    def _apply(self, view: tuple[SlotRange, ...]) -> None:
        """Take over a view: open nodes, give slots their owners, and let nodes leave."""
        mapped = self._options.mapped
        masters: list[Connection | None] = [None] * _common.SLOTS
        present: set[Connection] = set()
        for one in view:
            primary = self._node(mapped(*one.primary))
            present.add(primary)
            masters[one.first : one.last + 1] = [primary] * (one.last - one.first + 1)
            if self._options.scale_reads != "master":
                present.update(self._node(mapped(*replica)) for replica in one.replicas)
        for slot in self._moved:
            # The view may be the older one; the next will tell.
            masters[slot] = self._masters[slot]
        present.update(node for node in masters if node is not None)
        self._view = view
        self._limbo.pipeline.down = ConnectError("no node of the cluster serves this slot")
        changed = [slot for slot, now in enumerate(masters) if now is not self._masters[slot]]
        left = {self._masters[slot] for slot in changed}
        self._forget(changed)
        rooms: set[Room] = set()
        for slot in changed:
            before, self._masters[slot] = self._masters[slot], masters[slot]
            if slot in self._rooms:
                continue
            if before is not None and before.pipeline.in_flight:
                self._room_for(slot, before, rooms)
            else:
                self._route(slot)
        if self._options.scale_reads != "master":
            self._assign_readers()
        for node in left:
            self._move(self._limbo.pipeline if node is None else node.pipeline)
        self._open_rooms()
        self._refusal = None
        self._limbo.refuse(None)
        self._discovered.set()
        self._let_leave(present)

    def _let_leave(self, present: set[Connection]) -> None:
        if not any(node.is_ready for node in present):
            return
        for node in list(self._nodes.values()):
            if node in present:
                self._absences.pop(node, None)
                continue
            self._absences[node] += 1
            if self._absences[node] >= VIEWS_TO_LEAVE:
                self._leave(node)
            else:
                self._stale.set()

    # -- reads from replicas

    def _assign_readers(self) -> None:
        """Choose anew which nodes are read from: those that are ready, as configured."""
        shards: dict[Connection, dict[Connection, None]] = {}
        for one in self._view:
            primary = self._nodes.get(self._address(one.primary))
            if primary is not None:
                replicas = (self._nodes.get(self._address(replica)) for replica in one.replicas)
                ready = {node: None for node in replicas if node is not None and node.is_ready}
                shards.setdefault(primary, {}).update(ready)
        also_primary = self._options.scale_reads == "all"
        reading = {
            primary: [*replicas, primary] if also_primary else list(replicas)
            for primary, replicas in shards.items()
        }
        if reading == self._reading:
            return
        self._reading = reading
        for slot in range(_common.SLOTS):
            if slot not in self._rooms:
                self._route(slot)

    def _stop_reading(self, node: Connection) -> None:
        """If it is a replica that sends reads away, read from others until the next view."""
        for candidates in self._reading.values():
            if node in candidates:
                candidates.remove(node)

    # -- small things

    async def _name_seeds(self) -> None:
        """Look up which addresses the configured nodes with credentials of their own have."""
        now = self._loop.time()
        if now < self._name_again_at:
            return
        self._name_again_at = now + NAMES_LAST
        for seed in self._options.seeds:
            if seed.password is UNSET and seed.username is UNSET:
                continue
            try:
                async with asyncio.timeout(self._options.slots_refresh_timeout / 1000):
                    found = await self._loop.getaddrinfo(seed.host, seed.port)
            except (OSError, TimeoutError):
                continue
            for *_, address in found:
                self._named[str(address[0]), seed.port] = seed

    def _troubles(self) -> str:
        """Return what keeps the nodes from being ready, each in a few words."""
        down = {address: node.pipeline.down for address, node in self._nodes.items()}
        troubles = "; ".join(f"{address}: {why}" for address, why in down.items() if why)
        return troubles or str(self._limbo.pipeline.down)

    def _check_owner(self) -> None:
        check_process(self._pid, _OWNER)
        check_loop(self._loop, _OWNER)

    def _check_usable(self) -> None:
        self._check_owner()
        if self._closed:
            raise ConnectionLost("the cache is closed")

    def _give_up(self, reason: str) -> None:
        self._discovered.set()
        self._stop_opener()
        for room in self._all_rooms():
            room.fail(reason)
