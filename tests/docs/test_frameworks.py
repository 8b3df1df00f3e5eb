"""The programs of the page on frameworks, served and asked."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp.test_utils
import django
import django.conf
import django.test
import httpx
import pytest
from starlette.testclient import TestClient

import dscache
from dscache.embedded import EmbeddedServer
from tests.support.documents import PROJECT, blocks

PAGE = PROJECT / "docs" / "frameworks.md"
PATIENCE = 60
DOCUMENT = {"name": "ada", "visits": 0}


@pytest.fixture(scope="module")
def own_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as started:
        yield started


@pytest.fixture
def records(own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[dscache.Cache]:
    """A cache on the server that the programs find, with one record."""
    monkeypatch.setenv("REDIS_PORT", str(own_server.port))
    with dscache.Cache(own_server.url) as cache:
        cache.delete_bulk(["user/bob", "visits"])
        cache.set("user/ada", 1, DOCUMENT)
        yield cache


def program(heading: str) -> str:
    """Return the program under a heading of the page."""
    text = PAGE.read_text(encoding="utf-8")
    line = text[: text.index(f"## {heading}\n")].count("\n")
    return next(one.text for one in blocks(PAGE) if one.language == "python" and one.line > line)


def load(heading: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": f"page_{heading.lower()}"}
    exec(compile(program(heading), heading, "exec", dont_inherit=True), names)
    return names


def check(get: Callable[[str], Any], path: str) -> None:
    """Check the responses for a record that exists, and for one that doesn't."""
    found = get(path + "ada")
    assert (found.status_code, found.headers["content-type"]) == (200, "application/json")
    assert found.content == b'{"name":"ada","visits":0}'
    assert get(path + "nobody").status_code == 404


def test_fastapi(records: dscache.Cache) -> None:
    with TestClient(load("FastAPI")["app"]) as client:
        check(client.get, "/users/")
        assert client.get("/ready").status_code == 200
        assert [client.post("/users/bob/visits").json() for _ in range(3)] == [1, 2, 3]
    record = records.get("user/bob")
    assert record is not None
    assert record.data == {"name": "bob", "visits": 3}


def test_fastapi_is_not_ready_without_redis(
    records: dscache.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = load("FastAPI")
    with TestClient(names["app"]) as client:
        monkeypatch.setattr(dscache.AsyncCache, "is_ready", False)
        assert client.get("/ready").status_code == 503


def test_starlette(records: dscache.Cache) -> None:
    with TestClient(load("Starlette")["app"]) as client:
        check(client.get, "/records/user/")


def test_flask(records: dscache.Cache) -> None:
    names = load("Flask")
    client = names["app"].test_client()
    assert client.get("/records/user/ada").json == DOCUMENT
    assert client.get("/records/user/nobody").status_code == 404
    names["cache"].close()


async def test_aiohttp(records: dscache.Cache) -> None:
    server = aiohttp.test_utils.TestServer(load("aiohttp")["app"])
    async with aiohttp.test_utils.TestClient(server) as client:
        response = await client.get("/records/user/ada")
        assert (response.status, response.content_type) == (200, "application/json")
        assert await response.json() == DOCUMENT
        assert (await client.get("/records/user/nobody")).status == 404


def test_django(records: dscache.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    if not django.conf.settings.configured:
        django.conf.settings.configure(ALLOWED_HOSTS=["*"], SECRET_KEY="-", DEBUG=False)
        django.setup()
    names = load("Django")
    module = type(sys)("records_of_a_project")
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with django.test.override_settings(ROOT_URLCONF=module.__name__):
        check(django.test.Client().get, "/records/user/")
    names["cache"].close()


def test_celery(records: dscache.Cache) -> None:
    names = load("Celery")
    names["app"].conf.task_always_eager = True
    assert [names["count"].delay("visits").get() for _ in range(3)] == [1, 2, 3]
    assert records.head("visits") == 3
    names["cache"].close()


@pytest.mark.parametrize("preload", [True, False])
def test_gunicorn(preload: bool, records: dscache.Cache, tmp_path: Path) -> None:
    """Two workers with threads, of which each uses the cache that was made at import."""
    # The master uses it too, so that a worker that shared its connection would be found out.
    program_text = program("Flask") + "\ncache.get('warm')\n"
    (tmp_path / "service.py").write_text(program_text, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "gunicorn", "--workers", "2", "--threads", "4"]
        command += ["--bind", f"fd://{listener.fileno()}", "service:app"]
        with subprocess.Popen(
            [*command, "--preload"] if preload else command,
            cwd=tmp_path,
            pass_fds=[listener.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # Newer versions keep a socket in the home folder.
            env={**os.environ, "PYTHONPATH": str(PROJECT), "HOME": str(tmp_path)},
        ) as process:
            try:
                url = f"http://127.0.0.1:{listener.getsockname()[1]}/records/user/"
                with httpx.Client(timeout=PATIENCE) as client:
                    check(lambda path: client.get(url + path), "")
                    for _ in range(50):
                        assert client.get(url + "ada").json() == DOCUMENT
            finally:
                process.terminate()
                said = process.communicate(timeout=PATIENCE)[1].decode()
    assert "Traceback" not in said
    assert process.returncode == 0


def test_a_cache_of_an_ended_loop_is_refused(records: dscache.Cache) -> None:
    """The first rule of the page: an AsyncCache belongs to one event loop."""
    cache = dscache.AsyncCache("127.0.0.1:{}".format(os.environ["REDIS_PORT"]))

    async def use() -> None:
        await cache.get("user/ada")

    with asyncio.Runner() as runner:
        runner.run(use())
        with asyncio.Runner() as other, pytest.raises(dscache.UsageError):
            other.run(use())
        runner.run(cache.close())
