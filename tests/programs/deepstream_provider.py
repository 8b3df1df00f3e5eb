"""A peer that provides an RPC and dies of a signal.

    python -m tests.programs.deepstream_provider PORT NAME RPC

It answers with its own name after a moment, and is ready once it has printed a line.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from dscache.deepstream import Peer


async def main(port: str, name: str, rpc: str) -> None:
    redis = {"name": "redis", "options": {"host": "127.0.0.1", "port": int(port)}}
    times = {"options": {"keepAliveInterval": 500, "nodeInactiveTimeout": 2000}}
    config: dict[str, Any] = {"cache": redis, "clusterNode": redis, "clusterRegistry": times}
    async with Peer.from_config(config, server_name=name) as peer:

        async def answer(data: Any) -> str:
            await asyncio.sleep(0 if data is None else data)
            return name

        peer.rpc.provide(rpc, answer)
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
