"""A progress bar on standard error, if that is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class _JobBar(Progress):
    """A bar that asks for the position of the job each time it is drawn."""

    def __init__(self, title: str, position: Callable[[], tuple[int, int, int]]) -> None:
        self._position = position
        self._began = time.monotonic()
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[records]:,} records"),
            TextColumn("{task.fields[rate]:,.0f}/s"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            refresh_per_second=5,
            expand=True,
            transient=True,
        )
        self.add_task(title, total=None, records=0, rate=0)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the parts to draw."""
        done, total, records = self._position()
        rate = records / max(time.monotonic() - self._began, 0.001)
        for task in self.task_ids:
            self.update(task, completed=done, total=total or None, records=records, rate=rate)
        return super().get_renderables()


def progress(
    title: str, position: Callable[[], tuple[int, int, int]]
) -> AbstractContextManager[object]:
    """Show a progress bar during a block, drawn by a thread of rich.

    ``position`` returns the work done, the total (0 if unknown) and the records of this run, which
    give the rate.
    """
    return _JobBar(title, position) if sys.stderr.isatty() else nullcontext()
