"""A wheel is complete: tested on each machine that a release is built for, without a server."""

import asyncio
import inspect
from contextlib import closing

import pytest

import dscache


def test_the_wheel_has_the_compiled_core() -> None:
    assert dscache.BACKEND == "fast"
    assert type(dscache.Record("a", 1, b"[]")).__module__ == "dscache._fast"


def test_records_in_memory(dscache_memory: dscache.AsyncCache) -> None:
    async def main() -> None:
        assert await dscache_memory.set("user/1", 3, {"firstname": "Ada"})
        assert not await dscache_memory.set("user/1", 3, {}, if_newer=True)
        record = await dscache_memory.get("user/1")
        assert (record.version, record.data) == (3, {"firstname": "Ada"})

    asyncio.run(main())


def test_an_absent_server() -> None:
    options = {"port": 1, "commandTimeout": 500}
    config = {"name": "redis", "options": options}

    async def main() -> None:
        cache = dscache.AsyncCache.from_config(config)
        try:
            with pytest.raises(dscache.ConnectError):
                await cache.get("user/1")
        finally:
            await cache.close()

    asyncio.run(main())
    with closing(dscache.Cache.from_config(config)) as cache, pytest.raises(dscache.ConnectError):
        cache.get("user/1")


def test_everything_public_is_documented() -> None:
    for name in set(dscache.__all__) - {"BACKEND", "__version__"}:
        assert inspect.getdoc(getattr(dscache, name)), name
