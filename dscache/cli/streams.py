"""Standard output and standard error that can't be written."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import IO, Any


def discard_rest(stream: IO[Any]) -> None:
    """Lead a stream to /dev/null.

    What it has buffered would fail again at the interpreter's exit, whose status it would change.
    """
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
