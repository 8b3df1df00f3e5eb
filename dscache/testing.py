"""A pytest plugin: fixtures for tests of programs that use dscache.

pytest finds it after ``pip install dscache``. The option ``-p no:dscache.testing`` disables it. It
works with any plugin for async tests, or without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

try:
    import pytest
except ImportError as error:
    raise ImportError("dscache.testing needs pytest; install pytest") from error

from .cache import AsyncCache
from .errors import DscacheError

if TYPE_CHECKING:
    from .embedded import EmbeddedServer

# Limit for the server's reply, in seconds.
_PATIENCE = 5

__all__ = ["dscache_memory", "dscache_server"]


@pytest.fixture
def dscache_memory() -> AsyncCache:
    """A new, empty dscache.AsyncCache in memory, which opens on the event loop of its test.

    It needs no server and no closing. Its API, results and errors are the same as in Redis.
    """
    # Not opened here: a fixture doesn't know the event loop of the test.
    return AsyncCache.from_config({"name": "memory"})


@pytest.fixture(scope="session")
def _dscache_process() -> Iterator[EmbeddedServer]:
    from .embedded import EmbeddedServer  # not needed by tests without a server

    try:
        server = EmbeddedServer()
        server.start()
    except DscacheError as error:
        pytest.fail(f"dscache_server: {error}", pytrace=False)
    yield server
    server.close()


@pytest.fixture
def dscache_server(_dscache_process: EmbeddedServer) -> EmbeddedServer:
    """A private, empty Redis or Valkey server: a dscache.embedded.EmbeddedServer.

    Pass ``dscache_server.url`` to the tested program. One server is started for the whole run, at
    its first use. With pytest-xdist, each process has its own. Each test gets the server running
    and empty, even if the previous test left data or stopped or paused it. If no server is
    installed, the test fails with the remedy.
    """
    import redis  # not needed by tests without a server

    server = _dscache_process
    if not server.is_running:
        server.start()
        return server
    server.resume()
    try:
        with redis.Redis.from_url(server.url, socket_timeout=_PATIENCE, retry=None) as client:
            client.flushall()
    except redis.RedisError:
        server.restart()  # the test before may have set a password or made it a replica
    return server
