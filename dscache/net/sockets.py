"""Opening a socket step by step: connect and TLS, as generators that aio and blocking drive.

Nothing here waits: each step yields the events of poll that the socket must have before the next
step. So a thread can connect to several nodes of a cluster at once, while others answer.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import zip_longest
from typing import Any, Final

from .._locks import make_lock
from ..config import Options
from ..config.address import join_address
from .foreign_errors import is_of_handler

FAMILIES: Final = {0: socket.AF_UNSPEC, 4: socket.AF_INET, 6: socket.AF_INET6}

# TCP keepalive and user timeout: the system ends a connection on which nothing was acknowledged for
# 10 s. Names that a platform lacks are left out.
_TCP_OPTIONS: Final = {
    getattr(socket, name): value
    for name, value in {
        "TCP_KEEPIDLE": 4,
        "TCP_KEEPINTVL": 2,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": 10_000,
    }.items()
    if hasattr(socket, name)
}

_ENDS: Final = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)

# Held while a new socket belongs to no object yet. So a fork comes before or after, and the child
# can close every socket of its parent. The child inherits the lock, held by the thread that has
# forked.
_making = make_lock()
os.register_at_fork(
    before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release
)

# EAGAIN is none of them: a Unix socket reports it when the server's backlog is full, and then
# looks connected to poll (connect(2)).
_UNDER_WAY: Final = (errno.EINPROGRESS, errno.EALREADY)

Found = tuple[int, int, int, Any]
"""An address as ``socket`` takes it: family, type, protocol, and the argument of ``connect``."""

Steps = Generator[int, None, None]
"""Yields the events of poll that the socket must have before the next step.

The step is also due at ``SocketConnect.wake_at``. The socket may be another one each time.
"""


# The seconds after which the next address is tried, while the last one has not answered.
ATTEMPT_DELAY: Final = 0.25
# The seconds after which the sockets before the newest one are looked at.
_GLANCE: Final = 0.02
# A timer may be this many seconds early.
_EARLY: Final = 0.002


# So many addresses are remembered as useless.
_REMEMBERED: Final = 16


class NoneAccepts(OSError):
    """No address of a host accepts; the text names each with its reason."""


class EndOfTls(ConnectionResetError):
    """The connection ended in the middle of the TLS handshake, without an alert."""


@contextmanager
def tls_handshake() -> Iterator[None]:
    """Raise EndOfTls if the connection ends in the block, in whatever words the system says so.

    A balancer without a server ends it, or a server that restarts. Data that it has left unread
    makes of the end a reset.
    """
    try:
        yield
    except OSError as error:
        ended = isinstance(error, _ENDS) or error.errno == errno.ENOTCONN
        if not ended or is_of_handler(error):
            raise
        raise EndOfTls(errno.ECONNRESET, os.strerror(errno.ECONNRESET)) from error


class UselessAddresses:
    """The addresses of a host that have accepted a connection and then served nothing.

    They are tried last. Otherwise one that is silent, such as that of a balancer without a server,
    would use up every attempt. Any thread may use it.
    """

    def __init__(self) -> None:
        self._known: tuple[Found, ...] = ()

    def add(self, address: Found) -> None:
        """Note that an address was of no use, the latest of all."""
        others = [one for one in self._known if one != address]
        self._known = (*others[1 - _REMEMBERED :], address)

    def last(self, addresses: Iterable[Found]) -> list[Found]:
        """Return the addresses, of which the latest useless one is the last."""
        known = self._known
        return sorted(addresses, key=lambda one: known.index(one) if one in known else -1)


class SocketConnect:
    """A non-blocking socket while it is opened, and its holder from then on.

    The socket can be closed at every step, also by the finalizer. All attempts to connect to one
    server share the ``useless`` addresses.
    """

    # A class attribute, as ``__del__`` also runs when ``__init__`` was interrupted.
    _sock: socket.socket | None = None
    _racing: list[tuple[socket.socket, Any]] = []  # noqa: RUF012 # replaced before it is changed

    def __init__(self, useless: UselessAddresses | None = None) -> None:
        self.wake_at = math.inf
        """When the next step is due even without an event, in seconds of ``time.monotonic``."""
        self._racing = []
        self._tried: dict[str, str] = {}
        self._waiting: deque[Found] = deque()
        self._is_shut = False
        self._useless = useless or UselessAddresses()
        self._used: Found | None = None
        self.in_tls = False
        """Whether a TLS handshake is under way."""

    @property
    def sock(self) -> socket.socket:
        """The socket; there must be one."""
        assert self._sock is not None
        return self._sock

    def open(self, options: Options, host: str, port: int) -> Steps:
        """Look up the host, connect and do the TLS handshake, as the options say.

        ``options.path`` takes the place of host and port. The look-up blocks. Raises OSError, of
        which SSLError is a kind, ConfigError if a file of TLS is bad, and UnicodeError for a text
        that can't be a host.
        """
        if options.path:
            host = "localhost"
            yield from self.connect([unix_address(options.path)])
        else:
            found = socket.getaddrinfo(host, port, FAMILIES[options.family], socket.SOCK_STREAM)
            yield from self.connect((*kind, address) for *kind, _, address in found)  # type: ignore[misc] # a starred tuple has no length for mypy
        if options.tls is not None:
            yield from self.secure(options.tls.context(), options.tls.servername or host)

    def connect(self, addresses: Iterable[Found]) -> Steps:
        """Connect to the first of the addresses that accepts ("Happy Eyeballs", RFC 8305).

        The next address is tried at once when another has failed, and otherwise 250 ms after the
        last. Raises the OSError of a single address, and NoneAccepts for several.
        """
        waiting = self._waiting = deque(self._useless.last(interleaved(addresses)))
        found = {address: (*kind, address) for *kind, address in waiting}
        is_single = len(waiting) == 1
        failure = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        self._tried = {}
        next_at = 0.0
        due: socket.socket | None = None  # poll has reported it
        while waiting or self._racing:
            # The newest first, as the driver waits for it.
            racing = [(sock, address, _is_connected) for sock, address in reversed(self._racing)]
            if waiting and (not racing or time.monotonic() >= next_at):
                next_at = time.monotonic() + ATTEMPT_DELAY
                *of_socket, address = waiting.popleft()
                try:
                    with _making:
                        sock = socket.socket(*of_socket)
                        self._racing.append((sock, address))
                except OSError as error:
                    failure = self._note(address, error)
                    next_at = 0.0
                    continue
                racing.append((sock, address, _begin))
            for sock, address, attempt in racing:
                try:
                    is_connected = attempt(sock, address)
                    if sock is due and not is_connected:
                        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
                except OSError as error:
                    self._drop(sock)
                    failure = self._note(address, error)
                    next_at = 0.0
                else:
                    if is_connected:
                        self._win(sock, address)
                        self._used = None if is_single else found[address]
                        return
            if not self._racing or (waiting and time.monotonic() >= next_at):
                continue
            self._sock = self._racing[-1][0]
            self.wake_at = next_at if waiting else math.inf
            if len(self._racing) > 1:  # only the newest socket wakes the driver
                self.wake_at = min(self.wake_at, time.monotonic() + _GLANCE)
            yield select.POLLOUT
            is_timed = time.monotonic() >= self.wake_at - _EARLY
            due = None if is_timed else self._sock
            if self._is_shut:
                self.close()
                raise OSError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))
        if is_single or not self._tried:
            raise failure
        raise NoneAccepts(failure.errno, self.tried)

    @property
    def tried(self) -> str:
        """The addresses, each with the reason why it is of no use; empty for a single one."""
        tried = dict(self._tried)
        for _sock, address in self._racing:
            tried[shown_address(address)] = "no answer"
        for *_, address in self._waiting:
            tried.setdefault(shown_address(address), "not tried")
        if len(tried) < 2:
            return ""
        return "; ".join(f"{address}: {reason}" for address, reason in tried.items())

    def _note(self, address: Any, error: OSError) -> OSError:
        """Note why an address has failed; raises an error that isn't the system's."""
        if error.errno is None:
            raise error  # a signal handler has raised it
        self._tried[shown_address(address)] = os.strerror(error.errno)
        return error

    def note_useless(self) -> None:
        """Note that the address, one of several, has accepted and serves nothing."""
        if self._used is not None:
            self._useless.add(self._used)

    def _win(self, winner: socket.socket, its_address: Any) -> None:
        self._sock = winner
        for sock, address in self._racing:
            if sock is not winner:
                sock.close()
                self._tried[shown_address(address)] = "no answer"
        self._racing = []
        self._tried[shown_address(its_address)] = "silent once connected"
        self.wake_at = math.inf

    def _drop(self, sock: socket.socket) -> None:
        self._racing = [(one, address) for one, address in self._racing if one is not sock]
        if self._sock is sock:
            self._sock = None
        sock.close()

    def secure(self, context: ssl.SSLContext, server_hostname: str) -> Steps:
        """Do the TLS handshake over the connected socket. Raises SSLError or OSError."""
        self.in_tls = True
        with tls_handshake():
            with _making:
                self._sock = secure = context.wrap_socket(
                    self.sock, server_hostname=server_hostname, do_handshake_on_connect=False
                )
            while True:
                try:
                    secure.do_handshake()
                    self.in_tls = False
                    return
                except ssl.SSLWantReadError:
                    yield select.POLLIN
                except ssl.SSLWantWriteError:
                    yield select.POLLOUT

    def detach(self) -> socket.socket:
        """Return the socket, which the caller closes from now on."""
        sock, self._sock = self.sock, None
        return sock

    def shutdown(self) -> None:
        """End the connection under a thread that waits for the socket; it stays open."""
        self._is_shut = True
        sock = self._sock
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the sockets, if there are any, without a word to the server.

        In a forked child, the parent's connection goes on.
        """
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()
        racing, self._racing = self._racing, []
        for one, address in racing:
            one.close()
            self._tried[shown_address(address)] = "no answer"

    def __del__(self) -> None:
        self.close()


def unix_address(path: str) -> Found:
    """Return the address of a Unix socket."""
    return socket.AF_UNIX, socket.SOCK_STREAM, 0, path


def interleaved(addresses: Iterable[Found]) -> list[Found]:
    """Return the addresses, each once, with their families in turn; the first stays first."""
    families: dict[int, list[Found]] = {}
    for found in dict.fromkeys(addresses):
        families.setdefault(found[0], []).append(found)
    rounds = zip_longest(*families.values())
    return [found for one in rounds for found in one if found is not None]


def shown_address(address: Any) -> str:
    """Return an address, as ``socket`` takes it, for an error text."""
    return join_address(address[0], address[1]) if isinstance(address, tuple) else str(address)


def _begin(sock: socket.socket, address: Any) -> bool:
    """Begin to connect; return whether the socket is connected already."""
    sock.setblocking(False)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _TCP_OPTIONS.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    code = sock.connect_ex(address)
    if code and code not in _UNDER_WAY:
        raise OSError(code, os.strerror(code))
    return not code


def _is_connected(sock: socket.socket, address: Any) -> bool:
    """Return whether a socket that was connecting is connected. Raises the OSError of a failure."""
    if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(code, os.strerror(code))
    try:
        sock.getpeername()
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return False
        raise
    return True
