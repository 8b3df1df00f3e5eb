"""What ``get``, ``head``, ``delete`` and ``set`` print of records: lines of JSON, or a table."""

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
from .settings import complain, plain, write

# How many of the names that have no record are told.
_TOLD = 5


class Answers(contextlib.AbstractContextManager["Answers"]):
    """What came of some names: those found, those missing, and those that are damaged."""

    def __init__(self, names: Iterable[str], complains: bool) -> None:
        self._complains = complains
        self.found: dict[str, Any] = {}
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

    def out(self, line: bytes) -> None:
        self._lines.append(line)

    def damaged(self, error: RecordError) -> None:
        self._errors[str(error.name)] = error

    def missing(self) -> list[str]:
        return [one for one in self._names if one not in self.found and one not in self._errors]

    def end(self) -> int:
        """Write what is to be written; return how many names had no record that is whole."""
        write_all(self._lines)
        for error in self._errors.values():
            complain(str(error))
        missing = self.missing()
        if missing and self._complains:
            some = ", ".join(shorten(name) for name in missing[:_TOLD])
            more = f" and {len(missing) - _TOLD} more" if len(missing) > _TOLD else ""
            complain(f"no record {some}{more}")
        return len(missing) + len(self._errors)


def write_all(lines: list[bytes]) -> None:
    if lines:
        write(b"".join(lines))


def line_of(**fields: object) -> bytes:
    return msgspec.json.encode(fields) + b"\n"


class Rows:
    """The table of a terminal: each time that something is shown, what was added since."""

    def __init__(self, *columns: str, fold: bool = False) -> None:
        self._columns = columns
        self._fold = fold
        self._rows: list[tuple[Text, ...]] = []
        self._headed = False

    def add(self, name: str, *cells: Text) -> None:
        self._rows.append((plain(name), *cells))

    def add_missing(self, name: str) -> None:
        rest = len(self._columns) - 1
        self._rows.append((plain(name), Text("no record", "yellow"), *([Text()] * rest)))

    def show(self) -> None:
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
        # What is cut is the data, and a name only where it would leave no room for that.
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
