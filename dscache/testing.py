"""A pytest plugin with fixtures for projects that use dscache.

pytest finds it once dscache is installed; ``-p no:dscache.testing`` disables it. It works with any
plugin for async tests, or without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from .cache import AsyncCache
from .errors import DscacheError

if TYPE_CHECKING:
    from .embedded import EmbeddedServer

# Seconds without an answer after which the server is restarted.
_PATIENCE = 5

__all__ = ["dscache_memory", "dscache_server"]


@pytest.fixture
def dscache_memory() -> AsyncCache:
    """A new, empty dscache.AsyncCache in memory, which opens on the event loop of its test.

    It needs no server and no closing. Its API, results and errors are those of a cache in Redis.
    """
    # Not opened here: a fixture doesn't know the event loop of its test.
    return AsyncCache.from_config({"name": "memory"})


@pytest.fixture(scope="session")
def _dscache_process() -> Iterator[EmbeddedServer]:
    # Imported here, as it imports redis-py, which tests without a server don't need.
    from .embedded import EmbeddedServer

    try:
        server = EmbeddedServer()
        server.start()
    except DscacheError as error:
        pytest.fail(f"dscache_server: {error}", pytrace=False)
    yield server
    server.close()


@pytest.fixture
def dscache_server(_dscache_process: EmbeddedServer) -> EmbeddedServer:
    """A private Redis or Valkey server without data, as a dscache.embedded.EmbeddedServer.

    Give ``dscache_server.url`` to the code under test. The first test that uses the fixture starts
    the server for the whole run (one for each process of pytest-xdist). Each test finds it running
    and empty, even if the test before stopped, paused or filled it. Without an installed server,
    the test fails and names the package to install.
    """
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    server = _dscache_process
    if not server.is_running:
        server.start()
        return server
    server.resume()
    try:
        with redis.Redis(
            host=server.host,
            port=server.port,
            socket_timeout=_PATIENCE,
            retry=Retry(NoBackoff(), 0),
        ) as client:
            client.flushall()
    except redis.RedisError:
        server.restart()  # a test has set a password, made it a replica, or keeps it busy
    return server
