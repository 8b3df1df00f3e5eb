"""Configuration files of deepstream 1 to 10, as their users write them: what each must say."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dscache.config import Options, RedisOptions, load
from dscache.config import messages as of_messages
from dscache.errors import ConfigError

FILES = Path(__file__).parents[1] / "data" / "deepstream"
OLD = (
    "plugins.cache is a section of deepstream 1 to 3, which keep each record under one key, and "
    "dscache reads the two keys of deepstream 4 and newer: the records of such a server read as "
    "missing; run dscache migrate --from deepstream3, and write the section as cache: at the top "
    "of the file"
)
EXAMPLE = "clusterNode: {name: redis, options: {host: localhost, port: 6379}}"
OLD_MESSAGES = (
    "plugins.message: is the message connector of deepstream 1 to 3, whose protocol is another "
    f"one; with deepstream 4 or newer write {EXAMPLE}"
)
URL = (
    "must be a mapping of options, not text; write a URL as url: below options, as in options: "
    "{url: ${REDIS_URL}}"
)
NO_NODE = "no section clusterNode, the sections are: "
HEROKU = "redis://rediscloud:pass@redis-1.example.com:15000"
PLACES = {"REDIS_HOST": "10.0.0.4", "REDIS_PORT": "6380", "REDIS_PASSWORD": "pass"}


@dataclass
class Expected:
    """What must be said of a file: the address or the error of each part, and the warnings."""

    cache: str
    node: str
    environ: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    hot_paths: tuple[str, ...] = ()


EXPECTED = {
    "v1-first-steps.yml": Expected("10.0.0.4:6380", OLD_MESSAGES, PLACES, (OLD,)),
    "v2-heroku.yml": Expected(
        f"plugins.cache.options: {URL}", NO_NODE, {"REDISCLOUD_URL": HEROKU}, (OLD,)
    ),
    "v3-docker.yml": Expected("redis:6379", NO_NODE, {}, (OLD,)),
    "v3-message.json": Expected("10.0.0.5:6379", OLD_MESSAGES, {}, (OLD,)),
    "v4-cluster.yml": Expected(
        "cache.options.redisOptions.foo: unknown option; the options are username, password, tls, "
        "connectTimeout, commandTimeout, connectionName, db, family; leave redisOptions out, or "
        "write redisOptions: {}, which deepstream's connector needs beside nodes",
        NO_NODE,
    ),
    "v5-three-servers.yml": Expected(
        "10.0.0.4:6379", "10.0.0.4:6379", PLACES, (), ("analytics/", "metrics/")
    ),
    "v6-heroku.yml": Expected(
        "redis-1.example.com:15000", NO_NODE, {"REDIS_URL": HEROKU.replace("redis:", "rediss:")}
    ),
    "v7-readme.yml": Expected(
        "cache.options.ttl: must be 0, or a whole number of seconds from 1 to", NO_NODE, PLACES
    ),
    "v8-memcached.json": Expected(
        'cache.name: must be "redis" or "memory", not \'memcached\'',
        f"clusterNode.name: must be \"redis\", not 'vertical'; write {EXAMPLE}",
    ),
    "v9-url.yml": Expected(
        f"cache.options: {URL}", f"clusterNode.options: {URL}", {"REDIS_URL": HEROKU}
    ),
    "v10-sentinels.yml": Expected(
        '"mymaster" of the Sentinels sentinel-0:26379,sentinel-1:26379',
        '"mymaster" of the Sentinels sentinel-0:26379,sentinel-1:26379',
        {"HOSTNAME": "web-1"},
    ),
    "v10-cluster.yml": Expected("10.0.0.1:7000,10.0.0.2:7000", NO_NODE),
}


def test_each_file_is_expected() -> None:
    assert {path.name for path in FILES.iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_cache(name: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = EXPECTED[name]
    caplog.set_level(logging.WARNING, logger="dscache")
    try:
        config = load(FILES / name, environ=expected.environ)
    except ConfigError as error:
        said = str(error)
        assert said.startswith(f"{name}: {expected.cache}")
        assert "pass" not in said.replace("password", "")
    else:
        assert config.address == expected.cache
        assert config.hot_path_prefixes == expected.hot_paths
    assert tuple(one.getMessage().removeprefix(f"{name}: ") for one in caplog.records) == (
        expected.warnings
    )


@pytest.mark.parametrize("name", EXPECTED)
def test_a_message_node(name: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = EXPECTED[name]
    caplog.set_level(logging.WARNING, logger="dscache")
    try:
        config = of_messages.load(FILES / name, environ=expected.environ)
    except ConfigError as error:
        said = str(error)
        assert said.startswith(f"{name}: {expected.node}")
        assert "pass" not in said.replace("password", "")
    else:
        assert config.address == expected.node
    assert caplog.records == []


def test_the_remedies_load(caplog: pytest.LogCaptureFixture) -> None:
    """Each error's remedy makes a configuration that loads without a word."""
    caplog.set_level(logging.WARNING, logger="dscache")
    url = f"{HEROKU}?dropBufferSupport=true"
    found = load({"cache": {"name": "redis", "options": {"url": url}}}).options
    assert (found.host, found.port, found.username) == (
        "redis-1.example.com",
        15000,
        "rediscloud",
    )
    nodes = [{"host": "10.0.0.1", "port": 7000}]
    for redis_options in ({}, {"redisOptions": {}}):
        options = {"nodes": nodes, **redis_options}
        found = load({"cache": {"name": "redis", "options": options}}).options
        assert found.redis_options == RedisOptions()
    assert caplog.records == []


def test_an_option_without_effect_in_a_url(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dscache")
    assert load("redis://h:1?dropBufferSupport=true&db=2").options == Options(
        host="h", port=1, db=2
    )
    (said,) = [one.getMessage() for one in caplog.records]
    assert said.startswith("URL: dropBufferSupport has no effect: ")
    with pytest.raises(ConfigError, match='unknown query option "dropBuffer"'):
        load("redis://h:1?dropBuffer=true")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("analytics/", "storageHotPathPrefixes: must be a list of the beginnings of names"),
        (["a/", {}], r"storageHotPathPrefixes\[1\]: must be text, not a mapping"),
    ],
)
def test_bad_hot_paths(written: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load({"cache": {"name": "redis"}, "record": {"storageHotPathPrefixes": written}})
    empty = {"cache": {"name": "redis"}, "record": {"storageHotPathPrefixes": None}}
    assert load(empty).hot_path_prefixes == ()


def test_the_options_of_another_plug_in_are_not_evaluated(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text("cache: {name: memcached, options: {serverLocation: '${NOT_SET}'}}\n")
    with pytest.raises(ConfigError, match=r"cache\.name: must be"):
        load(file, environ={})


# The parts of files that users write, and what each must say: an address, or the error.
TRIED: list[tuple[str, str]] = [
    (
        "cache: {type: redis, options: {host: h}}",
        'cache.type: must be "default"; write',
    ),
    (
        "cache: {path: ./node_modules/mine, options: {host: h}}",
        'cache.path: must be "@deepstream/cache-redis", .*; write name: redis',
    ),
    ("cache: ./cache.js", "cache: must be a mapping; write cache: {name: redis"),
    ("cache: {name: redis, options: {host: h, port: '6380', db: '2'}}", "h:6380"),
    (
        "cache: {path: '@deepstream/cache-redis', name: x, options: {host: h}}",
        "h:6379",
    ),
    ("cache: {name: hazelcast, options: {port: 5701}}", "cache.name: must be"),
    (
        "storage: {name: mongodb}",
        "no section cache, the sections are: storage; write",
    ),
    (
        "cache:\n\tname: redis\n",
        "line 2, column 1: not valid YAML: .*indent by spaces",
    ),
    ("\ufeffcache: {name: redis, options: {host: h}}", "h:6379"),
    ("cache:\r\n  name: redis\r\n  options:\r\n    host: h\r\n", "h:6379"),
    (
        '{\n  // the cache\n  "cache": {"name": "redis"}}',
        "line 2, column 3: .*JSON has no comments: remove them, or name the file .yml",
    ),
    ('{"cache": {"name": "redis",}}', "line 1, .*remove the comma before it"),
    (
        '{"cache": {"options": {"db": 1, "db": 2}}}',
        "cache.options.db: is given twice",
    ),
    ("", "line 1, column 1: not valid JSON: .*; it is empty"),
    ("\n", "is empty, or has only comments; write cache: {name: redis"),
    ("# cache:\n#   name: redis\n", "is empty, or has only comments; write cache:"),
    (
        "version: '3'\nservices: {deepstream: {}, redis: {}}",
        "no section cache, .*this is a file of docker-compose, so give the configuration",
    ),
    ("- cache: {name: redis}", "must be a mapping of sections; write cache: {name"),
    (
        "cache: {name: a}\ncache: {name: b}",
        r"cache: is given twice \(lines 1 and 2\)",
    ),
    ("cache: {name: redis}\n---\na: 1", "line 2, .*keep one of the documents"),
    ("cache: {name: redis, options: null}", "localhost:6379"),
    ("cache: {name: redis, options: {host: h, redisOptions: {}}}", "h:6379"),
    (
        "cache: {name: redis}\noptions: {host: h}",
        "options: stands beside cache:; indent",
    ),
    ("cache: {name: redis, host: h}", "cache.host: unknown .*belongs below options:"),
    (
        "cache: {name: redis, options: {nodes: ['10.0.0.1:7000']}}",
        r"cache.options.nodes\[0\]: .*such as {host: 10.0.0.1, port: 7000}, not text",
    ),
    (
        "cache: {name: redis, options: {nodes: [{url: 'redis://:pass@h:1'}]}}",
        r"cache.options.nodes\[0\].url: .*write host: and port: of each node",
    ),
    ("cache: {name: redis, options: {host: 'redis:6379'}}", ".*without a port"),
    ("cache: {name: redis, options: {host: '${URL}'}}", ".*for a URL, use the option url"),
    ("cache: {name: redis, options: {url: '${URL}'}}", "h:15000"),
    ("cache: {name: redis, options: {url: $URL}}", r".*written as in \${REDIS_URL}"),
    ("cache: {name: redis, options: '${UNSET}'}", ".*variable UNSET is not set"),
    ("cache: {name: redis, options: {port: '${LINK}'}}", ".*port: must be a whole"),
]


@pytest.mark.parametrize(("text", "said"), TRIED)
def test_what_users_write(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / ("config.yml" if text and text[0] != "{" else "config.json")
    path.write_bytes(text.encode())
    environ = {"URL": "redis://user:pass@h:15000", "LINK": "tcp://172.17.0.2:6379"}
    try:
        answer = load(path, environ=environ).address
    except ConfigError as error:
        answer = str(error)
    assert re.match(said, answer.removeprefix(f"{path.name}: ")), answer
    assert "pass@" not in answer
