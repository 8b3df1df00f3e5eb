"""The compared clients: one class for each, all with the same few methods.

A read is both keys of a record, a write too, and each client does it in its fastest way. Imports
happen on demand, as a client may not be installed.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import dscache
from workload import KINDS, VERSION, Work, chosen, decode, encode, keys_of

# A busy machine may stop a benchmark for a while, which is no error.
PATIENCE_SECONDS = 600
# The same for redis-py. Both have a default there, so they cause no more work.
PATIENCE: dict[str, Any] = {
    "socket_timeout": PATIENCE_SECONDS,
    "socket_connect_timeout": PATIENCE_SECONDS,
}
MOST_CONNECTIONS = 100_000
Decoder = Callable[[bytes], Any]


class Peer(Protocol):
    """One client of a server. If it blocks, its methods are plain functions."""

    blocking: ClassVar[bool]

    def open(self, host: str, port: int) -> Any: ...
    def prepare(self, work: Work) -> None:
        """Prepare a measurement: the document, its TTL, and whether to decode it."""

    def get(self, name: str) -> Any: ...
    def get_many(self, names: Sequence[str]) -> Any: ...
    def set(self, name: str) -> Any: ...
    def set_many(self, names: Sequence[str]) -> Any: ...
    def close(self) -> Any: ...


class _Json:
    """The work that clients of plain Redis leave to the program: version and document."""

    blocking: ClassVar[bool] = False
    _document: object
    _value: Decoder
    _ttl: int | None = None

    def prepare(self, work: Work) -> None:
        self._document = KINDS[work.kind].document
        # bytes of bytes are the same object: no copy, but what a program would write.
        self._value = decode if work.decode else bytes
        self._ttl = work.ttl

    def _record(self, values: Sequence[Any]) -> tuple[int, Any]:
        version, text = values
        return int(version), self._value(text)

    def _records(self, names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
        value = self._value
        return {
            name: (int(version), value(text))
            for name, version, text in zip(names, values[::2], values[1::2], strict=True)
        }

    def _pairs(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the pairs to write, each document encoded separately."""
        values = [value for _ in names for value in (VERSION, encode(self._document))]
        return dict(zip(keys_of(names), values, strict=True))

    def _texts(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return the same for a client that takes no numbers."""
        version = b"%d" % VERSION
        values = [value for _ in names for value in (version, encode(self._document))]
        return dict(zip(keys_of(names), values, strict=True))


# -- dscache


def _options(host: str, port: int) -> dict[str, object]:
    """Return a configuration whose limits allow a million records."""
    patience = PATIENCE_SECONDS * 1000
    options = {
        "host": host,
        "port": port,
        "commandTimeout": patience,
        "connectTimeout": patience,
        "maxPending": 10_000_000,
        "maxPendingBytes": 1 << 33,
        "maxReplyBytes": 1 << 30,
    }
    return {"name": "redis", "options": options}


def _decoded(records: dict[str, Any]) -> dict[str, Any]:
    """Return the records after reading the ``.data`` of each, which they keep."""
    for record in records.values():
        _ = record.data
    return records


class _Dscache:
    """Shared by AsyncCache and Cache: the records that are written, and raw operations."""

    _cache: Any
    _get_decoded: Callable[[str], Any]
    _get_many_decoded: Callable[[Sequence[str]], Any]

    def __init__(self, core_name: str) -> None:
        self._core = core_name

    def prepare(self, work: Work) -> None:
        self._document = KINDS[work.kind].document
        self._how: dict[str, Any] = {}
        if work.ttl:
            self._how["ttl"] = work.ttl
        if work.if_newer:
            self._how["if_newer"] = True
        # With if_newer each write must be newer than all before, those of other clients included,
        # or nothing would be written. No client writes faster than one a nanosecond.
        self._versions = itertools.count(time.time_ns()) if work.if_newer else None
        # Raw, as a server would call them: without a wrapper around the results.
        cache = self._cache
        self.get: Any = self._get_decoded if work.decode else cache.get
        self.get_many: Any = self._get_many_decoded if work.decode else cache.get_bulk

    def set(self, name: str) -> Any:
        return self._cache.set(name, self._version(), self._document, **self._how)

    def set_many(self, names: Sequence[str]) -> Any:
        return self._cache.set_bulk(self._all(names), **self._how)

    def _version(self) -> int:
        return VERSION if self._versions is None else next(self._versions)

    def _all(self, names: Sequence[str]) -> dict[str, tuple[int, object]]:
        return dict.fromkeys(names, (self._version(), self._document))


class Dscache(_Dscache):
    """An AsyncCache with one of the cores."""

    blocking: ClassVar[bool] = False

    async def open(self, host: str, port: int) -> None:
        with chosen(self._core):
            self._cache = dscache.AsyncCache.from_config(_options(host, port))
            await self._cache.when_ready()

    async def _get_decoded(self, name: str) -> Any:
        record = await self._cache.get(name)
        assert record is not None
        return record.data

    async def _get_many_decoded(self, names: Sequence[str]) -> dict[str, Any]:
        return _decoded(await self._cache.get_bulk(names))

    async def close(self) -> None:
        await self._cache.close()


class DscacheBlocking(_Dscache):
    """A Cache with one of the cores."""

    blocking: ClassVar[bool] = True

    def open(self, host: str, port: int) -> None:
        with chosen(self._core):
            self._cache = dscache.Cache.from_config(_options(host, port))
            self._cache.when_ready()

    def _get_decoded(self, name: str) -> Any:
        record = self._cache.get(name)
        assert record is not None
        return record.data

    def _get_many_decoded(self, names: Sequence[str]) -> dict[str, Any]:
        return _decoded(self._cache.get_bulk(names))

    def close(self) -> None:
        self._cache.close()


# -- redis-py


class RedisPy(_Json):
    """redis-py's asyncio client with hiredis: a command a record, and one command a bulk.

    Its pool is the default one, except that it may grow to a connection for each task.
    """

    async def open(self, host: str, port: int) -> None:
        import redis.asyncio

        # Its stubs give the results of all commands at once, which is of no use here.
        self._redis: Any = redis.asyncio.Redis(
            host=host, port=port, max_connections=MOST_CONNECTIONS, **PATIENCE
        )
        await self._redis.ping()

    async def get(self, name: str) -> Any:
        return self._record(await self._redis.mget(name + "_v", name + "_d"))

    async def get_many(self, names: Sequence[str]) -> Any:
        return self._records(names, await self._redis.mget(keys_of(names)))

    async def set(self, name: str) -> Any:
        text = encode(self._document)
        if self._ttl is None:
            return await self._redis.mset({name + "_v": VERSION, name + "_d": text})
        return await self._set_with_ttl({name + "_v": VERSION, name + "_d": text})

    async def set_many(self, names: Sequence[str]) -> Any:
        pairs = self._pairs(names)
        return await (self._redis.mset(pairs) if self._ttl is None else self._set_with_ttl(pairs))

    async def _set_with_ttl(self, pairs: dict[str, Any]) -> Any:
        # The only way to give all keys their TTL in one step, without a script.
        pipeline = self._redis.pipeline(transaction=True)
        for key, value in pairs.items():
            pipeline.set(key, value, ex=self._ttl)
        return await pipeline.execute()

    async def close(self) -> None:
        await self._redis.aclose()


class RedisPyPipelined(RedisPy):
    """The same, whose bulk is a pipeline of one command a record."""

    async def get_many(self, names: Sequence[str]) -> Any:
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.mget(name + "_v", name + "_d")
        found = await pipeline.execute()
        return dict(zip(names, map(self._record, found), strict=True))

    async def set_many(self, names: Sequence[str]) -> Any:
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.mset({name + "_v": VERSION, name + "_d": encode(self._document)})
        return await pipeline.execute()


class RedisPyBlocking(_Json):
    """redis-py's blocking client with hiredis: a command a record, and one command a bulk."""

    blocking: ClassVar[bool] = True

    def open(self, host: str, port: int) -> None:
        import redis

        self._redis: Any = redis.Redis(host=host, port=port, **PATIENCE)
        self._redis.ping()

    def get(self, name: str) -> Any:
        return self._record(self._redis.mget(name + "_v", name + "_d"))

    def get_many(self, names: Sequence[str]) -> Any:
        return self._records(names, self._redis.mget(keys_of(names)))

    def set(self, name: str) -> Any:
        return self._redis.mset({name + "_v": VERSION, name + "_d": encode(self._document)})

    def set_many(self, names: Sequence[str]) -> Any:
        return self._redis.mset(self._pairs(names))

    def close(self) -> None:
        self._redis.close()


class RedisPyBlockingPipelined(RedisPyBlocking):
    """The same, whose bulk is a pipeline of one command a record."""

    def get_many(self, names: Sequence[str]) -> Any:
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.mget(name + "_v", name + "_d")
        return dict(zip(names, map(self._record, pipeline.execute()), strict=True))

    def set_many(self, names: Sequence[str]) -> Any:
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.mset({name + "_v": VERSION, name + "_d": encode(self._document)})
        return pipeline.execute()


# -- the others


class Coredis(_Json):
    """coredis, whose client shares its connections between tasks."""

    async def open(self, host: str, port: int) -> None:
        import coredis

        self._redis: Any = coredis.Redis(host=host, port=port)
        # It must be entered and left in the same task.
        self._leave = asyncio.Event()
        entered = asyncio.get_running_loop().create_future()
        self._stay = asyncio.create_task(self._inside(entered))
        await entered

    async def _inside(self, entered: asyncio.Future[None]) -> None:
        try:
            async with self._redis:
                await self._redis.ping()
                entered.set_result(None)
                await self._leave.wait()
        except Exception as error:
            if entered.done():
                raise
            entered.set_exception(error)

    async def get(self, name: str) -> Any:
        return self._record(await self._redis.mget([name + "_v", name + "_d"]))

    async def get_many(self, names: Sequence[str]) -> Any:
        return self._records(names, await self._redis.mget(keys_of(names)))

    async def set(self, name: str) -> Any:
        return await self._redis.mset({name + "_v": VERSION, name + "_d": encode(self._document)})

    async def set_many(self, names: Sequence[str]) -> Any:
        return await self._redis.mset(self._pairs(names))

    async def close(self) -> None:
        self._leave.set()
        await self._stay


class Glide(_Json):
    """valkey-glide's asyncio client: threads in Rust drive one connection."""

    async def open(self, host: str, port: int) -> None:
        import glide

        at = [glide.NodeAddress(host, port)]
        wait = PATIENCE_SECONDS * 1000
        how = glide.GlideClientConfiguration(
            at, request_timeout=wait, inflight_requests_limit=10_000_000
        )
        self._client: Any = await glide.GlideClient.create(how)

    async def get(self, name: str) -> Any:
        return self._record(await self._client.mget([name + "_v", name + "_d"]))

    async def get_many(self, names: Sequence[str]) -> Any:
        return self._records(names, await self._client.mget(keys_of(names)))

    async def set(self, name: str) -> Any:
        text = encode(self._document)
        return await self._client.mset({name + "_v": str(VERSION), name + "_d": text})

    async def set_many(self, names: Sequence[str]) -> Any:
        return await self._client.mset(self._texts(names))

    async def close(self) -> None:
        await self._client.close()


class GlideBlocking(_Json):
    """valkey-glide's blocking client."""

    blocking: ClassVar[bool] = True

    def open(self, host: str, port: int) -> None:
        import glide_sync

        at = [glide_sync.NodeAddress(host, port)]
        wait = PATIENCE_SECONDS * 1000
        how = glide_sync.GlideClientConfiguration(at, request_timeout=wait)
        self._client: Any = glide_sync.GlideClient.create(how)

    def get(self, name: str) -> Any:
        return self._record(self._client.mget([name + "_v", name + "_d"]))

    def get_many(self, names: Sequence[str]) -> Any:
        return self._records(names, self._client.mget(keys_of(names)))

    def set(self, name: str) -> Any:
        text = encode(self._document)
        return self._client.mset({name + "_v": str(VERSION), name + "_d": text})

    def set_many(self, names: Sequence[str]) -> Any:
        return self._client.mset(self._texts(names))

    def close(self) -> None:
        self._client.close()


class Aiocache(_Json):
    """aiocache, which is built on redis-py. It uses msgspec's JSON instead of its own."""

    async def open(self, host: str, port: int) -> None:
        import aiocache
        from aiocache.serializers import NullSerializer

        plain = NullSerializer(encoding=None)
        self._cache: Any = aiocache.RedisCache(
            endpoint=host,
            port=port,
            serializer=plain,
            timeout=PATIENCE_SECONDS,
            pool_max_size=MOST_CONNECTIONS,
            connection_pool_kwargs={"socket_timeout": PATIENCE_SECONDS},
            create_connection_timeout=PATIENCE_SECONDS,
        )
        await self._cache.exists("")

    async def get(self, name: str) -> Any:
        return self._record(await self._cache.multi_get([name + "_v", name + "_d"]))

    async def get_many(self, names: Sequence[str]) -> Any:
        return self._records(names, await self._cache.multi_get(keys_of(names)))

    async def set(self, name: str) -> Any:
        text = encode(self._document)
        return await self._cache.multi_set([(name + "_v", VERSION), (name + "_d", text)])

    async def set_many(self, names: Sequence[str]) -> Any:
        return await self._cache.multi_set(list(self._pairs(names).items()))

    async def close(self) -> None:
        # Its own close calls a deprecated method of redis-py.
        await self._cache.client.aclose()


# -- all of them


@dataclass(frozen=True)
class Python:
    """A client in Python: its label in a table, and its class."""

    label: str
    create: Callable[[], Peer]
    package: str
    """What pip calls it; without it the client is left out, and the table says so."""
    uvloop: bool = True

    @property
    def version(self) -> str:
        """Return its version. Raises PackageNotFoundError if it isn't installed."""
        return importlib.metadata.version(self.package)


PYTHON: dict[str, Python] = {
    "fast": Python("dscache", lambda: Dscache("fast"), "dscache"),
    "fast-asyncio": Python(
        "dscache, asyncio's loop", lambda: Dscache("fast"), "dscache", uvloop=False
    ),
    "pure": Python("dscache, pure core", lambda: Dscache("pure"), "dscache"),
    "blocking": Python("dscache.Cache", lambda: DscacheBlocking("fast"), "dscache"),
    "blocking-pure": Python("dscache.Cache, pure core", lambda: DscacheBlocking("pure"), "dscache"),
    "redis-py": Python("redis-py asyncio", RedisPy, "redis"),
    "redis-py-pipelined": Python("redis-py asyncio, pipeline", RedisPyPipelined, "redis"),
    "redis-py-blocking": Python("redis-py", RedisPyBlocking, "redis"),
    "redis-py-blocking-pipelined": Python("redis-py, pipeline", RedisPyBlockingPipelined, "redis"),
    "coredis": Python("coredis", Coredis, "coredis"),
    "glide": Python("valkey-glide", Glide, "valkey-glide"),
    "glide-blocking": Python("valkey-glide sync", GlideBlocking, "valkey-glide-sync"),
    "aiocache": Python("aiocache", Aiocache, "aiocache"),
}
