"""The configuration: every form of it, every rule for a value, every error text."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from msgspec import UNSET
from msgspec.structs import replace

from dscache import AsyncCache, Cache, MessageNode
from dscache.config import (
    ClusterRetryStrategy,
    Config,
    NatTarget,
    NearCacheOptions,
    Node,
    Options,
    RedisOptions,
    RetryStrategy,
    Tls,
    load,
)
from dscache.config.model import canonical, split_address
from dscache.embedded import TLSFiles
from dscache.errors import ConfigError
from tests.support.documents import PROJECT, code, table
from tests.support.waiting import PATIENCE

DATA = Path(__file__).parents[1] / "data"
EXAMPLE = "cache: {name: redis, options: {host: localhost, port: 6379}}"
OPTIONS = (
    "host, port, path, family, username, password, db, keyPrefix, keyLayout, proxied, ttl, "
    "connectionName, connectTimeout, commandTimeout, closeTimeout, reconnectOnError, "
    "retryStrategy, maxPending, "
    "maxPendingBytes, whenFull, maxReplyBytes, maxConnections, nearCache, maintNotifications, "
    "tls, sentinels, name, "
    "role, sentinelUsername, sentinelPassword, nodes, maxRedirections, scaleReads, zone, natMap, "
    "slotsRefreshTimeout, slotsRefreshInterval, clusterRetryStrategy, redisOptions, url"
)
NAT_NAME = "each name in it must be host:port, with brackets around an IPv6 address"
PORT = "must be a whole number from 1 to 65535"
MS = "must be a whole number of milliseconds from 1 to 2147483647"
# The tests' password, which must never appear in a text.
SECRET = "hunter2-secret"

Read = Callable[..., Options]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration file and return its path."""

    def write_file(content: str, name: str = "config.yml") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode())
        return path

    return write_file


@pytest.fixture
def read(write: Callable[..., Path]) -> Read:
    """Return the options of a YAML file whose cache.options are the given lines."""

    def read_options(*lines: str, **environ: str) -> Options:
        text = "\n    ".join(("cache:\n  name: redis\n  options:", *lines))
        return load(write(text + "\n"), environ=environ).options

    return read_options


def options(**written: Any) -> Options:
    """Return the options of a mapping."""
    return load({"name": "redis", "options": written}).options


def refusal(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """Return the text of the ConfigError that a call raises."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    assert SECRET not in str(caught.value)
    cause = caught.value.__cause__ or (
        None if caught.value.__suppress_context__ else caught.value.__context__
    )
    assert cause is None
    return str(caught.value)


# Sources


def test_defaults() -> None:
    config = load({"name": "redis"})
    assert config == Config(name="redis", options=Options(), source="mapping")
    assert config.options == Options(
        host="localhost",
        port=6379,
        path=None,
        family=0,
        username=None,
        password=None,
        db=0,
        key_prefix="",
        key_layout="auto",
        ttl=None,
        connection_name=None,
        connect_timeout=2000,
        command_timeout=1000,
        close_timeout=2000,
        tls=None,
        nodes=None,
        max_redirections=16,
        scale_reads="master",
        zone=None,
        nat_map=None,
        slots_refresh_timeout=1000,
        slots_refresh_interval=5000,
        cluster_retry_strategy=ClusterRetryStrategy(first=100, cap=2000),
        redis_options=RedisOptions(),
    )


def test_a_complete_deepstream_file() -> None:
    environ = {"REDIS_HOST": "10.1.2.3", "REDIS_PORT": "6380"}
    config = load(DATA / "deepstream-config.yml", environ=environ)
    assert config == Config(
        name="redis",
        options=Options(host="10.1.2.3", port=6380),
        source="deepstream-config.yml",
        hot_path_prefixes=("analytics/", "metrics/"),
    )


def test_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_HOST", "10.1.2.3")
    monkeypatch.setenv("REDIS_PORT", "6380")
    assert load(str(DATA / "deepstream-config.yml")).address == "10.1.2.3:6380"


CLUSTER = """\
cache:
  name: redis
  options:
    nodes:
      - {host: 10.0.0.1, port: 7000, password: own-secret}
      - {host: 10.0.0.2, port: 7000}
      - {host: 10.0.0.3, password: null, username: ''}
      - {}
    maxRedirections: 8
    redisOptions:
      password: fallback-password
      username: app
      connectTimeout: 500
      commandTimeout: '250'
      connectionName: records
      family: 6
      tls: true
"""


def test_cluster(write: Callable[..., Path]) -> None:
    config = load(write(CLUSTER))
    assert config.options == Options(
        nodes=(
            Node(host="10.0.0.1", port=7000, password="own-secret"),
            Node(host="10.0.0.2", port=7000),
            Node(host="10.0.0.3", password=None, username=None),
            Node(host="127.0.0.1", port=6379),
        ),
        max_redirections=8,
        redis_options=RedisOptions(
            password="fallback-password",
            username="app",
            connect_timeout=500,
            command_timeout=250,
            connection_name="records",
            family=6,
            tls=Tls(),
        ),
    )
    assert config.options.nodes is not None
    assert config.options.nodes[1].password is UNSET
    assert config.options.nodes[2].password is None
    assert config.address == "10.0.0.1:7000,10.0.0.2:7000,10.0.0.3:6379,127.0.0.1:6379"


@pytest.mark.parametrize(
    "given",
    [
        {"cache": {"name": "redis", "options": {"port": 7000}}, "rpc": {"ackTimeout": "${NO}"}},
        {"plugins": {"cache": {"name": "redis", "options": {"port": 7000}}}},
        {"name": "redis", "options": {"port": 7000}},
        {"cache": {"name": "REDIS", "type": "default", "options": {"port": 7000}}},
        {"cache": {"path": "@deepstream/cache-redis", "options": {"port": 7000}}},
        {"cache": {"name": "redis", "options": {"port": 7000}}, "plugins": {"cache": {"name": 1}}},
    ],
)
@pytest.mark.parametrize("suffix", [None, ".yml", ".yaml", ".json", ".JSON"])
def test_forms_of_a_cache_entry(
    given: Mapping[str, Any], suffix: str | None, write: Callable[..., Path]
) -> None:
    # JSON is also YAML.
    source = given if suffix is None else write(json.dumps(given), f"config{suffix}")
    config = load(source, environ={})
    assert (config.name, config.options) == ("redis", Options(port=7000))
    assert config.source == ("mapping" if suffix is None else f"config{suffix}")


@pytest.mark.parametrize(
    "entry", [{}, {"type": "default"}, {"name": "Memory"}, {"options": None, "name": "memory"}]
)
def test_memory(entry: Mapping[str, Any]) -> None:
    config = load({"cache": entry})
    assert (config.name, config.address) == ("memory", "memory")


@pytest.mark.parametrize(
    "option",
    [
        "host: h",
        "port: 1",
        "password: hunter2-secret",
        "url: redis://h",
        "nodes: [{}]",
        "tls: true",
    ],
)
def test_options_of_redis_without_a_name(option: str, write: Callable[..., Path]) -> None:
    """A cache in memory would ignore them."""
    name, _, _ = option.partition(":")
    said = f"name: is missing, and {name} is for Redis; add name: redis (or name: memory)"
    file = write(f"cache:\n  options:\n    commandTimeout: 9\n    {option}\n")
    assert refusal(load, file) == f"config.yml: cache.{said}"
    assert refusal(load, write(f"options: {{{option}}}")) == f"config.yml: {said}"
    assert refusal(load, write(f"cache: {{type: default, options: {{{option}}}}}")) == (
        f"config.yml: cache.{said}"
    )
    assert load(write(f"cache: {{name: memory, options: {{{option}}}}}")).name == "memory"


def test_keywords_of_redis_without_a_name() -> None:
    said = "cache.name: is missing, and host is for Redis; add name: redis (or name: memory)"
    for section in ({}, {"options": {}}):
        given = {"host": "redis.prod"}
        assert refusal(load, {"cache": section}, options=given) == f"mapping: {said}"
        assert load({"cache": section}, options={"ttl": 5}).name == "memory"
    assert load({"cache": {"options": {"ttl": 5, "keyPrefix": "a:"}}}).name == "memory"


@pytest.mark.parametrize("option", ["host", "url"])
@pytest.mark.parametrize("written", ["${X}", "'${X}'", "${X}${X}"])
def test_an_empty_variable_is_no_server(option: str, written: str, read: Read) -> None:
    assert refusal(read, f"{option}: {written}", X="") == (
        f"config.yml: cache.options.{option}: is empty; is the variable set that it comes from?"
    )
    assert refusal(read, f"nodes: [{{host: {written}}}]", X="").endswith(
        "nodes[0].host: is empty; is the variable set that it comes from?"
    )


def test_a_file_with_only_a_cache_entry(write: Callable[..., Path]) -> None:
    path = write("name: redis\noptions: {prot: 1}\n")
    assert refusal(load, path) == ('config.yml: options.prot: unknown option, did you mean "port"?')


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("127.0.0.1:6380", "127.0.0.1:6380"),
        ("[::1]:6380", "[::1]:6380"),
        ("cache.example:1", "cache.example:1"),
        ("redis://h", "h:6379"),
        ("redis://:secret@[::1]/2", "[::1]:6379"),
        ("unix:///run/redis.sock?db=1", "/run/redis.sock"),
    ],
)
def test_address(source: str, address: str) -> None:
    assert load(source).address == address


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (5, "the configuration must be a path, a mapping or a URL, not int"),
        (
            {},
            f"mapping: names no server; pass a URL, the path of a file, host=..., or {EXAMPLE}",
        ),
        (
            {"rpc": {}, "Cache": {}},
            'mapping: no section cache, the sections are: rpc, Cache; rename "Cache" to '
            f"cache, or write {EXAMPLE}",
        ),
        (
            {"plugins": None},
            f"mapping: no section cache, the sections are: plugins; write {EXAMPLE}",
        ),
        ({"cache": None}, f"mapping: cache: must be a mapping; write {EXAMPLE}"),
        ({"cache": "redis"}, f"mapping: cache: must be a mapping; write {EXAMPLE}"),
        (
            {"cache": {"name": "redsi"}},
            'mapping: cache.name: must be "redis" or "memory", not \'redsi\'',
        ),
        ({"cache": {"name": None}}, 'mapping: cache.name: must be "redis" or "memory", not null'),
        ({"cache": {"name": ["redis"]}}, "mapping: cache.name: must be text, not a list"),
        (
            {"cache": {"type": "redis"}},
            'mapping: cache.type: must be "default"; write name: redis to choose the cache',
        ),
        (
            {"cache": {"path": "./mine", "name": "redis"}},
            'mapping: cache.path: must be "@deepstream/cache-redis", no other plug-in runs here; '
            "write name: redis in its place if the records are in Redis, and the path of a socket "
            "below options:",
        ),
        (
            {"cache": {"name": "redis", "option": {}}},
            'mapping: cache.option: unknown option, did you mean "options"?',
        ),
        (
            {"cache": {"name": "redis", "options": [1]}},
            "mapping: cache.options: must be a mapping of options, not a list",
        ),
        (
            {"cache": {"name": "redis", "options": {5: 1}}},
            "mapping: cache.options: the name of an option must be text, not a number",
        ),
    ],
)
def test_no_cache_entry(source: Any, message: str) -> None:
    assert refusal(load, source) == message


@pytest.mark.parametrize(
    ("source", "shown", "remedy"),
    [
        ("otherhost", "otherhost", "; for a server of this name write otherhost:6379"),
        ("127.0.0.1", "127.0.0.1", "; for a server at this address write 127.0.0.1:6379"),
        ("::1", "::1", "; for a server at this address write [::1]:6379"),
        ("config.yml ", "config.yml ", "; leave out the space around it"),
        ("localhost:", "localhost:", "; the port is missing, write localhost:6379"),
        ("memory", "memory", '; for a cache in memory write {"name": "memory"}'),
        ("h:6379 ", "h:6379 ", "; leave out the space around it"),
        (f"user:{SECRET}@h:6379", "h:6379", "; begin a URL with redis://"),
        ("config.toml", "config.toml", ""),
    ],
)
def test_a_word_that_is_no_source(source: str, shown: str, remedy: str) -> None:
    assert refusal(load, source) == (
        f"{shown}: a configuration is a file ending in .yml, .yaml, .json, a mapping, "
        f"host:port, or a URL (redis://, rediss:// or unix://){remedy}"
    )


def test_an_unset_variable_as_the_source() -> None:
    unset = "; is the variable set that it comes from?"
    for source in ("", " "):
        assert refusal(load, source) == f"the configuration is an empty text{unset}"
    assert refusal(load, None) == (
        f"the configuration must be a path, a mapping or a URL, not NoneType{unset}"
    )


# Unreadable files


def test_missing_and_unreadable_files(tmp_path: Path, write: Callable[..., Path]) -> None:
    missing = tmp_path / "missing.yml"
    assert refusal(load, missing) == f"missing.yml: there is no file {missing}"
    assert refusal(load, "missing.yml") == (
        f"missing.yml: there is no file missing.yml in {os.getcwd()}"
    )
    folder = tmp_path / "folder.yml"
    folder.mkdir()
    assert refusal(load, folder) == f"folder.yml: {folder} is a folder; name a file in it"
    assert re.search("can't be read: .*embedded null", refusal(load, "a\0.yml"))
    latin = tmp_path / "latin.yml"
    latin.write_bytes(b"cache: \xe9")
    assert refusal(load, latin) == f"latin.yml: {latin} isn't UTF-8 text (byte 7); save it as UTF-8"
    assert refusal(load, write("")) == (
        f"config.yml: is empty, or has only comments; write {EXAMPLE}"
    )
    assert refusal(load, write("- cache")) == (
        f"config.yml: must be a mapping of sections; write {EXAMPLE}"
    )


# Loads the configuration in its last argument, and prints why it can't.
READ_SAFELY = """
import resource, signal, sys, sysconfig
from dscache import ConfigError
from dscache.config import load

signal.alarm(20)
# A free-threaded Python reserves more addresses than it has memory.
most = (4 if sysconfig.get_config_var("Py_GIL_DISABLED") else 1) << 30
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    load(sys.argv[1])
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["fifo", "device", "large", "socket"])
@pytest.mark.parametrize("place", ["", "ca", "cert", "key", "password"])
def test_files_that_are_never_read(kind: str, place: str, tmp_path: Path) -> None:
    """In a separate process: reading a pipe would block, and a device never ends."""
    odd = tmp_path / "odd.yml"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        if kind == "fifo":
            os.mkfifo(odd)
        elif kind == "device":
            odd.symlink_to("/dev/zero")
        elif kind == "socket":
            listener.bind(str(odd))
        else:
            with odd.open("wb") as file:
                file.truncate(1 << 34)
        config = tmp_path / "config.yml"
        if not place:
            config = odd
        elif place == "password":
            call = f"fileLoad({odd})"
            config.write_text(f"cache: {{name: redis, options: {{{place}: '{call}'}}}}")
        else:
            config.write_text(f"cache: {{name: redis, options: {{tls: {{{place}: {odd}}}}}}}")
            if place == "key":
                cert = tmp_path / "cert.pem"
                cert.write_text("-----BEGIN CERTIFICATE-----")
                text = config.read_text().replace("tls: {", f"tls: {{cert: {cert}, ")
                config.write_text(text)
        done = subprocess.run(
            [sys.executable, "-c", READ_SAFELY, str(config)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    why = "more than" if kind == "large" else "isn't a regular file but a pipe, socket or device"
    assert why in done.stdout
    assert done.stdout.startswith("config.yml: cache.options." if place else "odd.yml: ")
    assert place in done.stdout


@pytest.mark.parametrize(
    "options",
    [
        "{host: h, password S3CR3T}",
        "{host: h, S3CR3T}",
        "{host: h, ? S3CR3T}",
        "{password: , S3CR3T}",
        "{password=S3CR3T}",
        "{natMap: {password S3CR3T: {}}}",
        "{redisOptions: {password S3CR3T}}",
        "{sentinels: [{host: h, password S3CR3T}]}",
        "{tls: {passphrase S3CR3T}}",
        "{password: 'a${S3CR3T b}'}",
        "{password: *S3CR3T}",
        "{host: &S3CR3T h, port: &S3CR3T 1, password: *S3}",
        "{password: !S3CR3T x}",
    ],
)
def test_a_line_that_failed_shows_no_secret(options: str, write: Callable[..., Path]) -> None:
    text = f"cache: {{name: redis, options: {options}}}"
    said = {refusal(load, write(text)) for text in (text, f"{options}\n", f"plugins: {options}\n")}
    assert not [one for one in said if "S3CR3T" in one]


def test_a_broken_line_shows_no_character_of_a_secret(write: Callable[..., Path]) -> None:
    """Not even one character, which a parser may quote."""
    said = refusal(load, write('cache: {name: redis, options: {password: "\\q"}}'))
    assert "'q'" not in said
    assert "unknown escape character" in said


QUOTES = "; put text with special characters in quotes"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"password: *{SECRET}", "line 4, column 15: not valid YAML: found undefined alias"),
        (
            f"password: !a!{SECRET} x",
            "line 4, column 15: not valid YAML: found undefined tag handle",
        ),
        (
            f"password: @{SECRET}",
            "line 4, column 15: not valid YAML: found character '@' that cannot start any token",
        ),
        (
            f'password: "{SECRET}',
            "line 5, column 1: not valid YAML: found unexpected end of stream",
        ),
        (
            f"password: {SECRET}: 1",
            "line 4, column 29: not valid YAML: mapping values are not allowed here",
        ),
        (
            f"password: {SECRET}\a",
            "line 4, column 29: not valid YAML: a character that YAML doesn't allow",
        ),
    ],
)
def test_broken_yaml(line: str, message: str, read: Read) -> None:
    assert refusal(read, line) == f"config.yml: {message}{QUOTES}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"cache": ', "line 1, column 11: not valid JSON: Expecting value"),
        ('{\n"cache": {"name": NaN}}', "line 2, column 19: not valid JSON: NaN isn't JSON"),
        ('{"cache" 1}', "line 1, column 10: not valid JSON: Expecting ':' delimiter"),
    ],
)
def test_broken_json(text: str, message: str, write: Callable[..., Path]) -> None:
    assert refusal(load, write(text, "config.json")) == f"config.json: {message}{QUOTES}"


def test_two_documents_are_refused(write: Callable[..., Path]) -> None:
    text = "cache: {name: redis}\n---\ncache: {name: memory}\n"
    assert "line 2, column 1: not valid YAML" in refusal(load, write(text))


@pytest.mark.parametrize("name", ["config.yml", "config.json"])
def test_nested_too_deeply(name: str, write: Callable[..., Path]) -> None:
    text = '{"cache": {"name": "redis", "options": {"host": %s}}}'
    deep = text % ("[" * 100_000 + "]" * 100_000 if name.endswith("json") else "[" * 3000)
    assert refusal(load, write(deep, name)) == f"{name}: is nested too deeply"
    deep = text % ("[" * 240 + "]" * 240)
    assert refusal(load, write(deep, name)).endswith(
        ("host: must be text, not a list", "is nested too deeply")
    )


def test_duplicate_keys(write: Callable[..., Path], read: Read) -> None:
    assert refusal(read, "port: 1", "db: 0", "port: 2") == (
        "config.yml: cache.options.port: is given twice (lines 4 and 6); keep one"
    )
    assert refusal(load, write("cache: {}\ncache: {}\n")) == (
        "config.yml: cache: is given twice (lines 1 and 2); keep one"
    )
    assert refusal(load, write('{"cache": {"name": "redis", "name": 1}}', "c.json")) == (
        "c.json: cache.name: is given twice; keep one"
    )
    # Other sections are deepstream's own business.
    assert load(write("rpc: {a: 1, a: 2}\ncache: {name: redis}\n")).name == "redis"


def test_merge_keys_and_aliases_across_sections(write: Callable[..., Path]) -> None:
    text = """\
defaults: &defaults {host: "${HOST}", port: 1}
more: &more {port: 2, ttl: 5, closeTimeout: 6}
unset: ${NO}
cache:
  name: redis
  options:
    <<: [*defaults, *more]
    closeTimeout: 7
    nodes: [&node {<<: *defaults}, *node]
"""
    found = load(write(text), environ={"HOST": "h"}).options
    assert (found.host, found.port, found.close_timeout, found.ttl) == ("h", 1, 7, 5)
    assert found.nodes == (Node(host="h", port=1),) * 2
    assert refusal(load, write("cache: {name: redis, options: {<<: 5}}")) == (
        "config.yml: cache.options: << must be followed by a mapping or a list of them"
    )


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("nodes: &a [*a]", "cache.options.nodes[0]"),
        ("redisOptions: &a {tls: *a}", "cache.options.redisOptions.tls"),
        ("redisOptions: &a {<<: *a}", "cache.options.redisOptions"),
    ],
)
def test_an_alias_inside_its_own_anchor(line: str, place: str, read: Read) -> None:
    assert refusal(read, line) == f"config.yml: {place}: contains itself, through an alias"


def test_aliases_of_aliases_do_not_grow(read: Read) -> None:
    lists = [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(40)]
    assert refusal(read, "a0: &a0 [x]", *lists).startswith("config.yml: cache.options.a0: unknown")


@pytest.mark.parametrize("tag", ["!mine", "!!python/object/apply:os.system", "!!timestamp"])
@pytest.mark.parametrize("value", ["x", "[x]", "{x: y}"])
def test_tags(tag: str, value: str, read: Read) -> None:
    assert refusal(read, f"password: {tag} {value}") == (
        "config.yml: cache.options.password: a YAML tag has no meaning here; "
        "put text that begins with ! into quotes"
    )


def test_standard_tags_of_yaml(read: Read) -> None:
    found = read('port: !!int "7000"', "password: !!str null", "username: ! null")
    assert (found.port, found.password, found.username) == (7000, "null", "null")


# Values

INTEGERS = [
    ("port: 6380", 6380),
    ("port: '6380'", 6380),
    ("port: ' 6380 '", 6380),
    ("port: 0x18EC", 6380),
    ("port: 06380", 6380),
    ("port: 012", 12),
    ("port: 1e3", 1000),
    ("port: 6380.0", 6380),
    ("port:", 6379),
    ("db: 0", 0),
    ("db: '3'", 3),
    ("db: 3 # optional", 3),
    ("ttl: 86400", 86400),
    ("ttl: '86400'", 86400),
    ("ttl: 0", None),
    ("ttl: '0'", None),
    ("ttl: ''", None),
    ("ttl: false", None),
    ("ttl: null", None),
    ("ttl:", None),
    ("family: 4", 4),
    ("family: '6'", 6),
    ("connectTimeout: 1", 1),
    ("commandTimeout: '1500'", 1500),
    ("closeTimeout: 2147483647", 2147483647),
    ("retryStrategy: {first: 10, cap: 200}", RetryStrategy(first=10, cap=200)),
    ("retryStrategy: {cap: 200}", RetryStrategy(first=50, cap=200)),
    ("maxPending: 1", 1),
    ("maxPendingBytes: 1099511627776", 2**40),
    ("maxReplyBytes: '4096'", 4096),
    ("maxConnections: 65535", 65535),
    ("nearCache: true", NearCacheOptions()),
    ("nearCache: false", None),
    ("nearCache: {}", NearCacheOptions()),
    (
        "nearCache: {maxAge: 10, mode: broadcast, prefixes: [a/, b/], serveStale: true}",
        NearCacheOptions(max_age=10, mode="broadcast", prefixes=("a/", "b/"), serve_stale=True),
    ),
    ("nearCache: {prefixes: [a, ab]}", NearCacheOptions(prefixes=("a", "ab"))),
    ("whenFull: error", "error"),
    ("maxRedirections: 0", 0),
    ("scaleReads: slave", "slave"),
    ("scaleReads: all", "all"),
    ("scaleReads: null", "master"),
    ("slotsRefreshTimeout: '500'", 500),
    ("slotsRefreshTimeout: null", 1000),
    ("slotsRefreshInterval: 1", 1),
    ("slotsRefreshInterval: 0", None),
    ("slotsRefreshInterval: '0'", None),
    ("slotsRefreshInterval: false", None),
    ("slotsRefreshInterval: null", None),
    ("slotsRefreshInterval:", None),
    ("clusterRetryStrategy: {first: 10}", ClusterRetryStrategy(first=10, cap=2000)),
    ("clusterRetryStrategy: {cap: '50'}", ClusterRetryStrategy(first=100, cap=50)),
    ("clusterRetryStrategy: null", ClusterRetryStrategy(first=100, cap=2000)),
    ("natMap: null", None),
    ("natMap: {}", None),
    ("natMap: false", None),
    ("natMap: {h:1: {host: i, port: '2'}}", {"h:1": NatTarget(host="i", port=2)}),
    (
        "natMap: {10.0.1.1:70: {host: a, port: 65535}, '[fd00::1]:65535': {host: '::1', port: 1}}",
        {
            "10.0.1.1:70": NatTarget(host="a", port=65535),
            "[fd00::1]:65535": NatTarget(host="::1", port=1),
        },
    ),
]


@pytest.mark.parametrize(("line", "expected"), INTEGERS)
def test_numbers(line: str, expected: int | None, read: Read) -> None:
    assert field(read(line), line) == expected


def field(found: Options, line: str) -> object:
    """Return the value of the option in a line of YAML."""
    name = line.partition(":")[0]
    return getattr(found, "".join(f"_{c.lower()}" if c.isupper() else c for c in name))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("port: abc", f"port: {PORT}, not 'abc'"),
        ("port: 0", f"port: {PORT}, not 0"),
        ("port: 65536", f"port: {PORT}, not 65536"),
        ("port: '-1'", f"port: {PORT}, not '-1'"),
        ("port: true", f"port: {PORT}, not true"),
        ("port: 1_000", f"port: {PORT}, not '1_000'"),
        ("port: 1:30", f"port: {PORT}, not '1:30'"),
        ("port: 1.5", f"port: {PORT}, not 1.5"),
        ("port: .inf", f"port: {PORT}, not '.inf'"),
        ("port: 1e400", f"port: {PORT}, not 1e400"),
        ("port: ''", f"port: {PORT}, not ''"),
        ("port: '٦٣'", f"port: {PORT}, not '٦٣'"),
        ("port: [1]", f"port: {PORT}, not a list"),
        ("port: {a: 1}", f"port: {PORT}, not a mapping"),
        (f"port: {'9' * 5000}", f"port: {PORT}, not {'9' * 80}"),
        (
            "db: 3 // optional",
            "db: must be a whole number of at least 0, not '3 // optional'; "
            "in YAML, a comment begins with #, not with //",
        ),
        ("db: -1", "db: must be a whole number of at least 0, not -1"),
        (
            'ttl: "86400 // optional"',
            "ttl: must be 0, or a whole number of seconds from 1 to 10000000000, not '86400 // "
            "optional'; in YAML, a comment begins with #, not with //",
        ),
        ("ttl: -1", "ttl: must be 0, or a whole number of seconds from 1 to 10000000000, not -1"),
        (
            "ttl: true",
            "ttl: must be 0, or a whole number of seconds from 1 to 10000000000, not true",
        ),
        ("ttl: 1.5", "ttl: must be 0, or a whole number of seconds from 1 to 10000000000, not 1.5"),
        (
            "connectTimeout: 0",
            f"connectTimeout: {MS}, not 0",
        ),
        (
            "commandTimeout: soon",
            f"commandTimeout: {MS}, not 'soon'",
        ),
        ("family: 5", "family: must be 0, 4 or 6, not 5"),
        ("family: IPv4", "family: must be 0, 4 or 6, not 'IPv4'"),
        ("maxRedirections: -1", "maxRedirections: must be a whole number from 0 to 1000, not -1"),
        (
            "keyLayout: hashtags",
            'keyLayout: must be "auto", "deepstream" or "hashtag", not \'hashtags\'',
        ),
        (
            "host: a b",
            "host: must be a host name or an address without a port, not 'a b'; "
            "for a URL, use the option url",
        ),
        (
            f"host: redis://:{SECRET}@h",
            "host: must be a host name or an address without a port, not text; "
            "for a URL, use the option url",
        ),
        ("host: ''", "host: is empty; is the variable set that it comes from?"),
        ("url: ''", "url: is empty; is the variable set that it comes from?"),
        ("host: [h]", "host: must be text, not a list"),
        ("host: {h: 1}", "host: must be text, not a mapping"),
        (f"password: [{SECRET}]", "password: must be text, not a list"),
        (f"password: {{a: {SECRET}}}", "password: must be text, not a mapping"),
        ('password: "a\\0b"', "password: must be text without NUL that can be encoded as UTF-8"),
        ("nodes: 'h:1'", "nodes: must be a list, not text"),
        ("nodes: {host: h}", "nodes: must be a list, not a mapping"),
        ("nodes:", "nodes: must be a list, not null"),
        ("nodes: []", "nodes: must have at least one entry; leave the option out if there is none"),
        ("nodes: [{}, null]", "nodes[1]: must be a mapping of options, not null"),
        (
            "nodes: ['h:1']",
            "nodes[0]: must be a mapping of options, such as {host: 10.0.0.1, port: 7000}, not "
            "text",
        ),
        ("nodes: [{port: x}]", f"nodes[0].port: {PORT}, not 'x'"),
        (
            "nodes: [{host: 'rediss://h:7000'}]",
            "nodes[0].host: must be a host name or an address without a port, not "
            "'rediss://h:7000'; for a URL, give its host and port as the options host and port; "
            "rediss:// becomes redisOptions: {tls: true}",
        ),
        (
            f"{{name: m, sentinels: [{{host: 'redis://:{SECRET}@h'}}]}}",
            "sentinels[0].host: must be a host name or an address without a port, not text; for a "
            "URL, give its host and port as the options host and port; Sentinels are queried "
            "without TLS",
        ),
        (
            "{nodes: [{}], natMap: {'a:1': {host: 'redis://h', port: 1}}}",
            'natMap["a:1"].host: must be a host name or an address without a port, not '
            "'redis://h'; for a URL, give its host and port as the options host and port",
        ),
        ("redisOptions: 5", "redisOptions: must be a mapping of options, not a number"),
        ("tls: yes", "tls: must be true, false or a mapping of options, not text"),
        ("tls: 1", "tls: must be true, false or a mapping of options, not a number"),
        (
            "tls: {rejectUnauthorized: 'false'}",
            "tls.rejectUnauthorized: must be true or false, without quotes, not 'false'",
        ),
        ("tls: {rejectUnauthorized: no}", None),
        (f"password:{SECRET}", ": must be a mapping of options, not text"),
        (
            f"{{password:{SECRET}}}",
            "password: unknown option; separate a name from its value by a colon and a space",
        ),
        ("prot: 1", 'prot: unknown option, did you mean "port"?'),
        ("key_prefix: a", 'key_prefix: unknown option, did you mean "keyPrefix"?'),
        ("HOST: a", 'HOST: unknown option, did you mean "host"?'),
        (
            "socket_timeout: 1",
            'socket_timeout: unknown option, did you mean "commandTimeout", in milliseconds?',
        ),
        (
            "timeout: 1",
            'timeout: unknown option, did you mean "commandTimeout", in milliseconds?',
        ),
        ("auth: x", 'auth: unknown option, did you mean "password"?'),
        ("ssl: true", 'ssl: unknown option, did you mean "tls"?'),
        (
            "encoding: x",
            "encoding: unknown option, leave it out; it has no counterpart here",
        ),
        ("uri: a", 'uri: unknown option, did you mean "url"?'),
        ("lazyConect: true", 'lazyConect: unknown option, did you mean "lazyConnect"?'),
        ("retryStrategy: 500", "retryStrategy: must be a mapping of options, not a number"),
        ("retryStrategy: {first: 0}", None),
        ("whenFull: drop", 'whenFull: must be "error" or "wait", not \'drop\''),
        ("maxPending: 0", None),
        ("zzz: 1", f"zzz: unknown option; the options are {OPTIONS}"),
        ("nodes: [{}, {prot: 1}]", 'nodes[1].prot: unknown option, did you mean "port"?'),
        ("nodes: [{lazyConnect: 1}]", None),
        ("redisOptions: {ttl: 1}", None),
        ("tls: {CA: x}", 'tls.CA: unknown option, did you mean "ca"?'),
        (
            "sentinels: [{host: a}]",
            "name: is missing; write the name of the group the Sentinels watch",
        ),
        ("sentinels: null", "sentinels: must be a list, not null"),
        ("sentinels: [{prot: 1}]", 'sentinels[0].prot: unknown option, did you mean "port"?'),
        ("role: primary", 'role: must be "master" or "slave", not \'primary\''),
        ("name: mymaster", None),
        ("enableTLSForSentinelMode: true", None),
        (
            "scaleReads: primary",
            'scaleReads: must be "all", "master", "slave" or "zone", not \'primary\'',
        ),
        (
            "nearCache: {maxRecord: 1}",
            'nearCache.maxRecord: unknown option, did you mean "maxRecords"?',
        ),
        (
            "nearCache: {prefixes: ['']}",
            "nearCache.prefixes[0]: is empty; is the variable set that it comes from?",
        ),
        (
            "nearCache: {mode: broadcast, prefixes: [user/, a, user/1]}",
            "nearCache.prefixes[2]: 'user/1' and 'user/' overlap, which Redis refuses in the mode "
            "broadcast; leave the longer one out",
        ),
        ("scaleReads: [slave]", "scaleReads: must be text, not a list"),
        (
            "slotsRefreshTimeout: 0",
            f"slotsRefreshTimeout: {MS}, not 0",
        ),
        (
            "slotsRefreshInterval: -1",
            f"slotsRefreshInterval: {MS.replace('must be', 'must be 0, or')}, not -1",
        ),
        (
            "slotsRefreshInterval: true",
            f"slotsRefreshInterval: {MS.replace('must be', 'must be 0, or')}, not true",
        ),
        (
            "clusterRetryStrategy: 100",
            "clusterRetryStrategy: must be a mapping of options, not a number",
        ),
        (
            "clusterRetryStrategy: {cap: 2s}",
            f"clusterRetryStrategy.cap: {MS}, not '2s'",
        ),
        (
            "clusterRetryStrategy: {frist: 1}",
            'clusterRetryStrategy.frist: unknown option, did you mean "first"?',
        ),
        ("natMap: 5", "natMap: must be a mapping, not a number"),
        ("natMap: [{host: h, port: 1}]", "natMap: must be a mapping, not a list"),
        ("natMap: {10.0.0.1: {}}", f"natMap: {NAT_NAME}, not '10.0.0.1'"),
        ("natMap: {'10.0.0.1:': {}}", f"natMap: {NAT_NAME}, not '10.0.0.1:'"),
        ("natMap: {'h:0': {}}", f"natMap: {NAT_NAME}, not 'h:0'"),
        ("natMap: {'h:65536': {}}", f"natMap: {NAT_NAME}, not 'h:65536'"),
        ("natMap: {'h:99999': {}}", f"natMap: {NAT_NAME}, not 'h:99999'"),
        ("natMap: {'h:x': {}}", f"natMap: {NAT_NAME}, not 'h:x'"),
        ("natMap: {'fd00::1:7000': {}}", f"natMap: {NAT_NAME}, not 'fd00::1:7000'"),
        ("natMap: {'redis://h:1': {}}", f"natMap: {NAT_NAME}, not 'redis://h:1'"),
        (f"natMap: {{'{SECRET}@h:1': {{}}}}", f"natMap: {NAT_NAME}, not text"),
        ("natMap: {'h:1': null}", 'natMap["h:1"]: must be a mapping of options, not null'),
        ("natMap: {'h:1': 'i:2'}", 'natMap["h:1"]: must be a mapping of options, not text'),
        ("natMap: {'h:1': {port: 2}}", 'natMap["h:1"].host: is missing'),
        ("natMap: {'h:1': {host: i}}", 'natMap["h:1"].port: is missing'),
        ("natMap: {'h:1': {host: i, port: }}", 'natMap["h:1"].port: is missing'),
        (
            "natMap: {'h:1': {host: i, prot: 2}}",
            'natMap["h:1"].prot: unknown option, did you mean "port"?',
        ),
        ("natMap: {'h:1': {host: i, port: 0}}", f'natMap["h:1"].port: {PORT}, not 0'),
        ("natMap: {'h:1': {host: a b, port: 1}}", None),
        ("? [a]\n    : b", ": the name of an option must be text"),
    ],
)
def test_mistakes(line: str, message: str | None, read: Read) -> None:
    found = refusal(read, line)
    place = "config.yml: cache.options"
    assert found.startswith(place)
    if message is not None:
        assert found == (place + message if message[0] == ":" else f"{place}.{message}")


@pytest.mark.parametrize(
    ("near", "others", "problem"),
    [
        ({}, {"nodes": [{"host": "h"}]}, "is for one server; on a cluster each process has"),
        ({"serveStale": True}, {}, "and serveStale exclude each other: a record of another"),
        ({"maxBytes": 1000}, {}, "needs maxBytes of at least 1048576, not 1000; write more, or"),
    ],
)
def test_what_a_shared_near_cache_excludes(
    near: dict[str, Any], others: dict[str, Any], problem: str
) -> None:
    near = {"shared": True, **near}
    found = refusal(options, nearCache=near, **others)
    assert found.startswith(f"mapping: options.nearCache.shared: {problem}")
    shared = options(nearCache={"shared": True}).near_cache
    assert shared is not None
    assert shared.shared
    assert not NearCacheOptions().shared


@pytest.mark.parametrize(
    ("option", "others"),
    [
        ("role", {"role": "slave", "name": "g", "sentinels": [{"host": "s"}]}),
        ("scaleReads", {"scaleReads": "slave", "nodes": [{"host": "h"}]}),
        ("scaleReads", {"scaleReads": "zone", "zone": "a", "nodes": [{"host": "h"}]}),
    ],
)
def test_replicas_keep_no_near_cache(option: str, others: dict[str, Any]) -> None:
    assert refusal(options, nearCache=True, **others) == (
        f"mapping: options.nearCache: with {option}: {others[option]} every read goes to a "
        "replica, and reads of replicas are not cached; leave one of the two out"
    )
    assert options(nearCache={"required": False}, **others).near_cache
    # Without Sentinels or nodes, the option has no effect.
    assert options(nearCache=True, **{option: "slave"}).near_cache


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("012345", "012345"),
        ("1e5", "1e5"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("1.50", "1.50"),
        ("2020-01-01", "2020-01-01"),
        ("true", "true"),
        ("no", "no"),
        ("=", "="),
        ("a#b", "a#b"),
        ("a # comment", "a"),
        ("'a # b'", "a # b"),
        ('"12345"', "12345"),
        ('"\\x24{NO}"', "${NO}"),
        ("$NO", "$NO"),
        ("${}", "${}"),
        ("null", None),
        ("'null'", "null"),
        ("~", None),
        ("", None),
        ("''", None),
        ("myfile(x)", "myfile(x)"),
        ("file(x", "file(x"),
        ("file(x) ", None),
    ],
)
@pytest.mark.parametrize("option", ["password", "username", "connectionName"])
def test_text_is_taken_literally(
    option: str, written: str, expected: str | None, read: Read, tmp_path: Path
) -> None:
    if written == "file(x) ":
        expected = str(tmp_path / "x")
    line = f"{option}: {written}"
    assert field(read(line), line) == expected


def test_values_of_a_mapping() -> None:
    found = options(port="7000", password=12345, username=7, path=Path("/run/x"), keyPrefix="${A}")
    assert found == Options(
        port=7000, password="12345", username="7", path="/run/x", key_prefix="${A}"
    )
    assert options(nodes=({"port": 1},)).nodes == (Node(port=1),)
    for wrong, kind in ((True, "a boolean"), (1.5, "a number"), (b"x", "bytes")):
        assert refusal(options, password=wrong) == (
            f"mapping: options.password: must be text, not {kind}"
        )
    assert refusal(options, port=True) == f"mapping: options.port: {PORT}, not True"
    assert "can be encoded as UTF-8" in refusal(options, password="\udcff")


def test_json_keeps_text_as_text(write: Callable[..., Path]) -> None:
    written = """{"name": "redis", "options": {"password": "${P}", "port": "${PORT}", "db": 1,
        "username": "\\ud83d\\ude00", "connectionName": 1e5, "keyPrefix": "\\u0024{P}",
\t\t"tls": false}}"""
    found = load(write(written, "c.json"), environ={"P": '"}: 1', "PORT": "7"}).options
    assert found == Options(
        password='"}: 1', port=7, db=1, username="😀", connection_name="1e5", key_prefix="${P}"
    )


# ${NAME}, file() and fileLoad()


@pytest.mark.parametrize("option", ["nodes: [{}, ${N}]", "sentinels: [{}, ${N}]"])
def test_a_variable_that_makes_an_entry_null(option: str, read: Read) -> None:
    place = f"config.yml: cache.options.{option.partition(':')[0]}[1]"
    text = refusal(read, option, "name: group", N="null")
    assert text == f"{place}: must be a mapping of options, not null"


@pytest.mark.parametrize(
    "value",
    [
        *("a: b", "#a", "a #b", "'", '"', "a\nb", "{}", "[", "*a", "!a", "%", "\t a ", "<<"),
        *("~", "null", "true", "012345", "1e5", "${P}", "file(x)", "fileLoad(x)", "\U00100000"),
    ],
)
@pytest.mark.parametrize("written", ["${P}", "'${P}'", '"${P}"', "${Q:-x}"])
def test_environment_arrives_unchanged(written: str, value: str, read: Read) -> None:
    assert read(f"password: {written}", P=value, Q=value).password == value
    assert read(f"{{password: {written}, port: ${{Q:-1}}}}", P=value, Q="").password == (
        "x" if "Q" in written else value
    )


@pytest.mark.parametrize(
    ("line", "environ", "expected"),
    [
        ("port: ${X}", "6380", 6380),
        ("port: ${X}", "", 6379),
        ("port: '${X}'", "6380", 6380),
        ("port: 6${X}0", "38", 6380),
        ("port: ${X:-6380}", None, 6380),
        ("port: ${X:-6380}", "", 6380),
        ("port: ${X:-6380}", "1", 1),
        ("port: ${X:-}", None, 6379),
        ("tls: ${X}", "false", None),
        ("ttl: ${X}", "", None),
        ("host: a${X}b${X}", "-", "a-b-"),
        ("host: ${X:-}", None, "localhost"),
        ("password: ${X}", "", None),
        ("password: '${X}'", "", None),
        ("keyPrefix: ${X:-a: b, [#c]}", None, "a: b, [#c]"),
        ("keyPrefix: ${X:-a:-b}", None, "a:-b"),
        ("keyPrefix: ${X:-${Y}", None, "${Y"),
        ("keyPrefix: ${X}", "${X}", "${X}"),
        ("keyPrefix: |-\n      a\n      ${X}", "b", "a\nb"),
    ],
)
def test_substitution(line: str, environ: str | None, expected: object, read: Read) -> None:
    assert field(read(line, **({} if environ is None else {"X": environ})), line) == expected


def test_substitution_in_keys_and_flow_mappings(read: Read) -> None:
    found = read(
        "${K}: 1", "nodes: [{host: ${H}, port: ${P}}, {host: ${H}}]", K="ttl", H="h", P="5"
    )
    assert found == Options(ttl=1, nodes=(Node(host="h", port=5), Node(host="h")))
    assert refusal(read, "{host: ${H}, ttl: x}", H="h").startswith(
        "config.yml: cache.options.ttl: must be"
    )


@pytest.mark.parametrize("line", ["host: ${NO_SUCH}", "'host': 'a${NO_SUCH}'"])
def test_unset_variable(line: str, read: Read) -> None:
    assert refusal(read, line) == (
        "config.yml: cache.options.host: the environment variable NO_SUCH is not set; "
        "set it, or write a default as in ${NO_SUCH:-default}"
    )


def test_positions_are_right_beside_placeholders(read: Read) -> None:
    assert refusal(read, "host: ${HOST:-{a: b}", "port: ${P} : 1").startswith(
        "config.yml: line 5, column 16: not valid YAML"
    )


def test_file_and_file_load(tmp_path: Path, read: Read, write: Callable[..., Path]) -> None:
    (tmp_path / "sub").mkdir()
    write(f"{SECRET} ${{NO}}\n", "sub/word.txt")
    write("[{host: ${H}, port: 012, password: file(x)}]", "nodes.yml")
    write('{"password": "${H}", "connectTimeout": 7}', "shared.json")
    assert read("path: file(./run/../redis.sock)").path == str(tmp_path / "redis.sock")
    found = read(
        "keyPrefix: 'file(/abs/x)'",
        "connectionName: file(${D}/y)",
        "password: fileLoad(sub/word.txt)",
        "nodes: fileLoad(nodes.yml)",
        "redisOptions: fileLoad(${D}/../shared.json)",
        H="h",
        D="sub",
    )
    assert found == Options(
        key_prefix="/abs/x",
        connection_name=str(tmp_path / "sub/y"),
        password=f"{SECRET} ${{NO}}\n",
        nodes=(Node(host="h", port=12, password="file(x)"),),
        redis_options=RedisOptions(password="h", connect_timeout=7),
    )


def test_file_load_of_a_bad_file(tmp_path: Path, read: Read, write: Callable[..., Path]) -> None:
    assert refusal(read, "password: fileLoad(no.txt)") == (
        f"config.yml: cache.options.password: no.txt: there is no file {tmp_path / 'no.txt'}"
    )
    write(f"password: *{SECRET}", "bad.yml")
    assert refusal(read, "redisOptions: fileLoad(bad.yml)") == (
        "config.yml: cache.options.redisOptions: bad.yml: line 1, column 11: not valid YAML: "
        f"found undefined alias{QUOTES}"
    )
    write("password: ${NO}", "unset.yml")
    assert refusal(read, "redisOptions: fileLoad(unset.yml)").startswith(
        "config.yml: cache.options.redisOptions: unset.yml: password: the environment variable NO"
    )


# Options of ioredis


def test_options_without_effect(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dscache")
    ignored = [
        "enableReadyCheck",
        "enableOfflineQueue",
        "autoResendUnfulfilledCommands",
        "lazyConnect",
        "keepAlive",
        "noDelay",
        "maxRetriesPerRequest",
        "dropBufferSupport",
        "enableAutoPipelining",
        "stringNumbers",
        "maxLoadingRetryTime",
        "serverName",
        "showFriendlyErrorStack",
        "autoResubscribe",
        "readOnly",
        "disconnectTimeout",
    ]
    elsewhere = [
        "retryDelayOnMoved",
        "retryDelayOnFailover",
        "retryDelayOnClusterDown",
        "retryDelayOnTryAgain",
        "updateSentinels",
    ]
    in_shared = ["keyPrefix", "retryStrategy", "reconnectOnError"]
    shared = ", ".join(f"{name}: 1" for name in (*ignored, *in_shared))
    found = read(
        "nodes: [{}]",
        *(f"{name}: [any, value]" for name in ignored + elsewhere),
        f"redisOptions: {{{shared}}}",
        "useSRVRecords: false",
    )
    assert found == Options(nodes=(Node(),))
    messages = [record.getMessage() for record in caplog.records]
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert len(messages) == len(ignored) * 2 + len(elsewhere) + len(in_shared)
    assert (
        "config.yml: cache.options.lazyConnect has no effect: "
        "the connection is made when the cache is opened"
    ) in messages
    assert (
        "config.yml: cache.options.redisOptions.keyPrefix has no effect: it belongs beside "
        "redisOptions, as with ioredis"
    ) in messages


# Clusters


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, str]]]:
    """Return a function that gives the level and text of messages logged since the last call."""
    caplog.set_level(logging.INFO, "dscache")

    def logged() -> list[tuple[str, str]]:
        found = [(record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        return found

    return logged


Notes = Callable[[], list[tuple[str, str]]]


@pytest.mark.parametrize(
    "line",
    [
        "maxRedirections: 16",
        "scaleReads: slave",
        "natMap: {h:1: {host: i, port: 2}}",
        "slotsRefreshTimeout: 1",
        "slotsRefreshInterval: 0",
        "clusterRetryStrategy: {first: 1}",
        "redisOptions: {connectTimeout: 1}",
    ],
)
def test_options_only_for_clusters(line: str, read: Read, notes: Notes) -> None:
    name = line.partition(":")[0]
    found = read(line)
    assert notes() == [
        (
            "INFO",
            f"config.yml: cache.options.{name} has no effect: there are no nodes of a cluster",
        )
    ]
    assert field(read("nodes: [{}]", line), line) == field(found, line)
    read("nodes: [{}]", line)
    read(f"{name}: null")
    assert notes() == []


def test_the_zone_of_the_program(read: Read, notes: Notes) -> None:
    where = "config.yml: cache.options"
    found = read("nodes: [{}]", "scaleReads: zone", "zone: eu-1a")
    assert (found.scale_reads, found.zone) == ("zone", "eu-1a")
    for zone in ("zone: null", "zone: ''"):
        assert refusal(read, "nodes: [{}]", "scaleReads: zone", zone) == (
            f"{where}.scaleReads: reads replicas in the program's own availability zone; "
            "write its name as zone: ..."
        )
    assert refusal(read, "nodes: [{}]", "scaleReads: all", "zone: a") == (
        f"{where}.zone: chooses replicas only with scaleReads: zone; write that, or leave it out"
    )
    assert notes() == []
    read("zone: a")
    assert notes() == [
        ("INFO", f"{where}.zone has no effect: there are no nodes of a cluster"),
    ]


def test_missing_options_are_not_logged(notes: Notes) -> None:
    options()
    options(nodes=[{}])
    options(nodes=[{}], host=None, port=None, password=None, username=None, tls=None, db=None)
    options(nodes=[{}], url=None, path="", db=0, connectionName="", ttl=5)
    load({"name": "redis", "options": None})
    load("redis://h/1")
    assert notes() == []


def test_options_without_effect_beside_nodes(read: Read, notes: Notes) -> None:
    cluster = "nodes: [{host: a, port: 7000}]"
    found = read(cluster, "host: h", "port: 1", "role: slave", "tls: false")
    place = "config.yml: cache.options"
    assert notes() == [
        ("INFO", f"{place}.host has no effect on a cluster: nodes names the servers"),
        ("INFO", f"{place}.port has no effect on a cluster: nodes names the servers"),
        ("INFO", f"{place}.tls has no effect on a cluster: redisOptions.tls is used"),
        (
            "INFO",
            f"{place}.role has no effect on a cluster: "
            "scaleReads selects the nodes that serve reads",
        ),
    ]
    assert found.address == "a:7000"
    assert (found.for_node("a", 7000).host, found.for_node("a", 7000).port) == ("a", 7000)
    read(cluster, "tls: true", "redisOptions: {tls: {servername: s}}")
    assert notes() == [
        ("INFO", f"{place}.tls has no effect on a cluster: redisOptions.tls is used")
    ]


@pytest.mark.parametrize("name", ["username", "password"])
def test_a_login_beside_nodes_is_logged(name: str, read: Read, notes: Notes) -> None:
    line = f"{name}: {SECRET}"
    note = (
        f"config.yml: cache.options.{name} has no effect on a cluster: "
        f"the node's own {name} or redisOptions.{name} is used; write it there"
    )
    found = read("nodes: [{}]", line)
    assert notes() == [("WARNING", note)]
    assert getattr(found.for_node("127.0.0.1", 6379), name) is None
    read("nodes: [{}]", line, f"redisOptions: {{{name}: its-own}}")
    assert notes() == [("INFO", note)]


def test_url_beside_nodes(notes: Notes) -> None:
    found = options(nodes=[{"port": 7000}], url=f"redis://u:{SECRET}@h:1", path="/own")
    place = "mapping: options.url has no effect on a cluster"
    assert notes() == [
        ("INFO", f"{place}: nodes names the servers"),
        (
            "WARNING",
            f"{place}: the node's own username or redisOptions.username is used; write it there",
        ),
        (
            "WARNING",
            f"{place}: the node's own password or redisOptions.password is used; write it there",
        ),
    ]
    assert (found.address, found.path) == ("127.0.0.1:7000", None)
    for url, message in (
        (
            "redis://h/3",
            OTHER_DATABASE,
        ),
        ("rediss://h", "on a cluster redisOptions.tls is used; write it there"),
        ("unix:///run/redis.sock", "a cluster has no socket; leave out the path or nodes"),
    ):
        assert refusal(options, nodes=[{}], url=url) == f"mapping: options.url: {message}"


OTHER_DATABASE = (
    "on a cluster, write redisOptions.db: 3 if it has several databases (Valkey 9 with "
    "cluster-databases), else leave out db"
)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (code(row[0])[0], row[1])
        for row in table(PROJECT / "docs" / "configuration.md", "Refused on a cluster")
    ],
)
def test_refused_on_a_cluster(written: str, message: str, read: Read) -> None:
    name = written.partition(":")[0]
    # The mistake in combining Sentinels is that there are nodes.
    place = "nodes" if name == "sentinels" else name
    beside = ["name: group"] if name == "sentinels" else []
    assert refusal(read, "nodes: [{}]", written, *beside) == (
        f"config.yml: cache.options.{place}: {message}"
    )
    if name != "keyPrefix":
        assert refusal(read, "nodes: [{}]", written, "keyLayout: deepstream", *beside)
    read(written, *beside)


@pytest.mark.parametrize(
    ("prefix", "layout", "fits"),
    [
        ("{}", "auto", False),
        ("a{}b:", "hashtag", False),
        ("{}", "deepstream", True),
        ("{app}", "auto", True),
        ("{app}{}", "auto", True),
        ("}{", "auto", False),
        ("{", "auto", False),
        ("{a", "auto", True),
        ("}{}", "auto", False),
    ],
)
def test_prefixes_of_a_cluster(prefix: str, layout: str, fits: bool) -> None:
    written = {"keyPrefix": prefix, "keyLayout": layout}
    if fits:
        key = f"{prefix}{{name}}" if layout != "deepstream" else None
        assert options(nodes=[{}], **written).key_prefix == prefix
        # Redis hashes the text between the first { and the first } after it, unless it is empty.
        assert key is None or key.partition("{")[2].partition("}")[0]
    else:
        assert refusal(options, nodes=[{}], **written).startswith(
            "mapping: options.keyPrefix: its { begins an empty hash tag"
        )
    assert options(**written).key_prefix == prefix


def test_nat_map_of_a_mapping() -> None:
    assert refusal(options, natMap={7000: {}}) == f"mapping: options.natMap: {NAT_NAME}, not 7000"
    given = {"h:1": {"host": "i", "port": 2}}
    found = options(nodes=({},), natMap=given)
    given.clear()
    assert found.nat_map == {"h:1": NatTarget(host="i", port=2)}


def test_nat_map_without_nodes() -> None:
    mapping = {"h:1": {"host": "i", "port": 2}}
    sentinels = {"sentinels": [{}], "name": "group"}
    assert refusal(options, natMap=mapping, **sentinels) == (
        "mapping: options.natMap: is for the nodes of a cluster; configure the Sentinels to "
        "announce addresses that can be reached from here"
    )
    assert options(natMap={}, **sentinels).nat_map is None


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({}, False),
        ({"keyLayout": "deepstream"}, False),
        ({"keyLayout": "hashtag"}, True),
        ({"nodes": [{}]}, True),
        ({"nodes": [{}], "keyLayout": "deepstream"}, False),
        ({"nodes": [{}], "keyLayout": "hashtag"}, True),
        ({"sentinels": [{}], "name": "group"}, False),
    ],
)
def test_hash_tag(written: dict[str, Any], expected: bool) -> None:
    found = options(**written)
    assert found.hash_tag is expected
    # The options of a single node equal those of its cluster.
    assert found.for_node("h", 1).hash_tag is expected


def test_seeds() -> None:
    assert options().seeds == ()
    found = options(
        nodes=[
            {"host": "A", "port": 1, "password": "first"},
            {"host": "b", "port": 1},
            {"host": "a", "port": 1, "password": "last"},
            {"host": "a", "port": 2},
            {"host": "::1", "port": 1},
            {"host": "0:0:0:0:0:0:0:1", "port": 1},
            {"host": "b", "port": 1},
        ]
    )
    assert found.seeds == (
        Node(host="a", port=1, password="last"),
        Node(host="b", port=1),
        Node(host="a", port=2),
        Node(host="0:0:0:0:0:0:0:1", port=1),
    )
    assert found.for_node("A", 1).password == "last"


def test_mapped() -> None:
    found = options(
        nodes=[{}],
        natMap={
            "10.0.1.230:30001": {"host": "203.0.113.73", "port": 1},
            "Inside.Example:7000": {"host": "outside.example", "port": 2},
            "[FD00::0:1]:7000": {"host": "2001:db8::1", "port": 3},
        },
    )
    assert found.mapped("10.0.1.230", 30001) == ("203.0.113.73", 1)
    assert found.mapped("inside.EXAMPLE", 7000) == ("outside.example", 2)
    assert found.mapped("fd00::1", 7000) == ("2001:db8::1", 3)
    for unmapped in (("10.0.1.230", 30002), ("10.0.1.23", 30001), ("203.0.113.73", 1)):
        assert found.mapped(*unmapped) == unmapped
    assert options(nodes=[{}]).mapped("H", 1) == ("H", 1)


def login(found: Options, host: str, node: Node | None = None) -> tuple[str | None, str | None]:
    """Return the username and password for the node on port 7000 of a host."""
    options_of_node = found.for_node(host, 7000, node)
    return options_of_node.username, options_of_node.password


NODES = """nodes:
      - {host: a, port: 7000, password: own-secret}
      - {host: b, port: 7000}
      - {host: c, port: 7000, password: null}
      - {host: d, port: 7000, password: ''}
      - {host: e, port: 7000, username: own, password: null}
      - {host: f, port: 7000, username: own}
      - {host: g, port: 7000, username: null, password: own-secret}
      - {host: h, port: 7000, username: own, password: own-secret}
      - {host: '::1', port: 7000, password: own-secret}"""


def test_logins_of_nodes(read: Read) -> None:
    found = read(NODES, "redisOptions: {username: app, password: shared}")
    assert login(found, "a") == ("app", "own-secret")
    assert login(found, "b") == ("app", "shared")
    assert login(found, "c") == (None, None)
    assert login(found, "d") == (None, None)
    assert login(found, "e") == ("own", None)
    assert login(found, "f") == ("own", "shared")
    assert login(found, "g") == (None, "own-secret")
    assert login(found, "h") == ("own", "own-secret")
    # Discovered, at another address or at that of a configured node in another spelling.
    assert login(found, "z") == ("app", "shared")
    assert login(found, "A") == ("app", "own-secret")
    assert login(found, "0:0:0:0:0:0:0:1") == ("app", "own-secret")
    assert found.for_node("a", 7001).password == "shared"
    # Discovered at an address whose configured node the caller knows.
    assert found.nodes is not None
    assert login(found, "10.0.0.1", found.nodes[0]) == ("app", "own-secret")
    assert login(found, "a", found.nodes[2]) == (None, None)
    without = read(NODES)
    assert login(without, "a") == (None, "own-secret")
    assert login(without, "b") == login(without, "z") == (None, None)


def test_options_of_nodes() -> None:
    tls = Tls(servername="s")
    beside = Options(
        host="elsewhere",
        port=1,
        key_prefix="p:",
        ttl=5,
        close_timeout=7,
        retry_strategy=RetryStrategy(first=1, cap=2),
        max_pending=3,
        max_pending_bytes=4,
        when_full="error",
        max_reply_bytes=5,
        max_connections=6,
        connect_timeout=11,
        command_timeout=12,
        connection_name="top",
        family=4,
        nodes=(Node(host="a", port=7000),),
        nat_map={"h:1": NatTarget(host="i", port=2)},
    )
    single = replace(beside, host="a", port=7000, key_layout="hashtag", nodes=None, nat_map=None)
    assert beside.for_node("a", 7000) == single
    assert beside.for_node("a", 7000).address == "a:7000"
    shared = RedisOptions(
        tls=tls, connect_timeout=21, command_timeout=22, connection_name="shared", family=0
    )
    assert replace(beside, redis_options=shared).for_node("a", 7000) == replace(
        single,
        tls=tls,
        connect_timeout=21,
        command_timeout=22,
        connection_name="shared",
        family=0,
    )
    assert beside.for_node("a", 7000).for_node("a", 7000) == single


# URLs


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", {}),
        ("redis://h", {"host": "h"}),
        ("REDIS://h:1", {"host": "h", "port": 1}),
        ("redis://h:6380/3", {"host": "h", "port": 6380, "db": 3}),
        ("redis://h/3?db=4", {"host": "h", "db": 4}),
        ("redis:///3", {"db": 3}),
        ("redis://h/", {"host": "h"}),
        ("redis://user@h", {"host": "h", "username": "user"}),
        ("redis://:p%40ss%2F%25@h", {"host": "h", "password": "p@ss/%"}),
        ("redis://:p@ss@h", {"host": "h", "password": "p@ss"}),
        ("redis://us%3Aer:pw@h", {"host": "h", "username": "us:er", "password": "pw"}),
        ("redis://:@h", {"host": "h"}),
        ("redis://[::1]:6380", {"host": "::1", "port": 6380}),
        ("redis://h?password=p%20w&username=u", {"host": "h", "password": "p w", "username": "u"}),
        (
            "redis://h?socket_timeout=0.5&socket_connect_timeout=3&client_name=app&protocol=3",
            {
                "host": "h",
                "command_timeout": 500,
                "connect_timeout": 3000,
                "connection_name": "app",
            },
        ),
        ("unix:///run/a%20b.sock?db=1", {"path": "/run/a b.sock", "db": 1}),
        ("unix://u:p@/run/r.sock", {"path": "/run/r.sock", "username": "u", "password": "p"}),
        ("unix:///run/r@1.sock?password=a@b", {"path": "/run/r@1.sock", "password": "a@b"}),
        ("rediss://h", {"host": "h", "tls": Tls()}),
        (
            "rediss://h?ssl_cert_reqs=none&ssl_check_hostname=false",
            {"host": "h", "tls": Tls(reject_unauthorized=False, check_hostname=False)},
        ),
        ("rediss://h?ssl_cert_reqs=required&ssl_check_hostname=True", {"host": "h", "tls": Tls()}),
        ("127.0.0.1:6380", {"host": "127.0.0.1", "port": 6380}),
    ],
)
def test_url(url: str, expected: dict[str, Any]) -> None:
    config = load(url)
    assert (config.name, config.options) == ("redis", Options(**expected))
    assert options(url=url) == config.options
    for secret in filter(None, (config.options.username, config.options.password)):
        assert f"{secret}@" not in config.source
        assert f"={secret}" not in config.source


ESCAPE = "write the special characters of the password percent-encoded (@ %40, / %2F, # %23)"
UNREADABLE = f"the host or the port can't be read; {ESCAPE}"
BAD_PORT = "the port must be a whole number from 1 to 65535"
BRACKETS = "an IPv6 address is written in brackets, as in redis://[::1]:6379"
SOCKET = "a socket's path begins with a third slash: unix:///run/redis.sock"
SPILLED = f"an @ or # is in the wrong place; {ESCAPE}"
DATABASE = "the path must be the number of a database, as in redis://host/3"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"http://:{SECRET}@h", "must begin with redis://, rediss:// or unix://, not http://"),
        (f"{SECRET}://h", "must begin with redis://, rediss:// or unix://"),
        (f"redis://{SECRET}:x", f"{BAD_PORT}; a password is followed by @ and the host"),
        (f"redis://:{SECRET}", f"{BAD_PORT}; a password is followed by @ and the host"),
        (f"redis://user:{SECRET}@h:port", BAD_PORT),
        (f"redis://:{SECRET}@h:70000/1", BAD_PORT),
        ("redis://h:99999", BAD_PORT),
        ("redis://[::1", BRACKETS),
        ("redis://::1", BRACKETS),
        ("redis://::1:6379/0", BRACKETS),
        (f"redis://:{SECRET}@fe80::1:6379", BRACKETS),
        ("redis://h:6379 ", "begins or ends with a space; leave it out"),
        (" redis://h:6379/0", "begins or ends with a space; leave it out"),
        (f"unix://:{SECRET}/run/x", SOCKET),
        (f"redis://:{SECRET}/x@h:1", UNREADABLE),
        (f"redis://:1/{SECRET}@h:1", SPILLED),
        (f"redis://:1?{SECRET}@h:1", SPILLED),
        (f"redis://:1#{SECRET}@h:1", SPILLED),
        (f"redis://:1#{SECRET}", SPILLED),
        (f"redis://h/{SECRET}", DATABASE),
        ("redis://h/1/2", DATABASE),
        ("redis://:%ff@h", "the percent-encoded text isn't UTF-8"),
        (f"redis://h?password={SECRET}%ff", f"the query can't be read; {ESCAPE}"),
        (
            "redis://h?scoket_timeout=1",
            'unknown query option "scoket_timeout", did you mean "socket_timeout"?',
        ),
        (
            "redis://h?z=1",
            'unknown query option "z", the options are db, username, password, client_name, '
            "socket_timeout, socket_connect_timeout, ssl_ca_certs, ssl_certfile, ssl_keyfile, "
            "ssl_cert_reqs, ssl_check_hostname, protocol",
        ),
        (
            "redis://h?socket_timeout=x",
            "the query option socket_timeout must be a number of seconds above 0",
        ),
        (
            "redis://h?socket_timeout=inf",
            "the query option socket_timeout must be a number of seconds above 0",
        ),
        (
            "redis://h?socket_timeout=nan",
            "the query option socket_timeout must be a number of seconds above 0",
        ),
        ("redis://h?protocol=4", "the query option protocol must be 2 or 3"),
        (
            "rediss://h?ssl_check_hostname=maybe",
            "the query option ssl_check_hostname must be true or false",
        ),
        (
            "rediss://h?ssl_cert_reqs=sometimes",
            "the query option ssl_cert_reqs must be none, optional or required",
        ),
        ("redis://h?ssl_cert_reqs=none", "the ssl_ options need a URL that begins with rediss://"),
        (f"unix://{SECRET}/run/x", SOCKET),
        ("unix://", SOCKET),
    ],
)
def test_bad_url(url: str, message: str) -> None:
    assert refusal(load, url) == f"URL: {message}"
    assert refusal(options, url=url) == f"mapping: options.url: {message}"


def test_a_variable_outside_of_a_file() -> None:
    assert refusal(load, {"url": "${REDIS_URL}"}) == (
        "mapping: url: must begin with redis://, rediss:// or unix://, or be like 127.0.0.1:6379; "
        "${...} is replaced by a variable's value in files alone"
    )


def test_bad_value_in_a_url() -> None:
    assert refusal(load, f"redis://:{SECRET}@h:0/1") == f"redis://h:0/1: port: {PORT}, not 0"
    assert refusal(load, "redis://h?db=x") == (
        "redis://h: db: must be a whole number of at least 0, not 'x'"
    )


def test_url_option() -> None:
    own: dict[str, Any] = {
        "host": "own",
        "port": 1,
        "username": "own",
        "password": "own",
        "db": 1,
        "path": "/own",
    }
    assert options(url="redis://h", **own) == Options(
        host="h", port=1, username="own", password="own", db=1
    )
    assert options(url="redis://u:p@h:2/3", **own) == Options(
        host="h", port=2, username="u", password="p", db=3
    )
    assert options(url="unix:///s", **own).path == "/s"
    assert options(url="redis://:p@", **own).path == "/own"
    assert options(url=None, port=5) == Options(port=5)
    tls = {"servername": "s", "checkHostname": True}
    assert options(url="rediss://h?ssl_check_hostname=no", tls=tls).tls == Tls(
        servername="s", check_hostname=False
    )
    assert options(url="rediss://h", tls=False).tls == Tls()
    assert options(url="redis://h", tls=True).tls == Tls()
    assert refusal(options, url=[SECRET]) == "mapping: options.url: must be text, not a list"
    assert refusal(options, url=SECRET) == (
        "mapping: options.url: must begin with redis://, rediss:// or unix://, or be like "
        "127.0.0.1:6379"
    )


# TLS


def encrypted(key: str) -> str:
    """Return a key encrypted with the passphrase "open"."""
    return (
        serialization.load_pem_private_key(key.encode(), None)
        .private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"open"),
        )
        .decode()
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tls: true", Tls()),
        ("tls: {}", Tls()),
        ("tls: false", None),
        ("tls: null", None),
        ("tls:", None),
        (
            "tls: {servername: s, rejectUnauthorized: false}",
            Tls(servername="s", reject_unauthorized=False),
        ),
        ("tls: {ca: null, rejectUnauthorized: null}", Tls()),
    ],
)
def test_tls_forms(line: str, expected: Tls | None, read: Read) -> None:
    assert read(line).tls == expected


def test_context_verifies_by_default() -> None:
    context = Tls().context()
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)
    context = Tls(check_hostname=False).context()
    assert (context.check_hostname, context.verify_mode) == (False, ssl.CERT_REQUIRED)
    context = Tls(reject_unauthorized=False).context()
    assert (context.check_hostname, context.verify_mode) == (False, ssl.CERT_NONE)


def handshake(client: ssl.SSLContext, certificates: TLSFiles, name: str) -> dict[str, Any]:
    """Return the client's certificate as a server with ``certificates`` sees it."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificates.certificate, certificates.key)
    server.load_verify_locations(certificates.authority)
    server.verify_mode = ssl.CERT_OPTIONAL
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            advance(end)
    return ends[1].getpeercert() or {}


def advance(end: ssl.SSLObject) -> None:
    with contextlib.suppress(ssl.SSLWantReadError):
        end.do_handshake()


def test_handshake(certificates: TLSFiles, write: Callable[..., Path], tmp_path: Path) -> None:
    for name, source in (("ca", "authority"), ("cert", "certificate"), ("key", "key")):
        write(Path(getattr(certificates, source)).read_text(), f"{name}.pem")
    (tmp_path / "ca.pem").write_bytes("# Autorité\n".encode() + (tmp_path / "ca.pem").read_bytes())
    key = (tmp_path / "key.pem").read_text()
    write(encrypted(key), "locked.pem")
    write((tmp_path / "cert.pem").read_text() + key, "both.pem")
    forms = {
        "paths": "ca: ca.pem, cert: cert.pem, key: key.pem",
        "file()": "ca: file(ca.pem), cert: file(cert.pem), key: file(key.pem)",
        "content": "ca: fileLoad(ca.pem), cert: fileLoad(cert.pem), key: fileLoad(key.pem)",
        "one file": "ca: ca.pem, cert: both.pem",
        "one text": "ca: ca.pem, cert: fileLoad(both.pem)",
        "encrypted": "ca: ca.pem, cert: cert.pem, key: locked.pem, passphrase: open",
    }
    for form, written in forms.items():
        path = write(f"cache: {{name: redis, options: {{tls: {{{written}}}}}}}")
        tls = load(path).options.tls
        assert tls is not None
        assert handshake(tls.context(), certificates, "localhost"), form
        assert key.splitlines()[1] not in repr(tls)
    url = f"rediss://h?ssl_ca_certs={tmp_path}/ca.pem"
    anonymous = load(url).options.tls
    assert anonymous is not None
    assert handshake(anonymous.context(), certificates, "localhost") == {}
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(anonymous.context(), certificates, "elsewhere")
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        handshake(Tls().context(), certificates, "localhost")
    unverified = replace(anonymous, ca=None, reject_unauthorized=False)
    assert handshake(unverified.context(), certificates, "elsewhere") == {}


def test_bad_pem(certificates: TLSFiles, read: Read, write: Callable[..., Path]) -> None:
    place = "config.yml: cache.options.tls"
    write("nothing", "empty.pem")
    write("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "bad.pem")
    write(encrypted(Path(certificates.key).read_text()), "locked.pem")
    other = write(Path(certificates.authority).read_text(), "other.pem")
    cert, key = certificates.certificate, certificates.key

    def tls(written: str, option: str = "tls") -> str:
        return refusal(read, f"{option}: {written}")

    ca = "must be PEM text or a PEM file of certificates"
    assert tls("{ca: no.pem}").startswith(f"{place}.ca: {ca}: [Errno 2] No such file or directory")
    assert tls("{ca: empty.pem}") == f"{place}.ca: {ca}: no certificate in it"
    assert tls("{ca: bad.pem}").startswith(f"{place}.ca: {ca}: ")
    assert tls("{ca: fileLoad(bad.pem)}").startswith(f"{place}.ca: {ca}: ")
    assert tls("{tls: {ca: no.pem}}", "redisOptions").startswith(
        f"{place.removesuffix('tls')}redisOptions.tls.ca: {ca}"
    )
    assert tls(f"{{key: {key}}}") == f"{place}.cert: is missing; a key needs its certificate"
    missing = "must be PEM text or a PEM file: No such file or directory"
    assert tls(f"{{cert: {cert}, key: {SECRET}}}") == f"{place}.key: {missing}"
    assert tls("{cert: no.pem, key: no.pem}") == f"{place}.cert: {missing}"
    unfit = "certificate and key are no PEM, don't belong together, or the passphrase is wrong"
    assert tls(f"{{cert: {other}, key: {key}}}").startswith(f"{place}.key: {unfit} (")
    assert tls(f"{{cert: {cert}}}").startswith(f"{place}.cert: {unfit} (")
    assert tls(f"{{cert: {cert}, key: locked.pem, passphrase: {SECRET}}}").startswith(
        f"{place}.key: {unfit} ("
    )
    assert tls(f"{{cert: {cert}, key: locked.pem}}") == (
        f"{place}.passphrase: is missing; the key is encrypted"
    )
    with pytest.raises(ConfigError, match=r"^here\.ca: must be PEM text"):
        Tls(ca="/no/such.pem").context("here")


def test_a_key_on_disk_is_removed(
    certificates: TLSFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    texts = {name: Path(getattr(certificates, name)).read_text() for name in ("certificate", "key")}
    Tls(cert=texts["certificate"], key=texts["key"]).context()
    assert os.listdir(tmp_path) == []


# Secrets


def test_no_repr_shows_a_secret() -> None:
    config = load(
        {
            "name": "redis",
            "options": {
                "password": SECRET,
                "url": f"rediss://u:{SECRET}@h",
                "nodes": [{"password": SECRET}, {"password": None}, {}],
                "redisOptions": {"password": SECRET, "tls": True},
            },
        }
    )
    tls = Tls(cert=SECRET, key=SECRET, passphrase=SECRET)
    found = config.options
    node = found.for_node("127.0.0.1", 6379)
    values = [config, found, *(found.nodes or ()), found.redis_options, node]
    for value in [*values, tls]:
        for shown in (repr(value), str(value), f"{value}", repr(value.__rich_repr__())):
            assert SECRET not in shown
    assert repr(Node(host="h", password=SECRET)) == (
        "Node(host='h', port=6379, username=UNSET, password='***')"
    )
    assert repr(Node(password=None)).endswith("password=None)")
    assert repr(tls).startswith("Tls(ca=None, cert='***', key='***', passphrase='***'")
    assert SECRET not in load(f"redis://:{SECRET}@h:1/2?password={SECRET}").source
    assert config.options.password == SECRET


def test_structs_are_frozen() -> None:
    config = load({"name": "redis"})
    with pytest.raises(AttributeError, match="immutable"):
        config.options.port = 1  # type: ignore[misc]


@pytest.mark.parametrize("cache_class", [AsyncCache, Cache])
def test_a_cache_has_its_configuration(cache_class: type[AsyncCache | Cache]) -> None:
    source = {"name": "redis", "options": {"host": "h", "db": 3}}
    assert cache_class.from_config(source).config == load(source)


def test_a_message_node_has_its_configuration() -> None:
    config = MessageNode.from_config("h:7000", server_name="A").config
    assert (config.server_name, config.options.host, config.options.port) == ("A", "h", 7000)


@pytest.mark.parametrize(
    ("one", "other"),
    [(("H.example", 1), ("h.EXAMPLE", 1)), (("::1", 1), ("0:0::1", 1)), (("::1", 1), ("[::1]", 1))],
)
def test_spellings_of_an_address(one: tuple[str, int], other: tuple[str, int]) -> None:
    assert (canonical(*one) == canonical(*other)) is ("[" not in other[0])
    assert split_address(f"[{one[0]}]:{one[1]}") == one


def test_proxied_chooses_the_layout() -> None:
    def layout(**options: Any) -> bool:
        return load({"name": "redis", "options": options}).options.hash_tag

    assert layout(proxied=True) is True
    assert layout(proxied=False) is False
    assert layout(proxied=True, keyLayout="deepstream") is False


def test_proxied_beside_nodes() -> None:
    nodes = [{"host": "127.0.0.1", "port": 7000}]
    with pytest.raises(ConfigError, match="proxied"):
        load({"name": "redis", "options": {"proxied": True, "nodes": nodes}})
