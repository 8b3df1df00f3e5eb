"""Host lookups: their use of threads while no name server answers."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest

import dscache
from dscache.aio.resolver import Resolver, connect_to
from dscache.embedded import EmbeddedServer
from tests.support.waiting import PATIENCE, until

# The program's executor has this many threads, which a few attempts would occupy.
THREADS = 2
HASTY = {"connectTimeout": 40, "retryStrategy": {"first": 1, "cap": 5}}


class Names:
    """Lookups of names that end in ``.test``, none of which ends before ``answer`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: Counter[str] = Counter()
        self.under_way = self.most = 0
        self.numeric_elsewhere = 0
        self.answer = threading.Event()
        self._lock = threading.Lock()
        self._look_up = socket.getaddrinfo
        self._loop_thread = threading.get_ident()
        monkeypatch.setattr(socket, "getaddrinfo", self._slow)

    def _slow(
        self, host: str, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> Any:
        if not host.endswith(".test"):
            if threading.get_ident() != self._loop_thread:
                self.numeric_elsewhere += 1
            return self._look_up(host, port, family, type, proto, flags)
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "no number")
        with self._lock:
            self.begun[host] += 1
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        self.answer.wait(PATIENCE)
        with self._lock:
            self.under_way -= 1
        return self._look_up("127.0.0.1", port, family, type, proto, flags)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    names = Names(monkeypatch)
    yield names
    names.answer.set()


@asynccontextmanager
async def small_executor() -> AsyncIterator[ThreadPoolExecutor]:
    """Give the running loop an executor that slow lookups would soon exhaust."""
    executor = ThreadPoolExecutor(THREADS)
    asyncio.get_running_loop().set_default_executor(executor)
    yield executor
    executor.shutdown(wait=False)


def begun(cache: dscache.AsyncCache) -> asyncio.Future[Any]:
    """Let a cache begin to connect."""
    return asyncio.ensure_future(cache.get("a record that no other test writes"))


async def run_in_executor() -> int:
    async with asyncio.timeout(PATIENCE):
        return await asyncio.get_running_loop().run_in_executor(None, lambda: 7)


def node_of(names: int) -> dict[str, Any]:
    return {"nodes": [{"host": f"n{i}.test", "port": 7000} for i in range(names)]}


OPTIONS: dict[str, dict[str, Any]] = {
    "one server": {"host": "slow.test"},
    "Sentinels": {
        "name": "main",
        "sentinels": [{"host": f"s{i}.test", "port": 26379} for i in range(3)],
    },
    "a cluster": node_of(30),
    "logins of nodes": {
        "nodes": [{"host": f"n{i}.test", "port": 7000, "password": "x"} for i in range(5)],
        "slotsRefreshTimeout": 20,
    },
}


@pytest.mark.parametrize("kind", OPTIONS)
async def test_slow_lookups_do_not_use_the_executor(names: Names, kind: str) -> None:
    """In attempt after attempt, each name is looked up once, and never many at a time."""
    hasty = {**HASTY, "clusterRetryStrategy": {"first": 1, "cap": 5}}
    options = OPTIONS[kind] | (hasty if "nodes" in OPTIONS[kind] else HASTY)
    async with small_executor():
        cache = dscache.AsyncCache.from_config({"name": "redis", "options": options})
        waiting = begun(cache)
        try:
            await until(lambda: names.begun)
            await asyncio.sleep(0.5)  # time for some ten attempts
            assert names.begun
            assert max(names.begun.values()) == 1
            assert names.most <= 4
            assert await run_in_executor() == 7
        finally:
            names.answer.set()
            await cache.close()
            await asyncio.gather(waiting, return_exceptions=True)


async def test_slow_lookups_of_message_nodes(names: Names) -> None:
    async with small_executor():
        node = dscache.MessageNode.from_config(
            {"name": "redis", "options": {**node_of(1), **HASTY}}, server_name="a"
        )
        node.subscribe(1, lambda message, sender: None)
        try:
            await until(lambda: names.begun)
            await asyncio.sleep(0.5)
            # One connection to subscribe and one to publish.
            assert names.begun["n0.test"] <= 2
            assert await run_in_executor() == 7
        finally:
            names.answer.set()
            await node.close()


async def test_the_next_attempt_uses_the_lookup_of_the_last(
    names: Names, server: EmbeddedServer
) -> None:
    options = {"host": "slow.test", "port": server.port, **HASTY, "connectTimeout": 500}
    cache = dscache.AsyncCache.from_config({"name": "redis", "options": options})
    waiting = begun(cache)
    try:
        await until(lambda: names.begun["slow.test"] == 1)
        await asyncio.sleep(0.7)
        names.answer.set()
        assert await waiting is None
        assert names.begun["slow.test"] == 1
    finally:
        await cache.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "127.1", "::ffff:127.0.0.1"])
async def test_a_numeric_address_needs_no_thread(
    names: Names, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise AssertionError("no thread is needed")

    monkeypatch.setattr(threading.Thread, "start", start)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    (found,) = await Resolver().look_up(host, 6379)
    assert (found[0], found[-1][1]) == (family, 6379)
    assert not names.numeric_elsewhere


async def test_each_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address refuses, and the second one serves the port."""
    look_up = socket.getaddrinfo

    def two(host: str, port: Any, *others: int) -> Any:
        if host != "two.test":
            return look_up(host, port, *others)
        if others[-1] & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "no number")
        kinds = others[:3]
        return [*look_up("127.0.0.3", port, *kinds), *look_up("127.0.0.2", port, *kinds)]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    with socket.create_server(("127.0.0.2", 0)) as listener:
        port = listener.getsockname()[1]
        sock = await connect_to(await Resolver().look_up("two.test", port))
        with sock:
            assert sock.getpeername() == ("127.0.0.2", port)
    said = f"127.0.0.3:{port}: Connection refused; 127.0.0.2:{port}: Connection refused"
    with pytest.raises(OSError, match=said):
        await connect_to(await Resolver().look_up("two.test", port))


async def test_an_invalid_name(names: Names) -> None:
    with pytest.raises(UnicodeError):
        await Resolver().look_up("a" * 70, 1)
    with pytest.raises(socket.gaierror):
        await Resolver().look_up("no-such-host.invalid", 1)
