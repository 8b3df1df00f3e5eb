"""An operation at which the server cuts the connection harms no others for long."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress

import pytest

import dscache
from dscache.config import Config, load
from dscache.embedded import EmbeddedServer
from tests.support.waiting import PATIENCE

Poison = Callable[[dscache.AsyncCache], Awaitable[object]]

TIMEOUT = PATIENCE * 1000
# What a server's limits are to a request that exceeds them.
MARK = b"poison"


class CuttingServer:
    """A server that cuts each connection on which a command contains the mark."""

    def __init__(self, behind: EmbeddedServer) -> None:
        self._behind = behind
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cuts = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((self._behind.host, self._behind.port))
                for source, target in ((client, server), (server, client)):
                    args = source, target, source is client
                    threading.Thread(target=self._forward, args=args, daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, is_request: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if is_request and MARK in data:
                    self.cuts += 1
                    break
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        if is_request:
            source.close()
            target.close()


@pytest.fixture
def cutting() -> Iterator[CuttingServer]:
    with EmbeddedServer() as server:
        cutting = CuttingServer(server)
        yield cutting
        cutting.close()


def hasty(server: CuttingServer) -> Config:
    host, _, port = server.url.removeprefix("redis://").partition(":")
    options = {
        "host": host,
        "port": int(port),
        "commandTimeout": TIMEOUT,
        "retryStrategy": {"first": 1, "cap": 20},
    }
    return load({"cache": {"name": "redis", "options": options}})


async def read(cache: dscache.AsyncCache) -> object:
    return await cache.get("poison")


async def read_bulk(cache: dscache.AsyncCache) -> object:
    return await cache.get_bulk(["b", "poison"])


async def read_version(cache: dscache.AsyncCache) -> object:
    return await cache.head("poison")


async def write(cache: dscache.AsyncCache) -> object:
    return await cache.set("b", 1, "poison", if_newer=True)


@pytest.mark.parametrize("poison", [read, read_bulk, read_version, write])
async def test_a_poison_operation_costs_three_connections(
    backend: str, cutting: CuttingServer, poison: Poison
) -> None:
    async with dscache.AsyncCache(hasty(cutting)) as cache:
        await cache.set("a", 1, "a's")
        others = [cache.get("a"), cache.head("a"), cache.set("c", 1, "c's", if_newer=True)]
        with pytest.raises(dscache.ConnectionLost, match="has cut the connection 3 times"):
            async with asyncio.timeout(PATIENCE / 2):
                await poison(cache)
        record, version, was_written = await asyncio.gather(*others)
        assert (tuple(record), version, was_written) == ((1, "a's"), 1, True)
        assert cutting.cuts == 3
        assert cache.stats()["connects"] <= 4
        assert cache.stats()["pending"] == 0


def test_a_blocking_poison_operation_costs_three_connections(
    backend: str, cutting: CuttingServer
) -> None:
    with dscache.Cache(hasty(cutting)) as cache:
        cache.set("a", 1, "a's")
        with pytest.raises(dscache.ConnectionLost, match="has cut the connection 3 times"):
            cache.get("poison")
        assert cutting.cuts == 3
        with pytest.raises(dscache.ConnectionLost, match="the write may have happened"):
            cache.set("b", 1, "poison", if_newer=True)
        assert cutting.cuts == 6
        record = cache.get("a")
        assert record is not None
        assert tuple(record) == (1, "a's")
