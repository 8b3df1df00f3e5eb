"""Replies as a broken network or a hostile server would make them, for the core.

A Fuzzer keeps one Pipeline for all its cases, so that anything a broken connection leaves behind
would show in the next one. It runs without an event loop and without pytest.
"""

from __future__ import annotations

import copy
import random
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

from dscache.errors import ConnectionLost, DscacheError, ProtocolError
from tests.support.wire import (
    ADDRESS,
    Exchange,
    ModelServer,
    Operation,
    Push,
    Refusal,
    Waiter,
    plain,
    resp,
)

NAMES = [f"n{i}" for i in range(12)]
_TEMPLATES = 400
_EXAMPLES = 20
# Seconds: no operation may expire only because the machine was busy for a while.
_TIMEOUT = 3600.0
# Bytes with a meaning in RESP, which random bytes seldom hit.
_TOKENS = (b"*", b"$", b"%", b"~", b">", b"_", b":", b"+", b"-", b"#", b",", b"(", b"=", b"|", b"!")
_TOKENS += (b"\r\n", b"\r", b"\n", b"-1", b"0", b"9", b"\x00", b"\xff", b"$-1\r\n", b"*0\r\n")
_REFUSALS = tuple(map(Refusal, ("ERR no", "", "NOSCRIPT x", "NOPERM x", "READONLY x")))
_TOKENS += (b"*-1\r\n", b"$?\r\n", b"*1\r\n" * 12, b"-NOSCRIPT \r\n", b"-NOPERM no\r\n", b"-\r\n")


def data_of(name: str, version: int) -> dict[str, Any]:
    """Return data that shows its owner and whether it is complete."""
    text = f"{name} {version}"
    return {"text": text, "sum": zlib.crc32(text.encode())}


def _is_anothers(name: str, data: Any) -> bool:
    """Whether complete data belongs to another name."""
    if not isinstance(data, dict) or not isinstance(data.get("text"), str):
        return False
    text = data["text"]
    return zlib.crc32(text.encode()) == data.get("sum") and text.partition(" ")[0] != name


@dataclass(frozen=True)
class _Template:
    """Operations of a tick, and the traffic of a server of these records for them."""

    operations: tuple[Operation, ...]
    msetex: bool
    server: ModelServer
    replies: bytes
    expected: tuple[Any, ...]


class Fuzzer:
    """Feeds a core one mutated exchange after the other, and records violations."""

    def __init__(self, core: Any, seed: int) -> None:
        self.cases = 0
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self._random = random.Random(seed)
        self._seed = seed
        self._core = core
        self._waiters: list[Waiter] = []
        self._templates = [self._template() for _ in range(_TEMPLATES)]
        self._pipeline = self._new_pipeline()

    def run(self, cases: int) -> None:
        """Run that many more cases."""
        for _ in range(cases):
            self.cases += 1
            template = self._random.choice(self._templates)
            bad = self._mutate(template.replies)
            try:
                self._run(template, bad)
            except Exception as error:  # no error of any kind is allowed here
                self._note(f"{error!r} from {bad!r} to {template.operations}")
                self._pipeline = self._new_pipeline()

    def _new_pipeline(self) -> Any:
        return self._core.Pipeline(self._waiter, lambda: None, address=ADDRESS, timeout=_TIMEOUT)

    def _run(self, template: _Template, bad: bytes) -> None:
        pipeline = self._pipeline
        pipeline.has_msetex = template.msetex
        pipeline.away = ""  # as of a new connection
        self._waiters = []
        for operation in template.operations:
            operation.on(pipeline)
        pipeline.take_output()
        good = template.replies
        same = next(
            (i for i, pair in enumerate(zip(good, bad, strict=False)) if pair[0] != pair[1]),
            min(len(good), len(bad)),
        )
        # Waiters answered before the first wrong byte have the right answer.
        pipeline.feed(bad[:same])
        for waiter, expected in zip(self._waiters, template.expected, strict=True):
            if waiter.done and _outcome(waiter) != expected:
                self._note(f"{_outcome(waiter)} instead of {expected}, from {bad[:same]!r}")
        reason: Exception = ConnectionLost("it was cut")
        try:
            self._feed(bad[same:])
        except ProtocolError as error:
            reason = error
        self.outcomes[type(reason).__name__] += 1
        if len(bad) - len(good) in (-1, 0, 1) and bad[same + 1 :] in (
            good[same + 1 :],
            good[same:],
        ):
            self._check_owners(template, bad)
        # As a Connection does: nothing is sent again after an invalid reply.
        retry = not isinstance(reason, ProtocolError) and self._random.random() < 0.5
        pipeline.connection_lost(reason, retry)
        self._finish(template, bad)

    def _feed(self, data: bytes) -> None:
        for piece in self._pieces(data):
            if self._random.random() < 0.5:
                self._pipeline.feed(piece)
            else:
                buffer = self._pipeline.get_buffer(-1)
                buffer[: len(piece)] = piece
                self._pipeline.buffer_updated(len(piece))
            if self._random.random() < 0.1 and not self._pipeline.away:
                # Replies may cause retries, which go out at the next flush. To a server that is
                # away nothing is sent until all commands under way have their replies.
                self._pipeline.take_output()

    def _pieces(self, data: bytes) -> list[bytes]:
        points = sorted(self._random.randrange(len(data) + 1) for _ in range(2))
        return [data[: points[0]], data[points[0] : points[1]], data[points[1] :]]

    def _check_owners(self, template: _Template, bad: bytes) -> None:
        """Look for records under another record's name after one byte was changed."""
        for operation, waiter in zip(template.operations, self._waiters, strict=True):
            if operation.method not in ("get", "get_bulk") or not waiter.value:
                continue
            found = waiter.value
            for name, record in (found if type(found) is dict else {found.name: found}).items():
                try:
                    data = record.data
                except DscacheError:
                    continue
                if name not in operation.argument or _is_anothers(name, data):
                    self._note(f"{operation} got {record!r} from {bad!r}")

    def _finish(self, template: _Template, bad: bytes) -> None:
        """Continue on a new connection to a sane server: everything is answered, correctly."""
        pipeline = self._pipeline
        known = len(self._waiters)
        server = template.server
        if pipeline.queued:
            server = copy.copy(server)
            server.values = dict(server.values)
        probe = pipeline.get("probe")
        while output := pipeline.take_output():
            pipeline.feed(server.answer(output))
        server.executed.clear()
        counters = pipeline.stats()
        pending = [counters[name] for name in ("pending", "pending_bytes", "in_flight", "queued")]
        if any(pending):
            self._note(f"not drained: {pending} after {bad!r}")
        for operation, waiter in zip(template.operations, self._waiters[:known], strict=True):
            if not waiter.done:
                self._note(f"{operation} was never told after {bad!r}")
        if plain(probe.result()) != (7, data_of("probe", 7)):
            self._note(f"the probe got {probe} after {bad!r}")

    # -- traffic

    def _mutate(self, data: bytes) -> bytes:
        chance = self._random
        kind = chance.randrange(10)
        if kind == 0:
            return bytes(chance.randrange(256) for _ in range(chance.randrange(60)))
        if kind == 1:
            return resp(self._value(3)) + data
        changes = 1 if kind < 6 else chance.randrange(1, 6)
        for _ in range(changes):
            data = self._change(data)
        return data

    def _change(self, data: bytes) -> bytes:
        chance = self._random
        at = chance.randrange(len(data) + 1)
        match chance.randrange(8):
            case 0:
                return data[:at]
            case 1:
                return data[:at] + data[at + 1 :]
            case 2:
                return data[:at] + data[at + chance.randrange(1, 30) :]
            case 3:
                return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
            case 4:
                return data[:at] + bytes([chance.randrange(256)]) + data[at:]
            case 5:
                token = chance.choice(_TOKENS)
                return data[:at] + token + data[at + len(token) :]
            case 6:
                return data[:at] + chance.choice(_TOKENS) + data[at:]
            case _:
                end = at + chance.randrange(1, 60)
                return data[:end] + data[at:end] + data[end:]

    def _value(self, depth: int) -> Any:
        """Return any RESP value."""
        chance = self._random
        simple = (
            None,
            True,
            3,
            -1,
            2.5,
            b"",
            b"12",
            b"x" * 40,
            "OK",
            Refusal("ERR no"),
            Refusal(""),
        )
        simple += (Refusal("NOSCRIPT x"), Refusal("NOPERM x"), Refusal("READONLY x"), "string", 1)
        kind = chance.randrange(10)
        if depth == 0 or kind < 6:
            return chance.choice(simple)
        members = [self._value(depth - 1) for _ in range(chance.randrange(5))]
        if kind < 8:
            return members
        return Push(members) if kind == 8 else {b"k": members}

    # -- templates

    def _waiter(self) -> Waiter:
        waiter = Waiter()
        self._waiters.append(waiter)
        return waiter

    def _template(self) -> _Template:
        chance = self._random
        msetex = chance.random() < 0.5
        exchange = Exchange(self._core, msetex=msetex, timeout=_TIMEOUT)
        server = exchange.server
        for name in [*NAMES[:8], "probe"]:
            server.put(name, 7, encoded(data_of(name, 7)))
        if chance.random() < 0.2:
            server.refused.add(b"n1_v")
        server.has_script = chance.random() < 0.8
        if chance.random() < 0.2:
            server.values[b"n2_v"] = b"damaged"
        before = copy.copy(server)
        before.values = dict(server.values)
        operations = tuple(random_operation(chance) for _ in range(chance.randrange(1, 8)))
        waiters = exchange.issue(*operations)
        replies = server.answer(exchange.pipeline.take_output())
        exchange.pipeline.feed(replies)
        # An operation that needs a second round has no expected result in the first.
        expected = tuple(_outcome(waiter) if waiter.done else None for waiter in waiters)
        server.executed.clear()
        before.refused, before.has_script = set(), True
        return _Template(operations, msetex, before, replies, expected)

    def _note(self, problem: str) -> None:
        if len(self.problems) < _EXAMPLES:
            self.problems.append(f"case {self.cases} of seed {self._seed}: {problem}")


def random_operation(chance: random.Random) -> Operation:
    """Return an operation on some of ``NAMES``."""
    name = chance.choice(NAMES)
    some = chance.sample(NAMES, chance.randrange(1, 6))
    version = chance.randrange(5, 10)
    options: dict[str, Any] = {}
    if chance.random() < 0.5:
        options["ttl"] = 100
    if chance.random() < 0.5:
        options["if_newer"] = True
    match chance.randrange(8):
        case 0 | 1:
            return Operation("get", name)
        case 2:
            return Operation("head", name)
        case 3:
            return Operation("set", name, (version, data_of(name, version)), options)
        case 4:
            return Operation("delete", name)
        case 5:
            return Operation("get_bulk", some)
        case 6:
            records = {name: (version, data_of(name, version)) for name in some}
            return Operation("set_bulk", records, (), options)
        case _:
            return Operation(chance.choice(("head_bulk", "delete_bulk")), some)


def encoded(data: dict[str, Any]) -> bytes:
    return b'{"text":"%s","sum":%d}' % (data["text"].encode(), data["sum"])


def _outcome(waiter: Waiter) -> Any:
    if waiter.error is not None:
        return (type(waiter.error).__name__, str(waiter.error))
    return ("ok", plain(waiter.value))
