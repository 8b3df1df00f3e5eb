"""How good a server is for records, and the way to it.

Facts that were asked elsewhere are judged here; nothing is asked.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence

from ...errors import shorten
from .findings import BAD, OK, UNKNOWN, WARNING, Finding, number

_SLOW_MS = 1.0
_LATE_MS = 10.0
# Of the commands that records are read and written with, those that have many at once.
_COMMANDS = ("mget", "mset", "msetex", "evalsha")
_CLOCK_SECONDS = 1.0
_FULL = 0.9
_CROWDED = 0.8
# What SET needs for the lifetime that both keys of a record share.
_OLDEST = (6, 2)
_CONSOLE = "ask in the hosting company's console, as the server does not tell"


# -- the way to the server


def check_round_trip(milliseconds: Sequence[float]) -> Finding:
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


def check_commands(latency: Mapping[str, str]) -> Finding:
    """Judge how long the server itself has taken for the commands of records, as it tells."""
    told = {}
    for command in _COMMANDS:
        said = latency.get(f"latency_percentiles_usec_{command}", "")
        if match := re.match(r"p50=([\d.]+),p99=([\d.]+)", said):
            told[command] = float(match[1]), float(match[2])
    if not told:
        return Finding("commands", OK, "none for records yet, or it does not tell their times")
    found = "; ".join(
        f"{name} p50 {middle:.0f} µs, p99 {late:.0f} µs" for name, (middle, late) in told.items()
    )
    slowest = max(late for _, late in told.values()) / 1000
    if slowest > _LATE_MS:
        return Finding(
            "commands",
            WARNING,
            f"on the server, {found}",
            f"one in a hundred keeps all others waiting for {slowest:.0f} ms: look at SLOWLOG GET, "
            "at the size of the records, and at the server's processor and memory",
        )
    return Finding("commands", OK, f"on the server, {found}")


def check_tls(spoken: str, *, verified: bool, is_local: bool) -> Finding:
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


def check_login(username: str | None, has_password: bool, *, is_local: bool) -> Finding:
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


def check_server(server: str) -> Finding:
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


def check_role(replication: Mapping[str, str], wanted: str) -> Finding:
    """Judge whether the server is what the configuration takes it for: master or slave."""
    role = replication.get("role")
    if role is None:
        return Finding("role", UNKNOWN, "INFO is refused", _CONSOLE)
    if role != "slave":
        replicas = int(replication.get("connected_slaves", "0"))
        if wanted == "slave":
            return Finding("role", WARNING, "primary", "the configuration has role: slave")
        return Finding("role", OK, f"primary with {number(replicas, 'replica')}")
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


def check_persistence(info: Mapping[str, str], save: str | None) -> Finding:
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


def check_memory(
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


def check_connections(clients: Mapping[str, str], limit: str | None) -> Finding | None:
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


def check_scripts(refusal: str) -> Finding:
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


def check_tracking(refusal: str) -> Finding:
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


def check_clock(ahead: float | None) -> Finding:
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


# -- small things


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit in ("B", "KB") else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"
