"""Text from a server or a user that is shown on a terminal."""

from __future__ import annotations

import re
from typing import Final

# A path has lost one slash of such a URL.
_LOGIN: Final = re.compile(r"\b((?:redis|valkey|unix)s?:?//?)\S*@", re.IGNORECASE)


def printable(words: str) -> str:
    """Return text without the characters that steer a terminal."""
    return "".join(one if one.isprintable() else " " for one in words)


def quotable(message: str) -> str:
    """Return the text of an error without such characters, and without the login of a URL."""
    return _LOGIN.sub(r"\1***@", printable(message))
