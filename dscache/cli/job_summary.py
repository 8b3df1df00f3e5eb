"""Options and results that ``export``, ``import`` and ``migrate`` share."""

from __future__ import annotations

import gc
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import typer

from ..admin.key_layout import Layout
from ..admin.progress import JobProgress
from ..config import Config
from .options import flag
from .output import interruptible, print_json
from .settings import run

T = TypeVar("T")

STDIO = "-"
"""The FILE that stands for standard input or output."""
RESUMES = "the same command resumes"

RestartOption = Annotated[bool, flag("--restart", "Discard the progress of an earlier run.")]


def identity(config: Config) -> dict[str, str]:
    """Return which records a configuration means: server, database, layout and key prefix."""
    options = config.options
    return {
        "redis": config.address,
        "db": str(options.db),
        "layout": Layout.of(options).kind,
        "keyPrefix": options.key_prefix,
    }


def run_timed(work: Coroutine[Any, Any, T], hint: str) -> tuple[T, float]:
    """Run a coroutine; return its result and the seconds it took. ``hint`` is for Ctrl-C."""
    began = time.monotonic()
    thresholds = gc.get_threshold()
    # Each page makes thousands of objects and no cycles: collecting them as often as by default
    # takes a fifth of the processor time of an export.
    gc.set_threshold(20_000, *thresholds[1:])
    try:
        with interruptible(hint):
            result = run(work)
    finally:
        gc.set_threshold(*thresholds)
    return result, time.monotonic() - began


def conclude(
    summary: Mapping[str, object],
    words: Sequence[str],
    job: JobProgress,
    seconds: float,
    *,
    as_json: bool,
    err: bool = False,
) -> None:
    """Print the summary with the rate; raises typer.Exit with status 1 unless its ``ok`` is true.

    ``words`` state the result on a terminal; empty ones are left out. With ``err`` they go to
    standard error.
    """
    rate = round((job.records - job.resumed) / max(seconds, 0.001))
    if as_json:
        pace = {"resumed": job.resumed, "seconds": round(seconds, 3), "per_second": rate}
        print_json({**summary, **pace})
    else:
        result = ", ".join(filter(None, words))
        typer.echo(f"{result} ({seconds:.1f} s, {rate:,} a second)", err=err)
    if not summary["ok"]:
        raise typer.Exit(1)
