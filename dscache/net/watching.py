"""The parts of a watch that both caches have: what its caller holds, and what its drivers share."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic

from msgspec.structs import replace

from ..config import Config, Options
from ..core import failures
from ..core.holder import Holder, Place
from ..core.record import DataT
from ..errors import BulkError, DscacheError, ReplyError, UsageError, shorten
from .backoff import full_jitter
from .watch import LONGEST_PAUSE, PAUSE, Change, Changes, primaries_only

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

# How errors name the commands that a watch reads with.
_READS: Final = ("mget", "type", "'get'", "`get`")


def _is_forbidden(error: ReplyError) -> bool:
    """Return whether a server refuses a command or a key to this user, or to everybody."""
    return error.code == "NOPERM" or any(failures.refuses(one, error) for one in _READS)


class WatchBase:
    """A watch as its caller holds it; ``how`` are the options of its ``Watching``.

    Tasks and threads refer to its ``Watching`` alone, so that a watch that the program drops is
    noticed.
    """

    _made_with: ClassVar[type[Watching[Any]]]

    def __init__(
        self,
        cache: object,
        topology: Any,
        config: Config,
        credentials: CredentialProvider | None,
        prefix: str,
        **how: Any,
    ) -> None:
        self._cache = cache
        self._shown = f"{shorten(prefix)} at {config.address}"
        self._watching: Any = self._made_with(topology, config, credentials, prefix, **how)

    @property
    def skipped(self) -> int:
        """The number of reports left out so far, because their names aren't UTF-8: int."""
        return int(self._watching.changes.skipped)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._shown}>"


class Watching(Generic[DataT]):
    """Changes that a watch has heard of, and the primaries that it listens to.

    A driver has the tasks or threads. It calls ``_look`` for names, reads them, and gives the
    results to ``_settle``.
    """

    _kind: ClassVar[type[Change]]
    _event: ClassVar[type[Any]]
    _usage: ClassVar[str]
    is_closed: bool

    def __init__(
        self,
        topology: Any,
        config: Config,
        credentials: CredentialProvider | None,
        prefix: str,
        *,
        records: bool,
        max_pending: int,
        type: Any = None,
    ) -> None:
        self._topology = topology
        self._options = config.options
        self.credentials = credentials
        self._of_primaries = replace(config, options=primaries_only(config.options))
        self._private: Any = None
        """The connections to primaries alone, where the cache has others."""
        self._news = self._event()
        self._type = type
        self.changes = Changes(
            config.options,
            prefix,
            self._news.set,
            records=records,
            max_pending=max_pending,
            read=self._get,
            kind=self._kind,
            as_type=type,
        )
        self._found: deque[Any] = deque()
        self._place = Place()  # of the one consumer
        self._failures = 0
        self._end: Exception | None = None
        self._pid = os.getpid()
        self._has_begun = False
        self._listening: dict[str, Any] = {}

    @property
    def addresses(self) -> list[str]:
        """The addresses of the primaries that report changes."""
        return list(self._listening)

    @property
    def is_listening(self) -> bool:
        """Whether it has begun, and must be closed in this process."""
        return self._has_begun and not self.is_closed and self._pid == os.getpid()

    def _enter(self) -> None:
        """Note that the block begins; raises UsageError a second time, or on a closed cache."""
        if self._end is not None and not self._has_begun:
            raise failures.closed("cache")
        if self._has_begun or self.is_closed:
            raise UsageError("a watch is entered once; call watch() again")
        self._has_begun = True

    # -- the iteration

    def _hold(self) -> Holder:
        """Return the place of the one consumer, held; raises UsageError if it can't be."""
        if not self._has_begun:
            raise UsageError(f"use {self._usage} cache.watch(...) as changes, and iterate over it")
        holder = self._place.take()
        if holder is None:
            raise UsageError("this watch is in use already; call watch() once per consumer")
        return holder

    def _look(self) -> list[str] | None:
        """Return the names to read next; empty to wait for news, None to look for events."""
        self._news.clear()
        if self.is_closed:
            return None
        self.changes.move_events(self._found)
        return None if self._found else self.changes.take_names()

    def _settle(
        self, names: list[str], found: Mapping[str, Any], error: DscacheError | None = None
    ) -> float:
        """Take the records or versions of some names, or an error; return the seconds to pause."""
        changes: list[Change] = []
        if error is None:
            changes = self.changes.changes_of(names, found)
        elif isinstance(error, BulkError):
            changes = self.changes.changes_of(names, error.result, error)
        elif isinstance(error, ReplyError) and _is_forbidden(error):
            # All of them are refused, and will be: the caller must hear of that.
            all_refused = BulkError(self.changes.operation, dict.fromkeys(names, error), {})
            changes = self.changes.changes_of(names, {}, all_refused)
        else:
            # The loss of a server is an event of its own. The names are read once it is back.
            self.changes.back(names)
        if not self.is_closed:
            self._found.extend(changes)
        self.changes.finish()
        if changes:
            self._failures = 0
            return 0.0
        self._failures += 1
        return full_jitter(PAUSE, LONGEST_PAUSE, self._failures - 1)

    def _get(self, name: str) -> Any:
        """Read a record, for the changes that were found."""
        raise NotImplementedError

    # -- the servers

    def _follow(self, wanted: Mapping[str, Options], *, is_first: bool) -> None:
        """Listen to the current primaries, and to no others."""
        departed = self._listening.keys() - wanted.keys()
        for address in wanted.keys() - self._listening.keys():
            if self.is_closed:
                return
            if not is_first:
                self.changes.lose(address, "it has become a primary of the cluster")
            self._listen_to(address, wanted[address], is_first=is_first)
        # Behind the gaps of the new primaries, which have these servers' records now.
        for address in departed:
            self._leave(self._listening.pop(address))
            self.changes.leave(address, "it is no longer a primary of the cluster")

    def _listen_to(self, address: str, options: Options, *, is_first: bool) -> None:
        """Begin to listen to a server, in ``_listening``."""
        raise NotImplementedError

    def _leave(self, listener: Any) -> None:
        """Have a listener end."""
        raise NotImplementedError
