"""RESP2 and RESP3 written by a grammar, and a fuzzer that feeds it to both cores at once.

``Grammar`` writes replies in every form of the protocol (https://redis.io/docs/latest/develop/
reference/protocol-spec/): with the meaning they should have, with another meaning, slightly broken,
and with the lengths of a hostile server. ``TwinFuzzer`` issues the same operations on a pipeline of
each core and feeds both the same pieces. The outcomes of all waiters, the errors, the commands and
the counters must be equal; after valid replies, the outcomes must be those of a sane server.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dscache import _fast
from dscache.core import pure
from dscache.errors import BulkError, ConnectionLost, ProtocolError, ReplyError
from tests.support.mutation import NAMES, data_of, encoded, random_operation
from tests.support.wire import (
    ADDRESS,
    ModelServer,
    Operation,
    Refusal,
    Waiter,
    commands,
    counters,
    keys_of,
    plain,
    resp,
)

_TEMPLATES = 80
# Cases after which the pipelines and the options are others.
_ROUND = 500
_EXAMPLES = 20
# Rounds of requests and replies until a pipeline has an endless number of them.
_MOST_FLUSHES = 50
# Seconds: no operation expires because the machine is slow.
_TIMEOUT = 3600.0

_NULLS = (b"_\r\n", b"$-1\r\n", b"*-1\r\n")
_REFUSALS = (
    *("ERR no", "", "NOSCRIPT x", "NOPERM x", "READONLY x", "LOADING x", "CLUSTERDOWN x"),
    *("MOVED 7 127.0.0.1:7", "ASK 7 127.0.0.1:7", "TRYAGAIN x", "MOVED", "ASK x y"),
)
# Well-formed values of every type, with the members of no other.
VALUES = (
    *_NULLS,
    *(b":0\r\n", b":1\r\n", b":2\r\n", b":-1\r\n", b":+7\r\n", b":9223372036854775807\r\n"),
    *(b"+OK\r\n", b"+\r\n", b"+string\r\n", b"+none\r\n", b"+list\r\n", b"+QUEUED\r\n"),
    *(b"$0\r\n\r\n", b"$2\r\nOK\r\n", b"$1\r\n7\r\n", b"$2\r\n{}\r\n", b"$4\r\n\r\n\r\n\r\n"),
    *(b"$2\r\n07\r\n", b"$16\r\n9007199254740992\r\n", b"$3\r\n\xff\x00*\r\n"),
    *(b"#t\r\n", b"#f\r\n", b",2.5\r\n", b",inf\r\n", b",-inf\r\n", b",nan\r\n", b",1e300\r\n"),
    *(b"(3492890328409238509324850943850943825024385\r\n", b"(-1\r\n"),
    *(b"=6\r\ntxt:OK\r\n", b"=4\r\ntxt:\r\n", b"!5\r\nERR x\r\n", b"!10\r\nNOSCRIPT x\r\n"),
    *(b"*0\r\n", b"~0\r\n", b"%0\r\n"),
    *(resp(Refusal(text)) for text in _REFUSALS),
)
# What stands for a value and is none.
BROKEN = (
    *(b"$+3\r\nabc\r\n", b"$03\r\nabc\r\n", b"$ 3\r\nabc\r\n", b"$3 \r\nabc\r\n", b"$-2\r\n"),
    *(b"$\r\n", b"$3\nabc\r\n", b"$3\r\nabcd\r\n", b"$3\r\nab\r\n", b"$3\r\nabc\n", b"$-1\n"),
    *(b"$3\r\rabc\r\n", b"$x\r\n", b"$1e3\r\n", b"$-\r\n", b"$--1\r\n", b"$?\r\n", b"*?\r\n"),
    *(b":\r\n", b":1.5\r\n", b":-\r\n", b":9223372036854775808\r\n", b":0x1\r\n", b":1\n"),
    *(b",\r\n", b",x\r\n", b",1e999\r\n", b",1.2.3\r\n", b",0x1p3\r\n", b"#x\r\n", b"#\r\n"),
    *(b"(\r\n", b"(1a\r\n", b"(1.5\r\n", b"_x\r\n", b"__\r\n", b"=2\r\nab\r\n", b"=4\r\nabcd\r\n"),
    *(b"*-2\r\n", b"*\r\n", b"*01\r\n:1\r\n", b"*+1\r\n:1\r\n", b"*x\r\n", b"%-1\r\n", b"~-1\r\n"),
    *(b">-1\r\n", b">0\r\n", b">1\r\n:1\r\n", b"%1\r\n*0\r\n:1\r\n", b"~1\r\n%0\r\n", b".\r\n"),
    *(b"\r\n", b"\n", b"\x00", b"\xff\xff", b"GET / HTTP/1.1\r\n\r\n", b"%1\r\n+k\r\n"),
    *(b"+a\rb\r\n", b"+a\nb\r\n", b"-a\rb\r\n", b"!3\r\nab\r\n", b";4\r\nabcd\r\n;0\r\n"),
)  # fmt: skip
_MARKS = b"$*%~>|=!:+-#,(_"
# Beside the limits of the cores, of C's integers, and beyond all.
_SIZES = (
    *(31, 32, 33, 999, 1000, 2**16, 2**20 - 1, 2**20, 2**20 + 1, 2**29, 2**29 + 1, 2**31 - 1),
    *(2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**18, 10**30),
)


class Grammar:
    """Writes replies, at random."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def valid(self, value: Any) -> bytes:
        """Return a value in one of the forms that mean the same."""
        if value is None:
            return self._chance.choice(_NULLS)
        if type(value) is list:
            return b"*%d\r\n" % len(value) + b"".join(map(self.valid, value))
        if value == "OK" and self._chance.random() < 0.2:
            return resp(b"OK")
        return resp(value)

    def other(self, value: Any) -> bytes:
        """Return what means something else, in the place of the value or of one within."""
        chance = self._chance
        if type(value) is not list or not value or chance.random() < 0.3:
            return self.any(4)
        at = chance.randrange(len(value))
        members = [*map(self.valid, value)]
        members[at] = self.other(value[at])
        length = len(members)
        if chance.random() < 0.2:
            members.insert(at, self.any(1))
            length += chance.random() < 0.8
        return b"*%d\r\n" % length + b"".join(members)

    def any(self, depth: int) -> bytes:
        """Return a well-formed value of any type."""
        chance = self._chance
        if depth == 0 or chance.random() < 0.6:
            return chance.choice(VALUES)
        if chance.random() < 0.1:
            return self.push()
        count = chance.randrange(5)
        mark = chance.choice((b"*", b"*", b"~", b"%", b">", b"|"))
        pairs = 2 if mark in b"%|" else 1
        members = (self.any(depth - 1) for _ in range(count * pairs))
        return b"%s%d\r\n" % (mark, count) + b"".join(members)

    def push(self) -> bytes:
        """Return a push that says what pushes of Redis say."""
        chance = self._chance
        keys = [key for name in chance.sample(NAMES, chance.randrange(3)) for key in keys_of(name)]
        return chance.choice(
            (
                b">2\r\n$10\r\ninvalidate\r\n" + self.valid(keys),
                b">2\r\n$10\r\ninvalidate\r\n_\r\n",
                b">2\r\n+invalidate\r\n" + self.valid(keys),
                b">2\r\n$6\r\nserver\r\n$5\r\nhello\r\n",
            )
        )

    def broken(self, text: bytes) -> bytes:
        """Return a reply of which one thing is wrong."""
        chance = self._chance
        at = chance.randrange(len(text))
        match chance.randrange(6):
            case 0:
                return text[:at] + text[at + chance.randrange(1, 4) :]
            case 1:
                return text[:at] + bytes([chance.choice(_MARKS)]) + text[at + 1 :]
            case 2:
                return text[:at] + bytes([chance.randrange(256)]) + text[at + 1 :]
            case 3:
                return self._at_a_line(text, chance.choice(BROKEN))
            case 4:
                return self._with_another_length(text)
            case _:
                return chance.choice(BROKEN)

    def hostile(self, text: bytes) -> bytes:
        """Return a reply that announces more than it has, or more than anyone should take."""
        chance = self._chance
        size = chance.choice(_SIZES)
        mark = bytes([chance.choice(b"$*%~>|=!")])
        depth = chance.choice((8, 30, 31, 32, 33, 40, 200))
        match chance.randrange(7):
            case 0:
                announced = b"%s%d\r\n" % (mark, size)
            case 1:
                announced = b"%s1\r\n" % chance.choice((b"*", b"~", b">", b"|")) * depth
                announced += chance.choice((b":1\r\n", b"", b"*0\r\n"))
            case 2:
                announced = b"*%d\r\n" % chance.choice((2, 1000, 2**17)) * depth
            case 3:
                announced = mark + b"0" * chance.choice((10, 63, 64, 65, 200)) + b"1\r\n"
            case 4:
                announced = mark + b"9" * chance.choice((17, 18, 19, 20, 63, 64, 65, 5000))
            case 5:
                announced = chance.choice((b"+", b"-", b":", b",", b"(")) + b"7" * size_of(size)
            case _:
                announced = b"$%d\r\n" % size_of(size) + b"x" * size_of(size) + b"\r\n"
        return self._at_a_line(text, announced)

    def _at_a_line(self, text: bytes, inserted: bytes) -> bytes:
        """Return a reply with something before one of its lines, or in place of what follows."""
        lines = [i for i in range(len(text)) if i == 0 or text[i - 1 : i] == b"\n"]
        at = self._chance.choice(lines)
        return text[:at] + inserted + (text[at:] if self._chance.random() < 0.7 else b"")

    def _with_another_length(self, text: bytes) -> bytes:
        chance = self._chance
        headers = [i for i, mark in enumerate(text) if mark in b"$*"]
        if not headers:
            return text[:-1]
        at = chance.choice(headers)
        end = text.find(b"\r", at)
        digits = text[at + 1 : end]
        if not digits.isdigit():
            return text[:at] + text[at + 1 :]
        length = int(digits) + chance.choice((-2, -1, 1, 2, 10))
        return text[: at + 1] + b"%d" % length + text[end:]

    def pieces(self, text: bytes) -> list[bytes]:
        """Return the text in pieces of any size."""
        chance = self._chance
        kind = chance.randrange(5)
        if kind == 0 or len(text) > 20_000:
            return [text]
        if kind == 1:
            size = chance.choice((1, 2, 3, 7, 16, 50))
            return [text[at : at + size] for at in range(0, min(len(text), 60 * size), size)] + (
                [text[60 * size :]] if len(text) > 60 * size else []
            )
        points = sorted(chance.randrange(len(text) + 1) for _ in range(kind))
        ends = zip([0, *points], [*points, len(text)], strict=True)
        return [text[start:end] for start, end in ends]


def size_of(size: int) -> int:
    """Return a size for a text that is really sent."""
    return min(size, 70_000)


@dataclass(frozen=True)
class _Template:
    """The operations of a tick; what a server sends, and what becomes of them."""

    operations: tuple[Operation, ...]
    msetex: bool
    replies: list[Any]
    server: ModelServer  # after these replies
    expected: list[Any]


@dataclass
class _Twin:
    """A pipeline of one of the cores, and the waiters of a case."""

    pipeline: Any
    waiters: list[Waiter]


# What a pipeline is made with, and what else it has: a near cache, or messages of RESP2.
_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small replies": {"max_reply_bytes": 1000},
    "clustered": {"clustered": True},
    "near": {},
    "resp2 messages": {},
    "small window": {"max_pending": 3},
}


class TwinFuzzer:
    """Feeds both cores the same exchange, one after the other, and notes each difference."""

    def __init__(self, seed: int) -> None:
        self.cases = 0
        self.replies = 0
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self._seed = seed
        self._chance = random.Random(seed)
        self._grammar = Grammar(self._chance)
        self._kind = ""
        self._twins: list[_Twin] = []
        self._fed = b""
        self._templates: dict[str, list[_Template]] = {}
        for self._kind in _OPTIONS:
            self._templates[self._kind] = [self._template() for _ in range(_TEMPLATES)]

    def run(self, cases: int) -> None:
        """Run so many cases more."""
        for _ in range(cases):
            if self.cases % _ROUND == 0:
                self._begin()
            self.cases += 1
            template = self._chance.choice(self._templates[self._kind])
            try:
                self._run(template)
            except Exception as error:
                self._note(f"{error!r}")
                self._begin()

    # -- one case

    def _run(self, template: _Template) -> None:
        chance = self._chance
        how = chance.choices(("valid", "other", "broken", "hostile"), (40, 30, 20, 10))[0]
        for twin in self._twins:
            twin.waiters.clear()
            twin.pipeline.has_msetex = template.msetex
            twin.pipeline.away = ""  # as of a new connection
        for operation in template.operations:
            self._on_both(lambda twin, one=operation: one.on(twin.pipeline) and None)
        self._on_both(lambda twin: twin.pipeline.take_output())
        self._fed = self._made(template, how)
        error = None
        for piece in self._grammar.pieces(self._fed):
            if (error := self._feed(piece)) is not None:
                break
            is_away = self._on_both(lambda twin: bool(twin.pipeline.away), is_error=False)
            if how != "valid" and chance.random() < 0.05 and not is_away:
                # Replies may cause repeats, which go out whenever there is a flush. To a server
                # that is away nothing is sent until all commands under way have their replies.
                self._on_both(lambda twin: twin.pipeline.take_output())
        self._compare()
        self.outcomes[how if error is None else type(error).__name__] += 1
        if how == "valid" and error is not None:
            self._note(f"{error!r} from valid replies")
        if how != "valid" or error is not None:
            self._lose(error)
        self._finish(template)
        if how == "valid":
            outcomes = [_shown(waiter) for waiter in self._twins[0].waiters]
            if outcomes != template.expected:
                self._note(f"{outcomes} instead of {template.expected}")

    def _made(self, template: _Template, how: str) -> bytes:
        """Return the bytes of a server, and count its replies."""
        chance = self._chance
        grammar = self._grammar
        texts = [*map(grammar.valid, template.replies)]
        for _ in range(chance.randrange(1, 3) if texts and how != "valid" else 0):
            at = chance.randrange(len(template.replies))
            if how == "other":
                texts[at] = grammar.other(template.replies[at])
                if chance.random() < 0.1:
                    texts.insert(at, grammar.any(2))
                elif chance.random() < 0.1:
                    texts[at] = b""
            else:
                make = grammar.broken if how == "broken" else grammar.hostile
                texts[at] = make(texts[at] or b"\n")
        while chance.random() < 0.25:
            texts.insert(chance.randrange(len(texts) + 1), grammar.push())
        self.replies += len(texts)
        return b"".join(texts)

    def _feed(self, piece: bytes) -> Any:
        """Let a piece arrive at both; return what it raised."""
        if self._chance.random() < 0.5:
            return self._on_both(lambda twin: twin.pipeline.feed(piece))

        def read(twin: _Twin) -> None:
            at = 0
            while at < len(piece):
                buffer = twin.pipeline.get_buffer(-1)
                size = min(len(buffer), len(piece) - at)
                buffer[:size] = piece[at : at + size]
                twin.pipeline.buffer_updated(size)
                at += size

        return self._on_both(read)

    def _lose(self, error: Exception | None) -> None:
        # As a Connection does: nothing is sent again after what was no answer at all.
        retry = error is None and self._chance.random() < 0.7
        reason = error or ConnectionLost("it was cut")
        self._on_both(lambda twin: twin.pipeline.connection_lost(reason, retry))
        self._on_both(lambda twin: twin.pipeline.connected(self._kind == "near"))

    def _finish(self, template: _Template) -> None:
        """Go on with a sane server: each operation ends, and a read gives its own record."""
        server = copy.copy(template.server)
        server.values = dict(server.values)
        known = len(template.operations)
        self._on_both(lambda twin: twin.pipeline.get("probe") and None)
        for _ in range(_MOST_FLUSHES):
            self._requeue()
            output = self._on_both(lambda twin: twin.pipeline.take_output(), is_error=False)
            if not output:
                break
            replies = server.answer(output)
            self._on_both(lambda twin, text=replies: twin.pipeline.feed(text))
        else:
            self._note("there is always more to send")
        server.executed.clear()
        self._compare()
        for twin in self._twins:
            stats = twin.pipeline.stats()
            names = ("pending", "pending_bytes", "in_flight", "queued")
            if left := {name: stats[name] for name in names if stats[name]}:
                self._note(f"not drained: {left}")
            if not all(waiter.done for waiter in twin.waiters):
                self._note(f"without an outcome: {twin.waiters}")
            if plain(twin.waiters[-1].value) != (7, data_of("probe", 7)):
                self._note(f"the probe got {twin.waiters[-1]}")
            del twin.waiters[known:]

    def _requeue(self) -> None:
        """Give operations that were redirected to the same pipelines."""
        batches: list[list[Any]] = []
        seen = []
        for twin in self._twins:
            taken, twin.pipeline.redirected = twin.pipeline.redirected, []
            seen.append([(words, slot) for words, slot, _ in taken])
            batches.append([batch for _, _, batch in taken])
        if seen[0] != seen[1]:
            self._note(f"redirected {seen[0]}, and {seen[1]}")
        for twin, own in zip(self._twins, batches, strict=True):
            if own:
                twin.pipeline.requeue(own)

    # -- both cores

    def _on_both(self, call: Callable[[_Twin], Any], *, is_error: bool = True) -> Any:
        """Do something with both; return the error, or else the result, of the compiled core."""
        seen: list[Any] = []
        for twin in self._twins:
            try:
                seen.append((None, call(twin)))
            except Exception as error:
                seen.append((error, _plain_error(error)))
        (error, first), (_, second) = seen
        if first != second:
            self._note(f"{first!r}, and {second!r}")
        return error if is_error else first

    def _compare(self) -> None:
        """Look for differences in what is known after a case."""
        fast, pure_ = self._twins
        if [*map(_shown, fast.waiters)] != [*map(_shown, pure_.waiters)]:
            self._note(f"{fast.waiters}, and {pure_.waiters}")
        counted = [counters(twin.pipeline) for twin in self._twins]
        if counted[0] != counted[1]:
            different = {
                name: (counted[0][name], counted[1][name])
                for name in counted[0]
                if counted[0][name] != counted[1].get(name)
            }
            self._note(f"counters {different}")
        if self._kind == "near":
            # The objects of the cores differ in size.
            near = [twin.pipeline.near.stats() | {"bytes": 0} for twin in self._twins]
            if near[0] != near[1]:
                self._note(f"near caches {near}")

    # -- templates

    def _begin(self) -> None:
        """Make new pipelines, with other options."""
        self._kind = self._chance.choice([*_OPTIONS])
        self._twins = [self._twin(core, self._kind) for core in (_fast, pure)]

    @staticmethod
    def _twin(core: Any, kind: str) -> _Twin:
        waiters: list[Waiter] = []

        def waiter() -> Waiter:
            waiters.append(Waiter())
            return waiters[-1]

        pipeline = core.Pipeline(
            waiter, lambda: None, address=ADDRESS, timeout=_TIMEOUT, **_OPTIONS[kind]
        )
        if kind == "near":
            pipeline.near = core.NearCache(waiter, pipeline, timeout=_TIMEOUT, idle_limit=_TIMEOUT)
        pipeline.resp2_pubsub = kind == "resp2 messages"
        pipeline.connected(kind == "near")
        return _Twin(pipeline, waiters)

    def _template(self) -> _Template:
        """Return operations and the replies of a model of Redis, run through the pure core."""
        chance = self._chance
        twin = self._twin(pure, self._kind)
        twin.pipeline.has_msetex = msetex = chance.random() < 0.5
        server = ModelServer()
        for name in [*NAMES[:8], "probe"]:
            server.put(name, 7, encoded(data_of(name, 7)))
        if chance.random() < 0.2:
            server.refused.add(b"n1_v")
        server.has_script = chance.random() < 0.8
        if chance.random() < 0.2:
            server.values[b"n2_v"] = b"damaged"
        if chance.random() < 0.2:
            server.values[b"n3_d"] = None
        operations = tuple(random_operation(chance) for _ in range(chance.randrange(1, 8)))
        for operation in operations:
            operation.on(twin.pipeline)
        replies = [*map(server.execute, commands(twin.pipeline.take_output()))]
        after = copy.copy(server)
        after.values = dict(server.values)
        twin.pipeline.feed(b"".join(map(resp, replies)))
        while output := twin.pipeline.take_output():
            twin.pipeline.feed(server.answer(output))
        server.executed.clear()
        expected = [*map(_shown, twin.waiters)]
        return _Template(operations, msetex, replies, after, expected)

    def _note(self, problem: str) -> None:
        if len(self.problems) < _EXAMPLES:
            where = f"case {self.cases} of seed {self._seed}, {self._kind}"
            self.problems.append(f"{where}: {problem[:1500]}, from {self._fed[:400]!r}")


def _plain_error(error: BaseException) -> Any:
    """Return an error as a value that is equal for equal errors of the cores."""
    more: list[Any] = []
    if isinstance(error, BulkError):
        more = [(name, _plain_error(one)) for name, one in error.errors.items()]
        more.append(_shown_result(error.result))
    elif isinstance(error, ReplyError):
        more = [error.code, error.message]
    cause = error.__cause__ and _plain_error(error.__cause__)
    if isinstance(error, ProtocolError) and _fast.READER == "own":
        cause = None  # that of hiredis alone
    # A push that is the key of a map: the error names its class, which is that of the reader.
    text = str(error).replace("dscache._fast._Push", "hiredis.PushNotification")
    return (type(error).__name__, text, more, cause)


def _shown(waiter: Waiter) -> Any:
    if waiter.error is not None:
        return _plain_error(waiter.error)
    return (waiter.done, _shown_result(waiter.value))


def _shown_result(value: Any) -> Any:
    return ("set", sorted(value)) if type(value) is set else (type(value).__name__, _raw(value))


def _raw(value: Any) -> Any:
    if type(value) is dict:
        return {name: _raw(one) for name, one in value.items()}
    if isinstance(value, (_fast.Record, pure.Record)):
        return (value.name, value.version, value.raw)
    return value
