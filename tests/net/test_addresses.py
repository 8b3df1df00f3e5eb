"""Names with several addresses, of which the first ones are dead."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

import dscache
from dscache.aio.resolver import Resolver
from dscache.aio.sentinel import Sentinels
from dscache.blocking.sentinel import Sentinels as BlockingSentinels
from dscache.config import Config, load
from dscache.embedded import EmbeddedServer
from dscache.net.sockets import interleaved
from tests.support.faults import FakeServer
from tests.support.waiting import PATIENCE

NAME = "several.test"
LIMIT = PATIENCE * 1000


@contextmanager
def deaf(port: int, host: str = "127.0.0.2") -> Iterator[None]:
    """Let an address answer no attempt to connect: its backlog is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((host, port))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex((host, port))
        yield


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses of the name, which a test may change."""
    hosts = ["127.0.0.2", "127.0.0.1"]
    look_up = socket.getaddrinfo

    def getaddrinfo(host: str, port: Any, *kinds: int) -> Any:
        if host != NAME:
            return look_up(host, port, *kinds)
        if len(kinds) > 3 and kinds[3] & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "no number")
        return [one for each in hosts for one in look_up(each, port, *kinds[:3])]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return hosts


def config_of(port: int, **options: Any) -> Config:
    options = {"connectTimeout": LIMIT, "commandTimeout": LIMIT, **options}
    where = {} if "sentinels" in options else {"host": NAME, "port": port}
    return load({"cache": {"name": "redis", "options": {**where, **options}}})


@pytest.mark.usefixtures("resolve")
async def test_a_cache_connects_past_a_deaf_address(backend: str) -> None:
    with EmbeddedServer() as server, deaf(server.port):
        async with dscache.AsyncCache(config_of(server.port)) as cache:
            assert await cache.set("a", 1, 1)


@pytest.mark.usefixtures("resolve")
def test_a_blocking_cache_connects_past_a_deaf_address(backend: str) -> None:
    with (
        EmbeddedServer() as server,
        deaf(server.port),
        dscache.Cache(config_of(server.port)) as cache,
    ):
        assert cache.set("a", 1, 1)


@pytest.mark.parametrize("order", [1, -1])
async def test_an_older_attempt_may_win(resolve: list[str], order: int) -> None:
    """An address of which others are deaf is found at any place among them."""
    resolve[:] = ["127.0.0.2", "127.0.0.1", "127.0.0.3"][::order]
    with EmbeddedServer() as server, deaf(server.port), deaf(server.port, "127.0.0.3"):
        async with dscache.AsyncCache(config_of(server.port)) as cache:
            assert await cache.set("a", 1, 1)
        with dscache.Cache(config_of(server.port)) as blocking:
            assert blocking.get("a") is not None


@contextmanager
def useless(port: int, first_words: bytes, *, closes: bool) -> Iterator[None]:
    """Let an address accept, say something, and serve nothing."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.2", port)))
        stack.callback(listener.shutdown, socket.SHUT_RDWR)
        accepted = []

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    accepted.append(client)
                    client.sendall(first_words)
                    if closes:
                        client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield
    thread.join()
    assert accepted
    for client in accepted:
        client.close()


@pytest.mark.parametrize(
    ("first_words", "closes"),
    [(b"", False), (b"", True), (b"-ERR max number of clients reached\r\n", True)],
    ids=["silent", "closing", "full"],
)
@pytest.mark.usefixtures("resolve")
async def test_an_address_that_accepts_and_serves_nothing_is_tried_last(
    backend: str, first_words: bytes, closes: bool
) -> None:
    with EmbeddedServer() as server:
        config = config_of(server.port, connectTimeout=300)
        with useless(server.port, first_words, closes=closes):
            async with asyncio.timeout(PATIENCE):
                cache = dscache.AsyncCache(config)
                assert await cache.set("a", 1, 1)
                await cache.close()
        with useless(server.port, first_words, closes=closes):
            blocking = dscache.Cache(config)
            assert blocking.get("a") is not None
            blocking.close()


@pytest.mark.usefixtures("resolve")
async def test_the_error_of_a_silent_address_names_all_of_them(backend: str) -> None:
    with EmbeddedServer() as server:
        port = server.port
    config = config_of(port, connectTimeout=300, commandTimeout=300)
    said = f"127.0.0.2:{port}: silent once connected; 127.0.0.1:{port}: not tried"
    with useless(port, b"", closes=False):
        with pytest.raises(dscache.ConnectError, match=said):
            get_blocking(config)
        cache = dscache.AsyncCache(config)
        with pytest.raises(dscache.ConnectError, match=said):
            await cache.when_ready()
        await cache.close()


@pytest.mark.usefixtures("resolve")
async def test_a_replica_among_the_addresses_of_a_name_is_left(backend: str) -> None:
    with EmbeddedServer() as server:
        answers = {"MSET": b"-READONLY You can't write against a read only replica.\r\n"}
        config = config_of(server.port)
        async with (
            FakeServer(answers, host="127.0.0.2", port=server.port) as replica,
            asyncio.timeout(PATIENCE),
        ):
            async with dscache.AsyncCache(config) as cache:
                assert await cache.set("a", 1, 1) is True
                assert cache.stats()["connects"] == 2
            assert replica.accepted == 1
            await asyncio.to_thread(set_blocking, config)
            assert replica.accepted == 2


async def get_async(config: Config) -> None:
    cache = dscache.AsyncCache(config)
    try:
        await cache.get("a")
    finally:
        await cache.close()


def set_blocking(config: Config) -> None:
    with dscache.Cache(config) as cache:
        assert cache.set("b", 1, 1) is True


def get_blocking(config: Config) -> None:
    cache = dscache.Cache(config)
    try:
        cache.get("a")
    finally:
        cache.close()


@pytest.mark.parametrize("reason", ["Connection refused", "no answer"])
@pytest.mark.usefixtures("resolve")
async def test_an_error_names_every_address_with_its_reason(reason: str) -> None:
    with EmbeddedServer() as server:
        port = server.port
    said = f"127.0.0.2:{port}: {reason}; 127.0.0.1:{port}: {reason}"
    config = config_of(port, connectTimeout=600, commandTimeout=2000)
    with ExitStack() as stack:
        if reason == "no answer":
            stack.enter_context(deaf(port))
            stack.enter_context(deaf(port, "127.0.0.1"))
        with pytest.raises(dscache.ConnectError, match=said):
            await get_async(config)
        with pytest.raises(dscache.ConnectError, match=said):
            # The attempt takes all of the time, so that no shorter one follows.
            get_blocking(config_of(port, connectTimeout=600, commandTimeout=600))


@pytest.mark.usefixtures("resolve")
async def test_a_sentinel_is_asked_past_a_deaf_address() -> None:
    """The server is no Sentinel, and says so."""
    with EmbeddedServer() as server, deaf(server.port):
        nodes = [{"host": NAME, "port": server.port}]
        options = config_of(server.port, sentinels=nodes, name="group").options
        assert options.sentinels is not None
        sentinels = Sentinels(options, Resolver())
        assert await sentinels.execute(options.sentinels[0], [("ECHO", "x")]) == ["x"]
        blocking = BlockingSentinels(options)
        with pytest.raises(dscache.ConnectError, match="unknown command"):
            blocking.locate(time.monotonic() + PATIENCE)


def test_families_take_turns() -> None:
    def found(family: int, host: str) -> Any:
        return family, socket.SOCK_STREAM, 0, (host, 1)

    six = [found(socket.AF_INET6, f"::{i}") for i in range(3)]
    four = [found(socket.AF_INET, f"127.0.0.{i}") for i in range(2)]
    assert interleaved([*six, *four, six[0]]) == [six[0], four[0], six[1], four[1], six[2]]
    assert interleaved([four[0], *six]) == [four[0], *six]
