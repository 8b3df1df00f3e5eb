"""Peer: a Python server among deepstream's servers, on one configuration file."""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from ..aio.lifecycle import AsyncResource
from ..cache import AsyncCache
from ..config.messages import split_options, with_server_name
from ..config.sources import Source
from ..core import failures
from ..errors import UsageError, shorten
from ..messages import MessageNode
from . import settings as settings_
from .cluster import ClusterMember
from .events import Events
from .lists import Lists
from .presence import Presence
from .records import Records
from .rpc import RPCs
from .settings import Settings

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider


class Peer(AsyncResource):
    """A Python server in a cluster of deepstream's servers, for one asyncio event loop.

    ``async with`` opens it. It then has ``events``, ``records``, ``lists``, ``rpc`` and
    ``presence``. Before that, each of them raises UsageError. They use the peer's AsyncCache,
    ``cache``, and its MessageNode, ``node``. A peer tells the servers regularly that it is alive,
    and never becomes their leader.
    """

    events: Events
    records: Records
    lists: Lists
    rpc: RPCs
    presence: Presence

    def __init__(
        self, cache: AsyncCache, node: MessageNode, settings: Settings, *, reconcile: bool = True
    ) -> None:
        self.cache = cache
        self.node = node
        self._settings = settings
        self._reconcile = reconcile
        self._on_gap = node.on_gap
        node.on_gap = self._heal
        self._member: ClusterMember | None = None
        self._is_closed = False
        self._opening: asyncio.Task[None] | None = None

    @classmethod
    def from_config(
        cls,
        source: Source,
        *,
        server_name: str | None = None,
        credentials: CredentialProvider | None = None,
        on_gap: Callable[[float, float], object] | None = None,
        reconcile: bool = True,
        **options: Any,
    ) -> Self:
        """Return a peer configured by a file, a mapping or a URL; it isn't connected yet.

        ``source`` is the path of deepstream's file, a mapping of the same shape or of options
        alone, a URL or ``host:port``. From a file, a peer reads the sections ``cache`` and
        ``clusterNode``. It also reads the options of ``record``, ``rpc`` and ``clusterRegistry``
        that servers and peers share.

        ``server_name`` must be unique among all servers. The name in the file belongs to
        deepstream's server, so a peer without ``server_name`` gets a random name. Messages about a
        record may cross each other. With ``reconcile``, the peer then makes the servers read the
        record again. ``credentials`` and ``on_gap`` are as for ``MessageNode``. ``options``
        override the options of both sections. Each option goes to the connection that has it.
        Options are named as in a file, or in snake_case.

        Raises ConfigError for a bad configuration.
        """
        server_name, others = with_server_name(server_name, options)
        name = f"dscache-{uuid.uuid4().hex[:12]}" if server_name is None else server_name
        of_cache, of_node = split_options(others)
        node = MessageNode.from_config(
            source, server_name=name, credentials=credentials, on_gap=on_gap, **of_node
        )
        cache = AsyncCache.from_config(source, credentials=credentials, **of_cache)
        return cls(cache, node, settings_.load(source), reconcile=reconcile)

    @property
    def server_name(self) -> str:
        """This peer's name among the servers: str."""
        return self.node.server_name

    @property
    def servers(self) -> list[str]:
        """The names of the other servers and peers that are alive: list of str."""
        return [] if self._member is None else self._member.servers

    @property
    def is_ready(self) -> bool:
        """Whether both connections are open and all subscriptions are confirmed: bool."""
        return self._member is not None and self.cache.is_ready and self.node.is_ready

    @property
    def description(self) -> str:
        """One line that names the peer, its servers and the core; contains no password."""
        return f"deepstream peer: {self.node.description}; {self.cache.description}"

    def stats(self) -> dict[str, Any]:
        """Return counters since the peer was made, as a dict.

        - ``cache``, ``node``: the counters of the AsyncCache and of the MessageNode
        - ``servers``: the number of other servers and peers that are alive
        - ``events_emitted``, ``events_received``, ``events_damaged``, and ``listening`` iterators
        - ``records_written``, ``records_deleted``, ``records_expired``, ``records_reconciled``
        - ``records_untold``, ``records_told_late``: records whose message is still to be sent, and
          records whose message was sent later
        - ``rpcs_made``, ``rpcs_served``, ``rpcs_rejected``, ``rpcs_failed``, ``rpcs_late``, and
          ``providers``, the number of RPCs that the peer provides
        """
        stats: dict[str, Any] = {"cache": self.cache.stats(), "node": self.node.stats()}
        if self._member is not None:
            stats |= {**self.events.stats(), **self.records.stats(), **self.rpc.stats()}
            stats["servers"] = len(self._member.servers)
        return stats

    async def when_ready(self) -> None:
        """Open the peer, and wait until it is connected and every subscription is confirmed.

        The call raises the errors of ``AsyncCache.when_ready`` and ``MessageNode.when_ready``.
        Raises UsageError if the peer is closed.
        """
        if self._is_closed:
            raise failures.closed("peer")
        if self._opening is None:
            self._opening = asyncio.create_task(self._open(), name="dscache peer opens")
        try:
            await asyncio.shield(self._opening)
        except BaseException:
            if self._opening.done() and self._member is None:
                self._opening = None  # the next call tries again
            raise
        await self.node.when_ready()

    async def _open(self) -> None:
        await self.cache.when_ready()
        await self.node.when_ready()
        member = ClusterMember(self.node, self._settings)
        rpc = RPCs(self.node, member, self._settings)
        records = Records(self.cache, self.node, self._settings, reconcile=self._reconcile)
        self.events = Events(self.node)
        self.records, self.rpc, self.presence = records, rpc, Presence(member)
        self.lists = Lists(records)
        self._member = member
        await self.node.when_ready()
        member.join()

    def __getattr__(self, name: str) -> Any:
        if name in ("events", "records", "lists", "rpc", "presence"):
            if self._is_closed:
                raise failures.closed("peer")
            raise UsageError(f"peer.{name}: use async with peer, or await its when_ready()")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    async def close(self) -> None:
        """Leave the cluster, and close both connections; a second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
            await asyncio.wait([self._opening])
        try:
            if self._member is not None:
                self.events.close()
                self.presence.close()
                await self.rpc.close()
                await self.records.close()
                await self._member.leave()
        finally:
            try:
                await self.node.close()
            finally:
                await self.cache.close()

    def _heal(self, since: float, until: float) -> Any:
        """After a gap, announce this peer again, and have the servers read its records again."""
        if self._member is not None and not self._is_closed:
            self._member.announce()
            self.records.on_gap()
        if self._on_gap is not None:
            result = self._on_gap(since, until)
            if inspect.isawaitable(result):
                return result
        return None

    def __repr__(self) -> str:
        return f"<Peer {shorten(self.server_name)}>"
