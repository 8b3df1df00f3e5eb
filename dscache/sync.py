"""Cache: the public API for servers with threads, or with greenlets."""

from __future__ import annotations

import builtins
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from . import _backend
from ._forks import after_fork_in_child
from .blocking.memory import MemoryPool
from .blocking.pool import Pool
from .config import Config, load
from .errors import ConfigError, ConnectionLost

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from .core.pure import Record

_logger = logging.getLogger("dscache")


class Cache:
    """Records in Redis, for any number of threads.

    An operation has ended when its call returns: the calling thread sends it over a connection
    of its own, borrowed from at most ``maxConnections``, and waits for the answer. On a cluster
    it has one to each node, as far as it needs them.

    It raises RecordError for a bad name, version, ttl or data, or if what is stored is no
    record, ConnectionLost if the cache is closed, ReplyError (Redis said no), DeadlineExceeded
    (``commandTimeout`` is over), ConnectError or ConnectionLost (no connection, or lost before
    the answer), Overloaded (all connections are in use, and ``whenFull`` is error),
    ProtocolError, or in the bulk forms BulkError, which holds the others' result.
    """

    def __init__(self, config: Config, credentials: CredentialProvider | None = None) -> None:
        near = config.options.near_cache
        if near is not None and config.name == "redis":
            if near.required:
                raise ConfigError(
                    f"{config.source}: cache.options.nearCache: a Cache keeps nothing near; leave "
                    "it out, set nearCache.required: false, or use an AsyncCache"
                )
            _logger.info("%s: nearCache has no effect: a Cache keeps nothing near", config.source)
        self._config = config
        self._credentials = credentials
        self._pool: Pool | MemoryPool | None = None
        self._run: Callable[..., Any] | None = None
        self._closed = False
        # A signal handler may use the cache while its thread is in the middle of anything.
        self._lock = threading.RLock()
        after_fork_in_child(self, Cache._reset_after_fork)

    @classmethod
    def from_config(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        *,
        credentials: CredentialProvider | None = None,
    ) -> Self:
        """Return a cache as a file, a mapping or a URL configures it.

        ``source`` is the path of deepstream's YAML or JSON file, a mapping of the same shape, a
        URL (``redis://``, ``rediss://``, ``unix://``) or ``host:port``. It connects when it is
        first used, or entered by ``with``. ``credentials`` is a provider as redis-py has them,
        asked before each connection, and in place of the configured username and password.
        Raises ConfigError.
        """
        return cls(load(source), credentials)

    def get(self, name: str) -> Record | None:
        """Return the Record of that name, or None if there is none, or half of one.

        ``name`` is any text that isn't empty. Raises RecordError for any other, or if what Redis
        holds is no record.
        """
        return (self._run or self._open())("get", name)  # type: ignore[no-any-return]

    def head(self, name: str) -> int | None:
        """Return the version of the record of that name, an int, or None if there is none.

        Raises RecordError for a bad name, or if what Redis holds is no version.
        """
        return (self._run or self._open())("head", name)  # type: ignore[no-any-return]

    def set(
        self,
        name: str,
        version: int,
        data: Any,
        *,
        ttl: int | None = None,
        if_newer: bool = False,
    ) -> bool:
        """Write a record: version and data in one atomic step. Returns True.

        ``name`` is any text that isn't empty, and ``version`` an int from 0 to 2^63-1. ``data`` is
        anything msgspec encodes, or ``msgspec.Raw`` for text that is JSON already. ``ttl`` is the
        record's lifetime in seconds: None for the configured default, 0 for none. With
        ``if_newer``, returns False and writes nothing if Redis holds that version or a higher one.
        Raises RecordError if one of them is none of that, and ConnectionLost or DeadlineExceeded
        if a plain write may or may not have happened, which ``if_newer`` makes harmless to repeat.
        """
        return (self._run or self._open())(  # type: ignore[no-any-return]
            "set", name, version, data, ttl, if_newer
        )

    def delete(self, name: str) -> bool:
        """Remove a record, whole, half or damaged; return whether there was one.

        Raises RecordError for a bad name.
        """
        return (self._run or self._open())("delete", name)  # type: ignore[no-any-return]

    def get_bulk(self, names: Iterable[str]) -> dict[str, Record]:
        """Return the records found, by name, in the order of ``names``.

        Raises RecordError for a bad name, and then asks for none of them, and BulkError if some
        can't be read: it has their errors, and the records of the others.
        """
        return (self._run or self._open())("get_bulk", names)  # type: ignore[no-any-return]

    def head_bulk(self, names: Iterable[str]) -> dict[str, int]:
        """Return the versions of the records found, by name, in the order of ``names``.

        Raises RecordError for a bad name, and then asks for none of them, and BulkError if some
        can't be read: it has their errors, and the versions of the others.
        """
        return (self._run or self._open())("head_bulk", names)  # type: ignore[no-any-return]

    def set_bulk(
        self,
        records: Mapping[str, tuple[int, Any]],
        *,
        ttl: int | None = None,
        if_newer: bool = False,
    ) -> builtins.set[str]:
        """Write records, given as ``{name: (version, data)}``; return the names not written.

        Each record is atomic, the bulk is not: it goes out in commands of some hundred records.
        Without ``if_newer`` all are written, and the set is empty. ``ttl`` is in seconds, and
        holds for all of them. Raises RecordError for a bad record, and then writes none, and
        BulkError if some were not written for another reason: it has their errors.
        """
        return (self._run or self._open())(  # type: ignore[no-any-return]
            "set_bulk", records, ttl, if_newer
        )

    def delete_bulk(self, names: Iterable[str]) -> int:
        """Remove records; return how many there were.

        Raises RecordError for a bad name, and then removes none, and BulkError if some could not
        be removed: it has their errors, and the number of the others.
        """
        return (self._run or self._open())("delete_bulk", names)  # type: ignore[no-any-return]

    @property
    def is_ready(self) -> bool:
        """Whether there is a connection to the server, or on a cluster to all primaries."""
        return self._pool is not None and self._pool.is_ready

    @property
    def description(self) -> str:
        """What this cache is and where its records are, in one line and without passwords."""
        server = self._pool.server if self._pool is not None else ""
        return _backend.described(f"{self._config.name} cache", self._config.address, server)

    def stats(self) -> dict[str, Any]:
        """Return counters since the cache was opened; before that, nothing.

        Calls: ``operations``. Records: ``records`` (all that were answered), ``reads``, of these
        ``hits misses`` and ``halves`` (a miss of which Redis held one key), ``damaged writes
        not_newer deletes``, ``failed`` (their call ended in an error), ``overloaded`` (calls that
        were refused). Traffic: ``batches sent mean_batch`` (records a batch), ``commands flushes
        bytes_out bytes_in``. Now: ``queued in_flight`` records, ``pending`` operations and
        ``pending_bytes``, threads ``waiting`` for a connection, ``connections``. Connections so
        far: ``connects reconnections redirections last_loss``. ``latency`` has its ``bounds`` in
        seconds, and of each operation ``count``, ``sum`` in seconds and ``buckets``, from the call
        to the answer. On a cluster also ``refreshes``, and ``nodes`` with the counters of each.
        """
        return {} if self._pool is None else self._pool.stats()

    def when_ready(self) -> None:
        """Wait until the cache is ready to serve.

        Raises ConnectError if it isn't within ``connectTimeout``, at once what the server says if
        it refuses (ReplyError: WRONGPASS, NOAUTH, no such database), and ConfigError if ``nodes``
        are configured and of no cluster.
        """
        self._open()
        assert self._pool is not None
        self._pool.when_ready()

    def close(self) -> None:
        """Let other threads finish, within ``closeTimeout``, and close; the second time, nothing.

        What begins after this call is refused.
        """
        with self._lock:
            already, self._closed = self._closed, True
            self._run = None
        if self._pool is not None and not already:
            self._pool.close()

    def __enter__(self) -> Self:
        try:
            self.when_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Cache {self._config.name} at {self._config.address}>"

    def _reset_after_fork(self) -> None:
        # The thread that held it may not be in the child.
        self._lock = threading.RLock()

    def _open(self) -> Callable[..., Any]:
        """Return what does the operations."""
        with self._lock:
            if self._closed:
                raise ConnectionLost("the cache is closed")
            if self._pool is None:
                options = self._config.options
                if self._config.name == "memory":
                    self._pool = MemoryPool(options)
                elif options.nodes:
                    from .blocking.cluster_pool import ClusterPool  # of no use to most

                    self._pool = ClusterPool(self._config, self._credentials)
                else:
                    self._pool = Pool(options, self._credentials)
            self._run = self._pool.run
            return self._run
