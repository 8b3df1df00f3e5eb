"""All commands of the command line. Imports typer and rich, which are an extra."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import versions
from .bench import bench
from .cluster import cluster
from .delete import delete
from .diff import diff
from .doctor import doctor
from .edit import edit
from .export import export
from .get import get
from .head import head
from .import_ import import_
from .ls import ls
from .migrate import migrate
from .options import flag
from .set import set_
from .top import top
from .watch import watch

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    # typer's tracebacks show local variables, and passwords with them.
    pretty_exceptions_enable=False,
    # Help without frames in a file or a pipe.
    rich_markup_mode="markdown" if sys.stdout.isatty() else None,
)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(versions.described())
        raise typer.Exit


@app.callback()
def dscache(
    version: Annotated[
        bool, flag("--version", "Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Versioned JSON records in Redis: inspect and change them from a terminal or a script."""


_COMMANDS = (
    *(get, set_, head, delete, edit, ls, diff),
    *(doctor, top, export, import_, bench, watch, migrate, cluster),
)
for _command in _COMMANDS:
    app.command(_command.__name__.strip("_"))(_command)
