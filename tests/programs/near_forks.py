"""Fork with a warm near cache: ``python -m tests.programs.near_forks SCENE WHERE COUNT``.

WHERE is a URL or options as JSON. Prints what happened as JSON. The scenes:

``generations``: a process forks a child, that one forks the next, COUNT times.
``threads``: a process forks COUNT children while its threads read.
``fork`` and ``spawn``: multiprocessing's pools of COUNT processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import Any

import redis as redis_py

import dscache
from tests.programs.forks import sockets
from tests.support.blocking import options_of, until
from tests.support.near_truth import Truth as Records
from tests.support.near_truth import counters, has_last, is_at_hand, putting, version_of

NAMES = [f"n/{number}" for number in range(5)]
# Nothing but messages ends what is kept.
NEAR = {"idleLimit": 600_000, "maxAge": 3_600_000}
# Seconds until a process counts as stuck.
PATIENCE = 100


def opened(where: str) -> dscache.Cache:
    options = options_of(where) | {"commandTimeout": 60_000, "nearCache": NEAR}
    return dscache.Cache.from_config({"name": "redis", "options": options})


def client(where: str) -> redis_py.Redis:
    return redis_py.Redis.from_url(options_of(where)["url"])


def native_threads() -> int:
    """Return how many threads the system knows of this process."""
    try:
        return len(os.listdir("/proc/self/task"))
    except FileNotFoundError:
        return threading.active_count()


def check(
    cache: dscache.Cache, where: str, version: int, inherited: set[Any], wrong: list[str], who: str
) -> None:
    """Use an inherited or own warm cache: right at once, kept, and told of changes."""
    with client(where) as redis:
        put = putting(redis)
        for name in NAMES:
            put(name, version)
        for name in NAMES:
            if (found := version_of(cache, name)) != version and inherited:
                wrong.append(f"{who}: {name} was {found} at once, not {version}")
        for name in NAMES:
            until(lambda name=name: version_of(cache, name) == version, f"{who}: {name}")
            until(lambda name=name: is_at_hand(cache, name), f"{who}: a hit of {name}")
        for name in NAMES:
            put(name, version + 1)
        for name in NAMES:
            until(lambda name=name: version_of(cache, name) == version + 1, f"{who}: a change")
            until(lambda name=name: is_at_hand(cache, name), f"{who}: a hit of {name}")
    if shared := len(sockets() & inherited):
        wrong.append(f"{who}: {shared} sockets are those of the parent")


def forked(work: Any) -> Any:
    """Return what a function returns in a forked child, or its error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(PATIENCE)
        os.close(reading)
        try:
            result = work()
        except BaseException as error:
            result = [repr(error)]
        os.write(writing, json.dumps(result).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        told = file.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(told) if told else [f"a child ended with {status}"]


def generations(cache: dscache.Cache, where: str, left: int, version: int = 1) -> list[str]:
    """Use a cache, fork, and use it again."""
    wrong: list[str] = []
    who = f"{left} generations before the last"
    is_first = version == 1
    at_first = native_threads(), threading.active_count()
    if not is_first and at_first != (1, 1):
        wrong.append(f"{who}: {at_first} threads in a child that has done nothing")
    inherited = set() if is_first else sockets()
    check(cache, where, version, inherited, wrong, who)
    if left:
        wrong += forked(lambda: generations(cache, where, left - 1, version + 10))
    # Fork and child change nothing here.
    hits = [name for name in NAMES if version_of(cache, name) is not None]
    if hits != NAMES:
        wrong.append(f"{who}: only {hits} are left after the fork")
    check(cache, where, version + 1000, set(), wrong, f"{who}, after its child")
    before = sockets()
    cache.close()
    until(lambda: native_threads() == 1, f"{who}: the end of the threads of a closed cache")
    if threading.active_count() != 1:
        wrong.append(f"{who}: {threading.enumerate()} are left")
    # At least one of a thread and one that hears of changes.
    if len(before) - len(sockets()) < 2:
        wrong.append(f"{who}: {len(sockets())} sockets are left of {len(before)}")
    return wrong


def beside_threads(cache: dscache.Cache, where: str, count: int) -> list[str]:
    """Fork while threads hit, miss and write, in whatever they are."""
    wrong: list[str] = []
    over = threading.Event()

    def work(number: int) -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            try:
                cache.get(NAMES[turn % 5])
                cache.get_bulk([f"miss/{number}/{turn}", *NAMES])
                if turn % 7 == 0:
                    cache.set(f"own/{number}", turn, turn)
            except dscache.DscacheError as error:
                wrong.append(f"thread {number}: {error!r}")
                return

    def child(number: int) -> list[str]:
        found: list[str] = []
        check(cache, where, 10 * number + 10, sockets(), found, f"child {number}")
        cache.close()
        return found

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for number in range(count):
        wrong += forked(lambda number=number: child(number))
        time.sleep(0.003)
    over.set()
    for thread in threads:
        thread.join()
    check(cache, where, 10 * count + 10, set(), wrong, "the parent")
    cache.close()
    return wrong


# -- multiprocessing

shared: dscache.Cache | None = None
place = ""


def begin(where: str) -> None:
    """Begin a process of a pool: a forked one has the cache of its parent."""
    global shared, place
    place = where
    if shared is None:
        shared = opened(where)


def task(version: int) -> list[str]:
    wrong: list[str] = []
    assert shared is not None
    name = f"task/{version}"
    truth = Records([name], 60.0)
    with client(place) as redis:
        for _ in range(3):
            truth.write(putting(redis))
            until(lambda: has_last(shared, truth, name), "the last step")
            until(lambda: is_at_hand(shared, name), "a hit")
    return wrong


def pool(where: str, method: str, count: int) -> list[str]:
    global shared
    wrong: list[str] = []
    if method == "fork":
        shared = opened(where)
        check(shared, where, 1, set(), wrong, "the parent")
    context = multiprocessing.get_context(method)
    with context.Pool(count, begin, (where,)) as workers:
        for told in workers.map_async(task, range(3 * count)).get(PATIENCE):
            wrong += told
        workers.close()
        workers.join()
    one = context.Process(target=use_and_end, args=(where,))
    one.start()
    one.join(PATIENCE)
    if one.exitcode != 0:
        wrong.append(f"a process that ends without close ended with {one.exitcode}")
    if shared is not None:
        check(shared, where, 100, set(), wrong, "the parent at last")
        shared.close()
    return wrong


def use_and_end(where: str) -> None:
    begin(where)
    assert shared is not None
    shared.get("n/0")
    shared.get("n/0")


def main(scene: str, where: str, count: int) -> dict[str, Any]:
    if scene in ("fork", "spawn"):
        return {"wrong": pool(where, scene, count)}
    cache = opened(where)
    if scene == "generations":
        return {"wrong": generations(cache, where, count)}
    check(cache, where, 1, set(), [], "at first")
    hits = counters(cache)["hits"]
    return {"wrong": beside_threads(cache, where, count) if hits else ["no hits"]}


if __name__ == "__main__":
    signal.alarm(3 * PATIENCE)
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
