"""The configuration of a message node: deepstream's own, a mapping or a URL."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

import dscache
from dscache.config import Node, Options
from dscache.config import messages as message_config
from dscache.config.messages import MessageOptions, load
from dscache.config.validation import ConfigStruct

DATA = Path(__file__).parents[1] / "data"
ENTRY: dict[str, Any] = {"name": "redis", "options": {"host": "h", "port": 7000}}


def test_an_unmodified_file_of_deepstream() -> None:
    config = load(DATA / "deepstream-config.yml", environ={"CLUSTER_REDIS_HOST": "10.1.2.4"})
    assert config.address == "10.1.2.4:6379"
    assert re.fullmatch("[0-9a-f]{32}", config.server_name)
    assert config.source == "deepstream-config.yml"
    again = load(DATA / "deepstream-config.yml", environ={"CLUSTER_REDIS_HOST": "10.1.2.4"})
    assert again.server_name != config.server_name
    named = load(DATA / "deepstream-config.yml", "py-1", environ={"CLUSTER_REDIS_HOST": "h"})
    assert named.server_name == "py-1"


def test_the_name_of_the_server(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text("serverName: ${SERVER:-07}\nclusterNode: {name: Redis}\n")
    assert load(file, environ={}).server_name == "07"
    assert load(file, environ={"SERVER": "js 1"}).server_name == "js 1"
    assert load(file, "py-1", environ={}).server_name == "py-1"
    assert load({"serverName": "a", "clusterNode": ENTRY}).server_name == "a"
    assert load({"serverName": "a", **ENTRY}).server_name == "a"
    assert load("redis://h:7000/2", "b").server_name == "b"
    for source in ({"clusterNode": ENTRY}, ENTRY, "h:7000", {"serverName": None, **ENTRY}):
        assert len(load(source).server_name) == 32


@pytest.mark.parametrize(
    "source",
    [
        {"clusterNode": ENTRY},
        ENTRY,
        "redis://h:7000",
        "h:7000",
        {"cache": {}, "clusterNode": ENTRY},
    ],
    ids=str,
)
def test_the_server_address(source: Any) -> None:
    config = load(source)
    assert config.address == "h:7000"
    assert config.options == MessageOptions(host="h", port=7000)


def test_the_plugin_by_its_path() -> None:
    entry = {"path": "@deepstream/clusternode-redis", "options": {"url": "redis://:p@h:1/1"}}
    options = load({"clusterNode": entry}).options
    assert (options.host, options.port, options.password, options.db) == ("h", 1, "p", 1)


def test_options_of_message_nodes() -> None:
    written = {"overflow": "disconnect", "heartbeat": 250, "maxPending": 7}
    nodes = [{"host": "a"}, {"host": "b", "password": "secret"}]
    options = load(ENTRY | {"options": {**written, "nodes": nodes, "sharded": True}}).options
    assert (options.overflow, options.heartbeat, options.max_pending) == ("disconnect", 250, 7)
    assert options.sharded is True
    assert options.nodes == (Node(host="a"), Node(host="b", password="secret"))
    assert isinstance(options.for_node("a", 6379), MessageOptions)
    assert "secret" not in repr(load(ENTRY | {"options": {"nodes": nodes}}))


def test_options_for_records_have_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    of_records = {
        **{"keyPrefix": "{", "ttl": 60, "nearCache": True, "keyLayout": "hashtag"},
        "proxied": True,
        **{"maxConnections": 3, "scaleReads": "zone", "zone": "a"},
    }
    caplog.set_level(logging.INFO)
    nodes = [{"host": "a"}]
    options = load(ENTRY | {"options": {**of_records, "nodes": nodes}}).options
    assert options == MessageOptions(nodes=(Node(host="a"),), max_connections=3)
    assert of_records.keys() == message_config.RECORD_OPTIONS.keys()
    texts = [record.getMessage() for record in caplog.records]
    for name, why in message_config.RECORD_OPTIONS.items():
        assert f"mapping: options.{name} has no effect: {why}" in texts


def options(**written: Any) -> dict[str, Any]:
    return {"clusterNode": {"name": "redis", "options": written}}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            {},
            "mapping: no section clusterNode, the sections are: none; write clusterNode: {",
        ),
        ({"cache": ENTRY}, "no section clusterNode, the sections are: cache; write"),
        ({"clusternode": ENTRY}, '; rename "clusternode" to clusterNode, or write'),
        ({"clusterNode": None}, "mapping: clusterNode: must be a mapping; write"),
        ({"clusterNode": {}}, 'clusterNode.name: must be "redis", not missing'),
        ({"clusterNode": {"name": "memory"}}, "must be \"redis\", not 'memory'"),
        ({"clusterNode": {"name": None}}, 'must be "redis", not None'),
        ({"clusterNode": {"path": "x"}}, 'must be "@deepstream/clusternode-redis"'),
        ({"clusterNode": {"name": "redis", "type": "x"}}, 'clusterNode.type: must be "default"'),
        ({"clusterNode": {"name": "redis", "option": {}}}, 'did you mean "options"?'),
        (options(shard=True), 'clusterNode.options.shard: unknown option, did you mean "sharded"?'),
        (options(sharded=True), "clusterNode.options.sharded: is for a cluster"),
        (options(overflow="drop"), 'must be "disconnect", "drop_newest" or "drop_oldest", not'),
        (
            options(heartbeat=0),
            "options.heartbeat: must be a whole number of milliseconds from 1 to 2147483647",
        ),
        (options(prot=1), 'did you mean "port"?'),
        (options(sentinels=[{}]), "options.name: is missing"),
        (
            options(sentinels=[{}], name="x", role="slave"),
            "options.role: must be master: a message",
        ),
        (
            options(nodes=[{}], db=1),
            "on a cluster, write redisOptions.db: 1 if it has several databases",
        ),
        ({"serverName": [], "clusterNode": ENTRY}, "mapping: serverName: must be text"),
        ({"serverName": "", "clusterNode": ENTRY}, "mapping: serverName: must be a text that is"),
        ("redis://h/x", "the path must be the number of a database"),
        ("nowhere", "a configuration is a file ending in"),
        (7, "must be a path, a mapping or a URL, not int"),
    ],
    ids=str,
)
def test_mistakes(source: Any, said: str) -> None:
    with pytest.raises(dscache.ConfigError, match=re.escape(said)):
        dscache.MessageNode.from_config(source)


@pytest.mark.parametrize("name", ["", 7, "\ud800", "a\0"])
def test_bad_names(name: Any) -> None:
    with pytest.raises(dscache.ConfigError, match="server_name"):
        dscache.MessageNode.from_config(ENTRY, server_name=name)


def test_message_nodes_have_few_options() -> None:
    assert issubclass(MessageOptions, ConfigStruct)
    own = set(MessageOptions.__struct_fields__) - set(Options.__struct_fields__)
    assert own == {"overflow", "heartbeat", "sharded"}


@pytest.mark.parametrize(
    "source", ["redis://h:7000", "h:7000", {"host": "h", "port": 7000}, {"clusterNode": ENTRY}]
)
def test_options_by_keyword(source: Any) -> None:
    node = dscache.MessageNode.from_config(
        source, server_name="a", commandTimeout=200, max_pending=5, overflow="disconnect"
    )
    wanted = MessageOptions(
        host="h", port=7000, command_timeout=200, max_pending=5, overflow="disconnect"
    )
    assert node.config.options == wanted
    assert node.server_name == "a"


def test_options_alone_may_have_a_name_beside() -> None:
    config = load({"url": "redis://h:1/2", "db": 3, "serverName": "py"}, options={"heartbeat": 9})
    assert (config.server_name, config.address) == ("py", "h:1")
    assert (config.options.db, config.options.heartbeat) == (2, 9)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("h:1", {"overflw": 1}, 'arguments: overflw: unknown option, did you mean "overflow"?'),
        ("h:1", {"sharded": True}, "arguments: sharded: is for a cluster"),
        ({"host": "h", "sharded": True}, {}, "mapping: sharded: is for a cluster"),
        ({"host": "h", "prot": 1}, {}, 'mapping: prot: unknown option, did you mean "port"?'),
        ({"host": "h", "cache": {}}, {}, "mapping: no section clusterNode"),
        (
            {"name": "s", "sentinels": [{"host": "h"}]},
            {"role": "slave"},
            "arguments: role: must be master",
        ),
    ],
)
def test_mistakes_in_options(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(dscache.ConfigError) as caught:
        load(source, options=options)
    assert str(caught.value).startswith(message)


def test_keywords_without_effect_on_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dscache")
    assert load("h:1", options={"key_prefix": "a"}).options.key_prefix == ""
    assert load({"host": "h"}, options={"ttl": 5}).options.ttl is None
    said = [one.getMessage() for one in caplog.records]
    assert [one.partition(" has no effect: ")[0] for one in said] == [
        "arguments: keyPrefix",
        "arguments: ttl",
    ]
