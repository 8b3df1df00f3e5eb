"""``RecordStore`` beside py-key-value's own RedisStore, in turns against one private server.

``python bench/stores.py [ROUNDS]``. 100 tasks call at a time. Each round measures every store,
and the medians of the rounds are shown, so that a busy machine slows all stores alike.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from statistics import median

from key_value.aio.protocols import AsyncKeyValue
from key_value.aio.stores.redis import RedisStore

from dscache.embedded import EmbeddedServer
from dscache.key_value import RecordStore

TASKS = 100
KEYS = [f"key{number}" for number in range(1000)]
VALUE = {"name": "Ada Lovelace", "visits": 17, "tags": ["a", "b"], "active": True}
JOBS: dict[str, Callable[[AsyncKeyValue, str], Awaitable[object]]] = {
    "get": lambda store, key: store.get(key),
    "put": lambda store, key: store.put(key, VALUE),
    "put with a ttl": lambda store, key: store.put(key, VALUE, ttl=600),
    "get_many of 100": lambda store, key: store.get_many(KEYS[:100]),
}


async def rate(job: str, store: AsyncKeyValue, calls: int) -> float:
    """Return the calls a second, of tasks with ``calls`` calls each."""
    call = JOBS[job]

    async def work(number: int) -> None:
        for turn in range(calls):
            await call(store, KEYS[(number * calls + turn) % len(KEYS)])

    began = time.perf_counter()
    await asyncio.gather(*map(work, range(TASKS)))
    return TASKS * calls / (time.perf_counter() - began)


async def main(rounds: int) -> None:
    """Measure every job with every store, and print the medians."""
    with EmbeddedServer() as server:
        async with (
            RecordStore(server.url) as ours,
            RecordStore(server.url, prefix="near/", near_cache=True) as near,
            RedisStore(url=server.url) as theirs,
        ):
            stores = {"RecordStore": ours, "with near cache": near, "RedisStore": theirs}
            for store in stores.values():
                await store.put_many(KEYS, [VALUE] * len(KEYS))
                await rate("get", store, 1)  # RedisStore opens a connection for each task
            print(f"{'calls/s':20}" + "".join(f"{name:>18}" for name in stores) + f"{'ratio':>8}")
            for job in JOBS:
                calls = 1 if "many" in job else 20
                rates: dict[str, list[float]] = {name: [] for name in stores}
                for _ in range(rounds):
                    for name, store in stores.items():
                        # Of the faster ones more, so that a round of each takes long enough.
                        times = 1 if store is theirs or calls == 1 else 5
                        rates[name].append(await rate(job, store, calls * times))
                medians = [median(one) for one in rates.values()]
                shown = "".join(f"{one:18,.0f}" for one in medians)
                print(f"{job:20}{shown}{medians[0] / medians[-1]:7.1f}x", flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 11))
