"""What a near cache of threads may return: records, their writers' acknowledgements, and readers.

Each record has a number of steps: its versions, and the steps at which it was removed. A step is
acknowledged at a time. A read may return a step only for a limited time after the next one was
acknowledged, and a thread that has read a step may never read an earlier one.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import redis as redis_py

import dscache
from tests.support.blocking import until

if TYPE_CHECKING:
    from tests.support.clusters import ClusterGroup

EXAMPLES = 10
# Reads by head and by get_bulk: every so many.
_HEAD = 5
_BULK = 11

Put = Callable[[str, int], object]


class Truth:
    """The steps of some records, of which the first is that there is no record.

    ``bound`` is for how many seconds a step may be returned after the next one was acknowledged.
    """

    def __init__(self, names: Iterable[str], bound: float) -> None:
        self.names = list(names)
        self.bound = bound
        self.issued = dict.fromkeys(self.names, 0)
        self._acknowledged = {name: [0.0] for name in self.names}
        self._gone = {name: [0] for name in self.names}

    def begin(self, name: str, *, gone: bool = False) -> int:
        """Return the next step of a record: a version, or its removal."""
        step = self.issued[name] + 1
        if gone:
            self._gone[name].append(step)
        self.issued[name] = step
        return step

    def done(self, name: str) -> None:
        """Record that the server acknowledged the last step just now."""
        self._acknowledged[name].append(time.monotonic())

    def write(self, put: Put, *names: str) -> None:
        """Write the next step of these records, by default of all."""
        for name in names or self.names:
            put(name, self.begin(name))
            self.done(name)

    def remove(self, act: Callable[[], object], *names: str) -> None:
        """Remove these records, by default all, with one call."""
        for name in names or self.names:
            self.begin(name, gone=True)
        act()
        for name in names or self.names:
            self.done(name)

    def is_last(self, name: str, version: int | None) -> bool:
        """Whether a record is that of the last step."""
        last = self.issued[name]
        return version == (None if last in self._gone[name] else last)

    def check(self, name: str, version: int | None, began: float, floor: int) -> tuple[int, str]:
        """Return the step after which the next read may not go back, and what is wrong.

        ``floor`` is the step that the thread has read before, ``began`` when it began to read.
        """
        gone = self._gone[name]
        if version is None:
            step = gone[-1]
            if step < floor:
                return floor, f"{name}: a record was read at step {floor}, and none later"
            floor = next(one for one in gone if one >= floor)
        else:
            step = version
            if step in gone or step > self.issued[name]:
                return floor, f"{name}: version {version} was never written"
            if step < floor:
                return floor, f"{name}: step {step} was read after step {floor}"
            floor = step
        later = self._acknowledged[name][step + 1 : step + 2]
        if later and began - later[0] > self.bound:
            return floor, f"{name}: step {step} was outdated for {began - later[0]:.3f} s"
        return floor, ""


class Readers:
    """Threads that read records all the time, from ``with`` on until its end.

    ``wrong`` tells what no read may return, ``errors`` counts the reads that failed, and
    ``last_hit`` is when the last read began that asked no server.
    """

    def __init__(self, cache: Any, truth: Truth, count: int = 2, pause: float = 0.0005) -> None:
        self.wrong: list[str] = []
        self.errors: Counter[str] = Counter()
        self.reads = 0
        self._cache = cache
        self._truth = truth
        self._pause = pause
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in self._threads), "a read has no end"
        if error is None:
            assert not self.wrong, self.wrong

    def _work(self) -> None:
        floors = dict.fromkeys(self._truth.names, 0)
        names = self._truth.names
        number = 0
        while not self._stop.is_set():
            name = names[number % len(names)]
            number += 1
            began = time.monotonic()
            try:
                found = self._read(name, number)
            except dscache.DscacheError as error:
                self.errors[type(error).__name__] += 1
                self._stop.wait(0.01)
                continue
            except BaseException as error:
                self._note(repr(error))
                raise
            self.reads += 1
            for each, version in found.items():
                floors[each], wrong = self._truth.check(each, version, began, floors[each])
                if wrong:
                    self._note(wrong)
            if self._pause:
                time.sleep(self._pause)

    def _read(self, name: str, number: int) -> dict[str, int | None]:
        if number % _BULK == 0:
            bulk = self._cache.get_bulk(self._truth.names[:3])
            return {one: None if one not in bulk else bulk[one].version for one in bulk}
        if number % _HEAD == 0:
            return {name: self._cache.head(name)}
        record = self._cache.get(name)
        if record is not None and record.data != [name, record.version]:
            self._note(f"{name}: {record!r}")
        return {name: None if record is None else record.version}

    def _note(self, problem: str) -> None:
        if len(self.wrong) < EXAMPLES:
            self.wrong.append(problem)


class NaiveCache:
    """A near cache that asks the server once and hears of no change: every check must notice it."""

    def __init__(self, cache: dscache.Cache) -> None:
        self._cache = cache
        self._kept: dict[str, Any] = {}
        self._hits = self._misses = 0

    def get(self, name: str) -> Any:
        if name in self._kept:
            self._hits += 1
            return self._kept[name]
        self._misses += 1
        # The first answer stays, also if another thread's later one arrives behind a change.
        return self._kept.setdefault(name, self._cache.get(name))

    def head(self, name: str) -> int | None:
        record = self.get(name)
        return None if record is None else record.version

    def get_bulk(self, names: Iterable[str]) -> dict[str, Any]:
        found = {name: self.get(name) for name in names}
        return {name: record for name, record in found.items() if record is not None}

    def stats(self) -> dict[str, Any]:
        near = {"hits": self._hits, "misses": self._misses, "joins": 0, "invalidations": 0}
        return {**self._cache.stats(), "near_cache": {**near, "dropped_fills": 0, "flushes": {}}}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cache.close()


def open_cache(options: Mapping[str, Any], near: Mapping[str, Any] | str) -> Any:
    """Return a Cache with a near cache of these options; "naive" is a NaiveCache."""
    if near == "naive":
        return NaiveCache(dscache.Cache.from_config({"name": "redis", "options": dict(options)}))
    return dscache.Cache.from_config({"name": "redis", "options": {**options, "nearCache": near}})


@contextlib.contextmanager
def opened_caches(near: Any, **usual: Any) -> Iterator[Callable[..., dscache.Cache]]:
    """Give a function that opens caches with a near cache, and close them at the end.

    Its options are added to the ``usual`` ones; with None for ``near`` it has no near cache.
    """
    opened: list[dscache.Cache] = []

    def open_one(near: Any = near, **options: Any) -> dscache.Cache:
        chosen = {**usual, **options, **({} if near is None else {"nearCache": near})}
        if options.keys() & {"path", "sentinels"}:
            del chosen["url"]
        cache = dscache.Cache.from_config({"name": "redis", "options": chosen})
        opened.append(cache)
        return cache

    try:
        yield open_one
    finally:
        for cache in opened:
            cache.close()


def version_of(cache: Any, name: str = "a") -> int | None:
    """Return the version that a read gives."""
    record = cache.get(name)
    return None if record is None else int(record.version)


def counters(cache: Any) -> dict[str, Any]:
    """Return the counters of the near cache, also before its first use."""
    unused = dict.fromkeys(("hits", "misses", "joins"), 0)
    found: dict[str, Any] = cache.stats().get("near_cache", unused)
    return found


def is_at_hand(cache: Any, name: str) -> bool:
    """Read a record; return whether that was certainly a hit, whatever other threads read."""
    before = counters(cache)
    cache.get(name)
    after = counters(cache)
    return bool(
        after["hits"] > before["hits"]
        and all(after[what] == before[what] for what in ("misses", "joins"))
    )


def assert_serves(cache: Any, truth: Truth, put: Put, *names: str) -> None:
    """Assert that changes arrive, and that records are kept meanwhile: two times for each."""
    for name in names or truth.names:
        for _ in range(2):
            truth.write(put, name)
            until(lambda n=name: has_last(cache, truth, n), f"the last step of {name}")
            until(lambda n=name: is_at_hand(cache, n), f"a hit of {name}")


def has_last(cache: Any, truth: Truth, name: str) -> bool:
    """Whether a read gives the last step; one that fails doesn't."""
    try:
        return truth.is_last(name, version_of(cache, name))
    except dscache.DscacheError:
        return False


def putting(redis: redis_py.Redis) -> Put:
    """Return a function that writes a version of a record, as another client."""

    def put(name: str, version: int) -> None:
        redis.mset({f"{name}_v": version, f"{name}_d": json.dumps([name, version])})

    return put


def putting_on(group: ClusterGroup) -> Put:
    """Return a function that writes a version of a record on the owner of its slot."""

    def put(name: str, version: int) -> None:
        data = json.dumps([name, version])
        key = f"{{{name}}}"
        group.owner(f"{key}_v").ask("MSET", f"{key}_v", version, f"{key}_d", data)

    return put


RIGHTS = ("ACL", "SETUSER", "reader", "reset", "on", ">secret", "~*", "&*", "+@all")
"""The command that gives ``reader`` every right."""
RIGHTS_LOST = (
    *("SETUSER reader reset", "SETUSER reader off", "SETUSER reader -@all"),
    *("SETUSER reader -client|tracking", "SETUSER reader resetkeys"),
    *("SETUSER reader resetpass >another", "DELUSER reader"),
)


def write_without_rights(
    redis: redis_py.Redis, truth: Truth, name: str, change: str, seconds: float
) -> None:
    """Take rights from ``reader``, whose connections have a name; write; give the rights back."""
    redis.execute_command("ACL", *change.split())
    if "tracking" in change:  # which matters to the next link only
        for client in links(redis, name)[0]:
            redis.client_kill_filter(_id=client["id"])
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        truth.write(putting(redis))
        time.sleep(0.01)
    redis.execute_command(*RIGHTS)


def links(redis: redis_py.Redis, name: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the connections of a ``connectionName``: those that hear of changes, and the others.

    A connection hears of changes if it is told of prefixes, if others redirect to it, or if it
    subscribes to the channel of invalidations.
    """
    clients = [one for one in redis.client_list() if one["name"] == name]
    targets = {one["redir"] for one in clients if int(one["redir"]) > 0}
    listening = [
        one
        for one in clients
        if one["id"] in targets
        or int(one["sub"])
        or ("B" in one["flags"] and int(one["redir"]) <= 0)
    ]
    return listening, [one for one in clients if one not in listening]


def port_of(client: dict[str, str]) -> int:
    """Return the port of a connection, as a server sees it."""
    return int(client["addr"].rpartition(":")[2])


def ports_of(process: int) -> set[int]:
    """Return the ports of a process's IPv4 sockets, as Linux tells them."""
    sockets = set()
    with contextlib.suppress(OSError):  # it may have ended
        for file in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(str(file.readlink()))
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {
        int(line[1].rpartition(":")[2], 16) for line in table if f"socket:[{line[9]}]" in sockets
    }
