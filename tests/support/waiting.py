"""Waiting in tests, and what an idle cache must show."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import dscache
from tests.soak.figures import COUNTERS

# Seconds until something must have ended: far more than any machine needs, since it measures
# nothing.
PATIENCE = 60


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds. Raises TimeoutError if that takes far too long."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.002)


def assert_drained(cache: dscache.AsyncCache) -> None:
    """Assert that no operation is in progress."""
    stats = cache.stats()
    counters = {name: stats[name] for name in COUNTERS}
    assert not any(counters.values()), f"{cache.description}: not drained: {counters}"


def own_tasks() -> list[str]:
    """Return the names of dscache's own tasks in this loop."""
    names = [task.get_name() for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith("dscache")]
