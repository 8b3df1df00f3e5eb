"""Increment one record many times; several processes do so at once (test_changes.py).

``python increments.py KIND CONFIG NAME WRITER TIMES`` takes a configuration as JSON, and prints the
number of increments that were acknowledged, and of those whose outcome was reported as unknown. The
record counts all increments, and those of each writer. An increment that was certainly not done is
repeated, and doesn't count.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import dscache

_UNKNOWN = "may have happened"
_FAILURES = (dscache.ConnectionLost, dscache.ConnectError, dscache.DeadlineExceeded)


class Writer:
    """One writer, and the outcomes of its increments."""

    def __init__(self, name: str, writer: str, times: int) -> None:
        self.name = name
        self.acknowledged = self.unknown = 0
        self._writer = writer
        self._times = times

    @property
    def is_done(self) -> bool:
        return self.acknowledged + self.unknown >= self._times

    def increment(self, data: dict[str, Any]) -> dict[str, Any]:
        data["total"] += 1
        data["of"][self._writer] = data["of"].get(self._writer, 0) + 1
        return data

    def note(self, error: Exception) -> None:
        self.unknown += _UNKNOWN in str(error)


async def in_a_loop(config: dict[str, Any], writer: Writer) -> None:
    async with dscache.AsyncCache.from_config(config) as cache:
        while not writer.is_done:
            try:
                await cache.update(writer.name, writer.increment, default={"total": 0, "of": {}})
                writer.acknowledged += 1
            except _FAILURES as error:
                writer.note(error)


def in_a_thread(config: dict[str, Any], writer: Writer) -> None:
    with dscache.Cache.from_config(config) as cache:
        while not writer.is_done:
            try:
                cache.update(writer.name, writer.increment, default={"total": 0, "of": {}})
                writer.acknowledged += 1
            except _FAILURES as error:
                writer.note(error)


def main() -> None:
    kind, config, name, label, times = sys.argv[1:]
    writer = Writer(name, label, int(times))
    if kind == "async":
        asyncio.run(in_a_loop(json.loads(config), writer))
    else:
        in_a_thread(json.loads(config), writer)
    print(json.dumps({"acknowledged": writer.acknowledged, "unknown": writer.unknown}))


if __name__ == "__main__":
    main()
