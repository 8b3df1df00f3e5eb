"""Exceptions raised anywhere in a cache never give a record to another's caller."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from dscache.embedded import EmbeddedServer
from tests.conftest import NamedServer

PROGRAM = Path(__file__).parents[1] / "programs" / "interruptions.py"
# lost_write replaces a method of asyncio that uvloop doesn't have.
SCENES = [
    (scene, loop)
    for scene in (*("short_of_memory", "deep", "recursive", "signals", "finalizers", "callbacks"),)
    for loop in ("asyncio", "uvloop")
] + [("lost_write", "asyncio")]


@pytest.mark.parametrize(("scene", "loop"), SCENES)
async def test_each_record_goes_to_its_owner_and_each_operation_ends(
    server: EmbeddedServer | NamedServer, backend: str, scene: str, loop: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, PROGRAM, scene, loop, server.url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "DSCACHE_BACKEND": backend},
    )
    output, errors = await asyncio.wait_for(process.communicate(), 240)
    assert process.returncode == 0, errors.decode()[-4000:]
    assert json.loads(output.splitlines()[-1]) == {"wrong": [], "pending": {}}
