"""A checkup of a Redis: collects the facts that the checks beside this module judge."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping
from contextlib import closing
from typing import cast

from ...aio.control import ControlConnection, Reply, is_clustered
from ...aio.resolver import Resolver
from ...aio.sentinel import Sentinels
from ...config import Config, Options, SentinelNode
from ...config.messages import MessageConfig
from ...config.validation import Location
from ...core.failures import refuses
from ...core.keys import is_version_key, partner
from ...errors import ConfigError, DscacheError, ReplyError, clean
from ...net.connect_errors import IF_PLAIN, IF_TLS, is_full
from ...net.sentinels import pairs, read_epoch
from ...net.slots import parse_info
from .. import one_key
from ..cache import AdminCache, on_cluster
from ..cluster_survey import survey
from ..key_layout import DEEPSTREAM, HASHTAG, Layout
from ..primaries import Primaries, open_primaries
from ..scan import SCAN_COUNT
from . import record_checks as of_records
from . import server_checks as of_server
from . import topology_checks as of_topology
from .findings import BAD, Checkup, Finding, merged
from .hot_records import Counted, check_counted, check_frequent, count_uses, find_frequent
from .message_checks import check_messages, check_server_name
from .record_checks import Sample
from .rights import check_rights, find_missing_rights
from .topology_checks import SentinelReport

_PINGS = 200
# The most seconds that all PINGs may take, as all below.
_PINGS_LIMIT = 2.0
# Keys in the sample.
_SAMPLE = 20_000
_SECTIONS = ("replication", "persistence", "memory", "stats", "clients", "latencystats")
# The pause before half a record is looked up again, as it may be in the middle of a write.
_RECHECK_PAUSE = 0.1

# The advice for a server that can't be used at all, by the code of its error reply.
_REMEDIES = {
    "WRONGPASS": "correct the password, and the username if there is one",
    "NOAUTH": "give the password: in the configuration, or as redis://:password@host",
    "NOPERM": "let an administrator allow the missing command with ACL SETUSER",
    "DENIED": "set a password on the server, or end its protected mode",
    "ERR": "correct the cause that it names",
    "LOADING": "wait until the server has loaded its data",
    "MASTERDOWN": "name the primary: this server is a replica that has lost it",
}
_FULL = "raise the server's maxclients, or end connections that have no more use"
_UNREACHABLE = "start the server, or correct the address, and check the firewalls in between"


async def check_up(
    config: Config,
    *,
    by_url: bool = False,
    messages: MessageConfig | None = None,
    is_named: bool = False,
    hot_seconds: float = 0.0,
) -> Checkup:
    """Return the findings on the server or the cluster of a configuration.

    A server that can't be reached is a finding, not an error. With ``by_url`` the configuration is
    a URL, which can't name the nodes of a cluster. ``messages`` is the section ``clusterNode``
    beside it, and ``is_named`` whether ``serverName`` is. With ``hot_seconds``, servers that can
    count the uses of each key do so for that time. Raises ConfigError.
    """
    found: list[Finding] = []
    options = config.options
    if config.name == "memory":
        raise Location(config.source).error("the cache is inside its process; name a server")
    if options.sentinels:
        found.append(await _check_sentinels(options))
    try:
        is_configured = by_url or bool(options.nodes)
        if not options.nodes and not options.sentinels:
            with closing(await ControlConnection.open(options)) as server:
                if await is_clustered(server):
                    config = on_cluster(config)
        if config.options.nodes:
            report = await survey(config)
            found.append(of_topology.check_cluster(report, is_configured=is_configured))
        async with AdminCache(config) as cache, open_primaries(cache) as primaries:
            found += await _check_all(primaries, config.options, hot_seconds)
    except ConfigError:
        raise
    except DscacheError as error:
        found.insert(0, _no_connection("connection", error, options))
    if messages is not None:
        try:
            found.append(await check_messages(messages))
        except ConfigError:
            raise
        except DscacheError as error:
            found.append(_no_connection("messages", error, messages.options))
        if is_named:
            found.append(check_server_name(messages.server_name))
    return Checkup(config.address, tuple(found))


def _no_connection(check: str, error: DscacheError, options: Options) -> Finding:
    """Return the finding of a server that can't be reached, or refuses to serve."""
    code = error.code if isinstance(error, ReplyError) else ""
    remedy = _REMEDIES.get(code, _REMEDIES["ERR"] if code else _UNREACHABLE)
    if is_full(str(error)):
        remedy = _FULL
    elif not code and "refused" not in str(error):
        tls = options.redis_options.tls if options.nodes else options.tls
        remedy += IF_PLAIN if tls else IF_TLS
    reason = str(error).removesuffix(IF_PLAIN).removesuffix(IF_TLS)
    return Finding(check, BAD, reason, remedy)


async def _check_all(primaries: Primaries, options: Options, hot_seconds: float) -> list[Finding]:
    by_node = {
        primary.address: await _check_server(primary.server, options) for primary in primaries.all
    }
    sample = await _take_sample(primaries, options)
    # At the same time, as each takes that long.
    counts = await asyncio.gather(
        *(count_uses(one.server, Layout.of(options), hot_seconds) for one in primaries.all)
    )
    for primary, counted in zip(primaries.all, counts, strict=True):
        hot = check_counted(counted)
        if not isinstance(counted, Counted) and primary.address in sample.frequencies:
            hot = check_frequent(sample.frequencies[primary.address], Layout.of(options))
        if hot is not None:
            by_node[primary.address].append(hot)
    layout = HASHTAG if options.hash_tag else DEEPSTREAM
    return [
        *merged(by_node),
        of_records.check_layout(sample, layout, on_cluster=bool(options.nodes)),
        of_records.check_halves(sample),
        of_records.check_sizes(sample),
        *of_records.check_one_key(sample),
    ]


# -- one server


async def _check_server(server: ControlConnection, options: Options) -> list[Finding]:
    tls = options.redis_options.tls if options.nodes else options.tls
    info = await _info(server)
    save, policy, most = await _configured(server)
    scripts, tracking = await server.execute_many(
        ["EVAL", "return 1", 0], ["CLIENT", "TRACKING", "ON", "BCAST"]
    )
    await server.execute_many(["CLIENT", "TRACKING", "OFF"])
    missing = await find_missing_rights(
        server,
        Layout.of(options),
        db=options.redis_options.db if options.nodes else options.db,
        is_cluster=bool(options.nodes),
    )
    username, has_password = _login(options)
    is_local = server.is_local
    found = [
        of_server.check_round_trip(await _ping(server)),
        of_server.check_commands(info["latencystats"]),
        of_server.check_server(server.server),
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
        of_server.check_permission("scripts", _refusal(scripts)),
        of_server.check_permission("tracking", _refusal(tracking)),
        check_rights(missing, username),
        of_server.check_clock(await _clock(server)),
    ]
    return [one for one in found if one is not None]


async def _ping(server: ControlConnection) -> list[float]:
    """Return the times of PINGs in milliseconds."""
    times: list[float] = []
    end = time.perf_counter() + _PINGS_LIMIT
    await server.execute_many(["PING"])
    while len(times) < _PINGS and time.perf_counter() < end:
        began = time.perf_counter()
        await server.execute_many(["PING"])  # a refusal takes the same time
        times.append((time.perf_counter() - began) * 1000)
    return times or [_PINGS_LIMIT * 1000]


async def _info(server: ControlConnection) -> Mapping[str, Mapping[str, str]]:
    replies = await server.execute_many(*(["INFO", section] for section in _SECTIONS))
    return dict(zip(_SECTIONS, map(parse_info, replies), strict=True))


async def _configured(server: ControlConnection) -> list[str | None]:
    """Return the values of ``save``, ``maxmemory-policy`` and ``maxclients``; None if refused."""
    names = ("save", "maxmemory-policy", "maxclients")
    values: list[str | None] = []
    for reply in await server.execute_many(*(["CONFIG", "GET", name] for name in names)):
        # A dict by RESP3, a list by RESP2.
        words = [*itertools.chain(*reply.items())] if isinstance(reply, dict) else reply
        is_known = isinstance(words, list) and len(words) == 2 and isinstance(words[1], bytes)
        values.append(clean(words[1].decode(errors="replace")) if is_known else None)
    return values


async def _clock(server: ControlConnection) -> float | None:
    """Return the seconds by which the server's clock is ahead of ours; None if TIME is refused."""
    began = time.time()
    (answer,) = await server.execute_many(["TIME"])
    if not isinstance(answer, list) or len(answer) != 2:
        return None
    theirs = int(answer[0]) + int(answer[1]) / 1_000_000
    return theirs - (began + time.time()) / 2


def _login(options: Options) -> tuple[str | None, bool]:
    if not options.nodes:
        return options.username, options.password is not None
    shared = options.redis_options
    own = any(node.password for node in options.nodes)
    return shared.username, shared.password is not None or own


def _refusal(answer: Reply) -> str:
    return answer.message if isinstance(answer, ReplyError) else ""


# -- the keys


async def _take_sample(primaries: Primaries, options: Options) -> Sample:
    """Return counts of some keys of each server, and the keys whose partner is missing."""
    either, tagged = (Layout(kind, options.key_prefix) for kind in (DEEPSTREAM, HASHTAG))
    sample = Sample()
    alone: list[bytes] = []
    rounds = max(_SAMPLE // SCAN_COUNT // len(primaries.all), 1)
    for primary in primaries.all:
        cursor: bytes = b"0"
        keys: list[bytes]
        for _ in range(rounds):
            try:
                cursor, keys = await primary.server.execute("SCAN", cursor, "COUNT", SCAN_COUNT)
            except ReplyError as error:
                if not refuses("scan", error):
                    raise
                sample.unscanned = error.message
                break
            behind = [key for key in keys if key.startswith(either.prefix)]
            old = set[bytes]()
            if behind and not sample.unread:
                old.update(await one_key.find_keys(primaries, behind, sample.unread))
            sample.one_key += len(old)
            sample.first_one_key = sample.first_one_key or next(iter(old), b"")
            # A hashtag key is also a deepstream key, of a name in braces.
            ours = [key for key in behind if key not in old and either.name_of(key) is not None]
            sample.others += len(keys) - len(old) - len(ours)
            versions = [key for key in ours if is_version_key(key)]
            sample.hashtag += (by_tag := sum(tagged.name_of(key) is not None for key in versions))
            sample.deepstream += len(versions) - by_tag
            sample.add_frequencies(primary.address, await find_frequent(primary.server, ours))
            await _measure(primaries, [k for k in ours if not is_version_key(k)], sample)
            lonely = await _lonely(primaries, ours)
            sample.records += len(versions) + sum(not is_version_key(key) for key in lonely)
            alone += lonely
            if not int(cursor):
                break
    if alone:
        await asyncio.sleep(_RECHECK_PAUSE)
        there = await _exist(primaries, alone)
        alone = [key for key, is_there in zip(alone, there, strict=True) if is_there]
        sample.halves = await _lonely(primaries, alone)
    return sample


async def _measure(primaries: Primaries, keys: list[bytes], sample: Sample) -> None:
    """Add the sizes of data keys to a sample. A key that has gone meanwhile has none."""
    replies = await primaries.execute_by_key([(key, ("STRLEN", key)) for key in keys])
    for key, reply in zip(keys, replies, strict=True):
        if isinstance(reply, int) and reply:
            sample.sizes[key] = reply
        elif isinstance(reply, ReplyError) and reply.code != "WRONGTYPE":
            sample.unmeasured = reply.message


async def _lonely(primaries: Primaries, keys: list[bytes]) -> list[bytes]:
    """Return the keys whose partner doesn't exist."""
    there = await _exist(primaries, [partner(key) for key in keys])
    return [key for key, has_partner in zip(keys, there, strict=True) if not has_partner]


async def _exist(primaries: Primaries, keys: list[bytes]) -> list[bool]:
    """Return for each key whether it exists; True if its server refuses EXISTS."""
    replies = await primaries.execute_by_key([(key, ("EXISTS", key)) for key in keys])
    return [reply != 0 for reply in replies]


# -- Sentinels


async def _check_sentinels(options: Options) -> Finding:
    group = Sentinels(options, Resolver())
    nodes = options.sentinels or ()
    reports = await asyncio.gather(*(_query_sentinel(group, options, node) for node in nodes))
    return of_topology.check_sentinels(reports)


async def _query_sentinel(group: Sentinels, options: Options, node: SentinelNode) -> SentinelReport:
    seconds = options.connect_timeout / 1000
    name = options.name or ""
    try:
        async with asyncio.timeout(seconds):
            flat, verdict = await group.execute(
                node, [("SENTINEL", "MASTER", name), ("SENTINEL", "CKQUORUM", name)]
            )
        if isinstance(flat, Exception):
            raise flat
        facts = pairs(cast(list[str], flat))
        state = {clean(str(name)): clean(str(value)) for name, value in facts.items()}
    except Exception as error:  # redis-py may raise anything for replies that are no RESP
        return SentinelReport(node.address, group.shown(error, seconds))
    quorum = clean(str(verdict)) if isinstance(verdict, Exception) else ""
    return SentinelReport(
        node.address,
        primary=f"{state.get('ip')}:{state.get('port')}",
        flags=state.get("flags", ""),
        replicas=max(read_epoch(state.get("num-slaves", "0")), 0),
        quorum=quorum,
    )
