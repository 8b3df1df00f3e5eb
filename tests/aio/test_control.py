"""The control connection of the commands: replies, pushes, and its end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import redis as redis_py

from dscache import ConnectError, ConnectionLost, ReplyError
from dscache.admin.cache import AdminCache, open_cache
from dscache.admin.primaries import open_primaries
from dscache.aio import control
from dscache.aio.connection import Connection
from dscache.aio.control import ControlConnection, is_clustered
from dscache.config import Options, load
from dscache.embedded import EmbeddedServer
from dscache.net.slots import parse_info
from tests.support.commands import invoke
from tests.support.faults import FakeServer


def options_of(fake: FakeServer, **more: Any) -> Options:
    return load({"name": "redis", "options": {"url": fake.url, **more}}).options


async def test_replies_are_returned_in_order() -> None:
    answers = {"PING": b"+PONG\r\n", "DBSIZE": b":7\r\n", "NONE": b"_\r\n", "BAD": b"-ERR no\r\n"}
    async with FakeServer(answers) as fake:
        direct = await ControlConnection.open(options_of(fake))
        assert direct.address == f"{fake.host}:{fake.port}"
        first = asyncio.ensure_future(direct.execute_many(["PING"], ["BAD"], ["NONE"]))
        second = asyncio.ensure_future(direct.execute("DBSIZE"))
        pong, error, none = await first
        assert (pong, none, await second) == (b"PONG", None, 7)
        assert isinstance(error, ReplyError)
        assert await direct.execute_many() == []
        with pytest.raises(ReplyError, match=r"^ERR no \(BAD at 127\.0\.0\.1:\d+\)$"):
            await direct.execute("BAD")
        # A caller that stops waiting leaves the others their replies.
        left = asyncio.ensure_future(direct.execute("PING"))
        await asyncio.sleep(0)
        left.cancel()
        assert await direct.execute("DBSIZE") == 7
        assert (direct.tls, direct.is_local) == ("", True)
        direct.close()
        direct.close()
        assert str(await direct.lost) == "it was closed"
        with pytest.raises(ConnectionLost, match="it was closed"):
            await direct.execute("PING")


async def test_pushes_are_not_replies() -> None:
    pushes: list[Any] = []
    async with FakeServer({"PING": b"+PONG\r\n"}) as fake:
        direct = await ControlConnection.open(options_of(fake), pushes.append)
        fake.push(b">2\r\n$10\r\ninvalidate\r\n*1\r\n$3\r\na_v\r\n")
        assert await direct.execute("PING") == b"PONG"
        assert [list(push) for push in pushes] == [[b"invalidate", [b"a_v"]]]
        direct.close()


@pytest.mark.parametrize("answer", [None, b"nonsense\r\n", b":1\r\n:2\r\n"])
async def test_a_connection_that_the_server_ends(answer: bytes | None) -> None:
    async with FakeServer({"PING": answer}) as fake:
        direct = await ControlConnection.open(options_of(fake))
        if answer and answer.startswith(b":"):
            assert await direct.execute("PING") == 1
        else:
            with pytest.raises(ConnectionLost, match=r"^connection to 127\.0\.0\.1:\d+ lost: "):
                await direct.execute("PING")
        assert str(await direct.lost)
        with pytest.raises(ConnectionLost):
            await direct.execute("PING")


async def test_a_hanging_server_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_ANSWER_TIMEOUT", 0.1)
    async with FakeServer({"PING": b""}) as fake:
        direct = await ControlConnection.open(options_of(fake))
        with pytest.raises(ConnectionLost, match="did not answer"):
            await direct.execute("PING")
        await direct.lost


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (b"-WRONGPASS no\r\n", ReplyError, r"^WRONGPASS no \(connect at 127"),
        (None, ConnectError, r"^no connection to 127\.0\.0\.1:\d+: "),
        (b"", ConnectError, r"^no connection to 127\.0\.0\.1:\d+: no answer within 100 ms$"),
    ],
)
async def test_a_refused_login(answer: bytes | None, error: type[Exception], words: str) -> None:
    async with FakeServer({"HELLO": answer}) as fake:
        with pytest.raises(error, match=words):
            await ControlConnection.open(options_of(fake, connectTimeout=100))
    with pytest.raises(ConnectError, match="Connection refused"):
        await ControlConnection.open(load("127.0.0.1:1").options)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"$17\r\ncluster_state:ok\n\r\n", True),
        (b"-ERR This instance has cluster support disabled\r\n", False),
        (b"-NOPERM this user has no permissions\r\n", False),
    ],
)
async def test_cluster_nodes_are_detected(answer: bytes, expected: bool) -> None:
    async with FakeServer({"CLUSTER": answer}) as fake:
        direct = await ControlConnection.open(options_of(fake))
        assert await is_clustered(direct) is expected
        direct.close()


def test_info_is_parsed() -> None:
    assert parse_info(b"# Server\r\nredis_version:7.0.15\r\nempty:\r\n") == {
        "redis_version": "7.0.15",
        "empty": "",
    }
    assert parse_info(ReplyError("NOPERM")) == {}


@pytest.fixture(scope="module")
def counted() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as started:
        yield started


@pytest.mark.parametrize(
    "words",
    [
        ("get", "a"),
        ("head", "a"),
        ("set", "a", "1", "[]"),
        ("export", "-"),
        ("import", "-"),
        ("bench", "--seconds", "0.1", "--records", "10", "--tasks", "2"),
    ],
    ids=lambda words: words[0],
)
def test_one_connection_to_a_single_server(words: tuple[str, ...], counted: EmbeddedServer) -> None:
    with redis_py.Redis.from_url(counted.url) as client:
        client.mset({"a_v": 1, "a_d": "[]"})

        def received() -> int:
            return int(client.info("stats")["total_connections_received"])

        before = received()
        assert invoke(*words, "--url", counted.url).status == 0
        assert received() - before == 1


async def test_a_shared_socket_is_left_to_its_cache(counted: EmbeddedServer) -> None:
    async with open_cache(load(counted.url)) as cache, open_primaries(cache) as primaries:
        (primary,) = primaries.all
        primary.server.close()
        assert await primary.server.execute("PING") == b"PONG"
        assert await cache.get("nothing") is None
        connection = cache.topology
        assert isinstance(connection, Connection)
        connection.leave("a test ends it")
        await primary.server.lost
        # A cursor of the old socket means nothing on the next one.
        with pytest.raises(ConnectionLost, match="lost: a test ends it"):
            await primary.server.execute("PING")
        assert await cache.get("nothing") is None
        with pytest.raises(ConnectionLost, match="lost: a test ends it"):
            await primary.server.execute("PING")


async def test_a_connection_that_is_not_ready_is_not_shared() -> None:
    cache = AdminCache(load("127.0.0.1:1"))
    connection = cache.topology
    assert isinstance(connection, Connection)
    with pytest.raises(ConnectionLost, match=r"^no connection to 127\.0\.0\.1:1$"):
        ControlConnection.share(connection)
    await cache.close()


def test_without_a_terminal_s_libraries() -> None:
    program = """
import importlib, pkgutil, sys
sys.modules["typer"] = sys.modules["rich"] = None
import dscache.admin
for one in pkgutil.walk_packages(dscache.admin.__path__, "dscache.admin."):
    importlib.import_module(one.name)
    print(one.name)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True
    )
    assert "dscache.admin.doctor.checkup" in done.stdout.splitlines()
