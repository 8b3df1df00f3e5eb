"""What is said on a fresh connection, sans-IO, and what a failed attempt to connect means."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from ..config import NearCacheOptions, Options
from ..core import constants
from ..core.keys import key_stem
from ..errors import ConnectError, DscacheError, ProtocolError, ReplyError, clean
from .credentials import Hidden, Login, hidden, masked

Word = str | bytes | Hidden
"""A word of a command."""

FAMILIES = {0: socket.AF_UNSPEC, 4: socket.AF_INET, 6: socket.AF_INET6}

# The system's own watch over a link: it is dead when for 10 s nothing was acknowledged. The
# names that a platform doesn't have are left out.
TCP_OPTIONS = {
    getattr(socket, name): value
    for name, value in {
        "TCP_KEEPIDLE": 4,
        "TCP_KEEPINTVL": 2,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": 10_000,
    }.items()
    if hasattr(socket, name)
}


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server said of itself."""

    server: str
    """Its kind and version, such as ``redis 7.0.15``; empty if it didn't say."""
    has_msetex: bool
    is_tracked: bool = False
    """Whether the server tells of changes to what is read."""
    has_pushes: bool = True
    """Whether it speaks RESP3, where what nobody asked for is told from replies."""


class UnsuitableServer(ConnectError):
    """The server can't do what the configuration asks of it."""


def handshake(
    options: Options,
    login: Login,
    address: str,
    *,
    read_only: bool = False,
    is_near: bool = False,
    of_cluster: bool = False,
) -> Generator[list[list[Word]], list[Any], ServerInfo]:
    """Get a server's consent to work with it; yields commands, and wants their replies sent.

    They are to be sent at once; errors of Redis are among their replies. ``login`` is username
    and password. With ``is_near``, the server is asked to tell of changes, for a near cache; a
    replica only if it is one ``of_cluster``, where it may be promoted on the same connection.
    Returns the ServerInfo. Raises ReplyError if the server refuses (WRONGPASS,
    NOAUTH, no such database) or is loading, and ConnectError if it isn't what the Sentinels
    named it for.
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
        questions.append(["READONLY"])  # a server that is no cluster says so elsewhere
    greeting, *others = yield [*commands, *questions]
    if isinstance(greeting, ReplyError) and _is_without_resp3(greeting):
        commands[0] = ["PING"]
        if password is not None:
            commands[0] = ["AUTH", *([username] if username else []), password]
        if options.connection_name:
            commands.append(["CLIENT", "SETNAME", options.connection_name])
        greeting, *others = yield [*commands, *questions]
    answers = [greeting, *others]
    consents, (loaded, known) = answers[: len(commands)], answers[len(commands) :][:2]
    for reply in consents:
        if isinstance(reply, ReplyError):
            raise reply
    # A user who may not load scripts may do all the rest; a server that is still loading
    # its data may do nothing.
    if isinstance(loaded, ReplyError) and loaded.code in ("LOADING", "NOAUTH"):
        raise loaded
    said = greeting if isinstance(greeting, dict) else {}
    if options.sentinels is not None:
        _check_role(options, said.get(b"role"), address)
    facts = (said.get(b"server"), said.get(b"version"))
    server = " ".join(fact.decode(errors="replace") for fact in facts if type(fact) is bytes)
    server = masked(clean(server), secrets_of(options, login))
    is_tracked = False
    is_kept = of_cluster or said.get(b"role") != b"replica"
    if is_near and options.near_cache is not None and is_kept:
        problem = _too_old(said)
        if not problem:
            (answer,) = yield [[*_tracking(options, options.near_cache)]]
            if isinstance(answer, ReplyError):
                problem = f'it says "{answer.message}" to CLIENT TRACKING ON'
        is_tracked = not problem
        if problem and options.near_cache.required:
            raise UnsuitableServer(
                f"{address} can't keep a near cache coherent: {problem}; leave nearCache out, or "
                "let it be off on such a server with nearCache.required: false"
            )
    has_msetex = isinstance(known, list) and any(known)
    return ServerInfo(server, has_msetex, is_tracked, isinstance(greeting, dict))


def secrets_of(options: Options, login: Login) -> list[Hidden | None]:
    """Return what no text may hold that a server says to a handshake."""
    return [login[1], hidden(options.password), hidden(options.sentinel_password)]


def _tracking(options: Options, near: NearCacheOptions) -> list[str]:
    command = ["CLIENT", "TRACKING", "ON"]
    if near.mode == "broadcast":
        command.append("BCAST")
        opening = options.key_prefix
        for prefix in near.prefixes:
            stem = key_stem(prefix, options.hash_tag)
            command += ["PREFIX", opening + stem]
        if not near.prefixes and opening:
            command += ["PREFIX", opening]
    return command


def _too_old(said: dict[Any, Any]) -> str:
    """Return why a server that introduces itself so is too old for a near cache, or ""."""
    if not said:
        return "it does not speak RESP3, which Redis does from version 6 on"
    kind, version = said.get(b"server"), said.get(b"version")
    if kind == b"redis" and type(version) is bytes:
        major = version.partition(b".")[0]
        if major.isdigit() and int(major) < 7:
            return (
                f"it is Redis {clean(version.decode(errors='replace'))}, which may tell of a "
                "change in the middle of a reply; Redis 7 does not"
            )
    return ""


def as_connect_error(error: Exception, connect_timeout: int) -> Exception:
    """Return what to tell of an attempt to connect that failed."""
    if isinstance(error, DscacheError):
        return error
    if isinstance(error, TimeoutError):
        return ConnectError(f"no answer within {connect_timeout} ms")
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConnectError(f"the server's certificate is refused: {error.verify_message}")
    if isinstance(error, OSError):
        said = error.strerror
        if error.errno and not isinstance(error, (ssl.SSLError, socket.gaierror)):
            said = os.strerror(error.errno)  # asyncio has words of its own
        return ConnectError(clean(said or str(error)) or type(error).__name__)
    return ConnectError(clean(f"{type(error).__name__}: {error}"))


def permanent_failure(
    error: Exception, said: Exception, address: str
) -> Callable[[str], Exception] | None:
    """Return how to fail operations at once, if waiting for the next attempt is no use.

    ``said`` is what ``as_connect_error`` made of the error.
    """
    if isinstance(error, ReplyError) and error.code != "LOADING":
        message = error.message
        return lambda operation: ReplyError(message, context=f"{operation} at {address}")
    if isinstance(error, UnsuitableServer):
        return lambda operation: ConnectError(f"{operation}: {said}")
    if isinstance(error, (ssl.SSLError, ProtocolError)):
        kind = ProtocolError if isinstance(error, ProtocolError) else ConnectError
        return lambda operation: kind(f"{operation}: {address}: {said}")
    return None


def _check_role(options: Options, role: object, address: str) -> None:
    """Raise ConnectError if a Sentinel named a server that has another role by now."""
    if not isinstance(role, bytes):
        return
    wanted = b"master" if options.role == "master" else b"replica"
    if role != wanted:
        shown = clean(role.decode(errors="replace"))
        raise ConnectError(f"the Sentinels name {address} as {wanted.decode()}, but it is {shown}")


def _is_without_resp3(error: ReplyError) -> bool:
    """Whether HELLO was refused by a server before Redis 6, or to a user who may not say it."""
    return error.code in ("NOPROTO", "NOPERM") or "unknown command" in error.message.lower()
