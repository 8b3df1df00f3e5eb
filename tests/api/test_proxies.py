"""Proxies in front of several servers: twemproxy, and fake ones that speak like others."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import hiredis
import pytest
import redis as redis_py

import dscache
from dscache.core.keys import slot_of_key
from dscache.embedded import EmbeddedServer
from tests.conftest import SERVERS, _server_id
from tests.support.blocking import BlockingCache
from tests.support.faults import FakeServer
from tests.support.twemproxy import Twemproxy, find_twemproxy
from tests.support.waiting import until

MakeCache = Callable[..., Awaitable[dscache.AsyncCache]]
MakeServer = Callable[..., EmbeddedServer]

SECRET = "pa55-w0rd"
RECORDS = {f"r{i}": (i, {"n": i}) for i in range(300)}
WRITES = ({}, {"if_newer": True}, {"ttl": 1000}, {"ttl": 1000, "if_newer": True})
CROSS_SLOT = b"-CROSSSLOT Keys in request don't hash to the same slot\r\n"
CLOSED_AT = ("HELLO", "CLIENT", "SCRIPT", "COMMAND", "READONLY", "INFO")

on_one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)
pytestmark = on_one_server


class ThreadedCache(BlockingCache):
    """A Cache of which each call has a thread, so that fakes on the loop can answer it."""

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._cache, name)
        return lambda *args, **options: asyncio.ensure_future(
            asyncio.to_thread(operation, *args, **options)
        )

    async def when_ready(self) -> None:
        await asyncio.to_thread(self._cache.when_ready)

    async def close(self) -> None:
        await asyncio.to_thread(self._cache.close)


@pytest.fixture(params=[dscache.AsyncCache, ThreadedCache], ids=["async", "blocking"])
def cache_class(request: pytest.FixtureRequest) -> Any:
    """Both kinds of cache, in turn."""
    return request.param


@pytest.fixture
def backends(make_server: MakeServer) -> list[EmbeddedServer]:
    """Two servers that a proxy hides."""
    return [make_server(), make_server()]


@pytest.fixture
def program() -> str:
    """The path of twemproxy, which no Python package holds; the report's header tells of it."""
    found = find_twemproxy()
    if found is None:
        pytest.skip("there is no twemproxy; make test fetches it where apt-get has it")
    return found


@pytest.fixture
def twemproxy(backends: list[EmbeddedServer], program: str) -> Iterator[Twemproxy]:
    """A twemproxy in front of them."""
    with Twemproxy(program, backends) as proxy:
        yield proxy


def keys_in(server: EmbeddedServer) -> int:
    with redis_py.Redis.from_url(server.url) as redis:
        return redis.dbsize()


# -- twemproxy


@pytest.mark.parametrize("options", [{"keyLayout": "hashtag"}, {"proxied": True}])
@pytest.mark.parametrize("how", WRITES, ids=str)
async def test_twemproxy_keeps_every_record(
    make_cache: MakeCache,
    twemproxy: Twemproxy,
    backends: list[EmbeddedServer],
    options: dict[str, Any],
    how: dict[str, Any],
) -> None:
    cache = await make_cache(host="127.0.0.1", port=twemproxy.port, connectionName="me", **options)
    assert await cache.set_bulk(RECORDS, **how) == set()
    found = await cache.get_bulk(RECORDS)
    assert {name: (one.version, one.data) for name, one in found.items()} == RECORDS
    assert await cache.head_bulk(RECORDS) == {name: pair[0] for name, pair in RECORDS.items()}
    counts = [keys_in(server) for server in backends]
    assert sum(counts) == 2 * len(RECORDS)
    assert min(counts) > 0
    one_tick = [cache.set(f"x{i}", 2, [i], **how) for i in range(5)]
    assert await asyncio.gather(*one_tick) == [True] * 5
    reads = await asyncio.gather(*(cache.get(f"x{i}") for i in range(5)))
    assert [one.data for one in reads] == [[i] for i in range(5)]
    if how.get("if_newer"):
        assert await cache.set("x0", 1, [], **how) is False
        assert await cache.set_bulk(RECORDS, **how) == set(RECORDS)
    assert await cache.delete_bulk(RECORDS) == len(RECORDS)
    assert await cache.get_bulk(RECORDS) == {}


async def test_twemproxy_with_keys_on_two_servers(
    make_cache: MakeCache, twemproxy: Twemproxy
) -> None:
    cache = await make_cache(host="127.0.0.1", port=twemproxy.port)
    assert await cache.set_bulk(RECORDS) == set()
    assert len(await cache.get_bulk(RECORDS)) == len(RECORDS)
    for how in WRITES[1:]:
        with pytest.raises(dscache.RecordError, match="keyLayout: hashtag"):
            await cache.set("r1", 900, "lost", **how)
        with pytest.raises(dscache.BulkError) as caught:
            await cache.set_bulk({"{t}a": (5, 1), "r1": (900, 1), "{t}b": (6, 2)}, **how)
        assert set(caught.value.errors) == {"r1"}
        assert (await cache.get("r1")).version == 1
        assert await cache.head_bulk(["{t}a", "{t}b"]) == {"{t}a": 5, "{t}b": 6}
        await cache.delete_bulk(["{t}a", "{t}b"])


async def test_twemproxy_that_hides_one_server(
    make_cache: MakeCache, backends: list[EmbeddedServer], program: str
) -> None:
    with Twemproxy(program, backends[:1]) as proxy:
        cache = await make_cache(host="127.0.0.1", port=proxy.port, proxied=False)
        assert await cache.set_bulk(RECORDS, ttl=1000) == set()
        assert len(await cache.get_bulk(RECORDS)) == len(RECORDS)


async def test_twemproxy_with_a_password(
    make_cache: MakeCache, make_server: MakeServer, program: str
) -> None:
    guarded = [make_server("--requirepass", SECRET), make_server("--requirepass", SECRET)]
    with Twemproxy(program, guarded, SECRET) as proxy:
        options = {"host": "127.0.0.1", "port": proxy.port, "proxied": True}
        cache = await make_cache(password=SECRET, **options)
        assert await cache.set_bulk(RECORDS, if_newer=True) == set()
        assert len(await cache.get_bulk(RECORDS)) == len(RECORDS)
        with pytest.raises(dscache.ReplyError) as caught:
            await make_cache(password="wrong-one", **options)
        assert "wrong-one" not in str(caught.value)


# -- handshakes


@pytest.mark.parametrize("closing", CLOSED_AT[:4])
async def test_a_server_that_closes_in_the_handshake(make_cache: MakeCache, closing: str) -> None:
    answers: dict[str, Any] = dict.fromkeys(CLOSED_AT)
    if closing != "HELLO":
        answers = {"HELLO": b"-ERR unknown command\r\n", "SCRIPT": b"-ERR no\r\n", closing: None}
    answers["MGET"] = b"*2\r\n$1\r\n5\r\n$3\r\n[5]\r\n"
    async with FakeServer(answers) as fake:
        cache = await make_cache(url=fake.url, password=SECRET, connectionName="me")
        assert (await cache.get("a")).version == 5
        # The second attempt finds out that the server is well, and the third is bare.
        assert fake.accepted == 3
        sent = {bytes(command[0]) for command in fake.commands[-2:]}
        assert sent == {b"AUTH", b"MGET"}
        await cache.close()


async def test_bare_handshakes_are_remembered(make_cache: MakeCache) -> None:
    answers: dict[str, Any] = dict.fromkeys(CLOSED_AT)
    answers["MGET"] = b"*2\r\n$1\r\n5\r\n$3\r\n[5]\r\n"
    async with FakeServer(answers) as fake:
        cache = await make_cache(url=fake.url)
        assert (await cache.get("a")).version == 5
        before, connections = len(fake.commands), fake.accepted
        once = iter([None])
        fake.answers["MGET"] = lambda _command: next(once, answers["MGET"])
        assert (await cache.get("b")).version == 5
        assert fake.accepted == connections + 1
        assert b"HELLO" not in {bytes(command[0]) for command in fake.commands[before:]}
        await cache.close()


async def test_a_server_that_restarts_is_no_proxy(make_cache: MakeCache) -> None:
    async with FakeServer({"HELLO": None, "PING": None}) as fake:
        opening = asyncio.ensure_future(make_cache(url=fake.url, connectionName="me"))
        await until(lambda: fake.accepted > 2)
        del fake.answers["PING"]
        fake.answers.update({"HELLO": HELLO, "PING": b"+PONG\r\n"})
        cache = await opening
        assert fake.commands[-1][0] != b"PING"
        assert b"HELLO" in {bytes(command[0]) for command in fake.commands[-4:]}
        await cache.close()


HELLO = b"%1\r\n$6\r\nserver\r\n$5\r\nredis\r\n"
REFUSALS = {
    "envoy": b"-unsupported command 'HELLO'\r\n",
    "codis": b"-ERR handle request, command 'HELLO' is not allowed\r\n",
    "noauth": b"-NOAUTH Authentication required.\r\n",
    "arguments": b"-ERR wrong number of arguments for 'hello' command\r\n",
    "redis 5": b"-ERR unknown command `HELLO`, with args beginning with: `3`, \r\n",
    "version": b"-NOPROTO unsupported protocol version\r\n",
    "bare": b"-ERR\r\n",
}


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_any_refusal_of_hello_falls_back_to_resp2(
    make_cache: MakeCache, refusal: str
) -> None:
    no = b"-ERR not here\r\n"
    answers: dict[str, Any] = {"HELLO": REFUSALS[refusal], "CLIENT": no, "SCRIPT": no}
    answers |= {"COMMAND": no, "PING": no, "MGET": b"*2\r\n$1\r\n5\r\n$3\r\n[5]\r\n"}
    async with FakeServer(answers) as fake:
        for password in (None, SECRET):
            cache = await make_cache(url=fake.url, password=password, connectionName="me")
            assert (await cache.get("a")).version == 5
            await cache.close()
        assert fake.accepted == 2
        assert [b"AUTH", SECRET.encode()] in fake.commands


@pytest.mark.parametrize("word", ["WRONGPASS invalid", "DENIED protected mode", "LOADING wait"])
async def test_some_refusals_of_hello_are_final(make_cache: MakeCache, word: str) -> None:
    async with FakeServer({"HELLO": f"-{word}\r\n".encode()}) as fake:
        with pytest.raises(dscache.DscacheError, match=word):
            await make_cache(url=fake.url, connectTimeout=300, commandTimeout=300)
        assert {bytes(one[0]) for one in fake.commands} <= {b"HELLO", b"SCRIPT", b"COMMAND"}


async def test_a_refused_ping_ends_no_connection(
    make_cache: MakeCache, cache_class: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dscache.aio.heartbeat._PING_AFTER", 0.05)
    answers = {"PING": b"-ERR no\r\n", "MGET": b"*2\r\n$1\r\n5\r\n$3\r\n[5]\r\n"}
    async with FakeServer(answers) as fake:
        cache = await make_cache(url=fake.url)
        if cache_class is dscache.AsyncCache:
            await until(lambda: sum(one[0] == b"PING" for one in fake.commands) > 2)
        assert (await cache.get("a")).version == 5
        assert fake.accepted == 1
        await cache.close()


# -- proxies that check slots


class StrictProxy(FakeServer):
    """Passes commands to a server, and refuses those with keys of several slots."""

    def __init__(self, server: EmbeddedServer, refused: tuple[str, ...], error: bytes) -> None:
        self._server = socket.create_connection((server.host, server.port))
        self.refusals = 0
        self._refused = refused
        self._error = error
        super().__init__({"*": self._pass_on})

    def _pass_on(self, command: list[bytes]) -> bytes:
        name = command[0].decode().upper()
        if name in ("SCRIPT", "COMMAND"):
            return b"-ERR unknown command\r\n"
        keys = command[1:]
        if name == "MSET":
            keys = command[1::2]
        elif name in ("EVAL", "EVALSHA"):
            keys = command[3 : 3 + int(command[2])]
        if name in self._refused and len({slot_of_key(key) for key in keys}) > 1:
            self.refusals += 1
            return self._error
        self._server.sendall(hiredis.pack_command(tuple(command)))
        reader, reply = hiredis.Reader(), b""
        while reader.gets() is False:
            data = self._server.recv(65536)
            reader.feed(data)
            reply += data
        return reply

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await super().__aexit__()


ACROSS = {"redis": CROSS_SLOT, "codis": b"-ERR all keys must be in the same slot\r\n"}


@pytest.mark.parametrize("error", ACROSS)
@pytest.mark.parametrize("refused", [("EVAL", "EVALSHA"), ("EVAL", "EVALSHA", "MSET", "MGET")])
@pytest.mark.parametrize("how", [{}, {"if_newer": True}, {"ttl": 1000}], ids=str)
async def test_refusals_of_several_slots(
    make_cache: MakeCache,
    make_server: MakeServer,
    how: dict[str, Any],
    refused: tuple[str, ...],
    error: str,
) -> None:
    async with StrictProxy(make_server(), refused, ACROSS[error]) as proxy:
        cache = await make_cache(url=proxy.url, keyLayout="hashtag")
        three = [cache.set(f"x{i}", 2, [i], **how) for i in range(3)]
        assert await asyncio.gather(*three) == [True] * 3
        assert await cache.set_bulk(RECORDS, **how) == set()
        found = await cache.get_bulk([*RECORDS, "x0", "x1", "x2"])
        assert {name: one.version for name, one in found.items()} == {
            **{name: pair[0] for name, pair in RECORDS.items()},
            **dict.fromkeys(("x0", "x1", "x2"), 2),
        }
        before = proxy.refusals
        assert await cache.set_bulk(dict.fromkeys(RECORDS, (400, 0)), **how) == set()
        assert len(await cache.get_bulk(RECORDS)) == len(RECORDS)
        assert proxy.refusals == before  # it is known by now
        await cache.close()


async def test_a_proxied_server_is_sent_one_record_a_command(
    make_cache: MakeCache, make_server: MakeServer
) -> None:
    refused = ("EVAL", "EVALSHA", "MSET")
    async with StrictProxy(make_server(), refused, CROSS_SLOT) as proxy:
        cache = await make_cache(url=proxy.url, proxied=True)
        for how in WRITES:
            old = set(RECORDS) if "if_newer" in how else set()
            assert await cache.set_bulk(RECORDS, **how) == old
        assert len(await cache.get_bulk(RECORDS)) == len(RECORDS)
        assert proxy.refusals == 0
        await cache.close()


@pytest.mark.parametrize("how", [{"if_newer": True}, {"ttl": 1000}], ids=str)
async def test_keys_in_two_slots_are_refused_with_the_remedy(
    make_cache: MakeCache, make_server: MakeServer, how: dict[str, Any]
) -> None:
    async with StrictProxy(make_server(), ("EVAL", "EVALSHA"), CROSS_SLOT) as proxy:
        cache = await make_cache(url=proxy.url)
        for _ in range(2):
            with pytest.raises(dscache.RecordError, match="keyLayout: hashtag"):
                await cache.set("a", 1, [], **how)
        three = [cache.set(name, 1, [], **how) for name in ("b", "{t}c", "d")]
        b, c, d = await asyncio.gather(*three, return_exceptions=True)
        assert isinstance(b, dscache.RecordError)
        assert isinstance(d, dscache.RecordError)
        assert c is True
        await cache.close()
