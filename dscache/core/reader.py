"""Received data: the limits of lengths; the pure twin of ``reader.pxi``."""

from __future__ import annotations

import re
from typing import Final

from . import constants as c
from . import failures

# Types that RESP2 and RESP3 announce with a length: texts in bytes, the others in elements.
_TEXTS: Final = (b"$", b"=", b"!")
_LENGTHS: Final = (*_TEXTS, b"*", b"~", b">", b"%", b"|")


def _announced(header: bytes) -> int:
    """Return the length in a header, or -1 if the header has none; hiredis refuses invalid RESP."""
    digits = header.rstrip(b"\r")
    if not digits.isdigit() or len(header) > c.HEADER_BYTES:
        return -1
    return int(digits) if len(digits) <= 18 else 10**18


# Bytes that may wait for the exact check.
_PUT_OFF: Final = 1024 * 1024
_TAIL: Final = 2 * c.HEADER_BYTES  # a valid header is shorter


class LengthGuard:
    """Checks the lengths that a server announces, across any number of reads.

    To go from header to header takes Python 1 µs for a text, as long as all else that a bulk does
    with a record. So ``inspect`` first looks for anything like a header of an array or a very long
    text. While all of these together, nested in each other, would be within the limits, the exact
    check is put off; and the end of a reply, of which hiredis knows, makes it needless.
    """

    def __init__(self, max_reply_bytes: int) -> None:
        self._max_reply_bytes = max_reply_bytes
        long_text = len(str(max_reply_bytes))
        self._headers = re.compile(rb"\n(?:([*~>%%|])(\d{1,19})|[$=!]\d{%d})" % long_text)
        # Number of elements missing from each incomplete array, outermost first.
        self._left: list[int] = []
        self._put_off: list[bytes] = []
        self.restart()

    def restart(self) -> None:
        """Begin anew: a reply has ended with the last byte."""
        self._skip = 0
        self._header = b""
        self._left.clear()
        self._put_off.clear()
        self._tail = b"\n"
        self._size = self._most_elements = self._most_arrays = 0

    def inspect(self, data: bytes, address: str) -> None:
        """Check the announced lengths in received data, before hiredis allocates memory for them.

        Otherwise a few bytes from a hostile server could take all memory. Raises ProtocolError.
        """
        text = self._tail + data
        self._tail = text[-_TAIL:]
        self._put_off.append(data)
        self._size += len(data)
        for mark, length in self._headers.findall(text):
            self._most_arrays += 1
            is_short = mark and len(length) < 19
            self._most_elements += 2 * int(length) if is_short else c.MAX_ELEMENTS + 1
        if (
            self._most_elements > c.MAX_ELEMENTS
            or self._most_arrays > c.MAX_DEPTH
            or self._size > _PUT_OFF
        ):
            for part in self._put_off:
                self._inspect_exactly(part, address)
            self._put_off.clear()
            self._size = 0
            self._most_elements, self._most_arrays = sum(self._left), len(self._left)

    def _inspect_exactly(self, data: bytes, address: str) -> None:
        at = self._skip  # skip the rest of a text, and of its line end
        data = self._header + data
        left = self._left
        while at < len(data):
            end = data.find(b"\n", at)
            if end < 0:
                break
            mark = data[at : at + 1]
            length = -1
            of_text = False
            if mark in _LENGTHS:
                length = _announced(data[at + 1 : end])
                of_text = mark in _TEXTS
                limit = self._max_reply_bytes if of_text else c.MAX_ELEMENTS
                if length > limit:
                    raise failures.too_long(address, length, limit, of_text)
                if of_text and length >= 0:
                    end += length + 2
            if length > 0 and not of_text:
                self._open(mark, length, address)
            elif left and mark != b"\n":
                left[-1] -= 1
                while left and not left[-1]:
                    left.pop()
                    if left:
                        left[-1] -= 1
            at = end + 1
        self._skip = max(at - len(data), 0)
        # Keep only the start of an incomplete line: a valid header is no longer than that.
        self._header = data[at : at + _TAIL]

    def _open(self, mark: bytes, length: int, address: str) -> None:
        """Enter an array, set or push, or a map or attributes, which have two elements per pair."""
        if mark in (b"%", b"|"):
            length *= 2
        if len(self._left) == c.MAX_DEPTH:
            raise failures.too_deep(address)
        total = length + sum(self._left)
        if total > c.MAX_ELEMENTS:
            raise failures.too_long(address, total, c.MAX_ELEMENTS)
        self._left.append(length)
