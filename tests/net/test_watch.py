"""The changes and losses that wait for the caller of a watch. Each of them becomes an event."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from dscache.config import load
from dscache.net import watch
from dscache.net.watch import Change, Changes


class Watch:
    """The pending changes of a watch, and the records that its reads find."""

    def __init__(self, **options: Any) -> None:
        self.news = 0
        self.versions: dict[str, int] = {}
        config = load("redis://127.0.0.1")
        settings: dict[str, Any] = {"records": False, "max_pending": 10, **options}
        self.changes = Changes(
            config.options, "n/", self._note, read=self.versions.get, kind=Change, **settings
        )

    def _note(self) -> None:
        self.news += 1

    def push(self, *names: str) -> None:
        self.changes.take_push("here:1", [b"invalidate", [f"{name}_v".encode() for name in names]])

    def take(self) -> list[tuple[str, str]]:
        """Return the kinds and names of all that waits, in the order of the iteration."""
        found: deque[Change] = deque()
        while True:
            self.changes.move_events(found)
            names = self.changes.take_names()
            if not names:
                return [(one.kind, one.name) for one in found]
            found.extend(self.changes.changes_of(names, self.versions))
            self.changes.finish()


def test_names_of_the_prefix_alone_are_pending_and_each_once() -> None:
    one = Watch()
    one.versions = {"n/a": 1}
    one.push("n/a", "m/a", "n/b", "n/a")
    one.push("n/a")
    assert one.take() == [("changed", "n/a"), ("deleted", "n/b")]
    assert one.take() == []


@pytest.mark.parametrize("at_once", [True, False])
def test_more_names_than_may_wait_are_a_gap(at_once: bool) -> None:
    one = Watch()
    names = [f"n/{number}" for number in range(11)]
    for some in [names] if at_once else [[name] for name in names]:
        one.push(*some)
    assert one.take() == [("gap", ""), ("resumed", "")]
    one.push("n/0")
    assert one.take() == [("deleted", "n/0")]


def test_as_many_names_as_may_wait_are_no_gap() -> None:
    one = Watch()
    one.push(*(f"n/{number}" for number in range(10)))
    assert {kind for kind, _ in one.take()} == {"deleted"}


def test_names_that_overflow_during_a_read_come_behind_what_was_read() -> None:
    one = Watch()
    one.push("n/a")
    found: deque[Change] = deque()
    names = one.changes.take_names()
    one.push(*(f"n/{number}" for number in range(11)))
    found.extend(one.changes.changes_of(names, {"n/a": 7}))
    one.changes.finish()
    one.changes.move_events(found)
    assert [one.kind for one in found] == ["changed", "gap", "resumed"]


def test_a_name_that_changes_during_its_read_is_read_again() -> None:
    one = Watch()
    one.push("n/a")
    names = one.changes.take_names()
    one.push("n/a")
    assert [change.version for change in one.changes.changes_of(names, {"n/a": 1})] == [1]
    one.changes.finish()
    one.versions = {"n/a": 2}
    assert one.take() == [("changed", "n/a")]


def test_a_server_is_lost_once_and_resumes_once() -> None:
    one = Watch()
    for _ in range(2):
        one.changes.lose("here:1", "it was cut")
    one.changes.resume("there:2")
    for _ in range(2):
        one.changes.resume("here:1")
    one.changes.leave("there:2", "it has no slots")
    assert [kind for kind, _ in one.take()] == ["gap", "resumed", "gap", "resumed"]


def test_events_are_bounded_and_end_with_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_MOST_EVENTS", 6)
    one = Watch()
    for _ in range(5):
        one.changes.lose("here:1", "it was cut")
        one.changes.resume("here:1")
        one.changes.take_push("here:1", [b"invalidate", None])
    kinds = [kind for kind, _ in one.take()]
    assert kinds == ["gap", "resumed", "flushed"] * 2


def test_a_gap_that_has_not_ended_outlives_dropped_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_MOST_EVENTS", 3)
    one = Watch()
    one.changes.lose("there:2", "it is away")
    for _ in range(3):
        one.changes.take_push("here:1", [b"invalidate", None])
    found: deque[Change] = deque()
    one.changes.move_events(found)
    assert [(one.kind, one.node) for one in found] == [
        ("gap", ""),
        ("resumed", ""),
        ("gap", "there:2"),
    ]
    assert found[2].reason == "it is away"
    one.changes.resume("there:2")
    assert one.take() == [("resumed", "")]


def test_a_caller_hears_of_each_event() -> None:
    one = Watch()
    one.push("m/a")
    assert one.news == 0
    one.push("n/a")
    one.changes.lose("here:1", "it was cut")
    one.changes.take_push("there:2", [b"invalidate", None])
    assert one.news == 3
