"""No output shows a password or a record's data, however a server repeats its commands.

Every output is searched: errors with all that hangs on them, log, counters, descriptions, metrics,
spans and the command line, for passwords that are short, long, quoted and of several lines.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest

import dscache
from dscache import otel, prometheus
from dscache.embedded import EmbeddedServer
from dscache.errors import DscacheError
from tests.support.faults import FakeServer
from tests.support.outputs import as_redis_quotes, content_of, shown_secrets

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


async def error_of(ask: Callable[[], Awaitable[object]]) -> str:
    """Return the content of the error that an operation must raise."""
    with pytest.raises(DscacheError) as caught:
        await ask()
    return content_of(caught.value)


def blocking_error_of(ask: Callable[[], object]) -> str:
    with pytest.raises(DscacheError) as caught:
        ask()
    return content_of(caught.value)


async def outputs_of(config: dict[str, Any], **more: Any) -> str:
    """Return all outputs of an AsyncCache, a Cache and a MessageNode that can't log in."""
    told = []
    exporter = InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    registry = CollectorRegistry()

    cache = dscache.AsyncCache.from_config(config, **more)
    otel.trace(cache, tracer_provider=tracers)
    prometheus.register(cache, "main", registry)
    told += [
        await error_of(cache.when_ready),
        await error_of(lambda: cache.get("a")),
        await error_of(lambda: cache.get_bulk(["a", "b"])),
        await error_of(lambda: cache.set("a", 1, {}, if_newer=True)),
    ]
    told += [repr(cache.stats()), cache.description, repr(cache), repr(cache.config)]
    told.append(generate_latest(registry).decode())
    await cache.close()

    def block() -> None:
        blocking = dscache.Cache.from_config(config, **more)
        told.extend(
            (
                blocking_error_of(blocking.when_ready),
                blocking_error_of(lambda: blocking.get("a")),
                blocking_error_of(lambda: blocking.get_bulk(["a", "b"])),
            )
        )
        told.extend((repr(blocking.stats()), blocking.description, repr(blocking)))
        blocking.close()

    await asyncio.to_thread(block)

    node = dscache.MessageNode.from_config(config, **more)
    told.append(await error_of(node.when_ready))
    told += [repr(node.stats()), repr(node)]
    await node.close()
    told += [span.to_json() for span in exporter.get_finished_spans()]
    return "\n".join(told)


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
