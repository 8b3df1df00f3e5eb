"""Announcements of maintenance, played by a proxy in front of a real server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import hiredis
import pytest
from redis.asyncio import Redis
from redis.maint_notifications import MaintNotificationsConfig

import dscache
from dscache.config import Options
from dscache.core.recovery import change_timeout
from dscache.net.maintenance import Announcements, Notice, parse
from tests.support.wire import CORES, Push, resp

pytestmark = pytest.mark.usefixtures("backend")

CONSENT = b"+OK\r\n"
REFUSAL = b"-ERR unknown subcommand 'MAINT_NOTIFICATIONS'\r\n"


class Announcer:
    """A proxy that answers the request for announcements, and pushes them between replies."""

    def __init__(self, host: str, port: int, answer: bytes = CONSENT) -> None:
        self.port = 0
        self.requests: list[list[bytes]] = []
        self.served = 0
        """How many commands of records it has forwarded."""
        self.accepted = 0
        self.slow = 0.0
        """The pause before each command of records, in seconds."""
        self._target = host, port
        self._answer = answer
        self._tasks: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Announcer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def connections(self) -> int:
        return len(self._tasks)

    def push(self, *words: Any) -> None:
        for writer in list(self._tasks):
            writer.write(resp(Push(words)))

    async def _serve(self, client: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks[writer] = task
        self.accepted += 1
        server, out = await asyncio.open_connection(*self._target)
        commands, replies = hiredis.Reader(), _Replies()
        try:
            while data := await client.read(65536):
                commands.feed(data)
                while isinstance(command := commands.gets(), list):
                    if command[:2] == [b"CLIENT", b"MAINT_NOTIFICATIONS"]:
                        self.requests.append(command)
                        writer.write(self._answer)
                        continue
                    if command[0] in (b"MGET", b"MSET"):
                        self.served += 1
                        await asyncio.sleep(self.slow)
                    out.write(hiredis.pack_command(tuple(command)))
                    # One at a time, so that a push never stands in the middle of a reply.
                    writer.write(await replies.next(server))
        except ConnectionError:
            pass
        finally:
            del self._tasks[writer]
            writer.close()
            out.close()
            with contextlib.suppress(ConnectionError):
                await out.wait_closed()


_INCOMPLETE = object()


class _Replies:
    """Cuts the bytes of a server into whole replies."""

    def __init__(self) -> None:
        self._rest = b""
        self._begin()

    def _begin(self) -> None:
        self._whole = b""
        self._reader: Any = hiredis.Reader(notEnoughData=_INCOMPLETE)

    async def next(self, server: asyncio.StreamReader) -> bytes:
        """Return the next reply, with the pushes before it."""
        pushes = b""
        while True:
            piece, end, self._rest = self._rest.partition(b"\r\n")
            if not end:
                data = await server.read(65536)
                if not data:
                    raise ConnectionError
                self._rest = piece + data
                continue
            self._whole += piece + end
            self._reader.feed(piece + end)
            if (reply := self._reader.gets()) is _INCOMPLETE:
                continue
            whole = self._whole
            self._begin()
            if type(reply) is not hiredis.PushNotification:
                return pushes + whole
            pushes += whole


@pytest.fixture
async def before(server: Any) -> AsyncIterator[Announcer]:
    async with Announcer(server.host, server.port) as announcer:
        yield announcer


@pytest.fixture
async def behind(server: Any) -> AsyncIterator[Announcer]:
    async with Announcer(server.host, server.port) as announcer:
        yield announcer


async def until(done: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not done():
            await asyncio.sleep(0.005)


def open_cache(announcer: Announcer, **options: Any) -> dscache.AsyncCache:
    where = {"host": "127.0.0.1", "port": announcer.port, "commandTimeout": 10_000}
    return dscache.AsyncCache.from_config({**where, **options})


async def load(cache: dscache.AsyncCache, number: int, ended: asyncio.Event) -> int:
    """Write and read one record again and again; return the last version."""
    name, version = f"moving/{number}", 0
    while not ended.is_set():
        version += 1
        await cache.set(name, version, {"task": number, "version": version})
        record = await cache.get(name)
        assert record is not None
        assert record.version == version
        assert record.data == {"task": number, "version": version}
        await asyncio.sleep(0)
    return version


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("named", [True, False])
async def test_move_under_load(
    before: Announcer, behind: Announcer, redis: Any, near: bool, named: bool
) -> None:
    """Each operation ends once with its own reply, and new ones go to the new address."""
    async with open_cache(before, maintNotifications="on", nearCache=near) as cache:
        await cache.when_ready()
        ended = asyncio.Event()
        tasks = [asyncio.create_task(load(cache, number, ended)) for number in range(100)]
        await until(lambda: before.served > 20)
        if named:
            before.push(b"MOVING", 1, 10, b"127.0.0.1:%d" % behind.port)
            before.push(b"MOVING", 1, 10, b"127.0.0.1:%d" % behind.port)
            await until(lambda: behind.served > 20)
            assert behind.accepted == 1
        else:
            before.push(b"MOVING", 1, 1, None)
            await until(lambda: before.accepted == 2)
            served = before.served
            await until(lambda: before.served > served + 20)
        await until(lambda: before.connections == (0 if named else 1))
        ended.set()
        versions = await asyncio.gather(*tasks)
        assert min(versions) > 0
        assert cache.stats()["failed"] == 0
        for number, version in enumerate(versions):
            assert redis.get(f"moving/{number}_v") == b"%d" % version


async def test_move_of_another_client(before: Announcer, behind: Announcer) -> None:
    """The client of redis-py reads the same script as the same move."""
    config = MaintNotificationsConfig(enabled=True)
    client: Any = Redis(
        host="127.0.0.1", port=before.port, protocol=3, maint_notifications_config=config
    )
    async with client:
        await client.set("moving/other", 1)
        assert before.requests
        # Its pool takes the host alone from the address, and keeps the port.
        before.push(b"MOVING", 1, 1, b"127.0.0.1:%d" % behind.port)
        await client.set("moving/other", 2)
        await until(lambda: before.connections == 0)
        assert await client.get("moving/other") == b"2"


async def test_invalidations_after_a_move(before: Announcer, behind: Announcer, redis: Any) -> None:
    """No record that was cached over the former socket is a hit after the move."""
    async with open_cache(before, maintNotifications="on", nearCache=True) as cache:
        await cache.set("moving", 1, "old")
        await cache.get("moving")
        before.push(b"MOVING", 1, 10, b"127.0.0.1:%d" % behind.port)
        await until(lambda: behind.accepted and not before.connections)
        redis.mset({"moving_v": 2, "moving_d": '"new"'})
        record = await cache.get("moving")
        assert record is not None
        assert (record.version, record.data) == (2, "new")


async def test_an_address_that_is_not_there_is_no_loss(before: Announcer) -> None:
    async with open_cache(before, maintNotifications="on") as cache:
        await cache.when_ready()
        before.push(b"MOVING", 1, 1, b"127.0.0.1:1")
        for version in range(1, 100):
            assert await cache.set("moving", version, None)
            await asyncio.sleep(0.001)
        assert before.connections == 1
        assert cache.stats()["reconnections"] == 0


async def test_more_time(before: Announcer, caplog: pytest.LogCaptureFixture) -> None:
    """During maintenance, operations have more time, and so have those under way."""
    caplog.set_level(logging.INFO, "dscache")
    async with open_cache(before, maintNotifications="on", commandTimeout=300) as cache:
        await cache.when_ready()
        before.slow = 1.0
        before.push(b"MIGRATING", 1, 0, b"1")
        assert await cache.set("moving", 1, None)
        before.slow = 0.0
        before.push(b"MIGRATED", 2, b"1")
        await until(lambda: "is over" in caplog.text)
        before.slow = 2.0
        with pytest.raises(dscache.DeadlineExceeded):
            await cache.get("moving")


@pytest.mark.parametrize(
    "words",
    [
        (b"MOVING",),
        (b"MOVING", b"1", 10, b"127.0.0.1:1"),
        (b"MOVING", 1, -1, None),
        (b"MOVING", 1, 10**9, None),
        (b"MOVING", 1, 10, b"127.0.0.1"),
        (b"MOVING", 1, 10, b"127.0.0.1:0"),
        (b"MOVING", 1, 10, b"127.0.0.1:99999999999999999999"),
        (b"MOVING", 1, 10, b"a\nb:1"),
        (b"MOVING", 1, 10, b"\xff:1"),
        (b"MOVING", 1, 10, 7),
        (b"MIGRATING", 1),
        (b"FAILING_OVER", 1, b"10"),
        (b"MIGRATED",),
        (b"FAILED_OVER", None),
    ],
)
def test_malformed(words: tuple[Any, ...], caplog: pytest.LogCaptureFixture) -> None:
    """A malformed announcement is ignored, and the first one is logged."""
    announcements = Announcements(Options())
    for _ in range(2):
        assert announcements.read(list(words), "a:1") is None
    assert len(caplog.records) == 1


def test_well_formed() -> None:
    assert parse([b"MOVING", 1, 10, b"[::1]:6379"]) == Notice(b"MOVING", 1, 10, ("::1", 6379))
    assert parse([b"MOVING", 1, 10, None]) == Notice(b"MOVING", 1, 10)
    assert parse([b"MIGRATING", 1, 10, b"1,2"]) == Notice(b"MIGRATING", 1, 10)
    assert parse([b"FAILED_OVER", 2, b"1"]) == Notice(b"FAILED_OVER", 2)
    assert Announcements(Options()).read([b"invalidate", None], "a:1") is None


@pytest.mark.parametrize(
    ("options", "peer", "kind"),
    [
        ({"host": "records.test"}, "10.0.0.1", "internal-fqdn"),
        ({"host": "records.test"}, "8.8.8.8", "external-fqdn"),
        ({"host": "10.0.0.1"}, "10.0.0.1", "internal-ip"),
        ({"host": "8.8.8.8"}, "8.8.8.8", "external-ip"),
        ({"host": "records.test"}, "127.0.0.1", None),
        ({"path": "/socket"}, "", None),
        ({"proxied": True}, "8.8.8.8", None),
        ({"maint_notifications": "off"}, "8.8.8.8", None),
        ({"maint_notifications": "on", "path": "/socket"}, "", "none"),
        ({"maint_notifications": "on", "host": "::1"}, "::1", "internal-ip"),
    ],
)
def test_request(options: dict[str, Any], peer: str, kind: str | None) -> None:
    request = Announcements(Options(**options)).request(peer)
    assert (None if request is None else request[-1]) == kind


def test_refusal_is_remembered() -> None:
    announcements = Announcements(Options(host="records.test"))
    announcements.note("LOADING")
    assert announcements.request("8.8.8.8")
    announcements.note("ERR")
    assert announcements.request("8.8.8.8") is None


async def test_refusal_of_what_is_required(server: Any) -> None:
    async with Announcer(server.host, server.port, REFUSAL) as announcer:
        cache = open_cache(announcer, maintNotifications="on", connectTimeout=500)
        with pytest.raises(dscache.ConnectError, match="maintNotifications"):
            async with cache:
                await cache.when_ready()
        assert announcer.requests


@pytest.mark.parametrize("core", CORES)
def test_change_of_timeout(core: Any) -> None:
    """More time moves deadlines; less time leaves an operation at least the new time."""
    pipeline = core.Pipeline(asyncio.Event, lambda: None, timeout=1.0)
    pipeline.set("a", 1, None)
    (batch,) = pipeline.queue
    deadline = batch.deadline
    change_timeout(pipeline, 10.0)
    assert batch.deadline == pytest.approx(deadline + 9)
    change_timeout(pipeline, 1.0)
    assert deadline <= batch.deadline < deadline + 9
    assert pipeline.timeout == 1.0


def test_no_request_on_a_cluster() -> None:
    """A cluster refuses to promise announcements that it doesn't follow."""
    nodes = [{"host": "10.0.0.1", "port": 7000}]
    with pytest.raises(dscache.ConfigError, match="maintNotifications: is for one server"):
        dscache.AsyncCache.from_config({"nodes": nodes, "maintNotifications": "on"})
