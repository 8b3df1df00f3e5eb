"""The examples run, and do on a real server what they claim."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import redis as redis_py
from websockets.sync.client import connect

import dscache
from dscache.embedded import EmbeddedServer
from tests.conftest import DEEPSTREAM, DEEPSTREAM_SERVER
from tests.support.documents import PROJECT, blocks

EXAMPLES = PROJECT / "examples"
PATIENCE = 60


@pytest.fixture(scope="module")
def shared() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as started:
        yield started


@pytest.fixture
def private(shared: EmbeddedServer) -> EmbeddedServer:
    """An empty server."""
    with redis_py.Redis.from_url(shared.url) as client:
        client.flushall()
    return shared


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, folder: Path = PROJECT, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Run a server; at the end it must stop by Ctrl-C, without a traceback."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        yield process
        assert process.poll() is None, log.read_text()
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text(), log.read_text()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], log: Path) -> Any:
    """Return the result of ``condition`` once it is true, while the process runs."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, httpx.HTTPError):
            if result := condition():
                return result
        time.sleep(0.02)
    raise AssertionError(log.read_text())


# -- FastAPI


@pytest.fixture
def fastapi_url(private: EmbeddedServer, tmp_path: Path) -> Iterator[str]:
    port, log = free_port(), tmp_path / "log"
    command = ["-m", "uvicorn", "--app-dir", "examples", "fastapi_service:app", "--port"]
    served = running([sys.executable, *command, str(port)], log, REDIS_URL=private.url)
    with served as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: httpx.get(f"{url}/records/none").status_code == 404, process, log)
        yield url


def test_fastapi(fastapi_url: str, private: EmbeddedServer) -> None:
    record = f"{fastapi_url}/records/room/1"
    watch = f"{fastapi_url}/watch/room/1".replace("http", "ws")
    with httpx.Client(timeout=PATIENCE) as http, connect(watch) as early:
        assert http.put(record, params={"version": 1}, json={"open": True}).status_code == 204
        read = http.get(record)
        assert (read.content, read.headers["etag"]) == (b'{"open":true}', '"1"')
        assert read.headers["content-type"] == "application/json"

        stale = http.put(record, params={"version": 1}, json={})
        assert (stale.status_code, stale.json()["detail"]) == (409, "room/1 has version 1 already")
        bad = http.put(record, params={"version": -1}, json={})
        assert (bad.status_code, bad.json()["detail"][:15]) == (422, "record 'room/1'")
        with redis_py.Redis.from_url(private.url) as client:
            client.mset({"room/2_v": "two", "room/2_d": "{}"})
        damaged = http.get(f"{fastapi_url}/records/room/2")
        assert (damaged.status_code, damaged.json()["detail"][:15]) == (500, "record 'room/2'")

        assert early.recv(PATIENCE) == '{"open":true}'
        with connect(watch) as late, dscache.Cache.from_config(private.url) as elsewhere:
            assert late.recv(PATIENCE) == '{"open":true}'
            # Any writer's record: text in a format that only this writer uses arrives as it is
            # stored.
            elsewhere.set("room/1", 2, msgspec.Raw(b'{ "open" : false, "by": "\\u00c4da" }'))
            for client in (early, late):
                assert client.recv(PATIENCE) == '{ "open" : false, "by": "\\u00c4da" }'
        elsewhere_again = http.put(record, params={"version": 3}, json=[])
        assert elsewhere_again.status_code == 204
        assert early.recv(PATIENCE) == "[]"
        with dscache.Cache.from_config(private.url) as cache:
            cache.set("room/1", 3, {"open": True})  # no condition, so any version is written
        assert early.recv(PATIENCE) == '{"open":true}'


def test_fastapi_while_redis_is_down(private: EmbeddedServer, fastapi_url: str) -> None:
    record = f"{fastapi_url}/records/room/1"
    with httpx.Client(timeout=PATIENCE) as http:
        private.stop()
        try:
            away = http.put(record, params={"version": 1}, json={})
            assert away.status_code == 503, away.text
        finally:
            private.start()
        back = http.put(record, params={"version": 1}, json={})
        while back.status_code == 503:
            back = http.put(record, params={"version": 1}, json={})
        assert back.status_code in (204, 409)


# -- Flask


def test_flask(private: EmbeddedServer, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "flask", "--app", "examples/flask_service.py", "run", "--port"]
    url = f"http://127.0.0.1:{port}/polls/lunch"
    with (
        running([*command, str(port)], log, REDIS_URL=private.url) as process,
        httpx.Client(timeout=PATIENCE) as http,
    ):
        wait_for(lambda: http.get(url).status_code == 404, process, log)
        with ThreadPoolExecutor(8) as threads:
            answers = list(
                threads.map(lambda what: http.post(f"{url}/{what}"), ["pizza", "soup"] * 40)
            )
        assert {answer.status_code for answer in answers} == {200}
        assert http.get(url).json() == {"pizza": 40, "soup": 40}
        with dscache.Cache.from_config(private.url) as cache:
            assert cache.head("poll/lunch") == 80


# -- uvloop


def test_uvloop(private: EmbeddedServer, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(
        [sys.executable, "examples/uvloop_server.py", "0"], log, REDIS_URL=private.url
    ) as process:
        line = wait_for(log.read_text, process, log)
        port = int(line.split()[-1])

        def ask(*lines: str) -> list[Any]:
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
                client.sendall("".join(f"{line}\n" for line in lines).encode())
                client.shutdown(socket.SHUT_WR)
                return [json.loads(answer) for answer in client.makefile()]

        made = '{"do":"score","player":"ada","points":5}'
        show = '{"do":"show","player":"ada"}'
        assert ask(show, made, show) == [None, *[{"points": 5, "games": 1}] * 2]
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(ask, [made] * 20))
        assert ask(show) == [{"points": 105, "games": 21}]

        with dscache.Cache.from_config(private.url) as cache:
            assert cache.get("player/ada") == dscache.Record(
                "player/ada", 21, b'{"points":105,"games":21}'
            )
            cache.set("player/eve", 1, {"points": "many"})
        refused = ask('{"do":"score","player":"eve","points":1}', '{"do":"score","player":7}', "{")
        errors = [one["error"] for one in refused]
        assert errors[0].startswith("record 'player/eve'")
        assert "$.points" in errors[0]
        assert "$.player" in errors[1]
        assert "JSON" in errors[2] or "truncated" in errors[2]


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (["uvloop_server.py"], "usage: python examples/uvloop_server.py PORT\n"),
        (["uvloop_server.py", "http"], "usage: python examples/uvloop_server.py PORT\n"),
        (["deepstream/share.py"], "usage: python share.py NAME [JSON]\n"),
    ],
)
def test_an_example_without_its_argument(words: list[str], usage: str) -> None:
    assert outcome(*words) == (1, "", usage)


def outcome(program: str, *words: str, **environment: str) -> tuple[int, str, str]:
    """Run an example to its end; return its exit status and its output."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / program, *words],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_an_example_whose_port_is_in_use(private: EmbeddedServer) -> None:
    port = str(private.port)
    status, out, err = outcome("uvloop_server.py", port, REDIS_URL=private.url)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("uvloop_server.py: ")
    assert port in err
    assert "address already in use" in err

    words = ("metrics.py", "--url", private.url, "--port")
    assert outcome(*words, port) == (
        1,
        "",
        f"metrics.py: no port {port}: Address already in use; choose another by --port\n",
    )
    status, _, err = outcome(*words, "65536")
    assert status == 2
    assert err.endswith("error: --port must be from 0 to 65535, not 65536\n")


@pytest.mark.parametrize(
    "words", [("uvloop_server.py", "0"), ("metrics.py", "--url"), ("deepstream/share.py", "user/1")]
)
def test_an_example_without_redis(words: tuple[str, ...]) -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    given = (*words, url) if words[-1] == "--url" else words
    host, port = url.removeprefix("redis://").split(":")
    environment = {"REDIS_URL": url, "REDIS_HOST": host, "REDIS_PORT": port}
    status, out, err = outcome(*given, **environment)
    assert (status, out) == (1, "")
    assert "Traceback" not in err
    name = Path(words[0]).name
    assert err.splitlines()[-1].startswith(f"{name}: no connection to {host}:{port} ")


def test_sharing_something_that_is_not_json(private: EmbeddedServer) -> None:
    environment = {"REDIS_HOST": private.host, "REDIS_PORT": str(private.port)}
    status, out, err = outcome("deepstream/share.py", "user/1", "{", **environment)
    assert (status, out, err) == (1, "", "{ is not JSON: Input data was truncated\n")


# -- deepstream


def share(server: EmbeddedServer, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "share.py", *arguments],
        cwd=DEEPSTREAM,
        env={**os.environ, "REDIS_HOST": server.host, "REDIS_PORT": str(server.port)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    return done.stdout


def recorded() -> list[dict[str, Any]]:
    """Return the recorded output of deepstream's own connector, for the plainest cases."""
    path = PROJECT / "tests" / "api" / "golden" / "stored_by_connector.json"
    vectors = json.loads(path.read_text(encoding="utf-8"))["vectors"]
    return [vector for vector in vectors if vector["id"] in ("g001", "g002", "g004")]


def test_sharing_records_with_deepstream(private: EmbeddedServer) -> None:
    with redis_py.Redis.from_url(private.url) as client:
        vectors = recorded()
        assert len(vectors) == 3
        for vector in vectors:
            for stored in vector["stored"]:
                client.set(base64.b64decode(stored["key"]), base64.b64decode(stored["value"]))
            name, version, data = (vector[key] for key in ("name", "version", "data"))
            assert share(private, name) == f"{name} {version} {data}\n"

            # And back: dscache writes what the connector would have stored.
            client.delete(f"{name}_v", f"{name}_d")
            assert share(private, name) == f"{name} None\n"
            assert share(private, name, data) == f"{name} 1 {data}\n"
            for stored in vector["stored"]:
                if stored["key_text"].endswith("_d"):
                    assert client.get(base64.b64decode(stored["key"])) == base64.b64decode(
                        stored["value"]
                    )
            assert client.get(f"{name}_v") == b"1"
            assert share(private, name, "{}") == f"{name} 2 {{}}\n"


def printed() -> list[str]:
    (text,) = (one.text for one in blocks(DEEPSTREAM / "README.md") if one.language == "text")
    return text.splitlines(keepends=True)


def test_the_readme_of_sharing_shows_the_output(private: EmbeddedServer) -> None:
    ada, lovelace = '{"firstname":"Ada"}', '{"firstname":"Ada","lastname":"Lovelace"}'
    assert share(private, "user/1", ada) == printed()[1]
    assert share(private, "user/1", lovelace) == printed()[2]


def real_server(private: EmbeddedServer, tmp_path: Path) -> None:
    """The README's example, with a deepstream server and client on Node."""
    environment = {
        "REDIS_HOST": private.host,
        "REDIS_PORT": str(private.port),
        "DEEPSTREAM_PORT": str(free_port()),
    }

    def client(*arguments: str) -> str:
        return subprocess.run(
            ["node", "client.js", *arguments],
            cwd=DEEPSTREAM,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        ).stdout

    ada, lovelace = '{"firstname":"Ada"}', '{"firstname":"Ada","lastname":"Lovelace"}'
    command = ["node", str(DEEPSTREAM_SERVER), "start", "-c", "config.yml"]
    log = tmp_path / "log"
    with running(command, log, DEEPSTREAM, **environment) as process:
        wait_for(lambda: "Deepstream started" in log.read_text(), process, log)
        assert client("user/1", ada) == printed()[0]
        assert share(private, "user/1") == printed()[1]
        assert share(private, "user/1", lovelace) == printed()[2]
        assert client("user/1") == printed()[3]


# The header of a run names it as absent otherwise.
if shutil.which("node") and DEEPSTREAM_SERVER.exists():
    test_sharing_with_a_deepstream_server = real_server
