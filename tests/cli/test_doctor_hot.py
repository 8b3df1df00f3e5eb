"""The hot records that ``doctor`` finds: by HOTKEYS, by OBJECT FREQ, and where neither is there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import redis as redis_py

from dscache.admin.doctor.findings import OK, UNKNOWN, WARNING
from dscache.admin.doctor.hot_records import Counted, check_counted, count_uses
from dscache.admin.key_layout import DEEPSTREAM, Layout
from dscache.embedded import EmbeddedServer
from dscache.errors import ReplyError
from tests.conftest import BY_AGE
from tests.support.commands import invoke

LAYOUT = Layout(DEEPSTREAM)
# A reply of Redis 8.6.3 to HOTKEYS GET, by RESP2: 20,000 reads of one record, and some writes.
FACTS: dict[bytes, Any] = {
    b"tracking-active": 1,
    b"sample-ratio": 1,
    b"selected-slots": [[0, 16383]],
    b"all-commands-all-slots-us": 39740,
    b"net-bytes-all-commands-all-slots": 1025990,
    b"collection-start-time-unix-ms": 1795959070322,
    b"collection-duration-ms": 1068,
    b"total-cpu-time-user-ms": 56,
    b"total-cpu-time-sys-ms": 220,
    b"total-net-bytes": 1025990,
    b"by-cpu-time-us": [b"hot_v", 650, b"hot_d", 650, b"k0_v", 10, b"other", 9],
    b"by-net-bytes": [b"hot_v", 300000, b"hot_d", 500000, b"k298_v", 87, b"k299_v", 87],
}
FLAT = [word for pair in FACTS.items() for word in pair]
# By RESP3 the maps are maps.
MAPPED = {
    key: dict(zip(value[::2], value[1::2], strict=True)) if key.startswith(b"by-") else value
    for key, value in FACTS.items()
}
UNKNOWN_COMMAND = ReplyError("ERR unknown command 'HOTKEYS', with args beginning with: 'GET'")


class Server:
    """Answers HOTKEYS like a server that counts from START on; ``refusal`` is for those that don't.

    Attributes:
        asked: The subcommands, in order.
    """

    def __init__(self, counted: Any, *, counting: bool = False, refusal: Any = None) -> None:
        self.asked: list[str] = []
        self._counted = counted
        self._counting = counting
        self._refusal = refusal

    async def execute_many(self, *commands: Sequence[Any]) -> list[Any]:
        return [self._answer(str(command[1])) for command in commands]

    def _answer(self, subcommand: str) -> Any:
        self.asked.append(subcommand)
        if self._refusal is not None:
            return self._refusal
        if subcommand == "GET":
            return [self._counted] if self._counting else None
        self._counting = subcommand == "START"
        return b"OK"


async def count(server: Server, seconds: float) -> Counted | str | None:
    return await count_uses(server, LAYOUT, seconds)  # type: ignore[arg-type]  # a stand-in


@pytest.mark.parametrize("counted", [FLAT, MAPPED], ids=["RESP2", "RESP3"])
async def test_a_server_counts_for_some_time(counted: Any) -> None:
    server = Server(counted)
    found = await count(server, 0.01)
    assert isinstance(found, Counted)
    assert server.asked == ["GET", "START", "GET", "STOP", "RESET"]
    assert (found.seconds, found.busy_ms) == (1.068, 39.74)
    hottest = found.hottest[0]
    assert hottest.name == "hot"
    assert hottest.bytes == pytest.approx(800000 / 1025990)
    assert hottest.time == pytest.approx(1300 / 39740)
    assert "other" not in {one.name for one in found.hottest}
    finding = check_counted(found)
    assert finding is not None
    assert finding.verdict == WARNING
    assert "'hot' 78% of the bytes and 3% of the time" in finding.found
    assert "nearCache" in finding.advice


async def test_the_count_of_another_is_left_as_it_is() -> None:
    server = Server(FLAT, counting=True)
    assert isinstance(await count(server, 0), Counted)
    assert isinstance(await count(server, 5), Counted)
    assert server.asked == ["GET", "GET"]


async def test_nothing_is_begun_without_being_asked_for() -> None:
    server = Server(FLAT)
    assert await count(server, 0) is None
    assert server.asked == ["GET"]
    assert check_counted(None) is None


async def test_the_count_ends_with_the_command() -> None:
    server = Server(FLAT)
    task = asyncio.create_task(count(server, 60))
    while "START" not in server.asked:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert server.asked == ["GET", "START", "STOP", "RESET"]


async def test_a_server_without_the_command() -> None:
    server = Server(FLAT, refusal=UNKNOWN_COMMAND)
    assert await count(server, 0) is None
    found = check_counted(await count(server, 1))
    assert found is not None
    assert (found.verdict, server.asked) == (UNKNOWN, ["GET", "GET"])
    assert "unknown command 'HOTKEYS'" in found.found
    assert "Redis 8.6" in found.advice


@pytest.mark.parametrize("reply", [[], {}, [b"x"], [b"by-cpu-time-us", 1], 5])
async def test_a_reply_of_another_form(reply: Any) -> None:
    found = await count(Server(reply, counting=True), 1)
    assert isinstance(found, str)
    assert "another form" in found


@pytest.mark.parametrize(
    "change",
    [
        {b"all-commands-all-slots-us": 5000},
        {b"net-bytes-all-commands-all-slots": 10**9, b"all-commands-all-slots-us": 10**6},
        {b"by-cpu-time-us": [], b"by-net-bytes": [b"other", 5]},
    ],
    ids=["a server at rest", "many others", "no records"],
)
async def test_no_record_stands_out(change: dict[bytes, Any]) -> None:
    found = check_counted(await count(Server(FACTS | change, counting=True), 1))
    assert found is not None
    assert found.verdict == OK


@pytest.mark.parametrize("hot", [1, 10])
def test_frequencies(hot: int) -> None:
    """Of a real server with an LFU policy."""
    args = ("--maxmemory-policy", "allkeys-lfu", "--lfu-log-factor", "0", "--save", "")
    with EmbeddedServer(BY_AGE[0], args=args) as server, redis_py.Redis(port=server.port) as redis:
        redis.mset({f"user/{i}_{part}": 1 for i in range(50) for part in "vd"})
        for i in range(hot):
            for _ in range(300):
                redis.get(f"user/{i}_v")
        document = invoke("doctor", "--url", server.url).document
        [found] = [one for one in document["findings"] if one["check"] == "hot records"]
        assert "in a sample of 50: 'user/" in found["found"]
        # Where many are used often, none of them stands out.
        assert found["verdict"] == (WARNING if hot == 1 else OK)
        assert hot > 1 or "'user/0' 2" in found["found"]


def test_no_frequencies() -> None:
    with EmbeddedServer(BY_AGE[0]) as server, redis_py.Redis(port=server.port) as redis:
        redis.mset({f"user/{i}_{part}": 1 for i in range(50) for part in "vd"})
        document = invoke("doctor", "--url", server.url).document
        assert "hot records" not in {one["check"] for one in document["findings"]}
        document = invoke("doctor", "--url", server.url, "--hot", "1").document
        [found] = [one for one in document["findings"] if one["check"] == "hot records"]
        assert found["verdict"] in (UNKNOWN, OK)
