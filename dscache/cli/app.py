"""The commands of the command line. Imports typer and rich, which are an extra."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .options import flag
from .words import quotable

_NEGATIVE = re.compile(r"-\d+(\.\d+)?([eE][+-]?\d+)?")
# The words with which the validator of typer begins its errors.
_VALIDATOR = "Value error, "
# The module of each command, and the function in it. A final underscore is no part of the command:
# it sets the name apart from a word of Python's own.
_COMMANDS = {
    name.rstrip("_"): name
    for name in (
        *("get", "set_", "head", "delete", "edit", "ls", "diff", "doctor", "top", "export"),
        *("import_", "bench", "watch", "migrate", "cluster"),
    )
}


class _Program(TyperGroup):
    """The program itself, whose errors say where the options of a command belong."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Return the words that are left. Raises an error of typer."""
        with _errors_quotable(), _hint_at_wrong_option("an option of a command follows its name"):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the words name. Raises an error of typer, and those of commands."""
        with _errors_quotable():
            return super().invoke(ctx)


class _Command(TyperCommand):
    """A command with plain errors. The arguments of ``set`` may be negative numbers."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Return the words that are left. Raises an error of typer."""
        if self.name == "set":
            # The data may be such a number, and no option begins with a digit.
            ctx.ignore_unknown_options = any(map(_NEGATIVE.fullmatch, args))
        try:
            with _hint_at_wrong_option("a name or data that begins with - goes behind --", "-[^-]"):
                return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix(_VALIDATOR)
            raise


@contextmanager
def _errors_quotable() -> Iterator[None]:
    """Let errors of the command line quote no login, and nothing that steers a terminal."""
    try:
        yield
    except Exception as error:
        # typer exports no base class of them.
        if hasattr(error, "format_message"):
            # Line by line: without a command, the error is the help.
            lines = error.message.split("\n")  # type: ignore[attr-defined]
            error.message = "\n".join(map(quotable, lines))  # type: ignore[attr-defined]
        raise


@contextmanager
def _hint_at_wrong_option(hint: str, which: str = "") -> Iterator[None]:
    """Add a hint to the error of an option that doesn't exist; a pattern may say of which."""
    try:
        yield
    except Exception as error:
        # typer exports no class for it.
        option = getattr(error, "option_name", None)
        if option is not None and re.match(which, option):
            error.message += f"; {hint}"  # type: ignore[attr-defined]
        raise


def _show_version(requested: bool) -> None:
    if requested:
        from . import versions

        typer.echo(versions.described())
        raise typer.Exit


def make_app(words: Sequence[str] = ()) -> typer.Typer:
    """Return the command line for these words: its help lists every command.

    Words that begin with a command get that one alone, since to import all takes longer than most
    commands run.
    """
    app = typer.Typer(
        cls=_Program,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        # typer's tracebacks show local variables, and passwords with them.
        pretty_exceptions_enable=False,
        # Help without frames in a file or a pipe.
        rich_markup_mode="markdown" if sys.stdout.isatty() else None,
    )
    app.callback()(_dscache)
    for name in words[:1] if words and words[0] in _COMMANDS else _COMMANDS:
        own = _COMMANDS[name]
        app.command(name, cls=_Command)(getattr(import_module(f".{own}", __package__), own))
    return app


def _dscache(
    version: Annotated[
        bool, flag("--version", "Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Versioned JSON records in Redis: inspect and change them from a terminal or a script."""
