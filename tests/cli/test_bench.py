"""bench: its load, its measurements, and its cleanup."""

from __future__ import annotations

import json
import math
import random
import signal
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import redis as redis_py
from hypothesis import given
from hypothesis import strategies as st

from dscache import AsyncCache, ConnectionLost, DscacheError
from dscache.admin import load_test
from dscache.admin.latency_chart import draw
from dscache.admin.load_test import Latencies, Plan, Result, apply
from dscache.embedded import EmbeddedServer
from tests.support.commands import PATIENCE, failing_after, invoke, plain, run_on_terminal, running

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def loaded() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as started:
        yield started


@pytest.fixture
def client(loaded: EmbeddedServer) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(loaded.url) as opened:
        opened.flushall()
        opened.config_resetstat()
        opened.mset({"user/1_v": 1, "user/1_d": "{}"})
        yield opened
        # A load leaves nothing behind and touches nothing else.
        assert sorted(opened.keys()) == [b"user/1_d", b"user/1_v"]


SHORT = ("--seconds", "0.2", "--records", "50", "--tasks", "5")


@pytest.mark.parametrize(
    ("words", "reads", "writes"),
    [
        ((), True, True),
        (("--read-ratio", "1"), True, False),
        (("--read-ratio", "0", "--bulk", "20"), False, True),
        (("--bulk", "100", "--size", "1"), True, True),
    ],
)
def test_a_load_is_measured(
    words: tuple[str, ...],
    reads: bool,
    writes: bool,
    loaded: EmbeddedServer,
    client: redis_py.Redis,
    backend: str,
) -> None:
    done = invoke("bench", *SHORT, *words, "--url", loaded.url)
    assert (done.status, done.err) == (0, "")
    document = done.document
    assert (document["core"], document["errors"]) == (backend, 0)
    for name, expected in (("reads", reads), ("writes", writes)):
        measured = document[name]
        assert (measured["operations"] > 0) == expected
        times = [measured[f"{one}_ms"] for one in ("p50", "p90", "p99", "p99.9", "max")]
        assert times == sorted(times)
        assert (measured["mean_ms"] > 0) == expected
    operations = document["reads"]["operations"] + document["writes"]["operations"]
    rate = operations * document["bulk"] / document["seconds"]
    assert document["records_per_second"] == pytest.approx(rate, rel=0.01)


def test_records_have_the_given_size(loaded: EmbeddedServer, client: redis_py.Redis) -> None:
    sizes = set()
    set_bulk = AsyncCache.set_bulk

    def measuring(self, records, **options):
        sizes.update(len(bytes(data)) for _, data in records.values())
        return set_bulk(self, records, **options)

    with mock.patch.object(AsyncCache, "set_bulk", measuring):
        invoke("bench", *SHORT, "--size", "300", "--url", loaded.url)
    assert sizes == {300}


def test_a_chart(loaded: EmbeddedServer, client: redis_py.Redis, tmp_path: Path) -> None:
    file = tmp_path / "latency.svg"
    done = invoke("bench", *SHORT, "--plot", str(file), "--url", loaded.url)
    assert done.status == 0
    drawing = ElementTree.parse(file).getroot()
    assert drawing.tag == f"{SVG}svg"
    assert len(drawing.findall(f"{SVG}path")) == 2
    told = [text.text or "" for text in drawing.iter(f"{SVG}text")]
    assert f"{done.document['records_per_second']:,} records a second" in told
    assert sum(text.startswith("p99") for text in told) == 4


def test_a_terminal(loaded: EmbeddedServer, client: redis_py.Redis) -> None:
    status, written = run_on_terminal("bench", *SHORT, "--url", loaded.url, columns=60)
    assert status == 0
    lines = plain(written).splitlines()
    assert any(line.startswith("reads ") for line in lines)
    assert "records a second" in plain(written)


def test_operations_that_fail_are_counted(loaded: EmbeddedServer, client: redis_py.Redis) -> None:
    broken = failing_after(20, AsyncCache.get, ConnectionLost("it was unplugged"))
    with mock.patch.object(AsyncCache, "get", broken):
        done = invoke("bench", *SHORT, "--read-ratio", "1", "--url", loaded.url)
    assert (done.status, done.document["reads"]["operations"]) == (1, 20)
    assert done.document["errors"] > 0
    assert "failed: ConnectionLost: it was unplugged" in done.err


DEFAULT = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_removes_the_written_records(
    number: signal.Signals, status: int, loaded: EmbeddedServer, client: redis_py.Redis
) -> None:
    words = ("bench", "--seconds", "60", "--records", "100", "--url", loaded.url)
    # The tests may run with SIGHUP ignored, as nohup has it.
    with running(*words, preexec_fn=partial(signal.signal, number, DEFAULT[number])) as process:
        # Records are read once the load itself is on.
        while client.info("commandstats").get("cmdstat_mget", {"calls": 0})["calls"] < 100:
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(PATIENCE) == status
        assert process.stdout
        assert process.stderr
        assert process.stderr.read() == b"dscache: interrupted; its records have been removed\n"
        # The result so far.
        assert json.loads(process.stdout.read())["records_per_second"] > 0


def test_filling_is_bounded(
    loaded: EmbeddedServer, client: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_test, "FILL_SECONDS", 0.0)
    done = invoke("bench", "--seconds", "0.1", "--records", "100000000", "--url", loaded.url)
    assert done.status == 0
    used = done.document["records"]
    assert 0 < used < 100_000_000
    assert f"used {used:,} records in place of 100,000,000" in done.err


def test_the_memory_of_the_records_is_bounded(
    loaded: EmbeddedServer, client: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_test, "MOST_BYTES", 100 * (120 + 250))
    done = invoke("bench", "--seconds", "0.1", "--records", "1000", "--url", loaded.url)
    assert (done.status, done.document["records"]) == (0, 100)
    assert done.err == ("dscache: used 100 records in place of 1,000, as no more fit into 1 GiB\n")


async def test_an_operation_of_more_records_than_there_is_time_for(
    loaded: EmbeddedServer, client: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_test, "FILL_SECONDS", 0.0)
    plan = Plan(tasks=1, seconds=0, read_ratio=1, size=1, bulk=10_000, records=1)
    async with AsyncCache(loaded.url) as cache:
        with pytest.raises(DscacheError, match="1,000 records could be written in 0 s, fewer than"):
            await apply(cache, plan, Result())


def test_a_signal_while_the_records_are_written(
    loaded: EmbeddedServer, client: redis_py.Redis
) -> None:
    words = ("bench", "--seconds", "60", "--records", "100000000", "--url", loaded.url)
    reset = partial(signal.signal, signal.SIGTERM, signal.SIG_DFL)
    with running(*words, preexec_fn=reset) as process:
        while client.dbsize() < 1000:
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (143, b"")
    assert err == b"dscache: interrupted; its records have been removed\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--tasks", "0"), "--tasks"),
        (("--tasks", "100000000"), "--tasks"),
        (("--seconds", "inf"), "--seconds"),
        (("--seconds", "nan"), "--seconds"),
        (("--read-ratio", "nan"), "--read-ratio"),
        (("--bulk", "100000000"), "would take more than 1 GiB at a time"),
        (("--size", "100000000"), "would take more than 1 GiB at a time"),
        (("--read-ratio", "1.5"), "--read-ratio"),
        (("--plot", "latency.png"), "it must be a file that ends in .svg"),
        (("--plot", "/nowhere/latency.svg"), "in a folder that exists"),
    ],
)
def test_a_wrong_command_line(words: tuple[str, ...], error: str) -> None:
    done = invoke("bench", *words, "--url", "127.0.0.1:1")
    assert (done.status, error in " ".join(done.err.split())) == (2, True)


# -- numbers


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=200))
def test_percentiles_are_nearly_exact(times: list[int]) -> None:
    latencies = Latencies()
    for time in times:
        latencies.add(time)
    assert latencies.count == len(times)
    assert latencies.mean == pytest.approx(sum(times) / len(times) / 1e6)
    ordered = sorted(times)
    for percent in (1, 50, 90, 99, 99.9, 100):
        exact = ordered[max(math.ceil(len(times) * percent / 100) - 1, 0)] / 1e6
        assert exact * 0.999 <= latencies.percentile(percent) <= exact * 1.04 + 2e-6
    assert latencies.steps.total() == len(times)


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_charts_of_few_and_many_values(count: int) -> None:
    random.seed(count)
    reads = Latencies()
    for _ in range(count):
        reads.add(int(random.lognormvariate(13, 1.2)))
    drawing = draw("<title>", "a & b", {"reads": reads, "writes": Latencies()})
    parsed = ElementTree.fromstring(drawing)
    assert len(parsed.findall(f"{SVG}path")) == bool(count)
    assert "nan" not in drawing
    assert "inf" not in drawing
