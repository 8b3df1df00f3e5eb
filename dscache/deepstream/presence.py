"""Presence: the users that are logged in at any server. A peer only reads it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakSet

import msgspec

from ..core.failures import closed
from ..errors import UsageError, shorten
from .arrivals import Arrivals
from .cluster import ClusterMember


class PresenceChange(msgspec.Struct, frozen=True):
    """A user who has come online at the first server, or has left the last one.

    ``user`` is the name, and ``is_online`` whether the user has come.
    """

    user: str
    is_online: bool


class PresenceChanges(Arrivals[PresenceChange]):
    """The changes of presence, by ``async for``; made by ``peer.presence.changes``.

    At most one change of each user waits. If a user comes back, or leaves again, before the change
    was taken, neither is reported.
    """

    def __init__(self, on_close: Callable[[PresenceChanges], object]) -> None:
        super().__init__("changes", on_close)
        self._waiting: OrderedDict[str, bool] = OrderedDict()

    def put(self, user: str, is_online: bool) -> None:
        """Add a change, or remove the opposite one that waits."""
        if self._waiting.pop(user, is_online) == is_online:
            self._waiting[user] = is_online
            self._news.set()

    def _has_waiting(self) -> bool:
        return bool(self._waiting)

    def _take(self) -> PresenceChange:
        return PresenceChange(*self._waiting.popitem(last=False))


class Presence:
    """The users that are online: ``peer.presence``.

    A user is a client's name, as its server's authentication gives it. Servers don't count clients
    without a name, which are called OPEN.
    """

    def __init__(self, member: ClusterMember) -> None:
        self._member = member
        self._is_closed = False
        # Weak references: an iterator that its consumer drops needs no more changes.
        self._changes: WeakSet[PresenceChanges] = WeakSet()
        member.users.changed.append(self._report)

    async def users(self) -> set[str]:
        """Return the names of all users that are online, a set.

        It waits until the other servers have told their users: at most a second after the peer was
        opened or connected again.
        """
        self._check_open()
        await self._settle()
        return self._member.users.names()

    async def is_online(self, user: str) -> bool:
        """Return whether a user is online.

        It waits as ``users`` does. Raises UsageError for a name that isn't text.
        """
        self._check_open()
        if not isinstance(user, str):
            raise UsageError(f"is_online: a user must be a text, not {shorten(user)}")
        await self._settle()
        return self._member.users.has(user)

    def changes(self) -> PresenceChanges:
        """Return an iterator over the users that come online and go: ``async for change in ...``.

        It reports changes from the call on. To miss no change, call ``changes`` first and ``users``
        afterwards. In the first second of a peer, servers still tell the users that are online
        already, and the iterator reports these too. A user who is logged in at several servers is
        gone when the last server reports it.
        """
        self._check_open()
        opened = PresenceChanges(self._changes.discard)
        self._changes.add(opened)
        return opened

    def _report(self, user: str, is_online: bool) -> None:
        for one in list(self._changes):
            one.put(user, is_online)

    def _check_open(self) -> None:
        if self._is_closed:
            raise closed("peer")

    def close(self) -> None:
        """End all iterations."""
        self._is_closed = True
        for one in list(self._changes):
            one.close()

    async def _settle(self) -> None:
        loop = asyncio.get_running_loop()
        if (seconds := self._member.settled_at - loop.time()) > 0:
            await asyncio.sleep(seconds)
