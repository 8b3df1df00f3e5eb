"""The base of AsyncCache and Cache: the configuration, and the counters."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, Self, TypeVar

from . import _backend
from .config import Config, load, load_url
from .config.sources import NO_SOURCE, Source
from .errors import shorten
from .net.credentials import check_provider

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

_logger = logging.getLogger("dscache")


class Nodes(Protocol):
    """The server, or the nodes of a cluster, that a cache has connected to."""

    @property
    def server(self) -> str: ...
    @property
    def is_ready(self) -> bool: ...
    def stats(self) -> dict[str, Any]: ...


NodesT = TypeVar("NodesT", bound=Nodes)


def warn_of_dropped(resource: object, remedy: str) -> None:
    """Warn that an object was dropped without ``close``; call it in ``__del__``."""
    message = f"{resource!r} was dropped without close(); {remedy}"
    warnings.warn(message, ResourceWarning, stacklevel=3, source=resource)


def check_cache(operation: str, cache: object) -> None:
    """Raise TypeError for an object that is no cache, of which metrics were to be exported."""
    if not isinstance(cache, CacheBase):
        raise TypeError(f"{operation} needs an AsyncCache or a Cache, not {type(cache).__name__}")


def check_label(operation: str, name: object, following: str) -> None:
    """Raise TypeError for the name of a cache in metrics that is no text.

    ``following`` is the next argument, which may have been given in its place.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"{operation}: name must be a str, not {type(name).__name__}; write {following}=... "
            "for that"
        )


class CacheBase(Generic[NodesT]):
    """A cache, which connects at its first use."""

    def __init__(
        self,
        source: Source | Config = NO_SOURCE,
        credentials: CredentialProvider | None = None,
        **options: Any,
    ) -> None:
        """Make a cache; ``from_config`` documents the arguments."""
        check_provider(credentials)
        self._config = load(source, options=options)
        self._credentials = credentials
        self._topology: NodesT | None = None
        self._closed = False
        self._pid = 0  # the process in which it was opened
        # Empty once a write below one of them has been warned of.
        self._hot_paths = self._config.hot_path_prefixes

    @classmethod
    def from_config(
        cls,
        source: Source | Config = NO_SOURCE,
        *,
        credentials: CredentialProvider | None = None,
        **options: Any,
    ) -> Self:
        """Return a cache configured by a file, a mapping or a URL; it isn't connected yet.

        ``source`` is one of these:

        - the path of deepstream's YAML or JSON file
        - a mapping of the same shape, or of options alone
        - a URL (``redis://``, ``rediss://``, ``unix://``), ``host:port`` or ``localhost``
        - a Config of ``dscache.config.load``
        - left out, if ``options`` name the server: ``host="10.0.0.1"``

        ``options`` override those of the source. They are named as in a file, or in snake_case:
        ``commandTimeout=200`` or ``command_timeout=200``. ``credentials`` is a
        ``redis.CredentialProvider``, which is called before each connection. It replaces the
        configured username and password. The constructor takes the same arguments.

        The cache connects at the first operation, or on entering a ``with`` or ``async with``
        block.

        Raises ConfigError for a bad configuration.
        """
        return cls(source, credentials, **options)

    @classmethod
    def from_url(
        cls, url: str, *, credentials: CredentialProvider | None = None, **options: Any
    ) -> Self:
        """Return a cache configured by a URL or ``host:port``, as ``from_config`` does.

        Raises ConfigError for a bad URL, and for the path of a file.
        """
        return cls(load_url(url, options=options), credentials)

    def _warn_of_hot_paths(self, names: Iterable[str]) -> None:
        """Warn once of a guarded write to a record that deepstream keeps at version 0."""
        paths = self._hot_paths
        found = next((one for one in names if isinstance(one, str) and one.startswith(paths)), None)
        if found is not None:
            self._hot_paths = ()
            _logger.warning(
                "record %s is below storageHotPathPrefixes (%s), where deepstream writes version 0 "
                "at every write: if_newer, update and patch write higher ones, and refuse to write "
                "0 again; write version 0 without a condition, as dscache.deepstream.Peer does",
                shorten(found),
                self._config.source,
            )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse copies and pickles: the connections can't be shared with them."""
        raise TypeError(
            f"{type(self).__name__} can't be copied or pickled; open another one by its "
            "configuration"
        )

    @property
    def config(self) -> Config:
        """The checked configuration."""
        return self._config

    @property
    def is_ready(self) -> bool:
        """Whether the server, or every primary of a cluster, is connected: bool.

        An AsyncCache that was opened connects again by itself. A Cache connects only for an
        operation or ``when_ready``, so a probe of a Cache must call ``when_ready``.
        """
        return self._topology is not None and self._topology.is_ready

    @property
    def description(self) -> str:
        """One line that names the cache, its server and the core; contains no password."""
        server = self._topology.server if self._topology is not None else ""
        return _backend.described(f"{self._config.name} cache", self._config.address, server)

    def stats(self) -> dict[str, Any]:
        """Return counters since the cache was opened, as a dict; empty before that.

        - ``operations``: calls; a bulk counts once
        - ``records``: the sum of ``reads``, ``writes``, ``not_newer`` and ``deletes``
        - ``reads``, ``hits``, ``misses``: records read, found and not found
        - ``halves``: records of which Redis held one key only
        - ``damaged``: records whose stored version isn't one
        - ``writes``, ``deletes``: records written, and records to delete
        - ``not_newer``: writes and deletions refused by ``if_newer`` or ``if_version``
        - ``failed``: records whose call ended in an error
        - ``overloaded``: calls refused with Overloaded
        - ``batches``, ``sent``, ``mean_batch``: batches sent, the records in them, and their mean
        - ``commands``, ``flushes``: commands for records, and writes to sockets
        - ``bytes_out``, ``bytes_in``: bytes sent for records, and all bytes received
        - ``queued``, ``in_flight``: records to be sent now, and records sent without a reply so far
        - ``pending``, ``pending_bytes``: operations under way now, and the bytes that they write
        - ``waiting``: in a Cache, threads that wait for a connection now
        - ``connections``: connections that are ready now
        - ``connects``, ``reconnections``: connections made, and connections made after a loss
        - ``redirections``: redirections by the nodes of a cluster
        - ``last_loss``: the reason of the last loss of a connection, or of the last failure to
          connect
        - ``latency``: ``bounds``, the upper bounds of the buckets in seconds; and ``operations``,
          which has the ``count``, the ``sum`` in seconds and the ``buckets`` of each kind of
          operation. Time runs from the call to the reply
        - ``refreshes``, ``nodes``: on a cluster, refreshes of the slots, and the counters of each
          node
        - ``near_cache``: the near cache's ``hits``, ``misses``, ``joins``, ``stale``,
          ``invalidations``, ``evictions`` and ``dropped_fills``; ``flushes`` by reason; and the
          ``records`` and ``bytes`` that it keeps
        - ``maintenance``: ``notifications`` of hosted servers by kind, ``moves`` to another
          address, ``moved_slots``, and how often connections were ``relaxed``
        """
        return {} if self._topology is None else self._topology.stats()

    def __del__(self) -> None:
        # ``__init__`` may have raised, and a forked child must leave its parent's sockets alone.
        topology = self.__dict__.get("_topology")
        if topology is None or self._closed or self._config.name == "memory":
            return
        if sys.is_finalizing() or self._pid != os.getpid():
            return
        self._closed = True
        try:
            self._close_dropped(topology)
        finally:
            warn_of_dropped(self, self._remedy)

    _remedy = ""
    """How to close a cache, for the warning about one that wasn't closed."""

    def _close_dropped(self, topology: NodesT) -> None:
        """Close the connections of a cache that was dropped, without waiting."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._config.name} at {self._config.address}>"
