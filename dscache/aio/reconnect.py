"""When a Connection tries again to connect: ever later, but soon if somebody waits for it."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from ..config import RetryStrategy

# While operations wait for a connection, attempts are no further apart, in seconds.
_WANTED_DELAY = 0.25


class Reconnect:
    """The pauses between attempts to connect, on behalf of the operations of a pipeline."""

    def __init__(self, strategy: RetryStrategy, pipeline: Any) -> None:
        self._strategy = strategy
        self._pipeline = pipeline
        self._failures = 0
        # Set when an operation finds no connection.
        self._wanted = asyncio.Event()

    def expedite(self) -> None:
        """Note that an operation finds no connection."""
        self._wanted.set()

    async def pause(self, *, was_well: bool, is_refused: bool) -> None:
        """Wait before the next attempt.

        The last one ``was_well`` if its connection was of use for a while, and ``is_refused`` if
        the server has said no.
        """
        if was_well:
            self._failures = 0
        # Full jitter: the clients of a server that restarts must not come all at once.
        longest = min(self._strategy.cap, self._strategy.first * 2**self._failures) / 1000
        self._failures = min(self._failures + 1, 30)
        seconds = random.uniform(longest / 2 if is_refused else 0, longest)
        hurried = min(seconds, random.uniform(0, _WANTED_DELAY))
        # Of a server that refuses, nobody waits for the next refusal.
        if is_refused or hurried == seconds:
            await asyncio.sleep(seconds)
            return
        await asyncio.sleep(hurried)
        # Who listens waits all the time.
        if not self._pipeline.queued and self._pipeline.inbox is None:
            self._wanted.clear()
            try:
                async with asyncio.timeout(seconds - hurried):
                    await self._wanted.wait()
            except TimeoutError:
                return
