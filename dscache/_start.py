"""The imports of the command line, which end without a traceback as its commands do.

This module imports next to nothing, since it guards the other imports.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing takes longer to import than all of this
if TYPE_CHECKING:
    from types import TracebackType
    from typing import NoReturn

# The variable that chooses the core; errors about it begin with its name.
BACKEND_VARIABLE = "DSCACHE_BACKEND"


class CommandImports:
    """A context in which the modules of the command line are imported.

    Ctrl-C ends the process with the status 130, and a wrong DSCACHE_BACKEND with one line and the
    status 2. In other programs the context does nothing.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or not _is_command_line():
            return
        if is_interrupt(error):
            end(130)
        if isinstance(error, ImportError) and str(error).startswith(BACKEND_VARIABLE):
            if sys.stderr is not None:
                print(f"dscache: {error}", file=sys.stderr)
            sys.exit(2)


def is_interrupt(error: BaseException) -> bool:
    """Return whether an exception is KeyboardInterrupt, or was raised because of one.

    Python and typer replace it by exceptions of their own.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            return True
        cause = cause.__context__
    return False


def end(status: int) -> NoReturn:
    """End the process with an exit status after KeyboardInterrupt."""
    # Python notes an interrupt that came while it executed text, as dataclasses do, and would end
    # by SIGINT in place of the status. Other text removes the note.
    exec("")
    sys.exit(status)


def _is_command_line() -> bool:
    """Return whether this process is ``dscache`` or ``python -m dscache``."""
    words = getattr(sys, "argv", None) or [""]  # an embedded Python may have none
    program = os.path.basename(words[0])
    # It is -m while Python looks for the module that -m names.
    return program == "dscache" or (
        program in ("-m", "__main__.py") and not {"dscache", "-mdscache"}.isdisjoint(sys.orig_argv)
    )
