"""Where a server is and how it is greeted: everything of a socket before its first operation.

Each attempt to connect begins here and from nothing: the host is looked up, the Sentinels are
asked, certificates are read if their files have changed and credentials are fetched afresh, since
any of them may have changed since the last one.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from ..config import Options
from ..core import constants
from ..errors import ConnectError, DscacheError
from ..net.credentials import Login, without
from ..net.handshake import ServerInfo, handshake, secrets_of
from ..net.sockets import FAMILIES, TCP_OPTIONS
from .credentials import Credentials
from .resolver import Resolver

if TYPE_CHECKING:
    from .sentinel import Sentinels

__all__ = ["Ask", "Endpoint", "ServerInfo"]

Ask = Callable[..., Awaitable[list[Any]]]
"""Sends commands (lists) at once and returns the replies; error replies are among them."""


class Endpoint:
    """One server as the configuration names it: by address, by path, or by its Sentinels.

    With ``read_only``, a replica of a cluster is told that it may answer reads; with ``is_near``,
    a server is asked to tell of changes, as the near cache is configured, and as one ``of_cluster``
    is. All nodes of a cluster have one ``resolver``.
    """

    def __init__(
        self,
        options: Options,
        credentials: Credentials,
        *,
        read_only: bool = False,
        is_near: bool = False,
        of_cluster: bool = False,
        resolver: Resolver | None = None,
    ) -> None:
        self._is_near = is_near
        self._of_cluster = of_cluster
        self._read_only = read_only
        self._options = options
        self._credentials = credentials
        self._resolver = resolver or Resolver()
        self._sentinels: Sentinels | None = None
        self.address = options.address
        self.named = options.address
        """The address that the Sentinels named last."""

    @property
    def is_discovered(self) -> bool:
        """Whether the address may be another one at the next attempt."""
        return self._options.sentinels is not None

    @property
    def may_move(self) -> bool:
        """Whether the server may be replaced while it is connected to and well."""
        return self.is_discovered and self._options.role == "master"

    @property
    def has_moved(self) -> bool:
        """Whether the Sentinels have named another server since the last socket was opened."""
        return self.named != self.address

    async def follow(self, told: Callable[[], None]) -> None:
        """Keep ``named`` up to date, and call ``told`` after each time, until cancelled."""

        def moved(host: str, port: int) -> None:
            self.named = constants.join_address(host, port)
            told()

        await self._group().follow(moved)

    async def open(self, protocol: asyncio.BufferedProtocol) -> None:
        """Open a socket for ``protocol``, with TLS if so configured.

        Raises OSError, or ConnectError if the Sentinels know no server.
        """
        options = self._options
        loop = asyncio.get_running_loop()
        tls = options.tls
        context = await self._resolver.tls_context(tls) if tls else None
        if options.path:
            await loop.create_unix_connection(
                lambda: protocol,
                options.path,
                ssl=context,
                server_hostname=(tls.servername or "localhost") if tls else None,
            )
            return
        host, port = options.host, options.port
        if options.sentinels is not None:
            host, port = await self._group().locate()
            self.address = self.named = constants.join_address(host, port)
        link = await self._resolver.connect(host, port, FAMILIES[options.family])
        try:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in TCP_OPTIONS.items():
                link.setsockopt(socket.IPPROTO_TCP, option, value)
        except OSError:
            link.close()
            raise
        # From here on the loop closes the socket, whatever happens.
        await loop.create_connection(
            lambda: protocol,
            sock=link,
            ssl=context,
            server_hostname=(tls.servername or host) if tls else None,
        )

    async def greet(self, ask: Ask) -> ServerInfo:
        """Get the server's consent to work with it.

        Raises ReplyError if it refuses (WRONGPASS, NOAUTH, no such database) or is loading, and
        ConnectError if it isn't, or is no more, what the Sentinels named it for.
        """
        login = await self._credentials.current()
        try:
            return await self._greet(ask, login)
        except DscacheError as error:
            failure = without(error, secrets_of(self._options, login))
        raise failure

    async def _greet(self, ask: Ask, login: Login) -> ServerInfo:
        words = handshake(
            self._options,
            login,
            self.address,
            read_only=self._read_only,
            is_near=self._is_near,
            of_cluster=self._of_cluster,
        )
        commands = next(words)
        while True:
            try:
                commands = words.send(await ask(*commands))
            except StopIteration as consent:
                greeting: ServerInfo = consent.value
                break
        if self.has_moved:
            raise ConnectError(f"the Sentinels name another primary by now, {self.named}")
        return greeting

    def _group(self) -> Sentinels:
        if self._sentinels is None:
            # redis-py takes longer to import than all of dscache, and is only used here.
            from .sentinel import Sentinels

            self._sentinels = Sentinels(self._options, self._resolver)
        return self._sentinels
