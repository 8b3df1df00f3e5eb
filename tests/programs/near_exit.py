"""End a program in the middle of the use of a near cache: ``near_exit.py SCENE URL``.

It prints "done" as its last act where it can. Nothing may be written to stderr.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

import dscache

NAMES = [f"n/{number}" for number in range(20)]
PATIENCE = 60


def opened() -> dscache.Cache:
    options = {"url": sys.argv[2], "commandTimeout": 20_000, "nearCache": {"idleLimit": 10_000}}
    cache = dscache.Cache.from_config({"name": "redis", "options": options})
    cache.set_bulk({name: (1, name) for name in NAMES})
    for _ in range(3):
        for name in NAMES:
            cache.get(name)
    assert cache.stats()["near_cache"]["hits"] > 0
    return cache


def hit(cache: dscache.Cache, until: Callable[[], bool] = lambda: False) -> None:
    """Read for as long as the cache is open; what it gives is right."""
    while not until():
        for name in NAMES:
            try:
                record = cache.get(name)
            except dscache.DscacheError:
                return
            assert record is not None
            assert record.data == name


def started(cache: dscache.Cache, count: int, daemon: bool = True) -> list[threading.Thread]:
    threads = [threading.Thread(target=hit, args=(cache,), daemon=daemon) for _ in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    return threads


def without_close() -> None:
    globals()["kept"] = opened()
    print("done")


def sys_exit() -> None:
    globals()["kept"] = opened()
    print("done")
    sys.exit(0)


def beside_daemons() -> None:
    """Hits run in daemon threads when the interpreter ends."""
    globals()["kept"] = cache = opened()
    started(cache, 3)
    print("done")


def in_other_threads() -> None:
    """Threads that the interpreter waits for read after the main thread has ended."""
    globals()["kept"] = cache = opened()
    end = time.monotonic() + 0.3

    def work() -> None:
        hit(cache, lambda: time.monotonic() > end)
        cache.set("n/0", 2, "n/0")
        assert cache.get("n/0") is not None
        print("done")

    threading.Thread(target=work).start()


def at_exit() -> None:
    """A function that the interpreter calls at its end reads and writes."""

    def last() -> None:
        cache.set("last", 1, 1)
        assert cache.get("last") is not None
        assert cache.get("n/3") is not None
        print("done")

    atexit.register(last)
    cache = opened()


def at_exit_closing() -> None:
    cache = opened()
    atexit.register(print, "done")
    atexit.register(cache.close)
    started(cache, 2)


class _Reading:
    def __init__(self, cache: dscache.Cache) -> None:
        self.cache = cache

    def __del__(self) -> None:
        # Whatever it gives so late: an end.
        try:
            self.cache.get("n/1")
            self.cache.get("not read before")
        except Exception:
            pass


def in_a_finalizer() -> None:
    """A finalizer reads while modules are torn down."""
    globals()["reading"] = _Reading(opened())
    print("done")


def close_beside_hits() -> None:
    for _ in range(5):
        cache = opened()
        threads = started(cache, 4, daemon=False)
        cache.close()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        for call in (cache.get, cache.head):
            with pytest.raises(dscache.DscacheError, match="closed"):
                call("n/0")
    assert threading.active_count() == 1, threading.enumerate()
    print("done")


def close_in_threads() -> None:
    """Several threads close it at once."""
    cache = opened()
    started(cache, 2)
    closing = [threading.Thread(target=cache.close) for _ in range(4)]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    print("done")


def collected() -> None:
    """A cache that nobody has any more leaves no thread and no socket."""
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        cache: Any = opened()
        gone = weakref.ref(cache)
        del cache
        end = time.monotonic() + PATIENCE
        while gone() is not None or threading.active_count() > 1:
            gc.collect()
            assert time.monotonic() < end, f"{gone()}, {threading.enumerate()}"
            time.sleep(0.01)
    gc.collect()
    assert len(os.listdir("/dev/fd")) <= before, os.listdir("/dev/fd")
    print("done")


def interrupted() -> None:
    """Ctrl-C comes while the main thread hits, misses and writes, two hundred times."""
    globals()["kept"] = cache = opened()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    struck = 0
    numbers = count(1)

    # A function of its own: Python 3.14 may raise the exception at a jump of a loop that stands
    # in the try block, and not catch it.
    def work(turn: int) -> None:
        for number in numbers:
            check(cache, number)
            if turn % 2:
                cache.get(f"not read before {number}")
                cache.set("written", number, number)

    for turn in range(200):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + turn % 20 * 0.0002)
            work(turn)
        except KeyboardInterrupt:
            struck += 1
    assert struck == 200
    for number in range(len(NAMES)):
        check(cache, number)
    print("done")


def interrupted_at_the_end() -> None:
    """Ctrl-C comes while the end of the program waits for a thread that looks up a host."""
    resolve = socket.getaddrinfo
    is_looked_up = threading.Event()

    def slow(*arguments: Any, **more: Any) -> Any:
        is_looked_up.set()
        time.sleep(2)
        return resolve(*arguments, **more)

    socket.getaddrinfo = slow
    options = {"url": sys.argv[2].replace("127.0.0.1", "localhost"), "nearCache": True}
    globals()["kept"] = cache = dscache.Cache.from_config({"name": "redis", "options": options})

    def read() -> None:
        with contextlib.suppress(dscache.DscacheError):
            cache.get("n/0")

    threading.Thread(target=read, daemon=True).start()
    assert is_looked_up.wait(PATIENCE)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    # Behind this function, the program's end calls the one that waits for the threads.
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0.3)
    print("done")


def check(cache: dscache.Cache, number: int) -> None:
    name = NAMES[number % len(NAMES)]
    record = cache.get(name)
    assert record is not None
    assert record.data == name


SCENES = {
    one.__name__: one
    for one in (
        without_close,
        sys_exit,
        beside_daemons,
        in_other_threads,
        at_exit,
        at_exit_closing,
        in_a_finalizer,
        close_beside_hits,
        close_in_threads,
        collected,
        interrupted,
        interrupted_at_the_end,
    )
}

if __name__ == "__main__":
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    SCENES[sys.argv[1]]()
    if sys.argv[1] in ("close_beside_hits", "close_in_threads", "collected"):
        faulthandler.cancel_dump_traceback_later()
