"""Exceptions on every line of an operation, failing allocations, and interfering finalizers.

Each test runs in its own process. The long forms are rows of the soak test.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import pytest

from dscache.embedded import EmbeddedServer, ServerBinary
from tests.conftest import BY_AGE, CORES, MakeServer
from tests.programs.injection import TIMEOUT
from tests.programs.shortage import scan, scenes
from tests.support.blocking import run_child
from tests.support.clusters import ClusterGroup

QUICK = {"commandTimeout": TIMEOUT, "closeTimeout": TIMEOUT}
QUICK |= {"retryStrategy": {"first": 1, "cap": 20}}
# One line of so many is struck, and others with each core; in the soak test, all are.
STEP = 6
# Children that share the actions on a cache; a single one could take minutes on a busy machine.
PARTS = 3
OFFSETS = {"fast": 0, "pure": 3}
# In what is scanned here, every so many allocations fail; in the soak test, each one does.
STRIDE = {"fast": 3, "pure": 41}
FEW = ("get", "mixed read", "set-bulk", "near hit", "messages", "mixed sent lose", "get MOVED")


@pytest.fixture(scope="module")
def binary() -> ServerBinary:
    """Only the newest server: the client is under test."""
    return BY_AGE[-1]


@pytest.fixture(scope="module")
def server(
    binary: ServerBinary, running: Callable[[ServerBinary], EmbeddedServer]
) -> EmbeddedServer:
    return running(binary)


def assert_holds(backend: str, options: dict[str, Any], kind: str, **more: Any) -> None:
    where = {"options": options | QUICK, "kind": kind, "uvloop": False, "every": False}
    where |= {"reconnect": False, "step": STEP, "offset": OFFSETS[backend], "seconds": 240, **more}
    result = run_child("injection.py", json.dumps(where), backend=backend)
    assert result["problems"] == []
    assert result["cases"] > 5, result


@pytest.fixture(params=range(PARTS), ids=lambda part: f"part {part + 1}")
def part(request: pytest.FixtureRequest) -> tuple[int, int]:
    """The share of one child in the actions."""
    return request.param, PARTS


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_exceptions_on_each_line_of_an_async_cache(
    server: EmbeddedServer, backend: str, loop: str, part: tuple[int, int]
) -> None:
    options = {"host": server.host, "port": server.port}
    assert_holds(backend, options, "async", uvloop=loop == "uvloop", part=part)


def test_exceptions_on_each_line_of_a_near_cache(
    server: EmbeddedServer, backend: str, part: tuple[int, int]
) -> None:
    options = {"host": server.host, "port": server.port, "nearCache": {}}
    assert_holds(backend, options, "async", part=part)


def test_exceptions_on_each_line_of_a_lost_connection(make_server: MakeServer) -> None:
    server = make_server()
    assert_holds("fast", {"host": server.host, "port": server.port}, "async", reconnect=True)


def test_exceptions_on_each_line_of_a_blocking_cache(
    server: EmbeddedServer, backend: str, part: tuple[int, int]
) -> None:
    assert_holds(backend, {"host": server.host, "port": server.port}, "blocking", part=part)


def test_exceptions_on_each_line_of_a_blocking_near_cache(
    make_server: MakeServer, backend: str, part: tuple[int, int]
) -> None:
    """Those of its thread too, and while its connections are killed."""
    server = make_server()
    options = {"host": server.host, "port": server.port, "nearCache": {"idleLimit": 500}}
    assert_holds(backend, options, "blocking", part=part)


@pytest.mark.parametrize("kind", ["messages", "coroutines"])
def test_exceptions_on_each_line_of_a_message_node(
    server: EmbeddedServer, backend: str, kind: str
) -> None:
    assert_holds(backend, {"host": server.host, "port": server.port}, kind)


@pytest.mark.parametrize("kind", ["async", "blocking"])
def test_exceptions_on_each_line_on_a_cluster(
    group: ClusterGroup, backend: str, kind: str, part: tuple[int, int]
) -> None:
    assert_holds(backend, group.options, kind, part=part)


@pytest.mark.parametrize("backend", CORES)
def test_single_allocations_fail(backend: str) -> None:
    if importlib.util.find_spec("_testcapi") is None:
        pytest.fail(
            "this Python lacks _testcapi, which lets allocations fail; take one that has it"
        )
    result = scan(backend, STRIDE[backend], list(FEW))
    assert (result["crashes"], result["problems"]) == ([], [])
    assert result["runs"] > 40


def test_scenes_have_every_step() -> None:
    assert set(FEW) <= scenes().keys()


@pytest.mark.parametrize("backend", CORES)
def test_interfering_finalizers_do_no_harm(backend: str) -> None:
    result = run_child("finalizers.py", backend, "3000", backend=backend)
    assert result["problems"] == []
    assert result["finalized"] >= 3000
