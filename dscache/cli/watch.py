"""``dscache watch``: names and versions of records as they change, live."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from ..admin import ndjson
from ..admin.cache import open_cache
from ..errors import RecordError
from ..net.watch import CHANGED, DAMAGED, DELETED, FLUSHED, GAP, RESUMED, Change
from . import signals
from .options import Chosen, PrefixArgument, flag, with_all_options
from .output import complain, plain, write
from .settings import run
from .tables import line_of

_STYLES = {
    CHANGED: "",
    DELETED: "yellow",
    DAMAGED: "red",
    FLUSHED: "yellow",
    GAP: "red",
    RESUMED: "green",
}


@with_all_options
def watch(
    prefix: PrefixArgument = "",
    data: Annotated[bool, flag("--data", "Print the data of changed records too.")] = False,
    *,
    chosen: Chosen,
) -> None:
    """Print names and versions of records as they change, until Ctrl-C.

    In a pipe, prints one JSON object a line. Shows the last of several changes in quick succession.
    Prints a line when a connection is lost, since changes may be missed until it is back.
    """
    config = chosen.load()
    as_json = chosen.as_json
    console = Console(highlight=False)

    def show(event: Change) -> None:
        now = datetime.now(UTC)
        try:
            text = _text_of(event)
        except RecordError as error:
            event, text = replace(event, kind=DAMAGED, reason=str(error)), None
        if as_json:
            write(line(event, now, text))
        else:
            console.print(row(event, now.astimezone(), text), soft_wrap=True)

    async def work() -> None:
        async with open_cache(config) as cache, cache.watch(prefix, records=data) as changes:
            complain(f"watching {', '.join(changes.addresses)}")
            async for change in changes:
                show(change)

    try:
        run(work())
    except KeyboardInterrupt:
        # Ctrl-C is the usual way to end it, so nothing is printed.
        raise typer.Exit(signals.exit_status()) from None


def _text_of(event: Change) -> bytes | None:
    """Return the JSON text of a record that was read, on one line. Raises RecordError."""
    if event.record is None:
        return None
    return ndjson.on_one_line(event.name, event.record.version, event.record.raw)


def line(event: Change, now: datetime, text: bytes | None = None) -> bytes:
    """Return an event as one line of JSON, without the fields that don't apply."""
    fields: dict[str, object] = {
        "time": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "event": event.kind,
    }
    if event.name:
        fields |= {"name": event.name, "version": event.version}
    if text is not None:
        fields["data"] = msgspec.Raw(text)
    if event.node and event.kind != FLUSHED:
        fields["node"] = event.node
    if event.reason:
        fields["reason"] = event.reason
    return line_of(**fields)


def row(event: Change, now: datetime, data: bytes | None = None) -> Text:
    """Return an event as a line for a terminal."""
    version = event.kind if event.version is None else str(event.version)
    text = Text.assemble(
        (now.strftime("%H:%M:%S.%f")[:-3], "dim"), "  ", (f"{version:>8}", _STYLES[event.kind])
    )
    why = f"{event.node}: {event.reason}" if event.node else event.reason
    words = {
        FLUSHED: "all records were removed",
        GAP: f"changes may be missed from here on: {why}",
        RESUMED: f"{event.node and event.node + ': '}changes are reported again",
    }
    text.append("  ").append_text(plain(words.get(event.kind, event.name)))
    if data is not None:
        text.append_text(plain(f"  {data.decode()}", "dim"))
    if event.name and event.reason:
        text.append_text(plain(f"  {event.reason}", "red"))
    return text
