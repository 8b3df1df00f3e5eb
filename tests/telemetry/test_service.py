"""``examples/operations``: the service runs as in its image, and its probes see each incident."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
import yaml

from dscache.embedded import EmbeddedServer
from tests.conftest import SERVERS, MakeServer, _server_id
from tests.support.blocking import until
from tests.support.clusters import hold_port
from tests.support.documents import PROJECT
from tests.support.prometheus import find_promtool, promtool

FOLDER = PROJECT / "examples" / "operations"
(COMMAND,) = re.findall(r"^CMD (.*)$", (FOLDER / "Dockerfile").read_text("utf-8"), re.MULTILINE)
OBJECTS = {one["kind"]: one for one in yaml.safe_load_all((FOLDER / "kubernetes.yml").read_text())}
(CONTAINER,) = OBJECTS["Deployment"]["spec"]["template"]["spec"]["containers"]
COMPOSED = yaml.safe_load((FOLDER / "compose.yml").read_text())["services"]["service"]
PORT = CONTAINER["ports"][0]["containerPort"]
PATIENCE = 60

on_one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)


class Service:
    """The process that the image starts, with another port and another Redis."""

    def __init__(self, redis_port: int, folder: Path, command_timeout: int) -> None:
        held = hold_port()
        self.port = held.getsockname()[1]
        held.close()
        self._written = folder / "log"
        configuration = yaml.safe_load((FOLDER / "config.yml").read_text())
        if command_timeout:
            configuration["cache"]["options"]["commandTimeout"] = command_timeout
        (folder / "config.yml").write_text(yaml.safe_dump(configuration))
        words = json.loads(COMMAND)
        assert words.count(str(PORT)) == 1
        words = [str(self.port) if word == str(PORT) else word for word in words]
        assert words[0] == "uvicorn"
        with open(self._written, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=FOLDER,
                env={
                    **{name: text for name, text in os.environ.items() if "PROXY" not in name},
                    "CONFIG": str(folder / "config.yml"),
                    "REDIS_HOST": "127.0.0.1",
                    "REDIS_PORT": str(redis_port),
                    "PYTHONPATH": str(PROJECT),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> str:
        return self._written.read_text()

    def get(self, path: str) -> tuple[int, str]:
        """Return the status and the text of an answer; 0 if the service takes no connection."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except (urllib.error.URLError, ConnectionError):
            return 0, ""

    def probe(self, kind: str) -> bool:
        """Return whether a probe of Kubernetes succeeds."""
        asked = CONTAINER[f"{kind}Probe"]["httpGet"]
        assert asked["port"] == CONTAINER["ports"][0]["name"]
        return 200 <= self.get(asked["path"])[0] < 400

    def end(self) -> int:
        """Return the exit status after the signal of Docker and Kubernetes."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


Start = Callable[..., Service]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Service] = []

    def start_service(redis_port: int, command_timeout: int = 0) -> Service:
        started.append(Service(redis_port, tmp_path, command_timeout))
        return started[-1]

    yield start_service
    for service in started:
        service.process.kill()
        service.process.wait()


def ready(start: Start, server: EmbeddedServer, command_timeout: int = 0) -> Service:
    """Start a service, and wait until it is ready."""
    service = start(server.port, command_timeout)
    until(lambda: service.probe("startup"), "the start")
    assert service.probe("readiness")
    return service


@on_one_server
def test_the_probes_see_each_incident(start: Start, make_server: MakeServer) -> None:
    """One service, as it takes seconds to start."""
    server = make_server()
    service = ready(start, server)
    with redis_py.Redis(port=server.port) as redis:
        redis.mset({"user/1_v": 3, "user/1_d": '{"a":1}'})
    it_serves_what_the_manifests_ask_for(service)
    a_silent_redis_holds_no_probe_up(service, server)
    without_redis_it_lives_and_is_not_ready(service, server)
    server.pause()
    try:
        answer = in_background(lambda: service.get("/records/unread"))
        until(lambda: is_under_way(service) or answer.done(), "the request")
        # The end takes no longer than the operations under way.
        assert service.end() in (0, -signal.SIGTERM)
        assert answer.result(PATIENCE)[0] == 503
    finally:
        server.resume()
    assert service.get("/live")[0] == 0
    assert healthcheck(service) != 0
    assert "Finished server process" in service.log
    assert "Traceback" not in service.log


def it_serves_what_the_manifests_ask_for(service: Service) -> None:
    assert service.probe("liveness")
    assert service.get("/records/user/1") == (200, '{"a":1}')
    assert service.get("/records/none")[0] == 404
    annotations = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    status, text = service.get(annotations["prometheus.io/path"])
    assert status == 200
    assert 'dscache_ready{cache="records"} 1.0' in text
    assert healthcheck(service) == 0
    if find_promtool() is not None:
        own = [line for line in text.splitlines(keepends=True) if "dscache_" in line]
        assert promtool("check", "metrics", given="".join(own)) == ""


def a_silent_redis_holds_no_probe_up(service: Service, server: EmbeddedServer) -> None:
    """The request ends by commandTimeout, and the probes take no round trip."""
    server.pause()
    try:
        answer = in_background(lambda: service.get("/records/unread"))
        assert service.probe("liveness")
        assert service.get("/metrics")[0] == 200
        assert answer.result(PATIENCE)[0] == 503
        # The heartbeat finds out.
        until(lambda: not service.probe("readiness"), "the heartbeat")
        assert service.probe("liveness")
    finally:
        server.resume()
    until(lambda: service.probe("readiness"), "the return")


def without_redis_it_lives_and_is_not_ready(service: Service, server: EmbeddedServer) -> None:
    server.kill()
    until(lambda: not service.probe("readiness"), "the loss")
    for _ in range(3):
        assert not service.probe("readiness")
        assert service.probe("liveness")
    assert healthcheck(service) != 0
    status, text = service.get("/records/user/1")
    assert status == 503
    assert "127.0.0.1" in json.loads(text)["detail"]
    assert 'dscache_ready{cache="records"} 0.0' in service.get("/metrics")[1]
    server.restart()
    until(lambda: service.probe("readiness"), "the return")
    assert service.get("/records/user/1")[0] == 404


def test_without_redis_at_the_start_the_log_has_the_reason(start: Start) -> None:
    held = hold_port()  # which nothing listens on
    try:
        service = start(held.getsockname()[1])
        assert service.process.wait(PATIENCE) > 0
    finally:
        held.close()
    assert re.search(r"no connection to 127\.0\.0\.1:\d+ within 2000 ms", service.log)


@on_one_server
def test_the_end_waits_for_the_requests_under_way(start: Start, make_server: MakeServer) -> None:
    server = make_server()
    service = ready(start, server, command_timeout=60_000)
    server.pause()
    try:
        answer = in_background(lambda: service.get("/records/slow"))
        until(lambda: is_under_way(service), "the request")
        service.process.send_signal(signal.SIGTERM)
        # No new request is taken: a client that still sends one sees a refusal, and doesn't hang.
        until(lambda: service.get("/ready")[0] == 0, "the refusal")
        assert not answer.done()
    finally:
        server.resume()
    assert answer.result(PATIENCE)[0] == 404
    assert service.process.wait(PATIENCE) in (0, -signal.SIGTERM)


def healthcheck(service: Service) -> int:
    """Return the status of the check in compose.yml."""
    kind, program, *arguments = COMPOSED["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python")
    arguments = [text.replace(f":{PORT}/", f":{service.port}/") for text in arguments]
    done = subprocess.run([sys.executable, *arguments], stderr=subprocess.DEVNULL, check=False)
    return done.returncode


def is_under_way(service: Service) -> bool:
    text = service.get("/metrics")[1]
    (value,) = re.findall(r"^dscache_pending_operations\{.*\} (\S+)", text, re.MULTILINE)
    return float(value) > 0


def in_background(call: Callable[[], Any]) -> Future[Any]:
    """Begin a call in a thread of its own."""
    future: Future[Any] = Future()
    threading.Thread(target=lambda: future.set_result(call())).start()
    return future
