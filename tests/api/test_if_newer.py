"""Guarded writes of many records on real servers: outcomes, and what they cost the server."""

from __future__ import annotations

import pytest
import redis as redis_py

import dscache
from dscache.core import constants as c
from tests.conftest import SERVERS, _server_id

every_server = pytest.mark.parametrize("server", SERVERS, indirect=True, ids=_server_id)

# Stored version, and whether version 10 replaces it; None for a damaged one.
ROWS: list[tuple[bytes | None, bool | None]] = [
    *((None, True), (b"9", True), (b"10", False), (b"11", False), (b"0", True), (b"", None)),
    *((b"009", True), (b"0010", False), (b"00000000000000000000000000000003", True)),
    *((b"100", False), (b"9223372036854775807", False), (b"9223372036854775808", None)),
    *((b"5x", None), (b" 9", None), (b"-1", None), (b"9.0", None), (b"1e0", None)),
]


@every_server
@pytest.mark.parametrize("is_alone", [False, True], ids=["beside others", "alone"])
async def test_stored_versions(
    cache: dscache.AsyncCache, redis: redis_py.Redis, is_alone: bool
) -> None:
    for i, (stored, is_newer) in enumerate(ROWS):
        name = f"versions/{is_alone}/{i}"
        if stored is not None:
            redis.mset({f"{name}_v": stored, f"{name}_d": b"[]"})
        others = {} if is_alone else {f"others/{n}": (i + 1, n) for n in range(3)}
        setting = cache.set_bulk({name: (10, 1), **others}, if_newer=True)
        if is_newer is None:
            with pytest.raises(Exception, match=name):
                await setting
        else:
            assert await setting == (set() if is_newer else {name})
        if is_newer:
            assert redis.mget(f"{name}_v", f"{name}_d") == [b"10", b"1"]
        else:
            assert redis.mget(f"{name}_v", f"{name}_d") == [stored, b"[]"]


@every_server
async def test_keys_of_other_types(cache: dscache.AsyncCache, redis: redis_py.Redis) -> None:
    redis.lpush("list_v", "1")
    redis.set("list_d", "[]")
    redis.set("half_v", "70")
    redis.set("other_v", "70")
    redis.lpush("other_d", "1")
    with pytest.raises(Exception, match="WRONGTYPE"):
        await cache.set("list", 10, 1, if_newer=True)
    names = ["half", "other", "absent"]
    assert await cache.set_bulk(dict.fromkeys(names, (10, 1)), if_newer=True) == set()
    assert list(await cache.get_bulk(names)) == names


@every_server
async def test_one_mget_and_one_mset_a_command(
    cache: dscache.AsyncCache, redis: redis_py.Redis
) -> None:
    """More calls in the script would double what a guarded write costs the server."""
    names = [f"calls/{i}" for i in range(2 * c.SCRIPT_RECORDS)]
    await cache.set_bulk(dict.fromkeys(names, (1, [])), if_newer=True)
    redis.config_resetstat()
    assert await cache.set_bulk(dict.fromkeys(names, (2, [])), if_newer=True) == set()
    stats = redis.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): one["calls"] for name, one in stats.items()}
    assert calls["evalsha"] == calls["mget"] == calls["mset"] == 2
    assert not {"get", "set", "strlen", "exists"} & calls.keys()
