"""Key layouts: from the name of a record to its two keys, back, and to the slot of a cluster.

Under the layout ``deepstream`` the keys of a record are ``<name>_v`` and ``<name>_d``, behind the
key prefix; under ``hashtag`` they are ``{<name>}_v`` and ``{<name>}_d``, which share a slot. The
compiled core encodes keys with C code of its own; tests compare that code with this module.

Slots: https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
"""

from __future__ import annotations

import re
from binascii import crc_hqx
from collections.abc import Iterable, Sequence
from typing import Final

from . import constants as c

NOTE_SUFFIX: Final = "}:fetch"
"""The end of the name of a note, which ``fetch`` keeps beside a record."""

_SUFFIXES = (c.VERSION_SUFFIX, c.DATA_SUFFIX)
# Characters of a pattern that stand for others.
_SPECIAL = re.compile(rb"[*?\[\]^\\-]")


def common_prefix(names: Sequence[str]) -> str:
    """Return what all names begin with.

    ``os.path.commonprefix`` does that too, and warns on Python 3.15 that it is deprecated.
    """
    first, last = min(names, default=""), max(names, default="")
    pairs = enumerate(zip(first, last, strict=False))
    length = next((at for at, (one, other) in pairs if one != other), None)
    return first[:length]


def names_with(prefix: str, names: Iterable[str | None]) -> list[str]:
    """Return the names of records that begin with a prefix; notes of ``fetch`` are left out."""
    return [
        name
        for name in names
        if name is not None and name.startswith(prefix) and not name.endswith(NOTE_SUFFIX)
    ]


class KeyLayout:
    """The keys of records behind one prefix, with a hash tag around the name or without."""

    def __init__(self, key_prefix: str, hash_tag: bool) -> None:
        self.prefix = key_prefix.encode()
        self.hash_tag = hash_tag

    def keys(self, name: str) -> tuple[bytes, bytes]:
        """Return the keys of a record: the version key and the data key."""
        text = name.encode()
        if not self.hash_tag:
            stem = self.prefix + text
        elif text.startswith(c.TAG_CLOSE):
            stem = self.prefix + c.TAG_FOR_BRACE + text
        else:
            stem = self.prefix + c.TAG_OPEN + text + c.TAG_CLOSE
        return stem + c.VERSION_SUFFIX, stem + c.DATA_SUFFIX

    def name_of(self, key: bytes) -> str | None:
        """Return the name of the record that a key belongs to, or None for a key of no record.

        A key belongs to a record exactly if ``keys`` returns it for the record's name.
        """
        if not key.endswith(_SUFFIXES) or not key.startswith(self.prefix):
            return None
        stem: bytes | None = key[len(self.prefix) : -len(c.DATA_SUFFIX)]
        if self.hash_tag and stem is not None:
            stem = _untagged(stem)
        try:
            return stem.decode() or None if stem is not None else None
        except UnicodeDecodeError:
            return None

    def is_no_text(self, key: bytes) -> bool:
        """Return whether a key is a record's but for its name, which is no UTF-8."""
        if not key.endswith(_SUFFIXES) or not key.startswith(self.prefix):
            return False
        stem: bytes | None = key[len(self.prefix) : -len(c.DATA_SUFFIX)]
        if self.hash_tag and stem is not None:
            stem = _untagged(stem)
        try:
            if stem is not None:
                stem.decode()
        except UnicodeDecodeError:
            return True
        return False

    def slot(self, name: str) -> int:
        """Return the slot of both keys of a record, or -1 if their slots differ."""
        version, data = map(slot_of_key, self.keys(name))
        return version if version == data else -1

    def starts(self, text: str) -> list[bytes]:
        """Return the beginnings of the keys of all records whose names begin with ``text``."""
        if self.hash_tag and not text:  # both kinds of tag
            tags = (c.TAG_OPEN, c.TAG_FOR_BRACE + c.TAG_CLOSE)
            return [self.prefix + tag for tag in tags]
        return [self.prefix + key_stem(text, self.hash_tag).encode()]

    def pattern(self, prefix: str) -> bytes:
        """Return a MATCH pattern for SCAN that covers the version keys of these records."""
        starts = self.starts(prefix)
        start = starts[0] if len(starts) == 1 else self.prefix
        return _SPECIAL.sub(rb"\\\g<0>", start) + b"*" + c.VERSION_SUFFIX


def _untagged(stem: bytes) -> bytes | None:
    """Return the name in the hash tag of a key without its suffix, or None without such a tag."""
    if stem.startswith(c.TAG_FOR_BRACE + c.TAG_CLOSE):
        return stem[len(c.TAG_FOR_BRACE) :]
    if len(stem) > 2 and stem.startswith(c.TAG_OPEN) and stem.endswith(c.TAG_CLOSE):
        name = stem[len(c.TAG_OPEN) : -len(c.TAG_CLOSE)]
        return None if name.startswith(c.TAG_CLOSE) else name  # such a name has the other tag
    return None


def key_stem(text: str, hash_tag: bool) -> str:
    """Return the beginning, behind the key prefix, of the keys of names beginning with ``text``."""
    if not hash_tag:
        return text
    opening = c.TAG_FOR_BRACE if text.startswith(c.TAG_CLOSE.decode()) else c.TAG_OPEN
    return opening.decode() + text


def slot_of_key(key: bytes) -> int:
    """Return the slot of a key, computed from its hash tag if it has a nonempty one."""
    start = key.find(c.TAG_OPEN) + 1
    end = key.find(c.TAG_CLOSE, start) if start else -1
    return crc_hqx(key[start:end] if end > start else key, 0) % c.SLOTS


def is_version_key(key: bytes) -> bool:
    """Return whether a key ends with the suffix of version keys."""
    return key.endswith(c.VERSION_SUFFIX)


def partner(key: bytes) -> bytes:
    """Return the other key of the record that a key belongs to."""
    other = c.DATA_SUFFIX if is_version_key(key) else c.VERSION_SUFFIX
    return key[: -len(c.DATA_SUFFIX)] + other
