"""The locks that threads share stay free when an exception of a signal handler arrives."""

from __future__ import annotations

import _thread
import threading

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
