"""A peer among real servers of deepstream with real clients."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import uuid
import weakref
from datetime import timedelta
from typing import Any

import msgspec
import pytest

import dscache
from dscache.deepstream import (
    Event,
    Peer,
    PresenceChange,
    Reject,
    RPCError,
    RPCTimeout,
    check,
    protocol,
)
from dscache.errors import (
    ConfigError,
    MessageError,
    Overloaded,
    RecordError,
    RecordMissing,
    UsageError,
)
from tests.support.deepstream import Client, Pair, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

DATA = [None, 0, False, "", "text", "Ä😀", [], {}, {"a": [1, {"b": None}]}, 1.5, 2**53 - 1]


async def heard(client: Client, name: str, count: int) -> list[Any]:
    """Return the data of a client's events of a name, once there are so many."""

    async def condition() -> list[Any] | None:
        found = [data for event, data in await client.do("events") if event == name]
        return found if len([one for one in found if one != "first"]) >= count else None

    found: list[Any] = await eventually(condition)
    return found


async def shows(client: Client, name: str, expected: Any) -> None:
    """Wait until a client's open record has a version and data, or is None."""

    async def condition() -> bool:
        return bool(await client.do("get", name=name) == expected)

    await eventually(condition)


async def provided(peer: Peer, name: str) -> None:
    """Wait until a peer knows a provider."""

    async def condition() -> bool:
        try:
            await peer.rpc.make(name, None, timeout=1)
        except RPCTimeout:
            return True
        except RPCError as error:
            return error.reason != "NO_RPC_PROVIDER"
        return True

    await eventually(condition)


@pytest.fixture(autouse=True)
def no_complaints(pair: Pair) -> Any:
    """Fail a test of which a server or a client complains, or that ends one."""
    before = len(pair.complaints())
    yield
    assert pair.complaints()[before:] == []
    assert all(server.is_running for server in pair.world.servers)
    assert all(client.is_running for client in pair.world.clients)


# -- events


async def test_events_reach_clients_of_all_servers(pair: Pair) -> None:
    for client in (pair.one, pair.two):
        await client.do("subscribe", name="news")

        async def is_subscribed() -> bool:
            await pair.peer.events.emit("news", "first")
            return bool(await client.do("events"))  # noqa: B023 # called before the next round

        await eventually(is_subscribed)
    for data in DATA:
        assert await pair.peer.events.emit("news", data) == 2
    for client in (pair.one, pair.two):
        got = await heard(client, "news", len(DATA))
        assert got[-len(DATA) :] == DATA
        assert set(map(str, got[: -len(DATA)])) == {"first"}
        await client.do("unsubscribe", name="news")


async def test_events_of_clients_reach_the_peer(pair: Pair) -> None:
    async with pair.peer.events.listen("talk/*") as listening:
        await pair.peer.when_ready()
        await pair.one.do("emit", name="other", data=1)
        for data in DATA:
            await pair.one.do("emit", name="talk/1", data=data)
        got = [await anext(listening) for _ in DATA]
    assert got == [Event("talk/1", data, "js-1") for data in DATA]
    await pair.two.do("emit", name="talk/1")
    assert [event async for event in listening] == []


async def test_events_of_a_peer_reach_its_own_listeners_and_other_peers(pair: Pair) -> None:
    other = await pair.world.peer("py-2")
    mine, theirs = pair.peer.events.listen("p?er"), other.events.listen("peer")
    await other.when_ready()
    await pair.peer.when_ready()
    await pair.peer.events.emit("peeer")
    await pair.peer.events.emit("peer", [1])
    for listening in (mine, theirs):
        assert await anext(listening) == Event("peer", [1], "py-1")
        listening.close()
    await other.close()


@pytest.mark.parametrize(
    ("overflow", "kept"), [("drop_oldest", [3, 4]), ("drop_newest", [0, 1]), ("disconnect", None)]
)
async def test_an_overflow_is_told(
    pair: Pair, overflow: Any, kept: list[int] | None, caplog: pytest.LogCaptureFixture
) -> None:
    listening = pair.peer.events.listen("many", max_pending=2, overflow=overflow)
    for number in range(5):
        await pair.peer.events.emit("many", number)
    assert "events of 'many' are dropped: 2 wait already" in caplog.text
    if kept is None:
        assert [(await anext(listening)).data for _ in range(2)] == [0, 1]
        with pytest.raises(Overloaded, match="2 events of 'many'"):
            await anext(listening)
    else:
        assert [(await anext(listening)).data for _ in range(2)] == kept
        assert listening.dropped == 3
    listening.close()
    assert [event async for event in listening] == []


async def test_an_iterator_that_is_dropped_ends(pair: Pair) -> None:
    """Without a call of close, and with the subscription at the next message."""
    listening: Any = pair.peer.events.listen("dropped/*")
    await pair.peer.when_ready()
    assert pair.peer.stats()["listening"] == 1
    topics = pair.peer.node.stats()["topics"]
    del listening

    async def has_ended() -> bool:
        gc.collect()
        await pair.one.do("emit", name="dropped/1", data=1)
        return bool(pair.peer.node.stats()["topics"] == topics - 1)

    await eventually(has_ended)
    assert pair.peer.stats()["listening"] == 0


async def test_bad_events_are_refused_at_the_call(pair: Pair) -> None:
    for name in ("", None, 5):
        with pytest.raises(MessageError, match="name of an event"):
            await pair.peer.events.emit(name, 1)  # type: ignore[arg-type]
    nested = {"a": [msgspec.Raw(b"{")]}
    for data in (object(), {1, object()}, msgspec.Raw(b"{"), msgspec.Raw(b""), nested):
        with pytest.raises(MessageError, match="emit 'news': the data"):
            await pair.peer.events.emit("news", data)
    for arguments in (
        {"pattern": ""},
        {"pattern": "a", "max_pending": 0},
        {"pattern": 1},
        {"pattern": "\ud800*"},
    ):
        with pytest.raises(UsageError, match="listen"):
            pair.peer.events.listen(**arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="overflow must be one of"):
        pair.peer.events.listen("a", overflow="never")  # type: ignore[arg-type]


async def test_a_damaged_event_is_counted(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    async with dscache.MessageNode.from_config(pair.world.config, server_name="bad") as node:
        listening = pair.peer.events.listen("quiet/*")
        await pair.peer.when_ready()
        # No server has a client that is subscribed to it.
        bad = [{"data": "{"}, {"data": 5}]
        for fields in bad:
            raw = json.dumps({"topic": 4, "action": 2, "name": "quiet/1", **fields}).encode()
            text = b'{"fromServer":"bad","message":' + raw + b"}"
            pair.world.publish(4, text)
        await node.send({"topic": 4, "action": 2, "name": "quiet/1", "data": "7"})
        assert (await anext(listening)).data == 7
        assert pair.peer.stats()["events_damaged"] >= 2
        listening.close()
    assert "an event was ignored" in caplog.text


# -- records


async def test_writes_are_told_to_open_records(pair: Pair) -> None:
    name = "live/1"
    for client in (pair.one, pair.two):
        assert await client.do("open", name=name) == [0, {}]
    record = await pair.peer.records.set(name, {"n": 1})
    assert (record.version, record.data) == (1, {"n": 1})
    for client in (pair.one, pair.two):
        await shows(client, name, [1, {"n": 1}])
    await pair.peer.records.patch(name, "a.b[1]", "x")
    await pair.peer.records.update(name, lambda data: {**data, "n": 2})
    for client in (pair.one, pair.two):
        await shows(client, name, [3, {"n": 2, "a": {"b": [None, "x"]}}])
    assert await pair.two.do("set", name=name, path="n", data=5) == 4
    found = await pair.peer.records.get(name)
    assert found is not None
    assert (found.version, found.data["n"]) == (4, 5)
    await shows(pair.one, name, [4, found.data])
    assert len(await pair.one.do("changes", name=name)) >= 4


async def test_what_changes_nothing_tells_nothing(pair: Pair) -> None:
    peer = pair.peer
    await peer.records.set("same", {"n": 1})
    before = peer.stats()["records_written"]
    assert (await peer.records.patch("same", "n", 1)).version == 1
    assert await peer.records.update("same", lambda _: dscache.KEEP) is not None
    with pytest.raises(ZeroDivisionError):
        await peer.records.update("same", lambda data: 1 / 0)
    with pytest.raises(RecordMissing):
        await peer.records.update("absent", lambda data: data)
    with pytest.raises(RecordMissing):
        await peer.records.patch("absent", "a", 1)
    assert peer.stats()["records_written"] == before
    assert (await peer.records.patch("patched", "a", 1, default={})).data == {"a": 1}
    assert (await peer.records.patch("patched", "a")).data == {}
    assert (await peer.records.patch("again", "a", default={})).data == {}


@pytest.mark.parametrize("way", ["delete", "update"])
async def test_a_deletion_is_told_and_later_writes_arent_lost(pair: Pair, way: str) -> None:
    name = f"gone/{way}"
    await pair.one.do("set", name=name, data={"n": 1})
    await pair.two.do("open", name=name)
    if way == "delete":
        assert await pair.peer.records.delete(name) is True
    else:
        assert await pair.peer.records.update(name, lambda _: dscache.DELETE) is None
    for client in (pair.one, pair.two):
        await shows(client, name, None)
    assert await pair.peer.records.get(name) is None
    assert await pair.peer.records.delete(name) is False
    await pair.one.do("set", name=name, data={"n": 2})
    found = await pair.peer.records.get(name)
    assert found is not None
    assert found.data == {"n": 2}


async def test_an_expiry_is_told(pair: Pair) -> None:
    await pair.one.do("open", name="brief")
    await pair.peer.records.set("brief", {"n": 1}, ttl=timedelta(seconds=1))
    await shows(pair.one, "brief", [1, {"n": 1}])
    await shows(pair.one, "brief", None)
    # One that was written again in the meantime has not expired.
    await pair.one.do("open", name="renewed")
    before = pair.peer.stats()["records_expired"]
    await pair.peer.records.set("renewed", {"n": 1}, ttl=1)
    await pair.peer.records.set("renewed", {"n": 2}, ttl=0)
    await asyncio.sleep(1.3)
    assert pair.peer.stats()["records_expired"] == before
    assert await pair.one.do("get", name="renewed") == [2, {"n": 2}]


async def test_records_of_a_hot_path_stay_at_version_0(pair: Pair) -> None:
    # Servers don't acknowledge such a write.
    await pair.one.do("putData", name="hot/1", data={"n": 0})

    async def is_written() -> bool:
        return await pair.peer.records.get("hot/1") is not None

    await eventually(is_written)
    await pair.two.do("open", name="hot/1")
    for number in (1, 2):
        assert (await pair.peer.records.set("hot/1", {"n": number})).version == 0
        await shows(pair.two, "hot/1", [0, {"n": number}])
    await pair.one.do("putData", name="hot/1", data={"n": 3})

    async def is_written_again() -> bool:
        found = await pair.peer.records.get("hot/1")
        return found is not None and (found.version, found.data) == (0, {"n": 3})

    await eventually(is_written_again)
    for operation in (
        pair.peer.records.update("hot/1", lambda data: data),
        pair.peer.records.patch("hot/1", "n", 1),
    ):
        with pytest.raises(UsageError, match="storageHotPathPrefixes"):
            await operation


@pytest.mark.parametrize("data", [None, 0, "text", True, 1.5, msgspec.Raw(b" 7")])
async def test_data_that_servers_take_for_missing_is_refused(pair: Pair, data: Any) -> None:
    with pytest.raises(RecordError, match="objects or arrays"):
        await pair.peer.records.set("bad", data)
    with pytest.raises(RecordError, match="objects or arrays"):
        await pair.peer.records.update("bad", lambda _: data, default={})
    assert await pair.peer.records.get("bad") is None
    with pytest.raises(RecordError):
        await pair.peer.records.set("", {})


async def test_a_nested_text_that_is_no_json_is_refused(pair: Pair) -> None:
    """It would end the server that reads it."""
    for data in ({"a": msgspec.Raw(b"{")}, [msgspec.Raw(b"1 2")]):
        with pytest.raises(RecordError, match=r"msgspec\.Raw in its data isn't JSON"):
            await pair.peer.records.set("nested", data)
        with pytest.raises(RecordError, match=r"msgspec\.Raw"):
            await pair.peer.records.update("nested", lambda _: data, default={})  # noqa: B023
    assert await pair.peer.records.get("nested") is None
    assert (await pair.peer.records.set("nested", {"a": msgspec.Raw(b" 1 ")})).data == {"a": 1}


async def test_writes_of_python_and_javascript_end_equal(pair: Pair) -> None:
    """Each write takes part in a count, which is right only if none was lost."""
    name = "count"
    other = await pair.world.peer("py-2")
    await pair.one.do("set", name=name, data={"n": 0})
    await pair.two.do("open", name=name)

    async def count(peer: Peer) -> None:
        for _ in range(20):
            await peer.records.update(name, lambda data: {**data, "n": data["n"] + 1})

    await asyncio.gather(count(pair.peer), count(other))
    found = await pair.peer.records.get(name)
    assert found is not None
    assert found.data == {"n": 40}
    for client in (pair.one, pair.two):
        await shows(client, name, [found.version, found.data])
    await other.close()


async def test_notify_tells_writes_of_others(pair: Pair) -> None:
    await pair.one.do("open", name="elsewhere")
    await pair.peer.cache.set("elsewhere", 7, {"n": 7})
    await pair.peer.records.notify(["elsewhere", "closed"])
    await shows(pair.one, "elsewhere", [7, {"n": 7}])
    await pair.peer.cache.delete("elsewhere")
    await pair.peer.records.notify("elsewhere")
    await shows(pair.one, "elsewhere", None)
    with pytest.raises(RecordError):
        await pair.peer.records.notify([""])


async def test_a_write_that_was_never_told_is_seen_with_the_next_one(pair: Pair) -> None:
    """As a peer leaves it that dies between the write and the message."""
    for client in (pair.one, pair.two):
        assert await client.do("open", name="untold") == [0, {}]
    await pair.peer.cache.update("untold", lambda data: {**data, "a": 1})
    late = await pair.world.client(pair.world.servers[0], "late")
    assert await late.do("open", name="untold") == [1, {"a": 1}]
    assert (await pair.peer.records.patch("untold", "b", 2)).version == 2
    for client in (pair.one, pair.two, late):
        await shows(client, "untold", [2, {"a": 1, "b": 2}])
    await late.stop()
    pair.world.clients.remove(late)


async def test_messages_that_cross_are_reconciled(pair: Pair) -> None:
    """A late message takes clients back to an old version; the servers read the record again."""
    await pair.one.do("set", name="crossed", data={"n": 1})
    await pair.two.do("open", name="crossed")
    await pair.peer.records.set("crossed", {"n": 2})
    async with dscache.MessageNode.from_config(pair.world.config, server_name="late") as node:
        late = protocol.Update(name="crossed", version=1, data='{"n":1}')
        await node.send(late)
        await shows(pair.two, "crossed", [1, {"n": 1}])
    for client in (pair.one, pair.two):
        await shows(client, "crossed", [2, {"n": 2}])


# -- changes


async def test_changes_are_reported_once(pair: Pair) -> None:
    changes = pair.peer.records.changes("chg/*")
    async with changes:
        await pair.peer.when_ready()
        await pair.peer.records.set("other/1", {})
        await pair.one.do("set", name="chg/1", data={"n": 1})
        await pair.one.do("set", name="chg/1", path="n", data=2)
        await pair.two.do("set", name="chg/1", data={"n": 3})
        await pair.peer.records.set("chg/1", {"n": 4})
        await pair.peer.records.delete("chg/1")
        await pair.peer.records.set("chg/2", {"end": True})
        got = []
        async with asyncio.timeout(30):
            async for change in changes:
                got.append(change)
                if change.name == "chg/2":
                    break
        versions = [change.version for change in got if change.name == "chg/1" and change.version]
        assert versions == sorted(set(versions))
        assert got[-2].kind == "deleted"
        assert got[-1].data == {"end": True}
        # Nothing comes twice, from neither source.
        await asyncio.sleep(1.5)
        await pair.peer.records.set("chg/3", {})
        assert (await anext(changes)).name == "chg/3"
    assert [change async for change in changes] == []


async def test_changes_of_servers_messages_come_with_their_sender(pair: Pair) -> None:
    """A server's message is faster than Redis's report, or at least merged with it."""
    async with pair.peer.records.changes("quick/1") as changes:
        await pair.peer.when_ready()
        await pair.one.do("set", name="quick/1", data={"n": 0})
        last = 0
        for number in range(1, 30):
            await pair.one.do("put", name="quick/1", data={"n": number})
        senders = set()
        while last < 29:
            change = await anext(changes)
            if change.data:
                assert change.data["n"] >= last
                last = change.data["n"]
            senders.add(change.sender)
        assert senders <= {None, "js-1"}


async def test_a_false_version_of_a_message_is_corrected(pair: Pair) -> None:
    await pair.peer.records.set("false/1", {"n": 1})
    async with pair.peer.records.changes("false/1") as changes:
        await pair.peer.when_ready()
        await pair.peer.records.set("false/1", {"n": 2})
        assert (await anext(changes)).version == 2
        async with dscache.MessageNode.from_config(pair.world.config, server_name="lie") as node:
            await node.send(protocol.Update(name="false/1", version=9, data='{"n":9}'))
            change = await anext(changes)
            assert (change.version, change.sender) == (9, "lie")
        change = await anext(changes)
        assert (change.version, change.data, change.sender) == (2, {"n": 2}, None)


async def test_closed_changes_are_freed_at_once(pair: Pair) -> None:
    """With the buffers of their connection, which no garbage collection needs to find."""
    gc.disable()
    try:
        changes: Any = pair.peer.records.changes("freed/*")
        async with changes:
            await pair.peer.records.set("freed/1", {})
            assert (await anext(changes)).name == "freed/1"
        freed = weakref.ref(changes)
        del changes
        await asyncio.sleep(0)
        assert freed() is None
    finally:
        gc.enable()


async def test_bad_arguments_of_changes(pair: Pair) -> None:
    for arguments in (
        {"pattern": ""},
        {"pattern": "a", "max_pending": 0},
        {"pattern": "a\ud800?"},
    ):
        with pytest.raises(UsageError, match="changes"):
            pair.peer.records.changes(**arguments)  # type: ignore[arg-type]


# -- lists


async def test_lists_are_those_of_the_client(pair: Pair) -> None:
    lists = pair.peer.lists
    assert await lists.entries("team") == []
    assert await pair.one.do("list", name="team") == []
    assert await lists.add("team", "user/1") == ["user/1"]
    assert await lists.add("team", "user/2", index=0) == ["user/2", "user/1"]
    assert await lists.add("team", "user/2") == ["user/2", "user/1"]

    async def condition() -> bool:
        return bool(await pair.one.do("list", name="team") == ["user/2", "user/1"])

    await eventually(condition)
    await pair.one.do("addEntry", name="team", entry="user/3")

    async def arrived() -> bool:
        return await lists.entries("team") == ["user/2", "user/1", "user/3"]

    await eventually(arrived)
    assert await lists.remove("team", "user/1") == ["user/2", "user/3"]
    assert await lists.remove("team", "user/9") == ["user/2", "user/3"]
    assert await lists.add("team", "user/2", unique=False) == ["user/2", "user/3", "user/2"]
    assert (await lists.set("team", ["a"])).data == ["a"]
    with pytest.raises(UsageError, match="index must be an int from 0 to 1"):
        await lists.add("team", "b", index=5)
    for operation in (lists.add("team", 5), lists.remove("team", None), lists.set("team", [1])):  # type: ignore[arg-type, list-item]
        with pytest.raises(UsageError, match="entry must be a text"):
            await operation
    await pair.peer.records.set("nolist", {"a": 1})
    with pytest.raises(RecordError, match="isn't a list"):
        await lists.add("nolist", "a")


# -- remote procedure calls


async def test_clients_call_python(pair: Pair) -> None:
    async def later(data: Any) -> Any:
        await asyncio.sleep(0.01)
        return {"got": data}

    ends = [
        pair.peer.rpc.provide("py/add", lambda data: data["a"] + data["b"]),
        pair.peer.rpc.provide("py/later", later),
        pair.peer.rpc.provide("py/slow", slow := (lambda data: asyncio.sleep(data, "done"))),
    ]
    assert callable(slow)
    await settled(pair)
    for client in (pair.one, pair.two):
        assert await client.do("make", name="py/add", data={"a": 1, "b": 2}) == {"result": 3}
        for data in DATA:
            made = await client.do("make", name="py/later", data=data)
            assert made == {"result": {"got": data}}
        # Longer than ackTimeout: it must be accepted.
        assert await client.do("make", name="py/slow", data=0.9) == {"result": "done"}
    # Longer than responseTimeout: the server gives up, and gets no response later.
    assert await pair.one.do("make", name="py/slow", data=2.5) == {"error": "RESPONSE_TIMEOUT"}
    for end in ends:
        end()
    await settled(pair)
    assert await pair.two.do("make", name="py/add", data={}) == {"error": "NO_RPC_PROVIDER"}


async def settled(pair: Pair) -> None:
    """Wait until both servers have taken every message of this process so far."""
    name = f"py/settle/{uuid.uuid4().hex}"
    end = pair.peer.rpc.provide(name, lambda data: data)
    for client in (pair.one, pair.two):

        async def is_known(client: Client = client) -> bool:
            return bool(await client.do("make", name=name, data=1) == {"result": 1})

        await eventually(is_known)
    end()


async def test_failures_of_python_are_told(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    def fail(data: Any) -> Any:
        if data == "own":
            raise RPCError("no", data={"code": 7})
        if data == "unsendable":
            return object()
        raise KeyError("a secret of the server")

    async def fail_later(data: Any) -> Any:
        await asyncio.sleep(0.3)
        raise Reject

    ends = [
        pair.peer.rpc.provide("py/fail", fail),
        pair.peer.rpc.provide("py/fail-later", fail_later),
    ]
    await settled(pair)
    made = await pair.one.do("make", name="py/fail", data="own")
    assert made == {"error": {"code": 7}}
    made = await pair.one.do("make", name="py/fail", data=1)
    assert made == {"error": "py/fail failed: KeyError"}
    made = await pair.one.do("make", name="py/fail", data="unsendable")
    assert made == {"error": "py/fail failed: MessageError"}
    made = await pair.one.do("make", name="py/fail-later", data=1)
    assert made == {"error": "py/fail-later was rejected too late"}
    assert "the handler of RPC 'py/fail' failed" in caplog.text
    for end in ends:
        end()


async def test_a_rejected_request_goes_to_another_provider(pair: Pair) -> None:
    other = await pair.world.peer("py-2")

    def reject(data: Any) -> Any:
        raise Reject

    async def reject_soon(data: Any) -> Any:
        await asyncio.sleep(0.01)
        raise Reject

    ends = [
        pair.peer.rpc.provide("py/choice", reject),
        other.rpc.provide("py/choice", lambda data: "chosen"),
        pair.peer.rpc.provide("py/busy", reject_soon),
    ]
    await settled(pair)
    for _ in range(6):
        assert await pair.one.do("make", name="py/choice", data=1) == {"result": "chosen"}
        assert await other.rpc.make("py/choice") == "chosen"
        assert await pair.peer.rpc.make("py/choice") == "chosen"
    assert await pair.two.do("make", name="py/busy", data=1) == {"error": "NO_RPC_PROVIDER"}
    with pytest.raises(RPCError, match="each has rejected") as raised:
        await other.rpc.make("py/busy")
    assert raised.value.reason == "NO_RPC_PROVIDER"
    for end in ends:
        end()
    await other.close()


async def test_no_more_requests_than_max_running(pair: Pair) -> None:
    gate, began = asyncio.Event(), asyncio.Event()

    async def wait(data: Any) -> Any:
        began.set()
        await gate.wait()
        return data

    end = pair.peer.rpc.provide("py/few", wait, max_running=1)
    await settled(pair)
    first = asyncio.create_task(pair.one.do("make", name="py/few", data=1))
    await began.wait()
    made = await pair.two.do("make", name="py/few", data=2)
    assert made == {"error": "NO_RPC_PROVIDER"}
    gate.set()
    assert await first == {"result": 1}
    end()


async def test_python_calls_clients(pair: Pair) -> None:
    for kind in ("add", "echo", "reject", "error", "deaf", "silent"):
        await pair.two.do("provide", name=f"js/{kind}", kind=kind)
    make = pair.peer.rpc.make
    await provided(pair.peer, "js/silent")
    assert await make("js/add", {"a": 1, "b": 2}) == 3
    for data in DATA:
        assert await make("js/echo", data) == data
    with pytest.raises(RPCError) as failed:
        await make("js/error", [1])
    assert (failed.value.reason, failed.value.data) == ("REQUEST_ERROR", {"why": [1]})
    with pytest.raises(RPCError, match="each has rejected") as failed:
        await make("js/reject")
    assert failed.value.reason == "NO_RPC_PROVIDER"
    with pytest.raises(RPCTimeout) as late:
        await make("js/deaf")
    assert late.value.reason == "ACCEPT_TIMEOUT"
    with pytest.raises(RPCTimeout) as late:
        await make("js/silent", timeout=30)
    assert late.value.reason == "RESPONSE_TIMEOUT"
    with pytest.raises(RPCTimeout, match=r"no response within 0\.2 s"):
        await make("js/silent", timeout=0.2)
    await pair.two.do("unprovide", name="js/add")

    async def has_ended() -> bool:
        try:
            await make("js/add", {"a": 1, "b": 2})
        except RPCError as error:
            return error.reason == "NO_RPC_PROVIDER"
        return False

    await eventually(has_ended)
    # The server's own time is over now, so that its answers belong to no other call.
    await asyncio.sleep(1.6)


async def test_bad_arguments_of_rpcs(pair: Pair) -> None:
    rpc = pair.peer.rpc
    end = rpc.provide("py/once", lambda data: data)
    with pytest.raises(UsageError, match="provides 'py/once' already"):
        rpc.provide("py/once", lambda data: data)
    for name in ("", None, "\ud800"):
        with pytest.raises(UsageError, match="name"):
            rpc.provide(name, lambda data: data)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="name"):
            await rpc.make(name)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="handler must be callable"):
        rpc.provide("py/x", 5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_running"):
        rpc.provide("py/x", lambda data: data, max_running=0)
    for seconds in (0, -1, "1", True, math.nan):
        with pytest.raises(UsageError, match="timeout must be"):
            await rpc.make("py/once", timeout=seconds)  # type: ignore[arg-type]
    with pytest.raises(MessageError, match="data of the RPC"):
        await rpc.make("py/once", object())
    assert await rpc.make("py/once", {"a": 1}) == {"a": 1}
    end()
    end()


# -- presence


async def test_presence_is_that_of_all_servers(pair: Pair) -> None:
    assert await pair.peer.presence.users() == {"ada", "bob"}
    third = await pair.world.client(pair.world.servers[1], "eve")

    async def is_there() -> bool:
        return await pair.peer.presence.is_online("eve")

    await eventually(is_there)
    await third.stop()
    pair.world.clients.remove(third)

    async def has_left() -> bool:
        return await pair.peer.presence.users() == {"ada", "bob"}

    await eventually(has_left)
    assert not await pair.peer.presence.is_online("py-1")


async def test_users_come_and_go(pair: Pair) -> None:
    """A user with a client at each server goes with the last one."""
    await pair.peer.presence.users()
    async with pair.peer.presence.changes() as changes:
        first = await pair.world.client(pair.world.servers[0], "mia")
        assert await anext(changes) == PresenceChange("mia", is_online=True)
        second = await pair.world.client(pair.world.servers[1], "mia")
        other = await pair.world.client(pair.world.servers[1], "tom")
        assert await anext(changes) == PresenceChange("tom", is_online=True)
        await first.stop()
        await other.stop()
        assert await anext(changes) == PresenceChange("tom", is_online=False)
        assert await pair.peer.presence.is_online("mia")
        await second.stop()
        assert await anext(changes) == PresenceChange("mia", is_online=False)
        busy = asyncio.create_task(anext(changes))
        await asyncio.sleep(0)
        with pytest.raises(UsageError, match=r"call changes\(\) once per consumer"):
            await anext(changes)
        changes.close()
        with pytest.raises(StopAsyncIteration):
            await busy
    for client in (first, second, other):
        pair.world.clients.remove(client)
    assert await pair.peer.presence.users() == {"ada", "bob"}
    with pytest.raises(UsageError, match="user must be a text, not 5"):
        await pair.peer.presence.is_online(5)  # type: ignore[arg-type]


async def test_a_change_of_presence_that_was_undone_is_not_reported(pair: Pair) -> None:
    await pair.peer.presence.users()
    changes = pair.peer.presence.changes()
    for user in ("zoe", "max"):
        client = await pair.world.client(pair.world.servers[0], user)

        async def is_there(user: str = user) -> bool:
            return await pair.peer.presence.is_online(user)

        await eventually(is_there)
        if user == "zoe":
            await client.stop()
            pair.world.clients.remove(client)

            async def has_left() -> bool:
                return not await pair.peer.presence.is_online("zoe")

            await eventually(has_left)
    assert await anext(changes) == PresenceChange("max", is_online=True)
    await client.stop()
    pair.world.clients.remove(client)
    assert await anext(changes) == PresenceChange("max", is_online=False)
    changes.close()
    assert [change async for change in changes] == []


# -- the cluster


async def test_no_peer_is_elected_leader(pair: Pair) -> None:
    others = [await pair.world.peer(f"py-{number}") for number in (3, 4)]

    async def are_known() -> bool:
        _, members = await pair.world.servers[0].leader()
        return {"py-1", "py-3", "py-4"} <= set(members)

    await eventually(are_known)
    for server in pair.world.servers:
        leader, _ = await server.leader()
        assert leader in ("js-1", "js-2")
    for peer in others:
        await peer.close()

    async def have_left() -> bool:
        _, members = await pair.world.servers[0].leader()
        return set(members) == {"js-1", "js-2", "py-1"}

    await eventually(have_left)


async def test_the_messages_of_real_servers_pass_the_check(pair: Pair) -> None:
    with pair.world.tap() as tap:
        await pair.one.do("set", name="tapped", data={"n": 1})
        await pair.one.do("set", name="tapped", path="a", data=1)
        await pair.one.do("emit", name="tapped", data={"n": 1})
        await pair.one.do("emit", name="tapped")
        end = pair.peer.rpc.provide("py/tapped", lambda data: data)
        await settled(pair)
        await pair.one.do("make", name="py/tapped", data=1)
        await pair.two.do("provide", name="js/tapped", kind="add")

        async def is_provided() -> bool:
            made = await pair.one.do("make", name="js/tapped", data={"a": 1, "b": 2})
            return bool(made == {"result": 3})

        await eventually(is_provided)
        await pair.one.do("delete", name="tapped")
        end()
        await asyncio.sleep(1.2)
        messages = tap()
    seen = set()
    for sender, message in messages:
        seen.add((sender[:2], message["topic"], message["action"]))
        if message["topic"] == protocol.Topic.CLUSTER and sender.startswith("js"):
            assert message["leaderScore"] > 0
            continue
        check(message)
    assert {("js", 4, 2), ("js", 5, 18), ("js", 5, 19), ("js", 5, 13), ("js", 6, 2)} <= seen
    assert {("py", 6, 5), ("py", 9, 2), ("py", 11, 2), ("js", 11, 6), ("js", 6, 5)} <= seen
    # Python takes part in no election, and grants or requests no lock.
    assert not [one for one in messages if one[0] == "py-1" and one[1]["topic"] == 10]


# -- the peer


async def test_a_peer_of_bad_configuration() -> None:
    redis = {"name": "redis", "options": {"host": "127.0.0.1", "port": 1}}
    with pytest.raises(ConfigError, match="clusterNode"):
        Peer.from_config({"cache": redis, "record": {}})
    both = {"cache": redis, "clusterNode": redis}
    for more, text in (
        ({"record": {"storageHotPathPrefixes": "a"}}, "record.storageHotPathPrefixes: must be"),
        ({"record": {"storageHotPathPrefixes": [1]}}, r"storageHotPathPrefixes\[0\]: must be"),
        ({"rpc": {"ackTimeout": "soon"}}, "rpc.ackTimeout: must be a number of milliseconds"),
        ({"rpc": []}, "rpc: must be a mapping"),
    ):
        with pytest.raises(ConfigError, match=text):
            Peer.from_config({**both, **more})
    peer = Peer.from_config({**both, "serverName": "theirs"})
    assert peer.server_name != "theirs"
    with pytest.raises(UsageError, match="async with"):
        peer.events.listen("a")
    assert not peer.is_ready
    await peer.close()
    with pytest.raises(dscache.UsageError):
        await peer.when_ready()


@pytest.mark.parametrize("source", ["redis://h:7000/2", "h:7000", {"host": "h", "port": 7000}])
async def test_options_by_keyword(source: Any) -> None:
    """Each goes to the connection that has it."""
    peer = Peer.from_config(
        source,
        server_name="py",
        commandTimeout=200,
        connect_timeout=300,
        keyPrefix="live/",
        overflow="disconnect",
        ttl=60,
    )
    for options in (peer.cache.config.options, peer.node.config.options):
        assert (options.host, options.port) == ("h", 7000)
        assert (options.command_timeout, options.connect_timeout) == (200, 300)
    assert (peer.cache.config.options.key_prefix, peer.cache.config.options.ttl) == ("live/", 60)
    assert (peer.node.config.options.key_prefix, peer.node.config.options.ttl) == ("", None)
    assert peer.node.config.options.overflow == "disconnect"
    await peer.close()
    with pytest.raises(ConfigError, match=r'arguments: prot: unknown option, did you mean "port"'):
        Peer.from_config(source, prot=1)
    with pytest.raises(ConfigError, match="arguments: ttl: must be"):
        Peer.from_config(source, ttl=-1)


async def test_a_peer_by_a_url(pair: Pair) -> None:
    url = pair.world.redis.url
    async with Peer.from_config(url, server_name="py-url", near_cache=True) as peer:
        record = await peer.records.set("by/url", {"n": 1})
        await pair.one.do("open", name="by/url")
        await shows(pair.one, "by/url", [record.version, {"n": 1}])


async def test_state_of_a_peer(pair: Pair) -> None:
    assert pair.peer.is_ready
    assert set(pair.peer.servers) >= {"js-1", "js-2"}
    assert "py-1" in repr(pair.peer)
    assert "py-1" in pair.peer.description
    stats = pair.peer.stats()
    assert stats["records_untold"] == 0
    assert stats["servers"] >= 2
