"""Output of ``get``, ``head``, ``delete`` and ``set``: lines of JSON, or a table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

import msgspec
from rich.console import Console
from rich.highlighter import JSONHighlighter
from rich.text import Text

from ..admin.indent import indented
from ..errors import BulkError, RecordError, shorten
from .output import complain, new_table, plain, write
from .words import printable

T = TypeVar("T")
Cell = str | Text

NO_RECORD = Text("no record", "yellow")
"""The cell beside a name without a record."""
# The columns of numbers.
_NUMBERS = ("version", "bytes", "ttl")
# Bytes of JSON text beyond which colours would take seconds.
_MOST_COLOURED = 100_000
# The number of missing names that are printed one by one.
_MISSING_SHOWN = 5


def line_of(**fields: object) -> bytes:
    """Return fields as one line of JSON, with its line end."""
    return msgspec.json.encode(fields) + b"\n"


class Results:
    """Results by name, printed in parts: ``show`` prints the ones added since the last call."""

    def __init__(self, as_json: bool, *columns: str) -> None:
        self._as_json = as_json
        self._heads = ["name", *columns]
        self._lines: list[bytes] = []
        self._rows: list[list[Text]] = []
        self._headed = False

    def add(self, name: str, line: bytes, *cells: Cell) -> None:
        """Add a result: a line of JSON, and the cells of a row."""
        if self._as_json:
            self._lines.append(line)
        else:
            texts = (one if isinstance(one, Text) else plain(one) for one in cells)
            self._rows.append([plain(name), *texts])

    async def report(
        self,
        names: Sequence[str],
        reply: Awaitable[Mapping[str, T]],
        describe: Callable[[str, T], tuple[bytes, *tuple[Cell, ...]]],
    ) -> int:
        """Print the reply of a bulk read; return the number of names without a whole record.

        ``describe`` returns the line and the cells of an answer. Damaged records are printed on
        standard error, and so are missing ones with JSON.
        """
        damaged: dict[str, Exception] = {}
        try:
            found = await reply
        except BulkError as error:
            damaged.update(error.errors)
            for reason in damaged.values():
                if not isinstance(reason, RecordError):
                    raise reason from None
            found = error.result
        for name, answer in found.items():
            try:
                self.add(name, *describe(name, answer))
            except RecordError as error:
                damaged[name] = error
        answered = found.keys() | damaged.keys()
        missing = [one for one in dict.fromkeys(names) if one not in answered]
        if not self._as_json:
            for name in missing:
                self.add(name, b"", NO_RECORD)
        self.show()
        for reason in damaged.values():
            complain(str(reason))
        if missing and self._as_json:
            some = ", ".join(map(shorten, missing[:_MISSING_SHOWN]))
            rest = len(missing) - _MISSING_SHOWN
            complain(f"no record {some}{f' and {rest} more' if rest > 0 else ''}")
        return len(missing) + len(damaged)

    def show(self) -> None:
        """Print the results added since the last call, with a heading the first time."""
        if self._lines:
            write(b"".join(self._lines))
            self._lines.clear()
        if not self._rows:
            return
        console = Console(highlight=False)
        table = new_table(show_header=not self._headed)
        heads = self._heads
        columns = zip_longest(map(Text, heads), *self._rows, fillvalue=Text())
        widths = [max(cell.cell_len for cell in column) for column in columns]
        # A name is folded only if it would leave no width for the other columns.
        widths[0] = min(widths[0], max(console.width // 2, 12))
        for head, width in zip(heads, widths, strict=True):
            table.add_column(
                head,
                justify="right" if head in _NUMBERS else "left",
                width=width,
                no_wrap=head != "name",
                overflow="fold" if head == "name" else "ellipsis",
            )
        for row in self._rows:
            table.add_row(*row)
        console.print(table)
        self._rows.clear()
        self._headed = True


class Blocks(Results):
    """Records for a terminal: each as a heading, and its data indented below."""

    def __init__(self) -> None:
        super().__init__(False)

    @staticmethod
    def block(head: str, data: bytes) -> Text:
        """Return a record's cell: the facts beside its name, and its JSON text."""
        lines = indented(data).decode(errors="replace").split("\n")
        text = Text("\n".join(map(printable, lines)))
        if len(data) <= _MOST_COLOURED:
            JSONHighlighter().highlight(text)
        return Text("\n").join([Text(head, "dim"), text])

    def show(self) -> None:
        """Print the records added since the last call, with an empty line between two."""
        console = Console(highlight=False)
        for name, cell in self._rows:
            if self._headed:
                console.print()
            self._headed = True
            name.stylize("bold")
            # The terminal folds long lines, so that copied text has no line ends of ours.
            console.print(Text("  ").join([name, cell]), soft_wrap=True)
        self._rows.clear()


def with_lifetime(head: str, name: str, lifetimes: Mapping[str, int | None]) -> str:
    """Return a heading with the remaining lifetime of a record, if it is known."""
    if name not in lifetimes:
        return head
    seconds = lifetimes[name]
    if seconds is None:
        return f"{head}, no expiry"
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{head}, expires in {seconds // size} {unit}"
    return f"{head}, expires in {seconds} s"
