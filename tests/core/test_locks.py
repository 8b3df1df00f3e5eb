"""Locks and events that threads share stay usable when a signal handler strikes."""

from __future__ import annotations

import _thread
import sys
import threading
from types import FrameType
from typing import Any

import pytest

from dscache import _locks


class Struck(_locks._Lock):
    """Raises as a signal handler may on Python 3.14: behind the lock, or before it."""

    when = "behind"

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self.when == "before":
            raise KeyboardInterrupt
        taken = super().acquire(blocking, timeout)
        if self.when == "behind":
            raise KeyboardInterrupt
        return taken


@pytest.mark.parametrize("when", ["before", "behind"])
def test_no_lock_stays_locked(when: str) -> None:
    lock = Struck()
    lock.when = when
    with pytest.raises(KeyboardInterrupt), lock:
        pytest.fail("the block began")
    assert is_free(lock)


@pytest.mark.parametrize("when", ["before", "behind"])
def test_an_outer_block_keeps_its_lock(when: str) -> None:
    lock = Struck()
    lock.when = "never"
    with lock:
        lock.when = when
        with pytest.raises(KeyboardInterrupt), lock:
            pytest.fail("the block began")
        assert not is_free(lock)
    assert is_free(lock)


@pytest.mark.parametrize("loses", [False, True], ids=["3.11", "3.14"])
def test_a_lock_is_reentrant(loses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_locks, "_LOSES_LOCKS", loses)
    lock = _locks.make_lock()
    assert isinstance(lock, _locks._Lock) == loses
    with lock:
        with lock:
            assert not is_free(lock)
        assert not is_free(lock)
    assert is_free(lock)


def test_replaced_locks_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As gevent replaces them, whose locks belong to greenlets."""
    replaced = object()
    monkeypatch.setattr(_locks, "_LOSES_LOCKS", True)
    monkeypatch.setattr(threading, "RLock", lambda: replaced)
    assert _locks.make_lock() is replaced


def is_free(lock: threading.RLock) -> bool:
    """Return whether another thread can take a lock."""
    found = []

    def take() -> None:
        found.append(_thread.RLock.acquire(lock, blocking=False))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("loses", [False, True])
def test_a_handler_sets_an_event_at_any_line_of_a_wait(
    monkeypatch: pytest.MonkeyPatch, loses: bool
) -> None:
    """A signal handler runs between two lines of its thread, and so does a trace function."""
    monkeypatch.setattr(_locks, "_LOSES_LOCKS", loses)

    def wait_struck_at(line: int, event: threading.Event, seen: list[int]) -> None:
        def trace(frame: FrameType, what: str, _: object) -> Any:
            if what == "line" and frame.f_code.co_filename == threading.__file__:
                seen.append(line)
                if len(seen) == line:
                    sys.settrace(None)
                    event.set()
            return trace

        sys.settrace(trace)
        event.wait(0.001)
        sys.settrace(None)

    for line in range(1, 200):
        event, seen = _locks.ReentrantEvent(), list[int]()
        thread = threading.Thread(target=wait_struck_at, args=(line, event, seen), daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        if len(seen) < line:
            break
        assert event.is_set()
    assert 10 < line < 199
