"""diff: the records that differ between two places."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis as redis_py

from dscache import Cache
from dscache.embedded import EmbeddedServer
from tests.support.commands import Done, invoke, plain, run_on_terminal


@pytest.fixture(scope="module")
def here() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as started, Cache(started.url) as cache:
        cache.set_bulk({f"user/{n}": (1, {"a": 1, "b": n}) for n in range(2000)})
        cache.set("other", 1, {})
        yield started


@pytest.fixture
def there() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as started, Cache(started.url) as cache:
        cache.set_bulk({f"user/{n}": (1, {"b": n, "a": 1}) for n in range(2000)})
        cache.set("other", 1, msgspec.Raw(b"{ }"))
        yield started


def differences(done: Done) -> set[tuple[object, ...]]:
    return {tuple(line.values()) for line in done.lines}


def test_equal_records(here: EmbeddedServer, there: EmbeddedServer, backend: str) -> None:
    done = invoke("diff", there.url, "--url", here.url)
    assert (done.status, done.out, done.err) == (0, "", "dscache: equal\n")


def test_damaged_records_are_left_out(here: EmbeddedServer, there: EmbeddedServer) -> None:
    with redis_py.Redis.from_url(there.url) as client, Cache(there.url) as cache:
        client.set("user/1_v", "no version")
        cache.delete("user/2")
        done = invoke("diff", there.url, "--url", here.url)
        assert (done.status, differences(done)) == (1, {("user/2", 1, None, "missing")})
        assert "record 'user/1': its stored version isn't" in done.err
        assert done.err.endswith("dscache: 1 record differs; 1 damaged record wasn't compared\n")
    done = invoke("diff", here.url, "--url", there.url, "--prefix", "user/1")
    assert (done.status, done.out) == (1, "")
    assert done.err.endswith("dscache: equal; 1 damaged record wasn't compared\n")


def test_every_kind_of_difference(here: EmbeddedServer, there: EmbeddedServer) -> None:
    with Cache(there.url) as cache:
        cache.set("user/1", 2, {"a": 1, "b": 1})
        cache.set("user/2", 1, {"a": 1, "b": 3})
        cache.set("user/new", 7, {})
        cache.delete("user/3")
        cache.delete("other")
    wanted = {
        ("user/1", 1, 2, "version"),
        ("user/2", 1, 1, "data"),
        ("user/new", None, 7, "added"),
        ("user/3", 1, None, "missing"),
    }
    done = invoke("diff", there.url, "--url", here.url)
    assert done.status == 1
    assert differences(done) == wanted | {("other", 1, None, "missing")}
    assert done.err == "dscache: 5 records differ\n"
    done = invoke("diff", there.url, "--prefix", "user/", "--url", here.url)
    assert differences(done) == wanted


@pytest.mark.parametrize("name", ["records.ndjson", "records.ndjson.gz"])
def test_an_export(name: str, here: EmbeddedServer, tmp_path: Path) -> None:
    file = tmp_path / name
    assert invoke("export", str(file), "--url", here.url).status == 0
    done = invoke("diff", str(file), "--url", here.url)
    assert (done.status, done.out, done.err) == (0, "", "dscache: equal\n")
    opened = gzip.open if name.endswith(".gz") else open
    with opened(file, "at") as text:
        text.write('{"name":"late","version":4,"data":[]}\n')
    done = invoke("diff", str(file), "--url", here.url)
    assert (done.status, differences(done)) == (1, {("late", None, 4, "added")})


@pytest.mark.parametrize("name", ["out.json", "out.JSON", "out.yml"])
def test_an_export_with_the_name_of_a_configuration(
    name: str, here: EmbeddedServer, tmp_path: Path
) -> None:
    file = tmp_path / name
    assert invoke("export", str(file), "--url", here.url).status == 0
    done = invoke("diff", str(file), "--url", here.url)
    assert (done.status, done.out, done.err) == (0, "", "dscache: equal\n")
    options = {"host": here.host, "port": here.port}
    file.write_bytes(msgspec.json.encode({"name": "redis", "options": options}))
    done = invoke("diff", str(file), "--url", here.url)
    assert (done.status, done.out, done.err) == (0, "", "dscache: equal\n")


def test_an_export_that_is_none(here: EmbeddedServer, tmp_path: Path) -> None:
    file = tmp_path / "records.ndjson"
    file.write_text('{"name":"a","version":1,"data":[]}\nnonsense\n')
    done = invoke("diff", str(file), "--url", here.url)
    assert done.status == 1
    assert f"{file}, line 2: it is not JSON" in done.err
    # export takes any name.
    file = file.rename(tmp_path / "records")
    done = invoke("diff", str(file), "--url", here.url)
    assert f"{file}, line 2: it is not JSON" in done.err
    done = invoke("diff", str(tmp_path / "away.ndjson"), "--url", here.url)
    assert (done.status, "No such file" in done.err) == (1, True)


@pytest.mark.parametrize(
    ("other", "error"),
    [
        ("http://h", "OTHER: must begin with redis://"),
        ("127.0.0.1:1", "no connection to 127.0.0.1:1"),
        ("none.yml", "there is no file none.yml"),
    ],
)
def test_mistakes(other: str, error: str, here: EmbeddedServer) -> None:
    done = invoke("diff", other, "--url", here.url)
    assert (done.status, error in done.err) == (1, True)


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        (".", ". is a folder"),
        ("none", "none isn't a file that exists"),
        ("redis//:secret@host", "host isn't a file that exists"),
    ],
)
def test_what_is_no_place(other: str, fault: str, here: EmbeddedServer) -> None:
    done = invoke("diff", other, "--url", here.url)
    assert done.status == 2
    assert " ".join(done.err.split()).endswith(
        f"Error: Invalid value for OTHER: {fault}; give a URL, host:port, configuration file, or "
        "an export (.ndjson, .ndjson.gz)"
    )


def test_a_terminal(here: EmbeddedServer, there: EmbeddedServer) -> None:
    with Cache(there.url) as cache:
        cache.set("user/1", 2, {})
    status, written = run_on_terminal("diff", there.url, "--url", here.url, columns=60)
    assert status == 1
    lines = plain(written).splitlines()
    assert lines[0].split() == ["name", "here", "there"]
    assert lines[2].split() == ["user/1", "1", "2", "version"]
