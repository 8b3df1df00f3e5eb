"""Login: providers of credentials, and credentials that become invalid."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
import trustme
import uvloop
from redis.auth.idp import IdentityProviderInterface
from redis.auth.token import SimpleToken
from redis.auth.token_manager import (
    CredentialsListener,
    RetryPolicy,
    TokenManager,
    TokenManagerConfig,
)
from redis.credentials import (
    CredentialProvider,
    StreamingCredentialProvider,
    UsernamePasswordCredentialProvider,
)

import dscache
from dscache.aio import heartbeat
from dscache.embedded import EmbeddedServer
from tests.conftest import SERVERS, _server_id
from tests.support.faults import FaultProxy
from tests.support.waiting import PATIENCE, until

LONG = PATIENCE * 1000
# Short pauses for tests in which attempts follow each other at any pace.
AT_ONCE = {"first": 1, "cap": 5}
USER = "app"
# Every secret begins with this, and no visible text may contain it.
SECRET = "t0ken"

pytestmark = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)


@pytest.fixture(autouse=True)
def _no_output_has_a_secret(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    for record in caplog.get_records("call"):
        shown = record.getMessage()
        if record.exc_info:
            shown += "".join(traceback.format_exception(record.exc_info[1]))
        assert SECRET not in shown
        assert record.levelno < logging.ERROR, shown


@dataclass
class Account:
    """A user of the server, whose tokens change."""

    redis: redis_py.Redis

    def give(self, *tokens: str) -> None:
        """Make these tokens valid, and no others."""
        self.redis.execute_command(
            *("ACL", "SETUSER", USER, "on", "resetpass"),
            *(f">{token}" for token in tokens),
            *("allkeys", "+@all"),
        )

    def disconnect(self) -> None:
        """Close all connections of the user."""
        self.redis.execute_command("CLIENT", "KILL", "USER", USER)

    def logins(self) -> int:
        """Return the number of AUTH commands since the last CONFIG RESETSTAT."""
        return int(self.redis.info("commandstats").get("cmdstat_auth", {}).get("calls", 0))

    def connections(self) -> int:
        """Return how many connections the user has."""
        return sum(client["user"] == USER for client in self.redis.client_list())


@pytest.fixture
def account(redis: redis_py.Redis) -> Iterator[Account]:
    made = Account(redis)
    made.give(f"{SECRET}-0")
    yield made
    redis.acl_deluser(USER)


class Blocking(CredentialProvider):
    """Has only the blocking method, as many do; each call returns the next of ``answers``."""

    def __init__(self, *answers: Any, seconds: float = 0.0) -> None:
        self.calls = 0
        self.threads: set[int] = set()
        self.under_way = 0
        self.most_under_way = 0
        self._answers = answers
        self._seconds = seconds

    def get_credentials(self) -> Any:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        self.threads.add(threading.get_ident())
        self.calls += 1
        answer = self._answers[min(self.calls, len(self._answers)) - 1]
        self._take_time()
        self.under_way -= 1
        return self._give(answer)

    def _take_time(self) -> None:
        time.sleep(self._seconds)

    def _give(self, answer: Any) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Held(Blocking):
    """Returns nothing before it is released."""

    def __init__(self, *answers: Any) -> None:
        super().__init__(*answers)
        self.let_go = threading.Event()

    def _take_time(self) -> None:
        self.let_go.wait(PATIENCE)


class Async(Blocking):
    """Has a separate method for asyncio."""

    def get_credentials(self) -> Any:
        pytest.fail("the blocking way was taken")

    async def get_credentials_async(self) -> Any:
        self.calls += 1
        self.under_way += 1
        try:
            await asyncio.sleep(self._seconds)
        finally:
            self.under_way -= 1
        return self._give(self._answers[min(self.calls, len(self._answers)) - 1])


@dataclass
class Token:
    """A renewed token in the form of redis-py's providers."""

    value: str
    user: str | None = USER

    def try_get(self, key: str) -> str | None:
        return self.user if key == "oid" else None

    def get_value(self) -> str:
        return self.value


class Streaming(StreamingCredentialProvider):
    """Returns a token, and publishes a new one when a test says so."""

    def __init__(self) -> None:
        self.token = f"{SECRET}-0"
        self.calls = 0
        self.renewed: Callable[[Any], Any] | None = None
        self.failed: Callable[[Exception], Any] | None = None

    def get_credentials(self) -> Any:
        self.calls += 1
        return USER, self.token

    def on_next(self, callback: Callable[[Any], Any]) -> None:
        self.renewed = callback

    def on_error(self, callback: Callable[[Exception], Any]) -> None:
        self.failed = callback

    def is_streaming(self) -> bool:
        return True

    def renew(self, token: Any) -> None:
        """Publish a new token, in a thread of the provider's own."""
        assert self.renewed is not None
        thread = threading.Thread(target=self.renewed, args=(token,))
        thread.start()
        thread.join()


def open_cache(server: Any, provider: CredentialProvider, **options: Any) -> dscache.AsyncCache:
    place = {"host": server.host, "port": server.port}
    return dscache.AsyncCache.from_config(
        {"name": "redis", "options": place | options}, credentials=provider
    )


async def result_of(issued: Awaitable[Any]) -> Any:
    """Return the result or error of an operation, which must neither hang nor reveal a secret."""
    async with asyncio.timeout(PATIENCE):
        (result,) = await asyncio.gather(issued, return_exceptions=True)
    if isinstance(result, BaseException):
        assert SECRET not in f"{result} {result!r} {result.args}"
    return result


def assert_silent(cache: dscache.AsyncCache) -> None:
    """Assert that no output of a cache contains a secret."""
    assert SECRET not in f"{cache!r} {cache.description} {cache.stats()}"


# -- providers


@pytest.mark.parametrize("kind", [Blocking, Async], ids=["blocking", "async"])
async def test_a_provider_is_asked_before_each_connection(
    server: EmbeddedServer, backend: str, account: Account, kind: type[Blocking]
) -> None:
    provider = kind((USER, f"{SECRET}-0"), (USER, f"{SECRET}-1"), (USER, f"{SECRET}-2"))
    # Users in the configuration are ignored then.
    options = {"username": "nobody", "password": f"{SECRET}-wrong", "commandTimeout": LONG}
    async with open_cache(server, provider, **options) as cache:
        for number in range(1, 3):
            assert await cache.set("a", number, number) is True
            assert provider.calls == number
            assert account.connections() == 1
            account.give(f"{SECRET}-{number}")
            account.disconnect()
            for _ in range(2):
                assert tuple(await result_of(cache.get("a"))) == (number, number)
            assert provider.calls == number + 1
        assert_silent(cache)
    assert threading.get_ident() not in provider.threads


async def test_a_password_alone_is_that_of_the_default_user(
    make_server: Callable[..., EmbeddedServer], backend: str
) -> None:
    server = make_server("--requirepass", f"{SECRET}-0")
    for provider in (
        Blocking((f"{SECRET}-0",)),
        Async([f"{SECRET}-0"]),
        UsernamePasswordCredentialProvider(password=f"{SECRET}-0"),
        UsernamePasswordCredentialProvider("default", f"{SECRET}-0"),
    ):
        async with open_cache(server, provider) as cache:
            assert await cache.set("a", 1, 1) is True


@pytest.mark.parametrize("kind", [Blocking, Async], ids=["blocking", "async"])
@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError(f"no luck with {SECRET}"),
        ConnectionError(f"{SECRET} is out of reach"),
        TimeoutError(SECRET),
        KeyError(SECRET),
        None,
        (),
        (USER, f"{SECRET}-0", "more"),
        (USER, None),
        (USER, b"t0ken-0"),
    ],
    ids=repr,
)
async def test_a_provider_that_fails_is_asked_again(
    server: EmbeddedServer, backend: str, account: Account, failure: Any, kind: type[Blocking]
) -> None:
    provider = kind(*[failure] * 3, (USER, f"{SECRET}-0"))
    options = {"connectTimeout": LONG, "commandTimeout": LONG, "retryStrategy": AT_ONCE}
    async with open_cache(server, provider, **options) as cache:
        assert provider.calls == 4
        assert await result_of(cache.set("a", 1, 1)) is True
        assert_silent(cache)


async def test_a_provider_whose_iterator_ends_is_asked_again(
    server: EmbeddedServer, backend: str, account: Account
) -> None:
    """No future takes a StopIteration."""
    provider = Blocking(StopIteration(), (USER, f"{SECRET}-0"))
    options = {"connectTimeout": LONG, "commandTimeout": LONG, "retryStrategy": AT_ONCE}
    async with open_cache(server, provider, **options) as cache:
        assert provider.calls == 2
        assert await result_of(cache.set("a", 1, 1)) is True


async def test_a_provider_that_always_fails_is_the_reason(
    server: EmbeddedServer, backend: str
) -> None:
    provider = Async(RuntimeError(f"no luck with {SECRET}"))
    cache = open_cache(server, provider, connectTimeout=300, commandTimeout=300)
    for ask in (cache.when_ready, lambda: cache.get("a"), lambda: cache.set("a", 1, 1)):
        error = await result_of(ask())
        assert isinstance(error, dscache.ConnectError)
        assert "the credential provider failed: RuntimeError" in str(error)
    assert "RuntimeError" in cache.stats()["last_loss"]
    assert_silent(cache)
    await cache.close()
    assert not cache.stats()["pending"]


async def test_a_wrong_token_fails_at_once(
    server: EmbeddedServer, backend: str, account: Account
) -> None:
    provider = Async((USER, f"{SECRET}-wrong"))
    cache = open_cache(server, provider, connectTimeout=LONG, commandTimeout=LONG)
    for ask in (cache.when_ready, lambda: cache.get("a"), lambda: cache.set("a", 1, 1)):
        error = await result_of(ask())
        assert isinstance(error, dscache.ReplyError)
        assert error.code == "WRONGPASS"
    account.give(f"{SECRET}-wrong")
    await until(lambda: cache.is_ready)
    assert await result_of(cache.set("a", 1, 1)) is True
    await cache.close()


async def test_a_slow_blocking_provider_is_asked_once(
    proxy: FaultProxy, backend: str, account: Account
) -> None:
    provider = Held((USER, f"{SECRET}-0"))
    cache = open_cache(proxy, provider, connectTimeout=100, commandTimeout=LONG)
    written = cache.set("a", 1, 1)
    try:
        await until(lambda: proxy.accepted > 3)
        assert (provider.calls, provider.under_way) == (1, 1)
    finally:
        provider.let_go.set()
    assert await result_of(written) is True
    # On a busy machine no time may be left to use the answer; then the provider is asked again.
    assert provider.most_under_way == 1
    await cache.close()


async def test_close_does_not_wait_for_a_provider(
    server: EmbeddedServer, backend: str, account: Account
) -> None:
    held = Held((USER, f"{SECRET}-0"))
    for provider in (held, Async((), seconds=PATIENCE)):
        cache = open_cache(server, provider, closeTimeout=10, commandTimeout=LONG)
        waiting = cache.get("a")
        await until(lambda provider=provider: provider.under_way)
        await cache.close()
        assert isinstance(await result_of(waiting), dscache.ConnectionLost)
        # A thread can't be stopped; a coroutine is cancelled.
        assert provider.under_way == (1 if provider is held else 0)
    held.let_go.set()
    await until(lambda: not held.under_way)


# -- renewed tokens


async def test_a_renewed_token_is_sent_to_the_server(
    server: EmbeddedServer, backend: str, account: Account
) -> None:
    provider = Streaming()
    async with open_cache(server, provider) as cache:
        await cache.set("a", 1, 1)
        account.redis.acl_log_reset()
        account.redis.config_resetstat()
        account.give(f"{SECRET}-1")
        provider.renew(Token(f"{SECRET}-1"))
        await until(account.logins)
        assert await cache.get("a") is not None
        assert (provider.calls, cache.stats()["connects"]) == (1, 1)
        assert account.redis.acl_log() == []
        assert_silent(cache)
    # After the close nothing is subscribed, and nothing happens.
    provider.renew(Token(f"{SECRET}-2"))
    await asyncio.sleep(0)


async def test_after_a_refused_renewal_a_fresh_token_reconnects(
    server: EmbeddedServer, backend: str, account: Account
) -> None:
    provider = Streaming()
    async with open_cache(server, provider, commandTimeout=LONG) as cache:
        await cache.set("a", 1, 1)
        provider.token = f"{SECRET}-1"
        account.give(provider.token)
        provider.renew(Token(f"{SECRET}-stale"))
        await until(lambda: cache.stats()["connects"] == 2)
        assert "AUTH was refused: WRONGPASS" in cache.stats()["last_loss"]
        assert provider.calls == 2
        assert (await result_of(cache.get("a"))).version == 1
        assert_silent(cache)


async def test_a_renewal_under_load_fails_no_operation(
    server: EmbeddedServer, backend: str, account: Account
) -> None:
    provider = Streaming()
    async with open_cache(server, provider, commandTimeout=LONG) as cache:
        for number in range(1, 20):
            token = f"{SECRET}-{number}"
            account.give(token)
            writes = [cache.set(f"r{n}", number, [number]) for n in range(50)]
            provider.renew(Token(token))
            reads = [cache.get(f"r{n}") for n in range(50)]
            assert await asyncio.gather(*writes) == [True] * 50
            assert {record.version for record in await asyncio.gather(*reads)} == {number}
        stats = cache.stats()
        assert (stats["connects"], stats["last_loss"]) == (1, "")


async def test_caches_that_share_a_provider_all_hear_of_its_tokens(
    server: EmbeddedServer, backend: str, account: Account
) -> None:
    """Though the provider keeps only the callback that it was given last."""
    provider = Streaming()
    async with open_cache(server, provider) as one, open_cache(server, provider) as other:
        for number in range(1, 4):
            for cache in (one, other):
                await cache.set("a", number, number)
            account.redis.config_resetstat()
            account.give(f"{SECRET}-{number}")
            provider.renew(Token(f"{SECRET}-{number}"))
            await until(lambda: account.logins() == 2)
        assert (one.stats()["connects"], other.stats()["connects"]) == (1, 1)


@pytest.mark.parametrize("user", [USER, None], ids=["user", "password alone"])
async def test_a_renewal_without_a_connection_is_used_by_the_next(
    server: EmbeddedServer, backend: str, account: Account, proxy: FaultProxy, user: str | None
) -> None:
    provider = Streaming()
    async with open_cache(proxy, provider, commandTimeout=LONG) as cache:
        await proxy.refuse()
        proxy.cut()
        await until(lambda: not cache.is_ready)
        provider.token = f"{SECRET}-1"
        account.give(provider.token)
        provider.renew(Token(provider.token, user))
        await proxy.listen()
        assert await result_of(cache.set("a", 1, 1)) is True
        assert provider.calls == cache.stats()["connects"] == 2


class Early(Streaming):
    """Publishes a new token right behind each answer, which is the one before it."""

    async def get_credentials_async(self) -> Any:
        answer = self.get_credentials()
        self.renew(Token(f"{SECRET}-{self.calls}"))
        return answer


async def test_a_renewal_during_a_login_is_sent_behind_it(
    server: EmbeddedServer, backend: str, account: Account
) -> None:
    account.give(f"{SECRET}-0", f"{SECRET}-1")
    account.redis.config_resetstat()
    provider = Early()
    async with open_cache(server, provider, commandTimeout=LONG) as cache:
        await until(account.logins)
        assert await cache.set("a", 1, 1) is True
        assert (provider.calls, cache.stats()["connects"]) == (1, 1)


class Nonsense:
    """An object that is no token."""

    def try_get(self, key: str) -> str:
        raise ValueError(SECRET)


async def test_a_failed_renewal_is_logged_without_its_text(
    server: EmbeddedServer, backend: str, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    provider = Streaming()
    async with open_cache(server, provider) as cache:
        assert provider.failed is not None
        provider.failed(RuntimeError(SECRET))
        provider.renew(Nonsense())
        assert await cache.set("a", 1, 1) is True
    said = [record.getMessage() for record in caplog.records if "no new cred" in record.msg]
    place = f"no new credentials for {server.host}:{server.port}"
    assert said == [f"{place}: RuntimeError", f"{place}: ValueError"]


class Issuer(IdentityProviderInterface):
    """Issues tokens that stay valid a little longer than stated.

    A token just issued may be used while the next one is being issued.
    """

    def __init__(self, account: Account) -> None:
        self.issued = 0
        self._account = account
        self._valid: deque[str] = deque(maxlen=3)

    def request_token(self, force_refresh: bool = False) -> SimpleToken:
        self.issued += 1
        token = f"{SECRET}-{self.issued}"
        self._valid.append(token)
        self._account.give(*self._valid)
        now = time.time() * 1000
        return SimpleToken(token, now + 100, now, {"oid": USER})


class Managed(StreamingCredentialProvider):
    """A provider that uses redis-py's own TokenManager, as redis-entraid does."""

    def __init__(self, issuer: Issuer) -> None:
        policy = RetryPolicy(3, 10)
        self._manager = TokenManager(issuer, TokenManagerConfig(0.5, 0, 1000, policy))
        self._listener = CredentialsListener()
        self._streaming = False

    def get_credentials(self) -> Any:
        pytest.fail("the blocking way was taken")

    async def get_credentials_async(self) -> Any:
        token = (await self._manager.acquire_token_async()).get_token()
        if not self._streaming:
            await self._manager.start_async(self._listener, skip_initial=True)
            self._streaming = True
        return token.try_get("oid"), token.get_value()

    def on_next(self, callback: Any) -> None:
        self._listener.on_next = callback

    def on_error(self, callback: Any) -> None:
        self._listener.on_error = callback

    def is_streaming(self) -> bool:
        return self._streaming

    def stop(self) -> None:
        self._manager.stop()


async def test_redis_py_token_manager_works(
    server: EmbeddedServer, backend: str, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    """It awaits its callbacks, which providers with threads do not."""
    issuer = Issuer(account)
    provider = Managed(issuer)
    async with open_cache(server, provider, commandTimeout=LONG) as cache:
        await until(lambda: issuer.issued >= 6)
        assert await result_of(cache.set("a", 1, 1)) is True
        assert_silent(cache)
    provider.stop()
    assert not [record for record in caplog.records if "no new cred" in record.msg]


# -- credentials and permissions that change on the server


async def test_a_rotated_password(
    make_server: Callable[..., EmbeddedServer], backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The right error at once, paced attempts, and recovery when the password is corrected."""
    server = make_server("--requirepass", f"{SECRET}-0")
    async with FaultProxy(server.host, server.port) as proxy:
        options = {"host": proxy.host, "port": proxy.port, "password": f"{SECRET}-0"}
        cache = dscache.AsyncCache.from_config(
            {"name": "redis", "options": options | {"commandTimeout": LONG, "connectTimeout": LONG}}
        )
        assert await result_of(cache.set("a", 1, 1)) is True
        with redis_py.Redis(port=server.port, password=f"{SECRET}-0") as admin:
            admin.config_set("requirepass", f"{SECRET}-1")
            # An open connection continues; the next one is refused.
            assert await result_of(cache.set("a", 2, 2)) is True
            admin.client_kill_filter(_type="normal", skipme=True)
            await until(lambda: not cache.is_ready)
            before = proxy.accepted
            for _ in range(200):
                for ask in (
                    lambda: cache.get("a"),
                    lambda: cache.set("a", 3, 3),
                    lambda: cache.set_bulk({"a": (3, 3)}),
                    cache.when_ready,
                ):
                    error = await result_of(ask())
                    assert isinstance(error, dscache.ReplyError)
                    assert error.code == "WRONGPASS"
                await asyncio.sleep(0.005)
            # Operations that are refused at once don't speed up the attempts.
            assert proxy.accepted - before <= 15
            admin.config_set("requirepass", f"{SECRET}-0")
        await until(lambda: cache.is_ready)
        assert (await result_of(cache.get("a"))).version == 2
        await cache.close()
    lines = [r.getMessage() for r in caplog.records if r.name == "dscache"]
    assert sum("can't connect" in line for line in lines) == 1


async def test_a_permission_that_is_revoked_and_restored(
    server: EmbeddedServer, backend: str, account: Account
) -> None:
    options = {"username": USER, "password": f"{SECRET}-0", "commandTimeout": LONG}
    place = {"host": server.host, "port": server.port}
    async with dscache.AsyncCache.from_config(
        {"name": "redis", "options": place | options}
    ) as cache:
        assert await result_of(cache.set("a", 1, 1)) is True
        for permission in ("-mset", "-@write"):
            account.redis.execute_command("ACL", "SETUSER", USER, permission)
            error = await result_of(cache.set("a", 2, 2))
            assert isinstance(error, dscache.ReplyError)
            assert error.code == "NOPERM"
            assert (await result_of(cache.get("a"))).version == 1
            account.redis.execute_command("ACL", "SETUSER", USER, "+@all")
            assert await result_of(cache.set("a", 1, 1)) is True
        # Without keys there is nothing left to read, and the connection is as good as before.
        account.redis.execute_command("ACL", "SETUSER", USER, "resetkeys", "~b*")
        for call in (cache.get, cache.head, cache.delete):
            error = await result_of(call("a"))
            assert isinstance(error, dscache.ReplyError)
            assert error.code == "NOPERM"
        assert await result_of(cache.set("b", 1, 1)) is True
        account.redis.execute_command("ACL", "SETUSER", USER, "allkeys")
        assert (await result_of(cache.get("a"))).version == 1
        assert cache.stats()["connects"] == 1


async def test_a_user_who_is_removed_and_restored(
    server: EmbeddedServer, backend: str, account: Account
) -> None:
    provider = Async((USER, f"{SECRET}-0"))
    async with open_cache(server, provider, commandTimeout=LONG) as cache:
        assert await result_of(cache.set("a", 1, 1)) is True
        account.redis.acl_deluser(USER)  # which closes the user's connections
        await until(lambda: not cache.is_ready)
        while True:  # until the first attempt to reconnect was refused
            error = await result_of(cache.set("a", 2, 2))
            if isinstance(error, dscache.ReplyError):
                break
        assert error.code == "WRONGPASS"
        account.give(f"{SECRET}-0")
        await until(lambda: cache.is_ready)
        assert await result_of(cache.set("a", 3, 3)) is True


# -- certificates


class Certificates:
    """An authority, and certificates of it and of another one: good, and bad in each way."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        past = datetime.now(UTC) - timedelta(days=1)
        self.authority = authority.cert_pem.bytes().decode()
        self._folder = folder
        self.good = self._write("good", authority.issue_cert("127.0.0.1"))
        self.bad = {
            "authority": self._write("authority", trustme.CA().issue_cert("127.0.0.1")),
            "host": self._write("host", authority.issue_cert("elsewhere.example")),
            "expired": self._write(
                "expired",
                authority.issue_cert(
                    "127.0.0.1", not_before=past - timedelta(days=9), not_after=past
                ),
            ),
        }

    def _write(self, name: str, certificate: trustme.LeafCert) -> str:
        path = self._folder / f"{name}.pem"
        certificate.private_key_and_cert_chain_pem.write_to_path(str(path))
        return str(path)


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("issued"))


@dataclass
class TlsServer:
    """A server behind TLS whose certificate may change at any moment."""

    proxy: FaultProxy
    context: ssl.SSLContext
    options: dict[str, Any]

    def present(self, path: str) -> None:
        """Present this certificate from now on, and close the connections that saw another."""
        self.context.load_cert_chain(path)
        self.proxy.cut()


@pytest.fixture
async def tls_server(server: EmbeddedServer, issued: Certificates) -> AsyncIterator[TlsServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    async with (
        FaultProxy(server.host, server.port, tls=context) as inner,
        # A proxy in front of TLS counts the attempts to connect.
        FaultProxy(inner.host, inner.port) as proxy,
    ):
        options = {"host": proxy.host, "port": proxy.port, "tls": {"ca": issued.authority}}
        options |= {"commandTimeout": LONG, "connectTimeout": LONG}
        yield TlsServer(proxy, context, options)


SAID = {
    "authority": "certificate",
    "expired": "certificate has expired",
    "host": r"127\.0\.0\.1",
}


@pytest.mark.parametrize("flaw", SAID)
async def test_a_bad_certificate_fails_at_once_until_it_is_replaced(
    tls_server: TlsServer, issued: Certificates, backend: str, redis: redis_py.Redis, flaw: str
) -> None:
    tls_server.present(issued.bad[flaw])
    cache = dscache.AsyncCache.from_config({"name": "redis", "options": tls_server.options})
    for ask in (
        cache.when_ready,
        lambda: cache.get("a"),
        lambda: cache.set("a", 1, 1),
        lambda: cache.get_bulk(["a"]),
    ):
        error = await result_of(ask())
        assert type(error) is dscache.ConnectError
        with pytest.raises(dscache.ConnectError, match=f"certificate is refused: .*{SAID[flaw]}"):
            raise error
    tls_server.present(issued.good)
    await until(lambda: cache.is_ready)
    assert await result_of(cache.set("a", 1, 1)) is True
    await cache.close()


@pytest.mark.parametrize("flaw", SAID)
async def test_reconnections_are_paced_after_a_certificate_goes_bad(
    tls_server: TlsServer, issued: Certificates, backend: str, redis: redis_py.Redis, flaw: str
) -> None:
    tls_server.present(issued.good)
    async with dscache.AsyncCache.from_config(
        {"name": "redis", "options": tls_server.options}
    ) as cache:
        assert await result_of(cache.set("a", 1, 1)) is True
        tls_server.present(issued.bad[flaw])
        await until(lambda: not cache.is_ready)
        before = tls_server.proxy.accepted
        for _ in range(100):
            assert isinstance(await result_of(cache.get("a")), dscache.ConnectError)
            await asyncio.sleep(0.01)
        assert 1 <= tls_server.proxy.accepted - before <= 15
        tls_server.present(issued.good)
        await until(lambda: cache.is_ready)
        assert (await result_of(cache.get("a"))).version == 1


async def test_a_corrected_authority_is_read_again(
    tls_server: TlsServer, issued: Certificates, backend: str, tmp_path: Path
) -> None:
    """Files are read at each connection: a rotated authority needs no restart."""
    tls_server.present(issued.good)
    path = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    options = tls_server.options | {"tls": {"ca": str(path)}}
    cache = dscache.AsyncCache.from_config({"name": "redis", "options": options})
    error = await result_of(cache.when_ready())
    assert isinstance(error, dscache.ConnectError)
    path.write_text("no certificate for a moment")
    await asyncio.sleep(0.3)
    path.write_text(issued.authority)
    await until(lambda: cache.is_ready)
    assert await result_of(cache.set("a", 1, 1)) is True
    await cache.close()


# -- a silent peer


@pytest.fixture
def _frequent_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_PING_AFTER", 0.1)
    monkeypatch.setattr(heartbeat, "_PING_ANSWER", 0.1)


@pytest.mark.usefixtures("_frequent_heartbeats")
async def test_a_silent_peer_is_found_without_traffic(
    make_cache: Callable[..., Awaitable[dscache.AsyncCache]], proxy: FaultProxy
) -> None:
    cache = await make_cache(url=proxy.url, connectTimeout=300, commandTimeout=LONG)
    # A peer that answers is pinged now and then, and kept.
    commands = proxy.forwarded["replies"]
    await until(lambda: proxy.forwarded["replies"] > commands + 3 * len("+PONG\r\n"))
    assert cache.stats()["connects"] == 1
    proxy.stall()
    await until(lambda: not cache.is_ready)
    assert "did not answer" in cache.stats()["last_loss"]
    proxy.resume()
    await until(lambda: cache.is_ready)
    assert await result_of(cache.set("a", 1, 1)) is True


@pytest.mark.parametrize("direction", ["requests", "replies"])
async def test_a_silent_peer_is_found_by_unanswered_commands(
    make_cache: Callable[..., Awaitable[dscache.AsyncCache]], proxy: FaultProxy, direction: Any
) -> None:
    cache = await make_cache(url=proxy.url, connectTimeout=LONG, commandTimeout=200)
    await cache.set("a", 1, 1)
    proxy.stall(direction)
    assert isinstance(await result_of(cache.get("a")), dscache.DeadlineExceeded)
    await until(lambda: not cache.is_ready)
    # The heartbeat finds it where the loop was late to send the command.
    assert re.search("silent|did not answer", cache.stats()["last_loss"])
    proxy.resume()
    await until(lambda: cache.is_ready)
    assert (await result_of(cache.get("a"))).version == 1
    assert cache.stats()["connects"] == 2


@pytest.mark.parametrize("family", ["tcp", "tls"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_system_watches_the_connection_too(
    server: EmbeddedServer,
    tls_proxy_files: tuple[ssl.SSLContext, str],
    backend: str,
    loop: str,
    family: str,
) -> None:
    async def look() -> dict[str, int]:
        context, authority = tls_proxy_files
        tls = family == "tls"
        async with FaultProxy(server.host, server.port, tls=context if tls else None) as proxy:
            options: dict[str, Any] = {"host": proxy.host, "port": proxy.port}
            options |= {"tls": {"ca": authority}} if tls else {}
            config = {"name": "redis", "options": options}
            async with dscache.AsyncCache.from_config(config) as cache:
                transport = cache._topology.link._transport  # type: ignore[union-attr]
                link = transport.get_extra_info("socket")
                found = {"SO_KEEPALIVE": link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)}
                names = ("TCP_NODELAY", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
                for name in (*names, "TCP_USER_TIMEOUT"):
                    if hasattr(socket, name):
                        found[name] = link.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                return found

    factory = uvloop.new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        found = runner.run(look())
    assert found.pop("SO_KEEPALIVE")
    assert found.pop("TCP_NODELAY")
    # Dead after this many silent milliseconds, by heartbeat or by the system.
    assert found.pop("TCP_USER_TIMEOUT", 10_000) == 10_000
    if "TCP_KEEPIDLE" in found:
        probes = found["TCP_KEEPINTVL"] * found["TCP_KEEPCNT"]
        assert found["TCP_KEEPIDLE"] + probes <= 10


@pytest.fixture
def tls_proxy_files(issued: Certificates) -> tuple[ssl.SSLContext, str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.good)
    return context, issued.authority
