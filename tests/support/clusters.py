"""A private Redis Cluster for tests of resharding, failover, lost nodes and new addresses."""

from __future__ import annotations

import abc
import contextlib
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from dscache.embedded import EmbeddedServer, ServerBinary
from dscache.errors import DscacheError, UsageError

SLOTS = 16384

_HOST = "127.0.0.1"
_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.02
_PORT_TRIES = 5
# A server abandons a handshake after the node timeout, and at the earliest after one second.
_MEET_AGAIN_SECONDS = 1.5
# A server abandons a manual failover that has not completed after five seconds.
_TRIM_SECONDS = 30
_FAILOVER_AGAIN_SECONDS = 5.5
_KEYS_AT_ONCE = 100
_SLOTS_AT_ONCE = 16
# Connections to one node: fewer than redis-py's default, but enough for several threads.
_CONNECTIONS = 32
# A folder in memory: servers sync to disk at each change of a slot.
_MEMORY = Path("/dev/shm")
_MIGRATE_MS = 5000
_PORTS = re.compile(r"^([0-9a-f]{40})( [^ ,:]*):\d+@\d+", re.MULTILINE)
# The user with which nodes log in to each other when each has its own password: roles change, and a
# server can store only one password for its primary.
_REPLICATION_USER = "replication"


@dataclass(frozen=True, slots=True)
class _Line:
    """One node's line in another node's CLUSTER NODES, or in its own."""

    id: str
    address: str
    flags: frozenset[str]
    primary: str
    """The id of its primary; "" of one that is none's replica."""
    epoch: int
    """The higher, the later it came by its slots."""
    is_linked: bool
    ranges: tuple[str, ...]

    @property
    def is_primary(self) -> bool:
        return "master" in self.flags

    @property
    def is_down(self) -> bool:
        return "fail" in self.flags

    def slots(self) -> Iterator[int]:
        for text in self.ranges:
            first, _, last = text.partition("-")
            yield from range(int(first), int(last or first) + 1)


class ClusterNode:
    """One server of a cluster. Its id and data stay; start_all() may give it other ports.

    ``server`` is replaced then, so keep a reference to the node and not to its server.
    """

    def __init__(
        self,
        binary: ServerBinary,
        folder: Path,
        known: Path,
        args: Sequence[str],
        password: str | None,
    ) -> None:
        self.host = _HOST
        self.port = 0
        self.bus_port = 0
        self.id = ""
        self.password = password
        self.is_paused = False
        self.server = EmbeddedServer(binary)
        self._binary = binary
        self._folder = folder
        self._known = known
        self._args = args
        self._held: list[socket.socket] = []
        self._control: redis.Redis | None = None
        folder.mkdir()

    @property
    def address(self) -> str:
        """Host, port and cluster bus port, as in CLUSTER NODES."""
        return f"{self.host}:{self.ports}"

    @property
    def ports(self) -> str:
        """The port and the cluster bus port."""
        return f"{self.port}@{self.bus_port}"

    @property
    def is_alive(self) -> bool:
        """Whether the server runs and is not paused."""
        return self.server.is_running and not self.is_paused

    def __repr__(self) -> str:
        return f"<node {self.id[:8]} at {self.address}>"

    def role(self) -> Literal["primary", "replica"]:
        """Return the role that the node reports for itself."""
        return "primary" if self.ask("ROLE")[0] == "master" else "replica"

    def client(self) -> redis.Redis:
        """Return a new redis-py client of this node that follows no redirections."""
        return redis.Redis(
            self.host,
            self.port,
            password=self.password,
            decode_responses=True,
            # Keys need not be UTF-8 and must be returned unchanged.
            encoding_errors="surrogateescape",
            socket_timeout=2 * _MIGRATE_MS / 1000,
            retry=Retry(NoBackoff(), 0),
        )

    def ask(self, *words: bytes | str | int) -> Any:
        """Send one command and return its reply. Raises redis.RedisError."""
        if self._control is None:
            raise redis.ConnectionError(f"{self!r} was never started")
        return self._control.execute_command(*words)

    def ask_all(self, commands: Sequence[Sequence[bytes | str | int]]) -> list[Any]:
        """Send commands over several connections at once and return all replies in order.

        Raises redis.RedisError, that of the first command to fail, once all have been answered.
        """
        if self._control is None:
            raise redis.ConnectionError(f"{self!r} was never started")
        # One connection would do if some servers didn't wait at each change of a slot until the
        # replicas have it too.
        pool = self._control.connection_pool
        taken = []
        answers: list[Any] = []
        try:
            for _ in commands[:_CONNECTIONS]:
                taken.append(pool.get_connection())
            for number, command in enumerate(commands):
                taken[number % _CONNECTIONS].send_command(*command)
            for number in range(len(commands)):
                try:
                    answers.append(taken[number % _CONNECTIONS].read_response())
                except redis.ResponseError as error:
                    answers.append(error)
        except BaseException:
            for connection in taken:
                connection.disconnect()  # or the next request would get its reply
            raise
        finally:
            for connection in taken:
                pool.release(connection)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def reads(self) -> int:
        """Return how many commands that read records the node has executed."""
        stats = self.ask("INFO", "commandstats")
        return sum(
            int(stats.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in ("mget", "get")
        )

    def view(self) -> dict[str, _Line]:
        """Return the node's view of the cluster, by node id. Raises redis.RedisError."""
        lines = {}
        for text in self.ask("CLUSTER", "NODES").splitlines():
            name, address, flags, primary, _, _, epoch, link, *ranges = text.split()
            lines[name] = _Line(
                name,
                address.partition(",")[0],
                frozenset(flags.split(",")),
                primary.strip("-"),
                int(epoch),
                link == "connected",
                # "[" begins a slot that is migrating.
                tuple(one for one in ranges if not one.startswith("[")),
            )
        return lines

    def launch(self) -> None:
        """Start the server, on free ports if it has none. Raises DscacheError."""
        fixed = self.port != 0
        for attempt in range(1, _PORT_TRIES + 1):
            if not fixed:
                self.choose_ports()
            try:
                self.server.start()
            except DscacheError as error:
                if fixed or attempt == _PORT_TRIES or "in use" not in str(error):
                    raise
            else:
                break
        self.is_paused = False
        self._control = self._control or self.client()
        self.id = self.id or self.ask("CLUSTER", "MYID")

    def choose_ports(self, port: int = 0) -> None:
        """Choose other ports for the next launch; the former ones stay reserved.

        ``port`` may be that of another node, which has ended.
        """
        self.server.close()
        held = [hold_port(), hold_port()]
        self.port, self.bus_port = (one.getsockname()[1] for one in held)
        self.port = port or self.port
        self._held += held
        if sys.platform != "linux":
            self._release()
        self.server = EmbeddedServer(self._binary, args=self._arguments())
        self.server.port = self.port
        if self._control is not None:
            self._control.close()
            self._control = None

    def rewrite_ports(self, ports: dict[str, str]) -> None:
        """Write each node's new ports into the file in which a stopped node keeps its view."""
        text = self._known.read_text()
        self._known.write_text(_PORTS.sub(lambda one: f"{one[1]}{one[2]}:{ports[one[1]]}", text))

    def end(self) -> None:
        """Ask the server to end without waiting for it."""
        with contextlib.suppress(UsageError, ProcessLookupError):
            os.kill(self.server.pid, signal.SIGTERM)

    def close(self) -> None:
        """End the server and release its ports."""
        self.server.close()
        if self._control is not None:
            self._control.close()
            self._control = None
        self._release()

    def _arguments(self) -> list[str]:
        options = {
            "--cluster-enabled": "yes",
            "--cluster-config-file": str(self._known),
            "--cluster-port": str(self.bus_port),
            # Not the server's own folder, which is removed when a start fails.
            "--dir": str(self._folder),
            "--appendonly": "yes",
            # A killed process loses nothing it has written; only a crash of the machine would.
            "--appendfsync": "no",
            # Otherwise a primary waits 5 s for further replicas before it serves the first.
            "--repl-diskless-sync-delay": "0",
            # Otherwise a stopping primary waits up to 10 s for a paused replica.
            "--shutdown-timeout": "0",
            # Otherwise a replica that was paused for long is never promoted.
            "--cluster-replica-validity-factor": "0",
        }
        return [*(word for option in options.items() for word in option), *self._args]

    def _release(self) -> None:
        while self._held:
            self._held.pop().close()


Failover = Literal["", "FORCE", "TAKEOVER"]


class Together(abc.ABC):
    """Servers started and stopped together, in a with block."""

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @abc.abstractmethod
    def close(self) -> None:
        """Stop everything and remove all data; a second call does nothing."""

    @abc.abstractmethod
    def _start(self) -> None: ...


class ClusterGroup(Together):
    """Primaries with replicas that form a cluster, all started and stopped together.

    Replicas are spread over the primaries in turn. ``passwords`` is one password for all nodes, or
    a list with each node's own, primaries first, with None for a node without. ``args`` are further
    options of each server and override those set here. Calls block, and may come from several
    threads. A wait that fails raises TimeoutError with what was missing.
    """

    def __init__(
        self,
        binary: ServerBinary,
        *,
        primaries: int = 3,
        replicas: int = 3,
        node_timeout_ms: int = 1000,
        passwords: str | Sequence[str | None] | None = None,
        args: Sequence[str] = (),
        full_coverage: bool = True,
    ) -> None:
        count = primaries + replicas
        self._own: list[str | None]
        if passwords is None or isinstance(passwords, str):
            self._shared, self._own = passwords, [passwords] * count
        else:
            self._shared, self._own = None, list(passwords)
        if len(self._own) != count:
            raise ValueError(f"ClusterGroup: {len(self._own)} passwords for {count} nodes")
        if not primaries:
            raise ValueError("ClusterGroup: a cluster needs a primary")
        if binary.version < (7,):
            raise ValueError(f"{binary.name} has no cluster-port: a cluster needs version 7")
        self.nodes: list[ClusterNode] = []
        self._binary = binary
        self._primaries = primaries
        coverage = "yes" if full_coverage else "no"
        self._args = (
            *("--cluster-node-timeout", str(node_timeout_ms)),
            *("--cluster-require-full-coverage", coverage),
            *self._logins(),
            *args,
        )
        self._folders = contextlib.ExitStack()
        self._left: list[ClusterNode] = []

    def close(self) -> None:
        """Stop everything and remove all data; a second call does nothing."""
        for node in (*self.nodes, *self._left):
            node.end()
        with self._folders:
            for node in (*self.nodes, *self._left):
                self._folders.callback(node.close)

    # -- the nodes

    @property
    def options(self) -> dict[str, object]:
        """The options of a cache on this cluster."""
        nodes: list[dict[str, object]] = [
            {"host": node.host, "port": node.port} for node in self.nodes
        ]
        if self._shared:
            return {"nodes": nodes, "redisOptions": {"password": self._shared}}
        for node, entry in zip(self.nodes, nodes, strict=True):
            if node.password:
                entry["password"] = node.password
        return {"nodes": nodes}

    def primaries(self) -> list[ClusterNode]:
        """Return the primaries, also those without slots, except any that is marked as failed."""
        view = self._view()
        return [one for one in self.nodes if (line := view[one.id]).is_primary and not line.is_down]

    def replicas(self) -> list[ClusterNode]:
        """Return the replicas, except any that is marked as failed."""
        view = self._view()
        return [
            one for one in self.nodes if not (line := view[one.id]).is_primary and not line.is_down
        ]

    def primary_of(self, slot: int) -> ClusterNode:
        """Return the owner of a slot, even if it is down. Raises LookupError if there is none."""
        view = self._view()
        for node in self.nodes:
            if slot in view[node.id].slots():
                return node
        raise LookupError(f"no node owns slot {slot}")

    def replica_of(self, node: ClusterNode) -> ClusterNode:
        """Return the first replica of ``node`` that is up. Raises LookupError if there is none."""
        for replica in self._replicas_of(node, self._view()):
            if replica.is_alive:
                return replica
        raise LookupError(f"{node!r} has no replica that is up")

    def slots_of(self, node: ClusterNode) -> list[int]:
        """Return a node's slots in order."""
        return list(self._view()[node.id].slots())

    def owner(self, key: str | bytes) -> ClusterNode:
        """Return the owner of a key's slot. Raises LookupError if there is none."""
        return self.primary_of(key_slot(key.encode() if isinstance(key, str) else key))

    def wait_until_ok(self) -> None:
        """Wait until all running nodes serve, agree about each other, and have been replicated.

        Nodes that were killed or paused must have been marked as failed and own no slots: start a
        primary without a replica again before calling this.
        """
        self._wait(self._missing)

    def wait_until_noticed(self) -> None:
        """Wait until all running nodes know each other's addresses and which nodes are down."""
        self._wait(self._unacquainted)

    # -- moving slots

    def migrate(
        self,
        slots: Iterable[int],
        source: ClusterNode,
        target: ClusterNode,
        *,
        pause: float = 0.0,
        at_once: int = _SLOTS_AT_ONCE,
    ) -> None:
        """Move slots with their keys, ``at_once`` of them at a time, while clients keep working.

        With ``pause``, each batch stays half migrated for that many seconds. A primary that loses
        its last slot becomes a replica, which is the servers' default; the option
        ``--cluster-allow-replica-migration no`` keeps it a primary.
        """
        todo = list(slots)
        for first in range(0, len(todo), at_once):
            some = todo[first : first + at_once]
            self._begin(some, source, target)
            if pause:
                counts = source.ask_all([("CLUSTER", "COUNTKEYSINSLOT", slot) for slot in some])
                for slot, count in zip(some, counts, strict=True):
                    self.move_keys(slot, source, target, count // 2)
                time.sleep(pause)
            self._move(some, source, target)
            self._end(some, source, target)

    @property
    def moves_atomically(self) -> bool:
        """Whether the servers can move slots with all their keys at one moment."""
        return self._binary.version >= ((9,) if self._is_valkey else (8, 4))

    def migrate_atomically(
        self, slots: Sequence[int], source: ClusterNode, target: ClusterNode
    ) -> None:
        """Move slots with their keys as a whole: no key is ever on both nodes for clients.

        Raises RuntimeError if the servers give up the move.
        """
        ranges = [bound for first, last in _ranges_of(slots) for bound in (first, last)]
        if self._is_valkey:
            source.ask("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", *ranges, "NODE", target.id)
        else:
            task = target.ask("CLUSTER", "MIGRATION", "IMPORT", *ranges)

        def missing() -> str:
            if self._is_valkey:
                # Newest first; the servers keep the ended ones for a while.
                state = source.ask("CLUSTER", "GETSLOTMIGRATIONS")[0]["state"]
            else:
                [found] = target.ask("CLUSTER", "MIGRATION", "STATUS", "ID", task)
                state = found["state"]
            if state in {"failed", "cancelled", "canceled"}:
                raise RuntimeError(f"{source!r} keeps its slots: the move has {state}")
            if state not in {"success", "completed"}:
                return f"{source!r} moves slots to {target!r}: {state}"
            return self._disowned(set(slots), target)

        self._wait(missing)

    @property
    def _is_valkey(self) -> bool:
        return self._binary.name.startswith("valkey")

    def begin_migration(self, slot: int, source: ClusterNode, target: ClusterNode) -> None:
        """Open a slot: ``source`` now answers ASK with ``target`` for keys it lacks."""
        self._begin([slot], source, target)

    def move_keys(
        self, slot: int, source: ClusterNode, target: ClusterNode, limit: int | None = None
    ) -> int:
        """Move the keys of an open slot, at most ``limit``; return how many were moved."""
        moved = 0
        while limit is None or moved < limit:
            count = _KEYS_AT_ONCE if limit is None else min(limit - moved, _KEYS_AT_ONCE)
            keys = source.ask("CLUSTER", "GETKEYSINSLOT", slot, count)
            if not keys:
                break
            source.ask(*_migration(target, keys))
            moved += len(keys)
        return moved

    def end_migration(self, slot: int, source: ClusterNode, target: ClusterNode) -> None:
        """Assign an open slot, all of whose keys have been moved, to ``target``."""
        self._end([slot], source, target)

    def cancel_migration(self, slot: int, source: ClusterNode, target: ClusterNode) -> None:
        """Return an open slot to the source with all its keys.

        Keys can't be moved back within an open slot: clients would miss them meanwhile. If any have
        been moved, the whole slot goes to ``target`` and then comes back.
        """
        # The source first: from then on it sends no client to the target.
        if not target.ask("CLUSTER", "COUNTKEYSINSLOT", slot):
            source.ask("CLUSTER", "SETSLOT", slot, "STABLE")
            # A client sent there just before may have written.
            if not target.ask("CLUSTER", "COUNTKEYSINSLOT", slot):
                target.ask("CLUSTER", "SETSLOT", slot, "STABLE")
                return
            source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
        self.move_keys(slot, source, target)
        self.end_migration(slot, source, target)
        self.migrate([slot], target, source)

    def _begin(self, slots: Sequence[int], source: ClusterNode, target: ClusterNode) -> None:
        # The target first, as the source may send a client there at once.
        for node, state, other in (target, "IMPORTING", source), (source, "MIGRATING", target):
            ask = [("CLUSTER", "SETSLOT", slot, state, other.id) for slot in slots]
            deadline = time.monotonic() + _TRIM_SECONDS
            while True:
                try:
                    node.ask_all(ask)
                    break
                except redis.ResponseError as error:
                    # From 8.6 on a node that has given slots away atomically removes their keys
                    # in the background, and meanwhile refuses to move them.
                    if "pending trim job" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)

    def _move(self, slots: Sequence[int], source: ClusterNode, target: ClusterNode) -> None:
        ask = [("CLUSTER", "GETKEYSINSLOT", slot, _KEYS_AT_ONCE) for slot in slots]
        while found := [keys for keys in source.ask_all(ask) if keys]:
            source.ask_all([_migration(target, keys) for keys in found])

    def _end(self, slots: Sequence[int], source: ClusterNode, target: ClusterNode) -> None:
        commands = [("CLUSTER", "SETSLOT", slot, "NODE", target.id) for slot in slots]
        # The target first: if it were lost in between, the source would still own the slots.
        target.ask_all(commands)
        # Then the target announces it to all. Redis 7.0 gives a slot to any node that claims it,
        # even in an old message, if it heard of the owner before hearing from it.
        self._wait(lambda: self._disowned(set(slots), target))
        source.ask_all(commands)

    # -- nodes that leave and return

    def failover(self, replica: ClusterNode, kind: Failover = "") -> None:
        """Promote a replica, and wait until all running nodes have noticed.

        Raises redis.ResponseError if the server refuses.
        """
        view = self._view()
        line = view[replica.id]
        if line.is_primary or not replica.is_alive:
            raise ValueError(f"{replica!r} can't be promoted: it is no replica, or is down")
        old = self._node(line.primary)
        if not kind and old.is_alive:
            # A server refuses until its replication link is up.
            self._wait(lambda: self._unlinked(replica, old))
        again = 0.0

        def missing() -> str:
            nonlocal again
            if time.monotonic() > again and replica.role() == "replica":
                replica.ask("CLUSTER", "FAILOVER", *([kind] if kind else ()))
                again = time.monotonic() + _FAILOVER_AGAIN_SECONDS
            return self._unpromoted(replica, old)

        self._wait(missing)

    def kill(self, node: ClusterNode) -> None:
        """End a node at once, as a crash would."""
        node.server.kill()

    def start(self, node: ClusterNode) -> None:
        """Start a killed or stopped node at its old address and with its data."""
        if node not in self.nodes:
            raise ValueError(f"{node!r} has left the cluster")
        node.launch()

    def move(self, node: ClusterNode, port: int = 0) -> None:
        """Restart a node at another port, by default a free one, and wait until all know it.

        ``port`` may be that of a node of another cluster, which has ended.
        """
        node.server.stop()
        node.choose_ports(port)
        node.launch()
        self.wait_until_ok()

    def pause(self, node: ClusterNode) -> None:
        """Freeze a node: its connections stay open and it answers nothing."""
        node.is_paused = True
        node.server.pause()

    def resume(self, node: ClusterNode) -> None:
        """Resume a paused node."""
        node.server.resume()
        node.is_paused = False

    def heal(self) -> None:
        """Start killed nodes, resume paused ones, and wait until the cluster is healthy."""
        for node in self.nodes:
            if node.is_paused:
                self.resume(node)
            if not node.server.is_running:
                self.start(node)
        self.wait_until_ok()

    def stop_all(self) -> None:
        """Stop all nodes; their data stays."""
        replicas = self.replicas() if any(node.is_alive for node in self.nodes) else []
        # Replicas first, as the remaining primaries would otherwise promote them.
        for node in sorted(self.nodes, key=lambda one: one not in replicas):
            node.server.stop()
            node.is_paused = False

    def start_all(self, on_new_ports: bool = True) -> None:
        """Start all nodes, by default at other addresses, and wait until the cluster is healthy."""
        for attempt in range(1, _PORT_TRIES + 1):
            if on_new_ports:
                for node in self.nodes:
                    node.choose_ports()
                ports = {node.id: node.ports for node in self.nodes}
                for node in self.nodes:
                    node.rewrite_ports(ports)
            try:
                for node in self.nodes:
                    if not node.server.is_running:
                        node.launch()
                break
            except DscacheError as error:
                if not on_new_ports or attempt == _PORT_TRIES or "in use" not in str(error):
                    raise
                for node in self.nodes:
                    node.server.kill()
        self.wait_until_ok()

    def forget(self, node: ClusterNode) -> None:
        """Remove a node without slots from the cluster; its replicas go to another primary.

        Its server keeps running, alone, until the end. All other nodes must be running: a node that
        misses the removal would bring this one back.
        """
        view = self._view()
        if view[node.id].ranges:
            raise ValueError(f"{node!r} still owns slots: move them away first")
        others = [one for one in self.nodes if one is not node]
        for other in others:
            if not other.is_alive:
                raise ValueError(f"{other!r} is down: start it first")
        for replica in self._replicas_of(node, view):
            fewest = min(
                (one for one in self.primaries() if one is not node),
                key=lambda one: len(self._replicas_of(one, self._view())),
            )
            replica.ask("CLUSTER", "REPLICATE", fewest.id)
            self._wait(lambda r=replica, p=fewest: self._unlinked(r, p))
        for other in others:
            # A node may have learnt it from the others already.
            try:
                other.ask("CLUSTER", "FORGET", node.id)
            except redis.ResponseError as error:
                if "Unknown node" not in str(error):
                    raise
        if node.is_alive:
            node.ask("CLUSTER", "RESET", "SOFT")
        self.nodes.remove(node)
        self._left.append(node)
        self.wait_until_ok()

    # -- forming the cluster

    def _logins(self) -> tuple[str, ...]:
        """Return how replicas log in to primaries."""
        if self._shared:
            return ("--masterauth", self._shared)
        if not any(self._own):
            return ()
        secret = secrets.token_hex(16)
        return (
            *("--masteruser", _REPLICATION_USER, "--masterauth", secret),
            *("--user", _REPLICATION_USER, "on", f">{secret}", "+psync", "+replconf", "+ping"),
        )

    def _start(self) -> None:
        in_memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
        data, known = self._make_folder(None), self._make_folder(in_memory)
        for number, password in enumerate(self._own):
            required = ("--requirepass", password) if password else ()
            node = ClusterNode(
                self._binary,
                data / f"node-{number}",
                known / f"nodes-{number}.conf",
                (*required, *self._args),
                password,
            )
            self.nodes.append(node)
            node.launch()
        for number, node in enumerate(self.nodes):
            # Distinct epochs; nodes with equal ones would have to resolve the conflict first.
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        primaries = self.nodes[: self._primaries]
        for number, node in enumerate(primaries):
            first, end = (SLOTS * one // self._primaries for one in (number, number + 1))
            node.ask("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
        self._meet()
        for number, node in enumerate(self.nodes[self._primaries :]):
            node.ask("CLUSTER", "REPLICATE", primaries[number % self._primaries].id)
        self.wait_until_ok()

    def _make_folder(self, parent: Path | None) -> Path:
        folder = tempfile.TemporaryDirectory(
            prefix="dscache-cluster-",
            dir=parent,
            # A killed server's child may still be writing there.
            ignore_cleanup_errors=True,
        )
        self._folders.callback(folder.cleanup)
        return Path(folder.name)

    def _meet(self) -> None:
        again = 0.0

        def missing() -> str:
            nonlocal again
            # Each node meets each: quicker than gossip.
            strangers = [
                (node, other)
                for number, node in enumerate(self.nodes)
                for view in [node.view()]
                for other in self.nodes[number + 1 :]
                if other.id not in view
            ]
            if strangers and time.monotonic() > again:
                for node, other in strangers:
                    address = (other.host, other.port, other.bus_port)
                    node.ask("CLUSTER", "MEET", *address)
                again = time.monotonic() + _MEET_AGAIN_SECONDS
            return self._unacquainted()

        self._wait(missing)

    # -- conditions to wait for: each returns what is missing, "" if nothing is

    def _missing(self) -> str:
        alive = [node for node in self.nodes if node.is_alive]
        if not alive:
            return "no node runs"
        if complaint := self._unacquainted():
            return complaint
        views = [(node, node.view()) for node in alive]
        if complaint := self._renew_outdated(views):
            return complaint
        first, view = views[0]
        for node, other in views:
            state = node.ask("CLUSTER", "INFO").split()[0]
            if state != "cluster_state:ok":
                return f"{node!r} has {state}"
            if _shape(other) != _shape(view):
                return f"{node!r} and {first!r} see different slots or replicas"
        owned = 0
        for node in self.nodes:
            line = view[node.id]
            owned += sum(1 for _ in line.slots())
            if line.ranges and not node.is_alive:
                return f"{node!r} is down and owns slots"
            follows = node.is_alive and not line.is_primary
            if follows and (complaint := self._unlinked(node, self._node(line.primary))):
                return complaint
        return "" if owned == SLOTS else f"{SLOTS - owned} slots are nobody's"

    def _renew_outdated(self, views: Sequence[tuple[ClusterNode, dict[str, _Line]]]) -> str:
        """Have a primary take a new epoch if the dead one that it replaces had a later one.

        Redis counts the votes of an election for two seconds, or two node timeouts, also when the
        elected node is a replica again by then. If its primary dies within that time, it wins at
        once, under the epoch of those votes. Other nodes heed the dead primary's later epoch for
        good. Valkey forgets votes that have been used.
        """
        for node, view in views:
            mine = view[node.id]
            if not (mine.is_primary and mine.ranges):
                continue
            for other in self.nodes:
                dead = view[other.id]
                is_later = dead.is_down and dead.is_primary and dead.epoch > mine.epoch
                slots = {slot for _, its in views for slot in its[other.id].slots()}
                if is_later and not other.is_alive and not slots.isdisjoint(mine.slots()):
                    node.ask("CLUSTER", "BUMPEPOCH")
                    return f"{node!r} has replaced {other!r} under an earlier epoch"
        return ""

    def _unacquainted(self) -> str:
        ids = {node.id for node in self.nodes}
        for node in self.nodes:
            if not node.is_alive:
                continue
            view = node.view()
            for other in self.nodes:
                line = view.get(other.id)
                if line is None:
                    return f"{node!r} does not know {other!r}"
                if not other.is_alive:
                    if not line.is_down:
                        return f"{node!r} has not noticed that {other!r} is down"
                    continue
                odd = line.flags & {"fail", "fail?", "handshake", "noaddr"}
                # A lone node has no peer that could tell it its host.
                expected = (other.address, f":{other.ports}")[: 1 + (len(ids) == 1)]
                if odd or not line.is_linked or line.address not in expected:
                    flags = ",".join(sorted(line.flags))
                    return f"{node!r} has {other!r} as {line.address!r}, {flags}, or no link to it"
            if strangers := view.keys() - ids:
                return f"{node!r} knows {len(strangers)} nodes that are not of this cluster"
        return ""

    def _unlinked(self, replica: ClusterNode, primary: ClusterNode) -> str:
        role = replica.ask("ROLE")
        if role[0] != "slave" or int(role[2]) != primary.port or role[3] != "connected":
            return f"{replica!r} does not replicate {primary!r}: it says {role!r}"
        role = primary.ask("ROLE")
        if role[0] != "master" or str(replica.port) not in [one[1] for one in role[2]]:
            return f"{primary!r} does not serve its replica {replica!r}: it says {role!r}"
        return ""

    def _unpromoted(self, new: ClusterNode, old: ClusterNode) -> str:
        for node in self.nodes:
            if not node.is_alive:
                continue
            view = node.view()
            if not view[new.id].is_primary or view[old.id].ranges:
                return f"{node!r} does not take {new!r} for the primary of its shard"
            if old.is_alive and view[old.id].primary != new.id:
                return f"{node!r} does not take {old!r} for a replica of {new!r}"
        return ""

    def _disowned(self, slots: set[int], owner: ClusterNode) -> str:
        epoch = owner.view()[owner.id].epoch
        for node in self.nodes:
            if not node.is_alive:
                continue
            view = node.view()
            if rest := slots.difference(view[owner.id].slots()):
                return f"{node!r} does not know that {owner!r} owns slot {min(rest)}"
            # A new owner takes a new epoch unless it knows of none above its own. Before it has
            # heard of the last owner's epoch, it would keep one that other nodes consider outdated.
            if view[owner.id].epoch != epoch:
                return f"{node!r} does not know the epoch of {owner!r}"
        return ""

    def _wait(self, missing: Callable[[], str]) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                complaint = missing()
            except (redis.ConnectionError, redis.TimeoutError) as error:
                complaint = f"a node does not answer: {error}"
            if not complaint:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {_PATIENCE_SECONDS:g} s: {complaint}")
            time.sleep(_POLL_SECONDS)

    # -- lookups

    def _view(self) -> dict[str, _Line]:
        """Return the view of the node with the newest epoch."""
        views = []
        last: redis.RedisError | None = None
        for node in self.nodes:
            if node.is_alive:
                try:
                    views.append(node.view())
                except (redis.ConnectionError, redis.TimeoutError) as error:
                    last = error
        if not views:
            raise redis.ConnectionError("no node of the cluster answers") from last
        # A node that has just returned briefly believes its old view.
        return max(views, key=lambda view: max(line.epoch for line in view.values()))

    def _node(self, name: str) -> ClusterNode:
        for node in self.nodes:
            if node.id == name:
                return node
        raise LookupError(f"no node of this cluster has the id {name!r}")

    def _replicas_of(self, node: ClusterNode, view: dict[str, _Line]) -> list[ClusterNode]:
        return [one for one in self.nodes if view[one.id].primary == node.id]


def _shape(view: dict[str, _Line]) -> dict[str, tuple[bool, str, tuple[str, ...]]]:
    return {name: (line.is_primary, line.primary, line.ranges) for name, line in view.items()}


def _ranges_of(slots: Iterable[int]) -> list[tuple[int, int]]:
    """Return the ranges, first and last slot each, that slots make up."""
    ranges: list[tuple[int, int]] = []
    for slot in sorted(slots):
        if ranges and ranges[-1][1] == slot - 1:
            ranges[-1] = ranges[-1][0], slot
        else:
            ranges.append((slot, slot))
    return ranges


def _migration(target: ClusterNode, keys: Sequence[str]) -> tuple[bytes | str | int, ...]:
    password = ("AUTH", target.password) if target.password else ()
    to = (target.host, target.port, "", 0, _MIGRATE_MS)
    # Encoded here, since redis-py with hiredis packs non-UTF-8 text in no other form.
    encoded = (key.encode(errors="surrogateescape") for key in keys)
    return ("MIGRATE", *to, *password, "KEYS", *encoded)


def hold_port() -> socket.socket:
    """Bind a free port without listening, which reserves it for one server.

    A server binds it a second time, which Linux allows because both ask for it and only one of them
    listens. While a killed server is away, no other process gets its port, and a client that keeps
    reconnecting can't connect to itself.
    """
    held = socket.socket()
    held.bind((_HOST, 0))
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return held
