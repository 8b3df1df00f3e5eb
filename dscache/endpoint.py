"""Where a server is and how it is greeted: everything of a socket before its first operation.

Each attempt to connect begins here and from nothing: the host is looked up, the Sentinels are
asked, certificates are read and credentials are fetched afresh, since any of them may have
changed since the last one.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from . import _common
from .config import Options
from .credentials import Credentials
from .errors import ConnectError, ReplyError

Ask = Callable[..., Awaitable[list[Any]]]
"""Sends commands (lists) at once and returns the replies; error replies are among them."""

_FAMILIES = {0: socket.AF_UNSPEC, 4: socket.AF_INET, 6: socket.AF_INET6}

# The system's own watch over a link: it is dead when for 10 s nothing was acknowledged. The
# names that a platform doesn't have are left out.
_TCP_OPTIONS = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a server said of itself."""

    server: str
    """Its kind and version, such as ``redis 7.0.15``; empty if it didn't say."""
    has_msetex: bool


class Endpoint:
    """One server as the configuration names it: by address, by path, or by its Sentinels."""

    def __init__(self, options: Options, credentials: Credentials) -> None:
        self._options = options
        self._credentials = credentials
        self.address = options.address

    @property
    def is_discovered(self) -> bool:
        """Whether the address may be another one at the next attempt."""
        return self._options.sentinels is not None

    async def open(self, protocol: asyncio.BufferedProtocol) -> None:
        """Open a socket for ``protocol``, with TLS if so configured.

        Raises OSError, or ConnectError if the Sentinels know no server.
        """
        options = self._options
        loop = asyncio.get_running_loop()
        tls = options.tls
        context = tls.context() if tls else None
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
            # redis-py takes longer to import than all of dscache, and is only used here.
            from . import sentinel

            host, port = await sentinel.locate(options)
            self.address = _common.join_address(host, port)
        transport, _ = await loop.create_connection(
            lambda: protocol,
            host,
            port,
            family=_FAMILIES[options.family],
            ssl=context,
            server_hostname=(tls.servername or host) if tls else None,
        )
        link = transport.get_extra_info("socket")
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _TCP_OPTIONS.items():
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    async def greet(self, ask: Ask) -> Greeting:
        """Get the server's consent to work with it.

        Raises ReplyError if it refuses (WRONGPASS, NOAUTH, no such database) or is loading.
        """
        options = self._options
        username, password = await self._credentials.current()
        hello: list[str] = ["HELLO", "3"]
        if username is not None or password is not None:
            hello += ["AUTH", username or "default", password or ""]
        if options.connection_name:
            hello += ["SETNAME", options.connection_name]
        commands = [hello]
        if options.db:
            commands.append(["SELECT", str(options.db)])
        questions: list[list[str | bytes]] = [
            # Loaded here, the script is missing only after SCRIPT FLUSH.
            ["SCRIPT", "LOAD", _common.SET_SCRIPT],
            ["COMMAND", "INFO", "MSETEX"],
        ]
        greeting, *others = await ask(*commands, *questions)
        if isinstance(greeting, ReplyError) and _is_without_resp3(greeting):
            commands[0] = ["PING"]
            if password is not None:
                commands[0] = ["AUTH", *([username] if username else []), password]
            if options.connection_name:
                commands.append(["CLIENT", "SETNAME", options.connection_name])
            greeting, *others = await ask(*commands, *questions)
        *consents, loaded, known = [greeting, *others]
        for reply in consents:
            if isinstance(reply, ReplyError):
                raise reply
        # A user who may not load scripts may do all the rest; a server that is still loading
        # its data may do nothing.
        if isinstance(loaded, ReplyError) and loaded.code in ("LOADING", "NOAUTH"):
            raise loaded
        said = greeting if isinstance(greeting, dict) else {}
        self._check_role(said.get(b"role"))
        facts = (said.get(b"server"), said.get(b"version"))
        server = " ".join(fact.decode(errors="replace") for fact in facts if type(fact) is bytes)
        return Greeting(server, isinstance(known, list) and any(known))

    def _check_role(self, role: object) -> None:
        """Raise ConnectError if a Sentinel named a server that has another role by now."""
        if not self.is_discovered or not isinstance(role, bytes):
            return
        wanted = b"master" if self._options.role == "master" else b"replica"
        if role != wanted:
            raise ConnectError(
                f"the Sentinels name {self.address} as {wanted.decode()}, but it is {role.decode()}"
            )


def _is_without_resp3(error: ReplyError) -> bool:
    """Whether HELLO was refused by a server before Redis 6, or to a user who may not say it."""
    return error.code in ("NOPROTO", "NOPERM") or "unknown command" in error.message.lower()
