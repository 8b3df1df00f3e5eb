"""A primary, replicas and Sentinels of our own, for tests of what happens when one fails over."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from dscache.embedded import EmbeddedServer, ServerBinary

GROUP = "records"
# How long a primary must be silent to be called down, and how long a failover may take.
DOWN_AFTER_MS = 500
FAILOVER_TIMEOUT_MS = 3000
_PATIENCE_SECONDS = 30
_AT_ONCE = ("--repl-diskless-sync-delay", "0")


class SentinelGroup:
    """One primary with replicas, watched by Sentinels, all started and stopped together."""

    def __init__(
        self, binary: ServerBinary, *, replicas: int = 2, sentinels: int = 3, password: str = ""
    ) -> None:
        self._binary = binary
        self._password = password
        self._folder = tempfile.TemporaryDirectory(prefix="dscache-sentinels-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self.ports: list[int] = []
        # Else a primary waits 5 s for further replicas before it serves the first.
        self.servers = [EmbeddedServer(binary, args=_AT_ONCE)]
        self._replicas = replicas
        self._sentinels = sentinels

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

    @property
    def options(self) -> dict[str, object]:
        """The options of a cache behind these Sentinels."""
        nodes = [{"host": "127.0.0.1", "port": port} for port in self.ports]
        secret = {"sentinelPassword": self._password} if self._password else {}
        return {"sentinels": nodes, "name": GROUP, **secret}

    def primary(self) -> EmbeddedServer:
        """Return the server that the first Sentinel takes for the primary."""
        with self.ask(self.ports[0]) as client:
            _, port = client.sentinel_get_master_addr_by_name(GROUP)
        return next(server for server in self.servers if server.port == int(port))

    def ask(self, port: int) -> redis.Redis:
        """Return a client of the server or Sentinel at ``port``."""
        sentinel = port in self.ports
        password = self._password if sentinel else None
        return redis.Redis(port=port, password=password, decode_responses=True, socket_timeout=5)

    def wait_for_primary(self, old: EmbeddedServer) -> float:
        """Wait until every Sentinel names another primary than ``old``; return when it was."""
        for port in self.ports:
            _wait(lambda port=port: self._named(port) != old.port, "the Sentinels did not agree")
        return time.monotonic()

    def heal(self) -> None:
        """Start what was killed, and wait until all replicas follow the primary."""
        for server in self.servers:
            if not server.is_running:
                server.start()
                # The Sentinels would say so too, in their own time of ten seconds.
                with self.ask(server.port) as client:
                    client.replicaof("127.0.0.1", str(self.primary().port))
        with self.ask(self.primary().port) as client:
            _wait(
                lambda: int(client.info("replication")["connected_slaves"]) == self._replicas,
                "a replica did not come back",
            )
        for port in self.ports:
            _wait(lambda port=port: self._knows_all(port), "a Sentinel takes a server for down")

    def close(self) -> None:
        """Stop everything."""
        for process in self._processes:
            process.kill()
            process.wait()
        for server in self.servers:
            server.close()
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
        for port in self.ports:
            _wait(lambda port=port: self._knows_all(port), "a Sentinel did not find the others")

    def _start_sentinel(self, number: int) -> None:
        probe = EmbeddedServer(self._binary)
        probe.start()  # finds a free port, as a server does
        port = probe.port
        probe.close()
        path = Path(self._folder.name, f"sentinel-{number}.conf")
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
        with Path(self._folder.name, f"sentinel-{number}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [self._binary.path, str(path), "--sentinel"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        self.ports.append(port)

    def _named(self, port: int) -> int:
        with self.ask(port) as client:
            return int(client.sentinel_get_master_addr_by_name(GROUP)[1])

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


def _wait(condition: object, complaint: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.05)
