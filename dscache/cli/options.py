"""Options that most commands share: the Redis to use, and the format of the result."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import Config
from .settings import DEFAULT_FILE, load, with_layout


def flag(name: str, text: str, **options: Any) -> Any:
    """Return an option without a value, whose type help would show by default."""
    return typer.Option(name, metavar="", help=text, **options)


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help=f"Configuration file; the default without --url is {DEFAULT_FILE} in this folder.",
    ),
]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="redis://, rediss:// or unix:// URL, or host:port."),
]
JsonOption = Annotated[
    bool, flag("--json", "Print JSON, as it does by default when the output is no terminal.")
]
IfNewerOption = Annotated[
    bool, flag("--if-newer", "Write only records newer than the stored ones.")
]
PrefixOption = Annotated[
    str, typer.Option(metavar="PREFIX", help="Only records whose names begin with it.")
]


class KeyLayout(StrEnum):
    """The values of ``--layout``."""

    AUTO = "auto"
    DEEPSTREAM = "deepstream"
    HASHTAG = "hashtag"


LayoutOption = Annotated[
    KeyLayout | None,
    typer.Option(
        "--layout",
        metavar="LAYOUT",
        help="Key layout in place of the configured one: auto, deepstream or hashtag.",
        show_default=False,
    ),
]
_KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
_SHARED = {
    "config": (ConfigOption, None),
    "url": (UrlOption, None),
    "layout": (LayoutOption, None),
    "json": (JsonOption, False),
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """The values of the shared options."""

    config: Path | None
    url: str | None
    layout: KeyLayout | None
    json: bool

    def load(self) -> Config:
        """Return the configuration. Raises typer.BadParameter and ConfigError."""
        config = load(self.config, self.url)
        return config if self.layout is None else with_layout(config, self.layout)

    @property
    def as_json(self) -> bool:
        """Whether to print JSON: with ``--json``, or if standard output is no terminal."""
        return self.json or not sys.stdout.isatty()


def with_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add shared options to a command: ``config``, ``url``, ``layout``, ``json``.

    They follow the command's own options, and it receives their values as ``chosen``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def call(**arguments: Any) -> None:
            values = {name: arguments.pop(name, default) for name, (_, default) in _SHARED.items()}
            command(**arguments, chosen=Chosen(**values))

        own = inspect.signature(command, eval_str=True)
        parameters = [one for one in own.parameters.values() if one.name != "chosen"]
        for name in names:
            kind, default = _SHARED[name]
            parameters.append(
                inspect.Parameter(name, _KEYWORD_ONLY, default=default, annotation=kind)
            )
        # typer reads the signature and the annotations.
        call.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {one.name: one.annotation for one in parameters}
        return call

    return decorate


with_all_options = with_options(*_SHARED)
