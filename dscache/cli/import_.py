"""``dscache import``: the records of a file into Redis."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ..admin import ndjson
from ..admin.cache import open_cache
from ..admin.progress import JobProgress, with_long_timeouts
from ..admin.restore import Import, ImportFile, ImportState
from .by_name import STDIN
from .job_summary import RESUMES, STDIO, RestartOption, conclude, identity, pace, position
from .options import FLAG, Chosen, with_all_options
from .output import complain, complain_of_all, interruptible, number
from .progress_bar import progress
from .settings import require_input, run


@with_all_options
def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="File of an export; .gz is compressed, and - is standard input."
        ),
    ],
    if_newer: Annotated[
        bool,
        typer.Option(
            "--if-newer", metavar=FLAG, help="Write only records newer than the stored ones."
        ),
    ] = False,
    ttl: Annotated[
        int | None,
        typer.Option(
            metavar="SECONDS",
            help="Lifetime of all records in place of that in their lines, 0 for none.",
            min=0,
            show_default=False,
        ),
    ] = None,
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", metavar=FLAG, help="Skip lines that are not records."),
    ] = False,
    restart: RestartOption = False,
    *,
    chosen: Chosen,
) -> None:
    """Write the records of a file, in the order of its lines.

    A line is {"name": ..., "version": ..., "data": ...}, and may have "ttl" in seconds. Without
    --if-newer, it replaces records of any version. After an interruption, the same command
    resumes. The exit status is 1 if there are lines that are not records.
    """
    source = None if str(file) == STDIO else ImportFile(file)
    if source is None:
        require_input("FILE")
    config = with_long_timeouts(chosen.load())
    job = JobProgress(total=0 if source is None else source.length)

    async def work() -> None:
        async with open_cache(config) as cache:
            of = identity(cache.config)
            import_run = Import(cache, job, ttl=ttl, if_newer=if_newer, keep_going=keep_going)
            async with progress("import", position(job)):
                if source is None:
                    lines = ndjson.Lines(ndjson.pieces_of(sys.stdin.fileno()), STDIN)
                    await import_run.run(lines, ImportState(of, 0, 0), None, lambda: 0)
                    return
                state = source.state(of, restart=restart)
                if state.line:
                    complain(f"resuming after line {state.line:,}")
                lines = ndjson.Lines(source.pieces(state.offset), str(file))
                await import_run.run(lines, state, source.save, lambda: source.position)
                source.finish()

    began = time.monotonic()
    try:
        with interruptible(RESUMES if source is not None else ""):
            run(work())
    finally:
        if source is not None:
            source.close()
    complain_of_all(job.notes, job.broken)
    summary = {
        "ok": not job.broken,
        "records": job.records,
        "not_newer": job.not_newer,
        "broken": job.broken,
        **pace(job, began),
    }
    words = [
        f"{number(job.records - job.not_newer, 'record')} imported",
        *([f"{job.not_newer:,} not newer"] if job.not_newer else []),
        *([f"{number(job.broken, 'broken line')} skipped"] if job.broken else []),
    ]
    conclude(summary, words, as_json=chosen.as_json, err=False)
