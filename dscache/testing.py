"""A pytest plugin: fixtures with which users of dscache test their own code.

``pip install dscache`` is enough for pytest to find it; ``-p no:dscache.testing`` leaves it out.
It needs no other plugin: whatever runs a project's async tests, or none, will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from .cache import AsyncCache
from .errors import DscacheError

if TYPE_CHECKING:
    from .embedded import EmbeddedServer

# Seconds after which a server that doesn't answer is given up.
_PATIENCE = 5

__all__ = ["dscache_memory", "dscache_server"]


@pytest.fixture
def dscache_memory() -> AsyncCache:
    """A new, empty dscache.AsyncCache in memory, which opens on the event loop of its test.

    It needs no server, and nothing need be closed: it ends with the test. Its API, results and
    errors are those of a cache in Redis.
    """
    # Not opened here: no fixture knows on which loop a test will run.
    return AsyncCache.from_config({"name": "memory"})


@pytest.fixture(scope="session")
def _dscache_process() -> Iterator[EmbeddedServer]:
    # With it comes redis-py, which tests without a server need not wait for.
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
    """A private Redis or Valkey server, a dscache.embedded.EmbeddedServer, with nothing in it.

    Give ``dscache_server.url`` to what is tested. One server is started for the whole run (one
    for each process of pytest-xdist), when first asked for; each test finds it running and
    empty, whatever the test before has left, stopped or paused. Without any server to start, the
    test fails with the way to get one.
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
        server.restart()  # it has a password now, is some other server's replica, is busy...
    return server
