"""The configuration that a command works with, and the event loop that it runs on."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import typer
from msgspec.structs import replace

from .. import config
from ..admin import ndjson
from ..config import Config
from ..config import url as urls
from ..config.validation import Location

T = TypeVar("T")

DEFAULT_FILE = "config.yml"


def load(file: Path | None, url: str | None) -> Config:
    """Return the configuration that ``--config`` or ``--url`` names, else that of the default file.

    Its warnings go to standard error. Raises typer.BadParameter if both or neither are given and
    there is no default file, and ConfigError.
    """
    both = "--config / --url"
    if file is not None and url is not None:
        raise typer.BadParameter("give only one of them", param_hint=both)
    source = url if file is None else file
    if source is None:
        source = Path(DEFAULT_FILE)
        if not source.is_file():
            raise typer.BadParameter(
                f"give one of them, as there is no {DEFAULT_FILE} here", param_hint=both
            )
    with _warnings_shown():
        if url is not None and "://" not in url and not urls.HOST_AND_PORT.fullmatch(url):
            # config.load would take it for the path of a file.
            urls.parse(url, Location("--url"))
        return config.load(source)


def with_layout(given: Config, layout: str) -> Config:
    """Return a configuration with another key layout."""
    return replace(given, options=replace(given.options, key_layout=str(layout)))


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine and return its result; uses uvloop if it is installed."""
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with suppress(ImportError):
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(work)


def read_input(argument: str) -> ndjson.Lines:
    """Return the lines of standard input, which replace a missing argument.

    Raises typer.BadParameter unless it is a pipe or a file.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter(
            "it is missing, and nothing is piped into standard input", param_hint=argument
        )
    return ndjson.Lines(ndjson.pieces_of(sys.stdin.fileno()), "standard input")


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
