"""The keys of records in a layout, and the name of the record that a key belongs to."""

from __future__ import annotations

from ..config import Options
from ..core.keys import KeyLayout

DEEPSTREAM = "deepstream"
HASHTAG = "hashtag"


class Layout(KeyLayout):
    """The mapping of names to keys: ``deepstream`` or ``hashtag``, after a key prefix."""

    def __init__(self, kind: str, key_prefix: str = "") -> None:
        super().__init__(key_prefix, kind == HASHTAG)
        self.kind = kind

    @classmethod
    def of(cls, options: Options) -> Layout:
        """Return the layout that options configure."""
        return cls(HASHTAG if options.hash_tag else DEEPSTREAM, options.key_prefix)
