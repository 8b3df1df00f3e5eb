"""Interrupt a blocking cache at random moments, and check that no reply goes astray.

``python -m tests.programs.interrupts URL COUNT`` prints the results as JSON; options as JSON may
replace the URL. A signal handler raises COUNT times, in the thread that uses the cache, while other
threads use it as well. Every record's data contains its name and version, so that a misdelivered
reply shows, as does a write that ended in the middle of another. There are as many connections as
threads, so a lost place shows as Overloaded. The cache's own error classes are raised as well: from
a handler they say nothing about the interrupted operation.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import types
from collections import Counter
from typing import Any

import dscache
from tests.support.blocking import options_of

THREADS = 3
NAMES = [f"record/{n}" for n in range(50)]
LARGE = {f"large/{n}": (n, f"large/{n} 0" + "x" * 2000) for n in range(1500)}
OWNED = {f"owner/{n}": (n, f"owner/{n} {n}") for n in range(100)}
# More than the buffers of a socket hold.
BIG = {f"big/{n}": "x" * 2_000_000 for n in range(2)}
# A bulk takes so much longer than other operations that few signals would hit any of those.
ACTIONS = ("get", "set", "guarded", "head", "delete", "get_bulk", "head_bulk")
LONG = ("large", "big_get", "big_set")
# Functions in which an exception reaches no caller: Python ignores one in a finalizer, the standard
# library takes a ValueError of an enum for an unknown number, and the core encodes or decodes JSON
# once more, tolerantly, after an error of a user's own type.
SWALLOWING = {"__del__", "_intenum_converter", "encode_data", "data"}
# Seconds until a signal: from before the operation begins to long after its end.
LATEST = 0.0004


class Struck(BaseException):
    """Raised like KeyboardInterrupt and a greenlet's end."""


class Alarm(Exception):
    """Raised like a server's limit for a request."""


KINDS: tuple[type[BaseException], ...] = (
    *(Struck, Alarm, KeyboardInterrupt, TimeoutError, OSError, MemoryError, RecursionError),
    *(BlockingIOError, dscache.RecordError, dscache.ReplyError, dscache.ConnectionLost),
    *(dscache.ConnectError, dscache.DeadlineExceeded, dscache.ProtocolError),
)


class Run:
    """One run: the exceptions raised, caught and swallowed, and the violations."""

    def __init__(self, cache: dscache.Cache, seed: int) -> None:
        self.cache = cache
        self.random = random.Random(seed)
        self.raised = 0
        self.caught = 0
        self.swallowed = 0
        self.may_swallow = False
        self.armed = False
        self.struck: BaseException | None = None
        self.wrong: list[str] = []
        self.outcomes: Counter[str] = Counter()
        self.stop = False

    def strike(self, number: int, frame: types.FrameType | None) -> None:
        if self.armed:
            self.armed = False
            self.raised += 1
            self.struck = KINDS[self.raised % len(KINDS)]("struck")
            self.may_swallow = _may_swallow(frame)
            raise self.struck

    def check(self, name: str, record: Any) -> None:
        if record is None:
            return
        said, version, *rest = record.data.split(" ")
        if (
            record.name != name
            or said != name
            or int(version.rstrip("x")) != (record.version if not name.startswith("large/") else 0)
            or rest != ([BIG[name], version] if name in BIG else [])
        ):
            self.wrong.append(f"{name}: {record!r:.200}")

    def act(self, action: str, name: str, version: int) -> None:
        cache = self.cache
        data = f"{name} {version}"
        if action == "get":
            self.check(name, cache.get(name))
        elif action == "set":
            if cache.set(name, version, data) is not True:
                self.wrong.append(f"{name}: set")
        elif action == "guarded":
            if type(cache.set(name, version, data, ttl=1000, if_newer=True)) is not bool:
                self.wrong.append(f"{name}: set if_newer")
        elif action == "head":
            if type(cache.head(name)) not in (int, type(None)):
                self.wrong.append(f"{name}: head")
        elif action == "delete":
            if type(cache.delete(name)) is not bool:
                self.wrong.append(f"{name}: delete")
        elif action == "get_bulk":
            for key, record in cache.get_bulk(NAMES[:20]).items():
                self.check(key, record)
        elif action == "big_get":
            name = self.random.choice(list(BIG))
            self.check(name, cache.get(name))
        elif action == "big_set":
            name = self.random.choice(list(BIG))
            if cache.set(name, version, f"{name} {version} {BIG[name]} {version}") is not True:
                self.wrong.append(f"{name}: set")
        elif action == "head_bulk":
            if not cache.head_bulk([name, "never"]).keys() <= {name}:
                self.wrong.append(f"{name}: head_bulk")
        else:
            found = cache.get_bulk(LARGE)
            if list(found) != list(LARGE):
                self.wrong.append("a bulk lost records")
            for key, record in found.items():
                self.check(key, record)

    def beside(self, seed: int) -> None:
        """Use the cache undisturbed, in another thread."""
        own = random.Random(seed)
        version = 0
        while not self.stop:
            version += 1
            try:
                self.act(own.choice(ACTIONS), own.choice(NAMES), version)
            except Exception as error:
                self.wrong.append(f"in another thread: {error!r}")

    def interrupted(self, count: int) -> None:
        """Use the cache until it was interrupted that often."""
        version = 0
        while self.raised < count and not self.wrong:
            version += 1
            is_long = version % 30 == 0
            action = self.random.choice(LONG if is_long else ACTIONS)
            latest = 50 * LATEST if is_long else LATEST
            # Otherwise most signals would hit a thread that connects.
            self.cache.head("ready")
            try:
                self.struck = None
                self.armed = True
                signal.setitimer(signal.ITIMER_REAL, self.random.uniform(1e-6, latest))
                self.act(action, self.random.choice(NAMES), version)
                self.armed = False
                self.outcomes["undisturbed"] += 1
                self.swallowed += self.struck is not None and self.may_swallow
            except KINDS as error:
                # An exception raised while a host's name is encoded is raised once more.
                if self.struck not in (error, error.__cause__):
                    self.wrong.append(f"{action}: {error!r}")
                self.caught += 1
                self.outcomes[type(error).__name__] += 1
            except dscache.DscacheError as error:
                self.wrong.append(f"{action}: {error!r}")
            finally:
                self.armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def _may_swallow(frame: types.FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name in SWALLOWING:
            return True
        frame = frame.f_back
    return False


def main(where: str, count: int, seed: int) -> dict[str, Any]:
    options = options_of(where) | {
        "maxConnections": THREADS + 1, "whenFull": "error", "commandTimeout": 60_000,
    }  # fmt: skip
    cache = dscache.Cache.from_config({"name": "redis", "options": options})
    cache.set_bulk(LARGE)
    cache.set_bulk(OWNED)
    run = Run(cache, seed)
    signal.signal(signal.SIGALRM, run.strike)
    threads = [threading.Thread(target=run.beside, args=(seed + n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    run.interrupted(count)
    seconds = time.monotonic() - began
    run.stop = True
    for thread in threads:
        thread.join()
    for name in (*NAMES, *BIG, *OWNED):
        run.check(name, cache.get(name))
    found = {name: (it.version, it.data) for name, it in cache.get_bulk(OWNED).items()}
    if found != OWNED:
        run.wrong.append("records went to others")
    stats = cache.stats()
    cache.close()
    return {
        "seed": seed,
        "raised": run.raised,
        "caught": run.caught,
        "swallowed": run.swallowed,
        "wrong": run.wrong[:5],
        "seconds": round(seconds, 1),
        "outcomes": dict(run.outcomes),
        "connects": stats["connects"],
        "connections": max(
            node["connections"] for node in stats.get("nodes", {"": stats}).values()
        ),
        "pending": sum(stats[name] for name in ("pending", "in_flight", "queued", "waiting")),
    }


if __name__ == "__main__":
    seed = int(os.environ.get("SEED", time.time_ns() % 2**32))
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), seed)))
