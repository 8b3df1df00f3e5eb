"""top: the load of servers and of a program's caches."""

from __future__ import annotations

import asyncio
import http.server
import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import prometheus_client
import pytest
import redis as redis_py
from rich.console import Console

import dscache
from dscache.admin import program_load
from dscache.admin.program_load import WatchedProgram
from dscache.admin.server_load import CommandLoad, NodeLoad, ServerLoad, _with_slow, watched_servers
from dscache.cli.top import document, page
from dscache.config import load
from dscache.embedded import EmbeddedServer, ServerBinary
from dscache.prometheus import CacheCollector
from tests.support.clusters import ClusterGroup
from tests.support.commands import PATIENCE, Done, invoke, on_terminal, plain, run, running

# Intervals that make the tests short.
QUICK = ("--interval", "0.1")


@pytest.fixture(scope="module")
def looked_at(binary: ServerBinary) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(binary) as started:
        yield started


@pytest.fixture
def client(looked_at: EmbeddedServer) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(looked_at.url, decode_responses=True) as opened:
        opened.flushall()
        opened.config_set("maxmemory", 0)
        yield opened
        opened.config_set("maxmemory", 0)


@contextmanager
def load_on(client: redis_py.Redis) -> Iterator[None]:
    """Read two keys that are there, and one that isn't, again and again."""
    ended = threading.Event()
    client.mset({"a_v": 1, "a_d": "{}"})

    def work() -> None:
        while not ended.wait(0.002):
            client.mget("a_v", "a_d", "no")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# -- servers


def test_a_pipe_gets_one_table(looked_at: EmbeddedServer, client: redis_py.Redis) -> None:
    with load_on(client):
        done = run("top", "--url", looked_at.url, *QUICK)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    place = f"{looked_at.host}:{looked_at.port}"
    assert re.match(rf"{place}: 1 node, [\d,]+ ops/s, [\d.]+ [kM]B used, \d+ clients$", lines[0])
    heads = ["node", "role", "ops/s", "hits", "µs/op", "p99 µs", "ping ms", "memory", "clients"]
    assert re.split("  +", lines[2].strip()) == [*heads, "in/s", "out/s"]
    assert lines[4].split()[0] == place
    assert "66.7 %" in lines[4]
    assert any(line.startswith("mget ") for line in lines)


def test_one_json_document(looked_at: EmbeddedServer, client: redis_py.Redis) -> None:
    client.config_set("maxmemory", 10**9)
    with load_on(client):
        done = invoke("top", "--url", looked_at.url, "--json", "--once", *QUICK)
    assert (done.status, done.err) == (0, "")
    (node,) = done.document["nodes"]
    assert node["address"] == f"{looked_at.host}:{looked_at.port}"
    assert (node["role"], node["down"], node["slow"], node["evicted"]) == ("primary", None, "", 0)
    assert node["hits"] == pytest.approx(2 / 3, abs=1e-4)
    assert node["max_memory"] == 10**9
    assert 0 < node["used_memory"] < 10**9
    for name in ("operations", "microseconds", "round_trip_ms", "received", "sent", "clients"):
        assert node[name] > 0, name
    assert done.document["commands"]["mget"] == node["commands"]["mget"]
    assert node["commands"]["mget"]["per_second"] > 0


def test_lines_of_json_until_a_signal(looked_at: EmbeddedServer, client: redis_py.Redis) -> None:
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with running("top", "--url", looked_at.url, "--json", *QUICK) as process:
            assert process.stdout
            assert process.stderr
            for _ in range(2):
                line = json.loads(process.stdout.readline())
                assert line.keys() == {"time", "nodes", "commands"}
            process.send_signal(number)
            assert process.wait(PATIENCE) == status
            assert process.stderr.read() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_live_screen(
    looked_at: EmbeddedServer, client: redis_py.Redis, number: signal.Signals
) -> None:
    with on_terminal("top", "--url", looked_at.url, *QUICK, columns=130) as terminal:
        terminal.until(r"\d\d:\d\d:\d\d, every 0.1 s, Ctrl-C ends")
        terminal.until(rf"{looked_at.host}:{looked_at.port} +primary")
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 1)
        terminal.until(r"\d+% of maxmemory used")
        terminal.process.send_signal(number)
        status, written = terminal.rest()
    assert status == 128 + number
    assert "Traceback" not in written
    # The screen before is back, and the cursor is shown.
    assert written.index("\x1b[?1049h") < written.rindex("\x1b[?1049l")
    assert written.rindex("\x1b[?25l") < written.rindex("\x1b[?25h")


def test_a_narrow_terminal(looked_at: EmbeddedServer, client: redis_py.Redis) -> None:
    with on_terminal("top", "--url", looked_at.url, "--once", *QUICK, columns=80) as terminal:
        status, written = terminal.rest()
    assert (status, "?1049" in written) == (0, False)
    lines = plain(written).splitlines()
    assert max(map(len, lines)) <= 80
    assert "µs/op" in lines[2]
    assert "in/s" not in lines[2]


def test_the_help_says_what_a_pipe_gets() -> None:
    told = " ".join(invoke("top", "--help").out.split())
    assert "In a pipe it prints one table and ends." in told
    assert "--json Print a JSON object at each interval, until Ctrl-C; one with --once." in told
    assert "by default when the output isn't a terminal" not in told


def test_an_unreachable_server() -> None:
    done = run("top", "--url", "127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "dscache: no connection to 127.0.0.1:1: Connection refused\n"


async def test_a_server_that_restarts(binary: ServerBinary) -> None:
    with EmbeddedServer(binary) as server:
        async with watched_servers(load(server.url)) as watched:
            (first,) = (await watched.look()).nodes
            assert (first.operations, first.hits, first.microseconds) == (None, None, None)
            (second,) = (await watched.look()).nodes
            assert second.operations is not None
            assert second.operations > 0
            server.kill()
            (lost,) = (await watched.look()).nodes
            assert lost.down is not None
            server.start()
            (again,) = (await watched.look()).nodes
            assert (again.down, again.operations) == (None, None)
            (last,) = (await watched.look()).nodes
            assert last.operations is not None


async def test_counters_that_begin_anew(looked_at: EmbeddedServer, client: redis_py.Redis) -> None:
    async with watched_servers(load(looked_at.url)) as watched:
        client.mget(["no"] * 5)
        await watched.look()
        client.config_resetstat()
        (node,) = (await watched.look()).nodes
        assert node.operations is None
        assert node.hits is None


async def test_all_nodes_of_a_cluster(group: ClusterGroup) -> None:
    seed, lost = group.primaries()[0], group.replicas()[0]
    addresses = {f"{node.host}:{node.port}" for node in group.nodes}
    config = load(f"{seed.host}:{seed.port}", options={"slotsRefreshInterval": 100})
    async with watched_servers(config) as watched, asyncio.timeout(PATIENCE):
        nodes = (await watched.look()).nodes
        # A node that has just joined may not have heard of all replicas.
        while {node.address for node in nodes} != addresses:
            await asyncio.sleep(0.05)
            nodes = (await watched.look()).nodes
        nodes = (await watched.look()).nodes
        assert [node.role for node in nodes] == 3 * ["primary"] + 3 * ["replica"]
        assert all(node.operations for node in nodes)
        group.kill(lost)
        down = [node.address for node in (await watched.look()).nodes if node.down]
        assert down == [f"{lost.host}:{lost.port}"]


def test_keys_that_are_evicted(looked_at: EmbeddedServer, client: redis_py.Redis) -> None:
    client.config_set("maxmemory-policy", "allkeys-random")
    limit = client.info("memory")["used_memory"] + 200_000
    ended = threading.Event()

    def fill() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            client.set(f"k{number}", "x" * 1000)

    client.config_set("maxmemory", limit)
    thread = threading.Thread(target=fill)
    thread.start()
    try:
        done = invoke("top", "--url", looked_at.url, "--once", "--interval", "0.5")
    finally:
        ended.set()
        thread.join()
        client.config_set("maxmemory-policy", "noeviction")
    assert re.search(rf"{looked_at.port}: evicts [\d,]+ keys a second", done.out), done


# -- slow nodes

NODE = NodeLoad("a:1", role="primary", round_trip_ms=0.3, microseconds=20.0)


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (NODE, ""),
        (replace(NODE, round_trip_ms=0.8), ""),  # slower than the others, and fast
        (replace(NODE, round_trip_ms=4.0), "round trip 4.00 ms, the others 0.30 ms"),
        (replace(NODE, microseconds=400.0), ""),
        (replace(NODE, microseconds=900.0), "900 µs a command, the others 20 µs"),
        (replace(NODE, microseconds=900.0, role="replica"), ""),  # it does other work
        (replace(NODE, slow="loads its data", round_trip_ms=99.0), "loads its data"),
        (replace(NODE, down="refused", round_trip_ms=None), ""),
    ],
)
def test_a_slow_node(odd: NodeLoad, why: str) -> None:
    others = [replace(NODE, address=f"b:{port}") for port in (1, 2)]
    found = _with_slow([others[0], odd, others[1]])
    assert [node.slow for node in found] == ["", why, ""]


def test_a_slow_node_alone() -> None:
    for node, why in (
        (replace(NODE, round_trip_ms=12.0), "round trip 12.00 ms"),
        (replace(NODE, microseconds=20_000.0), "20,000 µs a command"),
        (NODE, ""),
    ):
        assert _with_slow([node])[0].slow == why


def test_slow_nodes_and_lost_ones_are_named() -> None:
    nodes = (
        replace(NODE, slow="loads its data", commands={"mget": CommandLoad(10, 20, 0.0002)}),
        NodeLoad("b:1", down="\x1b[2Jrefused"),
        replace(NODE, address="c:1", commands={"mget": CommandLoad(30, 40, 0.0012)}),
    )
    written = rendered(ServerLoad(nodes))
    assert "a:1: loads its data" in written
    assert "b:1 is down:" in written
    assert "\x1b" not in written
    # The mean of both nodes, and the sum of their shares.
    assert re.search(r"mget +40 +35\.0 +0\.1", written)


def rendered(report: Any, width: int = 130) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(page(report, "title", width))
    return captured.get()


# -- a program


@contextmanager
def exported(caches: dict[str, Any]) -> Iterator[str]:
    """The metrics endpoint of a program with these caches."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(CacheCollector(caches))
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def test_the_caches_of_a_program(looked_at: EmbeddedServer, client: redis_py.Redis) -> None:
    name = 'of "a\\b"'
    async with dscache.AsyncCache(looked_at.url, nearCache=True) as cache:
        with exported({name: cache, "idle": dscache.Cache("127.0.0.1:1")}) as url:
            watched = WatchedProgram(url)
            await watched.look()
            await cache.set("a", 1, {})
            for _ in range(4):
                await cache.get("a")
            assert await cache.get("no") is None
            report = await watched.look()
    idle, used = report.caches
    assert (idle.name, idle.ready, idle.calls, idle.near) == ("idle", False, None, None)
    assert (used.name, used.ready, used.pending) == (name, True, 0)
    assert used.near == pytest.approx(3 / 5)
    assert used.hits == pytest.approx(1 / 2)
    assert used.failed == 0
    assert used.operations.keys() == {"get", "set"}
    for operation in used.operations.values():
        assert operation.per_second > 0
        assert operation.p50_ms is not None
        assert operation.p99_ms is not None
        assert 0 < operation.p50_ms <= operation.p99_ms
    written = rendered(report)
    assert re.search(r"idle .* not ready", written)
    assert re.search(r"60\.0 % ", written)
    assert document(report)["caches"][1]["near"] == 0.6  # type: ignore[index] # a list of dicts


def test_a_table_and_a_screen_of_a_program(looked_at: EmbeddedServer) -> None:
    with dscache.Cache(looked_at.url) as cache, exported({"main": cache}) as url:
        cache.when_ready()
        done = run("top", "--metrics", url, *QUICK)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(r"^main +0 ", done.stdout, re.MULTILINE)
        with on_terminal("top", "--metrics", url, *QUICK) as terminal:
            terminal.until(r"main +0 ")
            terminal.process.send_signal(signal.SIGINT)
            assert terminal.rest()[0] == 130


def test_a_program_that_ends_while_it_is_shown(looked_at: EmbeddedServer) -> None:
    with ExitStack() as stack, dscache.Cache(looked_at.url) as cache:
        url = stack.enter_context(exported({"main": cache}))
        with on_terminal("top", "--metrics", url, *QUICK) as terminal:
            terminal.until("main ")
            stack.close()
            terminal.until(f"no metrics from {url}: Connection refused")
            terminal.process.terminate()
            assert terminal.rest()[0] == 143


class _Refusing(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/other":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"python_info 1\n# dscache_ready 1\n")
        elif self.path == "/odd":
            self.send_response(200)
            self.end_headers()
            for name, value in (
                ("ready", "1"),
                ("connections", "NaN"),
                ("operations_total", "Inf"),
            ):
                self.wfile.write(f'dscache_{name}{{cache="a"}} {value}\n'.encode())
        else:
            self.send_error(404, "Not \x1b[2J here")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def failure(url: str) -> str:
    done: Done = invoke("top", "--metrics", url, "--once", *QUICK)
    assert (done.status, done.out) == (1, "")
    assert done.err.count("\n") == 1
    assert "\x1b" not in done.err
    return done.err


def test_an_endpoint_without_metrics(endpoint: str) -> None:
    assert f"{endpoint}/other has no metrics of dscache; call dscache." in failure(
        f"{endpoint}/other"
    )
    assert f"{endpoint}/away answers 404" in failure(f"{endpoint}/away?token=secret")
    assert "secret" not in failure(f"{endpoint}/away?token=secret")


def test_a_value_that_is_no_number_counts_as_missing(endpoint: str) -> None:
    done = invoke("top", "--metrics", f"{endpoint}/odd", "--once", "--json", *QUICK)
    (cache,) = done.document["caches"]
    assert (done.status, cache["connections"], cache["calls"]) == (0, 0, None)


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "127.0.0.1:9100", "http://", "http://h:x/m", "http://[x/m", ""),
        "http://me:hidden@127.0.0.1:1/metrics",
    ],
)
def test_an_address_that_is_no_endpoint(url: str) -> None:
    said = failure(url)
    assert "must be http://host:port/path" in said
    assert "hidden" not in said


def test_percentiles_are_interpolated() -> None:
    bounds, counts = [0.001, 0.01, float("inf")], [50.0, 100.0, 100.0]
    assert program_load._percentile(bounds, counts, 0.5) == pytest.approx(1.0)
    assert program_load._percentile(bounds, counts, 0.75) == pytest.approx(5.5)
    # Beyond the last bound nothing is known.
    assert program_load._percentile(bounds, [0, 0, 1.0], 0.99) == pytest.approx(10.0)
