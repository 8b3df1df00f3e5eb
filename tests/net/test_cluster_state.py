"""The state of a cluster that both caches share: its schedule, its slots and its nodes."""

from __future__ import annotations

import time
from dataclasses import replace
from math import inf
from typing import Any

import pytest

import dscache
from dscache.config import load
from dscache.net import slots
from dscache.net.cluster_state import ClusterState
from dscache.net.maintenance import SlotMove
from dscache.net.slot_table import SlotTable
from dscache.net.slots import Address, SlotRange, View

A, B, C, D = (("127.0.0.1", port) for port in (1, 2, 3, 4))
HALF = 8192


def state_of(*seeds: Address, **options: Any) -> ClusterState:
    nodes = [{"host": host, "port": port} for host, port in seeds or (A,)]
    return ClusterState(load({"name": "redis", "options": {"nodes": nodes, **options}}))


def view_of(first: Address, second: Address, *replicas: Address, epoch: int = 1) -> View:
    """Return a view of two primaries; the first one has the replicas."""
    ranges = (SlotRange(0, HALF - 1, first, replicas), SlotRange(HALF, 16383, second, ()))
    return View(epoch, ranges)


def refresh(state: ClusterState, view: View, **options: Any) -> None:
    state.apply(view, state.table, len(state.table.moved), **options)


def shown(*addresses: Address) -> set[str]:
    return {f"{host}:{port}" for host, port in addresses}


def test_one_caller_has_the_refresh() -> None:
    state = state_of()
    now = time.monotonic()
    claim = state.start_refresh(now)
    assert claim > now
    assert not state.start_refresh(now)
    state.abandon_refresh(claim - 1)  # of another caller, whose claim has ended by itself
    assert not state.start_refresh(now)
    state.abandon_refresh(claim)
    assert 0 < state.refresh_at - time.monotonic() <= slots.GAP


def test_a_claim_ends_by_itself() -> None:
    state = state_of()
    claim = state.start_refresh(time.monotonic())
    assert not state.start_refresh(claim - 0.01)
    assert state.start_refresh(claim) > claim


def test_nothing_is_due_after_a_refresh() -> None:
    state = state_of(slotsRefreshInterval=None)
    assert state.start_refresh(time.monotonic())
    refresh(state, view_of(A, B))
    assert state.refresh_at == inf
    state.record_stale()
    assert state.refresh_at < time.monotonic() + slots.GAP
    assert state.start_refresh(state.refresh_at)
    state.record_stale()  # the view under way may be older than this
    refresh(state, view_of(A, B))
    assert state.refresh_at < time.monotonic() + slots.GAP * slots.GAP_GROWTH


@pytest.mark.parametrize("record", ["record_stale", "record_unready"])
def test_refreshes_that_change_nothing_get_rarer(record: str) -> None:
    state = state_of()
    refresh(state, view_of(A, B))
    longest = []
    for _ in range(30):
        if record == "record_unready":
            state.record_unready()
        assert state.start_refresh(inf)
        if record == "record_stale":
            state.record_stale()
        refresh(state, view_of(A, B))
        longest.append(max(state.gap() for _ in range(50)))
    assert longest[0] <= slots.GAP * slots.GAP_GROWTH
    assert slots.GAP_CAP / 2 <= longest[-1] <= slots.GAP_CAP
    state.start_refresh(inf)
    state.record_stale()
    refresh(state, view_of(B, A))
    assert max(state.gap() for _ in range(50)) <= slots.GAP


def test_the_owner_of_a_cache_is_called_when_a_refresh_comes_earlier() -> None:
    calls: list[float] = []
    config = load({"name": "redis", "options": {"nodes": [{"host": A[0], "port": A[1]}]}})
    state = ClusterState(config, lambda: calls.append(state.refresh_at))
    assert state.start_refresh(time.monotonic())
    state.record_stale()
    assert calls == []
    refresh(state, view_of(A, B))
    state.start_refresh(inf)
    refresh(state, view_of(A, B))
    state.record_stale()
    assert calls == [state.refresh_at]


def test_failures_back_off_and_a_ready_node_ends_the_pause() -> None:
    state = state_of(clusterRetryStrategy={"first": 1000, "cap": 60_000})
    for node in state.nodes.values():
        node.is_tried = True
    pauses = []
    for _ in range(40):
        state.record_failure(dscache.ConnectError("no node"))
        pauses.append(state.refresh_at - time.monotonic())
    assert pauses[0] <= 1
    assert max(pauses) <= 60
    assert max(pauses) > 10
    state.expedite_refresh()
    assert state.start_refresh(time.monotonic())
    refresh(state, view_of(A, B))
    due = state.refresh_at
    state.expedite_refresh()
    assert state.refresh_at == due


def test_an_untried_node_is_asked_without_a_pause() -> None:
    state = state_of(clusterRetryStrategy={"first": 60_000, "cap": 60_000})
    state.record_failure(dscache.ConnectError("no node"))
    assert state.start_refresh(time.monotonic())


def test_a_redirection_is_newer_than_a_view_asked_for_before() -> None:
    state = state_of()
    refresh(state, view_of(A, B))
    state.record_redirection("MOVED 5 127.0.0.1:2", 5, A)
    table, moved = state.table, len(state.table.moved)
    state.record_redirection("MOVED 6 127.0.0.1:3", 6, A)
    state.apply(view_of(A, B), table, moved)
    assert state.table.find(5, reads=False) == "127.0.0.1:1"
    assert state.table.find(6, reads=False) == "127.0.0.1:3"
    assert set(state.table.primaries) == shown(A, B, C)
    refresh(state, view_of(A, B))
    assert state.table.find(6, reads=False) == "127.0.0.1:1"
    assert state.redirections == 2


def test_a_node_leaves_after_two_views_without_it() -> None:
    state = state_of(A, C)
    state.keep_counts(state.node(C), {"reads": 3, "queued": 2})
    refresh(state, view_of(A, B))
    assert set(state.nodes) == shown(A, B, C)
    assert state.refresh_at < time.monotonic() + 1  # the second view comes soon
    refresh(state, view_of(A, C))
    refresh(state, view_of(A, B))
    assert set(state.nodes) == shown(A, B, C)
    refresh(state, view_of(A, B))
    assert set(state.nodes) == shown(A, B)
    assert state.departures == 1
    assert state.past["reads"] == 3
    assert "queued" not in state.past


def test_a_departure_alone_is_a_new_table() -> None:
    """Threads see by the table that they have connections to end."""
    state = state_of(C)
    refresh(state, view_of(A, B))
    table = state.table
    refresh(state, view_of(A, B))
    assert state.departures == 1
    assert state.table is not table
    assert state.table == table
    table = state.table
    refresh(state, view_of(A, B))
    assert state.table is table


# -- announced moves of slots


def moved(source: Address, target: Address, *ranges: tuple[int, int]) -> SlotMove:
    return SlotMove(source, target, ranges)


def test_announced_slots_move_at_once() -> None:
    state = state_of()
    refresh(state, view_of(A, B))
    owners = state.record_moves([moved(A, C, (0, 9), (20, 20)), moved(B, A, (HALF, HALF))])
    assert {slot: node.address for slot, node in owners.items()} == {
        **dict.fromkeys((*range(10), 20), C),
        HALF: A,
    }
    assert state.table.find(9, reads=True) == "127.0.0.1:3"
    assert state.table.find(10, reads=False) == "127.0.0.1:1"
    assert state.table.find(HALF, reads=False) == "127.0.0.1:1"
    assert state.refresh_at < time.monotonic() + slots.GAP
    # Again, and back: the present owner counts.
    assert state.record_moves([moved(A, C, (0, 9))]) == {}
    assert set(state.record_moves([moved(C, A, (0, 9), (10, 10))])) == set(range(10))


def test_announced_slots_of_another_owner_stay() -> None:
    state = state_of()
    assert state.record_moves([moved(A, B, (0, 16383))]) == {}
    refresh(state, view_of(A, B))
    assert state.record_moves([moved(B, C, (0, 9)), moved(D, C, (HALF, HALF))]) == {}
    assert state.table.moved == []
    assert shown(*(one.address for one in state.nodes.values())) == shown(A, B)


def test_a_node_leaves_at_the_first_view_that_confirms_an_announcement() -> None:
    state = state_of()
    refresh(state, view_of(A, B))
    state.record_moves([moved(A, C, (0, HALF - 1))])
    refresh(state, view_of(C, B))
    assert set(state.nodes) == shown(B, C)


def test_a_node_that_keeps_slots_stays() -> None:
    state = state_of()
    refresh(state, view_of(A, B))
    state.record_moves([moved(A, C, (0, 9))])
    refresh(state, view_of(A, B))  # an older view
    refresh(state, view_of(C, B))
    assert set(state.nodes) == shown(A, B, C)


def test_announced_addresses_are_mapped() -> None:
    state = state_of(natMap={"10.0.0.1:7000": {"host": "127.0.0.1", "port": 3}})
    refresh(state, view_of(A, B))
    (node,) = state.record_moves([moved(A, ("10.0.0.1", 7000), (5, 5))]).values()
    assert node.address == C


def test_no_node_leaves_while_none_of_the_others_is_up() -> None:
    state = state_of(C)
    for _ in range(3):
        refresh(state, view_of(A, B), is_up=lambda address: False)
    assert set(state.nodes) == shown(A, B, C)
    for _ in range(2):
        refresh(state, view_of(A, B), is_up=lambda address: address == "127.0.0.1:2")
    assert set(state.nodes) == shown(A, B)


@pytest.mark.parametrize(("scale", "opens_all"), [("master", True), ("slave", False)])
def test_nodes_of_a_large_cluster_are_not_known_beforehand(scale: str, opens_all: bool) -> None:
    """The replicas count as far as they are read."""
    state = state_of(scaleReads=scale)
    ranges = [
        SlotRange(n, n, (f"10.0.0.{n}", 1), ((f"10.0.1.{n}", 1), (f"10.0.2.{n}", 1)))
        for n in range(100)
    ]
    refresh(state, View(1, tuple(ranges)))
    assert state.opens_all is opens_all
    assert len(state.nodes) == (101 if opens_all else 1)
    assert state.table.find(7, reads=False) == "10.0.0.7:1"


def test_a_lost_replica_is_not_read_for_a_while() -> None:
    state = state_of(scaleReads="slave")
    refresh(state, view_of(A, B, C, D))
    assert {state.table.find(slot, reads=True) for slot in (0, 1)} == shown(C, D)
    state.exclude_replica(state.node(C))
    assert {state.table.find(slot, reads=True) for slot in (0, 1)} == shown(D)
    assert state.table.find(0, reads=False) == "127.0.0.1:1"
    assert state.refresh_at <= state.node(C).avoid_until
    refresh(state, view_of(A, B, C, D))
    assert {state.table.find(slot, reads=True) for slot in (0, 1)} == shown(D)
    state.node(C).avoid_until = time.monotonic()
    refresh(state, view_of(A, B, C, D))
    assert {state.table.find(slot, reads=True) for slot in (0, 1)} == shown(C, D)
    table = state.table
    state.exclude_replica(state.node(A))  # a primary
    assert state.table is table


def in_zones(view: View, **zones: str) -> View:
    at = {"a": A, "b": B, "c": C, "d": D}
    return replace(view, zones={at[name]: zone for name, zone in zones.items()})


def readers(state: ClusterState) -> set[str | None]:
    return {state.table.find(slot, reads=True) for slot in (0, 1, 2)}


def test_the_replica_in_the_zone_is_read_then_any_then_the_primary() -> None:
    state = state_of(scaleReads="zone", zone="x")
    view = in_zones(view_of(A, B, C, D), a="x", c="x", d="y")
    refresh(state, view)
    assert readers(state) == shown(C)
    assert state.table.find(HALF, reads=True) == "127.0.0.1:2"
    state.exclude_replica(state.node(C))
    assert readers(state) == shown(D)
    state.exclude_replica(state.node(D))
    assert readers(state) == shown(A)
    refresh(state, view)
    assert readers(state) == shown(A)
    state.node(D).avoid_until = state.node(C).avoid_until = time.monotonic()
    refresh(state, view)
    assert readers(state) == shown(C)
    refresh(state, in_zones(view, d="x", c="y"))  # as after CONFIG SET availability-zone
    assert readers(state) == shown(D)
    refresh(state, in_zones(view, c="y", d="z"))
    assert readers(state) == shown(C, D)


def test_replicas_in_reserve_do_not_leave() -> None:
    state = state_of(scaleReads="zone", zone="x")
    for address in (A, B, C, D):
        state.node(address)
    for _ in range(slots.VIEWS_TO_LEAVE + 1):
        refresh(state, in_zones(view_of(A, B, C, D), c="x"))
    assert set(state.nodes) == shown(A, B, C, D)


def test_a_zone_that_only_the_node_itself_tells() -> None:
    """The slots of Valkey 9.0 don't have it, but the reply to HELLO does."""
    state = state_of(scaleReads="zone", zone="x")
    refresh(state, view_of(A, B, C, D))
    assert readers(state) == shown(C, D)
    assert state.refresh_at - time.monotonic() > slots.GAP
    state.record_zone(state.node(D), "x")
    assert state.refresh_at - time.monotonic() <= slots.GAP
    refresh(state, view_of(A, B, C, D))
    assert readers(state) == shown(D)
    state.record_zone(state.node(D), "x")
    assert state.refresh_at - time.monotonic() > slots.GAP


@pytest.mark.parametrize("as_map", [True, False])
def test_zones_in_a_reply_to_cluster_slots(as_map: bool) -> None:
    def node(port: int, **metadata: str) -> list[Any]:
        pairs = {name.replace("_", "-").encode(): text.encode() for name, text in metadata.items()}
        flat = [word for pair in pairs.items() for word in pair]
        return [b"h", port, b"%040d" % port, pairs if as_map else flat]

    nodes = [node(1, availability_zone="x", ip="::1"), node(2, availability_zone=""), node(3)]
    view = slots.read_view([[0, 16383, *nodes, [b"h", 4]]], b"", A, "config.yml")
    assert view.zones == {("h", 1): "x"}
    assert len(view.ranges[0].replicas) == 3


def test_a_refusal_ends_with_a_view() -> None:
    state = state_of()
    state.record_failure(dscache.ReplyError("NOPERM this user has no permissions"))
    assert state.refusal is not None
    assert str(state.refusal("get 'a'")).startswith("NOPERM")
    refresh(state, view_of(A, B))
    assert state.refusal is None
    state.record_failure(dscache.ReplyError("NOPERM this user has no permissions"))
    assert state.refusal is None  # the slots are known


# -- which cluster a node belongs to

IDS = {name: name * 40 for name in "abcdef"}


def with_ids(*named: tuple[str, Address], epoch: int = 1, asked: Address | None = None) -> View:
    """Return a view of two primaries with these ids, as the first one gives it."""
    (_, first), (_, second) = named
    ranges = view_of(first, second).ranges
    return View(epoch, ranges, {IDS[name]: at for name, at in named}, asked or first)


OURS = with_ids(("a", A), ("b", B))
THEIRS = with_ids(("c", C), ("d", A), epoch=9, asked=A)


def state_with(view: View, *seeds: Address, **options: Any) -> ClusterState:
    state = state_of(*seeds, **options)
    refresh(state, state.choose([view]))
    return state


def test_a_view_without_a_known_node_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    state = state_with(OURS)
    later = with_ids(("a", A), ("e", C), epoch=2, asked=B)
    assert state.choose([THEIRS, later]) is later
    assert len(caplog.messages) == 1
    assert "127.0.0.1:1 belongs to another cluster" in caplog.text
    with pytest.raises(dscache.ConnectError, match=r"another cluster are at.*: 127\.0\.0\.1:1"):
        state.choose([THEIRS])
    assert len(caplog.messages) == 1
    # All nodes are replaced, one after the other.
    for view in (later, with_ids(("e", C), ("f", D), epoch=3)):
        refresh(state, state.choose([view, THEIRS]))
        assert state.view is view
    with pytest.raises(dscache.ConnectError):
        state.choose([OURS])


def test_the_only_primary_and_its_heir_are_in_no_common_view() -> None:
    """CLUSTER SLOTS leaves out a replica without data."""

    def alone(name: str, at: Address, asked: Address, by: str = "") -> View:
        ranges = (SlotRange(0, 16383, at, ()),)
        return View(1, ranges, {IDS[name]: at}, asked, IDS.get(by, ""))

    def started() -> ClusterState:
        return state_with(alone("a", A, A, "a"))

    heir, told = alone("b", B, B, "b"), alone("b", B, A, "a")
    assert started().choose([told]) is told
    assert started().choose([heir, told]) in (heir, told)
    with pytest.raises(dscache.ConnectError):
        started().choose([heir])
    with pytest.raises(dscache.ConnectError):
        started().choose([alone("b", B, A)])
    # The replica gave the view in use as well.
    assert state_with(alone("a", A, B, "b")).choose([heir]) is heir
    # The other nodes count first: this one has left for another cluster.
    state = state_with(OURS)
    assert state.choose([View(9, told.ranges, {IDS["c"]: C}, A, IDS["a"]), OURS]) is OURS


def test_views_without_ids_are_believed() -> None:
    state = state_with(OURS)
    plain = view_of(C, D, epoch=3)
    assert state.choose([plain, OURS]) is plain
    refresh(state, plain)
    assert state.choose([THEIRS]) is THEIRS


def test_the_first_view_is_that_of_most_nodes() -> None:
    other = with_ids(("a", A), ("b", B), asked=B)
    assert state_of().choose([THEIRS, OURS, other]) in (OURS, other)
    assert state_of().choose([OURS, THEIRS]) is THEIRS  # the newer one


def test_a_node_without_slots_outweighs_no_view() -> None:
    assert state_of().choose([View(99, ()), OURS]) is OURS


def test_a_node_with_another_id_is_refused() -> None:
    state = state_with(OURS)
    node = state.node(A)
    for known in (IDS["a"], ""):
        state.check_identity(node, known)
        assert state.may_use(node, known)
    with pytest.raises(dscache.ConnectError, match="is another node, dddddddd, than aaaaaaaa"):
        state.check_identity(node, IDS["d"])
    state.check_identity(state.node(D), IDS["d"])  # an address of which the view says nothing
    # It was replaced by a node of the same cluster.
    refresh(state, state.choose([with_ids(("d", A), ("b", B), epoch=2, asked=B)]))
    state.check_identity(node, IDS["d"])
    assert not state.may_use(node, IDS["a"])


def test_an_address_of_several_nodes_has_no_expected_id() -> None:
    state = state_with(with_ids(("a", A), ("b", A)))
    state.check_identity(state.node(A), IDS["c"])


def test_ids_are_those_of_mapped_addresses() -> None:
    state = state_with(
        with_ids(("a", ("10.0.0.1", 7)), ("b", B)),
        natMap={"10.0.0.1:7": {"host": A[0], "port": A[1]}},
    )
    with pytest.raises(dscache.ConnectError):
        state.check_identity(state.node(A), IDS["d"])
    state.check_identity(state.node(A), IDS["a"])


def test_ids_that_contradict_the_own_view_prove_nothing() -> None:
    """A proxy answers CLUSTER MYID with an id of its own."""
    state = state_of()
    state.node(A).node_id = IDS["f"]
    refresh(state, state.choose([OURS]))
    state.check_identity(state.node(A), IDS["f"])
    assert state.may_use(state.node(A), IDS["e"])


def lose(state: ClusterState, *addresses: Address) -> None:
    for address in addresses:
        state.record_unreachable(state.node(address), dscache.ConnectError("refused"), None)


def test_a_whole_cluster_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_with(OURS, A, C)
    seed, elsewhere = state.node(A), with_ids(("c", C), ("d", D), epoch=9, asked=D)
    lose(state, A)
    state.record_failure(dscache.ConnectError("gone"))
    now = time.monotonic() + 2 * slots.GONE_AFTER
    monkeypatch.setattr(time, "monotonic", lambda: now)
    state.node(B).is_tried = True
    with pytest.raises(dscache.ConnectError):
        state.choose([THEIRS])  # B may still be there
    with pytest.raises(dscache.ConnectError):
        state.check_identity(seed, IDS["d"])
    lose(state, B)
    with pytest.raises(dscache.ConnectError):
        state.choose([elsewhere])  # no configured node says so
    state.check_identity(seed, IDS["d"])
    assert state.choose([THEIRS, elsewhere]) is THEIRS
    refresh(state, THEIRS)
    with pytest.raises(dscache.ConnectError):
        state.choose([OURS])


def test_nodes_that_were_reset_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same servers form another cluster, and no connection has ended."""
    state = state_with(OURS)
    for address, name in ((A, "a"), (B, "b")):
        state.record_connected(state.node(address), "redis", again=False)
        state.check_identity(state.node(address), IDS[name])
    anew = [with_ids(("c", A), ("d", B), asked=one) for one in (A, B)]
    with pytest.raises(dscache.ConnectError) as failure:
        state.choose(anew)
    assert not state.may_use(state.node(B), state.node(B).node_id)
    state.record_failure(failure.value)
    now = time.monotonic() + 2 * slots.GONE_AFTER
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert state.choose(anew) is anew[0]


def test_a_short_loss_of_all_nodes_replaces_none() -> None:
    state = state_with(OURS)
    lose(state, A, B)
    with pytest.raises(dscache.ConnectError):
        state.choose([THEIRS])
    state.record_failure(dscache.ConnectError("gone"))
    with pytest.raises(dscache.ConnectError):
        state.choose([THEIRS])


def test_a_redirection_to_an_unknown_host() -> None:
    """A node without a host name is at the address that the view has for it."""
    there = ("10.0.0.3", 7003)
    state = state_with(with_ids(("a", A), ("b", there)))
    for code in ("MOVED", "ASK"):
        _, named = state.record_redirection(f"{code} 5 ?:7003", 5, A)
        assert named is not None
        assert named.address == there
    _, named = state.record_redirection("MOVED 5 ?:9", 5, A)
    assert named is not None
    assert named.address == (A[0], 9)
    _, named = state.record_redirection("MOVED 5 :7003", 5, A)
    assert named is not None
    assert named.address == (A[0], 7003)
    state = state_with(with_ids(("a", ("10.0.0.2", 7003)), ("b", there)))
    before = len(state.table.moved)
    assert state.record_redirection("MOVED 5 ?:7003", 5, A) == ("MOVED", None)
    assert len(state.table.moved) == before


# -- the parsers

NODE = b"a" * 40
OTHER = b"b" * 40
IP = [b"ip", b"10.0.0.3"]


@pytest.mark.parametrize("host", [b"?", b""])
@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        (IP, "10.0.0.3"),
        ([b"hostname", b"", *IP], "10.0.0.3"),
        ([b"hostname", b"node.example"], "node.example"),
        ([b"shard", b"1", b"hostname", b"node.example", b"ip", b""], "node.example"),
        ({b"ip": b"fd00::3"}, "fd00::3"),
        ({b"hostname": b"node.example", b"ip": b"?"}, "node.example"),
        ({b"ip": b"a b"}, "asked"),
        ([b"hostname"], "asked"),
        ([1, 2], "asked"),
        ([], "asked"),
        (None, "asked"),
    ],
)
def test_a_host_in_the_metadata(host: bytes, metadata: Any, found: str) -> None:
    reply = [[0, 16383, [host, 7, NODE, metadata]]]
    (only,) = slots.parse_slots(reply, ("asked", 7))
    assert only.primary == (found, 7)
    assert slots.parse_nodes(reply, ("asked", 7)) == {NODE.decode(): (found, 7)}


def test_only_the_node_itself_is_at_the_host_that_was_asked() -> None:
    reply = [
        [0, 1, [b"?", 7, NODE, []], [b"?", 8, OTHER, []], [b"", 9, OTHER]],
        [2, 3, [b"?", 8, OTHER, []]],
        [4, 5, [None, 8, OTHER, IP]],
    ]
    asked = ("asked", 7)
    first, last = slots.parse_slots(reply, asked, NODE.decode())
    assert first == SlotRange(0, 1, asked, ())
    assert last == SlotRange(4, 5, ("asked", 8), ())
    # Without its id, all are.
    assert len(slots.parse_slots(reply, asked)) == 3


def test_a_node_with_a_forgotten_address_spoils_no_view() -> None:
    reply = [
        [0, 1, [b"", 0, OTHER, []]],
        [2, 3, [b"10.0.0.1", 7, NODE, []], [b"", 0, OTHER]],
    ]
    view = slots.read_view(reply, b"cluster_current_epoch:4", A, "test")
    assert view.ranges == (SlotRange(2, 3, ("10.0.0.1", 7), ()),)
    assert view.nodes == {NODE.decode(): ("10.0.0.1", 7), OTHER.decode(): None}


@pytest.mark.parametrize(
    "reply", [None, b"", b"a" * 39, b"A" * 40, b"g" * 40, "a" * 40, 7, dscache.ReplyError("NOPERM")]
)
def test_no_id_of_a_node(reply: object) -> None:
    assert slots.parse_node_id(reply) == ""


def test_an_empty_table_knows_no_slot() -> None:
    assert SlotTable().find(0, reads=True) is None
    assert SlotTable().primaries == {}
