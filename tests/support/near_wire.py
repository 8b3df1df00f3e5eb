"""A near cache alone: calls stepped by hand, and servers that send invalidations.

The server's messages queue up until a test delivers them, whole or in pieces: what the near cache
may still believe depends only on what has arrived.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Generator
from sys import getsizeof
from typing import Any

from dscache.errors import ConnectionLost
from tests.support.wire import (
    ADDRESS,
    ModelServer,
    Operation,
    Push,
    Refusal,
    Waiter,
    commands,
    keys_of,
    resp,
)

FOREVER = 3600.0
_READS = frozenset((b"GET", b"MGET", b"TYPE", b"EXISTS"))


class Promise(Waiter):
    """An awaitable Waiter."""

    def __await__(self) -> Generator[Promise, None, Any]:
        while not self.done:
            yield self
        return self.result()


class Call:
    """An issued operation, stepped as an event loop would step it."""

    def __init__(self, operation: Operation, awaitable: Any) -> None:
        self.operation = operation
        self.error: Exception | None = None
        self.value: Any = None
        self.done = False
        self.cancelled = False
        self._steps = awaitable.__await__()
        self._promise: Any = None
        self._step()
        self.was_at_hand = self.done
        """Whether it ended without waiting for anybody."""

    def look(self) -> bool:
        """Continue if what it waits for is there; return whether it has ended."""
        if not self.done and not self.cancelled and self._promise.done:
            self._step()
        return self.done

    def result(self) -> Any:
        """Return the result or raise the error; there must be one."""
        assert self.look(), f"{self.operation}: there is no reply"
        if self.error is not None:
            raise self.error
        return self.value

    def cancel(self) -> None:
        """Cancel the call as a task is cancelled: first what it waits for, then itself."""
        if self.look() or self.cancelled:
            return
        self._promise.cancel()
        self.cancelled = True
        try:
            self._steps.throw(asyncio.CancelledError())
        except asyncio.CancelledError:
            return
        raise AssertionError(f"{self.operation}: it was not cancelled")

    def _step(self) -> None:
        try:
            self._promise = next(self._steps)
        except StopIteration as end:
            self.value = end.value
        except Exception as error:
            self.error = error
        else:
            return
        self.done = True

    def __repr__(self) -> str:
        if self.cancelled or not self.done:
            return f"<{self.operation}: {'cancelled' if self.cancelled else 'pending'}>"
        return f"<{self.operation}: {self.value if self.error is None else self.error!r}>"


class TrackingServer(ModelServer):
    """A server that invalidates a client's reads, once each.

    ``sent`` is the part of the stream that the client has not received, and ``offset`` the length
    of the stream so far. ``named`` are the keys that the last command invalidated. Keys in
    ``moved`` belong to another node, and commands on them get the error stored there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.offset = 0
        self.is_tracking = True
        self.named: set[bytes] = set()
        self.moved: dict[bytes, str] = {}
        self._read: set[bytes] = set()
        self._changed: dict[bytes, None] = {}

    def serve(self, command: list[bytes]) -> None:
        """Execute a command of the client; its reply comes first, then its invalidations."""
        self.named.clear()
        keys = [argument for argument in command[1:] if argument in self.moved]
        if keys:
            self._send(resp(Refusal(self.moved[keys[0]])))
            return
        reply = self.execute(command)
        if command[0] in _READS and self.is_tracking:
            self._read.update(command[1:])
        self._send(resp(reply))
        self._tell()

    def elsewhere(self, *command: bytes) -> Any:
        """Execute a command of another client."""
        self.named.clear()
        reply = self.execute(list(command))
        self._tell()
        return reply

    def write(self, name: str, version: int, data: bytes) -> None:
        """Let another client write a record."""
        version_key, data_key = keys_of(name)
        self.elsewhere(b"MSET", version_key, b"%d" % version, data_key, data)

    def remove(self, name: str) -> None:
        """Let another client, or expiry, remove a record."""
        self.elsewhere(b"DEL", *keys_of(name))

    def flush(self) -> None:
        """Let another client remove everything."""
        self.named.clear()
        self.named.update(self.values)
        self.values.clear()
        self._read.clear()
        if self.is_tracking:
            self._send(resp(Push([b"invalidate", None])))

    def receive(self, size: int) -> bytes:
        """Take up to that many bytes from the stream."""
        received, self.sent = self.sent[:size], self.sent[size:]
        return received

    def disconnect(self) -> None:
        """Forget the client and its unreceived bytes until ``is_tracking`` is set again."""
        self.sent = b""
        self.is_tracking = False
        self._read.clear()

    def _send(self, message: bytes) -> None:
        self.sent += message
        self.offset += len(message)

    def _tell(self) -> None:
        for key in self._changed:
            if key in self._read:
                self._read.discard(key)
                self.named.add(key)
                self._send(resp(Push([b"invalidate", [key]])))
        self._changed.clear()

    def _store(self, key: bytes, value: bytes, ttl: int) -> None:
        super()._store(key, value, ttl)
        self._changed[key] = None

    def _del(self, *keys: bytes) -> Any:
        self._changed.update(dict.fromkeys(key for key in keys if key in self.values))
        return super()._del(*keys)


class NearExchange:
    """A near cache of one of the cores before a Pipeline, and a server with tracking.

    ``near`` are options of the near cache, the others of both.
    """

    def __init__(
        self,
        core: Any,
        *,
        key_prefix: str = "",
        hash_tag: bool = False,
        pipeline: dict[str, Any] | None = None,
        **near: Any,
    ) -> None:
        self.server = TrackingServer()
        self.promises: list[Promise] = []
        layout: dict[str, Any] = {"key_prefix": key_prefix, "hash_tag": hash_tag}
        self.pipeline = core.Pipeline(
            self._promise,
            lambda: None,
            address=ADDRESS,
            **{"timeout": FOREVER, **layout, **(pipeline or {})},
        )
        slow = {"timeout": FOREVER, "max_age": FOREVER, "idle_limit": FOREVER}
        self.near = core.NearCache(self._promise, self.pipeline, **slow | layout | near)
        self.pipeline.near = self.near
        self.pipeline.connected(True)

    def issue(self, method: str, argument: Any, *rest: Any, **options: Any) -> Call:
        """Issue one operation in this tick."""
        operation = Operation(method, argument, rest, options)
        return Call(operation, operation.on(self.near))

    def get(self, name: str) -> Call:
        """Issue a read."""
        return self.issue("get", name)

    def take(self) -> list[list[bytes]]:
        """Flush once, and return the commands, which no server sees."""
        return commands(self.pipeline.take_output())

    def reply(self, *values: object) -> None:
        """Deliver values as replies, all at once."""
        self.pipeline.feed(b"".join(map(resp, values)))

    def push(self, *keys: Any) -> None:
        """Deliver an invalidation of these keys."""
        self.reply(Push([b"invalidate", list(keys)]))

    def send(self) -> list[list[bytes]]:
        """Flush, and let the server execute everything; none of its output arrives."""
        sent = self.take()
        for command in sent:
            self.server.serve(command)
        return sent

    def arrive(self, size: int = 2**30) -> None:
        """Deliver that many bytes of the server's output."""
        if received := self.server.receive(size):
            self.pipeline.feed(received)

    def run(self) -> list[list[bytes]]:
        """Flush and deliver everything until all is settled; return the commands."""
        sent: list[list[bytes]] = []
        while more := self.send():
            sent += more
            self.arrive()
        self.arrive()
        return sent

    def read(self, name: str) -> Any:
        """Read a record, from cache or server, and return it."""
        call = self.get(name)
        self.run()
        return call.result()

    def fill(self, *names: str, version: int = 1, data: bytes = b"1") -> None:
        """Put records of these names on the server, and read them."""
        for name in names:
            self.server.write(name, version, data)
            assert self.read(name) is not None

    def has(self, name: str) -> bool:
        """Whether a name is cached. Pending input arrives; this check caches nothing."""
        call = self.issue("head", name)  # its reply is not cached
        if not call.was_at_hand:
            call.cancel()
            self.run()
        return call.was_at_hand

    def lose(self, retry: bool = True) -> None:
        """Lose the connection."""
        self.server.disconnect()
        self.server.is_tracking = True  # of the next connection
        self.pipeline.connection_lost(ConnectionLost("cut"), retry)

    def stats(self) -> dict[str, Any]:
        """Return the counters of the near cache."""
        found: dict[str, Any] = self.near.stats()
        return found

    def count(self, *names: str) -> tuple[Any, ...]:
        """Return some of the counters."""
        stats = self.stats()
        return tuple(stats[name] for name in names)

    def assert_drained(self) -> None:
        """Assert that nothing is pending and that every waiter has a result."""
        stats = self.pipeline.stats()
        counters = {name: stats[name] for name in ("queued", "in_flight", "pending")}
        assert not any(counters.values()), counters
        assert all(one.done or one.cancelled for one in self.promises), self.promises

    def _promise(self) -> Promise:
        self.promises.append(Promise())
        return self.promises[-1]


def size_of(core: Any, name: str, data: bytes = b"") -> int:
    """Return the bytes that an entry counts for, without its slot in the dict."""
    return int(core.NEAR_ENTRY_BYTES) + len(name.encode()) + len(data)


def table_of(core: Any, entries: int = 1) -> int:
    """Return the bytes that a dict of that many entries counts for."""
    empty: dict[str, None] = OrderedDict() if core.__name__ == "dscache.core.pure" else {}
    filled = empty.copy()
    for key in range(entries):
        filled[str(key)] = None
    return getsizeof(filled) - getsizeof(empty)
