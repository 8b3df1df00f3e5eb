"""Opening a socket step by step: connect and TLS, as generators that aio and blocking drive.

Nothing here waits: each step yields the events of poll that the socket must have before the next
step. So a thread can connect to several nodes of a cluster at once, while others answer.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import threading
from collections.abc import Generator, Iterable
from contextlib import suppress
from typing import Any, Final

from ..config import Options

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

# Held while a socket is made that no object holds yet. A fork then comes before or after, and the
# child closes every socket that it finds. The child inherits the lock, held by the thread that has
# forked.
_making = threading.RLock()
os.register_at_fork(
    before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release
)

# EAGAIN is none of them: a Unix socket reports it when the server's backlog is full, and then
# looks connected to poll (connect(2)).
_UNDER_WAY: Final = (errno.EINPROGRESS, errno.EALREADY)

Found = tuple[int, int, int, Any]
"""An address as ``socket`` takes it: family, type, protocol, and the argument of ``connect``."""

Steps = Generator[int, None, None]
"""Yields the events of poll that the socket must have before the next step."""


class SocketConnect:
    """A non-blocking socket while it is opened, and its holder from then on.

    The socket can be closed at every step, also by the finalizer.
    """

    # A class attribute, as ``__del__`` also runs when ``__init__`` was interrupted.
    _sock: socket.socket | None = None

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
        """Connect to the first of the addresses that accepts.

        Raises the OSError of the last one.
        """
        failure = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        for family, kind, protocol, address in addresses:
            try:
                with _making:
                    self._sock = socket.socket(family, kind, protocol)
                yield from _connect(self._sock, address)
                return
            except OSError as error:
                self.close()
                if error.errno is None:
                    raise  # not the system's: a signal handler has raised it
                failure = error
        raise failure

    def secure(self, context: ssl.SSLContext, server_hostname: str) -> Steps:
        """Do the TLS handshake over the connected socket. Raises SSLError or OSError."""
        with _making:
            self._sock = secure = context.wrap_socket(
                self.sock, server_hostname=server_hostname, do_handshake_on_connect=False
            )
        while True:
            try:
                secure.do_handshake()
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
        sock = self._sock
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, if there is one, without a word to the server.

        In a forked child, the parent's connection goes on.
        """
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def __del__(self) -> None:
        self.close()


def unix_address(path: str) -> Found:
    """Return the address of a Unix socket."""
    return socket.AF_UNIX, socket.SOCK_STREAM, 0, path


def _connect(sock: socket.socket, address: Any) -> Steps:
    sock.setblocking(False)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _TCP_OPTIONS.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    code = sock.connect_ex(address)
    if code in _UNDER_WAY:
        yield select.POLLOUT
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))
