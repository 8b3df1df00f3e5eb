"""The types of Peer. Type checkers read this file (test_typing.py); nothing runs it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, assert_type

import dscache
from dscache import Record, RPCError
from dscache.deepstream import Event, Peer, PresenceChange, RecordChange, check


async def add(data: Any) -> int:
    return int(data["a"] + data["b"])


async def events() -> None:
    async with Peer.from_config("redis://h:1", server_name="py-1", commandTimeout=200) as peer:
        assert_type(peer, Peer)
        assert_type(await peer.events.emit("news", {"a": 1}), int)
        async for event in peer.events.listen("user/*", overflow="disconnect"):
            assert_type(event, Event)
            assert_type(event.name, str)
            assert_type(event.sender, str)


async def records(peer: Peer) -> None:
    assert_type(await peer.records.get("a"), Record[Any] | None)
    assert_type(await peer.records.set("a", {}, ttl=5), Record[Any])
    assert_type(await peer.records.set("a", {}, ttl=timedelta(minutes=1)), Record[Any])
    assert_type(await peer.records.patch("a", "b.c", 1), Record[Any])
    assert_type(await peer.records.update("a", lambda data: data), Record[Any] | None)
    assert_type(await peer.records.delete("a"), bool)
    async for change in peer.records.changes("user/*"):
        assert_type(change, RecordChange)
        assert_type(change.version, int | None)
    assert_type(await peer.lists.add("list", "a", index=0), list[str])
    assert_type(await peer.lists.entries("list"), list[str])


async def others(peer: Peer) -> None:
    assert_type(peer.rpc.provide("add", add, max_running=5), Callable[[], None])
    assert_type(await peer.presence.users(), set[str])
    async for change in peer.presence.changes():
        assert_type(change, PresenceChange)
        assert_type(change.user, str)
        assert_type(change.is_online, bool)
    assert_type(peer.servers, list[str])
    assert_type(peer.server_name, str)
    assert_type(peer.stats(), dict[str, Any])
    assert_type(check({"topic": 4}), None)
    assert_type(dscache.deepstream.Peer, type[Peer])
    try:
        await peer.rpc.make("add", {}, timeout=2)
    except RPCError as error:
        assert_type(error.reason, str)


def refused(peer: Peer) -> None:
    peer.events.listen("a", overflow="wait")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    peer.rpc.provide("a", 5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
