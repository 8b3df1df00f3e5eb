"""No output shows a password or a record's data, however a server repeats its commands.

Every output is searched: errors with all that hangs on them, log, counters, descriptions, metrics,
spans and the command line, for passwords that are short, long, quoted and of several lines.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest
from redis.credentials import CredentialProvider

import dscache
from dscache import otel, prometheus
from dscache.embedded import EmbeddedServer
from dscache.errors import DscacheError
from tests.conftest import SERVERS, _server_id
from tests.support.commands import invoke
from tests.support.faults import HELLO_REPLY, FakeServer
from tests.support.outputs import as_redis_quotes, content_of, shown_secrets
from tests.support.waiting import until

MakeServer = Callable[..., EmbeddedServer]
PASSWORDS = {
    "plain": "hunter2-of-the-app",
    "short": "q7",
    "quoted": "qu\"o't`e\\d-word",
    "lines": "zeile1\r\nline2\tx",
    "foreign": "пароль-日本-😀",
    "long": "tok-" + "zx9" * 400,
}
WATCH = "hunter2-of-the-watch"


def words_of(command: list[bytes]) -> list[bytes]:
    """Return the words of a command as Redis puts them into an error, each on one line."""
    return [word.replace(b"\r", b" ").replace(b"\n", b" ") for word in command]


def as_redis_5(command: list[bytes]) -> bytes:
    name, *args = words_of(command)
    shown = b"".join(b"`%b`, " % one for one in args)[:128]
    return b"-ERR unknown command `%b`, with args beginning with: %b\r\n" % (name, shown)


def as_redis_7(command: list[bytes]) -> bytes:
    name, *args = words_of(command)
    shown = b"".join(b"'%b' " % one for one in args)[:128]
    return b"-ERR unknown command '%b', with args beginning with: %b\r\n" % (name, shown)


def as_a_proxy(command: list[bytes]) -> bytes:
    return b"-unsupported command '" + b" ".join(words_of(command)) + b"'\r\n"


def in_a_list(command: list[bytes]) -> bytes:
    return b"-ERR refused args: [" + b", ".join(words_of(command)) + b"]\r\n"


def cut_off(command: list[bytes]) -> bytes:
    shown = b" ".join(b'"%b"' % word[:12] for word in words_of(command))
    return b"-ERR refused " + shown + b"\r\n"


def escaped(command: list[bytes]) -> bytes:
    shown = " ".join(f'"{as_redis_quotes(word.decode())}"' for word in command)
    return f"-ERR refused {shown}\r\n".encode()


def as_json(command: list[bytes]) -> bytes:
    return f"-ERR refused {json.dumps([word.decode() for word in command])}\r\n".encode()


def in_a_url(command: list[bytes]) -> bytes:
    return f"-ERR bad login redis://app:{quote(command[-1])}@host\r\n".encode()


def on_several_lines(command: list[bytes]) -> bytes:
    """Break the protocol where a password has a line break."""
    return b"-ERR refused " + b" ".join(command) + b"\r\n"


STYLES = {
    one.__name__: one
    for one in (
        *(as_redis_5, as_redis_7, as_a_proxy, in_a_list, cut_off, escaped, as_json, in_a_url),
        on_several_lines,
    )
}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Return the whole log: messages, arguments, and errors with their frames."""
    caplog.set_level(logging.DEBUG)

    def shown() -> str:
        return "\n".join(
            f"{one.getMessage()} {one.args!r} {content_of(one.exc_info[1]) if one.exc_info else ''}"
            for one in caplog.records
        )

    return shown


def options_of(password: str, **more: Any) -> dict[str, Any]:
    return {
        **{"username": "app", "password": password, "retryStrategy": {"first": 1, "cap": 5}},
        **{"commandTimeout": 2000, "connectTimeout": 2000},
        **more,
    }


async def error_of(ask: Callable[[], Awaitable[object]], *, with_locals: bool = True) -> str:
    """Return the content of the error that an operation must raise."""
    with pytest.raises(DscacheError) as caught:
        await ask()
    return content_of(caught.value, with_locals=with_locals)


def blocking_error_of(ask: Callable[[], object], *, with_locals: bool = True) -> str:
    with pytest.raises(DscacheError) as caught:
        ask()
    return content_of(caught.value, with_locals=with_locals)


async def outputs_of_async(config: dict[str, Any], **more: Any) -> str:
    exporter = InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    registry = CollectorRegistry()
    cache = dscache.AsyncCache.from_config(config, **more)
    otel.trace(cache, tracer_provider=tracers, roots=True)
    prometheus.register(cache, "main", registry)
    told = [
        await error_of(cache.when_ready),
        await error_of(lambda: cache.get("a")),
        await error_of(lambda: cache.get_bulk(["a", "b"])),
        await error_of(lambda: cache.set("a", 1, {}, if_newer=True)),
    ]
    told += [repr(cache.stats()), cache.description, repr(cache), repr(cache.config)]
    told.append(generate_latest(registry).decode())
    await cache.close()
    spans = exporter.get_finished_spans()
    assert len(spans) == 3
    return "\n".join((*told, *(span.to_json() for span in spans)))


async def outputs_of_blocking(config: dict[str, Any], **more: Any) -> str:
    def block() -> str:
        cache = dscache.Cache.from_config(config, **more)
        told = [
            blocking_error_of(cache.when_ready),
            blocking_error_of(lambda: cache.get("a")),
            blocking_error_of(lambda: cache.get_bulk(["a", "b"])),
        ]
        told += [repr(cache.stats()), cache.description, repr(cache), repr(cache.config)]
        cache.close()
        return "\n".join(told)

    return await asyncio.to_thread(block)


async def outputs_of_messages(config: dict[str, Any], **more: Any) -> str:
    node = dscache.MessageNode.from_config(config, **more)
    told = [await error_of(node.when_ready), repr(node.stats()), repr(node)]
    await node.close()
    return "\n".join(told)


CLIENTS = {
    "AsyncCache": outputs_of_async,
    "Cache": outputs_of_blocking,
    "MessageNode": outputs_of_messages,
}


async def outputs_of(config: dict[str, Any], **more: Any) -> str:
    """Return all outputs of an AsyncCache, a Cache and a MessageNode that can't log in."""
    return "\n".join([await outputs(config, **more) for outputs in CLIENTS.values()])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("password", PASSWORDS.values(), ids=PASSWORDS)
async def test_a_login_that_is_repeated(
    style: str, password: str, backend: str, log: Callable[[], str]
) -> None:
    answers = dict.fromkeys(("HELLO", "AUTH"), STYLES[style])
    async with FakeServer(answers) as fake:  # type: ignore[arg-type]
        config = {"name": "redis", "options": options_of(password, host=fake.host, port=fake.port)}
        told = await outputs_of(config)
        assert any(password.encode() in command for command in fake.commands)
    assert "refused" in told or "unknown" in told or "unsupported" in told or "ERR bad" in told
    assert not shown_secrets(told + log(), password)


class Token(CredentialProvider):
    """Returns the password as a token, and another one from the second call on."""

    def __init__(self, password: str) -> None:
        self.password = password
        self.calls = 0

    def get_credentials(self) -> tuple[str, str]:
        self.calls += 1
        return "app", self.password if self.calls == 1 else "another-token"


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("of_cluster", [False, True])
@pytest.mark.parametrize("kind", ["short", "long"])
async def test_a_token_that_is_repeated(
    client: str, of_cluster: bool, kind: str, backend: str, log: Callable[[], str]
) -> None:
    """The server repeats the first token of all attempts."""
    password = PASSWORDS[kind]
    given: list[bytes] = []

    def repeat(command: list[bytes]) -> bytes:
        given.append(command[-1])
        return escaped([b"LOADING", given[0]]).replace(b"ERR", b"LOADING")

    async with FakeServer({"HELLO": cut_off, "AUTH": repeat}) as fake:
        where = {"host": fake.host, "port": fake.port}
        options = {**options_of("", **where), "commandTimeout": 300, "connectTimeout": 300}
        del options["username"], options["password"]
        if of_cluster:
            options = {
                "nodes": [where],
                "redisOptions": {"commandTimeout": 300, "connectTimeout": 300},
            }
        provider = Token(password)
        told = await CLIENTS[client]({"name": "redis", "options": options}, credentials=provider)
    assert given[:2] == [password.encode(), b"another-token"]
    assert "LOADING refused" in told
    assert not shown_secrets(told + log(), password)


@pytest.mark.parametrize("style", ["cut_off", "escaped"])
@pytest.mark.parametrize("kind", ["short", "quoted", "long"])
async def test_a_login_that_a_sentinel_repeats(
    style: str, kind: str, backend: str, log: Callable[[], str]
) -> None:
    password = PASSWORDS[kind]
    answers = dict.fromkeys(("HELLO", "AUTH", "SENTINEL"), STYLES[style])
    async with FakeServer(answers) as fake:  # type: ignore[arg-type]
        options = {
            **options_of(WATCH),
            **{"sentinels": [{"host": fake.host, "port": fake.port}], "name": "group"},
            **{"commandTimeout": 250, "connectTimeout": 250},
            **{"sentinelUsername": "watch", "sentinelPassword": password},
        }
        told = await outputs_of({"name": "redis", "options": options})
        assert any(password.encode() in command for command in fake.commands)
    assert "no Sentinel names a primary" in told
    assert not shown_secrets(told + log(), password)


@pytest.mark.parametrize("style", ["cut_off", "escaped"])
@pytest.mark.parametrize("kind", ["short", "quoted", "long"])
async def test_a_login_that_a_node_of_a_cluster_repeats(
    style: str, kind: str, backend: str, log: Callable[[], str]
) -> None:
    password = PASSWORDS[kind]
    answers = dict.fromkeys(("HELLO", "AUTH"), STYLES[style])
    async with FakeServer(answers) as fake:  # type: ignore[arg-type]
        own = {"host": fake.host, "port": fake.port, "username": "app", "password": password}
        shared = {"password": WATCH, "commandTimeout": 500, "connectTimeout": 500}
        options = {"nodes": [own], "redisOptions": shared}
        told = await outputs_of({"name": "redis", "options": options})
        assert any(password.encode() in command for command in fake.commands)
    assert "ERR" in told
    assert not shown_secrets(told + log(), password)
    assert not shown_secrets(told, WATCH)


COMMANDS = {
    "doctor": (),
    "get": ("a",),
    "head": ("a",),
    "set": ("a", "1", "{}"),
    "delete": ("a",),
    "export": ("-",),
    "import": ("-",),
    "migrate": ("--to", "hashtag", "--yes"),
    "watch": (),
    "bench": ("--seconds", "0.1"),
    "cluster": (),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("style", ["as_redis_7", "cut_off", "escaped"])
async def test_a_login_that_is_repeated_to_the_command_line(
    command: str, style: str, tmp_path: Path, log: Callable[[], str]
) -> None:
    password = PASSWORDS["quoted"]
    answers = dict.fromkeys(("HELLO", "AUTH", "SELECT"), STYLES[style])
    async with FakeServer(answers) as fake:  # type: ignore[arg-type]
        where = {"host": fake.host, "port": fake.port}
        options = options_of(password, **where)
        if command == "cluster":
            options = {"nodes": [where], "redisOptions": {"password": password}}
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"cache": {"name": "redis", "options": options}}))
        url = f"redis://app:{quote(password, safe='')}@{fake.host}:{fake.port}"
        done = []
        for source in (("--config", str(config)), ("--url", url)):
            for form in ((), ("--json",)):
                words = (command, *COMMANDS[command], *source, *form)
                line = b'{"name": "a", "version": 1, "data": 1}\n'
                done.append(await asyncio.to_thread(invoke, *words, stdin=line))
        assert any(password.encode() in said for said in fake.commands)
    told = "\n".join(one.out + one.err for one in done)
    assert all(one.status > 0 for one in done), told
    assert "ERR" in told, told
    assert not shown_secrets(told + log(), password)


RENAMED = {
    "both": ("--rename-command", "HELLO", "", "--rename-command", "AUTH", ""),
    "AUTH": ("--rename-command", "AUTH", ""),
    "HELLO": ("--rename-command", "HELLO", "", "--requirepass", "another"),
}


@pytest.mark.parametrize("server", SERVERS, indirect=True, ids=_server_id)
@pytest.mark.parametrize("renamed", RENAMED)
async def test_a_real_server_with_renamed_commands(
    make_server: MakeServer, renamed: str, backend: str, log: Callable[[], str]
) -> None:
    started = make_server(*RENAMED[renamed])
    for password in PASSWORDS.values():
        where = {"host": started.host, "port": started.port}
        told = await outputs_of({"name": "redis", "options": options_of(password, **where)})
        assert re.search("unknown command|WRONGPASS", told)
        assert not shown_secrets(told + log(), password)


@pytest.mark.parametrize("style", ["as_redis_5", "as_redis_7", "as_a_proxy", "in_a_list"])
@pytest.mark.parametrize("if_newer", [False, True])
async def test_data_that_is_repeated(
    style: str, if_newer: bool, backend: str, log: Callable[[], str]
) -> None:
    """Guarded writes are scripts, the others MSET or SET; each has a record's data."""
    secret = PASSWORDS["plain"]
    data = {"token": secret}
    some = {"b": (1, data), "c": (1, data)}
    told: list[str] = []
    answers = dict.fromkeys(("EVALSHA", "EVAL", "MSET", "MSETEX", "SET"), STYLES[style])

    def write(cache: Any) -> list[Callable[[], Any]]:
        return [
            lambda: cache.set("a", 1, data, if_newer=if_newer),
            lambda: cache.set("a", 1, data, if_newer=if_newer, ttl=9),
            lambda: cache.set_bulk(some, if_newer=if_newer),
        ]

    def block() -> None:
        with dscache.Cache.from_config(fake.url) as blocking:
            told.extend(blocking_error_of(one, with_locals=False) for one in write(blocking))
            told.append(repr(blocking.stats()))

    async with FakeServer(answers) as fake:  # type: ignore[arg-type]
        async with dscache.AsyncCache.from_config(fake.url) as cache:
            told += [await error_of(one, with_locals=False) for one in write(cache)]
            told.append(repr(cache.stats()))
        await asyncio.to_thread(block)
        assert any(secret.encode() in word for said in fake.commands for word in said)
    shown = "\n".join(told)
    assert re.search("refused args|(?:unknown|unsupported) command .(?:MSET|EVAL)", shown)
    assert not shown_secrets(shown + log(), secret)


@pytest.mark.parametrize("client", ["AsyncCache", "MessageNode"])
@pytest.mark.parametrize("shape", ["text", "array"])
async def test_a_password_in_a_reply_too_many(
    client: str, shape: str, backend: str, log: Callable[[], str]
) -> None:
    """The connection ends, and the reason of the loss doesn't show the reply."""
    password = PASSWORDS["plain"]

    def more(command: list[bytes]) -> bytes:
        text = b"$%d\r\n%b\r\n" % (len(password), password.encode())
        return HELLO_REPLY + (text if shape == "text" else b"*1\r\n" + text) * 5

    async with FakeServer({"HELLO": more, "MGET": b""}) as fake:
        options = options_of(password, host=fake.host, port=fake.port, commandTimeout=300)
        config = {"name": "redis", "options": options}
        kind = getattr(dscache, client)
        async with kind.from_config(config) as used:
            await until(lambda: "no operation waits for" in used.stats()["last_loss"])
            told = repr(used.stats())
    assert ("a text of 18 bytes" if shape == "text" else "1 elements") in told
    assert not shown_secrets(told + log(), password)
