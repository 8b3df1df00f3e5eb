"""Parts of the core that threads share: records, messages, batch numbers, texts, near caches."""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pydantic
import pytest

from dscache.core import pure
from dscache.core.batch import latest_serial, serials
from tests.support.waiting import PATIENCE
from tests.support.wire import CORES, Waiter

THREADS = 4
CORE = str(Path(pure.__file__).parent)


@pytest.fixture(params=CORES)
def core(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """Return the results of as many threads, each with its number, that begin at once."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> Any:
        barrier.wait(PATIENCE)
        return work(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(begin, range(count)))


def in_another_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result(PATIENCE)


# -- texts


def test_threads_encode_each_its_own_data(core: Any) -> None:
    values = [[number] * (40 * number + 1) for number in range(THREADS)]
    texts = [msgspec.json.encode(value) for value in values]

    def encode(number: int) -> set[bytes]:
        return {core.encode_data("a", values[number]) for _ in range(1000)}

    assert in_threads(encode) == [{text} for text in texts]


def test_a_thread_encodes_while_another_one_is_in_the_middle(core: Any) -> None:
    inner: list[bytes] = []

    class Slow(pydantic.BaseModel):
        value: int

        @pydantic.model_serializer
        def write(self) -> dict[str, int]:
            inner.append(in_another_thread(lambda: core.encode_data("b", ["other"] * 50)))
            return {"value": self.value}

    before = ["before"] * 20
    text = core.encode_data("a", [*before, Slow(value=7), "behind"])
    assert text == msgspec.json.encode([*before, {"value": 7}, "behind"])
    assert inner == [msgspec.json.encode(["other"] * 50)]
    assert core.encode_data("c", [1]) == b"[1]"


# -- data


def test_threads_that_read_records_first_share_their_data(core: Any) -> None:
    records = [core.Record("a", i, b'{"list":[1,2,{"three":3}]}') for i in range(2000)]
    found = in_threads(lambda number: [record.data for record in records])
    for i, record in enumerate(records):
        assert all(of_thread[i] is record.data for of_thread in found)
        assert record.data == {"list": [1, 2, {"three": 3}]}


def test_threads_that_read_messages_first_share_their_data(core: Any) -> None:
    messages = [core.Message(7, "b", b'{"topic":7,"i":%d}' % i) for i in range(2000)]
    found = in_threads(lambda number: [message.data for message in messages])
    for i, message in enumerate(messages):
        assert all(of_thread[i] is message.data for of_thread in found)
        assert message.data == {"topic": 7, "i": i}


def test_a_thread_reads_data_first_while_another_one_decodes_it(core: Any) -> None:
    first: list[Any] = []

    class Slow(pydantic.BaseModel):
        value: int

        @pydantic.field_validator("value")
        @classmethod
        def check(cls, value: int) -> int:
            if not first:
                first.append(None)
                first[0] = in_another_thread(lambda: record.data)
            return value

    record = core.Record("a", 1, b'{"value":7}', type=Slow)
    data = record.data
    assert data == Slow(value=7)
    assert first[0] is data is record.data


# -- numbers of batches


def test_batches_of_threads_have_numbers_of_their_own_in_their_order(core: Any) -> None:
    def queue(_number: int) -> list[int]:
        pipeline = core.Pipeline(Waiter, lambda: None, timeout=3600)
        for i in range(500):
            pipeline.get(f"n{i}")
            pipeline.end_tick()
        return [batch.serial for batch in pipeline.queue]

    found = in_threads(queue)
    for of_thread in found:
        assert len(of_thread) == 500
        assert of_thread == sorted(of_thread)
    assert len({number for of_thread in found for number in of_thread}) == THREADS * 500


def test_no_number_is_taken_twice_however_threads_alternate() -> None:
    """As if another thread took one before each step of Python's."""
    numbers: list[int] = []
    is_nested = False

    def alternate(frame: Any, event: str, _argument: Any) -> Any:
        nonlocal is_nested
        frame.f_trace_opcodes = True
        if event == "opcode" and not is_nested:
            is_nested = True
            numbers.append(next(serials))
            is_nested = False
        return alternate

    def take() -> int:
        return next(serials)

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 traces opcodes only if it is set by now
    sys.settrace(alternate)
    try:
        number = take()
        latest = latest_serial()
    finally:
        sys.settrace(before)
    assert len(numbers) > 2
    assert len({number, *numbers}) == len(numbers) + 1
    assert number <= latest
    assert next(serials) > max(number, latest, *numbers)


# -- near caches


def test_no_hit_is_older_than_what_was_reported(core: Any) -> None:
    """While changes, flushes and losses are reported, and another thread logs in anew."""
    version, reported, is_over = 1, 0, False
    problems: list[tuple[int, int]] = []

    def read(name: str, _type: Any = None) -> Any:
        entry = near.begin_read(name)
        record = core.Record(name, version, b"1")
        if entry is not None:
            near.settle(entry, record, True)
        return record

    near = core.SharedNearCache(read, read, max_age=1e6, idle_limit=1e6)
    node = near.only_node()

    def report(count: int) -> None:
        nonlocal version, reported
        version += 1
        if count % 4 == 0:
            node.disconnected("connection", count % 8 == 0)
            node.unreachable()
            node.connected("one", time.monotonic())
        elif not node.is_live:
            node.connected("one", time.monotonic())
        elif count % 4 == 1:
            node.take_push([b"invalidate", None])
        else:
            node.take_push([b"invalidate", [b"a_v"]])
            node.confirm(time.monotonic())
        reported = version

    def has_seen_all() -> bool:
        stats = near.stats()
        return stats["hits"] > 0 and {"flushall", "connection", "login"} <= stats["flushes"].keys()

    def hear(_: int) -> None:
        nonlocal is_over
        try:
            count = 0
            while count < 2000 or not has_seen_all():
                report(count)
                count += 1
        finally:
            is_over = True

    def log_in(_: int) -> None:
        while not is_over:
            node.disconnected("login", False)
            time.sleep(0.001)

    def look(_: int) -> None:
        while not is_over:
            least = reported
            found = near.get("a")
            if found.version < least and not found.stale:
                problems.append((found.version, least))

    in_threads(lambda number: (hear, log_in, look, look)[number](number))
    assert not problems
    stats = near.stats()
    node.disconnected("connection", False)
    assert near.get("a").version == version  # is read anew
    assert near.stats()["misses"] == stats["misses"] + 1


def test_reads_end_beside_close_and_leave_nothing(core: Any) -> None:
    for number in range(300):
        near = core.SharedNearCache(lambda _n, _t: None, lambda _n: None, max_records=3)
        near.only_node().connected("one", time.monotonic())

        def read(_: int, near: Any = near) -> None:
            for i in range(30):
                near.begin_read(f"n{i}")

        def close(_: int, near: Any = near, number: int = number) -> None:
            for _ in range(10 * (number % 30)):
                pass
            near.close()

        in_threads(lambda i, both=(read, close): both[i](i), 2)  # type: ignore[misc]
        stats = near.stats()
        assert (stats["records"], stats["bytes"]) == (0, 0)


@pytest.mark.parametrize("version", [None, 1])
def test_two_reads_of_one_name_make_one_record(core: Any, version: int | None) -> None:
    near = core.SharedNearCache(lambda _n, _t: "missed", lambda _n: "missed")
    near.only_node().connected("one", time.monotonic())
    reads = [near.begin_read("a"), near.begin_read("a")]
    for read in reads:
        near.settle(read, version and core.Record("a", version, b"1"), True)
    assert near.get("a") != "missed"
    once = near.stats()
    assert once["records"] == 1
    near.begin_write(["a"]).end()
    near.settle(near.begin_read("a"), version and core.Record("a", version, b"1"), True)
    assert near.stats()["bytes"] == once["bytes"]


@pytest.mark.parametrize("count", range(3))
def test_a_signal_handler_leaves_the_bytes_of_a_near_cache_right(count: int) -> None:
    """It strikes behind a call, such as that of the dict."""
    near = pure.SharedNearCache(lambda _n, _t: None, lambda _n: None)
    node = near.only_node()
    node.connected("one", time.monotonic())

    def read() -> None:
        entry = near.begin_read("a")
        if entry is not None:
            near.settle(entry, pure.Record("a", 1, b"1"), True)

    calls = 0

    class Entries(OrderedDict[str, Any]):
        def get(self, *arguments: Any) -> Any:
            return struck(super().get, *arguments)

        def pop(self, *arguments: Any) -> Any:
            return struck(super().pop, *arguments)

    def struck(call: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal calls
        found = call(*arguments)
        calls += 1
        if calls == count + 1:
            near.begin_write(["a"]).end()
            read()
            near.begin_write(["a"]).end()
            if count % 2:
                read()
        return found

    read()
    near._entries = Entries(near._entries)
    node.disconnected("connection")
    node.connected("one", time.monotonic())
    read()  # in place of the entry of the former connection
    assert calls > count
    near.begin_write(["a"]).end()
    assert (near.stats()["records"], near._bytes) == (0, 0)


@pytest.mark.parametrize("what", ["write", "read", "close"])
def test_a_signal_handler_may_use_a_full_near_cache_at_any_line(what: str) -> None:
    """While another read takes the place of the oldest record."""
    names = [f"n{i}" for i in range(4)]

    def read(near: Any, name: str) -> None:
        entry = near.begin_read(name)
        if entry is not None:
            near.settle(entry, pure.Record(name, 1, b"1"), True)

    uses: dict[str, Callable[[Any], object]] = {
        "write": lambda near: near.begin_write(names).end(),
        "read": lambda near: read(near, "m"),
        "close": lambda near: near.close(),
    }
    for after in range(1000):
        near = pure.SharedNearCache(lambda _n, _t: None, lambda _n: None, max_records=4)
        near.only_node().connected("one", time.monotonic())
        for name in names:
            read(near, name)
        near.get("n0")  # so that it stays for another round
        left = after

        def trace(frame: Any, event: str, _argument: Any, near: Any = near) -> Any:
            nonlocal left
            if not frame.f_code.co_filename.startswith(CORE):
                return None
            if event == "line":
                left -= 1
                if left == -1:
                    sys.settrace(None)
                    uses[what](near)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            read(near, "new")
        finally:
            sys.settrace(before)
        if left >= 0:
            break
        if what != "close":
            assert near.stats()["records"] <= 4
            near.begin_write([*names, "new", "m"]).end()
            assert near.stats()["records"] == 0
    assert 30 < after < 999
