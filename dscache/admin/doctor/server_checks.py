"""Checks of a server and of the connection to it.

Each check judges facts that ``checkup`` has collected; none of them does any I/O.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence

from ...errors import shorten
from .findings import Check, Finding, number

_SLOW_MS = 1.0
_LATE_MS = 10.0
# The commands that read and write many records at once.
_COMMANDS = ("mget", "mset", "msetex", "evalsha")
_CLOCK_SECONDS = 1.0
_FULL = 0.9
_CROWDED = 0.8
# The first version with SET ... PXAT, for a lifetime that both keys of a record share.
_OLDEST = (6, 2)
# The advice where scripts or client tracking are refused.
_PERMISSIONS = {
    "scripts": "if_newer fails, and so does ttl where the server has no MSETEX: allow the user "
    "+eval +evalsha +script|load",
    "tracking": "nearCache and dscache watch need RESP3 and CLIENT TRACKING: use Redis 7 or newer "
    "or Valkey, and allow the user +client|tracking",
}
_CONSOLE = "look in the hosting company's console, as the server does not report it"


# -- the connection


def check_round_trip(milliseconds: Sequence[float]) -> Finding:
    """Check the times of PINGs, one after the other."""
    check = Check("round trip")
    times = sorted(milliseconds)
    middle = statistics.median(times)
    late = times[min(len(times) - 1, round(len(times) * 0.99))]
    found = f"p50 {middle:.2f} ms, p99 {late:.2f} ms"
    if middle > _SLOW_MS:
        return check.warning(
            found,
            f"code that awaits one record after the other gets {1000 / middle:,.0f} a second at "
            "most: read many at once (get_bulk, asyncio.gather), and run client and server in "
            "one zone",
        )
    if late > _LATE_MS:
        return check.warning(
            found,
            f"one operation in a hundred takes {late:.0f} ms: check SLOWLOG GET, LATENCY DOCTOR, "
            "swapping, and other processes on that machine",
        )
    return check.ok(found)


def check_commands(latency: Mapping[str, str]) -> Finding:
    """Check the server's own times for the commands of records (INFO latencystats)."""
    check = Check("commands")
    times = {}
    for command in _COMMANDS:
        said = latency.get(f"latency_percentiles_usec_{command}", "")
        if match := re.match(r"p50=([\d.]+),p99=([\d.]+)", said):
            times[command] = float(match[1]), float(match[2])
    if not times:
        return check.ok("none for records yet, or the server does not report their times")
    found = "; ".join(
        f"{name} p50 {middle:.0f} µs, p99 {late:.0f} µs" for name, (middle, late) in times.items()
    )
    slowest = max(late for _, late in times.values()) / 1000
    if slowest > _LATE_MS:
        return check.warning(
            f"on the server, {found}",
            f"one in a hundred blocks all others for {slowest:.0f} ms: check SLOWLOG GET, the size "
            "of the records, and the server's processor and memory",
        )
    return check.ok(f"on the server, {found}")


def check_tls(spoken: str, *, verified: bool, is_local: bool) -> Finding:
    """Check that the connection is encrypted, unless the server is on this machine."""
    check = Check("tls")
    if spoken:
        if verified:
            return check.ok(spoken)
        return check.warning(
            f"{spoken}, and the server's certificate is not verified",
            "an attacker on the network can pose as the server: give tls.ca, and leave out "
            "rejectUnauthorized: false",
        )
    if is_local:
        return check.ok("none, and the server is on this machine")
    return check.warning(
        "none, and the server is on another machine",
        "an attacker on the network can read passwords and records: use rediss:// or tls: true, "
        "unless the network is private",
    )


def check_login(username: str | None, has_password: bool, *, is_local: bool) -> Finding:
    """Check that the server asks for a password, unless it is on this machine."""
    check = Check("login")
    if has_password:
        return check.ok(f"as {shorten(username or 'default')}, with a password")
    if is_local:
        return check.ok("without a password, and the server is on this machine")
    return check.warning(
        "without a password",
        "every client that reaches the server can read and change all records: set requirepass, "
        "or add users with ACL SETUSER",
    )


# -- the server


def check_server(server: str) -> Finding:
    """Check the server's kind and version, such as ``redis 7.0.15``."""
    check = Check("server")
    if not server:
        return check.unknown(
            "the server does not report its version",
            "use Redis 6 or newer, or Valkey, which report it in the reply to HELLO",
        )
    numbers = re.search(r"redis (\d+)\.(\d+)", server)
    if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST:
        return check.bad(server, "records with a ttl need Redis 6.2: use a newer version")
    return check.ok(server)


def check_role(replication: Mapping[str, str], wanted: str) -> Finding:
    """Check the server's role against the configured one, ``master`` or ``slave``."""
    check = Check("role")
    role = replication.get("role")
    if role is None:
        return check.unknown("INFO is refused", _CONSOLE)
    if role != "slave":
        replicas = int(replication.get("connected_slaves", "0"))
        if wanted == "slave":
            return check.warning("primary", "the configuration has role: slave")
        return check.ok(f"primary with {number(replicas, 'replica')}")
    primary = f"{replication.get('master_host', '?')}:{replication.get('master_port', '?')}"
    if wanted == "master":
        return check.bad(
            f"replica of {primary}",
            f"every write is refused with READONLY: name the primary, {primary}, or the Sentinels",
        )
    if replication.get("master_link_status") != "up":
        return check.bad(
            f"replica without a link to its primary, {primary}",
            "its records are out of date: check the logs of both servers",
        )
    return check.ok(f"replica of {primary}")


def check_persistence(info: Mapping[str, str], save: str | None) -> Finding:
    """Check that the server persists its data; ``save`` is None if CONFIG GET is refused."""
    check = Check("persistence")
    if not info:
        return check.unknown("INFO is refused", _CONSOLE)
    if info.get("loading") == "1":
        return check.bad("the server is loading its data", "wait: until then it replies LOADING")
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        return check.bad(
            "the last snapshot failed",
            "the server may refuse all writes (MISCONF): check its log, for a full disk or too "
            "little memory to fork",
        )
    if info.get("aof_last_write_status", "ok") != "ok":
        return check.bad(
            "the append-only file can't be written",
            "the server refuses writes (MISCONF): check its log and the disk",
        )
    if info.get("aof_enabled") == "1":
        return check.ok("append-only file")
    if save:
        return check.ok(f"snapshots (save {save})")
    if save is None:
        return check.unknown("no append-only file, and CONFIG GET save is refused", _CONSOLE)
    return check.warning(
        "none: a restart of the server loses all records",
        'set appendonly yes, or save "3600 1 300 100", unless the records are stored elsewhere too',
    )


def check_memory(
    memory: Mapping[str, str], stats: Mapping[str, str], policy: str | None
) -> Finding:
    """Check the memory limit and its policy; ``policy`` is None if CONFIG GET is refused."""
    check = Check("memory")
    if "used_memory" not in memory:
        return check.unknown("INFO is refused", _CONSOLE)
    used, limit = int(memory["used_memory"]), int(memory.get("maxmemory", "0"))
    evicted = int(stats.get("evicted_keys", "0"))
    shown = f"{_bytes(used)} used"
    if not limit:
        return check.ok(f"{shown}, without a limit (maxmemory 0)")
    shown += f" of {_bytes(limit)}"
    if policy is None:
        return check.unknown(
            f"{shown}; CONFIG GET maxmemory-policy is refused",
            f"{_CONSOLE}: it must be noeviction, as eviction removes single keys of records",
        )
    shown += f", {policy}"
    if policy != "noeviction":
        lost = f"; {evicted:,} keys were evicted already" if evicted else ""
        some = policy.startswith("volatile-")
        judge = check.warning if some and not evicted else check.bad
        return judge(
            f"{shown}{lost}",
            "when memory is short the server evicts single keys"
            f"{' that have a ttl' if some else ''}, and a record that loses one is lost: "
            "set maxmemory-policy noeviction, and use a ttl or more memory",
        )
    if used > _FULL * limit:
        return check.warning(
            f"{shown}: {used / limit:.0%}",
            "at the limit, every write fails with OOM: raise maxmemory, or give records a ttl",
        )
    return check.ok(shown)


def check_connections(clients: Mapping[str, str], limit: str | None) -> Finding | None:
    """Check the number of clients against its limit; None if either is unknown."""
    check = Check("connections")
    limit = clients.get("maxclients", limit)
    if limit is None or "connected_clients" not in clients:
        return None
    there, most = int(clients["connected_clients"]), int(limit)
    found = f"{there:,} of {most:,}"
    if there > _CROWDED * most:
        return check.warning(
            found,
            "at the limit, the server refuses new clients: raise maxclients, or lower "
            "maxConnections of blocking caches",
        )
    return check.ok(found)


def check_permission(name: str, refusal: str) -> Finding:
    """Check scripts or tracking; ``refusal`` is the server's error reply to it, or empty."""
    check = Check(name)
    return check.warning(refusal, _PERMISSIONS[name]) if refusal else check.ok("allowed")


def check_clock(ahead: float | None) -> Finding:
    """Check the clock; ``ahead`` is the seconds by which it is ahead of ours, None if refused."""
    check = Check("clock")
    if ahead is None:
        return check.unknown("TIME is refused", "allow the user +time")
    if abs(ahead) <= _CLOCK_SECONDS:
        return check.ok(f"{abs(ahead) * 1000:.0f} ms from ours")
    side = "ahead of" if ahead > 0 else "behind"
    return check.warning(
        f"{abs(ahead):,.1f} s {side} ours",
        "lifetimes end by the server's clock, and logs of both can't be compared: synchronize both "
        "with NTP",
    )


# -- formatting


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit in ("B", "KB") else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"
