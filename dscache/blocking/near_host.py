"""The near cache that the processes of a host share, for ``nearCache: {shared: true}``.

Theory of operation
-------------------
All processes of a host map one file, the **segment**, which has the entries. One of them, the
**owner**, has the connection over which the server reports changes; the others wait for its place.
``core/host_segment.pxi`` has the segment, ``near_segment.py`` the files and their locks. The rules
are those of ``core/shared_near.py``, with processes in the place of threads.

**Changes are made under a lock, and hits take none.** The lock is an ``flock``, so the system
releases it if its process dies. A process that finds it released in the middle of a change drops
all entries. No process waits for the lock for longer than some milliseconds. After that, a read
does without an entry. A step that has to drop an entry then drops all of them, by an atomic
addition to the number of the epoch.

**A hit is never half an entry.** Each entry has a sequence number, which is odd while the entry is
written. A reader copies the entry, and returns it only if the number of the entry and that of the
epoch are the same before and after. The texts lie in blocks that other entries may take over, but
only after the number of the former entry has changed. The numbers are read and written by atomic
operations, with the fences that any processor needs for this. An entry has the whole name, so that
another name with the same hash isn't mistaken for it.

**The fence.** A read puts its empty entry into the segment before it is sent, with a ticket that no
other entry ever has. A report, a write or an answer that differs drops the entry. The answer fills
the entry only if ticket and epoch are still the same.

**The epoch** is a number in the segment. It is even while the owner hears of changes, and odd
otherwise. It grows when a connection begins or ends, and at a flush. An entry is of the epoch in
which its read was sent. Beside the epoch stands the time up to which the owner knows of every
change. If the owner dies or stops, that time stands still, and hits end within ``idle_limit``. The
next owner first ends the epoch.

**Own writes** are fenced in the process from the call to the reply, as without ``shared``: the
process serves no entry of the name meanwhile. The entry of all processes is dropped before and
after the write. So a record that another process has read during the write isn't served here after
it.

**Is it the same server?** An answer is kept only if the server that gave it is the one that reports
its changes. A process serves nothing before an answer to itself has shown that it speaks with that
server too. It needs such an answer for each new connection of the owner.

A forked child maps the segment anew, with locks of its own, at its first use. Until then it has no
segment: with the open files of its parent it would also have its parent's locks.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from .. import _backend
from ..config import Config, Options
from ..core.failures import EndedHere
from ..core.near_node import is_of_keys
from ..errors import ConfigError
from .foreign_errors import raise_foreign
from .near_cache import NearFront
from .near_link import NearConnection, NearLink
from .near_segment import Segment
from .pool import Asked, Pool

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from .._fast import HostNearCache

_logger = logging.getLogger("dscache")

# How often a process tries to become the owner, in seconds: at first, and within ``idleLimit``.
_FIRST_GLANCE: Final = 0.005
_GLANCES: Final = 4
_LONGEST_GLANCE: Final = 0.5


def check_host(config: Config) -> None:
    """Raise ConfigError where processes can't share a near cache."""
    near = config.options.near_cache
    if near is None or not near.shared or config.name == "memory":
        return
    if _backend.BACKEND == "pure":
        problem = "needs the compiled core, and this process has the pure one"
    elif sys.platform != "linux" or not _backend.core.HOST_NEAR_SUPPORTED:
        # It was tried on no other system.
        problem = "needs Linux and 64-bit atomic operations"
    else:
        return
    raise ConfigError(
        f"{config.source}: nearCache: shared {problem}; leave it out, and each process has a near "
        "cache of its own"
    )


def _bytes_of(identity: str) -> bytes:
    return identity.encode("utf-8", "surrogateescape")


class HostNode:
    """The server as the processes of a host know it; only the owner may pass on its reports."""

    def __init__(self, core: HostNearCache) -> None:
        self.core = core

    @property
    def is_live(self) -> bool:
        """Whether the server reports its changes to this process."""
        return self.core.leads and self.core.is_live

    def connected(self, identity: str | None, since: float) -> None:
        """Begin to cache: the server reports every change after ``since``."""
        self.core.begin_epoch(_bytes_of(identity or ""), since)

    def confirm(self, known: float) -> None:
        """Note that every change from before a time has been reported.

        Raises EndedHere if another process has got an answer of another server.
        """
        if self.core.is_doubted:
            raise EndedHere("another server answers")
        self.core.confirm(known)

    def disconnected(self, reason: str, is_trusted: bool = True) -> None:
        """End all entries."""
        self.core.end_epoch(reason)

    def unreachable(self) -> None:
        """Do nothing: no stale entries are served."""

    def reachable(self) -> None:
        """Do nothing, as for ``unreachable``."""

    def take_push(self, push: Any) -> None:
        """Drop the entries of changed keys. Raises ProtocolError for a push of a wrong shape."""
        if is_of_keys(push):
            self.core.take_keys(push[1])


class HostLink(NearLink):
    """Hears of changes for all processes of a host, or waits until this one is the owner.

    ``on_session`` is called with the identity of the server when the owner, in another process, has
    a new connection.
    """

    def __init__(
        self,
        options: Options,
        credentials: CredentialProvider | None,
        node: HostNode,
        segment: Segment,
        *,
        on_connected: Callable[[NearConnection], object],
        on_session: Callable[[str], object],
        pool: Pool,
    ) -> None:
        super().__init__(options, credentials, node, on_connected=on_connected, pool=pool)
        self._core = node.core
        self._segment = segment
        self._on_session = on_session
        self._session = 0
        self._glance = _FIRST_GLANCE
        self._longest_glance = min(self._near.idle_limit / 1000 / _GLANCES, _LONGEST_GLANCE)

    def renew(self) -> None:
        # The owner may be another process, which has records of the former login as well.
        self._core.flush("login")
        super().renew()

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            if not self._segment.try_lead():
                self._wait_for_owner()
                continue
            try:
                self._core.leads = True
                failures = 0 if self._serve() else failures + 1
            finally:
                self._core.leads = False
                self._segment.resign()
            # Meanwhile, another process may have more luck.
            self._pause(failures)

    def _wait_for_owner(self) -> None:
        """Wait a moment for the place of the owner, and follow its connections."""
        core = self._core
        if core.is_live:
            session = core.session
            identity = core.identity
            if session != self._session and identity is not None:
                self._on_session(identity)
                self._session = session
            self.refusal = None
            self._decided.set()
            self._glance = _FIRST_GLANCE
            self._stopping.wait(self._longest_glance)
        else:
            # The owner is about to connect, or no server can be reached.
            self._stopping.wait(self._glance)
            self._glance = min(2 * self._glance, self._longest_glance)


class HostFront(NearFront):
    """The operations of a Pool, with the near cache of the host before them."""

    core: HostNearCache

    def _make_core(self) -> Any:
        make = _backend.core.HostNearCache
        return make(self._get, self._head, **self._options.for_near_cache())

    def _begin(self) -> None:
        super()._begin()
        self._segment: Segment | None = None

    def _make_links(self) -> list[NearLink]:
        near = self._options.near_cache
        # Known from here on, so that its files are closed when the cache is, or in a forked child.
        segment = self._segment = self._segment or Segment(self.core, self._options)
        try:
            segment.attach()
        except ConfigError as error:
            raise_foreign(error)
            if near is None or near.required:
                raise
            _logger.warning("%s", error)
            return []
        return [
            HostLink(
                self._options,
                self._credentials,
                HostNode(self.core),
                segment,
                on_connected=self._leave_strangers,
                on_session=self._pool.leave_strangers,
                pool=self._pool,
            )
        ]

    def _is_of_owner(self, operation: Asked, stamp: object) -> bool:
        identity = operation.identity
        if identity is None:
            return False
        if self.core.vouches(_bytes_of(identity)):
            return True
        if self.core.identity not in (None, identity):
            self.core.doubt()
        return False

    def close(self) -> None:
        super().close()
        if self._segment is not None:
            self._segment.detach()

    def reset_after_fork(self) -> None:
        segment = self._segment
        super().reset_after_fork()
        if segment is not None:
            segment.leave()
