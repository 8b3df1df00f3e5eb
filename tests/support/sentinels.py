"""A private primary with replicas and Sentinels, for tests of failover.

Also a fake Sentinel that says what a test gives it.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis

from dscache.embedded import EmbeddedServer, ServerBinary
from tests.support.clusters import Together, hold_port
from tests.support.faults import FakeServer

GROUP = "records"
# How long a primary must be silent to count as down, and how long a failover may take.
DOWN_AFTER_MS = 500
FAILOVER_TIMEOUT_MS = 3000
_PATIENCE_SECONDS = 30
_AT_ONCE = ("--repl-diskless-sync-delay", "0")
# Milliseconds between the Sentinels' questions to each other and to the servers; the second value
# is for phases in which nothing is tested.
_PERIODS = {"INFO-PERIOD": 10_000, "PUBLISH-PERIOD": 2000, "PING-PERIOD": 1000, "ASK-PERIOD": 1000}
_HURRIED_MS = 100
# A Sentinel stopped for longer by a busy machine takes the clock to be wrong, and then does nothing
# for half a minute.
_TILT_MS = 20_000


class SentinelGroup(Together):
    """One primary with replicas, watched by Sentinels, all started and stopped together."""

    def __init__(
        self, binary: ServerBinary, *, replicas: int = 2, sentinels: int = 3, password: str = ""
    ) -> None:
        self._binary = binary
        self._password = password
        self._folder = tempfile.TemporaryDirectory(prefix="dscache-sentinels-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._held: list[socket.socket] = []
        self.ports: list[int] = []
        # Otherwise a primary waits 5 s for further replicas before it serves the first.
        self.servers = [EmbeddedServer(binary, args=_AT_ONCE)]
        self._replicas = replicas
        self._sentinels = sentinels

    @property
    def options(self) -> dict[str, object]:
        """The options of a cache behind these Sentinels."""
        nodes = [{"host": "127.0.0.1", "port": port} for port in self.ports]
        secret = {"sentinelPassword": self._password} if self._password else {}
        return {"sentinels": nodes, "name": GROUP, **secret}

    def primary(self, sentinel: int = 0) -> EmbeddedServer:
        """Return the primary's server, according to a Sentinel."""
        port = self._named(self.ports[sentinel])
        return next(server for server in self.servers if server.port == port)

    def ask(self, port: int) -> redis.Redis:
        """Return a client of the server or Sentinel at ``port``."""
        sentinel = port in self.ports
        password = self._password if sentinel else None
        return redis.Redis(port=port, password=password, decode_responses=True, socket_timeout=5)

    def wait_for_primary(self, old: EmbeddedServer) -> float:
        """Wait until every Sentinel names another primary than ``old``; return when that was."""
        for port in self.ports:
            _wait(lambda port=port: self._named(port) != old.port, "the Sentinels did not agree")
        return time.monotonic()

    def fail_over(self, sentinel: int = 0) -> EmbeddedServer:
        """Have a Sentinel replace a healthy primary; return the old one.

        The old one stays a primary until ``heal()``, as it would behind a partition.
        """
        old = self.primary(sentinel)
        with self.ask(old.port) as client:
            client.execute_command("ACL", "SETUSER", "default", "-replicaof", "-slaveof")
        with self.ask(self.ports[sentinel]) as client:
            _wait(lambda: _accepted(client), "the Sentinel has no replica to promote")
        return old

    def pause_sentinel(self, number: int) -> None:
        """Freeze a Sentinel: its connections stay open and it learns nothing."""
        self._processes[number].send_signal(signal.SIGSTOP)

    def resume_sentinel(self, number: int) -> None:
        """Resume a paused Sentinel."""
        self._processes[number].send_signal(signal.SIGCONT)

    def restart_sentinel(self, number: int) -> None:
        """Kill a Sentinel and start it again with its state."""
        self._processes[number].kill()
        self._processes[number].wait()
        self._processes[number] = self._spawn(number)
        with self._fast_polling():
            _wait(lambda: self._knows_all(self.ports[number]), "the Sentinel did not come back")

    def heal(self) -> None:
        """Start what was killed, and wait until all replicas follow the primary."""
        for number in range(self._sentinels):
            self.resume_sentinel(number)
        for server in self.servers:
            if not server.is_running:
                server.start()
            with self.ask(server.port) as client:
                client.execute_command("ACL", "SETUSER", "default", "+@all")
        with self._fast_polling():
            _wait(self._is_whole, "the group did not become whole again")

    def close(self) -> None:
        """Stop everything."""
        for process in self._processes:
            process.kill()
            process.wait()
        for server in self.servers:
            server.kill()  # a stopping primary waits for its replicas
            server.close()
        while self._held:
            self._held.pop().close()
        self._folder.cleanup()

    def _start(self) -> None:
        first = self.servers[0]
        first.start()
        for _ in range(self._replicas):
            follow = ("--replicaof", first.host, str(first.port))
            replica = EmbeddedServer(self._binary, args=(*follow, *_AT_ONCE))
            self.servers.append(replica)
            replica.start()
        for replica in self.servers[1:]:
            with self.ask(replica.port) as client:
                _wait(
                    lambda c=client: c.info("replication")["master_link_status"] == "up", "no link"
                )
        for number in range(self._sentinels):
            self._start_sentinel(number)
        with self._fast_polling():
            for port in self.ports:
                _wait(lambda port=port: self._knows_all(port), "a Sentinel did not find the others")

    @contextlib.contextmanager
    def _fast_polling(self) -> Iterator[None]:
        """Make the Sentinels poll constantly instead of at their usual pace."""
        self._pace(dict.fromkeys(_PERIODS, _HURRIED_MS))
        yield
        self._pace(_PERIODS)

    def _pace(self, periods: dict[str, int]) -> None:
        words = [word for period in periods.items() for word in period]
        for port in self.ports:
            _wait(lambda port=port: self._answers(port), "a Sentinel does not answer")
            with self.ask(port) as client:
                client.execute_command("SENTINEL DEBUG", *words, "TILT-TRIGGER", _TILT_MS)

    def _answers(self, port: int) -> bool:
        try:
            with self.ask(port) as client:
                return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False

    def _start_sentinel(self, number: int) -> None:
        held = hold_port()
        port = held.getsockname()[1]
        if sys.platform == "linux":
            self._held.append(held)
        else:
            held.close()
        path = self._config(number)
        quorum = self._sentinels // 2 + 1
        lines = [
            f"port {port}",
            "bind 127.0.0.1",
            f"dir {self._folder.name}",
            f"sentinel monitor {GROUP} 127.0.0.1 {self.servers[0].port} {quorum}",
            f"sentinel down-after-milliseconds {GROUP} {DOWN_AFTER_MS}",
            f"sentinel failover-timeout {GROUP} {FAILOVER_TIMEOUT_MS}",
            f"sentinel parallel-syncs {GROUP} 2",
        ]
        if self._password:
            lines += [f"requirepass {self._password}", f"sentinel sentinel-pass {self._password}"]
        path.write_text("\n".join(lines) + "\n")
        self._processes.append(self._spawn(number))
        self.ports.append(port)

    def _config(self, number: int) -> Path:
        return Path(self._folder.name, f"sentinel-{number}.conf")

    def _spawn(self, number: int) -> subprocess.Popen[bytes]:
        with Path(self._folder.name, f"sentinel-{number}.log").open("ab") as log:
            return subprocess.Popen(
                [self._binary.path, str(self._config(number)), "--sentinel"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _named(self, port: int) -> int:
        with self.ask(port) as client:
            return int(client.sentinel_get_master_addr_by_name(GROUP)[1])

    def _is_whole(self) -> bool:
        primary = self.primary()
        if any(self._named(port) != primary.port for port in self.ports):
            return False
        for server in self.servers:
            with self.ask(server.port) as client:
                # The Sentinels would notice too, but only within ten seconds.
                if server is not primary and client.role()[2] != primary.port:
                    client.replicaof("127.0.0.1", str(primary.port))
        with self.ask(primary.port) as client:
            following = int(client.info("replication")["connected_slaves"])
        return following == self._replicas and all(map(self._knows_all, self.ports))

    def _knows_all(self, port: int) -> bool:
        try:
            with self.ask(port) as client:
                state = client.sentinel_master(GROUP)
        except redis.ConnectionError:
            return False
        others = self._sentinels - 1
        return (
            state["flags"] == "master"
            and int(state["num-slaves"]) == self._replicas
            and int(state["num-other-sentinels"]) == others
        )


class FakeSentinel(FakeServer):
    """Claim that the group's primary is at ``port``, by a configuration of ``epoch``."""

    def __init__(self, port: int, epoch: int = 1) -> None:
        super().__init__({"SENTINEL": self._say, "SUBSCRIBE": self._subscribe})
        self.primary = port
        self.epoch = epoch

    @property
    def questions(self) -> int:
        """How often it was asked for the primary."""
        return sum(command[1:2] == [b"GET-MASTER-ADDR-BY-NAME"] for command in self.commands)

    @property
    def subscriptions(self) -> int:
        """How often a client has subscribed to its events."""
        return sum(command[0] == b"SUBSCRIBE" for command in self.commands)

    def announce(self, old: int, group: str = GROUP) -> None:
        """Announce to every connected client that the primary is no longer at ``old``."""
        words = f"{group} 127.0.0.1 {old} 127.0.0.1 {self.primary}"
        self.push(_array("message", "+switch-master", words))

    def _say(self, command: list[bytes]) -> bytes:
        if command[1] == b"MASTER":
            return _array("name", GROUP, "config-epoch", str(self.epoch), "flags", "master")
        return _array("127.0.0.1", str(self.primary))

    def _subscribe(self, command: list[bytes]) -> bytes:
        channels = [channel.decode() for channel in command[1:]]
        return b"".join(
            b"*3\r\n" + _bulk("subscribe") + _bulk(channel) + b":%d\r\n" % count
            for count, channel in enumerate(channels, 1)
        )


def _array(*words: str) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(map(_bulk, words))


def _bulk(word: str) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(word), word.encode())


def _accepted(sentinel: redis.Redis) -> bool:
    try:
        sentinel.execute_command("SENTINEL FAILOVER", GROUP)
    except redis.ResponseError as error:
        if "NOGOODSLAVE" in str(error):  # it believes a replica for only a few seconds
            return False
        raise
    return True


def _wait(condition: object, complaint: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.05)
