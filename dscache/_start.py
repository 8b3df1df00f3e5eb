"""The imports of the command line, which end without a traceback as its commands do.

This module imports next to nothing, since it guards the other imports.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # typing takes longer to import than all of this
if TYPE_CHECKING:
    from types import FrameType, TracebackType

# The variable that chooses the core; errors about it begin with its name.
BACKEND_VARIABLE = "DSCACHE_BACKEND"


class CommandImports:
    """A context in which the modules of the command line are imported.

    Ctrl-C ends the process with the status 130, and a wrong DSCACHE_BACKEND with one line and the
    status 2. In other programs the context does nothing.
    """

    def __enter__(self) -> None:
        self._is_command = is_command_line()
        self._ends = False
        if self._is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            try:
                signal.signal(signal.SIGINT, _end)
                self._ends = True
            except ValueError:  # in another thread than the main one
                pass

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ends:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self._is_command or not isinstance(error, ImportError):
            return
        if str(error).startswith(BACKEND_VARIABLE):
            if sys.stderr is not None:
                print(f"dscache: {error}", file=sys.stderr)
            sys.exit(2)


def _end(number: int, frame: FrameType | None) -> None:
    # KeyboardInterrupt would crash msgspec while it makes a decoder. Nothing is to be cleaned up.
    os._exit(128 + number)


def is_command_line() -> bool:
    """Return whether this process is ``dscache`` or ``python -m dscache``."""
    words = getattr(sys, "argv", None) or [""]  # an embedded Python may have none
    program = os.path.basename(words[0])
    # It is -m while Python looks for the module that -m names.
    return program == "dscache" or (
        program in ("-m", "__main__.py") and not {"dscache", "-mdscache"}.isdisjoint(sys.orig_argv)
    )
