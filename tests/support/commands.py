"""Run the command line as a user would: in this process, in a pipe, on a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from dscache import cli

PATIENCE = 60


@dataclass(frozen=True)
class Done:
    """The result of a command: its exit status and output."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        """Parse each line of the output as JSON."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def document(self) -> Any:
        """Parse the output as one JSON document."""
        return json.loads(self.out)


def invoke(*words: str, stdin: bytes = b"", source: TextIO | None = None) -> Done:
    """Run the command line in this process, with its output captured as in a pipe.

    It reads ``stdin``, or ``source`` if that is given.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    status: Any = 0
    with tempfile.TemporaryFile() as file:
        file.write(stdin)
        file.seek(0)
        with (
            open(file.fileno(), closefd=False) as given,
            mock.patch.object(sys, "argv", ["dscache", *words]),
            mock.patch.object(sys, "stdin", source or given),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            before = signal.getsignal(signal.SIGINT)
            try:
                cli.main()
            except SystemExit as ended:
                status = ended.code
            finally:
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGINT, before)
            if isinstance(status, str):  # which Python prints before it ends with status 1
                print(status, file=sys.stderr)
                status = 1
    written = [one.buffer.getvalue().decode() for one in (out, err)]  # type: ignore[attr-defined]
    return Done(status or 0, *written)


def run(
    *words: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in its own process, with its output in a pipe."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "dscache", *words],
        cwd=cwd,
        env={**os.environ, **environment, "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
        check=False,
    )


def run_on_terminal(
    *words: str, columns: int = 130, typed: bytes = b"", **environment: str
) -> tuple[int, str]:
    """Run the command line on its own terminal; return its exit status and all its output.

    ``typed`` is its input.
    """
    ours, its = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    with subprocess.Popen(
        [sys.executable, "-m", "dscache", *words],
        env={**inherited, "TERM": "xterm-256color", "COLUMNS": str(columns), **environment},
        stdin=its,
        stdout=its,
        stderr=its,
    ) as process:
        os.close(its)
        os.write(ours, typed)
        written = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux raises this when the other side has ended
                break
            if not piece:
                break
            written += piece
        os.close(ours)
        return process.wait(PATIENCE), written.decode()


class Terminal:
    """A command on a terminal of its own, with what it has written so far."""

    def __init__(self, process: subprocess.Popen[bytes], ours: int) -> None:
        self.process = process
        self._ours = ours
        self.written = ""

    def until(self, pattern: str) -> re.Match[str]:
        """Read until the output, without colours, matches; return the match."""
        while not (match := re.search(pattern, plain(self.written))):
            assert self._read(), f"it ended before {pattern!r}: {self.written!r}"
        return match

    def rest(self) -> tuple[int, str]:
        """Return the exit status, and all the output."""
        while self._read():
            pass
        return self.process.wait(PATIENCE), self.written

    def _read(self) -> bool:
        ready, _, _ = select.select([self._ours], [], [], PATIENCE)
        assert ready, f"it wrote nothing for {PATIENCE} s after {self.written!r}"
        try:
            piece = os.read(self._ours, 65536)
        except OSError:  # Linux raises this when the other side has ended
            return False
        self.written += piece.decode(errors="replace")
        return bool(piece)


@contextlib.contextmanager
def on_terminal(*words: str, columns: int = 130, **environment: str) -> Iterator[Terminal]:
    """Start the command line on its own terminal; the process has ended on exit."""
    ours, its = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    size = {"COLUMNS": str(columns), "LINES": "40"}
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "dscache", *words],
        env={**inherited, "TERM": "xterm-256color", **size, **environment},
        stdin=its,
        stdout=its,
        stderr=its,
    ) as process:
        os.close(its)
        try:
            yield Terminal(process, ours)
        finally:
            process.kill()
            os.close(ours)


@contextlib.contextmanager
def running(*words: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start the command line with pipes for all its streams; the process has ended on exit."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "dscache", *words], **{**pipes, **options}
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def plain(written: str) -> str:
    """Return a terminal's output without its colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", written).replace("\r\n", "\n")


def failing_after(count: int, work: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """Return ``work`` wrapped to raise ``error`` after that many calls."""
    left = count

    def limited(*args: Any, **keywords: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise error
        return work(*args, **keywords)

    return limited
