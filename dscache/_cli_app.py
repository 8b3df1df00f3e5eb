"""All commands of the command line, put together. Imported only where typer and rich are there."""

from __future__ import annotations

import sys

import typer

from . import _cli_cluster

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    # With the values of local variables, a traceback would show passwords.
    pretty_exceptions_enable=False,
    # Frames are for eyes; in a file or a pipe they are in the way.
    rich_markup_mode="markdown" if sys.stdout.isatty() else None,
)


@app.callback()
def dscache() -> None:
    """Versioned JSON records in Redis: look at what is there, from a terminal or a script."""


app.command("cluster")(_cli_cluster.cluster)
