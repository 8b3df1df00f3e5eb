"""A node's subscriptions and the gaps reported to it, without any server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Any

import pytest

from dscache.config.messages import load
from dscache.errors import ConfigError, ConnectionLost, ProtocolError, ReplyError
from dscache.pubsub import subscriptions as module
from dscache.pubsub.any_node import AnyNode
from dscache.pubsub.subscriptions import Listener, Subscriptions
from tests.support.waiting import until


class Source:
    """A connection with replies chosen by a test."""

    def __init__(self) -> None:
        self.address = "node.test:6379"
        self.is_ready = True
        self.asked: list[list[str]] = []
        self.left: list[str] = []
        self.answer: Callable[[list[str]], Any] = lambda command: [command[0].lower(), 1]
        self.gate = asyncio.Event()
        self.gate.set()

    async def ask(self, *commands: list[str]) -> list[Any]:
        self.asked += commands
        await self.gate.wait()
        answers = [self.answer(command) for command in commands]
        for answer in answers:
            if isinstance(answer, Exception) and not isinstance(answer, ReplyError):
                raise answer
        return answers

    def leave(self, reason: str) -> None:
        self.left.append(reason)


class Place:
    """Topics on one source, as one of several nodes has them."""

    def __init__(self, ledger: Subscriptions, heartbeat: float = 60.0, **options: Any) -> None:
        self.source = Source()
        self.topics: Collection[int] = ()
        self.listener = Listener(
            ledger, self.source, lambda: self.topics, heartbeat=heartbeat, **options
        )

    def have(self, *topics: int) -> None:
        self.topics = topics
        self.listener.on_topics_changed()


@pytest.fixture
def gaps() -> list[tuple[float, float]]:
    return []


@pytest.fixture
async def ledger(gaps: list[tuple[float, float]]) -> Subscriptions:
    return Subscriptions(lambda since, until: gaps.append((since, until)))


async def test_topics_are_subscribed_and_unsubscribed(
    ledger: Subscriptions, gaps: list[Any]
) -> None:
    place = Place(ledger)
    for topic in (4, 5):
        ledger.add(topic)
    place.have(4, 5)
    place.listener.on_connected()
    await ledger.wait_confirmed()
    assert place.source.asked == [["SUBSCRIBE", "4"], ["SUBSCRIBE", "5"]]
    ledger.remove(5)
    place.have(4)
    await until(lambda: place.source.asked[2:] == [["UNSUBSCRIBE", "5"]])
    assert ledger.is_confirmed
    await place.listener.close()
    await place.listener.close()
    assert gaps == []


async def test_a_gap_begins_at_the_last_answered_ping(
    ledger: Subscriptions, gaps: list[tuple[float, float]]
) -> None:
    place = Place(ledger, heartbeat=0.01)
    ledger.add(4)
    place.have(4)
    place.listener.on_connected()
    await ledger.wait_confirmed()
    await until(lambda: ["PING"] in place.source.asked)
    await until(lambda: place.source.asked.count(["PING"]) > 2)
    place.source.gate.clear()
    asked = place.source.asked.count(["PING"])
    await until(lambda: place.source.asked.count(["PING"]) > asked)
    before = place.listener.received_until
    place.listener.on_disconnected()
    place.listener.on_disconnected()
    assert not ledger.is_confirmed
    place.source.gate.set()
    place.listener.on_connected()
    await ledger.wait_confirmed()
    ((since, until_),) = gaps
    assert since == before <= until_
    assert (ledger.gaps, ledger.last_gap) == (1, (since, until_))
    await place.listener.close()


async def test_a_new_owner_may_confirm_before_the_old_one_ends(
    ledger: Subscriptions, gaps: list[tuple[float, float]]
) -> None:
    moves: list[int] = []
    old = Place(ledger, moved=lambda: moves.append(1))
    new = Place(ledger, moved=lambda: moves.append(1))
    ledger.add(4)
    old.have(4)
    for place in (old, new):
        place.listener.on_connected()
    await ledger.wait_confirmed()
    # Both have it for a moment: the end at the old one is never confirmed.
    new.have(4)
    await until(lambda: gaps)
    assert gaps[0][0] == old.listener.received_until
    old.have()
    old.listener.ended(4)
    await asyncio.sleep(0)
    assert ledger.is_confirmed
    assert (len(gaps), moves) == (1, [1])
    for place in (old, new):
        await place.listener.close()


async def test_a_redirecting_node_is_asked_again(ledger: Subscriptions) -> None:
    moves: list[int] = []
    place = Place(ledger, commands=("SSUBSCRIBE", "SUNSUBSCRIBE"), moved=lambda: moves.append(1))
    answers = [ReplyError("MOVED 9 a:1"), ReplyError("CLUSTERDOWN no"), ["ssubscribe", "4", 1]]
    place.source.answer = lambda command: answers.pop(0)
    ledger.add(4)
    place.have(4)
    place.listener.on_connected()
    await ledger.wait_confirmed()
    assert place.source.asked == [["SSUBSCRIBE", "4"]] * 3
    assert moves == [1, 1]
    await place.listener.close()


async def test_errors_that_end_a_connection(
    ledger: Subscriptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REPLY_TIMEOUT", 0.01)
    place = Place(ledger, heartbeat=0.01)
    ledger.add(4)
    place.have(4)
    for answer, left in (
        (ConnectionLost("gone"), []),
        (ProtocolError("nonsense"), ["its subscriptions failed: nonsense"]),
    ):
        place.source.left.clear()
        place.source.answer = lambda command, said=answer: said
        place.listener.on_connected()
        await until(lambda: place.listener._task is not None and place.listener._task.done())
        assert place.source.left == left
    place.source.gate.clear()
    place.listener.on_connected()
    await until(lambda: place.source.left[-1:] == ["it did not answer for 0 s"])
    await place.listener.close()


async def test_topics_that_are_subscribed_again_meanwhile(
    ledger: Subscriptions, gaps: list[Any]
) -> None:
    place = Place(ledger)
    ledger.add(4)
    place.have(4)
    place.listener.on_connected()
    await ledger.wait_confirmed()
    place.source.gate.clear()
    ledger.remove(4)
    place.have()
    await until(lambda: ["UNSUBSCRIBE", "4"] in place.source.asked)
    ledger.add(4)
    place.have(4)
    place.source.gate.set()
    await until(lambda: place.source.asked.count(["SUBSCRIBE", "4"]) == 2)
    await ledger.wait_confirmed()
    # Messages after the new request and before its confirmation are missed.
    assert len(gaps) == 1
    await place.listener.close()


# -- any node of a cluster

WELL = b"cluster_state:ok\r\ncluster_current_epoch:3\r\n"


def any_node() -> AnyNode:
    options = {"nodes": [{"host": "a", "port": 1}, {"host": "b", "port": 2}]}
    config = load({"name": "redis", "options": options})
    return AnyNode(config.options, None, config.source)


def slots(*ports: int) -> list[Any]:
    return [[0, 16383, *([b"10.0.0.1", port, b"id"] for port in ports)]]


async def test_the_cluster_state_reported_by_a_node() -> None:
    node = any_node()
    assert node.address in ("a:1", "b:2")
    node.update_nodes(slots(7000, 7001), WELL)
    assert node.is_healthy
    assert sorted(node._known) == [("10.0.0.1", 7000), ("10.0.0.1", 7001)]
    node.update_nodes(slots(7000), WELL.replace(b"ok", b"fail"))
    assert not node.is_healthy
    node.update_nodes([], WELL)
    assert (node.is_healthy, node._known) == (False, [("10.0.0.1", 7000)])
    node.update_nodes(slots(7000), ReplyError("NOPERM CLUSTER INFO"))
    assert node.is_healthy
    node.update_nodes([], WELL)
    # Without the right to ask there is no information.
    node.update_nodes(ReplyError("NOPERM no permissions"), WELL)
    assert not node.is_healthy
    with pytest.raises(ConfigError, match="isn't a node of a cluster"):
        node.update_nodes(ReplyError("ERR This instance has cluster support disabled"), WELL)
    with pytest.raises(ReplyError):
        node.update_nodes(ReplyError("LOADING"), WELL)
    with pytest.raises(ProtocolError):
        node.update_nodes(b"?", WELL)


async def test_a_node_of_another_cluster_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address was one of this cluster's before."""
    node = any_node()
    ours = [[0, 16383, [b"10.0.0.1", 7000, b"a" * 40], [b"10.0.0.1", 7001, b"b" * 40]]]
    theirs = [[0, 16383, [b"10.0.0.1", 7001, b"c" * 40]]]
    assert node.update_nodes(ours, WELL) is True
    for _ in range(2):
        assert node.update_nodes(theirs, WELL) is False
        assert not node.is_healthy
        assert node._known == [("10.0.0.1", 7000), ("10.0.0.1", 7001)]
    failed = [[0, 16383, [b"10.0.0.1", 7001, b"b" * 40]]]
    assert node.update_nodes(failed, WELL) is True
    assert node.is_healthy
    # Each known node was tried in vain, for a while: a configured one may be of a new cluster.
    node._attempts = 4
    now = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert node.update_nodes(theirs, WELL) is True
    node._current = ("10.0.0.1", 7000)
    assert node.update_nodes(ours, WELL) is False
