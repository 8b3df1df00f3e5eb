"""The user that docs/operating.md describes may do all that a cache does, and hardly more."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.admin.doctor import rights
from dscache.core import constants
from dscache.embedded import EmbeddedServer, ServerBinary, find_servers
from tests.support.clusters import ClusterGroup
from tests.support.documents import PROJECT, blocks

FOUND = find_servers()
WORDS = next(
    block.text.split()
    for block in blocks(PROJECT / "docs" / "operating.md")
    if block.text.startswith("ACL SETUSER")
)
USER, RULES = WORDS[2], WORDS[3:]
LOGIN = {"username": USER, "password": next(rule[1:] for rule in RULES if rule[0] == ">")}
PATIENCE = {"commandTimeout": 30_000, "connectTimeout": 30_000}


def create_user(client: redis_py.Redis) -> set[str]:
    """Create the user; return the commands that it may run."""
    known = {name.lower() for name in client.command()}
    rules = [rule for rule in RULES if rule[0] != "+" or rule[1:].partition("|")[0] in known]
    client.execute_command("ACL", "SETUSER", USER, *rules)
    return {rule[1:] for rule in rules if rule[0] == "+"}


def refused(client: redis_py.Redis) -> list[Any]:
    """Return the commands that a server has refused to any user."""
    return [entry["object"] for entry in client.acl_log()]


def called(client: redis_py.Redis) -> set[str]:
    """Return the commands that were run."""
    return {name.removeprefix("cmdstat_") for name in client.info("commandstats")}


async def do_everything(options: dict[str, Any]) -> None:
    """Use every feature of each kind of cache."""
    for near in ({}, {"nearCache": True}, {"nearCache": {"mode": "broadcast"}}):
        config = {"name": "redis", "options": {**PATIENCE, **options, **near}}
        async with dscache.AsyncCache.from_config(config) as cache:
            await use(cache)
    config = {"name": "redis", "options": {**PATIENCE, **options}}
    await asyncio.to_thread(block, config)


async def use(cache: dscache.AsyncCache) -> None:
    assert await cache.set("a", 3, {})
    assert await cache.set("a", 4, {}, ttl=60)
    assert await cache.set("a", 5, {}, if_newer=True)
    assert not await cache.set("a", 5, {}, if_newer=True, ttl=60)
    assert await cache.set("a", 6, {}, if_newer=True, ttl=60)
    assert await cache.get("a") is not None
    assert await cache.head("a") == 6
    names = [f"bulk/{number}" for number in range(300)]
    assert await cache.set_bulk({name: (1, {}) for name in names}) == set()
    assert await cache.set_bulk({name: (1, {}) for name in names}, if_newer=True) == set(names)
    assert len(await cache.get_bulk(names)) == len(await cache.head_bulk(names)) == len(names)
    assert await cache.delete_bulk([*names, "none"]) == len(names)
    assert await cache.delete("a")
    assert (await cache.fetch("b", lambda name: name, ttl=60, refresh_after=30)).data == "b"
    assert (await cache.update("b", lambda data: [data], ttl=dscache.KEEP)).data == ["b"]
    assert [name async for name in cache.scan("b")] == ["b"]
    async with cache.watch("b") as changes:
        await cache.set("b", 100, {})
        assert (await anext(changes)).name == "b"
    assert await cache.delete("b", if_version=100)


def block(config: dict[str, Any]) -> None:
    with dscache.Cache.from_config(config) as cache:
        assert cache.set("a", 3, {}, ttl=60)
        assert not cache.set("a", 3, {}, if_newer=True)
        assert cache.get_bulk(["a"])["a"].version == cache.head("a") == 3
        assert cache.delete("a")
        assert list(cache.scan("a")) == []


@pytest.mark.parametrize("binary", FOUND, ids=lambda binary: binary.name)
def test_one_server(binary: ServerBinary) -> None:
    with EmbeddedServer(binary) as server, redis_py.Redis(port=server.port) as client:
        allowed = create_user(client)
        client.config_resetstat()
        options = {"port": server.port, "connectionName": "me", "db": 3, **LOGIN}
        asyncio.run(do_everything(options))
        assert refused(client) == []
        of_clusters = {name for name in allowed if name.startswith("cluster|")}
        of_clusters |= {"readonly", "asking"}
        # These are needed for lost scripts and servers without HELLO.
        at_times = {"eval", "auth", "client|setname", "ping", "msetex"}
        assert allowed - called(client) <= of_clusters | at_times


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterGroup]:
    with ClusterGroup(FOUND[0], primaries=2, replicas=0) as started:
        yield started


def test_a_cluster(cluster: ClusterGroup) -> None:
    for node in cluster.nodes:
        with node.client() as client:
            create_user(client)
    asyncio.run(do_everything({**cluster.options, "redisOptions": LOGIN}))
    for node in cluster.nodes:
        with node.client() as client:
            assert refused(client) == []


def test_the_doctor_asks_for_the_same_rights() -> None:
    groups = (
        *(rights.FOR_CONNECTION, rights.FOR_RECORDS),
        *(rights.FOR_SCRIPTS, rights.FOR_CLUSTERS, rights.FOR_SCANS),
    )
    lines = [" ".join(f"+{name}" for name in group) for group in groups]
    [text] = [
        block.text
        for block in blocks(PROJECT / "docs" / "operating.md")
        if block.text.startswith("ACL SETUSER")
    ]
    assert [line.strip().removeprefix("-@all ") for line in text.splitlines()[1:]] == lines


def test_only_listed_commands_are_allowed() -> None:
    assert "-@all" in RULES
    assert not [rule for rule in RULES if rule.startswith("+@")]
    assert all(re.fullmatch(r"\+[a-z|]+", rule) for rule in RULES if rule[0] == "+")


def test_the_longest_command_has_the_documented_length() -> None:
    """ElastiCache Serverless accepts 3,999 arguments; docs/hosting.md states dscache's maximum."""
    # MSETEX, a count, a key and a value for each half, EX and seconds.
    plain = 2 + 4 * constants.COMMAND_RECORDS + 2
    scripted = 3 + (2 + 4) * constants.SCRIPT_RECORDS
    told = (PROJECT / "docs" / "hosting.md").read_text(encoding="utf-8")
    assert f"sends at most {max(plain, scripted):,}" in " ".join(told.split())
