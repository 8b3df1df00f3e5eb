"""The loop of an update, step by step, in both cores and without a server."""

from __future__ import annotations

import pickle
from typing import Any

import msgspec
import pytest

from dscache import _backend
from dscache.core import changes as c
from dscache.core.constants import MAX_VERSION
from dscache.errors import DeadlineExceeded, DscacheError, RecordError, RecordMissing

pytestmark = pytest.mark.usefixtures("backend")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Update:
    """One update; ``pauses`` are the conflicts before each pause."""

    def __init__(
        self, default: Any = c.OMITTED, ttl: int | None = None, if_changed: bool = False
    ) -> None:
        self.clock = Clock()
        self.pauses: list[int] = []
        name, text = c.check_arguments("a", default, ttl)
        timing = c.Timing(1.0, self.clock, self._pause)
        self._steps = c.change_steps("update", name, text, ttl, timing, if_changed)
        assert next(self._steps) == ("get", ("a",))

    def _pause(self, conflicts: int) -> float:
        self.pauses.append(conflicts)
        return 0.25

    def reads(self, version: int | None, raw: bytes = b"1") -> Any:
        """Answer the read; return the data that the change gets."""
        record = None if version is None else _backend.core.Record("a", version, raw)
        step, (data,) = self._steps.send(record)
        assert step == c.CHANGE
        return data

    def takes(self, result: Any) -> tuple[str, tuple[Any, ...]]:
        """Answer a step; return the next one."""
        return self._steps.send(result)

    def ends(self, result: Any) -> Any:
        """Answer the last step; return the result of the update."""
        with pytest.raises(StopIteration) as end:
            self._steps.send(result)
        return end.value.value


def write(version: int, text: bytes, expected: int | None, ttl: int | None = None) -> Any:
    return ("set", ("a", version, msgspec.Raw(text), ttl, False, expected))


def test_a_record_is_written_under_the_version_read() -> None:
    update = Update(ttl=60)
    assert update.reads(7, b'{"n":1}') == {"n": 1}
    assert update.takes({"n": 2}) == write(8, b'{"n":2}', 7, 60)
    record = update.ends(True)
    assert (record.name, record.version, record.raw) == ("a", 8, b'{"n":2}')


def test_another_writer_was_first() -> None:
    update = Update()
    for version in (1, 5, 9):
        assert update.reads(version) == 1
        assert update.takes(2) == write(version + 1, b"2", version)
        assert update.takes(False) == (c.PAUSE, (0.25,))
        assert update.takes(None) == ("get", ("a",))
    assert update.pauses == [0, 1, 2]


def test_another_writer_was_always_first() -> None:
    update = Update()
    update.reads(1)
    update.takes(2)
    update.takes(False)
    update.takes(None)
    update.reads(2)
    update.takes(2)
    update.clock.now += 0.75
    with pytest.raises(DeadlineExceeded) as caught:
        update.takes(False)
    assert str(caught.value) == (
        "update 'a': another writer was first, 2 times within 1000 ms; nothing was written"
    )


def test_a_change_that_took_all_of_the_time_writes_nothing() -> None:
    for result in (2, c.DELETE):
        update = Update()
        update.reads(1)
        update.clock.now += 1
        with pytest.raises(DeadlineExceeded, match="changing its data took longer than 1000 ms"):
            update.takes(result)


def test_kept_data_is_the_record_as_it_is() -> None:
    update = Update()
    data = update.reads(3, b"[1]")
    data.append(2)
    record = update.ends(c.KEEP)
    assert (record.version, record.raw, record.data) == (3, b"[1]", [1])


def test_a_removal_is_guarded_by_the_version() -> None:
    update = Update()
    update.reads(3)
    assert update.takes(c.DELETE) == ("delete", ("a", 3))
    assert update.takes(False) == (c.PAUSE, (0.25,))
    assert update.takes(None) == ("get", ("a",))
    update.reads(4)
    assert update.takes(c.DELETE) == ("delete", ("a", 4))
    assert update.ends(True) is None


def test_a_missing_record() -> None:
    with pytest.raises(RecordMissing, match=r"^update 'a': there is no such record") as caught:
        Update().reads(None)
    assert caught.value.name == "a"
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, DscacheError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.name) == (RecordMissing, str(caught.value), "a")


def test_a_default_takes_the_place_of_a_missing_record() -> None:
    default = {"n": [0]}
    update = Update(default)
    default["n"].append(1)
    data = update.reads(None)
    assert data == {"n": [0]}
    data["n"].append(5)
    assert update.takes(data) == write(1, b'{"n":[0,5]}', None)
    update.takes(False)
    update.takes(None)
    assert update.reads(None) == {"n": [0]}  # a copy for each attempt
    update.takes(None)
    assert update.ends(True).version == 1


@pytest.mark.parametrize("result", [c.KEEP, c.DELETE])
def test_no_record_is_created_to_be_kept_or_removed(result: Any) -> None:
    update = Update(0)
    update.reads(None)
    assert update.ends(result) is None


def test_there_is_no_version_above_the_highest() -> None:
    update = Update()
    update.reads(MAX_VERSION)
    with pytest.raises(RecordError, match=f"version {MAX_VERSION}, and no version is above"):
        update.takes(2)
    update = Update()
    update.reads(MAX_VERSION)
    assert update.takes(c.DELETE) == ("delete", ("a", MAX_VERSION))


def test_equal_data_is_written_unless_only_changes_are() -> None:
    update = Update()
    update.reads(1, b'{ "n": 1.0 }')
    assert update.takes({"n": 1.0})[0] == "set"
    for raw in (b'{ "n": 1.0 }', b'{"n":1.0}'):
        update = Update(if_changed=True)
        update.reads(1, raw)
        assert update.ends({"n": 1.0}).version == 1
    update = Update(if_changed=True)
    update.reads(1, b"1")
    assert update.takes(True) == write(2, b"true", 1)


@pytest.mark.parametrize(
    ("name", "default", "ttl"), [("", 0, None), (5, 0, None), ("a", object(), None), ("a", 0, -1)]
)
def test_bad_arguments_are_refused(name: Any, default: Any, ttl: Any) -> None:
    with pytest.raises(RecordError):
        c.check_arguments(name, default, ttl)


def test_data_that_has_no_json_is_refused() -> None:
    update = Update()
    update.reads(1)
    with pytest.raises(RecordError, match="'a'"):
        update.takes(object())


def test_a_damaged_record_is_refused_before_the_change() -> None:
    update = Update()
    with pytest.raises(RecordError, match="'a'"):
        update.reads(1, b"{")


def test_the_constants_show_their_names() -> None:
    assert repr((c.KEEP, c.DELETE, c.OMITTED)) == "(dscache.KEEP, dscache.DELETE, ...)"
