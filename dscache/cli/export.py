"""``dscache export``: all records of a prefix into a file."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ..admin.cache import open_cache
from ..admin.export import Export, ExportState, Sink, Target
from ..admin.key_layout import Layout
from ..admin.primaries import open_primaries
from ..admin.progress import JobProgress, with_long_timeouts
from .job_summary import RESUMES, STDIO, RestartOption, conclude, identity, pace, position
from .options import Chosen, with_all_options
from .output import complain, complain_of_all, interruptible, number
from .progress_bar import progress
from .settings import run


@with_all_options
def export(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="File to write; .gz compresses it, and - is standard output."
        ),
    ],
    prefix: Annotated[
        str, typer.Option(metavar="PREFIX", help="Only records whose names begin with it.")
    ] = "",
    restart: RestartOption = False,
    *,
    chosen: Chosen,
) -> None:
    """Write all records into a file, one JSON object a line.

    The servers stay in use: a record written or deleted during the export may be missing, and a
    record may appear twice. After an interruption, the same command resumes. The exit status is 1
    if records could not be exported.
    """
    to_stdout = str(file) == STDIO
    target = None if to_stdout else Target(file)
    if target is not None and file.exists() and not restart:
        raise typer.BadParameter(f"{file} exists already; --restart replaces it", param_hint="FILE")
    if target is not None and not file.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {file.parent}", param_hint="FILE")
    config = with_long_timeouts(chosen.load())
    job = JobProgress()

    async def work() -> None:
        async with open_cache(config) as cache, open_primaries(cache) as primaries:
            if restart and target is not None:
                target.discard()
            layout = Layout.of(cache.config.options)
            of = {**identity(cache.config), "prefix": prefix}
            state = target.state() if target is not None else None
            if state is not None and state.of != of:
                raise typer.BadParameter(
                    f"an unfinished export of other records is there ({_shown(state.of)}); "
                    "--restart discards it",
                    param_hint="FILE",
                )
            export_run = Export(cache, primaries, layout, prefix, job)
            if state is not None:
                complain(f"resuming after {number(state.records, 'record')}")
            async with progress("export", position(job)):
                if target is None:
                    await export_run.run(
                        Sink(sys.stdout.buffer, compressed=False, durable=False),
                        ExportState(of),
                        None,
                    )
                else:
                    with target.open(state) as sink:
                        await export_run.run(sink, state or ExportState(of), target.save)
        if target is not None:
            target.finish()

    began = time.monotonic()
    with interruptible(RESUMES if target is not None else ""):
        run(work())
    complain_of_all(job.notes, job.damaged)
    for warning in job.warnings:
        complain(f"warning: {warning}")
    summary = {
        "ok": not job.damaged and not job.warnings,
        "records": job.records,
        "halves": job.halves,
        "damaged": job.damaged,
        "warnings": job.warnings,
        **pace(job, began),
    }
    words = [
        f"{number(job.records, 'record')} exported",
        *([f"{number(job.halves, 'half', 'halves')} left out"] if job.halves else []),
        *([f"{job.damaged:,} damaged left out"] if job.damaged else []),
    ]
    conclude(summary, words, as_json=chosen.as_json and not to_stdout, err=to_stdout)


def _shown(of: dict[str, str]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in of.items())
