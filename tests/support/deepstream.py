"""deepstream's own server and client from npm: how the tests get and run them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import redis as redis_py

from dscache.deepstream import Peer
from dscache.embedded import EmbeddedServer
from tests.support.documents import PROJECT
from tests.support.waiting import PATIENCE

PROGRAMS = PROJECT / "tests" / "programs"

VERSIONS = {
    "@deepstream/cache-redis": "2.0.9",
    "@deepstream/client": "7.0.5",
    "@deepstream/clusternode-redis": "1.0.1",
    "@deepstream/protobuf": "1.0.9",
    "@deepstream/server": "7.0.2",
}
# The package is on no registry. A server with httpServer of type default doesn't use it.
_STUB = {
    "package.json": '{"name": "uWebSockets.js", "version": "20.19.0", "main": "index.js"}',
    "index.js": "module.exports = {}",
}
BROWSER = {"@sparticuz/chromium": "131.0.1", "puppeteer-core": "23.11.1"}
"""A headless Chromium in a package, and its remote control."""


class NotInstalledError(Exception):
    """There is no Node, or npm can't get the packages."""


def install(versions: Mapping[str, str] = VERSIONS) -> Path:
    """Return the folder that holds ``node_modules``; the first call takes ten seconds.

    Raises NotInstalledError.
    """
    goal = PROJECT / "build" / "deepstream" / "-".join(versions.values())
    if goal.exists():
        return goal
    if not (shutil.which("node") and (npm := shutil.which("npm"))):
        raise NotInstalledError("there is no Node with npm")
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=goal.parent))
    except OSError:
        folder = Path(tempfile.mkdtemp())  # the tests of a wheel may run where nothing is writable
    stub = folder / "stub"
    stub.mkdir()
    for name, text in _STUB.items():
        (stub / name).write_text(text, encoding="utf-8")
    package = {
        "private": True,
        "dependencies": dict(versions),
        "overrides": {"uWebSockets.js": "file:./stub"},
    }
    (folder / "package.json").write_text(json.dumps(package), encoding="utf-8")
    try:
        subprocess.run(
            [npm, "install", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund"],
            cwd=folder,
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=240,
        )
    except (subprocess.SubprocessError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise NotInstalledError(f"npm can't get deepstream: {error}") from None
    if folder.parent != goal.parent:
        return folder
    try:
        # Several processes may install at once; each has a folder of its own until it is whole.
        os.rename(folder, goal)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
    return goal


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One of deepstream's servers, in its own process."""

    def __init__(
        self, packages: Path, host: str, redis_port: int, name: str, log: Path, **options: Any
    ) -> None:
        self.name = name
        self.port = 0
        self.log_path = log
        redis = {"name": "redis", "options": {"host": host, "port": redis_port}}
        self.config: dict[str, Any] = {
            "serverName": name,
            "showLogo": False,
            "logLevel": 1,
            "dependencyInitializationTimeout": 30_000,
            "httpServer": {
                "type": "default",
                "options": {
                    "host": "127.0.0.1",
                    "port": 0,  # start() chooses it
                    "healthCheckPath": "/health-check",
                    "allowAllOrigins": True,
                },
            },
            "connectionEndpoints": [{"type": "ws-binary", "options": {"urlPath": "/deepstream"}}],
            "cache": redis,
            "clusterNode": redis,
            **options,
        }
        self._packages = packages
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start at a free port, and wait until clients can connect."""
        for _ in range(5):
            self.port = free_port()
            self.config["httpServer"]["options"]["port"] = self.port
            self.log_path.write_bytes(b"")
            await self._spawn()
            # Another process may take the port between the choice and the server's bind.
            if "EADDRINUSE" not in self.log():
                break
        assert "READY" in self.log(), self.log()

    @property
    def url(self) -> str:
        """The address for clients."""
        return f"ws://127.0.0.1:{self.port}/deepstream"

    async def _spawn(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *("node", str(PROGRAMS / "deepstream_server.js"), str(self._packages)),
                json.dumps(self.config),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        async with asyncio.timeout(60):
            while "READY" not in self.log() and self.process.returncode is None:
                await asyncio.sleep(0.02)

    def log(self) -> str:
        """Return everything that it has printed."""
        return self.log_path.read_text(encoding="utf-8")

    def complaints(self) -> list[str]:
        """Return the lines of its log that tell of an error, or of a message that it can't use."""
        signs = ("ERROR", "FATAL", "PLUGIN_ERROR", "unknown action", "missing socket", "INVALID")
        return [line for line in self.log().splitlines() if any(sign in line for sign in signs)]

    async def leader(self) -> tuple[str, list[str]]:
        """Return the cluster's leader and all its members, as this server has them."""
        assert self.process is not None
        before = self.log().count("LEADER ")
        self.process.send_signal(signal.SIGUSR2)
        async with asyncio.timeout(30):
            while self.log().count("LEADER ") == before or not self.log().endswith("\n"):
                await asyncio.sleep(0.01)
        line = [line for line in self.log().splitlines() if line.startswith("LEADER ")][-1]
        leader, members = json.loads(line.removeprefix("LEADER "))
        return leader, members

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def kill(self) -> None:
        """End it at once, as a crash does."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
        if self.process is not None:
            await self.process.wait()

    async def stop(self) -> None:
        """End it as its administrator does."""
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            try:
                async with asyncio.timeout(20):
                    await self.process.wait()
            except TimeoutError:
                await self.kill()


class Client:
    """A client of deepstream, in its own process."""

    def __init__(self, packages: Path, server: Server, username: str) -> None:
        self._packages = packages
        self.server = server
        self.username = username
        self.process: asyncio.subprocess.Process | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._count = 0
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start, and wait until it is logged in."""
        self.process = await asyncio.create_subprocess_exec(
            *("node", str(PROGRAMS / "deepstream_client.js"), str(self._packages)),
            *(self.server.url, self.username),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            limit=2**24,
        )
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            assert await self.process.stdout.readline() == b"READY\n"
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            if not line.startswith(b'{"id"'):
                continue
            answer = json.loads(line)
            waiting = self._waiting.pop(answer["id"], None)
            if waiting is None or waiting.done():
                continue
            if "failed" in answer:
                waiting.set_exception(RuntimeError(answer["failed"]))
            else:
                waiting.set_result(answer["answer"])
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(RuntimeError("the client has ended"))

    async def do(self, action: str, *, patience: float = 30, **arguments: Any) -> Any:
        """Have the client do something, and return its answer; raises RuntimeError."""
        assert self.process is not None
        assert self.process.stdin is not None
        self._count += 1
        waiting = self._waiting[self._count] = asyncio.get_running_loop().create_future()
        asked = {"do": action, "id": self._count, **arguments}
        self.process.stdin.write(json.dumps(asked).encode() + b"\n")
        async with asyncio.timeout(patience):
            return await waiting

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def stop(self) -> str:
        """End it, and return what it has printed as errors."""
        if self.process is None:
            return ""
        if self.process.returncode is None:
            self.process.kill()
        assert self.process.stderr is not None
        errors = await self.process.stderr.read()
        await self.process.wait()
        if self._reader is not None:
            await asyncio.wait([self._reader])
        return errors.decode()


class World:
    """Real servers and clients on one Redis, all stopped at the end."""

    def __init__(self, packages: Path, redis: EmbeddedServer, folder: Path) -> None:
        self._packages = packages
        self.redis = redis
        self._folder = folder
        self.servers: list[Server] = []
        self.clients: list[Client] = []
        self.peers: list[Peer] = []

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of peers: that of the servers."""
        redis = {"host": self.redis.host, "port": self.redis.port}
        return {
            "cache": {"name": "redis", "options": redis},
            "clusterNode": {"name": "redis", "options": redis},
        }

    async def server(self, name: str = "", **options: Any) -> Server:
        """Start a server."""
        name = name or f"js-{len(self.servers) + 1}"
        log = self._folder / f"{name}.log"
        started = Server(self._packages, self.redis.host, self.redis.port, name, log, **options)
        self.servers.append(started)
        await started.start()
        return started

    async def client(self, server: Server, username: str = "") -> Client:
        """Start a client of a server."""
        name = username or f"user-{len(self.clients) + 1}"
        started = Client(self._packages, server, name)
        self.clients.append(started)
        await started.start()
        return started

    async def peer(self, name: str = "", *, more: Any = None, **options: Any) -> Peer:
        """Open a peer; ``more`` are sections of its configuration."""
        name = name or f"py-{len(self.peers) + 1}"
        opened = Peer.from_config({**self.config, **(more or {})}, server_name=name, **options)
        self.peers.append(opened)
        await opened.when_ready()
        return opened

    def publish(self, topic: int, payload: bytes) -> None:
        """Publish any bytes as a message."""
        with redis_py.Redis.from_url(self.redis.url) as client:
            client.publish(str(topic), payload)

    @contextlib.contextmanager
    def tap(self) -> Iterator[Callable[[], list[tuple[str, dict[str, Any]]]]]:
        """Take all messages; the value returns the sender and the message of each so far."""
        with redis_py.Redis.from_url(self.redis.url) as client, client.pubsub() as pubsub:
            pubsub.psubscribe("*")
            while pubsub.get_message(timeout=1) is None:
                pass

            def taken() -> list[tuple[str, dict[str, Any]]]:
                found = []
                while (push := pubsub.get_message(timeout=0.1)) is not None:
                    envelope = json.loads(push["data"])
                    found.append((envelope["fromServer"], envelope["message"]))
                return found

            yield taken

    async def close(self) -> None:
        """Stop everything."""
        for peer in self.peers:
            await peer.close()
        for client in self.clients:
            await client.stop()
        await asyncio.gather(*(server.kill() for server in self.servers))


class Pair(NamedTuple):
    """Two servers, a client of each, and a peer."""

    world: World
    one: Client
    two: Client
    peer: Peer

    @classmethod
    async def start(cls, world: World) -> Pair:
        servers = await asyncio.gather(world.server("js-1", **FAST), world.server("js-2", **FAST))
        one = await world.client(servers[0], "ada")
        two = await world.client(servers[1], "bob")
        return cls(world, one, two, await world.peer("py-1", more=FAST))

    def complaints(self) -> list[str]:
        """Return the complaints of both servers so far."""
        return [line for server in self.world.servers for line in server.complaints()]


FAST: dict[str, Any] = {
    "rpc": {"ackTimeout": 600, "responseTimeout": 1500},
    "record": {"storageHotPathPrefixes": ["hot/"]},
    "clusterRegistry": {
        "options": {
            "keepAliveInterval": 500,
            "activeCheckInterval": 200,
            "nodeInactiveTimeout": 2000,
        }
    },
}
"""Sections of servers that are soon to notice a failure."""


async def eventually(condition: Callable[[], Awaitable[Any]]) -> Any:
    """Return what an async condition returns, once that is true."""
    result = None
    try:
        async with asyncio.timeout(PATIENCE):
            while not (result := await condition()):
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"it never came true: {result}") from None
    return result
