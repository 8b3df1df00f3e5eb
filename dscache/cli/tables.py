"""Output of ``get``, ``head``, ``delete`` and ``set``: lines of JSON, or a table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import BulkError, RecordError, shorten
from .output import complain, plain, write

# The number of missing names that are printed one by one.
_MISSING_SHOWN = 5


class Answers(contextlib.AbstractContextManager["Answers"]):
    """The records found for some names, the names without one, and the damaged records.

    As a context manager it takes the result and the errors of a BulkError that its block raises.
    With ``complains``, ``end`` prints the missing names on standard error.
    """

    def __init__(self, names: Iterable[str], complains: bool) -> None:
        self._complains = complains
        self.found: dict[str, Any] = {}
        """The answer to each name that has a record: a Record, a version, or True."""
        self._names = list(dict.fromkeys(names))
        self._errors: dict[str, Exception] = {}
        self._lines: list[bytes] = []

    def __exit__(self, kind: object, error: object, traceback: object) -> bool:
        if not isinstance(error, BulkError):
            return False
        for name, reason in error.errors.items():
            if not isinstance(reason, RecordError):
                raise reason
            self._errors[name] = reason
        self.found = error.result
        return True

    def add_line(self, line: bytes) -> None:
        """Add a line to be written by ``end``."""
        self._lines.append(line)

    def add_damaged(self, error: RecordError) -> None:
        """Count the record that an error names as damaged."""
        self._errors[str(error.name)] = error

    def missing(self) -> list[str]:
        """Return the names that have no record, whole or damaged."""
        return [one for one in self._names if one not in self.found and one not in self._errors]

    def end(self) -> int:
        """Write the lines and the errors; return the number of names without a whole record."""
        write_all(self._lines)
        for error in self._errors.values():
            complain(str(error))
        missing = self.missing()
        if missing and self._complains:
            some = ", ".join(shorten(name) for name in missing[:_MISSING_SHOWN])
            rest = len(missing) - _MISSING_SHOWN
            complain(f"no record {some}{f' and {rest} more' if rest > 0 else ''}")
        return len(missing) + len(self._errors)


def write_all(lines: list[bytes]) -> None:
    """Write lines to standard output at once."""
    if lines:
        write(b"".join(lines))


def line_of(**fields: object) -> bytes:
    """Return fields as one line of JSON, with its line end."""
    return msgspec.json.encode(fields) + b"\n"


class Rows:
    """A table on a terminal, printed in parts: ``show`` prints the rows added since the last."""

    def __init__(self, *columns: str, fold: bool = False) -> None:
        self._columns = columns
        self._fold = fold
        self._rows: list[tuple[Text, ...]] = []
        self._headed = False

    def add(self, name: str, *cells: Text) -> None:
        """Add the row of a record."""
        self._rows.append((plain(name), *cells))

    def add_missing(self, name: str) -> None:
        """Add the row of a name without a record."""
        rest = len(self._columns) - 1
        self._rows.append((plain(name), Text("no record", "yellow"), *([Text()] * rest)))

    def finish(self, answers: Answers, as_json: bool) -> int:
        """Print the rows and end the answers; return the number of names without a whole record."""
        if not as_json:
            for name in answers.missing():
                self.add_missing(name)
        self.show()
        return answers.end()

    def show(self) -> None:
        """Print the rows added since the last call, with a heading the first time."""
        if not self._rows:
            return
        console = Console(highlight=False)
        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
            show_header=not self._headed,
        )
        heads = ["name", *self._columns]
        widths = [
            max(len(head), *(row[i].cell_len for row in self._rows)) for i, head in enumerate(heads)
        ]
        # Data is cut first; a name is folded only if it would leave no width for the data.
        widths[0] = min(widths[0], max(console.width // 2, 12))
        if "data" in heads:
            widths[-1] = min(widths[-1], max(console.width - sum(widths[:-1]) - 2 * len(heads), 10))
        for head, width in zip(heads, widths, strict=True):
            folds = head == "name" or (head == "data" and self._fold)
            table.add_column(
                head,
                justify="right" if head == "version" else "left",
                width=width,
                no_wrap=not folds,
                overflow="fold" if folds else "ellipsis",
            )
        for row in self._rows:
            table.add_row(*row)
        console.print(table)
        self._rows.clear()
        self._headed = True
