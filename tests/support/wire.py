"""Both ends of a connection for tests of the core: RESP, waiters, and two models of Redis.

``ModelServer`` executes the commands that a Pipeline emits. ``ModelRecords`` is the oracle beside
it: it knows nothing of commands and executes operations one after the other. A Pipeline must answer
what ``ModelRecords`` answers, however the operations were batched.
"""

from __future__ import annotations

from asyncio import InvalidStateError
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import hiredis
import pytest

from dscache import _fast
from dscache.core import constants as c
from dscache.core import pure, scripts
from dscache.core.condition import ANY
from dscache.core.split_records import SplitRecords
from dscache.errors import ConnectionLost

ADDRESS = "node.test:6379"
CORES = [pytest.param(_fast, id="fast"), pytest.param(pure, id="pure")]

WRONGTYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"
NOSCRIPT = "NOSCRIPT No matching script. Please use EVAL."
NOPERM = "NOPERM No permissions to access a key"


# -- RESP


class Refusal(str):
    """An error reply."""

    __slots__ = ()


class Push(list[Any]):
    """A RESP3 push, which answers no command."""


def resp(value: object) -> bytes:
    """Return a value as Redis would send it: a str as a simple string, bytes as a bulk string."""
    match value:
        case None:
            return b"_\r\n"
        case bool():
            return b"#t\r\n" if value else b"#f\r\n"
        case int():
            return b":%d\r\n" % value
        case float():
            return b",%r\r\n" % value
        case bytes():
            return b"$%d\r\n%s\r\n" % (len(value), value)
        case Refusal():
            return b"-%s\r\n" % value.encode()
        case str():
            return b"+%s\r\n" % value.encode()
        case dict():
            members = (member for pair in value.items() for member in pair)
            return b"%%%d\r\n" % len(value) + b"".join(map(resp, members))
        case set():
            return b"~%d\r\n" % len(value) + b"".join(map(resp, value))
        case list():
            mark = b">" if isinstance(value, Push) else b"*"
            return b"%s%d\r\n" % (mark, len(value)) + b"".join(map(resp, value))
    raise TypeError(f"no RESP for {value!r}")


def commands(output: bytes) -> list[list[bytes]]:
    """Return the commands of a request, each a list of its parts; all must be complete."""
    reader = hiredis.Reader()
    reader.feed(output)
    found = []
    while (command := reader.gets()) is not False:
        found.append(command)
    packed = b"".join(hiredis.pack_command(tuple(command)) for command in found)
    assert packed == output, "the last command is incomplete"
    return found


def flushed(pipeline: Any) -> bytes:
    """Return everything a pipeline has to send, as far as its window allows."""
    return b"".join(iter(pipeline.take_output, b""))


def keys_of(name: str) -> tuple[bytes, bytes]:
    """Return the keys of a record under deepstream's layout."""
    return name.encode() + b"_v", name.encode() + b"_d"


def counters(counted: Any) -> dict[str, Any]:
    """Return the counters of a Pipeline, or of anything with its counters, without times."""
    stats: dict[str, Any] = counted.stats()
    return {name: stats[name] for name in stats if name != "latency"}


# -- waiters


class Waiter:
    """A receiver of one result, never of a second."""

    def __init__(self) -> None:
        self.done = False
        self.cancelled = False
        self.error: Exception | None = None
        self.value: Any = None

    def set_result(self, result: Any, /) -> None:
        self._settle()
        self.value = result

    def set_exception(self, error: Exception, /) -> None:
        assert isinstance(error, Exception)
        self._settle()
        self.error = error

    def cancel(self) -> None:
        """Refuse a result from now on, as a cancelled ``asyncio.Future`` does."""
        self.cancelled = not self.done

    def result(self) -> Any:
        """Return the result or raise the error; there must be one."""
        assert self.done, "this waiter has no result"
        if self.error is not None:
            raise self.error
        return self.value

    def exception(self) -> Exception | None:
        """Return the error, if there is one."""
        return self.error

    def _settle(self) -> None:
        if self.cancelled:
            raise InvalidStateError
        assert not self.done, "settled twice"
        self.done = True

    def __repr__(self) -> str:
        if self.cancelled or not self.done:
            return "<cancelled>" if self.cancelled else "<pending>"
        return f"<{self.error!r}>" if self.error is not None else f"<{self.value!r}>"


# -- operations


@dataclass(frozen=True)
class Operation:
    """One call of a record operation: of a Pipeline, an AsyncCache or ``ModelRecords``."""

    method: str
    argument: Any  # a name, or the names or records of a bulk
    rest: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def on(self, target: Any) -> Any:
        """Issue it."""
        return getattr(target, self.method)(self.argument, *self.rest, **self.options)

    def __str__(self) -> str:
        options = [f"{name}={value}" for name, value in self.options.items()]
        return f"{self.method}({', '.join([repr(self.argument), *map(repr, self.rest), *options])})"


def plain(result: Any) -> Any:
    """Return a result with each Record as the (version, data) that ``ModelRecords`` has."""
    if isinstance(result, (_fast.Record, pure.Record)):
        return tuple(result)
    if isinstance(result, dict):
        return {name: plain(value) for name, value in result.items()}
    return result


class ModelRecords:
    """The oracle: records in a dict, and operations that take effect one after the other."""

    def __init__(self) -> None:
        self.records: dict[str, tuple[int, Any]] = {}

    def get(self, name: str) -> tuple[int, Any] | None:
        return self.records.get(name)

    def head(self, name: str) -> int | None:
        record = self.records.get(name)
        return record and record[0]

    def set(
        self,
        name: str,
        version: int,
        data: Any,
        *,
        ttl: int | None = None,
        if_newer: bool = False,
        if_version: Any = ANY,
    ) -> bool:
        stored = self.records.get(name)
        if if_version is not ANY and if_version != self.head(name):
            return False
        if if_newer and stored is not None and stored[0] >= version:
            return False
        self.records[name] = (version, data)
        return True

    def delete(self, name: str, *, if_version: Any = ANY) -> bool:
        if if_version is not ANY and if_version != self.head(name):
            return False
        return self.records.pop(name, None) is not None

    def get_bulk(self, names: Iterable[str]) -> dict[str, tuple[int, Any]]:
        return {name: self.records[name] for name in names if name in self.records}

    def head_bulk(self, names: Iterable[str]) -> dict[str, int]:
        return {name: self.records[name][0] for name in names if name in self.records}

    def set_bulk(
        self,
        records: Mapping[str, tuple[int, Any]],
        *,
        ttl: int | None = None,
        if_newer: bool = False,
        if_version: Any = ANY,
    ) -> set[str]:
        return {
            name
            for name, (version, data) in records.items()
            if not self.set(
                name,
                version,
                data,
                if_newer=if_newer,
                if_version=ANY if if_version is ANY else if_version[name],
            )
        }

    def delete_bulk(self, names: Iterable[str], *, if_version: Any = ANY) -> int:
        return sum(
            self.delete(name, if_version=ANY if if_version is ANY else if_version[name])
            for name in dict.fromkeys(names)
        )


# -- a server


class ModelServer:
    """As much of Redis as dscache needs, in memory and in one thread.

    ``values`` holds a key's bytes, or None for a key of another type than string. ``refused`` are
    keys that the user may not access. ``has_script`` is whether EVALSHA finds its script.
    """

    def __init__(self) -> None:
        self.values: dict[bytes, bytes | None] = {}
        self.lifetimes: dict[bytes, int] = {}
        self.refused: set[bytes] = set()
        self.has_script = True
        self.executed: list[list[bytes]] = []

    def put(self, name: str, version: object, data: bytes | None) -> None:
        """Store a record, or something that looks like one."""
        version_key, data_key = keys_of(name)
        self.values[version_key] = str(version).encode()
        self.values[data_key] = data

    def answer(self, output: bytes) -> bytes:
        """Execute a client's request, and return its replies."""
        return b"".join(resp(self.execute(command)) for command in commands(output))

    def execute(self, command: list[bytes]) -> Any:
        """Execute one command, and return the reply as ``resp`` takes it."""
        self.executed.append(command)
        verb, *arguments = command
        execute: Callable[..., Any] = getattr(self, f"_{verb.decode().lower()}")
        return execute(*arguments)

    def _get(self, key: bytes) -> Any:
        return self._refuse(key) or self._value(key)

    def _type(self, key: bytes) -> Any:
        if refusal := self._refuse(key):
            return refusal
        if key not in self.values:
            return "none"
        return "list" if self.values[key] is None else "string"

    def _mget(self, *keys: bytes) -> Any:
        return self._refuse(*keys) or [self.values.get(key) for key in keys]

    def _mset(self, *pairs: bytes) -> Any:
        if refusal := self._refuse(*pairs[::2]):
            return refusal
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            self._store(key, value, 0)
        return "OK"

    def _msetex(self, count: bytes, *rest: bytes) -> Any:
        *pairs, mode, seconds = rest
        assert mode == b"EX"
        assert len(pairs) == 2 * int(count)
        if refusal := self._refuse(*pairs[::2]):
            return refusal
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            self._store(key, value, int(seconds))
        return 1

    def _exists(self, *keys: bytes) -> Any:
        return self._refuse(*keys) or sum(key in self.values for key in keys)

    def _set(self, key: bytes, value: bytes, *lifetime: bytes) -> Any:
        if refusal := self._refuse(key):
            return refusal
        self._store(key, value, int(lifetime[1]) if lifetime else 0)
        return "OK"

    def _del(self, *keys: bytes) -> Any:
        if refusal := self._refuse(*keys):
            return refusal
        for key in keys:
            self.lifetimes.pop(key, None)
        present = [key for key in keys if key in self.values]
        for key in present:
            del self.values[key]
        return len(present)

    def _evalsha(self, sha: bytes, *arguments: bytes) -> Any:
        assert sha == scripts.SET_SCRIPT_SHA
        return self._run_script(*arguments) if self.has_script else Refusal(NOSCRIPT)

    def _eval(self, text: bytes, *arguments: bytes) -> Any:
        assert text == scripts.SET_SCRIPT
        self.has_script = True
        return self._run_script(*arguments)

    def _run_script(self, count: bytes, *rest: bytes) -> Any:
        number = int(count)
        keys, arguments = rest[:number], rest[number:]
        if refusal := self._refuse(*keys):
            return refusal
        if len(arguments) == number + 2:  # the last two are of all records
            *arguments, ttl, guard = arguments
            writes = [(*arguments[i : i + 2], ttl, guard) for i in range(0, number, 2)]
        else:
            assert len(arguments) == 2 * number
            writes = [arguments[i : i + 4] for i in range(0, 2 * number, 4)]
            assert len({write[2:] for write in writes}) > 1
        answers = [
            self._run_one(*keys[2 * i : 2 * i + 2], *write) for i, write in enumerate(writes)
        ]
        return answers if set(answers) != {c.WRITTEN} else c.WRITTEN

    def _run_one(
        self,
        version_key: bytes,
        data_key: bytes,
        version: bytes,
        data: bytes,
        ttl: bytes,
        guard: bytes,
    ) -> Any:
        stored = self._value(version_key)
        if guard[:1] in (c.EXPECTED, c.EXPECTED_REPEAT):
            whole = stored is not None and self.values.get(data_key) is not None
            text = self.values[data_key] if whole else None
            answer = self._compare(stored if whole else None, text, version, data, guard)
            if answer != c.WRITTEN:
                return answer
            if not data:
                self._del(version_key, data_key)
                return answer
        elif guard != c.UNGUARDED and stored is not None:
            if isinstance(stored, Refusal):
                return stored
            if self.values.get(data_key) is not None:
                if not stored.isdigit() or int(stored) > c.MAX_VERSION:
                    return c.DAMAGED
                own = guard == c.GUARDED_REPEAT and self.values[data_key] == data
                if int(stored) > int(version) or (int(stored) == int(version) and not own):
                    return c.NOT_NEWER
        self._store(version_key, version, int(ttl))
        self._store(data_key, data, int(ttl))
        return c.WRITTEN

    def _compare(
        self, stored: Any, text: bytes | None, version: bytes, data: bytes, guard: bytes
    ) -> Any:
        """Answer a write or removal with ``if_version``, which stores nothing yet."""
        is_repeat = guard[:1] == c.EXPECTED_REPEAT
        if isinstance(stored, Refusal):
            return stored
        if stored is not None and (not stored.isdigit() or int(stored) > c.MAX_VERSION):
            return c.DAMAGED
        found = b"" if stored is None else b"%d" % int(stored)
        holds = found == guard[1:]
        if not is_repeat:
            return c.WRITTEN if holds else c.NOT_NEWER
        if data and (found, text) == (version, data):
            return c.WRITTEN
        return c.WRITTEN if holds and found and not (data and found == version) else c.UNTOLD

    def _store(self, key: bytes, value: bytes, ttl: int) -> None:
        self.values[key] = value
        if ttl == c.KEPT_TTL:
            return
        self.lifetimes.pop(key, None)
        if ttl:
            self.lifetimes[key] = ttl

    def _value(self, key: bytes) -> bytes | Refusal | None:
        if key in self.values and self.values[key] is None:
            return Refusal(WRONGTYPE)
        return self.values.get(key)

    def _refuse(self, *keys: bytes) -> Refusal | None:
        return None if self.refused.isdisjoint(keys) else Refusal(NOPERM)


class Exchange:
    """A Pipeline of one of the cores, its waiters, and its server."""

    def __init__(
        self,
        core: Any,
        *,
        msetex: bool = False,
        timeout: float = 3600,  # nothing expires because a machine is slow
        **options: Any,
    ) -> None:
        self.server = ModelServer()
        self.waiters: list[Waiter] = []
        self.wakes = 0
        self.pipeline = core.Pipeline(
            self._waiter, self._wake, address=ADDRESS, timeout=timeout, **options
        )
        self.pipeline.has_msetex = msetex

    def issue(self, *operations: Operation) -> list[Waiter]:
        """Issue operations in this tick."""
        return [operation.on(self.pipeline) for operation in operations]

    def take(self) -> list[list[bytes]]:
        """Flush, and return the commands, which no server sees."""
        return commands(flushed(self.pipeline))

    def reply(self, *values: object) -> None:
        """Deliver values as replies, all at once."""
        self.pipeline.feed(b"".join(map(resp, values)))

    def run(self) -> list[list[bytes]]:
        """Flush and let the server answer until all is settled; return the commands."""
        before = len(self.server.executed)
        while output := self.pipeline.take_output():
            self.pipeline.feed(self.server.answer(output))
        self.assert_drained()
        return self.server.executed[before:]

    def assert_drained(self) -> None:
        """Assert that nothing is pending and that every waiter has a result."""
        stats = self.pipeline.stats()
        counters = {name: stats[name] for name in ("queued", "in_flight", "pending")}
        assert not any(counters.values()), counters
        assert (self.pipeline.queued, self.pipeline.in_flight) == (0, 0)
        assert all(waiter.done or waiter.cancelled for waiter in self.waiters), self.waiters

    def _waiter(self) -> Waiter:
        self.waiters.append(Waiter())
        return self.waiters[-1]

    def _wake(self) -> None:
        self.wakes += 1


class ClusterExchange:
    """The Router of one of the cores, the pipelines of some nodes, and their waiters.

    Node ``i`` of ``n`` serves the slots that leave ``i`` when divided by ``n``, reads included.
    """

    def __init__(
        self,
        core: Any,
        nodes: int = 3,
        *,
        key_prefix: str = "",
        hash_tag: bool = False,
        ttl: int = 0,
        timeout: float = 3600,  # nothing expires because a machine is slow
        **options: Any,
    ) -> None:
        self.waiters: list[Waiter] = []
        self.wakes = [0] * nodes
        self.closed: set[int] = set()
        layout: dict[str, Any] = {"key_prefix": key_prefix, "hash_tag": hash_tag}
        self.pipelines = [
            core.Pipeline(
                self._waiter,
                partial(self._wake, node),
                address=self.address(node),
                ttl=ttl,
                timeout=timeout,
                clustered=True,
                **layout,
                **options,
            )
            for node in range(nodes)
        ]
        self.apart = SplitRecords(core, self._waiter, key_prefix=key_prefix, ttl=ttl)
        self.router = core.Router(self._waiter, self.pipelines[0], self.apart, **layout)
        self.apart.router = self.router
        table = [self.pipelines[slot % nodes] for slot in range(c.SLOTS)]
        self.router.owners[:] = self.router.readers[:] = table

    @staticmethod
    def address(node: int) -> str:
        """Return a node's address, for messages."""
        return f"node{node}.test:6379"

    def assign(self, slot: int, node: int) -> None:
        """Assign a slot to a node from now on."""
        self.router.owners[slot] = self.router.readers[slot] = self.pipelines[node]

    def issue(self, *operations: Operation) -> list[Waiter]:
        """Issue operations in this tick."""
        return [operation.on(self.router) for operation in operations]

    def take(self, node: int = 0) -> list[list[bytes]]:
        """Flush a node, and return the commands, which no server sees."""
        return commands(flushed(self.pipelines[node]))

    def reply(self, node: int, *values: object) -> None:
        """Deliver values as replies of a node, all at once."""
        self.pipelines[node].feed(b"".join(map(resp, values)))

    def redirected(self, node: int) -> list[tuple[str, int, Any]]:
        """Take the operations that a node has redirected."""
        pipeline = self.pipelines[node]
        taken: list[tuple[str, int, Any]] = pipeline.redirected
        pipeline.redirected = []
        return taken

    def move(self, node: int) -> None:
        """Hand over operations that wait at a node but now belong to another."""
        for target, batch in self.pipelines[node].take_queued(self.router.target_of):
            target.requeue([batch])

    def serve(self, node: int, server: ModelServer) -> list[list[bytes]]:
        """Let a server answer everything that a node sends; return the commands."""
        before = len(server.executed)
        while output := self.pipelines[node].take_output():
            self.pipelines[node].feed(server.answer(output))
        return server.executed[before:]

    def counters(self, node: int) -> tuple[int, int, int, int]:
        """Return a node's counters: waiting, in flight, pending, and bytes."""
        pipeline = self.pipelines[node]
        return (
            pipeline.queued,
            pipeline.in_flight,
            pipeline.operations,
            pipeline.pending_bytes,
        )

    def assert_drained(self) -> None:
        """Assert that nothing is pending and that every waiter has a result."""
        for node, pipeline in enumerate(self.pipelines):
            assert self.counters(node) == (0, 0, 0, 0)
            assert not pipeline.redirected
        assert all(waiter.done or waiter.cancelled for waiter in self.waiters), self.waiters

    def _waiter(self) -> Waiter:
        self.waiters.append(Waiter())
        return self.waiters[-1]

    def _wake(self, node: int) -> None:
        if node in self.closed:
            raise ConnectionLost(f"{self.address(node)} is closed")
        self.wakes[node] += 1
