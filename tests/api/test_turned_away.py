"""A server says why it turns a client away, and closes: the reason is in every error.

It has too many clients, or is in protected mode, in which Redis still answers on loopback. It
closes before the first command, with commands unread (a reset), or once it has read them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from redis.credentials import CredentialProvider

import dscache
from dscache.blocking.foreign_errors import ConnectTimeout
from dscache.blocking.sentinel import Sentinels
from dscache.config import load
from dscache.embedded import EmbeddedServer, TLSFiles
from dscache.messages import MessageNode
from dscache.net.connect_errors import IF_PLAIN, TurnedAway, as_connect_error, permanent_failure
from tests.conftest import SERVERS, _server_id
from tests.support.blocking import BlockingCache, ProxyThread
from tests.support.commands import invoke
from tests.support.faults import FakeServer
from tests.support.waiting import PATIENCE, until

MakeServer = Callable[..., EmbeddedServer]

FULL = "ERR max number of clients reached"
PROTECTED = "DENIED Redis is running in protected mode because protected mode is enabled"
PROXY = "ERR connection limit exceeded"
IMPATIENT = {"connectTimeout": 200, "commandTimeout": 200}
on_one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)


class Turnstile:
    """Turns every client away, in one of several ways: with an error, or without a word.

    Attributes:
        url: The server's URL; of a unix socket it is a path.
    """

    def __init__(self, words: str, way: str, path: str = "") -> None:
        self._words = b"-" + words.encode() + b"\r\n" if words else b""
        self._way = way
        if path:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(path)
        else:
            self._listener = socket.socket()
            self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(100)
        self.port = 0 if path else self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                if not self._words:
                    if self._way == "unread":
                        client.recv(1)
                    continue
                if self._way != "at once" and not client.recv(1):
                    continue
                client.sendall(self._words)
                if self._way == "after all":
                    client.settimeout(0.02)
                    with contextlib.suppress(TimeoutError):
                        while client.recv(65536):
                            pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture(params=["at once", "unread", "after all"])
def way(request: pytest.FixtureRequest) -> str:
    """How the server closes: before a command, with commands unread, or once it has read them."""
    way: str = request.param
    return way


@contextlib.contextmanager
def turnstile(words: str, way: str, path: str = "") -> Iterator[Turnstile]:
    server = Turnstile(words, way, path)
    try:
        yield server
    finally:
        server.close()


def config_of(**options: Any) -> dict[str, Any]:
    return {"name": "redis", "options": {**IMPATIENT, **options}}


async def async_errors(config: dict[str, Any], **more: Any) -> list[str]:
    """Return what an AsyncCache says: its errors, and the reason in its counters."""
    cache = dscache.AsyncCache.from_config(config, **more)
    said = []
    async with asyncio.timeout(PATIENCE):
        for ask in (cache.when_ready, lambda: cache.get("a"), lambda: cache.set("a", 1, 1)):
            with pytest.raises(dscache.DscacheError) as caught:
                await ask()
            said.append(str(caught.value))
        said.append(cache.stats()["last_loss"])
        await cache.close()
    return said


async def blocking_errors(config: dict[str, Any]) -> list[str]:
    """Return what a Cache says."""

    def block() -> list[str]:
        said = []
        cache = dscache.Cache.from_config(config)
        for ask in (cache.when_ready, lambda: cache.get("a"), lambda: cache.set("a", 1, 1)):
            with pytest.raises(dscache.DscacheError) as caught:
                ask()
            said.append(str(caught.value))
        said.append(cache.stats()["last_loss"])
        cache.close()
        return said

    return await asyncio.to_thread(block)


async def message_errors(config: dict[str, Any]) -> list[str]:
    """Return what a MessageNode says."""
    node = MessageNode.from_config(config)
    with pytest.raises(dscache.DscacheError) as caught:
        await node.when_ready()
    await node.close()
    return [str(caught.value), node.stats()["last_loss"]]


@pytest.mark.parametrize("words", [FULL, PROTECTED, PROXY])
async def test_the_reason_is_in_every_error(words: str, way: str, backend: str) -> None:
    with turnstile(words, way) as server:
        config = config_of(host="127.0.0.1", port=server.port)
        said = await async_errors(config)
        said += await blocking_errors(config)
        said += await message_errors(config)
    assert [text for text in said if words not in text] == []


@pytest.mark.parametrize("words", [FULL, PROTECTED])
async def test_over_a_unix_socket(words: str, way: str, tmp_path: Path, backend: str) -> None:
    """Here a write after the server has closed fails at once."""
    path = str(tmp_path / "turnstile")
    with turnstile(words, way, path):
        said = await async_errors(config_of(path=path))
        said += await blocking_errors(config_of(path=path))
    assert [text for text in said if words not in text] == []


async def test_nodes_of_a_cluster(way: str, backend: str) -> None:
    with turnstile(FULL, way) as server:
        config = config_of(nodes=[{"host": "127.0.0.1", "port": server.port}])
        said = await async_errors(config)
        said += await blocking_errors(config)
        said += await message_errors(config)
    assert [text for text in said if FULL not in text] == []


@pytest.mark.parametrize("words", [FULL, PROTECTED])
@pytest.mark.parametrize("password", [None, "of the Sentinels"])
async def test_sentinels(words: str, way: str, password: str | None, backend: str) -> None:
    with turnstile(words, way) as server:
        node = {"host": "127.0.0.1", "port": server.port}
        config = config_of(sentinels=[node], name="group", sentinelPassword=password)
        said = await async_errors(config)
        said += await blocking_errors(config)
    wanted = words.removeprefix("ERR ")  # redis-py drops this code
    assert [text for text in said if wanted not in text] == []


class Slow(CredentialProvider):
    """Gives credentials only after the server has closed."""

    async def get_credentials_async(self) -> tuple[str, str]:
        await asyncio.sleep(0.05)
        return "app", "secret"

    def get_credentials(self) -> tuple[str, str]:
        return "app", "secret"


async def test_the_error_comes_before_the_first_command(backend: str) -> None:
    with turnstile(FULL, "at once") as server:
        config = config_of(host="127.0.0.1", port=server.port)
        said = await async_errors(config, credentials=Slow())
    assert [text for text in said if FULL not in text] == []


@pytest.mark.parametrize(
    ("words", "advice"), [(FULL, "maxclients"), (PROTECTED, "protected mode"), ("ERR no", "cause")]
)
async def test_the_doctor_names_the_reason(words: str, advice: str, way: str) -> None:
    with turnstile(words, way) as server:
        url = f"redis://127.0.0.1:{server.port}"
        done = await asyncio.to_thread(invoke, "doctor", "--url", url, "--json")
        told = await asyncio.to_thread(invoke, "get", "a", "--url", url)
    assert words in done.out
    assert advice in done.out
    assert "firewall" not in done.out
    assert words in told.out + told.err


async def test_protected_mode_fails_operations_at_once(backend: str) -> None:
    async with FakeServer({"HELLO": b"-%b\r\n" % PROTECTED.encode(), "*": None}) as fake:
        config = config_of(host=fake.host, port=fake.port, commandTimeout=600_000)
        cache = dscache.AsyncCache.from_config(config)
        # At once, as it does not pass by itself.
        with pytest.raises(dscache.ReplyError) as caught:
            await cache.get("a")
        assert caught.value.code == "DENIED"
        await cache.close()


@on_one_server
async def test_a_full_server_is_waited_for(backend: str, make_server: MakeServer) -> None:
    server = make_server("--maxclients", "1")
    config = config_of(host="127.0.0.1", port=server.port)
    patient = config_of(host="127.0.0.1", port=server.port, commandTimeout=60_000)
    with redis_py.Redis.from_url(server.url) as redis:
        redis.ping()
        said = await async_errors(config)
        said += await blocking_errors(config)
        assert [text for text in said if FULL not in text] == []
        cache = dscache.AsyncCache.from_config(patient)
        written = cache.set("a", 1, [1])
        await until(lambda: FULL in cache.stats()["last_loss"])
        assert not written.done()
        redis.config_set("maxclients", 100)
        async with asyncio.timeout(PATIENCE):
            assert await written is True
        await cache.close()


@pytest.mark.parametrize(
    ("error", "is_final"),
    [
        (TurnedAway("ERR max number of clients reached"), False),
        (TurnedAway("ERR no server behind this proxy"), False),
        (TurnedAway("DENIED Redis is running in protected mode"), True),
        (TurnedAway("NOAUTH Authentication required."), True),
        (dscache.ReplyError("ERR max number of clients + cluster connections reached"), False),
        (dscache.ReplyError("ERR maximum number of connections exceeded"), False),
        (dscache.ReplyError("MASTERDOWN Link with MASTER is down"), False),
        (dscache.ReplyError("ERR DB index is out of range"), True),
    ],
)
def test_refusals_that_pass_are_waited_for(error: Exception, is_final: bool) -> None:
    failure = permanent_failure(error, as_connect_error(error, 100), "node.test:6379")
    assert (failure is not None) is is_final


def test_a_sentinel_that_is_silent_in_the_last_moment_hides_no_reason() -> None:
    """With the time that is left at the end, no Sentinel could answer."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        node = {"host": "127.0.0.1", "port": silent.getsockname()[1]}

        def ask(timeout: int) -> None:
            options = {"sentinels": [node], "name": "group", "connectTimeout": timeout}
            config = load({"cache": {"name": "redis", "options": options}})
            Sentinels(config.options).locate(time.monotonic() + 0.1)

        with pytest.raises(ConnectTimeout):
            ask(60_000)
        with pytest.raises(dscache.ConnectError, match=r"127\.0\.0\.1:\d+: no answer within"):
            ask(100)


@pytest.mark.parametrize("kind", [dscache.AsyncCache, BlockingCache], ids=["async", "blocking"])
@pytest.mark.parametrize("end", ["at once", "unread"])
async def test_an_end_in_the_tls_handshake_is_waited_out(kind: Any, end: str) -> None:
    """A balancer without a server accepts and closes; the next attempt may find one.

    What it leaves unread makes of the end a reset.
    """
    with turnstile("", end) as server:
        options = {"host": "127.0.0.1", "port": server.port, "tls": True}
        said = "within 200 ms: the server closed it during the TLS handshake"
        cache = kind.from_config(config_of(**options))
        try:
            with pytest.raises(dscache.ConnectError, match=said):
                await cache.set("a", 1, 1)
            loss = cache.stats()["last_loss"]
            assert loss == f"the server closed it during the TLS handshake{IF_PLAIN}"
        finally:
            await cache.close()


@pytest.mark.parametrize("kind", [dscache.AsyncCache, BlockingCache], ids=["async", "blocking"])
async def test_a_server_without_tls_gets_tls(kind: Any) -> None:
    """OpenSSL's name for that is WRONG_VERSION_NUMBER, which says nothing to most people."""
    with turnstile("ERR unknown command", "at once") as server:
        options = {"host": "127.0.0.1", "port": server.port, "tls": True}
        cache = kind.from_config(config_of(**options))
        try:
            with pytest.raises(
                dscache.ConnectError, match=r"the server answers without TLS; .* use redis://"
            ):
                await cache.set("a", 1, 1)
        finally:
            await cache.close()


@pytest.mark.parametrize("kind", [dscache.AsyncCache, BlockingCache], ids=["async", "blocking"])
@on_one_server
async def test_a_server_with_tls_gets_none(
    kind: Any, server: EmbeddedServer, certificates: TLSFiles
) -> None:
    """OpenSSL closes such a connection without a word."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certificate, certificates.key)
    with ProxyThread(server.host, server.port, tls=context) as proxy:
        port = int(proxy.url.rpartition(":")[2])
        cache = kind.from_config(config_of(host="127.0.0.1", port=port))
        try:
            with pytest.raises(dscache.ConnectError, match=r"within 200 ms: .* use rediss://"):
                await cache.set("a", 1, 1)
        finally:
            await cache.close()
