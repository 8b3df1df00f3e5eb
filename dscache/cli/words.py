"""Text from a server or a user that is shown on a terminal."""

from __future__ import annotations

import json
import re
from typing import Final

# A path has lost one slash of such a URL.
_LOGIN: Final = re.compile(r"\b((?:redis|valkey|unix)s?://?)\S*@", re.IGNORECASE)


def printable(words: str) -> str:
    """Return text without the characters that steer a terminal."""
    return "".join(one if one.isprintable() else " " for one in words)


def escaped(text: bytes) -> bytes:
    """Return JSON text with JSON's escape sequences in place of what steers a terminal.

    JSON has such characters in strings alone, but for white space, which stays.
    """
    words = text.decode(errors="replace")
    if words.isprintable():
        return text
    parts = (one if one.isprintable() or one in "\n\t" else json.dumps(one)[1:-1] for one in words)
    return "".join(parts).encode()


def quotable(message: str) -> str:
    """Return the text of an error without such characters, and without the login of a URL."""
    return _LOGIN.sub(r"\1***@", printable(message))
