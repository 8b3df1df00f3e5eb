"""The keys of records in a layout, and the name of the record that a key belongs to."""

from __future__ import annotations

import re

from ..config import Options
from ..core import constants
from ..core.keys import KeyLayout

DEEPSTREAM = "deepstream"
HASHTAG = "hashtag"

# Characters of a pattern that stand for others.
_SPECIAL = re.compile(rb"[*?\[\]^\\-]")


class Layout(KeyLayout):
    """The mapping of names to keys: ``deepstream`` or ``hashtag``, after a key prefix."""

    def __init__(self, kind: str, key_prefix: str = "") -> None:
        super().__init__(key_prefix, kind == HASHTAG)
        self.kind = kind

    @classmethod
    def of(cls, options: Options) -> Layout:
        """Return the layout that options configure."""
        return cls(HASHTAG if options.hash_tag else DEEPSTREAM, options.key_prefix)

    def pattern(self, prefix: str) -> bytes:
        """Return a MATCH pattern for SCAN that covers the version keys of these records."""
        starts = self.starts(prefix)
        start = starts[0] if len(starts) == 1 else self.prefix
        return _SPECIAL.sub(rb"\\\g<0>", start) + b"*" + constants.VERSION_SUFFIX
