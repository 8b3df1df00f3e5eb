"""The handshake of a fresh connection, sans-IO: HELLO, AUTH, SELECT, READONLY, CLIENT TRACKING."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Final

from ..config import NearCacheOptions, Options
from ..config.address import join_address
from ..core import constants, scripts
from ..core.keys import key_stem
from ..errors import ConnectError, ProtocolError, ReplyError, clean
from .connect_errors import (
    IF_TLS,
    UnsuitableConfig,
    UnsuitableServer,
    as_connect_error,
    end_of_handshake,
    is_full,
    says_to_hello,
)
from .credentials import Hidden, Login, Word, hidden, masked
from .maintenance import Announcements
from .slots import NO_NODE, has_no_cluster, parse_node_id, parse_nodes

# Errors to HELLO that end the attempt: a login without RESP3 would meet them too.
_FINAL: Final = (*constants.PASSING, "WRONGPASS", "MASTERDOWN", "DENIED")
# Errors to later commands of a server that serves no operation.
_NOT_SERVING: Final = (*constants.PASSING, "NOAUTH")
_RUN_ID: Final = re.compile(rb"^run_id:([0-9a-f]{40})\r?$", re.MULTILINE)
# Seconds for which HELLO isn't sent again to a server that closes connections at it.
_BARE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Facts about a server, which it states during the handshake."""

    server: str
    """Kind and version, such as ``redis 7.0.15``; empty if the server doesn't state them."""
    has_msetex: bool
    is_tracked: bool = False
    """Whether the server announces changes to the keys that are read."""
    has_pushes: bool = True
    """Whether the connection speaks RESP3, which marks pushes apart from replies."""
    node_id: str = ""
    """The id of a node of a cluster; empty if it doesn't tell it, or wasn't asked."""
    run_id: str = ""
    """The id of the server's process; empty if it doesn't tell it, or wasn't asked."""
    zone: str = ""
    """The availability zone that the server states; empty if it states none."""
    is_proxied: bool = False
    """Whether the server is a proxy that may keep the keys of one command on several servers."""
    announces: bool = False
    """Whether the server announces its maintenance."""
    refused_announcements: str | None = None
    """The code of the error with which it has refused to announce maintenance; None if it didn't.
    """


class ClosedHandshakes:
    """Finds out whether a server closes connections at HELLO, as twemproxy does.

    A server that restarts, or a balancer without a server, closes connections as well. So an
    attempt that was closed is followed by one that sends PING first. If that one is closed between
    PING and the end of the handshake, the next attempts are bare: without HELLO, CLIENT, SCRIPT and
    COMMAND. All attempts to connect to one server share one of these.
    """

    def __init__(self, *, tls: bool) -> None:
        self.tls = tls
        self.is_suspect = False
        self.bare_until = -math.inf

    def attempt(self) -> Attempt:
        """Return the next attempt."""
        return Attempt(self)


class Attempt:
    """One handshake: whether it ``is_bare``, or begins with PING because it ``is_suspect``."""

    def __init__(self, closed: ClosedHandshakes) -> None:
        self._closed = closed
        self.is_bare = time.monotonic() < closed.bare_until
        self.is_suspect = closed.is_suspect and not self.is_bare
        self.has_answer = False
        """Whether the PING was answered."""
        self.refusal: ReplyError | None = None
        """The error reply to the PING."""

    def note_closed(self, reason: Exception) -> Exception:
        """Note that the connection was closed during the handshake; return the reason to raise."""
        until = time.monotonic() + _BARE_SECONDS if self.has_answer else -math.inf
        self._closed.is_suspect, self._closed.bare_until = True, until
        if self.has_answer:
            return reason
        if self.refusal is not None:
            return end_of_handshake([self.refusal], reason)
        if self.is_suspect and not self._closed.tls and not isinstance(reason, ReplyError):
            # Neither HELLO nor PING has got a word.
            return ConnectError(f"{as_connect_error(reason, 0)}{IF_TLS}")
        return reason

    def note_done(self) -> None:
        """Note a finished handshake."""
        self._closed.is_suspect = False


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
    identifies: bool = False,
    attempt: Attempt | None = None,
    announcements: Announcements | None = None,
    peer: str = "",
) -> Handshake:
    """Log in to a server and set up the connection; returns the ServerInfo.

    - ``read_only``: ask a replica of a cluster to answer reads.
    - ``is_near``: ask the server to announce changes, for a near cache. A replica is asked only
      ``of_cluster``, since it may be promoted there on the same connection.
    - ``of_cluster``: ask for the id of the node.
    - ``identifies``: outside of a cluster, ask for the id of the server's process.
    - ``attempt``: given for a server that may be a proxy. The caller tells it if the connection is
      closed.
    - ``announcements``: may have the server, at the IP address ``peer``, announce its maintenance.

    Raises ReplyError if the server refuses (WRONGPASS, NOAUTH, no such database) or is loading,
    ConnectError if its role isn't the one that the Sentinels named it for, and UnsuitableServer if
    it lacks a feature that the options require.

    Source: the Redis pages of HELLO, AUTH, READONLY and CLIENT TRACKING.
    """
    if attempt is not None and attempt.is_bare:
        info = yield from _log_in_barely(options, login, address, is_near)
    else:
        if attempt is not None and attempt.is_suspect:
            (pong,) = yield [["PING"]]
            if isinstance(pong, ReplyError):
                if _is_final(pong):
                    raise pong
                # It may be a proxy without PING, or a server that turns the client away and closes.
                attempt.refusal = pong
                yield [["PING"]]
            attempt.has_answer = True
        request = None
        # A server that may close connections at unknown commands isn't sent this one.
        if announcements is not None and (
            attempt is None or not attempt.is_suspect or announcements.are_required
        ):
            request = announcements.request(options.host, peer)
        info = yield from _log_in(
            options, login, address, read_only, is_near, of_cluster, identifies, request
        )
        if announcements is not None:
            if request is not None:
                announcements.note(info.refused_announcements, peer)
            if announcements.are_required and not info.announces:
                raise UnsuitableServer(
                    f"{address} doesn't announce its maintenance: it refuses CLIENT "
                    "MAINT_NOTIFICATIONS; leave maintNotifications: on out"
                )
    if attempt is not None:
        attempt.note_done()
    return info


def _log_in(
    options: Options,
    login: Login,
    address: str,
    read_only: bool,
    is_near: bool,
    of_cluster: bool,
    identifies: bool,
    request: list[Word] | None,
) -> Handshake:
    username, password = login
    hello: list[Word] = ["HELLO", "3"]
    if username is not None or password is not None:
        hello += ["AUTH", username or "default", password or ""]
    if options.connection_name:
        hello += ["SETNAME", options.connection_name]
    selection: list[list[Word]] = [["SELECT", str(options.db)]] if options.db else []
    questions: list[list[Word]] = [
        # Loaded here, the script is missing only after SCRIPT FLUSH.
        ["SCRIPT", "LOAD", scripts.SET_SCRIPT],
        ["COMMAND", "INFO", "MSETEX"],
    ]
    if read_only:
        # Its reply is ignored: a server outside a cluster is found out by CLUSTER SLOTS.
        questions.append(["READONLY"])
    identity: list[list[Word]] = []
    if of_cluster:
        identity.append(["CLUSTER", "MYID"])
    elif identifies:
        identity.append(["INFO", "server"])
    # In this batch it costs no round trip, and a refusal changes nothing.
    requests = [] if request is None else [request]
    greeting, *others = yield [hello, *selection, *questions, *requests, *identity]
    consent = others.pop(len(selection) + len(questions)) if requests else None
    is_foreign = False
    refusal = says_to_hello(greeting)
    if isinstance(greeting, ReplyError) and not _is_final(greeting):
        is_foreign = not _is_of_redis(greeting)
        if options.connection_name:
            questions.append(["CLIENT", "SETNAME", options.connection_name])
        greeting, *others = yield [_authentication(login), *selection, *questions, *identity]
        if password is None:
            greeting = _unless_refused(greeting)
    selected, (loaded, known) = others[: len(selection)], others[len(selection) :][:2]
    _check_consent([greeting])
    if of_cluster:
        _check_database(options.db, selected)
    _check_consent(selected)
    # A user without the right to load scripts may do all the rest. But a server that is loading its
    # data, or is busy with a script, serves nothing and says nothing of itself.
    for reply in (loaded, known):
        if isinstance(reply, ReplyError) and reply.code in _NOT_SERVING:
            raise reply
    facts = greeting if isinstance(greeting, dict) else {}
    if options.sentinels is not None:
        _check_role(options, facts.get(b"role"), address)
    is_tracked = False
    is_kept = of_cluster or facts.get(b"role") != b"replica"
    if is_near and options.near_cache is not None and is_kept:
        is_tracked = yield from _track(options, options.near_cache, facts, address, refusal)
    node_id = (yield from _identify(others[-1], address)) if of_cluster else ""
    has_msetex = isinstance(known, list) and any(known)
    server = masked(_kind_and_version(facts), secrets_of(options, login))
    return ServerInfo(
        server,
        has_msetex,
        is_tracked,
        isinstance(greeting, dict),
        node_id,
        _run_id(others[-1]) if identifies and not of_cluster else "",
        _zone_in(facts),
        _is_proxied(options, is_foreign),
        consent is not None and not isinstance(consent, ReplyError) and bool(facts),
        consent.code if isinstance(consent, ReplyError) else None,
    )


def _zone_in(facts: dict[Any, Any]) -> str:
    zone = facts.get(b"availability_zone")
    return zone.decode(errors="replace") if isinstance(zone, bytes) else ""


def _log_in_barely(options: Options, login: Login, address: str, is_near: bool) -> Handshake:
    """Log in to a proxy that closes a connection at every command that it doesn't know."""
    selection: list[list[Word]] = [["SELECT", str(options.db)]] if options.db else []
    greeting, *selected = yield [_authentication(login), *selection]
    if login[1] is None:
        greeting = _unless_refused(greeting)
    _check_consent([greeting, *selected])
    if is_near and options.near_cache is not None:
        yield from _track(options, options.near_cache, {}, address)
    return ServerInfo("", False, False, False, is_proxied=_is_proxied(options, True))


def _is_proxied(options: Options, is_foreign: bool) -> bool:
    return is_foreign if options.proxied is None else options.proxied


def _authentication(login: Login) -> list[Word]:
    """Return the login of RESP2. Without a password it is PING, whose refusal tells as much."""
    username, password = login
    if password is None:
        return ["PING"]
    return ["AUTH", *([] if username in (None, "", "default") else [username]), password]


def _unless_refused(pong: object) -> object:
    """Return the reply to PING, or None for a refusal of the command alone."""
    is_harmless = isinstance(pong, ReplyError) and not (
        _is_final(pong) or pong.code in _NOT_SERVING
    )
    return None if is_harmless else pong


def _check_consent(replies: list[Any]) -> None:
    for reply in replies:
        if isinstance(reply, ReplyError):
            raise reply


def _check_database(number: int, selected: list[Any]) -> None:
    """Raise UnsuitableConfig if a cluster doesn't have the database.

    Source: Valkey's page of SELECT, and its option cluster-databases.
    """
    for reply in selected:
        if isinstance(reply, ReplyError) and reply.code == "ERR":
            raise UnsuitableConfig(
                f'redisOptions.db: the cluster has no database {number} ("{reply.message}"); '
                "leave it out, or set cluster-databases on Valkey 9 or later"
            )


def secrets_of(options: Options, login: Login) -> list[Hidden | None]:
    """Return the passwords that no text from a server may repeat."""
    return [login[1], hidden(options.password), hidden(options.sentinel_password)]


def _identify(reply: object, address: str) -> Generator[list[list[Word]], list[Any], str]:
    """Return the id of a node of a cluster, or an empty text if it can't be known.

    It is NO_NODE for a server outside of a cluster. A user without the right to CLUSTER MYID may
    have the right to CLUSTER SLOTS, which lists the node.
    """
    if not isinstance(reply, ReplyError):
        return parse_node_id(reply)
    if has_no_cluster(reply):
        return NO_NODE
    (slots,) = yield [["CLUSTER", "SLOTS"]]
    if has_no_cluster(slots):
        return NO_NODE
    try:
        nodes = parse_nodes(slots, (address.rpartition(":")[0].strip("[]"), 0))
    except ProtocolError:
        return ""
    named = [name for name, at in nodes.items() if at and join_address(*at) == address]
    return named[0] if len(named) == 1 else ""


def _run_id(reply: object) -> str:
    """Return the id of a server's process from its reply to INFO, or an empty text."""
    found = _RUN_ID.search(reply) if isinstance(reply, bytes) else None
    return "" if found is None else found[1].decode()


def _track(
    options: Options,
    near: NearCacheOptions,
    facts: dict[Any, Any],
    address: str,
    refusal: str = "",
) -> Generator[list[list[Word]], list[Any], bool]:
    """Ask the server to announce changes; return whether it does.

    ``refusal`` are its words about HELLO, if it has refused that. Raises UnsuitableServer if it
    doesn't announce changes and ``nearCache.required`` is set. Raises ReplyError if
    the server is loading or busy, and so can't tell yet.
    """
    problem = _too_old(facts, refusal)
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


def _too_old(facts: dict[Any, Any], refusal: str) -> str:
    """Return why the server is too old for a near cache, or an empty text."""
    if not facts:
        return f"it does not speak RESP3, which Redis does from version 6 on{refusal}"
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


def _is_final(error: ReplyError) -> bool:
    """Whether a login without RESP3 would be refused like HELLO."""
    return error.code in _FINAL or is_full(error.message)


def _is_of_redis(error: ReplyError) -> bool:
    """Whether HELLO was refused by a server before Redis 6, or for want of permission.

    Proxies have wordings of their own.
    """
    return (
        error.code in ("NOPROTO", "NOPERM", "NOAUTH") or "unknown command" in error.message.lower()
    )
