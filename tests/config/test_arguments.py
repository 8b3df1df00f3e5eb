"""Options as keyword arguments, and the short forms of a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dscache import AsyncCache, Cache, ConfigError
from dscache.config import Options, load, load_url
from dscache.embedded import EmbeddedServer

CACHES = pytest.mark.parametrize("cache_class", [AsyncCache, Cache])


@CACHES
@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("redis://h:7000/2", {"host": "h", "port": 7000, "db": 2}),
        ("valkey://h:7000/2", {"host": "h", "port": 7000, "db": 2}),
        ("h:7000", {"host": "h", "port": 7000}),
        ("localhost", {"host": "localhost", "port": 6379}),
        ({"host": "h"}, {"host": "h"}),
        ({"url": "redis://h:1", "db": 3}, {"host": "h", "port": 1, "db": 3}),
        ({"cache": {"name": "redis", "options": {"host": "h"}}}, {"host": "h"}),
        (load({"host": "h"}), {"host": "h"}),
    ],
)
def test_the_constructors_take_every_source(
    cache_class: type[Cache | AsyncCache], source: Any, options: dict[str, Any]
) -> None:
    wanted = Options(**options)
    assert cache_class(source).config.options == wanted
    assert cache_class.from_config(source).config.options == wanted


def test_the_constructors_take_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text("cache:\n  name: redis\n  options:\n    host: h\n    ttl: 60\n")
    cache = Cache(file, ttl=5)
    assert (cache.config.options.host, cache.config.options.ttl) == ("h", 5)
    assert cache.config.source == "config.yml"


def test_tls_by_valkeys_scheme() -> None:
    assert load("valkeys://h").options.tls == load("rediss://h").options.tls


@pytest.mark.parametrize("source", ["redis://h", {"host": "h"}, load("redis://h")])
@pytest.mark.parametrize(
    "given",
    [
        {"commandTimeout": 200, "keyLayout": "hashtag"},
        {"command_timeout": 200, "key_layout": "hashtag"},
        {"command_timeout": "200", "keyLayout": "hashtag", "db": None},
    ],
)
def test_options_by_keyword(source: Any, given: dict[str, Any]) -> None:
    wanted = Options(host="h", command_timeout=200, key_layout="hashtag")
    assert AsyncCache(source, **given).config.options == wanted
    assert Cache.from_config(source, **given).config.options == wanted


@pytest.mark.parametrize("kind", [AsyncCache, Cache])
def test_a_server_by_keyword_alone(kind: Any) -> None:
    for make in (kind, kind.from_config):
        assert make(host="127.0.0.1", db=3).config == load({"host": "127.0.0.1", "db": 3})
        assert make(nodes=[{"host": "n"}]).config.address == "n:6379"
        with pytest.raises(ConfigError, match=r"names no server; .*or cache: {name: redis"):
            make()
        with pytest.raises(ConfigError, match="mapping: names no server; pass a URL"):
            make(ttl=5)


def test_options_override_the_source() -> None:
    source = {"cache": {"name": "redis", "options": {"host": "h", "ttl": 60, "db": 2}}}
    options = AsyncCache(source, ttl=5, near_cache={"maxAge": 10}).config.options
    assert (options.host, options.ttl, options.db) == ("h", 5, 2)
    assert options.near_cache is not None
    assert options.near_cache.max_age == 10
    assert Cache("h:1", nodes=[{"host": "n"}]).config.address == "n:6379"


def test_an_option_without_effect(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "dscache"):
        assert Cache("h:1", serverName="here", ttl=5).config.options.ttl == 5
    assert "serverName has no effect" in caplog.text


@pytest.mark.parametrize(
    ("source", "given", "message"),
    [
        ("h:1", {"prot": 1}, 'arguments: prot: unknown option, did you mean "port"?'),
        ("h:1", {"comand_timeout": 1}, "arguments: comand_timeout: unknown option"),
        ("h:1", {"db": -1}, "arguments: db: must be a whole number"),
        (
            "h:1",
            {"max_pending": 1, "maxPending": 2},
            "arguments: maxPending: given twice, in camelCase and in snake_case",
        ),
        ("h:1", {"url": "h:2"}, "arguments: url: is the source itself; pass it as the first"),
        ({"host": "h", "prot": 1}, {}, 'mapping: prot: unknown option, did you mean "port"?'),
        ({"name": "redis", "host": "h"}, {}, "mapping: host: unknown option"),
        ({"cahce": {"name": "redis"}}, {}, "mapping: no section cache"),
        ({"sentinels": [{}]}, {}, "mapping: name: is missing"),
        (6379, {}, "the configuration must be a path, a mapping or a URL, not int"),
    ],
)
def test_mistakes(source: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AsyncCache(source, **given)
    assert str(caught.value).startswith(message)


@CACHES
def test_from_url(cache_class: type[Cache | AsyncCache]) -> None:
    cache = cache_class.from_url("redis://h:1", max_pending=3)
    assert (cache.config.address, cache.config.options.max_pending) == ("h:1", 3)
    with pytest.raises(ConfigError, match=r"^URL: must begin with redis://"):
        cache_class.from_url("config.yml")


def test_a_password_by_keyword_is_never_shown() -> None:
    cache = Cache("h:1", password="hunter2", username="app")
    assert "hunter2" not in f"{cache!r} {cache.config!r} {cache.description}"
    with pytest.raises(ConfigError) as caught:
        Cache("h:1", password=["hunter2"])
    assert "hunter2" not in str(caught.value)


def test_the_loader_of_urls_takes_options() -> None:
    assert load_url("h:1", options={"db": 2}).options.db == 2


async def test_options_by_keyword_work(server: EmbeddedServer, backend: str) -> None:
    async with AsyncCache(server.url, near_cache=True, key_prefix="arguments/") as cache:
        assert await cache.set("a", 1, {}) is True
        assert [tuple(await cache.get("a") or ()) for _ in range(2)] == [(1, {})] * 2
        assert cache.stats()["near_cache"]["hits"] == 1
        assert await cache.delete("a") is True
