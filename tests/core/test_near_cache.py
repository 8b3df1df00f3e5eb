"""The near cache alone, on both cores: bytes in, bytes out, and no socket.

One section for each of its rules. ``test_near_model.py`` covers random operations, and
``test_near_live.py`` real servers.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count, product
from types import FrameType
from typing import Any

import pytest

from dscache.core import constants as c
from dscache.core import near_parts, pure
from dscache.core.near_parts import BulkRead
from dscache.core.resp import Encoder
from dscache.errors import (
    BulkError,
    ConnectionLost,
    DeadlineExceeded,
    DscacheError,
    Overloaded,
    ProtocolError,
    RecordError,
    ReplyError,
)
from tests.support.near_wire import FOREVER, Call, NearExchange, Promise, size_of, table_of
from tests.support.wire import (
    CORES,
    NOPERM,
    ClusterExchange,
    Exchange,
    Operation,
    Push,
    Refusal,
    commands,
    plain,
    resp,
)

PATIENCE = 60


@pytest.fixture(params=CORES)
def core(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def near(core: Any) -> NearExchange:
    return NearExchange(core)


def asked(sent: list[list[bytes]]) -> list[bytes]:
    """Return the names whose version keys were read."""
    return [key[:-2] for command in sent if command[0] == b"MGET" for key in command[1::2]]


# -- caching


def test_a_record_is_read_once(near: NearExchange) -> None:
    near.server.write("a", 3, b'{"b":[1]}')
    first = near.get("a")
    assert not first.was_at_hand
    assert near.run() == [[b"MGET", b"a_v", b"a_d"]]
    second = near.get("a")
    assert second.was_at_hand
    assert near.run() == []
    one, other = first.result(), second.result()
    assert (one.name, one.version, one.raw, one.stale) == ("a", 3, b'{"b":[1]}', False)
    assert one == other
    assert near.count("hits", "misses", "records") == (1, 1, 1)
    near.assert_drained()


def test_each_read_has_a_record_of_its_own(near: NearExchange) -> None:
    """A caller's changes to the decoded data are invisible to other callers."""
    near.server.write("a", 1, b'{"b":[1]}')
    together = [near.get("a") for _ in range(3)]
    near.run()
    later = [near.get("a") for _ in range(2)]
    bulk = [near.issue("get_bulk", ["a"]) for _ in range(2)]
    records = [call.result() for call in (*together, *later)]
    records += [call.result()["a"] for call in bulk]
    for record in records:
        record.data["b"].append(2)
    assert [record.data for record in records] == [{"b": [1, 2]}] * len(records)
    assert len({id(record) for record in records}) == len(records)


def test_misses_are_cached(near: NearExchange) -> None:
    assert near.read("a") is None
    call = near.get("a")
    assert call.was_at_hand
    assert call.result() is None
    assert near.issue("head", "a").result() is None
    assert near.issue("get_bulk", ["a"]).result() == {}
    assert near.issue("head_bulk", ["a"]).result() == {}
    assert near.run() == []
    near.server.write("a", 1, b"1")
    near.arrive()
    assert near.read("a").version == 1


@pytest.mark.parametrize("reply", [[b"3", None], [None, b"1"], [None, None]])
def test_half_a_record_is_cached_as_a_miss(near: NearExchange, reply: list[Any]) -> None:
    call = near.get("a")
    near.take()
    near.reply(reply)
    assert call.result() is None
    assert near.get("a").was_at_hand
    assert near.pipeline.stats()["halves"] == (reply != [None, None])
    near.push(b"a_d")
    assert not near.has("a")


def test_head_is_served_from_a_cached_record(near: NearExchange) -> None:
    near.fill("a", version=7)
    head = near.issue("head", "a")
    assert head.was_at_hand
    assert head.result() == 7
    assert near.issue("head_bulk", ["a"]).result() == {"a": 7}
    assert near.run() == []


def test_a_head_that_misses_caches_nothing(near: NearExchange) -> None:
    near.server.write("a", 7, b"1")
    heads = [near.issue("head", "a"), near.issue("head_bulk", ["a"])]
    sent = near.run()
    assert [command[0] for command in sent] == [b"GET", b"TYPE"] * 2
    assert [call.result() for call in heads] == [7, {"a": 7}]
    assert near.count("misses", "records") == (2, 0)
    assert not near.get("a").was_at_hand


def test_a_bulk_read_is_cached(near: NearExchange) -> None:
    near.server.write("a", 1, b"1")
    near.issue("get_bulk", ["a", "b"])
    near.run()
    assert near.get("a").result().version == 1
    assert near.get("b").was_at_hand
    assert near.run() == []


@pytest.mark.parametrize("method", ["get", "head", "delete"])
@pytest.mark.parametrize("name", [None, 5, b"a", "", "\ud800"])
def test_bad_names_are_refused_at_the_call(near: NearExchange, method: str, name: Any) -> None:
    with pytest.raises(RecordError):
        near.issue(method, name)
    assert near.run() == []
    assert near.stats()["records"] == 0


def test_a_name_of_a_str_subclass_is_the_same_name(near: NearExchange) -> None:
    class Name(str):
        __slots__ = ()

    near.fill("a")
    assert near.read(Name("a")).version == 1
    assert type(near.read(Name("b"))) is type(None)
    assert near.get("b").was_at_hand


# -- invalidations

NAMES = (
    "a",
    "user/1",
    "{tag}/a",
    "{}",
    "}",
    "}x",
    "}{",
    "{{x}}",
    "a{b}c",
    "ä/ö",
    "名",
    "x y",
    "_v",
)
PREFIXES = ("", "app:", "{p}", "ü/")


@pytest.mark.parametrize(
    ("hash_tag", "key_prefix"),
    list(product((False, True), PREFIXES)),
    ids=lambda value: str(value) if isinstance(value, str) else ("tagged" if value else "plain"),
)
def test_a_change_of_either_key_drops_the_record(
    core: Any, hash_tag: bool, key_prefix: str
) -> None:
    near = NearExchange(core, hash_tag=hash_tag, key_prefix=key_prefix)

    def keys_asked_for(name: str) -> list[bytes]:
        assert not near.get(name).was_at_hand
        [[_, *keys]] = near.take()
        near.reply([b"1", b"1"])
        return keys

    keys = {name: keys_asked_for(name) for name in NAMES}
    for name, which in product(NAMES, (0, 1)):
        near.push(keys[name][which])
        at_hand = [other for other in NAMES if near.has(other)]
        assert at_hand == [other for other in NAMES if other != name], keys[name]
        assert keys_asked_for(name) == keys[name]
    assert near.count("records", "invalidations") == (len(NAMES), 2 * len(NAMES))


def test_an_invalidation_may_name_many_keys(near: NearExchange) -> None:
    near.fill(*"abcd")
    near.push(b"a_v", b"b_d", b"b_v", b"nobody_v", b"d_d")
    assert [name for name in "abcd" if near.has(name)] == ["c"]
    assert near.count("invalidations") == (3,)


FOREIGN_KEYS = (
    *(b"", b"_v", b"_d", b"a", b"a_", b"a_x", b"a_V", b"a_v_", b"aa_v", b"_va", b"app:_v"),
    *(b"app:a", b"ap:a_v", b"a_v", b"{a}_v", b"app:{a}_v", b"app:a_v_v", b"app:\xff_v"),
    *(b"app:\xed\xa0\x80_d", b"app:" + b"a" * 100_000 + b"_v", 5, None, 1.5, True, [b"app:a_v"]),
)


@pytest.mark.parametrize("key", FOREIGN_KEYS, ids=lambda key: repr(key)[:20])
def test_foreign_keys_drop_nothing(core: Any, key: Any) -> None:
    near = NearExchange(core, key_prefix="app:")
    near.get("a")
    near.take()
    near.reply([b"1", b"1"])
    near.push(key)
    assert near.get("a").was_at_hand
    tagged = NearExchange(core, key_prefix="app:", hash_tag=True)
    tagged.get("b")
    tagged.take()
    tagged.reply([b"1", b"1"])
    tagged.push(key)
    assert tagged.get("b").was_at_hand
    assert near.count("invalidations") == tagged.count("invalidations") == (0,)


def test_a_flush_of_the_server_drops_everything(near: NearExchange) -> None:
    near.fill(*"abc")
    near.server.flush()
    assert near.has("a")  # no invalidation has arrived
    near.arrive()
    assert not any(map(near.has, "abc"))
    assert near.stats()["flushes"] == {"flushall": 1}
    assert near.read("a") is None
    assert near.has("a")


@pytest.mark.parametrize(
    "push",
    [
        [b"message", b"channel", b"a_v"],
        [b"pmessage", b"*", b"channel", None],
        [b"subscribe", b"__redis__:invalidate", 1],
        [b"tracking-redir-broken", 5],
        [b"invalidated", [b"a_v"]],
        [b"INVALIDATE", [b"a_v"]],
        [b"monitor"],
    ],
    ids=lambda push: push[0].decode(),
)
def test_other_pushes_are_ignored(near: NearExchange, push: list[Any]) -> None:
    near.fill("a")
    near.reply(Push(push))
    assert near.has("a")
    assert near.stats()["flushes"] == {}


@pytest.mark.parametrize(
    "push",
    [
        [b"invalidate"],
        [b"invalidate", b"a_v"],
        [b"invalidate", 5],
        [b"invalidate", {b"a_v": 1}],
        [b"invalidate", [b"a_v"], 1],
        [b"invalidate", None, None],
    ],
    ids=repr,
)
def test_malformed_invalidations_end_the_connection(core: Any, push: list[Any]) -> None:
    near = NearExchange(core, serve_stale=True)
    near.fill("a")
    with pytest.raises(
        ProtocolError, match=r"node.test:6379: unexpected reply to a change of keys"
    ):
        near.reply(Push(push))
    near.lose(retry=False)
    # A connection that broke the protocol isn't trusted for anything.
    assert not near.get("a").was_at_hand


def test_without_a_near_cache_invalidations_are_ignored(core: Any) -> None:
    exchange = Exchange(core)
    exchange.reply(Push([b"invalidate"]), Push([b"invalidate", None]))
    exchange.pipeline.connected(True)
    exchange.pipeline.forget("login")
    [waiter] = exchange.issue(Operation("get", "a"))
    exchange.take()
    exchange.reply(Push([b"invalidate", [b"a_v"]]), [b"1", b"1"])
    assert plain(waiter.result()) == (1, 1)
    exchange.assert_drained()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_invalidations_may_arrive_in_pieces(near: NearExchange, size: int) -> None:
    near.fill(*"ab")
    near.server.write("a", 2, b"2")
    read = near.get("b")
    near.server.write("b", 2, b"2")
    message = near.server.sent
    assert near.has("b")
    for _ in range(0, len(message), size):
        near.arrive(size)
    assert (near.has("a"), near.has("b")) == (False, False)
    assert read.result().version == 1
    assert near.read("a").version == near.read("b").version == 2


def test_a_reply_and_its_invalidation_arrive_together(near: NearExchange) -> None:
    """The reader gets the value that was current; later readers don't."""
    near.server.write("a", 1, b"1")
    call = near.get("a")
    near.send()
    near.server.write("a", 2, b"2")
    near.arrive()
    assert call.result().version == 1
    assert near.read("a").version == 2


# -- own writes

WRITES: dict[str, Callable[[NearExchange], Call]] = {
    "set": lambda near: near.issue("set", "a", 2, 2),
    "ttl": lambda near: near.issue("set", "a", 2, 2, ttl=60),
    "guarded": lambda near: near.issue("set", "a", 2, 2, if_newer=True),
    "delete": lambda near: near.issue("delete", "a"),
    "set_bulk": lambda near: near.issue("set_bulk", {"b": (2, 2), "a": (2, 2)}),
    "guarded_bulk": lambda near: near.issue("set_bulk", {"a": (2, 2), "b": (2, 2)}, if_newer=True),
    "delete_bulk": lambda near: near.issue("delete_bulk", ["b", "a"]),
    "delete_once": lambda near: near.issue("delete_bulk", iter(["b", "a"])),
}


@pytest.fixture(params=WRITES)
def write(request: pytest.FixtureRequest) -> Callable[[NearExchange], Call]:
    return WRITES[request.param]


Write = Callable[[NearExchange], Call]


def test_a_write_drops_the_record_when_it_is_issued(near: NearExchange, write: Write) -> None:
    near.fill("a")
    call = write(near)
    read = near.get("a")
    assert not read.was_at_hand
    near.run()
    call.result()
    known = read.result()
    stored = near.server.values.get(b"a_d")
    assert (known and known.raw) == stored != b"1"
    # The read was issued after the write, so its result is current.
    assert near.has("a")
    near.assert_drained()


def test_a_read_before_a_write_caches_nothing(near: NearExchange, write: Write) -> None:
    """The reply arrives after the write was issued, but reads the state before it."""
    near.server.write("a", 1, b"1")
    before = near.get("a")
    near.send()
    near.arrive(5)
    call = write(near)
    near.arrive()
    assert before.result().version == 1
    assert near.count("dropped_fills", "records") == (1, 0)
    after = near.get("a")
    assert not after.was_at_hand
    near.run()
    call.result()
    known = after.result()
    assert (known and known.raw) == near.server.values.get(b"a_d") != b"1"


def test_a_read_before_a_write_in_one_tick_caches_nothing(near: NearExchange, write: Write) -> None:
    near.server.write("a", 1, b"1")
    before = near.get("a")
    write(near)
    after = near.get("a")
    near.run()
    assert before.result().version == 1
    assert plain(after.result()) != plain(before.result())
    assert near.count("dropped_fills", "joins", "misses") == (1, 0, 2)
    assert plain(near.get("a").result()) == plain(after.result())


def test_bulk_reads_before_a_write_cache_nothing(near: NearExchange, write: Write) -> None:
    near.server.write("a", 1, b"1")
    near.server.write("z", 1, b"1")
    before = near.issue("get_bulk", ["z", "a"])
    near.send()
    write(near)
    near.run()
    assert plain(before.result()) == {"z": (1, 1), "a": (1, 1)}
    assert near.has("z")
    assert not near.has("a")


@pytest.mark.parametrize("sent", [False, True])
@pytest.mark.parametrize(
    "outcome", ["refused", "expired", "lost", "lost_and_retried", "broken", "cancelled"]
)
def test_a_write_drops_the_record_whatever_its_result(
    near: NearExchange, write: Write, outcome: str, sent: bool
) -> None:
    """The record is read again, whether the write took effect or its fate is unknown."""
    near.fill("a")
    call = write(near)
    if outcome == "refused":
        near.server.refused = {b"a_v", b"b_v"}
    if sent:
        near.send()
    assert not near.get("a").was_at_hand
    match outcome:
        case "refused":
            near.run()
            near.server.refused = set()
            assert call.look()
            assert call.error is not None
        case "expired":
            near.pipeline.expire(2 * FOREVER + time.monotonic())
            with pytest.raises(DeadlineExceeded):
                call.result()
        case "cancelled":
            call.cancel()
        case _:
            near.lose(retry=outcome == "lost_and_retried")
            if outcome == "broken":
                near.lose(retry=False)
            near.pipeline.connected(True)
    near.run()
    known = near.read("a")
    assert (known and known.raw) == near.server.values.get(b"a_d")
    near.assert_drained()


def test_a_guarded_write_that_is_not_newer_drops_the_record(near: NearExchange) -> None:
    near.fill("a", version=5)
    call = near.issue("set", "a", 3, 3, if_newer=True)
    assert not near.get("a").was_at_hand
    near.run()
    assert call.result() is False
    assert near.read("a").version == 5


def test_a_write_that_is_refused_at_the_call_changes_nothing(near: NearExchange) -> None:
    near.fill(*"ab")
    flying = near.get("c")
    bad: list[tuple[str, Any]] = [
        ("set", ("a", -1, 1)),
        ("set", ("a", 1, object())),
        ("set", ("", 1, 1)),
        ("set_bulk", ({"a": (1, 1), "b": (1, object())},)),
        ("set_bulk", ([("a", (1, 1))],)),
        ("delete_bulk", ("ab",)),
        ("delete_bulk", (["a", ""],)),
    ]
    for method, (argument, *rest) in bad:
        with pytest.raises(RecordError):
            near.issue(method, argument, *rest)
    for method in ("delete_bulk", "get_bulk", "head_bulk"):
        with pytest.raises(TypeError):
            near.issue(method, 5)
    joined = near.get("c")
    assert near.has("a")
    assert near.has("b")
    assert near.stats()["joins"] == 1
    near.run()
    assert flying.result() is joined.result() is None


def test_a_write_of_another_name_changes_nothing(near: NearExchange) -> None:
    near.fill("a")
    flying = near.get("b")
    near.issue("set", "c", 1, 1)
    assert near.get("a").was_at_hand
    assert not near.get("b").was_at_hand
    assert near.stats()["joins"] == 1
    near.run()
    assert flying.result() is None
    assert near.has("b")


def test_its_own_writes_are_not_cached(near: NearExchange) -> None:
    """Redis doesn't invalidate them until they have been read."""
    near.issue("set", "a", 1, 1)
    near.issue("set_bulk", {"b": (1, 1)})
    near.run()
    assert near.stats()["records"] == 0
    assert not near.has("a")


def test_more_writes_than_are_remembered(near: NearExchange) -> None:
    """Reads issued before them cache nothing then; reads issued after them do."""
    near.server.write("old", 1, b"1")
    near.server.write("a", 1, b"1")
    before = [near.get("old"), near.get("a")]
    near.send()
    for number in range(c.NEAR_FENCES + 1):
        near.issue("set", f"b/{number}", 1, 1)
    near.issue("set", "a", 2, 2)
    for number in range(c.NEAR_FENCES):
        near.issue("delete", f"c/{number}")
    after = [near.get("new"), near.get("b/0")]
    near.run()
    assert [call.result().version for call in before] == [1, 1]
    assert near.stats()["dropped_fills"] == 2
    assert after[1].result().version == 1
    assert near.has("new")
    assert near.has("b/0")
    assert near.read("a").version == 2


def test_an_answered_write_drops_the_record_again(core: Any) -> None:
    """When the slot has moved meanwhile, a read may be cached while the write is in flight."""
    cluster = NearCluster(core)
    name = "{a}"
    slot = cluster.router.slot_of(name)
    cluster.assign(slot, 0)
    written = cluster.issue("set", name, 2, 2)
    [[verb, *_]] = cluster.take(0)
    assert verb == b"MSET"
    cluster.assign(slot, 1)
    cluster.read(name, 1)
    assert cluster.issue("get", name).was_at_hand
    cluster.reply(0, "OK")
    assert written.result() is True
    assert not cluster.issue("get", name).was_at_hand


# -- sharing reads


def test_concurrent_misses_share_one_read(near: NearExchange) -> None:
    near.server.write("a", 1, b"[]")
    calls = [near.get("a") for _ in range(100)]
    assert asked(near.send()) == [b"a"]
    calls += [near.get("a") for _ in range(100)]
    assert near.take() == []
    near.arrive()
    records = [call.result() for call in calls]
    assert len({id(record) for record in records}) == 200
    assert {record.version for record in records} == {1}
    assert near.count("misses", "joins", "hits") == (1, 199, 0)
    assert near.pipeline.stats()["reads"] == 1
    near.assert_drained()


def test_reads_are_not_shared_across_a_write(near: NearExchange, write: Write) -> None:
    near.server.write("a", 1, b"1")
    before = near.get("a")
    near.send()
    write(near)
    after, joined = near.get("a"), near.get("a")
    near.run()
    assert before.result().version == 1
    assert plain(after.result()) == plain(joined.result()) != (1, 1)
    assert near.count("misses", "joins") == (2, 1)


def test_an_old_read_is_not_shared(core: Any) -> None:
    near = NearExchange(core, timeout=0.0)
    near.server.write("a", 1, b"1")
    calls = [near.get("a") for _ in range(3)]
    near.send()
    calls.append(near.get("a"))
    assert asked(near.run()) == [b"a"]
    assert [call.result().version for call in calls] == [1] * 4
    assert near.count("misses", "joins") == (4, 0)


def test_reads_are_not_shared_without_tracking(near: NearExchange) -> None:
    near.lose()
    near.pipeline.connected(False)
    calls = [near.get("a") for _ in range(3)]
    near.run()
    calls.append(near.get("a"))
    near.run()
    assert [call.result() for call in calls] == [None] * 4
    assert near.count("misses", "joins", "records") == (4, 0, 0)


@pytest.mark.parametrize("which", [(0,), (2,), (1,), (0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("sent", [False, True])
def test_cancelling_one_caller_keeps_the_shared_read(
    near: NearExchange, which: tuple[int, ...], sent: bool
) -> None:
    near.server.write("a", 1, b"1")
    calls = [near.get("a") for _ in range(3)]
    if sent:
        near.send()
    for number in which:
        calls[number].cancel()
    late = near.get("a")
    near.run()
    near.arrive()
    for number, call in enumerate(calls):
        assert call.cancelled == (number in which)
        assert call.cancelled or call.result().version == 1
    assert late.result().version == 1
    assert near.count("misses", "joins", "records") == (1, 3, 1)
    near.assert_drained()


@pytest.mark.parametrize("failure", ["refused", "damaged", "expired", "lost", "broken"])
@pytest.mark.parametrize("first_is_cancelled", [False, True])
def test_a_failed_read_fails_for_all_callers_and_caches_nothing(
    near: NearExchange, failure: str, first_is_cancelled: bool
) -> None:
    near.server.write("a", 1, b"1")
    calls = [near.get("a") for _ in range(4)]
    match failure:
        case "refused":
            near.server.refused = {b"a_v"}
            near.run()
        case "damaged":
            near.take()
            near.reply([b"x", b"1"])
    if first_is_cancelled and failure not in ("refused", "damaged"):
        calls.pop(0).cancel()
    match failure:
        case "expired":
            near.send()
            near.pipeline.expire(2 * FOREVER + time.monotonic())
        case "lost" | "broken":
            near.send()
            reason: Exception = ConnectionLost("cut")
            if failure == "broken":
                reason = ProtocolError("nonsense")
            near.server.disconnect()
            near.pipeline.connection_lost(reason, False)
            near.pipeline.connected(True)
    expected = {
        "refused": ReplyError,
        "damaged": RecordError,
        "expired": DeadlineExceeded,
        "lost": ConnectionLost,
        "broken": ProtocolError,
    }[failure]
    errors = []
    for call in calls:
        with pytest.raises(expected, match=r"'a'") as caught:
            call.result()
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == len(calls)
    assert len({str(error) for error in errors}) == 1
    if failure == "refused":
        assert [error.code for error in errors] == ["NOPERM"] * len(calls)
    if failure == "damaged":
        assert [error.name for error in errors] == ["a"] * len(calls)
    assert near.stats()["records"] == 0
    near.server.refused = set()
    near.arrive()
    again = near.get("a")
    assert not again.was_at_hand
    assert near.stats()["joins"] == 3
    near.run()
    assert again.result().version == 1
    assert near.has("a")
    near.assert_drained()


def test_a_bulk_shares_reads_in_flight(near: NearExchange) -> None:
    for name in "abc":
        near.server.write(name, 1, b"[]")
    one = near.get("a")
    bulk = near.issue("get_bulk", list("bamc"))
    other = near.issue("get_bulk", list("cad"))
    reads = [near.get(name) for name in "bd"]
    everything = near.issue("get_bulk", list("dcbam"))
    assert asked(near.run()) == [b"a", b"b", b"m", b"c", b"d"]
    assert list(bulk.result()) == ["b", "a", "c"]
    assert list(other.result()) == ["c", "a"]
    assert list(everything.result()) == ["c", "b", "a"]
    assert [call.result() and call.result().version for call in reads] == [1, None]
    records = [one.result(), reads[0].result(), *bulk.result().values()]
    records += [*other.result().values(), *everything.result().values()]
    assert {record.version for record in records} == {1}
    assert len({id(record) for record in records}) == len(records)
    assert near.count("misses", "joins") == (5, 1 + 2 + 2 + 5)
    near.assert_drained()


def test_a_read_does_not_share_a_head(near: NearExchange) -> None:
    near.server.write("a", 1, b"1")
    head = near.issue("head_bulk", ["a"])
    read = near.get("a")
    heads = [near.issue("head_bulk", ["a"]), near.issue("head", "a")]
    assert [command[0] for command in near.run()].count(b"MGET") == 1
    assert [head.result(), read.result().version] == [{"a": 1}, 1]
    assert [call.result() for call in heads] == [{"a": 1}, 1]
    assert near.stats()["joins"] == 0


def test_bulks_are_not_shared_across_a_write(near: NearExchange, write: Write) -> None:
    near.server.write("a", 1, b"1")
    before = near.issue("get_bulk", ["a", "z"])
    near.send()
    call = write(near)
    after = near.issue("get_bulk", ["z", "a"])
    read = near.get("a")
    near.run()
    call.result()
    assert plain(before.result()) == {"a": (1, 1)}
    stored = near.server.values.get(b"a_d")
    found = after.result().get("a")
    assert (found and found.raw) == stored != b"1"
    assert plain(read.result()) == plain(found)
    assert near.stats()["joins"] == 2  # of z, and of a by the last read


def test_a_long_bulk_is_not_shared(near: NearExchange) -> None:
    names = [f"n/{number}" for number in range(c.NEAR_SHARED + 1)]
    near.issue("get_bulk", names)
    assert near.read(names[0]) is None
    assert near.stats()["joins"] == 0
    assert near.count("misses", "records") == (len(names) + 1, len(names))
    near.lose()
    near.pipeline.connected(True)
    near.issue("get_bulk", names[1:])
    assert near.read(names[1]) is None
    assert near.stats()["joins"] == 1


def test_cancelling_a_bulk_keeps_its_shared_reads(near: NearExchange) -> None:
    near.server.write("a", 1, b"1")
    bulk = near.issue("get_bulk", ["a", "b"])
    read, other = near.get("a"), near.issue("get_bulk", ["b", "a"])
    bulk.cancel()
    near.run()
    assert read.result().version == 1
    assert plain(other.result()) == {"a": (1, 1)}
    near.assert_drained()


def test_a_bulk_fails_for_a_shared_read_that_fails(near: NearExchange) -> None:
    near.server.write("b", 1, b"1")
    near.server.refused = {b"a_v"}
    read = near.get("a")
    bulk, joined = near.issue("get_bulk", ["a", "b"]), near.issue("get_bulk", ["a"])
    near.run()
    with pytest.raises(ReplyError):
        read.result()
    for call, found in ((bulk, ["b"]), (joined, [])):
        with pytest.raises(BulkError, match=r"get_bulk: 1 of the records") as caught:
            call.result()
        assert isinstance(caught.value.errors.pop("a"), ReplyError)
        assert (caught.value.errors, list(caught.value.result)) == ({}, found)
    near.assert_drained()


def test_reads_fail_with_the_bulk_they_share(near: NearExchange) -> None:
    near.server.write("b", 1, b"1")
    near.server.refused = {b"a_v"}
    bulk = near.issue("get_bulk", ["a", "b", "m"])
    reads = [near.get(name) for name in "abm"]
    near.run()
    with pytest.raises(BulkError):
        bulk.result()
    with pytest.raises(ReplyError):
        reads[0].result()
    assert [call.result() and call.result().version for call in reads[1:]] == [1, None]
    assert near.has("b")
    assert not near.has("a")
    bulk = near.issue("get_bulk", ["x", "y"])
    read = near.get("y")
    near.send()
    near.lose(retry=False)
    for call in (bulk, read):
        with pytest.raises(ConnectionLost):
            call.result()
    near.assert_drained()


def test_a_lost_bulk_has_the_results_of_its_shared_reads(near: NearExchange) -> None:
    near.server.write("a", 1, b"1")
    read = near.get("a")
    near.send()
    bulk = near.issue("get_bulk", ["b", "a"])
    near.arrive()
    assert read.look()
    assert not bulk.look()
    near.send()
    near.lose(retry=False)
    with pytest.raises(BulkError) as caught:
        bulk.result()
    assert list(caught.value.errors) == ["b"]
    assert isinstance(caught.value.errors["b"], ConnectionLost)
    assert plain(caught.value.result) == {"a": (1, 1)}


def test_an_error_keeps_its_cause(near: NearExchange) -> None:
    near.lose()
    near.pipeline.down = ConnectionLost("the cable was cut")
    calls = [near.get("a") for _ in range(2)]
    near.pipeline.expire(2 * FOREVER + time.monotonic())
    for call in calls:
        with pytest.raises(DscacheError) as caught:
            call.result()
        assert caught.value.__cause__ is near.pipeline.down


def test_a_retried_read_is_cached(near: NearExchange) -> None:
    near.server.write("a", 1, b"1")
    call = near.get("a")
    near.send()
    near.lose(retry=True)
    near.server.write("a", 2, b"2")
    near.pipeline.connected(True)
    assert asked(near.run()) == [b"a"]
    assert call.result().version == 2
    assert near.has("a")


def test_a_read_refused_by_a_full_pipeline_leaves_no_trace(core: Any) -> None:
    near = NearExchange(core, pipeline={"refuse_when_full": True, "max_pending": 2})
    near.fill("a")
    calls = [near.get("b"), near.get("c")]
    for method in ("get", "head"):
        with pytest.raises(Overloaded):
            near.issue(method, "d")
    with pytest.raises(Overloaded):
        near.issue("get_bulk", ["a", "d"])
    with pytest.raises(Overloaded):
        near.issue("set", "a", 2, 2)
    assert near.get("a").was_at_hand  # a write that was not issued changes nothing
    calls.append(near.get("b"))  # a shared read needs no capacity
    near.run()
    calls.append(near.get("d"))
    near.run()
    assert [call.result() for call in calls] == [None] * 4
    assert near.pipeline.operations == 0


# -- validity


@pytest.mark.parametrize("retry", [False, True])
def test_a_lost_connection_drops_its_records(near: NearExchange, retry: bool) -> None:
    near.fill(*"ab")
    near.lose(retry)
    assert not near.get("a").was_at_hand
    near.pipeline.connected(True)
    assert not near.get("b").was_at_hand
    near.run()
    assert near.get("b").was_at_hand
    assert near.stats()["flushes"] == {"connection": 1}


def test_a_failed_reconnection_drops_nothing(near: NearExchange) -> None:
    near.lose()
    near.lose()
    assert near.stats()["flushes"] == {"connection": 1}


def test_without_tracking_nothing_is_cached(near: NearExchange) -> None:
    near.fill("a")
    near.lose()
    near.pipeline.connected(False)
    assert near.read("a").version == 1
    assert not near.get("a").was_at_hand
    near.pipeline.forget("login")
    near.run()
    assert near.stats()["flushes"] == {"connection": 1}
    near.lose()
    near.pipeline.connected(True)
    assert near.read("a").version == 1
    assert near.get("a").was_at_hand


def test_all_records_may_be_forgotten(near: NearExchange) -> None:
    near.fill(*"ab")
    flying = near.get("c")
    near.send()
    near.pipeline.forget("login")
    assert not near.has("a")
    assert flying.result() is None
    assert near.has("c")
    assert near.read("a").version == 1
    assert near.has("a")
    assert near.stats()["flushes"] == {"login": 1}


def test_reads_are_not_shared_after_a_reset(near: NearExchange) -> None:
    """In a forked child such a read would never be answered."""
    flying = near.get("a")
    near.send()
    near.pipeline.forget("fork")
    near.get("a")
    assert near.stats()["joins"] == 0
    assert asked(near.run()) == [b"a"]
    assert flying.result() is None


# Longer than a busy machine pauses a test between two of its lines.
IDLE_LIMIT = 0.3


def until_not_at_hand(near: NearExchange, name: str) -> Call:
    """Read until the record is no longer served at once; return that read."""
    end = time.monotonic() + PATIENCE
    while (call := near.get(name)).was_at_hand:
        assert time.monotonic() < end, "the record is served for ever"
    return call


def test_a_silent_connection_serves_nothing(core: Any) -> None:
    near = NearExchange(core, idle_limit=IDLE_LIMIT)
    near.fill("a")
    call = until_not_at_hand(near, "a")
    assert near.pipeline.unknown() > IDLE_LIMIT
    near.run()
    assert call.result().version == 1
    assert near.pipeline.unknown() < IDLE_LIMIT
    assert near.get("a").was_at_hand


def test_late_input_does_not_prove_that_nothing_else_changed(core: Any) -> None:
    """More may still arrive, up to the reply to a command sent after the silence."""
    near = NearExchange(core, idle_limit=IDLE_LIMIT)
    near.fill(*"abc")
    near.get("missing")
    near.send()
    early = time.monotonic()
    time.sleep(IDLE_LIMIT)
    assert not near.get("a").was_at_hand
    near.push(b"x_v")
    near.server.write("b", 2, b"2")
    assert not near.get("a").was_at_hand
    # A reply reflects the moment its command was sent, which is equally long ago.
    near.arrive()
    assert not near.get("a").was_at_hand
    assert near.pipeline.unknown() >= time.monotonic() - early - 0.01
    near.run()
    assert near.get("a").was_at_hand
    assert near.get("c").was_at_hand
    assert not near.get("b").was_at_hand


def test_each_reply_proves_the_time_of_its_own_command(core: Any) -> None:
    near = NearExchange(core, idle_limit=IDLE_LIMIT)
    near.fill("a")
    near.get("first")
    near.send()
    of_the_first = len(near.server.sent)
    time.sleep(IDLE_LIMIT)
    second = near.get("a")
    assert not second.was_at_hand
    near.send()
    near.arrive(of_the_first)
    assert not near.get("a").was_at_hand
    assert not second.look()
    near.arrive()
    assert second.result().version == 1
    assert near.get("a").was_at_hand


def test_a_ping_proves_freshness_too(core: Any) -> None:
    near = NearExchange(core, idle_limit=IDLE_LIMIT)
    near.fill("a")
    until_not_at_hand(near, "a").cancel()
    near.pipeline.command("PING")
    near.reply(b"PONG")
    assert near.get("a").was_at_hand


def test_buffered_answers_count_as_well(core: Any) -> None:
    near = NearExchange(core, idle_limit=IDLE_LIMIT)
    near.fill("a")
    until_not_at_hand(near, "a").cancel()
    near.pipeline.command("PING")
    sign = resp(b"PONG")
    near.pipeline.get_buffer(-1)[: len(sign)] = sign
    near.pipeline.buffer_updated(len(sign))
    assert near.get("a").was_at_hand


def test_a_flush_does_not_refresh_a_late_connection(core: Any) -> None:
    near = NearExchange(core, idle_limit=IDLE_LIMIT)
    near.fill("a")
    until_not_at_hand(near, "a").cancel()
    near.reply(Push([b"invalidate", None]))
    assert near.pipeline.unknown() > IDLE_LIMIT


def test_a_record_beyond_its_maximum_age_is_read_again(core: Any) -> None:
    near = NearExchange(core, max_age=0.05, serve_stale=True)
    near.fill("a")
    call = until_not_at_hand(near, "a")
    assert near.stats()["records"] == 0
    near.run()
    assert call.result().version == 1
    # Hits don't renew it.
    call = until_not_at_hand(near, "a")
    near.lose()
    assert not near.get("a").was_at_hand
    near.pipeline.expire(2 * FOREVER + time.monotonic())
    with pytest.raises(DscacheError):
        call.result()


def test_misses_beyond_their_maximum_age_are_read_again(core: Any) -> None:
    near = NearExchange(core, max_age=0.05)
    assert near.read("a") is None
    until_not_at_hand(near, "a")


# -- on a cluster


class NearCluster(ClusterExchange):
    """A near cache before the Router of some nodes."""

    def __init__(self, core: Any, *, hash_tag: bool = True, **near: Any) -> None:
        self.promises: list[Promise] = []
        super().__init__(core, hash_tag=hash_tag)
        slow = {"timeout": FOREVER, "max_age": FOREVER, "idle_limit": FOREVER}
        self.near = core.NearCache(
            self._waiter, self.router, clustered=True, hash_tag=hash_tag, **slow | near
        )
        for pipeline in self.pipelines:
            pipeline.near = self.near
            pipeline.connected(True)

    def issue(self, method: str, argument: Any, *rest: Any, **options: Any) -> Any:
        return NearExchange.issue(self, method, argument, *rest, **options)  # type: ignore[arg-type]

    def node_of(self, name: str) -> int:
        return int(self.router.slot_of(name) % len(self.pipelines))

    def read(self, name: str, node: int | None = None) -> Call:
        """Read a record, from a given node or from the owner of its slot."""
        node = self.node_of(name) if node is None else node
        call: Call = self.issue("get", name)
        if not call.was_at_hand:
            self.take(node)
            self.reply(node, [b"1", b"1"])
        assert call.result().version == 1
        return call

    def _waiter(self) -> Any:
        self.promises.append(Promise())
        self.waiters.append(self.promises[-1])
        return self.promises[-1]


@pytest.fixture
def cluster(core: Any) -> NearCluster:
    return NearCluster(core)


def names_in_other_slots(cluster: NearCluster, number: int) -> list[str]:
    found: dict[int, str] = {}
    for i in count():
        if len(found) == number:
            break
        found.setdefault(cluster.router.slot_of(f"n/{i}"), f"n/{i}")
    return list(found.values())


def test_records_of_a_cluster_are_cached(cluster: NearCluster) -> None:
    names = names_in_other_slots(cluster, 30)
    assert {cluster.node_of(name) for name in names} == {0, 1, 2}
    for name in names:
        assert not cluster.read(name).was_at_hand
    for name in names:
        assert cluster.read(name).was_at_hand
    for name in names[::2]:
        message = Push([b"invalidate", [b"{%s}_v" % name.encode()]])
        cluster.reply(cluster.node_of(name), message)
    assert [cluster.read(name).was_at_hand for name in names] == [False, True] * 15


def test_a_slot_is_computed_once_for_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pure core, whose computations can be counted."""
    cluster = NearCluster(pure)
    asked: list[str] = []
    slot = Encoder.slot
    monkeypatch.setattr(Encoder, "slot", lambda self, name: asked.append(name) or slot(self, name))
    node = cluster.node_of("a")
    asked.clear()
    assert not cluster.read("a", node).was_at_hand
    assert asked == ["a"]
    assert cluster.read("a", node).was_at_hand
    assert asked == ["a"]


def test_a_slot_that_moves_loses_its_records(cluster: NearCluster) -> None:
    names = names_in_other_slots(cluster, 30)
    for name in names:
        cluster.read(name)
    slots = [cluster.router.slot_of(name) for name in names]
    for slot in slots[:10]:
        cluster.assign(slot, (slot + 1) % 3)
    cluster.near.slots_moved(slots[:10])
    calls = [cluster.issue("get", name) for name in names]
    assert [call.was_at_hand for call in calls] == [False] * 10 + [True] * 20
    for node in range(3):
        while sent := cluster.take(node):
            cluster.reply(node, *([b"2", b"2"] * (len(keys) // 2) for _, *keys in sent))
    assert [call.result().version for call in calls[:10]] == [2] * 10
    assert all(cluster.issue("get", name).was_at_hand for name in names)
    assert cluster.near.stats()["flushes"] == {"slots": 1}
    cluster.near.slots_moved([])
    assert cluster.near.stats()["flushes"] == {"slots": 1}


def test_a_slot_that_moves_and_returns_loses_its_records(cluster: NearCluster) -> None:
    cluster.read("a")
    slot = cluster.router.slot_of("a")
    cluster.near.slots_moved([slot])
    cluster.near.slots_moved([slot])
    assert not cluster.issue("get", "a").was_at_hand


def test_invalid_slots_are_refused(cluster: NearCluster) -> None:
    with pytest.raises(IndexError):
        cluster.near.slots_moved([c.SLOTS])


def test_replies_of_a_former_owner_are_not_cached(cluster: NearCluster) -> None:
    call = cluster.issue("get", "a")
    slot, node = cluster.router.slot_of("a"), cluster.node_of("a")
    cluster.take(node)
    cluster.assign(slot, (node + 1) % 3)
    cluster.near.slots_moved([slot])
    cluster.reply(node, [b"1", b"1"])
    assert call.result().version == 1
    assert not cluster.issue("get", "a").was_at_hand
    assert cluster.near.stats()["dropped_fills"] == 1


def test_reads_of_a_former_owner_are_not_shared(cluster: NearCluster) -> None:
    before = cluster.issue("get", "a")
    slot, node = cluster.router.slot_of("a"), cluster.node_of("a")
    cluster.take(node)
    heir = (node + 1) % 3
    cluster.assign(slot, heir)
    cluster.near.slots_moved([slot])
    after = cluster.issue("get", "a")
    cluster.take(heir)
    cluster.reply(heir, [b"2", b"2"])
    assert after.result().version == 2
    cluster.reply(node, [b"1", b"1"])
    assert before.result().version == 1
    assert cluster.issue("get", "a").result().version == 2


def test_replies_after_asking_are_not_cached(cluster: NearCluster) -> None:
    call = cluster.issue("get", "a")
    slot, node = cluster.router.slot_of("a"), cluster.node_of("a")
    cluster.take(node)
    target = (node + 1) % 3
    cluster.reply(node, Refusal(f"ASK {slot} {cluster.address(target)}"))
    [(_, _, batch)] = cluster.redirected(node)
    batch.ask(cluster.pipelines[target])
    cluster.pipelines[target].requeue([batch])
    [asking, command] = cluster.take(target)
    assert (asking, command[0]) == ([b"ASKING"], b"MGET")
    cluster.reply(target, "OK", [b"1", b"1"])
    assert call.result().version == 1
    again = cluster.issue("get", "a")
    assert not again.was_at_hand
    # The read was answered, and no caller waits for it.
    assert cluster.near.stats()["joins"] == 0
    cluster.take(node)
    cluster.reply(node, [b"1", b"1"])
    assert cluster.issue("get", "a").was_at_hand


def test_a_read_redirected_once_is_cached(cluster: NearCluster) -> None:
    call = cluster.issue("get", "a")
    slot, node = cluster.router.slot_of("a"), cluster.node_of("a")
    cluster.take(node)
    heir = (node + 1) % 3
    cluster.reply(node, Refusal(f"MOVED {slot} {cluster.address(heir)}"))
    [(_, _, batch)] = cluster.redirected(node)
    cluster.assign(slot, heir)
    cluster.near.slots_moved([slot])
    cluster.pipelines[heir].requeue([batch])
    cluster.take(heir)
    cluster.reply(heir, [b"1", b"1"])
    assert call.result().version == 1
    assert cluster.issue("get", "a").was_at_hand


def test_a_lost_node_drops_only_its_own_records(cluster: NearCluster) -> None:
    names = names_in_other_slots(cluster, 30)
    for name in names:
        cluster.read(name)
    cluster.pipelines[0].connection_lost(ConnectionLost("cut"), True)
    for name in names:
        assert cluster.issue("get", name).was_at_hand == (cluster.node_of(name) != 0)
    cluster.reply(1, Push([b"invalidate", None]))
    for name in names:
        assert cluster.issue("get", name).was_at_hand == (cluster.node_of(name) == 2)
    assert cluster.near.stats()["flushes"] == {"connection": 1, "flushall": 1}


@pytest.mark.parametrize("is_tracked", [False, True])
def test_replies_of_a_replica_are_not_cached(cluster: NearCluster, is_tracked: bool) -> None:
    """Not even after its promotion on the same connection."""
    slot = cluster.router.slot_of("a")
    replica = cluster.pipelines[(cluster.node_of("a") + 1) % 3]
    replica.connection_lost(ConnectionLost("cut"), True)
    replica.connected(is_tracked)
    cluster.router.readers[slot] = replica
    cluster.read("a", cluster.pipelines.index(replica))
    assert not cluster.issue("get", "a").was_at_hand
    cluster.take(cluster.pipelines.index(replica))
    cluster.reply(cluster.pipelines.index(replica), [b"1", b"1"])
    cluster.router.owners[slot] = replica
    cluster.near.slots_moved([slot])
    cluster.read("a", cluster.pipelines.index(replica))
    assert cluster.issue("get", "a").was_at_hand == is_tracked


def test_split_records_are_not_cached(core: Any) -> None:
    cluster = NearCluster(core, hash_tag=False)
    assert cluster.router.slot_of("a") == -1
    for expected in ([b"1", b"1"], [b"2", b"2"]):
        call = cluster.issue("get", "a")
        assert not call.was_at_hand
        head = cluster.issue("head", "a")
        for node in range(3):
            for verb, *_ in cluster.take(node):
                cluster.reply(node, "string" if verb == b"TYPE" else expected[0])
        assert call.result().raw == expected[0]
        assert not head.was_at_hand
    written = cluster.issue("set", "a", 3, 3)
    for node in range(3):
        cluster.reply(node, *("OK" for _ in cluster.take(node)))
    assert written.result() is True
    assert cluster.near.stats()["records"] == 0
    # A record with a hash tag is cached like any other.
    cluster.read("{t}a")
    assert cluster.issue("get", "{t}a").was_at_hand


# -- what is cacheable


def test_only_names_with_the_prefixes_are_cached(core: Any) -> None:
    near = NearExchange(core, prefixes=("user/", "ä"))
    names = ["user/1", "user/", "users", "ä", "äö", "a", "x/user/1"]
    near.fill(*names)
    assert [name for name in names if near.has(name)] == ["user/1", "user/", "ä", "äö"]
    assert near.stats()["dropped_fills"] == 0
    # Reads of other names are still shared while in flight.
    calls = [near.get("a") for _ in range(3)]
    assert asked(near.run()) == [b"a"]
    assert [call.result().version for call in calls] == [1, 1, 1]


def test_the_number_of_records_is_limited(core: Any) -> None:
    near = NearExchange(core, max_records=3)
    near.fill(*"abcde")
    assert [name for name in "abcde" if near.has(name)] == ["c", "d", "e"]
    assert near.count("records", "evictions", "bytes") == (
        3,
        2,
        table_of(core, 3) + 3 * size_of(core, "a", b"1"),
    )


def test_a_hit_record_survives_one_more_round(core: Any) -> None:
    near = NearExchange(core, max_records=3)
    near.fill(*"abc")
    assert near.get("a").was_at_hand
    near.fill("d")  # b is evicted, as a was hit
    near.fill("e")  # c is evicted; a has not been hit again
    assert [name for name in "abcde" if near.has(name)] == ["a", "d", "e"]
    near = NearExchange(core, max_records=3)
    near.fill(*"abc")
    for name in "abc":
        assert near.get(name).was_at_hand
    near.fill("d")  # all were hit: after one round the first is evicted
    near.fill("e")
    assert [name for name in "abcde" if near.has(name)] == ["c", "d", "e"]


def test_hits_by_bulks_and_heads_count_too(core: Any) -> None:
    near = NearExchange(core, max_records=3)
    near.fill(*"abc")
    near.issue("get_bulk", ["a"])
    near.issue("head", "b")
    near.fill("d")
    assert [name for name in "abcd" if near.has(name)] == ["a", "b", "d"]


def test_a_record_that_may_not_be_served_is_evicted(core: Any) -> None:
    near = NearExchange(core, max_records=3)
    near.fill(*"abc")
    for name in "abc":
        near.get(name)
    near.lose()
    near.pipeline.connected(True)
    near.fill(*"de")
    assert near.get("d").was_at_hand
    near.fill("f")
    assert [name for name in "abcdef" if near.has(name)] == ["d", "e", "f"]


def test_the_number_of_bytes_is_limited(core: Any) -> None:
    each, table = size_of(core, "a", b"1" * 1000), table_of(core, 3)
    near = NearExchange(core, max_bytes=table + 3 * each)
    near.fill(*"abc", data=b"1" * 1000)
    assert near.count("records", "bytes", "evictions") == (3, table + 3 * each, 0)
    near.fill("d", data=b"1" * 1001)
    assert near.count("records", "evictions") == (2, 2)
    both = each + size_of(core, "d", b"1" * 1001)
    assert near.stats()["bytes"] == table_of(core, 2) + both <= table + 3 * each
    assert [name for name in "abcd" if near.has(name)] == ["c", "d"]


def test_a_record_that_is_too_large_is_not_cached(core: Any) -> None:
    near = NearExchange(core, max_bytes=2000)
    near.fill(*"ab")
    near.fill("c", data=b"1" * 2000)
    assert [name for name in "abc" if near.has(name)] == ["a", "b"]
    # Its earlier entry is gone too.
    near.fill("a", version=2, data=b"2" * 2000)
    assert not near.has("a")
    assert near.count("records", "bytes", "evictions") == (
        1,
        table_of(core) + size_of(core, "b", b"1"),
        0,
    )
    exact = 2000 - size_of(core, "exact") - table_of(core)
    near.fill("exact", data=b"1" * exact)
    assert near.has("exact")
    assert near.count("records", "bytes") == (1, 2000)


@pytest.mark.parametrize("name", ["a", "ä", "名", "\U0001f600", "x" * 1000])
def test_bytes_count_names_as_they_are_sent(core: Any, name: str) -> None:
    near = NearExchange(core)
    near.fill(name)
    assert near.stats()["bytes"] == table_of(core) + size_of(core, name, b"1")
    near.read("missing")
    both = size_of(core, name, b"1") + size_of(core, "missing")
    assert near.stats()["bytes"] == table_of(core, 2) + both


def test_every_removal_frees_its_bytes(core: Any) -> None:
    near = NearExchange(core, max_records=4)
    for round in range(20):
        near.fill(*"abcdef", version=round)
        near.read("missing")
        near.issue("set", "e", round, round)
        near.push(b"f_v", b"missing_d")
        near.issue("get_bulk", list("abc"))
        near.run()
    near.push(*(b"%c_v" % letter for letter in b"abcdef"))
    near.issue("delete", "missing")
    near.run()
    assert near.count("records") == (0,)
    assert near.stats()["bytes"] <= table_of(core, 6)


def test_a_limit_may_be_one_record_or_one_byte(core: Any) -> None:
    near = NearExchange(core, max_records=1)
    near.fill(*"ab")
    assert near.has("b")
    assert near.count("records", "evictions") == (1, 1)
    near = NearExchange(core, max_bytes=1)
    near.fill(*"ab")
    assert near.count("records", "bytes", "evictions") == (0, 0, 0)


# -- bulks


def test_a_bulk_is_partly_served_from_memory(near: NearExchange) -> None:
    near.fill(*"bd")
    near.server.write("a", 5, b"5")
    near.server.write("c", 6, b"6")
    bulk = near.issue("get_bulk", ["d", "c", "missing", "b", "a", "d"])
    assert asked(near.run()) == [b"c", b"missing", b"a"]
    found = bulk.result()
    assert plain(found) == {"d": (1, 1), "c": (6, 6), "b": (1, 1), "a": (5, 5)}
    assert list(found) == ["d", "c", "b", "a"]
    assert near.count("hits", "misses") == (2, 2 + 3)
    heads = near.issue("head_bulk", ["missing", "a", "new", "d"])
    assert [command[1] for command in near.run()] == [b"new_v", b"new_d"]
    assert list(heads.result().items()) == [("a", 5), ("d", 1)]


def test_a_bulk_is_served_from_memory(near: NearExchange) -> None:
    near.fill(*"ab")
    near.read("missing")
    bulk = near.issue("get_bulk", ("b", "missing", "a"))
    assert bulk.was_at_hand
    assert list(bulk.result()) == ["b", "a"]
    heads = near.issue("head_bulk", {"a": 0, "missing": 0})
    assert heads.was_at_hand
    assert heads.result() == {"a": 1}
    assert near.run() == []


def test_a_bulk_is_served_by_the_server(near: NearExchange) -> None:
    near.server.write("a", 1, b"1")
    bulk = near.issue("get_bulk", (name for name in "ab"))
    assert not bulk.was_at_hand
    assert asked(near.run()) == [b"a", b"b"]
    assert plain(bulk.result()) == {"a": (1, 1)}


@pytest.mark.parametrize(
    ("method", "nothing", "result"),
    [
        ("get_bulk", [], {}),
        ("head_bulk", [], {}),
        ("set_bulk", {}, set()),
        ("delete_bulk", [], 0),
    ],
)
def test_an_empty_bulk(near: NearExchange, method: str, nothing: Any, result: Any) -> None:
    call = near.issue(method, nothing)
    assert call.was_at_hand
    assert call.result() == result
    assert near.run() == []


@pytest.mark.parametrize("method", ["get_bulk", "head_bulk"])
def test_bulks_refuse_the_arguments_a_pipeline_refuses(near: NearExchange, method: str) -> None:
    near.fill("a")
    for names in ("ab", b"ab"):
        with pytest.raises(RecordError, match=rf"{method} takes an iterable of names"):
            near.issue(method, names)
    for names in (["a", ""], ["a", 5], [b"a"]):
        with pytest.raises(RecordError):
            near.issue(method, names)
    assert near.run() == []
    near.assert_drained()


def test_a_partly_failed_bulk_has_its_hits(near: NearExchange) -> None:
    near.fill(*"ab")
    near.server.write("c", 1, b"1")
    near.server.write("e", 1, b"1")
    near.server.refused = {b"d_v"}
    for method in ("get_bulk", "head_bulk"):
        near.push(b"c_v", b"e_v")
        bulk = near.issue(method, list("bdcae"))
        near.run()
        with pytest.raises(BulkError, match=method) as caught:
            bulk.result()
        assert list(caught.value.errors) == ["d"]
        assert isinstance(caught.value.errors["d"], ReplyError)
        assert list(caught.value.result) == list("bcae")
        assert near.has("c") == near.has("e") == (method == "get_bulk")


def test_a_bulk_is_lost(near: NearExchange) -> None:
    near.fill(*"ab")
    bulk = near.issue("get_bulk", list("abcd"))
    near.send()
    near.lose(retry=False)
    with pytest.raises(BulkError, match="get_bulk") as caught:
        bulk.result()
    assert list(caught.value.result) == ["a", "b"]
    assert [type(error) for error in caught.value.errors.values()] == [ConnectionLost] * 2
    near.pipeline.connected(True)
    bulk = near.issue("get_bulk", list("abcd"))
    near.send()
    near.lose(retry=True)
    near.pipeline.connected(True)
    near.run()
    assert list(bulk.result()) == ["a", "b"]
    near.assert_drained()


@pytest.mark.parametrize("method", ["get_bulk", "head_bulk"])
def test_a_bulk_keeps_its_hits_where_all_the_rest_is_refused(
    near: NearExchange, method: str
) -> None:
    near.fill("a", version=7)
    assert near.read("gone") is None  # a cached miss is an answer too
    near.server.refused = {b"b_v", b"c_v"}
    for cached in ("a", "gone"):
        bulk = near.issue(method, [cached, "b", "c"])
        near.run()
        with pytest.raises(BulkError) as caught:
            bulk.result()
        assert list(caught.value.result) == ["a"][: cached == "a"]
        assert {type(error) for error in caught.value.errors.values()} == {ReplyError}
        assert list(caught.value.errors) == ["b", "c"]
    bulk = near.issue(method, ["b", "c"])
    near.run()
    with pytest.raises(ReplyError):
        bulk.result()
    near.assert_drained()


def test_a_cancelled_bulk_is_still_cached(near: NearExchange) -> None:
    near.server.write("a", 1, b"1")
    bulk = near.issue("get_bulk", ["a"])
    near.send()
    bulk.cancel()
    near.arrive()
    near.run()
    near.assert_drained()


# -- while Redis is down


@pytest.fixture
def away(core: Any) -> NearExchange:
    near = NearExchange(core, serve_stale=True)
    near.fill(*"ab")
    return near


def late(near: NearExchange) -> None:
    """Let every deadline pass."""
    near.pipeline.expire(2 * FOREVER + time.monotonic())


def test_a_bulk_of_known_and_unknown_names_while_down(away: NearExchange) -> None:
    """The known records are in its result, whether the loss shows at once or at the end."""
    away.lose()
    bulk = away.issue("get_bulk", ["a", "c"])
    late(away)
    with pytest.raises(BulkError) as caught:
        bulk.result()
    assert list(caught.value.errors) == ["c"]
    assert caught.value.result["a"].stale


def test_shared_reads_are_served_the_last_known_record_too(core: Any) -> None:
    away = NearExchange(core, serve_stale=True, idle_limit=0.0)
    away.fill(*"ab")
    until_not_at_hand(away, "a")
    calls = [away.get("b"), away.get("a")]
    bulks = [away.issue("get_bulk", ["a"]), away.issue("get_bulk", ["b", "a"])]
    late(away)
    assert [call.result().stale for call in calls] == [True, True]
    for bulk in bulks:
        assert all(record.stale for record in bulk.result().values())


def test_the_last_known_record_is_served_at_once_while_down(away: NearExchange) -> None:
    away.lose()
    call = away.get("a")
    assert call.was_at_hand
    record = call.result()
    assert (record.name, record.version, record.raw, record.stale) == ("a", 1, b"1", True)
    bulk = away.issue("get_bulk", ["b", "a"])
    assert bulk.was_at_hand
    assert [record.stale for record in bulk.result().values()] == [True, True]
    assert away.count("stale", "hits") == (3, 0)
    away.pipeline.connected(True)
    again = away.get("a")
    assert not again.was_at_hand
    away.run()
    assert again.result().stale is False
    assert away.get("a").result().stale is False


def test_stale_records_need_the_option(near: NearExchange) -> None:
    near.fill("a")
    near.lose()
    call = near.get("a")
    assert not call.was_at_hand
    late(near)
    with pytest.raises(DscacheError):
        call.result()


@pytest.mark.parametrize("sent", [False, True])
def test_the_last_known_record_is_served_in_place_of_an_error(core: Any, sent: bool) -> None:
    """The connection is open, but silent."""
    away = NearExchange(core, serve_stale=True, idle_limit=0.0)
    away.fill(*"ab")
    calls = [until_not_at_hand(away, "a"), away.get("a")]
    bulk = away.issue("get_bulk", ["a", "b"])
    head = away.issue("head", "a")
    if sent:
        away.send()
    late(away)
    assert [call.result().stale for call in calls] == [True, True]
    assert [record.stale for record in bulk.result().values()] == [True, True]
    with pytest.raises(DeadlineExceeded):
        head.result()


def test_a_lost_read_is_answered_with_the_last_known_record(away: NearExchange) -> None:
    """The server was back when the read was sent, and then failed again."""
    away.lose()
    away.pipeline.connected(True)
    call, bulk = away.get("a"), away.issue("get_bulk", ["b", "c", "a"])
    away.send()
    away.lose()
    late(away)
    assert call.result().stale
    with pytest.raises(BulkError) as caught:
        bulk.result()
    assert list(caught.value.errors) == ["c"]
    assert [record.stale for record in caught.value.result.values()] == [True, True]
    assert list(caught.value.result) == ["b", "a"]


@pytest.mark.parametrize("error", [ReplyError("ERR no"), ProtocolError("nonsense")], ids=repr)
def test_errors_other_than_a_lost_server_are_raised(away: NearExchange, error: Exception) -> None:
    away.lose()
    away.pipeline.connected(True)
    call = away.get("a")
    away.take()
    if isinstance(error, ReplyError):
        away.reply(Refusal("ERR no"))
    else:
        away.pipeline.connection_lost(error, False)
    with pytest.raises(type(error)):
        call.result()


@pytest.mark.parametrize("method", ["head", "head_bulk"])
def test_heads_are_never_stale(away: NearExchange, method: str) -> None:
    away.lose()
    call = away.issue(method, "a" if method == "head" else ["a", "b"])
    assert not call.was_at_hand
    late(away)
    with pytest.raises(DscacheError):
        call.result()


def test_misses_are_never_stale(away: NearExchange) -> None:
    assert away.read("missing") is None
    away.lose()
    call, bulk = away.get("missing"), away.issue("get_bulk", ["a", "missing"])
    assert not call.was_at_hand
    late(away)
    with pytest.raises(DscacheError):
        call.result()
    with pytest.raises(BulkError) as caught:
        bulk.result()
    assert list(caught.value.errors) == ["missing"]
    assert list(caught.value.result) == ["a"]


def test_an_invalidated_record_is_not_served_stale(away: NearExchange) -> None:
    away.server.write("a", 2, b"2")
    away.arrive()
    away.lose()
    assert not away.get("a").was_at_hand
    assert away.get("b").was_at_hand


def test_a_record_written_here_is_not_served_stale(away: NearExchange, write: Write) -> None:
    write(away)
    away.lose()
    assert not away.get("a").was_at_hand
    write(away)
    late(away)
    call = away.get("a")
    late(away)
    with pytest.raises(DscacheError):
        call.result()


def test_a_record_written_while_down_is_not_served_stale(away: NearExchange, write: Write) -> None:
    away.lose()
    write(away)
    assert not away.get("a").was_at_hand


def test_nothing_is_served_stale_after_a_flush_of_the_server(away: NearExchange) -> None:
    away.server.flush()
    away.arrive()
    away.lose()
    assert not away.get("a").was_at_hand


def test_nothing_is_served_stale_after_a_flush_on_a_later_connection(
    away: NearExchange,
) -> None:
    """The records of an earlier connection were removed with everything else."""
    away.lose()
    away.pipeline.connected(True)
    away.server.flush()
    away.arrive()
    away.lose()
    call = away.get("a")
    assert not call.was_at_hand
    late(away)
    with pytest.raises(DscacheError):
        call.result()


def test_a_record_read_after_a_flush_is_served_stale(away: NearExchange) -> None:
    away.server.flush()
    away.arrive()
    away.fill("c")
    away.lose()
    assert away.get("c").result().stale
    assert not away.get("a").was_at_hand


def test_nothing_is_served_stale_after_a_protocol_error(away: NearExchange) -> None:
    away.lose(retry=False)
    assert not away.get("a").was_at_hand
    call = away.get("b")
    late(away)
    with pytest.raises(DscacheError):
        call.result()


def test_only_the_records_of_a_lost_node_are_stale(core: Any) -> None:
    cluster = NearCluster(core, serve_stale=True)
    names = names_in_other_slots(cluster, 12)
    for name in names:
        cluster.read(name)
    cluster.pipelines[1].connection_lost(ConnectionLost("cut"), True)
    for name in names:
        call = cluster.issue("get", name)
        assert call.was_at_hand
        assert call.result().stale == (cluster.node_of(name) == 1)
    # Its slots belong to the other node now, which must be asked.
    moved = next(name for name in names if cluster.node_of(name) == 1)
    slot = cluster.router.slot_of(moved)
    cluster.assign(slot, 2)
    cluster.near.slots_moved([slot])
    assert not cluster.issue("get", moved).was_at_hand


# -- closing


def test_a_closed_near_cache_caches_and_serves_nothing(core: Any) -> None:
    near = NearExchange(core, serve_stale=True)
    near.fill(*"ab")
    flying = near.get("c")
    near.send()
    near.near.close()
    assert near.count("records", "bytes") == (0, 0)
    near.arrive()
    assert flying.result() is None
    assert not near.get("a").was_at_hand
    near.run()
    assert near.count("records", "bytes") == (0, 0)
    near.lose()
    assert not near.get("b").was_at_hand
    near.near.close()


def test_counters_of_the_near_cache(near: NearExchange) -> None:
    assert near.stats() == {
        **dict.fromkeys(("hits", "misses", "joins", "stale", "invalidations", "evictions"), 0),
        **{"dropped_fills": 0, "flushes": {}, "records": 0, "bytes": 0},
    }
    near.stats()["flushes"]["x"] = 1
    assert near.stats()["flushes"] == {}


def test_a_near_cache_is_freed(core: Any) -> None:
    """Nothing of it remains, although a pipeline and its near cache refer to each other."""
    import gc
    import weakref

    class Made:
        """An object with a single reference."""

        def __call__(self) -> Promise:
            return Promise()

    create = Made()
    gone = weakref.ref(create)
    pipeline = core.Pipeline(create, int)
    pipeline.near = core.NearCache(create, pipeline)
    pipeline.connected(True)
    pipeline.near.get("a")
    pipeline.take_output()
    pipeline.feed(resp([b"1", b"1"]))
    pipeline.near.get("b")
    del pipeline, create
    gc.collect()
    assert gone() is None


# -- in an event loop


async def pair(core: Any) -> tuple[Any, Any]:
    """Return a pipeline and its near cache, with futures of the running loop."""
    create = asyncio.get_running_loop().create_future
    pipeline = core.Pipeline(create, lambda: None, timeout=FOREVER)
    pipeline.near = core.NearCache(create, pipeline, timeout=FOREVER, idle_limit=FOREVER)
    pipeline.connected(True)
    return pipeline, pipeline.near


async def test_tasks_share_one_read(core: Any) -> None:
    pipeline, near = await pair(core)
    tasks = [near.get("a") for _ in range(5)]
    assert [command[0] for command in commands(pipeline.take_output())] == [b"MGET"]
    tasks.append(near.get("a"))
    await asyncio.sleep(0)
    tasks[0].cancel()
    tasks[3].cancel()
    await asyncio.sleep(0)
    pipeline.feed(resp([b"1", b"1"]))
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) is asyncio.CancelledError for one in outcomes] == [
        number in (0, 3) for number in range(6)
    ]
    assert await near.get("a") == outcomes[1]
    assert commands(pipeline.take_output()) == []


async def test_a_read_may_be_dropped_without_awaiting_it(core: Any) -> None:
    """A caller that never awaits gets no result, and no other caller is affected."""
    pipeline, near = await pair(core)
    near.get("a")
    waiting = near.get("a")
    pipeline.take_output()
    pipeline.feed(resp(Refusal(NOPERM)))
    with pytest.raises(ReplyError):
        await waiting
    assert pipeline.in_flight == 0


async def test_the_futures_of_a_loop_of_its_own_kind_are_kept(core: Any) -> None:
    class Own(asyncio.Future):  # type: ignore[type-arg] # of any result
        pass

    class Loop:
        def create_future(self) -> Own:
            return Own(loop=asyncio.get_running_loop())

    create = Loop().create_future
    pipeline = core.Pipeline(create, lambda: None, timeout=FOREVER)
    pipeline.near = core.NearCache(create, pipeline, timeout=FOREVER, idle_limit=FOREVER)
    pipeline.connected(True)
    missed = pipeline.near.get("a")
    pipeline.take_output()
    pipeline.feed(resp([b"1", b"1"]))
    hit = pipeline.near.get("a")
    assert type(missed) is type(hit) is type(pipeline.near.head("a")) is Own
    assert await missed == await hit


async def test_a_hit_is_an_exact_future_of_the_loop(core: Any) -> None:
    pipeline, near = await pair(core)
    near.get("a")
    pipeline.take_output()
    pipeline.feed(resp([b"1", b"1"]))
    loop = asyncio.get_running_loop()
    for debug in (False, True):
        loop.set_debug(debug)
        hit = near.get("a")
        assert (type(hit), hit.done(), hit.get_loop()) == (asyncio.Future, True, loop)
        assert hit.result() is await hit
    loop.set_debug(False)


async def test_a_hit_does_not_yield_to_the_loop(core: Any) -> None:
    pipeline, near = await pair(core)
    task = near.get("a")
    pipeline.take_output()
    pipeline.feed(resp([b"1", b"1"]))
    record = await task
    turned = False

    def turn() -> None:
        nonlocal turned
        turned = True

    asyncio.get_running_loop().call_soon(turn)
    for _ in range(1000):
        assert await near.get("a") == record
        assert await near.head("a") == 1
        found = await near.get_bulk(["a"])
        assert found == {"a": record}
    assert not turned
    await asyncio.sleep(0)
    assert turned


# -- interruptions


class _Store:
    """The part of a near cache that a bulk read uses."""

    def settle_reads(self, *_: Any) -> None: ...

    def last_known(self, name: str) -> None:
        return None


def struck(call: Callable[[], object], number: int) -> bool:
    """Raise MemoryError on a line of a BulkRead's methods; return whether there are so many."""
    left = number

    def on_line(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        left -= event == "line" and frame.f_code.co_filename == near_parts.__file__
        if not left:
            left = -1
            raise MemoryError
        return on_line

    before = sys.gettrace()
    sys.settrace(on_line)
    try:
        call()
    except MemoryError:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("first", ["pipeline", "joined"])
async def test_a_bulk_read_that_is_struck_on_any_line_ends(first: str) -> None:
    """Each outcome comes again after a strike: no read is missed, and none counts twice."""
    loop = asyncio.get_running_loop()
    for number in count(1):
        waiter = loop.create_future()
        found = {"joined": None, "read": None}
        bulk = BulkRead(_Store(), c.GET, found, ["read"], [], waiter, {None, "joined"})
        settle = [partial(bulk.set_result, {}), partial(bulk.take, "joined", None)]
        if first == "joined":
            settle.reverse()
        was_struck = struck(settle[0], number)
        settle[0]()
        assert not waiter.done()
        was_struck |= struck(settle[1], number)
        settle[1]()
        assert waiter.done()
        if not was_struck:
            break
    assert number > 3
