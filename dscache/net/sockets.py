"""One attempt to reach a node, step by step: whoever makes it does the waiting.

While one node of a cluster is being connected to, others answer, and one may never be reached. So
nothing here waits: each step says what its socket must be ready for before the next.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import threading
from collections.abc import Generator
from typing import Final

from ..config import Options

FAMILIES: Final = {0: socket.AF_UNSPEC, 4: socket.AF_INET, 6: socket.AF_INET6}

# TCP keepalive and user timeout: the system ends a connection on which nothing was acknowledged for
# 10 s. Names that a platform lacks are left out.
TCP_OPTIONS: Final = {
    getattr(socket, name): value
    for name, value in {
        "TCP_KEEPIDLE": 4,
        "TCP_KEEPINTVL": 2,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": 10_000,
    }.items()
    if hasattr(socket, name)
}

# Held while a socket is being made that nobody could find yet: a fork then comes before or after,
# and the child closes what it finds. The child has it too, held by the thread that forked.
_making = threading.RLock()
os.register_at_fork(
    before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release
)

_UNDER_WAY: Final = (errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EALREADY)


class SocketConnect:
    """A socket that is being connected, in the shape of redis-py's connections.

    That is ``_sock`` and ``disconnect``: a line knows no more of those than that.
    """

    # Here, as ``__del__`` is called of one whose ``__init__`` was interrupted too.
    _sock: socket.socket | None = None

    def __init__(self, options: Options) -> None:
        self._options = options

    @property
    def sock(self) -> socket.socket:
        """The socket, which does not block."""
        assert self._sock is not None
        return self._sock

    def steps(self) -> Generator[int, None, None]:
        """Connect; yields the events of poll that the socket must have before the next step.

        The addresses of a name are tried in turn. Raises OSError (an SSLError is one).
        """
        options = self._options
        found = socket.getaddrinfo(
            options.host, options.port, FAMILIES[options.family], socket.SOCK_STREAM
        )
        for number, (family, kind, protocol, _, address) in enumerate(found, 1):
            try:
                with _making:
                    self._sock = socket.socket(family, kind, protocol)
                yield from self._reach(self._sock, address)
                break
            except OSError as error:
                # One without a number is none of the system's.
                if number == len(found) or error.errno is None:
                    raise
                self.disconnect()
        if options.tls is not None:
            context = options.tls.context()
            with _making:
                self._sock = secure = context.wrap_socket(
                    self.sock,
                    server_hostname=options.tls.servername or options.host,
                    do_handshake_on_connect=False,
                )
            yield from tls_handshake(secure)

    def _reach(self, sock: socket.socket, address: object) -> Generator[int, None, None]:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in TCP_OPTIONS.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        code = sock.connect_ex(address)  # type: ignore[arg-type]
        if code in _UNDER_WAY:
            yield select.POLLOUT
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))

    def disconnect(self) -> None:
        """Close the socket, if there is one."""
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def __del__(self) -> None:
        # Of a line that was dropped, by a thread that was interrupted.
        self.disconnect()


def tls_handshake(sock: ssl.SSLSocket) -> Generator[int, None, None]:
    """Do the handshake of TLS; yields the events that it needs. Raises ssl.SSLError."""
    while True:
        try:
            sock.do_handshake()
            return
        except ssl.SSLWantReadError:
            yield select.POLLIN
        except ssl.SSLWantWriteError:
            yield select.POLLOUT
