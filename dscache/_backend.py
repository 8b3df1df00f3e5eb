"""Choose the core: ``_fast`` (Cython) or ``core.pure`` (Python), which behave the same.

``DSCACHE_BACKEND=fast|pure`` obeys or raises. Unset, the compiled core is taken, else the pure one:
silently where dscache was installed without a compiled core, and with a warning where the core is
there but doesn't load, or the source tree isn't built. Other modules use ``_backend.core`` at the
moment of construction and never import either core by its name.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ._start import BACKEND_VARIABLE

if TYPE_CHECKING:
    from .core.pure import Message, Record

T = TypeVar("T")

_MODULES = {"fast": "dscache._fast", "pure": "dscache.core.pure"}
_logger = logging.getLogger("dscache")


def choose(wanted: str | None) -> tuple[str, ModuleType]:
    """Return the name and the module of the core that ``wanted`` (or None) asks for.

    Raises ImportError when the named core is unknown or can't be loaded.
    """
    if wanted != "pure" and isinstance(sys.modules.get(_MODULES["fast"]), _StandIn):
        del sys.modules[_MODULES["fast"]]
    if wanted:
        if wanted not in _MODULES:
            raise ImportError(f'{BACKEND_VARIABLE}={wanted!r}: must be "fast" or "pure"')
        try:
            return wanted, importlib.import_module(_MODULES[wanted])
        except ImportError as error:
            raise ImportError(
                f"{BACKEND_VARIABLE}={wanted}: {_MODULES[wanted]} can't be loaded: {error}; "
                "unset the variable to take whichever core loads, or reinstall dscache"
            ) from error
    try:
        return "fast", importlib.import_module(_MODULES["fast"])
    except ImportError as error:
        # An ImportError alone: a compiled core that is there but broken must not hide.
        _warn_of_fallback(error, Path(__file__).parent)
        return "pure", importlib.import_module(_MODULES["pure"])


def _warn_of_fallback(error: ImportError, package: Path) -> None:
    """Log why the pure core is used, unless the package was installed without a compiled core."""
    absent = isinstance(error, ModuleNotFoundError) and error.name == _MODULES["fast"]
    if absent and package.joinpath("_fast.pyx").exists():
        _logger.warning(
            "%s is the source tree of dscache, and not built: falling back to pure Python, which "
            "is several times slower; run make build, or leave this folder to import an installed "
            "dscache",
            package.parent,
        )
    elif not absent or any(package.glob("_fast.*.so")):
        _logger.warning(
            "the compiled core can't be loaded (%s): falling back to pure Python, "
            "which is several times slower; reinstall dscache for this Python with a C compiler at "
            "hand, or set DSCACHE_BACKEND=pure to choose it silently",
            error,
        )


class _StandIn(ModuleType):
    """A module under the compiled core's name for unpickling, in a process with the pure core."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.__name__} was not loaded, and has no {name}")


def _stand_in() -> None:
    """Let pickles that name the compiled core load when it is not loaded or not installed.

    Pickles of dscache 0.1 do so; the pure core makes their objects.
    """
    name = _MODULES["fast"]
    if name not in sys.modules:
        module = sys.modules[name] = _StandIn(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(Record=make_record, Message=make_message)


@overload
def make_record(
    name: str, version: int, raw: bytes, stale: bool = ..., type: None = ...
) -> Record: ...
@overload
def make_record(
    name: str, version: int, raw: bytes, stale: bool = ..., *, type: type[T]
) -> Record[T]: ...
@overload
def make_record(
    name: str, version: int, raw: bytes, stale: bool = ..., type: Any = ...
) -> Record: ...
def make_record(
    name: str, version: int, raw: bytes, stale: bool = False, type: Any = None
) -> Record:
    """Return a Record of this process's core, such as for a test.

    With a ``type``, such as a ``msgspec.Struct``, its ``data`` is of that type. The JSON text isn't
    checked before ``data`` is read. A pickled Record is a call of this function.
    """
    record: Record = core.Record(name, version, raw, stale, type)
    return record


def make_message(topic: int, sender: str, raw: bytes) -> Message:
    """Return a Message of this process's core, such as for a test.

    The JSON text isn't checked before ``data`` is read. A pickled Message is a call of this
    function.
    """
    message: Message = core.Message(topic, sender, raw)
    return message


# Pickles contain this module name, wherever the functions are defined.
make_record.__module__ = make_message.__module__ = __package__

BACKEND, core = choose(os.environ.get(BACKEND_VARIABLE))
if BACKEND == "pure":
    _stand_in()


def described(subject: str, address: str, server: str) -> str:
    """Return one line with a subject, its server's address and kind, and the core."""
    known = f" ({server})" if server else ""
    return f"dscache {subject} at {address}{known}, {BACKEND} core"
