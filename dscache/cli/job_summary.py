"""Options and results that ``export`` and ``import`` share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from ..admin.key_layout import Layout
from ..admin.progress import JobProgress
from ..config import Config
from .options import FLAG
from .output import print_json

STDIO = "-"
"""The FILE that stands for standard input or output."""
RESUMES = "the same command resumes"

RestartOption = Annotated[
    bool,
    typer.Option("--restart", metavar=FLAG, help="Discard the progress of an earlier run."),
]


def identity(config: Config) -> dict[str, str]:
    """Return which records a configuration means: server, database, layout and key prefix."""
    options = config.options
    return {
        "redis": config.address,
        "db": str(options.db),
        "layout": Layout.of(options).kind,
        "keyPrefix": options.key_prefix,
    }


def position(job: JobProgress) -> Callable[[], tuple[int, int, int]]:
    """Return the function that a progress bar calls: done, total, and records of this run."""
    return lambda: (job.done, job.total, job.records - job.resumed)


def pace(job: JobProgress, began: float) -> dict[str, int | float]:
    """Return the seconds since ``began`` and the rate, as fields of the summary."""
    seconds = time.monotonic() - began
    return {
        "resumed": job.resumed,
        "seconds": round(seconds, 3),
        "per_second": round((job.records - job.resumed) / max(seconds, 0.001)),
    }


def conclude(summary: Mapping[str, Any], words: list[str], *, as_json: bool, err: bool) -> None:
    """Print the summary; raises typer.Exit with status 1 unless its ``ok`` is true.

    ``words`` state the result on a terminal. With ``err`` they go to standard error.
    """
    if as_json:
        print_json(summary)
    else:
        rate = f"{summary['seconds']:.1f} s, {summary['per_second']:,} a second"
        typer.echo(f"{', '.join(words)} ({rate})", err=err)
    if not summary["ok"]:
        raise typer.Exit(1)
