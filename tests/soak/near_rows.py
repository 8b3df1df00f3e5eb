"""The soak row of the near cache: eight processes write, and no read returns an outdated record.

Each name has one writer, which publishes in shared memory what it has issued and what was
acknowledged. A read may return nothing older than acknowledged before it, except for changes that
the connection and the event loop had not delivered yet. A probe measures that delay: a command to
the server over the connection that also carries the invalidations. Its reply follows the
invalidations of everything acknowledged before the probe was sent. So the first rule is exact and
has no tolerance:

    Once a probe is answered, no read returns what was outdated when the probe was sent.

The second rule limits what a user sees: for how long a returned record had been outdated.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import redis as redis_py

import dscache
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.soak.figures import Figures
from tests.support.faults import ProxyProcess

WRITERS = 8
NAMES = 2000
ZIPF = 0.99
# Every n-th step removes a record instead of writing it.
REMOVAL = 7
# For how many seconds a user may see outdated records, apart from delays of connection and loop.
LAG = 0.050
IDLE_LIMIT = 0.5
COMMAND_TIMEOUT = 5.0
_TASKS = 32
_PICKS = 128_000
# A hit doesn't yield to the event loop, so a task does after this many.
_BURST = 50
_RING = 64
_EXAMPLES = 10
# During the first ones everything starts at once.
_COLD_PROBES = 100
_READER = "near-reader"


def names_of(count: int) -> list[str]:
    """Return the names that are written and read, the most popular ones first."""
    return [f"near/{number}" for number in range(count)]


def popular(count: int, size: int, chance: random.Random) -> list[int]:
    """Return numbers of names, distributed by Zipf's law."""
    weights = [1 / rank**ZIPF for rank in range(1, count + 1)]
    return chance.choices(range(count), weights, k=size)


class Board:
    """What the writers publish, in a file that all processes have mapped.

    For each name the last step ``issued`` and ``acked``, the step at which everything was ``gone``,
    and when its last steps were acknowledged (``times``). ``writes`` counts those of each writer.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.count = count
        parts = (4, WRITERS + 1, WRITERS, count, count, count, count * _RING)
        with path.open("a+b") as file:
            file.truncate(8 * sum(parts))
            self._map = mmap.mmap(file.fileno(), 0)
        whole = memoryview(self._map).cast("q")
        views = []
        for part in parts:
            views.append(whole[:part])
            whole = whole[part:]
        self._flags, self.paused, self.writes, self.issued, self.acked, self.gone, self.times = (
            views
        )

    @property
    def is_over(self) -> bool:
        """Whether the writers are to end."""
        return bool(self._flags[0])

    @property
    def may_end(self) -> bool:
        """Whether the readers of other processes may end, once they have read enough."""
        return bool(self._flags[2])

    def let_end(self) -> None:
        self._flags[2] = 1

    @property
    def pause(self) -> int:
        """The number of the current pause; 0 for none."""
        return self._flags[1]

    @pause.setter
    def pause(self, number: int) -> None:
        self._flags[1] = number

    def end(self) -> None:
        self._flags[0] = 1

    def acknowledge(self, index: int, step: int) -> None:
        """Publish that a step was acknowledged just now."""
        self.times[index * _RING + step % _RING] = time.monotonic_ns()
        self.acked[index] = step

    def was_outdated_at(self, index: int, step: int) -> int | None:
        """Return when the step after this one was acknowledged, if that is still known."""
        if self.acked[index] - step >= _RING:
            return None
        return self.times[index * _RING + (step + 1) % _RING]

    def may_be_gone(self, index: int, floor: int) -> bool:
        """Whether the record may be missing when this step was the last known one."""
        issued = self.issued[index]
        removal = -(-floor // REMOVAL) * REMOVAL
        return removal <= issued or floor <= self.gone[index] <= issued


# -- a writing process


def write(host: str, port: int, path: str, number: int, pause: float) -> None:
    """Write the names of one writer until stopped; Redis acknowledges each step."""
    names = names_of(NAMES)
    board = Board(Path(path), NAMES)
    chance = random.Random(number)
    own = [index for index in popular(NAMES, _PICKS, chance) if owner_of(index) == number]
    with redis_py.Redis(host, port) as client:
        turn = 0
        while not board.is_over:
            if board.pause:
                board.paused[number] = board.pause
                time.sleep(0.0005)
                continue
            index = own[turn % len(own)]
            turn += 1
            step = board.issued[index] + 1
            board.issued[index] = step
            _take_step(client, names[index], step)
            board.acknowledge(index, step)
            board.writes[number] += 1
            time.sleep(pause * chance.uniform(0.5, 1.5))


def owner_of(index: int) -> int:
    """Return the writer of a name: one of the writers, or with WRITERS the reader itself."""
    return index % (WRITERS + 1)


def text_of(name: str, step: int) -> str:
    """Return the data of a step."""
    return f'["{name}",{step},"{"x" * (step % 100)}"]'


def _take_step(client: redis_py.Redis, name: str, step: int) -> None:
    version, data = f"{name}_v", f"{name}_d"
    if step % REMOVAL:
        pairs = {version: str(step), data: text_of(name, step)}
        if step % 3:
            client.mset(pairs)
        else:
            with client.pipeline(transaction=True) as both:
                both.set(data, pairs[data], ex=1000).set(version, step, ex=1000).execute()
    elif step % 2:
        client.delete(version, data)
    else:
        client.pexpire(version, 1)
        # Redis deletes an expired record when it is accessed, if not before.
        while client.exists(version):
            time.sleep(0.0002)


# -- the reader


class Reader:
    """Reads of popular names through a near cache, and the answers each of them allows."""

    def __init__(self, figures: Figures, cache: dscache.AsyncCache, board: Board) -> None:
        self.reads = 0
        self.stop = False
        self.is_disturbed = False
        self.probes = 0
        self.late = 0.0
        """How long a probe has taken at most, as long as all was well: the link and the loop."""
        self._figures = figures
        self._cache = cache
        self._board = board
        self._names = names_of(board.count)
        self._picks = popular(board.count, _PICKS, random.Random(1))
        # For each name, the step acknowledged when the last answered probe was sent.
        self._floor = array("q", bytes(8 * board.count))
        # The cache's own writes count from the moment they were issued.
        self._own = array("q", bytes(8 * board.count))
        self._doubtful: set[int] = set()
        # For how many ns an outdated record was served: while all is well, and otherwise.
        self.stale = array("q")
        self.stale_in_trouble = array("q")

    # -- tasks

    async def read(self, at: int) -> None:
        """Read, from some position in the picks, until stopped."""
        picks = self._picks
        names, board, get = self._names, self._board, self._cache.get
        acked, own, now = board.acked, self._own, time.monotonic_ns
        while not self.stop:
            done = 0
            for index in picks[at : at + _BURST]:
                floor, known = max(self._floor[index], own[index]), acked[index]
                began = now()
                try:
                    record = await get(names[index])
                except dscache.DscacheError as error:
                    self._figures.outcomes[type(error).__name__] += 1
                    continue
                done += 1
                if record is None:
                    if not board.may_be_gone(index, floor):
                        self._wrong(index, "none", floor)
                    continue
                step = record.version
                if step < floor or step % REMOVAL == 0 or step > board.issued[index]:
                    self._wrong(index, str(step), floor)
                if step < known:
                    self._outdated(index, step, began)
                if step % 16 == 0 and record.data[:2] != [names[index], step]:
                    self._wrong(index, repr(record), floor)
            at = (at + _BURST) % len(picks)
            self.reads += done
            self._figures.outcomes["ok"] += done
            await asyncio.sleep(0)

    async def probe(self) -> None:
        """Send a command to the server repeatedly: its reply follows all earlier invalidations."""
        loop = asyncio.get_running_loop()
        while not self.stop:
            floor = array("q", self._board.acked.tobytes())
            began = loop.time()
            is_disturbed = self.is_disturbed
            try:
                await self._cache.head("nobody has read this")
            except dscache.DscacheError:
                continue
            is_disturbed = is_disturbed or self.is_disturbed or self.probes < _COLD_PROBES
            if not is_disturbed:
                self.late = max(self.late, loop.time() - began)
            self._floor = floor
            self.probes += 1
            await asyncio.sleep(0.001)

    async def write(self, pause: float) -> None:
        """Write own names, and read them before the reply and after it."""
        chance = random.Random(0)
        board = self._board
        own = [
            index for index in popular(board.count, 50_000, chance) if owner_of(index) == WRITERS
        ]
        turn = 0
        while not self.stop:
            index = own[turn % len(own)]
            turn += 1
            if not board.pause and index not in self._doubtful:
                await self._write_one(index)
            await asyncio.sleep(pause * chance.uniform(0.5, 1.5))

    async def _write_one(self, index: int) -> None:
        board, name = self._board, self._names[index]
        step = board.issued[index] + 1
        board.issued[index] = step
        removal = step % REMOVAL == 0
        if removal:
            issued: Awaitable[bool] = self._cache.delete(name)
        else:
            data = [name, step, "x" * (step % 100)]
            issued = self._cache.set(name, step, data, if_newer=True)
        before, self._own[index] = self._own[index], step
        reading = asyncio.ensure_future(self._cache.get(name))
        try:
            written = await issued
        except dscache.DscacheError:
            # It may still happen at any time; from now on nothing about this name is certain.
            self._doubtful.add(index)
            self._own[index] = before
            await asyncio.wait([reading])
            reading.exception()
            return
        board.acknowledge(index, step)
        board.writes[0] += 1
        if not written and not removal:
            self._wrong(index, "not written", step)
        try:
            record = await reading
        except dscache.DscacheError:
            return
        if (record is None) != removal or (record is not None and record.version != step):
            self._wrong(index, f"own step {step} and then {record!r}", step)

    # -- checks

    def _outdated(self, index: int, step: int, began: int) -> None:
        since = self._board.was_outdated_at(index, step)
        if since is not None:
            times = self.stale_in_trouble if self.is_disturbed else self.stale
            times.append(began - since)

    def _wrong(self, index: int, found: str, floor: int) -> None:
        if index in self._doubtful:
            return
        if len(self._figures.problems) < _EXAMPLES:
            issued, gone = self._board.issued[index], self._board.gone[index]
            self._figures.problems.append(
                f"{self._names[index]}: read {found}, {floor} to {issued} was possible, gone {gone}"
            )


# -- faults


class Faults:
    """Faults of the reader's connection and of the records, one after the other."""

    def __init__(
        self, reader: Reader, board: Board, proxy: ProxyProcess, admin: redis_py.Redis
    ) -> None:
        self.done: dict[str, int] = {}
        self._reader = reader
        self._board = board
        self._proxy = proxy
        self._admin = admin
        self._pauses = 0
        self._kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "flush": self._flush,
            "kill": self._kill,
            "stall": lambda: self._stall(random.uniform(0.02, 0.4 * IDLE_LIMIT)),
            "deaf": lambda: self._stall(random.uniform(1.5, 3) * IDLE_LIMIT),
        }

    async def work(self, pause: float) -> None:
        """Cause them all repeatedly, with time to recover in between."""
        while True:
            for kind in random.sample(list(self._kinds), len(self._kinds)):
                await asyncio.sleep(pause)
                await self._kinds[kind]()
                self.done[kind] = self.done.get(kind, 0) + 1

    @property
    def is_complete(self) -> bool:
        """Whether every fault has happened at least once."""
        return self.done.keys() == self._kinds.keys()

    async def _flush(self) -> None:
        """Remove everything while no process writes."""
        board = self._board
        self._pauses += 1
        board.pause = self._pauses
        while any(board.paused[number] != self._pauses for number in range(WRITERS)):
            await asyncio.sleep(0.001)
        while any(
            board.issued[index] != board.acked[index]
            for index in range(board.count)
            if owner_of(index) == WRITERS and index not in self._reader._doubtful
        ):
            await asyncio.sleep(0.001)
        steps = [step + 1 for step in board.issued]
        for index, step in enumerate(steps):
            board.gone[index] = board.issued[index] = step
        await asyncio.to_thread(self._admin.flushall)
        for index, step in enumerate(steps):
            board.acknowledge(index, step)
        board.pause = 0

    async def _kill(self) -> None:
        self._reader.is_disturbed = True
        for client in await asyncio.to_thread(self._admin.client_list):
            if client["name"] == _READER:
                await asyncio.to_thread(self._admin.client_kill_filter, _id=client["id"])
        await self._settle()

    async def _stall(self, seconds: float) -> None:
        self._reader.is_disturbed = True
        await self._proxy.do("stall", "replies")
        await asyncio.sleep(seconds)
        await self._proxy.do("resume")
        await self._settle()

    async def _settle(self) -> None:
        """Wait until delayed data has arrived."""
        probes = self._reader.probes
        while self._reader.probes < probes + 2:
            await asyncio.sleep(0.001)
        self._reader.is_disturbed = False


async def near(
    figures: Figures,
    binary: ServerBinary,
    *,
    reads: int = 10_000_000,
    write_pause: float = 0.02,
    mischief_pause: float = 2.0,
) -> None:
    """Read popular records through a near cache, while others write and the connection suffers."""
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(binary) as server:
        path = Path(folder, "board")
        board = Board(path, NAMES)
        writers = start_writers(server, path, write_pause)
        try:
            async with ProxyProcess(server.host, server.port) as proxy:
                await _read(figures, server, proxy, board, reads, write_pause, mischief_pause)
        finally:
            board.end()
            for writer in writers:
                if await asyncio.to_thread(writer.wait, 30):
                    figures.problems.append(f"a writer ended with {writer.returncode}")
        figures.notes.append(f"{sum(board.writes)} writes")


def start_writers(
    server: EmbeddedServer, path: Path, pause: float
) -> list[subprocess.Popen[bytes]]:
    """Start the process whose children write the names of the writers until the board's end."""
    where = (server.host, str(server.port), str(path))
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.soak.near_rows", *where, str(pause)],
            cwd=Path(__file__).parents[2],
        )
    ]


def write_in_children(host: str, port: int, path: str, pause: float) -> bool:
    """Write the names of all writers, each in a process of its own; return whether all ended well.

    Eight interpreters would take longer to start than a short row runs.
    """
    children = []
    for number in range(WRITERS):
        child = os.fork()
        if not child:
            write(host, port, path, number, pause)
            os._exit(0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return not any(statuses)


async def _read(
    figures: Figures,
    server: EmbeddedServer,
    proxy: ProxyProcess,
    board: Board,
    reads: int,
    write_pause: float,
    mischief_pause: float,
) -> None:
    options = {
        "host": proxy.host,
        "port": proxy.port,
        "connectionName": _READER,
        "commandTimeout": round(COMMAND_TIMEOUT * 1000),
        "nearCache": {"idleLimit": round(IDLE_LIMIT * 1000), "maxRecords": NAMES // 2},
    }
    with redis_py.Redis(server.host, server.port) as admin:
        config = {"name": "redis", "options": options}
        async with dscache.AsyncCache.from_config(config) as cache:
            reader = Reader(figures, cache, board)
            await cache.when_ready()
            faults = Faults(reader, board, proxy, admin)
            starts = range(0, _PICKS, _PICKS // _TASKS)
            tasks = [asyncio.create_task(reader.read(at)) for at in starts]
            tasks += [asyncio.create_task(reader.probe())]
            tasks += [asyncio.create_task(reader.write(write_pause))]
            working = asyncio.create_task(faults.work(mischief_pause))
            began = time.monotonic()
            while reader.reads < reads or not faults.is_complete:
                ended = [task for task in (*tasks, working) if task.done()]
                for task in ended:
                    task.result()
                await asyncio.sleep(0.02)
            seconds = time.monotonic() - began
            working.cancel()
            await asyncio.wait([working])
            board.pause = 0
            await proxy.do("resume")
            reader.stop = True
            await asyncio.gather(*tasks)
            figures.operations = reader.reads
            counts = cache.stats()["near_cache"]
            figures.drained(cache)
    _tell(figures, reader, faults, counts, seconds)


def _tell(
    figures: Figures, reader: Reader, faults: Faults, counts: dict[str, Any], seconds: float
) -> None:
    served = counts["hits"] / max(1, counts["hits"] + counts["misses"] + counts["joins"])
    figures.notes.append(f"{reader.reads / seconds:.0f} reads/s, {served:.2%} hits")
    figures.notes.append(
        f"{counts['joins']} joins, {counts['invalidations']} invalidations, "
        f"{counts['dropped_fills']} dropped fills, flushes {counts['flushes']}"
    )
    figures.notes.append(", ".join(f"{count} x {kind}" for kind, count in faults.done.items()))
    ordered = sorted(reader.stale)
    longest = ordered[-1] / 1e9 if ordered else 0.0
    # Of all reads: a current record counts as outdated for no time at all.
    rank = len(ordered) - max(1, reader.reads // 1000)
    usual = ordered[rank] / 1e9 if rank >= 0 else 0.0
    of_those = ordered[len(ordered) * 999 // 1000] / 1e9 if ordered else 0.0
    in_trouble = max(reader.stale_in_trouble, default=0) / 1e9
    figures.notes.append(
        f"outdated: {len(ordered)} reads, for up to {longest * 1000:.1f} ms, 99.9 % of them up to "
        f"{of_those * 1000:.1f} ms, 99.9 % of all reads up to {usual * 1000:.1f} ms; while the "
        f"link suffered {len(reader.stale_in_trouble)}, for up to {in_trouble * 1000:.0f} ms; "
        f"link and loop took up to {reader.late * 1000:.1f} ms"
    )
    if longest > LAG + reader.late:
        figures.slow.append(f"outdated for {longest * 1000:.0f} ms")
    if not counts["hits"] or not counts["invalidations"]:
        figures.problems.append(f"nothing was put to the test: {counts}")


if __name__ == "__main__":
    sys.exit(not write_in_children(sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])))
