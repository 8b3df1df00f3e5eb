"""Records as lines of JSON: ``{"name":...,"version":...,"data":...,"ttl":...}``, one a line.

The data keeps its stored text and isn't decoded.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from .. import _backend
from ..core import failures, json_text, tolerant_json
from ..errors import DscacheError, RecordError, shorten

T = TypeVar("T")

# The longest line: a value in Redis has at most 512 MiB (proto-max-bulk-len).
_LONGEST = 2**29 + 2**20
PIECE = 64 * 1024
"""Bytes in one read."""
BOM = b"\xef\xbb\xbf"
"""The byte order mark that some editors and shells write before UTF-8."""

# A line as ``encode`` writes it, with its data as group 1.
_AS_WRITTEN = re.compile(
    rb'\{"name":"(?:[^"\\]|\\.)*","version":[0-9]+,"data":(.*?)(?:,"ttl":[0-9]+)?\}\s*', re.DOTALL
)

# The first line of an export. No configuration begins so.
_BEGINS = re.compile(
    rb'\s*\{\s*"name"\s*:\s*"(?:[^"\\]|\\.)*"\s*,\s*"version"\s*:\s*[0-9]+\s*,\s*"data"\s*:'
)

_skip = msgspec.json.Decoder(msgspec.Raw).decode
_encode = msgspec.json.Encoder().encode


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """One record of a line; ``ttl`` is its lifetime in seconds, or None."""

    name: str
    version: int
    data: Any
    ttl: int | None = None


class _RawLine(Line, forbid_unknown_fields=True):
    data: msgspec.Raw


_read = msgspec.json.Decoder(_RawLine).decode


def encode(name: str, version: int, raw: bytes, ttl: int | None = None) -> bytes:
    """Return a record as one line, with its line end.

    Raises RecordError if the stored text is not JSON.
    """
    end = b"" if ttl is None else b',"ttl":%d' % ttl
    text = on_one_line(name, version, raw)
    return b'{"name":%b,"version":%d,"data":%b%b}\n' % (_encode(name), version, text, end)


def on_one_line(name: str, version: int, raw: bytes) -> bytes:
    """Return stored JSON text as one line of UTF-8, as readers of the record see it.

    Raises RecordError if it is not JSON.
    """
    try:
        _skip(raw)
    except (msgspec.DecodeError, RecursionError):
        # msgspec is stricter than the readers of records.
        json_text.decode_tolerantly(name, version, raw)
    if not raw.isascii():
        raw = raw.decode(errors="replace").encode()
    if b"\n" in raw or b"\r" in raw:
        # A raw line end can only be white space between values: a string escapes it.
        raw = raw.replace(b"\r", b" ").replace(b"\n", b" ")
    return raw


def decode(text: bytes) -> Line | None:
    """Return the record of a line, checked as ``set`` checks it; None for an empty line.

    Its data is ``msgspec.Raw``. Raises RecordError.
    """
    text = text.removeprefix(BOM)
    if not text.strip():
        return None
    line: Line
    try:
        line = _read(text)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        line = _decode_tolerantly(text, error)
    else:
        if json_text.is_too_deep(text):  # which msgspec refuses on some Pythons alone
            line = _decode_tolerantly(text, None)
    core = _backend.core
    core.check_name(line.name)
    core.check_version(line.name, line.version)
    if line.ttl is not None:
        failures.check_ttl(line.name, line.ttl, False)
    return line


def _decode_tolerantly(text: bytes, refusal: Exception | None) -> Line:
    try:
        value = tolerant_json.decode(text)
    except ValueError as error:
        raise RecordError(f"it is not JSON: {error}") from error
    try:
        line = msgspec.convert(value, Line)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # the latter for a member
        raise RecordError(
            f'it is not a record, which is {{"name":...,"version":...,"data":...}}: '
            f"{_fault(value) or error}"
        ) from refusal
    if "\ufffd" in line.name and not _is_utf8(text):
        # Different names would become the same one.
        raise RecordError(f"record {shorten(line.name)}: its name is not UTF-8")
    if match := _AS_WRITTEN.fullmatch(text):
        # Encoded again, the text would differ, or be nested too deeply.
        with suppress(ValueError):
            tolerant_json.decode(match[1])
            line.data = msgspec.Raw(match[1])
            return line
    line.data = msgspec.Raw(_backend.core.encode_data(line.name, line.data))
    return line


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _fault(value: object) -> str:
    """Return what keeps a decoded line from being a record, or "" if nothing is found."""
    if not isinstance(value, dict):
        return f"it is {shorten(value)}"
    for name in ("name", "version", "data"):
        if name not in value:
            return f'"{name}" is missing'
    for name, kind, expected in (
        ("name", str, "a string"),
        ("version", int, "a whole number"),
        ("ttl", int, "whole seconds"),
    ):
        given = value.get(name)
        if type(given) is not kind and not (name == "ttl" and given is None):
            return f'"{name}" must be {expected}, not {shorten(given)}'
    unknown = sorted(value.keys() - set(Line.__struct_fields__))
    return f"{shorten(unknown[0])} isn't part of it" if unknown else ""


def begins_with_record(text: bytes) -> bool:
    """Return whether the first bytes of a file are those of a line as an export has it."""
    return _BEGINS.match(text.removeprefix(BOM)) is not None


class Lines:
    """The lines of a text, as many at a time as have arrived.

    Attributes:
        shown: The name of the source, for messages.
        number: The number of the last line handled, counted by the reader.
    """

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
                    raise DscacheError(f"{self.place(self.number + 1)}: it has no line end")
                continue
            lines = b"".join((*rest, head)).split(b"\n")
            rest, size = [tail], len(tail)
            yield lines
        if last := b"".join(rest):
            yield [last]

    def place(self, number: int) -> str:
        """Return the position of a line, for messages."""
        return f"{self.shown}, line {number}"

    async def items(
        self, decode: Callable[[bytes], T | None], most: int, *, rest: str = ""
    ) -> AsyncIterator[list[T]]:
        """Yield decoded lines, at most ``most`` at a time, without those decoded as None.

        Raises DscacheError at a line that ``decode`` refuses with RecordError, after those before
        it, and at one that is not UTF-8. ``rest`` ends the error of a refused line: it says what
        became of the others.
        """
        async for lines in self:
            some: list[T] = []
            for line in lines:
                self.number += 1
                try:
                    item = decode(line.removeprefix(BOM) if self.number == 1 else line)
                except RecordError as error:
                    if some:
                        yield some
                    raise DscacheError(f"{self.place(self.number)}: {error}{rest}") from error
                except UnicodeDecodeError as error:
                    # Names that may come from a wrong file: none of them is handled.
                    text = f"it is not UTF-8: {shorten(error.object)}"
                    raise DscacheError(f"{self.place(self.number)}: {text}") from None
                if item is not None:
                    some.append(item)
                if len(some) == most:
                    yield some
                    some = []
            if some:
                yield some


def name_of(line: bytes) -> str | None:
    """Return the name that a line consists of, or None if it is empty."""
    return line.removesuffix(b"\r").decode() or None


async def pieces_of(file: int) -> AsyncIterator[bytes]:
    """Yield what a file descriptor delivers, without a thread that would block the exit."""
    loop = asyncio.get_running_loop()
    while True:
        ready = asyncio.Event()
        try:
            # Registered for each read: unread input would keep the loop busy.
            loop.add_reader(file, ready.set)
        except OSError:
            pass  # epoll refuses an ordinary file, which is always ready
        else:
            try:
                await ready.wait()
            finally:
                loop.remove_reader(file)
        if not (piece := os.read(file, PIECE)):
            return
        yield piece
