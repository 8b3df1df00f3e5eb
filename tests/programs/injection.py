"""Raise an exception on every line that an operation executes, one after the other.

``python -m tests.programs.injection WHERE`` prints what it found as JSON. WHERE is a mapping as
JSON: the ``options`` that lead to a server or a cluster, the ``kind`` of user ("async", "blocking",
"messages", or "coroutines" for messages with a coroutine as callback), whether the loop is
``uvloop``'s, and whether ``every`` exception is raised on every line. If not, each exception in
turn is raised on one line of each ``step``, from the line ``offset`` on. ``part`` [I, N] strikes
only every Nth action, from the Ith on; all parts together strike the same lines as one run.
``DSCACHE_BACKEND`` names the core.

Each action, such as a read or a write, runs once to record its lines in dscache and in the parts of
asyncio that dscache calls. Then it runs once for each line, on which an exception is raised the
first time. Whatever the exception hits, each operation must end, 100 records must be those of their
owners, the counters must be zero, and the cache must work as before.

The event loop is entered again when an exception has ended it, as in a server that survives.
Asyncio's own scheduler is left alone: its losses there can't be detected.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import itertools
import json
import linecache
import logging
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, ClassVar

import redis as redis_py
import uvloop

import dscache
from dscache.messages import MessageNode
from tests.programs import sequences
from tests.programs.sequences import AsyncSequences, BlockingSequences

OWNERS = [f"owner/{i}" for i in range(100)]
COUNTERS = ("queued", "in_flight", "pending", "pending_bytes")
# Milliseconds: a stuck operation ends by its deadline.
TIMEOUT = 500
# Seconds until an operation counts as endless, or a cache as broken.
PATIENCE = 5.0
BIG = "x" * 300_000

_EXCEPTIONS: tuple[Callable[[], BaseException], ...] = (
    lambda: MemoryError("injected"),
    lambda: KeyboardInterrupt("injected"),
    lambda: RecursionError("injected"),
    lambda: dscache.RecordError("injected"),
)

# A place in the code: the file, the function, the line.
Site = tuple[str, str, int]
Call = Callable[[], Any]


_FOLDER = os.path.dirname(dscache.__file__) + os.sep


def _is_ours(name: str) -> bool:
    return name.startswith(_FOLDER)


def _may_fail(frame: types.FrameType) -> bool:
    """Whether the code is dscache's, a transport's, or called by dscache."""
    name = frame.f_code.co_filename
    if _is_ours(name) or frame.f_code.co_qualname.startswith("_Selector"):
        return True
    if "/asyncio/" not in name or frame.f_code.co_name in ("run_forever", "_run_once", "_run"):
        return False
    caller = frame.f_back
    return caller is not None and _is_ours(caller.f_code.co_filename)


class Tracer:
    """Records the executed lines, and raises on one of them.

    A frame that outlives a call, such as a coroutine's, keeps its tracer and therefore looks up the
    current one.
    """

    _present: ClassVar[Tracer | None] = None

    def __init__(self, target: Site | None = None, error: BaseException | None = None) -> None:
        self.sites: dict[Site, None] = {}
        self.raised = False
        self._target = target
        self._error = error

    def __enter__(self) -> Tracer:
        Tracer._present = self
        sys.settrace(self._enter)
        return self

    def __exit__(self, *details: object) -> None:
        sys.settrace(None)
        Tracer._present = None

    def forget(self) -> None:
        """Let go of the frames that the exception has passed, and of all that they hold."""
        if self._error is not None:
            self._error.__traceback__ = self._error.__context__ = None

    @staticmethod
    def _enter(frame: types.FrameType, event: str, argument: Any) -> Any:
        return Tracer._line if _may_fail(frame) else None

    @staticmethod
    def _line(frame: types.FrameType, event: str, argument: Any) -> Any:
        tracer = Tracer._present
        if tracer is not None and event == "line" and not tracer.raised:
            code = frame.f_code
            tracer._pass((code.co_filename, code.co_qualname, frame.f_lineno))
        return Tracer._line

    def _pass(self, site: Site) -> None:
        if self._target is None:
            # Nothing can be raised on a line with "try:" alone: it does nothing. Python 3.11 leaves
            # it out of the block around it, so that a lock would not be released.
            if linecache.getline(site[0], site[2]).strip() != "try:":
                self.sites[site] = None
        elif site == self._target:
            self.raised = True
            assert self._error is not None
            raise self._error


class Findings:
    """The actions done, and the violations."""

    def __init__(self) -> None:
        self.cases = 0
        self.problems: list[str] = []
        self.case = ""
        self.seconds: dict[str, float] = {}

    def note(self, problem: str) -> None:
        self.problems.append(f"{self.case}: {problem}"[:600])
        print(self.problems[-1], file=sys.stderr, flush=True)


def _write(name: str) -> dict[str, Any]:
    return {"name": name}


def _is_fit(name: str, record: Any) -> bool:
    """Whether a record is that of its owner, or missing."""
    return record is None or (record.name == name and record.data["name"] == name)


def _actions(cache: Any) -> dict[str, list[Call]]:
    """Return the operations that are issued together, by the name of the action."""
    some = OWNERS[:20]
    return {
        "get": [partial(cache.get, name) for name in OWNERS[:3]],
        "set": [partial(cache.set, name, 2, _write(name)) for name in OWNERS[:3]],
        "set-big": [partial(cache.set, "big", 1, {"name": "big", "text": BIG})],
        "get-big": [partial(cache.get, "big")],
        "get_bulk": [partial(cache.get_bulk, some)],
        "set_bulk": [partial(cache.set_bulk, {name: (2, _write(name)) for name in some})],
        "if_newer": [partial(cache.set, name, 2, _write(name), if_newer=True) for name in some[:3]],
        "delete": [partial(cache.delete, "never"), partial(cache.head, OWNERS[0])],
        "bad": [partial(cache.set, "bad", -1, None), partial(cache.get, OWNERS[1])],
    }


def _check_result(findings: Findings, call: Any, result: Any) -> None:
    method, argument = call.func.__name__, call.args[0] if call.args else None
    if method in ("get", "update", "patch", "fetch") and not _is_fit(argument, result):
        findings.note(f"WRONG OWNER: {method} {argument} gave {result!r}")
    if method in ("get_bulk", "fetch_bulk"):
        for name, record in result.items():
            if not _is_fit(name, record):
                findings.note(f"WRONG OWNER: {method} gave {record!r} as {name}")


# -- with an event loop


class Survivor:
    """Runs a loop, and continues after exceptions that end it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        asyncio.set_event_loop(loop)
        loop.set_exception_handler(lambda *_: None)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        task = self.loop.create_task(work)
        task.add_done_callback(lambda _: self.loop.stop())
        for _ in range(50):
            try:
                self.loop.run_forever()
            except BaseException as error:
                if "injected" not in str(error):
                    raise
            if task.done():
                return task.result()
        raise RuntimeError("the loop does not go on")


async def _act(
    findings: Findings, calls: list[Call], tracer: Tracer, patience: float = PATIENCE
) -> None:
    """Issue operations and wait until each has ended."""
    issued: list[tuple[Call, asyncio.Future[Any]]] = []
    with tracer:
        for call in calls:
            try:
                issued.append((call, asyncio.ensure_future(call())))
            except BaseException:
                continue  # it has ended with an error for its caller
        if issued:
            await asyncio.wait([future for _, future in issued], timeout=patience)
    for call, future in issued:
        if not future.done():
            findings.note(f"{call} had no end")
        elif not future.cancelled() and future.exception() is None:
            _check_result(findings, call, future.result())


async def _probe(findings: Findings, cache: Any) -> bool:
    """Wait until a cache works; return False if it never does."""
    end = time.monotonic() + PATIENCE
    said: Any = None
    while time.monotonic() < end:
        try:
            found = await asyncio.wait_for(
                asyncio.gather(*map(cache.get, OWNERS), return_exceptions=True), PATIENCE
            )
        except BaseException as error:
            said = error
            if "the cache is closed" in str(error):
                break
            await asyncio.sleep(0.01)
            continue
        for name, record in zip(OWNERS, found, strict=True):
            if not isinstance(record, BaseException) and not _is_fit(name, record):
                findings.note(f"WRONG OWNER: {name} got {record!r}")
        errors = [one for one in found if isinstance(one, BaseException)]
        left = {name: cache.stats()[name] for name in COUNTERS if cache.stats()[name]}
        missing = [name for name, one in zip(OWNERS, found, strict=True) if one is None]
        if not errors and not left and not missing:
            return True
        said = errors[0] if errors else left or f"{missing} are missing"
        await asyncio.sleep(0.01)
    findings.note(f"of no use any more: {said!r}")
    return False


async def _close(cache: Any, findings: Findings) -> None:
    try:
        await asyncio.wait_for(cache.close(), PATIENCE)
    except TimeoutError:
        findings.note("close had no end")
    except Exception as error:
        findings.note(f"close: {error!r}")


class Plan:
    """Chooses the lines to strike, action by action, as WHERE says."""

    def __init__(self, where: dict[str, Any]) -> None:
        self._every = where["every"]
        self._step, self._offset = where["step"], where["offset"]
        self._part, self._parts = where.get("part", (0, 1))
        self._known: set[Site] = set()
        self._actions = 0

    def each(self, sites: dict[Site, None]) -> Iterator[tuple[Site, BaseException]]:
        """Yield each exception with its line; a line hit in an earlier action is skipped."""
        is_mine = self._actions % self._parts == self._part
        self._actions += 1
        for place, site in enumerate(list(sites)):  # other threads may add to them
            if self._every:
                if is_mine and place % self._step == self._offset:
                    for make in _EXCEPTIONS:
                        yield site, make()
            elif site not in self._known:
                number = len(self._known)
                self._known.add(site)
                if is_mine and number % self._step == self._offset:
                    yield site, _EXCEPTIONS[number // self._step % len(_EXCEPTIONS)]()


def _named(action: str, site: Site, error: BaseException) -> str:
    file, function, line = site
    return f"{action}: {type(error).__name__} in {function}, {file.rpartition('/')[2]}:{line}"


def _run_async(findings: Findings, where: dict[str, Any]) -> None:
    """Strike an AsyncCache: in its operations, in a loss of its connection, and in its close."""
    survivor = Survivor(uvloop.new_event_loop() if where["uvloop"] else asyncio.new_event_loop())
    plan = Plan(where)

    async def opened() -> Any:
        cache = dscache.AsyncCache.from_config({"name": "redis", "options": where["options"]})
        await cache.when_ready()
        await cache.set_bulk({name: (1, _write(name)) for name in OWNERS})
        await cache.set("big", 1, {"name": "big", "text": BIG})
        return cache

    async def one(cache: Any, action: str, tracer: Tracer) -> None:
        if action == "reconnect":
            await _lose_connections(cache, where["options"], tracer)
        elif action == "close":
            await _act(findings, [partial(cache.get, OWNERS[0]), cache.close], tracer)
        elif action in sequences.KINDS:
            # A scan and a watch have no deadline: a lost reply is found missing within 10 s.
            patience = 2 * sequences.PATIENCE
            await _act(findings, several(cache).calls(action), tracer, patience)
        else:
            await _act(findings, _actions(cache)[action], tracer)

    def several(cache: Any) -> AsyncSequences:
        sequence.cache = cache
        return sequence

    async def close_of_each(tracer: Tracer) -> None:
        cache = await opened()
        await _act_and_close(findings, cache, tracer)

    cache = survivor.run(opened())
    sequence = AsyncSequences(cache, where["options"], findings.note)
    actions = [*_actions(cache), *sequences.KINDS, *(["reconnect"] if where["reconnect"] else [])]
    for action in actions:
        began = time.monotonic()
        first = Tracer()
        survivor.run(one(cache, action, Tracer()))
        survivor.run(one(cache, action, first))
        for site, error in plan.each(first.sites):
            findings.case = _named(action, site, error)
            findings.cases += 1
            survivor.run(one(cache, action, Tracer(site, error)))
            error.__traceback__ = None  # it would keep the struck frames
            if action in sequences.KINDS:
                survivor.run(several(cache).check(action))
            if not survivor.run(_probe(findings, cache)):
                survivor.run(_close(cache, findings))
                cache = survivor.run(opened())
        findings.seconds[action] = round(time.monotonic() - began, 1)
    survivor.run(_close(cache, findings))
    began = time.monotonic()
    first = Tracer()
    survivor.run(close_of_each(first))
    for site, error in plan.each(first.sites):
        findings.case = _named("close", site, error)
        findings.cases += 1
        survivor.run(close_of_each(Tracer(site, error)))
    findings.seconds["close"] = round(time.monotonic() - began, 1)


async def _act_and_close(findings: Findings, cache: Any, tracer: Tracer) -> None:
    """Close a cache with operations in flight: each ends, and a second close works."""
    with tracer:
        futures = []
        try:
            futures = [asyncio.ensure_future(cache.get(name)) for name in OWNERS[:3]]
            await cache.close()
        except BaseException as error:
            if "injected" not in str(error):
                findings.note(f"close: {error!r}")
    await _close(cache, findings)
    if futures:
        await asyncio.wait(futures, timeout=PATIENCE)
    for name, future in zip(OWNERS, futures, strict=False):
        if not future.done():
            findings.note(f"get {name} had no end")
        elif future.exception() is None and not _is_fit(name, future.result()):
            findings.note(f"WRONG OWNER: {name} got {future.result()!r}")
    left = {name: cache.stats()[name] for name in COUNTERS if cache.stats()[name]}
    if left:
        findings.note(f"not drained by close: {left}")


async def _lose_connections(cache: Any, options: dict[str, Any], tracer: Tracer) -> None:
    """Let the server end the cache's connections, and wait for the next one."""
    connects = cache.stats()["connects"]
    with tracer:
        await asyncio.to_thread(_kill_clients, options)
        end = time.monotonic() + 1.0
        is_again = False
        while not is_again and time.monotonic() < end:
            await asyncio.sleep(0.005)
            with contextlib.suppress(BaseException):
                is_again = cache.stats()["connects"] > connects


def _kill_clients(options: dict[str, Any]) -> None:
    with redis_py.Redis(host=options["host"], port=options["port"]) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


# -- with threads


def _run_blocking(findings: Findings, where: dict[str, Any]) -> None:
    """Strike a Cache, in the thread that uses it, and in the one that reads for a near cache."""
    plan = Plan(where)
    options = where["options"]
    has_near = "nearCache" in options
    if has_near:
        threading.settrace(Tracer._enter)
    cache = dscache.Cache.from_config({"name": "redis", "options": options})
    cache.set_bulk({name: (1, _write(name)) for name in OWNERS})
    other = redis_py.Redis(host=options["host"], port=options["port"]) if has_near else None
    versions = itertools.count(10)
    told = 0

    def tell() -> None:
        """Let another client change a record, and wait until that is known here."""
        nonlocal told
        told = next(versions)
        assert other is not None
        other.set(f"{OWNERS[0]}_v", told)
        end = time.monotonic() + 1.0
        while cache.head(OWNERS[0]) != told and time.monotonic() < end:
            time.sleep(0.001)

    def actions() -> dict[str, list[Call]]:
        found = _actions(cache)
        if has_near:
            number = next(versions)
            found["miss"] = [
                partial(cache.get, f"never/{number}"),
                partial(cache.get_bulk, [*OWNERS[:3], f"never/{number}/bulk"]),
            ]
            found["told"] = [partial(tell)]
            found["lost"] = [partial(_kill_clients, options), partial(tell)]
        return found

    def is_near() -> bool:
        """Whether the near cache is right, and of use."""
        found = cache.get(OWNERS[0])
        before = cache.stats()["near_cache"]["hits"]
        cache.get(OWNERS[0])
        is_right = not told or (found is not None and found.version in (told, 1, 2))
        return is_right and cache.stats()["near_cache"]["hits"] > before

    sequence = BlockingSequences(cache, where["options"], findings.note)

    def act(action: str, tracer: Tracer) -> None:
        is_sequence = action in sequences.KINDS
        for call in sequence.calls(action) if is_sequence else actions()[action]:
            result = None
            began = time.monotonic()
            try:
                with tracer:
                    result = call()
            except BaseException:
                result = None
            finally:
                sys.settrace(None)
            patience = 2 * sequences.PATIENCE if is_sequence else PATIENCE
            if time.monotonic() - began > patience:
                findings.note(f"{call} took {time.monotonic() - began:.1f} s")
            if result is not None:
                _check_result(findings, call, result)

    def probe() -> None:
        end = time.monotonic() + PATIENCE
        said: Any = None
        while time.monotonic() < end:
            if said is not None:
                time.sleep(0.005)  # for the thread of the near cache, which is to recover
            try:
                found = [cache.get(name) for name in OWNERS[:20]]
                found += cache.get_bulk(OWNERS).values()
            except Exception as error:
                said = error
                continue
            for name, record in zip((*OWNERS[:20], *OWNERS), found, strict=True):
                if not _is_fit(name, record):
                    findings.note(f"WRONG OWNER: {name} got {record!r}")
            stats = cache.stats()
            left = {name: stats[name] for name in COUNTERS if stats.get(name)}
            if not left and (not has_near or is_near()):
                return
            said = left or "nothing is kept, or what is kept is outdated"
        findings.note(f"of no use any more: {said!r}")

    for action in [*actions(), *sequences.KINDS]:
        began = time.monotonic()
        act(action, Tracer())
        first = Tracer()
        act(action, first)
        for site, error in plan.each(first.sites):
            findings.case = _named(action, site, error)
            findings.cases += 1
            act(action, Tracer(site, error))
            error.__traceback__ = None  # it would keep the struck frames
            if action in sequences.KINDS:
                sequence.check(action)
            probe()
        findings.seconds[action] = round(time.monotonic() - began, 1)
    cache.close()
    if other is not None:
        other.close()
    if has_near and threading.active_count() > 1:
        findings.note(f"{threading.enumerate()} are left")


# -- messages


def _run_messages(findings: Findings, where: dict[str, Any]) -> None:
    """Strike a MessageNode that publishes; another receives complete messages in order."""
    survivor = Survivor(uvloop.new_event_loop() if where["uvloop"] else asyncio.new_event_loop())
    plan = Plan(where)
    heard: list[int] = []

    async def opened(name: str) -> Any:
        entry = {"name": "redis", "options": where["options"]}
        node = MessageNode.from_config({"serverName": name, "clusterNode": entry})
        await node.when_ready()
        return node

    def hear(message: Any, _: str) -> None:
        heard.append(message.data["number"])

    async def hear_slowly(message: Any, _: str) -> None:
        await asyncio.sleep(0)
        heard.append(message.data["number"])

    async def both() -> tuple[Any, Any]:
        sender, listener = await opened("A"), await opened("B")
        listener.subscribe(1007, hear_slowly if where["kind"] == "coroutines" else hear)
        await listener.when_ready()
        return sender, listener

    async def send(sender: Any, number: int, tracer: Tracer) -> None:
        calls: list[Call] = [partial(sender.send, {"number": number}, topic=1007)] * 2
        await _act(findings, calls, tracer)
        with tracer:  # the listener's callbacks come later
            end = time.monotonic() + 0.1
            while heard.count(number) < 2 and time.monotonic() < end:
                await asyncio.sleep(0)
            await asyncio.sleep(0.001)

    async def comes(sender: Any, number: int) -> bool:
        end = time.monotonic() + PATIENCE
        said: Any = None
        while time.monotonic() < end:
            # A message sent while the listener connects is missed, as Redis stores none.
            try:
                await asyncio.wait_for(sender.send({"number": number}, topic=1007), PATIENCE)
            except BaseException as error:
                said = error
            await asyncio.sleep(0.01)
            left = {name: sender.stats()[name] for name in COUNTERS if sender.stats().get(name)}
            if number in heard and not left:
                return True
            said = left or said
        findings.note(f"of no use any more: {said!r}")
        return False

    sender, listener = survivor.run(both())
    number = 0
    survivor.run(send(sender, number, Tracer()))
    first = Tracer()
    survivor.run(send(sender, number, first))
    for site, error in plan.each(first.sites):
        findings.case = _named("send", site, error)
        findings.cases += 1
        number += 2
        survivor.run(send(sender, number, Tracer(site, error)))
        if not survivor.run(comes(sender, number + 1)):
            survivor.run(_close(sender, findings))
            survivor.run(_close(listener, findings))
            sender, listener = survivor.run(both())
    if heard != sorted(heard):
        findings.note("messages came out of their order")
    survivor.run(_close(sender, findings))
    survivor.run(_close(listener, findings))


def main(where: dict[str, Any]) -> dict[str, Any]:
    # Logging every loss would take most of the time.
    logging.getLogger("dscache").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    faulthandler.dump_traceback_later(where.get("seconds", 300), exit=True)
    sys.unraisablehook = lambda _: None
    # Each check collects garbage twice, and modules are none.
    gc.collect()
    gc.freeze()
    findings = Findings()
    began = time.monotonic()
    run = {"async": _run_async, "blocking": _run_blocking, "messages": _run_messages}
    run["coroutines"] = _run_messages
    run[where["kind"]](findings, where)
    return {
        "cases": findings.cases,
        "problems": findings.problems,
        "seconds": round(time.monotonic() - began, 1),
        "actions": findings.seconds,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
