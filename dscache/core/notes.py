"""Notes beside records that ``fetch`` loads: their names and states.

The theory of operation stands in ``core/loading.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from ..errors import RecordError
from .keys import NOTE_SUFFIX

LEASE_SECONDS: Final = 5
RENEW_SECONDS: Final = 1.5

LOADING: Final = "loading"
FRESH: Final = "fresh"
MISSING: Final = "missing"
FAILED: Final = "failed"
STALE: Final = "stale"


def note_of(name: str) -> str:
    """Return the name of the note beside a record."""
    return name + NOTE_SUFFIX


def with_notes(names: Iterable[str]) -> list[str]:
    """Return names and the names of their notes."""
    names = list(names)
    return [*names, *map(note_of, names)]


def state_of(note: Any) -> str:
    """Return the state that a note tells, or nothing without a note."""
    return str(content_of(note).get("state", ""))


def content_of(note: Any) -> Mapping[str, Any]:
    """Return the data of a note, or nothing without a note."""
    try:
        data = None if note is None else note.data
    except RecordError:
        data = None
    return data if isinstance(data, Mapping) else {}
