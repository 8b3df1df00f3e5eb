"""How far long work is: a bar on a terminal's standard error, and nothing anywhere else."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_EVERY = 0.2


@asynccontextmanager
async def progress(what: str, look: Callable[[], tuple[int, int, int]]) -> AsyncIterator[None]:
    """Show a bar meanwhile; ``look`` returns what is done, of how much, and how many records.

    The records are those of this run, by which the rate is told.
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
    task = bar.add_task(what, total=None, records=0, rate=0)

    def show() -> None:
        done, total, records = look()
        rate = records / max(time.monotonic() - began, 0.001)
        bar.update(task, completed=done, total=total or None, records=records, rate=rate)

    async def keep_showing() -> None:
        while True:
            await asyncio.sleep(_EVERY)
            show()

    with bar:
        showing = asyncio.create_task(keep_showing())
        try:
            yield
        finally:
            showing.cancel()
            show()
