"""``dscache export``: all records of a prefix into a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..admin.cache import open_cache
from ..admin.export import Export, ExportState, Sink, Target
from ..admin.primaries import open_primaries
from ..admin.progress import JobProgress, save_nowhere, with_long_timeouts
from .job_summary import RESUMES, STDIO, RestartOption, conclude, identity, run_timed
from .options import Chosen, PrefixOption, with_all_options
from .output import complain, complain_of_all, number
from .progress_bar import progress


@with_all_options
def export(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="File to write; .gz compresses it, and - is standard output."
        ),
    ],
    prefix: PrefixOption = "",
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
    if not to_stdout and file.exists() and not file.is_file():
        # The finished export would replace a device, such as /dev/null.
        raise typer.BadParameter(
            f"{file} isn't a file but a folder or a device; name a file, or - for standard output",
            param_hint="FILE",
        )
    target = None if to_stdout else Target(file)
    if target is not None and file.exists() and not restart:
        raise typer.BadParameter(f"{file} exists already; --restart replaces it", param_hint="FILE")
    if target is not None and not file.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {file.parent}", param_hint="FILE")
    config = with_long_timeouts(chosen.load())
    job = JobProgress()

    async def work() -> None:
        async with open_cache(config) as cache, open_primaries(cache) as primaries:
            export_run = Export(cache, primaries, prefix, job)
            of = {**identity(cache.config), "prefix": prefix}
            if target is None:
                sink = Sink(sys.stdout.buffer, compressed=False, durable=False)
                with progress("export", job.position):
                    await export_run.run(sink, ExportState(of), save_nowhere)
                return
            state = target.state(of, restart=restart)
            if state.of != of:
                others = ", ".join(f"{name} {value!r}" for name, value in state.of.items())
                raise typer.BadParameter(
                    f"an unfinished export of other records is there ({others}); "
                    "--restart discards it",
                    param_hint="FILE",
                )
            if state.cursor:
                complain(f"resuming: skipped {number(state.records, 'record')} already exported")
            with progress("export", job.position), target.open(state) as sink:
                await export_run.run(sink, state, target.save)
                target.finish()

    _, seconds = run_timed(work(), "" if to_stdout else RESUMES)
    complain_of_all(job.notes, job.damaged)
    summary = {
        "ok": not job.damaged,
        "records": job.records,
        "halves": job.halves,
        "damaged": job.damaged,
    }
    words = [
        f"{number(job.records, 'record')} exported",
        f"{number(job.halves, 'half', 'halves')} of a record left out" if job.halves else "",
        f"{job.damaged:,} damaged left out" if job.damaged else "",
    ]
    conclude(summary, words, job, seconds, as_json=chosen.as_json and not to_stdout, err=to_stdout)
