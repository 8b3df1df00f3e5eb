"""Output of the commands: results on standard output, warnings and errors on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import typer
from rich import box
from rich.table import Table
from rich.text import Text

from . import signals
from .streams import discard_rest
from .words import printable, quotable


def print_json(document: object) -> None:
    """Print one JSON document, indented by two spaces."""
    typer.echo(msgspec.json.format(msgspec.json.encode(document), indent=2))


def write(line: bytes) -> None:
    """Write bytes to standard output unchanged, and flush them for the reader of a pipe."""
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


NOT_NEWER = "not written: Redis holds the same or a newer version"
"""The result of a write with ``--if-newer`` that was refused."""


def complain(message: str) -> None:
    """Print an error or a warning as one line on standard error."""
    try:
        print(f"dscache: {quotable(message)}", file=sys.stderr, flush=True)
    except OSError:  # there is no other place to report it
        discard_rest(sys.stderr)


def complain_of_all(notes: Sequence[str], total: int) -> None:
    """Print each note on standard error, and the number of faults that have none."""
    for note in notes:
        complain(note)
    if total > len(notes):
        complain(f"and {total - len(notes):,} more")


def plain(words: str, style: str = "") -> Text:
    """Return text from a server or a user for rich, in one style and without control characters."""
    return Text(printable(words), style)


def number(count: int, one: str, many: str = "") -> str:
    """Return a count with its noun, such as ``1 node`` or ``12,000 nodes``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def new_table(*, show_header: bool = True) -> Table:
    """Return an empty table in the style of all commands."""
    return Table(
        box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), show_header=show_header
    )


@contextmanager
def interruptible(hint: str | Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM or SIGHUP into one line on standard error, with a hint, and an exit.

    A function is called for the hint after the interrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        hint = hint if isinstance(hint, str) else hint()
        complain(f"interrupted; {hint}" if hint else "interrupted")
        raise typer.Exit(signals.exit_status()) from None
