"""``dscache top``: the load of servers, or of a program's caches, live."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..admin.program_load import CacheLoad, ProgramLoad, WatchedProgram
from ..admin.server_load import NodeLoad, ServerLoad, watched_servers
from ..errors import DscacheError
from . import signals
from .options import Chosen, flag, number_option, with_options
from .output import new_table, number, plain, print_json, write
from .settings import run
from .tables import line_of

# Columns at which the table of servers fits as a whole, with addresses of usual length.
_WIDE = 116
_PIPE_WIDTH = 160
# The first interval, so that the screen isn't empty for long.
_FIRST_SECONDS = 1.0
_COMMANDS_SHOWN = 8
_UNITS = ("B", "kB", "MB", "GB", "TB")

Load = ServerLoad | ProgramLoad


@with_options("config", "url")
def top(
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Show the caches of the program whose metrics this endpoint exports.",
            show_default=False,
        ),
    ] = None,
    interval: Annotated[
        float,
        number_option(
            float, "Seconds between two looks.", metavar="SECONDS", least=0.1, most=86_400
        ),
    ] = 2.0,
    once: Annotated[bool, flag("--once", "Print one table, and end.")] = False,
    as_json: Annotated[
        bool,
        flag("--json", "Print a JSON object at each interval, until Ctrl-C; one with --once."),
    ] = False,
    *,
    chosen: Chosen,
) -> None:
    """Show the load of all servers, or of a program's caches, live.

    Shows operations, hits, times, memory, clients and slow nodes. With --metrics, shows the load of
    a program's caches instead, as dscache.prometheus exports it. In a pipe it prints one table and
    ends. With --json it prints an object at each interval, until Ctrl-C. If it prints once and
    ends, the exit status is 1 if a server is down.
    """
    is_live = sys.stdout.isatty() and not once and not as_json
    title = ""

    async def work() -> Load | None:
        async with AsyncExitStack() as stack:
            look: Callable[[], Awaitable[Load]]
            nonlocal title
            if metrics is not None:
                program = WatchedProgram(metrics)
                look, title = program.look, program.shown
            else:
                config = chosen.load()
                servers = await stack.enter_async_context(watched_servers(config))
                look, title = servers.look, config.address
            await look()
            await asyncio.sleep(min(interval, _FIRST_SECONDS))
            if is_live:
                await _show(look, title, interval)
            elif as_json and not once:
                while True:
                    write(line_of(time=datetime.now().astimezone(), **document(await look())))
                    await asyncio.sleep(interval)
            return await look()

    try:
        load = run(work())
    except KeyboardInterrupt:
        # Ctrl-C is the usual way to end it, so nothing is printed.
        raise typer.Exit(signals.exit_status()) from None
    assert load is not None
    if as_json:
        print_json(document(load))
    else:
        # A pipe has no width, and rich would take that of a narrow terminal.
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
        console.print(page(load, title, console.width))
    if isinstance(load, ServerLoad) and any(node.down for node in load.nodes):
        raise typer.Exit(1)


async def _show(look: Callable[[], Awaitable[Load]], title: str, interval: float) -> None:
    """Show the load on the whole screen until the task is cancelled."""
    console = Console(highlight=False)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                shown = page(await look(), title, console.width)
            except DscacheError as error:
                shown = plain(str(error), "red")
            now = f"{datetime.now():%H:%M:%S}, every {interval:g} s, Ctrl-C ends"
            live.update(Group(Text(now, "dim"), Text(), shown), refresh=True)
            await asyncio.sleep(interval)


def document(load: Load) -> dict[str, object]:
    """Return a load as the JSON document to print."""
    found = asdict(load)
    if isinstance(load, ServerLoad):
        found["commands"] = {name: asdict(one) for name, one in load.commands.items()}
    return {name: _rounded(value) for name, value in found.items()}


def _rounded(value: Any) -> Any:
    """Return a value with its floats rounded to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def page(load: Load, title: str, width: int) -> RenderableType:
    """Return a load for a terminal of ``width`` columns."""
    if isinstance(load, ProgramLoad):
        return _page_of_caches(load, title)
    return _page_of_servers(load, title, width)


# -- servers


def _page_of_servers(load: ServerLoad, title: str, width: int) -> RenderableType:
    columns: dict[str, Callable[[NodeLoad], str]] = {
        "role": lambda node: node.role,
        "ops/s": lambda node: _count(node.operations),
        "hits": lambda node: _percent(node.hits),
        "µs/op": lambda node: _decimal(node.microseconds),
        "p99 µs": lambda node: _decimal(node.p99_microseconds),
        "ping ms": lambda node: "" if node.round_trip_ms is None else f"{node.round_trip_ms:.2f}",
        "memory": _memory,
        "clients": lambda node: "" if node.clients is None else f"{node.clients:,}",
        "in/s": lambda node: _bytes(node.received),
        "out/s": lambda node: _bytes(node.sent),
    }
    if width < _WIDE:
        for name in ("role", "p99 µs", "in/s", "out/s"):
            del columns[name]
    table = new_table()
    table.add_column("node", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="left" if name == "role" else "right", no_wrap=True)
    table.add_column("")
    for node in load.nodes:
        note = (
            Text("down", "bold red") if node.down else Text("slow" if node.slow else "", "yellow")
        )
        cells = (cell(node) if node.down is None else "" for cell in columns.values())
        table.add_row(plain(node.address, "red" if node.down else ""), *cells, note)
    parts: list[RenderableType] = [plain(_sum(load, title), "bold"), Text(), table]
    troubles = [
        *(plain(f"{node.address} is down: {node.down}", "red") for node in load.nodes if node.down),
        *(plain(f"{node.address}: {node.slow}", "yellow") for node in load.nodes if node.slow),
    ]
    if troubles:
        parts += [Text(), *troubles]
    if load.commands:
        parts += [Text(), _commands(load)]
    return Group(*parts)


def _sum(load: ServerLoad, title: str) -> str:
    up = [node for node in load.nodes if node.down is None]
    facts = [
        number(len(load.nodes), "node"),
        f"{sum(node.operations or 0 for node in up):,.0f} ops/s",
        f"{_bytes(sum(node.used_memory or 0 for node in up))} used",
        number(sum(node.clients or 0 for node in up), "client"),
    ]
    return f"{title}: {', '.join(facts)}"


def _commands(load: ServerLoad) -> Table:
    table = _table("command", "calls/s", "µs/call", "% of a core")
    for name, one in list(load.commands.items())[:_COMMANDS_SHOWN]:
        cells = _count(one.per_second), _decimal(one.microseconds), f"{one.busy * 100:.1f}"
        table.add_row(plain(name), *cells)
    return table


def _memory(node: NodeLoad) -> str:
    if node.used_memory is None:
        return ""
    limit = f" of {_bytes(node.max_memory)}" if node.max_memory else ""
    return f"{_bytes(node.used_memory)}{limit}"


# -- a program's caches


def _page_of_caches(load: ProgramLoad, title: str) -> RenderableType:
    table = _table("cache", "calls/s", "hits", "near hits", "writes/s", "failed/s", "pending")
    table.add_column("connections", justify="right", no_wrap=True)
    table.add_column("")
    for cache in load.caches:
        table.add_row(
            plain(cache.name),
            _count(cache.calls),
            _percent(cache.hits),
            _percent(cache.near),
            _count(cache.writes),
            Text(_count(cache.failed), "red" if cache.failed else ""),
            f"{cache.pending:,}",
            f"{cache.connections:,}",
            Text("" if cache.ready else "not ready", "red"),
        )
    parts: list[RenderableType] = [plain(title, "bold"), Text(), table]
    for other in (_operations(load.caches), _nodes(load.caches)):
        if other.row_count:
            parts += [Text(), other]
    return Group(*parts)


def _operations(caches: Iterable[CacheLoad]) -> Table:
    table = _table("operation", "calls/s", "p50 ms", "p99 ms")
    table.add_column("cache")
    for cache in caches:
        for name, one in sorted(cache.operations.items(), key=lambda each: -each[1].per_second):
            cells = _count(one.per_second), _decimal(one.p50_ms, 3), _decimal(one.p99_ms, 3)
            table.add_row(plain(name), *cells, plain(cache.name))
    return table


def _nodes(caches: Iterable[CacheLoad]) -> Table:
    table = _table("node", "calls/s", "failed/s", "in flight")
    table.add_column("cache")
    for cache in caches:
        for address, node in cache.nodes.items():
            failed = Text(_count(node.failed), "red" if node.failed else "")
            table.add_row(
                plain(address),
                _count(node.operations),
                failed,
                f"{node.in_flight:,}",
                plain(cache.name),
            )
    return table


# -- cells


def _table(first: str, *numbers: str) -> Table:
    table = new_table()
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 10 or not value else f"{value:.1f}"


def _decimal(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share * 100:.1f} %"


def _bytes(count: float | None) -> str:
    if count is None:
        return ""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count /= 1000
        unit += 1
    return f"{count:.1f} {_UNITS[unit]}" if unit else f"{count:.0f} B"
