"""Commands as RESP; the pure twin of ``resp.pxi``."""

from __future__ import annotations

from typing import Any, Final

import hiredis

from . import constants as c
from . import scripts
from .batch import Batch, Write
from .condition import repeat_of
from .keys import KeyLayout

# hiredis's stub gives it a narrower type than it has.
pack_command: Any = hiredis.pack_command


# Names up to so many characters have the headers of their keys ready.
_SHORT: Final = 256


class Encoder(KeyLayout):
    """Writes the commands of batches, with the keys of one layout."""

    def __init__(self, key_prefix: str, hash_tag: bool) -> None:
        super().__init__(key_prefix, hash_tag)
        opening, closing = ("{", "}") if hash_tag else ("", "")
        around = len(self.prefix) + len(opening) + len(closing) + len(c.DATA_SUFFIX)
        self._heads = [f"${around + n}\r\n{key_prefix}{opening}" for n in range(_SHORT)]
        self._tails = [f"{closing}{end.decode()}\r\n" for end in (c.VERSION_SUFFIX, c.DATA_SUFFIX)]

    def _reading(self, names: list[str]) -> bytes:
        """Return the MGET of these records."""
        text = "".join(names)
        if text.isascii() and not (self.hash_tag and "}" in text):
            heads, (version, data) = self._heads, self._tails
            try:
                keys = [
                    f"{(head := heads[len(name)])}{name}{version}{head}{name}{data}"
                    for name in names
                ]
            except IndexError:
                pass  # a long name
            else:
                return f"*{2 * len(names) + 1}\r\n$4\r\nMGET\r\n{''.join(keys)}".encode()
        command: bytes = pack_command((b"MGET", *(key for n in names for key in self.keys(n))))
        return command

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
        if kind == c.GET:
            return ask + self._reading(batch.names[first:last]), last - first
        keys: list[bytes] = []
        for i in range(first, last):
            keys.extend(self.keys(batch.names[i]))
        entries = batch.entries[first:last]
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
        lifetimes_and_guards = [
            (b"%d" % write.ttl, _sent_guard(write, repeated=i < batch.repeated))
            for i, write in enumerate(entries, first)
        ]
        is_shared = len(set(lifetimes_and_guards)) == 1
        arguments: list[bytes] = []
        for write, own in zip(entries, lifetimes_and_guards, strict=True):
            arguments += (b"%d" % write.version, write.text)
            if not is_shared:
                arguments += own
        if is_shared:
            arguments += lifetimes_and_guards[0]
        return ask + pack((*how, count, *keys, *arguments)), last - first


def _sent_guard(write: Write, *, repeated: bool) -> bytes:
    return repeat_of(write.guard) if repeated and write.guard != c.UNGUARDED else write.guard
