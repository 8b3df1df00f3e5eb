"""Errors of wrong arguments and wrong settings: each names its place and the true remedy."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import redis as redis_py
from key_value.aio.errors import SerializationError
from prometheus_client import CollectorRegistry
from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider

import dscache
from dscache import otel, prometheus
from dscache.deepstream import Peer
from dscache.embedded import EmbeddedServer
from dscache.errors import (
    BulkError,
    ConfigError,
    ConnectError,
    DeadlineExceeded,
    LoadError,
    MessageError,
    ProtocolError,
    RecordDamaged,
    RecordError,
    RecordMissing,
    ReplyError,
    UsageError,
)
from dscache.key_value import RecordStore
from tests import conftest
from tests.support.either import Either
from tests.support.faults import FakeServer

# Options by keyword, as of any type.
PATIENT: dict[str, Any] = conftest.PATIENT
KINDS = pytest.mark.parametrize("kind", ["AsyncCache", "Cache"])
SECRET = "hunter2-secret"


class Broken:
    """Names whose own code has a mistake."""

    def __iter__(self) -> Any:
        raise TypeError("a mistake of the program")


@pytest.fixture(params=["redis", "near", "memory"])
def source(
    request: pytest.FixtureRequest, server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> dict[str, Any]:
    """The options of a cache on a server, with a near cache, and in memory."""
    if request.param == "memory":
        return {"name": "memory"}
    return {"url": server.url} | ({"nearCache": True} if request.param == "near" else {})


# -- arguments of operations

NAMES_OPERATIONS = ("get_bulk", "head_bulk", "delete_bulk", "fetch_bulk")


def arguments_of(operation: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return further arguments of an operation on names."""
    return ((lambda names: {},), {"ttl": None}) if operation == "fetch_bulk" else ((), {})


@KINDS
@pytest.mark.parametrize("keeps_missing", [False, True])
async def test_names_that_are_none(kind: str, source: dict[str, Any], keeps_missing: bool) -> None:
    async with Either(kind, **source) as either:
        if keeps_missing:
            await either.do("fetch", "none", lambda name: None, ttl=1, keep_missing=1)
        for operation in NAMES_OPERATIONS:
            more, options = arguments_of(operation)
            for names, said in (
                (None, f"{operation} takes an iterable of names, not None"),
                (3, f"{operation} takes an iterable of names, not 3"),
                (
                    b"abc",
                    f"{operation} takes an iterable of names, not one bytes; "
                    f"write {operation}(['abc'])",
                ),
            ):
                with pytest.raises(RecordError) as caught:
                    await either.do(operation, names, *more, **options)
                assert str(caught.value) == said
            with pytest.raises(TypeError, match="a mistake of the program"):
                await either.do(operation, Broken(), *more, **options)
        with pytest.raises(RecordError, match="takes an iterable of names, not None"):
            await either.do("get_bulk", None, type=dict)


@KINDS
@pytest.mark.parametrize("option", ["ttl", "refresh_after", "keep_missing", "jitter"])
async def test_an_option_of_fetch_without_a_hash(
    kind: str, source: dict[str, Any], option: str
) -> None:
    options: dict[str, Any] = {"ttl": 3} | {option: [1]}
    async with Either(kind, **source) as either:
        with pytest.raises(RecordError, match=rf"^fetch: {option} must be .*, not \[1\]"):
            await either.do("fetch", "a", lambda name: 1, **options)
        with pytest.raises(RecordError, match=rf"^fetch_bulk: {option} must be .*, not \[1\]"):
            await either.do("fetch_bulk", ["a"], lambda names: {}, **options)


@KINDS
async def test_a_type_that_is_a_text(kind: str, source: dict[str, Any]) -> None:
    said = "type must be a class or another type, not the text 'b'"
    async with Either(kind, **source) as either:
        for operation, arguments in (
            ("get", ("a", "b")),
            ("get_bulk", (["a"], "b")),
        ):
            with pytest.raises(TypeError, match=said):
                await either.do(operation, *arguments)
        with pytest.raises(TypeError, match=said):
            await either.do("fetch", "a", lambda name: 1, ttl=1, type="b")
        with pytest.raises(TypeError, match=said):
            await either.do("update", "a", lambda data: data, type="b")
    with pytest.raises(TypeError, match=said):
        dscache.Record("a", 1, b"1").decode("b")


@KINDS
async def test_an_if_newer_that_is_a_text(kind: str, source: dict[str, Any]) -> None:
    async with Either(kind, **source) as either:
        said = "if_newer must be True or False, not 'no'"
        with pytest.raises(RecordError, match=f"^record 'a': {said}$"):
            await either.do("set", "a", 1, 1, if_newer="no")
        with pytest.raises(RecordError, match=f"^set_bulk: {said}$"):
            await either.do("set_bulk", {"a": (1, 1)}, if_newer="no")
        assert await either.do("head", "a") is None
        assert await either.do("set", "a", 1, 1, if_newer=1) is True
        await either.do("delete", "a")


@KINDS
@pytest.mark.parametrize("type_", [5, (int, str)], ids=["int", "tuple"])
async def test_a_type_that_is_none(kind: str, source: dict[str, Any], type_: Any) -> None:
    said = re.escape(f"type must be a class or another type that msgspec decodes, not {type_!r}")
    async with Either(kind, **source) as either:
        for operation, arguments in (
            ("get", ("a",)),
            ("get_bulk", (["a"],)),
            ("update", ("a", lambda data: data)),
        ):
            with pytest.raises(TypeError, match=f"^{said}$"):
                await either.do(operation, *arguments, type=type_)
        with pytest.raises(TypeError, match=f"^{said}$"):
            await either.do("fetch", "a", lambda name: 1, ttl=1, type=type_)
        with pytest.raises(TypeError, match=f"^{said}$"):
            await either.do("fetch_bulk", ["a"], lambda names: {}, ttl=1, type=type_)
        with pytest.raises(TypeError, match=f"^{said}$"):
            await either.all("a", records=True, type=type_)


@KINDS
async def test_records_of_a_scan_and_a_watch_that_is_a_text(
    kind: str, source: dict[str, Any]
) -> None:
    async with Either(kind, **source) as either:
        with pytest.raises(UsageError, match=r"^scan: records must be True or False, not 'no'$"):
            either.cache.scan("a", records="no")
        if source != {"name": "memory"}:
            with pytest.raises(UsageError, match=r"^watch: records must be True or False, not"):
                either.cache.watch("a", records="no")
        assert await either.all("none", records=1) == []


@KINDS
async def test_data_that_is_no_json(
    kind: str, source: dict[str, Any], server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    async with Either(kind, **source) as either:
        said = "Encoding objects of type object is unsupported; convert it to a dict, list, str or"
        with pytest.raises(RecordError, match=said):
            await either.do("set", "a", 1, {"x": object()})
        if source != {"name": "memory"}:
            redis.mset({"a_v": "1", "a_d": "{"})
            record = await either.do("get", "a")
            with pytest.raises(RecordDamaged, match=r"isn't JSON: .*; set or delete the record"):
                _ = record.data


# -- operations that are made of others


@KINDS
async def test_an_error_names_the_call(kind: str, backend: str) -> None:
    """And not the read or write that the call was made of."""
    closed = {"host": "127.0.0.1", "port": 1, "commandTimeout": 100, "connectTimeout": 100}
    either = Either(kind, **closed)
    calls: dict[str, tuple[Any, ...]] = {
        "get 'a'": ("get", "a"),
        "update 'a'": ("update", "a", lambda data: data),
        "patch 'a'": ("patch", "a", {"b": 1}),
    }
    try:
        for said, (operation, *arguments) in calls.items():
            with pytest.raises(ConnectError, match=f"^{said}: no connection to 127.0.0.1:1 within"):
                await either.do(operation, *arguments)
        for options in ({}, {"refresh_after": 1}):
            with pytest.raises(ConnectError, match=r"^fetch 'a': no connection to"):
                await either.do("fetch", "a", lambda name: 1, ttl=2, **options)
            with pytest.raises(ConnectError, match=r"^fetch_bulk: no connection to"):
                await either.do("fetch_bulk", ["a"], lambda names: {}, ttl=2, **options)
    finally:
        await either.do("close")


@KINDS
async def test_a_refusal_names_the_call(
    kind: str, server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    """Whether it meets the read or the write."""
    redis.set("a_v", "1")
    redis.set("a_d", "{}")
    refusal = b"-OOM command not allowed\r\n"
    found = b"*2\r\n$1\r\n1\r\n$2\r\n{}\r\n"
    for answers in ({"MGET": refusal}, {"MGET": found, "EVALSHA": refusal}):
        async with FakeServer(answers) as fake, Either(kind, url=fake.url) as either:
            with pytest.raises(ReplyError) as caught:
                await either.do("update", "a", lambda data: [1])
            assert "(update 'a' at 127.0.0.1:" in str(caught.value)
            assert caught.value.message == "OOM command not allowed"
    async with (
        FakeServer({"MGET": refusal}) as fake,
        Either(kind, url=fake.url) as either,
    ):
        with pytest.raises(ReplyError, match=r"\(fetch 'a' at 127.0.0.1:"):
            await either.do("fetch", "a", lambda name: 1, ttl=1)


REFUSALS = {
    "WRONGPASS invalid username-password pair": "check username and password",
    "NOAUTH Authentication required.": "set password, and username if the server has users",
    "NOPERM User x has no permissions": "let ACL SETUSER give this user the command and the keys",
    "MOVED 15495 10.0.0.1:7000": "it is a node of a cluster, so give nodes in place of host",
    "CROSSSLOT Keys in request don't hash to the same slot": "give nodes in place of host and port",
    "OOM command not allowed": "raise maxmemory of the server, or choose a maxmemory-policy that",
    "ERR Protocol error: invalid bulk length": "write less data, or raise proto-max-bulk-len of",
}


@KINDS
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda words: words.split()[0])
async def test_a_refusal_of_the_server_has_a_remedy(kind: str, backend: str, refusal: str) -> None:
    said = f"^{re.escape(refusal)} .*; {REFUSALS[refusal]}"
    answers = {"MSET": f"-{refusal}\r\n".encode()}
    async with FakeServer(answers) as fake, Either(kind, url=fake.url) as either:
        with pytest.raises(ReplyError, match=said) as caught:
            await either.do("set", "q1", 1, 1)
        assert "(set 'q1' at " in str(caught.value)
        with pytest.raises(ReplyError, match=said) as caught:
            await either.do("set_bulk", {"q1": (1, 1), "q2": (1, 1)})
        assert "(set_bulk 'q1' at " in str(caught.value)


@KINDS
@pytest.mark.parametrize("command", ["SCAN", "CLIENT"])
async def test_a_refusal_of_a_scan_or_watch_has_a_remedy(
    kind: str, backend: str, command: str
) -> None:
    refusal = "NOPERM User x has no permissions"
    said = rf"^{refusal} \(.*{command}.*; {REFUSALS[refusal]}\)$"
    answers = {command: f"-{refusal}\r\n".encode()}

    async def refused(either: Either) -> None:
        if command == "SCAN":
            await either.all("a")
        elif kind == "AsyncCache":
            await either.cache.watch("a").__aenter__()
        else:
            await asyncio.to_thread(either.cache.watch("a").__enter__)

    async with FakeServer(answers) as fake, Either(kind, url=fake.url) as either:
        with pytest.raises(ReplyError, match=said):
            await refused(either)


@KINDS
async def test_a_server_that_speaks_no_resp_is_named_once(kind: str, backend: str) -> None:
    answers = {"HELLO": b"HTTP/1.1 400 Bad Request\r\n"}
    async with FakeServer(answers) as fake:
        either = Either(kind, url=fake.url)
        address = fake.url.removeprefix("redis://")
        with pytest.raises(ProtocolError, match=f"^get 'a': {address} sent no valid reply: "):
            await either.do("get", "a")
        await either.do("close")


@KINDS
async def test_names_as_arguments_of_a_bulk(kind: str, source: dict[str, Any]) -> None:
    async with Either(kind, **source) as either:
        with pytest.raises(RecordError, match=r"^get_bulk takes .*; write get_bulk\(\['a'\]\)$"):
            await either.do("get_bulk", "a", "b")


@KINDS
async def test_a_load_that_takes_no_name(kind: str, source: dict[str, Any]) -> None:
    """Python's own text is shown. That of another exception may contain a secret."""
    said = r"TypeError: .*takes 0 positional arguments but 1 was given; a load takes one argument"

    def load(_: Any) -> Any:
        raise TypeError(f"bad argument: {SECRET}")

    async with Either(kind, **source) as either:
        with pytest.raises(LoadError, match=said):
            await either.do("fetch", "no name", lambda: 1, ttl=1)
        with pytest.raises(BulkError, match=r"its load raised TypeError: .*takes 0 positional"):
            await either.do("fetch_bulk", ["no names"], lambda: {}, ttl=1)
        with pytest.raises(LoadError, match=r"its load raised TypeError$"):
            await either.do("fetch", "secret", load, ttl=1)


@KINDS
async def test_what_a_load_of_many_must_return(kind: str, source: dict[str, Any]) -> None:
    async with Either(kind, **source) as either:
        for result in ([1], None):
            name = f"loaded {type(result).__name__}"
            with pytest.raises(BulkError) as caught:
                await either.do("fetch_bulk", [name], lambda names, it=result: it, ttl=1)
            error = caught.value.errors[name]
            assert isinstance(error, LoadError)
            assert str(error) == (
                f"record '{name}': its load returned {type(result).__name__}; load_many must "
                "return a mapping of name to data"
            )
        with pytest.raises(LoadError, match=r"returned data that can't be stored: data can't be"):
            await either.do("fetch", "unfit", lambda name: object(), ttl=1)


async def test_an_awaitable_that_a_blocking_load_returns(source: dict[str, Any]) -> None:
    async def load(_: Any) -> Any:
        raise AssertionError

    said = "its load returned an awaitable, and a Cache awaits nothing; give a plain function"
    async with Either("Cache", **source) as either:
        with pytest.raises(LoadError, match=f"^record 'one': {said}"):
            await either.do("fetch", "one", lambda name: load(name), ttl=1)
        with pytest.raises(BulkError, match=f"record 'two': {said}"):
            await either.do("fetch_bulk", ["two"], lambda names: load(names), ttl=1)


async def test_an_async_cache_in_a_thread(backend: str) -> None:
    said = r"used from outside of it; call it in a coroutine .*, or use a Cache in threads$"
    async with dscache.AsyncCache({"name": "memory"}) as cache:
        with pytest.raises(UsageError, match=said):
            await asyncio.to_thread(cache.get, "a")


async def test_a_scan_without_an_event_loop(server: EmbeddedServer, backend: str) -> None:
    async with dscache.AsyncCache(server.url, **PATIENT) as cache:
        await cache.get("a")
        for begin in (cache.scan, cache.watch):
            with pytest.raises(UsageError, match=r"^an AsyncCache opens .*; call it in a co"):
                await asyncio.to_thread(begin, "a")


@KINDS
async def test_a_scan_names_itself(
    kind: str, source: dict[str, Any], redis: redis_py.Redis
) -> None:
    said = r"^scan: 1 of the records failed \('a'\)"
    async with Either(kind, **source) as either:
        await either.do("set", "a", 1, 5)
        with pytest.raises(BulkError, match=said):
            await either.all("a", records=True, type=dict)
        if source != {"name": "memory"}:
            redis.set("a_v", "x")
            with pytest.raises(BulkError, match=said):
                await either.all("a", records=True)


@KINDS
async def test_a_bulk_that_is_damaged_in_part(
    kind: str, server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    """Its error knows no notes, which are read with the records."""
    redis.mset({"a_v": "x", "a_d": "1", "b_v": "2", "b_d": "2"})

    def load_twos(names: list[str]) -> dict[str, int]:
        return dict.fromkeys(names, 2)

    async with Either(kind, url=server.url) as either:
        await either.do("fetch_bulk", ["b"], load_twos, ttl=3, refresh_after=2)
        await either.do("fetch", "c", lambda name: 3, ttl=3, refresh_after=2)
    async with Either(kind, url=server.url) as either:
        with pytest.raises(BulkError, match=r"^fetch_bulk: 1 of the records failed") as caught:
            await either.do("fetch_bulk", ["a", "b", "c"], load_twos, ttl=3, refresh_after=2)
        assert caught.value.errors.keys() == {"a"}
        assert caught.value.result.keys() == {"b", "c"}


# -- the server of a cache


@KINDS
async def test_a_database_that_the_server_lacks(
    kind: str, server: EmbeddedServer, backend: str
) -> None:
    either = Either(kind, url=server.url, db=99)
    try:
        for call in (("when_ready",), ("get", "a")):
            with pytest.raises(ReplyError) as caught:
                await either.do(*call)
            assert "DB index is out of range" in str(caught.value)
            assert "choose a smaller db, or raise the server's number" in str(caught.value)
    finally:
        await either.do("close")


async def test_a_database_that_the_server_of_a_node_lacks(
    server: EmbeddedServer, backend: str
) -> None:
    node = dscache.MessageNode.from_config(server.url, db=99)
    with pytest.raises(ReplyError, match=r"^ERR DB index is out of range .*choose a smaller db"):
        await node.when_ready()
    await asyncio.sleep(0)
    with pytest.raises(ReplyError, match=r"^ERR DB index is out of range .*choose a smaller db"):
        await node.when_ready()
    await node.close()


@KINDS
async def test_tls_to_a_server_without(kind: str, backend: str) -> None:
    """A server may wait for more of what it takes for a command."""

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    listener = await asyncio.start_server(wait, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    options = {"connectTimeout": 200, "commandTimeout": 300}
    either = Either(kind, url=f"rediss://127.0.0.1:{port}", **options)
    said = r"no answer within \d+ ms; if it speaks no TLS on this port, use redis:// or leave tls"
    try:
        for call in (("when_ready",), ("get", "a")):
            with pytest.raises(ConnectError, match=said):
                await either.do(*call)
    finally:
        await either.do("close")
    if kind == "AsyncCache":  # the first operation may end before the first attempt to connect
        either = Either(kind, url=f"rediss://127.0.0.1:{port}", commandTimeout=100)
        with pytest.raises(
            ConnectError, match=r": still in the TLS handshake; if it speaks no TLS"
        ):
            await either.do("get", "a")
        await either.do("close")
    listener.close()


@KINDS
@pytest.mark.parametrize("limit", [1000, 2**20])
async def test_a_reply_beyond_the_limit(
    kind: str, server: EmbeddedServer, backend: str, redis: redis_py.Redis, limit: int
) -> None:
    redis.mset({"large_v": "1", "large_d": b"1" * (limit + 1)})
    async with Either(kind, url=server.url, maxReplyBytes=limit) as either:
        with pytest.raises(ProtocolError, match=r"is allowed \(maxReplyBytes\)"):
            await either.do("get", "large")


# -- credentials


class Provider(CredentialProvider):
    """Gives a fixed login."""

    def get_credentials(self) -> tuple[str, str]:
        return "user", SECRET


MAKERS: dict[str, Callable[[Any], Any]] = {
    "AsyncCache": lambda given: dscache.AsyncCache("h:1", given),
    "Cache": lambda given: dscache.Cache("h:1", credentials=given),
    "from_url": lambda given: dscache.Cache.from_url("redis://h", credentials=given),
    "MessageNode": lambda given: dscache.MessageNode.from_config("h:1", credentials=given),
    "Peer": lambda given: Peer.from_config("h:1", credentials=given),
    "RecordStore": lambda given: RecordStore("h:1", credentials=given),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (SECRET, "not str; a fixed login is username=... and password=..."),
        (("user", SECRET), "not tuple; a fixed login is username=... and password=..."),
        (6379, "not int; a port is part of the source, as in localhost:6379"),
        (Provider, "not the class Provider; write Provider(...)"),
    ],
)
def test_credentials_that_are_no_provider(maker: str, given: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MAKERS[maker](given)
    assert str(caught.value) == f"credentials must be a redis.CredentialProvider, {said}"
    MAKERS[maker](UsernamePasswordCredentialProvider("user", SECRET))


def test_credentials_as_an_option() -> None:
    with pytest.raises(ConfigError) as caught:
        dscache.Cache({"host": "h", "credentials": Provider()})
    assert str(caught.value) == (
        "mapping: credentials: isn't supported: write username and password; a provider is an "
        "argument, credentials=..."
    )


# -- messages


@pytest.fixture
async def node(server: EmbeddedServer, backend: str) -> AsyncIterator[dscache.MessageNode]:
    async with dscache.MessageNode.from_config(server.url, **PATIENT) as opened:
        yield opened


async def test_arguments_of_a_message_node(node: dscache.MessageNode) -> None:
    callback: Any = None
    with pytest.raises(MessageError, match=r"^topic 99: callback must be a function, not None"):
        node.subscribe(99, callback)
    server: Any = {"topic": 99}
    with pytest.raises(MessageError, match=r"^the server to send to must be a text .* not \{'top"):
        node.send_direct(server, {"topic": 99})


def test_a_message_node_with_wrong_arguments() -> None:
    on_gap: Any = 3
    with pytest.raises(UsageError, match=r"^on_gap must be a function, not 3$"):
        dscache.MessageNode.from_config("h:1", on_gap=on_gap)
    config: Any = "redis://h"
    with pytest.raises(UsageError, match=r"not str; write MessageNode.from_config\(...\)$"):
        dscache.MessageNode(config)


@pytest.mark.parametrize("source", ["h:1", {"host": "h"}])
def test_the_name_of_a_server_as_in_a_file(source: Any) -> None:
    for kind in (dscache.MessageNode, Peer):
        assert kind.from_config(source, serverName="py-1").server_name == "py-1"
        with pytest.raises(ConfigError, match=r"^arguments: serverName: given twice"):
            kind.from_config(source, serverName="py-1", server_name="py-1")


# -- a peer


async def test_a_closed_peer(server: EmbeddedServer, backend: str) -> None:
    peer = Peer.from_config(server.url, **PATIENT)
    async with peer:
        events, lists, records = peer.events, peer.lists, peer.records
        presence, rpc = peer.presence, peer.rpc
    calls: list[Callable[[], Any]] = [
        lambda: events.emit("a"),
        lambda: events.listen("a"),
        lambda: lists.add("a", "b"),
        lambda: lists.entries("a"),
        lambda: presence.changes(),
        lambda: presence.is_online("a"),
        lambda: presence.users(),
        lambda: records.changes(),
        lambda: records.delete("a"),
        lambda: records.get("a"),
        lambda: records.notify("a"),
        lambda: records.patch("a", "b", 1),
        lambda: records.set("a", {}),
        lambda: records.update("a", lambda data: data),
        lambda: rpc.make("a"),
        lambda: rpc.provide("a", lambda data: data),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"^the peer is closed; open another one$"):
            await call()
    unopened = Peer.from_config(server.url)
    await unopened.close()
    with pytest.raises(UsageError, match=r"^the peer is closed; open another one$"):
        _ = unopened.rpc


async def test_errors_of_a_peer_name_its_calls(server: EmbeddedServer, backend: str) -> None:
    async with Peer.from_config(server.url, **PATIENT) as peer:
        names: Any = 3
        with pytest.raises(RecordError, match=r"^notify takes an iterable of names, not 3$"):
            await peer.records.notify(names)
        names = b"abc"
        with pytest.raises(RecordError, match=r"write notify\(\['abc'\]\)$"):
            await peer.records.notify(names)
        for operation, call in (
            ("update", peer.records.update("none", lambda data: data)),
            ("patch", peer.records.patch("none", "a", 1)),
        ):
            with pytest.raises(RecordMissing, match=f"^{operation} 'none': there is no such"):
                await call
        entries: Any = "abc"
        with pytest.raises(UsageError, match=r"^set: entries must be a list of texts, not 'abc'$"):
            await peer.lists.set("list", entries)
        names = 3
        with pytest.raises(RecordError, match=r"^record 3: a name must be a str, not int$"):
            await peer.lists.add(names, "a")
        change: Any = 3
        with pytest.raises(TypeError, match=r"^update: change must be a function, not 3$"):
            await peer.records.update("a", change)

        async def slow(data: Any) -> Any:
            await asyncio.sleep(60)

        options: Any = {**PATIENT, "commandTimeout": 50}
    async with Peer.from_config(server.url, **options) as peer:
        with pytest.raises(DeadlineExceeded, match=r"^update 'a': reading the record and"):
            await peer.records.update("a", slow, default={})


# -- exporters and servers


def test_what_is_no_cache_has_no_metrics() -> None:
    cache = dscache.Cache("h:1")
    wrong: Any = None
    registry: Any = CollectorRegistry()
    for call, said in (
        (lambda: otel.observe(wrong), "observe needs an AsyncCache or a Cache, not NoneType"),
        (lambda: otel.trace(wrong), "trace needs an AsyncCache or a Cache, not NoneType"),
        (lambda: otel.measure(wrong), "measure needs an AsyncCache or a Cache, not NoneType"),
        (
            lambda: prometheus.register(wrong, "a", registry),
            "register needs an AsyncCache or a Cache, not NoneType",
        ),
        (
            lambda: prometheus.register(cache, registry),
            "register: name must be a str, not CollectorRegistry; write registry=... for that",
        ),
        (
            lambda: prometheus.register(cache, "a", wrong),
            "register: registry must be a CollectorRegistry, not NoneType",
        ),
        (
            lambda: prometheus.CacheCollector(registry),
            "CacheCollector takes a mapping of names to caches, not CollectorRegistry",
        ),
        (
            lambda: prometheus.CacheCollector({"a": wrong}),
            "add needs an AsyncCache or a Cache, not NoneType",
        ),
        (
            lambda: otel.observe(cache, wrong),
            "observe: name must be a str, not NoneType; write meter_provider=... for that",
        ),
    ):
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value) == said
    sample: Any = "half"
    with pytest.raises(ValueError, match="sample must be from 0 to 1, not 'half'"):
        otel.trace(cache, sample=sample)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"binary": "/bin/nope"}, "binary must be one of find_servers(), not '/bin/nope'"),
        ({"binary": 6379}, "binary must be one of find_servers(), not 6379; write port=6379"),
        ({"port": "6379"}, "port must be an int from 0 to 65535, not '6379'"),
        ({"port": 70000}, "port must be an int from 0 to 65535, not 70000"),
        ({"tls": True}, "tls must be TLSFiles(certificate, key, authority), not True"),
        ({"args": "--save 60"}, "args must be a list of texts"),
        ({"args": ["--port", 1]}, "args must be a list of texts"),
    ],
)
def test_arguments_of_an_embedded_server(arguments: Any, said: str) -> None:
    with pytest.raises(UsageError, match=f"^EmbeddedServer: {re.escape(said)}"):
        EmbeddedServer(**arguments)


# -- py-key-value


async def test_keys_of_a_store_that_are_none(source: dict[str, Any]) -> None:
    options = source if source == {"name": "memory"} else {"options": PATIENT | source}
    store = RecordStore({"name": "redis"} | options)
    wrong: Any = None
    calls: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
        "a key must be a str, not None": (lambda: store.get(wrong), RecordError),
        "a key must be a str, not 3": (lambda: store.put(3, {}), RecordError),  # type: ignore[arg-type]
        "a key must be a str, not 4": (lambda: store.delete(4), RecordError),  # type: ignore[arg-type]
        "a key must be a str, not 5": (lambda: store.ttl(5), RecordError),  # type: ignore[arg-type]
        "get_many takes a list of keys, not 'abc'": (lambda: store.get_many("abc"), RecordError),
        "delete_many takes a list of keys, not None": (
            lambda: store.delete_many(wrong),
            RecordError,
        ),
        "put_many takes a list of values, not None": (
            lambda: store.put_many(["a"], wrong),
            SerializationError,
        ),
        "a collection must be a str, not 6": (
            lambda: store.get("a", collection=6),  # type: ignore[arg-type]
            RecordError,
        ),
    }
    for said, (call, kind) in calls.items():
        with pytest.raises(kind, match=f"^{re.escape(said)}"):
            await call()
    await store.close()
    await store.put("a", {"b": 1})
    assert await store.delete("a") is True
    await store.close()


@pytest.mark.parametrize("option", ["prefix", "default_collection"])
def test_names_of_a_store_that_are_none(option: str) -> None:
    options: dict[str, Any] = {option: None}
    with pytest.raises(TypeError, match=f"^{option} must be a str, not None$"):
        RecordStore("h:1", **options)


async def test_a_store_on_a_closed_cache(server: EmbeddedServer, backend: str) -> None:
    async with dscache.AsyncCache(server.url, **PATIENT) as cache:
        store = RecordStore(cache)
        await store.put("a", {})
        await store.destroy()
    for call in (store.get("a"), store.put("a", {}), store.keys()):
        with pytest.raises(UsageError, match=r"^the cache is closed; open another one$"):
            await call
