"""The typed protocol, and the check of messages to deepstream's servers."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dscache.deepstream import check, protocol
from dscache.deepstream.protocol import Registry, RPCAction, StateAction
from dscache.errors import MessageError

GOOD: list[dict[str, Any]] = [
    {"topic": 4, "action": 2, "name": "news"},
    {"topic": 4, "action": 2, "name": "news", "data": '{"a":1}'},
    {"topic": 4, "action": 2, "name": "news", "data": '"\\ud800"'},
    {"topic": 4, "action": 2, "name": "news", "parsedData": None},
    {"topic": 5, "action": 2, "names": ["a", "b"]},
    {"topic": 5, "action": 13, "name": "a", "names": []},
    {"topic": 5, "action": 18, "name": "a", "version": 0, "parsedData": {}},
    {"topic": 5, "action": 18, "name": "a", "version": 2**31 - 1, "data": "[]"},
    {"topic": 5, "action": 19, "name": "a", "version": 2, "path": "b", "data": "null"},
    {"topic": 5, "action": 20, "name": "a", "version": 2, "path": "b", "isWriteAck": False},
    {"topic": 6, "action": 2, "name": "add", "correlationId": "1", "data": '{"a":1}'},
    {"topic": 6, "action": 4, "name": "add", "correlationId": "1"},
    {"topic": 9, "action": 2, "serverName": "py", "leaderScore": -1, "role": "x"},
    {"topic": 9, "action": 1, "serverName": "py"},
    {"topic": 11, "action": 2, "registryTopic": 13, "name": "add"},
    {"topic": 11, "action": 5, "registryTopic": 10, "fullState": []},
    {"topic": 11, "action": 6, "registryTopic": 13, "checksum": -1e30},
    {"topic": 20, "action": 102, "subscription": "a"},
    {"topic": 99, "text": "a topic that deepstream doesn't use"},
]
BAD: list[tuple[dict[str, Any], str]] = [
    # The ones that were seen to end servers, clients, or to be lost.
    ({"topic": 4, "action": 0, "name": "news"}, "action must be .*EMIT 2, not UNKNOWN 0"),
    ({"topic": 4, "name": "news"}, "action is missing"),
    ({"topic": 4, "action": True, "name": "news"}, "action must be .*not True"),
    ({"topic": 4, "action": 2, "name": "news", "data": {"a": 1}}, "data must be JSON text.*dumps"),
    ({"topic": 4, "action": 2, "name": "news", "data": 7}, "data must be JSON text"),
    ({"topic": 4, "action": 2, "name": "news", "data": "hello"}, "data must be JSON text"),
    ({"topic": 4, "action": 2, "name": "news", "data": None}, "data must be JSON text"),
    ({"topic": 4, "action": 2, "name": "news", "data": "NaN"}, "data must be JSON text"),
    ({"topic": 4, "action": 2, "data": "1"}, "name is missing"),
    ({"topic": 4, "action": 2, "name": 5}, "name must be a text"),
    ({"topic": 5, "action": 2, "name": "live/1"}, "names is missing; name is not enough"),
    ({"topic": 5, "action": 2, "names": "live/1"}, "names must be a list"),
    ({"topic": 5, "action": 2, "names": []}, "names must be a list"),
    ({"topic": 5, "action": 2, "names": [1]}, "names must be a list"),
    ({"topic": 5, "action": 13, "names": ["a"]}, "name is missing; names is not enough"),
    ({"topic": 5, "action": 9, "name": "a"}, "action must be .*DELETED 13, not DELETE 9"),
    ({"topic": 5, "action": 18, "name": "a", "data": "{}"}, "version is missing"),
    ({"topic": 5, "action": 18, "name": "a", "version": 1}, "data is missing"),
    ({"topic": 5, "action": 18, "name": "a", "version": "1", "data": "{}"}, "version must be"),
    ({"topic": 5, "action": 18, "name": "a", "version": 2**31, "data": "{}"}, "version must be"),
    ({"topic": 5, "action": 18, "name": "a", "version": 1, "data": "0"}, "object or an array"),
    ({"topic": 5, "action": 18, "name": "a", "version": 1, "parsedData": None}, "parsedData must"),
    ({"topic": 5, "action": 19, "name": "a", "version": 1, "data": "0"}, "path is missing"),
    ({"topic": 6, "action": 2, "name": "add"}, "correlationId is missing"),
    ({"topic": 6, "action": 8, "names": ["add"], "correlationId": "1"}, "not PROVIDE 8"),
    ({"topic": 7, "action": 2}, "servers take no message here"),
    ({"topic": 9, "action": 2, "serverName": "py", "leaderScore": 0.5}, "leaderScore .* at most 0"),
    ({"topic": 9, "action": 1, "name": "py"}, "serverName is missing; name is not enough"),
    ({"topic": 10, "action": 2, "name": "a"}, "servers take no message here"),
    ({"topic": 11, "action": 2, "name": "add"}, "registryTopic is missing"),
    ({"topic": 11, "action": 2, "registryTopic": 6, "name": "add"}, "registryTopic must be"),
    ({"topic": 11, "action": 5, "registryTopic": 13}, "fullState is missing"),
    ({"topic": 11, "action": 6, "registryTopic": 13, "checksum": float("nan")}, "checksum must"),
]


@pytest.mark.parametrize("message", GOOD, ids=json.dumps)
def test_messages_of_servers_are_right(message: dict[str, Any]) -> None:
    check(message)
    check(msgspec.Raw(json.dumps(message).encode()), message["topic"])


@pytest.mark.parametrize(("message", "text"), BAD, ids=[json.dumps(one) for one, _ in BAD])
def test_a_wrong_message_is_an_error_that_names_the_field(
    message: dict[str, Any], text: str
) -> None:
    with pytest.raises(MessageError, match=text) as raised:
        check(message)
    assert f"message on topic {message['topic']}" in str(raised.value)
    with pytest.raises(MessageError):
        check(msgspec.Raw(json.dumps(message).encode()), message["topic"])


def test_the_topic_must_be_in_the_message() -> None:
    with pytest.raises(MessageError, match="topic must be 4 in the message too, not None"):
        check({"action": 2, "name": "news"}, 4)
    with pytest.raises(MessageError, match="topic must be 4 in the message too, not 99"):
        check({"topic": 99, "action": 2, "name": "news"}, 4)


NESTED: list[tuple[dict[str, Any], str]] = [
    ({"parsedData": {"a": [msgspec.Raw(b"{")]}}, r"parsedData .*msgspec\.Raw that isn't JSON"),
    ({"parsedData": msgspec.Raw(b"1 2")}, r"parsedData .*msgspec\.Raw that isn't JSON"),
    ({"parsedData": msgspec.Raw(b"")}, r"parsedData .*msgspec\.Raw that isn't JSON"),
    ({"parsedData": {"a": object()}}, "parsedData .*can't be encoded"),
    ({"parsedData": {"a": msgspec.Raw(b'"\xff"')}}, r"parsedData .*msgspec\.Raw that isn't JSON"),
    ({"more": [msgspec.Raw(b"nul")]}, r"more .*msgspec\.Raw that isn't JSON"),
]


@pytest.mark.parametrize(("fields", "text"), NESTED)
def test_a_nested_text_that_is_no_json_is_refused(fields: dict[str, Any], text: str) -> None:
    """It would break the whole message, and every server that reads it."""
    message = {"topic": 4, "action": 2, "name": "news", **fields}
    with pytest.raises(MessageError, match=text) as raised:
        check(message)
    assert str(raised.value).startswith("message on topic 4 (EVENT, EMIT): ")
    with pytest.raises(MessageError, match=r"msgspec\.Raw|encoded"):
        check(Parsed(fields.get("parsedData", fields.get("more"))))


def test_a_nested_text_that_is_json() -> None:
    check({"topic": 4, "action": 2, "name": "a", "parsedData": {"a": msgspec.Raw(b" [1] ")}})
    check(Parsed({"a": msgspec.Raw(b"1"), 5: "a key that becomes a text"}))


class Parsed(msgspec.Struct):
    parsedData: Any  # noqa: N815 # the name in the message
    topic: int = 4
    action: int = 2
    name: str = "news"


@pytest.mark.parametrize(
    ("value", "is_record"),
    [
        (msgspec.Raw(b" {}"), True),
        (msgspec.Raw(b"7"), False),
        (Parsed(1), True),
        ((1, 2), True),
        (date(2026, 1, 1), False),
        (b"bytes", False),
    ],
)
def test_a_record_by_its_text(value: Any, is_record: bool) -> None:
    update = {"topic": 5, "action": 18, "name": "a", "version": 1, "parsedData": value}
    if is_record:
        check(update)
        return
    with pytest.raises(MessageError, match="parsedData must be an object or an array"):
        check(update)


@dataclass
class Written:
    topic: int
    action: int
    name: str
    data: Any = "1"


@pytest.mark.parametrize("bad", [msgspec.Raw(b"[1]"), msgspec.Raw(b"{"), Written(4, 2, "a", 1)])
def test_other_types_are_checked_by_their_json(bad: Any) -> None:
    check(Written(4, 2, "a"))
    with pytest.raises(MessageError, match="topic 4"):
        check(bad, 4)


STRUCTS = [
    protocol.Emit(name="news", data="1"),
    protocol.Emit(name="news"),
    protocol.Notify(names=["a"]),
    protocol.Update(name="a", version=1, data="{}"),
    protocol.Deleted(name="a"),
    protocol.RPCMessage(name="add", correlation_id="1", action=RPCAction.REQUEST, data="1"),
    protocol.Status(server_name="py"),
    protocol.Leave(server_name="py"),
    protocol.RegistryEntry(
        registry_topic=Registry.RPC_SUBSCRIPTIONS, action=StateAction.ADD, name="add"
    ),
    protocol.RegistryChecksum(registry_topic=Registry.RPC_SUBSCRIPTIONS, checksum=7),
    protocol.FullStateRequest(registry_topic=Registry.ONLINE_USERS),
    protocol.FullState(registry_topic=Registry.ONLINE_USERS, full_state=["ada"]),
]


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda one: type(one).__name__)
def test_every_struct_is_a_right_message(struct: msgspec.Struct) -> None:
    check(struct)
    text = msgspec.json.encode(struct)
    check(msgspec.Raw(text), int(struct.topic))  # type: ignore[attr-defined] # each has one
    assert msgspec.json.decode(text, type=type(struct)) == struct


ENUMERATIONS = {
    "TOPIC": protocol.Topic,
    "STATE_REGISTRY_TOPIC": protocol.Registry,
    "EVENT_ACTION": protocol.EventAction,
    "RECORD_ACTION": protocol.RecordAction,
    "RPC_ACTION": protocol.RPCAction,
    "PRESENCE_ACTION": protocol.PresenceAction,
    "CLUSTER_ACTION": protocol.ClusterAction,
    "LOCK_ACTION": protocol.LockAction,
    "STATE_ACTION": protocol.StateAction,
}


def test_the_numbers_are_those_of_the_package(packages: Path) -> None:
    script = """
    const all = require('@deepstream/protobuf/dist/types/all')
    const names = one => Object.entries(one).filter(([, value]) => typeof value === 'number')
    console.log(JSON.stringify(Object.fromEntries(
      Object.entries(all).map(([name, one]) => [name, Object.fromEntries(names(one))]))))
    """
    done = subprocess.run(
        ["node", "-e", script], cwd=packages, check=True, capture_output=True, text=True
    )
    theirs = json.loads(done.stdout)
    ours = {
        name: {one.name: one.value for one in enumeration}
        for name, enumeration in ENUMERATIONS.items()
    }
    assert {name: theirs[name] for name in ours} == ours
