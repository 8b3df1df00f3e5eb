"""Guarded writes below deepstream's ``storageHotPathPrefixes``, whose records stay at version 0."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import dscache

CONFIG: dict[str, Any] = {
    "cache": {"name": "memory"},
    "record": {"storageHotPathPrefixes": ["analytics/", "metrics/"]},
}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]


@pytest.mark.parametrize("call", ["set", "set_bulk", "update", "patch"])
async def test_a_guarded_write_is_warned_of_once(
    call: str, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def write(cache: dscache.AsyncCache, name: str) -> None:
        match call:
            case "set":
                await cache.set(name, 5, {}, if_newer=True)
            case "set_bulk":
                await cache.set_bulk({"a": (5, {}), name: (5, {})}, if_newer=True)
            case "update":
                await cache.update(name, lambda data: {**data, "n": 1}, default={})
            case _:
                await cache.patch(name, {"n": 1}, default={})

    async with dscache.AsyncCache.from_config(CONFIG) as cache:
        await cache.set("metrics/0", 0, {})
        await write(cache, "user/metrics/1")
        assert warnings(caplog) == []
        await write(cache, "metrics/1")
        await write(cache, "analytics/1")
    (said,) = warnings(caplog)
    assert said.startswith("record 'metrics/1' is below storageHotPathPrefixes (mapping)")
    assert "write version 0 without a condition" in said


@pytest.mark.parametrize("call", ["set", "set_bulk", "update", "patch"])
def test_a_blocking_cache_warns_too(
    call: str, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    def write(cache: dscache.Cache, name: str) -> None:
        match call:
            case "set":
                cache.set(name, 5, {}, if_newer=True)
            case "set_bulk":
                cache.set_bulk({name: (5, {})}, if_newer=True)
            case "update":
                cache.update(name, lambda data: {**data, "n": 1}, default={})
            case _:
                cache.patch(name, {"n": 1}, default={})

    with dscache.Cache.from_config(CONFIG) as cache:
        cache.set("metrics/0", 0, {})
        write(cache, "user/1")
        assert warnings(caplog) == []
        write(cache, "metrics/1")
        write(cache, "metrics/2")
    (said,) = warnings(caplog)
    assert said.startswith("record 'metrics/1' is below storageHotPathPrefixes (mapping)")
