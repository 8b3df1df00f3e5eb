"""The cores alone, without a socket or an event loop: the cost of sending and answering a record.

Each call handles 1,000 records, so that microseconds in the table are nanoseconds a record. Where a
comparison is possible, a library with as much plain Python as makes the same of it stands beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import hiredis
import msgspec
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from redis.crc import key_slot

from clients.hot_paths import TEXT, Waiter, array_of, flushed
from clients.work import (
    CORES,
    DOCUMENT,
    ORDINARY,
    RECORDS,
    VERSION,
    core,
    decode,
    encode,
    keys_of,
    names_of,
)
from dscache.core import constants

NAMES = names_of(ORDINARY, RECORDS)
KEYS = keys_of(NAMES)
RAW = msgspec.Raw(TEXT)
ROUNDS = 300

# hiredis's stub declares a narrower type than it has.
pack: Any = hiredis.pack_command
Library = Callable[[], object]


def replies(records: int) -> bytes:
    """Return a server's replies to dscache's reads of that many records."""
    whole, rest = divmod(records, constants.COMMAND_RECORDS)
    return whole * array_of(constants.COMMAND_RECORDS) + (array_of(rest) if rest else b"")


def each(operation: str, *more: Any) -> Callable[[Any], None]:
    """Return a function that calls an operation of a pipeline for each name."""

    def run(pipeline: Any) -> None:
        one = getattr(pipeline, operation)
        for name in NAMES:
            one(name, *more)

    return run


def pipeline_of(who: str) -> Any:
    return core(who).Pipeline(Waiter, lambda: None)


def waiting_for(who: str, operation: Callable[[Any], Any]) -> Any:
    """Return a pipeline whose operations are sent and not yet answered."""
    pipeline = pipeline_of(who)
    operation(pipeline)
    assert flushed(pipeline)
    return pipeline


def run(benchmark: BenchmarkFixture, call: Callable[..., Any], prepare: Library | None) -> Any:
    """Measure a function; with ``prepare``, on a fresh argument each time."""
    benchmark.extra_info["records"] = RECORDS
    setup: Any = (lambda: ((prepare(),), {})) if prepare else None
    return benchmark.pedantic(  # type: ignore[no-untyped-call]
        call, setup=setup, rounds=ROUNDS, warmup_rounds=5
    )


def beside(table: dict[str, tuple[Any, ...]], group: str, library: str) -> pytest.MarkDecorator:
    """Parametrize with the cores and, where a line of the table ends with it, a library."""
    return pytest.mark.parametrize(
        ("what", "who"),
        [
            pytest.param(
                what, who, id=f"{what}-{who}", marks=pytest.mark.benchmark(group=f"{group}: {what}")
            )
            for what, line in table.items()
            for who in (*CORES, library)
            if who in CORES or line[-1]
        ],
    )


def packed_bulk() -> object:
    values = [value for _ in NAMES for value in (VERSION, encode(DOCUMENT))]
    pairs = zip(KEYS, values, strict=True)
    return pack(("MSET", *[part for pair in pairs for part in pair]))


ENCODED: dict[str, tuple[Callable[[Any], Any], Library | None]] = {
    "head_bulk": (
        lambda pipeline: pipeline.head_bulk(NAMES),
        lambda: pack(("MGET", *[f"{name}_v" for name in NAMES])),
    ),
    "get": (
        each("get"),
        lambda: b"".join([pack(("MGET", f"{name}_v", f"{name}_d")) for name in NAMES]),
    ),
    "get_bulk": (
        lambda pipeline: pipeline.get_bulk(NAMES),
        lambda: pack(("MGET", *keys_of(NAMES))),
    ),
    "set": (
        each("set", VERSION, DOCUMENT),
        lambda: b"".join(
            [pack(("MSET", f"{n}_v", VERSION, f"{n}_d", encode(DOCUMENT))) for n in NAMES]
        ),
    ),
    "set_raw": (each("set", VERSION, RAW), None),
    "set_if_newer": (each("set", VERSION, RAW, None, True), None),
    "set_bulk": (
        lambda pipeline: pipeline.set_bulk(dict.fromkeys(NAMES, (VERSION, DOCUMENT))),
        packed_bulk,
    ),
}


@beside(ENCODED, "micro: encode", "hiredis")
def test_encode(benchmark: BenchmarkFixture, what: str, who: str) -> None:
    operation, library = ENCODED[what]

    def measured(pipeline: Any) -> bytes:
        operation(pipeline)
        return flushed(pipeline)

    if who in CORES:
        output = run(benchmark, measured, lambda: pipeline_of(who))
    else:
        assert library is not None
        output = run(benchmark, library, None)
    assert NAMES[-1].encode() + b"_v" in output


def taken_apart(answer: bytes, take: Callable[[Any], Iterable[Any]]) -> Library:
    """Return a function that lets hiredis read an answer, and makes records of it."""
    reader = hiredis.Reader()

    def measured() -> list[tuple[str, int, bytes]]:
        reader.feed(answer)
        pairs = take(reader)
        return [(n, int(v), text) for n, (v, text) in zip(NAMES, pairs, strict=True)]

    return measured


def pairs_of(reader: Any) -> Iterable[Any]:
    values = reader.gets()
    return zip(values[::2], values[1::2], strict=True)


PARSED: dict[str, tuple[Callable[[Any], Any], bytes, Library | None]] = {
    "get": (
        each("get"),
        replies(RECORDS),
        taken_apart(RECORDS * array_of(1), lambda reader: [reader.gets() for _ in NAMES]),
    ),
    "set": (each("set", VERSION, RAW), -(-RECORDS // constants.COMMAND_RECORDS) * b"+OK\r\n", None),
    "get_bulk": (
        lambda pipeline: pipeline.get_bulk(NAMES),
        replies(RECORDS),
        taken_apart(array_of(RECORDS), pairs_of),
    ),
}


@beside(PARSED, "micro: parse the replies to", "hiredis")
def test_parse(benchmark: BenchmarkFixture, what: str, who: str) -> None:
    operation, answer, library = PARSED[what]
    if who in CORES:
        run(benchmark, lambda pipe: pipe.feed(answer), lambda: waiting_for(who, operation))
    else:
        assert library is not None
        assert len(run(benchmark, library, None)) == RECORDS


@pytest.mark.benchmark(group="micro: the slot of a key")
@pytest.mark.parametrize("who", [*CORES, "redis-py"])
def test_slot(benchmark: BenchmarkFixture, who: str) -> None:
    keys = [key.encode() for key in KEYS[::2]]
    slot: Any = core(who).slot_of_key if who in CORES else key_slot
    assert run(benchmark, lambda: [slot(key) for key in keys], None) == list(map(key_slot, keys))


@pytest.mark.benchmark(group="micro: JSON, .data at first access")
@pytest.mark.parametrize("who", [*CORES, "msgspec"])
def test_data(benchmark: BenchmarkFixture, who: str) -> None:
    if who not in CORES:
        run(benchmark, lambda: [decode(TEXT) for _ in NAMES], None)
        return
    record: Any = core(who).Record

    def measured(some: list[Any]) -> list[Any]:
        return [one.data for one in some]

    run(benchmark, measured, lambda: [record(name, VERSION, TEXT) for name in NAMES])


@pytest.mark.benchmark(group="micro: JSON, text of the data")
@pytest.mark.parametrize("who", [*CORES, "msgspec"])
def test_text(benchmark: BenchmarkFixture, who: str) -> None:
    if who in CORES:
        encode_data = core(who).encode_data
        run(benchmark, lambda: [encode_data(name, DOCUMENT) for name in NAMES], None)
    else:
        run(benchmark, lambda: [encode(DOCUMENT) for _ in NAMES], None)
