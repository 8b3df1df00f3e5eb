"""``dscache.django`` under Django's own tests of caches and of sessions in a cache."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dscache.embedded import EmbeddedServer
from tests.conftest import SERVERS, _server_id
from tests.support.django_tests import find_django_tests
from tests.support.documents import PROJECT, table

PROGRAM = Path(__file__).parents[1] / "programs" / "django_suite.py"

pytestmark = pytest.mark.skipif(
    find_django_tests() is None, reason="Django's tests aren't here; make test fetches them"
)


async def outcome(server: EmbeddedServer, database: int, **options: Any) -> dict[str, Any]:
    """Run the tests in a process; return how many ran, and which failed and were skipped."""
    options |= {"commandTimeout": 30_000, "db": database}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, PROGRAM, find_django_tests() or "", server.url, json.dumps(options)),
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    told, log = await process.communicate()
    assert process.returncode == 0, log.decode()
    found: dict[str, Any] = json.loads(told)
    return found


@pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)
async def test_djangos_own_tests(server: EmbeddedServer, redis: Any) -> None:
    """With both serializers, at once, as most of the time they sleep."""
    pickled, plain = await asyncio.gather(
        outcome(server, 1, SERIALIZER="pickle", nearCache=True),
        outcome(server, 2, SERIALIZER="json"),
    )
    assert pickled["failed"] == {}
    assert pickled["ran"] > 150
    assert plain["ran"] > 120
    rows = table(PROJECT / "docs" / "django.md", "Does it pass Django's tests?")
    listed: dict[str, set[str]] = {}
    for name, which, _ in rows:
        listed.setdefault(which, set()).add(name.strip("`"))
    for found in (pickled, plain):
        assert {name.partition(".")[2] for name in found["skipped"]} == listed["both"]
    # A test with parts has the name of its part behind it.
    assert {name.partition(".")[2].split()[0] for name in plain["failed"]} == listed["json"]
