"""RESP of commands and replies; the pure twin of ``resp.pxi``."""

from __future__ import annotations

from typing import Any, Final

import hiredis

from . import constants as c
from . import failures, scripts
from .batch import Batch
from .condition import repeat_of
from .keys import KeyLayout

# hiredis's stub gives it a narrower type than it has.
pack_command: Any = hiredis.pack_command

# Types that RESP2 and RESP3 announce with a length: texts in bytes, the others in elements.
_TEXTS: Final = (b"$", b"=", b"!")
_LENGTHS: Final = (*_TEXTS, b"*", b"~", b">", b"%", b"|")


def _announced(header: bytes) -> int:
    """Return the length in a header, or -1 if the header has none; hiredis refuses invalid RESP."""
    digits = header.rstrip(b"\r")
    if not digits.isdigit() or len(header) > c.HEADER_BYTES:
        return -1
    return int(digits) if len(digits) <= 18 else 10**18


class Encoder(KeyLayout):
    """Writes the commands of batches, with the keys of one layout."""

    def encode(self, batch: Batch, has_msetex: bool) -> tuple[bytes, int]:
        """Return the next command of a batch, and its record count.

        Removals, heads and operations on single keys have commands for each record instead.
        """
        pack = pack_command
        first = batch.sent
        kind = batch.kind
        msetex = kind == c.SET_TTL and has_msetex
        script = kind in (c.SET_TTL, c.SET_IF_NEWER, c.DELETE_IF) and not msetex
        limit = c.SCRIPT_RECORDS if script else c.COMMAND_RECORDS
        last = min(first + (1 if batch.one_per_command else limit), len(batch.names))
        if c.SET <= kind <= c.DELETE_IF:
            size = 0
            for i in range(first, last):
                size += len(batch.entries[i].text)
                other_ttl = msetex and batch.entries[i].ttl != batch.entries[first].ttl
                if size > c.COMMAND_BYTES or other_ttl:
                    last = max(i, first + 1)
                    break
        if batch.hash_slots:
            slot = batch.hash_slots[first]
            last = next((i for i in range(first + 1, last) if batch.hash_slots[i] != slot), last)
        ask = c.ASKING if batch.asking else b""
        if kind >= c.READ_KEY:
            commands = (ask + entry.text for entry in batch.entries[first:last])
            return b"".join(commands), last - first
        keys: list[bytes] = []
        for i in range(first, last):
            keys.extend(self.keys(batch.names[i]))
        entries = batch.entries[first:last]
        if kind == c.GET:
            return ask + pack((b"MGET", *keys)), last - first
        if kind == c.DELETE:
            pairs = zip(keys[::2], keys[1::2], strict=True)
            return b"".join(ask + pack((b"DEL", *pair)) for pair in pairs), last - first
        if kind == c.HEAD:
            pairs = zip(keys[::2], keys[1::2], strict=True)
            if ask:
                # While a slot migrates, a key that has not arrived yet looks like a missing one.
                # A command of both keys is refused instead. If the node serves EXISTS, both keys
                # are here for the GET.
                asked = (ask + pack((b"EXISTS", v, d)) + ask + pack((b"GET", v)) for v, d in pairs)
                return b"".join(asked), last - first
            out = (pack((b"GET", v)) + pack((b"TYPE", d)) for v, d in pairs)
            return b"".join(out), last - first
        count = b"%d" % len(keys)
        if kind == c.SET or msetex:
            values = (value for w in entries for value in (b"%d" % w.version, w.text))
            pairs_of = zip(keys, values, strict=True)
            flat = [part for pair in pairs_of for part in pair]
            if msetex:
                lifetime = (b"EX", b"%d" % entries[0].ttl)
                return ask + pack((b"MSETEX", count, *flat, *lifetime)), last - first
            return ask + pack((b"MSET", *flat)), last - first
        how = (
            (b"EVAL", scripts.SET_SCRIPT)
            if batch.whole_script
            else (b"EVALSHA", scripts.SET_SCRIPT_SHA)
        )
        arguments: list[bytes] = []
        for i, write in enumerate(entries, first):
            guard = write.guard
            if i < batch.repeated and guard != c.UNGUARDED:
                guard = repeat_of(guard)
            arguments += (b"%d" % write.version, write.text, b"%d" % write.ttl, guard)
        return ask + pack((*how, count, *keys, *arguments)), last - first


class LengthGuard:
    """Checks the lengths that a server announces, across any number of reads."""

    def __init__(self, max_reply_bytes: int) -> None:
        self._max_reply_bytes = max_reply_bytes
        self._skip = 0
        self._header = b""
        # Number of elements missing from each incomplete array, outermost first.
        self._left: list[int] = []

    def inspect(self, data: bytes, address: str) -> None:
        """Check the announced lengths in received data, before hiredis allocates memory for them.

        Otherwise a few bytes from a hostile server could take all memory. Raises ProtocolError.
        """
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
                    raise failures.too_long(address, length, limit)
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
        self._header = data[at : at + 2 * c.HEADER_BYTES]

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
