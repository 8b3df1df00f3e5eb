"""``dscache export`` and ``dscache import``: all records of a prefix into a file, and back."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..admin import ndjson
from ..admin.export import Export, ExportState, Sink, Target
from ..admin.key_layout import Layout
from ..admin.primaries import open_primaries
from ..admin.progress import JobProgress, with_long_timeouts
from ..admin.restore import Import, ImportFile, ImportState
from ..config import Config
from .options import FLAG, Chosen, with_all_options
from .progress_bar import progress
from .settings import (
    complain,
    interruptible,
    number,
    opened,
    print_json,
    require_input,
    run,
    tell_notes,
)

_STDIO = "-"
_AGAIN = "the same command goes on from here"

RestartOption = Annotated[
    bool,
    typer.Option("--restart", metavar=FLAG, help="Begin anew, whatever an earlier run has left."),
]


@with_all_options
def export(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Where to; .gz is compressed, and - is standard output."
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

    Servers go on meanwhile: what is written or deleted during the export may be in it or not, and
    a record may be in it twice. Interrupted, the same command goes on where it was. The exit
    status is 1 if there are records that could not be exported.
    """
    to_stdout = str(file) == _STDIO
    target = None if to_stdout else Target(file)
    if target is not None and file.exists() and not restart:
        raise typer.BadParameter(
            f"{file} is there already; --restart replaces it", param_hint="FILE"
        )
    if target is not None and not file.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {file.parent}", param_hint="FILE")
    settings = with_long_timeouts(chosen.load())
    tally = JobProgress()

    async def work() -> None:
        async with opened(settings) as cache, open_primaries(cache) as shards:
            if restart and target is not None:
                target.discard()
            found = Layout.of(cache.config.options)
            of = {**_identity(cache.config), "prefix": prefix}
            state = target.state() if target is not None else None
            if state is not None and state.of != of:
                raise typer.BadParameter(
                    f"an unfinished export of other records goes there ({_shown(state.of)}); "
                    "--restart discards it",
                    param_hint="FILE",
                )
            job = Export(cache, shards, found, prefix, tally)
            if state is not None:
                complain(f"going on behind {number(state.records, 'record')}")
            async with progress("export", _look(tally)):
                if target is None:
                    await job.run(
                        Sink(sys.stdout.buffer, compressed=False, durable=False),
                        ExportState(of),
                        None,
                    )
                else:
                    with target.open(state) as sink:
                        await job.run(sink, state or ExportState(of), target.save)
        if target is not None:
            target.finish()

    began = time.monotonic()
    with interruptible(_AGAIN if target is not None else ""):
        run(work())
    tell_notes(tally.notes, tally.damaged)
    for warning in tally.warnings:
        complain(f"warning: {warning}")
    summary = {
        "ok": not tally.damaged and not tally.warnings,
        "records": tally.records,
        "halves": tally.halves,
        "damaged": tally.damaged,
        "warnings": tally.warnings,
        **_pace(tally, began),
    }
    words = [
        f"{number(tally.records, 'record')} exported",
        *([f"{number(tally.halves, 'half', 'halves')} left out"] if tally.halves else []),
        *([f"{tally.damaged:,} damaged left out"] if tally.damaged else []),
    ]
    _conclude(summary, words, as_json=chosen.as_json and not to_stdout, err=to_stdout)


@with_all_options
def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="What export wrote; .gz is compressed, and - is standard input."
        ),
    ],
    if_newer: Annotated[
        bool,
        typer.Option(
            "--if-newer", metavar=FLAG, help="Write only what is newer than what is stored."
        ),
    ] = False,
    ttl: Annotated[
        int | None,
        typer.Option(
            metavar="SECONDS",
            help="Lifetime of all records in place of what their lines say, 0 for none.",
            min=0,
            show_default=False,
        ),
    ] = None,
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", metavar=FLAG, help="Pass over lines that are no records."),
    ] = False,
    restart: RestartOption = False,
    *,
    chosen: Chosen,
) -> None:
    """Write the records of a file, in the order of its lines.

    A line is {"name": ..., "version": ..., "data": ...}, and may have "ttl" in seconds. Without
    --if-newer, a record is replaced whatever its version is. Interrupted, the same command goes on
    where it was. The exit status is 1 if there are lines that are no records.
    """
    source = None if str(file) == _STDIO else ImportFile(file)
    if source is None:
        require_input("FILE")
    settings = with_long_timeouts(chosen.load())
    tally = JobProgress(total=0 if source is None else source.length)

    async def work() -> None:
        async with opened(settings) as cache:
            of = _identity(cache.config)
            job = Import(cache, tally, ttl=ttl, if_newer=if_newer, keep_going=keep_going)
            async with progress("import", _look(tally)):
                if source is None:
                    lines = ndjson.Lines(ndjson.pieces_of(sys.stdin.fileno()), "standard input")
                    await job.run(lines, ImportState(of, 0, 0), None, lambda: 0)
                    return
                state = source.state(of, restart=restart)
                if state.line:
                    complain(f"going on behind line {state.line:,}")
                lines = ndjson.Lines(source.pieces(state.offset), str(file))
                await job.run(lines, state, source.save, lambda: source.position)
                source.finish()

    began = time.monotonic()
    try:
        with interruptible(_AGAIN if source is not None else ""):
            run(work())
    finally:
        if source is not None:
            source.close()
    tell_notes(tally.notes, tally.broken)
    summary = {
        "ok": not tally.broken,
        "records": tally.records,
        "not_newer": tally.not_newer,
        "broken": tally.broken,
        **_pace(tally, began),
    }
    words = [
        f"{number(tally.records - tally.not_newer, 'record')} imported",
        *([f"{tally.not_newer:,} not newer"] if tally.not_newer else []),
        *([f"{number(tally.broken, 'broken line')} passed over"] if tally.broken else []),
    ]
    _conclude(summary, words, as_json=chosen.as_json, err=False)


# -- what both share


def _identity(config: Config) -> dict[str, str]:
    """Return which records these are, as far as a configuration tells."""
    options = config.options
    layout = Layout.of(options).kind
    return {
        "redis": config.address,
        "db": str(options.db),
        "layout": layout,
        "keyPrefix": options.key_prefix,
    }


def _shown(of: dict[str, str]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in of.items())


def _look(tally: JobProgress) -> Any:
    return lambda: (tally.done, tally.total, tally.records - tally.resumed)


def _pace(tally: JobProgress, began: float) -> dict[str, Any]:
    seconds = time.monotonic() - began
    return {
        "resumed": tally.resumed,
        "seconds": round(seconds, 3),
        "per_second": round((tally.records - tally.resumed) / max(seconds, 0.001)),
    }


def _conclude(summary: dict[str, Any], words: list[str], *, as_json: bool, err: bool) -> None:
    pace = f"{summary['seconds']:.1f} s, {summary['per_second']:,} a second"
    if as_json:
        print_json(summary)
    else:
        typer.echo(f"{', '.join(words)} ({pace})", err=err)
    if not summary["ok"]:
        raise typer.Exit(1)
