"""Reading of files that a configuration names: regular ones alone, and no more than is sensible.

A pipe would be waited for without end, and a device such as ``/dev/zero`` has no end either.
"""

from __future__ import annotations

import os
import stat
from typing import Final

MAX_CONFIG_BYTES: Final = 1 << 20
MAX_PEM_BYTES: Final = 16 << 20


class UnsuitableFile(ValueError):
    """A file that is not read; the text says why, without its name."""


def check(path: str, limit: int) -> None:
    """Raise UnsuitableFile for all but a regular file of at most ``limit`` bytes, or OSError."""
    # Without a look first, opening a device might already do something.
    _check(os.stat(path), limit)


def read(path: str, limit: int) -> bytes:
    """Return what a regular file of at most ``limit`` bytes holds.

    Raises UnsuitableFile for any other, and OSError or ValueError if it can't be read.
    """
    check(path, limit)
    # Should it be a pipe by now, the opening doesn't wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        _check(os.fstat(descriptor), limit)
        # Some files, such as those of /proc, have more than they say.
        content = file.read(limit + 1)
    if len(content) > limit:
        raise _too_large(limit)
    return content


def _check(found: os.stat_result, limit: int) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise UnsuitableFile("is a folder; name a file in it")
    if not stat.S_ISREG(found.st_mode):
        raise UnsuitableFile("is no regular file but a pipe, socket or device; name a file")
    if found.st_size > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> UnsuitableFile:
    return UnsuitableFile(f"has more than {limit >> 20} MiB; is it the right file?")
