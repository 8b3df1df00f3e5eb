"""Messages in both cores: their envelope, the handling of pushes, and the queues of subscribers."""

from __future__ import annotations

import base64
import collections.abc
import copy
import json
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dscache import _backend, _fast
from dscache.core import envelope, pure
from dscache.errors import (
    ConnectionLost,
    DeadlineExceeded,
    MessageError,
    Overloaded,
    ProtocolError,
    ReplyError,
)
from tests.support import wire
from tests.support.wire import CORES, Exchange, Push, Refusal

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "api" / "golden" / "messages_by_connector.json").read_text("utf-8")
)
MESSAGE = {"topic": 4, "name": "news"}
TEXT = b'{"topic":4,"name":"news"}'
OPENING = envelope.envelope_prefix("A")


def ignore(*_: object) -> None:
    """Ignore a callback."""


def dispatcher_of(core: Any, name: str = "B", topic: int = 4) -> tuple[Any, Any]:
    """Return a dispatcher with one queue for a topic."""
    dispatcher = core.MessageDispatcher(name, ignore, ignore)
    queue = core.SubscriberQueue(ignore, 1000, envelope.DROP_OLDEST)
    dispatcher.join(topic, queue)
    return dispatcher, queue


# -- sending


@pytest.mark.parametrize("vector", GOLDEN["sent"], ids=lambda vector: vector["id"])
@pytest.mark.parametrize("core", CORES)
def test_sent_bytes_equal_those_of_the_connector(core: Any, vector: dict[str, Any]) -> None:
    exchange = Exchange(core)
    opening = envelope.envelope_prefix(vector["server_name"], vector.get("to"))
    exchange.pipeline.publish(None, opening, json.loads(vector["message"]), False)
    (command,) = exchange.take()
    payload = base64.b64decode(vector["payload"])
    assert command[:2] == [b"PUBLISH", vector["channel"].encode()]
    # JavaScript formats 1e-7 and 0.000001 differently; the values are equal.
    ours, theirs = (
        (json.loads(text) if vector["id"] == "numbers" else text) for text in (command[2], payload)
    )
    assert ours == theirs


@pytest.mark.parametrize("core", CORES)
def test_messages_of_a_tick_are_sent_in_order(core: Any) -> None:
    exchange = Exchange(core)
    waiters = [
        exchange.pipeline.publish(None, OPENING, {"topic": i % 3, "number": i}, False)
        for i in range(2000)
    ]
    stats = exchange.pipeline.stats()
    assert (stats["queued"], stats["pending"]) == (2000, 2000)
    sent = []
    while taken := exchange.take():
        sent += taken
    assert exchange.wakes == 1
    assert [command[1] for command in sent] == [b"%d" % (i % 3) for i in range(2000)]
    numbers = [json.loads(command[2])["message"]["number"] for command in sent]
    assert numbers == list(range(2000))
    exchange.reply(*range(2000))
    assert [waiter.result() for waiter in waiters] == list(range(2000))
    exchange.assert_drained()
    assert exchange.pipeline.pending_bytes == 0


@pytest.mark.parametrize("core", CORES)
def test_sharded_messages(core: Any) -> None:
    exchange = Exchange(core)
    exchange.pipeline.publish(17, OPENING, msgspec.Raw(b"[1]"), True)
    assert exchange.take() == [[b"SPUBLISH", b"17", b'{"fromServer":"A","message":[1]}']]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(
    ("levels", "said"),
    [
        (
            60,
            r"^message on topic 4: it can't be encoded: \$: its JSON text has more than 536870912",
        ),
        (5000, r"^message on topic 4: it can't be encoded: \$\[0\]\S+: .* it has 5000 levels, and"),
    ],
)
def test_messages_beyond_the_bounds_of_data(core: Any, levels: int, said: str) -> None:
    message: list[Any] = [1]
    for _ in range(levels - 1):
        message = [message, message]
    with pytest.raises(MessageError, match=said):
        Exchange(core).pipeline.publish(4, OPENING, message, False)


class Struct(msgspec.Struct):
    topic: int


class Plain:
    topic = 4


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(
    ("topic", "message", "said"),
    [
        (None, {}, "a message must have a topic, and there is none in {}"),
        (None, [1], "there is none in \\[1\\]"),
        (None, msgspec.Raw(b"{}"), "there is none in"),
        (None, {"topic": "4"}, "a topic must be an int from 0 to 2147483647"),
        (None, {"topic": True}, "not True"),
        (None, {"topic": -1}, "not -1"),
        (None, {"topic": 2**31}, "not 2147483648"),
        (None, {"topic": 2**80}, "not 1208925819614629174706176"),
        (4.0, {}, "not 4.0"),
        ("4", {}, "not '4'"),
        (None, Struct(-3), "not -3"),
        (4, {"x": object()}, r"message on topic 4: it can't be encoded: \$\.x: "),
        (None, Plain(), r"message on topic 4: it can't be encoded: \$: "),
        (4, msgspec.Raw(b""), "message on topic 4: it is an empty msgspec.Raw"),
    ],
)
def test_invalid_messages_are_refused(core: Any, topic: Any, message: Any, said: str) -> None:
    exchange = Exchange(core)
    with pytest.raises(MessageError, match=said):
        exchange.pipeline.publish(topic, OPENING, message, False)
    assert (exchange.wakes, exchange.waiters) == (0, [])
    exchange.assert_drained()


@pytest.mark.parametrize("core", CORES)
def test_any_object_with_a_topic_is_a_message(core: Any) -> None:
    exchange = Exchange(core)
    for message in (Struct(7), collections.ChainMap({"topic": 7}), {"topic": 7, "t": "\ud800"}):
        if isinstance(message, collections.ChainMap):
            exchange.pipeline.publish(None, OPENING, dict(message), False)
        else:
            exchange.pipeline.publish(None, OPENING, message, False)
    bodies = [command[2][len(OPENING) : -1] for command in exchange.take()]
    assert bodies == [b'{"topic":7}', b'{"topic":7}', b'{"topic":7,"t":"\\ud800"}']


@pytest.mark.parametrize("core", CORES)
def test_a_message_is_never_sent_twice(core: Any) -> None:
    exchange = Exchange(core)
    sent = exchange.pipeline.publish(None, OPENING, MESSAGE, False)
    exchange.take()
    waiting = exchange.pipeline.publish(None, OPENING, {"topic": 5}, False)
    exchange.pipeline.connection_lost(ConnectionLost("gone"), True)
    with pytest.raises(
        ConnectionLost,
        match=r"send on topic 4: connection to .* lost: gone; the message may have been delivered$",
    ):
        sent.result()
    assert not waiting.done
    ((_, channel, _),) = exchange.take()
    assert channel == b"5"
    exchange.reply(3)
    assert waiting.result() == 3
    exchange.assert_drained()


@pytest.mark.parametrize("core", CORES)
def test_replies_to_a_message(core: Any) -> None:
    exchange = Exchange(core)
    waiters = [exchange.pipeline.publish(None, OPENING, MESSAGE, False) for _ in range(3)]
    exchange.take()
    exchange.reply(1, Refusal("NOPERM this user has no permissions"), 0)
    assert (waiters[0].result(), waiters[2].result()) == (1, 0)
    with pytest.raises(ReplyError, match=r"NOPERM .*send on topic 4 at node"):
        waiters[1].result()
    for wrong in (-1, b"OK", None, [1]):
        exchange.pipeline.publish(None, OPENING, MESSAGE, False)
        exchange.take()
        with pytest.raises(ProtocolError, match="unexpected reply to"):
            exchange.reply(wrong)
        exchange.pipeline.connection_lost(ProtocolError("that"), False)


@pytest.mark.parametrize("core", CORES)
def test_messages_obey_deadlines_and_limits(core: Any) -> None:
    exchange = Exchange(core, timeout=0.0, max_pending=2, refuse_when_full=True)
    late = exchange.pipeline.publish(None, OPENING, MESSAGE, False)
    exchange.pipeline.publish(None, OPENING, MESSAGE, False)
    with pytest.raises(Overloaded):
        exchange.pipeline.publish(None, OPENING, MESSAGE, False)
    assert exchange.take() == []
    doubtless = r"send on topic 4: not sent to .*; nothing was done"
    with pytest.raises(DeadlineExceeded, match=doubtless):
        late.result()
    exchange.assert_drained()


# -- receiving


@pytest.mark.parametrize("vector", GOLDEN["received"], ids=lambda vector: vector["id"])
@pytest.mark.parametrize("core", CORES)
def test_received_messages_equal_those_of_the_connector(core: Any, vector: dict[str, Any]) -> None:
    dispatcher, queue = dispatcher_of(core, GOLDEN["server_name"])
    exchange = Exchange(core)
    exchange.pipeline.inbox = dispatcher
    exchange.reply(Push([b"message", b"4", base64.b64decode(vector["payload"])]))
    callback = vector["callback"]
    if "never" in callback:
        assert not queue.messages
        assert dispatcher.stats()["damaged"] == ("logged" in vector)
    else:
        (message,) = queue.messages
        assert message.data == json.loads(callback["message"])
        assert (message.sender, message.topic) == (callback["from_server"], 4)
        # In an envelope with more after the message, only a full parse tells where it ends.
        assert vector["id"] == "more" or json.loads(message.raw) == message.data


ENVELOPES = st.recursive(
    st.sampled_from(
        [
            b'{"fromServer":"A"', b'{"fromServer":"B"', b'"fromServer":"A"', b'"fromServer":"B"',
            b',"toServer":"B"', b',"toServer":"C"', b',"toServer":""', b',"toServer":null',
            b',"message":{"topic":4}', b',"message":[1]', b',"message":{"a":{}}', b',"message":',
            b'{"topic":4}', b"}", b"}}", b"{", b'"', b"\\", b'\\"', b",", b" ",
            b"\xff", b"\xc3\xa9",
            b'{"fromServer":"', b',"toServer":"', b"\x00",
        ]
    ),
    lambda parts: st.lists(parts, max_size=6).map(b"".join),
)  # fmt: skip


@given(ENVELOPES, st.sampled_from(["A", "B", "", "é", 'a"b', "\\"]))
@example(b'{"fromServer":"A","message":{"topic":4}}', "B")
@example(b'{"fromServer":"A","toServer":"B","message":{"topic":4}}', "B")
@example(b'{"fromServer":"A","toServer":"B","message":{"topic":4}}', "A")
@example(b'{"fromServer":"\xff","message":{"topic":4}}', "A")
@example(b'{"fromServer":"A","message":{"topic":4},"more":{}}', "B")
@example(b'{"fromServer":"A","message":{]}}', "B")
def test_the_twins_read_an_envelope_alike(payload: bytes, name: str) -> None:
    results = []
    for core in (_fast, pure):
        dispatcher, queue = dispatcher_of(core, name)
        damaged: list[tuple[int, bytes]] = []
        dispatcher = core.MessageDispatcher(name, ignore, lambda *what, to=damaged: to.append(what))
        dispatcher.join(4, queue)
        dispatcher.take(b"4", payload)
        found: list[Any] = [dispatcher.stats(), damaged]
        for message in queue.messages:
            found += [repr(message), hash(message), message.raw]
            try:
                found.append(message.data)
            except MessageError as error:
                found.append(str(error))
        results.append(found)
    assert results[0] == results[1]


@pytest.mark.parametrize("core", CORES)
def test_subscriptions_are_confirmed(core: Any) -> None:
    told: list[Any] = []
    dispatcher = core.MessageDispatcher(
        "B", lambda pipeline, push: told.append((pipeline, push)), ignore
    )
    queue = core.SubscriberQueue(ignore, 10, envelope.DROP_OLDEST)
    dispatcher.join(4, queue)
    exchange = Exchange(core)
    pipeline = exchange.pipeline
    pipeline.inbox = dispatcher
    asked = [pipeline.command(*words)[1] for words in (("SUBSCRIBE", "4"), ("PING",))]
    asked += [pipeline.command("SUBSCRIBE", "5")[1], pipeline.command("UNSUBSCRIBE", "4")[1]]
    exchange.reply(
        Push([b"message", b"4", b'{"fromServer":"A","message":{}}']),
        Push([b"subscribe", b"4", 1]),
        Push([b"sunsubscribe", b"9", 0]),
        "PONG",
        Push([b"message", b"7", b"nobody wants it"]),
        Refusal("NOPERM no"),
        Push([b"unsubscribe", b"4", 0]),
        Push([b"unsubscribe", b"4", 0]),
    )
    assert asked[0].result() == [b"subscribe", b"4", 1]
    assert asked[1].result() == b"PONG"
    assert isinstance(asked[2].error, ReplyError)
    assert asked[3].result() == [b"unsubscribe", b"4", 0]
    unasked = [[b"sunsubscribe", b"9", 0], [b"unsubscribe", b"4", 0]]
    assert told == [(pipeline, push) for push in unasked]
    assert dispatcher.stats() == {
        "received": 1,
        "own": 0,
        "foreign": 0,
        "unwanted": 1,
        "damaged": 0,
    }
    exchange.assert_drained()


@pytest.mark.parametrize("core", CORES)
def test_messages_arrive_as_resp2_replies(core: Any) -> None:
    dispatcher, queue = dispatcher_of(core)
    exchange = Exchange(core)
    exchange.pipeline.inbox = dispatcher
    exchange.pipeline.resp2_pubsub = True
    _, begun = exchange.pipeline.command("SUBSCRIBE", "4")
    _, alive = exchange.pipeline.command("PING")
    exchange.reply([b"message", b"4", OPENING + b"{}}"], [b"subscribe", b"4", 1])
    exchange.reply([b"message", b"4", OPENING + b"{}}"], [b"pong", b""])
    assert begun.result() == [b"subscribe", b"4", 1]
    assert alive.result() == [b"pong", b""]
    assert [message.sender for message in queue.messages] == ["A", "A"]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(
    "push",
    [
        [b"message", b"4"],
        [b"message", b"4", None],
        [b"message", 4, b"x"],
        [b"message", b"4", b"x", b"y"],
        [b"smessage", b"4", 7],
        [],
        [7],
    ],
    ids=repr,
)
def test_an_invalid_message_ends_the_connection(core: Any, push: list[Any]) -> None:
    exchange = Exchange(core)
    exchange.pipeline.inbox, _ = dispatcher_of(core)
    with pytest.raises(ProtocolError):
        exchange.reply(Push(push))


@pytest.mark.parametrize("core", CORES)
def test_pushes_without_a_dispatcher_are_ignored(core: Any) -> None:
    exchange = Exchange(core)
    exchange.reply(Push([b"message", b"4", b"x"]), Push([b"subscribe", b"4", 1]))
    exchange.server.put("a", 1, b"1")
    [waiter] = exchange.issue(wire.Operation("get", "a"))
    exchange.run()
    assert waiter.result().version == 1


# -- subscriber queues


@pytest.mark.parametrize("core", CORES)
def test_a_full_queue_follows_its_overflow_policy(core: Any) -> None:
    wakes: list[int] = []
    for overflow, kept in (
        (envelope.DROP_OLDEST, [2, 3, 4]),
        (envelope.DROP_NEWEST, [0, 1, 2]),
        (envelope.DISCONNECT, [0, 1, 2]),
    ):
        wakes.clear()
        queue = core.SubscriberQueue(lambda: wakes.append(1), 3, overflow)
        for number in range(5):
            queue.put(core.Message(number, "A", b"{}"))
        assert [message.topic for message in queue.messages] == kept
        is_shut = overflow == envelope.DISCONNECT
        assert (queue.dropped, queue.is_shut) == (1 if is_shut else 2, is_shut)
        assert (wakes, queue.awake) == ([1], True)
        assert queue.received == (4 if is_shut else 5)


@pytest.mark.parametrize("core", CORES)
def test_subscribers_of_a_topic_share_one_message(core: Any) -> None:
    dispatcher, first = dispatcher_of(core)
    second = core.SubscriberQueue(ignore, 1000, envelope.DROP_OLDEST)
    dispatcher.join(4, second)
    dispatcher.join(5, second)
    dispatcher.take(b"4", OPENING + TEXT + b"}")
    assert first.messages[0] is second.messages[0]
    assert first.messages[0].data is second.messages[0].data
    assert dispatcher.leave(4, first) is False
    assert dispatcher.leave(4, second) is True
    dispatcher.take(b"4", OPENING + TEXT + b"}")
    assert (len(first.messages), len(second.messages)) == (1, 1)


# -- a message


@pytest.mark.parametrize("core", CORES)
def test_the_data_of_a_message_is_decoded(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "core", core)
    dispatcher, queue = dispatcher_of(core)
    dispatcher.take(b"4", OPENING + TEXT + b"}")
    message = queue.messages[0]
    assert message.raw == TEXT
    assert message.raw is message.raw
    assert message.data == MESSAGE
    assert message.data is message.data
    assert (message["name"], message.get("x"), message.get("x", 1)) == ("news", None, 1)
    assert ("name" in message, "x" in message, len(message)) == (True, False, 2)
    assert (dict(message), list(message)) == (MESSAGE, list(MESSAGE))
    assert list(message.items()) == list(MESSAGE.items())
    assert list(message.values()) == list(MESSAGE.values())
    assert message == MESSAGE
    assert message == core.Message(4, "A", TEXT)
    assert message != core.Message(5, "A", TEXT)
    assert (message != 4, message == None) == (True, False)  # noqa: E711
    assert hash(message) == hash(core.Message(4, "A", TEXT))
    assert isinstance(message, collections.abc.Mapping)
    assert repr(message) == """Message(4, 'A', b'{"topic":4,"name":"news"}')"""
    for other in (pickle.loads(pickle.dumps(message)), copy.copy(message)):
        assert (type(other), other) == (type(message), message)
    assert message.decode(dict[str, Any]) == MESSAGE
    with pytest.raises(MessageError, match=r"topic 4 from 'A': Expected `int`.*at `\$\["):
        message.decode(dict[str, int])
    with pytest.raises(AttributeError, match="immutable"):
        message.topic = 5
    with pytest.raises(TypeError, match=r"^type must be a class or another type .*, not 5$"):
        message.decode(5)
    with pytest.raises(AttributeError, match="immutable"):
        del message.topic


@pytest.mark.parametrize("core", CORES)
def test_a_message_of_invalid_json(core: Any) -> None:
    dispatcher, queue = dispatcher_of(core)
    dispatcher.take(b"4", OPENING + b"{]}}")
    (message,) = queue.messages
    for _ in range(2):
        with pytest.raises(MessageError, match="message on topic 4 from 'A': it isn't JSON: "):
            _ = message.data
    with pytest.raises(MessageError):
        core.Message(4, "A", b"{]").data  # noqa: B018


@pytest.mark.parametrize("core", CORES)
def test_a_message_may_hold_javascript_that_msgspec_refuses(core: Any) -> None:
    dispatcher, queue = dispatcher_of(core)
    dispatcher.take(b"4", OPENING + b'{"t":"\\ud800","n":1e400}}')
    assert queue.messages[0].data == {"t": "\ud800", "n": float("inf")}


# -- the nodes of a cluster


@pytest.mark.parametrize("core", CORES)
def test_a_message_goes_to_the_node_of_its_slot(core: Any) -> None:
    cluster = wire.ClusterExchange(core)
    waiters = [cluster.router.publish(None, OPENING, {"topic": t}, True) for t in range(30)]
    for node, pipeline in enumerate(cluster.pipelines):
        for verb, channel, _ in cluster.take(node):
            assert verb == b"SPUBLISH"
            assert core.slot_of_key(channel) % 3 == node
            pipeline.feed(b":1\r\n")
    assert [waiter.result() for waiter in waiters] == [1] * 30
    cluster.assert_drained()


@pytest.mark.parametrize("core", CORES)
def test_redirected_messages_keep_their_order(core: Any) -> None:
    cluster = wire.ClusterExchange(core)
    slot = core.slot_of_key(b"4")
    node, other = slot % 3, (slot + 1) % 3
    waiters = [cluster.router.publish(None, OPENING, {"topic": 4, "n": n}, True) for n in range(5)]
    assert len(cluster.take(node)) == 5
    cluster.reply(node, *[Refusal(f"MOVED {slot} node{other}.test:6379")] * 5)
    cluster.assign(slot, other)
    redirected = cluster.redirected(node)
    assert [where for _, where, _ in redirected] == [slot] * 5
    cluster.pipelines[other].requeue([batch for _, _, batch in redirected])
    numbers = [json.loads(command[2])["message"]["n"] for command in cluster.take(other)]
    assert numbers == list(range(5))
    cluster.reply(other, 1, 1, 1, 1, 1)
    assert [waiter.result() for waiter in waiters] == [1] * 5
    cluster.assert_drained()
