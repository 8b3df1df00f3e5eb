"""Bounded reading of the regular files that a configuration names.

Reading a pipe could block for ever, and a device such as ``/dev/zero`` has no end.
"""

from __future__ import annotations

import os
import stat
from typing import Final

MAX_CONFIG_BYTES: Final = 1 << 20
MAX_PEM_BYTES: Final = 16 << 20


class UnsuitableFile(ValueError):
    """A file that is refused. The text is the reason and doesn't contain the file's name."""


def check(path: str | int, limit: int) -> None:
    """Raise UnsuitableFile unless the path is a regular file of at most ``limit`` bytes.

    Raises OSError if there is no such file.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise UnsuitableFile("is a folder; name a file in it")
    if not stat.S_ISREG(status.st_mode):
        raise UnsuitableFile("isn't a regular file but a pipe, socket or device; name a file")
    if status.st_size > limit:
        raise _too_large(limit)


def read(path: str, limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Raises UnsuitableFile for any other file, and OSError or ValueError if it can't be read.
    """
    # Opening a device can have side effects, so the type is checked first.
    check(path, limit)
    # If a pipe has replaced the file, opening it doesn't wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        check(descriptor, limit)
        # Some files, such as the ones in /proc, are longer than their stated size.
        content = file.read(limit + 1)
    if len(content) > limit:
        raise _too_large(limit)
    return content


def _too_large(limit: int) -> UnsuitableFile:
    return UnsuitableFile(f"has more than {limit >> 20} MiB; is it the right file?")
