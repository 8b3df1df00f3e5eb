"""Checks that hold for a Cache both on one server and on a cluster."""

from __future__ import annotations

import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import dscache
from dscache.core.constants import READ_BUFFER_BYTES
from tests.support.blocking import PATIENCE, run_child, until


def assert_interrupted(where: str, count: int, backend: str) -> None:
    """Let a program raise that often from a signal handler; assert that the cache stays correct."""
    result = run_child("interrupts.py", where, str(count), backend=backend)
    assert result["wrong"] == [], result
    assert result["raised"] == count
    # Where exceptions may be swallowed, chance decides how many are; elsewhere each is caught.
    assert result["caught"] + result["swallowed"] > 0.98 * count, result
    assert result["connects"] > count / 4, "most struck elsewhere than between send and receive"
    assert result["connections"] <= 4
    assert result["pending"] == 0


def assert_struck_at_each_line(options: dict[str, Any], backend: str, *, fewest: int = 3) -> None:
    """Let a program interrupt a cache at each of its lines; assert that it stays correct.

    ``fewest`` is the number of lines that each operation executes at least; a write has three.
    """
    result = run_child("strikes.py", json.dumps(options), backend=backend)
    assert result["wrong"] == [], result
    assert all(count >= fewest for count in result["strikes"].values()), result
    assert result["strikes"]["set"] >= 3, result
    assert result["pending"] == result["pending_bytes"] == result["left"] == 0
    assert result["connections"] == 1


def assert_a_lost_connection_frees_its_place(cache: dscache.Cache) -> None:
    """Lose a cache's only connection, as if an exception had struck right after it was taken."""
    pool: Any = cache._topology
    line = pool._idle.pop()
    with pytest.raises(dscache.Overloaded):
        cache.get("a")
    gone = weakref.ref(line)
    del line
    assert gone() is None


def assert_no_counter_falls(cache: dscache.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a call wait for the only connection, twice, and end the connection.

    The second call uses the same connection without a place. Another thread may ask for the
    counters at any moment.
    """
    cache.get("a")
    pool: Any = cache._topology
    operations = cache.stats()["operations"]
    with ThreadPoolExecutor(1) as threads:
        for _ in range(2):
            connection = pool._idle.pop()
            waiting = threads.submit(cache.get, "a")
            until(lambda: pool._waiters)
            operations += 1
            stats = cache.stats()
            pool._put_back(connection)
            waiting.result(PATIENCE)
            assert (stats["operations"], stats["pending"], stats["waiting"]) == (operations, 0, 1)
    seen = []
    discard = type(connection).discard

    def discarded(ended: Any) -> None:
        discard(ended)
        seen.append(cache.stats()["operations"])

    monkeypatch.setattr(type(connection), "discard", discarded)
    pool._retire(lambda _: True)
    monkeypatch.undo()
    assert seen == [operations]
    assert cache.stats()["operations"] == operations


def assert_large_bulks_work(cache: dscache.Cache, count: int) -> None:
    """Write, read and remove in bulks larger than the buffers of both sides."""
    names = [f"{'long name ' * 50}{n}" for n in range(count)]
    records = {name: (n, "x" * 500) for n, name in enumerate(names)}
    assert cache.set_bulk(records, if_newer=True) == set()
    found = cache.get_bulk(names)
    assert list(found) == names
    assert all(record.version == n for n, record in enumerate(found.values()))
    assert cache.head_bulk(names) == {name: n for n, name in enumerate(names)}
    assert cache.delete_bulk(names) == len(names)


def assert_each_size_is_read(cache: dscache.Cache) -> None:
    """Read records whose replies end shortly before, at and after each end of the read buffer.

    Over TLS, some of them end in the middle of a TLS record, which holds at most 16 KiB.
    """
    sizes = [
        end + beyond
        for end in (READ_BUFFER_BYTES, 2 * READ_BUFFER_BYTES)
        for beyond in (*range(-64, 64, 16), *range(64, 17_000, 1000))
    ]
    records = {f"sized/{size}": (size, "x" * (size - 2)) for size in sizes}
    for name, (size, data) in records.items():
        assert cache.set(name, size, data) is True
        found = cache.get(name)
        assert found is not None
        assert (found.version, found.data) == (size, data)
    for first in range(0, len(sizes), 7):
        names = list(records)[first : first + 7]
        found_all = cache.get_bulk(names)
        assert list(found_all) == names
        assert all((it.version, it.data) == records[name] for name, it in found_all.items())
