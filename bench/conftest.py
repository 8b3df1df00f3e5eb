"""Fixtures of the benchmarks: a private server on a core of its own, an event loop, clients.

Every benchmark handles 1,000 records a call, so that microseconds in the table are nanoseconds
a record.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Callable, Coroutine, Iterator
from functools import partial

import pytest
import uvloop
from pytest_benchmark.fixture import BenchmarkFixture

from dscache.embedded import EmbeddedServer, find_server
from workload import CORES, Client, Dscache, RedisPy, apart, repeatedly

CLIENTS: dict[str, Callable[[], Client]] = {
    **{f"dscache-{name}": partial(Dscache, name) for name in CORES},
    "redis-py": RedisPy,
}


def pytest_report_header() -> str:
    libraries = ("hiredis", "redis", "msgspec", "uvloop")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    return f"server: {find_server().name}; libraries: {versions}; 1,000 records a call"


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    """A private server; for as long as it is there, it and this process have their own cores."""
    with EmbeddedServer() as started, apart(started):
        yield started


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """The event loop on which all clients are measured."""
    made = uvloop.new_event_loop()
    yield made
    made.close()


@pytest.fixture(params=list(CLIENTS))
def client(
    request: pytest.FixtureRequest, server: EmbeddedServer, loop: asyncio.AbstractEventLoop
) -> Iterator[Client]:
    """Each of those compared, in turn, connected and with all records in the server."""
    made = CLIENTS[request.param]()
    loop.run_until_complete(made.connect(server))
    loop.run_until_complete(repeatedly(made.set_bulk, 1))
    yield made
    loop.run_until_complete(made.close())


Measure = Callable[[Callable[[], Coroutine[None, None, None]]], None]


@pytest.fixture
def measure(benchmark: BenchmarkFixture, loop: asyncio.AbstractEventLoop) -> Measure:
    """Measure what a function that returns a coroutine takes on the event loop."""

    def run(start: Callable[[], Coroutine[None, None, None]]) -> None:
        benchmark(lambda: loop.run_until_complete(start()))

    return run
