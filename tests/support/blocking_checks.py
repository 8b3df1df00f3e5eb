"""Checks that hold for a Cache both on one server and on a cluster."""

from __future__ import annotations

import json
import weakref
from typing import Any

import pytest

import dscache
from dscache.core.constants import READ_BUFFER_BYTES
from tests.support.blocking import run_child


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
