"""JSON text with line ends and indentation, and otherwise unchanged."""

from __future__ import annotations

import re
from typing import Final

# A string, a bracket, a comma, a colon, or a number or word.
_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},:]|[^\s\[\]{},:"]+', re.DOTALL)
_INDENT: Final = b"  "
# Deeper values are indented no further: text of n levels would take n² bytes.
_MOST_LEVELS: Final = 30


def indented(text: bytes) -> bytes:
    """Return JSON text with each value on a line of its own.

    Numbers and strings stay as they are stored. Text that isn't JSON is no error.
    """
    parts: list[bytes] = []
    level = 0
    opened = False
    for token in _TOKEN.findall(text):
        if token in b"]}":
            level -= 1
            if not opened:
                parts.append(_line_end(level))
        elif opened:
            parts.append(_line_end(level))
        parts.append(token)
        opened = token in b"[{"
        if opened:
            level += 1
        elif token == b",":
            parts.append(_line_end(level))
        elif token == b":":
            parts.append(b" ")
    return b"".join(parts)


def _line_end(level: int) -> bytes:
    return b"\n" + _INDENT * min(max(level, 0), _MOST_LEVELS)
