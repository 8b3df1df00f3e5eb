"""The types of MessageNode. Type checkers read this file (test_typing.py); nothing runs it."""

from __future__ import annotations

from asyncio import Future
from collections.abc import Callable
from typing import Any, assert_type

from dscache import Message, MessageNode


async def handle(message: Message, sender: str) -> None: ...


def handle_at_once(message: Message, sender: str) -> int:
    return len(sender)


def note_gap(since: float, until: float) -> None: ...


async def sends() -> None:
    async with MessageNode.from_config("h:1", server_name="a", on_gap=note_gap, db=2) as node:
        assert_type(node, MessageNode)
        assert_type(node.send({"topic": 1}), Future[int])
        assert_type(await node.send([], topic=1), int)
        assert_type(await node.send_direct("b", {"topic": 1}), int)
        assert_type(await node.send({"topic": 4, "action": 0}, unchecked=True), int)
        assert_type(node.send_direct("b", [], topic=1, unchecked=True), Future[int])


async def listens(node: MessageNode) -> None:
    assert_type(node.subscribe(1, handle), Callable[[], None])
    node.subscribe(1, handle_at_once, max_pending=10, overflow="drop_newest")
    async for message, sender in node.messages(1, overflow="disconnect"):
        assert_type(message, Message)
        assert_type(sender, str)


async def state(node: MessageNode) -> None:
    assert_type(node.server_name, str)
    assert_type(node.is_ready, bool)
    assert_type(node.description, str)
    assert_type(node.stats(), dict[str, Any])
    assert_type(await node.when_ready(), None)
    assert_type(await node.close(), None)


def refused(node: MessageNode) -> None:
    node.subscribe("1", handle)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    node.subscribe(1, note_gap)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    node.messages(1, overflow="wait")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    node.send_direct({"topic": 1})  # type: ignore[call-arg, arg-type] # pyright: ignore[reportCallIssue]
    node.send({"topic": 1}, None, True)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
