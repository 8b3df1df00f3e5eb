"""A peer among real servers when something dies: a provider, a server, Redis."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

import dscache
from dscache.deepstream import Peer, RPCError, RPCTimeout, protocol
from tests.support.deepstream import FAST, Server, World, eventually
from tests.support.documents import PROJECT
from tests.support.waiting import until


async def members(server: Server) -> set[str]:
    _, found = await server.leader()
    return set(found)


async def test_the_death_of_a_provider_is_noticed(world: World) -> None:
    """Its cluster membership ends, and with it its RPCs."""
    server = await world.server(**FAST)
    client = await world.client(server)
    peer = await world.peer("py-1", more=FAST)
    provider = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.programs.deepstream_provider"),
        *(str(world.redis.port), "py-2", "mortal"),
        cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert provider.stdout is not None
        assert await provider.stdout.readline() == b"ready\n"

        async def is_provided() -> bool:
            try:
                return bool(await peer.rpc.make("mortal") == "py-2")
            except RPCError:
                return False

        await eventually(is_provided)

        async def is_known() -> bool:
            return bool(await client.do("make", name="mortal") == {"result": "py-2"})

        await eventually(is_known)
        dying = asyncio.create_task(client.do("make", name="mortal", data=5))
        await asyncio.sleep(0.3)
        provider.kill()
        await provider.wait()
        # The request under way ends by the server's own time.
        assert await dying == {"error": "RESPONSE_TIMEOUT"}

        async def is_removed() -> bool:
            return await members(server) == {server.name, "py-1"}

        await eventually(is_removed)
        assert await client.do("make", name="mortal") == {"error": "NO_RPC_PROVIDER"}
        await until(lambda: "py-2" not in peer.servers)
        with pytest.raises(RPCError, match="no provider"):
            await peer.rpc.make("mortal")
        assert server.complaints() == []
    finally:
        if provider.returncode is None:
            provider.kill()


async def test_the_death_of_a_server_is_noticed(world: World) -> None:
    servers = [await world.server(**FAST), await world.server(**FAST)]
    client = await world.client(servers[1], "ada")
    peer = await world.peer(more=FAST)
    await client.do("provide", name="js/slow", kind="silent")

    async def is_provided() -> bool:
        try:
            await peer.rpc.make("js/slow", timeout=0.5)
        except RPCTimeout:
            return True
        except RPCError:
            return False
        return False

    await eventually(is_provided)
    dying = asyncio.create_task(peer.rpc.make("js/slow", timeout=3))
    await asyncio.sleep(0.2)
    await servers[1].kill()
    with pytest.raises(RPCTimeout):
        await dying
    await until(lambda: peer.servers == ["js-1"])
    assert await peer.presence.users() == set()
    with pytest.raises(RPCError, match="no provider"):
        await peer.rpc.make("js/slow")


async def test_a_request_to_a_server_that_has_just_died_times_out(world: World) -> None:
    server = await world.server(**FAST)
    client = await world.client(server, "ada")
    peer = await world.peer(more=FAST)
    await client.do("provide", name="js/echo", kind="echo")

    async def is_provided() -> bool:
        try:
            return bool(await peer.rpc.make("js/echo", 1) == 1)
        except RPCError:
            return False

    await eventually(is_provided)
    await server.kill()
    with pytest.raises(RPCTimeout, match="has not accepted") as raised:
        await peer.rpc.make("js/echo", 1, timeout=30)
    assert raised.value.reason == "ACCEPT_TIMEOUT"


async def test_a_server_starts_beside_peers(world: World) -> None:
    """It waits for all names of all members, and learns what peers provide."""
    peer = await world.peer("py-1", more=FAST)
    end = peer.rpc.provide("early", lambda data: "there")
    server = await world.server(**FAST)
    client = await world.client(server)

    async def is_known() -> bool:
        return bool(await client.do("make", name="early") == {"result": "there"})

    await eventually(is_known)
    end()

    async def is_gone() -> bool:
        return bool(await client.do("make", name="early") == {"error": "NO_RPC_PROVIDER"})

    await eventually(is_gone)
    await peer.close()

    async def has_left() -> bool:
        return await members(server) == {server.name}

    await eventually(has_left)
    assert server.complaints() == []


async def test_a_score_above_0_would_take_the_lead(world: World) -> None:
    """The same registry that no peer leads follows any program that claims to."""
    server = await world.server(**FAST)
    peer = await world.peer(more=FAST)

    async def is_member() -> bool:
        return peer.server_name in await members(server)

    await eventually(is_member)
    assert (await server.leader())[0] == server.name
    async with dscache.MessageNode.from_config(world.config, server_name="usurper") as node:
        assert node.server_name == "usurper"
        status = b'{"topic":9,"action":2,"serverName":"usurper","leaderScore":2,"role":"x"}'
        world.publish(9, b'{"fromServer":"usurper","message":' + status + b"}")

        async def leads() -> bool:
            return (await server.leader())[0] == "usurper"

        await eventually(leads)


async def test_redis_dies_and_comes_back(world: World) -> None:
    """Servers, clients and the peer live on, and open records become equal again."""
    servers = [await world.server(**FAST), await world.server(**FAST)]
    clients = [await world.client(server) for server in servers]
    gaps: list[tuple[float, float]] = []
    peer = await world.peer(more=FAST, on_gap=lambda since, until: gaps.append((since, until)))
    peer.rpc.provide("py/echo", lambda data: data)
    listening = peer.events.listen("after")
    for client in clients:
        await client.do("open", name="kept")
    await peer.records.set("kept", {"n": 1})
    for client in clients:

        async def shows_first(client: Any = client) -> bool:
            return bool(await client.do("get", name="kept") == [1, {"n": 1}])

        await eventually(shows_first)
    world.redis.kill()
    with pytest.raises(dscache.DscacheError):
        await peer.records.set("kept", {"n": 2})
    await asyncio.sleep(0.3)
    world.redis.start()
    await peer.when_ready()

    async def writes() -> bool:
        try:
            await peer.records.set("kept", {"n": 3})
        except dscache.DscacheError:
            return False
        return True

    await eventually(writes)
    for client in clients:

        async def shows(client: Any = client) -> bool:
            await peer.records.notify("kept")
            got = await client.do("get", name="kept")
            return bool(got is not None and got[1] == {"n": 3})

        await eventually(shows)

        async def calls(client: Any = client) -> bool:
            return bool(await client.do("make", name="py/echo", data=5) == {"result": 5})

        await eventually(calls)

    async def emits() -> bool:
        await clients[0].do("emit", name="after", data=1)
        await asyncio.sleep(0.1)
        return peer.stats()["events_received"] > 0

    await eventually(emits)
    assert (await anext(listening)).data == 1
    await until(lambda: gaps)
    assert all(server.is_running for server in servers)
    assert all(client.is_running for client in clients)


async def test_what_cannot_be_told_is_told_later(world: World) -> None:
    """The bus is another Redis, and away while a record is written."""
    with dscache.embedded.EmbeddedServer() as store:
        cache = {"name": "redis", "options": {"host": store.host, "port": store.port}}
        server = await world.server(**FAST, cache=cache)
        client = await world.client(server)
        peer = await world.peer(more={**FAST, "cache": cache})
        await client.do("open", name="late")
        world.redis.kill()
        record = await peer.records.set("late", {"n": 1})
        assert record.version == 1
        assert peer.stats()["records_untold"] == 1
        world.redis.start()

        async def is_told() -> bool:
            return bool(await client.do("get", name="late") == [1, {"n": 1}])

        await eventually(is_told)
        assert peer.stats()["records_told_late"] >= 1
        await peer.close()
        await client.stop()
        await server.kill()


async def test_closing_ends_everything(world: World) -> None:
    """With a request and iterations under way, and without a task left."""
    peer = await world.peer()
    other = await world.peer()
    began = asyncio.Event()

    async def serve(data: Any) -> Any:
        began.set()
        await asyncio.sleep(60)

    other.rpc.provide("long", serve)
    made = asyncio.create_task(peer.rpc.make("long"))
    events = peer.events.listen("*")
    changes = peer.records.changes("*")
    listening = asyncio.create_task(anext(events))
    watching = asyncio.create_task(anext(changes))
    noticing = asyncio.create_task(anext(peer.presence.changes()))
    await began.wait()
    await peer.close()
    with pytest.raises(RPCError, match="closed") as raised:
        await made
    assert raised.value.reason == "CLOSED"
    for task in (listening, watching, noticing):
        with pytest.raises(StopAsyncIteration):
            await task
    await peer.close()
    with pytest.raises(dscache.UsageError):
        await peer.events.emit("a")
    with pytest.raises(dscache.UsageError):
        await peer.records.set("a", {})
    await other.close()
    await asyncio.sleep(0.05)
    left = [task.get_name() for task in asyncio.all_tasks()]
    assert not [name for name in left if name.startswith("dscache")]


async def test_two_peers_without_a_server(world: World) -> None:
    one, two = await world.peer("a"), await world.peer("b")
    two.rpc.provide("where", lambda data: "b")
    assert await one.rpc.make("where") == "b"
    assert one.servers == ["b"]
    assert isinstance(two, Peer)
    status = protocol.Status(server_name="c")
    assert status.leader_score < 0
