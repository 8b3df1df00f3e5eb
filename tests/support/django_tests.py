"""Django's own tests, which its wheel doesn't have."""

from __future__ import annotations

import sys
from pathlib import Path

# Where ``make test`` unpacks them.
_UNPACKED = Path(sys.prefix, "django-tests")


def find_django_tests() -> str | None:
    """Return the folder that has Django's tests of caches, or None if there is none."""
    return str(_UNPACKED) if (_UNPACKED / "cache" / "tests.py").exists() else None
