"""What a look at a Redis found, how good each of it is for records, and what to do about it.

Everything here judges facts that were asked elsewhere, and asks nothing itself.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ._cluster_report import ClusterReport
from ._layout import DEEPSTREAM, HASHTAG
from .errors import shorten

OK, UNKNOWN, WARNING, BAD = "ok", "unknown", "warning", "bad"
# From the best to the worst. Who isn't told what can't be known is no worse off for it.
VERDICTS = (OK, UNKNOWN, WARNING, BAD)

_SLOW_MS = 1.0
_LATE_MS = 10.0
_CLOCK_SECONDS = 1.0
_FULL = 0.9
_CROWDED = 0.8
# What SET needs for the lifetime that both keys of a record share.
_OLDEST = (6, 2)
_CONSOLE = "ask in the hosting company's console, as the server does not tell"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    verdict: str
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Checkup:
    """All that was found of one Redis."""

    address: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """The worst verdict of all."""
        return worst(one.verdict for one in self.findings)

    @property
    def status(self) -> int:
        """What a script gets as exit status: 0 if all is well, 1 for warnings, 2 if it is bad."""
        return {OK: 0, UNKNOWN: 0, WARNING: 1, BAD: 2}[self.verdict]

    def count(self, verdict: str) -> int:
        """Return how many findings have a verdict."""
        return sum(one.verdict == verdict for one in self.findings)


@dataclass(slots=True)
class Sample:
    """Some keys of the records: how many were looked at, and what they are."""

    deepstream: int = 0
    hashtag: int = 0
    """Version keys of the one layout, and of the other."""
    records: int = 0
    """Records of which both keys were looked for."""
    halves: list[bytes] = field(default_factory=list)
    """Keys without the other one of their record."""
    others: int = 0
    """Keys of no record."""


def worst(verdicts: Iterable[str]) -> str:
    """Return the worst of some verdicts."""
    return max(verdicts, key=VERDICTS.index, default=OK)


def merged(by_node: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Return what was found of several nodes as what was found of all: of each check the worst."""
    checks: dict[str, list[tuple[str, Finding]]] = {}
    for address, findings in by_node.items():
        for one in findings:
            checks.setdefault(one.check, []).append((address, one))
    result = []
    for found in checks.values():
        verdict = worst(one.verdict for _, one in found)
        those = [(address, one) for address, one in found if one.verdict == verdict]
        if len({one.found for _, one in found}) == 1:
            result.append(found[0][1])
            continue
        texts = "; ".join(f"{address}: {one.found}" for address, one in those)
        result.append(replace(those[0][1], found=texts))
    return result


# -- the way to the server


def judge_round_trip(milliseconds: Sequence[float]) -> Finding:
    """Judge how long some PINGs took, one after the other."""
    times = sorted(milliseconds)
    middle = statistics.median(times)
    late = times[min(len(times) - 1, round(len(times) * 0.99))]
    found = f"p50 {middle:.2f} ms, p99 {late:.2f} ms"
    if middle > _SLOW_MS:
        return Finding(
            "round trip",
            WARNING,
            found,
            f"code that awaits one record after the other gets {1000 / middle:,.0f} a second at "
            "most; ask for many at once (get_bulk, asyncio.gather), and run client and server in "
            "one zone",
        )
    if late > _LATE_MS:
        return Finding(
            "round trip",
            WARNING,
            found,
            f"one operation in a hundred waits {late:.0f} ms: look at SLOWLOG GET and LATENCY "
            "DOCTOR, at swapping, and at what else runs there",
        )
    return Finding("round trip", OK, found)


def judge_tls(spoken: str, *, verified: bool, is_local: bool) -> Finding:
    """Judge whether somebody on the way can read along."""
    if spoken:
        if verified:
            return Finding("tls", OK, spoken)
        return Finding(
            "tls",
            WARNING,
            f"{spoken}, and the server's certificate is not verified",
            "whoever is in between can pass for the server: give tls.ca, and leave out "
            "rejectUnauthorized: false",
        )
    if is_local:
        return Finding("tls", OK, "none, and the server is on this machine")
    return Finding(
        "tls",
        WARNING,
        "none, and the server is on another machine",
        "passwords and records can be read on the way: use rediss:// or tls: true, unless the "
        "network is your own",
    )


def judge_login(username: str | None, has_password: bool, *, is_local: bool) -> Finding:
    """Judge whether everybody may do everything."""
    if has_password:
        return Finding("login", OK, f"as {shorten(username or 'default')}, with a password")
    if is_local:
        return Finding("login", OK, "without a password, and the server is on this machine")
    return Finding(
        "login",
        WARNING,
        "without a password",
        "whoever reaches the server can read and change all records: set requirepass, or users "
        "by ACL SETUSER",
    )


# -- the server


def judge_server(server: str) -> Finding:
    """Judge a server's kind and version, such as ``redis 7.0.15``."""
    if not server:
        return Finding(
            "server",
            UNKNOWN,
            "it does not tell its version",
            "a server that knows HELLO, which is Redis 6 or newer or Valkey, would tell",
        )
    numbers = re.search(r"redis (\d+)\.(\d+)", server)
    if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST:
        return Finding(
            "server",
            BAD,
            server,
            "records with a ttl can't be written before Redis 6.2: use a newer one",
        )
    return Finding("server", OK, server)


def judge_role(replication: Mapping[str, str], wanted: str) -> Finding:
    """Judge whether the server is what the configuration takes it for: master or slave."""
    role = replication.get("role")
    if role is None:
        return Finding("role", UNKNOWN, "INFO is refused", _CONSOLE)
    if role != "slave":
        replicas = int(replication.get("connected_slaves", "0"))
        if wanted == "slave":
            return Finding("role", WARNING, "primary", "the configuration has role: slave")
        return Finding("role", OK, f"primary with {_number(replicas, 'replica')}")
    primary = f"{replication.get('master_host', '?')}:{replication.get('master_port', '?')}"
    if wanted == "master":
        return Finding(
            "role",
            BAD,
            f"replica of {primary}",
            f"every write is refused with READONLY: name the primary, {primary}, or the Sentinels",
        )
    if replication.get("master_link_status") != "up":
        return Finding(
            "role",
            BAD,
            f"replica without a link to its primary, {primary}",
            "what it serves grows older: look at the log of both",
        )
    return Finding("role", OK, f"replica of {primary}")


def judge_persistence(info: Mapping[str, str], save: str | None) -> Finding:
    """Judge what a restart would leave; ``save`` is its configuration, None if that is refused."""
    name = "persistence"
    if not info:
        return Finding(name, UNKNOWN, "INFO is refused", _CONSOLE)
    if info.get("loading") == "1":
        return Finding(
            name, BAD, "it is still loading its data", "wait: it answers LOADING until it has"
        )
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        return Finding(
            name,
            BAD,
            "the last snapshot failed",
            "the server may refuse all writes (MISCONF): look at its log, for a full disk or too "
            "little memory to fork",
        )
    if info.get("aof_last_write_status", "ok") != "ok":
        return Finding(
            name,
            BAD,
            "the append-only file can't be written",
            "the server refuses writes (MISCONF): look at its log, and at the disk",
        )
    if info.get("aof_enabled") == "1":
        return Finding(name, OK, "append-only file")
    if save:
        return Finding(name, OK, f"snapshots (save {save})")
    if save is None:
        return Finding(
            name,
            UNKNOWN,
            "no append-only file, and CONFIG GET save is refused",
            _CONSOLE,
        )
    return Finding(
        name,
        WARNING,
        "none: a restart of the server loses all records",
        'set appendonly yes, or save "3600 1 300 100", unless another storage has the records too',
    )


def judge_memory(
    memory: Mapping[str, str], stats: Mapping[str, str], policy: str | None
) -> Finding:
    """Judge what happens when memory is short; ``policy`` is None if it isn't told."""
    name = "memory"
    if "used_memory" not in memory:
        return Finding(name, UNKNOWN, "INFO is refused", _CONSOLE)
    used, limit = int(memory["used_memory"]), int(memory.get("maxmemory", "0"))
    evicted = int(stats.get("evicted_keys", "0"))
    shown = f"{_bytes(used)} used"
    if not limit:
        return Finding(name, OK, f"{shown}, without a limit (maxmemory 0)")
    shown += f" of {_bytes(limit)}"
    if policy is None:
        return Finding(
            name,
            UNKNOWN,
            f"{shown}; CONFIG GET maxmemory-policy is refused",
            f"{_CONSOLE}: it must be noeviction, or halves of records get lost",
        )
    shown += f", {policy}"
    if policy != "noeviction":
        lost = f"; {evicted:,} keys were evicted already" if evicted else ""
        some = policy.startswith("volatile-")
        return Finding(
            name,
            WARNING if some and not evicted else BAD,
            f"{shown}{lost}",
            "when memory is short the server removes single keys"
            f"{' that have a ttl' if some else ''}, and a record of which one is gone is lost: "
            "set maxmemory-policy noeviction, and let ttl or more memory keep room",
        )
    if used > _FULL * limit:
        return Finding(
            name,
            WARNING,
            f"{shown}: {used / limit:.0%}",
            "when it is full every write fails with OOM: raise maxmemory, or give records a ttl",
        )
    return Finding(name, OK, shown)


def judge_connections(clients: Mapping[str, str], limit: str | None) -> Finding | None:
    """Judge whether further clients get in; None if that isn't told."""
    limit = clients.get("maxclients", limit)
    if limit is None or "connected_clients" not in clients:
        return None
    there, most = int(clients["connected_clients"]), int(limit)
    found = f"{there:,} of {most:,}"
    if there > _CROWDED * most:
        return Finding(
            "connections",
            WARNING,
            found,
            "when all are taken, new clients are refused: raise maxclients, or lower "
            "maxConnections of blocking caches",
        )
    return Finding("connections", OK, found)


def judge_scripts(refusal: str) -> Finding:
    """Judge whether scripts may be run; ``refusal`` is what the server said, or empty."""
    if not refusal:
        return Finding("scripts", OK, "may be run")
    return Finding(
        "scripts",
        WARNING,
        refusal,
        "if_newer fails, and ttl where the server has no MSETEX: allow the user +eval +evalsha "
        "+script|load",
    )


def judge_tracking(refusal: str) -> Finding:
    """Judge whether the server tells of changes; ``refusal`` is what it said, or empty."""
    if not refusal:
        return Finding("tracking", OK, "the server tells of changes")
    return Finding(
        "tracking",
        WARNING,
        refusal,
        "nearCache and dscache watch need it: RESP3 and CLIENT TRACKING, of Redis 7 or newer or "
        "Valkey, and allowed to the user by +client|tracking",
    )


def judge_clock(ahead: float | None) -> Finding:
    """Judge by how many seconds the server's clock is ahead of ours; None if it doesn't tell."""
    if ahead is None:
        return Finding("clock", UNKNOWN, "TIME is refused", "allow the user +time")
    if abs(ahead) <= _CLOCK_SECONDS:
        return Finding("clock", OK, f"{abs(ahead) * 1000:.0f} ms from ours")
    side = "ahead of" if ahead > 0 else "behind"
    return Finding(
        "clock",
        WARNING,
        f"{abs(ahead):,.1f} s {side} ours",
        "lifetimes end by the server's clock, and logs of the two can't be compared: let NTP set "
        "both",
    )


# -- the records


def judge_halves(sample: Sample) -> Finding:
    """Judge how many records have lost one of their keys."""
    halves = sample.halves
    if not sample.records:
        return Finding("halves", OK, "no records yet")
    if not halves:
        return Finding("halves", OK, f"none in a sample of {_number(sample.records, 'record')}")
    first = shorten(halves[0].decode(errors="replace"))
    return Finding(
        "halves",
        WARNING,
        f"{len(halves):,} of {sample.records:,} sampled records have one key alone, such as "
        f"{first}",
        "dscache takes them for missing, deepstream reads nothing for their data: set or delete "
        "them, and look at memory for what lost the other key",
    )


def judge_layout(sample: Sample, configured: str, *, on_cluster: bool) -> Finding:
    """Judge whether the layout of the keys is the configured one."""
    name = "key layout"
    counts = {DEEPSTREAM: sample.deepstream, HASHTAG: sample.hashtag}
    other = HASHTAG if configured == DEEPSTREAM else DEEPSTREAM
    if not counts[other]:
        if not counts[configured]:
            strangers = f", and {sample.others:,} keys of something else" if sample.others else ""
            return Finding(name, OK, f"{configured}; no records yet{strangers}")
        if on_cluster and configured == DEEPSTREAM:
            return Finding(
                name,
                WARNING,
                f"{configured}, on a cluster",
                "the two keys of a record lie on two nodes, and are not written in one step: "
                "unless deepstream itself shares them, dscache migrate --to hashtag",
            )
        return Finding(name, OK, f"{configured}, as configured")
    remedy = f"dscache migrate --to {configured}, or configure keyLayout: {other}"
    if not counts[configured]:
        return Finding(
            name,
            BAD,
            f"{other}, and {configured} is configured",
            f"none of these records is found: {remedy}",
        )
    return Finding(
        name,
        WARNING,
        f"mixed: in a sample {counts[DEEPSTREAM]:,} deepstream and {counts[HASHTAG]:,} hashtag",
        f"those of {other} are not found: {remedy}",
    )


# -- several servers


def judge_cluster(report: ClusterReport, *, is_configured: bool) -> Finding:
    """Judge the state of a cluster, and whether the configuration says that it is one."""
    primaries = sum(node.role == "primary" for node in report.nodes)
    found = (
        f"{_number(len(report.nodes), 'node')}, "
        f"{primaries} {'primary' if primaries == 1 else 'primaries'}, "
        f"{report.covered} slots covered"
    )
    more = "dscache cluster shows each node"
    if report.problems:
        return Finding("cluster", BAD, "; ".join(report.problems), more)
    if not is_configured:
        return Finding(
            "cluster",
            BAD,
            f"{found}; the configuration names a single server",
            "a cache of this configuration fails with MOVED: give nodes in place of host and port",
        )
    if report.remarks:
        return Finding("cluster", WARNING, "; ".join(report.remarks), more)
    replicas = len(report.nodes) - primaries
    if not replicas:
        return Finding(
            "cluster",
            WARNING,
            f"{found}, no replicas",
            "the records of a node that is lost are lost, and its slots are served by nobody: "
            "give each primary a replica",
        )
    return Finding("cluster", OK, found)


@dataclass(frozen=True, slots=True)
class SentinelSays:
    """What one Sentinel says of its group, or why it says nothing."""

    address: str
    trouble: str = ""
    primary: str = ""
    flags: str = ""
    replicas: int = 0
    quorum: str = ""
    """Empty if enough Sentinels are there for a failover, else what it says of that."""


def judge_sentinels(said: Sequence[SentinelSays]) -> Finding:
    """Judge whether the Sentinels would replace a lost primary."""
    name = "sentinels"
    well = [one for one in said if not one.trouble]
    silent = "; ".join(f"{one.address}: {one.trouble}" for one in said if one.trouble)
    if not well:
        return Finding(name, BAD, silent, "start the Sentinels, or correct their addresses")
    primaries = {one.primary for one in well}
    found = f"{len(well)} of {len(said)} answer, the primary is {well[0].primary}"
    if len(primaries) > 1:
        told = ", ".join(f"{one.address} names {one.primary}" for one in well)
        return Finding(
            name, BAD, f"they disagree: {told}", "wait a minute; then restart what is behind"
        )
    down = [one for one in well if "o_down" in one.flags or "s_down" in one.flags]
    if len(down) > len(well) // 2:
        return Finding(name, BAD, f"{found}, and is down for them", "look at the primary's log")
    if short := next((one.quorum for one in well if one.quorum), ""):
        return Finding(
            name, BAD, f"{found}; {short}", "no failover can happen: start the missing Sentinels"
        )
    if silent:
        return Finding(name, WARNING, f"{found}; {silent}", "start the missing Sentinels")
    if not well[0].replicas:
        return Finding(
            name, WARNING, f"{found}, without replicas", "there is nothing to fail over to"
        )
    if len(said) < 3:
        return Finding(
            name,
            WARNING,
            f"{found}, of {_number(len(said), 'Sentinel')} configured",
            "name all of them, and run three at least: with fewer, one lost Sentinel is too many",
        )
    return Finding(name, OK, f"{found}, {_number(well[0].replicas, 'replica')}")


# -- small things


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit in ("B", "KB") else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"
