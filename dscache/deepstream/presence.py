"""Presence: the users that are logged in at any server. A peer only reads it."""

from __future__ import annotations

import asyncio

from .cluster import ClusterMember


class Presence:
    """The users that are online: ``peer.presence``.

    A user is a client's name, as its server's authentication gives it. Servers don't count clients
    without a name of their own, which are called OPEN.
    """

    def __init__(self, member: ClusterMember) -> None:
        self._member = member

    async def users(self) -> set[str]:
        """Return the names of all users that are online.

        It waits until the other servers have told theirs: at most a second after the peer was
        opened, or connected again.
        """
        await self._settle()
        return self._member.users.names()

    async def is_online(self, user: str) -> bool:
        """Return whether a user is online, as ``users`` does."""
        await self._settle()
        return self._member.users.has(user)

    async def _settle(self) -> None:
        loop = asyncio.get_running_loop()
        if (seconds := self._member.settled_at - loop.time()) > 0:
            await asyncio.sleep(seconds)
