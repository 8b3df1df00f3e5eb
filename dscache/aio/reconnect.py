"""The pauses between attempts to connect: exponential backoff, shortened while operations wait."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ..config import RetryStrategy
from ..net.backoff import MAX_PAUSE_WHILE_WAITING, full_jitter, half_jitter
from .deadlines import wait_at_most

if TYPE_CHECKING:
    from ..core.pure import Pipeline


class Reconnect:
    """The pauses between attempts to connect, on behalf of the operations of a pipeline."""

    def __init__(self, strategy: RetryStrategy, pipeline: Pipeline) -> None:
        self._first = strategy.first / 1000
        self._cap = strategy.cap / 1000
        self._pipeline = pipeline
        self._failures = 0
        # Set when an operation finds no connection.
        self._wanted = asyncio.Event()

    def expedite(self) -> None:
        """Shorten the pause: an operation has found no connection."""
        self._wanted.set()

    async def pause(self, *, was_well: bool, is_refused: bool) -> None:
        """Wait before the next attempt.

        Pass ``was_well`` if the last connection was of use for a while, and ``is_refused`` if the
        server has refused it.
        """
        if was_well:
            self._failures = 0
        jitter = half_jitter if is_refused else full_jitter
        seconds = jitter(self._first, self._cap, self._failures)
        self._failures += 1
        shortened = min(seconds, full_jitter(MAX_PAUSE_WHILE_WAITING, MAX_PAUSE_WHILE_WAITING, 0))
        # Operations fail at once while the server refuses: none waits for the next refusal.
        if is_refused or shortened == seconds:
            await asyncio.sleep(seconds)
            return
        await asyncio.sleep(shortened)
        # A connection for messages is always wanted.
        if not self._pipeline.queued and self._pipeline.inbox is None:
            self._wanted.clear()
            await wait_at_most(self._wanted, seconds - shortened)
