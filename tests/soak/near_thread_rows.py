"""Soak rows for the near cache of a blocking Cache: threads in processes, races and own writes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis as redis_py

import dscache
from dscache import _backend
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.soak.figures import Figures
from tests.soak.near_rows import LAG, NAMES, Board, start_writers
from tests.support.blocking import ProxyThread, until
from tests.support.near_truth import (
    Truth,
    counters,
    is_at_hand,
    links,
    open_cache,
    port_of,
    putting,
    version_of,
)

_READER = "near-reader"
_ROOT = Path(__file__).parents[2]
_IDLE_LIMIT = 0.5
_COMMAND_TIMEOUT = 5.0
# While no link is disturbed, no limit ends what is kept: messages alone keep it right.
_LONG = 60_000
_PATIENCE = 60.0


# -- reads of many processes


async def threads(
    figures: Figures,
    binary: ServerBinary,
    *,
    reads: int = 10_000_000,
    processes: int = 2,
    count: int = 4,
    pause: float = 0.02,
    mode: str = "default",
    near: str = "",
    core: str = "",
) -> None:
    """Read in threads of several processes, beside eight foreign writers and one of their own."""
    settings: Any = near or {"idleLimit": _LONG, "maxRecords": NAMES // 2, "mode": mode}
    await asyncio.to_thread(
        _threads, figures, binary, reads, processes, count, pause, settings, None, 0, core
    )


async def disturbed(
    figures: Figures,
    binary: ServerBinary,
    *,
    reads: int = 1_000_000,
    processes: int = 2,
    count: int = 4,
    pause: float = 0.02,
    mischief_pause: float = 1.0,
    times: int = 3,
    mode: str = "default",
    near: str = "",
) -> None:
    """Read as before while records are flushed, connections killed, and replies held back."""
    settings: Any = near or {
        "idleLimit": round(_IDLE_LIMIT * 1000),
        "maxRecords": NAMES // 2,
        "mode": mode,
    }
    await asyncio.to_thread(
        _threads, figures, binary, reads, processes, count, pause, settings, mischief_pause, times
    )


def _threads(
    figures: Figures,
    binary: ServerBinary,
    reads: int,
    processes: int,
    count: int,
    pause: float,
    near: Any,
    mischief_pause: float | None,
    times: int,
    core: str = "",
) -> None:
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(binary) as server:
        path = Path(folder, "board")
        board = Board(path, NAMES)
        if mischief_pause is None:
            board.let_end()
        writers = start_writers(server, path, pause)
        try:
            with ProxyThread(server.host, server.port) as proxy:
                where = {
                    "options": {
                        "url": server.url if mischief_pause is None else proxy.url,
                        "connectionName": _READER,
                        "commandTimeout": round(
                            1000 * (_PATIENCE if mischief_pause is None else _COMMAND_TIMEOUT)
                        ),
                    },
                    "host": server.host, "port": server.port, "near": near, "board": str(path),
                    "names": NAMES, "threads": count, "reads": reads // processes, "pause": pause,
                    "disturbed": mischief_pause is not None,
                    # A read that waits for another's may get what was current a twentieth of the
                    # timeout ago.
                    "bound": _PATIENCE
                    if mischief_pause is None
                    else max(_IDLE_LIMIT, _COMMAND_TIMEOUT / 20),
                }  # fmt: skip
                readers = [
                    subprocess.Popen(
                        [
                            *(sys.executable, "-m", "tests.programs.near_threads"),
                            json.dumps({**where, "seed": number, "writes": number == 0}),
                        ],
                        cwd=_ROOT,
                        env={**os.environ, "DSCACHE_BACKEND": core or _backend.BACKEND},
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                    for number in range(processes)
                ]
                try:
                    if mischief_pause is not None:
                        _disturb(figures, server, proxy, board, mischief_pause, times)
                        board.let_end()
                    found = [json.loads(reader.communicate(timeout=3600)[0]) for reader in readers]
                finally:
                    for reader in readers:
                        reader.kill()
                        reader.communicate()
        finally:
            board.end()
            for writer in writers:
                if writer.wait(30):
                    figures.problems.append(f"a writer ended with {writer.returncode}")
        figures.notes.append(f"{sum(board.writes)} writes")
    for number, one in enumerate(found):
        _tell(figures, number, one, is_disturbed=mischief_pause is not None)
    if not any(one["near"]["invalidations"] for one in found):
        figures.problems.append("no process was told of a change")


def _tell(figures: Figures, number: int, found: dict[str, Any], *, is_disturbed: bool) -> None:
    near = found["near"]
    figures.operations += found["reads"]
    figures.outcomes.update(found["outcomes"])
    figures.problems += [f"process {number}: {problem}" for problem in found["problems"]]
    served = near["hits"] / max(1, near["hits"] + near["misses"] + near["joins"])
    figures.notes.append(
        f"process {number}: {found['reads'] / found['seconds']:.0f} reads/s, {served:.2%} hits, "
        f"{near['joins']} joins, {near['invalidations']} invalidations, {near['dropped_fills']} "
        f"dropped fills, flushes {near['flushes']}, {found['probes']} probes "
        f"({found['vain_probes']} in vain), {found['outdated']} outdated for up to "
        f"{found['longest'] * 1000:.1f} ms, 99.9 % up to {found['usual'] * 1000:.1f} ms, a probe "
        f"took up to {found['late'] * 1000:.1f} ms"
    )
    if not near["hits"]:
        figures.problems.append(f"process {number}: nothing was put to the test: {near}")
    if not is_disturbed:
        if not found["probes"]:
            figures.problems.append(f"process {number}: no probe told anything")
        if found["longest"] > LAG + found["late"]:
            figures.slow.append(f"outdated for {found['longest'] * 1000:.0f} ms")


def _disturb(
    figures: Figures,
    server: EmbeddedServer,
    proxy: ProxyThread,
    board: Board,
    pause: float,
    times: int,
) -> None:
    """Cause every fault some times, with time to recover in between."""
    counts: dict[str, int] = {}
    pauses = 0
    with redis_py.Redis(server.host, server.port) as admin:

        def clients(which: str) -> list[dict[str, str]]:
            listening, pooled = links(admin, _READER)
            return {"listening": listening, "pooled": pooled, "all": listening + pooled}[which]

        def flush() -> None:
            nonlocal pauses
            pauses += 1
            board.pause = pauses
            try:
                end = time.monotonic() + _PATIENCE
                while any(one != pauses for one in board.paused):
                    assert time.monotonic() < end, "a writer doesn't pause"
                    time.sleep(0.001)
                steps = [step + 1 for step in board.issued]
                for index, step in enumerate(steps):
                    board.gone[index] = board.issued[index] = step
                admin.flushall()
                for index, step in enumerate(steps):
                    board.acknowledge(index, step)
            finally:
                board.pause = 0

        def kill(which: str) -> None:
            for client in clients(which):
                admin.client_kill_filter(_id=client["id"])

        def stall(which: str, seconds: float) -> None:
            for client in clients(which):
                proxy.do("stall_one", port_of(client), "replies")
            time.sleep(seconds)
            proxy.do("resume")

        def freeze() -> None:
            server.pause()
            time.sleep(2 * _IDLE_LIMIT)
            server.resume()

        kinds: dict[str, Callable[[], object]] = {"flush": flush, "freeze": freeze}
        for which in ("listening", "pooled", "all"):
            kinds[f"kill {which}"] = lambda which=which: kill(which)  # type: ignore[misc]
            kinds[f"stall {which}"] = lambda which=which: stall(  # type: ignore[misc]
                which, random.uniform(0.02, 0.4) * _IDLE_LIMIT
            )
            kinds[f"deaf {which}"] = lambda which=which: stall(  # type: ignore[misc]
                which, random.uniform(1.5, 3) * _IDLE_LIMIT
            )
        for _ in range(times):
            for kind in random.sample(list(kinds), len(kinds)):
                time.sleep(pause)
                kinds[kind]()
                counts[kind] = counts.get(kind, 0) + 1
        time.sleep(pause)
    figures.notes.append(", ".join(f"{count} x {kind}" for kind, count in counts.items()))


# -- a reader that races a writer

DELAYS = {
    "none": (0.0, 0.0),
    "listening": (0.002, 0.0),
    "data": (0.0, 0.002),
    "both": (0.001, 0.002),
}


async def race(
    figures: Figures,
    binary: ServerBinary,
    *,
    rounds: int = 100_000,
    patience: float = _PATIENCE,
    mode: str = "",
    near: str = "",
) -> None:
    """Read one record while it is written: the reads end on the last value, whatever is late."""
    modes = [mode] if mode else ["default", "broadcast"]
    for one in modes:
        settings: Any = near or {"mode": one, "idleLimit": 600_000, "maxAge": 3_600_000}
        each = -(-rounds // (len(DELAYS) * len(modes)))
        for delayed in DELAYS:
            await asyncio.to_thread(_race, figures, binary, each, delayed, settings, patience)
            if figures.problems:
                return


def _race(
    figures: Figures, binary: ServerBinary, rounds: int, delayed: str, near: Any, patience: float
) -> None:
    """Write a burst, then wait until each reader has the last value; again and again.

    The bursts begin as soon as one reader has the last value, so that another one's read is under
    way.
    """
    names = ["raced"]
    with (
        EmbeddedServer(binary) as server,
        redis_py.Redis(server.host, server.port) as redis,
        ProxyThread(server.host, server.port) as proxy,
    ):
        options = {"url": proxy.url, "connectionName": _READER, "commandTimeout": _LONG}
        with open_cache(options, near) as cache:
            truth = Truth(names, 3600.0)
            put = putting(redis)
            truth.write(put)
            cache.get(names[0])
            listening, _ = links(redis, _READER) if near != "naive" else ([], [])
            late_messages, late_data = DELAYS[delayed]
            proxy.do("delay", late_data)
            for client in listening:
                proxy.do("delay_one", port_of(client), late_messages)
            seen = [0, 0, 0]
            over = threading.Event()
            turned = threading.Condition()

            def read(number: int) -> None:
                floor = 0
                while not over.is_set():
                    began = time.monotonic()
                    version = cache.head(names[0]) if number == 2 else version_of(cache, names[0])
                    floor, wrong = truth.check(names[0], version, began, floor)
                    if wrong:
                        figures.problems.append(f"{delayed} delayed: {wrong}")
                        over.set()
                    figures.operations += 1
                    if floor > seen[number]:
                        seen[number] = floor
                        with turned:
                            turned.notify_all()
                    time.sleep(0.0001)

            threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
            for thread in threads:
                thread.start()

            def all_end_on(last: int, enough: Callable[[list[int]], int]) -> bool:
                """Wait until one reader or all have the last value; return whether they had."""
                with turned:
                    return turned.wait_for(lambda: over.is_set() or enough(seen) >= last, patience)

            chance = random.Random(rounds)
            try:
                for number in range(rounds):
                    for _ in range(chance.randrange(1, 4)):
                        truth.write(put)
                        if chance.random() < 0.5:
                            time.sleep(chance.uniform(0, 0.003))
                    last = truth.issued[names[0]]
                    is_at_end = number % 4 == 0 or number == rounds - 1
                    if not all_end_on(last, min if is_at_end else max):
                        figures.problems.append(
                            f"{delayed} delayed, round {number}: {seen} was read, {last} written"
                        )
                    if over.is_set() or figures.problems:
                        break
            finally:
                over.set()
                for thread in threads:
                    thread.join(120)
            if near != "naive" and not figures.problems:
                # On a busy machine each value may be outdated before it is read once more.
                until(lambda: is_at_hand(cache, names[0]), "a hit behind the last write")
            near_counts = counters(cache)
            figures.notes.append(
                f"{delayed} delayed: {rounds} rounds, {last} writes, {near_counts['hits']} hits, "
                f"{near_counts['dropped_fills']} dropped fills"
            )
            if near != "naive" and not (near_counts["hits"] and near_counts["invalidations"]):
                figures.problems.append(f"{delayed} delayed: nothing was tested: {near_counts}")


# -- own writes


async def writes(
    figures: Figures,
    binary: ServerBinary,
    *,
    rounds: int = 5000,
    losses: int = 300,
    near: str = "",
) -> None:
    """Read what another thread is writing through a late link, and what it wrote by a cut one."""
    for mode in ("default", "broadcast"):
        settings: Any = near or {"mode": mode, "idleLimit": 600_000, "maxAge": 3_600_000}
        await asyncio.to_thread(_writes, figures, binary, rounds // 2, losses // 2, settings)


def _writes(figures: Figures, binary: ServerBinary, rounds: int, losses: int, near: Any) -> None:
    with (
        EmbeddedServer(binary) as server,
        redis_py.Redis(server.host, server.port) as redis,
        ProxyThread(server.host, server.port) as proxy,
    ):
        options = {"url": proxy.url, "connectionName": _READER, "commandTimeout": _LONG}
        with open_cache(options, near) as cache:
            _own_writes(figures, cache, redis, proxy, rounds)
            if not figures.problems:
                _lost_writes(figures, cache, redis, proxy, losses)
            near_counts = counters(cache)
            figures.notes.append(f"{near_counts['hits']} hits")
        with open_cache({**options, "commandTimeout": 200}, near) as cache:
            if not figures.problems:
                _late_writes(figures, cache, redis, proxy, max(1, losses // 10))
            if not near_counts["hits"]:
                figures.problems.append("nothing was served from here")


def _own_writes(
    figures: Figures, cache: Any, redis: redis_py.Redis, proxy: ProxyThread, rounds: int
) -> None:
    """Once a write has returned, no thread reads what was before."""
    name = "own"
    returned = 0
    over = threading.Event()

    def read(number: int) -> None:
        floor = 0
        while not over.is_set():
            least = max(returned, floor)
            if number:
                version = version_of(cache, name)
            else:
                bulk = cache.get_bulk([name, "own/other"])
                version = bulk[name].version if name in bulk else None
            if (version or 0) < least:
                figures.problems.append(
                    f"own write {returned}, {floor} read before: {version} was read"
                )
                over.set()
            floor = max(floor, version or 0)
            figures.operations += 1
            time.sleep(0.0001)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for thread in readers:
        thread.start()
    chance = random.Random(rounds)
    try:
        for turn, version in enumerate(range(1, rounds + 1)):
            if turn % 50 == 0:
                listening, _ = links(redis, _READER)
                late = chance.choice(list(DELAYS.values()))
                proxy.do("delay", late[1])
                for client in listening:
                    proxy.do("delay_one", port_of(client), late[0])
            match turn % 3:
                case 0:
                    cache.set(name, version, [name, version])
                case 1:
                    cache.set(name, version, [name, version], if_newer=True)
                case _:
                    cache.set_bulk({name: (version, [name, version]), "own/other": (1, 1)})
            returned = version
            if version_of(cache, name) != version:
                figures.problems.append(f"own write {version}: another one was read")
            if over.is_set():
                break
            if turn % 4 == 0:
                time.sleep(chance.uniform(0, 0.004))
    finally:
        over.set()
        for thread in readers:
            thread.join(120)
        proxy.do("heal")


def _lost_writes(
    figures: Figures, cache: Any, redis: redis_py.Redis, proxy: ProxyThread, losses: int
) -> None:
    """After a write whose reply was lost, nothing older than what the server has is kept."""
    lost = happened = 0
    for turn in range(losses):
        name = f"lost/{turn % 5}"
        cache.set(name, 2 * turn + 1, [name, 1])
        for _ in range(3):
            cache.get(name)
        _, pooled = links(redis, _READER)
        way = "requests" if turn % 2 else "replies"
        over = threading.Event()

        def read(name: str = name, over: threading.Event = over) -> None:
            while not over.is_set():
                try:
                    cache.get(name)
                except dscache.DscacheError:
                    time.sleep(0.001)

        reader = threading.Thread(target=read)
        for client in pooled:
            proxy.do("stall_one", port_of(client), way)
        reader.start()

        def cut(pooled: list[dict[str, str]] = pooled) -> None:
            time.sleep(0.01)
            for client in pooled:
                proxy.do("cut_one", port_of(client), "rst")

        cutter = threading.Thread(target=cut)
        cutter.start()
        try:
            cache.set(name, 2 * turn + 2, [name, 2])
        except dscache.ConnectionLost:
            lost += 1
        finally:
            over.set()
            cutter.join()
            reader.join(120)
        proxy.do("resume")
        # The server has ended what was cut, and done what it had received.
        end = time.monotonic() + _PATIENCE
        while {one["id"] for one in pooled} & {one["id"] for one in links(redis, _READER)[1]}:
            assert time.monotonic() < end, "the server keeps a connection that was cut"
            time.sleep(0.001)
        has = int(redis.get(f"{name}_v") or 0)
        happened += has == 2 * turn + 2
        for _ in range(3):
            version = version_of(cache, name)
            # A reader may have been told of the earlier one before the write was done.
            end = time.monotonic() + _PATIENCE
            while version != has and time.monotonic() < end:
                version = version_of(cache, name)
            if version != has:
                figures.problems.append(f"lost write {turn}: {version} was kept, {has} is there")
                return
        figures.operations += 1
    figures.notes.append(f"{lost} of {losses} writes were lost, {happened} had happened")
    if not lost or not happened:
        figures.problems.append(f"nothing was tested: {lost} lost, {happened} happened")


def _late_writes(
    figures: Figures, cache: Any, redis: redis_py.Redis, proxy: ProxyThread, count: int
) -> None:
    """What the server does long after a write has failed is heard of as another's change."""
    late = 0
    for turn in range(count):
        name = f"late/{turn}"
        end = time.monotonic() + _PATIENCE
        is_written = False
        while not is_written and time.monotonic() < end:
            with contextlib.suppress(dscache.DscacheError):
                is_written = cache.set(name, 1, [name, 1])
                cache.get(name)
        _, pooled = links(redis, _READER)
        for client in pooled:
            proxy.do("stall_one", port_of(client), "requests")
        try:
            cache.set(name, 2, [name, 2])
        except dscache.DscacheError:
            late += 1
        # By other connections.
        for _ in range(20):
            with contextlib.suppress(dscache.DscacheError):
                cache.get(name)
        before = redis.get(f"{name}_v")
        proxy.do("resume")
        while int(redis.get(f"{name}_v") or 0) != 2 and time.monotonic() < end:
            time.sleep(0.001)
        version = 0
        while version != 2 and time.monotonic() < end:
            with contextlib.suppress(dscache.DscacheError):
                version = version_of(cache, name) or 0
        if version != 2 or redis.get(f"{name}_v") != b"2":
            figures.problems.append(f"late write {turn}: {version} was kept, {before!r} before")
            return
        figures.operations += 1
    figures.notes.append(f"{late} of {count} writes happened after they had failed")
    if not late:
        figures.problems.append("no write was late")


# -- the server's memory


async def memory(
    figures: Figures,
    binary: ServerBinary,
    *,
    processes: int = 8,
    count: int = 1_000_000,
    mode: str = "",
) -> None:
    """Let processes sleep with a warm near cache, while records are written."""
    for one in [mode] if mode else ["default", "broadcast"]:
        await asyncio.to_thread(_memory, figures, binary, processes, count, one)


# What the server may keep for all of them: messages that a busy machine has yet to read.
_KEPT = 2 * 2**20
_RECORDS = 1000


def _memory(figures: Figures, binary: ServerBinary, processes: int, count: int, mode: str) -> None:
    options = {"connectionName": _READER, "commandTimeout": _LONG}
    with EmbeddedServer(binary) as server, redis_py.Redis.from_url(server.url) as redis:
        names = [f"m/{number}" for number in range(_RECORDS)]
        redis.mset({f"{name}_{part}": 1 for name in names for part in "vd"})
        options["url"] = server.url
        where = {"options": options, "near": {"mode": mode}, "names": names}
        sleepers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.programs.near_sleep", json.dumps(where)],
                cwd=_ROOT,
                env={**os.environ, "DSCACHE_BACKEND": _backend.BACKEND},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(processes)
        ]
        try:
            for sleeper in sleepers:
                assert sleeper.stdout is not None
                assert sleeper.stdout.readline() == "warm\n"
            before = redis.info("memory")["used_memory"]
            most = 0
            at_once = 1000
            for start in range(0, count, at_once):
                both = redis.pipeline(transaction=False)
                for number in range(start, start + at_once):
                    name = names[number % _RECORDS]
                    both.mset({f"{name}_v": number, f"{name}_d": "1"})
                both.execute()
                if start % (count // 20) < at_once:
                    most = max(most, sum(int(one["omem"]) for one in redis.client_list()))
            grown = redis.info("memory")["used_memory"] - before
            connections = sum(map(len, links(redis, _READER)))
            figures.operations += count
            figures.notes.append(
                f"{mode}: {count} writes beside {processes} idle processes of {connections} "
                f"connections, {most} bytes of messages at most, {grown} bytes more at last"
            )
            if most > _KEPT or grown > _KEPT:
                figures.problems.append(f"{mode}: the server kept {most} bytes, {grown} at last")
            for sleeper in sleepers:
                out, _ = sleeper.communicate("go on\n", timeout=_PATIENCE)
                told = json.loads(out)
                figures.outcomes["invalidations"] += told["invalidations"]
                # Whoever sleeps hears of the changes meanwhile, and reads the last at once.
                if told["last"] != count - 1 or told["invalidations"] < _RECORDS:
                    figures.problems.append(f"{mode}: a process that slept tells {told}")
        finally:
            for sleeper in sleepers:
                sleeper.kill()
                sleeper.communicate()
