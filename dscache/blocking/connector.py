"""How a blocking cache reaches its server: by address, by path or by Sentinels, through redis-py.

redis-py makes the sockets. TLS is put on them here, since the configuration's says more than
redis-py's, and within one deadline, which redis-py starts anew for each step.
"""

from __future__ import annotations

import inspect
import math
import random
import select
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from ..config import Options, SentinelNode
from ..core import constants
from ..errors import ConnectError, DscacheError, ProtocolError, clean
from ..net.credentials import NOTHING, Login, checked, failed, hidden, masked, without
from ..net.handshake import FAMILIES, TCP_OPTIONS, ServerInfo, handshake, secrets_of
from ..net.sockets import tls_handshake

if TYPE_CHECKING:
    import socket
    import ssl

    from redis.credentials import CredentialProvider

# redis-py's stubs know neither all of their arguments nor those of other versions.
_RedisTcp: Any = redis.Connection
_RedisUnix: Any = redis.UnixDomainSocketConnection

# What it would say of itself it doesn't, but some versions read it from a file each time.
_ANONYMOUS = {
    name: None
    for name in ("driver_info",)
    if name in inspect.signature(redis.connection.AbstractConnection.__init__).parameters
}

_DOWN = {"o_down", "s_down", "disconnected"}
# What redis-py and this module may make of a Sentinel's nonsense.
_NONSENSE = (LookupError, TypeError, ValueError, AttributeError, RecursionError)


class ConnectTimeout(TimeoutError):
    """The deadline of an attempt to connect is past."""


def raise_foreign(error: Exception) -> None:
    """Raise an error again that comes from elsewhere than a socket: a signal handler may raise any.

    Errors of this package are raised in it, those of the system have their number, and a signal
    handler is found among the calls that an error went through. While a reply is read, much of what
    is raised is taken for a sign that it is none, and is the cause of a ProtocolError.
    """
    cause = error.__cause__
    if isinstance(error, ProtocolError) and cause is not None and not _is_own(cause):
        raise cause
    if isinstance(error, (DscacheError, ConnectTimeout)):
        is_not_from_socket = not _is_own(error)
    elif isinstance(error, OSError) and error.errno is None:
        is_not_from_socket = True
    else:
        is_not_from_socket = is_of_handler(error)
    if is_not_from_socket:
        raise error


def _is_own(error: BaseException) -> bool:
    return all(map(_is_ours, _frames(error)))


def is_of_handler(error: BaseException) -> bool:
    """Whether an error comes from a signal handler, or through one."""
    strangers = [frame.f_code for frame in _frames(error) if not _is_ours(frame)]
    return bool(strangers) and not _handlers().isdisjoint(strangers)


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Give the calls that an error went through, from who asks to who raised it."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _is_ours(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__")
    return isinstance(module, str) and module.partition(".")[0] == "dscache"


def _handlers() -> set[CodeType]:
    """Return the code of all signal handlers that are set."""
    found = set()
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, partial):
            handler = handler.func
        if callable(handler) and not hasattr(handler, "__code__"):
            handler = getattr(handler, "__func__", None) or type(handler).__call__
        code = getattr(handler, "__code__", None)
        if isinstance(code, CodeType):
            found.add(code)
    return found


class _ByDeadline:
    """A connection of redis-py that tries each address until one deadline."""

    def __init__(self, deadline: float, **options: Any) -> None:
        self._deadline = deadline
        made: Any = super().__init__
        made(
            # It greets nobody: that is done with the cache's own pipeline.
            redis_connect_func=_silent,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,
            parser_class=_NoParser,
            **_ANONYMOUS,
            **options,
        )

    @property
    def socket_connect_timeout(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)

    @socket_connect_timeout.setter
    def socket_connect_timeout(self, value: object) -> None:
        """Take no notice: it is set by redis-py, in some of its versions."""


class _Tcp(_ByDeadline, _RedisTcp):  # type: ignore[misc]
    pass


class _Unix(_ByDeadline, _RedisUnix):  # type: ignore[misc]
    pass


def _silent(connection: object) -> None:
    pass


class _NoParser:
    """The parser of a connection over which redis-py says nothing."""

    def __init__(self, socket_read_size: int) -> None:
        pass

    def on_connect(self, connection: object) -> None:
        pass

    def on_disconnect(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class ConnectAttempt:
    """One attempt to reach a server."""

    connection: Any
    """redis-py's, which is not connected yet."""
    address: str
    options: Options
    login: Callable[[], Login]
    secure: Callable[[Any], Any]

    def connect(self) -> socket.socket:
        """Return the connection's socket, which does not block.

        Raises OSError, RedisError, or ConfigError if the files of TLS are bad by now.
        """
        connection = self.connection
        try:
            connection.connect()
        except RedisError as error:
            cause = error.__context__
            if not isinstance(cause, OSError):
                raise
            late = isinstance(cause, TimeoutError) and cause.errno is None
            if late and connection.socket_connect_timeout <= 0.001:
                raise ConnectTimeout from cause
            raise cause from None
        connection._sock.setblocking(False)
        self.secure(connection)
        sock: socket.socket = connection._sock
        return sock

    def greet(self, ask: Callable[[list[list[Any]]], list[Any]]) -> ServerInfo:
        """Greet the server; ``ask`` returns the replies to some commands.

        Raises what ``ask`` raises, or a DscacheError.
        """
        login = self.login()
        try:
            words = handshake(self.options, login, self.address)
            commands = next(words)
            while True:
                try:
                    commands = words.send(ask(commands))
                except StopIteration as consent:
                    greeting: ServerInfo = consent.value
                    return greeting
        except DscacheError as error:
            raise_foreign(error)
            failure = without(error, secrets_of(self.options, login))
        raise failure


class Connector:
    """One server, or the primary or replicas of a group, as the configuration names it.

    It begins from nothing each time: hosts, certificates, Sentinels and credentials may all have
    changed.
    """

    def __init__(self, options: Options, provider: CredentialProvider | None) -> None:
        self._options = options
        self._provider = provider
        # The newest that any Sentinel said: its epoch, host and port.
        self._newest: tuple[int, str, int] = (-1, "", 0)

    def call(self, deadline: float) -> ConnectAttempt:
        """Prepare an attempt. Raises ConnectError if the Sentinels or the provider fail."""
        options = self._options
        if options.path:
            address = options.path
            connection: Any = _Unix(deadline, path=options.path)
            name = "localhost"
        else:
            name, port = options.host, options.port
            if options.sentinels is not None:
                name, port = self._locate(deadline)
            address = constants.join_address(name, port)
            connection = _Tcp(
                deadline,
                host=name,
                port=port,
                socket_type=FAMILIES[options.family],
                socket_keepalive=True,
                socket_keepalive_options=TCP_OPTIONS,
            )
        return ConnectAttempt(
            connection,
            address,
            options,
            lambda: login_of(options, self._provider),
            lambda connection: self._secure(connection, name, deadline),
        )

    def _secure(self, connection: Any, name: str, deadline: float) -> None:
        """Put TLS on a connection's socket, if so configured."""
        tls = self._options.tls
        if tls is None:
            return
        sock: ssl.SSLSocket = tls.context().wrap_socket(
            connection._sock,
            server_hostname=tls.servername or name,
            do_handshake_on_connect=False,
        )
        connection._sock = sock
        for events in tls_handshake(sock):
            poller = select.poll()
            poller.register(sock.fileno(), events)
            wait = deadline - time.monotonic()
            if wait <= 0:
                raise ConnectTimeout
            poller.poll(math.ceil(wait * 1000))

    # -- Sentinels

    def _locate(self, deadline: float) -> tuple[str, int]:
        """Return the host and port of the group's primary, or of one of its replicas.

        Raises ConnectError, with what each of the Sentinels said, if none names one.
        """
        nodes = self._options.sentinels or ()
        # Most of the time is for the server itself.
        seconds = max(deadline - time.monotonic(), 0.001) / (len(nodes) + 1)
        is_primary = self._options.role == "master"
        question = self._primary if is_primary else self._replica
        answers: list[tuple[int, str, int]] = []
        problems: list[str] = []
        for node in nodes:
            said = self._ask(node, question, seconds)
            if isinstance(said, str):
                problems.append(said)
                continue
            answers.append(said)
            if not is_primary:
                return said[1:]
            # A majority is enough, but for one that knows less than was known before.
            if len(answers) > len(nodes) // 2 and max(answers)[0] >= self._newest[0]:
                break
        if not answers:
            sought = "primary" if is_primary else "replica"
            raise ConnectError(
                f'no Sentinel names a {sought} of "{self._options.name}": {"; ".join(problems)}'
            )
        # Where all were asked, and know less than was known before, they are other ones.
        epoch = max(answers)[0]
        places = [answer for answer in answers if answer[0] == epoch]
        self._newest = max(places, key=places.count)
        return self._newest[1:]

    def _ask(
        self,
        node: SentinelNode,
        question: Callable[[Any], tuple[int, str, int] | None],
        seconds: float,
    ) -> tuple[int, str, int] | str:
        """Return a Sentinel's answer, or its address and why it has none."""
        connection = _RedisTcp(
            host=node.host,
            port=node.port,
            username=self._options.sentinel_username,
            password=self._options.sentinel_password,
            socket_timeout=seconds,
            socket_connect_timeout=seconds,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            decode_responses=True,
        )
        began = time.monotonic()
        try:
            connection.connect()
            answer = question(connection)
        except (RedisError, *_NONSENSE) as error:
            cause = error.__context__
            if isinstance(cause, Exception) and time.monotonic() < began + seconds:
                raise_foreign(cause)
            # A RecordError is a ValueError as well.
            raise_foreign(error)
            said = masked(clean(str(error)), [hidden(self._options.sentinel_password)])
            return f"{node.address}: {said or type(error).__name__}"
        finally:
            connection.disconnect()
        return answer or f"{node.address}: it knows of none that is up"

    def _primary(self, connection: Any) -> tuple[int, str, int] | None:
        # The epoch first: should they change in between, the answer is newer than it looks.
        connection.send_command("SENTINEL", "MASTER", self._options.name)
        connection.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._options.name)
        try:
            state = _pairs(connection.read_response())
        except redis.ResponseError:  # an ACL may allow no more than the other
            state = {}
        place = connection.read_response()
        if place is None:
            return None
        host, port = place
        return constants.read_epoch(state.get("config-epoch")), *constants.read_address(host, port)

    def _replica(self, connection: Any) -> tuple[int, str, int] | None:
        """Return any replica that the Sentinel doesn't take for down."""
        connection.send_command("SENTINEL", "SLAVES", self._options.name)
        replicas = [_pairs(replica) for replica in connection.read_response()]
        up = [one for one in replicas if _DOWN.isdisjoint(one["flags"].split(","))]
        if not up:
            return None
        replica = random.choice(up)
        return -1, *constants.read_address(replica["ip"], replica["port"])


def _pairs(flat: list[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=False))


def login_of(options: Options, provider: CredentialProvider | None) -> Login:
    """Return the username and password to log in with. Raises ConnectError if a provider fails."""
    if provider is None:
        return options.username, hidden(options.password)
    try:
        return checked(provider.get_credentials())
    except Exception as error:  # whatever it raises, the next attempt may succeed
        if is_of_handler(error):
            raise
        failure = failed(error)
    # Without its words and its frames, either of which may hold a token.
    raise failure


def listen(provider: CredentialProvider | None, renewed: Callable[[], None]) -> None:
    """Have a method called, in any thread, when a provider has new credentials."""
    if (tell := getattr(provider, "on_next", None)) is not None:
        tell(_reminder(renewed))


def _reminder(renewed: Callable[[], None]) -> Callable[[Any], Awaitable[None]]:
    """Return what a provider calls with a new token; it keeps nothing alive."""
    method = WeakMethod(renewed)

    def on_next(token: object) -> Awaitable[None]:
        if (call := method()) is not None:
            with suppress(RuntimeError):
                call()
        return NOTHING

    return on_next
