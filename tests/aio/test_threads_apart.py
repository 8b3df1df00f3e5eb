"""An AsyncCache used outside its loop's thread is refused, on one server and on a cluster."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.embedded import EmbeddedServer
from tests.conftest import BY_AGE, PATIENT, SERVERS, MakeCache, _server_id
from tests.programs.threads_apart import assert_other_threads_are_refused, assert_the_loop_may_move
from tests.soak.cluster_rows import open_cache
from tests.support.clusters import ClusterGroup
from tests.support.waiting import PATIENCE

NEAR = pytest.mark.parametrize("near", [{}, {"nearCache": True}], ids=["plain", "near"])
ON_ONE_SERVER = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)
ON_NEWEST = pytest.mark.parametrize("binary", BY_AGE[-1:], indirect=True, ids=lambda one: one.name)


@NEAR
@ON_ONE_SERVER
async def test_use_in_other_threads_is_refused(make_cache: MakeCache, near: dict[str, Any]) -> None:
    async with asyncio.timeout(PATIENCE):
        await assert_other_threads_are_refused(await make_cache(**near))


async def test_use_in_other_threads_is_refused_without_a_server(make_cache: MakeCache) -> None:
    await assert_other_threads_are_refused(await make_cache(name="memory"))


@pytest.mark.parametrize("layout", ["hashtag", "deepstream"])
@NEAR
@ON_NEWEST
async def test_use_in_other_threads_is_refused_on_a_cluster(
    group: ClusterGroup, backend: str, near: dict[str, Any], layout: str
) -> None:
    if near and layout == "deepstream":
        near = {"nearCache": {"required": False}}
    async with (
        asyncio.timeout(PATIENCE),
        open_cache(group, keyLayout=layout, **near, **PATIENT) as cache,
    ):
        await assert_other_threads_are_refused(cache)


@NEAR
@ON_ONE_SERVER
def test_a_loop_may_continue_in_another_thread(
    server: EmbeddedServer, redis: redis_py.Redis, backend: str, near: dict[str, Any]
) -> None:
    config = {"name": "redis", "options": {"url": server.url, **PATIENT, **near}}
    assert_the_loop_may_move(lambda: dscache.AsyncCache.from_config(config))
