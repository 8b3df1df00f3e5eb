"""Messages between servers: sending, receiving, subscriptions, and losses."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
import redis as redis_py
import uvloop

import dscache
from dscache.core.constants import FLUSH_RECORDS
from dscache.embedded import EmbeddedServer, ServerBinary
from dscache.pubsub import subscribers, subscriptions
from tests.conftest import SERVERS, NamedServer
from tests.support.faults import FaultProxy
from tests.support.message_nodes import Nodes, Received, open_nodes, receive_on
from tests.support.waiting import PATIENCE, until

EVENT = 4
RPC = 6
NEWS = {"topic": EVENT, "action": 2, "name": "news"}


@pytest.fixture
async def nodes(
    server: EmbeddedServer | NamedServer, backend: str, redis: redis_py.Redis
) -> AsyncIterator[Nodes]:
    """Open nodes on ``server`` with ``backend``."""
    async with open_nodes(host=server.host, port=server.port) as opened:
        yield opened


@pytest.fixture(scope="session")
def one_server(
    running: Callable[[ServerBinary], EmbeddedServer],
) -> EmbeddedServer | NamedServer:
    """The first server of those found."""
    return SERVERS[0] if isinstance(SERVERS[0], NamedServer) else running(SERVERS[0])


@pytest.fixture
async def quick(one_server: EmbeddedServer | NamedServer, backend: str) -> AsyncIterator[Nodes]:
    """The same for tests that depend on the core and not on the server."""
    async with open_nodes(host=one_server.host, port=one_server.port) as opened:
        yield opened


# -- sending and receiving


async def test_a_message_reaches_all_other_nodes(nodes: Nodes) -> None:
    one, two, three = [await nodes(name) for name in "ABC"]
    received = [await receive_on(node, EVENT) for node in (one, two, three)]
    assert await one.send(NEWS) == 3
    assert await two.send({"topic": 9}) == 0
    assert await two.send(NEWS | {"name": "more"}) == 3
    await received[2].reaches(2)
    await until(lambda: len(received[0]) == len(received[1]) == 1)
    assert received[2] == [NEWS, NEWS | {"name": "more"}]
    assert received[2].senders == ["A", "B"]
    assert (received[0].senders, received[1].senders) == (["B"], ["A"])
    assert one.stats()["own"] == 1
    assert one.is_ready
    assert one.server_name == "A"
    assert one.description.startswith("dscache message node 'A' at ")


async def test_a_message_for_one_server(nodes: Nodes) -> None:
    one, two, three = [await nodes(name) for name in ("A", "B", 'C "c" \u00e9')]
    received = [await receive_on(node, EVENT) for node in (one, two, three)]
    assert await one.send_direct("B", NEWS) == 3
    assert await one.send_direct('C "c" \u00e9', NEWS) == 3
    assert await one.send_direct("nobody", NEWS) == 3
    assert await one.send_direct("A", NEWS) == 3
    await one.send(NEWS | {"name": "last"})
    for each in received[1:]:
        await each.reaches(2)
        assert each == [NEWS, NEWS | {"name": "last"}]
    assert received[0] == []
    assert two.stats()["foreign"] == 3


async def test_the_messages_of_a_tick_are_sent_together(nodes: Nodes) -> None:
    sender, hearer = await nodes("A"), await nodes("B")
    received = await receive_on(hearer, EVENT)
    before = sender.stats()
    waiters = [sender.send({"topic": EVENT, "number": i}) for i in range(300)]
    assert await asyncio.gather(*waiters) == [1] * 300
    stats = sender.stats()
    assert stats["commands"] - before["commands"] == 300
    assert stats["flushes"] - before["flushes"] == -(-300 // FLUSH_RECORDS)
    await received.reaches(300)
    assert [one["number"] for one in received] == list(range(300))


class Struct(msgspec.Struct):
    topic: int
    name: str


@dataclasses.dataclass
class Plain:
    topic: int
    name: str


async def test_anything_with_a_topic_is_a_message(quick: Nodes) -> None:
    sender, hearer = await quick("A"), await quick("B")
    received = await receive_on(hearer, EVENT)
    await sender.send(Struct(EVENT, "x"))
    await sender.send(Plain(EVENT, "y"))
    await sender.send(msgspec.Raw(b'{"topic":4,"name":"z"}'), topic=EVENT)
    await sender.send_direct("B", msgspec.Raw(b'["\\ud800"]'), topic=EVENT)
    await received.reaches(4)
    assert received == [*({"topic": EVENT, "name": name} for name in "xyz"), ["\ud800"]]


async def test_the_channel_is_only_the_topic(nodes: Nodes, redis: redis_py.Redis) -> None:
    node = await nodes("A", keyPrefix="p:", db=1)
    received = await receive_on(node, EVENT)
    assert redis.publish("4", '{"fromServer":"js","message":{"topic":4,"x":1}}') == 1
    await received.reaches(1)
    assert (received, received.senders) == ([{"topic": 4, "x": 1}], ["js"])
    assert redis.execute_command("PUBSUB", "CHANNELS") == [b"4"]


async def test_an_invalid_message_is_counted_and_logged_once(
    quick: Nodes, one_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    node = await quick("A")
    received = await receive_on(node, EVENT)
    with redis_py.Redis(one_server.host, one_server.port) as redis:
        for text in ("hello", "{}", '{"fromServer":1,"message":{}}', ""):
            redis.publish("4", text)
        redis.publish("4", '{"fromServer":"B","message":{"topic":4}}')
    await received.reaches(1)
    assert node.stats()["damaged"] == 4
    complaints = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert complaints == [
        "topic 4: received b'hello', which isn't a deepstream message; "
        "further ones are only counted"
    ]


# -- subscribers


async def test_callbacks_subscribe_and_unsubscribe(nodes: Nodes, redis: redis_py.Redis) -> None:
    sender, hearer = await nodes("A"), await nodes("B")
    first, second = Received(), Received()
    leave_first = hearer.subscribe(EVENT, first)
    leave_second = hearer.subscribe(EVENT, second)
    await hearer.when_ready()
    await sender.send(NEWS)
    await second.reaches(1)
    leave_first()
    leave_first()
    await sender.send(NEWS)
    await second.reaches(2)
    assert len(first) == 1
    leave_second()
    await until(lambda: redis.pubsub_numsub("4") == [(b"4", 0)])
    assert await sender.send(NEWS) == 0
    await receive_on(hearer, RPC)  # which is confirmed after the end of the other has been received
    third = await receive_on(hearer, EVENT)
    await sender.send(NEWS)
    await third.reaches(1)
    assert (hearer.stats()["topics"], hearer.stats()["gaps"]) == (2, 0)
    assert len(second) == 2


async def test_messages_are_iterated_over(nodes: Nodes, redis: redis_py.Redis) -> None:
    sender, hearer = await nodes("A"), await nodes("B")

    async def listen(count: int) -> list[int]:
        numbers = []
        async for message, from_server in hearer.messages(EVENT):
            assert from_server == message.sender == "A"
            numbers.append(message["number"])
            if len(numbers) == count:
                break
        return numbers

    task = asyncio.create_task(listen(3))
    other = hearer.messages(EVENT)
    await asyncio.sleep(0)
    await hearer.when_ready()
    for i in range(4):
        sender.send({"topic": EVENT, "number": i})
    assert await task == [0, 1, 2]
    assert [(await anext(other))[0]["number"] for _ in range(4)] == [0, 1, 2, 3]
    async with other:
        waiting = asyncio.create_task(anext(other))
        await asyncio.sleep(0)
        with pytest.raises(dscache.UsageError, match="is already being awaited"):
            await anext(other)
    with pytest.raises(StopAsyncIteration):
        await waiting
    await other.aclose()
    # No one ended the iterator that was left by break.
    gc.collect()
    await until(lambda: redis.pubsub_numsub("4") == [(b"4", 0)])
    assert hearer.stats()["subscribers"] == 0


async def test_an_iteration_ends_with_the_node(quick: Nodes) -> None:
    sender, hearer = await quick("A"), await quick("B")
    messages = hearer.messages(EVENT)
    await hearer.when_ready()
    await sender.send(NEWS)
    await until(lambda: hearer.stats()["waiting"] == 1)
    await hearer.close()
    assert [message.data async for message, _ in messages] == [NEWS]


async def test_an_async_callback_is_awaited_before_the_next(quick: Nodes) -> None:
    sender, hearer = await quick("A"), await quick("B")
    log: list[Any] = []

    async def callback(message: Any, sender: str) -> None:
        log.append(("begin", message["number"]))
        for _ in range(3):
            await asyncio.sleep(0)
        log.append(("end", message["number"]))

    leave = hearer.subscribe(EVENT, callback)
    await hearer.when_ready()
    for i in range(10):
        sender.send({"topic": EVENT, "number": i})
    await until(lambda: len(log) == 20)
    assert log == [(what, i) for i in range(10) for what in ("begin", "end")]
    sender.send({"topic": EVENT, "number": 10})
    await until(lambda: len(log) == 22)
    leave()


async def test_a_callback_that_raises_affects_no_other(
    quick: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    sender, hearer = await quick("A"), await quick("B")

    def bad(message: Any, sender: str) -> None:
        raise ValueError(f"no {message['name']}")

    async def worse(message: Any, sender: str) -> None:
        raise KeyError(message["name"])

    hearer.subscribe(EVENT, bad)
    hearer.subscribe(EVENT, worse)
    hearer.subscribe(EVENT, print, max_pending=5)
    received = await receive_on(hearer, EVENT)
    for _ in range(3):
        await sender.send(NEWS)
    await received.reaches(3)
    await until(lambda: hearer.stats()["errors"] == 6)
    assert received == [NEWS] * 3
    texts = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert sum("bad failed for a message from 'A' on topic 4" in text for text in texts) == 3
    assert sum("worse failed for a message on topic 4" in text for text in texts) == 3
    assert hearer.stats()["connects"] == 2


@pytest.mark.parametrize(
    ("overflow", "kept"), [("drop_oldest", range(7, 10)), ("drop_newest", range(1, 4))]
)
async def test_a_slow_callback_has_a_limited_queue(
    quick: Nodes, overflow: Any, kept: range
) -> None:
    sender, hearer = await quick("A"), await quick("B")
    gate = asyncio.Event()
    seen: list[int] = []

    async def slow(message: Any, sender: str) -> None:
        await gate.wait()
        seen.append(message["number"])

    hearer.subscribe(EVENT, slow, max_pending=3, overflow=overflow)
    received = await receive_on(hearer, EVENT)
    await sender.send({"topic": EVENT, "number": 0})
    await received.reaches(1)
    for i in range(1, 10):
        sender.send({"topic": EVENT, "number": i})
    await received.reaches(10)
    assert (hearer.stats()["dropped"], hearer.stats()["waiting"]) == (6, 3)
    gate.set()
    await until(lambda: len(seen) == 4)
    assert seen == [0, *kept]
    assert hearer.stats()["dropped"] == 6


async def test_a_slow_subscriber_can_be_disconnected(
    quick: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    sender = await quick("A")
    hearer = await quick("B", overflow="disconnect", maxPending=3)
    gate = asyncio.Event()
    seen: list[int] = []

    async def slow(message: Any, sender: str) -> None:
        await gate.wait()
        seen.append(message["number"])

    hearer.subscribe(EVENT, slow)
    messages = hearer.messages(EVENT)
    last = Received()
    hearer.subscribe(5, last)
    await hearer.when_ready()
    await sender.send({"topic": EVENT, "number": 0})
    await until(lambda: hearer.stats()["waiting"] == 1)
    for i in range(1, 10):
        sender.send({"topic": EVENT, "number": i})
    await sender.send({"topic": 5})
    await last.reaches(1)
    gate.set()
    await until(lambda: len(seen) == 4)
    taken = [(await anext(messages))[0]["number"] for _ in range(3)]
    with pytest.raises(dscache.Overloaded, match="3 messages on topic 4 were waiting"):
        await anext(messages)
    assert (seen, taken) == ([0, 1, 2, 3], [0, 1, 2])
    await until(lambda: hearer.stats()["subscribers"] == 1)
    assert hearer.stats()["dropped"] == 2
    assert "disconnected a callback on topic 4" in caplog.text
    with pytest.raises(StopAsyncIteration):
        await anext(messages)


@pytest.mark.parametrize("loop_factory", [None, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("turn", [None, 0.0], ids=["long", "short"])
def test_a_burst_drops_nothing(
    one_server: EmbeddedServer,
    backend: str,
    loop_factory: Any,
    turn: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even if a turn ends after one message, as on a busy machine."""
    if turn is not None:
        monkeypatch.setattr(subscribers, "_SHORTEST", turn)
        monkeypatch.setattr(subscribers, "_LONGEST", turn)
    count = 30_000
    where = f"{one_server.host}:{one_server.port}"
    padding = b"x" * 100

    async def listen() -> None:
        async with dscache.MessageNode.from_config(where) as node:
            numbers: list[int] = []
            node.subscribe(EVENT, lambda message, sender: numbers.append(message["number"]))
            await node.when_ready()
            # It blocks the loop, so that all messages wait in the sockets' buffers.
            with (
                redis_py.Redis(one_server.host, one_server.port) as redis,
                redis.pipeline(transaction=False) as pipeline,
            ):
                for number in range(count):
                    body = b'{"topic":4,"number":%d,"t":"%s"}' % (number, padding)
                    pipeline.publish("4", b'{"fromServer":"B","message":%s}' % body)
                pipeline.execute()
            await until(lambda: len(numbers) + node.stats()["dropped"] >= count)
            assert node.stats()["dropped"] == 0
            assert numbers == list(range(count))

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(listen())


async def test_callbacks_yield_to_the_cache(
    quick: Nodes, one_server: EmbeddedServer, backend: str
) -> None:
    sender, hearer = await quick("A"), await quick("B")
    calls = 0

    def slow(message: Any, sender: str) -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.002)

    async with dscache.AsyncCache.from_config(one_server.url) as cache:
        hearer.subscribe(EVENT, slow)
        await hearer.when_ready()
        await asyncio.gather(*(sender.send(NEWS) for _ in range(1000)))
        before = calls
        for _ in range(5):
            await cache.get("nothing")
        # A read takes a few turns of the loop, and one call runs in each.
        assert calls - before < 200
        await sender.close()
        await hearer.close()
    assert calls < 1000


# -- refusals at the call


async def test_bad_arguments_are_refused_at_the_call(quick: Nodes) -> None:
    node = await quick("A")
    for call in (
        lambda: node.send({}),
        lambda: node.send({"topic": "4"}),
        lambda: node.send({"topic": 4, "x": object()}),
        lambda: node.send_direct("", NEWS),
        lambda: node.send_direct("\ud800", NEWS),
        lambda: node.send_direct(7, NEWS),  # type: ignore[arg-type]
        lambda: node.subscribe("4", print),  # type: ignore[arg-type]
        lambda: node.subscribe(-1, print),
        lambda: node.subscribe(4, print, max_pending=0),
        lambda: node.subscribe(4, print, overflow="drop"),  # type: ignore[arg-type]
        lambda: node.messages(True),
    ):
        with pytest.raises(dscache.MessageError):
            call()
    assert node.stats()["subscribers"] == 0
    await node.close()
    await node.close()
    for call in (lambda: node.send(NEWS), lambda: node.subscribe(4, print)):
        with pytest.raises(dscache.UsageError, match="the message node is closed"):
            call()
    with pytest.raises(dscache.UsageError):
        await node.when_ready()


def test_a_node_belongs_to_one_loop(one_server: EmbeddedServer, backend: str) -> None:
    where = f"{one_server.host}:{one_server.port}"
    node = dscache.MessageNode.from_config(where, server_name="A")
    assert (node.stats(), node.is_ready) == ({}, False)
    assert repr(node) == f"<MessageNode 'A' at {where}>"
    with pytest.raises(dscache.UsageError, match="opens on the event loop that runs"):
        node.send(NEWS)

    async def use() -> None:
        assert await node.send(NEWS) == 0

    async def use_elsewhere() -> None:
        told = "a MessageNode belongs to the event loop it was opened on"
        with pytest.raises(dscache.UsageError, match=told):
            node.subscribe(4, print)
        with pytest.raises(dscache.UsageError, match=told):
            node.send(NEWS)
        with pytest.raises(dscache.UsageError, match=told):
            await node.close()

    async def close() -> None:
        await node.close()

    with asyncio.Runner() as runner:
        runner.run(use())
        with asyncio.Runner() as other:
            other.run(use_elsewhere())
        runner.run(close())


async def test_use_in_a_forked_child_is_refused(quick: Nodes) -> None:
    node = await quick("A")
    node._pid = os.getpid() + 1
    with pytest.raises(dscache.UsageError, match="after a fork"):
        node.subscribe(4, print)
    node._pid = os.getpid()


# -- losses


async def test_a_lost_server_is_a_gap(nodes: Nodes, make_server: Any) -> None:
    server = make_server()
    gaps: list[tuple[float, float]] = []
    options = {"host": server.host, "port": server.port}
    sender = await nodes("A", **options)
    hearer = await nodes("B", on_gap=lambda *gap: gaps.append(gap), **options)
    received = await receive_on(hearer, EVENT)
    also = await receive_on(hearer, 5)
    await sender.send(NEWS)
    await received.reaches(1)
    began = time.time()
    await asyncio.to_thread(server.restart)
    await until(lambda: gaps)
    await hearer.when_ready()
    await sender.send(NEWS)
    await sender.send({"topic": 5})
    await received.reaches(2)
    await also.reaches(1)
    (gap,) = gaps
    assert gap[0] <= began <= gap[1] <= time.time()
    stats = hearer.stats()
    assert (stats["gaps"], stats["last_gap"]) == (1, gap)
    assert stats["missed_seconds"] == pytest.approx(gap[1] - gap[0])
    assert stats["last_loss"]
    assert received == [NEWS, NEWS]


async def test_a_gap_covers_only_confirmed_topics(nodes: Nodes, proxy: FaultProxy) -> None:
    def failing(since: float, until: float) -> None:
        raise ValueError("on_gap is wrong")

    node = await nodes("A", host=proxy.host, port=proxy.port, on_gap=failing)
    proxy.cut()
    await until(lambda: node.stats()["connects"] == 4)
    assert node.stats()["gaps"] == 0
    await receive_on(node, EVENT)
    proxy.cut()
    await until(lambda: node.stats()["gaps"] == 1)
    await node.when_ready()
    assert node.is_ready


async def test_on_gap_may_be_a_coroutine(
    quick: Nodes, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[float] = []

    async def on_gap(since: float, until: float) -> None:
        await asyncio.sleep(0)
        told.append(until)
        if len(told) == 2:
            raise ValueError("no more of this")

    node = await quick("A", host=proxy.host, port=proxy.port, on_gap=on_gap)
    await receive_on(node, EVENT)
    for count in (1, 2):
        proxy.cut()
        await until(lambda n=count: len(told) == n)
        await node.when_ready()
    assert told[-1] == node.stats()["last_gap"][1]
    await until(lambda: "no more of this" in caplog.text)


async def test_a_silent_connection_is_found_by_its_heartbeat(
    nodes: Nodes, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriptions, "_REPLY_TIMEOUT", 0.2)
    where = {"host": proxy.host, "port": proxy.port, "heartbeat": 50}
    sender = await nodes("A")
    hearer = await nodes("B", **where)
    received = await receive_on(hearer, EVENT)
    proxy.stall("replies")
    began = time.time()
    await sender.send(NEWS)
    await until(lambda: hearer.stats()["connects"] > 2 or proxy.accepted > 2)
    proxy.heal()
    await until(lambda: hearer.stats()["gaps"])
    await hearer.when_ready()
    since, _ = hearer.stats()["last_gap"]
    assert since <= began
    await sender.send({"topic": EVENT, "name": "after"})
    await until(lambda: received and received[-1] == {"topic": EVENT, "name": "after"})
    assert "did not answer" in hearer.stats()["last_loss"]


async def test_a_message_sent_while_redis_is_down_waits_or_fails(
    nodes: Nodes, proxy: FaultProxy
) -> None:
    where = {"host": proxy.host, "port": proxy.port}
    patient = await nodes("A", **where)
    hasty = await nodes("B", **where, commandTimeout=50)
    received = await receive_on(await nodes("C"), EVENT)
    await proxy.refuse()
    proxy.cut()
    await until(lambda: not patient.is_ready and not hasty.is_ready)
    waiting = patient.send(NEWS)
    with pytest.raises(
        dscache.ConnectionLost,
        match=r"^send on topic 4: no connection to .* within 50 ms: .*; it was not sent$",
    ):
        await hasty.send(NEWS)
    assert not waiting.done()
    await proxy.listen()
    assert await waiting == 1
    await received.reaches(1)
    assert received.senders == ["A"]


async def test_a_lost_message_in_flight_says_so(nodes: Nodes, proxy: FaultProxy) -> None:
    sender = await nodes("A", host=proxy.host, port=proxy.port)
    received = await receive_on(await nodes("B"), EVENT)
    proxy.stall("replies")
    waiting = sender.send(NEWS)
    await received.reaches(1)
    proxy.heal()
    proxy.stall("replies")
    proxy.cut()
    with pytest.raises(dscache.ConnectionLost, match="the message may have been delivered"):
        await waiting
    proxy.heal()
    await sender.when_ready()
    await sender.send(NEWS | {"name": "next"})
    await received.reaches(2)
    assert received == [NEWS, NEWS | {"name": "next"}]


async def test_a_server_that_never_replies(backend: str, proxy: FaultProxy) -> None:
    await proxy.refuse()
    url = f"redis://{proxy.host}:{proxy.port}?socket_connect_timeout=0.1"
    node = dscache.MessageNode.from_config(url)
    with pytest.raises(dscache.ConnectError, match="within 100 ms"):
        await node.when_ready()
    await node.close()


# -- servers with restrictions


@pytest.fixture
async def restricted(make_server: Any, backend: str) -> AsyncIterator[tuple[Any, Nodes]]:
    """A private server, and nodes on it."""
    server = make_server()
    async with open_nodes(host=server.host, port=server.port) as opened:
        yield server, opened


async def test_a_server_without_resp3(restricted: tuple[EmbeddedServer, Nodes]) -> None:
    server, nodes = restricted
    with redis_py.Redis(port=server.port, protocol=2) as admin:
        admin.execute_command("ACL", "SETUSER", "default", "-hello")
        gaps: list[Any] = []
        sender = await nodes("A", heartbeat=20)
        hearer = await nodes("B", heartbeat=20, on_gap=lambda *gap: gaps.append(gap))
        received = await receive_on(hearer, EVENT)
        leave = hearer.subscribe(5, received)
        await hearer.when_ready()
        before = hearer.stats()["bytes_in"]
        await until(lambda: hearer.stats()["bytes_in"] > before)  # the reply to a heartbeat
        for i in range(100):
            sender.send({"topic": EVENT + i % 2, "number": i})
        await received.reaches(100)
        leave()
        await until(lambda: admin.pubsub_numsub("5") == [(b"5", 0)])
        assert gaps == []
        admin.client_kill_filter(_type="pubsub")
        await until(lambda: gaps)
        await hearer.when_ready()
        await sender.send(NEWS)
        await received.reaches(101)
        assert hearer.description.endswith("core")


async def test_a_refused_subscription(
    restricted: tuple[EmbeddedServer, Nodes], caplog: pytest.LogCaptureFixture
) -> None:
    server, nodes = restricted
    with redis_py.Redis(port=server.port) as admin:
        admin.execute_command("ACL", "SETUSER", "default", "resetchannels", "&5")
        node = await nodes("A", heartbeat=20)
        received = Received()
        node.subscribe(EVENT, received)
        node.subscribe(5, received)
        with pytest.raises(dscache.ReplyError, match="NOPERM"):
            await node.when_ready()
        with pytest.raises(dscache.ReplyError, match=r"NOPERM.*send on topic 4"):
            await node.send(NEWS)
        assert await node.send({"topic": 5}) == 1
        assert "refuses a subscription to topic 4: NOPERM" in caplog.text
        admin.execute_command("ACL", "SETUSER", "default", "allchannels")
        # The next heartbeat subscribes again.
        await until(lambda: node.is_ready)
        assert admin.pubsub_numsub("4") == [(b"4", 1)]
        assert node.stats()["gaps"] == 0


async def test_a_subscription_ended_by_the_server(
    restricted: tuple[EmbeddedServer, Nodes],
) -> None:
    server, nodes = restricted
    node = await nodes("A")
    received = await receive_on(node, EVENT)
    with redis_py.Redis(port=server.port) as admin:
        # Revoking a channel closes the user's connection.
        admin.execute_command("ACL", "SETUSER", "default", "resetchannels", "&5")
        await until(lambda: not node.is_ready)
        admin.execute_command("ACL", "SETUSER", "default", "allchannels")
        await until(lambda: node.stats()["gaps"] == 1)
        await node.when_ready()
        admin.publish("4", '{"fromServer":"B","message":{"topic":4}}')
    await received.reaches(1)


async def test_wrong_password(restricted: tuple[EmbeddedServer, Nodes]) -> None:
    server, nodes = restricted
    with redis_py.Redis(port=server.port) as admin:
        admin.execute_command("CONFIG", "SET", "requirepass", "secret")
        node = dscache.MessageNode.from_config(f"redis://:wrong@{server.host}:{server.port}")
        with pytest.raises(dscache.ReplyError, match="WRONGPASS"):
            await node.when_ready()
        with pytest.raises(dscache.ReplyError, match="WRONGPASS"):
            await node.send(NEWS)
        await node.close()
        good = await nodes("B", password="secret")
        assert await good.send(NEWS) == 0


async def test_no_call_outlasts_the_close(quick: Nodes) -> None:
    sender = await quick("A")
    hearer = await quick("B", closeTimeout=50)
    begun = asyncio.Event()

    async def endless(message: Any, sender: str) -> None:
        begun.set()
        await asyncio.sleep(PATIENCE * 10)

    hearer.subscribe(EVENT, endless)
    await hearer.when_ready()
    sender.send(NEWS)
    await begun.wait()
    await hearer.close()
    await until(lambda: not [t for t in asyncio.all_tasks() if t.get_name() == "dscache topic 4"])
