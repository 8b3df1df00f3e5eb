"""The state of a cluster, for both caches: its nodes, its slots, and the errors of both."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from math import inf
from typing import Any, Final

from .._locks import make_lock
from ..config import Config
from ..config.address import join_address
from ..core import stats as counters
from ..core.failures import ErrorOf
from ..errors import ConfigError, ConnectError, ReplyError
from .backoff import full_jitter
from .maintenance import SlotMove
from .refresh_schedule import RefreshSchedule
from .slot_table import NodeInfo, Seeds, Shard, SlotTable
from .slots import (
    ASKED,
    GONE_AFTER,
    NO_NODE,
    VIEWS_TO_LEAVE,
    Address,
    View,
    groups_of,
    newest,
    parse_redirection,
)

Counts = Iterable[Mapping[str, Any]]
"""The counters of some connections."""

_logger = logging.getLogger("dscache")

# A lost replica isn't read for this long, in seconds, and for twice as long each further time.
_AVOID_FIRST: Final = 0.5
_AVOID_CAP: Final = 8.0
# If a cluster announces more nodes than this, each is connected to on its first use. Connecting to
# sixteen thousand takes seconds, and a faulty node may announce as many.
_AT_ONCE: Final = 256


class ClusterState(RefreshSchedule):
    """The nodes and slots of a cluster, and when to ask for them again; any thread may use it."""

    def __init__(self, config: Config, on_due: Callable[[], object] | None = None) -> None:
        options = config.options
        super().__init__(options, on_due)
        self.source = config.source
        self.address = options.address
        self.view = View(-1, ())
        """The newest view that a node has given."""
        self.table = SlotTable()
        self.known = False
        """Whether any node has given its view yet."""
        self.opens_all = True
        """Whether nodes are connected to before an operation needs them."""
        self.trouble: Exception = ConnectError("still connecting")
        """Why some slot has no node."""
        self.refusal: ErrorOf | None = None
        """How operations fail at once if no node can be used."""
        self.past: dict[str, Any] = {}
        """The counters of nodes that have left, and of connections that belong to no node."""
        self.departures = 0
        """How many nodes have left."""
        self.redirections = 0
        self.refreshes = 0
        self.last_loss = ""
        self.nodes: dict[str, NodeInfo] = {}
        """The nodes by address."""
        self.seeds = Seeds(options)
        self._options = options
        self._failing_since = inf
        self._complained = ""
        self._strangers: set[str] = set()
        self._witnesses: set[str] = set()
        self._checks_ids = True
        self._open_seeds()

    # -- the nodes

    def node(self, address: Address) -> NodeInfo:
        """Return the node at an address, which may be a new one."""
        shown = join_address(*address)
        found = self.nodes.get(shown)
        if found is None:
            with self.lock:
                node = NodeInfo(self.seeds.options_at(address))
                found = self.nodes.setdefault(shown, node)
        return found

    def node_at(self, shown: str) -> NodeInfo:
        """Return the node at ``host:port``, which may be a new one."""
        found = self.nodes.get(shown)
        if found is None:
            host, _, port = shown.rpartition(":")
            found = self.node((host.strip("[]"), int(port)))
        return found

    def primaries(self) -> list[NodeInfo]:
        """Return the nodes that serve slots; of very many, the ones needed so far, or one."""
        shown = self.table.primaries
        known = [node for one in shown if (node := self.nodes.get(one))]
        return known or [self.node_at(one) for one in list(shown)[:1]]

    def keep_counts(self, node: NodeInfo | None, counts: Mapping[str, Any]) -> None:
        """Keep the counters of a connection that has ended; ``node`` is None if it had none."""
        with self.lock:
            known = node is not None and self.nodes.get(node.shown) is node
            kept = node.counts if known and node is not None else self.past
            counters.add(kept, counts, lasting=True)

    @property
    def server(self) -> str:
        """The kinds and versions of the servers, as far as they are known."""
        known = sorted({node.server for node in list(self.nodes.values()) if node.server})
        return f"cluster of {', '.join(known)}" if known else ""

    def stats(
        self, nodes: dict[str, dict[str, Any]], departed: Counts, others: Counts
    ) -> dict[str, Any]:
        """Return the counters of all connections together, and of each node.

        ``departed`` are the counters of departed nodes, ``past`` among them. ``others`` belong to
        no node.
        """
        of_nodes = [*departed, *nodes.values()]
        return {
            **counters.merged([*of_nodes, *others]),
            "connections": sum(one["connections"] for one in nodes.values()),
            "connects": sum(one.get("connects", 0) for one in of_nodes),
            "reconnections": sum(one.get("reconnections", 0) for one in of_nodes),
            "last_loss": self.last_loss,
            "redirections": self.redirections,
            "refreshes": self.refreshes,
            "nodes": nodes,
        }

    def errors_by_node(self) -> str:
        """Return why nodes can't be connected to, a few words for each."""
        down = {node.shown: node.trouble for node in list(self.nodes.values()) if node.trouble}
        return "; ".join(f"{shown}: {why}" for shown, why in down.items()) or str(self.trouble)

    def _open_seeds(self) -> None:
        for address in self.seeds.addresses:
            self.node(address)

    def fallbacks(self) -> list[NodeInfo]:
        """Return the nodes to try while none answers: the configured and the known ones."""
        known: list[Address] = []
        if self._failures and len(self.view.nodes) <= _AT_ONCE:
            known = self._places()
        with self.lock:
            return [
                self.node(address) for address in dict.fromkeys((*self.seeds.addresses, *known))
            ]

    # -- which cluster a node belongs to

    def check_identity(self, node: NodeInfo, node_id: str) -> None:
        """Note the id of a node just connected to, which is empty if the node doesn't tell it.

        Raises ConnectError if the cluster has another node at this address, as where a node of
        another cluster has got an address that was used before. A node that was replaced by one of
        the same cluster counts once the other nodes announce it.
        """
        with self.lock:
            node.node_id = node_id
            if self.may_use(node, node_id):
                return
        if node_id == NO_NODE:
            raise ConnectError(
                f"{node.shown} isn't a node of a cluster but a server of its own: it isn't used"
            )
        raise ConnectError(
            f"{node.shown} is another node, {node_id[:8]}, than {self.table.ids[node.shown][:8]}, "
            "which the cluster has there: it isn't used unless the cluster announces it"
        )

    def may_use(self, node: NodeInfo, node_id: str) -> bool:
        """Return whether a node with this id may be the one that the cluster has at its address.

        While all known nodes are gone, it may also be a configured node. A server that isn't a node
        of a cluster may be used only before the first view: later, its address is one that the
        cluster had.
        """
        if node_id == NO_NODE:
            return not self.known
        if self._is_expected(node.shown, node_id):
            return True
        with self.lock:
            return self._is_seed(node.address) and self._is_gone()

    def _is_expected(self, shown: str, node_id: str) -> bool:
        return not self._checks_ids or self.table.is_of(shown, node_id)

    def choose(self, views: Iterable[View]) -> View:
        """Return the newest of some views of this cluster.

        A view without any node of the view in use is another cluster's. It counts only if it came
        from a configured node while all known nodes are gone: then the whole cluster was replaced.
        Before the first view, the cluster with most of the nodes counts. Raises ConnectError if no
        view is left.
        """
        with self.lock:
            views = list(views)
            kin = self._kin_among(views)
            if not kin and views and self._is_gone():
                kin = [view for view in views if self._is_seed(view.asked)]
                if kin:
                    _logger.warning(
                        "all nodes of the cluster %s were replaced: the configured nodes form "
                        "another one",
                        self.address,
                    )
            others = [view for view in views if view not in kin]
            for view in others:
                self._refuse(view)
            if kin:
                self._witnesses = {view.node_id for view in kin if view.node_id}
                self._strangers.difference_update(join_address(*view.asked) for view in kin)
                self._checks_ids = self._tell_their_ids(kin)
                return newest(kin)
            strangers = ", ".join(join_address(*view.asked) for view in others)
            raise ConnectError(f"nodes of another cluster are at known addresses: {strangers}")

    def is_kin(self, view: View) -> bool:
        """Return whether a view is of this cluster, as far as it can tell by itself."""
        return view.is_kin(self.view) or view.is_heir(self._ids())

    def _kin_among(self, views: list[View]) -> list[View]:
        groups = groups_of(views)
        if not self.known:
            return max(groups, key=_weight, default=[])
        ours = [group for group in groups if any(view.is_kin(self.view) for view in group)]
        if not ours:
            # No node of the view in use serves slots any more: the nodes that gave it may tell why.
            known = self._ids()
            ours = [group for group in groups if any(view.is_heir(known) for view in group)]
        return [view for group in ours for view in group]

    def _ids(self) -> set[str]:
        return {*self.view.nodes, *self._witnesses}

    def _refuse(self, view: View) -> None:
        shown = join_address(*view.asked)
        node = self.nodes.get(shown)
        if node is not None:
            # A node that was reset has another id by now, on the same connection.
            node.node_id = self._ids_of(view).get(shown, node.node_id)
        if shown not in self._strangers:
            self._strangers.add(shown)
            _logger.warning(
                "%s belongs to another cluster than %s: its view shares no node with the one in "
                "use, and is refused",
                shown,
                self.address,
            )

    def _tell_their_ids(self, views: Iterable[View]) -> bool:
        """Return whether nodes tell the ids that their own views have for them.

        The nodes behind some proxies don't: then ids prove nothing.
        """
        said = []
        for view in views:
            node = self.nodes.get(join_address(*view.asked))
            if node is not None and node.node_id and node.shown in self._ids_of(view):
                said.append(node.node_id in view.nodes)
        return any(said) or not said

    def _is_seed(self, address: Address) -> bool:
        return address in self.seeds.addresses

    def _is_gone(self) -> bool:
        """Return whether no known node is left."""
        if time.monotonic() < self._failing_since + GONE_AFTER:
            return False
        nodes = [self.nodes.get(join_address(*one)) for one in self._places()]
        return all(
            node.trouble is not None or not self._is_expected(node.shown, node.node_id)
            for node in nodes
            if node is not None and node.is_tried
        )

    def _places(self) -> list[Address]:
        """Return the addresses of the nodes in the view in use."""
        return [self._options.mapped(*one) for one in self.view.nodes.values() if one is not None]

    def _ids_of(self, view: View) -> dict[str, str]:
        ids: dict[str, str] = {}
        shared = set()
        for name, address in view.nodes.items():
            if address is not None:
                shown = join_address(*self._options.mapped(*address))
                if ids.setdefault(shown, name) != name:
                    shared.add(shown)
        return {shown: name for shown, name in ids.items() if shown not in shared}

    # -- the slots

    def record_redirection(
        self, words: str, slot: int, source: Address
    ) -> tuple[str, NodeInfo | None]:
        """Note that a node has redirected an operation or put it off, in these words.

        Returns their code, and the node that MOVED or ASK names.
        """
        code = words.partition(" ")[0]
        address = None
        if code in ("MOVED", "ASK"):
            address = self._located(parse_redirection(words, slot, source), words)
        named = None if address is None else self.node(self._options.mapped(*address))
        with self.lock:
            self.redirections += 1
            if named is not None and code == "MOVED":
                self.table.moved.append((slot, named.shown))
        if code == "MOVED" or (named is None and code != "TRYAGAIN"):
            self.record_stale()
        return code, named

    def record_moves(self, moves: Collection[SlotMove]) -> dict[int, NodeInfo]:
        """Note that slots have moved, as announced; return the new node of each that has.

        A slot stays if its known owner isn't the former owner that the announcement names. The
        announcement is then older than the table, or names nodes in another way than CLUSTER SLOTS,
        and the next refresh decides. So it does on slots that go to very many nodes. A former owner
        without any slot leaves with the first view that agrees.
        """
        if len({move.target for move in moves}) > _AT_ONCE:
            moves = ()
        with self.lock:
            owners: dict[int, NodeInfo] = {}
            heirs = dict(self.table.moved)
            for move in moves:
                source = join_address(*self._options.mapped(*move.source))
                target = self._options.mapped(*move.target)
                moved = [
                    slot
                    for first, last in move.ranges
                    for slot in range(first, last + 1)
                    if (heirs.get(slot) or self.table.shard_owner(slot)) == source
                ]
                if moved:
                    owners.update(dict.fromkeys(moved, self.node(target)))
            self.table.moved.extend((slot, node.shown) for slot, node in owners.items())
            for shown in {self.table.shard_owner(slot) or "" for slot in owners}:
                if (node := self.nodes.get(shown)) is not None:
                    node.absences = max(node.absences, VIEWS_TO_LEAVE - 1)
        self.record_stale()
        return owners

    def _located(self, address: Address | None, words: str) -> Address | None:
        """Return the address of a redirection; one without a host may have one in the view."""
        if address is None or not words.rpartition(":")[0].endswith(" ?"):
            return address
        at_port = {one for one in self.view.nodes.values() if one and one[1] == address[1]}
        if len(at_port) > 1:
            return None  # the next view tells which
        return at_port.pop() if at_port else address

    def apply(
        self,
        view: View,
        since: SlotTable,
        moved: int,
        is_up: Callable[[str], bool] = lambda shown: True,
    ) -> None:
        """Take over a view, and drop the nodes that two views in a row leave out.

        The refresh began while ``since`` was the table, with ``moved`` redirected slots. Nodes are
        only dropped if ``is_up`` holds for the address of one that is left.
        """
        now = time.monotonic()
        with self.lock:
            self.refreshes += 1
            changed = view.ranges != self.view.ranges
            self.view = view
            stayed = (self._is_stale or self._is_unready) and not changed
            self._is_unready = False
            self._fruitless = self._fruitless + 1 if stayed else 0
            self._failures = 0
            self._failing_since = inf
            self.known = True
            self.refusal = None
            self.trouble = ConnectError("no node of the cluster serves this slot")
            # A slot that moved during the refresh may be older in the view; the next view decides.
            kept = self.table.moved[moved if self.table is since else 0 :]
            table = SlotTable(self._shards_of(view), kept, self._ids_of(view))
            if table != self.table:
                self.table = table
            self._let_leave(is_up)
            self._end_claim(now)
            self._refresh_when_readable(now)

    def _shards_of(self, view: View) -> tuple[Shard, ...]:
        mapped = self._options.mapped
        reads_replicas = self._options.scale_reads != "master"
        announced = {one.primary for one in view.ranges}
        if reads_replicas:
            announced.update(replica for one in view.ranges for replica in one.replicas)
        self.opens_all = len(announced) <= _AT_ONCE
        zones = {join_address(*mapped(*at)): zone for at, zone in view.zones.items()}
        shards = []
        for one in sorted(view.ranges, key=lambda one: one.first):
            primary = join_address(*mapped(*one.primary))
            if self.opens_all:
                self.node_at(primary)
            replicas = [mapped(*replica) for replica in one.replicas] if reads_replicas else []
            readers, reserves = self._readers(primary, replicas, zones)
            shards.append(Shard(one.first, one.last, primary, readers, reserves))
        return tuple(shards)

    def record_failure(self, error: Exception) -> None:
        """Note that a refresh failed; the next one comes with exponential backoff."""
        retry = self._options.cluster_retry_strategy
        now = time.monotonic()
        with self.lock:
            self.trouble = error
            self.fallbacks()
            self._end_claim(now)
            pause = full_jitter(retry.first / 1000, retry.cap / 1000, self._failures)
            self._failures += 1
            self._failing_since = min(self._failing_since, now)
            untried = any(not node.is_tried for node in self.nodes.values())
            self.refresh_at = self._asked_at + (0 if untried else pause)
            self.refusal = None if self.known else self._refusal_of(error)
            if self.refusal is not None and str(error) != self._complained:
                self._complained = str(error)
                _logger.warning("can't use the cluster %s: %s", self.address, error)

    def _refusal_of(self, error: Exception) -> ErrorOf | None:
        """Return how operations fail if no later refresh can succeed, or None if one can."""
        if isinstance(error, ConfigError):
            message = str(error)
            return lambda operation: ConfigError(message)
        if isinstance(error, ReplyError):
            words = error.message
            return lambda operation: ReplyError(words, context=operation)
        refusals = [node.refusal for node in self.nodes.values()]
        return refusals[0] if all(refusals) else None

    def _let_leave(self, is_up: Callable[[str], bool]) -> None:
        present = set(self.table.primaries)
        for shard in self.table.shards:
            present.update(shard.readers, shard.reserves)
        if not any(map(is_up, present)):
            return
        departures = self.departures
        for shown, node in list(self.nodes.items()):
            if shown in present:
                node.absences = 0
                continue
            node.absences += 1
            if node.absences >= VIEWS_TO_LEAVE:
                del self.nodes[shown]
                self.departures += 1
                counters.add(self.past, node.counts)
                counters.add(self.past, node.connections())
            else:
                self._is_stale = True
        if self.departures != departures:
            # It becomes a new table, so that each thread sees the change, and ends its connections
            # to these nodes.
            self.table = replace(self.table, moved=self.table.moved.copy())

    # -- which nodes to ask

    def to_ask(self, ready: Iterable[str]) -> list[NodeInfo]:
        """Return the nodes to ask for their view, first the nodes at the addresses ``ready``."""
        chosen = [node for shown in ready if (node := self.nodes.get(shown))][:ASKED]
        with self.lock:
            others = [one for one in self.nodes.values() if one not in chosen]
        random.shuffle(others)
        # Nodes without a recorded failure first.
        others.sort(key=lambda one: one.trouble is not None)
        # A name lookup may take long. So at most one is done, and none if another node can be
        # asked.
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

    # -- reads from replicas

    def _readers(
        self, primary: str, replicas: list[Address], zones: Mapping[str, str]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the addresses that are read for a shard, and its reserves.

        The first are empty if its primary is read. The reserves are the replicas in other zones,
        while there is one in the cache's zone.
        """
        now = time.monotonic()
        shown = [join_address(*one) for one in replicas]
        readers = [one for one in shown if self._is_readable(one, now)]
        if self._options.scale_reads == "all" and readers:
            readers.append(primary)
        if self._options.scale_reads != "zone":
            return tuple(readers), ()
        here = tuple(one for one in readers if self._zone_of(one, zones) == self._options.zone)
        others = tuple(one for one in readers if one not in here)
        return (here, others) if here else (others, ())

    def _zone_of(self, shown: str, zones: Mapping[str, str]) -> str:
        node = self.nodes.get(shown)
        return zones.get(shown) or (node.zone if node is not None else "")

    def record_zone(self, node: NodeInfo, zone: str) -> None:
        """Note the zone that a node has told, on a server whose slots don't have it."""
        if node.zone != zone:
            node.zone = zone
            if self._options.scale_reads == "zone":
                self.record_stale()

    def _is_readable(self, shown: str, now: float) -> bool:
        node = self.nodes.get(shown)
        return node is None or node.avoid_until <= now

    def exclude_replica(self, node: NodeInfo) -> None:
        """Read from other nodes for a while, if this one is a replica."""
        with self.lock:
            table = self.table
            if node.shown in table.primaries:
                return
            now = time.monotonic()
            shards = [shard.without(node.shown) for shard in table.shards]
            if tuple(shards) == table.shards:
                return
            again = now < node.avoid_until + _AVOID_CAP
            node.avoid_for = min(2 * node.avoid_for, _AVOID_CAP) if again else _AVOID_FIRST
            node.avoid_until = now + node.avoid_for
            self.table = replace(table, shards=tuple(shards), moved=table.moved.copy())
            self._refresh_when_readable(now)

    def _refresh_when_readable(self, now: float) -> None:
        """Have the slots refreshed when an excluded replica may be read again."""
        ends = [one.avoid_until for one in self.nodes.values() if one.avoid_until > now]
        if ends and not self._claim:
            self._bring_forward(min(ends))

    # -- connections

    def record_connected(self, node: NodeInfo, server: str, again: bool) -> None:
        """Note a new connection to a node; ``again`` if it replaces a lost one."""
        with self.lock:
            node.record_connected(server, again)

    def record_unreachable(self, node: NodeInfo, error: Exception, refusal: ErrorOf | None) -> None:
        """Note a failed attempt to connect; ``refusal`` makes errors if it is permanent."""
        node.is_tried, node.trouble, node.refusal = True, error, refusal
        self.record_loss(node, str(error))

    def record_loss(self, node: NodeInfo, reason: str) -> None:
        """Note a lost connection: another node may serve its slots by now."""
        node.last_loss = self.last_loss = reason
        self.record_stale()

    def reset_after_fork(self) -> None:
        """Begin again in a forked child, with the known slots and without a claim."""
        self.lock = make_lock()
        self._claim = self.refresh_at = 0.0


def _weight(group: list[View]) -> tuple[int, int]:
    """Return how much a cluster counts: first by the number of nodes that gave views of it."""
    return len([view for view in group if view.ranges]), max(view.epoch for view in group)
