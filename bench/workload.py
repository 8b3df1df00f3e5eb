"""What is measured: one document, a thousand names, and the clients that read and write them.

Every client does the same work: a read is both keys of a record, a write too. JSON goes through
msgspec for all of them, so that clients are compared, and no decoders.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol
from unittest.mock import patch

import msgspec
import redis.asyncio

import dscache
from dscache import _backend
from dscache.embedded import EmbeddedServer

DOCUMENT = {
    "firstname": "Ada",
    "lastname": "Lovelace",
    "age": 36,
    "email": "ada@ex.org",
    "tags": ["math", "engine"],
    "active": True,
    "score": 12.5,
}
VERSION = 1
RECORDS = 1000
NAMES = [f"user/{number}" for number in range(RECORDS)]
CORES = {"fast": "dscache._fast", "pure": "dscache._pure"}

encode: Callable[[object], bytes] = msgspec.json.Encoder().encode
decode: Callable[[bytes], Any] = msgspec.json.Decoder().decode


def core(name: str) -> ModuleType:
    """Return the core of that name; a missing one must fail the run, not shorten the table."""
    return importlib.import_module(CORES[name])


@contextmanager
def chosen(name: str) -> Iterator[None]:
    """Let caches that are opened in this block have the core of that name."""
    with patch.multiple(_backend, core=core(name), BACKEND=name):
        yield


@contextmanager
def apart(server: EmbeddedServer) -> Iterator[str]:
    """Keep this process and the server on cores of their own; give a sentence that says so.

    Where there is one core, or the system can't pin a process, nothing is changed.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield "client and server where the system puts them"
        return
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        yield "client and server share one core"
        return
    ours, theirs, *_ = sorted(allowed)
    os.sched_setaffinity(server.pid, {theirs})
    os.sched_setaffinity(0, {ours})
    try:
        yield f"client on core {ours}, server on core {theirs}"
    finally:
        os.sched_setaffinity(0, allowed)


class Client(Protocol):
    """One of those that are compared. A raw read gives JSON text, a decoded one its value."""

    label: str

    async def connect(self, server: EmbeddedServer) -> None: ...
    async def close(self) -> None: ...
    def get(self, name: str) -> Awaitable[Any]: ...
    def get_decoded(self, name: str) -> Awaitable[Any]: ...
    def set(self, name: str) -> Awaitable[Any]: ...
    def get_bulk(self, names: Sequence[str]) -> Awaitable[Any]: ...
    def get_bulk_decoded(self, names: Sequence[str]) -> Awaitable[Any]: ...
    def set_bulk(self, names: Sequence[str]) -> Awaitable[Any]: ...


class Dscache:
    """An AsyncCache with one of the cores."""

    def __init__(self, core_name: str) -> None:
        self.label = f"dscache, {core_name} core"
        self._core = core_name

    async def connect(self, server: EmbeddedServer) -> None:
        # A busy machine may stop a benchmark for a while, which is no error.
        options = {"host": server.host, "port": server.port, "commandTimeout": 60_000}
        with chosen(self._core):
            self._cache = dscache.AsyncCache.from_config({"name": "redis", "options": options})
            await self._cache.when_ready()
        # As a server would call them: nothing of ours around the future.
        self.get = self._cache.get
        self.get_bulk = self._cache.get_bulk

    async def close(self) -> None:
        await self._cache.close()

    async def get_decoded(self, name: str) -> Any:
        record = await self._cache.get(name)
        assert record is not None
        return record.data

    def set(self, name: str) -> Awaitable[bool]:
        return self._cache.set(name, VERSION, DOCUMENT)

    async def get_bulk_decoded(self, names: Sequence[str]) -> dict[str, Any]:
        records = await self._cache.get_bulk(names)
        return {name: record.data for name, record in records.items()}

    def set_bulk(self, names: Sequence[str]) -> Awaitable[Any]:
        return self._cache.set_bulk(dict.fromkeys(names, (VERSION, DOCUMENT)))


class RedisPy:
    """redis-py's asyncio client with hiredis, on its default pool: a command per read or write.

    Its bulk is one MGET or MSET of all keys, the fastest that it has.
    """

    label = "redis-py, hiredis"

    async def connect(self, server: EmbeddedServer) -> None:
        # Its stubs give the results of all commands at once, which is of no use here.
        self._redis: Any = redis.asyncio.Redis(host=server.host, port=server.port)
        await self._redis.ping()

    async def close(self) -> None:
        await self._redis.aclose()

    async def get(self, name: str) -> tuple[int, bytes]:
        version, text = await self._redis.mget(name + "_v", name + "_d")
        return int(version), text

    async def get_decoded(self, name: str) -> tuple[int, Any]:
        version, text = await self._redis.mget(name + "_v", name + "_d")
        return int(version), decode(text)

    async def set(self, name: str) -> bool:
        written: bool = await self._redis.mset(
            {name + "_v": VERSION, name + "_d": encode(DOCUMENT)}
        )
        return written

    async def get_bulk(self, names: Sequence[str]) -> dict[str, tuple[int, bytes]]:
        values = await self._redis.mget(keys_of(names))
        return {
            name: (int(version), text)
            for name, version, text in zip(names, values[::2], values[1::2], strict=True)
        }

    async def get_bulk_decoded(self, names: Sequence[str]) -> dict[str, tuple[int, Any]]:
        values = await self._redis.mget(keys_of(names))
        return {
            name: (int(version), decode(text))
            for name, version, text in zip(names, values[::2], values[1::2], strict=True)
        }

    async def set_bulk(self, names: Sequence[str]) -> bool:
        values = [value for _ in names for value in (VERSION, encode(DOCUMENT))]
        written: bool = await self._redis.mset(dict(zip(keys_of(names), values, strict=True)))
        return written


class RedisPyPipelined(RedisPy):
    """The same, whose bulk is a pipeline of one command a record."""

    label = "redis-py, pipelined"

    async def get_bulk(self, names: Sequence[str]) -> dict[str, tuple[int, bytes]]:
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.mget(name + "_v", name + "_d")
        return {
            name: (int(version), text)
            for name, (version, text) in zip(names, await pipeline.execute(), strict=True)
        }

    async def get_bulk_decoded(self, names: Sequence[str]) -> dict[str, tuple[int, Any]]:
        records = await self.get_bulk(names)
        return {name: (version, decode(text)) for name, (version, text) in records.items()}

    async def set_bulk(self, names: Sequence[str]) -> bool:
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.mset({name + "_v": VERSION, name + "_d": encode(DOCUMENT)})
        return all(await pipeline.execute())


def keys_of(names: Sequence[str]) -> list[str]:
    """Return the keys of records, in the order in which a bulk asks for them."""
    return [key for name in names for key in (name + "_v", name + "_d")]


async def from_tasks(
    operation: Callable[[str], Awaitable[object]], tasks: int, records: int
) -> None:
    """Await ``operation`` for that many records altogether, from so many tasks at a time.

    Tasks in step have different names, as reads of one name in a tick would share one read.
    """

    async def task(number: int) -> None:
        first = number * 7
        for i in range(first, first + records // tasks):
            await operation(NAMES[i % RECORDS])

    await asyncio.gather(*(task(number) for number in range(tasks)))


async def repeatedly(operation: Callable[[Sequence[str]], Awaitable[object]], times: int) -> None:
    """Await a bulk ``operation`` on all names that many times, one after the other."""
    for _ in range(times):
        await operation(NAMES)
