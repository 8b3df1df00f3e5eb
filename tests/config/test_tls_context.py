"""The TLS context: made once for all attempts, off the loop, and again after a change."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import dscache
from dscache import ConfigError
from dscache.config import Tls
from dscache.embedded import TLSFiles
from tests.support.waiting import PATIENCE, until


class Made:
    """The contexts made since, each with the thread that made it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[int] = []
        make = ssl.create_default_context

        def counted(*args: Any, **options: Any) -> ssl.SSLContext:
            self.threads.append(threading.get_ident())
            return make(*args, **options)

        monkeypatch.setattr(ssl, "create_default_context", counted)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(monkeypatch)


@pytest.fixture
def files(certificates: TLSFiles, tmp_path: Path) -> TLSFiles:
    """Separate files for each test, which last changed a while ago."""
    own = TLSFiles(str(tmp_path / "cert"), str(tmp_path / "key"), str(tmp_path / "ca"))
    shutil.copy(certificates.certificate, own.certificate)
    shutil.copy(certificates.key, own.key)
    shutil.copy(certificates.authority, own.authority)
    return own


@dataclass
class NoServer:
    """A listener that closes every connection at once."""

    port: int
    attempts: int = 0


@pytest.fixture
def no_server() -> Iterator[NoServer]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        no_server = NoServer(listener.getsockname()[1])

        def refuse() -> None:
            with suppress(OSError):
                while True:
                    listener.accept()[0].close()
                    no_server.attempts += 1

        thread = threading.Thread(target=refuse, daemon=True)
        thread.start()
        yield no_server
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE)


def options_of(files: TLSFiles, port: int) -> dict[str, Any]:
    tls = {"ca": files.authority, "cert": files.certificate, "key": files.key}
    quick = {"first": 1, "cap": 5}
    return {"host": "127.0.0.1", "port": port, "tls": tls, "retryStrategy": quick}


async def settled(files: TLSFiles) -> None:
    """Wait until the files are so old that another change would be noticed."""
    Tls(ca=files.authority, cert=files.certificate, key=files.key).context()
    await asyncio.sleep(0.2)


async def test_attempts_share_one_context(files: TLSFiles, no_server: NoServer, made: Made) -> None:
    await settled(files)
    cache = dscache.AsyncCache.from_config(
        {"name": "redis", "options": options_of(files, no_server.port)}
    )
    made.threads.clear()
    get = asyncio.ensure_future(cache.get("a"))
    await until(lambda: no_server.attempts > 10)
    assert len(made.threads) <= 1
    # A change makes another one, on a thread that is not the loop's.
    os.utime(files.certificate)
    await until(lambda: made.threads)
    assert threading.get_ident() not in made.threads
    await cache.close()
    await asyncio.gather(get, return_exceptions=True)


def test_blocking_attempts_share_one_context(
    files: TLSFiles, no_server: NoServer, made: Made
) -> None:
    asyncio.run(settled(files))
    options = options_of(files, no_server.port)
    cache = dscache.Cache.from_config(
        {"name": "redis", "options": {**options, "commandTimeout": 200}}
    )
    made.threads.clear()
    for _ in range(5):
        with pytest.raises(dscache.DscacheError):
            cache.get("a")
    cache.close()
    assert no_server.attempts >= 5
    assert len(made.threads) <= 1


def test_a_change_of_any_file_makes_another(files: TLSFiles, made: Made) -> None:
    tls = Tls(ca=files.authority, cert=files.certificate, key=files.key)
    for path in (files.authority, files.certificate, files.key):
        asyncio.run(settled(files))
        before = tls.context()
        assert tls.context() is before
        copy = f"{path}.new"
        shutil.copy(path, copy)
        os.replace(copy, path)
        assert tls.context() is not before


def test_a_file_changed_just_now_is_read_again(files: TLSFiles) -> None:
    """Within one tick of the file system's clock, a second change would go unnoticed."""
    tls = Tls(ca=files.authority)
    os.utime(files.authority)
    first = tls.context()
    assert tls.context() is not first


def test_an_incomplete_change_is_tried_again(files: TLSFiles, tmp_path: Path) -> None:
    tls = Tls(ca=files.authority, cert=files.certificate, key=files.key)
    asyncio.run(settled(files))
    good = tls.context()
    key = Path(files.key).read_text()
    Path(files.key).write_text(Path(files.certificate).read_text())
    for _ in range(2):
        with pytest.raises(ConfigError, match="don't belong together"):
            tls.context()
    Path(files.key).write_text(key)
    assert tls.context() is not good


def test_the_authorities_of_the_system_are_watched(
    files: TLSFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", files.authority)
    asyncio.run(settled(files))
    before = Tls().context()
    assert Tls().context() is before
    os.utime(files.authority)
    assert Tls().context() is not before


def test_old_contexts_are_dropped(files: TLSFiles) -> None:
    asyncio.run(settled(files))
    first = Tls(ca=files.authority).context()
    for i in range(100):
        Tls(ca=files.authority, servername=f"n{i}").context()
    assert Tls(ca=files.authority).context() is not first


async def test_a_file_missing_at_an_attempt_is_the_reason(files: TLSFiles, backend: str) -> None:
    """Its ConfigError passes the frame of a context manager, which is no signal handler's."""
    tls = {"ca": files.authority, "cert": files.certificate, "key": files.key}
    options = {"host": "127.0.0.1", "port": 1, "tls": tls, "connectTimeout": 60_000}
    cache = dscache.AsyncCache.from_config({"name": "redis", "options": options})
    Path(files.key).unlink()  # noqa: ASYNC240
    issued = asyncio.ensure_future(cache.get("a"))
    try:
        await until(lambda: cache.stats()["last_loss"] != "")
        assert "tls.key: must be PEM text or a PEM file" in cache.stats()["last_loss"]
    finally:
        issued.cancel()
        await cache.close()
