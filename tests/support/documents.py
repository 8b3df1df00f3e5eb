"""Read the project's Markdown: fenced blocks, tables by their heading, links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

PROJECT = Path(__file__).parents[2]
DOCUMENTS = [
    *(PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted(PROJECT.glob("docs/*.md")),
]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    line: int
    """The line of its first line of text."""
    language: str
    text: str
    expected: str | None = None
    """The ``text`` block that follows a ``python`` block: what it prints."""

    @property
    def place(self) -> str:
        return f"{self.document.name}:{self.line}"


def blocks(document: Path) -> list[Block]:
    """Return the fenced blocks of a document in order."""
    source = document.read_text(encoding="utf-8")
    matches = list(_FENCE.finditer(source))
    found = []
    for match, after in zip_longest(matches, matches[1:]):
        line = source.count("\n", 0, match.start(2)) + 1
        prints = after is not None and after[1] == "text" and match[1] == "python"
        if prints and "\n#" in source[match.end() : after.start()]:
            prints = False  # it is of another section
        found.append(Block(document, line, match[1], match[2], after[2] if prints else None))
    return found


def prose(document: Path) -> str:
    """Return a document without its fenced blocks."""
    return _FENCE.sub("", document.read_text(encoding="utf-8"))


def section(document: Path, heading: str) -> str:
    """Return the prose under a heading, up to the next heading of any level."""
    parts = _HEADING.split(prose(document))
    for _, title, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if title == heading:
            return text
    raise AssertionError(f"{document.name} has no heading {heading!r}")


def table(document: Path, heading: str) -> list[list[str]]:
    """Return the rows of the first table under a heading, without its header."""
    rows = [line for line in section(document, heading).splitlines() if line.startswith("|")]
    assert len(rows) > 2, f"{document.name}: no table under {heading!r}"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def code(text: str) -> list[str]:
    """Return the text in backticks."""
    return _CODE.findall(text)


def links(document: Path) -> list[str]:
    """Return the targets of a document's links."""
    return _LINK.findall(prose(document))


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub derives from a document's headings."""
    titles = (title for _, title in _HEADING.findall(prose(document)))
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
