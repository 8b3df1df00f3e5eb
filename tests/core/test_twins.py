"""The twins are equal: the same input gives the same output, errors and their texts included.

The pure core is the model of the compiled one. Hypothesis drives both through the same steps, with
arguments, replies and chunks that no sane caller or server would send among them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import decimal
import enum
import fractions
import inspect
import itertools
import math
import random
import types
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import hiredis
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

import dscache
from dscache import _fast
from dscache.core import constants as c
from dscache.core import pure as _pure
from dscache.errors import BulkError, ConnectionLost, ProtocolError, RecordError, ReplyError
from tests.support.wire import (
    NOPERM,
    NOSCRIPT,
    WRONGTYPE,
    ClusterExchange,
    Exchange,
    ModelServer,
    Operation,
    Push,
    Refusal,
    commands,
    counters,
    keys_of,
    resp,
)

TWINS = (_fast, _pure)


# -- comparable values


def shown(value: Any) -> Any:
    """Return a result as a value that is equal for equal results of the twins, NaN included."""
    if isinstance(value, (_fast.Record, _pure.Record)):
        return ("record", value.name, value.version, value.raw, value.stale)
    if isinstance(value, BaseException):
        more: tuple[object, ...] = ()
        if isinstance(value, BulkError):
            more = (shown(value.errors), list(value.errors), shown(value.result))
        elif isinstance(value, RecordError):
            try:
                more = (repr(value.name),)
            except RecursionError:
                more = (type(value.name),)
        elif isinstance(value, ReplyError):
            more = (value.code, value.message)
        cause = value.__cause__
        if isinstance(cause, hiredis.ProtocolError) and _fast.READER == "own":
            cause = None  # the compiled core without hiredis has no such error
        return (type(value), str(value), *more, shown(cause))
    if isinstance(value, dict):
        return [(shown(key), shown(member)) for key, member in value.items()]
    if isinstance(value, set):
        return sorted(value)
    if isinstance(value, list):
        # The compiled core without hiredis has a class of its own for a push.
        is_push = type(value).__name__ in ("_Push", "PushNotification")
        return ["push" if is_push else type(value), *map(shown, value)]
    return (type(value), repr(value))


def outcome(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the result or the error of a call, for comparison."""
    try:
        return shown(call(*args, **kwargs))
    except Exception as error:
        return shown(error)


# -- the same shape


def members(thing: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(thing).items() if not name.startswith("_")}


PUBLIC = (
    *(
        "MessageDispatcher",
        "SubscriberQueue",
        "Message",
        "NearCache",
        "Pipeline",
        "Record",
        "Router",
    ),
    *("check_name", "check_version", "encode_data", "parse_version", "slot_of_key"),
)
# The near cache for threads: test_shared_near_model.py compares the twins.
OF_THREADS = ("SharedNearCache", "SharedWrite")
# test_fetch_calls.py uses both.
OF_FETCH = ("Fetcher", "BlockingFetcher")
# The near cache that processes share has no twin: Python has no atomic loads.
OF_PROCESSES = ("HOST_NEAR_SUPPORTED", "HostNearCache")
# What a Router or NearCache does with a Pipeline is in C there, and the same names in Python here.
IN_C = {
    *("add_part", "check_capacity", "notify_pending"),
    *("counts", "latencies", "arrived", "asked", "version_reply"),
    *("drop", "fill", "end_read", "add_fence"),
}


def test_public_names() -> None:
    for twin in TWINS:
        own = {
            name
            for name, value in members(twin).items()
            if getattr(value, "__module__", None) == twin.__name__ or name.isupper()
        }
        # The Python core consists of several modules and lists its own names.
        wanted = {*PUBLIC, *OF_THREADS, *OF_FETCH, "NEAR_ENTRY_BYTES", "READER"}
        if twin is _fast:
            wanted |= {*OF_PROCESSES}
        assert set(getattr(twin, "__all__", own)) == wanted, twin.__name__
    for name in (
        "MessageDispatcher",
        "SubscriberQueue",
        "Message",
        "NearCache",
        "Pipeline",
        "Record",
        "Router",
    ):
        fast, pure = (set(members(getattr(twin, name))) for twin in TWINS)
        if name in MAKERS:  # plain attributes there, descriptors of the class here
            made = MAKERS[name](_pure)
            pure |= {attribute for attribute in vars(made) if not attribute.startswith("_")}
        assert fast == pure - IN_C


def pipeline(core: Any) -> Any:
    return core.Pipeline(object, int)


def router(core: Any) -> Any:
    return core.Router(object, pipeline(core), None)


def near(core: Any) -> Any:
    return core.NearCache(object, pipeline(core))


MAKERS: dict[str, Callable[[Any], Any]] = {
    "MessageDispatcher": lambda core: core.MessageDispatcher("A", print, print),
    "SubscriberQueue": lambda core: core.SubscriberQueue(print, 1, 0),
    "NearCache": near,
    "Pipeline": pipeline,
    "Router": router,
}


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings(name: str) -> None:
    fast, pure = (getattr(twin, name) for twin in TWINS)
    assert inspect.getdoc(fast) == inspect.getdoc(pure)
    assert inspect.getdoc(fast)
    for member, value in members(pure).items():
        if callable(value) or isinstance(value, property):
            assert inspect.getdoc(value), member
        if (callable(value) or isinstance(value, property)) and member not in IN_C:
            assert inspect.getdoc(getattr(fast, member)) == inspect.getdoc(value), member


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    signature = inspect.signature(function)
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


def test_signatures() -> None:
    """Names, kinds and defaults; the annotations of the compiled core are in its stub."""
    compared = 0
    for name in PUBLIC:
        fast, pure = (getattr(twin, name) for twin in TWINS)
        pairs = [(fast, pure)]
        if inspect.isclass(pure):
            pairs = [
                (getattr(fast, member), value)
                for member, value in members(pure).items()
                if isinstance(value, types.FunctionType) and member not in IN_C
            ]
        for one, other in pairs:
            assert parameters(one) == parameters(other), other
            compared += 1
    assert compared >= 42


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), {}),
        ((object,), {}),
        ((object, int, "address"), {}),
        ((object, int), {"adress": "x"}),
        ((object, int), {"create_waiter": object}),
        ((object, int), {"clustered": True, "max_redirection": 1}),
    ],
)
def test_constructor_refuses_the_same(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    for twin in TWINS:
        with pytest.raises(TypeError):
            twin.Pipeline(*arguments, **options)


@pytest.mark.parametrize(
    "arguments", [(), (object,), (object, "p"), (object, "p", None, "x", True)]
)
def test_constructor_of_a_router_refuses_the_same(arguments: tuple[Any, ...]) -> None:
    for twin in TWINS:
        given = (pipeline(twin) if one == "p" else one for one in arguments)
        with pytest.raises(TypeError):
            twin.Router(*given)


def test_constructor_defaults() -> None:
    for twin in TWINS:
        one = router(twin)
        assert len(one.owners) == len(one.readers) == c.SLOTS
        assert len({*one.owners, *one.readers}) == 1
        one = pipeline(twin)
        assert (one.redirected, one.settled, one.fence()) == ([], 0, 0)
        one = pipeline(twin)
        assert (one.address, one.down, one.in_flight, one.queued) == ("", None, 0, 0)
        assert (one.has_msetex, one.away, one.operations, one.pending_bytes) == (
            *(False, ""),
            *(0, 0),
        )
    assert pipeline(_fast).stats() == pipeline(_pure).stats()
    assert list(pipeline(_fast).stats()) == list(pipeline(_pure).stats())


# -- arguments


class Text(str):
    """A str that lies about itself."""

    __slots__ = ()

    def __str__(self) -> str:
        return "lie"

    def encode(self, *_: object) -> bytes:
        return b"lie"

    def __len__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


class Number(int):
    pass


class Level(enum.IntEnum):
    HIGH = 9


class Color(enum.Enum):
    RED = "red"


class Stubborn:
    """An object that fails every access."""

    def __getattr__(self, name: str) -> object:
        if name == "_repr_pretty_":  # for Hypothesis
            raise AttributeError
        raise OSError("no")

    def __repr__(self) -> str:
        return "<Stubborn>"


@dataclasses.dataclass
class Point:
    x: Any = 0


class Struct(msgspec.Struct, tag=True):
    x: Any = 0


def cycle() -> list[Any]:
    around: list[Any] = [1]
    around.append(around)
    return around


def deep(levels: int) -> list[Any]:
    data: list[Any] = []
    for _ in range(levels):
        data = [data]
    return data


STUBBORN = Stubborn()
NOW = datetime.datetime(2024, 2, 29, 12, 30, 1, 5, tzinfo=datetime.UTC)
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400),
    *(0.0, -0.0, 1.5, 1e21, math.nan, math.inf, -math.inf, 1j),
    *("", "a", "é", "\U0001f600", "\0", "\ud800", "a\udfff", "}", "x" * 1000, "5"),
    *(b"", b"a", bytearray(b"a"), memoryview(b"a")),
    *(Text(""), Text("a"), Text("\ud800"), Number(5), Number(-5), Level.HIGH, Color.RED),
    *(decimal.Decimal("1.5"), decimal.Decimal("NaN"), fractions.Fraction(1, 2)),
    *(NOW, NOW.date(), NOW.time(), NOW - NOW, uuid.UUID(int=5)),
    *([], (), {}, set(), frozenset(), [1, "a"], ("a", (1, 2)), {"a": 1}, {1: 2}, {1.5: 2}),
    *({(1, 2): 3}, {None: 1}, {"\ud800": "\udfff"}, {"a": {"b": [object]}}, {Text("k"): 1}),
    *(["a", "b"], ["a", ""], ["a", 1], {"a": (1, 2)}, {"a": (1,)}, {"a": 1}, {"": (1, 1)}),
    *({"a": (-1, 1)}, {"a": (1, STUBBORN)}, [("a", (1, 1))], {"a": "xy"}, {"a": (1, 1, 1)}),
    *(Point(), Point(STUBBORN), Struct(), Struct({1: STUBBORN}), STUBBORN, object, len),
    *(msgspec.Raw(b""), msgspec.Raw(b"{}"), msgspec.Raw(b"no json"), msgspec.UNSET),
    *([msgspec.Raw(b"")], range(3), cycle(), {"a": cycle()}, deep(200), deep(5000)),
]
HOSTILE_IDS = [f"{i}-{type(value).__name__}" for i, value in enumerate(HOSTILE)]


@pytest.mark.parametrize("value", HOSTILE, ids=HOSTILE_IDS)
def test_checks_are_equal(value: Any) -> None:
    for check in (
        lambda twin: twin.check_name(value),
        lambda twin: twin.check_version("n", value),
        lambda twin: twin.encode_data("n", value),
        lambda twin: twin.encode_data("n", {"a": [value]}),
    ):
        fast, pure = (outcome(check, twin) for twin in TWINS)
        assert fast == pure


@pytest.mark.parametrize("value", HOSTILE, ids=HOSTILE_IDS)
def test_arguments_give_equal_results(value: Any) -> None:
    """Each argument of each operation: the same result, the same bytes."""
    calls: list[Callable[[Any], Any]] = [
        lambda p: p.get(value),
        lambda p: p.head(value),
        lambda p: p.delete(value),
        lambda p: p.set(value, 1, 1),
        lambda p: p.set("a", value, 1),
        lambda p: p.set("a", 1, value),
        lambda p: p.set("a", 1, 1, value),
        lambda p: p.set("a", 1, 1, ttl=value),
        lambda p: p.set("a", 1, 1, 5, value),
        lambda p: p.get_bulk(value),
        lambda p: p.head_bulk(value),
        lambda p: p.delete_bulk(value),
        lambda p: p.get_bulk(["fine", value]),
        lambda p: p.set_bulk(value),
        lambda p: p.set_bulk({"fine": (1, 1), "a": value}),
        lambda p: p.set_bulk({"fine": (1, 1), "a": (value, value)}),
        lambda p: p.set_bulk({"a": (1, 1)}, value, value),
    ]
    for call in calls:
        answers = []
        for twin in TWINS:
            exchange = Exchange(twin)
            answer = outcome(lambda p=exchange.pipeline, call=call: bool(call(p)))
            stats = exchange.pipeline.stats()
            answers.append((answer, exchange.wakes, stats, exchange.pipeline.take_output()))
        assert answers[0] == answers[1]


@given(st.text(st.characters()), st.integers(), st.binary() | st.from_regex(rb"\A0*[0-9]{1,20}\Z"))
@example("}", 2**63 - 1, b"9223372036854775807")
@example("a", 2**63, b"9223372036854775808")
@example("a", 0, b"0" * 100)
@example("a", 0, b"0" * 100 + b"18446744073709551617")
@example("a", 0, b"\xb2")
def test_error_texts_are_equal(name: str, version: int, text: bytes) -> None:
    for check in (
        lambda twin: twin.check_name(name),
        lambda twin: twin.check_version(name, version),
        lambda twin: twin.parse_version(text),
        lambda twin: twin.parse_version(b"%d" % abs(version)),
        lambda twin: twin.Record("a", 1, text).data,
    ):
        fast, pure = (outcome(check, twin) for twin in TWINS)
        assert fast == pure


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary(max_size=3)
    | st.sampled_from([msgspec.Raw(b""), NOW, Level.HIGH])
    | st.builds(Stubborn),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(), max_size=3) | st.integers(), inner, max_size=3)
        | st.builds(Point, inner)
        | st.builds(Struct, inner)
    ),
    max_leaves=8,
)


@given(JSON)
def test_encoded_data_is_equal(data: Any) -> None:
    fast, pure = (outcome(twin.encode_data, "n", data) for twin in TWINS)
    assert fast == pure


# -- the same results


names = st.sampled_from(["a", "b", "c", "}", "é"])
versions = st.integers(0, 5) | st.just(2**63 - 1)
data = st.sampled_from([1, "x", None, [], {"a": 1}, "\ud800"])
junk = st.sampled_from(["", None, -1, 1.5, True, object, 2**63, "\ud800", b"a"])
options = st.fixed_dictionaries(
    {},
    optional={
        "ttl": st.sampled_from([None, 0, 9, 60, -1, dscache.KEEP]),
        "if_newer": st.booleans(),
    },
)
operations = st.one_of(
    st.builds(Operation, st.sampled_from(["get", "head", "delete"]), names | junk),
    st.builds(
        lambda name, version, data, options: Operation("set", name, (version, data), options),
        names,
        versions | junk,
        data,
        options,
    ),
    st.builds(
        Operation,
        st.sampled_from(["get_bulk", "head_bulk", "delete_bulk"]),
        st.lists(names, max_size=4) | junk,
    ),
    st.builds(
        lambda records, options: Operation("set_bulk", records, (), options),
        st.dictionaries(names, st.tuples(versions, data), max_size=4) | junk,
        options,
    ),
)
# Replies that a server might send, though not to this command, and some that none would.
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.integers(),
    st.floats(),
    st.sampled_from([b"1", b"05", b"x", b"", b"9223372036854775808", b'{"a":1}', b"string"]),
    st.sampled_from(["OK", "string", "none", "list", "stream", "QUEUED", ""]),
    st.sampled_from([NOSCRIPT, NOPERM, WRONGTYPE, "OOM full", "READONLY x", "ERR", ""]).map(
        Refusal
    ),
    st.binary(max_size=5),
)
replies = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, min_size=1, max_size=3).map(Push),
        st.dictionaries(st.binary(max_size=2), inner, max_size=2),
    ),
    max_leaves=6,
)
RAW = [
    *(b"", b"\r\n", b"\0", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$-2\r\n", b"*-2\r\n", b":x\r\n"),
    *(b"$5\r\nab\r\n", b"*99999999999\r\n", b"$99999999999999999999\r\n", b"*1\r\n", b"%1\r\n"),
    *(b"~2\r\n:1\r\n*1\r\n:1\r\n", b"%1\r\n*0\r\n:1\r\n", b"|1\r\n+a\r\n:1\r\n", b"(12345\r\n"),
    *(
        b",nan\r\n",
        b",inf\r\n",
        b",x\r\n",
        b"#x\r\n",
        b"_x\r\n",
        b"=6\r\ntxt:ab\r\n",
        b"=1\r\na\r\n",
    ),
    *(b"!5\r\nERR x\r\n", b"!4\r\nERRx\r\n", b"-\xff\r\n", b"-\r\n", b"+\xff\r\n", b"*9" * 20),
    *(b"*1\r\n" * 10 + b":1\r\n", b"-NOSCRIPT\r\n", b"-NOPERM\r\n", b">1\r\n+x\r\n", b">0\r\n"),
]


class Twins:
    """Both cores, each with its own waiters, driven through the same steps."""

    def __init__(self, **options: Any) -> None:
        self.both = [Exchange(twin, **options) for twin in TWINS]
        self.server = self.both[0].server
        self.unanswered = b""
        self.alive = True

    def same(self, call: Callable[[Exchange], Any]) -> Any:
        """Run something on both, assert that the results are equal, and return the result."""
        fast, pure = (outcome(call, exchange) for exchange in self.both)
        assert fast == pure
        self.compare()
        return fast

    def compare(self) -> None:
        fast, pure = self.both
        assert counters(fast.pipeline) == counters(pure.pipeline)
        assert fast.pipeline.away == pure.pipeline.away
        assert fast.wakes == pure.wakes
        assert len(fast.waiters) == len(pure.waiters)
        for one, other in zip(fast.waiters, pure.waiters, strict=True):
            assert (one.done, one.cancelled) == (other.done, other.cancelled)
            assert shown(one.error) == shown(other.error)
            assert shown(one.value) == shown(other.value)

    # -- the steps

    def issue(self, operation: Operation) -> None:
        self.same(lambda exchange: bool(operation.on(exchange.pipeline)))

    def command(self, word: str) -> None:
        sent: list[bytes] = []

        def issue(exchange: Exchange) -> None:
            sent.append(exchange.pipeline.command(word, 3)[0])

        self.same(issue)
        assert sent[0] == sent[1]

    def flush(self) -> None:
        fast, pure = (exchange.pipeline.take_output() for exchange in self.both)
        assert fast == pure
        self.unanswered += fast
        self.compare()

    def cancel(self, which: int) -> None:
        for exchange in self.both:
            if exchange.waiters:
                exchange.waiters[which % len(exchange.waiters)].cancel()

    def feed(self, received: bytes, cuts: list[int]) -> None:
        """Deliver bytes in chunks; invalid input ends the connection of a Pipeline."""
        bounds = [0, *sorted({cut % (len(received) + 1) for cut in cuts}), len(received)]
        for start, end in itertools.pairwise(bounds):
            chunk = received[start:end]
            seen = self.same(lambda exchange, chunk=chunk: exchange.pipeline.feed(chunk))
            if seen != shown(None):
                assert seen[0] is ProtocolError, seen
                self.lose(ProtocolError(seen[1]), retry=False)
                return

    def answer(self, spoil: str, at: int, garbage: bytes, cuts: list[int]) -> None:
        """Let the server answer the requests, more or less."""
        received = self.server.answer(self.unanswered)
        self.unanswered = b""
        at %= len(received) + 1
        match spoil:
            case "cut":
                received = received[:at]
            case "insert":
                received = received[:at] + garbage + received[at:]
            case "replace":
                received = received[:at] + garbage + received[at + len(garbage) :]
            case "drop":
                received = received[:at] + received[at + 1 :]
        self.feed(received, cuts)

    def lose(self, reason: Exception, retry: bool) -> None:
        self.unanswered = b""
        self.same(lambda exchange: exchange.pipeline.connection_lost(reason, retry))

    def expire(self, everything: bool) -> None:
        """Let the first deadline pass, or all."""

        def expire(exchange: Exchange) -> bool:
            now = exchange.pipeline.expire(-math.inf)
            if everything or now is None:
                now = math.inf
            return exchange.pipeline.expire(now) is None

        self.same(expire)

    def fail_all(self) -> None:
        self.unanswered = b""
        self.same(lambda exchange: exchange.pipeline.fail_all(ConnectionLost))
        self.same(lambda exchange: exchange.pipeline.reset_reader())


cuts = st.lists(st.integers(0, 400), max_size=4)
steps = st.one_of(
    st.tuples(st.just("issue"), operations),
    st.tuples(st.just("issue"), operations),
    st.tuples(st.just("issue"), operations),
    st.tuples(st.just("flush")),
    st.tuples(st.just("flush")),
    st.tuples(
        st.just("answer"),
        st.sampled_from(["", "", "", "cut", "insert", "replace", "drop"]),
        st.integers(0, 400),
        st.sampled_from(RAW) | st.binary(max_size=3) | replies.map(resp),
        cuts,
    ),
    st.tuples(
        st.just("feed"),
        st.lists(replies, min_size=1, max_size=4).map(lambda all: b"".join(map(resp, all))),
        cuts,
    ),
    st.tuples(st.just("feed"), st.sampled_from(RAW) | st.binary(max_size=8), cuts),
    st.tuples(st.just("cancel"), st.integers(0, 50)),
    st.tuples(st.just("command"), st.sampled_from(["HELLO", "a"])),
    st.tuples(st.just("lose"), st.just(ConnectionLost("cut")), st.booleans()),
    st.tuples(st.just("expire"), st.booleans()),
    st.tuples(st.just("fail_all")),
)


@settings(max_examples=600)
@given(
    steps=st.lists(steps, min_size=3, max_size=30),
    msetex=st.booleans(),
    options=st.fixed_dictionaries(
        {},
        optional={
            "hash_tag": st.booleans(),
            "key_prefix": st.sampled_from(["", "p:"]),
            "ttl": st.sampled_from([0, 7]),
            "max_pending": st.sampled_from([1, 3, 1000]),
            "max_pending_bytes": st.sampled_from([1, 10, 1000]),
            "refuse_when_full": st.booleans(),
            "max_reply_bytes": st.sampled_from([10, 1000]),
        },
    ),
    refused=st.sets(st.sampled_from([b"a_v", b"b_d", b"}_v"])),
    has_script=st.booleans(),
)
def test_results_are_equal(
    steps: list[tuple[Any, ...]],
    msetex: bool,
    options: dict[str, Any],
    refused: set[bytes],
    has_script: bool,
) -> None:
    twins = Twins(msetex=msetex, **options)
    twins.server.refused = refused
    twins.server.has_script = has_script
    twins.server.values.update({b"c_v": None, b"c_d": b"1", b"b_v": b"x", b"b_d": b"1"})
    for step, *arguments in steps:
        getattr(twins, step)(*arguments)
    # Whatever happened: no waiter is left without a result, and all counters return to zero.
    twins.lose(ConnectionLost("at the end"), True)
    twins.expire(True)
    for exchange in twins.both:
        exchange.assert_drained()
        assert exchange.pipeline.pending_bytes == 0


@settings(max_examples=300)
@given(
    issued=st.lists(operations, min_size=1, max_size=6),
    given_replies=st.lists(replies, min_size=1, max_size=8),
    cuts=cuts,
    via_buffer=st.booleans(),
)
def test_replies_give_equal_results(
    issued: list[Operation], given_replies: list[Any], cuts: list[int], via_buffer: bool
) -> None:
    """Any replies to any commands, which reach further than spoiled ones of a real server."""
    twins = Twins()
    for operation in issued:
        twins.issue(operation)
    twins.flush()
    received = b"".join(map(resp, given_replies))
    if via_buffer:
        for exchange in twins.both:
            exchange.pipeline.get_buffer(-1)[: len(received)] = received

        def updated(exchange: Exchange) -> None:
            exchange.pipeline.buffer_updated(len(received))

        twins.same(updated)
    else:
        twins.feed(received, cuts)
    twins.flush()
    twins.lose(ProtocolError("at the end"), False)
    twins.expire(True)
    for exchange in twins.both:
        exchange.assert_drained()


# -- the same nodes


def routers(**options: Any) -> list[ClusterExchange]:
    return [ClusterExchange(twin, **options) for twin in TWINS]


prefixes = st.sampled_from(["", "app:", "{app}:", "{", "{}", "{a", "}{", "a}{b"]) | st.text(
    "{}ab:é", max_size=5
)
# Names in which the braces matter, and arbitrary names.
some_names = st.text("{}0_vdé", min_size=1, max_size=8) | st.text(st.characters(), min_size=1)


def is_unicode(name: str) -> bool:
    return outcome(name.encode)[0] is not UnicodeEncodeError


@given(some_names, prefixes, st.booleans())
@example("}", "", True)
@example("}", "{", True)
@example("a}b", "{", True)
@example("{}{a}", "", False)
@example("a}", "{", False)
def test_slots_are_those_of_redis_py(name: str, prefix: str, hash_tag: bool) -> None:
    """Both compute the slot that redis-py computes of the keys actually sent."""
    for twin in TWINS:
        nodes = ClusterExchange(twin, 1, key_prefix=prefix, hash_tag=hash_tag)
        if not is_unicode(name):
            with pytest.raises(RecordError):
                nodes.router.slot_of(name)
            continue
        one = nodes.router.slot_of(name)
        nodes.pipelines[0].delete(name)
        [[_, *keys]] = commands(nodes.pipelines[0].take_output())
        slots = [key_slot(key) for key in keys]
        assert one == (slots[0] if slots[0] == slots[1] else -1)
        assert [twin.slot_of_key(key) for key in keys] == slots
        assert nodes.pipelines[0].slot_of(c.GET, name) == one
        assert nodes.pipelines[0].slot_of(c.READ_KEY, name) == key_slot(name.encode())


@given(
    st.lists(some_names.filter(is_unicode), min_size=2, max_size=30, unique=True),
    st.sampled_from(["", "app:"]),
)
def test_no_two_records_share_a_key(names: list[str], prefix: str) -> None:
    """With the layout hashtag, both keys are in one slot, and no other record has them."""
    sent = []
    for twin in TWINS:
        pipeline = twin.Pipeline(object, int, key_prefix=prefix, hash_tag=True)
        for name in names:
            pipeline.delete(name)
        sent.append(commands(pipeline.take_output()))
    assert sent[0] == sent[1]
    keys = [key for _, *both in sent[0] for key in both]
    assert len(set(keys)) == len(keys) == 2 * len(names)
    assert all(key_slot(one) == key_slot(other) for _, one, other in sent[0])


@given(st.binary())
@example(b"{}a{b}")
@example(b"a{b{c}d}")
def test_slots_of_keys(key: bytes) -> None:
    assert {twin.slot_of_key(key) for twin in TWINS} == {key_slot(key)}


@pytest.mark.parametrize("value", HOSTILE, ids=HOSTILE_IDS)
def test_arguments_of_a_router(value: Any) -> None:
    calls: list[Callable[[Any], Any]] = [
        lambda r: r.get(value),
        lambda r: r.head(value),
        lambda r: r.delete(value),
        lambda r: r.set(value, 1, 1),
        lambda r: r.set("{a}", value, 1),
        lambda r: r.set("{a}", 1, value),
        lambda r: r.set("{a}", 1, 1, value),
        lambda r: r.set("{a}", 1, 1, 5, value),
        lambda r: r.set("apart", value, 1),
        lambda r: r.set("apart", 1, value),
        lambda r: r.set("apart", 1, 1, value, value),
        lambda r: r.get_bulk(value),
        lambda r: r.head_bulk(value),
        lambda r: r.delete_bulk(value),
        lambda r: r.get_bulk(["{fine}", value]),
        lambda r: r.set_bulk(value),
        lambda r: r.set_bulk({"{fine}": (1, 1), "apart": value}),
        lambda r: r.set_bulk({"{fine}": (1, 1), "{a}": (value, value)}),
        lambda r: r.set_bulk({"{a}": (1, 1), "{b}": (1, 1)}, value, value),
        lambda r: r.slot_of(value),
    ]
    for call in calls:
        answers = []
        for nodes in routers():
            answer = outcome(lambda r=nodes.router, call=call: type(call(r)).__name__)
            stats = [counters(pipeline) for pipeline in nodes.pipelines]
            output = [pipeline.take_output() for pipeline in nodes.pipelines]
            answers.append((answer, nodes.wakes, stats, output, counters(nodes.apart)))
        assert answers[0] == answers[1]


@given(
    st.lists(some_names.filter(is_unicode), max_size=20, unique=True),
    st.sampled_from(["get_bulk", "head_bulk", "delete_bulk", "set_bulk", "guarded"]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_bulks_are_divided_alike(names: list[str], method: str, hash_tag: bool, seed: int) -> None:
    """The same names to the same nodes, in the same order, and joined to the same result."""
    rnd = random.Random(seed)
    names += [f"{{{i % 40}}}{i}" for i in range(rnd.choice([0, 5, 2000]))]
    names = list(dict.fromkeys(names))
    if method == "guarded" and not hash_tag:
        names = [name for name in names if len({key_slot(key) for key in keys_of(name)}) == 1]
    owners = [rnd.randrange(3) for _ in range(c.SLOTS)]
    refusals = {rnd.randrange(50): rnd.choice([NOPERM, "OOM x", "MOVED 1 a:1"]) for _ in range(3)}
    seen: list[Any] = []
    for nodes in routers(hash_tag=hash_tag):
        nodes.router.owners[:] = nodes.router.readers[:] = [nodes.pipelines[i] for i in owners]
        match method:
            case "set_bulk":
                operation = Operation(method, {name: (len(name), name) for name in names})
            case "guarded":
                records = {name: (len(name), name) for name in names}
                operation = Operation("set_bulk", records, (), {"if_newer": True})
            case _:
                operation = Operation(method, names)
        [waiter] = nodes.issue(operation)
        server = ModelServer()
        for name in names[::2]:
            server.values.update(dict.fromkeys(_keys_of(name, hash_tag), b"5"))
        steps: list[Any] = []
        for pipeline in nodes.pipelines:
            while output := pipeline.take_output():
                steps.append(output)
                for at, command in enumerate(commands(output)):
                    refusal = refusals.get(at)
                    reply = Refusal(refusal) if refusal else server.execute(command)
                    pipeline.feed(resp(reply))
                    steps.append(counters(pipeline))
            steps.append([(words, at, list(b.records)) for words, at, b in pipeline.redirected])
        assert waiter.done is not any(pipeline.redirected for pipeline in nodes.pipelines)
        seen.append((steps, shown(waiter.error), shown(waiter.value), counters(nodes.apart)))
    assert seen[0] == seen[1]


def _keys_of(name: str, hash_tag: bool) -> tuple[bytes, bytes]:
    if not hash_tag:
        return keys_of(name)
    return keys_of(f"}}{{0}}{name}" if name.startswith("}") else f"{{{name}}}")


class ClusterTwins:
    """Both cores, each with a Router and three nodes, driven through the same steps."""

    def __init__(self, **options: Any) -> None:
        self.both = routers(**options)
        self.server = ModelServer()

    def same(self, call: Callable[[ClusterExchange], Any]) -> Any:
        fast, pure = (outcome(call, nodes) for nodes in self.both)
        assert fast == pure
        fast, pure = (self.state(nodes) for nodes in self.both)
        assert fast == pure

    @staticmethod
    def state(nodes: ClusterExchange) -> Any:
        """Return the whole visible state."""
        return [
            nodes.wakes,
            counters(nodes.apart),
            [(waiter.done, shown(waiter.error), shown(waiter.value)) for waiter in nodes.waiters],
            [
                (
                    counters(pipeline),
                    *(pipeline.settled, pipeline.fence(), pipeline.away),
                    [(words, at, described(batch)) for words, at, batch in pipeline.redirected],
                )
                for pipeline in nodes.pipelines
            ],
        ]

    def issue(self, operation: Operation) -> None:
        self.same(lambda nodes: bool(operation.on(nodes.router)))

    def key(self, kind: int, key: str) -> None:
        verb = "GET" if kind == c.READ_KEY else "DEL"

        def send(nodes: Any) -> None:
            target = nodes.router.target_of(kind, key)
            target.key_command(kind, key, nodes._waiter(), verb, key)

        self.same(send)

    def answer(self, at: int, refusals: list[str | None]) -> None:
        """Flush a node and let it answer, with some refusals."""
        fast, pure = (nodes.pipelines[at].take_output() for nodes in self.both)
        assert fast == pure
        for command, refusal in zip(commands(fast), itertools.cycle(refusals)):
            if command == [b"ASKING"]:
                reply: Any = "OK"
            else:
                reply = Refusal(refusal) if refusal else self.server.execute(command)
            self.same(lambda nodes, reply=reply: nodes.pipelines[at].feed(resp(reply)))

    def send(self, at: int) -> None:
        fast, pure = (nodes.pipelines[at].take_output() for nodes in self.both)
        assert fast == pure

    def follow(self, at: int, to: int, ask: bool) -> None:
        """Requeue what a node has redirected."""

        def follow(nodes: ClusterExchange) -> None:
            for _, _, batch in nodes.redirected(at):
                if ask:
                    batch.ask(nodes.pipelines[to])
                nodes.pipelines[to].requeue([batch])

        self.same(follow)

    def assign(self, tag: int, to: int) -> None:
        self.same(lambda nodes: nodes.assign(key_slot(b"%d" % tag), to))

    def move(self, at: int) -> None:
        def move(nodes: ClusterExchange) -> Any:
            released = nodes.pipelines[at].take_queued(nodes.router.target_of)
            for target, batch in released:
                target.requeue([batch])
            return [(nodes.pipelines.index(target), described(batch)) for target, batch in released]

        self.same(move)

    def lose(self, at: int, retry: bool) -> None:
        reason = ConnectionLost("cut")
        self.same(lambda nodes: nodes.pipelines[at].connection_lost(reason, retry))

    def expire(self, at: int) -> None:
        self.same(lambda nodes: nodes.pipelines[at].expire(math.inf))

    def fail_all(self, at: int) -> None:
        self.lose(at, True)
        self.same(lambda nodes: nodes.pipelines[at].fail_all(ConnectionLost))


def described(batch: Any) -> Any:
    """Return the attributes of a batch."""
    return (batch.kind, list(batch.records), batch.redirections, batch.asking, batch.settled())


tagged = st.sampled_from([*(f"{{{i % 4}}}{i}" for i in range(10)), "apart", "}"])
at = st.integers(0, 2)
tagged_operations = st.one_of(
    st.builds(Operation, st.sampled_from(["get", "head", "delete"]), tagged),
    st.builds(
        lambda name, version, options: Operation("set", name, (version, "x" * version), options),
        tagged,
        st.integers(0, 5),
        options,
    ),
    st.builds(
        Operation,
        st.sampled_from(["get_bulk", "head_bulk", "delete_bulk"]),
        st.lists(tagged, max_size=12),
    ),
    st.builds(
        lambda names, options: Operation(
            "set_bulk", {name: (len(name), "y" * i) for i, name in enumerate(names)}, (), options
        ),
        st.lists(tagged, max_size=12),
        options,
    ),
)
cluster_refusals = st.sampled_from(
    [
        *([None] * 5),
        *("MOVED 1 a:1", "ASK 1 a:1", "TRYAGAIN x", "CLUSTERDOWN x", "READONLY x"),
        *(NOSCRIPT, NOPERM, "OOM x", WRONGTYPE),
    ]
)
cluster_steps = st.one_of(
    st.tuples(st.just("issue"), tagged_operations),
    st.tuples(st.just("issue"), tagged_operations),
    st.tuples(st.just("issue"), tagged_operations),
    st.tuples(st.just("answer"), at, st.lists(cluster_refusals, min_size=1, max_size=5)),
    st.tuples(st.just("answer"), at, st.lists(cluster_refusals, min_size=1, max_size=5)),
    st.tuples(st.just("follow"), at, at, st.booleans()),
    st.tuples(st.just("follow"), at, at, st.booleans()),
    st.tuples(st.just("assign"), st.integers(0, 3), at),
    st.tuples(st.just("move"), at),
    st.tuples(st.just("send"), at),
    st.tuples(st.just("lose"), at, st.booleans()),
    st.tuples(st.just("expire"), at),
    st.tuples(
        st.just("key"), st.sampled_from([c.READ_KEY, c.WRITE_KEY]), st.sampled_from(["k", "l"])
    ),
)


@settings(max_examples=400)
@given(
    steps=st.lists(cluster_steps, min_size=3, max_size=30),
    options=st.fixed_dictionaries(
        {},
        optional={
            "hash_tag": st.booleans(),
            "key_prefix": st.sampled_from(["", "p:", "{", "{p}"]),
            "ttl": st.sampled_from([0, 7]),
            "max_pending": st.sampled_from([1, 3, 1000]),
            "max_pending_bytes": st.sampled_from([1, 10, 1000]),
            "refuse_when_full": st.booleans(),
            "max_redirections": st.sampled_from([0, 1, 16]),
        },
    ),
    has_script=st.booleans(),
)
def test_results_on_a_cluster_are_equal(
    steps: list[tuple[Any, ...]], options: dict[str, Any], has_script: bool
) -> None:
    twins = ClusterTwins(**options)
    twins.server.has_script = has_script
    for step, *arguments in steps:
        getattr(twins, step)(*arguments)
    for node in (0, 1, 2):
        twins.follow(node, 0, False)
    for node in (2, 1, 0):
        twins.fail_all(node)
    for nodes in twins.both:
        nodes.assert_drained()


def test_an_unexpected_reply_to_a_part_of_a_bulk_is_equal() -> None:
    twins = ClusterTwins()
    records = {"{0}0": (1, "a"), "{1}0": (1, "b"), "{2}0": (1, "c")}
    twins.same(lambda nodes: nodes.issue(Operation("set_bulk", records)))
    for node in (0, 1, 2):
        twins.send(node)
    for number in (0, 1, 2):
        twins.same(lambda nodes, at=number: outcome(nodes.pipelines[at].feed, b"$-1\r\n"))
        reason = ConnectionLost("cut")
        twins.same(
            lambda nodes, at=number, why=reason: nodes.pipelines[at].connection_lost(why, True)
        )
    for nodes in twins.both:
        assert isinstance(nodes.waiters[0].error, BulkError)
        assert set(nodes.waiters[0].error.errors) == set(records)


def test_records_of_both_behave_alike() -> None:
    for arguments in [("a", 1, b"1"), ("a", 2**63 - 1, b"no json", True), ("é", 0, b'"\xff"')]:
        fast, pure = (twin.Record(*arguments) for twin in TWINS)
        for look in (
            repr,
            hash,
            lambda record: record.data,
            lambda record: record.decode(int),
            lambda record: record.decode(len),
            lambda record: tuple(record),
            lambda record: setattr(record, "name", 1),
            lambda record: delattr(record, "raw"),
            lambda record: record.nothing,
            lambda record: record.__reduce__()[1],
            lambda record: record == 5,
            lambda record: record[0],
        ):
            one, other = outcome(look, fast), outcome(look, pure)
            assert _without_text_of_python(one) == _without_text_of_python(other)


def _without_text_of_python(seen: Any) -> Any:
    """Return an outcome without the text of an error that the interpreter raised."""
    with contextlib.suppress(TypeError, IndexError):
        if seen[0] in (TypeError, AttributeError) and "immutable" not in seen[1]:
            return seen[0]
    return seen


@pytest.mark.parametrize("twin", TWINS)
def test_pushes_of_the_inbox_reach_nothing_else(twin: Any) -> None:
    ended: list[Any] = []
    others: list[Any] = []
    dispatcher = twin.MessageDispatcher("A", lambda _, push: ended.append(push), print)
    one = pipeline(twin)
    one.inbox = dispatcher
    one.on_push = others.append
    one.feed(b">3\r\n$7\r\nmessage\r\n$1\r\n4\r\n$2\r\n{}\r\n")
    one.feed(b">3\r\n$11\r\nunsubscribe\r\n$1\r\n4\r\n:0\r\n")
    one.feed(b">2\r\n$5\r\nother\r\n$1\r\n4\r\n")
    assert dispatcher.stats()["unwanted"] == 1
    assert ended == [[b"unsubscribe", b"4", 0]]
    assert others == [[b"other", b"4"]]


@pytest.mark.parametrize("twin", TWINS)
def test_error_of_a_signal_handler_is_not_taken_for_invalid_resp(
    twin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise ValueError("of a handler")

    one = twin.Pipeline(Future, int)
    waiter = one.command("PING")[1]
    with monkeypatch.context() as patch:
        # The Python code that hiredis calls, in which a handler may strike.
        patch.setattr(ReplyError, "__init__", interrupted)
        with pytest.raises(ValueError, match="of a handler"):
            one.feed(b"-ERR no\r\n")
    one.connection_lost(ConnectionLost("gone"), False)
    assert isinstance(waiter.exception(), ConnectionLost)
    one.command("PING")
    with pytest.raises(ProtocolError, match="sent no valid reply"):
        one.feed(b"what\r\n")


def test_constants_stand_once() -> None:
    for name, value in vars(c).items():
        if name.isupper():
            for twin in TWINS:
                assert getattr(twin, name, value) is value
