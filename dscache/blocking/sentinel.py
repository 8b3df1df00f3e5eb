"""The Sentinels of a group, asked by the thread that connects; through redis-py's connections."""

from __future__ import annotations

import select
import socket
import time
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from ..config import Options, SentinelNode
from ..net.foreign_errors import is_of_handler
from ..net.sentinels import Address, Answer, SentinelGroup, without_introduction
from ..net.sockets import SocketConnect
from .connection import milliseconds
from .foreign_errors import ConnectTimeout, raise_foreign

# redis-py's stubs know neither all of its arguments nor those of other versions.
_Base: Any = redis.Connection
_QUIET: Final = without_introduction(AbstractConnection)


class _Connection(_Base):  # type: ignore[misc] # see above
    """redis-py's connection, which tries the addresses of a host side by side."""

    def _connect(self) -> socket.socket:
        holder = SocketConnect()
        until = time.monotonic() + self.socket_connect_timeout
        try:
            found = socket.getaddrinfo(self.host, self.port, 0, socket.SOCK_STREAM)
            for events in holder.connect((*kind, address) for *kind, _, address in found):  # type: ignore[misc] # a starred tuple has no length for mypy
                wait = until - time.monotonic()
                if wait <= 0:
                    raise ConnectTimeout
                poller = select.poll()
                poller.register(holder.sock, events)
                wait = min(wait, holder.wake_at - time.monotonic())
                if not poller.poll(milliseconds(wait)) and time.monotonic() >= until:
                    raise ConnectTimeout
            sock = holder.detach()
        finally:
            holder.close()
        sock.settimeout(self.socket_timeout)
        return sock


# Errors that redis-py and SentinelGroup.read raise for replies of another shape, or no RESP at all.
_NONSENSE: Final = (LookupError, TypeError, ValueError, AttributeError, RecursionError)


class Sentinels:
    """The Sentinels of one group; any thread may use them."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._group = SentinelGroup(options)
        self._silent: set[str] = set()
        self._least_telling = min(options.connect_timeout, options.command_timeout) / 2000

    def locate(self, deadline: float) -> Address:
        """Return the host and port of the group's primary, or of one of its replicas.

        The Sentinels are asked one after the other. Raises ConnectError, with the reason of each
        Sentinel, if none names one, and ConnectTimeout if the time was too short to tell.
        """
        group = self._group
        rest = max(deadline - time.monotonic(), 0.001)
        seconds = group.seconds_each(rest)
        number = group.begin()
        replies: list[Answer | str] = []
        timeouts = 0
        # Those that gave no answer come last: if the others are enough, they delay nothing.
        silent = self._silent
        for node in sorted(group.nodes, key=lambda one: one.address in silent):
            try:
                replies.append(self._query(node, seconds))
            except ConnectTimeout:
                timeouts += 1
                replies.append(f"{node.address}: {group.shown(TimeoutError(), seconds)}")
            if isinstance(replies[-1], Answer):
                silent.discard(node.address)
            else:
                silent.add(node.address)
            if group.is_enough([one for one in replies if isinstance(one, Answer)]):
                break
        if timeouts == len(group.nodes) and rest < self._least_telling:
            raise ConnectTimeout  # with so little time, the reason of the attempts before is better
        return group.conclude(number, replies)

    def _query(self, node: SentinelNode, seconds: float) -> Answer | str:
        """Return a Sentinel's answer, or its address and why it has none.

        Raises ConnectTimeout if it doesn't answer in time.
        """
        group = self._group
        connection = _Connection(
            host=node.host,
            port=node.port,
            username=self._options.sentinel_username,
            password=self._options.sentinel_password,
            socket_timeout=seconds,
            socket_connect_timeout=seconds,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            decode_responses=True,
            **_QUIET,
        )
        began = time.monotonic()
        try:
            connection.connect()
            # All at once: one that closes has often said why, which a failed write would hide.
            connection.send_packed_command(connection.pack_commands(group.commands))
            replies: list[Any] = []
            for _ in group.commands:
                replies.append(_reply(connection, replies))
            answer = group.read(replies)
        except (RedisError, *_NONSENSE) as error:
            cause = error.__context__
            if isinstance(cause, Exception) and time.monotonic() < began + seconds:
                raise_foreign(cause)
            # A RecordError of a signal handler is a ValueError too.
            raise_foreign(error)
            if isinstance(error, redis.TimeoutError):
                raise ConnectTimeout from None
            return f"{node.address}: {group.shown(error, seconds)}"
        finally:
            connection.disconnect()
        return answer or group.names_none(node)


def _reply(connection: Any, before: list[Any]) -> Any:
    """Return the next reply; an error reply is returned as a ResponseError.

    If there is none, the last error ``before`` is the reason.
    """
    try:
        return connection.read_response()
    except ResponseError as error:
        if is_of_handler(error):
            raise
        return error
    except RedisError as error:
        said = [reply for reply in before if isinstance(reply, ResponseError)]
        if not said or is_of_handler(error):
            raise
        raise said[-1] from None
