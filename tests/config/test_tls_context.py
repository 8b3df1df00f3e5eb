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
from tests.support.faults import FakeServer, FaultProxy
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


# -- a connection with files that are being replaced, and refusals by the server


@pytest.mark.parametrize("nodes", [False, True])
@pytest.mark.parametrize("kind", ["AsyncCache", "Cache"])
async def test_half_replaced_files_are_waited_for(
    kind: str, nodes: bool, files: TLSFiles, tmp_path: Path, backend: str
) -> None:
    """A certificate without its key, or with another one, is the state of a moment."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    key = Path(files.key)
    good, other = key.read_bytes(), Path(files.certificate).read_bytes()  # noqa: ASYNC240
    cluster = b"*1\r\n*3\r\n:0\r\n:16383\r\n*3\r\n$9\r\n127.0.0.1\r\n:%d\r\n$40\r\n" + b"a" * 40
    answers: dict[str, Any] = {"MGET": b"*2\r\n$1\r\n5\r\n$1\r\n7\r\n", "INFO": b"$0\r\n\r\n"}
    async with FakeServer(answers) as fake, FaultProxy(fake.host, fake.port, tls=context) as proxy:
        fake.answers["CLUSTER"] = lambda command: (
            cluster % proxy.port + b"\r\n"
            if command[1].upper() == b"SLOTS"
            else b"$16\r\ncluster_state:ok\r\n"
        )
        tls = {"ca": files.authority, "cert": files.certificate, "key": files.key}
        place = {"host": proxy.host, "port": proxy.port}
        options = {"connectTimeout": 60_000, "commandTimeout": 30_000}
        if nodes:
            options |= {"nodes": [place], "redisOptions": {"tls": tls}}  # type: ignore[dict-item]
        else:
            options |= {**place, "tls": tls}  # type: ignore[dict-item]
        cache = getattr(dscache, kind).from_config({"name": "redis", "options": options})
        for breaking, words in (
            (lambda: key.write_bytes(other), "don't belong together"),
            (key.unlink, "tls.key: must be PEM text or a PEM file: No such file"),
        ):
            breaking()
            if kind == "Cache":
                issued = asyncio.ensure_future(asyncio.to_thread(cache.get, "a"))
            else:
                issued = asyncio.ensure_future(cache.get("a"))
            await until(lambda words=words: words in cache.stats().get("last_loss", ""))
            assert not issued.done()
            key.write_bytes(good)  # noqa: ASYNC240
            async with asyncio.timeout(PATIENCE):
                record = await issued
            assert tuple(record) == (5, 7)
            proxy.cut()
        closed = cache.close()
        if kind == "AsyncCache":
            await closed


class Guarded:
    """A TLS server that demands a certificate of its clients, and closes without reading on."""

    def __init__(self, files: TLSFiles, version: str) -> None:
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files.authority)
        self._context.load_cert_chain(files.certificate, files.key)
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._context.minimum_version = self._context.maximum_version = ssl.TLSVersion[version]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with (
                self._context.wrap_socket(
                    client, server_side=True, do_handshake_on_connect=False
                ) as secure,
                suppress(OSError),
            ):
                secure.do_handshake()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("kind", ["AsyncCache", "Cache"])
async def test_a_missing_certificate_is_named(
    kind: str, version: str, files: TLSFiles, backend: str
) -> None:
    server = Guarded(files, version)
    try:
        options = {
            **{"host": "127.0.0.1", "port": server.port, "tls": {"ca": files.authority}},
            **{"connectTimeout": 60_000, "commandTimeout": 60_000},
        }
        cache = getattr(dscache, kind).from_config({"name": "redis", "options": options})

        async def ask() -> object:
            if kind == "Cache":
                return await asyncio.to_thread(cache.get, "a")
            return await cache.get("a")

        async with asyncio.timeout(PATIENCE):
            with pytest.raises(dscache.ConnectError) as caught:
                await ask()
        wanted = "handshake failure" if version == "TLSv1_2" else "certificate required"
        assert f"the server refuses the TLS connection: {wanted}; if it" in str(caught.value)
        assert "tls.cert" in cache.stats()["last_loss"]
        closed = cache.close()
        if kind == "AsyncCache":
            await closed
    finally:
        server.close()
