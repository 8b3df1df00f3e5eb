"""Versions of dscache and of the libraries that it works with, for ``--version``."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

from .. import __version__, _backend

_LIBRARIES = ("hiredis", "msgspec", "redis", "PyYAML", "uvloop")


def described() -> str:
    """Return two lines: version, core, Python and folder; then the versions of the libraries."""
    folder = Path(_backend.__file__).parent
    core = f"{_backend.BACKEND} core"
    if _backend.core.READER == "own":
        core += " with its own reader"
    libraries = (f"{name} {version}" for name in _LIBRARIES if (version := _version_of(name)))
    return (
        f"dscache {__version__}, {core}, Python {platform.python_version()}, in {folder}\n"
        f"{', '.join(libraries)}"
    )


def _version_of(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
