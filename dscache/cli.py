"""The command line: ``dscache COMMAND ...``, which is also ``python -m dscache``.

Exit status: 0 if all is well, 1 if it isn't or an error of dscache ended the command, 2 if the
command line itself is wrong. An error is one line on standard error.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from .errors import DscacheError

# What the extra ``cli`` brings; without it, dscache itself works all the same.
_EXTRA = ("typer", "rich")


def main() -> None:
    """Run the command that the command line names. Raises SystemExit."""
    try:
        from ._cli_app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        _fail(f"the command line needs {missing}; install it with: pip install 'dscache[cli]'")
    try:
        app()
    except DscacheError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    # Servers have a say in it, and must not have one in what a terminal does.
    line = "".join(one if one.isprintable() else " " for one in message)
    sys.exit(f"dscache: {line}")
