"""Fixtures: every server found, both cores, and caches that must be drained at the end.

``DSCACHE_TEST_URL=redis://host:port/db`` names an existing server to test on instead; that database
is emptied before each test.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.metadata
import os
import shutil
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis as redis_py
import trustme
from hypothesis import HealthCheck, settings

import dscache
from dscache import _backend
from dscache.embedded import EmbeddedServer, ServerBinary, TLSFiles, find_server, find_servers
from tests.soak import cluster_rows
from tests.support.clusters import ClusterGroup
from tests.support.django_tests import find_django_tests
from tests.support.faults import FaultProxy
from tests.support.prometheus import find_prometheus
from tests.support.twemproxy import find_twemproxy

CORES = {"fast": "dscache._fast", "pure": "dscache.core.pure"}
LIBRARIES = ("hiredis", "redis", "msgspec", "uvloop")
# Deepstream's server, which `npm install` puts there.
DEEPSTREAM = Path(__file__).parents[1] / "examples" / "deepstream"
DEEPSTREAM_SERVER = DEEPSTREAM.joinpath(
    *("node_modules", "@deepstream", "server", "dist", "bin", "deepstream")
)
# Counters of work in progress in a cache; each returns to zero once the cache is idle.
DRAINED = ("pending", "in_flight", "queued")

# Timeouts of caches that don't set their own: a busy machine must not make a test fail.
PATIENT = {"commandTimeout": 30_000, "connectTimeout": 30_000}

# The slowest files, the slowest first: none may be left for the end, when the other processes idle.
LONG = (
    *("test_injection", "test_resilience", "test_near_faults", "test_near_processes", "test_sync"),
    *("test_sync_cluster", "test_cluster", "test_packaging", "test_near", "test_topology"),
    *("test_sentinel", "test_cli", "test_near_live", "test_scan", "test_signals"),
    *("test_convergence", "test_interruptions", "test_peer", "test_cache", "test_clusters"),
    *("test_peer_failures", "test_pipeline", "test_messages_apart", "test_twins", "test_output"),
    *("test_connection", "test_near_model", "test_model", "test_shared_near_model", "test_typing"),
)

# Durations prove nothing here, since machines differ. The examples of one test share its fixtures.
settings.register_profile(
    "dscache",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("dscache")


@dataclass(frozen=True)
class NamedServer:
    """The server that ``DSCACHE_TEST_URL`` names."""

    url: str

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or "localhost"

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 6379


def _servers() -> list[NamedServer] | list[ServerBinary]:
    url = os.environ.get("DSCACHE_TEST_URL")
    return [NamedServer(url)] if url else find_servers()


SERVERS = _servers()

# The kinds of server, also when SERVERS is a named server. Where starting each would take long, the
# oldest and the newest represent all.
BINARIES = [one for one in SERVERS if isinstance(one, ServerBinary)] or find_servers()
BY_AGE = sorted(BINARIES, key=lambda binary: binary.version)
OLDEST_AND_NEWEST = list(dict.fromkeys((*BY_AGE[:1], *BY_AGE[-1:])))

# Valkey has numbered databases in a cluster from version 9 on; Redis answers SELECT with an error.
WITHOUT_DATABASES = [
    binary
    for binary in BINARIES
    if binary.version >= (7,) and not (binary.name.startswith("valkey") and binary.version >= (9,))
]

# The passwords of ``guarded_group``.
OWN, SHARED = "of-the-first-alone", "of-all-others"


def _server_id(server: NamedServer | ServerBinary) -> str:
    return server.name if isinstance(server, ServerBinary) else "named"


UNFETCHED = "none, so its tests are skipped; make test fetches it"


def pytest_report_header() -> list[str]:
    cores = (f"{name} ({_where(module)})" for name, module in CORES.items())
    versions = (f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    return [
        f"dscache: backends {', '.join(cores)}; {_backend.BACKEND} by default",
        f"libraries: {', '.join(versions)}",
        f"servers: {', '.join(map(_server_id, SERVERS)) or 'none'}",
        f"twemproxy: {find_twemproxy() or UNFETCHED}",
        f"prometheus: {find_prometheus() or UNFETCHED}",
        f"Django's tests: {find_django_tests() or UNFETCHED}",
        f"absent: {'; '.join(_absent()) or 'nothing'}",
    ]


def _absent() -> Iterator[str]:
    """Yield the optional programs that aren't here, and what replaces them."""
    if not (shutil.which("node") and shutil.which("npm")):
        yield "Node and npm: a recording is deepstream's connector, and tests/deepstream is skipped"
    if not (shutil.which("node") and DEEPSTREAM_SERVER.exists()):
        yield "deepstream's server (`npm install` in examples/deepstream), so its test is left out"
    if not any(binary.tls for binary in BINARIES):
        yield "a server with TLS, so proxies speak it"
    if len(OLDEST_AND_NEWEST) < 2:
        yield "a second server version, so one stands for the oldest and the newest"
    if not WITHOUT_DATABASES:
        yield "a server whose clusters have one database only, so a test of it is skipped"
    if sys.version_info < (3, 12):
        yield "eager tasks, which Python 3.12 brings"


def _where(module: str) -> str:
    try:
        return os.path.basename(importlib.import_module(module).__file__ or "?")
    except ImportError as error:
        return f"missing: {error}"


def pytest_configure(config: pytest.Config) -> None:
    # A background run may start with Ctrl-C ignored, and every process started here would inherit
    # that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("numprocesses", None):
        _check_cores()  # here, since what one of several processes finds out is not reported
    scheme = urlsplit(os.environ.get("DSCACHE_TEST_URL") or "redis:").scheme
    if scheme != "redis":
        raise pytest.UsageError(
            f"DSCACHE_TEST_URL begins with {scheme!r}: it must be redis://host:port/db, "
            "as tests put a proxy in front of the server"
        )
    if not SERVERS:
        try:
            find_server()
        except dscache.DscacheError as error:
            raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes run at once: twice as many as the cores, since tests often wait.

    The 36 slowest files take eleven minutes of processor time, their servers included, and wait for
    timers and servers about as long. A named server gets a single process, as each test empties it.
    """
    if os.environ.get("DSCACHE_TEST_URL"):
        return 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return cores * 2


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the slowest files first when files run in parallel, so that none is left for the end.

    Fail the run before its first test if it can't test what it should.
    """
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))
    if any("backend" in getattr(item, "fixturenames", ()) for item in items):
        _check_cores()


def pytest_collection_finish() -> None:
    """Leave what the collection has made out of every garbage collection of the tests."""
    gc.collect()
    gc.freeze()


def _check_cores() -> None:
    for module in CORES.values():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise pytest.UsageError(
                f"{module} can't be imported, and tests need both cores: {error}; "
                "`make build` builds the compiled one"
            ) from error


@pytest.fixture(scope="session")
def running() -> Iterator[Callable[[ServerBinary], EmbeddedServer]]:
    """Return a server of a kind, started at the first request and stopped after the last test."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda binary: stack.enter_context(EmbeddedServer(binary)))


@pytest.fixture(scope="session", params=SERVERS, ids=_server_id)
def server(
    request: pytest.FixtureRequest, running: Callable[[ServerBinary], EmbeddedServer]
) -> EmbeddedServer | NamedServer:
    """A running server: each one found, in turn. Tests share it and leave it as they found it."""
    return request.param if isinstance(request.param, NamedServer) else running(request.param)


@pytest.fixture(params=list(CORES))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The core that new caches use: "fast" and "pure", in turn."""
    name: str = request.param
    monkeypatch.setattr(_backend, "core", importlib.import_module(CORES[name]))
    monkeypatch.setattr(_backend, "BACKEND", name)
    return name


@pytest.fixture(scope="session")
def shared_redis(server: EmbeddedServer | NamedServer) -> Iterator[redis_py.Redis]:
    """A redis-py client on ``server``, shared because making one costs more than most tests."""
    with redis_py.Redis.from_url(server.url) as client:
        yield client


@pytest.fixture(name="redis")
def redis_client(shared_redis: redis_py.Redis) -> redis_py.Redis:
    """A redis-py client on ``server``, whose database has just been emptied."""
    shared_redis.flushdb()
    return shared_redis


MakeServer = Callable[..., EmbeddedServer]


@pytest.fixture
def make_server(server: EmbeddedServer | NamedServer) -> Iterator[MakeServer]:
    """Start more servers of the kind of ``server``, to configure, stop and break at will.

    ``make_server(*args, unix_socket=False, tls=None)``; ``args`` are command-line options.
    """
    binary = server.binary if isinstance(server, EmbeddedServer) else find_server()
    started: list[EmbeddedServer] = []

    def start(*args: str, unix_socket: bool = False, tls: TLSFiles | None = None) -> EmbeddedServer:
        new = EmbeddedServer(binary, unix_socket=unix_socket, tls=tls, args=args)
        started.append(new)
        new.start()
        return new

    yield start
    for one in started:
        one.kill()  # it has nothing to save, and would take a while to notice the signal to end
        one.close()


@pytest.fixture
def unix_server(make_server: MakeServer) -> EmbeddedServer:
    """A private server that listens only on a unix socket."""
    return make_server(unix_socket=True)


MakeCache = Callable[..., Awaitable["dscache.AsyncCache"]]


@pytest.fixture
def cache_class() -> Any:
    """The class that ``make_cache`` opens; a module may override it."""
    return dscache.AsyncCache


@pytest.fixture
async def make_cache(
    server: EmbeddedServer | NamedServer, backend: str, redis: redis_py.Redis, cache_class: Any
) -> AsyncIterator[MakeCache]:
    """Open caches on ``server``; they are closed at the end, when each must be drained.

    ``await make_cache(**options)`` takes the options of the YAML, with PATIENT as defaults.
    ``url``, ``path``, ``host`` or ``port`` lead to another server; ``name="memory"`` makes a cache
    without a server.
    """
    opened: list[dscache.AsyncCache] = []

    async def open_cache(*, name: str = "redis", **options: Any) -> dscache.AsyncCache:
        if name == "redis" and not options.keys() & {"url", "path", "host", "port"}:
            options["url"] = server.url
        config = {"name": name, "options": PATIENT | options}
        cache: dscache.AsyncCache = cache_class.from_config(config)
        opened.append(cache)
        await cache.when_ready()
        return cache

    yield open_cache
    for cache in opened:
        await cache.close()
    for cache in opened:
        counters = {name: cache.stats()[name] for name in DRAINED}
        assert not any(counters.values()), f"{cache.description}: not drained: {counters}"


@pytest.fixture
async def cache(make_cache: MakeCache) -> dscache.AsyncCache:
    """An open cache on ``server`` with ``backend`` and default options."""
    return await make_cache()


@pytest.fixture
async def proxy(server: EmbeddedServer | NamedServer) -> AsyncIterator[FaultProxy]:
    """A proxy in front of ``server`` that fails on command."""
    async with FaultProxy(server.host, server.port) as started:
        yield started


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> TLSFiles:
    """A certificate for 127.0.0.1 and localhost, its key, and the authority that issued it."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    files = TLSFiles(*(str(folder / name) for name in ("cert.pem", "key.pem", "ca.pem")))
    authority.cert_pem.write_to_path(files.authority)
    issued.private_key_pem.write_to_path(files.key)
    issued.cert_chain_pems[0].write_to_path(files.certificate)
    return files


@pytest.fixture
async def tls_proxy(
    server: EmbeddedServer | NamedServer, certificates: TLSFiles
) -> AsyncIterator[FaultProxy]:
    """A proxy that speaks TLS with the certificate of ``certificates`` and fails on command."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certificate, certificates.key)
    async with FaultProxy(server.host, server.port, tls=context) as started:
        yield started


@pytest.fixture(scope="module", params=OLDEST_AND_NEWEST, ids=lambda binary: binary.name)
def binary(request: pytest.FixtureRequest) -> ServerBinary:
    """The kind of a module's own servers: the oldest and the newest. A module may override it."""
    return request.param


@pytest.fixture(scope="module")
def shared_group(binary: ServerBinary) -> Iterator[ClusterGroup]:
    """Three primaries with a replica each; the cluster keeps serving when one node is lost.

    A module may override it with another cluster.
    """
    with cluster_rows.start(binary) as started:
        yield started


@pytest.fixture
def group(shared_group: ClusterGroup) -> ClusterGroup:
    """The shared group, whole and empty again whatever the last test did to it."""
    shared_group.heal()
    for primary in shared_group.primaries():
        primary.ask("FLUSHALL")
    return shared_group


@pytest.fixture(scope="session")
def guarded_group() -> Iterator[ClusterGroup]:
    """A cluster of nodes with different passwords and one without. Tests don't change them."""
    with ClusterGroup(BY_AGE[0], replicas=0, passwords=[OWN, SHARED, None]) as started:
        yield started
