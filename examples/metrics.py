"""A small program with a load, and its metrics for Prometheus.

    python examples/metrics.py --port 9100
    curl http://127.0.0.1:9100/metrics

It starts a private server unless --url names one, and runs until Ctrl-C. It needs the extras
``prometheus`` and ``embedded``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys

from prometheus_client import start_http_server

import dscache
from dscache.embedded import EmbeddedServer
from dscache.prometheus import register

USERS = 1000


def visited(data: dict[str, int]) -> dict[str, int]:
    return {"visits": data["visits"] + 1}


async def visit(cache: dscache.AsyncCache) -> None:
    """Change one user and read some others, like a visitor of a site."""
    user = f"user/{random.randrange(USERS)}"
    await cache.update(user, visited, default={"visits": 0}, ttl=60)
    await cache.get_bulk(f"user/{random.randrange(USERS)}" for _ in range(20))


async def work(url: str, port: int) -> None:
    async with dscache.AsyncCache.from_config(url) as cache:
        register(cache, "users")
        try:
            server, _ = start_http_server(port, "127.0.0.1")
        except OSError as error:
            sys.exit(f"metrics.py: no port {port}: {error.strerror}; choose another by --port")
        print(f"curl http://127.0.0.1:{server.server_port}/metrics", flush=True)
        while True:
            await asyncio.gather(*(visit(cache) for _ in range(10)))
            await asyncio.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--port", type=int, default=9100, help="port of the metrics; 0 for a free one"
    )
    parser.add_argument("--url", help="URL of a Redis in place of a private server")
    options = parser.parse_args()
    if not 0 <= options.port <= 65535:
        parser.error(f"--port must be from 0 to 65535, not {options.port}")
    try:
        with contextlib.ExitStack() as stack, contextlib.suppress(KeyboardInterrupt):
            url = options.url or stack.enter_context(EmbeddedServer()).url
            asyncio.run(work(url, options.port))
    except dscache.DscacheError as error:  # no Redis at the URL, for example
        sys.exit(f"metrics.py: {error}")


if __name__ == "__main__":
    main()
