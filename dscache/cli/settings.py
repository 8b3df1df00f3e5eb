"""What all commands share: which Redis they are about, how they run, and how they print."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import typer
from rich.text import Text

from .. import config
from ..admin.cluster_config import detect_cluster
from ..cache import AsyncCache
from ..config import Config
from ..config import url as urls
from ..config.address import HOST_AND_PORT
from ..config.validation import Location

T = TypeVar("T")

DEFAULT_FILE = "config.yml"
INTERRUPTED = 130  # as shells have it: 128 and the signal


def load(file: Path | None, url: str | None, layout: str | None = None) -> Config:
    """Return the configuration that ``--config`` or ``--url`` names, or the default file.

    What it warns of goes to standard error. Raises typer.BadParameter unless exactly one of
    them is given, and ConfigError.
    """
    found = _load(file, url)
    if layout is None:
        return found
    options = msgspec.structs.replace(found.options, key_layout=str(layout))
    return msgspec.structs.replace(found, options=options)


def _load(file: Path | None, url: str | None) -> Config:
    if file is not None and url is not None:
        raise typer.BadParameter("only one of them can be given", param_hint="--config / --url")
    if file is None and url is None:
        if not os.path.isfile(DEFAULT_FILE):
            raise typer.BadParameter(
                f"one of them is needed, as there is no {DEFAULT_FILE} here",
                param_hint="--config / --url",
            )
        file = Path(DEFAULT_FILE)
    with _warnings_shown():
        if file is not None:
            return config.load(file)
        assert url is not None
        if "://" not in url and not HOST_AND_PORT.fullmatch(url):
            # Else it would be taken for the path of a file.
            urls.parse(url, Location("--url"))
        return config.load(url)


@asynccontextmanager
async def opened(config: Config) -> AsyncIterator[AsyncCache]:
    """Give a cache that is ready, on the cluster if the server is a node of one.

    It shows what the primaries hold: not what a replica does still, or a near cache remembers.
    """
    config = await detect_cluster(config)
    options = msgspec.structs.replace(config.options, scale_reads="master", near_cache=None)
    async with AsyncCache(msgspec.structs.replace(config, options=options)) as cache:
        yield cache


def run(work: Coroutine[Any, Any, T]) -> T:
    """Return what becomes of a coroutine, on uvloop's event loop if that is installed."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(work)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def wants_json(asked: bool) -> bool:
    """Return whether the result is to be JSON: if asked for, or if nobody sees it."""
    return asked or not sys.stdout.isatty()


def print_json(document: Any) -> None:
    """Print one JSON document."""
    typer.echo(msgspec.json.format(msgspec.json.encode(document), indent=2))


def require_input(wanted: str) -> None:
    """Raise typer.BadParameter, for want of an argument, unless standard input has something."""
    if sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter(
            "it is missing, and nothing is piped into standard input", param_hint=wanted
        )


def write(line: bytes) -> None:
    """Write to standard output, as it is; who reads it in a pipe gets it at once."""
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def complain(message: str) -> None:
    """Print one line of an error, or of a warning, on standard error."""
    with suppress(OSError):  # there is nowhere else to say it
        print(f"dscache: {printable(message)}", file=sys.stderr, flush=True)


def printable(words: str) -> str:
    """Return words in which others had a say, without what would steer a terminal."""
    return "".join(one if one.isprintable() else " " for one in words)


def plain(words: str, style: str = "") -> Text:
    """Return words in which others had a say as rich prints them, in one style."""
    return Text(printable(words), style)


def number(count: int, one: str, many: str = "") -> str:
    """Return a count and the noun for it, such as ``1 node`` or ``12,000 nodes``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def tell_notes(notes: Sequence[str], total: int) -> None:
    """Print what is wrong, one by one, and how much more there is of it."""
    for note in notes:
        complain(note)
    if total > len(notes):
        complain(f"and {total - len(notes):,} more")


@contextmanager
def interruptible(what_then: str) -> Iterator[None]:
    """End with a word and the usual exit status if Ctrl-C ends what is done meanwhile."""
    try:
        yield
    except KeyboardInterrupt:
        complain(f"interrupted; {what_then}" if what_then else "interrupted")
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Show what dscache logs as a warning meanwhile; afterwards the commands tell themselves."""
    logger = logging.getLogger("dscache")
    # Without any, Python would print every lost connection beside the result.
    logger.addHandler(logging.NullHandler())
    shown = logging.StreamHandler()
    shown.setLevel(logging.WARNING)
    shown.setFormatter(logging.Formatter("dscache: warning: %(message)s"))
    logger.addHandler(shown)
    try:
        yield
    finally:
        logger.removeHandler(shown)
