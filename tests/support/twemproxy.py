"""A private twemproxy in front of several servers, for tests of proxies that hide the servers.

It splits MGET, MSET and DEL among its servers, and passes a script to the server of its first key.
It closes a connection at each command that it doesn't know: HELLO, CLIENT, SCRIPT, COMMAND INFO.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from dscache.embedded import EmbeddedServer
from tests.support.clusters import hold_port

_HOST = "127.0.0.1"
_PATIENCE_SECONDS = 30
# Where ``make test`` unpacks it.
_UNPACKED = Path(sys.prefix, "twemproxy", "usr", "sbin", "nutcracker")
_CONFIGURATION = """\
records:
  listen: {host}:{port}
  hash: md5
  hash_tag: "{{}}"
  distribution: modula
  redis: true
  servers:
"""


def find_twemproxy() -> str | None:
    """Return the path of a twemproxy, or None if there is none."""
    if os.access(_UNPACKED, os.X_OK):
        return str(_UNPACKED)
    return shutil.which("nutcracker")


class Twemproxy:
    """A twemproxy in front of the servers, running during ``with``."""

    def __init__(self, program: str, servers: Sequence[EmbeddedServer], password: str = "") -> None:
        self._program = program
        self._held = [hold_port(), hold_port()]
        self.port, self._stats_port = (one.getsockname()[1] for one in self._held)
        text = _CONFIGURATION.format(host=_HOST, port=self.port)
        text += "".join(f"   - {_HOST}:{server.port}:1\n" for server in servers)
        if password:
            text += f"  redis_auth: {password}\n"
        self._text = text
        self._folder = tempfile.TemporaryDirectory(prefix="dscache-twemproxy-")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        # It listens without SO_REUSEPORT; so the ports are free for a moment.
        for held in self._held:
            held.close()
        written = Path(self._folder.name, "nutcracker.yml")
        written.write_text(self._text)
        self._process = subprocess.Popen(
            [
                *(self._program, "-c", str(written), "-o", str(written.with_suffix(".log"))),
                *("-s", str(self._stats_port), "-a", _HOST),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                socket.create_connection((_HOST, self.port), 1).close()
            except OSError:
                assert self._process.poll() is None, "twemproxy did not start"
                assert time.monotonic() < end, "twemproxy did not listen"
                time.sleep(0.01)
            else:
                return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()
