"""Faults among deepstream's servers that a message node tells of, or doesn't let happen."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import msgspec
import pytest
import redis as redis_py

import dscache
from dscache.deepstream.protocol import Emit
from dscache.embedded import EmbeddedServer
from dscache.pubsub import reach
from tests.support.message_nodes import Received, receive_on
from tests.support.waiting import until

EVENT = 4


def open_node(server: EmbeddedServer, name: str, **options: Any) -> dscache.MessageNode:
    where = {"host": server.host, "port": server.port, **options}
    entry = {"name": "redis", "options": where}
    return dscache.MessageNode.from_config({"serverName": name, "clusterNode": entry})


def warnings(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [one.getMessage() for one in caplog.records if text in one.getMessage()]


def enveloped(sender: str, message: object) -> str:
    return json.dumps({"fromServer": sender, "message": message})


# -- messages are checked at the call

BAD = [
    ({"topic": 4, "action": 0, "name": "news"}, "action must be one that servers take, EMIT 2"),
    ({"topic": 4, "action": 2, "name": "news", "data": {"a": 1}}, "data must be JSON text"),
    ({"topic": 5, "action": 2, "name": "live/1"}, "names is missing; name is not enough"),
    ({"topic": 4, "action": 2, "name": "a", "parsedData": {"a": msgspec.Raw(b"{{")}}, "isn't"),
    (Emit(name=7), "name must be a text"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("message", "said"), BAD)
async def test_a_wrong_message_is_refused_at_the_call(
    message: Any, said: str, server: EmbeddedServer, backend: str
) -> None:
    async with open_node(server, "A") as node:
        with pytest.raises(dscache.MessageError, match=said):
            node.send(message)
        with pytest.raises(dscache.MessageError, match=said):
            node.send_direct("B", message)
        topic = message["topic"] if isinstance(message, dict) else message.topic
        text = msgspec.json.encode(message)
        with pytest.raises(dscache.MessageError, match="isn't JSON" if b"{{" in text else said):
            node.send(msgspec.Raw(text), topic=topic)
        assert node.stats()["commands"] == 0
        assert await node.send(message, unchecked=True) == 0
        assert await node.send_direct("B", message, unchecked=True) == 0
        assert node.stats()["commands"] == 2


async def test_right_messages_are_sent(server: EmbeddedServer, backend: str) -> None:
    async with open_node(server, "A") as sender, open_node(server, "B") as hearer:
        received = await receive_on(hearer, EVENT)
        await sender.send({"topic": 4, "action": 2, "name": "a", "parsedData": 1})
        await sender.send(Emit(name="b", data='"x"'))
        await sender.send_direct("B", Emit(name="c"))
        await sender.send({"topic": 99, "anything": "goes"})
        await received.reaches(3)
        assert [one["name"] for one in received] == ["a", "b", "c"]


# -- the topic that a message states


async def test_a_message_belongs_to_the_topic_that_it_states(
    server: EmbeddedServer, backend: str
) -> None:
    async with open_node(server, "A") as node:
        event, other = Received(), Received()
        topics: list[int] = []
        node.subscribe(EVENT, event)
        node.subscribe(98, other)
        node.subscribe(98, lambda message, sender: topics.append(message.topic))
        await node.when_ready()
        stated: list[Any] = [
            {"topic": 99},
            {"topic": 98, "n": 1},
            {"n": 2, "topic": 98},
            {"topic": "4"},
            {"topic": True},
            {"topic": None},
            {"topic": 44},
            {"n": 3},
            [4],
            {"n": 4, "topic": 4.0},
            {"topic": 4, "n": 5},
            {"topic": 4},
        ]
        with redis_py.Redis(server.host, server.port) as redis:
            for message in stated:
                redis.publish("4", enveloped("B", message))
        await event.reaches(5)
        assert event == [{"n": 3}, [4], {"n": 4, "topic": 4}, {"topic": 4, "n": 5}, {"topic": 4}]
        assert other == [{"topic": 98, "n": 1}, {"n": 2, "topic": 98}]
        assert topics == [98, 98]
        assert (node.stats()["unwanted"], node.stats()["received"]) == (5, 7)


# -- a name that another server has


async def test_another_server_of_the_same_name_is_told_of_once(
    server: EmbeddedServer, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        open_node(server, "same") as one,
        open_node(server, "same") as two,
        open_node(server, "other") as other,
    ):
        deaf, heard = await receive_on(one, EVENT), await receive_on(other, EVENT)
        for number in range(5):
            await one.send(Emit(name=f"one {number}"))
        await heard.reaches(5)
        await until(lambda: one.stats()["own"] == 5)
        assert warnings(caplog, "same name") == []
        for number in range(3):
            await two.send(Emit(name=f"two {number}"))
        await until(lambda: one.stats()["namesakes"] == 3)
        await heard.reaches(8)
        assert (one.stats()["own"], one.stats()["commands"]) == (5, 5)
        assert deaf == []
        (said,) = warnings(caplog, "same name")
        assert said.startswith("topic 4: a message of the server 'same' was not sent here")
        assert "server_name" in said


async def test_messages_sent_before_a_subscription_raise_no_alarm(
    server: EmbeddedServer, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_node(server, "A") as node:
        sent = [node.send(Emit(name="early")) for _ in range(50)]
        received = await receive_on(node, EVENT)
        sent += [node.send(Emit(name="late")) for _ in range(50)]
        await asyncio.gather(*sent)
        await until(lambda: node.stats()["own"] >= 50)
        assert received == []
        assert node.stats()["namesakes"] == 0
        assert warnings(caplog, "same name") == []


# -- receivers that don't come back


async def test_fewer_receivers_after_a_restart_are_told_of_once(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    with EmbeddedServer() as server:
        async with open_node(server, "A", commandTimeout=30_000) as node:
            await receive_on(node, EVENT)  # its own subscription doesn't count
            hearers = [open_node(server, name) for name in "BC"]
            for hearer in hearers:
                await receive_on(hearer, EVENT)
            assert await node.send(Emit(name="before")) == 3
            for hearer in hearers:
                await hearer.close()
            kill_connections(server)
            await until(lambda: node.stats()["connects"] >= 4)
            await node.when_ready()
            for _ in range(3):
                await node.send(Emit(name="after"))
            assert node.stats()["fewer"] == 3
            async with open_node(server, "B") as back, open_node(server, "C") as again:
                await receive_on(back, EVENT)
                await receive_on(again, EVENT)
                assert await node.send(Emit(name="again")) == 3
            await node.send(Emit(name="alone"))
            assert node.stats()["fewer"] == 3
    (said,) = warnings(caplog, "other connections")
    assert said.startswith(
        "topic 4: a message reached 0 other connections, and 2 before the connection to Redis was "
        "lost"
    )


def kill_connections(server: EmbeddedServer) -> None:
    with redis_py.Redis(server.host, server.port) as redis:
        redis.client_kill_filter(_type="normal")
        redis.client_kill_filter(_type="pubsub")


async def test_a_lower_number_becomes_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_PATIENCE", -1.0)
    connects = 1
    receivers = reach.Receivers(lambda: connects, lambda topic: False)

    async def send(count: int) -> None:
        sent = asyncio.get_running_loop().create_future()
        receivers.watch(EVENT, sent)
        sent.set_result(count)
        await asyncio.sleep(0)

    await send(5)
    connects = 2
    await send(3)
    assert receivers.fewer == 0
    connects = 3
    await send(3)
    assert receivers.fewer == 0


def test_warnings_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    echoes = reach.Echoes("A")
    echoes.expect(EVENT, 1)
    echoes.heard(EVENT)
    assert echoes.namesakes == 0
    echoes.heard(EVENT)
    echoes.heard(EVENT)
    assert echoes.namesakes == 2
    assert [one.levelno for one in caplog.records] == [logging.WARNING]
