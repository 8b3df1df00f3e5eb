"""Opening a socket to a server and logging in: everything before the first operation.

Each attempt to connect begins anew: the Sentinels are asked, the host is looked up, certificates
are read if their files have changed, and credentials are fetched. Any of them may have changed
since the last attempt.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ..config import Options
from ..config.address import join_address
from ..errors import ConnectError, ConnectionLost, DscacheError
from ..net.connect_errors import TurnedAway
from ..net.credentials import Login, without
from ..net.foreign_errors import foreign
from ..net.handshake import ClosedHandshakes, ServerInfo, handshake, secrets_of
from ..net.maintenance import Address, Announcements, NewAddress
from ..net.sockets import FAMILIES, SocketConnect, UselessAddresses, tls_handshake, unix_address
from .credentials import Credentials
from .resolver import Resolver, connect_to

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from .sentinel import Sentinels

# The Sentinels are asked about a primary in doubt at most this often, in seconds.
_DOUBT_AGAIN = 0.5

Ask = Callable[..., Awaitable[list[Any]]]
"""Sends commands (sequences of words) at once; returns the replies, error replies included."""


def _nothing() -> None:
    """Do nothing: the default of ``on_tls``."""


class Endpoint:
    """One server as the configuration names it: by address, by path, or by its Sentinels.

    ``provider`` has the credentials, if the options don't. ``read_only``, ``is_near`` and
    ``of_cluster`` are those of ``handshake``. The nodes of a cluster share a ``resolver``. With
    ``may_be_proxy``, a server that closes connections at HELLO is tried without it. With
    ``announcements``, it may be asked to announce its maintenance. ``new_address`` is that of
    another Endpoint for the same server, which may have moved.
    """

    def __init__(
        self,
        options: Options,
        provider: CredentialProvider | None = None,
        *,
        read_only: bool = False,
        is_near: bool = False,
        of_cluster: bool = False,
        resolver: Resolver | None = None,
        may_be_proxy: bool = False,
        announcements: Announcements | None = None,
        new_address: NewAddress | None = None,
    ) -> None:
        self._is_near = is_near
        self._announcements = announcements
        self._peer = ""
        self.new_address = new_address or NewAddress()
        """The address to which the server has moved."""
        self._moved: Address | None = None
        self._of_cluster = of_cluster
        self._read_only = read_only
        self._options = options
        self.credentials = Credentials(provider)
        self._resolver = resolver or Resolver()
        self._sentinels: Sentinels | None = None
        self._doubted = -math.inf
        self._useless = UselessAddresses()
        self._attempt = SocketConnect(self._useless)
        self._closed = ClosedHandshakes(tls=bool(options.tls)) if may_be_proxy else None
        self.on_tls: Callable[[], object] = _nothing
        """Called when a TLS handshake begins."""
        self.address = options.address
        self.named = options.address
        """The address that the Sentinels named last."""

    @property
    def options(self) -> Options:
        """The options of the server."""
        return self._options

    @property
    def is_discovered(self) -> bool:
        """Whether the address may be another one at the next attempt."""
        return self._options.sentinels is not None

    @property
    def may_move(self) -> bool:
        """Whether the server may be replaced while it is connected and well."""
        return self.is_discovered and self._options.role == "master"

    @property
    def has_moved(self) -> bool:
        """Whether the Sentinels have named another server since the last socket was opened."""
        return self.is_discovered and self.named != self.address

    @property
    def tried(self) -> str:
        """The addresses that the last attempt has tried in vain, each with its reason."""
        return self._attempt.tried

    @property
    def in_tls(self) -> bool:
        """Whether the last attempt has come to the TLS handshake, and no further."""
        return self._attempt.in_tls

    def move(self, address: Address | None, seconds: float) -> None:
        """Open sockets to another address for so long; None for the usual one.

        The usual one may lead to the new server only after a while.
        """
        self.new_address.set(address, time.monotonic() + seconds)

    @property
    def is_at_new_address(self) -> bool:
        """Whether the last attempt to connect was to an address that the server has announced."""
        return self._moved is not None

    def note_failure(self) -> None:
        """Have another address tried next, if there are several."""
        self.note_useless()
        self.new_address.note_failure(self._moved)

    def note_useless(self) -> None:
        """Have the address in use, if it is one of several, tried last."""
        self._attempt.note_useless()

    async def follow(self, moved: Callable[[], None]) -> None:
        """Keep ``named`` up to date, and call ``moved`` after each change, until cancelled."""

        def on_moved(host: str, port: int) -> None:
            self.named = join_address(host, port)
            moved()

        await self._group().follow(on_moved)

    def doubt(self) -> None:
        """Have the Sentinels asked whether the server is still the primary."""
        now = asyncio.get_running_loop().time()
        if self._sentinels is not None and now > self._doubted + _DOUBT_AGAIN:
            self._doubted = now
            self._sentinels.look()

    async def open(self, protocol: asyncio.BufferedProtocol) -> None:
        """Open a socket for the protocol, with TLS if so configured.

        Raises OSError, ConfigError if a file of TLS is bad, or ConnectError if no Sentinel names a
        server.
        """
        options = self._options
        self._attempt = SocketConnect(self._useless)
        loop = asyncio.get_running_loop()
        tls = options.tls
        context = await self._resolver.tls_context(tls) if tls else None
        create: Callable[..., Awaitable[object]]
        if options.path:
            host, create = "localhost", loop.create_unix_connection
            sock = await connect_to([unix_address(options.path)])
        else:
            host, port, create = options.host, options.port, loop.create_connection
            if options.sentinels is not None:
                host, port = await self._group().locate()
                self.address = self.named = join_address(host, port)
            else:
                moved = self._moved = self.new_address.get()
                host, port = moved or (host, port)
                self.address = options.address if moved is None else join_address(host, port)
            family = FAMILIES[options.family]
            found = await self._resolver.look_up(host, port, family)
            sock = await connect_to(found, self._attempt)
            self._peer = str(sock.getpeername()[0])
        # From here on the loop closes the socket, whatever happens.
        if tls:
            self._attempt.in_tls = True
            self.on_tls()
        with tls_handshake() if tls else nullcontext():
            await create(
                lambda: protocol,
                sock=sock,
                ssl=context,
                server_hostname=(tls.servername or host) if tls else None,
            )
        self._attempt.in_tls = False
        if tls:
            # With TLS 1.3 a server refuses the client's certificate behind the handshake. The
            # alert is read here, before a write fails on the socket that the server has closed.
            await asyncio.sleep(0)

    async def greet(self, ask: Ask) -> ServerInfo:
        """Log in and set up the connection; return the facts that the server states.

        Raises ReplyError if the server refuses (WRONGPASS, NOAUTH, no such database) or is loading,
        and ConnectError if the provider of credentials fails, or if the server doesn't have the
        role that the Sentinels name it for. No error holds a password.
        """
        login = await self.credentials.current(self._options)
        try:
            return await self._greet(ask, login)
        except DscacheError as error:
            if foreign(error) is not None:
                raise  # a signal handler's says nothing about the server
            failure = without(error, [*secrets_of(self._options, login), *self.credentials.given])
        raise failure

    async def _greet(self, ask: Ask, login: Login) -> ServerInfo:
        attempt = None
        # A server that has announced another address of its own knows all commands.
        if self._closed is not None and not self.is_at_new_address:
            attempt = self._closed.attempt()
        steps = handshake(
            self._options,
            login,
            self.address,
            read_only=self._read_only,
            is_near=self._is_near,
            of_cluster=self._of_cluster,
            attempt=attempt,
            announcements=self._announcements,
            peer=self._peer,
        )
        commands = next(steps)
        while True:
            try:
                replies = await ask(*commands)
            except (ConnectionLost, ConnectionError, TurnedAway) as error:
                if attempt is None or (reason := attempt.note_closed(error)) is error:
                    raise
                raise reason from None
            try:
                commands = steps.send(replies)
            except StopIteration as end:
                info: ServerInfo = end.value
                break
        if self.has_moved:
            raise ConnectError(f"the Sentinels name another primary by now, {self.named}")
        return info

    def _group(self) -> Sentinels:
        if self._sentinels is None:
            # Imported here: redis-py takes longer to import than all of dscache.
            from .sentinel import Sentinels

            self._sentinels = Sentinels(self._options, self._resolver)
        return self._sentinels
