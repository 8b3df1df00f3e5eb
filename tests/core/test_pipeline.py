"""The core alone: operations in, bytes out; bytes in, results out.

One section for each rule that a Pipeline keeps, on both cores.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

import dscache
from dscache.core import constants as c
from dscache.core import failures, refusals, scripts
from dscache.errors import (
    BulkError,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    ProtocolError,
    RecordError,
    ReplyError,
)
from tests.support.readers import FAST_WITH_OWN_READER
from tests.support.wire import (
    ADDRESS,
    CORES,
    NOPERM,
    NOSCRIPT,
    WRONGTYPE,
    Exchange,
    ModelRecords,
    Operation,
    Push,
    Refusal,
    Waiter,
    commands,
    counters,
    flushed,
    keys_of,
    plain,
    resp,
)

Op = Operation

# The most records in flight, apart from the last command that still fitted.
WINDOW = min(c.WINDOW_RECORDS, c.MAX_PENDING)


@pytest.fixture(params=[*CORES, FAST_WITH_OWN_READER])
def core(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def exchange(core: Any) -> Exchange:
    return Exchange(core)


def verbs(sent: list[list[bytes]]) -> list[str]:
    return [command[0].decode() for command in sent]


def record(name: str, version: int, data: bytes = b"1") -> list[bytes]:
    return [b"%d" % version, data]


# -- commands on the wire


@pytest.mark.parametrize(
    ("operation", "sent"),
    [
        (Op("get", "a"), [[b"MGET", b"a_v", b"a_d"]]),
        (Op("head", "a"), [[b"GET", b"a_v"], [b"TYPE", b"a_d"]]),
        (Op("set", "a", (3, [1])), [[b"MSET", b"a_v", b"3", b"a_d", b"[1]"]]),
        (
            Op("set", "a", (3, [1]), {"ttl": 60}),
            [[b"EVALSHA", scripts.SET_SCRIPT_SHA, b"2", b"a_v", b"a_d", b"3", b"[1]", b"60", b"0"]],
        ),
        (
            Op("set", "a", (3, [1]), {"if_newer": True}),
            [[b"EVALSHA", scripts.SET_SCRIPT_SHA, b"2", b"a_v", b"a_d", b"3", b"[1]", b"0", b"1"]],
        ),
        (
            Op("set", "a", (3, [1]), {"ttl": 60, "if_newer": True}),
            [[b"EVALSHA", scripts.SET_SCRIPT_SHA, b"2", b"a_v", b"a_d", b"3", b"[1]", b"60", b"1"]],
        ),
        (
            Op("set_bulk", {"a": (3, 1), "b": (4, 2)}, (), {"ttl": 60, "if_newer": True}),
            [
                [
                    *(b"EVALSHA", scripts.SET_SCRIPT_SHA, b"4", b"a_v", b"a_d", b"b_v", b"b_d"),
                    *(b"3", b"1", b"4", b"2", b"60", b"1"),
                ],
            ],
        ),
        (Op("delete", "a"), [[b"DEL", b"a_v", b"a_d"]]),
        (Op("get_bulk", ["a", "b", "a"]), [[b"MGET", b"a_v", b"a_d", b"b_v", b"b_d"]]),
        (
            Op("head_bulk", ["a", "b", "a"]),
            [[b"GET", b"a_v"], [b"TYPE", b"a_d"], [b"GET", b"b_v"], [b"TYPE", b"b_d"]],
        ),
        (
            Op("set_bulk", {"a": (0, "x"), "b": (c.MAX_VERSION, None)}),
            [
                [
                    *(b"MSET", b"a_v", b"0", b"a_d", b'"x"'),
                    *(b"b_v", b"9223372036854775807", b"b_d", b"null"),
                ],
            ],
        ),
        (Op("delete_bulk", ["a", "b", "a"]), [[b"DEL", b"a_v", b"a_d"], [b"DEL", b"b_v", b"b_d"]]),
    ],
    ids=lambda value: value.method if isinstance(value, Op) else "",
)
def test_commands(exchange: Exchange, operation: Operation, sent: list[list[bytes]]) -> None:
    exchange.issue(operation)
    assert exchange.take() == sent


def test_records_of_one_command_with_other_lifetimes_have_their_own(exchange: Exchange) -> None:
    exchange.issue(
        Op("set", "a", (3, 1), {"ttl": 60, "if_newer": True}),
        Op("set", "b", (4, 2), {"ttl": 7, "if_newer": True}),
    )
    [command] = exchange.take()
    assert command[2:] == [
        *(b"4", b"a_v", b"a_d", b"b_v", b"b_d"),
        *(b"3", b"1", b"60", b"1", b"4", b"2", b"7", b"1"),
    ]


def test_msetex_replaces_the_script_where_the_server_has_it(core: Any) -> None:
    exchange = Exchange(core, msetex=True)
    waiters = exchange.issue(
        Op("set", "a", (1, 1), {"ttl": 60}),
        Op("set", "b", (2, 2), {"ttl": 60}),
        Op("set", "c", (3, 3), {"ttl": 7}),
        Op("set", "d", (4, 4), {"ttl": 60, "if_newer": True}),
    )
    sent = exchange.run()
    assert sent[:2] == [
        [b"MSETEX", b"4", b"a_v", b"1", b"a_d", b"1", b"b_v", b"2", b"b_d", b"2", b"EX", b"60"],
        [b"MSETEX", b"2", b"c_v", b"3", b"c_d", b"3", b"EX", b"7"],
    ]
    assert verbs(sent) == ["MSETEX", "MSETEX", "EVALSHA"]
    assert [waiter.result() for waiter in waiters] == [True] * 4
    assert exchange.server.lifetimes == {
        key: 7 if name == "c" else 60 for name in "abcd" for key in keys_of(name)
    }


@pytest.mark.parametrize("msetex", [False, True], ids=["script", "msetex"])
def test_a_kept_lifetime_is_that_of_the_write_before(core: Any, msetex: bool) -> None:
    exchange = Exchange(core, msetex=msetex)
    exchange.issue(
        Op("set", "a", (1, 1), {"ttl": 60}),
        Op("set", "a", (2, 2), {"ttl": dscache.KEEP, "if_newer": True}),
        Op("set", "b", (1, 1), {"ttl": dscache.KEEP, "if_version": None}),
        Op("set", "c", (1, 1), {"ttl": 7, "if_version": None}),
    )
    exchange.run()
    exchange.issue(Op("set", "c", (2, 2), {"ttl": dscache.KEEP, "if_version": 1}))
    exchange.run()
    lifetimes = {key: 60 if name == "a" else 7 for name in "ac" for key in keys_of(name)}
    assert exchange.server.lifetimes == lifetimes
    assert [exchange.server.values[keys_of(name)[0]] for name in "abc"] == [b"2", b"1", b"2"]


@pytest.mark.parametrize("ttl", [None, 9, dscache.KEEP], ids=str)
def test_no_refused_write_counts_as_done_by_one_that_keeps_its_lifetime(
    core: Any, ttl: Any
) -> None:
    exchange = Exchange(core)
    exchange.issue(Op("set", "a", (1, 1), {"ttl": 9}))
    exchange.take()
    exchange.pipeline.whole_scripts = True
    exchange.issue(Op("set", "a", (2, 2), {"ttl": ttl, "if_newer": True}))
    exchange.take()
    exchange.reply(Refusal(NOSCRIPT), [1])
    first, second = exchange.waiters
    assert second.result() is True
    if ttl is dscache.KEEP:
        with pytest.raises(ReplyError, match="NOSCRIPT"):
            first.result()
    else:
        assert first.result() is True


@pytest.mark.parametrize(
    ("given", "argument"), [(None, b"30"), (0, None), (5, b"5"), (c.MAX_TTL, b"10000000000")]
)
def test_the_default_ttl_is_sent(core: Any, given: int | None, argument: bytes | None) -> None:
    exchange = Exchange(core, ttl=30)
    exchange.issue(Op("set", "a", (1, 1), {"ttl": given}))
    [sent] = exchange.take()
    assert sent[0] == (b"MSET" if argument is None else b"EVALSHA")
    assert argument is None or sent[-2] == argument


NAMES = [
    "a",
    "user/1",
    "with space",
    "line\r\nend",
    "\0",
    "é",
    "\u20ac",
    "\U0001f600",
    "{tag}x",
    "{",
    "{}",
    "}",
    "}{",
    "}}",
    "}{0}",
    "}x",
    "{0}",
    "0",
    "a_v",
    "a_d",
    "a}_v",
    "}_v",
    "x" * 65_536,
]


@pytest.mark.parametrize("prefix", ["", "app:", "é}{"])
@pytest.mark.parametrize("operation", ["get", "head", "delete", "set", "guarded"])
def test_keys_are_the_name_and_a_suffix(core: Any, prefix: str, operation: str) -> None:
    exchange = Exchange(core, key_prefix=prefix)
    for name in NAMES:
        assert _keys_sent(exchange, operation, name) == [
            f"{prefix}{name}_v".encode(),
            f"{prefix}{name}_d".encode(),
        ]


@pytest.mark.parametrize("operation", ["get", "head", "delete", "set", "guarded"])
def test_hash_tag_keeps_both_keys_in_one_slot(core: Any, operation: str) -> None:
    exchange = Exchange(core, hash_tag=True)
    owner: dict[bytes, str] = {}
    for name in NAMES:
        keys = _keys_sent(exchange, operation, name)
        assert key_slot(keys[0]) == key_slot(keys[1]), name
        assert [key[-2:] for key in keys] == [b"_v", b"_d"]
        for key in keys:
            assert owner.setdefault(key, name) == name
    assert _keys_sent(exchange, operation, "user/1") == [b"{user/1}_v", b"{user/1}_d"]


@given(st.lists(st.text("{}0_vda", min_size=1, max_size=6), min_size=1, max_size=40))
@pytest.mark.parametrize("core", CORES)
def test_hash_tag_is_injective(core: Any, names: list[str]) -> None:
    exchange = Exchange(core, hash_tag=True)
    exchange.issue(Op("get_bulk", names))
    [[_, *keys]] = exchange.take()
    assert len(set(keys)) == 2 * len(set(names))
    for version_key, data_key in zip(keys[::2], keys[1::2], strict=True):
        assert key_slot(version_key) == key_slot(data_key)


def test_prefix_and_hash_tag(core: Any) -> None:
    exchange = Exchange(core, hash_tag=True, key_prefix="app:")
    assert _keys_sent(exchange, "get", "a") == [b"app:{a}_v", b"app:{a}_d"]
    assert _keys_sent(exchange, "get", "}a") == [b"app:}{0}}a_v", b"app:}{0}}a_d"]


def _keys_sent(exchange: Exchange, operation: str, name: str) -> list[bytes]:
    """Return the two keys in the command of a record operation."""
    match operation:
        case "set":
            exchange.issue(Op("set", name, (1, 1)))
            [[_, version_key, _, data_key, _]] = exchange.take()
            return [version_key, data_key]
        case "guarded":
            exchange.issue(Op("set", name, (1, 1), {"if_newer": True}))
            [sent] = exchange.take()
            return sent[3:5]
        case "head":
            exchange.issue(Op("head", name))
            return [key for _, key in exchange.take()]
    exchange.issue(Op(operation, name))
    [sent] = exchange.take()
    return sent[1:]


# -- order


def _steps(name: str, at: int) -> list[Operation]:
    """Return every operation, as the step ``at`` of a sequence."""
    version = 10 * (at + 1)
    data = {"step": at}
    return [
        Op("get", name),
        Op("head", name),
        Op("set", name, (version, data)),
        Op("set", name, (version, data), {"ttl": 60}),
        Op("set", name, (version, data), {"if_newer": True}),
        Op("set", name, (1, data), {"if_newer": True}),
        Op("delete", name),
        Op("get_bulk", [name, "other"]),
        Op("head_bulk", [name]),
        Op("set_bulk", {name: (version, data), "more": (version, data)}),
        Op("set_bulk", {name: (version, data)}, (), {"ttl": 60}),
        Op("set_bulk", {name: (2, data)}, (), {"if_newer": True}),
        Op("delete_bulk", [name, "other"]),
    ]


SEQUENCES = [
    sequence
    for length in (1, 2, 3)
    for sequence in itertools.product(*(_steps("a", at) for at in range(length)))
]


@pytest.mark.parametrize("ticks", ["one tick", "a tick each"])
@pytest.mark.parametrize("start", [None, 5], ids=["absent", "present"])
@pytest.mark.parametrize("msetex", [False, True], ids=["script", "msetex"])
def test_every_sequence_on_a_name_takes_effect_in_order(
    core: Any, msetex: bool, start: int | None, ticks: str
) -> None:
    for sequence in SEQUENCES:
        exchange, oracle = Exchange(core, msetex=msetex), ModelRecords()
        if start is not None:
            exchange.server.put("a", start, b'"start"')
            oracle.set("a", start, "start")
        expected = [operation.on(oracle) for operation in sequence]
        output = b""
        for operation in sequence:
            exchange.issue(operation)
            if ticks == "a tick each":
                output += exchange.pipeline.take_output()
        output += exchange.pipeline.take_output()
        exchange.pipeline.feed(exchange.server.answer(output))
        exchange.assert_drained()
        assert [plain(waiter.result()) for waiter in exchange.waiters] == expected, sequence
        stored = exchange.server.values
        assert {key.decode()[:-2] for key in stored} == set(oracle.records), sequence
        for name, (version, _) in oracle.records.items():
            assert stored[keys_of(name)[0]] == b"%d" % version, sequence


names = st.sampled_from("abc")
versions = st.integers(0, 12)
write_options = st.fixed_dictionaries(
    {}, optional={"ttl": st.sampled_from([0, 60, 61]), "if_newer": st.booleans()}
)
operations = st.one_of(
    st.builds(Op, st.sampled_from(["get", "head", "delete"]), names),
    st.builds(
        lambda name, version, data, options: Op("set", name, (version, data), options),
        names,
        versions,
        st.integers(),
        write_options,
    ),
    st.builds(
        Op,
        st.sampled_from(["get_bulk", "head_bulk", "delete_bulk"]),
        st.lists(names, max_size=3),
    ),
    st.builds(
        lambda records, options: Op("set_bulk", records, (), options),
        st.dictionaries(names, st.tuples(versions, st.integers())),
        write_options,
    ),
)


@given(ticks=st.lists(st.lists(operations, max_size=12), max_size=4), msetex=st.booleans())
@pytest.mark.parametrize("core", CORES)
def test_ticks_take_effect_in_order(core: Any, ticks: list[list[Operation]], msetex: bool) -> None:
    exchange, oracle = Exchange(core, msetex=msetex), ModelRecords()
    expected = []
    output = b""
    for tick in ticks:
        exchange.issue(*tick)
        expected += [operation.on(oracle) for operation in tick]
        output += exchange.pipeline.take_output()
    exchange.pipeline.feed(exchange.server.answer(output))
    exchange.assert_drained()
    assert [plain(waiter.result()) for waiter in exchange.waiters] == expected


def test_operations_of_a_tick_share_commands_by_kind(exchange: Exchange) -> None:
    exchange.issue(
        Op("get", "a"),
        Op("set", "b", (1, 1)),
        Op("get", "c"),
        Op("head", "d"),
        Op("set", "e", (2, 2)),
        Op("get", "f"),
    )
    assert exchange.take() == [
        [b"MGET", b"a_v", b"a_d", b"c_v", b"c_d", b"f_v", b"f_d"],
        [b"MSET", b"b_v", b"1", b"b_d", b"1", b"e_v", b"2", b"e_d", b"2"],
        [b"GET", b"d_v"],
        [b"TYPE", b"d_d"],
    ]


def test_a_bulk_is_a_barrier(exchange: Exchange) -> None:
    exchange.issue(Op("get", "a"), Op("get_bulk", ["b"]), Op("get", "a"), Op("get", "c"))
    assert exchange.take() == [
        [b"MGET", b"a_v", b"a_d"],
        [b"MGET", b"b_v", b"b_d"],
        [b"MGET", b"a_v", b"a_d", b"c_v", b"c_d"],
    ]


# -- coalescing


def test_reads_of_a_name_share_one_wire_read_and_nothing_else(exchange: Exchange) -> None:
    exchange.server.put("a", 3, b'{"n":[1]}')
    waiters = exchange.issue(*[Op("get", "a")] * 50)
    assert exchange.pipeline.queued == 1
    assert exchange.run() == [[b"MGET", b"a_v", b"a_d"]]
    records = [waiter.result() for waiter in waiters]
    assert {(r.name, r.version, r.raw) for r in records} == {("a", 3, b'{"n":[1]}')}
    assert len({id(r) for r in records}) == 50
    assert len({id(r.data) for r in records}) == 50
    records[0].data["n"].append(2)
    assert records[1].data == {"n": [1]}


def test_heads_of_a_name_share_one_wire_read(exchange: Exchange) -> None:
    exchange.server.put("a", 3, b"1")
    waiters = exchange.issue(*[Op("head", "a")] * 5)
    assert len(exchange.run()) == 2
    assert [waiter.result() for waiter in waiters] == [3] * 5


@pytest.mark.parametrize("ttl", [0, 60], ids=["plain", "ttl"])
def test_writes_of_a_name_collapse_to_the_last(exchange: Exchange, ttl: int) -> None:
    waiters = exchange.issue(
        Op("set", "a", (1, "first"), {"ttl": ttl}),
        Op("set", "b", (1, "b"), {"ttl": ttl}),
        Op("set", "a", (3, "second"), {"ttl": ttl}),
        Op("set", "a", (2, "last"), {"ttl": ttl}),
    )
    assert exchange.pipeline.queued == 2
    assert len(exchange.run()) == 1
    assert [waiter.result() for waiter in waiters] == [True] * 4
    assert exchange.server.values[b"a_v"] == b"2"
    assert exchange.server.values[b"a_d"] == b'"last"'
    assert exchange.pipeline.stats()["writes"] == 2


def test_guarded_writes_of_a_name_each_have_their_result(exchange: Exchange) -> None:
    waiters = exchange.issue(
        *(Op("set", "a", (version, version), {"if_newer": True}) for version in (2, 1, 3, 3))
    )
    assert exchange.pipeline.queued == 4
    assert verbs(exchange.run()) == ["EVALSHA"] * 4
    assert [waiter.result() for waiter in waiters] == [True, False, True, False]
    assert exchange.pipeline.stats()["not_newer"] == 2


def test_removals_of_a_name_each_have_their_result(exchange: Exchange) -> None:
    exchange.server.put("a", 1, b"1")
    waiters = exchange.issue(*[Op("delete", "a")] * 3)
    assert verbs(exchange.run()) == ["DEL"] * 3
    assert [waiter.result() for waiter in waiters] == [True, False, False]


@pytest.mark.parametrize(
    "operation", [Op("get", "a"), Op("head", "a"), Op("set", "a", (1, 1))], ids=lambda op: op.method
)
def test_nothing_joins_a_sent_batch(exchange: Exchange, operation: Operation) -> None:
    exchange.issue(operation)
    first = exchange.take()
    exchange.issue(operation)
    assert exchange.take() == first


def test_nothing_joins_an_earlier_tick(exchange: Exchange) -> None:
    exchange.issue(Op("get", "a"))
    exchange.pipeline.end_tick()
    exchange.issue(Op("get", "a"))
    assert exchange.wakes == 2
    assert exchange.take() == [[b"MGET", b"a_v", b"a_d"]] * 2


def test_a_read_sent_before_a_write_does_not_serve_one_issued_after(exchange: Exchange) -> None:
    exchange.server.put("a", 1, b"1")
    [old] = exchange.issue(Op("get", "a"))
    late_reply = exchange.server.answer(exchange.pipeline.take_output())
    exchange.issue(Op("set", "a", (2, 2)))
    answered = exchange.server.answer(exchange.pipeline.take_output())
    [new] = exchange.issue(Op("get", "a"))
    exchange.pipeline.feed(late_reply + answered)
    exchange.run()
    assert (old.result().version, new.result().version) == (1, 2)


# -- flushing


def test_wake_is_called_once_a_tick(exchange: Exchange) -> None:
    assert exchange.wakes == 0
    exchange.issue(Op("get", "a"), Op("set", "b", (1, 1)), Op("get_bulk", ["c"]))
    assert exchange.wakes == 1
    exchange.run()
    exchange.issue(Op("delete_bulk", ["c"]), Op("get", "a"))
    assert exchange.wakes == 2


@pytest.mark.parametrize("operation", _steps("a", 0), ids=lambda op: op.method)
def test_a_wake_that_raises_leaves_nothing_queued(core: Any, operation: Operation) -> None:
    class NotNowError(Exception):
        pass

    def wake() -> None:
        raise NotNowError

    pipeline = core.Pipeline(Waiter, wake)
    for _ in range(2):
        with pytest.raises(NotNowError):
            operation.on(pipeline)
    assert pipeline.stats()["pending"] == 0
    assert pipeline.take_output() == b""


def test_an_idle_server_gets_work_before_the_tick_ends(core: Any) -> None:
    begun: list[list[list[bytes]]] = []
    exchange = Exchange(core, begin=lambda: begun.append(exchange.take()))
    reads = [Op("get", f"r{number}") for number in range(c.EARLY_RECORDS // 2)]
    writes = [Op("set", f"w{number}", (1, 1)) for number in range(c.EARLY_RECORDS // 2)]
    exchange.issue(*reads, *writes[1:])
    assert begun == []
    exchange.issue(writes[0])
    [[read, write]] = begun
    assert read == [b"MGET", *(key for one in reads for key in keys_of(one.argument))]
    assert len(write) == 1 + 4 * len(writes)
    # Now it is busy: the other operations go together at the end of the tick.
    exchange.issue(*(Op("delete", f"d{number}") for number in range(2 * c.EARLY_RECORDS)))
    assert len(begun) == 1
    assert len(exchange.take()) == 2 * c.EARLY_RECORDS
    assert exchange.wakes == 2


def test_each_operation_asks_for_a_flush_until_one_happens(core: Any) -> None:
    begun: list[int] = []
    exchange = Exchange(core, begin=lambda: begun.append(exchange.pipeline.queued))
    names = [f"r{number}" for number in range(c.EARLY_RECORDS + 2)]
    exchange.issue(*(Op("get", name) for name in names))
    assert begun == [c.EARLY_RECORDS, c.EARLY_RECORDS + 1, c.EARLY_RECORDS + 2]
    assert exchange.run() == [[b"MGET", *(key for name in names for key in keys_of(name))]]


def test_without_operations_nothing_is_flushed(exchange: Exchange) -> None:
    assert exchange.pipeline.take_output() == b""
    assert exchange.pipeline.stats()["flushes"] == 0


@pytest.mark.parametrize(
    ("operation", "result"),
    [
        (Op("get_bulk", []), {}),
        (Op("head_bulk", ()), {}),
        (Op("set_bulk", {}), set()),
        (Op("delete_bulk", iter(())), 0),
    ],
    ids=lambda value: value.method if isinstance(value, Op) else "",
)
def test_an_empty_bulk_sends_nothing(
    exchange: Exchange, operation: Operation, result: object
) -> None:
    [waiter] = exchange.issue(operation)
    assert waiter.result() == result
    assert type(waiter.result()) is type(result)
    # An empty bulk on a closed cache must report the closing too.
    assert exchange.wakes == 1
    assert exchange.pipeline.take_output() == b""
    exchange.assert_drained()


@pytest.mark.parametrize(
    ("operation", "limit"),
    [
        (lambda names: Op("get_bulk", names), c.COMMAND_RECORDS),
        (lambda names: Op("set_bulk", dict.fromkeys(names, (1, 1))), c.COMMAND_RECORDS),
        (
            lambda names: Op("set_bulk", dict.fromkeys(names, (1, 1)), (60,)),
            c.SCRIPT_RECORDS,
        ),
        (
            lambda names: Op("set_bulk", dict.fromkeys(names, (1, 1)), (0, True)),
            c.SCRIPT_RECORDS,
        ),
    ],
    ids=["get", "set", "ttl", "if_newer"],
)
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_number_of_records_in_a_command_is_limited(
    exchange: Exchange, operation: Any, limit: int, extra: int
) -> None:
    names = [f"n{i}" for i in range(2 * limit + extra)]
    [waiter] = exchange.issue(operation(names))
    sent = exchange.run()
    counts = [
        sum(part.endswith((b"_v", b"_d")) and part.startswith(b"n") for part in command) // 2
        for command in sent
    ]
    assert counts == {-1: [limit, limit - 1], 0: [limit, limit], 1: [limit, limit, 1]}[extra]
    assert waiter.result() in ({}, set())


@pytest.mark.parametrize("method", ["get_bulk", "set_bulk", "head_bulk", "delete_bulk"])
def test_a_large_bulk_is_sent_in_parts(exchange: Exchange, method: str) -> None:
    """The server works on the first part while the rest is encoded."""
    names = [f"n{i}" for i in range(3 * c.FLUSH_RECORDS + 1)]
    rest = dict.fromkeys(names, (1, 1)) if method == "set_bulk" else names
    exchange.issue(Op("get", "single"), Op(method, rest))
    counts = []
    while output := exchange.pipeline.take_output():
        counts.append(exchange.pipeline.in_flight - sum(counts))
        assert commands(output)
    # A batch is not split to fill up the window.
    assert counts == [1 + c.FLUSH_RECORDS, c.FLUSH_RECORDS, c.FLUSH_RECORDS, 1]


def test_the_window_limits_the_records_in_flight(exchange: Exchange) -> None:
    names = [f"n{i}" for i in range(WINDOW + 2000)]
    for name in names[::3]:
        exchange.server.put(name, 7, b"1")
    [waiter] = exchange.issue(Op("get_bulk", names))
    assert exchange.pipeline.queued == len(names)
    output = b""
    while more := exchange.pipeline.take_output():
        output += more
    in_flight = exchange.pipeline.in_flight
    assert WINDOW <= in_flight < WINDOW + c.COMMAND_RECORDS
    assert exchange.pipeline.queued == len(names) - in_flight
    replies = exchange.server.answer(output)
    exchange.pipeline.feed(replies[: len(replies) // 2])
    assert exchange.pipeline.in_flight < WINDOW
    output = exchange.pipeline.take_output()
    assert output
    exchange.pipeline.feed(replies[len(replies) // 2 :] + exchange.server.answer(output))
    exchange.run()
    assert list(waiter.result()) == names[::3]


def test_removals_in_flight_are_limited_too(exchange: Exchange) -> None:
    names = [f"n{i}" for i in range(WINDOW + 2000)]
    [waiter] = exchange.issue(Op("delete_bulk", names))
    output = b""
    while more := exchange.pipeline.take_output():
        output += more
    assert exchange.pipeline.in_flight < WINDOW + c.COMMAND_RECORDS
    exchange.pipeline.feed(exchange.server.answer(output))
    exchange.run()
    assert waiter.result() == 0


@pytest.mark.parametrize("options", [{}, {"ttl": 9}, {"if_newer": True}], ids=str)
@pytest.mark.parametrize("msetex", [False, True], ids=["script", "msetex"])
def test_the_text_of_a_command_is_limited(core: Any, options: dict[str, Any], msetex: bool) -> None:
    exchange = Exchange(core, msetex=msetex)
    third = "x" * (c.COMMAND_BYTES // 3 - len('""'))
    huge = "y" * (3 * c.COMMAND_BYTES)
    texts = [third, third, third, huge, "z", huge, huge, third, "z"]
    records = {f"n{i}": (i, text) for i, text in enumerate(texts)}
    [waiter] = exchange.issue(Op("set_bulk", records, (), options))
    flushes = []
    while output := exchange.pipeline.take_output():
        flushes.append(output)
        exchange.pipeline.feed(exchange.server.answer(output))
    exchange.assert_drained()
    assert waiter.result() == set()
    for command in exchange.server.executed:
        long = [len(part) for part in command if part.startswith(b'"')]
        assert sum(long) <= c.COMMAND_BYTES or len(long) == 1
    assert len(exchange.server.executed) == 6
    for output in flushes:
        last = len(output) - output.rfind(b"\r\n*")
        assert len(output) - last <= c.COMMAND_BYTES
    for name, (version, text) in records.items():
        assert exchange.server.values[keys_of(name)[0]] == b"%d" % version
        assert exchange.server.values[keys_of(name)[1]] == b'"%s"' % text.encode()


# -- a reply belongs to its slot


def test_the_reply_to_a_cancelled_waiter_is_dropped(exchange: Exchange) -> None:
    for version, name in enumerate("abc"):
        exchange.server.put(name, version, b"1")
    first, second, third = exchange.issue(Op("get", "a"), Op("get", "b"), Op("get", "b"))
    second.cancel()
    output = exchange.pipeline.take_output()
    first.cancel()
    [fourth] = exchange.issue(Op("get", "c"))
    output += exchange.pipeline.take_output()
    exchange.pipeline.feed(exchange.server.answer(output))
    exchange.assert_drained()
    assert (third.result().name, fourth.result().name) == ("b", "c")
    assert not first.done
    assert not second.done


@pytest.mark.parametrize("operation", _steps("a", 0), ids=lambda op: op.method)
@pytest.mark.parametrize("reply", ["good", "refused", "lost", "expired"])
def test_cancelled_futures_detach(core: Any, operation: Operation, reply: str) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        exchange = Exchange(core)
        pipeline = core.Pipeline(loop.create_future, lambda: None, address=ADDRESS, timeout=3600)
        cancelled, waited = operation.on(pipeline), pipeline.get("z")
        output = pipeline.take_output()
        cancelled.cancel()
        match reply:
            case "lost":
                pipeline.connection_lost(ConnectionLost("cut"), False)
            case "expired":
                pipeline.expire(math.inf)
                pipeline.feed(exchange.server.answer(output))
            case "refused":
                exchange.server.refused = {*keys_of("a")}
                pipeline.feed(exchange.server.answer(output))
                while output := pipeline.take_output():
                    pipeline.feed(exchange.server.answer(output))
            case "good":
                pipeline.feed(exchange.server.answer(output))
        assert cancelled.cancelled()
        expected = {"lost": ConnectionLost, "expired": DeadlineExceeded}
        assert type(waited.exception()) is expected.get(reply, type(None))
        assert pipeline.stats()["pending"] == 0

    asyncio.run(scenario())


def test_the_reply_to_an_expired_operation_is_dropped(exchange: Exchange) -> None:
    """Otherwise the next caller would get the reply to the abandoned request."""
    for version, name in enumerate("abcdef"):
        exchange.server.put(name, version, b"1")
    late = exchange.issue(
        Op("get", "a"),
        Op("head", "b"),
        Op("get_bulk", ["c", "d"]),
        Op("head_bulk", ["c", "d"]),
        Op("set", "x", (1, 1)),
        Op("set", "x", (1, 1), {"if_newer": True}),
        Op("delete", "y"),
        Op("delete_bulk", ["y", "z"]),
        Op("set_bulk", {"x": (1, 1)}),
    )
    output = exchange.pipeline.take_output()
    assert exchange.pipeline.expire(math.inf) is None
    for waiter in late:
        assert isinstance(waiter.error, DeadlineExceeded)
    assert exchange.pipeline.in_flight == 12
    [read, head] = exchange.issue(Op("get", "f"), Op("head", "e"))
    output += exchange.pipeline.take_output()
    exchange.pipeline.feed(exchange.server.answer(output))
    exchange.assert_drained()
    assert read.result().name == "f"
    assert head.result() == 4


def test_a_head_that_expires_between_its_two_replies(exchange: Exchange) -> None:
    exchange.server.put("a", 1, b"1")
    exchange.server.put("b", 2, b"1")
    [late] = exchange.issue(Op("head", "a"))
    exchange.pipeline.take_output()
    exchange.reply(b"1")
    exchange.pipeline.expire(math.inf)
    [waiter] = exchange.issue(Op("head", "b"))
    output = exchange.pipeline.take_output()
    exchange.reply("string")
    exchange.pipeline.feed(exchange.server.answer(output))
    exchange.assert_drained()
    assert isinstance(late.error, DeadlineExceeded)
    assert waiter.result() == 2


def test_half_a_reply_is_forgotten_with_its_connection(core: Any) -> None:
    length = cut = 0
    while cut <= length:
        exchange = Exchange(core)
        exchange.server.put("a", 1, b'"abc"')
        exchange.server.put("b", 2, b"1")
        waiters = exchange.issue(Op("get", "a"), Op("head", "b"), Op("get_bulk", ["b"]))
        replies = exchange.server.answer(exchange.pipeline.take_output())
        exchange.pipeline.feed(replies[:cut])
        exchange.pipeline.connection_lost(ConnectionLost("cut"), True)
        exchange.run()
        expected = [(1, "abc"), 2, {"b": (2, 1)}]
        assert [plain(waiter.result()) for waiter in waiters] == expected
        length, cut = len(replies), cut + 1


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_replies_may_arrive_in_pieces_of_any_size(core: Any, size: int) -> None:
    for via_buffer in (False, True):
        exchange, oracle = Exchange(core), ModelRecords()
        chosen = random.Random(size)
        sequence = [op for name in "ab" for op in chosen.sample(_steps(name, 0), 10)]
        waiters = exchange.issue(*sequence)
        expected = [operation.on(oracle) for operation in sequence]
        replies = exchange.server.answer(exchange.pipeline.take_output())
        for at in range(0, len(replies), size):
            piece = replies[at : at + size]
            if via_buffer:
                exchange.pipeline.get_buffer(-1)[: len(piece)] = piece
                exchange.pipeline.buffer_updated(len(piece))
            else:
                exchange.pipeline.feed(piece)
        exchange.assert_drained()
        assert [plain(waiter.result()) for waiter in waiters] == expected
        assert exchange.pipeline.stats()["bytes_in"] == len(replies)


# Around the size of the buffer and beyond it; a record's keys and lengths take some bytes too.
_SIZES = [0, 1, 100, c.READ_BUFFER_BYTES // 2, c.READ_BUFFER_BYTES - 40, c.READ_BUFFER_BYTES]
_SIZES += [c.READ_BUFFER_BYTES + 1, 3 * c.READ_BUFFER_BYTES]


@pytest.mark.parametrize("seed", range(20))
def test_replies_of_any_size_may_arrive_in_pieces_of_any_size(core: Any, seed: int) -> None:
    chosen = random.Random(seed)
    exchange = Exchange(core)
    expected: dict[str, tuple[int, str]] = {}
    damaged = []
    for name in map(str, range(30)):
        kind = chosen.choice(["record", "record", "record", "missing", "half", "damaged"])
        text = name[-1] * chosen.choice(_SIZES)
        version = chosen.choice([0, 7, 10**18, c.MAX_VERSION])
        if kind == "record":
            exchange.server.put(name, version, b'"%s"' % text.encode())
            expected[name] = (version, text)
        elif kind == "half":
            exchange.server.put(name, 1, None)
        elif kind == "damaged":
            exchange.server.put(name, chosen.choice([2**63, "x", "1" * 400]), b"1")
            damaged.append(name)
    for _ in range(3):  # the rest of one read must not disturb the next
        names = chosen.sample(list(map(str, range(30))), 30)
        bulk, *singles, last = exchange.issue(
            Op("get_bulk", names), *(Op("get", name) for name in names), Op("head", names[0])
        )
        replies = exchange.server.answer(flushed(exchange.pipeline))
        at = 0
        while at < len(replies):
            buffer = exchange.pipeline.get_buffer(-1)
            size = min(chosen.choice([1, 5, 1000, len(buffer)]), len(buffer), len(replies) - at)
            if chosen.randrange(2):
                buffer[:size] = replies[at : at + size]
                exchange.pipeline.buffer_updated(size)
            else:
                exchange.pipeline.feed(replies[at : at + size])
            at += size
        exchange.assert_drained()
        found = bulk.error.result if damaged else bulk.result()
        assert [plain(record) for record in found.values()] == [
            expected[name] for name in names if name in expected
        ]
        for name, waiter in zip(names, singles, strict=True):
            if name in damaged:
                assert isinstance(waiter.error, RecordError)
            else:
                assert plain(waiter.result()) == expected.get(name)
        assert last.done


def test_the_rest_of_an_abandoned_reply_answers_nothing(exchange: Exchange) -> None:
    for name in "abc":
        exchange.server.put(name, 1, b'"of %s"' % name.encode())
    [waiter] = exchange.issue(Op("get_bulk", ["a", "b", "c"]))
    reply = exchange.server.answer(exchange.pipeline.take_output())
    exchange.pipeline.feed(reply[: len(reply) // 2])
    exchange.pipeline.fail_all(lambda operation: ConnectionLost(operation))
    assert isinstance(waiter.error, ConnectionLost)
    with pytest.raises(ProtocolError, match=rf"^{ADDRESS} sent a reply that no operation waits"):
        exchange.pipeline.feed(reply[len(reply) // 2 :])


@pytest.mark.parametrize("names", [["a"], ["x", "y", "z"], ["x", "y", "z", "a"]], ids=len)
@pytest.mark.parametrize("part", [0.3, 0.5, 0.8])
def test_half_a_reply_is_not_completed_by_another(
    exchange: Exchange, names: list[str], part: float
) -> None:
    for name in "abc":
        exchange.server.put(name, 1, b'"of %s"' % name.encode())
    exchange.issue(Op("get_bulk", ["a", "b", "c"]))
    reply = exchange.server.answer(exchange.pipeline.take_output())
    at = int(len(reply) * part)
    exchange.pipeline.feed(reply[:at])
    exchange.pipeline.fail_all(lambda operation: ConnectionLost(operation))
    [waiter] = exchange.issue(Op("get_bulk", names))
    exchange.pipeline.take_output()
    with pytest.raises(ProtocolError):
        exchange.pipeline.feed(reply[at:])
    assert not waiter.done


@pytest.mark.parametrize("via_buffer", [False, True])
def test_the_reply_buffer_is_reused(exchange: Exchange, via_buffer: bool) -> None:
    """Each reply is whole, and together they are many times the size of the buffer."""
    text = "x" * (c.READ_BUFFER_BYTES // 3)
    exchange.server.put("a", 1, b'"%s"' % text.encode())
    for _ in range(20):
        [waiter] = exchange.issue(Op("get", "a"))
        reply = exchange.server.answer(exchange.pipeline.take_output())
        if via_buffer:
            exchange.pipeline.get_buffer(-1)[: len(reply)] = reply
            exchange.pipeline.buffer_updated(len(reply))
        else:
            exchange.pipeline.feed(reply)
        assert plain(waiter.result()) == (1, text)


def test_more_bytes_than_the_buffer_holds_are_refused(exchange: Exchange) -> None:
    buffer = exchange.pipeline.get_buffer(-1)
    with pytest.raises(ValueError, match="no such part"):
        exchange.pipeline.buffer_updated(len(buffer) + 1)


def test_buffer(exchange: Exchange) -> None:
    buffer = exchange.pipeline.get_buffer(-1)
    assert isinstance(buffer, memoryview)
    assert (len(buffer), buffer.readonly) == (c.READ_BUFFER_BYTES, False)


# -- other input


def test_pushes_answer_nothing(exchange: Exchange) -> None:
    [waiter] = exchange.issue(Op("get", "a"))
    exchange.take()
    push = Push([b"invalidate", [b"a_v"]])
    exchange.reply(push, push, [b"1", b"2"], push)
    exchange.assert_drained()
    assert waiter.result().version == 1


@pytest.mark.parametrize(
    "push", [[], [None, None], [1], [b"7", b"{}"], [b"", b""], [[b"a"]]], ids=repr
)
def test_a_push_without_a_kind_is_a_protocol_error(exchange: Exchange, push: list[Any]) -> None:
    """If it were skipped, the next reply would go to the caller of this one."""
    waiters = exchange.issue(Op("get", "a"))
    exchange.take()
    waiters += exchange.issue(Op("get", "b"))
    exchange.take()
    with pytest.raises(ProtocolError, match=rf"^{ADDRESS} sent a push without a kind"):
        exchange.reply(Push(push), [b"1", b'"of b"'])
    assert not any(waiter.done for waiter in waiters)


@pytest.mark.parametrize("reply", ["OK", b"x", None, 1, [], Refusal("ERR no"), {}, True], ids=repr)
def test_a_reply_without_a_command_ends_the_connection(exchange: Exchange, reply: object) -> None:
    with pytest.raises(ProtocolError, match=rf"^{ADDRESS} sent a reply that no operation waits"):
        exchange.reply(reply)


@pytest.mark.parametrize(
    "data",
    [
        *(b"HTTP/1.1 400 Bad Request\r\n", b"\0", b":x\r\n", b"$-2\r\n", b"*1\r\n?\r\n", b"\xff"),
        *(b"*02\r\n$1\r\n1\r\n$1\r\n1\r\n", b"*2\r\n$01\r\n1\r\n$1\r\n1\r\n"),
        *(b"*2\r\n$1\r\n1\r\n$+1\r\n1\r\n", b"*2\r\n_\r\n_x\r\n", b"*2\r\n$1\r1\r\n$1\r\n1\r\n"),
    ],
)
def test_invalid_resp_ends_the_connection(exchange: Exchange, data: bytes) -> None:
    [waiter] = exchange.issue(Op("get", "a"))
    exchange.take()
    with pytest.raises(ProtocolError, match=rf"^{ADDRESS} sent no valid reply: "):
        exchange.pipeline.feed(data)
    assert not waiter.done


NOT_AN_ARRAY: list[object] = [None, "OK", b"x", 2, True, 1.5, {b"a": b"b"}]
HOSTILE: list[tuple[Operation, list[object]]] = [
    (Op("get", "a"), NOT_AN_ARRAY),
    (Op("get", "a"), [[], [b"1"], [b"1"] * 3, [1, b"1"], [b"1", 1], [b"1", [b"1"]]]),
    (Op("get", "a"), [[True, b"1"], [Refusal("ERR"), b"1"], [None, Refusal("ERR")], [[None] * 2]]),
    (Op("get_bulk", ["a", "b"]), [*NOT_AN_ARRAY, [b"1"] * 2, [b"1"] * 6, [b"1", b"1", b"1", 1]]),
    (Op("set", "a", (1, 1)), [None, "OKAY", b"", 1, True, [b"OK"], "QUEUED", {b"OK": b"OK"}]),
    (Op("set_bulk", {"a": (1, 1), "b": (1, 1)}), [None, "QUEUED", 2]),
    (Op("set", "a", (1, 1), {"if_newer": True}), NOT_AN_ARRAY),
    (
        Op("set", "a", (1, 1), {"if_newer": True}),
        [[], [2], [-2], [None], [True], [b"1"], [1, 1], [1.0], [[1]], [2**62]],
    ),
    (Op("set_bulk", {"a": (1, 1), "b": (1, 1)}, (9,)), [[1], [1, 2], [1, 1, 1], [1, None], "OK"]),
    (Op("delete", "a"), [None, "OK", b"1", 3, -1, True, 1.0, [1], 2**62]),
    (Op("delete_bulk", ["a", "b"]), [None, "OK", 3]),
]


@pytest.mark.parametrize(
    ("operation", "reply"),
    [(operation, reply) for operation, replies in HOSTILE for reply in replies],
    ids=lambda value: value.method if isinstance(value, Op) else repr(value)[:30],
)
def test_an_unexpected_reply_ends_the_connection(
    exchange: Exchange, operation: Operation, reply: object
) -> None:
    """It ends the connection, and every operation on it fails exactly once."""
    exchange.issue(operation, Op("get", "later"))
    exchange.take()
    with pytest.raises(ProtocolError, match=rf"^{ADDRESS}: unexpected reply to [A-Z]\w.*|th"):
        exchange.reply(reply)
    _lose_all(exchange)


@pytest.mark.parametrize(
    "replies",
    [
        (b"1", "hash_of_another_kind"),
        (b"1", None),
        (b"1", [b"string"]),
        (b"1", 1),
        (1, "string"),
        ([b"1"], "string"),
        ({}, "string"),
    ],
    ids=repr,
)
def test_an_unexpected_reply_to_a_head_ends_the_connection(
    exchange: Exchange, replies: tuple[object, ...]
) -> None:
    exchange.issue(Op("head", "a"), Op("set", "b", (1, 1)))
    exchange.take()
    with pytest.raises(ProtocolError, match=rf"^{ADDRESS}: unexpected reply to "):
        exchange.reply(*replies)
    _lose_all(exchange)


def test_replies_before_an_unexpected_one_count(exchange: Exchange) -> None:
    first, second, third = exchange.issue(
        Op("get", "a"), Op("set", "b", (1, 1)), Op("get_bulk", ["c"])
    )
    exchange.take()
    with pytest.raises(ProtocolError):
        exchange.reply([b"5", b"1"], "WAT", [b"6", b"1"])
    assert first.result().version == 5
    exchange.pipeline.connection_lost(ProtocolError("wrong"), False)
    exchange.assert_drained()
    assert isinstance(second.error, ProtocolError)
    assert isinstance(third.error, ProtocolError)


def test_records_before_an_invalid_one_get_one_result(exchange: Exchange) -> None:
    first, second, third = exchange.issue(*(Op("get", name) for name in "abc"))
    exchange.take()
    with pytest.raises(ProtocolError):
        exchange.reply([b"5", b"1", b"6", 6, b"7", b"1"])
    exchange.pipeline.connection_lost(ProtocolError("wrong"), False)
    exchange.assert_drained()
    assert first.result().version == 5
    for waiter in (second, third):
        assert isinstance(waiter.error, ProtocolError)


def _lose_all(exchange: Exchange) -> None:
    """Assert that a connection ended by its input fails everything on it."""
    reason = ProtocolError(f"{ADDRESS} sent nonsense")
    exchange.pipeline.connection_lost(reason, False)
    exchange.assert_drained()
    for waiter in exchange.waiters:
        assert type(waiter.error) is ProtocolError
        assert f": {ADDRESS} sent nonsense" in str(waiter.error)
    errors = [waiter.error for waiter in exchange.waiters]
    assert len(set(map(id, errors))) == len(errors)


# -- deadlines


def test_expire_returns_the_next_deadline(core: Any) -> None:
    exchange = Exchange(core, timeout=1000)
    assert exchange.pipeline.expire(0) is None
    exchange.issue(Op("get", "a"))
    deadline = exchange.pipeline.expire(0)
    exchange.take()
    assert exchange.pipeline.expire(0) == deadline
    exchange.issue(Op("get", "b"))
    assert exchange.pipeline.expire(0) == deadline
    later = exchange.pipeline.expire(deadline)
    assert later > deadline
    first, second = exchange.waiters
    assert (first.done, second.done) == (True, False)
    assert exchange.pipeline.expire(later) is None
    assert second.done


def test_an_operation_that_expired_unsent_is_never_sent(exchange: Exchange) -> None:
    waiters = exchange.issue(*_steps("a", 0))
    exchange.pipeline.expire(math.inf)
    assert exchange.pipeline.stats()["pending"] == 0
    assert exchange.pipeline.take_output() == b""
    for waiter in waiters:
        with pytest.raises(DeadlineExceeded, match=r"not sent to .* nothing was done$"):
            waiter.result()
    [later] = exchange.issue(Op("get", "a"))
    exchange.run()
    assert later.result() is None


def test_an_operation_that_expired_unnoticed_is_not_sent(core: Any) -> None:
    """An event loop that was busy for long flushes before its timers run."""
    exchange = Exchange(core, timeout=0.0)
    waiters = exchange.issue(*_steps("a", 0))
    assert exchange.pipeline.take_output() == b""
    assert exchange.pipeline.stats()["pending"] == exchange.pipeline.queued == 0
    for waiter in waiters:
        with pytest.raises(DeadlineExceeded, match=r"not sent to .* nothing was done$"):
            waiter.result()


def test_nothing_joins_an_expired_batch(exchange: Exchange) -> None:
    exchange.issue(Op("get", "a"))
    exchange.pipeline.expire(math.inf)
    [waiter] = exchange.issue(Op("get", "a"))
    assert not waiter.done
    assert exchange.pipeline.queued == 1
    exchange.run()
    assert waiter.result() is None


def test_the_rest_of_an_expired_bulk_is_never_sent(exchange: Exchange) -> None:
    names = [f"n{i}" for i in range(WINDOW + 1500)]
    [bulk] = exchange.issue(Op("delete_bulk", names))
    output = b""
    while more := exchange.pipeline.take_output():
        output += more
    exchange.pipeline.expire(math.inf)
    assert isinstance(bulk.error, DeadlineExceeded)
    [read] = exchange.issue(Op("get", "a"))
    sent = len(commands(output))
    exchange.pipeline.feed(exchange.server.answer(output))
    assert verbs(exchange.run()) == ["MGET"]
    assert read.result() is None
    assert sent < len(names)


def test_a_retry_expires_at_the_deadline_of_its_operation(core: Any) -> None:
    """Even if an operation issued later, with a later deadline, precedes it on the wire."""
    exchange = Exchange(core, timeout=1000)
    [early] = exchange.issue(Op("set", "a", (1, 1), {"ttl": 60}))
    deadline = exchange.pipeline.expire(0)
    exchange.take()
    [late] = exchange.issue(Op("get", "b"))
    exchange.take()
    exchange.reply(Refusal(NOSCRIPT))
    assert verbs(exchange.take()) == ["EVAL"]
    assert exchange.pipeline.expire(0) == deadline
    assert exchange.pipeline.expire(deadline) > deadline
    assert isinstance(early.error, DeadlineExceeded)
    assert not late.done


@pytest.mark.parametrize(
    ("operation", "name", "written"),
    [
        (Op("get", "a"), "get 'a'", False),
        (Op("head", "a"), "head 'a'", False),
        (Op("set", "a", (1, 1)), "set 'a'", True),
        (Op("set", "a", (1, 1), {"ttl": 1}), "set 'a'", True),
        (Op("delete", "a"), "delete 'a'", True),
        (Op("get_bulk", ["a"]), "get_bulk", False),
        (Op("head_bulk", ["a"]), "head_bulk", False),
        (Op("set_bulk", {"a": (1, 1)}), "set_bulk", True),
        (Op("delete_bulk", ["a"]), "delete_bulk", True),
    ],
    ids=lambda value: value.method if isinstance(value, Op) else "",
)
def test_texts_of_expired_operations(
    core: Any, operation: Operation, name: str, written: bool
) -> None:
    exchange = Exchange(core, timeout=2.5)
    [sent] = exchange.issue(operation)
    exchange.take()
    [waiting] = exchange.issue(operation)
    exchange.pipeline.expire(math.inf)
    assert str(sent.error) == (
        f"{name}: no answer from {ADDRESS} within 2500 ms (sent; 1 record in flight)"
        + ("; the write may have happened" if written else "")
    )
    assert str(waiting.error) == (
        f"{name}: not sent to {ADDRESS} within 2500 ms (1 record in flight before it); "
        "nothing was done"
    )


@pytest.mark.parametrize(
    ("down", "kind", "text"),
    [
        (
            ConnectionLost("connection lost: cut"),
            ConnectError,
            f"get 'a': no connection to {ADDRESS} within 3600000 ms: connection lost: cut",
        ),
        (
            ReplyError("LOADING Redis is loading"),
            ReplyError,
            f"LOADING Redis is loading (get 'a' at {ADDRESS}, within 3600000 ms)",
        ),
    ],
)
def test_an_unsent_operation_expires_with_the_reason(
    exchange: Exchange, down: Exception, kind: type[Exception], text: str
) -> None:
    exchange.pipeline.down = down
    [waiter] = exchange.issue(Op("get", "a"))
    exchange.pipeline.expire(math.inf)
    assert type(waiter.error) is kind
    assert str(waiter.error) == text
    assert waiter.error.__cause__ is down


# -- a lost connection


# Whether an operation may be sent again when the fate of its first attempt is unknown.
REPEATABLE: list[tuple[Operation, bool]] = [
    (Op("get", "a"), True),
    (Op("head", "a"), True),
    (Op("set", "a", (1, 1)), False),
    (Op("set", "a", (1, 1), {"ttl": 9}), False),
    (Op("set", "a", (1, 1), {"if_newer": True}), True),
    (Op("set", "a", (1, 1), {"ttl": 9, "if_newer": True}), True),
    (Op("delete", "a"), False),
    (Op("get_bulk", ["a", "b"]), True),
    (Op("head_bulk", ["a", "b"]), True),
    (Op("set_bulk", {"a": (1, 1), "b": (1, 1)}), False),
    (Op("set_bulk", {"a": (1, 1), "b": (1, 1)}, (9,)), False),
    (Op("set_bulk", {"a": (1, 1), "b": (1, 1)}, (0, True)), True),
    (Op("delete_bulk", ["a", "b"]), False),
]


@pytest.mark.parametrize(("operation", "repeatable"), REPEATABLE, ids=str)
@pytest.mark.parametrize("retry", [True, False])
def test_idempotent_operations_are_sent_again(
    exchange: Exchange, operation: Operation, repeatable: bool, retry: bool
) -> None:
    [sent] = exchange.issue(operation)
    first = exchange.take()
    [waiting] = exchange.issue(operation)
    exchange.pipeline.connection_lost(OSError("reset by peer"), retry)
    assert exchange.pipeline.in_flight == 0
    assert not waiting.done
    second = exchange.run()
    if retry and repeatable:
        assert not isinstance(sent.error, ConnectionLost)
        assert verbs(second) == 2 * verbs(first)
    else:
        assert isinstance(sent.error, ConnectionLost)
        assert verbs(second) == verbs(first)
        text = str(sent.error)
        assert f"connection to {ADDRESS} lost: reset by peer" in text
        assert text.endswith("; the write may have happened") == (
            operation.method not in ("get", "head", "get_bulk", "head_bulk")
        )
    assert waiting.error is None


def test_unsent_operations_are_sent_on_the_next_connection(exchange: Exchange) -> None:
    waiters = exchange.issue(*_steps("a", 0))
    expected = [operation.on(ModelRecords()) for operation in _steps("a", 0)[:1]]
    exchange.pipeline.connection_lost(OSError("cut"), False)
    exchange.run()
    assert [plain(waiter.result()) for waiter in waiters[:1]] == expected
    assert not any(waiter.error for waiter in waiters)


def test_nothing_joins_a_batch_that_waited_for_a_connection(exchange: Exchange) -> None:
    exchange.issue(Op("get", "a"))
    exchange.pipeline.connection_lost(OSError("cut"), True)
    exchange.issue(Op("get", "a"))
    assert len(exchange.run()) == 2


def test_retries_keep_their_order_and_precede_newer_operations(exchange: Exchange) -> None:
    exchange.issue(Op("get", "a"), Op("get_bulk", ["b"]), Op("get", "c"))
    exchange.take()
    exchange.issue(Op("get", "d"))
    exchange.pipeline.connection_lost(OSError("cut"), True)
    exchange.issue(Op("get", "e"))
    assert [command[1] for command in exchange.take()] == [b"a_v", b"b_v", b"c_v", b"d_v", b"e_v"]


def test_only_unanswered_operations_are_sent_again(exchange: Exchange) -> None:
    names = [f"n{i}" for i in range(2 * c.COMMAND_RECORDS + 5)]
    for name in names:
        exchange.server.put(name, 1, b"1")
    [waiter] = exchange.issue(Op("get_bulk", names))
    replies = exchange.server.answer(flushed(exchange.pipeline))
    exchange.pipeline.feed(replies[: len(replies) * 2 // 3])
    exchange.pipeline.connection_lost(OSError("cut"), True)
    sent = exchange.run()
    assert [len(command) // 2 for command in sent] == [c.COMMAND_RECORDS, 5]
    assert list(waiter.result()) == names


def test_a_retried_guarded_write_recognizes_its_first_attempt(exchange: Exchange) -> None:
    [waiter] = exchange.issue(Op("set", "a", (3, "mine"), {"if_newer": True}))
    exchange.server.answer(exchange.pipeline.take_output())
    exchange.pipeline.connection_lost(OSError("cut"), True)
    [repeat] = exchange.run()
    assert repeat[-1] == c.GUARDED_REPEAT
    assert waiter.result() is True


def test_a_retried_guarded_write_respects_other_writers(exchange: Exchange) -> None:
    [waiter] = exchange.issue(Op("set", "a", (3, "mine"), {"if_newer": True}))
    exchange.take()
    exchange.server.put("a", 3, b'"theirs"')
    exchange.pipeline.connection_lost(OSError("cut"), True)
    exchange.run()
    assert waiter.result() is False
    assert exchange.server.values[b"a_d"] == b'"theirs"'


def test_only_records_that_were_sent_are_retries(exchange: Exchange) -> None:
    """Of a bulk that a lost connection cut in two; also if the script is lost then."""
    names = [f"n{i}" for i in range(WINDOW + 1000)]
    [waiter] = exchange.issue(
        Op("set_bulk", dict.fromkeys(names, (3, "same")), (), {"if_newer": True})
    )
    while exchange.pipeline.take_output():
        pass
    sent = exchange.pipeline.in_flight
    exchange.pipeline.connection_lost(OSError("cut"), True)
    for name in names:
        exchange.server.put(name, 3, b'"same"')
    exchange.server.has_script = False
    exchange.run()
    assert waiter.result() == set(names[sent:])


def test_a_first_attempt_is_never_taken_for_a_retry(exchange: Exchange) -> None:
    """An operation that waited for a connection was not sent: an equal value is another's."""
    exchange.server.put("a", 3, b'"same"')
    [waiter] = exchange.issue(Op("set", "a", (3, "same"), {"if_newer": True}))
    exchange.pipeline.connection_lost(OSError("cut"), True)
    [sent] = exchange.run()
    assert sent[-1] == c.GUARDED
    assert waiter.result() is False


def test_a_connection_lost_to_a_protocol_error_fails_with_it(exchange: Exchange) -> None:
    read, write = exchange.issue(Op("get", "a"), Op("set", "b", (1, 1)))
    exchange.take()
    exchange.pipeline.connection_lost(ProtocolError("it sent nonsense"), False)
    assert type(read.error) is type(write.error) is ProtocolError
    assert str(read.error) == "get 'a': it sent nonsense"
    assert str(write.error) == "set 'b': it sent nonsense; the write may have happened"


def test_each_caller_gets_a_separate_error(exchange: Exchange) -> None:
    waiters = exchange.issue(*[Op("get", "a")] * 3, Op("get", "b"))
    exchange.take()
    exchange.pipeline.connection_lost(OSError("cut"), False)
    assert len({id(waiter.error) for waiter in waiters}) == 4


def test_fail_all_keeps_the_doubt_about_writes(exchange: Exchange) -> None:
    """Sent writes may have taken effect, and every other error text must still say so."""
    sent = exchange.issue(*_steps("a", 0))
    exchange.take()
    waiting = exchange.issue(*_steps("a", 1))
    exchange.pipeline.fail_all(lambda operation: ConnectError(f"{operation}: closed"))
    exchange.assert_drained()
    assert exchange.pipeline.take_output() == b""
    reads = {f"{read}: closed" for read in ("get 'a'", "head 'a'", "get_bulk", "head_bulk")}
    writes = {f"{write}: closed" for write in ("set 'a'", "delete 'a'", "set_bulk", "delete_bulk")}
    assert {(type(waiter.error), str(waiter.error)) for waiter in waiting} == {
        (ConnectError, text) for text in reads | writes
    }
    assert {(type(waiter.error), str(waiter.error)) for waiter in sent} == {
        *((ConnectError, text) for text in reads),
        *((ConnectionLost, f"{text}; the write may have happened") for text in writes),
    }


@pytest.mark.parametrize(
    ("down", "kind", "text"),
    [
        (
            None,
            DeadlineExceeded,
            r"no answer from .* within 3600000 ms .*; the write may have happen",
        ),
        (
            ConnectionLost("connection lost: cut"),
            ConnectionLost,
            r"lost, and no other within 3600000 ms: .* cut; the write may have happened$",
        ),
        (
            ReplyError("WRONGPASS no"),
            ConnectionLost,
            r"no other within 3600000 ms: WRONGPASS no; the write may have happened$",
        ),
    ],
    ids=["up", "down", "refused"],
)
@pytest.mark.parametrize("bulk", [False, True], ids=["set", "bulk"])
def test_a_retry_that_expired_unsent_may_have_happened(
    exchange: Exchange, bulk: bool, down: Exception | None, kind: type[Exception], text: str
) -> None:
    guarded = (0, True)
    first = Op("set_bulk", {"a": (1, 1)}, guarded) if bulk else Op("set", "a", (1, 1, *guarded))
    [write, read] = exchange.issue(first, Op("get", "b"))
    exchange.take()
    exchange.pipeline.connection_lost(OSError("cut"), True)
    exchange.pipeline.down = down
    [later] = exchange.issue(Op("set", "c", (1, 1)))
    exchange.pipeline.expire(math.inf)
    assert type(write.error) is kind
    with pytest.raises(kind, match=text):
        write.result()
    # Reads and operations never sent are not in doubt.
    assert "may have happened" not in f"{read.error} {later.error}"
    exchange.assert_drained()


def test_a_partly_written_bulk_may_have_happened(exchange: Exchange) -> None:
    records = {f"n{i}": (1, "x") for i in range(WINDOW + 1500)}
    [bulk] = exchange.issue(Op("set_bulk", records))
    output = exchange.pipeline.take_output()
    while more := exchange.pipeline.take_output():
        output += more
    exchange.pipeline.feed(exchange.server.answer(output))
    exchange.pipeline.expire(math.inf)
    with pytest.raises(DeadlineExceeded, match=r"in part.*; the write may have happened$"):
        bulk.result()
    exchange.assert_drained()


# -- refusals


@pytest.mark.parametrize("operation", [op for op, _ in REPEATABLE], ids=str)
@pytest.mark.parametrize("msetex", [False, True], ids=["script", "msetex"])
@pytest.mark.parametrize(
    "message",
    [
        "OOM command not allowed when used memory > 'maxmemory'.",
        "NOAUTH Authentication required.",
        "NOREPLICAS Not enough good replicas to write.",
        "CLUSTERDOWN The cluster is down",
        "ERR",
        "NOSCRIPT",
    ],
)
def test_a_refused_command_fails_only_its_callers(
    core: Any, operation: Operation, msetex: bool, message: str
) -> None:
    """It fails its own callers, each with a separate error, and no others."""
    exchange = Exchange(core, msetex=msetex)
    before, refused, after = exchange.issue(
        Op("head_bulk", ["x"]), operation, Op("get_bulk", ["y"])
    )
    code = message.split()[0]
    sent = exchange.take()
    attempts = 0
    while sent:
        for command in sent:
            if command[1:2] == [b"x_v"]:
                exchange.reply(b"1")
            elif command[1:2] == [b"x_d"]:
                exchange.reply("string")
            elif b"y_v" in command:
                exchange.reply([b"2", b"2"])
            else:
                exchange.reply(Refusal(message))
                attempts += 1
        sent = exchange.take()
        assert attempts <= 8
    exchange.assert_drained()
    assert before.result() == {"x": 1}
    assert after.result()["y"].version == 2
    assert type(refused.error) is ReplyError
    assert refused.error.code == code
    assert refused.error.message == message
    name = operation.argument if isinstance(operation.argument, str) else "a"
    remedy = failures.remedy_of(message)
    assert str(refused.error) == f"{message} ({operation.method} {name!r} at {ADDRESS}{remedy})"


def test_a_refused_batch_fails_each_waiter(exchange: Exchange) -> None:
    waiters = exchange.issue(Op("get", "a"), Op("get", "a"), Op("get", "b"))
    exchange.take()
    exchange.reply(Refusal("ERR no"))
    exchange.assert_drained()
    assert [str(waiter.error) for waiter in waiters] == [
        f"ERR no (get {name!r} at {ADDRESS})" for name in "aab"
    ]
    assert len({id(waiter.error) for waiter in waiters}) == 3


def test_a_head_of_a_key_of_another_type_is_a_miss(exchange: Exchange) -> None:
    exchange.server.values.update({b"a_v": None, b"a_d": b"1", b"b_v": b"1", b"b_d": None})
    waiters = exchange.issue(Op("head", "a"), Op("head", "b"), Op("get", "a"), Op("get", "b"))
    exchange.run()
    assert [waiter.result() for waiter in waiters] == [None] * 4
    assert exchange.pipeline.stats()["halves"] == 4


@pytest.mark.parametrize("refusals", [(0,), (1,), (0, 1)])
def test_a_refused_head(exchange: Exchange, refusals: tuple[int, ...]) -> None:
    exchange.server.put("b", 2, b"1")
    refused, fine = exchange.issue(Op("head", "a"), Op("head", "b"))
    exchange.server.refused = {keys_of("a")[index] for index in refusals}
    exchange.run()
    assert isinstance(refused.error, ReplyError)
    assert refused.error.code == "NOPERM"
    assert fine.result() == 2


def test_an_error_inside_a_reply_of_the_script_belongs_to_its_record(exchange: Exchange) -> None:
    exchange.server.values[b"b_v"] = None
    waiters = exchange.issue(*(Op("set", name, (1, 1), {"if_newer": True}) for name in "abc"))
    [bulk] = exchange.issue(Op("set_bulk", dict.fromkeys("abc", (2, 2)), (), {"if_newer": True}))
    exchange.run()
    assert [waiters[0].result(), waiters[2].result()] == [True, True]
    with pytest.raises(ReplyError, match=rf"^{WRONGTYPE} \(set 'b' at {ADDRESS}\)$"):
        waiters[1].result()
    assert isinstance(bulk.error, BulkError)
    assert list(bulk.error.errors) == ["b"]
    assert bulk.error.result == set()


MANY = [f"n{i}" for i in range(7)]


@pytest.mark.parametrize("msetex", [False, True], ids=["script", "msetex"])
@pytest.mark.parametrize(
    "operation",
    [
        lambda name: Op("get", name),
        lambda name: Op("head", name),
        lambda name: Op("set", name, (1, 1)),
        lambda name: Op("set", name, (1, 1), {"ttl": 9}),
        lambda name: Op("set", name, (1, 1), {"if_newer": True}),
        lambda name: Op("delete", name),
    ],
    ids=["get", "head", "set", "ttl", "if_newer", "delete"],
)
def test_noperm_fails_only_the_forbidden_records(core: Any, operation: Any, msetex: bool) -> None:
    exchange = Exchange(core, msetex=msetex)
    exchange.server.refused = {*keys_of("n2"), keys_of("n5")[1]}
    waiters = exchange.issue(*map(operation, MANY))
    exchange.run()
    refused = [name for name, waiter in zip(MANY, waiters, strict=True) if waiter.error]
    assert refused == ["n2", "n5"]
    for name, waiter in zip(MANY, waiters, strict=True):
        if name in refused:
            assert str(waiter.error).startswith(f"{NOPERM} (")
            assert repr(name) in str(waiter.error)


@pytest.mark.parametrize("msetex", [False, True], ids=["script", "msetex"])
@pytest.mark.parametrize(
    ("operation", "result"),
    [
        (Op("get_bulk", MANY), {name: (9, 1) for name in MANY if name not in ("n2", "n5")}),
        (Op("head_bulk", MANY), {name: 9 for name in MANY if name not in ("n2", "n5")}),
        (Op("set_bulk", dict.fromkeys(MANY, (10, 1))), set()),
        (Op("set_bulk", dict.fromkeys(MANY, (10, 1)), (60,)), set()),
        (
            Op("set_bulk", dict.fromkeys(MANY, (9, 1)), (), {"if_newer": True}),
            {name for name in MANY if name not in ("n2", "n5")},
        ),
        (Op("delete_bulk", MANY), 5),
    ],
    ids=["get", "head", "set", "ttl", "if_newer", "delete"],
)
def test_a_bulk_with_refused_records_has_the_other_results(
    core: Any, operation: Operation, result: object, msetex: bool
) -> None:
    exchange = Exchange(core, msetex=msetex)
    for name in MANY:
        exchange.server.put(name, 9, b"1")
    exchange.server.refused = {*keys_of("n2"), *keys_of("n5")}
    [waiter] = exchange.issue(operation)
    exchange.run()
    error = waiter.error
    assert isinstance(error, BulkError)
    assert set(error.errors) == {"n2", "n5"}
    assert all(isinstance(one, ReplyError) for one in error.errors.values())
    assert plain(error.result) == result
    assert str(error) == (
        f"{operation.method}: 2 of the records failed ('n2' and 1 more): "
        f"{error.errors['n2']}; the result of the others is in .result"
    )


@pytest.mark.parametrize("operation", [op for op, _ in REPEATABLE if "_bulk" in op.method], ids=str)
def test_a_fully_refused_bulk_raises_the_refusal(exchange: Exchange, operation: Operation) -> None:
    exchange.server.refused = {*keys_of("a"), *keys_of("b")}
    [waiter] = exchange.issue(operation)
    exchange.run()
    assert type(waiter.error) is ReplyError
    assert waiter.error.code == "NOPERM"


LATER = [
    Op("set", "a", (3, "new")),
    Op("set", "a", (3, "new"), {"ttl": 9}),
    Op("set", "a", (3, "new"), {"if_newer": True}),
    Op("set", "a", (1, "new"), {"if_newer": True}),
    Op("delete", "a"),
    Op("set_bulk", {"a": (3, "new")}),
    Op("set_bulk", {"a": (3, "new")}, (), {"ttl": 9}),
    Op("set_bulk", {"a": (3, "new")}, (), {"if_newer": True}),
    Op("delete_bulk", ["a"]),
]


@pytest.mark.parametrize("later", LATER, ids=str)
@pytest.mark.parametrize("first", [{}, {"ttl": 60}, {"if_newer": True}], ids=str)
def test_a_retry_after_noperm_undoes_no_later_write(
    core: Any, first: dict[str, Any], later: Operation
) -> None:
    """The later write was already in flight. A caller that got True hasn't lost its data."""
    for stored, msetex in itertools.product([None, 2, 5], [False, True]):
        exchange, oracle = Exchange(core, msetex=msetex), ModelRecords()
        if stored is not None:
            exchange.server.put("a", stored, b'"stored"')
            oracle.set("a", stored, "stored")
        exchange.server.refused = {*keys_of("no")}
        old = Op("set", "a", (1, "old"), first)
        refused, overtaken = exchange.issue(Op("set", "no", (1, 1), first), old)
        output = exchange.pipeline.take_output()
        [overtaking] = exchange.issue(later)
        output += exchange.pipeline.take_output()
        exchange.pipeline.feed(exchange.server.answer(output))
        exchange.run()
        assert isinstance(refused.error, ReplyError)
        state = exchange.server.values.get(b"a_d")
        if isinstance(overtaken.error, ReplyError):
            # As if it had never been issued.
            assert overtaken.error.code == "NOPERM"
            assert overtaking.result() == later.on(oracle)
        elif first.get("if_newer") and later.options.get("if_newer"):
            # Both are guarded, in the order in which Redis received them.
            assert overtaking.result() == later.on(oracle)
            assert overtaken.result() == old.on(oracle)
        else:
            assert overtaken.result() is old.on(oracle) is True
            assert overtaking.result() == later.on(oracle)
        stored_now = oracle.records.get("a")
        assert state == (None if stored_now is None else b'"%s"' % stored_now[1].encode())


@pytest.mark.parametrize(
    "later",
    [
        Op("set", "a", (3, "new")),
        Op("set", "a", (3, "new"), {"ttl": 9}),
        Op("set", "a", (3, "new"), {"if_newer": True}),
        Op("delete", "a"),
    ],
    ids=["set", "ttl", "guarded", "delete"],
)
def test_a_superseded_write_succeeds_if_the_later_one_does(
    exchange: Exchange, later: Operation
) -> None:
    """No write fails for lack of permission on another record of the same tick."""
    exchange.server.refused = {*keys_of("no")}
    first = Op("set", "a", (1, "old"))
    no, one, two = exchange.issue(Op("set", "no", (1, 1)), first, first)
    [last] = exchange.issue(later)
    exchange.run()
    assert isinstance(no.error, ReplyError)
    assert (one.result(), two.result(), last.result()) == (True, True, True)


@pytest.mark.parametrize("outcome", ["refused", "lost", "late"])
@pytest.mark.parametrize("method", ["set", "delete"])
def test_a_superseded_write_fails_if_the_later_one_does(
    exchange: Exchange, outcome: str, method: str
) -> None:
    exchange.server.refused = {*keys_of("no")}
    first = exchange.issue(Op("set", "no", (1, 1)), *[Op("set", "a", (1, "old"))] * 2)
    output = exchange.pipeline.take_output()
    [later] = exchange.issue(Op("set", "a", (2, 2)) if method == "set" else Op("delete", "a"))
    exchange.take()
    exchange.pipeline.feed(exchange.server.answer(output))
    match outcome:
        case "refused":
            exchange.reply(Refusal("OOM no"))
        case "lost":
            exchange.pipeline.connection_lost(OSError("cut"), True)
        case "late":
            exchange.pipeline.expire(math.inf)
            exchange.reply("OK" if method == "set" else 2)
    exchange.run()
    kind = {"refused": ReplyError, "lost": ConnectionLost, "late": DeadlineExceeded}[outcome]
    errors = [waiter.error for waiter in (*first[1:], later)]
    assert [type(error) for error in errors] == [kind] * 3
    assert len({str(error) for error in errors}) == 1
    assert len({id(error) for error in errors}) == 3


def test_a_write_read_before_it_was_superseded_is_refused(exchange: Exchange) -> None:
    """A read between the two has seen that the first was not executed."""
    exchange.server.refused = {*keys_of("no")}
    exchange.server.put("a", 7, b'"stored"')
    _, first = exchange.issue(Op("set", "no", (1, 1)), Op("set", "a", (1, "old")))
    output = exchange.pipeline.take_output()
    [read] = exchange.issue(Op("get", "a"))
    output += exchange.pipeline.take_output()
    [later] = exchange.issue(Op("set", "a", (2, "new")))
    output += exchange.pipeline.take_output()
    exchange.pipeline.feed(exchange.server.answer(output))
    exchange.run()
    assert isinstance(first.error, ReplyError)
    assert plain(read.result()) == (7, "stored")
    assert later.result() is True
    assert exchange.server.values[b"a_d"] == b'"new"'


@pytest.mark.parametrize("later", LATER, ids=str)
def test_a_retried_read_sees_no_later_write(exchange: Exchange, later: Operation) -> None:
    """The value it should have read is gone: an error says so, where a value would be wrong."""
    for name in "abc":
        exchange.server.put(name, 2, b'"old"')
    exchange.server.refused = {*keys_of("no")}
    waiters = exchange.issue(Op("get", "a"), Op("get", "no"), Op("get", "b"))
    [bulk] = exchange.issue(Op("get_bulk", ["no", "a", "c"]))
    output = exchange.pipeline.take_output()
    exchange.issue(later)
    output += exchange.pipeline.take_output()
    exchange.pipeline.feed(exchange.server.answer(output))
    exchange.run()
    assert [type(waiter.error) for waiter in waiters] == [ReplyError, ReplyError, type(None)]
    assert plain(waiters[2].result()) == (2, "old")
    assert isinstance(bulk.error, BulkError)
    assert set(bulk.error.errors) == {"no", "a"}
    assert plain(bulk.error.result) == {"c": (2, "old")}


@pytest.mark.parametrize("msetex", [False, True], ids=["script", "msetex"])
@pytest.mark.parametrize("bulk", [False, True], ids=["one by one", "bulk"])
def test_reads_behind_a_retried_write_see_it(core: Any, msetex: bool, bulk: bool) -> None:
    """Refused are a lost script, and a batch because of one of its records."""
    for options in ({}, {"ttl": 9}, {"if_newer": True}):
        exchange = Exchange(core, msetex=msetex)
        exchange.server.refused = {*keys_of("no")}
        exchange.server.has_script = False
        for name in "abz":
            exchange.server.put(name, 1, b'"old"')
        records = dict.fromkeys(("a", "no", "b"), (2, "new"))
        writes = (
            [Op("set_bulk", records, (), options)]
            if bulk
            else [Op("set", name, record, options) for name, record in records.items()]
        )
        reads = [
            Op("get", "a"),
            Op("get", "a"),
            Op("get", "z"),
            Op("head", "b"),
            Op("head", "z"),
            Op("get_bulk", ["z", "b", "a"]),
            Op("head_bulk", ["a", "z", "b"]),
        ]
        exchange.issue(*writes)
        output = exchange.pipeline.take_output()
        waiters = exchange.issue(*reads)
        output += exchange.pipeline.take_output()
        replies = exchange.server.answer(output)
        for at in range(len(replies)):
            exchange.pipeline.feed(replies[at : at + 1])
        exchange.run()
        new, old = (2, "new"), (1, "old")
        assert [plain(waiter.result()) for waiter in waiters] == [
            *(new, new, old, 2, 1),
            {"z": old, "b": new, "a": new},
            {"a": 2, "z": 1, "b": 2},
        ]
        assert exchange.pipeline.stats()["reads"] == 10


# -- a script that the server has lost


SCRIPTED: list[tuple[str, dict[str, Any]]] = [
    ("ttl", {"ttl": 60}),
    ("if_newer", {"if_newer": True}),
    ("both", {"ttl": 60, "if_newer": True}),
]


@pytest.mark.parametrize("options", [o for _, o in SCRIPTED], ids=[i for i, _ in SCRIPTED])
def test_a_lost_script_is_sent_again(exchange: Exchange, options: dict[str, Any]) -> None:
    exchange.server.has_script = False
    waiters = exchange.issue(*(Op("set", name, (1, name), options) for name in "abc"))
    [bulk] = exchange.issue(Op("set_bulk", {"d": (1, 1), "e": (1, 1)}, (), options))
    assert verbs(exchange.run()) == ["EVALSHA", "EVALSHA", "EVAL", "EVAL"]
    assert [waiter.result() for waiter in waiters] == [True] * 3
    assert bulk.result() == set()
    assert len(exchange.server.values) == 10
    exchange.issue(Op("set", "a", (2, 2), options))
    assert verbs(exchange.run()) == ["EVALSHA"]


@pytest.mark.parametrize("options", [o for _, o in SCRIPTED], ids=[i for i, _ in SCRIPTED])
def test_a_script_that_stays_lost_is_an_error(exchange: Exchange, options: dict[str, Any]) -> None:
    [waiter] = exchange.issue(Op("set", "a", (1, 1), options))
    for _ in range(2):
        assert exchange.take()
        exchange.reply(Refusal(NOSCRIPT))
    exchange.assert_drained()
    assert exchange.take() == []
    assert isinstance(waiter.error, ReplyError)
    assert waiter.error.code == "NOSCRIPT"


@pytest.mark.parametrize("together", [True, False], ids=["one chunk", "a chunk each"])
def test_retries_of_a_lost_script_keep_their_order(exchange: Exchange, together: bool) -> None:
    """Also when their refusals arrive separately, with nothing sent in between."""
    waiters = exchange.issue(
        Op("set", "a", (5, "first"), {"ttl": 60}),
        Op("set_bulk", {"a": (6, "second")}, (60,)),
        Op("set", "a", (7, "third"), {"if_newer": True}),
        Op("set", "a", (4, "last"), {"ttl": 60}),
    )
    [waiting] = exchange.issue(Op("get", "z"))
    assert verbs(exchange.take()) == ["EVALSHA"] * 4 + ["MGET"]
    [queued] = exchange.issue(Op("get", "a"))
    replies = [resp(Refusal(NOSCRIPT))] * 4
    for chunk in [b"".join(replies)] if together else replies:
        exchange.pipeline.feed(chunk)
    exchange.reply([None, None])
    exchange.run()
    assert [waiter.result() for waiter in waiters] == [True, set(), True, True]
    assert waiting.result() is None
    assert (queued.result().version, queued.result().data) == (4, "last")


def test_a_retry_keeps_its_place_when_the_connection_is_lost(exchange: Exchange) -> None:
    """It was issued before the guarded write that is still in flight."""
    first, second = exchange.issue(
        Op("set", "a", (5, "old"), {"ttl": 60}), Op("set", "a", (6, "new"), {"if_newer": True})
    )
    exchange.take()
    exchange.reply(Refusal(NOSCRIPT))
    exchange.pipeline.connection_lost(OSError("cut"), True)
    exchange.run()
    assert (first.result(), second.result()) == (True, True)
    assert exchange.server.values[b"a_d"] == b'"new"'


def test_a_retry_does_not_undo_a_later_write(exchange: Exchange) -> None:
    exchange.server.has_script = False
    first, other = exchange.issue(
        Op("set", "a", (1, "old"), {"ttl": 60}), Op("set", "b", (1, "b"), {"ttl": 60})
    )
    output = exchange.pipeline.take_output()
    [later] = exchange.issue(Op("set", "a", (2, "new")))
    output += exchange.pipeline.take_output()
    exchange.pipeline.feed(exchange.server.answer(output))
    exchange.run()
    assert [waiter.result() for waiter in (first, other, later)] == [True] * 3
    assert exchange.server.values[b"a_d"] == b'"new"'
    assert exchange.server.values[b"b_d"] == b'"b"'


def test_a_retry_that_loads_the_script_waits_for_the_refusals_under_way(
    exchange: Exchange,
) -> None:
    """A write behind it would be executed by the script, and the refused one come too late."""
    refused = resp(Refusal(NOSCRIPT))
    [loads] = exchange.issue(Op("set", "z", (1, 1), {"ttl": 9}))
    exchange.take()
    [first] = exchange.issue(Op("set", "a", (1, "old"), {"ttl": 9}))
    exchange.take()
    exchange.pipeline.feed(refused)
    read, later = exchange.issue(Op("get", "a"), Op("set", "a", (2, "new"), {"ttl": 9}))
    assert exchange.take() == []
    exchange.pipeline.feed(refused)
    assert verbs(exchange.run()) == ["EVAL", "EVAL", "MGET", "EVALSHA"]
    assert [waiter.result() for waiter in (loads, first, later)] == [True] * 3
    assert plain(read.result()) == (1, "old")
    assert exchange.server.values[b"a_d"] == b'"new"'


@pytest.mark.parametrize("bulk", [False, True], ids=["one by one", "bulk"])
def test_guarded_writes_around_a_lost_script_keep_their_order(
    exchange: Exchange, bulk: bool
) -> None:
    """Of two writes of one version, the first is done and the second is not newer."""
    exchange.server.has_script = False
    guard = {"if_newer": True}

    def write(data: str) -> Op:
        if bulk:
            return Op("set_bulk", dict.fromkeys("ab", (0, data)), (), guard)
        return Op("set", "b", (0, data), guard)

    exchange.issue(Op("set", "a", (0, "ttl"), {"ttl": 60}))
    output = exchange.pipeline.take_output()
    [first] = exchange.issue(write("first"))
    output += exchange.pipeline.take_output()
    replies = exchange.server.answer(output)
    half = len(replies) // 2
    exchange.pipeline.feed(replies[:half])
    [read] = exchange.issue(Op("get", "a"))
    [second] = exchange.issue(write("second"))
    assert exchange.take() == []
    exchange.pipeline.feed(replies[half:])
    exchange.run()
    assert first.result() == ({"a"} if bulk else True)
    assert second.result() == ({"a", "b"} if bulk else False)
    assert plain(read.result()) == (0, "ttl")
    assert exchange.server.values[b"b_d"] == b'"first"'


def test_output_goes_on_when_the_connection_is_lost_before_the_refusals(exchange: Exchange) -> None:
    exchange.server.has_script = False
    first, second = exchange.issue(
        Op("set", "a", (1, "a"), {"if_newer": True}), Op("set", "b", (1, "b"), {"ttl": 9})
    )
    assert verbs(exchange.take()) == ["EVALSHA", "EVALSHA"]
    exchange.reply(Refusal(NOSCRIPT))
    assert exchange.take() == []
    exchange.pipeline.connection_lost(OSError("cut"), True)
    assert verbs(exchange.run()) == ["EVAL"]
    assert first.result() is True
    assert isinstance(second.error, ConnectionLost)


@pytest.mark.parametrize("bulk", [False, True], ids=["one by one", "bulk"])
@pytest.mark.parametrize("kind", ["ttl", "if_version", "if_newer"])
def test_a_retry_does_not_undo_a_write_whose_script_another_client_has_loaded(
    exchange: Exchange, kind: str, bulk: bool
) -> None:
    """The first one found no script; the second, already under way, found that client's."""
    exchange.server.put("a", 1, b'"stored"')
    options: dict[str, Any] = {"ttl": {"ttl": 9}, "if_newer": {"if_newer": True}}.get(kind, {})

    def write(version: int, data: str) -> Op:
        held: dict[str, Any] = {"if_version": {"a": 1} if bulk else 1}
        chosen = held if kind == "if_version" else options
        if bulk:
            return Op("set_bulk", {"a": (version, data)}, (), chosen)
        return Op("set", "a", (version, data), chosen)

    exchange.server.has_script = False
    [first] = exchange.issue(write(2, "first"))
    replies = exchange.server.answer(exchange.pipeline.take_output())
    [second] = exchange.issue(write(3, "second"))
    output = exchange.pipeline.take_output()
    exchange.pipeline.feed(replies)
    exchange.server.has_script = True
    exchange.pipeline.feed(exchange.server.answer(output))
    exchange.run()
    assert second.result() == (set() if bulk else True)
    assert exchange.server.values[b"a_d"] == b'"second"'
    if kind == "if_newer":
        assert first.result() == ({"a"} if bulk else False)
    else:
        assert isinstance(first.error, ReplyError)
        assert first.error.code == "NOSCRIPT"


def test_a_retry_without_the_script_does_not_undo_a_later_one_that_brings_it(
    exchange: Exchange,
) -> None:
    exchange.server.refused = {*keys_of("no")}
    no, first = exchange.issue(
        Op("set", "no", (1, 1), {"ttl": 9}), Op("set", "a", (1, "old"), {"ttl": 9})
    )
    refused = exchange.server.answer(exchange.pipeline.take_output())
    [later] = exchange.issue(Op("set", "a", (2, "new"), {"ttl": 9}))
    exchange.server.has_script = False
    refused += exchange.server.answer(exchange.pipeline.take_output())
    exchange.pipeline.feed(refused)
    exchange.run()
    assert isinstance(no.error, ReplyError)
    assert [first.result(), later.result()] == [True, True]
    assert exchange.server.values[b"a_d"] == b'"new"'


def test_guarded_writes_around_a_read_keep_their_order(exchange: Exchange) -> None:
    """The read has seen that the first was not executed, and must not see the second."""
    exchange.server.refused = {*keys_of("no")}
    exchange.server.put("a", 1, b'"stored"')
    guard = {"if_newer": True}
    _, first = exchange.issue(Op("set", "no", (1, 1), guard), Op("set", "a", (2, "first"), guard))
    [read, second] = exchange.issue(Op("get", "a"), Op("set", "a", (3, "second"), guard))
    exchange.run()
    assert isinstance(first.error, ReplyError)
    assert plain(read.result()) == (1, "stored")
    assert second.result() is True


@pytest.mark.parametrize("versions", [(1, 2), (2, 1), (2, 2)])
def test_reordered_guarded_writes_stay_guarded(
    exchange: Exchange, versions: tuple[int, int]
) -> None:
    """The retry of one doesn't affect the other: both have a result, and none is refused."""
    exchange.server.refused = {*keys_of("no")}
    guard = {"if_newer": True}
    no, first = exchange.issue(
        Op("set", "no", (1, 1), guard), Op("set", "a", (versions[0], "first"), guard)
    )
    [second] = exchange.issue(Op("set", "a", (versions[1], "second"), guard))
    exchange.run()
    assert isinstance(no.error, ReplyError)
    assert second.result() is True
    assert first.result() is (versions[0] > versions[1])
    assert exchange.server.values[b"a_v"] == b"2"


def test_a_retry_does_not_restore_a_deleted_record(exchange: Exchange) -> None:
    exchange.server.has_script = False
    first, later = exchange.issue(Op("set", "a", (1, 1), {"ttl": 60}), Op("delete", "a"))
    exchange.run()
    assert (first.result(), later.result()) == (True, True)
    assert not exchange.server.values


@pytest.mark.parametrize("first", [{"ttl": 60}, {"if_newer": True}], ids=["ttl", "guarded"])
def test_a_refusal_is_the_result_when_the_outcome_is_unknown(
    exchange: Exchange, first: dict[str, Any]
) -> None:
    exchange.server.has_script = False
    [bulk] = exchange.issue(Op("set_bulk", {"b": (1, 1), "c": (1, 1)}, (), first))
    exchange.issue(Op("set", "b", (2, 2)))
    [single] = exchange.issue(Op("set", "d", (1, 1), first))
    exchange.issue(Op("set_bulk", {"d": (2, 2)}))
    exchange.run()
    assert isinstance(bulk.error, BulkError)
    assert {name: error.code for name, error in bulk.error.errors.items()} == {"b": "NOSCRIPT"}
    assert isinstance(single.error, ReplyError)
    assert single.error.code == "NOSCRIPT"
    stored = {name: exchange.server.values[keys_of(name)[0]] for name in "bcd"}
    assert stored == {"b": b"2", "c": b"1", "d": b"2"}


# -- damaged records


@pytest.mark.parametrize(
    "stored",
    [b"", b"-1", b"1.0", b"x", b" 1", b"1 ", b"+1", b"1_0", b"9223372036854775808", b"\xff"],
)
@pytest.mark.parametrize(
    "operation",
    [
        Op("get", "a"),
        Op("head", "a"),
        Op("set", "a", (1, 1), {"if_newer": True}),
    ],
    ids=lambda op: op.method,
)
def test_a_damaged_version_is_an_error_of_its_record(
    exchange: Exchange, operation: Operation, stored: bytes
) -> None:
    exchange.server.values.update({b"a_v": stored, b"a_d": b"1"})
    exchange.server.put("b", 7, b"1")
    waiters = exchange.issue(operation, Operation(operation.method, "b", *_rest(operation)))
    exchange.run()
    with pytest.raises(
        RecordError, match=r"^record 'a': its stored version isn't an integer"
    ) as bad:
        waiters[0].result()
    assert bad.value.name == "a"
    assert operation.method == "set" or repr(stored) in str(bad.value)
    assert waiters[1].error is None
    assert exchange.pipeline.stats()["damaged"] == 1


def _rest(operation: Operation) -> tuple[Any, Any]:
    return operation.rest, operation.options


@pytest.mark.parametrize(
    ("operation", "result"),
    [
        (Op("get_bulk", ["b", "a", "half", "c", "no"]), {"b": (7, 1), "c": (7, 1)}),
        (Op("head_bulk", ["b", "a", "half", "c", "no"]), {"b": 7, "c": 7}),
        (
            Op("set_bulk", {"b": (7, 2), "a": (9, 2), "c": (8, 2)}, (0, True)),
            {"b"},
        ),
    ],
    ids=["get", "head", "set"],
)
def test_a_damaged_record_in_a_bulk(
    exchange: Exchange, operation: Operation, result: object
) -> None:
    exchange.server.put("a", "seven", b"1")
    exchange.server.put("b", 7, b"1")
    exchange.server.put("c", 7, b"1")
    exchange.server.values[b"half_v"] = b"1"
    [waiter] = exchange.issue(operation)
    exchange.run()
    assert isinstance(waiter.error, BulkError)
    assert list(waiter.error.errors) == ["a"]
    assert isinstance(waiter.error.errors["a"], RecordError)
    assert plain(waiter.error.result) == result


@pytest.mark.parametrize("key", [0, 1])
def test_half_a_record_is_a_miss_and_counted(exchange: Exchange, key: int) -> None:
    exchange.server.values[keys_of("a")[key]] = b"1"
    waiters = exchange.issue(
        Op("get", "a"), Op("head", "a"), Op("get_bulk", ["a"]), Op("head_bulk", ["a"])
    )
    exchange.run()
    assert [waiter.result() for waiter in waiters] == [None, None, {}, {}]
    [removed] = exchange.issue(Op("delete", "a"))
    exchange.run()
    assert removed.result() is False
    assert exchange.pipeline.stats()["halves"] == 5
    [guarded] = exchange.issue(Op("set", "a", (0, 1), {"if_newer": True}))
    exchange.run()
    assert guarded.result() is True


# -- arguments


BAD_NAMES = ["", None, 1, b"a", ["a"], "\ud800", "a\udfff"]
BAD_VERSIONS = [-1, 2**63, True, 1.0, "1", None]
BAD_TTLS = [
    *(-1, 1.5, True, "60", c.MAX_TTL + 1, math.inf),
    *(timedelta(seconds=each) for each in (0, -1, 0.5, 1.5, c.MAX_TTL + 1)),
]


@pytest.mark.parametrize(
    "operation",
    [
        *(Op(method, name) for method in ("get", "head", "delete") for name in BAD_NAMES),
        *(Op("set", name, (1, 1)) for name in BAD_NAMES),
        *(Op("set", "a", (version, 1)) for version in BAD_VERSIONS),
        *(Op("set", "a", (1, 1, ttl)) for ttl in BAD_TTLS),
        Op("set", "a", (1, object)),
        *(
            Op(method, ["fine", name])
            for method in ("get_bulk", "head_bulk", "delete_bulk")
            for name in BAD_NAMES
            if not isinstance(name, list)
        ),
        *(Op(method, "ab") for method in ("get_bulk", "head_bulk", "delete_bulk")),
        *(Op("set_bulk", {"fine": (1, 1), "a": pair}) for pair in (1, None, (1,), (1, 1, 1), "x")),
        *(Op("set_bulk", {"fine": (1, 1), "a": (version, 1)}) for version in BAD_VERSIONS),
        *(Op("set_bulk", {"fine": (1, 1), name: (1, 1)}) for name in BAD_NAMES[:4]),
        *(Op("set_bulk", {"fine": (1, 1)}, (ttl,)) for ttl in BAD_TTLS),
        Op("set_bulk", {"fine": (1, 1), "a": (1, object)}),
        *(Op("set_bulk", records) for records in ([("a", (1, 1))], "ab", None, 1)),
    ],
    ids=lambda op: f"{op.method}-{op.argument!a}"[:60],
)
def test_a_bad_argument_raises_at_the_call_and_queues_nothing(
    exchange: Exchange, operation: Operation
) -> None:
    with pytest.raises(RecordError):
        operation.on(exchange.pipeline)
    assert exchange.wakes == 0
    assert exchange.pipeline.stats()["pending"] == 0
    assert exchange.pipeline.take_output() == b""
    exchange.issue(Op("get", "a"))
    exchange.run()


def test_a_name_of_a_str_subclass_is_its_text(exchange: Exchange) -> None:
    class Name(str):
        __slots__ = ()

        def encode(self, *_: object) -> bytes:
            return b"not this"

        def __str__(self) -> str:
            return "nor this"

    exchange.server.put("a", 1, b"1")
    [waiter, bulk] = exchange.issue(Op("get", Name("a")), Op("get_bulk", [Name("a"), "a"]))
    exchange.run()
    assert type(waiter.result().name) is str
    assert waiter.result().name == "a"
    assert list(bulk.result()) == ["a"]


def test_data_is_encoded_at_the_call(exchange: Exchange) -> None:
    data = {"n": [1]}
    exchange.issue(Op("set", "a", (1, data)), Op("set_bulk", {"b": (1, data)}))
    data["n"].append(2)
    exchange.run()
    assert exchange.server.values[b"a_d"] == exchange.server.values[b"b_d"] == b'{"n":[1]}'


# -- other commands


@pytest.mark.parametrize(
    "reply", ["PONG", b"x", None, 5, [b"a", [1]], {b"proto": 3}, True, 1.5], ids=repr
)
def test_a_command_gets_its_reply(exchange: Exchange, reply: object) -> None:
    output, waiter = exchange.pipeline.command("HELLO", b"3", 7)
    assert commands(output) == [[b"HELLO", b"3", b"7"]]
    assert exchange.pipeline.in_flight == 1
    [read] = exchange.issue(Op("get", "a"))
    exchange.take()
    exchange.reply(reply, [b"1", b"1"])
    assert waiter.result() == (reply.encode() if isinstance(reply, str) else reply)
    assert read.result().version == 1
    exchange.assert_drained()


@pytest.mark.parametrize("message", ["WRONGPASS invalid", NOPERM, "NOSCRIPT", NOSCRIPT, "ERR"])
def test_a_refused_raw_command_is_not_sent_again(exchange: Exchange, message: str) -> None:
    """Whatever the code: only a script is sent again after NOSCRIPT."""
    _, waiter = exchange.pipeline.command("HELLO", "3")
    [later] = exchange.issue(Op("set", "HELLO", (1, 1)))
    exchange.take()
    exchange.reply(Refusal(message), "OK")
    exchange.assert_drained()
    assert exchange.take() == []
    assert isinstance(waiter.error, ReplyError)
    remedy = failures.remedy_of(message)
    assert str(waiter.error) == f"{message} (command 'HELLO' at {ADDRESS}{remedy})"
    assert later.result() is True


@pytest.mark.parametrize(
    "operation",
    [Op("get", "a"), Op("head", "a"), Op("set", "a", (1, 1)), Op("delete", "a")],
    ids=lambda op: op.method,
)
def test_noscript_for_a_command_without_a_script(exchange: Exchange, operation: Operation) -> None:
    [refused, later] = exchange.issue(operation, Op("set_bulk", {"a": (2, 2)}))
    sent = exchange.take()
    exchange.reply(*[Refusal(NOSCRIPT)] * (len(sent) - 1), "OK")
    exchange.assert_drained()
    assert isinstance(refused.error, ReplyError)
    assert refused.error.code == "NOSCRIPT"
    assert later.result() == set()


def test_a_command_is_lost_with_its_connection(exchange: Exchange) -> None:
    _, waiter = exchange.pipeline.command("PING")
    exchange.pipeline.connection_lost(OSError("cut"), True)
    exchange.assert_drained()
    assert str(waiter.error) == f"command 'PING': connection to {ADDRESS} lost: cut"


# -- counters


def test_stats_count_records_by_kind_and_result(exchange: Exchange) -> None:
    exchange.server.put("there", 5, b"1")
    exchange.server.put("bad", "x", b"1")
    exchange.server.values[b"half_d"] = b"1"
    exchange.issue(
        Op("get", "there"),
        Op("get", "there"),
        Op("get_bulk", ["there", "bad", "half", "no"]),
        Op("head_bulk", ["there", "bad", "half", "no"]),
        Op("set", "new", (1, 1)),
        Op("set_bulk", {"there": (5, 1), "new": (9, 1)}, (0, True)),
        Op("delete", "new"),
        Op("delete", "no"),
    )
    output = exchange.pipeline.take_output()
    replies = exchange.server.answer(output)
    exchange.pipeline.feed(replies)
    assert counters(exchange.pipeline) == {
        "operations": 8,
        "records": 14,
        "reads": 9,
        "hits": 3,
        "misses": 4,
        "halves": 2,
        "damaged": 2,
        "writes": 2,
        "not_newer": 1,
        "deletes": 2,
        "failed": 2,
        "overloaded": 0,
        "batches": 6,
        "sent": 14,
        "mean_batch": 14 / 6,
        "commands": len(commands(output)),
        "flushes": 1,
        "bytes_out": len(output),
        "bytes_in": len(replies),
        "queued": 0,
        "in_flight": 0,
        "pending": 0,
        "pending_bytes": 0,
    }


def test_pending_counts_operations_and_their_data(exchange: Exchange) -> None:
    exchange.issue(Op("get", "a"), Op("get", "a"), Op("set_bulk", {"a": (1, "x"), "b": (1, "y")}))
    exchange.take()
    exchange.issue(Op("get", "a"), Op("set", "a", (1, "old")), Op("set", "a", (1, "newer")))
    stats = exchange.pipeline.stats()
    assert (stats["queued"], stats["in_flight"], stats["pending"]) == (2, 3, 4)
    assert stats["pending_bytes"] == len('"x""y""newer"')


@pytest.mark.parametrize("operation", ["get", "head", "set", "ttl", "guarded", "delete", "bulk"])
@pytest.mark.parametrize("replies", [True, False], ids=["late", "none"])
def test_a_partly_sent_batch_that_expires_is_no_longer_counted(
    exchange: Exchange, operation: str, replies: bool
) -> None:
    """One tick larger than the window, the rest of which is never sent."""
    names = [f"n{i}" for i in range(WINDOW + 1500)]
    match operation:
        case "set" | "ttl" | "guarded":
            options = {"set": {}, "ttl": {"ttl": 9}, "guarded": {"if_newer": True}}[operation]
            exchange.issue(*(Op("set", name, (1, 1), options) for name in names))
        case "bulk":
            exchange.issue(Op("set_bulk", dict.fromkeys(names, (1, 1))))
        case _:
            exchange.issue(*(Op(operation, name) for name in names))
    output = b""
    while more := exchange.pipeline.take_output():
        output += more
    exchange.pipeline.expire(math.inf)
    assert all(isinstance(waiter.error, DeadlineExceeded) for waiter in exchange.waiters)
    if replies:
        exchange.pipeline.feed(exchange.server.answer(output))
    else:
        exchange.pipeline.connection_lost(OSError("cut"), True)
    exchange.assert_drained()
    assert exchange.pipeline.take_output() == b""


BUSY = Refusal("BUSY Redis is busy running a script")


def issued_apart(exchange: Exchange, *operations: Operation) -> list[Any]:
    """Issue and send each operation in a tick of its own."""
    waiters = []
    for operation in operations:
        waiters += exchange.issue(operation)
        exchange.take()
    return waiters


def repeated(exchange: Exchange) -> list[list[bytes]]:
    """Let the owner of the socket note that nothing is under way, and send again."""
    assert exchange.pipeline.in_flight == 0
    exchange.pipeline.away = ""
    refusals.settle_doubts(exchange.pipeline)
    return exchange.take()


@pytest.mark.parametrize("retry", [True, False])
def test_a_repeat_that_was_sent_early_has_one_result(core: Any, retry: bool) -> None:
    """The owner of the socket goes on sending, where a later write overtook the refused one."""
    exchange = Exchange(core)
    first, bulk = exchange.issue(Op("delete", "x"), Op("delete_bulk", ["x", "y"]))
    assert len(exchange.take()) == 3
    exchange.reply(Refusal("READONLY x"))
    assert len(exchange.take()) == 1  # the repeat, which must wait for the others' replies
    exchange.reply(0, 0, 2)
    assert (first.result(), bulk.result()) == (True, 0)
    exchange.pipeline.connection_lost(OSError("cut"), retry)
    exchange.assert_drained()


def test_what_was_put_off_before_a_suspect_waits_for_it(core: Any) -> None:
    """The later write of the name was cut off twice, and was not done."""
    exchange = Exchange(core)
    waiters = exchange.issue(
        Op("set", "x", (1, 1), {"if_newer": True}), Op("set", "x", (2, 2), {"if_newer": True})
    )
    assert len(exchange.take()) == 2
    exchange.pipeline.connection_lost(OSError("cut"), True)
    assert len(exchange.take()) == 2
    exchange.reply(BUSY)
    exchange.pipeline.connection_lost(OSError("cut"), True)
    exchange.pipeline.away = ""
    assert [waiter.done for waiter in waiters] == [False, False]
    exchange.run()
    assert [waiter.result() for waiter in waiters] == [True, True]
    assert exchange.server.values[b"x_v"] == b"2"
    exchange.assert_drained()


@pytest.mark.parametrize("operation", [op for op, _ in REPEATABLE], ids=str)
@pytest.mark.parametrize("words", ["BUSY x", "LOADING x", "READONLY x", "MASTERDOWN x"])
def test_what_a_server_puts_off_is_sent_again(core: Any, operation: Operation, words: str) -> None:
    exchange = Exchange(core)
    before, put_off = exchange.issue(Op("head_bulk", ["x"]), operation)
    for command in exchange.take():
        if command[1:2] == [b"x_v"]:
            exchange.reply(b"1")
        elif command[1:2] == [b"x_d"]:
            exchange.reply("string")
        else:
            exchange.reply(Refusal(words))
    assert before.result() == {"x": 1}
    assert exchange.pipeline.away == words.split()[0]
    assert not put_off.done
    assert (exchange.pipeline.in_flight, exchange.pipeline.queued > 0) == (0, True)
    exchange.pipeline.away = ""
    exchange.run()
    assert put_off.error is None
    assert exchange.pipeline.away == ""
    assert exchange.pipeline.pending_bytes == 0


def test_a_refusal_until_the_deadline_is_the_error(core: Any) -> None:
    exchange = Exchange(core, timeout=5)
    lone, bulk = exchange.issue(Op("set", "a", (1, 1)), Op("set_bulk", {"b": (1, 1), "c": (1, 1)}))
    exchange.take()
    exchange.reply(Refusal("READONLY no"), Refusal("READONLY no"))
    exchange.pipeline.expire(time.monotonic() + 6)
    for waiter in (lone, bulk):
        assert type(waiter.error) is ReplyError
        assert (waiter.error.code, waiter.error.message) == ("READONLY", "READONLY no")
    assert "set 'a' at node.test:6379, within 5000 ms" in str(lone.error)
    exchange.assert_drained()


def test_a_bulk_that_is_refused_in_part_keeps_the_rest(core: Any) -> None:
    exchange = Exchange(core, timeout=5)
    (bulk,) = exchange.issue(Op("delete_bulk", ["a", "b"]))
    exchange.take()
    exchange.reply(2, BUSY)
    exchange.pipeline.expire(time.monotonic() + 6)
    assert isinstance(bulk.error, BulkError)
    assert bulk.error.result == 1
    assert {name: error.code for name, error in bulk.error.errors.items()} == {"b": "BUSY"}
    exchange.assert_drained()


def test_operations_put_off_keep_their_order(core: Any) -> None:
    exchange = Exchange(core)
    removed, read, written, again = issued_apart(
        exchange,
        Op("delete", "a"),
        Op("get", "a"),
        Op("set", "a", (2, 2)),
        Op("delete", "a"),
    )
    exchange.reply(BUSY, BUSY, BUSY, BUSY)
    # The second removal stands for the write before it too.
    assert verbs(repeated(exchange)) == ["DEL", "MGET", "DEL"]
    exchange.reply(0, [None, None], 0)
    assert (removed.result(), read.result(), written.result()) == (False, None, True)
    assert again.result() is True
    exchange.assert_drained()


def test_a_write_put_off_does_not_undo_a_later_one(core: Any) -> None:
    exchange = Exchange(core)
    removed, written, other = issued_apart(
        exchange, Op("delete", "a"), Op("set", "a", (2, 2)), Op("delete", "b")
    )
    exchange.reply(BUSY, "OK", BUSY)
    assert repeated(exchange) == [[b"DEL", b"b_v", b"b_d"]]
    assert removed.error.code == "BUSY"
    exchange.reply(2)
    assert (written.result(), other.result()) == (True, True)
    exchange.assert_drained()


def test_a_write_put_off_is_not_repeated_after_a_loss_behind_a_later_one(core: Any) -> None:
    exchange = Exchange(core)
    removed, written = issued_apart(exchange, Op("delete", "a"), Op("set", "a", (2, 2)))
    exchange.reply(BUSY)
    exchange.pipeline.connection_lost(OSError("cut"), True)
    assert removed.error.code == "BUSY"
    assert "the write may have happened" in str(written.error)
    assert exchange.take() == []
    exchange.assert_drained()


def test_messages_put_off_keep_their_order(core: Any) -> None:
    exchange = Exchange(core)
    topics = (1, 2, 1, 1, 2)
    sent = [
        exchange.pipeline.publish(topic, b"{", number, False) for number, topic in enumerate(topics)
    ]
    exchange.take()
    # The third message of topic 1 is delivered; the others of it would come behind it.
    exchange.reply(BUSY, BUSY, BUSY, 1, BUSY)
    assert [command[1][-1:] for command in repeated(exchange)] == [b"2", b"2"]
    assert [waiter.error and waiter.error.code for waiter in sent] == [
        "BUSY",
        None,
        "BUSY",
        None,
        None,
    ]
    exchange.reply(1, 1)
    exchange.assert_drained()
