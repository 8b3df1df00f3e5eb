"""Fixtures: deepstream's own packages, and a Redis with servers, clients and peers on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import redis as redis_py

from dscache.embedded import EmbeddedServer
from tests.support.deepstream import NotInstalledError, Pair, World, install


@pytest.fixture(scope="session")
def packages() -> Path:
    """The folder with deepstream's packages from npm; without Node the test is skipped."""
    try:
        return install()
    except NotInstalledError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def bus() -> Iterator[EmbeddedServer]:
    """A Redis for one world after another."""
    with EmbeddedServer() as started:
        yield started


@pytest.fixture
async def world(packages: Path, tmp_path: Path) -> AsyncIterator[World]:
    """Real servers, clients and peers on a Redis of their own, to be started by the test."""
    with EmbeddedServer() as redis:
        started = World(packages, redis, tmp_path)
        try:
            yield started
        finally:
            await started.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(
    packages: Path, bus: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pair]:
    """Two servers with a client each, and a peer, that a module's tests share and don't break."""
    with redis_py.Redis.from_url(bus.url) as client:
        client.flushall()
    world = World(packages, bus, tmp_path_factory.mktemp("deepstream"))
    try:
        yield await Pair.start(world)
    finally:
        await world.close()
