"""``dscache bench``: a synthetic load against your own server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from .. import _backend
from ..admin.cache import open_cache
from ..admin.latency_chart import draw
from ..admin.load_test import MOST_BYTES, Latencies, Plan, Result, apply
from ..admin.progress import errors_of
from .options import Chosen, number_option, with_all_options
from .output import complain, interruptible, new_table, number, plain, print_json
from .progress_bar import progress
from .settings import run

_MOST_TASKS = 100_000
_MOST_SECONDS = 1_000_000
_PERCENTILES = (50, 90, 99, 99.9)


@with_all_options
def bench(
    tasks: Annotated[
        int,
        number_option(
            int,
            "Concurrent tasks, each with one operation at a time.",
            metavar="N",
            least=1,
            most=_MOST_TASKS,
        ),
    ] = 100,
    seconds: Annotated[
        float,
        number_option(float, "Duration of the load.", metavar="S", least=0.1, most=_MOST_SECONDS),
    ] = 5.0,
    read_ratio: Annotated[
        float,
        number_option(float, "Share of reads, 0 to 1.", metavar="SHARE", least=0, most=1),
    ] = 0.9,
    size: Annotated[
        int, number_option(int, "Size of each record's JSON text.", metavar="BYTES", least=1)
    ] = 120,
    bulk: Annotated[
        int,
        number_option(int, "Records in one operation; 1 uses get and set.", metavar="N", least=1),
    ] = 1,
    records: Annotated[
        int, number_option(int, "Number of different records.", metavar="N", least=1)
    ] = 10_000,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg", help="Draw the distribution of latencies."),
    ] = None,
    *,
    chosen: Chosen,
) -> None:
    """Put a load on a server, and measure rate and latency.

    Writes records under names of its own, dscache-bench/..., and removes them at the end, also
    after Ctrl-C, which shows the result so far. It slows down the server's other clients. The exit
    status is 1 if operations failed.
    """
    if plot is not None and (plot.suffix != ".svg" or not plot.parent.is_dir() or plot.is_dir()):
        raise typer.BadParameter(
            "it must be a file that ends in .svg, in a folder that exists", param_hint="--plot"
        )
    plan = Plan(
        tasks=tasks, seconds=seconds, read_ratio=read_ratio, size=size, bulk=bulk, records=records
    )
    if plan.bytes_under_way > MOST_BYTES:
        raise typer.BadParameter(
            f"{number(tasks, 'task')} with {number(bulk, 'record')} of {size:,} bytes in each "
            "operation would take more than 1 GiB at a time; choose fewer tasks, or less of the "
            "others",
            param_hint="--tasks, --bulk, --size",
        )
    config = chosen.load()
    result = Result()
    facts: dict[str, str] = {}

    def position() -> tuple[int, int, int]:
        passed = time.perf_counter() - result.began if result.began else 0.0
        return round(min(passed, seconds) * 1000), round(seconds * 1000), result.records

    async def work() -> None:
        async with open_cache(config) as cache:
            facts.update(
                address=cache.config.address,
                server=cache.topology.server,
                core=_backend.BACKEND,
                loop=type(asyncio.get_running_loop()).__module__.partition(".")[0],
            )
            with progress("bench", position):
                await apply(cache, plan, result)

    try:
        with interruptible(lambda: _whereabouts(result)):
            run(work())
    finally:
        # After an interrupt too.
        if result.seconds:
            _print_result(facts, plan, result, plot, as_json=chosen.as_json)
        if result.left:
            _complain_of_left(result)
    if result.errors or result.left:
        raise typer.Exit(1)


def _print_result(
    facts: Mapping[str, str], plan: Plan, result: Result, plot: Path | None, *, as_json: bool
) -> None:
    if as_json:
        print_json(document(facts, plan, result))
    else:
        console = Console(highlight=False)
        console.print(page(facts, plan, result, console.width))
    if plot is not None:
        _write_plot(plot, facts, plan, result)
    if result.written < plan.records:
        why = (
            "could be written in the time that filling may take"
            if result.written < plan.most_records
            else "fit into 1 GiB"
        )
        complain(f"used {result.written:,} records in place of {plan.records:,}, as no more {why}")
    for error, count in result.errors.most_common(5):
        complain(f"{number(count, 'operation')} failed: {error}")


def _whereabouts(result: Result) -> str:
    """Return what has become of the records, or nothing if that isn't known."""
    if result.left:
        return ""
    return "its records have been removed" if result.removed else "no record was written"


def _complain_of_left(result: Result) -> None:
    why = f": {result.removal_error}" if result.removal_error else ""
    complain(
        f"records that begin with {result.left} may be left{why}; dscache ls shows them, and "
        "dscache delete removes them"
    )


def document(facts: Mapping[str, str], plan: Plan, result: Result) -> dict[str, object]:
    """Return the result as the JSON document to print."""
    return {
        **facts,
        **asdict(plan),
        "records": result.written,
        "seconds": round(result.seconds, 3),
        "records_per_second": round(result.rate),
        "errors": result.errors.total(),
        "reads": _latencies(result.reads),
        "writes": _latencies(result.writes),
    }


def _latencies(of: Latencies) -> dict[str, float]:
    percentiles = {f"p{percent:g}_ms": of.percentile(percent) for percent in _PERCENTILES}
    times = {"mean_ms": of.mean, **percentiles, "max_ms": of.longest_ms}
    return {"operations": of.count, **{name: round(time, 4) for name, time in times.items()}}


def page(facts: Mapping[str, str], plan: Plan, result: Result, width: int) -> RenderableType:
    """Return the result for a terminal of ``width`` columns."""
    table = new_table()
    for name, of in (("reads", result.reads), ("writes", result.writes)):
        if not of.count:
            continue
        cells = {
            "": name,
            "operations": f"{of.count:,}",
            "a second": f"{of.count / result.seconds:,.0f}",
            "mean": _shown(of.mean),
            **{f"p{one:g}": _shown(of.percentile(one)) for one in _PERCENTILES},
            "max": _shown(of.longest_ms),
        }
        if width < 80:
            del cells["mean"], cells["p90"]
        if not table.columns:
            for head in cells:
                table.add_column(head, justify="right" if head else "left", no_wrap=True)
        table.add_row(*cells.values())
    summary = Text.assemble(
        (f"{result.rate:,.0f} records a second", "bold green"),
        f" in {result.seconds:.1f} s: {_described(plan)}",
    )
    where = f"{facts['address']}, {facts['server']}, {facts['core']} core on {facts['loop']}"
    return Group(table, Text("times in milliseconds", "dim"), Text(), summary, plain(where, "dim"))


def _shown(milliseconds: float) -> str:
    return f"{milliseconds:.3f}" if milliseconds < 10 else f"{milliseconds:.1f}"


def _described(plan: Plan) -> str:
    what = f"{number(plan.bulk, 'record')} an operation" if plan.bulk > 1 else "one at a time"
    return f"{number(plan.tasks, 'task')}, {plan.size:,} bytes, {what}"


def _write_plot(plot: Path, facts: Mapping[str, str], plan: Plan, result: Result) -> None:
    drawing = draw(
        f"{result.rate:,.0f} records a second",
        f"{_described(plan)}, {plan.read_ratio:.0%} reads; {facts['server']}, "
        f"{facts['core']} core on {facts['loop']}",
        {"reads": result.reads, "writes": result.writes},
    )
    with errors_of(plot):
        plot.write_text(drawing, encoding="utf-8")
