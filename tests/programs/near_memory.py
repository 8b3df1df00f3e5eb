"""Fill a near cache.

``python -m tests.programs.near_memory BACKEND SIZE MAX_BYTES`` prints two numbers: the bytes it
counts, and how many bytes this process holds more than with an empty one. SIZE is that of a
record's data.
"""

from __future__ import annotations

import sys
from typing import Any

import hiredis

from dscache import _backend
from tests.soak.figures import held
from tests.support.wire import resp

ROUNDS = 2


class Ignored:
    """A waiter of a bulk that ignores its result."""

    def set_result(self, result: object, /) -> None: ...
    def set_exception(self, error: Exception, /) -> None: ...


def read(pipeline: Any, names: list[str], data: bytes) -> None:
    """Read records, all with the same data, through a pipeline without a server."""
    pipeline.near.get_bulk(names)
    while output := pipeline.take_output():
        reader = hiredis.Reader()
        reader.feed(output)
        while command := reader.gets():
            pipeline.feed(resp([b"1", data] * ((len(command) - 1) // 2)))


def main(backend: str, size: int, max_bytes: int) -> None:
    _, core = _backend.choose(backend)
    pipeline = core.Pipeline(Ignored, int, timeout=3600.0)
    pipeline.near = core.NearCache(
        Ignored,
        pipeline,
        timeout=3600.0,
        max_records=10**9,
        max_bytes=max_bytes,
        max_age=3600.0,
        idle_limit=3600.0,
    )
    pipeline.connected(True)
    at_once = max(1, min(500, 2**20 // size))
    data = b"x" * size

    def names(first: int) -> list[str]:
        return [f"{number:010}" for number in range(first, first + at_once)]

    # Objects made once, by the first records.
    read(pipeline, names(0), data)
    pipeline.connection_lost(ConnectionError("cut"), True)
    before, counted = held(), pipeline.near.stats()["bytes"]
    pipeline.connected(True)
    needed = ROUNDS * max_bytes // (size + 200)
    for first in range(at_once, needed, at_once):
        read(pipeline, names(first), data)
    assert pipeline.near.stats()["evictions"] > needed // 4
    print(pipeline.near.stats()["bytes"] - counted, held() - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
