"""The configuration that a command works with, and the event loop that it runs on."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import typer

from .. import config
from ..config import Config
from ..config import url as urls
from ..config.validation import Location

T = TypeVar("T")

DEFAULT_FILE = "config.yml"


def load(file: Path | None, url: str | None, layout: str | None = None) -> Config:
    """Return the configuration that ``--config`` or ``--url`` names, else that of the default file.

    Its warnings go to standard error. Raises typer.BadParameter if both or neither are given and
    there is no default file, and ConfigError.
    """
    found = _load(file, url)
    if layout is None:
        return found
    options = msgspec.structs.replace(found.options, key_layout=str(layout))
    return msgspec.structs.replace(found, options=options)


def _load(file: Path | None, url: str | None) -> Config:
    if file is not None and url is not None:
        raise typer.BadParameter("give only one of them", param_hint="--config / --url")
    if file is None and url is None:
        if not os.path.isfile(DEFAULT_FILE):
            raise typer.BadParameter(
                f"give one of them, as there is no {DEFAULT_FILE} here",
                param_hint="--config / --url",
            )
        file = Path(DEFAULT_FILE)
    with _warnings_shown():
        if file is not None:
            return config.load(file)
        assert url is not None
        if "://" not in url and not urls.HOST_AND_PORT.fullmatch(url):
            # config.load would take it for the path of a file.
            urls.parse(url, Location("--url"))
        return config.load(url)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine and return its result; uses uvloop if it is installed."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(work)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def require_input(argument: str) -> None:
    """Raise typer.BadParameter for a missing argument unless standard input is a pipe or a file."""
    if sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter(
            "it is missing, and nothing is piped into standard input", param_hint=argument
        )


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Print dscache's log warnings on standard error during the block, and none afterwards."""
    logger = logging.getLogger("dscache")
    # Without a handler, Python would print every lost connection on standard error.
    logger.addHandler(logging.NullHandler())
    shown = logging.StreamHandler()
    shown.setLevel(logging.WARNING)
    shown.setFormatter(logging.Formatter("dscache: warning: %(message)s"))
    logger.addHandler(shown)
    try:
        yield
    finally:
        logger.removeHandler(shown)
