"""Look whether a Redis is good for records: ask it all that ``admin.doctor.findings`` judges."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from redis.exceptions import ResponseError

from ...aio.resolver import Resolver
from ...aio.sentinel import Sentinels, pairs
from ...cache import AsyncCache
from ...config import Config, Options, SentinelNode
from ...config.validation import Location
from ...core.constants import read_epoch
from ...core.keys import is_version_key, partner
from ...errors import ConfigError, DscacheError, ReplyError, clean
from ..cluster_config import on_cluster
from ..cluster_survey import survey
from ..control import ControlConnection, RawCommand
from ..key_layout import DEEPSTREAM, HASHTAG, Layout
from ..primaries import SCAN_COUNT, Primaries, is_clustered, open_primaries, parse_info
from . import record_checks as of_records
from . import server_checks as of_server
from . import topology_checks as of_topology
from .findings import BAD, Checkup, Finding, merged
from .record_checks import Sample
from .topology_checks import SentinelSays

_PINGS = 200
# The longest that the PINGs may take together, in seconds as all below.
_PINGS_LAST = 2.0
# Keys that are looked at.
_SAMPLE = 20_000
# A record that is just being written as two keys is whole after so long.
_SECOND_LOOK = 0.1

# What to do about a server that can't be used at all, by the first word of what it said.
_REMEDIES = {
    "WRONGPASS": "correct the password, and the username if there is one",
    "NOAUTH": "give the password: in the configuration, or as redis://:password@host",
    "NOPERM": "let an administrator allow what is missing by ACL SETUSER",
    "ERR": "correct what it complains of",
    "LOADING": "wait until the server has loaded its data",
    "MASTERDOWN": "the server is a replica that has lost its primary: name the primary",
}
_UNREACHABLE = "start the server, or correct the address, and look at firewalls in between"


async def check_up(config: Config, *, by_url: bool = False) -> Checkup:
    """Return how good the server or cluster of a configuration is for records.

    What keeps it from being reached is a finding too. ``by_url`` tells that the configuration is
    a URL, which can't name the nodes of a cluster. Raises ConfigError.
    """
    found: list[Finding] = []
    options = config.options
    if config.name == "memory":
        raise Location(config.source).error("the cache is inside its process; name a server")
    if options.sentinels:
        found.append(await _look_at_sentinels(options))
    try:
        is_configured = by_url or bool(options.nodes)
        if not options.nodes and not options.sentinels:
            server = await ControlConnection.open(options)
            try:
                if await is_clustered(server):
                    config = on_cluster(config)
            finally:
                server.close()
        if config.options.nodes:
            report = await survey(config)
            found.append(of_topology.check_cluster(report, is_configured=is_configured))
        async with AsyncCache(config) as cache, open_primaries(cache) as shards:
            found += await _look_at_all(shards, config.options)
    except ConfigError:
        raise
    except DscacheError as error:
        code = error.code if isinstance(error, ReplyError) else ""
        remedy = _REMEDIES.get(code, _REMEDIES["ERR"] if code else _UNREACHABLE)
        found.insert(0, Finding("connection", BAD, str(error), remedy))
    return Checkup(config.address, tuple(found))


async def _look_at_all(shards: Primaries, options: Options) -> list[Finding]:
    by_node = {shard.address: await _look_at_server(shard.server, options) for shard in shards.all}
    sample = await _take_sample(shards, options)
    layout = HASHTAG if options.hash_tag else DEEPSTREAM
    return [
        *merged(by_node),
        of_records.check_layout(sample, layout, on_cluster=bool(options.nodes)),
        of_records.check_halves(sample),
    ]


# -- one server


async def _look_at_server(server: ControlConnection, options: Options) -> list[Finding]:
    tls = options.redis_options.tls if options.nodes else options.tls
    info = await _info(server)
    save, policy, most = await _configured(server)
    scripts, tracking = await server.execute_many(
        ["EVAL", "return 1", 0], ["CLIENT", "TRACKING", "ON", "BCAST"]
    )
    await server.execute_many(["CLIENT", "TRACKING", "OFF"])
    username, has_password = _login(options)
    is_local = server.is_local
    found = [
        of_server.check_round_trip(await _ping(server)),
        of_server.check_commands(info["latencystats"]),
        of_server.check_server(server.greeting.server),
        of_server.check_role(info["replication"], options.role if not options.nodes else "master"),
        of_server.check_tls(
            server.tls, verified=bool(tls and tls.reject_unauthorized), is_local=is_local
        ),
        of_server.check_login(username, has_password, is_local=is_local),
        of_server.check_persistence(info["persistence"], save),
        of_server.check_memory(
            info["memory"], info["stats"], info["memory"].get("maxmemory_policy", policy)
        ),
        of_server.check_connections(info["clients"], most),
        of_server.check_scripts(_refusal(scripts)),
        of_server.check_tracking(_refusal(tracking)),
        of_server.check_clock(await _clock(server)),
    ]
    return [one for one in found if one is not None]


async def _ping(server: ControlConnection) -> list[float]:
    """Return how many milliseconds each of some PINGs took."""
    times: list[float] = []
    end = time.perf_counter() + _PINGS_LAST
    await server.execute_many(["PING"])
    while len(times) < _PINGS and time.perf_counter() < end:
        began = time.perf_counter()
        await server.execute_many(["PING"])  # who may not say it is refused in the same time
        times.append((time.perf_counter() - began) * 1000)
    return times or [_PINGS_LAST * 1000]


async def _info(server: ControlConnection) -> Mapping[str, Mapping[str, str]]:
    parts = ("replication", "persistence", "memory", "stats", "clients", "latencystats")
    answers = await server.execute_many(*(["INFO", part] for part in parts))
    return {part: parse_info(answer) for part, answer in zip(parts, answers, strict=True)}


async def _configured(server: ControlConnection) -> list[str | None]:
    """Return some of its configuration; None for what it doesn't tell."""
    names = ("save", "maxmemory-policy", "maxclients")
    answers = await server.execute_many(*(["CONFIG", "GET", name] for name in names))
    values: list[str | None] = []
    for name, answer in zip(names, answers, strict=True):
        value = None
        if isinstance(answer, dict):
            value = answer.get(name.encode())
        elif isinstance(answer, list) and len(answer) == 2:  # without RESP3
            value = answer[1]
        values.append(clean(value.decode(errors="replace")) if isinstance(value, bytes) else None)
    return values


async def _clock(server: ControlConnection) -> float | None:
    """Return by how many seconds the server's clock is ahead of ours."""
    began = time.time()
    (answer,) = await server.execute_many(["TIME"])
    if not isinstance(answer, list) or len(answer) != 2:
        return None
    its = int(answer[0]) + int(answer[1]) / 1_000_000
    return its - (began + time.time()) / 2


def _login(options: Options) -> tuple[str | None, bool]:
    if not options.nodes:
        return options.username, options.password is not None
    shared = options.redis_options
    own = any(node.password for node in options.nodes)
    return shared.username, shared.password is not None or own


def _refusal(answer: Any) -> str:
    return answer.message if isinstance(answer, ReplyError) else ""


# -- the keys


async def _take_sample(shards: Primaries, options: Options) -> Sample:
    """Look at some keys of each server, and for the other keys of their records."""
    either, tagged = (Layout(kind, options.key_prefix) for kind in (DEEPSTREAM, HASHTAG))
    sample = Sample()
    alone: list[bytes] = []
    for shard in shards.all:
        cursor: Any = 0
        for _ in range(max(_SAMPLE // SCAN_COUNT // len(shards.all), 1)):
            cursor, keys = await shard.server.execute("SCAN", cursor, "COUNT", SCAN_COUNT)
            # A key of the one layout is one of the other too, of a name in braces.
            ours = [key for key in keys if either.name_of(key) is not None]
            versions = [key for key in ours if is_version_key(key)]
            sample.others += len(keys) - len(ours)
            sample.hashtag += (by_tag := sum(tagged.name_of(key) is not None for key in versions))
            sample.deepstream += len(versions) - by_tag
            lonely = await _lonely(shards, ours)
            sample.records += len(versions) + sum(not is_version_key(key) for key in lonely)
            alone += lonely
            if not int(cursor):
                break
    if alone:
        await asyncio.sleep(_SECOND_LOOK)
        there = await _exist(shards, alone)
        alone = [key for key, is_there in zip(alone, there, strict=True) if is_there]
        sample.halves = await _lonely(shards, alone)
    return sample


async def _lonely(shards: Primaries, keys: list[bytes]) -> list[bytes]:
    """Return those keys whose partner isn't there."""
    there = await _exist(shards, [partner(key) for key in keys])
    return [key for key, has_partner in zip(keys, there, strict=True) if not has_partner]


async def _exist(shards: Primaries, keys: list[bytes]) -> list[bool]:
    """Return of each key whether it is there; as if it were, if its server doesn't tell."""
    by_server: dict[ControlConnection, list[int]] = {}
    for position, key in enumerate(keys):
        by_server.setdefault(shards.owner(key), []).append(position)
    found = [True] * len(keys)
    for server, positions in by_server.items():
        commands: list[RawCommand] = [("EXISTS", keys[position]) for position in positions]
        answers = await server.execute_many(*commands)
        for position, answer in zip(positions, answers, strict=True):
            found[position] = answer != 0
    return found


# -- Sentinels


async def _look_at_sentinels(options: Options) -> Finding:
    group = Sentinels(options, Resolver())
    nodes = options.sentinels or ()
    said = await asyncio.gather(*(_ask_sentinel(group, options, node) for node in nodes))
    return of_topology.check_sentinels(said)


async def _ask_sentinel(group: Sentinels, options: Options, node: SentinelNode) -> SentinelSays:
    connection: Any = None
    try:
        async with asyncio.timeout(options.connect_timeout / 1000):
            connection = await group._connect(node)
            await connection.send_command("SENTINEL", "MASTER", options.name)
            flat = await connection.read_response()
            state = {clean(str(name)): clean(str(value)) for name, value in pairs(flat).items()}
            await connection.send_command("SENTINEL", "CKQUORUM", options.name)
            try:
                await connection.read_response()
                quorum = ""
            except ResponseError as error:
                quorum = clean(str(error))
    except TimeoutError:
        return SentinelSays(node.address, f"no answer within {options.connect_timeout} ms")
    except Exception as error:  # redis-py may make anything of a Sentinel's nonsense
        return SentinelSays(node.address, group.as_connect_error(error, 0))
    finally:
        await group._end(connection)
    return SentinelSays(
        node.address,
        primary=f"{state.get('ip')}:{state.get('port')}",
        flags=state.get("flags", ""),
        replicas=max(read_epoch(state.get("num-slaves", "0")), 0),
        quorum=quorum,
    )
