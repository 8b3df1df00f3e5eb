"""What all commands share: which Redis they are about, and how they print."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from . import _url, config
from ._typed import Place
from .config import Config, Node, RedisOptions

DEFAULT_FILE = "config.yml"

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
    typer.Option("--json", help="Print JSON, which is the default where no terminal is."),
]


def load(file: Path | None, url: str | None) -> Config:
    """Return the configuration that ``--config`` or ``--url`` names, or the default file.

    What it warns of goes to standard error. Raises typer.BadParameter unless exactly one of
    them is given, and ConfigError.
    """
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
        if "://" not in url and not _url.HOST_AND_PORT.fullmatch(url):
            # Else it would be taken for the path of a file.
            _url.parse(url, Place("--url"))
        return config.load(url)


def on_cluster(config: Config) -> Config:
    """Return the configuration of the cluster that the configured server is a node of.

    Its host and port become the one known node, and what it logs in with holds for all. One with
    ``nodes`` is returned as it is. Raises ConfigError for what can be no node of a cluster.
    """
    options = config.options
    if options.nodes:
        return config
    place = Place(config.source)
    if config.name == "memory":
        raise place.error("the cache is inside its process; name a node of a cluster")
    if options.sentinels:
        raise place.error("a cluster has no Sentinels; name one of its nodes")
    if options.path:
        raise place.error("a cluster has no socket; name one of its nodes by host and port")
    if options.db:
        raise place.error(f"a cluster has database 0 alone, not {options.db}; leave it out")
    shared = RedisOptions(username=options.username, password=options.password, tls=options.tls)
    nodes = (Node(host=options.host, port=options.port),)
    # What else holds for one server is the fallback on a cluster anyway.
    options = msgspec.structs.replace(
        options, nodes=nodes, redis_options=shared, username=None, password=None, tls=None
    )
    return msgspec.structs.replace(config, options=options)


def wants_json(asked: bool) -> bool:
    """Return whether the result is to be JSON: if asked for, or if nobody sees it."""
    return asked or not sys.stdout.isatty()


def print_json(document: Any) -> None:
    """Print one JSON document."""
    typer.echo(msgspec.json.format(msgspec.json.encode(document), indent=2))


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
