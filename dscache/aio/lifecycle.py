"""Resources of an event loop: ``async with``, and the checks of their loop and process."""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from ..errors import UsageError


class AsyncResource(ABC):
    """A resource that ``async with`` waits for, and closes."""

    @abstractmethod
    async def when_ready(self) -> None:
        """Wait until it is ready; raises the error that keeps it from that."""

    @abstractmethod
    async def close(self) -> None:
        """Finish the operations under way, and close; a second call does nothing."""

    async def __aenter__(self) -> Self:
        try:
            await self.when_ready()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def running_loop(owner: str) -> asyncio.AbstractEventLoop:
    """Return the event loop on which the owner opens; raises UsageError if none runs."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise UsageError(f"{owner} opens on the event loop that runs, and none does") from None


def check_process(pid: int, owner: str) -> None:
    """Raise UsageError unless this process is the one in which the owner was made."""
    if os.getpid() != pid:
        raise UsageError(f"{owner} can't be used after a fork; open one in the child")


def check_loop(loop: asyncio.AbstractEventLoop, owner: str) -> None:
    """Raise UsageError unless ``loop``, which is the owner's, is the one that is running."""
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is not loop:
        raise UsageError(
            f"{owner} belongs to the event loop it was opened on, and was used from "
            f"{'another one' if running else 'outside of it'}; open one in each loop"
        )
