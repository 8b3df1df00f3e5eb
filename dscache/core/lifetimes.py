"""Versions that say when a value expires, for the caches of other libraries on records.

Such a version is the time in milliseconds since 1970, with random bits behind it, so that no write
is mistaken for an earlier one. The lifetime of a record in Redis is the same, in whole seconds.
"""

from __future__ import annotations

import math
import random
import time
from typing import Final

_RANDOM_BITS: Final = 20
# A version with this bit belongs to a value that doesn't expire.
_FOREVER: Final = 1 << 62
# The last millisecond that fits below that bit, in the year 2109.
_LATEST: Final = (1 << 42) - 1
# A version below is none of these. It is the time of a day in 2020.
_FIRST: Final = 1_600_000_000_000 << _RANDOM_BITS


def _now() -> int:
    return time.time_ns() // 1_000_000


def version_for(seconds: float) -> int:
    """Return a new version for a value that lives that long, or infinitely."""
    if seconds == math.inf:
        return _FOREVER | random.getrandbits(61)  # the next versions have that bit too
    expires = min(_now() + round(seconds * 1000), _LATEST)
    return expires << _RANDOM_BITS | random.getrandbits(_RANDOM_BITS)


def rest_of(version: int) -> float | None:
    """Return the seconds that a value has left, or None if its version doesn't say that."""
    if version >= _FOREVER:
        return math.inf
    if version < _FIRST:
        return None
    return ((version >> _RANDOM_BITS) - _now()) / 1000


def is_over(version: int) -> bool:
    """Whether a value has expired by the clock of this machine."""
    return _FIRST <= version < _FOREVER and version >> _RANDOM_BITS <= _now()
