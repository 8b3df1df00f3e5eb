"""A blocking near cache in processes that fork, that end, and that run greenlets."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from gunicorn import config

from dscache.embedded import EmbeddedServer, ServerBinary
from tests.conftest import BY_AGE
from tests.programs.near_exit import SCENES
from tests.support.blocking import PATIENCE, run_child, until
from tests.support.near_truth import Truth, links, putting

_ROOT = Path(__file__).parents[2]
GENERATIONS = 10


@pytest.fixture(scope="module")
def server(running: Callable[[ServerBinary], EmbeddedServer]) -> EmbeddedServer:
    """Only the newest server: the client is under test."""
    return running(BY_AGE[-1])


@pytest.fixture
def redis(server: EmbeddedServer) -> Iterator[redis_py.Redis]:
    """A client of the server, whose database is empty."""
    with redis_py.Redis.from_url(server.url) as client:
        client.flushdb()
        yield client


def assert_none_left(redis: redis_py.Redis) -> None:
    until(lambda: not any(links(redis, "near-reader")), "the end of all connections")


@pytest.mark.parametrize(
    ("scene", "count"), [("generations", GENERATIONS), ("threads", 8), ("fork", 2), ("spawn", 2)]
)
def test_forks(
    server: EmbeddedServer, redis: redis_py.Redis, backend: str, scene: str, count: int
) -> None:
    where = json.dumps({"url": server.url, "connectionName": "near-reader"})
    result = run_child("near_forks.py", scene, where, str(count), backend=backend)
    assert result == {"wrong": []}
    assert_none_left(redis)


@pytest.mark.parametrize("scene", SCENES)
def test_ends(server: EmbeddedServer, redis: redis_py.Redis, backend: str, scene: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.near_exit", scene, server.url],
        cwd=_ROOT,
        env={**os.environ, "DSCACHE_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_that_hits(
    server: EmbeddedServer, backend: str, number: signal.Signals
) -> None:
    """As it ends any other program; of Ctrl-C the interpreter tells itself."""
    program = (
        "import sys; sys.argv[1:] = ['without_close', %r]; from tests.programs import near_exit; "
        "cache = near_exit.opened(); print('warm', flush=True); near_exit.hit(cache)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program % server.url],
        cwd=_ROOT,
        env={**os.environ, "DSCACHE_BACKEND": backend},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "warm\n"
        process.send_signal(number)
        _, told = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -number
    expected = "KeyboardInterrupt" if number == signal.SIGINT else ""
    assert told.strip().rpartition("\n")[2] == expected
    assert told.count("Traceback") == (number == signal.SIGINT)


def test_a_process_that_stops_for_a_while(
    server: EmbeddedServer, redis: redis_py.Redis, backend: str
) -> None:
    """No thread that goes on reads a record whose change the near cache's thread couldn't hear."""
    idle_limit, rounds = 0.3, 3
    options = {"url": server.url, "commandTimeout": 20_000}
    where = {"options": options, "near": {"idleLimit": round(idle_limit * 1000)}}
    redis.mset({"a_v": 1, "a_d": 1})
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.programs.near_stopped"),
            *(json.dumps(where), str(rounds)),
        ],
        cwd=_ROOT,
        env={**os.environ, "DSCACHE_BACKEND": backend},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for version in range(2, rounds + 2):
            assert process.stdout.readline() == "warm\n"
            process.send_signal(signal.SIGSTOP)
            redis.set("a_v", version)
            written = time.monotonic()
            time.sleep(2 * idle_limit)
            process.send_signal(signal.SIGCONT)
            last = json.loads(process.stdout.readline())
            assert last - written <= idle_limit
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.communicate()


def test_greenlets(server: EmbeddedServer, redis: redis_py.Redis, backend: str) -> None:
    result = run_child("near_greenlets.py", server.url, backend=backend)
    assert result == {
        "wrong": [],
        "readers": 20,
        "hits": 1000,
        "listening": 1,
        "native_threads": 1,
        "others_ran": True,
    }


# -- gunicorn

WORKERS = 3
# Some versions serve a socket for commands by default.
_WITHOUT_MORE = ["--no-control-socket"] if hasattr(config, "ControlSocketDisable") else []


@contextmanager
def gunicorn(url: str, backend: str, tmp_path: Path, *options: str) -> Iterator[int]:
    """Serve tests.programs.near_app, loaded before the workers are forked; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener, (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn", "--preload", "--workers", str(WORKERS)),
                *("--bind", f"fd://{listener.fileno()}", "--worker-tmp-dir", str(tmp_path)),
                *("--graceful-timeout", "20", *_WITHOUT_MORE, *options),
                "tests.programs.near_app:app",
            ],
            cwd=_ROOT,
            env={**os.environ, "DSCACHE_BACKEND": backend, "NEAR_URL": url},
            pass_fds=[listener.fileno()],
            stdout=log,
            stderr=log,
        )
        try:
            yield listener.getsockname()[1]
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
            process.wait()
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text, text


def ask(port: int, name: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", f"/{name}")
        told: dict[str, Any] = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    return told


@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_gunicorn_that_loads_it_before_it_forks(
    server: EmbeddedServer, redis: redis_py.Redis, backend: str, tmp_path: Path, kind: str
) -> None:
    put = putting(redis)
    truth = Truth(["warm", "a"], PATIENCE)
    truth.write(put)
    workers: set[int] = set()

    def have_all(wanted: Callable[[dict[str, Any]], bool]) -> bool:
        """Whether each worker answers so; a worker that doesn't is asked again."""
        seen: set[int] = set()
        for _ in range(100):
            told = ask(port, "warm")
            assert told["process"] != told["master"]
            assert told["warm"]
            workers.add(told["process"])
            if wanted(told):
                seen.add(told["process"])
            if len(seen) == WORKERS:
                return True
        return False

    with gunicorn(server.url, backend, tmp_path, "--worker-class", kind) as port:
        truth.write(put)  # after the cache was warm
        first: dict[int, int] = {}
        while len(first) < WORKERS:
            told = ask(port, "warm")
            first.setdefault(told["process"], told["version"])
        assert set(first.values()) == {truth.issued["warm"]}
        for _ in range(5):
            until(lambda: have_all(lambda told: told["is_at_hand"]), "a hit in each worker")
            truth.write(put)
            last = truth.issued["warm"]
            until(
                lambda last=last: have_all(lambda told: told["version"] == last),
                "the last version in each worker",
            )
        assert len(workers) == WORKERS
        victim = next(iter(workers))
        os.kill(victim, signal.SIGKILL)  # another one takes its place
        truth.write(put)
        until(lambda: have_all(lambda told: told["version"] == truth.issued["warm"]), "the last")
    assert_none_left(redis)
