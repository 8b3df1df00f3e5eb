"""The cache ``name: memory`` on an event loop."""

from __future__ import annotations

import asyncio
from typing import Any

from ..config import Options
from ..core.memory import NO_CONNECTIONS, MemoryPipeline
from .lifecycle import check_loop


class MemoryNode:
    """Takes the place of a Connection: always ready until it is closed."""

    server = ""

    def __init__(self, options: Options) -> None:
        loop = asyncio.get_running_loop()
        self.pipeline = MemoryPipeline(
            loop.create_future, lambda: check_loop(loop, "an AsyncCache"), options.ttl
        )
        # No near cache: the records are in memory already.
        self.entry = self.pipeline

    @property
    def is_ready(self) -> bool:
        return not self.pipeline.closed

    async def when_ready(self) -> None:
        """Return at once; raises UsageError if it was closed."""
        self.pipeline.check_open()

    async def close(self) -> None:
        self.pipeline.close()

    def stats(self) -> dict[str, Any]:
        return {**self.pipeline.stats(), **NO_CONNECTIONS}
