"""The near cache that processes share: entries, epochs and tickets, torn and killed processes."""

from __future__ import annotations

import fcntl
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dscache import _fast
from tests.programs import host_near

Process = Callable[..., Any]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    """Return a function that makes the near cache of one more process."""
    opened: list[int] = []
    made: list[Any] = []

    def miss(name: str, type: Any = None) -> Any:
        raise KeyError(name)

    def make(**options: Any) -> Any:
        near = _fast.HostNearCache(
            miss, miss, **{"max_age": 1e6, "idle_limit": 1e6, "max_bytes": 2**26} | options
        )
        paths = [tmp_path / name for name in ("data", "lock")]
        files = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in paths]
        opened.extend(files)
        if not made:
            assert near.create(files[0], 1234567, 89)
        made.append(near)
        assert near.attach(*files)
        return near

    yield make
    for near in made:
        near.close()
    for file in opened:
        os.close(file)


def lead(near: Any, identity: bytes = b"one") -> None:
    near.leads = True
    near.begin_epoch(identity, time.monotonic())


def fill(near: Any, name: str, version: int | None, raw: bytes = b"1") -> None:
    """Read a record from the server."""
    entry = near.begin_read(name)
    record = None if version is None else _fast.Record(name, version, raw)
    assert entry is not None
    near.settle(entry, record, True)


def hit(near: Any, name: str) -> int | None:
    """Return the cached version, None for a missing record, or -1 if nothing is cached."""
    try:
        record = near.get(name)
    except KeyError:
        return -1
    return None if record is None else int(record.version)


def report(near: Any, *names: str) -> None:
    near.take_keys([key for name in names for key in (f"{name}_v".encode(), f"{name}_d".encode())])


def test_what_one_reads_is_a_hit_for_all_that_know_the_server(process: Process) -> None:
    one, two = process(), process()
    lead(one)
    fill(one, "a", 3, b'{"x":1}')
    assert hit(two, "a") == -1
    assert not two.vouches(b"other")
    assert hit(two, "a") == -1
    assert two.vouches(b"one")
    record = two.get("a")
    assert (record.name, record.version, record.raw, record.data) == ("a", 3, b'{"x":1}', {"x": 1})
    assert two.head("a") == 3
    fill(two, "b", None)
    assert one.get("b") is None
    assert one.head("b") is None
    assert one.find(0, ["a", "c", "b"]) == ({"a": record, "c": None, "b": None}, ["c"])
    assert one.stats()["records"] == two.stats()["records"] == 2
    assert two.stats()["hits"] == 2
    with pytest.raises(KeyError):
        one.get("\ud800")


def test_an_entry_is_not_that_of_another_name(process: Process) -> None:
    # Among so many, some have the same 32 bits of their hashes.
    near = process(max_records=200_000)
    lead(near)
    names = [f"record/{number}" for number in range(200_000)]
    for number, name in enumerate(names):
        fill(near, name, number, name.encode())
    assert all(near.get(name).raw == name.encode() for name in names)
    report(near, *names[::2])
    assert all(hit(near, name) == -1 for name in names[::2])
    assert all(near.get(name).version == number for number, name in enumerate(names) if number % 2)
    assert near.stats()["records"] == len(names) // 2


@pytest.mark.parametrize("size", [1, 7, 8, 9, 47, 48, 49, 55, 56, 57, 123, 5000, 1_000_000])
def test_texts_of_every_size_come_back(process: Process, size: int) -> None:
    near = process()
    lead(near)
    for name in ("n", "n" * 7, "n" * 8, "näme" * 20):
        raw = random.Random(size).randbytes(size)
        fill(near, name, size, raw)
        assert near.get(name).raw == raw


@pytest.mark.parametrize("at_end", [False, True])
def test_what_comes_between_keeps_a_read_from_being_kept(process: Process, at_end: bool) -> None:
    one, two = process(), process()
    lead(one)
    two.vouches(b"one")
    between: list[Callable[[], object]] = [
        lambda: report(one, "a"),
        lambda: one.take_keys(None),
        lambda: one.begin_write(["a"]).end(),
        lambda: two.begin_write(["a"]).end(),
        lambda: one.observe("a", 5),
        lambda: lead(one),
        lambda: lead(two),
        lambda: two.end_epoch("connection"),
        lambda: one.flush("login"),
    ]
    for act in between:
        for reader in (one, two):
            one.vouches(b"one")
            two.vouches(b"one")
            entry = reader.begin_read("a")
            assert entry is not None
            if at_end:
                reader.settle(entry, _fast.Record("a", 4, b"4"), True)
                assert hit(one, "a") == hit(two, "a") == 4
                act()
            else:
                act()
                reader.settle(entry, _fast.Record("a", 4, b"4"), True)
            for each in (one, two):
                each.vouches(b"one")
                assert hit(each, "a") == -1
            if not one.is_live:
                lead(one)


def test_a_read_of_before_does_not_fill_the_entry_of_a_later_one(process: Process) -> None:
    one, two = process(), process()
    lead(one)
    two.vouches(b"one")
    early = two.begin_read("a")
    report(one, "a")
    late = one.begin_read("a")
    two.settle(early, _fast.Record("a", 1, b"1"), True)
    assert hit(one, "a") == hit(two, "a") == -1
    one.settle(late, _fast.Record("a", 2, b"2"), True)
    assert hit(one, "a") == -1  # the answers differed
    fill(one, "a", 2)
    assert hit(two, "a") == 2


def test_answers_that_differ_are_not_kept(process: Process) -> None:
    one, two = process(), process()
    lead(one)
    two.vouches(b"one")
    for first, second in ((1, 2), (1, None), (None, 1)):
        entries = [near.begin_read("a") for near in (one, two)]
        for entry, version in zip(entries, (first, second), strict=True):
            record = None if version is None else _fast.Record("a", version, b"1")
            one.settle(entry, record, True)
        assert hit(one, "a") == -1
    entries = [near.begin_read("a") for near in (one, two)]
    for entry in entries:
        two.settle(entry, _fast.Record("a", 1, b"1"), True)
    assert hit(one, "a") == hit(two, "a") == 1
    two.observe("a", 1)
    assert hit(one, "a") == 1
    two.observe("a", None)
    assert hit(one, "a") == -1
    entry = one.begin_read("a")
    one.settle(entry, _fast.Record("a", 1, b"1"), False)
    assert hit(one, "a") == -1


def test_a_name_that_is_written_here_is_not_served_here(process: Process) -> None:
    one, two = process(), process()
    lead(one)
    two.vouches(b"one")
    fill(one, "a", 1)
    write = two.begin_write(["a", "\ud800"])
    assert two.begin_read("a") is None
    fill(one, "a", 1)
    assert hit(one, "a") == 1
    assert hit(two, "a") == -1
    write.end()
    assert hit(one, "a") == hit(two, "a") == -1
    fill(two, "a", 2)
    assert hit(two, "a") == 2


def test_another_owner_ends_what_the_former_knew(process: Process) -> None:
    one, two = process(), process()
    lead(one)
    fill(one, "a", 1)
    two.vouches(b"one")
    assert hit(two, "a") == 1
    two.leads = True
    assert not one.is_live
    assert hit(one, "a") == hit(two, "a") == -1
    assert one.begin_read("a") is None
    two.begin_epoch(b"two", time.monotonic())
    assert one.identity == "two"
    assert not one.vouches(b"one")
    assert hit(one, "a") == -1
    fill(two, "a", 2)
    assert hit(one, "a") == -1
    one.leads = False
    two.doubt()
    assert two.is_doubted
    lead(two, b"two")
    assert not two.is_doubted


def test_hits_end_when_the_owner_is_silent(process: Process) -> None:
    one, two = process(idle_limit=0.2), process(idle_limit=0.2)
    lead(one)
    fill(one, "a", 1)
    two.vouches(b"one")
    end = time.monotonic() + 60
    while hit(two, "a") != -1:
        assert time.monotonic() < end
    assert hit(one, "a") == -1
    one.confirm(time.monotonic() + 1e6)
    assert hit(one, "a") == hit(two, "a") == 1


def test_entries_end_with_their_age(process: Process) -> None:
    near = process(max_age=0.05)
    lead(near)
    fill(near, "a", 1)
    end = time.monotonic() + 60
    while hit(near, "a") != -1:
        assert time.monotonic() < end


def test_the_segment_is_bounded(process: Process, tmp_path: Path) -> None:
    limit = 2**20
    near = process(max_bytes=limit, max_records=1000)
    lead(near)
    chance = random.Random(1)
    for number in range(20_000):
        name = f"n/{chance.randrange(5000)}"
        fill(near, name, number, chance.randbytes(chance.choice((1, 100, 1000, 30_000))))
        hit(near, "n/7")
    stats = near.stats()
    assert stats["evictions"] > 1000
    assert 10 < stats["records"] <= 1000
    assert stats["bytes"] <= limit
    assert near.size <= limit
    assert (tmp_path / "data").stat().st_blocks * 512 <= limit + 8192
    # One that is too large for it drops the former, and isn't kept.
    fill(near, "large", 1)
    entry = near.begin_read("large")
    near.settle(entry, _fast.Record("large", 2, b"x" * limit), True)
    assert hit(near, "large") == -1
    fill(near, "after", 1)
    assert hit(near, "after") == 1


def test_an_often_read_entry_stays(process: Process) -> None:
    near = process(max_records=100)
    lead(near)
    fill(near, "often", 1)
    for number in range(1000):
        assert hit(near, "often") == 1
        fill(near, f"n/{number}", number)
    assert near.stats()["records"] == 100


def test_a_file_without_room_leaves_the_entries_there_are(process: Process) -> None:
    near = process(max_bytes=2**24, max_records=100_000)
    lead(near)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill(near, "first", 0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        for number in range(20_000):
            entry = near.begin_read(f"n/{number}")
            if entry is not None:
                near.settle(entry, _fast.Record(f"n/{number}", number, b"1" * 100), True)
            assert hit(near, f"n/{number}") in (-1, number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 0 < near.stats()["records"] < 20_000
    fill(near, "last", 1)
    assert hit(near, "last") == 1


def test_without_the_lock_nothing_is_kept_and_drops_flush(process: Process, tmp_path: Path) -> None:
    one, two = process(), process()
    lead(one)
    two.vouches(b"one")
    with (tmp_path / "lock").open("rb") as file:
        for drop in (
            lambda: report(one, "a"),
            lambda: two.begin_write(["a"]),
            lambda: two.observe("a", 9),
        ):
            fill(one, "a", 1)
            fill(one, "b", 1)
            entry = two.begin_read("c")
            fcntl.flock(file, fcntl.LOCK_EX)
            assert hit(two, "b") == 1  # a hit takes no lock
            assert one.begin_read("d") is None
            drop()
            assert hit(one, "a") == hit(two, "a") == hit(one, "b") == -1
            fcntl.flock(file, fcntl.LOCK_UN)
            two.settle(entry, _fast.Record("c", 1, b"1"), True)
            assert hit(one, "c") == -1
    assert one.stats()["flushes"] == {"busy": 1}


def test_a_forked_child_without_its_own_lock_changes_nothing(process: Process) -> None:
    near = process()
    lead(near)
    fill(near, "a", 1)
    pid = os.fork()
    if pid == 0:
        is_right = near.begin_read("b") is None
        near.observe("a", 2)  # which flushes
        is_right = is_right and hit(near, "a") == -1
        near.close()
        os._exit(0 if is_right else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert near.is_live
    assert hit(near, "a") == -1


def test_a_closed_file_is_not_taken_for_the_lock(process: Process, tmp_path: Path) -> None:
    process()
    near = process()
    lead(near)
    fill(near, "a", 1)
    files = [number for number in range(256) if _is_same(number, tmp_path / "lock")]
    with (tmp_path / "other").open("w") as other:
        kept = [os.dup(number) for number in files]
        for number in files:
            os.dup2(other.fileno(), number)
        assert near.begin_read("b") is None
        report(near, "a")
        assert hit(near, "a") == -1
        for number, old in zip(files, kept, strict=True):
            os.dup2(old, number)
            os.close(old)
    fill(near, "a", 2)
    assert hit(near, "a") == 2


def _is_same(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except OSError:
        return False


def test_killed_processes_leave_no_half_entries(process: Process, tmp_path: Path) -> None:
    torture(process, tmp_path, kills=12, processes=3)


def torture(process: Process, tmp_path: Path, kills: int, processes: int) -> int:
    """Kill processes that change a segment, while others read and change it; return the hits."""
    max_bytes = 65536
    near = process(max_bytes=max_bytes, max_records=40)
    lead(near, host_near.IDENTITY)
    chance = random.Random(kills)

    def start(number: int) -> subprocess.Popen[str]:
        arguments = [str(tmp_path / "data"), str(tmp_path / "lock"), str(number), "3600"]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.programs.host_near", *arguments, str(max_bytes)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )

    running = [start(number) for number in range(1, processes + 1)]
    hits = 0
    try:
        for number in range(kills):
            more, wrong = host_near.work(near, 1000 + number, chance.uniform(0.1, 0.3))
            hits += more
            assert not wrong
            victim = running.pop(0)
            victim.send_signal(signal.SIGKILL)
            told, _ = victim.communicate()
            assert told == "", told
            running.append(start(2000 + number))
    finally:
        for one in running:
            one.kill()
            told, _ = one.communicate()
            assert told == "", told
    more, wrong = host_near.work(near, 999, 0.2)
    assert not wrong
    assert hits + more > 1000
    assert near.stats()["records"] <= 40
    return hits
