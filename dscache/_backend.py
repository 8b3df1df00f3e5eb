"""Choose the core: ``_fast`` (Cython) or ``_pure`` (Python), which behave the same.

``DSCACHE_BACKEND=fast|pure`` obeys or raises. Unset, the compiled core is taken, else the
pure one, with the reason logged once. Whoever needs the core uses ``_backend.core`` at the
moment of construction and never imports a twin by its name.
"""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType

_MODULES = {"fast": "dscache._fast", "pure": "dscache._pure"}
_logger = logging.getLogger("dscache")


def choose(wanted: str | None) -> tuple[str, ModuleType]:
    """Return the name and the module of the core that ``wanted`` (or None) asks for.

    Raises ImportError when the named core is unknown or can't be loaded.
    """
    if wanted:
        if wanted not in _MODULES:
            raise ImportError(f'DSCACHE_BACKEND={wanted!r}: must be "fast" or "pure"')
        try:
            return wanted, importlib.import_module(_MODULES[wanted])
        except ImportError as error:
            raise ImportError(
                f"DSCACHE_BACKEND={wanted}: {_MODULES[wanted]} can't be loaded: {error}; "
                "unset the variable to take whichever core loads, or reinstall dscache"
            ) from error
    try:
        return "fast", importlib.import_module(_MODULES["fast"])
    except ImportError as error:
        # An ImportError alone: a compiled core that is there but broken must not hide.
        _logger.warning(
            "the compiled core can't be loaded (%s): falling back to pure Python, "
            "which is several times slower; reinstall dscache with a C compiler at hand, "
            "or set DSCACHE_BACKEND=pure to choose it silently",
            error,
        )
        return "pure", importlib.import_module(_MODULES["pure"])


BACKEND, core = choose(os.environ.get("DSCACHE_BACKEND"))


def described(what: str, address: str, server: str) -> str:
    """Return in one line what something is, where its server is and which core does the work."""
    known = f" ({server})" if server else ""
    return f"dscache {what} at {address}{known}, {BACKEND} core"
