"""Records as lines of text: ``{"name":...,"version":...,"data":...,"ttl":...}``, one a line.

The data is passed through as it is stored, and not decoded in between.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import msgspec

from .. import _backend
from ..core import constants, tolerant_json
from ..errors import DscacheError, RecordError, shorten

# A value of Redis ends at 512 MiB; what is longer is no line of ours.
_LONGEST = 2**29 + 2**20
PIECE = 64 * 1024
# What some editors and shells put before the first line of UTF-8.
BOM = b"\xef\xbb\xbf"

# What is around the data of a line as ``encode`` writes it.
_AS_WRITTEN = re.compile(
    rb'\{"name":"(?:[^"\\]|\\.)*","version":[0-9]+,"data":(.*?)(?:,"ttl":[0-9]+)?\}\s*', re.DOTALL
)

_skip = msgspec.json.Decoder(msgspec.Raw).decode
_encode = msgspec.json.Encoder().encode


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """One record as a line states it; ``ttl`` is its lifetime in seconds, if it has one."""

    name: str
    version: int
    data: Any
    ttl: int | None = None


class _RawLine(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    version: int
    data: msgspec.Raw
    ttl: int | None = None


_read = msgspec.json.Decoder(_RawLine).decode


def encode(name: str, version: int, raw: bytes, ttl: int | None = None) -> bytes:
    """Return a record as one line, with its end.

    Raises RecordError if the stored text is no JSON.
    """
    end = b"" if ttl is None else b',"ttl":%d' % ttl
    text = _presentable(name, version, raw)
    return b'{"name":%b,"version":%d,"data":%b%b}\n' % (_encode(name), version, text, end)


def _presentable(name: str, version: int, raw: bytes) -> bytes:
    """Return stored JSON text in one line of UTF-8, as all who read the record see it."""
    try:
        _skip(raw)
    except (msgspec.DecodeError, RecursionError):
        # It is stricter than what readers of records take.
        constants.decode_tolerantly(name, version, raw)
    if not raw.isascii():
        raw = raw.decode(errors="replace").encode()
    if b"\n" in raw or b"\r" in raw:
        # A line end is white space between values: within a text it would be written as \n.
        raw = raw.replace(b"\r", b" ").replace(b"\n", b" ")
    return raw


def decode(text: bytes) -> Line:
    """Return the record that a line states, checked as ``set`` would check it.

    Its data is ``msgspec.Raw``, or for text that msgspec refuses and records may hold, decoded.
    Raises RecordError.
    """
    line: Line
    text = text.removeprefix(BOM)
    try:
        read = _read(text)
        line = Line(read.name, read.version, read.data, read.ttl)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        line = _decode_tolerantly(text, error)
    core = _backend.core
    core.check_name(line.name)
    core.check_version(line.name, line.version)
    if line.ttl is not None:
        constants.check_ttl(line.name, line.ttl)
    return line


def _decode_tolerantly(text: bytes, refusal: Exception) -> Line:
    try:
        value = tolerant_json.decode(text)
    except ValueError as error:
        raise RecordError(f"it is no JSON: {error}") from error
    try:
        line = msgspec.convert(value, Line)
    except msgspec.ValidationError as error:
        raise RecordError(
            f'it is no record, which is {{"name":...,"version":...,"data":...}}: {error}'
        ) from refusal
    if match := _AS_WRITTEN.fullmatch(text):
        # Encoded once more, it would be another text, or too deep for that.
        with suppress(ValueError):
            tolerant_json.decode(match[1])
            line.data = msgspec.Raw(match[1])
    return line


class Lines:
    """The lines of some text, as many at a time as are there; ``number`` of the last one given."""

    def __init__(self, pieces: AsyncIterator[bytes], shown: str, *, number: int = 0) -> None:
        self.shown = shown
        self.number = number
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[list[bytes]]:
        rest: list[bytes] = []
        size = 0
        async for piece in self._pieces:
            head, end, tail = piece.rpartition(b"\n")
            if not end:
                rest.append(tail)
                size += len(tail)
                if size > _LONGEST:
                    raise DscacheError(f"{self.place(self.number + 1)}: it has no end")
                continue
            lines = b"".join((*rest, head)).split(b"\n")
            rest, size = [tail], len(tail)
            yield lines
        if last := b"".join(rest):
            yield [last]

    def place(self, number: int) -> str:
        """Return where a line stands, for messages."""
        return f"{self.shown}, line {number}"

    async def names(self, most: int) -> AsyncIterator[list[str]]:
        """Give the names that stand one a line, at most so many at a time; none of empty lines.

        Raises DscacheError for one that is no UTF-8.
        """
        async for lines in self:
            found = []
            for line in lines:
                self.number += 1
                if self.number == 1:
                    line = line.removeprefix(BOM)
                if not (text := line.removesuffix(b"\r")):
                    continue
                try:
                    found.append(text.decode())
                except UnicodeDecodeError:
                    raise DscacheError(
                        f"{self.place(self.number)}: it is no UTF-8: {shorten(text)}"
                    ) from None
            for first in range(0, len(found), most):
                yield found[first : first + most]


async def pieces_of(file: int) -> AsyncIterator[bytes]:
    """Give what is to be read, as soon as it is there, without a thread that can't be stopped."""
    loop = asyncio.get_running_loop()
    while True:
        ready = asyncio.Event()
        try:
            # Each time anew: while nobody reads, what is there would keep the loop busy.
            loop.add_reader(file, ready.set)
        except OSError:
            pass  # an ordinary file is always ready
        else:
            try:
                await ready.wait()
            finally:
                loop.remove_reader(file)
        if not (piece := os.read(file, PIECE)):
            return
        yield piece
