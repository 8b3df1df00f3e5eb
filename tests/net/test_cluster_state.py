"""The state of a cluster that both caches share: its schedule, its slots and its nodes."""

from __future__ import annotations

import time
from math import inf
from typing import Any

import pytest

import dscache
from dscache.config import load
from dscache.net import cluster_state
from dscache.net.cluster_state import ClusterState
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
    assert 0 < state.refresh_at - time.monotonic() <= cluster_state.GAP


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
    assert state.refresh_at < time.monotonic() + cluster_state.GAP
    assert state.start_refresh(state.refresh_at)
    state.record_stale()  # the view under way may be older than this
    refresh(state, view_of(A, B))
    assert state.refresh_at < time.monotonic() + cluster_state.GAP * cluster_state.GAP_GROWTH


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
    assert longest[0] <= cluster_state.GAP * cluster_state.GAP_GROWTH
    assert cluster_state.GAP_CAP / 2 <= longest[-1] <= cluster_state.GAP_CAP
    state.start_refresh(inf)
    state.record_stale()
    refresh(state, view_of(B, A))
    assert max(state.gap() for _ in range(50)) <= cluster_state.GAP


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


def test_a_refusal_ends_with_a_view() -> None:
    state = state_of()
    state.record_failure(dscache.ReplyError("NOPERM this user has no permissions"))
    assert state.refusal is not None
    assert str(state.refusal("get 'a'")).startswith("NOPERM")
    refresh(state, view_of(A, B))
    assert state.refusal is None
    state.record_failure(dscache.ReplyError("NOPERM this user has no permissions"))
    assert state.refusal is None  # the slots are known


def test_an_empty_table_knows_no_slot() -> None:
    assert SlotTable().find(0, reads=True) is None
    assert SlotTable().primaries == {}
