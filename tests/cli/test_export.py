"""export and import: round trips, interruptions, resumption, and errors in between."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import redis as redis_py

from dscache import AsyncCache, ConnectionLost
from dscache.admin import export, ndjson, progress, restore, scan
from dscache.embedded import EmbeddedServer
from dscache.net import scan as net_scan
from tests.conftest import BY_AGE
from tests.support.commands import PATIENCE, failing_after, invoke, plain, run_on_terminal, running
from tests.support.documents import PROJECT, code, section

DOCUMENT = PROJECT / "docs" / "cli.md"
MANY = 12_000
NAMES = [
    *("plain", "two words", "line\nend", "nul\0", "ü€😀", '"quoted"\\', "a_v", "a_d", "*?[x]"),
    *("{tag}/a", "}brace", "x" * 5000),
]


@pytest.fixture(scope="module")
def dumped() -> Iterator[EmbeddedServer]:
    """The oldest server; another module covers a cluster of the newest."""
    with EmbeddedServer(BY_AGE[0]) as started:
        yield started


@pytest.fixture
def client(dumped: EmbeddedServer) -> Iterator[redis_py.Redis]:
    """A client of the server, which has just been emptied."""
    with redis_py.Redis.from_url(dumped.url) as opened:
        opened.flushall()
        yield opened


@pytest.fixture
def url(dumped: EmbeddedServer, client: redis_py.Redis) -> tuple[str, str]:
    return "--url", dumped.url


Url = tuple[str, str]


def fill(client: redis_py.Redis, count: int) -> None:
    for first in range(0, count, 1000):
        pairs = {}
        for number in range(first, min(first + 1000, count)):
            pairs |= {f"r/{number}_v": number, f"r/{number}_d": f'{{"n":{number}}}'}
        client.mset(pairs)


def contents(client: redis_py.Redis) -> dict[bytes, Any]:
    keys = sorted(client.scan_iter(count=1000))
    return dict(zip(keys, client.mget(keys), strict=True))


def names_in(file: Path) -> list[str]:
    text = file.read_bytes()
    if file.suffix == ".gz":
        text = gzip.decompress(text)
    return [json.loads(line)["name"] for line in text.splitlines()]


# -- round trips


@pytest.mark.parametrize("layout", ["deepstream", "hashtag"])
@pytest.mark.parametrize("name", ["all.ndjson", "all.ndjson.gz"])
def test_a_round_trip(
    name: str, layout: str, url: Url, client: redis_py.Redis, tmp_path: Path
) -> None:
    text = "".join(
        json.dumps({"name": name, "version": version, "data": [name, None]}) + "\n"
        for version, name in enumerate(NAMES)
    )
    words = (*url, "--layout", layout)
    assert invoke("set", *words, stdin=text.encode()).status == 0
    client.set("a stranger", "1")
    before = contents(client)
    file = tmp_path / name
    done = invoke("export", str(file), *words)
    assert (done.status, done.err) == (0, "")
    assert done.document | {"seconds": 0, "per_second": 0} == {
        "ok": True,
        "records": len(NAMES),
        "halves": 0,
        "damaged": 0,
        "resumed": 0,
        "seconds": 0,
        "per_second": 0,
    }
    assert sorted(names_in(file)) == sorted(NAMES)
    assert os.listdir(tmp_path) == [name]
    client.flushall()
    done = invoke("import", str(file), *words)
    assert (done.status, done.err, done.document["records"]) == (0, "", len(NAMES))
    assert contents(client) == {key: text for key, text in before.items() if key != b"a stranger"}
    assert os.listdir(tmp_path) == [name]


def test_a_round_trip_through_a_pipe_to_another_layout(url: Url, client: redis_py.Redis) -> None:
    fill(client, 10)
    exported = invoke("export", "-", *url)
    assert exported.err.startswith("10 records exported (")
    assert len(exported.lines) == 10
    text = exported.out.encode()
    done = invoke("import", "-", *url, "--layout", "hashtag", stdin=text)
    assert (done.status, done.document["records"]) == (0, 10)
    assert client.mget("{r/7}_v", "{r/7}_d") == [b"7", b'{"n":7}']


@pytest.mark.parametrize("prefix", ["r/1", "*", "", "nobody", "[x", "\\"])
@pytest.mark.parametrize("layout", ["deepstream", "hashtag"])
def test_records_of_a_prefix(
    prefix: str, layout: str, url: Url, client: redis_py.Redis, tmp_path: Path
) -> None:
    names = ["r/1", "r/12", "r/2", "*a", "[x]", "\\b", "}c", "}"]
    lines = [f'{{"name":{json.dumps(name)},"version":1,"data":0}}' for name in names]
    words = (*url, "--layout", layout)
    invoke("set", *words, stdin="\n".join(lines).encode())
    file = tmp_path / "some.ndjson"
    assert invoke("export", str(file), "--prefix", prefix, *words).status == 0
    assert sorted(names_in(file)) == sorted(name for name in names if name.startswith(prefix))


def test_ttls_are_exported(url: Url, client: redis_py.Redis, tmp_path: Path) -> None:
    client.mset({"a_v": 1, "a_d": 1, "b_v": 1, "b_d": 1, "c_v": 1, "c_d": 1})
    for key in ("a_v", "a_d"):
        client.expire(key, 1000)
    for key in ("b_v", "b_d"):
        client.pexpire(key, 90_500)
    file = str(tmp_path / "all.ndjson")
    exported = invoke("export", file, *url)
    assert exported.status == 0
    lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    lifetimes = {line["name"]: line.get("ttl") for line in lines}
    assert 900 < lifetimes["a"] <= 1000
    assert 60 < lifetimes["b"] <= 91
    assert lifetimes["c"] is None
    client.flushall()
    invoke("import", file, *url)
    assert 900 < client.ttl("a_v") <= 1000
    assert client.ttl("a_v") == client.ttl("a_d")
    assert client.ttl("c_d") == -1
    invoke("import", file, "--ttl", "50", *url)
    assert all(40 < client.ttl(f"{name}_d") <= 50 for name in "abc")
    invoke("import", file, "--ttl", "0", *url)
    assert {client.ttl(f"{name}_v") for name in "abc"} == {-1}


def test_halves_and_damaged_records_are_not_exported(
    url: Url, client: redis_py.Redis, tmp_path: Path
) -> None:
    client.mset({"a_v": 1, "b_v": 1, "b_d": "{", "c_v": "x", "c_d": "1", "d_v": 1, "d_d": "1"})
    client.set(b"\xff_v", 1)
    file = tmp_path / "all.ndjson"
    done = invoke("export", str(file), *url)
    assert done.status == 1
    assert (done.document["records"], done.document["halves"], done.document["damaged"]) == (
        1,
        1,
        2,
    )
    told = sorted(done.err.splitlines())
    assert told[0].startswith("dscache: record 'b', version 1: the stored data isn't JSON")
    assert told[1].startswith("dscache: record 'c': its stored version isn't an integer")
    assert names_in(file) == ["d"]


def test_importing_only_newer_records(url: Url, client: redis_py.Redis, tmp_path: Path) -> None:
    fill(client, 10)
    file = str(tmp_path / "all.ndjson")
    invoke("export", file, *url)
    client.set("r/3_v", 100)
    client.set("r/4_v", 1)
    client.delete("r/5_v")
    done = invoke("import", file, "--if-newer", *url)
    assert (done.status, done.document["records"], done.document["not_newer"]) == (0, 10, 8)
    assert client.mget("r/3_v", "r/4_v", "r/5_v") == [b"100", b"4", b"5"]


def test_large_records_are_read_a_few_at_a_time(
    url: Url, client: redis_py.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "BYTES", 10_000)
    # The first request is as large as a page of SCAN: there, nothing is known of their sizes.
    monkeypatch.setattr(scan, "SCAN_COUNT", 50)
    for number in range(300):
        client.mset({f"{number}_v": 1, f"{number}_d": '"' + "x" * 3000 + '"'})
    asked: list[int] = []
    get_bulk = AsyncCache.get_bulk

    def counting(self: AsyncCache, names: Any) -> Any:
        asked.append(len(names))
        return get_bulk(self, names)

    file = tmp_path / "all.ndjson"
    with mock.patch.object(AsyncCache, "get_bulk", counting):
        assert invoke("export", str(file), *url).status == 0
    assert len(names_in(file)) == 300
    assert len(asked) > 80, asked
    assert max(asked[1:]) == 3


# -- interruptions


@pytest.mark.parametrize("name", ["all.ndjson", "all.ndjson.gz"])
def test_an_export_resumes(
    name: str, url: Url, client: redis_py.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SAVE_INTERVAL", 0)
    fill(client, MANY)
    file = tmp_path / name
    broken = failing_after(MANY // 2, ndjson.encode, ConnectionLost("it was unplugged"))
    with mock.patch.object(ndjson, "encode", broken):
        done = invoke("export", str(file), *url)
    assert (done.status, done.err) == (1, "dscache: it was unplugged\n")
    assert sorted(os.listdir(tmp_path)) == [f"{name}.partial", f"{name}.resume"]
    state = json.loads((tmp_path / f"{name}.resume").read_bytes())
    assert 0 < state["records"] <= MANY // 2
    # Output that a killed process wrote after its last checkpoint is not trusted.
    with (tmp_path / f"{name}.partial").open("ab") as partial:
        partial.write(b"nonsense")
    done = invoke("export", str(file), *url)
    assert done.status == 0
    assert done.err == (
        f"dscache: resuming: skipped {state['records']:,} records already exported\n"
    )
    assert (done.document["records"], done.document["resumed"]) == (MANY, state["records"])
    assert sorted(names_in(file)) == sorted(f"r/{number}" for number in range(MANY))
    assert os.listdir(tmp_path) == [name]


def test_an_export_of_a_restarted_server_starts_over(
    url: Url, client: redis_py.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SAVE_INTERVAL", 0)
    fill(client, 5000)
    file = tmp_path / "all.ndjson"
    broken = failing_after(3000, ndjson.encode, ConnectionLost("it was unplugged"))
    with mock.patch.object(ndjson, "encode", broken):
        invoke("export", str(file), *url)
    state = json.loads((tmp_path / "all.ndjson.resume").read_bytes())
    assert state["cursor"]
    info = net_scan.parse_info
    monkeypatch.setattr(net_scan, "parse_info", lambda reply: {**info(reply), "run_id": "another"})
    done = invoke("export", str(file), *url)
    assert done.status == 0
    assert set(names_in(file)) == {f"r/{number}" for number in range(5000)}
    assert len(names_in(file)) == 5000 + state["records"]


def test_an_unfinished_export_resumes_only_with_the_same_records(
    url: Url, client: redis_py.Redis, tmp_path: Path
) -> None:
    fill(client, 3000)
    file = tmp_path / "all.ndjson"
    broken = failing_after(10, ndjson.encode, ConnectionLost("it was unplugged"))
    with mock.patch.object(ndjson, "encode", broken):
        invoke("export", str(file), *url)
    done = invoke("export", str(file), "--prefix", "r/1", *url)
    assert done.status == 2
    assert "an unfinished export of other records is there" in done.err.replace("\n", " ")
    assert "--restart" in done.err
    done = invoke("export", str(file), "--prefix", "r/1", "--restart", *url)
    assert (done.status, done.document["resumed"]) == (0, 0)
    # And a finished one isn't replaced unless requested.
    done = invoke("export", str(file), *url)
    assert (done.status, "exists already" in done.err) == (2, True)
    done = invoke("export", str(file), "--restart", *url)
    assert (done.status, done.document["records"]) == (0, 3000)


def test_a_broken_state_file_names_the_remedy(
    url: Url, client: redis_py.Redis, tmp_path: Path
) -> None:
    (tmp_path / "a.ndjson.resume").write_text("{")
    (tmp_path / "a.ndjson.partial").write_text("")
    done = invoke("export", str(tmp_path / "a.ndjson"), *url)
    told = f"dscache: {tmp_path}/a.ndjson{{}}: it is damaged; start over with --restart\n"
    assert (done.status, done.err) == (1, told.format(".resume"))
    assert invoke("export", str(tmp_path / "a.ndjson"), "--restart", *url).status == 0
    (tmp_path / "a.ndjson.imported").write_text("{}")
    done = invoke("import", str(tmp_path / "a.ndjson"), *url)
    assert (done.status, done.err) == (1, told.format(".imported"))


@pytest.mark.parametrize("options", [(), ("--restart",)])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_target_that_is_no_file(
    kind: str, options: tuple[str, ...], url: Url, client: redis_py.Redis, tmp_path: Path
) -> None:
    """A named pipe stands for all devices, which a finished export must not replace."""
    target = tmp_path / kind
    target.mkdir() if kind == "folder" else os.mkfifo(target)
    done = invoke("export", str(target), *options, *url)
    assert (done.status, done.out) == (2, "")
    assert "isn't a file but a folder or a device" in done.err
    assert [one.name for one in tmp_path.iterdir()] == [kind]
    assert target.is_fifo() or target.is_dir()


@pytest.mark.parametrize("options", [(), ("--restart",)])
def test_two_exports_into_one_file(
    options: tuple[str, ...], url: Url, client: redis_py.Redis, tmp_path: Path
) -> None:
    target = export.Target(tmp_path / "all.ndjson")
    with target.open(export.ExportState({})):
        done = invoke("export", str(tmp_path / "all.ndjson"), *options, *url)
        target.finish()
    assert (done.status, "another export is writing it" in done.err) == (1, True)
    assert [one.name for one in tmp_path.iterdir()] == ["all.ndjson"]


@pytest.mark.parametrize("name", ["all.ndjson", "all.ndjson.gz"])
def test_an_import_resumes(
    name: str, url: Url, client: redis_py.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SAVE_INTERVAL", 0)
    fill(client, MANY)
    before = contents(client)
    file = tmp_path / name
    invoke("export", str(file), *url)
    client.flushall()
    broken = failing_after(6, AsyncCache.set_bulk, ConnectionLost("it was unplugged"))
    with mock.patch.object(AsyncCache, "set_bulk", broken):
        done = invoke("import", str(file), *url)
    assert (done.status, done.err.splitlines()[1:]) == (1, ["dscache: it was unplugged"])
    state = json.loads((tmp_path / f"{name}.imported").read_bytes())
    assert 0 < state["line"] == state["records"] < MANY
    # Completed records are not written again.
    client.delete(*(f"{one}_v" for one in names_in(file)[: state["line"]]))
    done = invoke("import", str(file), *url)
    assert done.status == 0
    assert done.err == (f"dscache: resuming: skipped {state['line']:,} lines already imported\n")
    assert (done.document["records"], done.document["resumed"]) == (MANY, state["records"])
    assert len(contents(client)) == 2 * MANY - state["line"]
    assert os.listdir(tmp_path) == [name]
    # With another file of that name, it begins at the first line.
    (tmp_path / f"{name}.imported").write_text(json.dumps({**state, "changed": 0}))
    done = invoke("import", str(file), *url)
    assert (done.err, contents(client)) == ("", before)


def test_ctrl_c_is_reported(url: Url, client: redis_py.Redis) -> None:
    with running("import", "-", *url) as process:
        assert process.stdin
        assert process.stderr
        process.stdin.write(b'{"name":"a","version":1,"data":1}\n' * 3000)
        process.stdin.flush()
        while not client.exists("a_v"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert process.stderr.read() == b"dscache: interrupted\n"


def test_a_full_disk(url: Url, client: redis_py.Redis, tmp_path: Path) -> None:
    fill(client, 10)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    file = tmp_path / "all.ndjson"
    with mock.patch.object(os, "fsync", failing_after(0, os.fsync, full)):
        done = invoke("export", str(file), *url)
    assert done.status == 1
    reason = "No space left on device; make room, or write elsewhere"
    assert done.err == f"dscache: {file}.partial: {reason}\n"
    assert invoke("export", str(file), *url).status == 0
    # An import that can't store its progress can't be resumed, and works all the same.
    with mock.patch.object(restore, "write_state", failing_after(0, print, full)):
        assert invoke("import", str(file), *url).document["records"] == 10


def test_a_record_deleted_meanwhile_is_no_half(
    url: Url, client: redis_py.Redis, tmp_path: Path
) -> None:
    fill(client, 10)
    get_bulk = AsyncCache.get_bulk

    def late(self: AsyncCache, names: Any) -> Any:
        client.delete("r/3_v", "r/3_d", "r/4_d")
        return get_bulk(self, names)

    with mock.patch.object(AsyncCache, "get_bulk", late):
        done = invoke("export", str(tmp_path / "all.ndjson"), *url)
    assert (done.status, done.document["records"], done.document["halves"]) == (0, 8, 1)


# -- invalid lines


def test_a_broken_line_ends_the_import(url: Url, client: redis_py.Redis, tmp_path: Path) -> None:
    file = tmp_path / "all.ndjson"
    good = [f'{{"name":"n{number}","version":1,"data":0}}\n' for number in range(3000)]
    file.write_text("".join([*good[:2500], "nonsense\n", *good[2500:]]))
    done = invoke("import", str(file), *url)
    assert done.status == 1
    assert done.err == (
        f"dscache: 2,500 lines imported; {file}.imported notes it for the next run\n"
        f"dscache: {file}, line 2501: it is not JSON: character 0: expecting value; "
        "--keep-going skips it\n"
    )
    assert client.dbsize() == 5000
    # Run again, it ends at the same line at once; with keep-going it skips the line.
    done = invoke("import", str(file), *url)
    assert (done.status, done.err.splitlines()[0]) == (
        1,
        "dscache: resuming: skipped 2,500 lines already imported",
    )
    done = invoke("import", str(file), "--keep-going", *url)
    assert done.status == 1
    assert (done.document["records"], done.document["broken"]) == (3000, 1)
    assert "line 2501: it is not JSON" in done.err
    assert client.dbsize() == 6000


def test_a_compressed_file_may_have_any_name(
    url: Url, client: redis_py.Redis, tmp_path: Path
) -> None:
    file = tmp_path / "backup"
    file.write_bytes(gzip.compress(b'{"name":"a","version":1,"data":[]}\n'))
    assert invoke("import", str(file), *url).document["records"] == 1
    assert client.get("a_d") == b"[]"
    assert invoke("diff", str(file), *url).err == "dscache: equal\n"


def test_an_import_that_has_written_nothing_leaves_no_file(url: Url, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("Dear diary\n")
    done = invoke("import", str(file), *url)
    assert (done.status, done.err.count("\n")) == (1, 1)
    assert [one.name for one in tmp_path.iterdir()] == [file.name]


def test_many_broken_lines_are_counted(url: Url, client: redis_py.Redis) -> None:
    text = b'{"name":"","version":1,"data":0}\n' * 30 + b'{"name":"a","version":1,"data":0}'
    done = invoke("import", "-", "--keep-going", *url, stdin=text)
    assert (done.document["broken"], done.document["records"]) == (30, 1)
    told = done.err.splitlines()
    assert len(told) == progress.MAX_NOTES + 1
    assert told[-1] == f"dscache: and {30 - progress.MAX_NOTES} more"


def test_damaged_records_in_redis_can_be_skipped(url: Url, client: redis_py.Redis) -> None:
    client.mset({"a_v": "x", "a_d": "1", "b_v": "x", "b_d": "1"})
    text = b"".join(b'{"name":"%c","version":1,"data":0}\n' % one for one in b"abc")
    text = text.replace(b'"b","version":1,', b'"b","version":1,"ttl":50,')
    done = invoke("import", "-", "--if-newer", *url, stdin=text)
    assert done.status == 1
    assert "its stored version isn't an integer" in done.err
    client.delete("c_v", "c_d")
    done = invoke("import", "-", "--if-newer", "--keep-going", *url, stdin=text)
    assert (done.status, done.document["records"], done.document["broken"]) == (1, 1, 2)
    assert len(done.err.splitlines()) == 2
    assert client.mget("a_v", "c_v") == [b"x", b"1"]
    # Without --if-newer it is repaired.
    assert invoke("import", "-", *url, stdin=text).status == 0
    assert client.mget("a_v", "b_v") == [b"1", b"1"]


def test_lines_of_one_name_keep_their_order(url: Url, client: redis_py.Redis) -> None:
    lines = b"".join(b'{"name":"a","version":%d,"data":%d}\n' % (i, i) for i in range(500))
    limited = b'{"name":"a","version":1000,"data":0,"ttl":500}\n'
    done = invoke("import", "-", *url, stdin=lines + limited + lines)
    assert (done.status, done.document["records"]) == (0, 1001)
    assert client.mget("a_v", "a_d") == [b"499", b"499"]
    assert client.ttl("a_d") == -1


def test_invalid_files(url: Url, tmp_path: Path) -> None:
    done = invoke("import", str(tmp_path / "none"), *url)
    assert done.err == f"dscache: {tmp_path / 'none'}: No such file or directory\n"
    done = invoke("import", str(tmp_path), *url)
    assert done.status == 1
    assert done.err == f"dscache: {tmp_path} is a folder; name the file of an export\n"
    done = invoke("import", ".", *url)
    assert (done.status, done.err) == (1, "dscache: . is a folder; name the file of an export\n")
    done = invoke("export", ".", *url)
    assert (done.status, ". isn't a file but a folder" in done.err) == (2, True)
    (tmp_path / "a.gz").write_bytes(b"no gzip")
    done = invoke("import", str(tmp_path / "a.gz"), *url)
    assert (done.status, "a.gz can't be read: " in done.err) == (1, True)
    (tmp_path / "b.gz").write_bytes(gzip.compress(os.urandom(100_000))[:5000])
    done = invoke("import", str(tmp_path / "b.gz"), *url)
    assert (done.status, "b.gz can't be read: " in done.err) == (1, True)
    done = invoke("export", str(tmp_path / "none" / "a"), *url)
    assert (done.status, "there is no folder" in done.err) == (2, True)
    os.mkfifo(tmp_path / "fifo")
    writing = os.open(tmp_path / "fifo", os.O_RDWR)
    done = invoke("import", str(tmp_path / "fifo"), *url)
    os.close(writing)
    assert (done.status, "fifo can't be read: " in done.err) == (1, True)
    done = invoke("import", str(tmp_path / "none"), "--ttl", "-1", *url)
    assert done.status == 2


def test_a_server_out_of_memory(url: Url, client: redis_py.Redis) -> None:
    text = b"".join(b'{"name":"n%d","version":1,"data":0}\n' % i for i in range(5000))
    client.config_set("maxmemory", 1)
    try:
        done = invoke("import", "-", *url, stdin=text)
    finally:
        client.config_set("maxmemory", 0)
    assert done.status == 1
    assert done.err.startswith("dscache: OOM ")


# -- a terminal


def test_a_terminal_gets_a_progress_bar_and_a_summary(
    url: Url, client: redis_py.Redis, tmp_path: Path
) -> None:
    file = str(tmp_path / "all.ndjson")
    fill(client, 1000)
    status, written = run_on_terminal("export", file, *url, columns=60)
    assert status == 0
    assert "\x1b" in written
    assert "1,000 records exported (" in plain(written).splitlines()[-1]
    words = ("import", file, "--if-newer", *url)
    status, written = run_on_terminal(*words, columns=60)
    assert status == 0
    assert (
        "0 records imported, 1,000 not written: Redis holds the same or a newer version ("
        in " ".join(plain(written).splitlines()[-2:])
    )


def test_every_key_is_documented(url: Url, client: redis_py.Redis, tmp_path: Path) -> None:
    text = section(DOCUMENT, "export and import").rpartition("Their JSON has")[2]
    file = str(tmp_path / "all.ndjson")
    keys = {*invoke("export", file, *url).document, *invoke("import", file, *url).document}
    assert set(code(text)) == keys
