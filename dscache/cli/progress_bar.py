"""A progress bar on standard error, if that is a terminal."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_INTERVAL = 0.2  # seconds


@asynccontextmanager
async def progress(title: str, position: Callable[[], tuple[int, int, int]]) -> AsyncIterator[None]:
    """Show a progress bar during the block.

    ``position`` returns the work done, the total (0 if unknown) and the records of this run, which
    give the rate.
    """
    if not sys.stderr.isatty():
        yield
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[records]:,} records"),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        expand=True,
        transient=True,
    )
    began = time.monotonic()
    task = bar.add_task(title, total=None, records=0, rate=0)

    def show() -> None:
        done, total, records = position()
        rate = records / max(time.monotonic() - began, 0.001)
        bar.update(task, completed=done, total=total or None, records=records, rate=rate)

    async def keep_showing() -> None:
        while True:
            await asyncio.sleep(_INTERVAL)
            show()

    with bar:
        showing = asyncio.create_task(keep_showing())
        try:
            yield
        finally:
            showing.cancel()
            show()
