"""Kill the owner of a host's near cache, again and again, while other processes read through it.

``python -m tests.programs.near_host_kills WHERE`` is started by a soak row; WHERE is JSON, that of
``near_threads`` with ``times`` and ``processes``. The readers are forked, since new interpreters
would take most of the time. Prints as JSON how many owners were killed and what the readers found.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import redis as redis_py

from tests.programs.near_threads import Process
from tests.support.near_truth import links, port_of, ports_of

READER = "near-reader"
PATIENCE = 60.0


class Kills:
    """The readers by their process, and the folder that they write their findings into."""

    def __init__(self, where: dict[str, Any], folder: Path) -> None:
        self._where = where
        self._folder = folder
        self._chance = random.Random(where["times"])
        self._readers: dict[int, int] = {}
        self._started = 0

    def run(self) -> dict[str, Any]:
        where = self._where
        # Until a reader can take it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        for _ in range(where["processes"]):
            self._start()
        killed = 0
        with redis_py.Redis(where["host"], where["port"]) as admin:
            while killed < where["times"]:
                owner = self._owner(admin)
                time.sleep(self._chance.uniform(0, 1.5 * where["near"]["idleLimit"] / 1000))
                os.kill(owner, signal.SIGKILL)
                os.waitpid(owner, 0)
                killed += 1
                del self._readers[owner]
                self._start()
            self._owner(admin)
        time.sleep(2 * where["near"]["idleLimit"] / 1000)
        for process in self._readers:
            os.kill(process, signal.SIGUSR1)
        for process in self._readers:
            os.waitpid(process, 0)
        told = [json.loads(path.read_text()) for path in sorted(self._folder.glob("*.json"))]
        problems = [path.read_text() for path in sorted(self._folder.glob("*.err"))]
        return {
            "killed": killed,
            "problems": [text for text in problems if text],
            "found": told,
            "expected": where["processes"],
        }

    def _start(self) -> None:
        number = self._started
        self._started += 1
        process = os.fork()
        if process:
            self._readers[process] = number
            return
        error = os.open(self._folder / f"{number:05}.err", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(error, 2)
        try:
            reader = Process({**self._where, "seed": number})
            signal.signal(signal.SIGUSR1, lambda *_: reader.end())
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
            found = json.dumps(reader.run())
            (self._folder / f"{number:05}.json").write_text(found)
        except BaseException as failure:
            print(f"reader {number}: {failure!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(0)

    def _owner(self, admin: redis_py.Redis) -> int:
        """Return the process that hears of changes."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            ports = {port_of(client) for client in links(admin, READER)[0]}
            for process in self._readers:
                if ports & ports_of(process):
                    return process
            time.sleep(0.005)
        raise AssertionError("no process hears of changes")

    def end(self) -> None:
        """Kill the readers that are left."""
        for process in self._readers:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def main(where: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        kills = Kills(where, Path(folder))
        try:
            return kills.run()
        except BaseException:
            kills.end()
            raise


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
