"""The generators of ``fetch``, executed step by step on records in memory."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from typing import Any

import pytest

from dscache.blocking.waiter import BlockingWaiter
from dscache.core import fetch_terms, flights, loading
from dscache.core.fetch_terms import Checks, terms_of
from dscache.core.loading import Do, Failed, Load, LoadEach, Loaded, Outcome, Pause
from dscache.core.memory import MemoryPipeline
from dscache.core.notes import note_of, state_of
from dscache.errors import BulkError, ConnectionLost, LoadError, ReplyError
from tests.support.waiting import PATIENCE

TERMS = terms_of(60, None, 0.1, None, None)
NOTE = note_of("a")


class Stepper:
    """One caller's generator, on a pipeline that several may share."""

    def __init__(self, pipeline: MemoryPipeline, steps: loading.Steps) -> None:
        self.pipeline = pipeline
        self.steps = steps
        self.step: Any = next(steps)
        self.outcome: Outcome | None = None
        self.done: list[str] = []

    def go_on(self, reply: Any = None, error: BaseException | None = None) -> None:
        """Give the current step its result or error, and take the next step."""
        self.done.append(getattr(self.step, "operation", type(self.step).__name__))
        try:
            self.step = self.steps.send(reply) if error is None else self.steps.throw(error)
        except StopIteration as end:
            self.outcome = end.value

    def do(self) -> None:
        """Execute the current step, an operation."""
        assert type(self.step) is Do
        waiter: BlockingWaiter = getattr(self.pipeline, self.step.operation)(*self.step.arguments)
        self.go_on(waiter.take())

    def until(self, reached: Callable[[Any], bool]) -> None:
        """Execute operations until such a step comes, or the end."""
        while self.outcome is None and not reached(self.step):
            self.do()


def of_kind(kind: type) -> Callable[[Any], bool]:
    return lambda step: type(step) is kind


def never(_: Any) -> bool:
    return False


@pytest.fixture
def pipeline(backend: str) -> MemoryPipeline:
    return MemoryPipeline(BlockingWaiter, lambda: None, None)


def missing(pipeline: MemoryPipeline) -> Stepper:
    return Stepper(pipeline, loading.load_missing(["a"], TERMS))


def stored(pipeline: MemoryPipeline, name: str = "a") -> Any:
    return pipeline.get(name).take()


def test_one_of_two_callers_has_the_lease_and_the_other_waits(pipeline: MemoryPipeline) -> None:
    first, second = missing(pipeline), missing(pipeline)
    # Both see that there is neither a record nor a note, and both want the lease.
    first.do()
    second.do()
    first.until(of_kind(Load))
    assert first.step.names == ("a",)
    second.until(of_kind(Pause))
    assert 0 < second.step.seconds <= 0.1
    first.go_on({"a": Loaded(3, "data")})
    first.until(never)
    second.go_on()
    second.until(never)
    assert first.outcome is not None
    assert second.outcome is not None
    assert first.outcome.of("a") == second.outcome.of("a") == stored(pipeline)
    assert stored(pipeline, NOTE) is None
    assert "Load" not in second.done


def test_a_caller_that_is_late_for_the_lease_finds_the_record(pipeline: MemoryPipeline) -> None:
    first, second = missing(pipeline), missing(pipeline)
    second.do()
    first.until(of_kind(Load))
    first.go_on({"a": 1})
    first.until(never)
    second.until(never)
    assert second.outcome is not None
    assert second.outcome.of("a") == stored(pipeline)
    assert "Load" not in second.done
    assert stored(pipeline, NOTE) is None


def test_a_lease_that_ends_is_taken_over(pipeline: MemoryPipeline) -> None:
    first, second = missing(pipeline), missing(pipeline)
    first.until(of_kind(Load))
    second.until(of_kind(Pause))
    pipeline.delete(NOTE)
    second.go_on()
    second.until(of_kind(Load))
    renewal = first.step.renewal([])
    refused = getattr(pipeline, renewal.operation)(*renewal.arguments).take()
    assert refused == {NOTE}, "a lost lease was renewed"
    second.go_on({"a": Loaded(1, "second")})
    second.until(never)
    first.go_on({"a": Loaded(9, "first")})
    first.until(never)
    assert first.outcome is not None
    assert first.outcome.of("a").data == stored(pipeline).data == "second"


def test_a_record_that_ended_before_its_note_is_loaded(pipeline: MemoryPipeline) -> None:
    pipeline.set(NOTE, 5, {"state": "fresh"}, 60)
    caller = missing(pipeline)
    caller.until(of_kind(Load))
    caller.go_on({"a": "data"})
    caller.until(never)
    assert stored(pipeline).data == "data"


@pytest.mark.parametrize("text", ["[]", "{}", "1", "no json"])
def test_a_note_of_another_shape_is_taken_over(pipeline: MemoryPipeline, text: str) -> None:
    pipeline._records[NOTE] = (5, text.encode(), float("inf"))
    caller = missing(pipeline)
    caller.until(of_kind(Load))
    assert caller.step.names == ("a",)


def test_a_load_that_is_no_mapping_has_failed(pipeline: MemoryPipeline) -> None:
    caller = missing(pipeline)
    caller.until(of_kind(Load))
    caller.go_on(["a"])
    caller.until(never)
    assert caller.outcome is not None
    with pytest.raises(LoadError, match="load_many must return a mapping"):
        caller.outcome.of("a")
    assert state_of(stored(pipeline, NOTE)) == "failed"


def test_an_interrupted_load_releases_its_lease(pipeline: MemoryPipeline) -> None:
    caller = missing(pipeline)
    caller.until(of_kind(Load))
    caller.go_on(error=KeyboardInterrupt())
    assert caller.step.operation == "delete_bulk"
    with pytest.raises(KeyboardInterrupt):
        caller.do()
    assert stored(pipeline, NOTE) is None


def test_a_refused_write_is_raised_and_releases_the_lease(pipeline: MemoryPipeline) -> None:
    caller = missing(pipeline)
    caller.until(of_kind(Load))
    caller.go_on({"a": 1})
    assert caller.step.operation == "set_bulk"
    caller.go_on(error=ReplyError("OOM full"))
    with pytest.raises(ReplyError, match="OOM"):
        caller.do()
    assert stored(pipeline, NOTE) is None


def test_a_release_that_fails_changes_no_result(pipeline: MemoryPipeline) -> None:
    caller = missing(pipeline)
    caller.until(of_kind(Load))
    caller.go_on({"a": 1})
    caller.do()
    assert caller.step.operation == "delete_bulk"
    caller.go_on(error=ConnectionLost("cut off"))
    assert caller.outcome is not None
    assert caller.outcome.of("a") == stored(pipeline)


def test_an_error_of_one_name_leaves_the_others(pipeline: MemoryPipeline) -> None:
    lost = ConnectionLost("cut off")
    caller = Stepper(pipeline, loading.load_missing(["a", "b"], TERMS))
    caller.go_on(error=BulkError("get_bulk", {NOTE: lost}, {}))
    caller.until(of_kind(Load))
    assert caller.step.names == ("b",)
    caller.go_on({"b": 1})
    caller.until(never)
    assert caller.outcome is not None
    assert caller.outcome.errors == {"a": lost}
    assert caller.outcome.of("b") == stored(pipeline, "b")


def test_a_dropped_generator_ends_in_silence(
    pipeline: MemoryPipeline, recwarn: pytest.WarningsRecorder
) -> None:
    caller = missing(pipeline)
    caller.until(of_kind(Load))
    caller.steps.close()
    del caller
    gc.collect()
    assert not recwarn.list
    assert stored(pipeline, NOTE) is not None, "nothing can be sent any more"


def test_a_ring_over_processes_ends(
    pipeline: MemoryPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loads of three processes fetch each other's records; each waits for the lease of the next."""
    monkeypatch.setattr(flights, "_RING_SECONDS", 0.05)
    names = ["a", "b", "c"]
    loads = [Stepper(pipeline, loading.load_missing([name], TERMS)) for name in names]
    waits = []
    for load in loads:
        load.until(of_kind(Load))
    for load, following in zip(loads, "bca", strict=True):
        renewal = load.step.renewal([following])
        assert getattr(pipeline, renewal.operation)(*renewal.arguments).take() == set()
        waits.append(Stepper(pipeline, loading.load_missing([following], TERMS)))
    outside = Stepper(pipeline, loading.load_missing(["a", "z"], TERMS))
    outside.until(of_kind(Load))
    began = time.monotonic()
    while waits[0].outcome is None:
        assert time.monotonic() - began < PATIENCE
        for each in waits:
            each.until(of_kind(Pause))
            if each.outcome is None:
                each.go_on()
        time.sleep(0.001)
    assert time.monotonic() - began > 0.05
    with pytest.raises(LoadError, match="'b': its load, in another call, fetches a record whose"):
        waits[0].outcome.of("b")


def test_a_chain_of_loads_is_no_ring(
    pipeline: MemoryPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flights, "_RING_SECONDS", 0)
    a, b = missing(pipeline), Stepper(pipeline, loading.load_missing(["b"], TERMS))
    a.until(of_kind(Load))
    b.until(of_kind(Load))
    renewal = a.step.renewal(["b"])
    getattr(pipeline, renewal.operation)(*renewal.arguments)
    caller = missing(pipeline)
    for _ in range(5):
        caller.until(of_kind(Pause))
        caller.go_on()
    b.go_on({"b": 1})
    b.until(never)
    a.go_on({"a": 2})
    a.until(never)
    caller.until(never)
    assert caller.outcome is not None
    assert caller.outcome.of("a").data == 2


# -- refreshes that run together


AGED = terms_of(60, 30, 0.5, None, None)


def refreshing(pipeline: MemoryPipeline, names: str, waits: dict[str, list[str]]) -> Stepper:
    """Return refreshes of records that have no notes, before the loads; the records are there."""
    for name in names:
        pipeline.set(name, 1, "old")
    vacant = dict.fromkeys(names)
    steps = loading.refresh_each(vacant, AGED, lambda name: waits.get(name, []))
    refreshing = Stepper(pipeline, steps)
    refreshing.until(of_kind(LoadEach))
    return refreshing


def test_a_slow_refresh_holds_up_no_other(pipeline: MemoryPipeline) -> None:
    caller = refreshing(pipeline, "abc", {})
    assert caller.step.names == ("a", "b", "c")
    caller.go_on({"b": Loaded(2, "new"), "a": Failed(ValueError("no source"))})
    caller.until(of_kind(LoadEach))
    assert caller.step.names == ("c",)
    assert stored(pipeline, "b").version == 2
    states = [state_of(stored(pipeline, note_of(name))) for name in "abc"]
    assert states == ["stale", "fresh", "loading"]
    caller.go_on({"c": Failed(asyncio.CancelledError())})
    caller.until(never)
    assert stored(pipeline, note_of("c")) is None, "the lease of a cancelled load is kept"
    assert [stored(pipeline, name).data for name in "abc"] == ["old", "new", "old"]


def test_refreshes_that_run_together_share_their_lifetimes(pipeline: MemoryPipeline) -> None:
    names = "abcdefghij"
    caller = refreshing(pipeline, names, {})
    caller.go_on(dict.fromkeys(names, "new"))
    caller.until(never)
    assert caller.done == ["set_bulk", "get_bulk", "LoadEach", "set_bulk", "set_bulk"]


def test_leases_of_refreshes_are_renewed_while_others_end(
    pipeline: MemoryPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "RENEW_SECONDS", 0)
    waits: dict[str, list[str]] = {}
    caller = refreshing(pipeline, "abc", waits)
    waits["b"] = ["z"]
    caller.go_on({"a": 5})
    caller.until(of_kind(LoadEach))
    assert stored(pipeline, note_of("b")).data == {"state": "loading", "waits": ["z"]}
    assert stored(pipeline, note_of("c")).data == {"state": "loading"}
    token = stored(pipeline, note_of("c")).version
    caller.go_on({})
    caller.until(of_kind(LoadEach))
    assert caller.step.seconds == 0
    assert stored(pipeline, note_of("c")).version == token


def test_refreshes_without_a_lease_load_nothing(pipeline: MemoryPipeline) -> None:
    pipeline.set(note_of("b"), 5, {"state": "loading"}, 60)
    caller = refreshing(pipeline, "ab", {})
    assert caller.step.names == ("a",)
    caller.steps.close()
    pipeline.set(note_of("a"), 5, {"state": "loading"}, 60)
    alone = Stepper(pipeline, loading.refresh_each({"a": None}, AGED, lambda _: []))
    alone.until(never)
    assert alone.done == ["set_bulk"]


@pytest.mark.parametrize("waits", ["b", [5, ""], {"a": 1}, None])
def test_a_lease_with_other_waits_is_a_lease(pipeline: MemoryPipeline, waits: Any) -> None:
    pipeline.set(NOTE, 5, {"state": "loading", "waits": waits}, 60)
    caller = missing(pipeline)
    caller.until(of_kind(Pause))
    caller.go_on()
    caller.until(of_kind(Pause))
    assert caller.outcome is None


def test_an_error_of_a_followed_note_is_not_of_the_names(pipeline: MemoryPipeline) -> None:
    pipeline.set(NOTE, 5, {"state": "loading", "waits": ["b"]}, 60)
    caller = missing(pipeline)
    caller.until(of_kind(Pause))
    caller.go_on()
    assert caller.step.arguments[0] == ["a", NOTE, note_of("b")]
    found = pipeline.get_bulk([NOTE]).take()
    caller.go_on(error=BulkError("get_bulk", {"b}:fetch": ConnectionLost("cut off")}, found))
    assert type(caller.step) is Pause


def test_what_a_process_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_terms, "_MOST_CHECKS", 3)
    monkeypatch.setattr(fetch_terms, "_MOST_TERMS", 3)
    checks = Checks(None)
    for i in range(2, 12):
        terms = checks.terms(100, i, 0.1, None)
        checks.note(str(i), terms)
        assert checks.is_recent(str(i))
    assert list(checks.recent) == ["9", "10", "11"]
    assert len(checks._known) <= 3
