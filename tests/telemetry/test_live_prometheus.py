"""A Prometheus that scrapes caches: each panel of the dashboard and each alert is seen at work."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
import yaml
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import dscache
from dscache.embedded import EmbeddedServer
from dscache.prometheus import register
from tests.aio.test_topology import FakeCluster, cache_on, names_of, slot_of
from tests.conftest import PATIENT, SERVERS, _server_id
from tests.support.announcer import Announcer, FakeSlots
from tests.support.documents import PROJECT
from tests.support.faults import FaultProxy
from tests.support.prometheus import Prometheus, find_prometheus, promtool

FOLDER = PROJECT / "examples" / "operations"
PANELS = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))["panels"]
RULES = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
COMPOSE = yaml.safe_load((FOLDER / "compose.yml").read_text(encoding="utf-8"))
SHIPPED = yaml.safe_load(COMPOSE["configs"]["prometheus"]["content"])

# Each minute of the rules is that long here, and a scrape comes several times in their windows.
MINUTE_MS = 200
SCRAPES = "100ms"
WINDOW = "1s"
PATIENCE = 100

pytestmark = pytest.mark.skipif(
    find_prometheus() is None, reason="no Prometheus; make test fetches it where apt-get has it"
)
on_one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)


def expressions() -> dict[str, str]:
    """Return the expressions of the panels by titles, as Grafana sends them for all caches."""
    found = {}
    for panel in PANELS:
        for target in panel.get("targets", ()):
            text = target["expr"].replace("$__rate_interval", WINDOW)
            text = re.sub(r"\$(cache|instance)\b", ".*", text)
            found[f"{panel['title']}, {target['legendFormat']}, {target['refId']}"] = text
    return found


def shortened(rules: Any) -> Any:
    """Return the rules with each minute shortened to ``MINUTE_MS``."""
    groups = []
    for group in rules["groups"]:
        short = [
            {
                **rule,
                "expr": re.sub(r"\[(\d+)m\]", lambda one: f"[{_short(one[1])}]", rule["expr"]),
                "for": _short(rule.get("for", "0m").removesuffix("m")),
            }
            for rule in group["rules"]
        ]
        groups.append({**group, "rules": short})
    return {"groups": groups}


def _short(minutes: str) -> str:
    return f"{int(minutes) * MINUTE_MS}ms"


def configuration(port: int, folder: Path) -> dict[str, Any]:
    """Return the configuration of compose.yml, with shorter times and another target."""
    (folder / "alerts.yml").write_text(yaml.safe_dump(shortened(RULES)))
    (job,) = SHIPPED["scrape_configs"]
    return {
        **SHIPPED,
        "global": {"scrape_interval": SCRAPES, "evaluation_interval": SCRAPES},
        "scrape_configs": [{**job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
    }


# -- what the caches do


class Caches:
    """Caches under names in one registry, with tasks and threads that use them."""

    def __init__(self, server: EmbeddedServer) -> None:
        self.registry = CollectorRegistry()
        self.stack = AsyncExitStack()
        self._server = server
        self._over = threading.Event()
        self._works: list[asyncio.Task[None]] = []
        self._threads: list[threading.Thread] = []

    async def __aenter__(self) -> Caches:
        await self.stack.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over.set()
        for task in self._works:
            task.cancel()
        await asyncio.gather(*self._works, return_exceptions=True)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        await self.stack.aclose()

    async def add(self, name: str, cache: dscache.AsyncCache) -> dscache.AsyncCache:
        await self.stack.enter_async_context(cache)
        register(cache, name, self.registry)
        return cache

    async def behind_a_proxy(
        self, name: str, **options: Any
    ) -> tuple[FaultProxy, dscache.AsyncCache]:
        proxy = FaultProxy(self._server.host, self._server.port)
        await self.stack.enter_async_context(proxy)
        return proxy, await self.add(name, dscache.AsyncCache(proxy.url, **options))

    def repeat(self, work: Callable[[], Awaitable[Any]], pause: float = 0.02) -> None:
        """Work again and again; errors of operations are expected."""

        async def go_on() -> None:
            while True:
                with contextlib.suppress(dscache.DscacheError):
                    await work()
                await asyncio.sleep(pause)

        self._works.append(asyncio.create_task(go_on()))

    def repeat_in_thread(self, work: Callable[[], Any]) -> None:
        def go_on() -> None:
            while not self._over.wait(0.02):
                with contextlib.suppress(dscache.DscacheError):
                    work()

        thread = threading.Thread(target=go_on)
        thread.start()
        self._threads.append(thread)

    async def work(self) -> FakeCluster:
        """Begin the traffic of a service in which all is well."""
        near = await self.add(
            "near",
            dscache.AsyncCache(self._server.url, near_cache={"maxRecords": 8}, **PATIENT),
        )
        threads = await asyncio.to_thread(
            lambda: dscache.Cache(self._server.url, **PATIENT).__enter__()
        )
        self.stack.push_async_callback(asyncio.to_thread, threads.close)
        register(threads, "threads", self.registry)
        fakes = await self.stack.enter_async_context(FakeCluster())
        clustered = await self.add("cluster", cache_on(fakes))
        numbers = itertools.count()

        async def records() -> None:
            names = [f"user/{number}" for number in range(10)]
            await near.set_bulk({name: (next(numbers), {}) for name in names})
            for _ in range(2):
                await asyncio.gather(*map(near.get, names), near.get("none"))
            await near.fetch("user/0", lambda _: {}, ttl=60)
            await near.delete("user/9")

        async def of_nodes() -> None:
            for node in fakes.nodes:
                (name,) = names_of(node, 1)
                await clustered.set(name, next(numbers), {})

        self.repeat(records)
        self.repeat(of_nodes)
        self.repeat_in_thread(lambda: threads.set("user/1", next(numbers), {}))
        return fakes

    async def break_everything(self, fakes: FakeCluster, redis: redis_py.Redis) -> None:
        """Begin each incident that an alert or a panel is for."""
        await self._without_a_server()
        await self._slow_and_stuck()
        await self._lose_connections()
        await self._spoil_records(redis)
        await self._move_slots(fakes)
        await self._announce_maintenance()

    async def _without_a_server(self) -> None:
        proxy, cache = await self.behind_a_proxy(
            "away", near_cache={"serveStale": True}, command_timeout=400
        )
        await cache.set("known", 1, {})
        while not cache.stats()["near_cache"]["hits"]:
            await cache.get("known")
        await proxy.refuse()
        proxy.cut()
        self.repeat(lambda: cache.get("known"))
        self.repeat(lambda: cache.get("unknown"))

    async def _slow_and_stuck(self) -> None:
        proxy, slow = await self.behind_a_proxy("slow", **PATIENT)
        proxy.delay(0.15)
        self.repeat(lambda: slow.get("any"))
        proxy, full = await self.behind_a_proxy(
            "full", max_pending=1, when_full="error", command_timeout=400
        )
        proxy.stall()
        self.repeat(lambda: full.get("any"))
        self.repeat(lambda: full.get("any"))
        one = dscache.Cache(proxy.url, max_connections=1, command_timeout=400)
        self.stack.push_async_callback(asyncio.to_thread, one.close)
        register(one, "one connection", self.registry)
        for _ in range(3):
            self.repeat_in_thread(lambda: one.get("any"))

    async def _lose_connections(self) -> None:
        proxy, cache = await self.behind_a_proxy("flaky", near_cache=True, **PATIENT)

        async def lose() -> None:
            await cache.get("any")
            # A read that a write overtakes isn't kept.
            await asyncio.gather(cache.get("other"), cache.set("other", 1, {}))
            proxy.cut()

        self.repeat(lose)

    async def _spoil_records(self, redis: redis_py.Redis) -> None:
        cache = await self.add("spoilt", dscache.AsyncCache(self._server.url, **PATIENT))
        redis.set("half_v", 1)
        redis.mset({"damaged_v": "none", "damaged_d": 1})
        self.repeat(lambda: cache.get("half"))
        self.repeat(lambda: cache.get("damaged"))

    async def _move_slots(self, fakes: FakeCluster) -> None:
        cache = await self.add("unsettled", cache_on(fakes))
        (moving,) = names_of(fakes.nodes[0], 1)
        bad = names_of(fakes.nodes[1], 2)[1]
        await cache.set(bad, 1, {})
        for key in [key for key in fakes.nodes[1].values if bad.encode() in key]:
            fakes.nodes[1].values[key] = b"none"
        owners = itertools.cycle(reversed(fakes.nodes))

        async def move() -> None:
            fakes.give(slot_of(moving), next(owners))
            await cache.get(moving)

        self.repeat(move)
        self.repeat(lambda: cache.get(bad))

    async def _announce_maintenance(self) -> None:
        """A server moves between two addresses, and slots between two nodes."""
        slots = FakeSlots()
        one, other, *nodes = [
            await self.stack.enter_async_context(
                Announcer(self._server.host, self._server.port, slots=of)
            )
            for of in (None, None, slots, slots)
        ]
        slots.divide(*nodes)
        options: dict[str, Any] = {"maint_notifications": "on", **PATIENT}
        moving = await self.add(
            "moving", dscache.AsyncCache({"host": "127.0.0.1", "port": one.port}, **options)
        )
        seeds = [{"host": "127.0.0.1", "port": node.port} for node in nodes]
        resharding = await self.add("resharding", dscache.AsyncCache({"nodes": seeds}, **options))
        numbers = itertools.count(1)

        async def move() -> None:
            await moving.get("any")
            here, there = (one, other) if one.connections else (other, one)
            here.push(b"MIGRATING", next(numbers), 0, b"1")
            here.push(b"MIGRATED", next(numbers), b"1")
            here.push(b"MOVING", next(numbers), 10, there.address)

        async def reshard() -> None:
            await resharding.get("any")
            source, target = nodes
            slots.give(0, 99, target)
            number = next(numbers)
            for node in (source, target):
                node.push(b"SMIGRATED", number, [[source.address, target.address, b"0-99"]])
            nodes.reverse()

        self.repeat(move)
        self.repeat(reshard)


@contextlib.asynccontextmanager
async def scraped(caches: Caches, folder: Path) -> AsyncIterator[Prometheus]:
    http, thread = start_http_server(0, "127.0.0.1", caches.registry)
    try:
        prometheus = Prometheus(configuration(http.server_port, folder), folder)
        await asyncio.to_thread(prometheus.__enter__)
        try:
            yield prometheus
        finally:
            await asyncio.to_thread(prometheus.__exit__)
    finally:
        await asyncio.to_thread(http.shutdown)
        http.server_close()
        await asyncio.to_thread(thread.join)


async def until_all(names: set[str], seen: Callable[[str], bool]) -> None:
    """Wait until each was seen, at any time."""
    left = set(names)
    try:
        async with asyncio.timeout(PATIENCE):
            while left:
                for name in sorted(left):
                    if await asyncio.to_thread(seen, name):
                        left.discard(name)
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"never seen: {sorted(left)}") from None


# -- the tests


@on_one_server
async def test_every_panel_and_every_alert_is_seen_at_work(
    server: EmbeddedServer, redis: redis_py.Redis, tmp_path: Path
) -> None:
    panels = expressions()
    assert len(panels) > 30
    async with Caches(server) as caches:
        fakes = await caches.work()
        async with scraped(caches, tmp_path) as prometheus:
            values = prometheus.values
            # While all is well each panel shows numbers, if only zeros.
            await until_all(
                set(panels), lambda name: bool(found := values(panels[name])) and finite(found)
            )
            for variable in ("cache", "instance"):
                labels = prometheus.ask(f"label/{variable}/values", **{"match[]": "dscache_ready"})
                assert len(labels) == {"cache": 3, "instance": 1}[variable]
            await caches.break_everything(fakes, redis)
            # In an incident each shows what it is for, and each alert fires.
            await until_all(set(panels), lambda name: any(one > 0 for one in values(panels[name])))
            await until_all(set(ALERTS), lambda name: name in prometheus.firing())
            firing = prometheus.firing()
    for name, alerts in firing.items():
        for alert in alerts:
            assert math.isfinite(float(alert["value"])), name
            for text in alert["annotations"].values():
                assert "<no value>" not in text, name
                assert "<error" not in text, name
            assert alert["labels"]["job"] == "records"
            assert alert["labels"]["cache"] in alert["annotations"]["summary"]


def finite(found: list[float]) -> bool:
    return all(map(math.isfinite, found))


@on_one_server
async def test_promtool_finds_nothing_to_improve(server: EmbeddedServer) -> None:
    """Names, help and types, of caches of all kinds after traffic."""
    async with Caches(server) as caches:
        await caches.work()
        while b"dscache_near_reads_total{" not in generate_latest(caches.registry):
            await asyncio.sleep(0.01)
        text = generate_latest(caches.registry).decode()
        as_openmetrics = openmetrics.generate_latest(caches.registry).decode()
    assert "dscache_node_operations_total{" in text
    assert promtool("check", "metrics", given=text) == ""
    # This parser refuses what the standard doesn't allow.
    families = [*text_string_to_metric_families(as_openmetrics)]
    assert len(families) > 30
    assert all(family.documentation.endswith(".") for family in families)
