"""Output of ``get``, ``head``, ``delete`` and ``set``: lines of JSON, or a table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

import msgspec
from rich.console import Console
from rich.text import Text

from ..errors import BulkError, RecordError, shorten
from .output import complain, new_table, plain, write

T = TypeVar("T")
Cell = str | Text

NO_RECORD = Text("no record", "yellow")
"""The cell beside a name without a record."""
# The columns of numbers.
_NUMBERS = ("version", "bytes", "ttl")
# The number of missing names that are printed one by one.
_MISSING_SHOWN = 5


def line_of(**fields: object) -> bytes:
    """Return fields as one line of JSON, with its line end."""
    return msgspec.json.encode(fields) + b"\n"


class Results:
    """Results by name, printed in parts: ``show`` prints those added since the last call."""

    def __init__(self, as_json: bool, *columns: str, fold: bool = False) -> None:
        self._as_json = as_json
        self._heads = ["name", *columns]
        self._fold = fold
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
        # Data is cut first; a name is folded only if it would leave no width for the data.
        widths[0] = min(widths[0], max(console.width // 2, 12))
        if "data" in heads:
            widths[-1] = min(widths[-1], max(console.width - sum(widths[:-1]) - 2 * len(heads), 10))
        for head, width in zip(heads, widths, strict=True):
            folds = head == "name" or (head == "data" and self._fold)
            table.add_column(
                head,
                justify="right" if head in _NUMBERS else "left",
                width=width,
                no_wrap=not folds,
                overflow="fold" if folds else "ellipsis",
            )
        for row in self._rows:
            table.add_row(*row)
        console.print(table)
        self._rows.clear()
        self._headed = True
