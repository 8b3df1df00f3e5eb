"""A demo of dscache on a private server that ends with it.

It writes some thousand named Unicode characters as records, reads them back, compares them and
shows them with redis-py. The last part measures dscache and redis-py on the same records.

    make demo
    python examples/demo.py --records 500 --seconds 0.05
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import platform
import statistics
import sys
import tempfile
import time
import unicodedata
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import redis.asyncio

import dscache
from dscache.embedded import EmbeddedServer

CONFIG = """\
cache:
  name: redis
  options:
    host: 127.0.0.1
    port: ${REDIS_PORT:-6379}
"""
TASKS = 100
BULK = 1000
ROUNDS = 5


def characters(count: int) -> dict[str, dict[str, Any]]:
    """Return the first ``count`` named characters, as names of records and their data."""
    found: dict[str, dict[str, Any]] = {}
    for code in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(code), "")
        if name and len(found) < count:
            found[f"char/U+{code:04X}"] = {
                "char": chr(code),
                "name": name,
                "category": unicodedata.category(chr(code)),
                "width": unicodedata.east_asian_width(chr(code)),
                "decomposition": unicodedata.decomposition(chr(code)).split(),
                "number": unicodedata.numeric(chr(code), None),
            }
    return found


# -- output


def headline(text: str) -> None:
    print(f"\n{text}")


def line(what: str, result: object) -> None:
    print(f"  {what:40} {result}")


async def timed(what: str, operation: Awaitable[Any], count: int, outcome: str) -> Any:
    """Await an operation on ``count`` records; print its outcome and its time."""
    began = time.perf_counter()
    result = await operation
    seconds = time.perf_counter() - began
    number = result if isinstance(result, int) else len(result)
    text = outcome.format(f"{number:,}")
    line(what, f"{text:24} {seconds * 1000:8.1f} ms {seconds / count * 1e6:7.2f} µs/record")
    return result


# -- the parts


async def one_record(cache: dscache.AsyncCache) -> None:
    headline("One record")
    ada = {"firstname": "Ada", "lastname": "Lovelace"}
    line("set user/1, version 3", await cache.set("user/1", 3, ada))
    record = await cache.get("user/1")
    assert record is not None
    assert record.data == ada
    line("get user/1: version and data", f"{record.version}, {record.data}")
    line("get user/2, which there is not", await cache.get("user/2"))
    line("head user/1: the version alone", await cache.head("user/1"))
    stale = await cache.set("user/1", 2, {}, if_newer=True)
    newer = await cache.set("user/1", 4, {**ada, "born": 1815}, if_newer=True)
    assert (stale, newer) == (False, True)
    line("set version 2, if newer", f"{stale}: refused, Redis holds version 3")
    line("set version 4, if newer", newer)
    try:
        await cache.set("user/1", -1, {})
    except dscache.RecordError as error:
        line("set version -1", "RecordError, nothing was sent:")
        print(f"    {error}")


async def in_redis(redis_py: Any) -> None:
    headline("What Redis holds, as redis-py reads it")
    for key in ("user/1_v", "user/1_d"):
        line(f"GET {key}", await redis_py.get(key))


async def expiry(cache: dscache.AsyncCache, redis_py: Any) -> None:
    headline("A record that expires")
    line("set session/9 with ttl=1", await cache.set("session/9", 1, {"user": 1}, ttl=1))
    async with redis_py.pipeline(transaction=True) as pipeline:
        left = await pipeline.pttl("session/9_v").pttl("session/9_d").execute()
    line("PTTL of both keys, set in one step", f"{left[0]} ms, {left[1]} ms")
    line("get session/9 at once", await cache.get("session/9"))
    await asyncio.sleep(1.1)
    gone = await cache.get("session/9")
    assert gone is None
    line("get session/9 after 1.1 s", gone)


async def in_bulk(cache: dscache.AsyncCache, data: dict[str, dict[str, Any]]) -> None:
    count = len(data)
    size = sum(len(msgspec.json.encode(one)) for one in data.values()) / count
    headline(f"{count:,} records in bulk: Unicode's characters, {size:.0f} bytes of JSON each")
    first = {name: (1, one) for name, one in data.items()}
    await timed("set_bulk", cache.set_bulk(first), count, "{} refused")
    found = await timed("get_bulk, JSON left as it is", cache.get_bulk(data), count, "{} found")
    began = time.perf_counter()
    equal = sum(found[name].data == one for name, one in data.items())
    took = time.perf_counter() - began
    assert equal == count
    each = f"{took * 1000:8.1f} ms {took / count * 1e6:7.2f} µs/record"
    line("every .data decoded and compared", f"{f'{equal:,} equal':24} {each}")
    await timed("head_bulk", cache.head_bulk(data), count, "{} versions")
    # Write version 2 of every second record, then of all that don't have it yet.
    second = {name: (2, one) for name, one in list(data.items())[::2]}
    await timed(
        "set_bulk, version 2 of every second", cache.set_bulk(second), count // 2, "{} refused"
    )
    all_of_them = {name: (2, one) for name, one in data.items()}
    refused = await timed(
        "set_bulk, version 2 of all, if newer",
        cache.set_bulk(all_of_them, if_newer=True, ttl=3600),
        count,
        "{} refused",
    )
    assert refused == set(second)


async def removal(cache: dscache.AsyncCache, data: dict[str, dict[str, Any]]) -> None:
    headline("The end")
    count = await timed("delete_bulk", cache.delete_bulk(data), len(data), "{} deleted")
    assert count == len(data)
    stats = cache.stats()
    reads, writes, commands = stats["reads"], stats["writes"], stats["commands"]
    line("stats", f"{reads:,} records read, {writes:,} written, in {commands:,} commands")
    assert stats["pending"] == 0


# -- the comparison


class Measured:
    """A way to read records, and its records per second in each round."""

    def __init__(self, label: str, read: Callable[[], Awaitable[None]], records: int) -> None:
        self.label = label
        self.rates: list[float] = []
        self._read = read
        self._records = records

    async def rate(self, seconds: float) -> float:
        """Read repeatedly for some seconds; return the records per second."""
        began = time.perf_counter()
        count = 0
        while (took := time.perf_counter() - began) < seconds or not count:
            await self._read()
            count += self._records
        return count / took


async def comparison(
    cache: dscache.AsyncCache, redis_py: Any, names: list[str], seconds: float
) -> None:
    headline(f"Records per second, the same ones for both (median of {ROUNDS} interleaved rounds)")
    decode = msgspec.json.decode
    keys = [key for name in names for key in (f"{name}_v", f"{name}_d")]

    def tasks(get: Callable[[str], Awaitable[object]]) -> Callable[[], Awaitable[None]]:
        # Each task reads its own names, one after the other.
        async def task(own: list[str]) -> None:
            for name in own:
                await get(name)

        shares = [names[i::TASKS] for i in range(TASKS)]

        async def read() -> None:
            await asyncio.gather(*map(task, shares))

        return read

    async def get_decoded(name: str) -> object:
        record = await cache.get(name)
        return record and record.data

    async def mget(name: str) -> object:
        version, text = await redis_py.mget(f"{name}_v", f"{name}_d")
        return int(version), decode(text)

    async def bulk() -> None:
        await cache.get_bulk(names)

    async def bulk_decoded() -> None:
        records = await cache.get_bulk(names)
        _ = [record.data for record in records.values()]

    async def one_mget() -> None:
        values = await redis_py.mget(keys)
        _ = [(int(v), decode(d)) for v, d in zip(values[::2], values[1::2], strict=True)]

    async def pipelined() -> None:
        pipeline = redis_py.pipeline(transaction=False)
        for name in names:
            pipeline.mget(f"{name}_v", f"{name}_d")
        _ = [(int(v), decode(d)) for v, d in await pipeline.execute()]

    # The last entry of each group is the base of the comparison.
    groups: dict[str, list[tuple[str, Callable[[], Awaitable[None]]]]] = {
        f"One at a time, from {TASKS} tasks": [
            ("dscache: await get", tasks(cache.get)),
            ("dscache: await get, .data decoded", tasks(get_decoded)),
            ("redis-py: await mget of both keys, decoded", tasks(mget)),
        ],
        f"{len(names):,} names at once": [
            ("dscache: get_bulk", bulk),
            ("dscache: get_bulk, every .data decoded", bulk_decoded),
            ("redis-py: a pipeline of mget, decoded", pipelined),
            ("redis-py: one mget of all keys, decoded", one_mget),
        ],
    }
    measured = {
        title: [Measured(label, read, len(names)) for label, read in entries]
        for title, entries in groups.items()
    }
    everyone = [one for entries in measured.values() for one in entries]
    for one in everyone:
        await one.rate(0)  # warm up
    for _ in range(ROUNDS):
        for one in everyone:
            one.rates.append(await one.rate(seconds))
    for title, entries in measured.items():
        print(f"  {title}")
        base = statistics.median(entries[-1].rates)
        for one in entries:
            median = statistics.median(one.rates)
            print(f"    {one.label:42} {median:12,.0f} records/s {median / base:6.1f} x")


def opened(server: EmbeddedServer) -> dscache.AsyncCache:
    """Return a cache configured by a file; ``async with`` connects it."""
    os.environ["REDIS_PORT"] = str(server.port)
    headline(f"config.yml, with REDIS_PORT={server.port}")
    print("".join(f"  {text}\n" for text in CONFIG.splitlines()), end="")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yml")
        path.write_text(CONFIG, encoding="utf-8")
        return dscache.AsyncCache.from_config(path)


async def demo(
    cache: dscache.AsyncCache, server: EmbeddedServer, records: int, seconds: float
) -> None:
    data = characters(records)
    async with cache, redis.asyncio.Redis(host=server.host, port=server.port) as redis_py:
        print(f"  That is the {cache.description}.")
        await one_record(cache)
        await in_redis(redis_py)
        await expiry(cache, redis_py)
        await in_bulk(cache, data)
        await comparison(cache, redis_py, list(data)[:BULK], seconds)
        await removal(cache, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--records", type=int, default=5000, help="number of records to write and read (5000)"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.2, help="duration of each measurement (0.2)"
    )
    options = parser.parse_args()
    if options.records < TASKS or options.seconds <= 0:
        parser.error(f"--records must be at least {TASKS}, --seconds above 0")
    if sys.stdout is None:
        sys.exit("demo.py: standard output is closed")
    try:
        run(options.records, options.seconds)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit("demo.py: interrupted")
    except dscache.DscacheError as error:  # no server is installed, for example
        sys.exit(f"demo.py: {error}")
    except OSError as error:
        # Otherwise Python would write the rest of the output when it exits, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        is_left = isinstance(error, BrokenPipeError)  # by a reader such as head
        sys.exit(1 if is_left else f"demo.py: standard output can't be written: {error.strerror}")


def run(records: int, seconds: float) -> None:
    loop = "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"
    with EmbeddedServer() as server:
        print(
            f"{server.binary.name}, Python {platform.python_version()}, {loop}, "
            f"dscache with its {dscache.BACKEND} core, redis-py {redis.__version__} with hiredis"
        )
        importlib.import_module(loop).run(demo(opened(server), server, records, seconds))


if __name__ == "__main__":
    main()
