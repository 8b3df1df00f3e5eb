"""The core on a cluster, alone: which node gets which operation, and which it redirects.

No sockets and no topology: tests provide the nodes' replies, and requeue redirected operations.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from dscache.core import constants as c
from dscache.errors import (
    BulkError,
    ConnectionLost,
    DeadlineExceeded,
    Overloaded,
    ProtocolError,
    RecordError,
    ReplyError,
)
from tests.support.wire import (
    CORES,
    NOPERM,
    NOSCRIPT,
    ClusterExchange,
    ModelServer,
    Operation,
    Push,
    Refusal,
    Waiter,
    keys_of,
    resp,
)

Op = Operation

ASKED = [b"ASKING"]
TRYAGAIN = "TRYAGAIN Multiple keys request during rehashing of slot"
CLUSTERDOWN = "CLUSTERDOWN Hash slot not served"
GUARDED = {"if_newer": True}
# A record whose keys are on different nodes of three.
APART = next(n for n in map(str, range(99)) if len({key_slot(k) % 3 for k in keys_of(n)}) == 2)


@pytest.fixture(params=CORES)
def core(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def nodes(core: Any) -> ClusterExchange:
    """Three nodes."""
    return ClusterExchange(core)


@pytest.fixture
def node(core: Any) -> ClusterExchange:
    """A single node that serves all slots."""
    return ClusterExchange(core, 1)


def slot(name: str) -> int:
    """Return the slot of a name with a hash tag, or of a tag."""
    return key_slot(name.encode())


def node_of(name: str, nodes: int = 3) -> int:
    return slot(name) % nodes


def tags_of(node: int, count: int, nodes: int = 3) -> list[str]:
    """Return hash tags of different slots that a node serves."""
    found: dict[int, str] = {}
    for i in itertools.count():
        if node_of(tag := f"{{t{i}}}", nodes) == node:
            found.setdefault(slot(tag), tag)
        if len(found) == count:
            return list(found.values())


def keys(*names: str) -> list[bytes]:
    return [key for name in names for key in keys_of(name)]


def names_in(command: list[bytes]) -> list[str]:
    """Return the records named by a command."""
    return [part[:-2].decode() for part in command if part.endswith(b"_v")]


def values(*names: str, version: int = 1) -> list[bytes]:
    """Return the MGET reply for records that exist."""
    return [value for _ in names for value in (b"%d" % version, b"{}")]


def moved(name: str, node: int = 1) -> Refusal:
    return Refusal(f"MOVED {slot(name)} {ClusterExchange.address(node)}")


def ask(name: str, node: int = 1) -> Refusal:
    return Refusal(f"ASK {slot(name)} {ClusterExchange.address(node)}")


def serving(nodes: ClusterExchange) -> tuple[list[ModelServer], Callable[..., list[Any]]]:
    """Return a server for each of three nodes, and a function that runs operations to the end."""
    servers = [ModelServer() for _ in range(3)]

    def ask_all(*operations: Operation) -> list[Any]:
        waiters = nodes.issue(*operations)
        for at in range(3):
            nodes.serve(at, servers[at])
        nodes.assert_drained()
        return [waiter.result() for waiter in waiters]

    return servers, ask_all


def assert_spread(servers: list[ModelServer]) -> None:
    """Assert that each server has keys, and none that belongs to another."""
    assert all(server.values for server in servers)
    for at, server in enumerate(servers):
        assert {key_slot(key) % 3 for key in server.values} == {at}


# -- slots

PREFIXES = [
    *("", "app:", "{app}:", "{", "{}", "{a", "}", "a}{b", "{x}{y}", "}{0}", "{}{a}", "é{", "é"),
]
NAMES = [
    *("a", "user/1", "{tag}x", "x{tag}", "{", "{}", "}", "}{", "}}", "}{0}", "}x", "{0}", "{}a"),
    *("{}{a}", "a}b", "a{b", "{a", "a}", "é", "{é}1", "\U0001f600}", "{\0}", "x" * 5000, "é" * 3),
]


@pytest.mark.parametrize("hash_tag", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_map_to_their_slots(core: Any, prefix: str, hash_tag: bool) -> None:
    """The slot is that of the two keys actually sent, or none if they differ."""
    nodes = ClusterExchange(core, 1, key_prefix=prefix, hash_tag=hash_tag)
    pipeline = nodes.pipelines[0]
    for name in NAMES:
        pipeline.get(name)
        [[_, version_key, data_key]] = nodes.take()
        one, other = key_slot(version_key), key_slot(data_key)
        expected = one if one == other else -1
        assert nodes.router.slot_of(name) == expected, name
        for kind in range(c.READ_KEY):
            assert pipeline.slot_of(kind, name) == expected
        for kind in (c.READ_KEY, c.WRITE_KEY):
            assert pipeline.slot_of(kind, name) == slot(name)
        assert core.slot_of_key(version_key) == one
        assert hash_tag is False or expected >= 0 or "{" in prefix


@pytest.mark.parametrize("name", ["", None, 5, b"a", "\ud800"])
def test_an_invalid_name_has_no_slot(nodes: ClusterExchange, name: Any) -> None:
    for call in ("slot_of", "get", "head", "delete"):
        with pytest.raises(RecordError):
            getattr(nodes.router, call)(name)
    with pytest.raises(RecordError):
        nodes.router.set(name, 1, 1)
    assert nodes.wakes == [0, 0, 0]


def test_the_known_slots(core: Any) -> None:
    """From the specification: the check value of the CRC, and the empty key."""
    assert core.slot_of_key(b"123456789") == 0x31C3
    assert core.slot_of_key(b"") == 0
    assert core.slot_of_key(b"foo{}{bar}") == key_slot(b"foo{}{bar}") != key_slot(b"bar")
    assert core.slot_of_key(b"foo{{bar}}zap") == core.slot_of_key(b"{bar")
    assert core.slot_of_key(b"foo{bar}{zap}") == core.slot_of_key(b"bar")


# -- routing to nodes


OPERATIONS = [
    Op("get", "{a}"),
    Op("head", "{a}"),
    Op("set", "{a}", (1, 1)),
    Op("set", "{a}", (1, 1), {"ttl": 5}),
    Op("set", "{a}", (1, 1), GUARDED),
    Op("delete", "{a}"),
    Op("get_bulk", ["{a}"]),
    Op("head_bulk", ["{a}"]),
    Op("set_bulk", {"{a}": (1, 1)}),
    Op("set_bulk", {"{a}": (1, 1)}, (), GUARDED),
    Op("delete_bulk", ["{a}"]),
]
READS = ("get", "head", "get_bulk", "head_bulk")


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_each_operation_goes_to_the_node_of_its_slot(
    nodes: ClusterExchange, operation: Operation
) -> None:
    """There it behaves as on a single server."""
    nodes.router.readers[slot("{a}")] = nodes.pipelines[1]
    nodes.router.owners[slot("{a}")] = nodes.pipelines[2]
    nodes.issue(operation)
    target = 1 if operation.method in READS else 2
    assert nodes.wakes == [node == target for node in range(3)]
    operation.on(nodes.pipelines[0])
    assert nodes.take(target) == nodes.take(0)


@pytest.mark.parametrize("layout", ["deepstream", "hashtag"])
def test_every_operation_works_on_several_nodes(core: Any, layout: str) -> None:
    """Three servers, each with one node's slots: written records can be read again."""
    nodes = ClusterExchange(core, hash_tag=layout == "hashtag")
    servers, ask_all = serving(nodes)
    names = [f"{{{i}}}" if layout == "deepstream" else f"user/{i}" for i in range(200)]

    assert ask_all(*(Op("set", name, (i, [i])) for i, name in enumerate(names))) == [True] * 200
    assert_spread(servers)
    [found, heads] = ask_all(Op("get_bulk", [*names, "{no}"]), Op("head_bulk", ["{no}", *names]))
    assert [(name, *record) for name, record in found.items()] == [
        (name, i, [i]) for i, name in enumerate(names)
    ]
    assert heads == {name: i for i, name in enumerate(names)}
    newer = dict.fromkeys(names, (100, "new"))
    assert ask_all(Op("set_bulk", newer, (), GUARDED)) == [set(names[100:])]
    assert ask_all(*(Op("head", name) for name in names)) == [100] * 100 + [*range(100, 200)]
    assert [r.data for r in ask_all(*(Op("get", n) for n in names[99:101]))] == ["new", [100]]
    assert ask_all(Op("delete_bulk", names[:50]), *(Op("delete", n) for n in names[40:60])) == [
        50,
        *[False] * 10,
        *[True] * 10,
    ]
    assert len(ask_all(Op("get_bulk", names))[0]) == 140


def test_empty_bulks(nodes: ClusterExchange) -> None:
    waiters = nodes.issue(
        Op("get_bulk", []), Op("head_bulk", []), Op("set_bulk", {}), Op("delete_bulk", [])
    )
    assert [waiter.result() for waiter in waiters] == [{}, {}, set(), 0]
    assert nodes.wakes == [1, 0, 0]
    nodes.assert_drained()


@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("get_bulk", "names"),
        ("head_bulk", b"names"),
        ("delete_bulk", ["{a}", 5]),
        ("set_bulk", ["{a}"]),
        ("set_bulk", {"{a}": (1, 1), "{b}": 5}),
        ("set_bulk", {"{a}": (1, 1), "{b}": (-1, 5)}),
        ("set_bulk", {"{a}": (1, 1), "{b}": (1, object())}),
    ],
)
def test_an_invalid_bulk_queues_nothing(nodes: ClusterExchange, method: str, argument: Any) -> None:
    with pytest.raises(RecordError):
        getattr(nodes.router, method)(argument)
    nodes.assert_drained()
    assert nodes.wakes == [0, 0, 0]


# -- grouping by slot


def test_reads_of_a_tick_are_grouped_by_slot(node: ClusterExchange) -> None:
    """One MGET for each slot, wherever its names stood in the tick, in their order."""
    names = [f"{{t{i % 7}}}{i}" for i in range(100)]
    random.Random(1).shuffle(names)
    waiters = node.issue(*(Op("get", name) for name in names))
    sent = node.take()
    assert len(sent) == len({slot(name) for name in names}) == 7
    assert [slot(names_in(command)[0]) for command in sent] == sorted({slot(n) for n in names})
    for command in sent:
        [own] = {slot(name) for name in names_in(command)}
        assert command == [b"MGET", *keys(*(name for name in names if slot(name) == own))]
    groups = [names_in(command) for command in sent]
    node.reply(0, *(values(*group, version=slot(group[0])) for group in groups))
    for name, waiter in zip(names, waiters, strict=True):
        assert waiter.result().name == name
        assert waiter.result().version == slot(name)
    node.assert_drained()
    assert node.pipelines[0].stats()["commands"] == 7


@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize(
    ("options", "verb", "limit"),
    [
        ({}, b"MSET", c.COMMAND_RECORDS),
        ({"ttl": 5}, b"EVALSHA", c.SCRIPT_RECORDS),
        (GUARDED, b"EVALSHA", c.SCRIPT_RECORDS),
    ],
    ids=["plain", "ttl", "guarded"],
)
def test_writes_are_grouped_by_slot(
    node: ClusterExchange, options: dict[str, Any], verb: bytes, limit: int, bulk: bool
) -> None:
    names = [f"{{t{i % 3}}}{i}" for i in range(3 * limit + 3)]
    if bulk:
        node.issue(Op("set_bulk", {name: (i, i) for i, name in enumerate(names)}, (), options))
    else:
        node.issue(*(Op("set", name, (i, i), options) for i, name in enumerate(names)))
    server = ModelServer()
    sent = node.serve(0, server)
    node.assert_drained()
    assert {command[0] for command in sent} == {verb}
    assert [len(names_in(command)) for command in sent] == [limit, 1] * 3
    assert all(len({slot(name) for name in names_in(command)}) == 1 for command in sent)
    assert server.values == {
        key: b"%d" % i for i, name in enumerate(names) for key in keys_of(name)
    }


@pytest.mark.parametrize(("method", "verbs"), [("head", [b"GET", b"TYPE"]), ("delete", [b"DEL"])])
def test_operations_with_a_command_each_keep_their_order(
    node: ClusterExchange, method: str, verbs: list[bytes]
) -> None:
    names = [f"{{t{i}}}" for i in range(50)]
    node.issue(*(Op(method, name) for name in names))
    sent = node.take()
    assert [command[0] for command in sent] == verbs * 50
    seen = dict.fromkeys(key[:-2].decode() for command in sent for key in command[1:])
    assert list(seen) == names


def test_the_result_keeps_the_order_of_the_names(nodes: ClusterExchange) -> None:
    """The caller's order, not that of slots and nodes."""
    names = [f"{{{i}}}" for i in range(100)]
    random.Random(2).shuffle(names)
    [waiter] = nodes.issue(Op("get_bulk", names))
    for at in (2, 0, 1):
        nodes.reply(at, *(values(*names_in(command)) for command in nodes.take(at)))
    assert list(waiter.result()) == names


def test_retries_one_by_one_stay_in_their_slot(node: ClusterExchange) -> None:
    """Each forbidden record gets its own command, and other slots are unaffected."""
    server = ModelServer()
    names = [f"{{t{i % 2}}}{i}" for i in range(10)]
    server.refused = set(keys_of(names[4]))
    waiters = node.issue(*(Op("set", name, (1, 1)) for name in names))
    sent = node.serve(0, server)
    assert sorted(len(names_in(command)) for command in sent) == [1] * 5 + [5, 5]
    assert [i for i, waiter in enumerate(waiters) if waiter.error] == [4]
    node.assert_drained()


def test_a_lost_connection_keeps_sent_operations_before_the_others(node: ClusterExchange) -> None:
    """Guarded writes that may have happened are told apart from those that can't have."""
    names = [f"{{t{i}}}" for i in range(300)]
    node.issue(*(Op("set", name, (1, 1), GUARDED) for name in names))
    sent = [name for command in node.take() for name in names_in(command)]
    answered = sent[:10]
    node.reply(0, *([1] for _ in answered))
    node.pipelines[0].connection_lost(ConnectionLost("cut"), True)
    assert node.counters(0)[:3] == (290, 0, 290)
    again = node.take()
    assert [name for command in again for name in names_in(command)] == sent[10:]
    assert {command[-1] for command in again} == {c.GUARDED_REPEAT}
    node.reply(0, *([1] for _ in again))
    node.assert_drained()


def test_bytes_are_counted_after_a_part_was_answered(node: ClusterExchange) -> None:
    """Grouped by slot, the texts are in another order than they were issued."""
    names = tags_of(0, 20, 1)
    random.Random(3).shuffle(names)
    texts = {name: "x" * (2**i) for i, name in enumerate(names[:12])}
    node.issue(Op("set_bulk", {name: (1, text) for name, text in texts.items()}))
    sent = node.take()
    left = {name: len(text) + 2 for name, text in texts.items()}
    for command in sent:
        assert node.counters(0)[3] == sum(left.values())
        node.pipelines[0].expire(-math.inf)
        assert node.counters(0)[3] == sum(left.values())
        node.reply(0, "OK")
        for name in names_in(command):
            del left[name]
    node.assert_drained()


# -- redirections


REFUSALS = [
    moved("{t}"),
    ask("{t}"),
    Refusal(TRYAGAIN),
    Refusal(CLUSTERDOWN),
    Refusal("READONLY You can't write against a read only replica."),
    Refusal("MASTERDOWN Link with MASTER is down"),
    Refusal("LOADING Redis is loading the dataset in memory"),
]
BATCHES = {
    "get": (Op("get", ""), [b"1", b"{}"]),
    "head": (Op("head", ""), None),
    "set": (Op("set", "", (1, "x")), "OK"),
    "ttl": (Op("set", "", (1, "x"), {"ttl": 9}), 1),
    "guarded": (Op("set", "", (1, "x"), GUARDED), 1),
    "delete": (Op("delete", ""), 2),
}


def issue(node: ClusterExchange, model: Op, names: list[str], bulk: bool) -> None:
    """Issue an operation for each of these records, or one for all."""
    if bulk and model.method == "set":
        node.issue(Op("set_bulk", dict.fromkeys(names, model.rest), (), model.options))
    elif bulk:
        node.issue(Op(f"{model.method}_bulk", names))
    else:
        node.issue(*(Op(model.method, name, model.rest, model.options) for name in names))


@pytest.mark.parametrize("bulk", [False, True], ids=["single", "bulk"])
@pytest.mark.parametrize("operation", BATCHES)
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.split()[0])
def test_one_redirection_among_500_records(
    node: ClusterExchange, refusal: Refusal, operation: str, bulk: bool
) -> None:
    """The redirected records leave, the others have their results, and nothing else is counted."""
    model, done = BATCHES[operation]
    names = [f"{{t{i % 50}}}{i}" for i in range(500)]
    away = [name for name in names if name.startswith("{t7}")]
    issue(node, model, names, bulk)
    sent = node.take()
    replies: list[Any] = []
    for command in sent:
        own = names_in(command) or [command[1][:-2].decode()]
        if own[0] in away:
            replies.append(refusal)
        elif operation == "head":
            replies.append(b"1" if command[0] == b"GET" else "string")
        else:
            replies.append(done * len(own) if operation == "get" else done)
            if operation in ("ttl", "guarded"):
                replies[-1] = [done] * len(own)
    node.reply(0, *replies)
    redirected = node.redirected(0)
    assert node.counters(0) == (0, 0, 0, 0)
    assert node.pipelines[0].away == ""
    assert [name for _, _, batch in redirected for name in batch.records] == away
    assert {(words, at) for words, at, _ in redirected} == {(str(refusal), slot("{t7}"))}
    assert {batch.redirections for _, _, batch in redirected} == {
        (f"{node.address(0)}: {refusal}",)
    }
    if bulk:
        [waiter] = node.waiters
        assert not waiter.done
    else:
        left = {name for name, w in zip(names, node.waiters, strict=True) if not w.done}
        assert left == set(away)
    # Once these are done too, the bulk is complete.
    node.pipelines[0].requeue(batch for _, _, batch in redirected)
    server = ModelServer()
    for name in away:
        if operation in ("get", "head", "delete"):
            server.put(name, 1, b"{}")
    node.serve(0, server)
    node.assert_drained()
    results = [waiter.result() for waiter in node.waiters]
    match model.method, bulk:
        case "get" | "head", True:
            assert list(results[0]) == names if operation == "get" else set(results[0]) == {*names}
        case "set", True:
            assert results == [set()]
        case "delete", True:
            assert results == [500]
        case _:
            assert all(results)


@pytest.mark.parametrize("bulk", [False, True], ids=["single", "bulk"])
@pytest.mark.parametrize("operation", BATCHES)
def test_asking_precedes_each_command(node: ClusterExchange, operation: str, bulk: bool) -> None:
    """A batch redirected by ASK sends ASKING before each command, once, and drops its reply."""
    model, done = BATCHES[operation]
    names = ["{t}1", "{t}2"]
    issue(node, model, names, bulk)
    first = node.take()
    node.reply(0, *[ask("{t}")] * len(first))
    batches = [batch for _, _, batch in node.redirected(0)]
    for batch in batches:
        assert not batch.asking
        batch.ask(node.pipelines[0])
        assert batch.asking
    node.pipelines[0].requeue(batches)
    sent = node.take()
    assert sent[::2] == [ASKED] * (len(sent) // 2)
    if operation == "head":
        own = [keys_of(name) for name in names]
        assert sent[1::2] == [
            command for v, d in own for command in ([b"EXISTS", v, d], [b"GET", v])
        ]
        replies: list[Any] = ["OK", 2, "OK", b"1"] * 2
    else:
        assert sent[1::2] == first
        if operation == "delete":
            replies = ["OK", 2] * 2
        elif operation in ("ttl", "guarded"):
            replies = ["OK", [1, 1]]
        else:
            replies = ["OK", done * 2 if operation == "get" else done]
    received = b"".join(map(resp, replies))
    for byte in received:  # in as many pieces as possible
        node.pipelines[0].feed(bytes([byte]))
    node.assert_drained()
    assert all(waiter.error is None for waiter in node.waiters)
    # Later commands don't send ASKING.
    node.issue(Op("get", "{t}3"))
    assert node.take() == [[b"MGET", *keys("{t}3")]]


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ((b"5", 2), 5),
        ((b"5", 1), None),
        ((None, 1), None),
        ((None, 0), None),
        ((None, 2), None),
        ((Refusal("WRONGTYPE x"), 2), None),
        ((b"x", 2), RecordError),
        ((b"5", Refusal(NOPERM)), ReplyError),
        ((Refusal(NOPERM), 2), ReplyError),
        ((b"5", "string"), 5),
        ((b"5", 3), None),
        ((b"5", None), ProtocolError),
        ((b"5", b"x"), ProtocolError),
    ],
)
def test_heads_follow_ask(node: ClusterExchange, replies: tuple[Any, Any], expected: Any) -> None:
    [waiter] = node.issue(Op("head", "{t}"))
    node.take()
    node.reply(0, ask("{t}"), "string")
    [(_, _, batch)] = node.redirected(0)
    batch.ask(node.pipelines[0])
    node.pipelines[0].requeue([batch])
    node.take()
    stored, present = replies
    received = ("OK", present, Push([b"invalidate", None]), "OK", stored)
    if expected is ProtocolError:
        with pytest.raises(ProtocolError):
            node.reply(0, *received)
        node.pipelines[0].connection_lost(ProtocolError("wrong"), False)
    else:
        node.reply(0, *received)
    node.assert_drained()
    if isinstance(expected, type):
        assert isinstance(waiter.error, expected)
    else:
        assert waiter.result() == expected


def redirected_by_ask(node: ClusterExchange, operation: Operation) -> Any:
    """Issue an operation that is redirected by ASK and follows it; return its waiter."""
    [waiter] = node.issue(operation)
    node.take()
    node.reply(0, ask("{t}"))
    [(_, _, batch)] = node.redirected(0)
    batch.ask(node.pipelines[0])
    node.pipelines[0].requeue([batch])
    node.take()
    return waiter


def test_a_refused_asking_decides_nothing(node: ClusterExchange) -> None:
    """Without its effect, the command behind it gets the deciding reply."""
    waiter = redirected_by_ask(node, Op("get", "{t}"))
    node.reply(0, Refusal("NOPERM no ASKING for you"), moved("{t}"))
    [(words, _, batch)] = node.redirected(0)
    assert words == moved("{t}")
    assert len(batch.redirections) == 2
    assert not batch.asking
    assert not waiter.done


def test_an_asking_batch_survives_a_lost_connection_and_a_lost_script(
    node: ClusterExchange,
) -> None:
    waiter = redirected_by_ask(node, Op("set", "{t}", (1, 1), GUARDED))
    node.reply(0, "OK", Refusal(NOSCRIPT))
    asked, [verb, *_] = node.take()
    assert (asked, verb) == (ASKED, b"EVAL")
    node.reply(0, "OK")  # not half of the next command
    node.pipelines[0].connection_lost(ConnectionLost("cut"), True)
    asked, command = node.take()
    assert (asked, command[0], command[-1]) == (ASKED, b"EVAL", c.GUARDED_REPEAT)
    node.reply(0, "OK", [1])
    assert waiter.result() is True
    node.assert_drained()


@pytest.mark.parametrize("limit", [0, 1, 3])
@pytest.mark.parametrize("bulk", [False, True], ids=["single", "bulk"])
def test_the_number_of_redirections_is_limited(core: Any, limit: int, bulk: bool) -> None:
    """The error then has the whole path."""
    node = ClusterExchange(core, 1, max_redirections=limit)
    [waiter] = node.issue(Op("get_bulk", ["{t}", "{u}"]) if bulk else Op("get", "{t}"))
    for command in node.take():
        node.reply(0, moved("{t}", 5) if names_in(command) == ["{t}"] else values("{u}"))
    for _ in range(limit):
        [(_, _, batch)] = node.redirected(0)
        assert not waiter.done
        node.pipelines[0].requeue([batch])
        node.take()
        node.reply(0, moved("{t}", 5))
    node.assert_drained()
    error = waiter.error
    if bulk:
        assert isinstance(error, BulkError)
        assert list(error.errors) == ["{t}"]
        assert list(error.result) == ["{u}"]
        error = error.errors["{t}"]
    assert isinstance(error, ReplyError)
    assert error.code == "MOVED"
    words = moved("{t}", 5)
    path = "; ".join([f"node0.test:6379: {words}"] * (limit + 1))
    assert f"(redirected {limit + 1} times, and maxRedirections is {limit}: {path})" in str(error)
    assert "get '{t}' at node0.test:6379" in str(error)


@pytest.mark.parametrize("operation", BATCHES)
def test_after_tryagain_each_record_is_sent_alone(node: ClusterExchange, operation: str) -> None:
    """A record whose keys are being moved must not delay the others of its slot again."""
    model, done = BATCHES[operation]
    names = ["{t}1", "{t}2", "{t}3"]
    node.issue(*(Op(model.method, name, model.rest, model.options) for name in names))
    sent = node.take()
    node.reply(0, *[Refusal(TRYAGAIN)] * len(sent))
    for _, _, batch in node.redirected(0):
        node.pipelines[0].requeue([batch])
    sent = node.take()
    assert len(sent) == (6 if operation == "head" else 3)
    assert [names_in(command) for command in sent if names_in(command)] == [[n] for n in names]
    replies: list[Any] = []
    for command in sent:
        if operation == "head":
            replies.append(b"1" if command[0] == b"GET" else "string")
        else:
            replies.append([done] if operation in ("ttl", "guarded") else done)
    lagging = 2 if operation == "head" else 1
    node.reply(0, *replies[:lagging], *[Refusal(TRYAGAIN)] * lagging, *replies[2 * lagging :])
    assert [waiter.done for waiter in node.waiters] == [True, False, True]
    [(_, _, batch)] = node.redirected(0)
    assert list(batch.records) == ["{t}2"]


def test_refusals_other_than_redirections(node: ClusterExchange) -> None:
    """Only a node of a cluster redirects, and never a command that has no key."""
    pipeline = node.pipelines[0]
    _, hello = pipeline.command("HELLO", 3)
    waiters = node.issue(Op("get", "{t}"), Op("set", "{u}", (1, 1)))
    node.take()
    node.reply(0, Refusal("LOADING x"), Refusal("OOM x"), Refusal("MOVEDX 1 a:1"))
    assert hello.error.code == "LOADING"
    assert [waiter.error.code for waiter in waiters] == ["OOM", "MOVEDX"]
    node.assert_drained()


@pytest.mark.parametrize("words", ["MOVED 1 a:1", "ASK 1 a:1", CLUSTERDOWN, "READONLY x"])
def test_a_single_server_redirects_nothing(core: Any, words: str) -> None:
    nodes = ClusterExchange(core, 1)
    alone = core.Pipeline(Waiter, int)
    waiter = alone.set("{t}", 1, 1)
    alone.take_output()
    alone.feed(resp(Refusal(words)))
    assert alone.redirected == []
    assert alone.away == ("READONLY" if words.startswith("READONLY") else "")
    if alone.away:
        assert (alone.queued, alone.in_flight, waiter.error) == (1, 0, None)
        alone.fail_all(lambda operation: ReplyError(words))
    assert waiter.error.message == words
    nodes.assert_drained()


def test_an_expired_operation_is_not_redirected(node: ClusterExchange) -> None:
    late, _ = node.issue(Op("get", "{t}"), Op("set", "{t}", (1, 1)))
    node.take()
    node.pipelines[0].expire(math.inf)
    assert isinstance(late.error, DeadlineExceeded)
    node.reply(0, moved("{t}"), moved("{t}"))
    node.assert_drained()


def test_a_cancelled_operation_is_still_redirected(node: ClusterExchange) -> None:
    [waiter] = node.issue(Op("set", "{t}", (1, 1)))
    node.take()
    waiter.cancel()
    node.reply(0, moved("{t}"))
    [(_, _, batch)] = node.redirected(0)
    node.pipelines[0].requeue([batch])
    assert node.take() == [[b"MSET", b"{t}_v", b"1", b"{t}_d", b"1"]]
    node.reply(0, "OK")
    node.assert_drained()


# -- a superseded write


PLAIN = [{}, {"ttl": 9}]


@pytest.mark.parametrize("first", PLAIN)
@pytest.mark.parametrize("later", [*PLAIN, "delete"])
@pytest.mark.parametrize("words", [moved("{t}"), ask("{t}"), TRYAGAIN, CLUSTERDOWN])
@pytest.mark.parametrize("both", [True, False], ids=["both", "only-the-first"])
def test_a_superseded_write_is_not_retried(
    node: ClusterExchange, first: dict[str, int], later: Any, words: str, both: bool
) -> None:
    """Its waiters get the result of the later one, wherever that is executed."""
    second = Op("delete", "{t}") if later == "delete" else Op("set", "{t}", (2, 2), later)
    one = node.issue(Op("set", "{t}", (1, 1), first))
    node.take()
    two = node.issue(second)
    node.take()
    done: Any = 2 if later == "delete" else [1] if later else "OK"
    if both:
        node.reply(0, Refusal(words), Refusal(words))
        [(_, _, batch)] = node.redirected(0)
        assert list(batch.records) == ["{t}"]
        assert not any(waiter.done for waiter in node.waiters)
        node.pipelines[0].requeue([batch])
        [command] = node.take()
        verb = b"DEL" if later == "delete" else b"EVALSHA" if later else b"MSET"
        assert command[0] == verb
        node.reply(0, done)
    else:
        node.reply(0, Refusal(words), done)
    assert node.redirected(0) == []
    node.assert_drained()
    assert [waiter.result() for waiter in one + two] == [True, True]


@pytest.mark.parametrize("words", [CLUSTERDOWN, "LOADING x", "MASTERDOWN x", "READONLY x"])
@pytest.mark.parametrize("first", ["set", "delete"])
def test_a_retry_undoes_no_guarded_write_behind_it(
    node: ClusterExchange, words: str, first: str
) -> None:
    """The node may already serve the next command; a retry would come after it."""
    [one] = node.issue(Op("delete", "{t}") if first == "delete" else Op("set", "{t}", (1, 1)))
    node.take()
    [two] = node.issue(Op("set", "{t}", (2, 2), GUARDED))
    node.take()
    node.reply(0, Refusal(words), [1])
    assert node.redirected(0) == []
    assert one.error.message == words
    assert two.result() is True
    node.assert_drained()


def test_a_superseded_write_gets_the_error_of_the_later_one(node: ClusterExchange) -> None:
    one = node.issue(Op("set", "{t}", (1, 1)))
    node.take()
    two = node.issue(Op("set", "{t}", (2, 2)))
    node.take()
    node.reply(0, moved("{t}"), Refusal("OOM full"))
    node.assert_drained()
    for waiter in one + two:
        assert isinstance(waiter.error, ReplyError)
        assert waiter.error.code == "OOM"
    assert one[0].error is not two[0].error


def test_writes_with_separate_results_keep_their_order(node: ClusterExchange) -> None:
    """Guarded ones, removals and bulks: all are redirected and executed in their order."""
    steps = [
        Op("set", "{t}", (1, 1)),
        Op("set", "{t}", (2, 2), GUARDED),
        Op("get", "{t}"),
        Op("delete", "{t}"),
        Op("set_bulk", {"{t}": (1, 3)}, (), GUARDED),
        Op("get", "{t}"),
        Op("set_bulk", {"{t}": (4, 4), "{t}2": (1, 1)}),
        Op("head", "{t}"),
    ]
    for step in steps:
        node.issue(step)
        node.take()
    node.reply(0, *[moved("{t}")] * 7, moved("{t}"), "string")
    batches = [batch for _, _, batch in node.redirected(0)]
    random.Random(4).shuffle(batches)
    for batch in batches:  # in any order of requeueing
        node.pipelines[0].requeue([batch])
    server = ModelServer()
    node.serve(0, server)
    node.assert_drained()
    results = [waiter.result() for waiter in node.waiters]
    assert [tuple(results[2]), tuple(results[5])] == [(2, 2), (1, 3)]
    assert [results[i] for i in (0, 1, 3, 4, 6, 7)] == [True, True, True, set(), set(), 4]


# -- moving between nodes


def test_waiting_operations_go_to_the_new_owner_of_their_slot(nodes: ClusterExchange) -> None:
    """Each record separately, in the order in which all were issued."""
    stays, goes = tags_of(0, 2)
    nodes.issue(
        Op("get", f"{stays}1"),
        Op("get", f"{goes}1"),
        Op("set", f"{goes}2", (1, "text")),
        Op("get_bulk", [f"{goes}3", f"{stays}3", f"{goes}4"]),
        Op("head", f"{goes}5"),
        Op("set", f"{stays}6", (1, "longer text")),
        Op("delete", f"{goes}7"),
    )
    [other] = tags_of(1, 1)
    nodes.issue(Op("get", f"{other}8"))
    assert nodes.counters(0) == (9, 0, 7, len('"text""longer text"'))
    nodes.assign(slot(goes), 1)
    nodes.move(0)
    assert nodes.counters(0) == (3, 0, 3, len('"longer text"'))
    assert nodes.counters(1) == (7, 0, 6, len('"text"'))
    assert nodes.counters(2) == (0, 0, 0, 0)
    assert nodes.take(0) == [
        [b"MGET", *keys(f"{stays}1")],
        [b"MGET", *keys(f"{stays}3")],
        [b"MSET", f"{stays}6_v".encode(), b"1", f"{stays}6_d".encode(), b'"longer text"'],
    ]
    assert nodes.take(1) == [
        [b"MGET", *keys(f"{goes}1")],
        [b"MSET", f"{goes}2_v".encode(), b"1", f"{goes}2_d".encode(), b'"text"'],
        [b"MGET", *keys(f"{goes}3", f"{goes}4")],
        [b"GET", f"{goes}5_v".encode()],
        [b"TYPE", f"{goes}5_d".encode()],
        [b"DEL", *keys(f"{goes}7")],
        [b"MGET", *keys(f"{other}8")],
    ]
    nodes.reply(0, values("a"), [None, None], "OK")
    nodes.reply(1, values("a"), "OK", values("a", "b"), None, "none", 0, values("a"))
    nodes.assert_drained()
    assert list(nodes.waiters[3].result()) == [f"{goes}3", f"{goes}4"]


def test_requeued_operations_keep_their_age(nodes: ClusterExchange) -> None:
    """Older operations go before the queued ones, younger ones after them."""
    [first], [second] = tags_of(0, 1), tags_of(1, 1)
    order = [(first, 1), (second, 2), (first, 3), (second, 4), (first, 5)]
    for tag, version in order:  # bulks join nothing
        nodes.issue(Op("set_bulk", {tag: (version, version)}))
    nodes.assign(slot(first), 1)
    nodes.move(0)
    assert [command[2] for command in nodes.take(1)] == [b"1", b"2", b"3", b"4", b"5"]
    nodes.reply(1, *["OK"] * 5)
    nodes.assert_drained()


def test_nothing_joins_a_requeued_batch(nodes: ClusterExchange) -> None:
    [tag] = tags_of(0, 1)
    nodes.issue(Op("get", f"{tag}1"))
    nodes.assign(slot(tag), 1)
    nodes.move(0)
    nodes.issue(Op("get", f"{tag}1"), Op("set", f"{tag}1", (1, 1)))
    nodes.assign(slot(tag), 0)
    nodes.issue(Op("get", f"{tag}1"))
    assert [command[0] for command in nodes.take(1)] == [b"MGET", b"MGET", b"MSET"]
    assert [command[0] for command in nodes.take(0)] == [b"MGET"]


def test_requeued_operations_keep_their_deadlines(core: Any) -> None:
    """An operation gains no time by being requeued."""
    nodes = ClusterExchange(core)
    [tag] = tags_of(0, 1)
    nodes.issue(Op("get", tag))
    before = nodes.pipelines[0].expire(-math.inf)
    nodes.take(0)
    nodes.reply(0, moved(tag))
    [(_, _, batch)] = nodes.redirected(0)
    assert nodes.pipelines[0].expire(-math.inf) is None
    assert batch.deadline == before
    nodes.pipelines[1].requeue([batch])
    assert nodes.pipelines[1].expire(-math.inf) == before
    assert nodes.pipelines[1].expire(before) is None
    [waiter] = nodes.waiters
    assert isinstance(waiter.error, DeadlineExceeded)
    assert f"redirected: {nodes.address(0)}: {moved(tag)}" in str(waiter.error)
    nodes.assert_drained()


@pytest.mark.parametrize("method", ["get_bulk", "set_bulk", "guarded", "delete_bulk", "set"])
def test_the_rest_of_a_partly_sent_batch_moves(core: Any, method: str) -> None:
    """The part in flight stays where it was sent; together both parts are the whole."""
    nodes = ClusterExchange(core, 2, max_pending=10)
    tag, other = tags_of(0, 2, 2)
    # Several hundred removals are sent at once, each in its own command.
    count = 3 * c.COMMAND_RECORDS if method == "delete_bulk" else 60
    names = [f"{tag if i % 2 else other}{i:04}" for i in range(count)]
    match method:
        case "set_bulk":
            nodes.issue(Op("set_bulk", {name: (1, name) for name in names}))
        case "guarded":
            nodes.issue(Op("set_bulk", {name: (1, name) for name in names}, (), GUARDED))
        case "set":
            nodes.issue(*(Op("set", name, (1, name)) for name in names))
        case _:
            nodes.issue(Op(method, names))
    writes = method in ("set_bulk", "set", "guarded")
    size = len(names[0]) + 2 if writes else 0
    sent = nodes.take(0)
    flying = [name for command in sent for name in names_in(command)]
    assert 0 < len(flying) < count
    nodes.assign(slot(tag), 1)
    nodes.move(0)
    moving = [name for name in names if name.startswith(tag) and name not in flying]
    staying = [name for name in names if name not in moving and name not in flying]
    assert moving
    many = method == "set"
    assert nodes.counters(1) == (
        len(moving),
        0,
        len(moving) if many else 1,
        len(moving) * size,
    )
    assert nodes.counters(0) == (
        len(staying),
        len(flying),
        count - len(moving) if many else 1 + bool(staying),
        (count - len(moving)) * size,
    )
    server = ModelServer()
    if not writes:
        for name in names:
            server.put(name, 1, b"{}")
    nodes.pipelines[0].feed(b"".join(resp(server.execute(command)) for command in sent))
    nodes.serve(0, server)
    nodes.serve(1, server)
    nodes.assert_drained()
    seen = Counter(name for command in server.executed for name in names_in(command))
    assert seen == Counter(names)
    results = [waiter.result() for waiter in nodes.waiters]
    expected = {"get_bulk": names, "delete_bulk": count, "set": True}.get(method, set())
    assert all((list(r) if method == "get_bulk" else r) == expected for r in results)


def test_a_batch_that_moves_as_a_whole_is_unchanged(nodes: ClusterExchange) -> None:
    """Including the part that was in flight on a lost connection."""
    tag, _ = tags_of(0, 2)
    names = [f"{tag}{i}" for i in range(c.COMMAND_RECORDS + 10)]
    nodes.issue(Op("get_bulk", names))
    assert len(nodes.take(0)) == 2
    nodes.reply(0, values(*names[: c.COMMAND_RECORDS]))
    nodes.pipelines[0].connection_lost(ConnectionLost("cut"), True)
    assert nodes.counters(0)[:3] == (10, 0, 1)
    nodes.assign(slot(tag), 2)
    nodes.move(0)
    assert nodes.counters(0) == (0, 0, 0, 0)
    assert nodes.counters(2)[:3] == (10, 0, 1)
    assert nodes.take(2) == [[b"MGET", *keys(*names[c.COMMAND_RECORDS :])]]
    nodes.reply(2, values(*names[c.COMMAND_RECORDS :]))
    assert list(nodes.waiters[0].result()) == names
    nodes.assert_drained()


def test_guarded_writes_sent_before_stay_in_doubt_on_the_next_node(nodes: ClusterExchange) -> None:
    """They may have happened on the lost node, whose replica now has their slot."""
    tag, _ = tags_of(0, 2)
    size = c.WINDOW_RECORDS
    names = [f"{tag}{i}" for i in range(c.SCRIPT_RECORDS + 5)]
    pipeline = nodes.pipelines[0]
    assert len(names) < size
    nodes.issue(Op("set_bulk", dict.fromkeys(names, (1, 1)), (), GUARDED))
    nodes.take(0)
    pipeline.connection_lost(ConnectionLost("cut"), True)
    nodes.issue(Op("set_bulk", {f"{tag}new": (1, 1)}, (), GUARDED))
    nodes.assign(slot(tag), 1)
    nodes.move(0)
    sent = nodes.take(1)
    assert [int(command[2]) // 2 for command in sent] == [c.SCRIPT_RECORDS, 5, 1]
    # The records of each have the same guard, which is its last argument.
    guards = [command[-1] for command in sent]
    assert guards == [c.GUARDED_REPEAT, c.GUARDED_REPEAT, c.GUARDED]


def test_an_asking_batch_stays_where_it_was_sent(nodes: ClusterExchange) -> None:
    """Its slot still belongs to the other node. Unsent, it goes to the node named by ASK."""
    [tag] = tags_of(0, 1)
    nodes.issue(Op("get", tag))
    nodes.take(0)
    nodes.reply(0, ask(tag, 1))
    [(_, _, batch)] = nodes.redirected(0)
    batch.ask(nodes.pipelines[1])
    nodes.pipelines[2].requeue([batch])  # where it waits
    assert nodes.counters(2)[:3] == (1, 0, 1)
    nodes.move(2)
    assert nodes.counters(2)[:3] == (0, 0, 0)
    nodes.move(1)
    assert nodes.counters(1)[:3] == (1, 0, 1)
    assert nodes.take(1) == [ASKED, [b"MGET", *keys(tag)]]
    nodes.reply(1, "OK", values(tag))
    nodes.assert_drained()


def test_a_finished_operation_is_not_taken(nodes: ClusterExchange) -> None:
    [tag] = tags_of(0, 1)
    nodes.issue(Op("set", tag, (1, 1)), Op("set_bulk", {tag: (2, 2)}))
    nodes.pipelines[0].expire(math.inf)
    nodes.assign(slot(tag), 1)
    nodes.move(0)
    assert nodes.pipelines[0].take_queued(nodes.router.target_of) == []
    nodes.assert_drained()


def test_requeueing_requests_a_flush_or_is_refused(nodes: ClusterExchange) -> None:
    """A closed node takes nothing over and leaves the offered batches unchanged."""
    [tag] = tags_of(0, 1)
    nodes.issue(Op("set", tag, (1, 1)))
    nodes.assign(slot(tag), 1)
    released = nodes.pipelines[0].take_queued(nodes.router.target_of)
    nodes.closed.add(1)
    with pytest.raises(ConnectionLost):
        nodes.pipelines[1].requeue([batch for _, batch in released])
    assert nodes.counters(1) == (0, 0, 0, 0)
    nodes.pipelines[2].requeue([batch for _, batch in released])
    assert nodes.wakes == [1, 0, 1]
    assert nodes.counters(2) == (1, 0, 1, 1)
    nodes.serve(2, ModelServer())
    nodes.assert_drained()


def test_a_fence_is_passed_when_all_before_it_is_answered(node: ClusterExchange) -> None:
    """It is passed once everything in flight before it is answered, with any result."""
    pipeline = node.pipelines[0]
    assert pipeline.fence() == pipeline.settled == 0
    node.issue(Op("get", "{t}"), Op("head", "{t}"))
    assert pipeline.fence() == 0  # as nothing is in flight
    node.take()
    fence = pipeline.fence()
    assert fence == 2
    node.issue(Op("get", "{u}"))
    node.take()
    node.reply(0, values("{t}"), b"1")
    assert pipeline.settled == 1
    node.reply(0, "string")
    assert pipeline.settled == fence
    assert pipeline.fence() == 3
    pipeline.connection_lost(ConnectionLost("cut"), True)
    assert pipeline.settled == 3
    node.take()
    assert pipeline.fence() == 4
    pipeline.fail_all(ConnectionLost)
    assert pipeline.settled == pipeline.fence() == 4


@pytest.mark.parametrize("operation", BATCHES)
def test_a_batch_reports_when_it_is_settled(node: ClusterExchange, operation: str) -> None:
    model, _ = BATCHES[operation]
    node.issue(Op(model.method, "{t}", model.rest, model.options))
    sent = node.take()
    node.reply(0, *[ask("{t}")] * len(sent))
    [(_, _, batch)] = node.redirected(0)
    assert not batch.settled()
    batch.ask(node.pipelines[0])
    node.pipelines[0].requeue([batch])
    node.take()
    assert not batch.settled()
    replies = ["OK", Refusal(TRYAGAIN)] * (2 if operation == "head" else 1)
    node.reply(0, *replies)
    assert batch.settled()
    [(_, _, again)] = node.redirected(0)
    assert not again.settled()
    assert again.serial == batch.serial
    node.pipelines[0].requeue([again])
    node.pipelines[0].fail_all(ConnectionLost)
    assert again.settled()
    node.assert_drained()


# -- bulks of several nodes


LOSSES: dict[str, Any] = {
    "connection_lost": lambda p: p.connection_lost(ConnectionLost("cut"), False),
    "expire": lambda p: p.expire(math.inf),
    "fail_all": lambda p: p.fail_all(ConnectionLost),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", ["get_bulk", "head_bulk", "set_bulk", "guarded", "delete_bulk"])
@pytest.mark.parametrize("when", ["queued", "sent", "partly"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_one_lost_node_keeps_the_results_of_the_others(
    nodes: ClusterExchange, method: str, loss: str, when: str, first: bool
) -> None:
    tags = {node: tags_of(node, 3) for node in range(3)}
    names = [name for three in zip(*tags.values(), strict=True) for name in three]
    lost = tags[1]
    if method in ("set_bulk", "guarded"):
        options = GUARDED if method == "guarded" else {}
        [waiter] = nodes.issue(Op("set_bulk", dict.fromkeys(names, (1, 1)), (), options))
    else:
        [waiter] = nodes.issue(Op(method, names))
    servers = [ModelServer() for _ in range(3)]
    for name in names:
        if method not in ("set_bulk", "guarded"):
            servers[node_of(name)].put(name, 5, b"{}")
    if when == "queued" and loss == "connection_lost":
        when = "sent"  # queued operations wait for another connection

    def lose() -> None:
        nonlocal lost
        pipeline = nodes.pipelines[1]
        if when != "queued":
            output = nodes.take(1)
            if when == "partly":
                done = output[: 2 if method == "head_bulk" else 1]
                pipeline.feed(b"".join(resp(servers[1].execute(command)) for command in done))
                [answered] = {name for command in done for name in names_in(command)}
                lost = [name for name in lost if name != answered]
        LOSSES[loss](pipeline)

    if first:
        lose()
    for at in (0, 2):
        nodes.serve(at, servers[at])
    if not first:
        assert not waiter.done
        lose()
    nodes.pipelines[1].connection_lost(ConnectionLost("after it"), False)
    nodes.assert_drained()
    error = waiter.error
    assert isinstance(error, BulkError)
    assert set(error.errors) == set(lost)
    assert len(lost) == (2 if when == "partly" else 3)
    assert all(isinstance(e, ConnectionLost | DeadlineExceeded) for e in error.errors.values())
    others = [name for name in names if name not in lost]
    match method:
        case "get_bulk":
            assert list(error.result) == others
        case "head_bulk":
            assert error.result == dict.fromkeys(others, 5)
        case "delete_bulk":
            assert error.result == len(others)
        case _:
            assert error.result == set()


def test_only_sent_writes_are_in_doubt(core: Any) -> None:
    """Of one bulk, the writes in flight may have happened, and the waiting ones can't have."""
    nodes = ClusterExchange(core, 2, max_pending=1)
    tags = tags_of(0, 3, 2)
    [waiter] = nodes.issue(Op("set_bulk", dict.fromkeys(tags, (1, 1))))
    [command] = nodes.take(0)
    nodes.pipelines[0].fail_all(lambda operation: ConnectionLost(f"{operation}: closed"))
    errors = waiter.error.errors
    [sent] = names_in(command)
    for tag in tags:
        assert ("the write may have happened" in str(errors[tag])) is (tag == sent)


@pytest.mark.parametrize(
    ("operation", "replies", "good"),
    [
        (Op("get_bulk", ["{t}1", "{t}2", "{t}3", "{u}"]), [[*values("a", "b"), 5, b"x"]], 2),
        (
            Op("set_bulk", dict.fromkeys(("{t}1", "{t}2", "{t}3", "{u}"), (1, 1)), (), GUARDED),
            [[1, 1, 7]],
            2,
        ),
        (Op("head_bulk", ["{t}1", "{u}"]), [b"1", "what"], 0),
        (Op("delete_bulk", ["{t}1", "{t}2", "{u}"]), [2, b"x"], 1),
    ],
    ids=lambda value: value.method if isinstance(value, Op) else "",
)
def test_an_unexpected_reply_leaves_no_waiter_without_a_result(
    core: Any, operation: Operation, replies: list[Any], good: int
) -> None:
    """The replies before it count, and so do those of the other node."""
    nodes = ClusterExchange(core, 2)
    nodes.assign(slot("{t}"), 0)
    nodes.assign(slot("{u}"), 1)
    [waiter] = nodes.issue(operation)
    nodes.take(0)
    with pytest.raises(ProtocolError):
        nodes.reply(0, *replies)
    nodes.pipelines[0].connection_lost(ProtocolError("wrong"), False)
    nodes.serve(1, ModelServer())
    nodes.assert_drained()
    assert isinstance(waiter.error, BulkError)
    assert sorted(waiter.error.errors) == [n for n in operation.argument if "t" in n][good:]


def test_refused_by_all_is_no_partial_failure(nodes: ClusterExchange) -> None:
    tags = [tags_of(node, 1)[0] for node in range(3)]
    [waiter] = nodes.issue(Op("set_bulk", dict.fromkeys(tags, (1, 1))))
    for at in range(3):
        nodes.take(at)
        nodes.reply(at, Refusal("OOM full"))
    nodes.assert_drained()
    assert isinstance(waiter.error, ReplyError)


# -- limits


BULKS = [
    Op("get_bulk", [tags_of(node, 1)[0] for node in range(3)]),
    Op("set_bulk", {tags_of(node, 1)[0]: (1, 1) for node in range(3)}),
]


@pytest.mark.parametrize("bulk", BULKS, ids=lambda bulk: bulk.method)
@pytest.mark.parametrize("full", [0, 1, 2])
def test_a_bulk_refused_by_one_node_sends_nothing(core: Any, bulk: Operation, full: int) -> None:
    nodes = ClusterExchange(core, max_pending=1, refuse_when_full=True)
    nodes.issue(Op("get", tags_of(full, 1)[0]))
    before = [nodes.counters(at) for at in range(3)]
    with pytest.raises(Overloaded, match=nodes.address(full)):
        nodes.issue(bulk)
    assert [nodes.counters(at) for at in range(3)] == before
    assert len(nodes.waiters) == 1
    nodes.serve(full, ModelServer())
    nodes.issue(bulk)
    assert [nodes.counters(at)[2] for at in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("bulk", BULKS, ids=lambda bulk: bulk.method)
@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_bulk_naming_a_closed_node_sends_nothing(
    nodes: ClusterExchange, bulk: Operation, closed: int
) -> None:
    nodes.closed.add(closed)
    with pytest.raises(ConnectionLost):
        nodes.issue(bulk)
    nodes.assert_drained()
    assert nodes.waiters == []


def test_text_is_counted_at_each_node(core: Any) -> None:
    nodes = ClusterExchange(core, max_pending_bytes=20, refuse_when_full=True)
    tags = [tags_of(node, 1)[0] for node in range(3)]
    nodes.issue(Op("set_bulk", dict.fromkeys(tags, (1, "x" * 16))))
    assert [nodes.counters(at) for at in range(3)] == [(1, 0, 1, 18)] * 3
    with pytest.raises(Overloaded):
        nodes.issue(Op("set", tags[1], (2, "yy")))
    nodes.serve(1, ModelServer())
    nodes.issue(Op("set", tags[1], (2, "yy")))


# -- single-key commands, and split records


def test_single_key_commands(node: ClusterExchange) -> None:
    """Each is sent unchanged, and its reply is returned as it came."""
    pipeline = node.pipelines[0]
    waiters = [Waiter() for _ in range(7)]
    sends: list[tuple[int, str, tuple[Any, ...]]] = [
        (c.READ_KEY, "a", ("GET", "a")),
        (c.READ_KEY, "b", ("TYPE", "b")),
        (c.WRITE_KEY, "a", ("SET", "a", b"\r\n")),
        (c.READ_KEY, "a", ("GET", "a")),
        (c.WRITE_KEY, "a", ("SET", "a", "é", "EX", 5)),
        (c.WRITE_KEY, "a", ("DEL", "a")),
        (c.READ_KEY, "b", ("GET", "b")),
    ]
    for waiter, (kind, key, parts) in zip(waiters, sends, strict=True):
        pipeline.key_command(kind, key, waiter, *parts)
    assert node.counters(0)[:3] == (7, 0, 7)
    sent = node.take()
    by_key = [[command for command in sent if command[1] == key] for key in (b"a", b"b")]
    assert by_key == [
        [
            [b"GET", b"a"],
            [b"SET", b"a", b"\r\n"],
            [b"GET", b"a"],
            [b"SET", b"a", "é".encode(), b"EX", b"5"],
            [b"DEL", b"a"],
        ],
        [[b"TYPE", b"b"], [b"GET", b"b"]],
    ]
    answers: dict[bytes, Any] = {b"GET": b"x", b"TYPE": "string", b"SET": "OK", b"DEL": 1}
    node.reply(0, *(answers[command[0]] for command in sent))
    node.assert_drained()
    assert [waiter.result() for waiter in waiters] == [
        answers[parts[0].encode()].encode()
        if isinstance(answers[parts[0].encode()], str)
        else answers[parts[0].encode()]
        for _, _, parts in sends
    ]
    assert pipeline.stats()["commands"] == 7


@pytest.mark.parametrize(
    ("kind", "reply"),
    [
        *((c.READ_KEY, reply) for reply in (5, 1.5, True, [], {}, [b"x"])),
        *((c.WRITE_KEY, reply) for reply in (None, 2, -1, True, b"x", "QUEUED", [])),
    ],
)
def test_an_unexpected_reply_to_a_single_key_command(
    node: ClusterExchange, kind: int, reply: Any
) -> None:
    waiters = [Waiter(), Waiter()]
    for at, waiter in enumerate(waiters):
        node.pipelines[0].key_command(kind, f"k{at}", waiter, "X", f"k{at}")
    node.take()
    with pytest.raises(ProtocolError, match="a command of one key"):
        node.reply(0, reply)
    node.pipelines[0].connection_lost(ProtocolError("wrong"), False)
    node.assert_drained()
    for waiter in waiters:
        assert isinstance(waiter.error, ProtocolError)
        assert ("may have happened" in str(waiter.error)) is (kind == c.WRITE_KEY)


def test_single_key_commands_follow_moved_and_ask(nodes: ClusterExchange) -> None:
    at = node_of("key")
    read, write = Waiter(), Waiter()
    target_of = nodes.router.target_of
    target_of(c.READ_KEY, "key").key_command(c.READ_KEY, "key", read, "GET", "key")
    target_of(c.WRITE_KEY, "key").key_command(c.WRITE_KEY, "key", write, "SET", "key", "value")
    assert nodes.counters(at)[:3] == (2, 0, 2)
    nodes.take(at)
    nodes.reply(at, moved("key"), ask("key"))
    (_, first_slot, first), (_, second_slot, second) = nodes.redirected(at)
    assert nodes.counters(at) == (0, 0, 0, 0)
    assert first_slot == second_slot == slot("key")
    assert (first.kind, second.kind) == (c.READ_KEY, c.WRITE_KEY)
    second.ask(nodes.pipelines[at])
    other = (at + 1) % 3
    nodes.assign(slot("key"), other)
    nodes.pipelines[at].requeue([first, second])
    size = nodes.counters(at)[3]
    nodes.move(at)  # the ASKING one is sent to the node at which it waits
    for target in (at, other):
        nodes.move(target)
    assert nodes.counters(at)[3] + nodes.counters(other)[3] in (size, 0)


@pytest.mark.parametrize("retry", [True, False])
def test_single_key_commands_on_a_lost_connection(node: ClusterExchange, retry: bool) -> None:
    """Reads are sent again, writes are not."""
    read, write = Waiter(), Waiter()
    node.pipelines[0].key_command(c.READ_KEY, "key", read, "GET", "key")
    node.pipelines[0].key_command(c.WRITE_KEY, "key", write, "SET", "key", "value")
    node.take()
    node.pipelines[0].connection_lost(ConnectionLost("cut"), retry)
    assert "write 'key'" in str(write.error)
    assert "may have happened" in str(write.error)
    if retry:
        assert node.take() == [[b"GET", b"key"]]
        node.reply(0, b"x")
        assert read.result() == b"x"
    else:
        assert "read 'key'" in str(read.error)
        assert "may have happened" not in str(read.error)
    node.assert_drained()


def test_split_records(nodes: ClusterExchange) -> None:
    """Each key goes to its own node, and the results equal those of ordinary records."""
    servers, ask_all = serving(nodes)
    names = [f"user/{i}" for i in range(30)]

    written = {name: (i, [i]) for i, name in enumerate(names)} | {"{t}": (7, 7)}
    more = Op("set", "user/x", (1, 1), {"ttl": 9})
    assert ask_all(Op("set_bulk", written), more) == [set(), True]
    assert_spread(servers)
    assert {k for s in servers for k in s.lifetimes} == set(keys_of("user/x"))
    found, heads, one, head, none = ask_all(
        Op("get_bulk", [*written, "no"]),
        Op("head_bulk", ["no", *written]),
        Op("get", "user/3"),
        Op("head", "user/3"),
        Op("get", "no"),
    )
    assert {name: tuple(record) for name, record in found.items()} == written
    assert list(found) == list(written)
    assert heads == {name: version for name, (version, _) in written.items()}
    assert (tuple(one), head, none) == ((3, [3]), 3, None)
    assert ask_all(Op("delete", "user/3"), Op("delete_bulk", names), Op("head", "user/4")) == [
        *(True, 29),
        None,
    ]
    counts = nodes.apart.stats()
    assert (counts["writes"], counts["deletes"], counts["hits"]) == (31, 31, 62)


def test_a_str_subclass_names_a_split_record_too(nodes: ClusterExchange) -> None:
    class Name(str):
        __slots__ = ()

    server = ModelServer()
    server.put(APART, 1, b"{}")
    waiters = nodes.issue(Op("get", Name(APART)), Op("get_bulk", [Name(APART)]))
    for at in range(3):
        nodes.serve(at, server)
    record, found = (waiter.result() for waiter in waiters)
    assert found == {APART: record}
    assert type(record.name) is str


@pytest.mark.parametrize(
    "operation",
    [
        Op("set", APART, (1, 1), GUARDED),
        Op("set_bulk", {"{t}": (1, 1), APART: (1, 1)}, (), GUARDED),
    ],
    ids=str,
)
def test_a_split_record_can_not_be_guarded(nodes: ClusterExchange, operation: Operation) -> None:
    with pytest.raises(RecordError, match="if_newer"):
        nodes.issue(operation)
    nodes.assert_drained()


@pytest.mark.parametrize(
    "operation",
    [
        Op("get", APART),
        Op("head", APART),
        Op("set", APART, (1, 1)),
        Op("delete", APART),
        Op("get_bulk", ["{t}", APART]),
        Op("set_bulk", {"{t}": (1, 1), APART: (1, 1)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("key", keys_of(APART))
def test_a_split_record_is_refused_as_a_whole(core: Any, operation: Operation, key: bytes) -> None:
    """If one node is full or closed, the other half isn't sent either."""
    nodes = ClusterExchange(core, 3, max_pending=1, refuse_when_full=True)
    at = key_slot(key) % 3
    target = nodes.router.target_of(c.READ_KEY, key.decode())
    target.key_command(c.READ_KEY, key.decode(), Waiter(), "GET", key)
    before = [nodes.counters(i) for i in range(3)]
    with pytest.raises(Overloaded, match=nodes.address(at)):
        nodes.issue(operation)
    assert [nodes.counters(i) for i in range(3)] == before
    nodes.serve(at, ModelServer())
    nodes.closed.add(at)
    nodes.pipelines[at].end_tick()
    with pytest.raises(ConnectionLost):
        nodes.issue(operation)
    nodes.assert_drained()


def test_a_bulk_of_split_records_may_exceed_the_limit(core: Any) -> None:
    """Like any bulk, it is accepted or refused as a whole."""
    nodes = ClusterExchange(core, 3, max_pending=5, refuse_when_full=True)
    names = [f"user/{i}" for i in range(100)]
    [waiter] = nodes.issue(Op("set_bulk", dict.fromkeys(names, (1, 1))))
    server = ModelServer()
    for at in range(3):
        nodes.serve(at, server)
    assert waiter.result() == set()
    nodes.assert_drained()


# -- everything at once


@given(st.integers(0, 2**32), st.sampled_from(["deepstream", "hashtag"]))
@pytest.mark.parametrize("core", CORES)
def test_everything_is_drained_whatever_the_nodes_reply(core: Any, seed: int, layout: str) -> None:
    """Random operations, replies, losses and moves: one result each, and counters of zero."""
    rnd = random.Random(seed)
    nodes = ClusterExchange(core, hash_tag=layout == "hashtag", max_redirections=2, max_pending=9)
    pool = [*(f"{{{i % 4}}}{i}" for i in range(12)), "}x", APART]
    server = ModelServer()
    for _ in range(40):
        at = rnd.randrange(3)
        pipeline = nodes.pipelines[at]
        match rnd.randrange(8):
            case 0 | 1 | 2:
                _issue_something(nodes, rnd, pool)
            case 3:
                for command in nodes.take(at):
                    if command == ASKED:
                        nodes.reply(at, "OK")
                    elif rnd.random() < 0.5:
                        nodes.reply(at, server.execute(command))
                    else:
                        nodes.reply(at, Refusal(rnd.choice(REFUSALS)))
            case 4:
                for _, _, batch in nodes.redirected(at):
                    if rnd.random() < 0.5:
                        batch.ask(rnd.choice(nodes.pipelines))
                    rnd.choice(nodes.pipelines).requeue([batch])
            case 5:
                nodes.assign(nodes.router.slot_of(rnd.choice(pool)), rnd.randrange(3))
                nodes.move(at)
            case 6:
                pipeline.take_output()
                pipeline.connection_lost(ConnectionLost("cut"), rnd.random() < 0.5)
            case 7 if rnd.random() < 0.3:
                pipeline.expire(math.inf)
    for at in range(3):
        nodes.pipelines[0].requeue([batch for _, _, batch in nodes.redirected(at)])
    for pipeline in nodes.pipelines:
        pipeline.connection_lost(ConnectionLost("at the end"), rnd.random() < 0.5)
        pipeline.fail_all(ConnectionLost)
    nodes.assert_drained()


def _issue_something(nodes: ClusterExchange, rnd: random.Random, pool: list[str]) -> None:
    names = rnd.sample(pool, rnd.randint(1, len(pool)))
    options = {"ttl": rnd.choice([None, 9])}
    guarded = {**options, "if_newer": rnd.random() < 0.3}
    operation = rnd.choice(
        [
            Op(rnd.choice(["get", "head", "delete"]), names[0]),
            Op("set", names[0], (rnd.randint(1, 5), "x" * rnd.randint(0, 9)), guarded),
            Op(rnd.choice(["get_bulk", "head_bulk", "delete_bulk"]), names),
            Op("set_bulk", {n: (1, "y" * rnd.randint(0, 9)) for n in names}, (), options),
        ]
    )
    if operation.options.get("if_newer") and nodes.router.slot_of(names[0]) < 0:
        return
    nodes.issue(operation)
