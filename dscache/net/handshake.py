"""The handshake of a fresh connection, sans-IO: HELLO, AUTH, SELECT, READONLY, CLIENT TRACKING."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from ..config import NearCacheOptions, Options
from ..core import constants
from ..core.keys import key_stem
from ..errors import ConnectError, ProtocolError, ReplyError, clean
from .connect_errors import UnsuitableServer
from .credentials import Hidden, Login, Word, hidden, masked
from .slots import parse_node_id, parse_nodes


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Facts that a server states about itself."""

    server: str
    """Kind and version, such as ``redis 7.0.15``; empty if the server doesn't state them."""
    has_msetex: bool
    is_tracked: bool = False
    """Whether the server announces changes to the keys that are read."""
    has_pushes: bool = True
    """Whether the connection speaks RESP3, which marks pushes apart from replies."""
    node_id: str = ""
    """The id of a node of a cluster; empty if it doesn't tell it, or wasn't asked."""


Handshake = Generator[list[list[Word]], list[Any], ServerInfo]
"""Yields commands to send at once; send back the list of their replies, error replies included."""


def handshake(
    options: Options,
    login: Login,
    address: str,
    *,
    read_only: bool = False,
    is_near: bool = False,
    of_cluster: bool = False,
) -> Handshake:
    """Log in to a server and set up the connection; returns the ServerInfo.

    With ``read_only``, a replica of a cluster is asked to answer reads. With ``is_near``, the
    server is asked to announce changes, for a near cache; a replica only ``of_cluster``, where it
    may be promoted on the same connection. There a node is asked for its id, too.

    Raises ReplyError if the server refuses (WRONGPASS, NOAUTH, no such database) or is loading,
    ConnectError if its role isn't the one that the Sentinels named it for, and UnsuitableServer if
    it can't do what the options require.

    Source: the Redis pages of HELLO, AUTH, READONLY and CLIENT TRACKING.
    """
    username, password = login
    hello: list[Word] = ["HELLO", "3"]
    if username is not None or password is not None:
        hello += ["AUTH", username or "default", password or ""]
    if options.connection_name:
        hello += ["SETNAME", options.connection_name]
    commands: list[list[Word]] = [hello]
    if options.db:
        commands.append(["SELECT", str(options.db)])
    questions: list[list[Word]] = [
        # Loaded here, the script is missing only after SCRIPT FLUSH.
        ["SCRIPT", "LOAD", constants.SET_SCRIPT],
        ["COMMAND", "INFO", "MSETEX"],
    ]
    if read_only:
        # Its reply is ignored: a server outside a cluster is found out by CLUSTER SLOTS.
        questions.append(["READONLY"])
    if of_cluster:
        questions.append(["CLUSTER", "MYID"])
    greeting, *others = yield [*commands, *questions]
    if isinstance(greeting, ReplyError) and _is_without_resp3(greeting):
        commands[0] = ["PING"]
        if password is not None:
            commands[0] = ["AUTH", *([username] if username else []), password]
        if options.connection_name:
            commands.append(["CLIENT", "SETNAME", options.connection_name])
        greeting, *others = yield [*commands, *questions]
    replies = [greeting, *others]
    consents, (loaded, known) = replies[: len(commands)], replies[len(commands) :][:2]
    for reply in consents:
        if isinstance(reply, ReplyError):
            raise reply
    # A user without the right to load scripts may do all the rest; a server that is still loading
    # its data, or busy with a script, serves nothing and says nothing of itself.
    for reply in (loaded, known):
        if isinstance(reply, ReplyError) and reply.code in (*constants.PASSING, "NOAUTH"):
            raise reply
    facts = greeting if isinstance(greeting, dict) else {}
    if options.sentinels is not None:
        _check_role(options, facts.get(b"role"), address)
    is_tracked = False
    is_kept = of_cluster or facts.get(b"role") != b"replica"
    if is_near and options.near_cache is not None and is_kept:
        is_tracked = yield from _track(options, options.near_cache, facts, address)
    node_id = (yield from _identify(replies[-1], address)) if of_cluster else ""
    has_msetex = isinstance(known, list) and any(known)
    server = masked(_kind_and_version(facts), secrets_of(options, login))
    return ServerInfo(server, has_msetex, is_tracked, isinstance(greeting, dict), node_id)


def secrets_of(options: Options, login: Login) -> list[Hidden | None]:
    """Return the passwords that no text from a server may repeat."""
    return [login[1], hidden(options.password), hidden(options.sentinel_password)]


def _identify(reply: object, address: str) -> Generator[list[list[Word]], list[Any], str]:
    """Return the id of a node of a cluster, or an empty text if it can't be known.

    A user without the right to CLUSTER MYID has that to CLUSTER SLOTS, where the node is listed.
    """
    if not isinstance(reply, ReplyError):
        return parse_node_id(reply)
    (slots,) = yield [["CLUSTER", "SLOTS"]]
    try:
        nodes = parse_nodes(slots, (address.rpartition(":")[0].strip("[]"), 0))
    except ProtocolError:
        return ""
    named = [name for name, at in nodes.items() if at and constants.join_address(*at) == address]
    return named[0] if len(named) == 1 else ""


def _track(
    options: Options, near: NearCacheOptions, facts: dict[Any, Any], address: str
) -> Generator[list[list[Word]], list[Any], bool]:
    """Ask the server to announce changes; return whether it does.

    Raises UnsuitableServer if it doesn't and ``nearCache.required`` is set, and ReplyError if the
    server is loading or busy: it can't say yet.
    """
    problem = _too_old(facts)
    if not problem:
        (reply,) = yield [_tracking(options, near)]
        if isinstance(reply, ReplyError):
            if reply.code in constants.PASSING:
                raise reply
            problem = f'it says "{reply.message}" to CLIENT TRACKING ON'
    if problem and near.required:
        raise UnsuitableServer(
            f"{address} can't keep a near cache coherent: {problem}; leave nearCache out, or "
            "let it be off on such a server with nearCache.required: false"
        )
    return not problem


def _tracking(options: Options, near: NearCacheOptions) -> list[Word]:
    command: list[Word] = ["CLIENT", "TRACKING", "ON"]
    if near.mode == "broadcast":
        command.append("BCAST")
        opening = options.key_prefix
        for prefix in near.prefixes:
            stem = key_stem(prefix, options.hash_tag)
            command += ["PREFIX", opening + stem]
        if not near.prefixes and opening:
            command += ["PREFIX", opening]
    return command


def _kind_and_version(facts: dict[Any, Any]) -> str:
    words = (facts.get(b"server"), facts.get(b"version"))
    return clean(" ".join(word.decode(errors="replace") for word in words if type(word) is bytes))


def _too_old(facts: dict[Any, Any]) -> str:
    """Return why the server is too old for a near cache, or an empty text."""
    if not facts:
        return "it does not speak RESP3, which Redis does from version 6 on"
    kind, version = facts.get(b"server"), facts.get(b"version")
    if kind == b"redis" and type(version) is bytes:
        major = version.partition(b".")[0]
        if major.isdigit() and int(major) < 7:
            return (
                f"it is Redis {clean(version.decode(errors='replace'))}, which may announce a "
                "change in the middle of a reply; Redis 7 does not"
            )
    return ""


def _check_role(options: Options, role: object, address: str) -> None:
    """Raise ConnectError if the server no longer has the role that a Sentinel named it for."""
    if not isinstance(role, bytes):
        return
    expected = b"master" if options.role == "master" else b"replica"
    if role != expected:
        shown = clean(role.decode(errors="replace"))
        raise ConnectError(
            f"the Sentinels name {address} as {expected.decode()}, but it is {shown}"
        )


def _is_without_resp3(error: ReplyError) -> bool:
    """Whether HELLO was refused by a server before Redis 6, or for want of permission."""
    return error.code in ("NOPROTO", "NOPERM") or "unknown command" in error.message.lower()
