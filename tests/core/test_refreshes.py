"""The queue of refreshes that wait for their turn."""

from __future__ import annotations

from contextvars import Context
from typing import Any

import pytest

from dscache.core import loading, refreshes
from dscache.core.fetch_terms import terms_of
from dscache.core.refreshes import MOST_REFRESHES, Refresh, RefreshQueue

TERMS = terms_of(60, 30, 0.1, None, None)
OTHER = terms_of(60, 40, 0.1, None, None)


def refresh(terms: Any = TERMS, note: int | None = None, **options: Any) -> Refresh:
    return Refresh(len, terms, Context(), note, **options)


def filled(count: int, queue: RefreshQueue | None = None) -> RefreshQueue:
    queue = queue or RefreshQueue()
    for number in range(count):
        queue.add(str(number), refresh())
    return queue


def test_so_many_run_at_once_in_the_order_they_came() -> None:
    queue = filled(MOST_REFRESHES + 5)
    batches = []
    while queue.room():
        batches.append(queue.take())
    running = [name for batch in batches for name in batch.left]
    assert running == [str(number) for number in range(MOST_REFRESHES)]
    assert len(batches) > 1
    assert not queue.take().left
    del batches[0].left["0"]
    assert queue.room() == 1
    assert list(queue.take().left) == [str(MOST_REFRESHES)]


def test_a_batch_that_no_driver_holds_takes_no_room() -> None:
    queue = filled(MOST_REFRESHES + 5)
    batches = [queue.take(), queue.take()]
    del batches[:]
    assert queue.room() == 5


def test_the_same_refresh_waits_once_in_its_old_place() -> None:
    queue = filled(2)
    queue.add("0", refresh(note=7))
    batch = queue.take()
    assert {name: one.note for name, one in batch.left.items()} == {"0": 7, "1": None}
    queue.add("0", refresh())
    assert not queue.room()
    del batch.left["0"]
    queue.add("0", refresh())
    assert queue.room() == 1


def test_a_batch_has_equal_terms_and_a_bulk_is_alone() -> None:
    queue = filled(1)
    queue.add("other", refresh(OTHER))
    queue.add("third", refresh(OTHER))
    names = frozenset("ab")
    steps = loading.refresh({}, {}, OTHER)
    queue.add(names, refresh(OTHER, steps=steps))
    queue.add("last", refresh(OTHER))
    batches = [queue.take() for _ in range(4)]
    assert [list(batch.left) for batch in batches] == [
        ["0"],
        ["other", "third"],
        [names],
        ["last"],
    ]


def test_so_many_wait_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refreshes, "_MOST_WAITING", 3)
    queue = filled(5)
    assert queue.room() == 3
    queue.add("0", refresh(note=7))
    batch = queue.take()
    assert list(batch.left) == ["0", "1", "2"]
    assert batch.left["0"].note == 7
    filled(9, queue)
    queue.clear()
    assert queue.room() == 0
