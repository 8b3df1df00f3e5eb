"""The rights that a cache needs, and which of them a server refuses.

Every command is tried in a form that changes nothing: on a key that doesn't exist, or without
effect. A server checks rights before it looks at keys or slots, so that each reply but a refusal
means that the command is allowed.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final

from ...aio.control import ControlConnection, RawCommand, Reply
from ...core.failures import refuses
from ...errors import ReplyError, shorten
from ..key_layout import Layout
from .findings import Check, Finding

FOR_CONNECTION: Final = (
    *("hello", "auth", "ping", "select", "client|setname", "client|tracking", "command|info"),
)
FOR_RECORDS: Final = ("mget", "mset", "msetex", "del", "get", "type")
FOR_SCRIPTS: Final = (
    *("eval", "evalsha", "script|load", "set", "strlen", "exists", "time", "pexpiretime"),
)
FOR_CLUSTERS: Final = ("readonly", "asking", "cluster|slots", "cluster|info", "cluster|myid")
FOR_SCANS: Final = (
    *("scan", "info", "role", "cluster|nodes", "cluster|countkeysinslot"),
    "cluster|getkeysinslot",
)

# A cache works without these: by RESP2, by EVAL, by MSET with a script.
_DISPENSABLE: Final = frozenset(
    {"hello", "command|info", "evalsha", "script|load", "msetex", "ping", "asking", "readonly"}
)
# Without these, only some features fail or are slower.
_OF_SOME: Final = {
    **dict.fromkeys(FOR_SCRIPTS, "ttl and guarded writes may fail"),
    **dict.fromkeys(FOR_SCANS, "scan may fail"),
    **dict.fromkeys(("role", "cluster|info", "cluster|myid"), "a failover may be noticed late"),
    "select": "the database can't be chosen",
}
_NO_KEY: Final = "the names of records"
_NO_WRITE: Final = "writes to the names of records"
_OTHERS: Final = "names such as "
# Of the trials on a key, those that need the right to write to it.
_WRITES: Final = ("del", "set")
# Keys that are tried if the one without a record is refused.
_KEYS: Final = 1000


async def find_missing_rights(
    server: ControlConnection, layout: Layout, *, db: int, is_cluster: bool
) -> list[str]:
    """Return the commands that the server refuses, as an ACL rule names them.

    Raises ConnectionLost.
    """
    key, _ = layout.keys(f"dscache doctor {secrets.token_hex(8)}")
    missing = []
    refused: set[str] = set()
    trials = _trials(key, db, is_cluster=is_cluster)
    replies = await server.execute_many(*(trial for _, trial in trials))
    for (name, _), reply in zip(trials, replies, strict=True):
        if isinstance(reply, ReplyError):
            if refuses(name.partition("|")[0], reply):
                missing.append(name)
            if _refuses_key(reply):
                refused.add(name)
    # MSET has no form without an effect, but one within a transaction that is given up.
    (begun,) = await server.execute_many(["MULTI"])
    said: Reply = None
    if not isinstance(begun, ReplyError):
        said, _ = await server.execute_many(["MSET", key, ""], ["DISCARD"])
    elif begun.code == "NOPERM":
        # A server with users looks at the rights first, and then refuses a key without a value.
        (said,) = await server.execute_many(["MSET", key, "", key])
    if isinstance(said, ReplyError) and refuses("mset", said) and "number of" not in str(said):
        missing.append("mset")
    if refused.issubset(_WRITES):
        return [*missing, *([_NO_WRITE] if refused else ())]
    return [*missing, await _refused_names(server, layout, key)]


def _refuses_key(reply: Reply) -> bool:
    return isinstance(reply, ReplyError) and reply.code == "NOPERM" and " key" in reply.message


async def _refused_names(server: ControlConnection, layout: Layout, key: bytes) -> str:
    """Return how to call the names that are refused: those of all records, or such as of a key.

    The user may have the right to all names that the program uses, and no other.
    """
    (reply,) = await server.execute_many(["SCAN", 0, "COUNT", _KEYS])
    keys: list[bytes] = [] if isinstance(reply, ReplyError) else reply[1]
    there = [one for one in keys if layout.name_of(one) is not None]
    reads: list[RawCommand] = [["GET", one] for one in there]
    if there and all(map(_refuses_key, await server.execute_many(*reads))):
        return _NO_KEY
    return f"{_OTHERS}{shorten(layout.name_of(key))}"


def _trials(key: bytes, db: int, *, is_cluster: bool) -> Sequence[tuple[str, RawCommand]]:
    of_cluster: list[tuple[str, RawCommand]] = [
        ("readonly", ["READONLY"]),
        ("asking", ["ASKING"]),
        *(
            (f"cluster|{word}", ["CLUSTER", word.upper()])
            for word in ("slots", "info", "myid", "nodes")
        ),
        ("cluster|countkeysinslot", ["CLUSTER", "COUNTKEYSINSLOT", 0]),
        ("cluster|getkeysinslot", ["CLUSTER", "GETKEYSINSLOT", 0, 1]),
    ]
    of_database: list[tuple[str, RawCommand]] = [("select", ["SELECT", db])]
    return [
        ("hello", ["HELLO"]),
        ("ping", ["PING"]),
        *(of_database if db else []),
        ("command|info", ["COMMAND", "INFO", "GET"]),
        ("mget", ["MGET", key, key]),
        ("get", ["GET", key]),
        ("type", ["TYPE", key]),
        ("del", ["DEL", key]),
        ("scan", ["SCAN", 0, "COUNT", 1]),
        ("info", ["INFO", "server"]),
        ("role", ["ROLE"]),
        ("eval", ["EVAL", "return 1", 0]),
        ("evalsha", ["EVALSHA", "0" * 40, 0]),
        ("script|load", ["SCRIPT", "LOAD", "return 1"]),
        ("set", ["SET", key, "", "XX"]),
        ("strlen", ["STRLEN", key]),
        ("exists", ["EXISTS", key]),
        ("time", ["TIME"]),
        ("pexpiretime", ["PEXPIRETIME", key]),
        *(of_cluster if is_cluster else []),
    ]


def check_rights(missing: Sequence[str], username: str | None) -> Finding:
    """Check that no command is refused which a cache needs."""
    check = Check("rights")
    if not missing:
        return check.ok("every command that a cache needs")
    found = f"no {', '.join(missing)}"
    commands = [name for name in missing if " " not in name]
    rules = " ".join(f"+{name}" for name in commands)
    if rules:
        advice = f"ACL SETUSER {username or 'default'} {rules}, or end the renaming of the command"
    else:
        advice = "allow the user the pattern of the keys, such as ~*"
    if len(commands) < len(missing) and _DISPENSABLE.issuperset(commands):
        if missing[-1] == _NO_WRITE:
            return check.warning(found, "reads work, and writes fail: allow ~ in place of %R~")
        if missing[-1] != _NO_KEY:
            return check.unknown(
                found, "the user's patterns of keys, such as ~user/*, must match all your names"
            )
    if _DISPENSABLE.issuperset(missing):
        return check.ok(f"{found}, without which a cache works too")
    effects = dict.fromkeys(_OF_SOME[name] for name in missing if name in _OF_SOME)
    if all(name in _OF_SOME or name in _DISPENSABLE for name in missing):
        return check.warning(found, f"{', and '.join(effects)}: {advice}")
    return check.bad(found, f"records can't be read or written: {advice}")
