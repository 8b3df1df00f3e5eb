"""migrate --from deepstream3: one key of each record to two, on a server and on a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py

from dscache import Cache
from dscache.admin import one_key
from dscache.embedded import EmbeddedServer
from tests.conftest import BY_AGE
from tests.support.commands import invoke, running


@pytest.fixture(scope="module")
def started() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(BY_AGE[-1]) as server:
        yield server


@pytest.fixture
def client(started: EmbeddedServer) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(started.url) as opened:
        opened.flushall()
        yield opened


def one(version: object, data: object) -> str:
    return json.dumps({"_v": version, "_d": data}, separators=(",", ":"))


def migrate(server: EmbeddedServer, *arguments: str, status: int = 0) -> dict[str, Any]:
    result = invoke(
        "migrate", "--yes", "--from", "deepstream3", "--url", server.url, "--json", *arguments
    )
    assert result.status == status, result
    document: dict[str, Any] = json.loads(result.out)
    return document


def counts(document: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(document[name] for name in names)


def test_versions_data_and_lifetimes_stay(started: EmbeddedServer, client: redis_py.Redis) -> None:
    client.set("user/1", '{"_v":7,"_d":{"n":1.50,"s":"ü"}}')
    client.set("user/2", '{"_d":[1,2],"_v":0}', px=90_000)
    client.set("ü", '{"_v":3,"_d":"\\ud800"}')
    client.set("list", one(2**53, []))
    client.set("other", "text")
    client.hset("hash", "a", "b")
    client.mset({"two_v": "4", "two_d": "{}"})
    dry = migrate(started, "--dry-run")
    assert counts(dry, "found", "copied", "removed", "already") == (4, 4, 0, 1)
    assert not client.exists("user/1_v")
    done = migrate(started)
    names = ("found", "copied", "present", "removed", "remaining", "damaged", "ambiguous")
    assert counts(done, *names) == (4, 4, 0, 4, 0, 0, 0)
    assert client.mget("user/1_v", "user/1_d") == [b"7", '{"n":1.50,"s":"ü"}'.encode()]
    assert client.mget("user/2_v", "user/2_d", "ü_v", "list_v") == [
        b"0",
        b"[1,2]",
        b"3",
        b"9007199254740992",
    ]
    assert json.loads(client.get("ü_d") or b"") == "\ud800"
    for key in ("user/2_v", "user/2_d"):
        assert 0 < client.pttl(key) <= 90_000
    assert client.get("other") == b"text"
    assert client.mget("two_v", "two_d") == [b"4", b"{}"]
    assert not client.exists("user/1", "user/2", "ü", "list")
    again = migrate(started)
    assert counts(again, "found", "copied", "removed") == (0, 0, 0)


def test_a_newer_record_is_never_overwritten(
    started: EmbeddedServer, client: redis_py.Redis
) -> None:
    client.mset({"a": one(5, "old"), "a_v": "6", "a_d": '"new"'})
    client.mset({"b": one(5, "new"), "b_v": "4", "b_d": '"old"'})
    client.mset({"c": one(5, "x"), "c_v": "5", "c_d": '"y"'})
    client.mset({"d": one(5, "x"), "d_v": "5", "d_d": '"x"'})
    done = migrate(started, status=1)
    assert counts(done, "found", "copied", "present", "removed", "conflicts", "remaining") == (
        *(4, 1, 2, 3, 1, 1),
    )
    assert client.mget("a_v", "a_d") == [b"6", b'"new"']
    assert client.mget("b_v", "b_d") == [b"5", b'"new"']
    assert client.mget("c", "c_v", "c_d") == [one(5, "x").encode(), b"5", b'"y"']
    assert not client.exists("a", "b", "d")


def test_data_that_looks_like_a_record(started: EmbeddedServer, client: redis_py.Redis) -> None:
    """Data of a record under two keys is no record, and a new key may be another's only one."""
    client.mset({"two_v": "4", "two_d": one(1, 2)})
    client.mset({"x": one(1, "x"), "x_v": one(2, "x_v"), "y": one(3, "y"), "y_d": one(4, "y_d")})
    first = migrate(started, status=1)
    assert counts(first, "found", "ambiguous", "copied", "removed", "remaining") == (4, 2, 2, 2, 2)
    second = migrate(started)
    assert counts(second, "found", "ambiguous", "copied", "removed") == (2, 0, 2, 2)
    assert client.mget("two_v", "two_d") == [b"4", one(1, 2).encode()]
    assert client.mget("x_v", "x_d", "x_v_v", "x_v_d") == [b"1", b'"x"', b"2", b'"x_v"']
    assert client.mget("y_v", "y_d", "y_d_v", "y_d_d") == [b"3", b'"y"', b"4", b'"y_d"']


@pytest.mark.parametrize("form", ['{{"_v":7,"_d":{0}}}', '{{"_d":{0},"_v":7}}'])
def test_deep_data_stays_as_it_is(
    form: str, started: EmbeddedServer, client: redis_py.Redis
) -> None:
    deep = "[" * 3000 + "1e999" + "]" * 3000
    client.set("deep", form.format(deep))
    assert counts(migrate(started), "copied", "removed", "damaged") == (1, 1, 0)
    assert client.mget("deep_v", "deep_d") == [b"7", deep.encode()]


def test_deep_data_in_another_form_stays_in_place(
    started: EmbeddedServer, client: redis_py.Redis
) -> None:
    client.set("deep", '{"_v":7, "_d":' + "[" * 3000 + "]" * 3000 + "}")
    assert counts(migrate(started, status=1), "removed", "damaged") == (0, 1)


@pytest.mark.parametrize(
    "value", ['{"_v":-1,"_d":{}}', '{"_v":"7","_d":{}}', '{"_v":1.5,"_d":{}}', '{"_v":7,"_d":']
)
def test_a_damaged_record_stays(
    value: str, started: EmbeddedServer, client: redis_py.Redis
) -> None:
    client.set("bad", value)
    client.set("good", one(1, {}))
    done = migrate(started, status=1)
    assert counts(done, "found", "damaged", "removed", "remaining") == (2, 1, 1, 1)
    assert client.get("bad") == value.encode()


def test_only_a_prefix_and_keep(started: EmbeddedServer, client: redis_py.Redis) -> None:
    client.mset({f"user/{i}": one(i, i) for i in range(1500)})
    client.mset({f"post/{i}": one(i, i) for i in range(10)})
    kept = migrate(started, "--prefix", "user/", "--keep")
    assert counts(kept, "found", "copied", "removed") == (1500, 1500, 0)
    assert client.dbsize() == 1510 + 2 * 1500
    done = migrate(started, "--prefix", "user/")
    assert counts(done, "found", "copied", "present", "removed") == (1500, 0, 1500, 1500)
    assert client.dbsize() == 10 + 2 * 1500
    assert client.mget("user/1499_v", "post/0_v") == [b"1499", None]


def test_records_written_meanwhile_are_not_lost(
    started: EmbeddedServer, client: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that still writes the old key between copy and removal has its version moved."""
    client.set("busy", one(1, "first"))
    real = one_key.run_script
    writes = iter([2, 3])

    async def write_before(*arguments: Any) -> Any:
        if (version := next(writes, None)) is not None:
            client.set("busy", one(version, "later"))
        return await real(*arguments)

    monkeypatch.setattr(one_key, "run_script", write_before)
    done = migrate(started)
    assert counts(done, "found", "removed", "changing") == (1, 1, 0)
    assert client.mget("busy", "busy_v", "busy_d") == [None, b"3", b'"later"']


def test_a_run_after_one_that_was_killed(started: EmbeddedServer, client: redis_py.Redis) -> None:
    """It moves the rest, whether or not the killed one had copied a record already."""
    names = [f"user/{number}" for number in range(8000)]
    client.mset({name: one(number, [number]) for number, name in enumerate(names)})
    words = ("migrate", "--from", "deepstream3", "--url", started.url, "--yes", "--json")
    with running(*words) as process:
        while client.dbsize() == len(names) and process.poll() is None:
            pass
        process.kill()
    left = client.exists(*names)
    assert left > 0
    done = migrate(started)
    assert counts(done, "found", "removed", "remaining") == (left, left, 0)
    assert client.dbsize() == 2 * len(names)
    assert client.mget([f"{name}_v" for name in names]) == [
        b"%d" % number for number in range(len(names))
    ]
    assert client.mget([f"{name}_d" for name in names]) == [
        b"[%d]" % number for number in range(len(names))
    ]


def test_a_key_prefix(started: EmbeddedServer, client: redis_py.Redis, tmp_path: Path) -> None:
    """Of two applications in one Redis, the records of one move."""
    client.mset({"app:a": one(1, "a"), "app:b": one(2, "b"), "a": one(3, "x"), "app2:c": one(4, 5)})
    file = tmp_path / "config.yml"
    options = {"host": started.host, "port": started.port, "keyPrefix": "app:"}
    file.write_text(json.dumps({"cache": {"name": "redis", "options": options}}))
    result = invoke("migrate", "--yes", "--from", "deepstream3", "--config", str(file), "--json")
    assert (result.status, result.document["removed"]) == (0, 2)
    assert set(client.keys()) == {b"app:a_v", b"app:a_d", b"app:b_v", b"app:b_d", b"a", b"app2:c"}
    with Cache.from_config(file) as cache:
        assert [(one.version, one.data) for one in cache.get_bulk(["a", "b"]).values()] == [
            (1, "a"),
            (2, "b"),
        ]


def test_the_page_and_the_layout(started: EmbeddedServer, client: redis_py.Redis) -> None:
    client.set("user/1", one(7, {}))
    done = migrate(started, "--to", "hashtag")
    assert counts(done, "found", "copied", "removed") == (1, 1, 1)
    assert client.mget("{user/1}_v", "{user/1}_d") == [b"7", b"{}"]
    missing = invoke("migrate", "--url", started.url)
    assert missing.status == 2
    assert "--from deepstream3" in missing.err
