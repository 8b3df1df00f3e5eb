"""Any node of a cluster: where a message is published or heard does not matter there.

The nodes pass on to each other what is published at one of them. So one connection is enough, to
whichever node can be reached; where all go the same way, they arrive in their order.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from ..aio.credentials import Credentials
from ..aio.endpoint import Ask, Endpoint
from ..aio.resolver import Resolver
from ..config import Options
from ..core import constants
from ..errors import ConfigError, ConnectError, ReplyError
from ..net.connect_errors import UnsuitableServer
from ..net.handshake import ServerInfo
from ..net.slots import QUESTIONS, Address, read_view

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider


class AnyNode:
    """The nodes of a cluster, one after the other: what an Endpoint is of one server."""

    is_discovered = False
    may_move = False
    has_moved = False
    named = ""

    def __init__(
        self, options: Options, credentials: CredentialProvider | None, source: str
    ) -> None:
        self._options = options
        self._credentials = credentials
        self._source = source
        self._resolver = Resolver()
        self._seeds = [(seed.host, seed.port) for seed in options.seeds]
        # Those to be tried next, the last one first.
        self._next: list[Address] = []
        self._known: list[Address] = []
        self._at: Address = random.choice(self._seeds)
        self._endpoint: Endpoint | None = None
        self._cut_off = 0
        self.is_well = True

    @property
    def address(self) -> str:
        """Where it is connected to, or was last."""
        return constants.join_address(*self._at)

    async def follow(self, moved: object) -> None:
        """Wait for ever: a node is left for what it says itself."""
        await asyncio.get_running_loop().create_future()

    async def open(self, protocol: asyncio.BufferedProtocol) -> None:
        """Open a socket to the next node. Raises OSError."""
        if not self._next:
            # Those of the configuration as well, looked up afresh.
            others = {*self._seeds, *self._known} - {self._at}
            # The one that was lost comes last, as it may be what went wrong.
            self._next = [self._at, *random.sample(sorted(others), len(others))]
        self._at = self._next.pop()
        options = self._options.for_node(*self._at)
        self._endpoint = Endpoint(
            options,
            Credentials(options, self._credentials),
            of_cluster=True,
            resolver=self._resolver,
        )
        await self._endpoint.open(protocol)

    async def greet(self, ask: Ask) -> ServerInfo:
        """Get the node's consent to work with it.

        Raises ReplyError if it refuses, and ConnectError if it is of no cluster, or cut off from
        the others of one.
        """
        assert self._endpoint is not None
        greeting = await self._endpoint.greet(ask)
        try:
            self.learn(*await ask(*map(list, QUESTIONS)))
        except ConfigError as error:
            raise UnsuitableServer(str(error)) from None
        # Where all say so, one of them is as good as another.
        if not self.is_well and self._cut_off < len(self._seeds) + len(self._known):
            self._cut_off += 1
            raise ConnectError(f"{self.address} is cut off from its cluster")
        self._cut_off = 0
        self._next = []
        return greeting

    def learn(self, slots: object, info: object) -> None:
        """Take over which nodes there are, and whether this one ``is_well``.

        ``slots`` and ``info`` are what it answers to QUESTIONS. Raises ConfigError if it is of no
        cluster, and ProtocolError if that is no answer.
        """
        try:
            view = read_view(slots, info, self._at, self._source)
        except ReplyError as error:
            if error.code != "NOPERM":  # one who may not ask does without
                raise
            return
        places = [
            self._options.mapped(*place)
            for one in view.ranges
            for place in (one.primary, *one.replicas)
        ]
        if places:
            self._known = list(dict.fromkeys(places))
        is_said = not isinstance(info, bytes) or b"cluster_state:ok" in info
        self.is_well = bool(places) and is_said
