"""Operations at which the server cuts the connection: suspects, tried alone and last."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dscache.core import failures, suspects
from dscache.errors import ConnectionLost, DeadlineExceeded
from tests.support.wire import CORES, Exchange, Operation

Op = Operation


@pytest.fixture(params=CORES)
def core(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def exchange(core: Any) -> Exchange:
    return Exchange(core)


def cut(exchange: Exchange) -> list[bytes]:
    """Send, and cut before any reply; return the keys of the commands."""
    keys = [command[1] for command in exchange.take()]
    exchange.pipeline.connection_lost(OSError("cut"), True)
    return keys


def test_an_operation_cut_off_twice_is_tried_alone_and_last(exchange: Exchange) -> None:
    poison, innocent = exchange.issue(Op("get", "poison"), Op("get", "innocent"))
    assert cut(exchange) == [b"poison_v"] == cut(exchange)
    [newer] = exchange.issue(Op("get", "newer"))
    assert [command[1] for command in exchange.take()] == [b"newer_v"]
    exchange.reply([None, None])
    assert newer.result() is None
    assert cut(exchange) == [b"poison_v"]
    with pytest.raises(
        ConnectionLost,
        match=r"get .poison.: node.test:6379 has cut the connection 3 times .*: cut",
    ):
        poison.result()
    assert [command[1] for command in exchange.take()] == [b"innocent_v"]
    exchange.reply([b"3", b"1"])
    assert tuple(innocent.result()) == (3, 1)
    exchange.assert_drained()


def test_nothing_is_sent_beside_a_suspect(exchange: Exchange) -> None:
    exchange.issue(Op("get", "a"))
    cut(exchange)
    cut(exchange)
    exchange.take()
    exchange.issue(Op("get", "b"), Op("set", "c", (1, 1)))
    assert exchange.take() == []
    exchange.reply([None, None])
    assert [command[1] for command in exchange.take()] == [b"b_v", b"c_v"]
    exchange.reply([None, None], "OK")
    exchange.assert_drained()


def test_a_suspect_overtakes_no_older_one(exchange: Exchange) -> None:
    """A newer operation calls for one suspect, which shares a record with an older suspect."""
    written, read = exchange.issue(
        Op("set", "a", (1, 1), {"if_newer": True}), Op("get_bulk", ["a", "b"])
    )
    assert len(cut(exchange)) == len(cut(exchange)) == 2
    exchange.issue(Op("delete", "b"))
    assert [command[0] for command in exchange.take()] == [b"EVALSHA"]
    exchange.reply([1])
    assert [command[0] for command in exchange.take()] == [b"MGET"]
    exchange.reply([b"1", b"1", None, None])
    assert written.result() is True
    assert list(read.result()) == ["a"]
    assert [command[0] for command in exchange.take()] == [b"DEL"]
    exchange.reply(2)
    exchange.assert_drained()


def test_a_finalizer_issues_operations_while_a_suspect_waits(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage collection may begin between any two operations that are compared with a suspect."""
    [suspect] = exchange.issue(Op("get", "a"))
    cut(exchange)
    cut(exchange)
    exchange.issue(Op("get", "b"), Op("set", "c", (1, 1)))
    keep_order = suspects._keep_order

    def collecting(one: Any, other: Any) -> bool:
        exchange.issue(Op("get_bulk", ["d"]))
        return keep_order(one, other)

    monkeypatch.setattr(suspects, "_keep_order", collecting)
    assert [command[1] for command in exchange.take()] == [b"b_v", b"c_v", b"d_v", b"d_v"]
    exchange.reply([None, None], "OK", [None, None], [None, None])
    monkeypatch.undo()
    assert [command[1] for command in exchange.take()] == [b"a_v"]
    exchange.reply([b"2", b"1"])
    assert tuple(suspect.result()) == (2, 1)
    exchange.assert_drained()


def test_a_suspect_gets_its_try_while_others_never_pause(core: Any) -> None:
    """It goes alone once half of its time is left, as soon as what is in flight is answered."""
    exchange = Exchange(core, timeout=0.4)
    [suspect] = exchange.issue(Op("get", "a"))
    cut(exchange)
    cut(exchange)
    exchange.issue(Op("get", "b"))
    assert [command[1] for command in exchange.take()] == [b"b_v"]
    assert exchange.pipeline.take_output() == b""
    time.sleep(0.21)
    exchange.issue(Op("get", "c"))
    assert exchange.take() == []
    exchange.reply([None, None])
    assert [command[1] for command in exchange.take()] == [b"a_v"]
    exchange.reply([b"2", b"1"])
    assert tuple(suspect.result()) == (2, 1)
    assert [command[1] for command in exchange.take()] == [b"c_v"]
    exchange.reply([None, None])
    exchange.assert_drained()


def test_no_write_overtakes_a_suspect_of_its_name(exchange: Exchange) -> None:
    exchange.server.put("a", 1, b"1")
    [suspect] = exchange.issue(Op("get", "a"))
    cut(exchange)
    cut(exchange)
    exchange.issue(Op("get", "b"), Op("set", "a", (2, 2)))
    sent = exchange.run()
    assert [command[:2] for command in sent] == [
        [b"MGET", b"a_v"],
        [b"MGET", b"b_v"],
        [b"MSET", b"a_v"],
    ]
    assert tuple(suspect.result()) == (1, 1)


def test_a_bulk_is_one_suspect(exchange: Exchange) -> None:
    [bulk] = exchange.issue(Op("get_bulk", ["a", "b"]))
    cut(exchange)
    cut(exchange)
    [waiter] = exchange.issue(Op("get", "c"))
    assert [command[1] for command in exchange.take()] == [b"c_v"]
    exchange.reply([None, None])
    assert cut(exchange) == [b"a_v"]
    with pytest.raises(ConnectionLost, match=r"get_bulk: .* 3 times"):
        bulk.result()
    assert waiter.result() is None
    exchange.assert_drained()


def test_a_guarded_write_cut_off_three_times_may_have_happened(exchange: Exchange) -> None:
    [waiter] = exchange.issue(Op("set", "a", (3, "much"), {"if_newer": True}))
    for _ in range(3):
        cut(exchange)
    with pytest.raises(ConnectionLost, match=r"3 times .* the write may have happened"):
        waiter.result()
    exchange.assert_drained()


@pytest.mark.parametrize("lost_script", [False, True])
def test_a_suspect_that_is_refused_for_its_script_goes_alone_again(
    exchange: Exchange, lost_script: bool
) -> None:
    exchange.server.has_script = not lost_script
    [waiter] = exchange.issue(Op("set", "a", (3, "x"), {"if_newer": True}))
    cut(exchange)
    cut(exchange)
    exchange.run()
    assert waiter.result() is True


def test_a_connection_ended_from_here_blames_nothing(exchange: Exchange) -> None:
    [waiter] = exchange.issue(Op("get", "a"))
    for _ in range(5):
        exchange.take()
        exchange.pipeline.connection_lost(failures.EndedHere("another primary"), True)
    exchange.run()
    assert waiter.result() is None


def test_a_suspect_is_late_and_closed_like_others(core: Any) -> None:
    exchange = Exchange(core, timeout=100)
    [late] = exchange.issue(Op("get", "a"))
    cut(exchange)
    cut(exchange)
    deadline = exchange.pipeline.expire(time.monotonic())
    assert deadline is not None
    assert exchange.pipeline.expire(deadline) is None
    with pytest.raises(DeadlineExceeded):
        late.result()
    exchange.assert_drained()
    [closed] = exchange.issue(Op("get", "a"))
    cut(exchange)
    cut(exchange)
    exchange.pipeline.fail_all(lambda operation: ConnectionLost(f"{operation}: closed"))
    with pytest.raises(ConnectionLost, match="closed"):
        closed.result()
    exchange.assert_drained()
