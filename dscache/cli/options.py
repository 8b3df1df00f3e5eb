"""Options that most commands share: the Redis to use, and the format of the result."""

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
from .output import wants_json
from .settings import DEFAULT_FILE, load

FLAG = ""
"""The metavar of an option without a value; by default, help would show a type."""

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
    bool,
    typer.Option(
        "--json",
        metavar=FLAG,
        help="Print JSON, as it does by default when the output is no terminal.",
    ),
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
_SHARED = {
    "config": (ConfigOption, None),
    "url": (UrlOption, None),
    "layout": (LayoutOption, None),
    "json": (JsonOption, False),
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """The values of the shared options."""

    file: Path | None
    url: str | None
    layout: KeyLayout | None
    json: bool

    def load(self) -> Config:
        """Return the configuration. Raises typer.BadParameter and ConfigError."""
        return load(self.file, self.url, self.layout)

    @property
    def as_json(self) -> bool:
        """Whether to print JSON: with ``--json``, or if standard output is no terminal."""
        return wants_json(self.json)


def with_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add shared options to a command: ``config``, ``url``, ``layout``, ``json``.

    They follow the command's own options, and it receives their values as ``chosen``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def call(**arguments: Any) -> None:
            values = {name: arguments.pop(name, default) for name, (_, default) in _SHARED.items()}
            file = values.pop("config")
            command(**arguments, chosen=Chosen(file, **values))

        own = inspect.signature(command, eval_str=True)
        parameters = [one for one in own.parameters.values() if one.name != "chosen"]
        for name in names:
            kind, default = _SHARED[name]
            parameters.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
                )
            )
        # typer reads the signature and the annotations.
        call.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {one.name: one.annotation for one in parameters}
        return call

    return decorate


with_all_options = with_options(*_SHARED)
