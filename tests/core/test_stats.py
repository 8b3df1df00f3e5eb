"""The counters of ``stats()``: operations, batches, failures, latencies; of one or many nodes."""

from __future__ import annotations

import asyncio
from types import ModuleType
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.core import constants as c
from dscache.core import stats as counters
from dscache.embedded import EmbeddedServer
from tests.conftest import MakeCache, NamedServer
from tests.support.wire import CORES, ClusterExchange, Exchange, ModelServer, Operation, Refusal

Op = Operation
TIMEOUT = 3600.0


@pytest.fixture(params=CORES)
def core(request: pytest.FixtureRequest) -> ModuleType:
    return request.param  # type: ignore[no-any-return]


def rows(stats: dict[str, Any]) -> dict[str, int]:
    """Return how many of each operation have a latency, which must add up."""
    latency = stats["latency"]
    assert latency["bounds"] == list(c.LATENCY_BOUNDS)
    for row in latency["operations"].values():
        assert row["count"] == sum(row["buckets"]) > 0
        assert len(row["buckets"]) == len(c.LATENCY_BOUNDS) + 1
        assert row["sum"] >= 0
    return {name: row["count"] for name, row in latency["operations"].items()}


# -- one pipeline


def test_a_fresh_pipeline_has_counted_nothing(core: ModuleType) -> None:
    stats = Exchange(core).pipeline.stats()
    assert tuple(stats) == (*counters.NAMES, "mean_batch", "latency")
    assert not any(stats[name] for name in (*counters.NAMES, "mean_batch"))
    assert rows(stats) == {}


def test_each_call_is_an_operation_and_each_answer_has_a_latency(core: ModuleType) -> None:
    exchange = Exchange(core)
    names = [f"n{i}" for i in range(c.COMMAND_RECORDS + 1)]
    exchange.issue(
        *(Op("get", name) for name in names),
        Op("head", "a"),
        Op("set", "a", (1, 1)),
        Op("set", "b", (1, 1), {"ttl": 9}),
        Op("set", "c", (1, 1), {"if_newer": True}),
        Op("delete", "a"),
        Op("get_bulk", names),
        Op("head_bulk", ["a", "b"]),
        Op("set_bulk", dict.fromkeys(names, (1, 1))),
        Op("delete_bulk", names),
        Op("get_bulk", []),
    )
    exchange.run()
    stats = exchange.pipeline.stats()
    assert stats["operations"] == len(names) + 10
    # The empty bulk was sent nowhere.
    assert rows(stats) == {
        **{"get": len(names), "head": 1, "set": 3, "delete": 1},
        **{"get_bulk": 1, "head_bulk": 1, "set_bulk": 1, "delete_bulk": 1},
    }
    assert stats["batches"] == 10
    assert stats["mean_batch"] == stats["sent"] / 10


def test_calls_that_share_a_record_are_separate_operations(core: ModuleType) -> None:
    exchange = Exchange(core)
    exchange.issue(Op("get", "a"), Op("get", "a"), Op("set", "a", (1, 1)), Op("set", "a", (2, 2)))
    exchange.run()
    stats = exchange.pipeline.stats()
    assert (stats["operations"], stats["records"], stats["sent"]) == (4, 2, 2)


def test_a_latency_begins_with_the_call(core: ModuleType) -> None:
    """The deadline carries its start time through queues, connections and nodes."""
    first = Exchange(core, timeout=TIMEOUT)
    first.issue(Op("get", "a"))
    [(_, batch)] = first.pipeline.take_queued(lambda kind, name: None)
    # A pipeline with a longer timeout takes the operation to have been called 30 s earlier.
    second = Exchange(core, timeout=TIMEOUT + 30)
    second.pipeline.requeue([batch])
    second.run()
    stats = second.pipeline.stats()
    assert rows(stats) == {"get": 1}
    row = stats["latency"]["operations"]["get"]
    assert row["buckets"][-1] == 1
    assert row["sum"] >= 30
    # The call was the first one's.
    assert (first.pipeline.stats()["operations"], stats["operations"]) == (1, 0)


def test_a_latency_of_zero_is_in_the_first_bucket(core: ModuleType) -> None:
    first = Exchange(core, timeout=TIMEOUT)
    first.issue(Op("get", "a"))
    [(_, batch)] = first.pipeline.take_queued(lambda kind, name: None)
    second = Exchange(core, timeout=TIMEOUT - 1000)
    second.pipeline.requeue([batch])
    second.run()
    row = second.pipeline.stats()["latency"]["operations"]["get"]
    assert row["buckets"][0] == 1


def test_a_retried_operation_counts_once(core: ModuleType) -> None:
    exchange = Exchange(core)
    exchange.server.has_script = False
    exchange.issue(
        *(Op("set", f"n{i}", (1, 1), {"if_newer": True}) for i in range(3)),
        Op("set_bulk", {"b": (1, 1), "c": (1, 1)}, (None, True)),
    )
    exchange.run()
    stats = exchange.pipeline.stats()
    assert (stats["operations"], stats["writes"]) == (4, 5)
    assert rows(stats) == {"set": 3, "set_bulk": 1}
    assert stats["sent"] > 5


def test_failures_are_counted_by_record_and_have_no_latency(core: ModuleType) -> None:
    exchange = Exchange(core)
    exchange.issue(Op("get", "a"), Op("get", "b"), Op("head", "a"), Op("get_bulk", ["c", "d", "e"]))
    exchange.take()
    exchange.reply(Refusal("OOM not now"), Refusal("OOM"), Refusal("OOM"))
    exchange.reply(Refusal("OOM not now"))
    exchange.issue(Op("set", "a", (1, 1)), Op("set_bulk", {"a": (1, 1), "b": (1, 1)}))
    exchange.take()
    exchange.pipeline.connection_lost(OSError("cut"), True)
    exchange.issue(Op("get", "a"), Op("delete_bulk", ["a", "b"]))
    exchange.pipeline.fail_all(lambda operation: dscache.ConnectError(operation))
    exchange.assert_drained()
    stats = exchange.pipeline.stats()
    assert (stats["failed"], stats["records"], rows(stats)) == (3 + 3 + 3 + 3, 0, {})


def test_the_handshake_counts_no_operations(core: ModuleType) -> None:
    exchange = Exchange(core)
    exchange.pipeline.command("PING")
    exchange.reply("PONG")
    exchange.pipeline.command("PING")
    exchange.pipeline.fail_all(lambda operation: dscache.ConnectError(operation))
    stats = exchange.pipeline.stats()
    assert (stats["operations"], stats["failed"], rows(stats)) == (0, 0, {})


def test_refusals_of_a_full_pipeline_count_as_overloaded(core: ModuleType) -> None:
    exchange = Exchange(core, max_pending=2, refuse_when_full=True)
    exchange.issue(Op("get", "a"), Op("get", "b"))
    for operation in (Op("get", "c"), Op("set", "c", (1, 1)), Op("get_bulk", ["c"])):
        with pytest.raises(dscache.Overloaded):
            exchange.issue(operation)
    stats = exchange.pipeline.stats()
    assert (stats["operations"], stats["overloaded"]) == (2, 3)
    exchange.run()


# -- several pipelines


def test_a_bulk_is_one_operation_on_however_many_nodes(core: ModuleType) -> None:
    nodes = ClusterExchange(core)
    names = [f"{{{i}}}n" for i in range(30)]
    waiters = nodes.issue(
        Op("get", names[0]),
        Op("get_bulk", names),
        Op("head_bulk", []),
        Op("set_bulk", dict.fromkeys(["apart", *names], (1, 1))),
        Op("delete_bulk", ["apart", "afar"]),
        Op("get", "apart"),
    )
    server = ModelServer()
    for pipeline in nodes.pipelines * 2:
        pipeline.feed(server.answer(pipeline.take_output()))
    assert all(waiter.done for waiter in waiters)
    parts = [pipeline.stats() for pipeline in nodes.pipelines]
    total = counters.merged([*parts, nodes.apart.stats(), nodes.router.stats()])
    assert sum(part["operations"] for part in parts) == 1 + 3 + 3
    assert total["operations"] == 6
    assert total["records"] == total["reads"] + total["writes"] + total["deletes"]
    assert (total["reads"], total["writes"], total["deletes"]) == (1 + 30 + 1, 31, 2)
    # Each node has a latency for its part of a bulk.
    assert rows(total) == {"get": 2, "get_bulk": 3, "set_bulk": 3}


def test_split_records_count_like_others(core: ModuleType) -> None:
    nodes = ClusterExchange(core)
    server = ModelServer()
    server.put("bad", "x", b"1")
    nodes.issue(
        Op("set", "a", (1, 1)),
        Op("get", "no"),
        Op("head", "no"),
        Op("delete", "no"),
        Op("get", "bad"),
        Op("get_bulk", ["bad"]),
    )
    for pipeline in nodes.pipelines:
        pipeline.feed(server.answer(pipeline.take_output()))
    stats = nodes.apart.stats()
    assert (stats["operations"], stats["misses"], stats["failed"]) == (5, 2, 2)
    assert rows(stats) == {"get": 1, "head": 1, "set": 1, "delete": 1}
    assert not any(pipeline.stats()["operations"] for pipeline in nodes.pipelines)


def test_counters_add_up(core: ModuleType) -> None:
    exchanges = [Exchange(core) for _ in range(2)]
    for number, exchange in enumerate(exchanges):
        exchange.issue(*(Op("set", f"n{i}", (1, 1)) for i in range(2 + number)), Op("head", "a"))
        exchange.run()
        exchange.issue(Op("get", "a"))
        exchange.take()
    parts = [exchange.pipeline.stats() for exchange in exchanges]
    total = counters.merged(parts)
    assert list(total) == list(parts[0])
    assert (total["operations"], total["in_flight"], total["writes"]) == (9, 2, 5)
    assert total["mean_batch"] == total["sent"] / total["batches"]
    assert rows(total) == {"set": 5, "head": 2}
    kept: dict[str, Any] = {}
    for part in parts:
        counters.add(kept, part, lasting=True)
    assert "in_flight" not in kept
    # The returned counters are a separate copy.
    counters.add(kept, parts[0], lasting=True)
    assert rows(parts[0]) == {"set": 2, "head": 1}
    assert counters.merged([kept])["operations"] == 9 + 4


# -- a cache


async def test_a_cache_reports_its_connection(make_cache: MakeCache) -> None:
    cache = await make_cache()
    assert await cache.set("a", 1, {"b": 1})
    assert await cache.get("a") is not None
    assert await cache.get("no") is None
    assert await cache.get_bulk(["a", "no"]) != {}
    stats = cache.stats()
    assert (stats["operations"], stats["records"]) == (4, 5)
    assert (stats["reads"], stats["hits"], stats["misses"]) == (4, 2, 2)
    assert (stats["connections"], stats["connects"], stats["reconnections"]) == (1, 1, 0)
    assert (stats["redirections"], stats["failed"], stats["overloaded"]) == (0, 0, 0)
    assert stats["mean_batch"] == stats["sent"] / stats["batches"] == 5 / 4
    assert rows(stats) == {"get": 2, "set": 1, "get_bulk": 1}


async def test_reconnections_are_counted(make_cache: MakeCache, redis: redis_py.Redis) -> None:
    cache = await make_cache(connectionName="again")
    for number in range(3):
        if number:
            [own] = (one for one in redis.client_list() if one["name"] == "again")
            redis.client_kill(own["addr"])
        await cache.get("a")
    stats = cache.stats()
    assert (stats["connects"], stats["reconnections"], stats["connections"]) == (3, 2, 1)
    assert (stats["operations"], rows(stats)) == (3, {"get": 3})


async def test_memory_has_the_counters_of_the_others(make_cache: MakeCache) -> None:
    real, memory = await make_cache(), await make_cache(name="memory")
    for cache in (real, memory):
        await cache.set_bulk({"a": (1, 1), "b": (2, 2)})
        await cache.set("a", 1, 1, if_newer=True)
        await cache.get("a")
        await cache.head_bulk(["b", "no"])
        await cache.delete("no")
        with pytest.raises(dscache.RecordError):
            await cache.get("")
    counted, there = memory.stats(), real.stats()
    assert counted.keys() == there.keys() - {"maintenance"}  # of a server alone
    of_the_wire = {"batches", "sent", "commands", "flushes", "bytes_out", "bytes_in"}
    for name in set(counters.NAMES) - of_the_wire:
        assert counted[name] == there[name], name
    # Nothing is sent.
    assert rows(counted) == {}


async def test_threads_that_wait_for_a_connection_are_counted(
    server: EmbeddedServer | NamedServer, redis: redis_py.Redis, backend: str
) -> None:
    options = {"url": server.url, "maxConnections": 1, "commandTimeout": 30_000}
    with dscache.Cache.from_config({"name": "redis", "options": options}) as cache:
        cache.set("a", 1, 1)
        redis.execute_command("CLIENT", "PAUSE", 30_000, "WRITE")
        async with asyncio.timeout(30):
            try:
                calls = [
                    asyncio.create_task(asyncio.to_thread(cache.set, "a", 2, 2)) for _ in range(3)
                ]
                while cache.stats()["waiting"] < 2:
                    await asyncio.sleep(0.005)
            finally:
                await asyncio.to_thread(redis.execute_command, "CLIENT", "UNPAUSE")
            assert await asyncio.gather(*calls) == [True] * 3
        stats = cache.stats()
        # Two operations were issued without a connection, and are counted too.
        assert (stats["waiting"], stats["operations"]) == (0, 4)
        assert rows(stats) == {"set": 4}


def test_counters_that_another_thread_adds_to() -> None:
    """Counters are added while a connection that ends adds the first ones of a kind to them."""
    row = {"count": 1, "sum": 0.5, "buckets": [1]}
    operations: dict[str, Any] = {"get": row}
    counts: dict[str, Any] = {"hits": 1, "latency": {"operations": operations}}

    class Total(dict[str, Any]):
        def __init__(self, grows: dict[str, Any], more: Any, **rows: Any) -> None:
            super().__init__(rows)
            self._grows, self._more = grows, more

        def __setitem__(self, name: str, value: Any) -> None:
            self._grows[f"more {name}"] = self._more
            super().__setitem__(name, value)

    total = Total(counts, 1, latency={"operations": Total(operations, row)})
    counters.add(total, counts)
    assert total == {"hits": 1, "latency": {"operations": {"get": row}}}
    assert (counts["more hits"], operations["more get"]) == (1, row)
