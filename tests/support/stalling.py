"""A server that stops to answer: from the start, or at the first of some commands."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

_HOST = "127.0.0.1"


class StallingServer:
    """Forward connections to a server until a request contains ``word``; no reply comes after it.

    Without a word, and without a server, it never answers. ``reached`` is set once a command
    waits in vain.
    """

    def __init__(self, port: int = 0, word: bytes = b"") -> None:
        self.reached = threading.Event()
        self._port = port
        self._word = word
        self._listener = socket.create_server((_HOST, 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                if not self._port:
                    threading.Thread(target=self._take, args=(client, None), daemon=True).start()
                    continue
                server = socket.create_connection((_HOST, self._port))
                self._open.append(server)
                for arguments in ((client, server), (server, client)):
                    threading.Thread(target=self._take, args=arguments, daemon=True).start()

    def _take(self, source: socket.socket, sink: socket.socket | None) -> None:
        """Take the data of one side, and give it to the other unless the server has stalled."""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if sink is None or self._word in data:
                    self.reached.set()
                elif not self.reached.is_set():
                    sink.sendall(data)
        if sink is not None:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close all connections."""
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for one in (self._listener, *self._open):
            one.close()


@contextlib.contextmanager
def stalling(port: int = 0, word: bytes = b"") -> Iterator[StallingServer]:
    """Run a StallingServer during the block."""
    server = StallingServer(port, word)
    try:
        yield server
    finally:
        server.close()
