"""The cores alone, without a socket or an event loop: the cost of sending and answering a record.

Where a comparison is possible, hiredis alone with plain Python is measured beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import hiredis
import msgspec
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from redis.crc import key_slot

from dscache.core import constants
from workload import CORES, DOCUMENT, NAMES, RECORDS, VERSION, core, decode, encode, keys_of

TEXT = encode(DOCUMENT)
RAW = msgspec.Raw(TEXT)
ROUNDS = 300

# hiredis's stub declares a narrower type than it has.
pack_command: Any = hiredis.pack_command


class Waiter:
    """A minimal waiter: it takes a result, and an error ends the benchmark."""

    __slots__ = ("result",)

    def set_result(self, result: object) -> None:
        self.result = result

    def set_exception(self, error: Exception) -> None:
        raise error


@pytest.fixture(params=list(CORES))
def a_core(request: pytest.FixtureRequest) -> ModuleType:
    """Each core, in turn."""
    return core(request.param)


def array_of(records: int) -> bytes:
    """Return a server's reply to an MGET of that many records."""
    version = b"%d" % VERSION
    one = b"$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(version), version, len(TEXT), TEXT)
    return b"*%d\r\n%b" % (2 * records, records * one)


def replies(records: int) -> bytes:
    """Return a server's replies to dscache's reads of that many records."""
    whole, rest = divmod(records, constants.COMMAND_RECORDS)
    return whole * array_of(constants.COMMAND_RECORDS) + (array_of(rest) if rest else b"")


def flushed(pipeline: Any) -> bytes:
    """Return everything that a pipeline has to send."""
    return b"".join(iter(pipeline.take_output, b""))


def get_each(pipeline: Any) -> None:
    for name in NAMES:
        pipeline.get(name)


def get_bulk(pipeline: Any) -> Any:
    return pipeline.get_bulk(NAMES)


def set_each(pipeline: Any) -> None:
    for name in NAMES:
        pipeline.set(name, VERSION, DOCUMENT)


def set_each_raw(pipeline: Any) -> None:
    for name in NAMES:
        pipeline.set(name, VERSION, RAW)


def set_each_if_newer(pipeline: Any) -> None:
    for name in NAMES:
        pipeline.set(name, VERSION, RAW, None, True)


def set_bulk(pipeline: Any) -> None:
    pipeline.set_bulk(dict.fromkeys(NAMES, (VERSION, DOCUMENT)))


def rounds(
    benchmark: BenchmarkFixture, measured: Callable[[Any], Any], prepare: Callable[[], Any]
) -> Any:
    """Measure a function on a fresh argument each time, without the cost of preparing it."""
    return benchmark.pedantic(  # type: ignore[no-untyped-call]
        measured, setup=lambda: ((prepare(),), {}), rounds=ROUNDS, warmup_rounds=5
    )


def encode_with(
    benchmark: BenchmarkFixture, a_core: ModuleType, operation: Callable[[Any], Any]
) -> None:
    def measured(pipeline: Any) -> bytes:
        operation(pipeline)
        return flushed(pipeline)

    output = rounds(benchmark, measured, lambda: a_core.Pipeline(Waiter, lambda: None))
    assert output.count(NAMES[-1].encode() + b"_d") == 1


@pytest.mark.benchmark(group="keys: head_bulk, which is little else")
def test_keys(benchmark: BenchmarkFixture, a_core: ModuleType) -> None:
    rounds(
        benchmark,
        lambda pipeline: (pipeline.head_bulk(NAMES), flushed(pipeline)),
        lambda: a_core.Pipeline(Waiter, lambda: None),
    )


@pytest.mark.benchmark(group="keys: head_bulk, which is little else")
def test_keys_hiredis(benchmark: BenchmarkFixture) -> None:
    benchmark(lambda: pack_command(("MGET", *[f"{name}_v" for name in NAMES])))


@pytest.mark.benchmark(group="keys: the slot of one")
def test_slot(benchmark: BenchmarkFixture, a_core: ModuleType) -> None:
    keys = [f"{name}_v".encode() for name in NAMES]
    assert [a_core.slot_of_key(key) for key in keys] == [key_slot(key) for key in keys]
    benchmark(lambda: [a_core.slot_of_key(key) for key in keys])


@pytest.mark.benchmark(group="keys: the slot of one")
def test_slot_redis_py(benchmark: BenchmarkFixture) -> None:
    keys = [f"{name}_v".encode() for name in NAMES]
    benchmark(lambda: [key_slot(key) for key in keys])


@pytest.mark.benchmark(group="encode: get, one by one in a tick")
def test_encode_get(benchmark: BenchmarkFixture, a_core: ModuleType) -> None:
    encode_with(benchmark, a_core, get_each)


@pytest.mark.benchmark(group="encode: get, one by one in a tick")
def test_encode_get_hiredis(benchmark: BenchmarkFixture) -> None:
    pack = pack_command
    benchmark(
        lambda: b"".join([pack(("MGET", f"{name}_v", f"{name}_d")) for name in NAMES]),
    )


@pytest.mark.benchmark(group="encode: get_bulk")
def test_encode_get_bulk(benchmark: BenchmarkFixture, a_core: ModuleType) -> None:
    encode_with(benchmark, a_core, get_bulk)


@pytest.mark.benchmark(group="encode: get_bulk")
def test_encode_get_bulk_hiredis(benchmark: BenchmarkFixture) -> None:
    benchmark(lambda: pack_command(("MGET", *keys_of(NAMES))))


@pytest.mark.benchmark(group="encode: set, JSON included")
def test_encode_set(benchmark: BenchmarkFixture, a_core: ModuleType) -> None:
    encode_with(benchmark, a_core, set_each)


@pytest.mark.benchmark(group="encode: set, JSON included")
def test_encode_set_hiredis(benchmark: BenchmarkFixture) -> None:
    pack = pack_command
    benchmark(
        lambda: b"".join(
            [pack(("MSET", f"{n}_v", VERSION, f"{n}_d", encode(DOCUMENT))) for n in NAMES]
        )
    )


@pytest.mark.benchmark(group="encode: set of msgspec.Raw")
def test_encode_set_raw(benchmark: BenchmarkFixture, a_core: ModuleType) -> None:
    encode_with(benchmark, a_core, set_each_raw)


@pytest.mark.benchmark(group="encode: set of msgspec.Raw, if newer")
def test_encode_set_if_newer(benchmark: BenchmarkFixture, a_core: ModuleType) -> None:
    encode_with(benchmark, a_core, set_each_if_newer)


@pytest.mark.benchmark(group="encode: set_bulk, JSON included")
def test_encode_set_bulk(benchmark: BenchmarkFixture, a_core: ModuleType) -> None:
    encode_with(benchmark, a_core, set_bulk)


@pytest.mark.benchmark(group="encode: set_bulk, JSON included")
def test_encode_set_bulk_hiredis(benchmark: BenchmarkFixture) -> None:
    def measured() -> bytes:
        values = [value for _ in NAMES for value in (VERSION, encode(DOCUMENT))]
        pairs = zip(keys_of(NAMES), values, strict=True)
        packed: bytes = pack_command(("MSET", *[part for pair in pairs for part in pair]))
        return packed

    benchmark(measured)


def waiting_for(a_core: ModuleType, operation: Callable[[Any], Any]) -> Any:
    """Return a pipeline whose operations are sent and not yet answered."""
    pipeline = a_core.Pipeline(Waiter, lambda: None)
    operation(pipeline)
    assert flushed(pipeline)
    return pipeline


@pytest.mark.benchmark(group="parse: the replies to get, one by one in a tick")
def test_parse_get(benchmark: BenchmarkFixture, a_core: ModuleType) -> None:
    answer = replies(RECORDS)
    rounds(benchmark, lambda pipe: pipe.feed(answer), lambda: waiting_for(a_core, get_each))


@pytest.mark.benchmark(group="parse: the replies to get, one by one in a tick")
def test_parse_get_hiredis(benchmark: BenchmarkFixture) -> None:
    reader = hiredis.Reader()
    answer = RECORDS * array_of(1)

    def measured() -> list[tuple[int, bytes]]:
        reader.feed(answer)
        values: Any = [reader.gets() for _ in NAMES]
        return [(int(version), text) for version, text in values]

    assert len(benchmark(measured)) == RECORDS


@pytest.mark.benchmark(group="parse: the replies to set, one by one in a tick")
def test_parse_set(benchmark: BenchmarkFixture, a_core: ModuleType) -> None:
    answer = -(-RECORDS // constants.COMMAND_RECORDS) * b"+OK\r\n"
    rounds(benchmark, lambda pipe: pipe.feed(answer), lambda: waiting_for(a_core, set_each_raw))


@pytest.mark.benchmark(group="parse: the replies to get_bulk")
def test_parse_get_bulk(benchmark: BenchmarkFixture, a_core: ModuleType) -> None:
    answer = replies(RECORDS)
    rounds(benchmark, lambda pipe: pipe.feed(answer), lambda: waiting_for(a_core, get_bulk))


@pytest.mark.benchmark(group="parse: the replies to get_bulk")
def test_parse_get_bulk_hiredis(benchmark: BenchmarkFixture) -> None:
    reader = hiredis.Reader()
    answer = array_of(RECORDS)

    def measured() -> dict[str, tuple[int, bytes]]:
        reader.feed(answer)
        values: Any = reader.gets()
        pairs = zip(NAMES, values[::2], values[1::2], strict=True)
        return {name: (int(version), text) for name, version, text in pairs}

    assert len(benchmark(measured)) == RECORDS


@pytest.mark.benchmark(group="parse: hiredis alone, nothing made of it")
def test_parse_alone_hiredis(benchmark: BenchmarkFixture) -> None:
    reader = hiredis.Reader()
    answer = array_of(RECORDS)

    def measured() -> object:
        reader.feed(answer)
        return reader.gets()

    benchmark(measured)


@pytest.mark.benchmark(group="JSON: .data at first access")
def test_data(benchmark: BenchmarkFixture, a_core: ModuleType) -> None:
    def records() -> list[Any]:
        return [a_core.Record(name, VERSION, TEXT) for name in NAMES]

    def measured(some: list[Any]) -> None:
        for record in some:
            _ = record.data

    rounds(benchmark, measured, records)


@pytest.mark.benchmark(group="JSON: .data at first access")
def test_data_msgspec(benchmark: BenchmarkFixture) -> None:
    benchmark(lambda: [decode(TEXT) for _ in NAMES])


@pytest.mark.benchmark(group="JSON: text of the data")
def test_text(benchmark: BenchmarkFixture, a_core: ModuleType) -> None:
    benchmark(lambda: [a_core.encode_data(name, DOCUMENT) for name in NAMES])


@pytest.mark.benchmark(group="JSON: text of the data")
def test_text_msgspec(benchmark: BenchmarkFixture) -> None:
    benchmark(lambda: [encode(DOCUMENT) for _ in NAMES])
