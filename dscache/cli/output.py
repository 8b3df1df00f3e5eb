"""Output of the commands: results on standard output, warnings and errors on standard error."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, cast

import msgspec
import typer
from rich import box
from rich.table import Table
from rich.text import Text

from . import signals
from .streams import discard_rest
from .words import escaped, printable, quotable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def print_json(document: object) -> None:
    """Print one JSON document, indented by two spaces."""
    write(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")


def write(line: bytes) -> None:
    """Write lines of JSON to standard output, and flush them for the reader of a pipe.

    A terminal gets escape sequences of JSON in place of characters that would steer it.
    """
    sys.stdout.buffer.write(escaped(line) if sys.stdout.isatty() else line)
    sys.stdout.buffer.flush()


def lines_output() -> BinaryIO:
    """Return the file for lines of JSON on standard output, by ``write`` if it is a terminal."""
    return cast(BinaryIO, _Terminal()) if sys.stdout.isatty() else sys.stdout.buffer


class _Terminal(io.RawIOBase):
    def write(self, data: ReadableBuffer, /) -> int:
        write(bytes(data))
        return memoryview(data).nbytes


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
