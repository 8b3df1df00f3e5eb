"""Options that most commands share: the Redis to use, and the format of the result."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ..config import Config
from ..errors import shorten
from .settings import load, with_layout


def flag(name: str, text: str, **options: Any) -> Any:
    """Return an option without a value, whose type help would show by default."""
    return typer.Option(name, metavar="", help=text, **options)


def number_option(
    kind: type[int] | type[float],
    text: str,
    *,
    least: float,
    most: float | None = None,
    **options: Any,
) -> Any:
    """Return an option for a number, whole or with a fraction, from ``least`` to ``most``."""
    return typer.Option(help=text, parser=number_parser(kind, least, most), **options)


def number_parser(
    kind: type[int] | type[float], least: float, most: float | None
) -> Callable[[str | float], float]:
    """Return a function that reads a number, or raises typer.BadParameter in plain words.

    The words of typer are those of its validator, and differ from version to version.
    """
    bounds = f"of {least:,} or more" if most is None else f"from {least:,} to {most:,}"
    expected = f"a whole number {bounds}" if kind is int else f"a number {bounds}"

    def read(given: str | float) -> float:
        try:
            value: float = kind(given)
        except ValueError:
            value = math.nan
        # NaN is neither below the least value nor above the greatest one.
        if not (least <= value and (most is None or value <= most)):
            raise typer.BadParameter(f"it must be {expected}, not {shorten(given)}")
        return value

    return read


IfNewerOption = Annotated[
    bool, flag("--if-newer", "Write only records newer than the stored ones.")
]


def _prefix(given: str) -> str:
    """Return a prefix of names. Raises typer.BadParameter."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("it is not UTF-8") from None
    return given


_PREFIX: Final = "Only records whose names begin with it."
PrefixOption = Annotated[str, typer.Option(metavar="PREFIX", help=_PREFIX, callback=_prefix)]
PrefixArgument = Annotated[
    str, typer.Argument(metavar="PREFIX", help=_PREFIX, show_default=False, callback=_prefix)
]


class KeyLayout(StrEnum):
    """The values of ``--layout``."""

    AUTO = "auto"
    DEEPSTREAM = "deepstream"
    HASHTAG = "hashtag"


@dataclass(frozen=True, slots=True)
class Chosen:
    """The values of the shared options."""

    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Configuration file; by default config.yml or conf/config.yml in this folder.",
        ),
    ] = None
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="redis://, rediss:// or unix:// URL, or host:port; by default DSCACHE_URL.",
        ),
    ] = None
    layout: Annotated[
        KeyLayout | None,
        typer.Option(
            "--layout",
            metavar="LAYOUT",
            help="Key layout in place of the configured one: auto, deepstream or hashtag.",
            show_default=False,
        ),
    ] = None
    json: Annotated[
        bool, flag("--json", "Print JSON, as it does by default when the output isn't a terminal.")
    ] = False

    def load(self) -> Config:
        """Return the configuration. Raises typer.BadParameter and ConfigError."""
        config = load(self.config, self.url)
        return config if self.layout is None else with_layout(config, self.layout)

    @property
    def as_json(self) -> bool:
        """Whether to print JSON: with ``--json``, or if standard output isn't a terminal."""
        return self.json or not sys.stdout.isatty()


_SHARED = inspect.signature(Chosen, eval_str=True).parameters


def with_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add shared options to a command, by the names of the fields of Chosen.

    They follow the command's own options, and it receives their values as ``chosen``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def call(**arguments: Any) -> None:
            shared = {name: arguments.pop(name) for name in names}
            command(**arguments, chosen=Chosen(**shared))

        own = inspect.signature(command, eval_str=True)
        parameters = [one for one in own.parameters.values() if one.name != "chosen"]
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters += (_SHARED[name].replace(kind=kind) for name in names)
        # typer reads the signature and the annotations.
        call.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined] # read by inspect
        call.__annotations__ = {one.name: one.annotation for one in parameters}
        return call

    return decorate


with_all_options = with_options(*_SHARED)
