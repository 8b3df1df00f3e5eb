"""All commands of the command line, put together. Imported only where typer and rich are there."""

from __future__ import annotations

import platform
import sys
from typing import Annotated

import typer

from .. import __version__, _backend
from . import bench, cluster, doctor, export, migrate, records, watch
from .options import FLAG

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    # With the values of local variables, a traceback would show passwords.
    pretty_exceptions_enable=False,
    # Frames are for eyes; in a file or a pipe they are in the way.
    rich_markup_mode="markdown" if sys.stdout.isatty() else None,
)


def _show_version(asked: bool) -> None:
    if asked:
        python = platform.python_version()
        typer.echo(f"dscache {__version__}, {_backend.BACKEND} core, Python {python}")
        raise typer.Exit


@app.callback()
def dscache(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar=FLAG,
            is_eager=True,
            callback=_show_version,
            help="Show the version.",
        ),
    ] = False,
) -> None:
    """Versioned JSON records in Redis: look at what is there, from a terminal or a script."""


app.command("get")(records.get)
app.command("set")(records.set_)
app.command("head")(records.head)
app.command("delete")(records.delete)
app.command("doctor")(doctor.doctor)
app.command("export")(export.export)
app.command("import")(export.import_)
app.command("bench")(bench.bench)
app.command("watch")(watch.watch)
app.command("migrate")(migrate.migrate)
app.command("cluster")(cluster.cluster)
