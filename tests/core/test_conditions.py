"""Writes and removals with ``if_version`` in both cores: the wire, the order, repeats, refusals."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

import dscache
from dscache import _fast
from dscache.core import constants as c
from dscache.core import pure, scripts
from dscache.core.memory import MemoryPipeline
from dscache.errors import BulkError, ConnectionLost, RecordError, ReplyError
from tests.support.wire import ClusterExchange, Exchange, Operation, Refusal, Waiter

CORES = pytest.mark.parametrize("core", [_fast, pure], ids=["fast", "pure"])
CUT = ConnectionLost("cut off")
LAST = 2**63 - 1
DOUBT = "may have happened"


def write(name: str, version: int, expected: int | None, data: Any = "new") -> Operation:
    """Return a set with a condition."""
    return Operation("set", name, (version, data), {"if_version": expected})


def removal(name: str, expected: int) -> Operation:
    """Return a delete with a condition."""
    return Operation("delete", name, (), {"if_version": expected})


def holding(core: ModuleType, version: bytes | None, data: bytes = b'"old"') -> Exchange:
    """Return an exchange whose server holds a record "a", or none."""
    exchange = Exchange(core)
    if version is not None:
        exchange.server.values |= {b"a_v": version, b"a_d": data}
    return exchange


def cut(exchange: Exchange) -> None:
    """End the connection, and let the operations under way wait for the next one."""
    exchange.pipeline.connection_lost(CUT, True)


@CORES
def test_they_go_by_the_script_of_if_newer_and_together(core: ModuleType) -> None:
    exchange = Exchange(core)
    exchange.issue(write("a", 2, 1), write("b", 1, None), removal("d", 7))
    exchange.pipeline.set("c", 3, "new", None, True)
    first, second = exchange.take()
    keys = [b"a_v", b"a_d", b"b_v", b"b_d", b"c_v", b"c_d"]
    assert first[:3] == [b"EVALSHA", scripts.SET_SCRIPT_SHA, b"6"]
    assert first[3:9] == keys
    assert first[9:] == [
        *(b"2", b'"new"', b"0", b"=1"),
        *(b"1", b'"new"', b"0", b"="),
        *(b"3", b'"new"', b"0", b"1"),
    ]
    assert second[2:] == [b"2", b"d_v", b"d_d", b"0", b"", b"0", b"=7"]
    exchange.reply([1, 0, 0], [1])
    assert [waiter.value for waiter in exchange.waiters] == [True, False, True, False]
    stats = exchange.pipeline.stats()
    assert (stats["writes"], stats["not_newer"], stats["deletes"]) == (1, 2, 1)
    assert stats["latency"]["operations"]["delete"]["count"] == 1
    exchange.assert_drained()


@CORES
def test_two_of_one_name_in_one_tick_both_count_in_their_order(core: ModuleType) -> None:
    exchange = holding(core, b"1")
    waiters = exchange.issue(
        *(write("a", 2, 1), write("a", 3, 1), write("a", 3, 2), removal("a", 2)),
        *(removal("a", 3), write("a", 1, None), write("a", 2, None)),
    )
    exchange.run()
    assert [waiter.value for waiter in waiters] == [True, False, True, False, True, True, False]
    assert exchange.server.values[b"a_v"] == b"1"


@CORES
def test_plain_writes_between_keep_their_place(core: ModuleType) -> None:
    exchange = holding(core, b"1")
    issue = exchange.pipeline
    results = [
        *exchange.issue(write("a", 2, 1)),
        issue.set("a", 9, "plain"),
        *exchange.issue(write("a", 3, 2), write("a", 10, 9)),
        issue.delete("a"),
        *exchange.issue(write("a", 1, None)),
    ]
    exchange.run()
    assert [waiter.value for waiter in results] == [True, True, False, True, True, True]
    assert exchange.server.values[b"a_v"] == b"1"


@CORES
def test_bulks(core: ModuleType) -> None:
    exchange = holding(core, b"4")
    issue = exchange.pipeline
    expected = {"a": 4, "b": None, "c": 3, "not in it": 1}
    written = issue.set_bulk(dict.fromkeys("abc", (5, "new")), None, False, expected)
    removed = issue.delete_bulk(["a", "b", "c"], {"a": 5, "b": 4, "c": 0})
    exchange.run()
    assert written.value == {"c"}
    assert removed.value == 1
    assert b"a_v" not in exchange.server.values
    assert exchange.server.values[b"b_v"] == b"5"
    empty = issue.set_bulk({}, None, False, {}), issue.delete_bulk([], {})
    exchange.run()
    assert [waiter.value for waiter in empty] == [set(), 0]


@CORES
@pytest.mark.parametrize("half", [b"a_v", b"a_d"], ids=["version", "data"])
def test_half_a_record_is_none(core: ModuleType, half: bytes) -> None:
    exchange = Exchange(core)
    exchange.server.values[half] = b"1"
    waiters = exchange.issue(write("a", 2, 1), removal("a", 1), write("a", 2, None))
    exchange.run()
    assert [waiter.value for waiter in waiters] == [False, False, True]


@CORES
def test_a_damaged_version_fits_no_condition(core: ModuleType) -> None:
    exchange = holding(core, b"x")
    waiters = exchange.issue(write("a", 2, 1), write("a", 2, None), removal("a", 1))
    exchange.run()
    for waiter in waiters:
        assert isinstance(waiter.error, RecordError)
        assert "repair" in str(waiter.error)
    assert exchange.server.values[b"a_v"] == b"x"


ARGUMENTS: list[tuple[str, tuple[Any, ...], str]] = [
    ("set", ("a", 2, 0, None, True, 1), "if_newer and if_version"),
    ("set", ("a", 2, 0, None, False, True), "not True"),
    ("set", ("a", 2, 0, None, False, -1), "or None if there must be no record, not -1"),
    ("set", ("a", 2, 0, None, False, LAST + 1), "must be an int"),
    ("set", ("a", 2, 0, None, False, "1"), "not '1'"),
    ("delete", ("a", None), f"from 0 to {LAST}, not None"),
    ("delete", ("a", 1.0), "not 1.0"),
    ("set_bulk", ({"a": (1, 0)}, None, True, {"a": 1}), "if_newer and if_version"),
    ("set_bulk", ({"a": (1, 0)}, None, False, {}), "record 'a': if_version has no version for it"),
    ("set_bulk", ({"a": (1, 0)}, None, False, None), "a mapping"),
    ("set_bulk", ({"a": (1, 0)}, None, False, 1), "a mapping"),
    ("set_bulk", ({"a": (1, 0)}, None, False, {"a": "1"}), "not '1'"),
    ("delete_bulk", (["a"], {"a": None}), "not None"),
    ("delete_bulk", (["a", "b"], {"a": 1}), "record 'b'"),
    ("delete_bulk", (["a"], None), "a mapping"),
]


@CORES
@pytest.mark.parametrize(("operation", "given", "said"), ARGUMENTS)
def test_bad_conditions(
    core: ModuleType, operation: str, given: tuple[Any, ...], said: str
) -> None:
    exchange = Exchange(core)
    errors = []
    for target in (
        exchange.pipeline,
        ClusterExchange(core, hash_tag=True).router,
        MemoryPipeline(Waiter, lambda: None, None),
    ):
        with pytest.raises(RecordError) as caught:
            getattr(target, operation)(*given)
        errors.append(str(caught.value))
    assert said.replace("'", '"') in errors[0].replace("'", '"')
    assert len(set(errors)) == 1
    exchange.assert_drained()
    assert exchange.wakes == 0


@CORES
def test_keys_on_two_nodes_can_not_have_a_condition(core: ModuleType) -> None:
    router = ClusterExchange(core).router
    for call in (
        lambda: router.set("a", 1, 0, None, False, 1),
        lambda: router.delete("a", 1),
        lambda: router.set_bulk({"a": (1, 0)}, None, False, {"a": None}),
        lambda: router.delete_bulk(["a"], {"a": 1}),
    ):
        with pytest.raises(RecordError, match="neither if_newer nor if_version"):
            call()


# -- repeats after a lost connection

NOTHING = None
TAKEN = True
UNTOLD = ConnectionLost
# What an operation issued on version 1 finds when it is repeated, and its outcome: the stored
# version and data, or none.
REPEATS: list[tuple[Operation, tuple[bytes, bytes] | None, Any]] = [
    (write("a", 2, 1), (b"1", b'"old"'), TAKEN),
    (write("a", 2, 1), (b"2", b'"new"'), TAKEN),
    (write("a", 2, 1), (b"2", b'"of another"'), UNTOLD),
    (write("a", 2, 1), (b"3", b'"of another"'), UNTOLD),
    (write("a", 2, 1), NOTHING, UNTOLD),
    (write("a", 1, 1), (b"1", b'"old"'), UNTOLD),
    (write("a", 1, 1), (b"1", b'"new"'), TAKEN),
    (write("a", 2, None), NOTHING, UNTOLD),
    (write("a", 2, None), (b"2", b'"new"'), TAKEN),
    (write("a", 2, None), (b"1", b'"old"'), UNTOLD),
    (removal("a", 1), (b"1", b'"old"'), TAKEN),
    (removal("a", 1), NOTHING, UNTOLD),
    (removal("a", 1), (b"2", b'"of another"'), UNTOLD),
    (removal("a", 0), (b"0", b'"old"'), TAKEN),
]


@CORES
@pytest.mark.parametrize(("operation", "found", "outcome"), REPEATS)
def test_a_repeat_knows_or_says_that_it_does_not(
    core: ModuleType, operation: Operation, found: tuple[bytes, bytes] | None, outcome: Any
) -> None:
    exchange = holding(core, found and found[0], found[1] if found else b"")
    (waiter,) = exchange.issue(operation)
    exchange.take()
    cut(exchange)
    before = dict(exchange.server.values)
    (repeat,) = exchange.run()
    assert repeat[-1][:1] == c.EXPECTED_REPEAT
    if outcome is TAKEN:
        assert waiter.value is True
        kept = exchange.server.values.get(b"a_v")
        assert kept == (repeat[5] if repeat[6] else None)
    else:
        assert isinstance(waiter.error, UNTOLD)
        assert DOUBT in str(waiter.error)
        assert operation.method in str(waiter.error)
        assert exchange.server.values == before
        assert exchange.pipeline.stats()["failed"] == 1


@CORES
def test_repeats_of_bulks_fail_by_name(core: ModuleType) -> None:
    exchange = holding(core, b"1")
    written = exchange.pipeline.set_bulk(
        {"a": (2, "new"), "b": (2, "new")}, None, False, {"a": 1, "b": 1}
    )
    removed = exchange.pipeline.delete_bulk(["a", "b"], {"a": 2, "b": 1})
    exchange.take()
    cut(exchange)
    exchange.run()
    for waiter, result in ((written, set()), (removed, 1)):
        assert isinstance(waiter.error, BulkError)
        assert list(waiter.error.errors) == ["b"]
        assert waiter.error.result == result


@CORES
def test_a_repeat_that_is_refused_may_have_happened(core: ModuleType) -> None:
    exchange = holding(core, b"1")
    waiters = exchange.issue(write("a", 2, 1))
    waiters.append(exchange.pipeline.set("b", 2, "new", None, True))
    exchange.take()
    cut(exchange)
    exchange.take()
    exchange.reply(Refusal("OOM command not allowed"))
    first, second = (waiter.error for waiter in waiters)
    assert isinstance(first, ConnectionLost)
    assert "OOM" in str(first)
    assert DOUBT in str(first)
    assert isinstance(second, ReplyError)


@CORES
def test_an_untold_reply_to_no_repeat_ends_the_connection(core: ModuleType) -> None:
    exchange = Exchange(core)
    exchange.issue(write("a", 2, 1))
    exchange.take()
    with pytest.raises(dscache.ProtocolError, match="the set script"):
        exchange.reply([c.UNTOLD])


@CORES
def test_without_another_connection_it_may_have_happened(core: ModuleType) -> None:
    exchange = Exchange(core)
    waiters = exchange.issue(write("a", 2, 1), removal("b", 1))
    exchange.take()
    exchange.pipeline.connection_lost(CUT, False)
    for waiter in waiters:
        assert isinstance(waiter.error, ConnectionLost)
        assert DOUBT in str(waiter.error)


# -- refusals


@CORES
def test_a_lost_script_is_brought_again_and_keeps_the_order(core: ModuleType) -> None:
    exchange = holding(core, b"1")
    exchange.server.has_script = False
    waiters = exchange.issue(write("a", 2, 1), write("a", 3, 2), removal("a", 3), removal("b", 1))
    executed = exchange.run()
    assert [waiter.value for waiter in waiters] == [True, True, True, False]
    assert any(command[0] == b"EVAL" for command in executed)


@CORES
def test_a_refused_record_of_several_fails_alone(core: ModuleType) -> None:
    exchange = holding(core, b"1")
    exchange.server.refused = {b"b_v"}
    waiters = exchange.issue(write("a", 2, 1), write("b", 2, 1), removal("b", 1))
    exchange.run()
    assert waiters[0].value is True
    for waiter in waiters[1:]:
        assert isinstance(waiter.error, ReplyError)
        assert waiter.error.code == "NOPERM"


@CORES
@pytest.mark.parametrize("later", ["write", "removal", "plain", "delete"])
def test_a_redirected_write_that_was_overtaken_is_not_done_late(
    core: ModuleType, later: str
) -> None:
    nodes = ClusterExchange(core, nodes=1, hash_tag=True)
    (first,) = nodes.issue(write("a", 2, 1))
    pipeline = nodes.router
    behind = {
        "write": lambda: pipeline.set("a", 3, "new", None, False, 2),
        "removal": lambda: pipeline.delete("a", 2),
        "plain": lambda: pipeline.set("a", 3, "new"),
        "delete": lambda: pipeline.delete("a"),
    }[later]()
    nodes.take()
    nodes.reply(0, Refusal("CLUSTERDOWN The cluster is down"))
    assert isinstance(first.error, ReplyError)
    assert nodes.redirected(0) == []
    nodes.reply(0, {"plain": b"OK", "delete": 2}.get(later, [0]))
    assert behind.value is {"plain": True, "delete": True}.get(later, False)


@CORES
def test_a_plain_write_is_not_taken_for_done_by_a_later_condition(core: ModuleType) -> None:
    exchange = Exchange(core)
    plain = exchange.pipeline.set("a", 2, "plain")
    exchange.pipeline.set("b", 2, "plain")
    (behind,) = exchange.issue(write("a", 3, 1))
    exchange.take()
    exchange.reply(Refusal("NOPERM No permissions to access a key"), [1])
    assert behind.value is True
    assert isinstance(plain.error, ReplyError)


@CORES
def test_behind_a_proxy_each_has_a_command_of_its_own(core: ModuleType) -> None:
    exchange = Exchange(core, hash_tag=True)
    exchange.pipeline.single_writes = True
    waiters = exchange.issue(write("a", 2, None), write("b", 2, 1), removal("c", 1))
    assert [command[2] for command in exchange.run()] == [b"2"] * 3
    assert [waiter.value for waiter in waiters] == [True, False, False]
    apart = Exchange(core)
    apart.pipeline.single_writes = True
    for waiter in apart.issue(write("a", 2, None), removal("c", 1)):
        apart.run()
        assert isinstance(waiter.error, RecordError)


@CORES
def test_a_near_cached_record_is_dropped_by_either_outcome(core: ModuleType) -> None:
    exchange = Exchange(core)
    near = core.NearCache(Waiter, exchange.pipeline)
    exchange.pipeline.near = near
    exchange.pipeline.connected(True)
    exchange.server.values |= {b"a_v": b"1", b"a_d": b"0"}
    for issue, result in (
        (lambda: near.set("a", 2, 0, None, False, 7), False),
        (lambda: near.delete("a", 7), False),
        (lambda: near.set("a", 2, 0, None, False, 1), True),
        (lambda: near.delete("a", 2), True),
    ):
        near.get("a")
        exchange.run()
        assert near.stats()["records"] == 1
        waiter = issue()
        assert near.stats()["records"] == 0
        exchange.run()
        assert waiter.value is result


def test_the_condition_is_shown_as_it_is_written() -> None:
    assert f"{dscache.ANY} {dscache.ANY!r}" == "ANY ANY"
