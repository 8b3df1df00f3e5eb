"""Read popular records in threads, through the near cache of a blocking cache.

``python -m tests.programs.near_threads WHERE`` is started by a soak row; WHERE is JSON. The
processes share a ``tests.soak.near_rows.Board`` with the writers, and print what they found as
JSON.

Each read is held against four rules:

1. A thread that has read a step of a record never reads an earlier one.
2. Once a write of this process has returned, no thread reads an earlier step.
3. Once a probe is seen, no read returns what was outdated when the probe was sent. A probe is a
   record that another client writes and this cache keeps: Redis tells of changes in their order, so
   that all earlier ones were heard of before it.
4. No read returns what was outdated for longer than ``bound`` seconds.

The third rule holds while no link is disturbed.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from array import array
from collections import Counter, deque
from pathlib import Path
from typing import Any

import redis as redis_py

import dscache
from tests.soak.near_rows import (
    REMOVAL,
    WRITERS,
    Board,
    names_of,
    owner_of,
    popular,
)
from tests.support.near_truth import counters, open_cache

_PICKS = 64_000
_EXAMPLES = 5
# Heads, bulks and checks of the data: every so many reads.
_HEAD, _BULK, _DATA = 13, 31, 16
_BULK_SIZE = 4


class Process:
    """The threads of a process and what they share."""

    def __init__(self, where: dict[str, Any]) -> None:
        self._where = where
        self._board = board = Board(Path(where["board"]), where["names"])
        self._names = names_of(board.count)
        self._bound = int(where["bound"] * 1e9)
        self._is_disturbed = where["disturbed"]
        # For each name, what was acknowledged when the last answered probe was sent, and what a
        # write of this process that has returned.
        self._floor = array("q", bytes(8 * board.count))
        self._own = array("q", bytes(8 * board.count))
        self._stop = threading.Event()
        self._ends = False
        self.problems: list[str] = []
        self.outcomes: Counter[str] = Counter()
        self.reads = [0] * where["threads"]
        self.stale: list[array[int]] = [array("q") for _ in range(where["threads"])]
        self.probes = self.vain_probes = 0
        self.late = 0.0
        self._cache = open_cache(where["options"], where["near"])
        self._cache.when_ready()

    def run(self) -> dict[str, Any]:
        where = self._where
        self._await_a_hit()
        readers = [
            threading.Thread(target=self._guard, args=(self._read, number))
            for number in range(where["threads"])
        ]
        others = []
        if not self._is_disturbed:
            others.append(threading.Thread(target=self._guard, args=(self._probe,)))
        if where["writes"]:
            others.append(threading.Thread(target=self._guard, args=(self._write,)))
        began = time.monotonic()
        for thread in (*readers, *others):
            thread.start()
        for thread in readers:
            thread.join()
        seconds = time.monotonic() - began
        self._stop.set()
        for thread in others:
            thread.join()
        counts = counters(self._cache)
        self._cache.close()
        stats = self._cache.stats()
        left = {name: stats[name] for name in ("pending", "in_flight", "queued") if stats[name]}
        if left:
            self._note(f"not drained: {left}")
        ordered = sorted(one for each in self.stale for one in each)
        return {
            "reads": sum(self.reads),
            "seconds": seconds,
            "problems": self.problems,
            "outcomes": self.outcomes,
            "near": counts,
            "probes": self.probes,
            "vain_probes": self.vain_probes,
            "late": self.late,
            "outdated": len(ordered),
            "longest": ordered[-1] / 1e9 if ordered else 0.0,
            "usual": ordered[len(ordered) * 999 // 1000] / 1e9 if ordered else 0.0,
        }

    def _await_a_hit(self) -> None:
        """Read until the near cache serves: on a busy machine it begins long after the connection.

        The readers would be done by then, without a hit.
        """
        deadline = time.monotonic() + 60
        while not counters(self._cache)["hits"]:
            for name in self._names[:100]:
                self._cache.get(name)
            if time.monotonic() > deadline:
                self._note("no hit within 60 s")
                return

    def end(self) -> None:
        """Have the readers of this process end, once they have read enough."""
        self._ends = True

    def _guard(self, work: Any, *arguments: int) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            self._note(f"a thread ended with {error!r}")
            raise

    # -- readers

    def _read(self, number: int) -> None:
        """Read until enough was read and every fault has happened."""
        board, cache, names = self._board, self._cache, self._names
        picks = popular(board.count, _PICKS, random.Random(f"{self._where['seed']} {number}"))
        least = self._where["reads"] // self._where["threads"]
        floors = array("q", bytes(8 * board.count))
        stale, floor, own, acked = self.stale[number], self._floor, self._own, board.acked
        now = time.monotonic_ns
        done = at = 0
        while done < least or not (board.may_end or self._ends):
            at = (at + 1) % (_PICKS - _BULK_SIZE)
            some = picks[at : at + (_BULK_SIZE if at % _BULK == 0 else 1)]
            lowest = [max(floors[i], floor[i], own[i]) for i in some]
            known = [acked[i] for i in some]
            began = now()
            try:
                if at % _BULK == 0:
                    bulk = cache.get_bulk([names[i] for i in some])
                    found = [bulk.get(names[i]) for i in some]
                elif at % _HEAD == 0:
                    found = [cache.head(names[some[0]])]
                else:
                    found = [cache.get(names[some[0]])]
            except dscache.DscacheError as error:
                self.outcomes[type(error).__name__] += 1
                continue
            done += len(some)
            self.reads[number] = done
            for index, value, least_step, acknowledged in zip(
                some, found, lowest, known, strict=True
            ):
                if value is None:
                    floors[index] = self._missing(index, least_step)
                    continue
                step = value if type(value) is int else value.version
                if step < least_step or step % REMOVAL == 0 or step > board.issued[index]:
                    self._wrong(number, index, str(step), (floors[index], floor[index], own[index]))
                floors[index] = max(step, floors[index])
                if step < acknowledged:
                    since = board.was_outdated_at(index, step)
                    if since is not None:
                        stale.append(began - since)
                        if began - since > self._bound:
                            self._note(
                                f"{names[index]}: step {step} was outdated for "
                                f"{(began - since) / 1e9:.3f} s"
                            )
                is_checked = done % _DATA == 0 and type(value) is not int
                if is_checked and value.data[:2] != [names[index], step]:
                    self._wrong(number, index, repr(value), (0, 0, 0))
        self.outcomes["ok"] += done

    def _missing(self, index: int, least: int) -> int:
        """Return the step after which a thread may not go back that has read of no record."""
        board = self._board
        if not board.may_be_gone(index, least):
            self._wrong(-1, index, "none", (least, 0, 0))
            return least
        # What was removed by a flush can't be told from what was removed before.
        return least if board.gone[index] >= least else -(-least // REMOVAL) * REMOVAL

    # -- others

    def _probe(self) -> None:
        """Write probes as another client, and read them until they are seen."""
        board, name = self._board, f"near/probe {self._where['seed']}"
        pool = redis_py.ConnectionPool(host=self._where["host"], port=self._where["port"])
        connection = pool.get_connection()
        number = 0
        # In broadcast mode one message may name many keys, and the next one follows it.
        waiting: deque[array[int]] = deque()
        near = self._where["near"]
        behind = 1 if "mode" in near and near["mode"] == "broadcast" else 0
        data = "[]"
        connection.send_command("MSET", f"{name}_v", 0, f"{name}_d", data)
        connection.read_response()
        while not self._stop.is_set():
            self._cache.get(name)
            waiting.append(array("q", board.acked.tobytes()))
            number += 1
            began = time.monotonic()
            connection.send_command("SET", f"{name}_v", number)
            # Seen to be kept after the floor was taken, and before Redis told of the change.
            is_kept = self._version(name) == number - 1
            connection.read_response()
            while self._version(name) != number and not self._stop.is_set():
                is_kept = True
                time.sleep(0)
            if not is_kept:
                self.vain_probes += 1
                waiting.clear()
                continue
            self.probes += 1
            self.late = max(self.late, time.monotonic() - began)
            if len(waiting) > behind:
                self._floor = waiting.popleft()
            self._stop.wait(0.002)
        pool.release(connection)
        pool.disconnect()

    def _version(self, name: str) -> int:
        record = self._cache.get(name)
        return -1 if record is None else int(record.version)

    def _write(self) -> None:
        """Write own names; once a write has returned, nobody reads what was before."""
        board, cache = self._board, self._cache
        chance = random.Random(0)
        own = [
            index for index in popular(board.count, 50_000, chance) if owner_of(index) == WRITERS
        ]
        turn = 0
        while not self._stop.is_set():
            index = own[turn % len(own)]
            name = self._names[index]
            turn += 1
            if board.pause:
                board.paused[WRITERS] = board.pause
            else:
                step = board.issued[index] + 1
                board.issued[index] = step
                self._write_one(name, index, step)
                self._own[index] = step
                board.acknowledge(index, step)
                record = cache.get(name) if not self._is_disturbed else None
                if not self._is_disturbed and (
                    (record is None) != (step % REMOVAL == 0)
                    or (record is not None and record.version != step)
                ):
                    self._note(f"{name}: own step {step}, and then {record!r}")
            time.sleep(self._where["pause"] * chance.uniform(0.5, 1.5))

    def _write_one(self, name: str, index: int, step: int) -> None:
        is_certain = True
        while True:
            try:
                if step % REMOVAL == 0:
                    self._cache.delete(name)
                    return
                data = [name, step, "x" * (step % 100)]
                written = self._cache.set(name, step, data, if_newer=True)
            except dscache.DscacheError as error:
                # Neither step can happen twice.
                is_certain = False
                self.outcomes[type(error).__name__] += 1
                continue
            if is_certain and not written:
                self._wrong(-1, index, "not written", (step, 0, 0))
            return

    def _wrong(self, number: int, index: int, found: str, floors: tuple[int, int, int]) -> None:
        read, probed, own = floors
        board = self._board
        self._note(
            f"{self._names[index]}, thread {number}: read {found}; steps {read} read, {probed} "
            f"probed, {own} written here; issued {board.issued[index]}, gone {board.gone[index]}"
        )

    def _note(self, problem: str) -> None:
        if len(self.problems) < _EXAMPLES:
            self.problems.append(problem)
            print(problem, file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(json.dumps(Process(json.loads(sys.argv[1])).run()))
