"""Messages with more than one server: on clusters, and behind Sentinels."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

import dscache
from dscache.core.keys import slot_of_key
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.conftest import BY_AGE
from tests.support.clusters import ClusterGroup, ClusterNode
from tests.support.message_nodes import Nodes, Received, open_nodes, receive_on
from tests.support.sentinels import SentinelGroup
from tests.support.waiting import until

EVENT = 4
NEWS = {"topic": EVENT, "action": 2, "name": "news"}
TOPICS = range(24)


@pytest.fixture(scope="module")
def binary() -> ServerBinary:
    """The newest server for the shared group; groups of a single test use the oldest."""
    return BY_AGE[-1]


@pytest.fixture
async def nodes(group: ClusterGroup, backend: str) -> AsyncIterator[Nodes]:
    """Open nodes on the cluster with ``backend``."""
    options: dict[str, Any] = {**group.options, "slotsRefreshInterval": 200}
    async with open_nodes(**options) as opened:
        yield opened


def listening(group: ClusterGroup, channel: str, sharded: bool = False) -> list[ClusterNode]:
    """Return the nodes that have subscribers."""
    words = ("PUBSUB", "SHARDNUMSUB" if sharded else "NUMSUB", channel)
    return [node for node in group.nodes if node.is_alive and node.ask(*words)[1]]


async def send_until_received(sender: Any, received: Received, topic: int = EVENT) -> None:
    """Send until a message is received; messages to a node that is being lost may be lost."""
    count = len(received)

    async def say() -> None:
        while len(received) == count:
            with contextlib.suppress(dscache.DscacheError):
                await sender.send({"topic": topic})
            await asyncio.sleep(0.02)

    async with asyncio.timeout(60):
        await say()


# -- any node will do


async def test_messages_pass_between_the_nodes_of_a_cluster(
    nodes: Nodes, group: ClusterGroup
) -> None:
    one, two, three = [await nodes(name) for name in "ABC"]
    received = [await receive_on(node, EVENT) for node in (one, two, three)]
    for i in range(200):
        one.send({"topic": EVENT, "number": i})
        two.send_direct("C", {"topic": EVENT, "number": i})
    await received[1].reaches(200)
    await received[2].reaches(400)
    assert [one["number"] for one in received[1]] == list(range(200))
    for sender in "AB":
        numbers = [
            message["number"]
            for message, name in zip(received[2], received[2].senders, strict=True)
            if name == sender
        ]
        assert numbers == list(range(200))
    assert received[0] == []
    assert one.description.endswith("core")


async def test_a_lost_node_is_replaced_by_any_other(nodes: Nodes, group: ClusterGroup) -> None:
    gaps: list[Any] = []
    sender = await nodes("A")
    hearer = await nodes("B", on_gap=lambda *gap: gaps.append(gap))
    received = await receive_on(hearer, EVENT)
    (where,) = listening(group, "4")
    await asyncio.to_thread(group.kill, where)
    await until(lambda: gaps)
    await hearer.when_ready()
    (other,) = listening(group, "4")
    assert other is not where
    await send_until_received(sender, received)
    assert len(gaps) == hearer.stats()["gaps"]


async def test_a_partitioned_node_is_left(backend: str) -> None:
    with ClusterGroup(BY_AGE[0], primaries=1, replicas=1, node_timeout_ms=1000) as group:
        # Only a replica that has data is in CLUSTER SLOTS, from which the hearer knows the nodes.
        (primary,) = group.primaries()
        primary.ask("SET", "a", "1")
        await until(lambda: len(primary.ask("CLUSTER", "SLOTS")[0]) == 4)
        async with open_nodes(**group.options, slotsRefreshInterval=100) as nodes:
            hearer = await nodes("B")
            received = await receive_on(hearer, EVENT)
            (where,) = listening(group, "4")
            if where.role() == "primary":
                await asyncio.to_thread(group.failover, group.replica_of(where))
            assert listening(group, "4") == [where]
            # It keeps answering, but has lost all other nodes.
            await asyncio.to_thread(group.forget, where)
            await until(lambda: hearer.stats()["gaps"])
            await hearer.when_ready()
            assert len(listening(group, "4")) == 1
            assert "cut off" in hearer.stats()["last_loss"]
            await send_until_received(await nodes("A"), received)


# -- by topic


async def test_sharded_messages(nodes: Nodes, group: ClusterGroup) -> None:
    one, two = await nodes("A", sharded=True), await nodes("B", sharded=True)
    everything = Received()
    for topic in TOPICS:
        two.subscribe(topic, everything)
    await two.when_ready()
    assert two.is_ready
    assert await asyncio.gather(*(one.send({"topic": topic}) for topic in TOPICS)) == [1] * 24
    await everything.reaches(24)
    assert sorted(message["topic"] for message in everything) == list(TOPICS)
    for topic in TOPICS:
        (where,) = listening(group, str(topic), sharded=True)
        assert where is group.primary_of(slot_of_key(b"%d" % topic))


async def test_a_topic_whose_slot_moves(nodes: Nodes, group: ClusterGroup) -> None:
    gaps: list[Any] = []
    sender = await nodes("A", sharded=True)
    hearer = await nodes("B", sharded=True, on_gap=lambda *gap: gaps.append(gap))
    received, other = await receive_on(hearer, EVENT), await receive_on(hearer, 5)
    slot = slot_of_key(b"4")
    source = group.primary_of(slot)
    target = next(node for node in group.primaries() if node is not source)
    await sender.send(NEWS)
    await received.reaches(1)
    await asyncio.to_thread(group.migrate, [slot], source, target)
    await until(lambda: listening(group, "4", sharded=True) == [target])
    await hearer.when_ready()
    assert len(gaps) == 1
    await send_until_received(sender, received)
    await send_until_received(sender, other, 5)
    assert len(gaps) == 1
    await asyncio.to_thread(group.migrate, [slot], target, source)
    await until(lambda: listening(group, "4", sharded=True) == [source])
    await hearer.when_ready()


async def test_a_shard_that_fails_over(nodes: Nodes, group: ClusterGroup) -> None:
    gaps: list[Any] = []
    sender = await nodes("A", sharded=True)
    hearer = await nodes("B", sharded=True, on_gap=lambda *gap: gaps.append(gap))
    received = await receive_on(hearer, EVENT)
    topic = next(
        one
        for one in range(1000)
        if group.primary_of(slot_of_key(b"%d" % one)) is not group.primary_of(slot_of_key(b"4"))
    )
    elsewhere = await receive_on(hearer, topic)
    primary = group.primary_of(slot_of_key(b"4"))
    await asyncio.to_thread(group.kill, primary)
    # The other shards' topics are unaffected.
    assert await sender.send({"topic": topic}) == 1
    await elsewhere.reaches(1)
    await until(lambda: gaps)
    await hearer.when_ready()
    await send_until_received(sender, received)


async def test_a_single_server_is_no_cluster(backend: str, make_server: Any) -> None:
    server: EmbeddedServer = make_server()
    options = {"nodes": [{"host": server.host, "port": server.port}]}
    for more in ({}, {"sharded": True}):
        config = {"clusterNode": {"name": "redis", "options": {**options, **more}}}
        node = dscache.MessageNode.from_config(config)
        with pytest.raises(dscache.DscacheError, match="isn't a node of a cluster"):
            await node.when_ready()
        await node.close()


# -- behind Sentinels


async def test_behind_sentinels() -> None:
    with SentinelGroup(BY_AGE[0]) as group:
        async with open_nodes(**group.options) as nodes:
            gaps: list[Any] = []
            sender = await nodes("A")
            hearer = await nodes("B", on_gap=lambda *gap: gaps.append(gap))
            received = await receive_on(hearer, EVENT)
            assert await sender.send(NEWS) == 1
            await received.reaches(1)
            old = group.primary()
            await asyncio.to_thread(old.kill)
            await asyncio.to_thread(group.wait_for_primary, old)
            await until(lambda: gaps)
            await hearer.when_ready()
            await send_until_received(sender, received)
