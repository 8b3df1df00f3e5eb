"""The configuration that a command works with, and the event loop that it runs on."""

from __future__ import annotations

import asyncio
import logging
import os
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
from ..config.document import SUFFIXES
from ..config.messages import MessageConfig, load_beside
from ..config.sources import is_url
from ..config.validation import Location
from .words import quotable

T = TypeVar("T")

DEFAULT_FILES = ("config.yml", "conf/config.yml")
"""The files that are looked for in the current folder; deepstream's package has the second."""
OWN_VARIABLE, COMMON_VARIABLE = "DSCACHE_URL", "REDIS_URL"
DEFAULT_ADDRESS = "localhost:6379"


def load(file: Path | None, url: str | None) -> Config:
    """Return the configuration that ``--config`` or ``--url`` names, else the first default found.

    The defaults are ``DSCACHE_URL``, the default files, ``REDIS_URL`` and ``localhost:6379``. A
    note on standard error names a default that is no file. Warnings go there too. Raises
    typer.BadParameter if both options are given, and ConfigError.
    """
    if file is not None and url is not None:
        raise typer.BadParameter("give only one of them", param_hint="--config / --url")
    if url is not None:
        if url.lower().endswith(SUFFIXES) and not is_url(url):
            raise typer.BadParameter("a file is the value of --config", param_hint="--url")
        return _load_url(url, "--url")
    if file is not None and not str(file).lower().endswith(SUFFIXES):
        raise typer.BadParameter(
            f"a configuration is a file ending in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}; "
            "a URL or host:port is the value of --url",
            param_hint="--config",
        )
    file = file or _default_file()
    if file is not None:
        with _warnings_shown():
            return config.load(file)
    variable = OWN_VARIABLE if os.environ.get(OWN_VARIABLE) else COMMON_VARIABLE
    if given := os.environ.get(variable):
        loaded = _load_url(given, variable)
        reason = f"as {variable} says"
    else:
        loaded = _load_url(DEFAULT_ADDRESS, "default")
        others = ("--url", "--config", OWN_VARIABLE, COMMON_VARIABLE, *DEFAULT_FILES)
        reason = f"without {', '.join(others[:-1])} or {others[-1]}"
    print(f"dscache: using {quotable(shown(loaded))}, {reason}", file=sys.stderr)
    return loaded


def shown(given: Config) -> str:
    """Return the servers of a configuration, and the database unless it is 0; no password."""
    database = given.options.db
    return f"{given.address}, database {database}" if database else given.address


def load_messages(file: Path | None, url: str | None) -> tuple[MessageConfig, bool] | None:
    """Return the section ``clusterNode`` beside the cache that ``load`` finds, if there is one.

    The second item is whether the file states ``serverName``. Raises ConfigError.
    """
    file = None if url is not None else file or _default_file()
    return None if file is None else load_beside(file)


def load_source(source: str, place: str) -> Config:
    """Return the configuration of a URL, ``host:port`` or file; errors of a URL name its place."""
    if source.lower().endswith(SUFFIXES):
        with _warnings_shown():
            return config.load(Path(source))
    return _load_url(source, place)


def _default_file() -> Path | None:
    """Return the first default file that exists, unless DSCACHE_URL is set."""
    if os.environ.get(OWN_VARIABLE):
        return None
    return next((path for path in map(Path, DEFAULT_FILES) if path.is_file()), None)


def _load_url(url: str, source: str) -> Config:
    """Return the configuration of a URL or ``host:port``; errors name its source."""
    with _warnings_shown():
        # config.load would name no source, and take text that is no URL for the path of a file.
        urls.parse(url, Location(source))
        return config.load(url)


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
    if sys.stdin.isatty():
        raise typer.BadParameter(
            "it is missing, and nothing is piped into standard input", param_hint=argument
        )
    return ndjson.Lines(ndjson.pieces_of(sys.stdin.fileno()), "standard input")


class _QuotableFormatter(logging.Formatter):
    """Log messages as one line without what steers a terminal, such as in the name of a file."""

    def format(self, record: logging.LogRecord) -> str:
        return quotable(super().format(record))


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Print dscache's log warnings on standard error during the block, and none afterwards."""
    logger = logging.getLogger("dscache")
    # Without a handler, Python would print every lost connection on standard error.
    logger.addHandler(logging.NullHandler())
    shown = logging.StreamHandler()
    shown.setLevel(logging.WARNING)
    shown.setFormatter(_QuotableFormatter("dscache: warning: %(message)s"))
    logger.addHandler(shown)
    try:
        yield
    finally:
        logger.removeHandler(shown)
