"""The control connection of the commands: replies, pushes, and its end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dscache import ConnectError, ConnectionLost, ReplyError
from dscache.admin import control
from dscache.admin.control import ControlConnection
from dscache.admin.primaries import is_clustered, parse_info
from dscache.config import Options, load
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
    monkeypatch.setattr(control, "_PATIENCE", 0.1)
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
