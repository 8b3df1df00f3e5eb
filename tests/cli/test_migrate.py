"""migrate: from one key layout to the other and back, with other writers, and records that stay."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import redis as redis_py
from hypothesis import given
from hypothesis import strategies as st

from dscache import Cache, ReplyError
from dscache.admin import migration
from dscache.admin.cache import AdminCache
from dscache.admin.key_layout import DEEPSTREAM, HASHTAG, Layout
from dscache.admin.primaries import open_primaries
from dscache.core.keys import is_version_key, partner, slot_of_key
from dscache.embedded import EmbeddedServer
from tests.conftest import BY_AGE
from tests.support.commands import invoke, plain, run_on_terminal
from tests.support.documents import PROJECT, code, table

DOCUMENT = PROJECT / "docs" / "cli.md"
NAMES = ["plain", "ü {x}", "}brace", "}", "a}b", "*", "x_v", "line\nend"]
OTHER = {DEEPSTREAM: HASHTAG, HASHTAG: DEEPSTREAM}


@pytest.fixture(scope="module")
def moved() -> Iterator[EmbeddedServer]:
    """The newest server; another module covers a cluster of the oldest."""
    with EmbeddedServer(BY_AGE[-1]) as started:
        yield started


@pytest.fixture
def client(moved: EmbeddedServer) -> Iterator[redis_py.Redis]:
    """A client of the server, which has just been emptied."""
    with redis_py.Redis.from_url(moved.url) as opened:
        opened.flushall()
        yield opened


@pytest.fixture
def url(moved: EmbeddedServer, client: redis_py.Redis) -> tuple[str, str]:
    return "--url", moved.url


Url = tuple[str, str]


def fill(url: Url, layout: str, names: list[str]) -> None:
    lines = [json.dumps({"name": name, "version": i, "data": [i]}) for i, name in enumerate(names)]
    assert invoke("set", *url, "--layout", layout, stdin="\n".join(lines).encode()).status == 0


def keys(client: redis_py.Redis) -> set[bytes]:
    return set(client.scan_iter(count=1000))


def keys_of(layout: str, names: list[str]) -> set[bytes]:
    return {key for name in names for key in Layout(layout).keys(name)}


# -- keys and names


@given(
    st.text(min_size=1), st.sampled_from([DEEPSTREAM, HASHTAG]), st.sampled_from(["", "p:", "*"])
)
def test_keys_map_back_to_their_names(name: str, kind: str, key_prefix: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return
    layout = Layout(kind, key_prefix)
    version, data = layout.keys(name)
    assert layout.name_of(version) == layout.name_of(data) == name
    assert (is_version_key(version), is_version_key(data)) == (True, False)
    assert (partner(version), partner(data)) == (data, version)
    assert kind == DEEPSTREAM or slot_of_key(version) == slot_of_key(data)
    for end in range(len(name) + 1):
        starts = layout.starts(name[:end])
        assert any(version.startswith(start) for start in starts)


@pytest.mark.parametrize(
    ("key", "by_name", "by_tag"),
    [
        (b"a_v", "a", None),
        (b"{a}_d", "{a}", "a"),
        (b"{a}b_d", "{a}b", None),
        (b"{}_v", "{}", None),
        (b"{}a}_v", "{}a}", None),
        (b"}{0}}_v", "}{0}}", "}"),
        (b"}{0}}a_v", "}{0}}a", "}a"),
        (b"}{0}a_v", "}{0}a", None),
        (b"_v", None, None),
        (b"a", None, None),
        (b"a_x", None, None),
        (b"\xff_v", None, None),
    ],
)
def test_the_owner_of_a_key(key: bytes, by_name: str | None, by_tag: str | None) -> None:
    assert Layout(DEEPSTREAM).name_of(key) == by_name
    assert Layout(HASHTAG).name_of(key) == by_tag
    assert Layout(HASHTAG, "p:").name_of(key) is None
    assert Layout(HASHTAG, "p:").name_of(b"p:" + key) == by_tag


# -- round trips


@pytest.mark.parametrize("to", [HASHTAG, DEEPSTREAM])
def test_a_round_trip(to: str, url: Url, client: redis_py.Redis) -> None:
    old = OTHER[to]
    fill(url, old, NAMES)
    client.set("a stranger", 1)
    before = invoke("export", "-", *url, "--layout", old).lines
    done = invoke("migrate", "--yes", "--to", to, *url)
    assert (done.status, done.err) == (0, "")
    counts = {name: count for name, count in done.document.items() if count}
    counts.pop("seconds")
    assert counts == {"ok": True, "found": 8, "copied": 8, "removed": 8}
    assert keys(client) == keys_of(to, NAMES) | {b"a stranger"}
    after = invoke("export", "-", *url, "--layout", to).lines
    assert sorted(map(json.dumps, after)) == sorted(map(json.dumps, before))
    again = invoke("migrate", "--yes", "--to", to, *url).document
    assert (again["ok"], again["found"], again["remaining"]) == (True, 0, 0)
    assert invoke("migrate", "--yes", "--to", old, *url).status == 0
    assert keys(client) == keys_of(old, NAMES) | {b"a stranger"}


def test_many_records(url: Url, client: redis_py.Redis) -> None:
    names = [f"r/{number}" for number in range(5000)]
    fill(url, DEEPSTREAM, names)
    assert invoke("migrate", "--yes", "--to", HASHTAG, *url).document["removed"] == 5000
    assert keys(client) == keys_of(HASHTAG, names)


def test_a_dry_run_changes_nothing(url: Url, client: redis_py.Redis) -> None:
    fill(url, DEEPSTREAM, NAMES)
    fill(url, HASHTAG, [*NAMES[:3], "new"])
    client.mset({"half_v": 1, "Half_d": 1, "bad_v": "x", "bad_d": 1})
    client.set("{plain}_d", "9")
    before = {key: client.get(key) for key in keys(client)}
    done = invoke("migrate", "--to", HASHTAG, "--dry-run", *url)
    assert done.status == 0
    counts = {name: done.document[name] for name in ("found", "copied", "present", "conflicts")}
    assert counts == {"found": 10, "copied": 5, "present": 2, "conflicts": 1}
    assert (done.document["halves"], done.document["damaged"]) == (1, 1)
    assert (done.document["already"], done.document["remaining"]) == (4, None)
    assert {key: client.get(key) for key in keys(client)} == before


def test_a_prefix_of_names_and_of_keys(
    moved: EmbeddedServer, client: redis_py.Redis, tmp_path: Path
) -> None:
    client.mset({"p:a/1_v": 1, "p:a/1_d": 1, "p:b_v": 1, "p:b_d": 1, "a/2_v": 1, "a/2_d": 1})
    options = {"host": "127.0.0.1", "port": moved.port, "keyPrefix": "p:"}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"name": "redis", "options": options}))
    done = invoke("migrate", "--yes", "--to", HASHTAG, "--prefix", "a/", "--config", str(file))
    assert (done.status, done.document["removed"]) == (0, 1)
    stay = {b"p:b_v", b"p:b_d", b"a/2_v", b"a/2_d"}
    assert keys(client) == stay | {b"p:{a/1}_v", b"p:{a/1}_d"}


def test_ttls_are_kept(url: Url, client: redis_py.Redis) -> None:
    client.mset({"a_v": 1, "a_d": 1, "b_v": 1, "b_d": 1})
    for key in ("a_v", "a_d"):
        client.pexpire(key, 100_000)
    assert invoke("migrate", "--yes", "--to", HASHTAG, *url).status == 0
    assert 60 < client.ttl("{a}_v") <= 100
    assert client.ttl("{b}_v") == client.ttl("{b}_d") == -1


# -- records left behind


def test_incomplete_records_stay(url: Url, client: redis_py.Redis) -> None:
    client.mset({"half_v": 1, "bad_v": "x", "bad_d": 1, "empty_v": 1, "empty_d": "", "a_v": 1})
    client.set("a_d", "{")  # not JSON, but it can be moved unchanged
    done = invoke("migrate", "--yes", "--to", HASHTAG, *url)
    assert done.status == 1
    assert (done.document["damaged"], done.document["halves"]) == (2, 1)
    assert (done.document["removed"], done.document["remaining"]) == (1, 3)
    assert client.mget("{a}_v", "{a}_d") == [b"1", b"{"]
    assert client.mget("bad_v", "bad_d", "half_v") == [b"x", b"1", b"1"]
    assert len(done.err.splitlines()) == 2


def test_versions_are_compared(url: Url, client: redis_py.Redis) -> None:
    client.mset({"older_v": 1, "older_d": 1, "{older}_v": 2, "{older}_d": 2})
    client.mset({"newer_v": "03", "newer_d": 3, "{newer}_v": 2, "{newer}_d": 2})
    client.mset({"same_v": 2, "same_d": 2, "{same}_v": 2, "{same}_d": 2})
    client.mset({"other_v": 2, "other_d": 7, "{other}_v": 2, "{other}_d": 2})
    client.mset({"torn_v": 2, "torn_d": 7, "{torn}_v": 9})
    done = invoke("migrate", "--yes", "--to", HASHTAG, *url)
    assert done.status == 1
    counts = {name: done.document[name] for name in ("copied", "present", "removed", "conflicts")}
    assert counts == {"copied": 2, "present": 2, "removed": 4, "conflicts": 1}
    assert "record 'other': both layouts have the same version of it" in done.err
    assert client.mget("{older}_d", "{newer}_v", "{torn}_v") == [b"2", b"3", b"2"]
    assert {key for key in keys(client) if not key.startswith(b"{")} == {b"other_v", b"other_d"}


def test_damaged_records_at_the_target_stay(url: Url, client: redis_py.Redis) -> None:
    client.mset({"a_v": 1, "a_d": 1, "{a}_v": "x", "{a}_d": 2, "b_v": 1, "b_d": 1})
    done = invoke("migrate", "--yes", "--to", HASHTAG, *url)
    counts = {name: done.document[name] for name in ("damaged", "copied", "removed", "changing")}
    assert (done.status, counts) == (
        1,
        {"damaged": 1, "copied": 1, "removed": 1, "changing": 0},
    )
    assert done.err.startswith("dscache: record 'a': its stored version isn't an integer")
    assert client.mget("a_v", "{a}_v") == [b"1", b"x"]


def test_a_name_that_would_change_its_record_stays(url: Url, client: redis_py.Redis) -> None:
    fill(url, HASHTAG, ["{a}", "b", "}{0}}c"])
    done = invoke("migrate", "--yes", "--to", DEEPSTREAM, *url)
    assert (done.status, done.document["ambiguous"], done.document["removed"]) == (1, 2, 1)
    assert keys(client) == keys_of(DEEPSTREAM, ["b"]) | keys_of(HASHTAG, ["{a}", "}{0}}c"])
    # From the other side, they can't be told from the existing ones.
    fill(url, DEEPSTREAM, ["{d}"])
    assert invoke("migrate", "--yes", "--to", HASHTAG, *url).document["found"] == 1


# -- with other writers


def test_a_record_written_before_its_removal_is_moved_again(
    url: Url, client: redis_py.Redis
) -> None:
    fill(url, DEEPSTREAM, ["a", "b"])
    verify = migration.Migration._verify
    turns = iter(range(10, 12))

    async def interrupted(self: Any, records: Any) -> Any:
        found = await verify(self, records)
        if (version := next(turns, None)) is not None:
            client.mset({"a_v": version, "a_d": version})
        return found

    with mock.patch.object(migration.Migration, "_verify", interrupted):
        done = invoke("migrate", "--yes", "--to", HASHTAG, *url)
    assert (done.status, done.document["removed"], done.document["copied"]) == (0, 2, 2)
    assert client.mget("{a}_v", "{a}_d") == [b"11", b"11"]
    assert keys(client) == keys_of(HASHTAG, ["a", "b"])


def test_a_record_written_constantly_stays(url: Url, client: redis_py.Redis) -> None:
    fill(url, DEEPSTREAM, ["a"])
    verify = migration.Migration._verify
    versions = iter(range(10, 100))

    async def interrupted(self: Any, records: Any) -> Any:
        found = await verify(self, records)
        version = next(versions)
        client.mset({"a_v": version, "a_d": version})
        return found

    with mock.patch.object(migration.Migration, "_verify", interrupted):
        done = invoke("migrate", "--yes", "--to", HASHTAG, *url)
    assert (done.status, done.document["changing"], done.document["remaining"]) == (1, 1, 1)
    assert "record 'a': it keeps changing, or" in done.err
    assert invoke("migrate", "--yes", "--to", HASHTAG, *url).document["removed"] == 1


def test_a_migration_in_three_steps_with_writing_servers(
    moved: EmbeddedServer, url: Url, client: redis_py.Redis
) -> None:
    names = [f"r/{number}" for number in range(300)]
    fill(url, DEEPSTREAM, names)
    ended = threading.Event()
    written: dict[str, int] = {}

    def write() -> None:
        version = 1000
        with Cache.from_config(moved.url) as cache:
            while not ended.is_set():
                for name in names[::7]:
                    version += 1
                    cache.set(name, version, [version])
                    written[name] = version

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert invoke("migrate", "--to", HASHTAG, "--keep", *url).document["removed"] == 0
        # It may leave some that are written constantly, and never loses one.
        moving = invoke("migrate", "--yes", "--to", HASHTAG, *url)
        assert moving.document["conflicts"] == 0
    finally:
        ended.set()
        thread.join()
    assert invoke("migrate", "--yes", "--to", HASHTAG, *url).status == 0
    assert keys(client) == keys_of(HASHTAG, names)
    for name, version in written.items():
        assert client.mget(*Layout(HASHTAG).keys(name)) == [
            str(version).encode(),
            f"[{version}]".encode(),
        ]


def test_two_concurrent_migrations(moved: EmbeddedServer, url: Url, client: redis_py.Redis) -> None:
    names = [f"r/{number}" for number in range(2000)]
    fill(url, DEEPSTREAM, names)

    async def one() -> migration.Count:
        count = migration.Count()
        options = {"url": moved.url}
        source = AdminCache.from_config({"name": "redis", "options": options})
        options = {"url": moved.url, "keyLayout": HASHTAG}
        target = AdminCache.from_config({"name": "redis", "options": options})
        async with source, target, open_primaries(source) as shards:
            job = migration.Migration(source, target, shards, prefix="", count=count, keep=False)
            await job.run()
        return count

    async def both() -> list[migration.Count]:
        return await asyncio.gather(one(), one())

    assert [count.left for count in asyncio.run(both())] == [0, 0]
    assert keys(client) == keys_of(HASHTAG, names)


def test_an_interrupted_migration_resumes(url: Url, client: redis_py.Redis) -> None:
    names = [f"r/{number}" for number in range(4000)]
    fill(url, DEEPSTREAM, names)
    remove = migration.Migration._remove
    calls = 0

    async def failing(self: Any, records: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ReplyError("ERR unplugged")
        return await remove(self, records)

    with mock.patch.object(migration.Migration, "_remove", failing):
        done = invoke("migrate", "--yes", "--to", HASHTAG, *url)
    assert (done.status, done.err) == (1, "dscache: ERR unplugged\n")
    done = invoke("migrate", "--yes", "--to", HASHTAG, *url)
    assert (done.status, done.document["present"] > 0) == (0, True)
    assert keys(client) == keys_of(HASHTAG, names)


# -- output


def test_a_terminal(url: Url, client: redis_py.Redis) -> None:
    fill(url, DEEPSTREAM, ["a", "b"])
    client.set("half_v", 1)
    status, written = run_on_terminal("migrate", "--to", "hashtag", "--yes", *url, columns=60)
    assert status == 0
    lines = plain(written).splitlines()
    # The first number follows the sequence that clears the progress bar.
    assert lines[-7].endswith("3 records found in the deepstream layout")
    assert lines[-6:] == [
        "2 copied to the hashtag layout",
        "0 were there already, the same or newer",
        "2 removed from the deepstream layout",
        "1 left: halves, with one of two keys missing",
        "no whole record is left in the deepstream layout",
        "configure keyLayout: hashtag for all processes that read or write them",
    ]


@pytest.mark.parametrize(("typed", "status"), [(b"n\n", 1), (b"y\n", 0)])
def test_a_terminal_is_asked_before_keys_are_removed(
    typed: bytes, status: int, url: Url, client: redis_py.Redis
) -> None:
    fill(url, DEEPSTREAM, ["a"])
    before = sorted(client.keys())
    done, written = run_on_terminal("migrate", "--to", "hashtag", *url, typed=typed)
    assert done == status, written
    question = f"Move all records at {url[1].removeprefix('redis://')} to the hashtag layout, "
    assert f"{question}and remove their old keys? [y/N]" in plain(written)
    assert (sorted(client.keys()) == before) == bool(status)


def test_no_terminal_needs_a_yes(url: Url, client: redis_py.Redis) -> None:
    fill(url, DEEPSTREAM, ["a"])
    before = sorted(client.keys())
    refused = invoke("migrate", "--to", HASHTAG, *url)
    assert refused.status == 2
    assert "add --yes: without a terminal nobody can be asked" in " ".join(refused.err.split())
    assert sorted(client.keys()) == before
    for harmless in ("--dry-run", "--keep"):
        assert invoke("migrate", "--to", HASHTAG, harmless, *url).status == 0
    assert client.exists(*keys_of(DEEPSTREAM, ["a"])) == 2
    assert invoke("migrate", "--to", HASHTAG, "--yes", *url).document["removed"] == 1


def test_the_question_names_the_database(url: Url) -> None:
    words = ("migrate", "--to", "hashtag", "--url", f"{url[1]}/3")
    status, written = run_on_terminal(*words, typed=b"n\n")
    address = url[1].removeprefix("redis://")
    assert status == 1
    assert f"Move all records at {address}, database 3 to the" in plain(written)


@pytest.mark.parametrize("words", [(), ("--to", "sideways")])
def test_a_wrong_command_line(words: tuple[str, ...]) -> None:
    done = invoke("migrate", *words, "--url", "127.0.0.1:1")
    assert (done.status, "--to" in done.err) == (2, True)


def test_every_key_is_documented(url: Url) -> None:
    documented = {code(row[0])[0] for row in table(DOCUMENT, "migrate") if code(row[0])}
    documented = {name for name in documented if not name.startswith("--")}
    assert documented | {"ok", "dry_run", "seconds"} == set(
        invoke("migrate", "--yes", "--to", HASHTAG, *url).document
    )
