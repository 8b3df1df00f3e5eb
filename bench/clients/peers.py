"""The compared clients, all with the same few methods, which are plain functions if one blocks.

``open`` takes the host and the port of a server and the options of a cache on it, ``get`` and
``set`` a name, ``get_many`` and ``set_many`` names. A read is both keys of a record, a write too,
and each client does it in its fastest way. Imports happen on demand: one may not be installed.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import dscache
from clients import messages
from clients.work import (
    DOCUMENT,
    KINDS,
    ORDINARY,
    PATIENCE_SECONDS,
    RECORDS,
    VERSION,
    WRITTEN,
    Work,
    chosen,
    decode,
    encode,
    keys_of,
    names_of,
)

MOST_CONNECTIONS = 100_000
MOST_KEPT = 100_000
TTL_SECONDS = 3600
# Keys that a server visits at a time, as dscache asks by default.
SCAN_COUNT = 1000
# For clients that take nothing else.
_BYTES = str(VERSION).encode()


Methods = tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[], Any]]
Connect = Callable[[str, int], Any]


class _Json:
    """The work that clients of plain Redis leave to the program: version and document."""

    blocking: ClassVar[bool] = False
    _version: int | str | bytes
    _document: object
    _value: Callable[[bytes], Any]
    _ttl: int | None = None
    _hashtag = False
    """Whether the keys are those of a cluster."""

    def prepare(self, work: Work) -> None:
        self._document = KINDS[work.kind].document
        # bytes of bytes are the same object: no copy, but what a program would write.
        self._value = decode if work.decode else bytes
        self._ttl = work.ttl

    def _keys(self, name: str) -> tuple[str, str]:
        if self._hashtag:
            return f"{{{name}}}_v", f"{{{name}}}_d"
        return name + "_v", name + "_d"

    def _record(self, values: Sequence[Any]) -> tuple[int, Any]:
        version, text = values
        return int(version), self._value(text)

    def _records(self, names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
        value = self._value
        return {
            name: (int(version), value(text))
            for name, version, text in zip(names, values[::2], values[1::2], strict=True)
        }

    def _pair(self, name: str) -> dict[str, Any]:
        return {name + "_v": self._version, name + "_d": encode(self._document)}

    def _pairs(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the pairs to write, each document encoded separately."""
        values = [value for _ in names for value in (self._version, encode(self._document))]
        return dict(zip(keys_of(names), values, strict=True))


class Soon(_Json):
    """A client of asyncio, whose own methods read and write keys: a command for each record."""

    def __init__(self, connect: Connect, version: int | str | bytes = VERSION) -> None:
        self._connect, self._version = connect, version

    async def open(self, where: dict[str, Any]) -> None:
        # The client's own methods, without a wrapper, and the one that closes it.
        self._read, self._write, self._end = await self._connect(where["host"], where["port"])

    async def get(self, name: str) -> Any:
        return self._record(await self._read(self._keys(name)))

    async def get_many(self, names: Sequence[str]) -> Any:
        return self._records(names, await self._read(keys_of(names)))

    async def set(self, name: str) -> Any:
        return await self._write(self._pair(name))

    async def set_many(self, names: Sequence[str]) -> Any:
        return await self._write(self._pairs(names))

    async def close(self) -> None:
        await self._end()


class Blocking(_Json):
    """The same of a client that blocks."""

    blocking: ClassVar[bool] = True

    def __init__(self, connect: Connect, version: int | str | bytes = VERSION) -> None:
        self._connect, self._version = connect, version

    def open(self, where: dict[str, Any]) -> None:
        self._read, self._write, self._end = self._connect(where["host"], where["port"])

    def get(self, name: str) -> Any:
        return self._record(self._read(self._keys(name)))

    def get_many(self, names: Sequence[str]) -> Any:
        return self._records(names, self._read(keys_of(names, self._hashtag)))

    def set(self, name: str) -> Any:
        return self._write(self._pair(name))

    def set_many(self, names: Sequence[str]) -> Any:
        return self._write(self._pairs(names))

    def close(self) -> None:
        self._end()


# -- dscache


class _Dscache:
    """Shared by AsyncCache and Cache: the records that are written, and raw operations."""

    _cache: Any
    _get_decoded: Callable[[str], Any]
    _get_many_decoded: Callable[[Sequence[str]], Any]

    def __init__(self, core: str, **options: Any) -> None:
        self._core = core
        self._options = options

    def _config(self, where: dict[str, Any]) -> dict[str, object]:
        """Return a configuration whose limits allow a million records."""
        limits = {
            "commandTimeout": PATIENCE_SECONDS * 1000,
            "connectTimeout": PATIENCE_SECONDS * 1000,
            "maxPending": 10_000_000,
            "maxPendingBytes": 1 << 33,
            "maxReplyBytes": 1 << 30,
        }
        return {"name": "redis", "options": {**where["options"], **limits, **self._options}}

    def prepare(self, work: Work) -> None:
        self._document = KINDS[work.kind].document
        self._how: dict[str, Any] = {"ttl": work.ttl} if work.ttl else {}
        if work.if_newer:
            self._how["if_newer"] = True
        # With if_newer each write must be newer than all before, those of other clients included,
        # or nothing would be written. No client writes faster than one a nanosecond. Writes that
        # are compared with those have as long versions: Redis keeps an object for each small one.
        self._versions = itertools.count(time.time_ns()) if work.kind == WRITTEN else None
        # Raw, as a server would call them: without a wrapper around the results.
        cache = self._cache
        self.get: Any = self._get_decoded if work.decode else cache.get
        self.get_many: Any = self._get_many_decoded if work.decode else cache.get_bulk

    def set(self, name: str) -> Any:
        return self._cache.set(name, self._version(), self._document, **self._how)

    def set_many(self, names: Sequence[str]) -> Any:
        pairs = dict.fromkeys(names, (self._version(), self._document))
        return self._cache.set_bulk(pairs, **self._how)

    def replace(self, name: str) -> Any:
        return self._cache.set(name, VERSION, self._document, if_version=VERSION)

    def read(self, name: str) -> Any:
        """Read a record through a method, as ``fetch`` of a benchmark needs one."""
        return self._cache.get(name)

    def fetch(self, name: str) -> Any:
        return self._cache.fetch(name, _no_load, ttl=TTL_SECONDS)

    def update(self, name: str) -> Any:
        return self._cache.update(name, _same)

    def _version(self) -> int:
        return VERSION if self._versions is None else next(self._versions)


def _no_load(name: str) -> None:
    raise AssertionError(f"{name} is missing")


def _same(data: Any) -> Any:
    return data


def _decoded(records: dict[str, Any]) -> dict[str, Any]:
    """Return the records after reading the ``.data`` of each, which they keep."""
    for record in records.values():
        _ = record.data
    return records


class Dscache(_Dscache):
    """An AsyncCache with one of the cores."""

    blocking: ClassVar[bool] = False

    async def open(self, where: dict[str, Any]) -> None:
        with chosen(self._core):
            self._cache = dscache.AsyncCache.from_config(self._config(where))
            self._opened(where)
            await self._cache.when_ready()

    def _opened(self, where: dict[str, Any]) -> None:
        """Prepare the cache before it connects."""

    async def _get_decoded(self, name: str) -> Any:
        record = await self._cache.get(name)
        assert record is not None
        return record.data

    async def rewrite(self, name: str) -> None:
        await self._cache.get(name)
        await self._cache.set(name, VERSION, self._document)

    async def scan(self, prefix: str) -> int:
        """Return how many names begin so."""
        return len([name async for name in self._cache.scan(prefix)])

    def watch(self, prefix: str) -> Any:
        return self._cache.watch(prefix)

    async def _get_many_decoded(self, names: Sequence[str]) -> dict[str, Any]:
        return _decoded(await self._cache.get_bulk(names))

    async def close(self) -> None:
        await self._cache.close()


class OneRecordACommand(Dscache):
    """The same on one server, whose connection is made like one to a node of a cluster."""

    def _opened(self, where: dict[str, Any]) -> None:
        from dscache.aio.cluster import Cluster
        from dscache.aio.connection import Connection
        from dscache.config import load

        # It redirects nothing, and so no cluster is needed.
        cluster: Any = object.__new__(Cluster)
        cluster.on_connected = cluster.on_disconnected = lambda node: None
        cluster.check_identity = lambda node, node_id: None
        cluster.check_timers = lambda: None
        connection = Connection(load(self._config(where)).options, cluster=cluster)
        self._cache._topology = connection
        self._cache._loop = asyncio.get_running_loop()


class DscacheBlocking(_Dscache):
    """A Cache with one of the cores."""

    blocking: ClassVar[bool] = True

    def open(self, where: dict[str, Any]) -> None:
        with chosen(self._core):
            self._cache = dscache.Cache.from_config(self._config(where))
            self._cache.when_ready()

    def _get_decoded(self, name: str) -> Any:
        record = self._cache.get(name)
        assert record is not None
        return record.data

    def rewrite(self, name: str) -> None:
        self._cache.get(name)
        self._cache.set(name, VERSION, self._document)

    def _get_many_decoded(self, names: Sequence[str]) -> dict[str, Any]:
        return _decoded(self._cache.get_bulk(names))

    def close(self) -> None:
        self._cache.close()


class Empty(_Json):
    """No client: awaiting an empty coroutine is the least that an awaited read can cost."""

    async def open(self, where: dict[str, Any]) -> None:
        """Connect to nothing."""

    async def get(self, name: str) -> None:
        """Return at once."""

    async def close(self) -> None:
        """Do nothing: nothing is open."""


# -- redis-py, and valkey-py, which began as a copy of it


class RedisPy(Soon):
    """redis-py's asyncio client with hiredis.

    Its pool is the default one, except that it may grow to a connection for each task.
    """

    def __init__(self, library: str = "redis", client: str = "Redis") -> None:
        super().__init__(self._open)
        self._library, self._class = library, client
        self._hashtag = client == "RedisCluster"

    async def _open(self, host: str, port: int) -> Methods:
        library = importlib.import_module(f"{self._library}.asyncio")
        # Its stubs give the results of all commands at once, which is of no use here.
        self._redis: Any = getattr(library, self._class)(
            host=host,
            port=port,
            max_connections=MOST_CONNECTIONS,
            socket_timeout=PATIENCE_SECONDS,
            socket_connect_timeout=PATIENCE_SECONDS,
        )
        await self._redis.ping()
        return self._redis.mget, self._redis.mset, self._redis.aclose

    def prepare(self, work: Work) -> None:
        super().prepare(work)
        self._write = self._set_with_ttl if work.ttl else self._redis.mset

    async def scan(self, prefix: str) -> int:
        """Return how many names begin so."""
        keys = self._redis.scan_iter(match=f"{prefix}*_v", count=SCAN_COUNT)
        return len([key async for key in keys])

    async def _set_with_ttl(self, pairs: dict[str, Any]) -> Any:
        # The only way to give all keys their TTL in one step, without a script.
        pipeline = self._redis.pipeline(transaction=True)
        for key, value in pairs.items():
            pipeline.set(key, value, ex=self._ttl)
        return await pipeline.execute()

    def pipelined(self, operation: str, arguments: Iterable[Any]) -> Any:
        """Return a pipeline of one command a record."""
        pipeline = self._redis.pipeline(transaction=False)
        for one in arguments:
            getattr(pipeline, operation)(one)
        return pipeline.execute()


class RedisPyPipelined(RedisPy):
    """redis-py's asyncio client, whose bulk is a pipeline of one command a record."""

    async def get_many(self, names: Sequence[str]) -> Any:
        found = await self.pipelined("mget", map(self._keys, names))
        return dict(zip(names, map(self._record, found), strict=True))

    async def set_many(self, names: Sequence[str]) -> Any:
        return await self.pipelined("mset", map(self._pair, names))


class RedisPyBlocking(Blocking):
    """redis-py's blocking client with hiredis."""

    pipelined: Callable[..., Any] = RedisPy.pipelined

    def __init__(
        self, library: str = "redis", client: str = "Redis", *, is_near: bool = False
    ) -> None:
        super().__init__(self._open)
        self._library, self._class, self._is_near = library, client, is_near
        self._hashtag = client == "RedisCluster"

    def _open(self, host: str, port: int) -> Methods:
        client = getattr(importlib.import_module(self._library), self._class)
        more: dict[str, Any] = {}
        if self._is_near:
            from redis.cache import CacheConfig
            from redis.connection import CacheProxyConnection

            # It asks for a server that calls itself Redis, though Valkey tracks in the same way.
            with client(host=host, port=port) as one:
                name = one.info("server").get("server_name", "redis")
            CacheProxyConnection.DEFAULT_SERVER_NAME = name
            more = {"protocol": 3, "cache_config": CacheConfig(max_size=MOST_KEPT)}
        self._redis: Any = client(host=host, port=port, socket_timeout=PATIENCE_SECONDS, **more)
        self._redis.ping()
        # MGET of a cluster's client takes the keys of one slot.
        read = self._redis.mget_nonatomic if self._hashtag else self._redis.mget
        return read, self._redis.mset, self._redis.close


class RedisPyBlockingPipelined(RedisPyBlocking):
    """redis-py's blocking client, whose bulk is a pipeline of one command a record."""

    def get_many(self, names: Sequence[str]) -> Any:
        found = self.pipelined("mget", map(self._keys, names))
        return dict(zip(names, map(self._record, found), strict=True))

    def set_many(self, names: Sequence[str]) -> Any:
        return self.pipelined("mset", map(self._pair, names))


# -- the others


async def coredis(host: str, port: int) -> Methods:
    """Connect coredis, whose client shares its connections between tasks."""
    import coredis

    client: Any = coredis.Redis(host=host, port=port)
    leave = asyncio.Event()
    entered = asyncio.get_running_loop().create_future()

    # It must be entered and left in the same task.
    async def stay() -> None:
        async with client:
            await client.ping()
            entered.set_result(None)
            await leave.wait()

    async def end() -> None:
        leave.set()
        await staying

    staying = asyncio.create_task(stay())
    await entered
    return client.mget, client.mset, end


async def glide(host: str, port: int) -> Methods:
    """Connect valkey-glide: threads in Rust drive one connection."""
    import glide

    config = glide.GlideClientConfiguration(
        [glide.NodeAddress(host, port)],
        request_timeout=PATIENCE_SECONDS * 1000,
        inflight_requests_limit=10_000_000,
    )
    client: Any = await glide.GlideClient.create(config)
    return client.mget, client.mset, client.close


def glide_blocking(host: str, port: int) -> Methods:
    import glide_sync

    config = glide_sync.GlideClientConfiguration(
        [glide_sync.NodeAddress(host, port)], request_timeout=PATIENCE_SECONDS * 1000
    )
    client: Any = glide_sync.GlideClient.create(config)
    return client.mget, client.mset, client.close


async def ruvio(host: str, port: int) -> Methods:
    """Connect ruvio-client: one connection for all tasks, and hiredis for the replies."""
    import ruvio.asyncio

    client: Any = ruvio.asyncio.Ruvio(host, port, decode_responses=False)
    await client.ping()
    return client.mget, client.mset, client.aclose


def ruvio_blocking(host: str, port: int) -> Methods:
    import ruvio

    client: Any = ruvio.Ruvio(host, port, decode_responses=False)
    client.ping()
    return client.mget, client.mset, client.close


async def redis_rs(host: str, port: int) -> Methods:
    """Connect redis-rs by its package for Python: threads in Rust drive the connections."""
    import redis_rs

    client = redis_rs.create_client(f"redis://{host}:{port}")
    execute = (await client.__aenter__()).execute
    await execute("PING")
    return (
        lambda keys: execute("MGET", *keys),
        lambda pairs: execute("MSET", *itertools.chain(*pairs.items())),
        lambda: client.__aexit__(None, None, None),
    )


async def aiocache(host: str, port: int) -> Methods:
    """Connect aiocache, which is built on redis-py; msgspec's JSON replaces its own."""
    import aiocache
    from aiocache.serializers import NullSerializer

    cache: Any = aiocache.RedisCache(
        endpoint=host,
        port=port,
        serializer=NullSerializer(encoding=None),
        timeout=PATIENCE_SECONDS,
        pool_max_size=MOST_CONNECTIONS,
        connection_pool_kwargs={"socket_timeout": PATIENCE_SECONDS},
        create_connection_timeout=PATIENCE_SECONDS,
    )
    await cache.exists("")
    # Its own close calls a deprecated method of redis-py.
    end = cache.client.aclose
    return cache.multi_get, lambda pairs: cache.multi_set(list(pairs.items())), end


def _vcache(host: str, port: int, kept: int = 0) -> Any:
    """Connect django-vcache's driver in Rust, which its cache for Django wraps."""
    from django_vcache._driver import RustValkeyDriver

    near = {"cache_max_size": kept, "cache_ttl_secs": 3600} if kept else {}
    return RustValkeyDriver.connect(f"redis://{host}:{port}/0", **near)


async def vcache(host: str, port: int) -> Methods:
    driver = _vcache(host, port)
    return driver.mget, lambda pairs: driver.pipeline_set(list(pairs.items()), None), _nothing


async def _nothing() -> None:
    """Do nothing: the driver has no method that closes it."""


def vcache_near(host: str, port: int) -> Methods:
    driver = _vcache(host, port, MOST_KEPT)
    write = driver.pipeline_set_sync
    return driver.mget_sync, lambda pairs: write(list(pairs.items()), None), lambda: None


class VcacheOneKey(_Json):
    """django-vcache's near cache, and half of the work: the documents alone, by a key each."""

    blocking: ClassVar[bool] = True

    def open(self, where: dict[str, Any]) -> None:
        self._driver = _vcache(where["host"], where["port"], MOST_KEPT)

    def get(self, name: str) -> Any:
        return self._value(self._driver.get_sync(name + "_d"))

    def get_many(self, names: Sequence[str]) -> Any:
        return [self.get(name) for name in names]

    def close(self) -> None:
        """Do nothing: the driver has no method that closes it."""


class Cashews(_Json):
    """cashews with its client-side cache, on entries of its own: a version and a text in each."""

    async def open(self, where: dict[str, Any]) -> None:
        import cashews

        cache: Any = cashews.Cache()
        cache.setup(f"redis://{where['host']}:{where['port']}", client_side=True)
        record = VERSION, encode(KINDS[ORDINARY].document)
        await cache.set_many(dict.fromkeys(names_of(ORDINARY, RECORDS), record))
        self.get, self.close = cache.get, cache.close


class Store:
    """A store of py-key-value, which keeps values of its own under the names of records."""

    blocking: ClassVar[bool] = False

    def __init__(self, connect: Callable[[str], Any]) -> None:
        self._connect = connect

    async def open(self, where: dict[str, Any]) -> None:
        self._store = await self._connect(f"redis://{where['host']}:{where['port']}").__aenter__()
        self.get, self.get_many = self._store.get, self._store.get_many
        await self.set_many(names_of(ORDINARY))

    def prepare(self, work: Work) -> None:
        self._ttl = work.ttl

    def set(self, name: str) -> Any:
        return self._store.put(name, DOCUMENT, ttl=self._ttl)

    async def set_many(self, names: Sequence[str]) -> None:
        await self._store.put_many(names, [DOCUMENT] * len(names))

    async def close(self) -> None:
        await self._store.__aexit__(None, None, None)


def record_store(url: str, **options: Any) -> Any:
    from dscache.key_value import RecordStore

    return RecordStore(url, **options)


def redis_store(url: str) -> Any:
    from key_value.aio.stores.redis import RedisStore

    return RedisStore(url=url)


# -- all of them


@dataclass(frozen=True)
class Python:
    """A client in Python: its label in a table, and its class."""

    label: str
    create: Callable[[], Any]
    package: str = "dscache"
    """Its name for pip; without it the client is left out, and the run says so."""
    uvloop: bool = True


PYTHON: dict[str, Python] = {
    "fast": Python("dscache", lambda: Dscache("fast")),
    "fast-asyncio": Python("dscache, asyncio's loop", lambda: Dscache("fast"), uvloop=False),
    "pure": Python("dscache, pure core", lambda: Dscache("pure")),
    "fast-near": Python("dscache, near cache", lambda: Dscache("fast", nearCache=True)),
    "pure-near": Python("dscache, pure core, near cache", lambda: Dscache("pure", nearCache=True)),
    "fast-single": Python("dscache, 1 record a command", lambda: OneRecordACommand("fast")),
    "blocking": Python("dscache.Cache", lambda: DscacheBlocking("fast")),
    "blocking-pure": Python("dscache.Cache, pure core", lambda: DscacheBlocking("pure")),
    "blocking-near": Python(
        "dscache.Cache, near cache", lambda: DscacheBlocking("fast", nearCache=True)
    ),
    "blocking-pure-near": Python(
        "dscache.Cache, pure core, near cache", lambda: DscacheBlocking("pure", nearCache=True)
    ),
    "fast-node": Python("dscache.MessageNode", lambda: messages.Nodes("fast")),
    "pure-node": Python("dscache.MessageNode, pure core", lambda: messages.Nodes("pure")),
    "record-store": Python("dscache's RecordStore", lambda: Store(record_store)),
    "record-store-near": Python(
        "dscache's RecordStore, near cache",
        lambda: Store(partial(record_store, prefix="near/", near_cache=True)),
    ),
    "redis-store": Python(
        "py-key-value's RedisStore", lambda: Store(redis_store), "py-key-value-aio"
    ),
    "empty": Python("an empty coroutine", Empty),
    "redis-py": Python("redis-py asyncio", RedisPy, "redis"),
    "redis-py-pipelined": Python("redis-py asyncio, pipeline", RedisPyPipelined, "redis"),
    "redis-py-cluster": Python(
        "redis-py RedisCluster", lambda: RedisPy(client="RedisCluster"), "redis"
    ),
    "redis-py-node": Python("redis-py, publish and listen", messages.RedisPy, "redis"),
    "redis-py-blocking": Python("redis-py", RedisPyBlocking, "redis"),
    "redis-py-blocking-near": Python(
        "redis-py, client-side cache", lambda: RedisPyBlocking(is_near=True), "redis"
    ),
    "redis-py-blocking-pipelined": Python("redis-py, pipeline", RedisPyBlockingPipelined, "redis"),
    "redis-py-blocking-cluster": Python(
        "redis-py RedisCluster", lambda: RedisPyBlocking(client="RedisCluster"), "redis"
    ),
    "valkey-py": Python(
        "valkey-py asyncio, libvalkey", lambda: RedisPy("valkey", "Valkey"), "libvalkey"
    ),
    "valkey-py-blocking": Python(
        "valkey-py, libvalkey", lambda: RedisPyBlocking("valkey", "Valkey"), "libvalkey"
    ),
    "coredis": Python("coredis", lambda: Soon(coredis), "coredis"),
    "glide": Python("valkey-glide", lambda: Soon(glide, str(VERSION)), "valkey-glide"),
    "glide-blocking": Python(
        "valkey-glide sync", lambda: Blocking(glide_blocking, str(VERSION)), "valkey-glide-sync"
    ),
    "ruvio": Python("ruvio-client asyncio", lambda: Soon(ruvio), "ruvio-client"),
    "ruvio-blocking": Python("ruvio-client", lambda: Blocking(ruvio_blocking), "ruvio-client"),
    "redis-rs": Python("redis-rs", lambda: Soon(redis_rs), "redis-rs"),
    "aiocache": Python("aiocache", lambda: Soon(aiocache), "aiocache"),
    "cashews": Python("cashews, client_side", Cashews, "cashews"),
    "vcache": Python("django-vcache", lambda: Soon(vcache, _BYTES), "django-vcache"),
    "vcache-blocking-near": Python(
        "django-vcache, near cache", lambda: Blocking(vcache_near, _BYTES), "django-vcache"
    ),
    "vcache-blocking-near-one": Python(
        "django-vcache, near cache, one key", VcacheOneKey, "django-vcache"
    ),
}
