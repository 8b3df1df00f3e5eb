"""``dscache cluster``: the nodes of a cluster, with their slots and health."""

from __future__ import annotations

from collections.abc import Callable

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from ..admin.cache import as_cluster
from ..admin.cluster_report import ClusterReport, NodeReport, show_slots
from ..admin.cluster_survey import survey
from ..config import Config
from ..core import constants
from .options import Chosen, with_options
from .output import new_table, number, plain, print_json
from .settings import run

# Columns at which the whole table fits, with addresses of usual length and a healthy cluster.
_WIDE = 100
_NODE_KEYS = (
    *("address", "id", "role", "primary", "slots", "slot_count", "round_trip_ms"),
    *("down", "server", "health"),
)


@with_options("config", "url", "json")
def cluster(*, chosen: Chosen) -> None:
    """Show the nodes of a cluster: roles, slots, times and health.

    One reachable node is enough to find all. The exit status is 1 if a slot has no primary, or if
    a primary with slots is down.
    """
    report = run(_survey(chosen.load()))
    if chosen.as_json:
        print_json(document(report))
    else:
        console = Console(highlight=False)
        console.print(page(report, console.width))
    if report.problems:
        raise typer.Exit(1)


async def _survey(config: Config) -> ClusterReport:
    return await survey(await as_cluster(config))


def document(report: ClusterReport) -> dict[str, object]:
    """Return a report as the JSON document to print."""
    return {
        "ok": not report.problems,
        "problems": report.problems,
        "warnings": report.remarks,
        "slots": {
            "total": constants.SLOTS,
            "covered": report.covered,
            "uncovered": report.uncovered,
        },
        "nodes": [{key: getattr(node, key) for key in _NODE_KEYS} for node in report.nodes],
    }


def page(report: ClusterReport, width: int) -> RenderableType:
    """Return a report for a terminal of ``width`` columns.

    A narrow table omits the server, which the summary names, and the number of slots.
    """
    servers = {node.server for node in report.nodes if node.server}
    narrow = width < _WIDE
    columns: dict[str, Callable[[NodeReport], Text]] = {
        "node": lambda node: plain(node.address),
        "role": lambda node: Text(node.role, "bold" if node.role == "primary" else ""),
        "its primary": lambda node: plain(
            "" if node.role == "primary" else node.primary or "unknown"
        ),
        "slots": lambda node: Text(show_slots(node.slots)),
        "count": lambda node: Text(str(node.slot_count) if node.role == "primary" else ""),
        "round trip": lambda node: _round_trip(node, with_reason=not narrow),
        "server": lambda node: plain(node.server),
        "health": lambda node: plain(node.health, _style(node)),
    }
    if narrow:
        del columns["count"]
        if len(servers) == 1:
            del columns["server"]
    table = new_table()
    for name in columns:
        # Addresses stay on one line, to be copied.
        table.add_column(
            name,
            no_wrap=name in ("node", "its primary"),
            overflow="fold",
            justify="right" if name == "count" else "left",
        )
    for node in report.nodes:
        table.add_row(*(cell(node) for cell in columns.values()))
    server = servers.pop() if "server" not in columns else ""
    return Group(table, Text(), *_summary(report, server))


def _round_trip(node: NodeReport, *, with_reason: bool) -> Text:
    if node.down is None:
        return Text(f"{node.round_trip_ms:.2f} ms")
    return plain(f"down: {node.down}" if with_reason else "down", "red")


def _style(node: NodeReport) -> str:
    return "red" if node.is_down else "green" if node.health == "ok" else "yellow"


def _summary(report: ClusterReport, server: str) -> list[Text]:
    primaries = sum(node.role == "primary" for node in report.nodes)
    kinds = [
        number(len(report.nodes), "node"),
        number(primaries, "primary", "primaries"),
        number(len(report.nodes) - primaries, "replica"),
        f"{report.covered} of {constants.SLOTS} slots covered",
        *([server] if server else []),
    ]
    style = "red" if report.problems else "yellow" if report.remarks else "green"
    return [
        plain(", ".join(kinds), style),
        *(plain(f"problem: {one}", "red") for one in report.problems),
        *(plain(f"warning: {one}", "yellow") for one in report.remarks),
    ]
