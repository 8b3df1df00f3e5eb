"""``dscache doctor``: checks of a Redis that is to hold records."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from ..admin.doctor.checkup import check_up
from ..admin.doctor.findings import BAD, OK, UNKNOWN, WARNING, Checkup
from .options import Chosen, number_option, with_all_options
from .output import new_table, number, plain, print_json
from .settings import load_messages, run

_STYLES = {OK: "green", UNKNOWN: "cyan", WARNING: "yellow", BAD: "bold red"}


HotOption = Annotated[
    float,
    number_option(
        float,
        "Let servers of Redis 8.6 or newer count for that long which records are used most.",
        metavar="SECONDS",
        least=0,
        most=60,
    ),
]


@with_all_options
def doctor(*, hot: HotOption = 0, chosen: Chosen) -> None:
    """Check whether a Redis suits records, and advise how to fix it.

    It changes no record, and takes some seconds. The exit status is 0 if all is well, 1 if there
    are warnings, and 2 if something is bad.
    """
    config = chosen.load()
    messages, is_named = load_messages(chosen.config, chosen.url) or (None, False)
    by_url = chosen.url is not None
    checkup = run(
        check_up(config, by_url=by_url, messages=messages, is_named=is_named, hot_seconds=hot)
    )
    if chosen.as_json:
        print_json(document(checkup))
    else:
        Console(highlight=False).print(page(checkup))
    if checkup.status:
        raise typer.Exit(checkup.status)


def document(checkup: Checkup) -> dict[str, object]:
    """Return the findings as the JSON document to print."""
    return {
        "verdict": checkup.verdict,
        "address": checkup.address,
        "findings": [asdict(one) | {"advice": one.advice or None} for one in checkup.findings],
    }


def page(checkup: Checkup) -> RenderableType:
    """Return the findings for a terminal."""
    table = new_table()
    table.add_column("verdict", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("finding and advice", overflow="fold")
    for one in checkup.findings:
        found = plain(one.found)
        if one.advice:
            found = Text("\n").join([found, plain(one.advice, "italic")])
        table.add_row(Text(one.verdict, _STYLES[one.verdict]), one.check, found)
    counts = [
        number(checkup.count(verdict), noun, many)
        for verdict, noun, many in (
            (BAD, "thing is bad", "things are bad"),
            (WARNING, "warning", "warnings"),
            (UNKNOWN, "thing is unknown", "things are unknown"),
        )
        if checkup.count(verdict)
    ]
    summary = f"{checkup.address}: {', '.join(counts) or 'all is well'}"
    return Group(table, Text(), plain(summary, _STYLES[checkup.verdict]))
