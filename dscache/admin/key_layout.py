"""The keys of records in a layout, and the name of the record that a key belongs to."""

from __future__ import annotations

from ..config import Options
from ..core import constants
from ..core.resp import Encoder

DEEPSTREAM = "deepstream"
HASHTAG = "hashtag"

_SUFFIXES = (constants.VERSION_SUFFIX, constants.DATA_SUFFIX)
_SPECIAL = b"*?[]^-\\"


class Layout:
    """The mapping of names to keys: ``deepstream`` or ``hashtag``, after a key prefix."""

    def __init__(self, kind: str, key_prefix: str = "") -> None:
        self.kind = kind
        self._prefix = key_prefix.encode()
        self._encoder = Encoder(key_prefix, kind == HASHTAG)

    @classmethod
    def of(cls, options: Options) -> Layout:
        """Return the layout that options configure."""
        return cls(HASHTAG if options.hash_tag else DEEPSTREAM, options.key_prefix)

    def keys(self, name: str) -> tuple[bytes, bytes]:
        """Return the version key and the data key of a record."""
        return self._encoder.keys(name)

    def name_of(self, key: bytes) -> str | None:
        """Return the name of the record that a key belongs to, or None if there can't be one."""
        if not key.endswith(_SUFFIXES) or not key.startswith(self._prefix):
            return None
        stem = key[len(self._prefix) : -2]
        if self.kind == HASHTAG:
            found = _untagged(stem)
            if found is None:
                return None
            stem = found
        if not stem:
            return None
        try:
            return stem.decode()
        except UnicodeDecodeError:  # no name is encoded like this
            return None

    def starts(self, prefix: str) -> list[bytes]:
        """Return the beginnings of the keys of all records whose names begin with ``prefix``."""
        text = prefix.encode()
        if self.kind != HASHTAG:
            return [self._prefix + text]
        braced = self._prefix + constants.TAG_FOR_BRACE + (text or constants.TAG_CLOSE)
        plain = self._prefix + constants.TAG_OPEN + text
        if not text:
            return [plain, braced]
        return [braced if text.startswith(constants.TAG_CLOSE) else plain]

    def pattern(self, prefix: str) -> bytes:
        """Return a MATCH pattern for SCAN that covers the version keys of these records."""
        starts = self.starts(prefix)
        start = starts[0] if len(starts) == 1 else self._prefix
        escaped = b"".join(
            b"\\" + start[i : i + 1] if start[i] in _SPECIAL else start[i : i + 1]
            for i in range(len(start))
        )
        return escaped + b"*" + constants.VERSION_SUFFIX


def _untagged(stem: bytes) -> bytes | None:
    """Return the name in the hash tag of a key without its suffix; None without a hash tag."""
    brace, opened = constants.TAG_FOR_BRACE, constants.TAG_OPEN
    if stem.startswith(brace + constants.TAG_CLOSE):
        return stem[len(brace) :]
    if len(stem) > 2 and stem.startswith(opened) and stem.endswith(constants.TAG_CLOSE):
        name = stem[1:-1]
        return None if name.startswith(constants.TAG_CLOSE) else name
    return None


def is_version_key(key: bytes) -> bool:
    """Return whether a key is a version key."""
    return key.endswith(constants.VERSION_SUFFIX)


def partner(key: bytes) -> bytes:
    """Return the other key of the record that a key belongs to."""
    other = constants.DATA_SUFFIX if is_version_key(key) else constants.VERSION_SUFFIX
    return key[:-2] + other
