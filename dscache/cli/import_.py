"""``dscache import``: the records of a file into Redis."""

from __future__ import annotations

from contextlib import closing, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ..admin import ndjson
from ..admin.cache import open_cache
from ..admin.progress import JobProgress, save_nowhere, with_long_timeouts
from ..admin.restore import Import, ImportFile, ImportState
from ..core.constants import MAX_TTL
from ..errors import DscacheError
from .job_summary import RESUMES, STDIO, RestartOption, conclude, identity, run_timed
from .options import Chosen, IfNewerOption, flag, number_option, with_all_options
from .output import NOT_NEWER, complain, complain_of_all, number
from .progress_bar import progress
from .settings import read_input


@with_all_options
def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="File of an export; .gz is compressed, and - is standard input."
        ),
    ],
    if_newer: IfNewerOption = False,
    ttl: Annotated[
        int | None,
        number_option(
            int,
            "Lifetime of all records in place of that in their lines, 0 for none.",
            metavar="SECONDS",
            least=0,
            most=MAX_TTL,
            show_default=False,
        ),
    ] = None,
    keep_going: Annotated[bool, flag("--keep-going", "Skip lines that are not records.")] = False,
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
    stdin = read_input("FILE") if source is None else None
    config = with_long_timeouts(chosen.load())
    job = JobProgress(total=0 if source is None else source.length)

    async def work() -> ImportState:
        async with open_cache(config) as cache:
            of = identity(cache.config)
            import_run = Import(cache, job, ttl, if_newer=if_newer, keep_going=keep_going)
            with progress("import", job.position):
                if stdin is not None:
                    state = ImportState(of, 0, 0)
                    await import_run.run(stdin, state, save_nowhere, lambda: 0)
                    return state
                assert source is not None
                state = source.state(of, restart=restart)
                if state.line:
                    complain(f"resuming: skipped {number(state.line, 'line')} already imported")
                lines = ndjson.Lines(source.pieces(state.offset), str(file))
                try:
                    await import_run.run(lines, state, source.save, lambda: source.position)
                except DscacheError:
                    if source.saved:
                        done = number(state.line, "line")
                        complain(f"{done} imported; {source.saved} notes it for the next run")
                    raise
                source.finish()
                return state

    with nullcontext() if source is None else closing(source):
        state, seconds = run_timed(work(), "" if source is None else RESUMES)
    complain_of_all(job.notes, state.broken)
    summary = {
        "ok": not state.broken,
        "records": state.records,
        "not_newer": state.not_newer,
        "broken": state.broken,
    }
    words = [
        f"{number(state.records - state.not_newer, 'record')} imported",
        f"{state.not_newer:,} {NOT_NEWER}" if state.not_newer else "",
        f"{number(state.broken, 'broken line')} skipped" if state.broken else "",
    ]
    conclude(summary, words, job, seconds, as_json=chosen.as_json)
