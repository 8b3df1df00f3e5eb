"""Membership of deepstream's cluster, and the registries that its servers share.

Each server tells the others on Topic.CLUSTER that it is alive. On Topic.STATE_REGISTRY it tells the
names that it has in each registry: the RPCs that its clients provide, and the users that are
online. A server that sees another one for the first time requests that one's names. A server that
hears nothing of another for ``nodeInactiveTimeout`` removes it, with its names.

Servers elect the one with the highest ``leaderScore`` above 0 leader, and the leader grants locks.
A peer has the score -1, so no server ever elects it.

Source: ``@deepstream/server`` 7.0.2, ``services/cluster-state`` and ``services/cluster-registry``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ..aio.background_task import BackgroundTask
from ..errors import DscacheError, shorten
from .protocol import (
    ClusterAction,
    FullState,
    FullStateRequest,
    Leave,
    Registry,
    RegistryChecksum,
    RegistryEntry,
    StateAction,
    Status,
    Topic,
)
from .settings import Settings

if TYPE_CHECKING:
    from ..core.pure import Message
    from ..messages import MessageNode

_logger = logging.getLogger("dscache")

ROLE: Final = "dscache"
# A lost message is noticed by its checksum; another message may repair it within this time.
_REPAIR_AFTER: Final = 0.5
# A name that was removed is removed again after a gap, of so many names.
_MAX_REMOVED: Final = 1000


class _Received(msgspec.Struct, rename="camel"):
    """The fields of a message on Topic.CLUSTER or Topic.STATE_REGISTRY."""

    action: int
    name: str | None = None
    server_name: str | None = None
    registry_topic: int | None = None
    full_state: list[str] | None = None
    checksum: float | None = None


def checksum(name: str) -> int:
    """Return the checksum of a name, as deepstream computes it with JavaScript's operators."""
    total = 0
    encoded = name.encode("utf-16-le", "surrogatepass")
    for low, high in zip(encoded[::2], encoded[1::2], strict=True):
        shifted = (total << 5) & 0xFFFFFFFF
        if shifted >= 0x80000000:
            shifted -= 0x100000000
        total = shifted - total + (high << 8 | low)
    return total


class SharedNames:
    """A registry: the names that each other server has in it."""

    def __init__(self, topic: Registry) -> None:
        self.topic = topic
        self._names: dict[str, dict[str, int]] = {}
        self.changed: list[Callable[[str, bool], object]] = []
        """Called with a name when the first server has it, and when the last has it no more."""

    def servers(self, name: str) -> list[str]:
        """Return the servers that have a name."""
        return [server for server, names in self._names.items() if name in names]

    def names(self) -> set[str]:
        """Return the names that any server has."""
        return {name for names in self._names.values() for name in names}

    def has(self, name: str) -> bool:
        """Return whether any server has a name."""
        return any(name in names for names in self._names.values())

    def add(self, server: str, name: str) -> None:
        """Note that a server has a name."""
        is_new = not self.has(name)
        self._names.setdefault(server, {})[name] = checksum(name)
        if is_new:
            self._report(name, True)

    def remove(self, server: str, name: str) -> None:
        """Note that a server has a name no more."""
        if self._names.get(server, {}).pop(name, None) is not None and not self.has(name):
            self._report(name, False)

    def replace(self, server: str, names: list[str]) -> None:
        """Note all names that a server has."""
        for name in set(self._names.get(server, ())).difference(names):
            self.remove(server, name)
        for name in names:
            self.add(server, name)

    def remove_server(self, server: str) -> None:
        """Note that a server has left."""
        self.replace(server, [])
        self._names.pop(server, None)

    def checksum(self, server: str) -> int:
        """Return the sum of the checksums of a server's names."""
        return sum(self._names.get(server, {}).values())

    def _report(self, name: str, is_there: bool) -> None:
        for call in list(self.changed):
            call(name, is_there)


class ClusterMember:
    """This process as a member of the cluster, and its view of the others."""

    def __init__(self, node: MessageNode, settings: Settings) -> None:
        self._node = node
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._seen: dict[str, float] = {}
        self._own: dict[str, None] = {}
        self._removed: dict[str, None] = {}
        self.providers = SharedNames(Registry.RPC_SUBSCRIPTIONS)
        self.users = SharedNames(Registry.ONLINE_USERS)
        self._registries = {one.topic: one for one in (self.providers, self.users)}
        self._mismatched: dict[tuple[str, int], asyncio.TimerHandle] = {}
        self._sending: set[asyncio.Future[int]] = set()
        self._task: BackgroundTask | None = None
        self._is_ending = False
        self.settled_at = 0.0
        """The time on the loop's clock by which the other servers have told their names."""
        self._unsubscribe = [
            node.subscribe(Topic.CLUSTER, self._on_cluster),
            node.subscribe(Topic.STATE_REGISTRY, self._on_registry),
        ]

    def join(self) -> None:
        """Tell the other servers of this one, now and from time to time, and ask for their names.

        The subscriptions must be confirmed.
        """
        self.announce()
        self._task = BackgroundTask(self._keep_alive, f"dscache peer {self._node.server_name}")

    def announce(self) -> None:
        """Tell this server's names, and request the others' names: at first, and after a gap."""
        self.settled_at = self._loop.time() + 1.0
        self._send(Status(server_name=self._node.server_name, role=ROLE))
        for registry in self._registries:
            self._send(FullStateRequest(registry_topic=registry))
        for name in self._removed:
            self._send_entry(StateAction.REMOVE, name)
        if self._own:
            self._send(FullState(registry_topic=self.providers.topic, full_state=list(self._own)))

    async def leave(self) -> None:
        """Tell the other servers that this one leaves."""
        self._is_ending = True
        for unsubscribe in self._unsubscribe:
            unsubscribe()
        if self._task is not None:
            self._task.cancel()
            self._send(Leave(server_name=self._node.server_name))
        for timer in self._mismatched.values():
            timer.cancel()
        if self._sending:
            await asyncio.wait(self._sending, timeout=1.0)

    # -- this server's names

    def provide(self, name: str) -> None:
        """Tell the other servers that this one provides an RPC."""
        self._own[name] = None
        self._removed.pop(name, None)
        self._send_entry(StateAction.ADD, name)
        self._send_checksum()

    def unprovide(self, name: str) -> None:
        """Tell the other servers that this one provides an RPC no more."""
        if self._own.pop(name, name) is None:
            self._removed[name] = None
            if len(self._removed) > _MAX_REMOVED:
                del self._removed[next(iter(self._removed))]
            self._send_entry(StateAction.REMOVE, name)
            self._send_checksum()

    def _send_entry(self, action: StateAction, name: str) -> None:
        self._send(RegistryEntry(registry_topic=self.providers.topic, action=action, name=name))

    def _send_checksum(self) -> None:
        total = sum(map(checksum, self._own))
        self._send(RegistryChecksum(registry_topic=self.providers.topic, checksum=total))

    # -- the other servers

    @property
    def servers(self) -> list[str]:
        """The names of the other servers that are alive."""
        return list(self._seen)

    def _note_alive(self, server: str) -> None:
        """Note that a server has sent a message; a new one is asked for its names."""
        is_new = server not in self._seen
        self._seen[server] = self._loop.time()
        if is_new and self._task is not None:
            for registry in self._registries:
                self._send(FullStateRequest(registry_topic=registry), server)

    def _on_cluster(self, message: Message, sender: str) -> None:
        received = message.decode(_Received)
        if received.action == ClusterAction.STATUS:
            self._note_alive(sender)
        elif received.action == ClusterAction.REMOVE:
            # Servers write their own name into ``name``, which none of them reads.
            self._remove_server(received.server_name or received.name or sender)

    def _on_registry(self, message: Message, sender: str) -> None:
        received = message.decode(_Received)
        if received.registry_topic is None:
            return
        self._note_alive(sender)
        if received.action == StateAction.REQUEST_FULL_STATE:
            self._answer(sender, received.registry_topic)
            return
        try:
            registry = self._registries[Registry(received.registry_topic)]
        except (ValueError, KeyError):
            return
        if received.action == StateAction.ADD and received.name is not None:
            registry.add(sender, received.name)
        elif received.action == StateAction.REMOVE and received.name is not None:
            registry.remove(sender, received.name)
        elif received.action == StateAction.FULL_STATE and received.full_state is not None:
            registry.replace(sender, received.full_state)
        elif received.action == StateAction.CHECKSUM and received.checksum is not None:
            self._verify(registry, sender, received.checksum)

    def _answer(self, server: str, topic: int) -> None:
        try:
            registry = Registry(topic)
        except ValueError:
            return
        names = list(self._own) if registry == self.providers.topic else []
        # A server that starts isn't ready until every other one has answered for every registry.
        self._send(FullState(registry_topic=registry, full_state=names), server)

    def _verify(self, registry: SharedNames, server: str, theirs: float) -> None:
        """Request a server's names again if a message of it was lost."""
        key = (server, int(registry.topic))
        if (timer := self._mismatched.pop(key, None)) is not None:
            timer.cancel()
        if registry.checksum(server) != theirs and not self._is_ending:
            self._mismatched[key] = self._loop.call_later(_REPAIR_AFTER, self._repair, key)

    def _repair(self, key: tuple[str, int]) -> None:
        self._mismatched.pop(key, None)
        server, topic = key
        self._send(FullStateRequest(registry_topic=Registry(topic)), server)

    def _remove_server(self, server: str) -> None:
        if self._seen.pop(server, None) is not None:
            for registry in self._registries.values():
                registry.remove_server(server)

    async def _keep_alive(self) -> None:
        # A server that misses two of them has been quiet for less than the timeout still.
        interval = min(self._settings.keep_alive, self._settings.inactive_timeout / 3)
        while True:
            await asyncio.sleep(interval)
            self._send(Status(server_name=self._node.server_name, role=ROLE))
            oldest = self._loop.time() - max(
                self._settings.inactive_timeout, 2 * self._settings.keep_alive
            )
            for server, seen in list(self._seen.items()):
                if seen < oldest:
                    self._remove_server(server)

    def _send(self, message: Any, server: str | None = None) -> None:
        """Send a message without waiting; a failure is repaired by the announcement after a gap."""
        try:
            if server is None:
                sent = self._node.send(message)
            else:
                sent = self._node.send_direct(server, message)
        except DscacheError as error:
            _logger.warning("a message to deepstream's servers was not sent: %s", error)
            return
        self._sending.add(sent)
        sent.add_done_callback(self._on_sent)

    def _on_sent(self, sent: asyncio.Future[int]) -> None:
        self._sending.discard(sent)
        if not sent.cancelled() and (error := sent.exception()) is not None:
            _logger.info("a message to deepstream's servers was not sent: %s", shorten(str(error)))
