"""The commands of the command line. Imports typer and rich, which are an extra."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from . import versions
from .options import flag

# The module and the function of each command.
_COMMANDS = {
    "get": ("get", "get"),
    "set": ("set", "set_"),
    "head": ("head", "head"),
    "delete": ("delete", "delete"),
    "edit": ("edit", "edit"),
    "ls": ("ls", "ls"),
    "diff": ("diff", "diff"),
    "doctor": ("doctor", "doctor"),
    "top": ("top", "top"),
    "export": ("export", "export"),
    "import": ("import_", "import_"),
    "bench": ("bench", "bench"),
    "watch": ("watch", "watch"),
    "migrate": ("migrate", "migrate"),
    "cluster": ("cluster", "cluster"),
}


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(versions.described())
        raise typer.Exit


def make_app(words: Sequence[str] = ()) -> typer.Typer:
    """Return the command line for these words: its help lists every command.

    Words that begin with a command get that one alone, since to import all takes longer than most
    commands run.
    """
    app = typer.Typer(
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        # typer's tracebacks show local variables, and passwords with them.
        pretty_exceptions_enable=False,
        # Help without frames in a file or a pipe.
        rich_markup_mode="markdown" if sys.stdout.isatty() else None,
    )
    app.callback()(_dscache)
    for name in words[:1] if words and words[0] in _COMMANDS else _COMMANDS:
        module, function = _COMMANDS[name]
        app.command(name)(getattr(import_module(f".{module}", __package__), function))
    return app


def _dscache(
    version: Annotated[
        bool, flag("--version", "Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Versioned JSON records in Redis: inspect and change them from a terminal or a script."""
