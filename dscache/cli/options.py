"""The options that most commands have: which Redis it is about, and how the result is printed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import Config
from .settings import DEFAULT_FILE, load, wants_json

# Of an option that is there or not: else help shows a type, as if it wanted a value.
FLAG = ""

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help=f"Configuration file; without --url, {DEFAULT_FILE} in this folder is the default.",
    ),
]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="redis://, rediss:// or unix:// URL, or host:port."),
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", metavar=FLAG, help="Print JSON, which is the default where no terminal is."
    ),
]


class KeyLayout(StrEnum):
    """What ``--layout`` may be."""

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
_SHARED = {
    "config": (ConfigOption, None),
    "url": (UrlOption, None),
    "layout": (LayoutOption, None),
    "json": (JsonOption, False),
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """What these options say."""

    file: Path | None
    url: str | None
    layout: KeyLayout | None
    json: bool

    def load(self) -> Config:
        """Return the configuration. Raises typer.BadParameter and ConfigError."""
        return load(self.file, self.url, self.layout)

    @property
    def as_json(self) -> bool:
        """Whether the result is to be JSON: if asked for, or if nobody sees it."""
        return wants_json(self.json)


def with_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options behind its own: ``config``, ``url``, ``layout``, ``json``.

    The command itself gets what they say as ``chosen``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def call(**arguments: Any) -> None:
            said = {name: arguments.pop(name, default) for name, (_, default) in _SHARED.items()}
            file = said.pop("config")
            command(**arguments, chosen=Chosen(file, **said))

        own = inspect.signature(command, eval_str=True)
        parameters = [one for one in own.parameters.values() if one.name != "chosen"]
        for name in names:
            kind, default = _SHARED[name]
            parameters.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
                )
            )
        # What typer reads of a command.
        call.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {one.name: one.annotation for one in parameters}
        return call

    return decorate


with_all_options = with_options(*_SHARED)
