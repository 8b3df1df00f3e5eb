"""The near cache that the processes of a host share, on a real server; two caches are processes."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache import _backend, _fast
from dscache.blocking import near_segment
from dscache.core import pure
from dscache.embedded import EmbeddedServer
from tests.conftest import SERVERS, MakeServer, _server_id
from tests.support.blocking import PATIENCE, until
from tests.support.near_truth import (
    Readers,
    Truth,
    assert_serves,
    counters,
    is_at_hand,
    links,
    opened_caches,
    putting,
    version_of,
)

# A busy machine may be silent for a while, which must not look like a dead link.
NEAR = {"shared": True, "idleLimit": 30_000, "maxBytes": 2**20}
NAME = "dscache-host-test"

pytestmark = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)

OpenCache = Callable[..., dscache.Cache]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the files of these tests apart."""
    monkeypatch.setattr(near_segment, "_MEMORY", tmp_path)
    monkeypatch.setattr(_backend, "core", _fast)
    monkeypatch.setattr(_backend, "BACKEND", "fast")
    return tmp_path


@pytest.fixture
def open_cache(server: EmbeddedServer, redis: redis_py.Redis, folder: Path) -> Iterator[OpenCache]:
    """Open caches of processes of a host; at the end, nothing is left of their files."""
    with opened_caches(NEAR, url=server.url, connectionName=NAME) as open_one:
        yield open_one
    assert list(folder.glob("dscache-*")) == []


def segments(folder: Path) -> list[Path]:
    return [path for path in folder.glob("dscache-*") if not path.suffix]


def test_what_one_process_reads_is_a_hit_for_all(
    open_cache: OpenCache, redis: redis_py.Redis, folder: Path
) -> None:
    one, two = open_cache(), open_cache()
    put = putting(redis)
    for name in "abc":
        put(name, 1)
    until(lambda: is_at_hand(one, "a"), "a hit")
    two.get("x")  # shows that it speaks with the same server
    redis.config_resetstat()
    assert version_of(two, "a") == 1
    assert two.head("a") == 1
    assert list(two.get_bulk(["a"])) == ["a"]
    assert two.get("a", type=list[Any]).data == ["a", 1]  # type: ignore[union-attr]
    assert "cmdstat_mget" not in redis.info("commandstats")
    assert counters(two)["hits"] == 4
    assert len(links(redis, NAME)[0]) == 1
    for path in folder.glob("dscache-*"):
        assert path.stat().st_mode & 0o777 == 0o600
    put("a", 2)
    until(lambda: version_of(two, "a") == version_of(one, "a") == 2, "the change")


def test_own_writes_of_a_process_are_seen_at_once_by_all(open_cache: OpenCache) -> None:
    one, two = open_cache(), open_cache()
    for version in range(1, 200):
        writer, reader = (one, two) if version % 2 else (two, one)
        if version % 5:
            writer.set("a", version, version)
        else:
            writer.set_bulk({"a": (version, version), "b": (version, version)})
        assert version_of(writer, "a") == version_of(reader, "a") == version
    one.delete("a")
    assert two.get("a") is None
    assert one.get("a") is None


def test_options_that_differ_are_not_shared(
    open_cache: OpenCache, redis: redis_py.Redis, folder: Path
) -> None:
    caches = [open_cache(), open_cache(db=1), open_cache(keyPrefix="p:")]
    caches += [open_cache({**NEAR, "prefixes": ["a"]}), open_cache({**NEAR, "maxBytes": 2**21})]
    redis.mset({"a_v": 1, "a_d": "0", "p:a_v": 2, "p:a_d": "0"})
    for cache in caches:
        until(lambda c=cache: c.get("a") is None or is_at_hand(c, "a"), "a hit")  # type: ignore[misc]
    assert [version_of(cache, "a") for cache in caches] == [1, None, 2, 1, 1]
    assert len(segments(folder)) == len(caches)


def test_the_next_process_takes_over(open_cache: OpenCache, redis: redis_py.Redis) -> None:
    caches = [open_cache() for _ in range(3)]
    truth = Truth(["a", "b"], 60.0)
    put = putting(redis)
    for left in (3, 2, 1):
        for cache in caches:
            assert_serves(cache, truth, put, "a")
        with Readers(caches[-1], truth):
            until(lambda: len(links(redis, NAME)[0]) == 1, "one link")
            owner = next(one for one in caches if one._near.core.leads)  # type: ignore[union-attr]
            if left > 1:
                caches.remove(owner)
                if owner is not caches[-1]:
                    owner.close()
    assert_serves(caches[0], truth, put)


@pytest.mark.parametrize("which", ["listening", "pooled", "all"])
def test_connections_that_are_killed(
    open_cache: OpenCache, redis: redis_py.Redis, which: str
) -> None:
    one, two = open_cache(), open_cache()
    truth = Truth(["a", "b", "c"], 60.0)
    put = putting(redis)
    with Readers(one, truth), Readers(two, truth):
        for _ in range(3):
            assert_serves(one, truth, put, "a")
            assert_serves(two, truth, put, "b")
            listening, pooled = links(redis, NAME)
            for client in {"listening": listening, "pooled": pooled}.get(which, listening + pooled):
                redis.client_kill_filter(_id=client["id"])
            truth.write(put)
        assert_serves(one, truth, put)
        assert_serves(two, truth, put)


@pytest.mark.parametrize("command", ["flushall", "flushdb"])
def test_a_flush_ends_all(open_cache: OpenCache, redis: redis_py.Redis, command: str) -> None:
    caches = [open_cache(), open_cache()]
    truth = Truth(["a", "b"], 60.0)
    put = putting(redis)
    for cache in caches:
        assert_serves(cache, truth, put)
    truth.remove(getattr(redis, command))
    for cache in caches:
        until(lambda c=cache: c.get("a") is None and c.get("b") is None, "the flush")  # type: ignore[misc]
    for cache in caches:
        assert_serves(cache, truth, put)


def test_a_frozen_server_ends_the_hits(make_server: MakeServer, open_cache: OpenCache) -> None:
    frozen = make_server()
    near = {**NEAR, "idleLimit": 300}
    caches = [open_cache(near, url=frozen.url, commandTimeout=200) for _ in range(2)]
    with redis_py.Redis.from_url(frozen.url) as redis:
        putting(redis)("a", 1)
    for cache in caches:
        until(lambda c=cache: is_at_hand(c, "a"), "a hit")  # type: ignore[misc]
    frozen.pause()
    try:
        time.sleep(0.301)
        for cache in caches:
            with pytest.raises(dscache.DscacheError):
                cache.get("a")
    finally:
        frozen.resume()
    for cache in caches:
        until(lambda c=cache: _is_hit(c), "hits again")  # type: ignore[misc]


def _is_hit(cache: dscache.Cache) -> bool:
    try:
        return is_at_hand(cache, "a")
    except dscache.DscacheError:
        return False


CHILD = """
import sys, time
from pathlib import Path
import dscache
from dscache.blocking import near_segment
near_segment._MEMORY = Path(sys.argv[2])
near = {"shared": True, "idleLimit": 30_000, "maxBytes": 2**20}
options = {"url": sys.argv[1], "connectionName": "dscache-host-test", "nearCache": near}
cache = dscache.Cache.from_config({"name": "redis", "options": options})
while not cache.stats().get("near_cache", {"hits": 0})["hits"]:
    cache.get("a")
print("warm", flush=True)
if sys.argv[3] == "wait":
    sys.stdin.read()
"""


def child(server: EmbeddedServer, folder: Path, what: str) -> subprocess.Popen[str]:
    """Start a process with a warm cache; it waits, or ends without close."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, server.url, str(folder), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "DSCACHE_BACKEND": "fast", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "warm\n"
    return process


def test_a_killed_owner_is_followed(
    open_cache: OpenCache, redis: redis_py.Redis, server: EmbeddedServer, folder: Path
) -> None:
    putting(redis)("a", 1)
    with child(server, folder, "wait") as owner:
        cache = open_cache()
        until(lambda: is_at_hand(cache, "a"), "a hit")
        assert not cache._near.core.leads  # type: ignore[union-attr]
        owner.send_signal(signal.SIGKILL)
    truth = Truth(["b"], 60.0)
    assert_serves(cache, truth, putting(redis))
    assert cache._near.core.leads  # type: ignore[union-attr]


@pytest.mark.parametrize("records", [100_000, 50])
def test_files_of_killed_processes_are_replaced(
    open_cache: OpenCache,
    redis: redis_py.Redis,
    server: EmbeddedServer,
    folder: Path,
    records: int,
) -> None:
    putting(redis)("a", 1)
    with child(server, folder, "wait") as killed:
        killed.kill()
    left = {*folder.glob("*.lock"), *folder.glob("*.owner")}
    assert len(left) == 2
    for name in ("dscache-x.new", f"dscache-{os.geteuid()}-early-0.new"):
        (folder / name).touch()
    # With other options, the file has another name.
    cache = open_cache({**NEAR, "maxRecords": records})
    until(lambda: is_at_hand(cache, "a"), "a hit")
    assert len(segments(folder)) == 1
    mine = {*folder.glob("*.lock"), *folder.glob("*.owner")}
    assert len(mine) == 2
    assert not mine & left
    assert [path.name for path in folder.glob("*.new")] == ["dscache-x.new"]
    (folder / "dscache-x.new").unlink()


def test_a_process_that_ends_without_close_removes_the_files(
    server: EmbeddedServer, folder: Path, redis: redis_py.Redis
) -> None:
    putting(redis)("a", 1)
    with child(server, folder, "end") as process:
        assert process.wait(60) == 0
    assert list(folder.glob("dscache-*")) == []


def test_a_forked_child_has_locks_of_its_own(open_cache: OpenCache, redis: redis_py.Redis) -> None:
    cache = open_cache()
    putting(redis)("a", 1)
    until(lambda: is_at_hand(cache, "a"), "a hit")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(120)
            core = cache._near.core  # type: ignore[union-attr]
            is_right = not core.is_live and not core.leads
            until(lambda: is_at_hand(cache, "a"), "a hit in the child")
            cache.set("a", 2, 2)
            is_right = is_right and version_of(cache, "a") == 2 and not core.leads
            cache.close()
            status = 0 if is_right else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert version_of(cache, "a") == 2
    assert cache._near.core.leads  # type: ignore[union-attr]
    until(lambda: is_at_hand(cache, "a"), "a hit in the parent")


@pytest.mark.parametrize("does", ["get", "close"])
def test_a_fork_leaves_no_open_file_to_the_child(
    open_cache: OpenCache, folder: Path, monkeypatch: pytest.MonkeyPatch, does: str
) -> None:
    """Also while another thread opens or closes the files; the child would keep their locks."""
    cache = open_cache()
    if does == "close":
        cache.get("a")
    try_lock = near_segment._try_lock
    is_busy, has_forked = threading.Event(), threading.Event()

    def try_lock_slowly(file: int, kind: int) -> bool:
        if threading.current_thread() is thread:
            is_busy.set()
            has_forked.wait(0.2)  # it may have to wait for this thread
        return try_lock(file, kind)

    monkeypatch.setattr(near_segment, "_try_lock", try_lock_slowly)
    thread = threading.Thread(target=getattr(cache, does), args=["a"][: does == "get"])
    thread.start()
    assert is_busy.wait(PATIENCE)
    pid = os.fork()
    if pid == 0:
        count = 255
        try:
            count = sum(
                file.is_symlink() and str(folder) in os.readlink(file)
                for file in Path("/proc/self/fd").iterdir()
            )
        finally:
            os._exit(count)
    has_forked.set()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    thread.join()


def test_a_segment_that_others_may_write_is_refused(open_cache: OpenCache, folder: Path) -> None:
    cache = open_cache()
    cache.get("a")
    (path,) = segments(folder)
    path.chmod(0o620)
    other = open_cache()
    with pytest.raises(dscache.ConfigError, match="may be used by other users; it needs up to"):
        other.get("a")
    path.chmod(0o600)
    assert other.get("a") is None


def test_a_segment_of_another_layout_is_refused(open_cache: OpenCache, folder: Path) -> None:
    cache = open_cache()
    cache.get("a")
    (path,) = segments(folder)
    with path.open("r+b") as file:
        magic = file.read(8)
        file.seek(0)
        file.write(b"whatever")
        file.flush()
        with pytest.raises(dscache.ConfigError, match=f"{path} is of another version of dscache"):
            open_cache().get("a")
        file.seek(0)
        file.write(magic)


def test_a_link_is_not_followed(open_cache: OpenCache, folder: Path) -> None:
    cache = open_cache()
    cache.get("a")
    (path,) = segments(folder)
    cache.close()
    path.symlink_to(folder / "elsewhere")
    with pytest.raises(dscache.ConfigError, match="can't be used"):
        open_cache().get("a")
    path.unlink()
    assert not (folder / "elsewhere").exists()


def test_without_room_the_cache_goes_without_if_it_may(
    open_cache: OpenCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    folder: Path,
) -> None:
    monkeypatch.setattr(near_segment, "_MEMORY", folder / "gone")
    monkeypatch.setattr(near_segment.tempfile, "gettempdir", lambda: str(folder / "gone"))
    with pytest.raises(dscache.ConfigError, match="can't be used: No such file or directory"):
        open_cache().get("a")
    cache = open_cache({**NEAR, "required": False})
    with caplog.at_level(logging.WARNING, "dscache"):
        assert cache.set("a", 1, 1)
        assert version_of(cache, "a") == 1
    assert "can't be used: No such file or directory" in caplog.text
    assert counters(cache)["hits"] == 0


def test_an_attachment_waits_for_a_process_that_begins(
    open_cache: OpenCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_segment, "_PATIENCE", 0.05)
    cache = open_cache()
    cache.get("a")
    (path,) = segments(folder)
    cache.close()
    path.touch(0o600)
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(dscache.ConfigError, match="is not given free by other processes"):
            open_cache().get("a")
    assert open_cache().get("a") is None


def test_the_pure_core_and_async_caches_share_nothing(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"name": "redis", "options": {"url": server.url, "nearCache": NEAR}}
    with pytest.raises(dscache.ConfigError, match=r"^mapping: nearCache: shared is for Cache"):
        dscache.AsyncCache.from_config(config)
    monkeypatch.setattr(_backend, "core", pure)
    monkeypatch.setattr(_backend, "BACKEND", "pure")
    with pytest.raises(dscache.ConfigError, match="needs the compiled core, and this process has"):
        dscache.Cache.from_config(config)
    assert dscache.Cache.from_config({**config, "name": "memory"}).get("a") is None
