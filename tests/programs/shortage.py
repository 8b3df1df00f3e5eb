"""Let single allocations fail within the core, one after the other, and check its state.

``python -m tests.programs.shortage BACKEND STRIDE [SCENE...]`` prints its findings as JSON. Every
scene is a few steps, such as issuing operations, taking the output and feeding the replies. In each
step the first allocation fails in one run, the second one in the next run, and so on to the last;
with a STRIDE of 7, every seventh. The runs are done in child processes, as one may crash: the
parent records the place, and continues behind it.

After every run, each operation must have ended, with its own record or with an error; the counters
must be zero; and each of 100 records must be that of its owner. An exception of ``take_output`` or
of ``feed`` ends the connection, as it must in a Connection. A step that settles operations, such as
``connection_lost``, is repeated when it raises.
"""

from __future__ import annotations

import asyncio
import faulthandler
import importlib
import json
import math
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import hiredis

from dscache.errors import ConnectionLost, DscacheError
from tests.support.wire import ADDRESS, ModelServer, Operation, Push, Refusal, commands, resp

# More than the allocations of any step, than those behind a failed one, and than the replies.
_MOST = 2000
_ROOM = (None,) * 50
_REPLIES = 8
# A child's progress: the scene, the step, the replies before, the allocation; and its runs so far.
_PLACE = struct.Struct("5q")
_OWNERS = [f"owner/{i}" for i in range(100)]
_COUNTERS = ("queued", "in_flight", "pending", "pending_bytes")
_EXAMPLES = 40
# A scene whose core is badly damaged must not run for ever.
_CRASHES = 200
# Seconds until a run counts as endless: it takes a millisecond.
_PATIENCE = 10

_READER = hiredis.Reader
_PACK = hiredis.pack_command
_LOOP = asyncio.new_event_loop()

_BIG = "x" * 20_000


def _data(name: str) -> dict[str, str]:
    return {"name": name}


def _text(name: str) -> bytes:
    return b'{"name":"%s"}' % name.encode()


def _awaited(waiter: Any) -> Any:
    """Return a future: a near cache returns coroutines, which begin when they are awaited."""
    if not asyncio.iscoroutine(waiter):
        return waiter
    task = _LOOP.create_task(waiter)
    _LOOP.run_until_complete(asyncio.wait([task], timeout=1.0))
    return task


class Shield:
    """Lets allocations fail only in the core, and not in the Reader of hiredis.

    hiredis crashes when it can't make an error reply. With error replies, the failing allocation is
    therefore counted from a given number of replies returned by it.
    """

    def __init__(self) -> None:
        self.replies = 0
        self.number = -1
        self.reached = False

    def arm(self, replies: int, number: int) -> None:
        """Let an allocation fail after that many replies; with none, at once."""
        self.replies, self.number, self.reached = replies, number, False
        if not replies:
            _set_failure(number)

    def reader(self, make: Callable[..., Any], **options: Any) -> Any:
        """Return a replacement of a Reader."""
        real = make(**options)
        return types.SimpleNamespace(
            feed=partial(self.past, real.feed),
            gets=partial(self.past, real.gets),
            has_data=real.has_data,
        )

    def past(self, call: Callable[..., Any], *arguments: Any) -> Any:
        if self.number < 0:
            return call(*arguments)
        hit = self.replies == 0
        if hit:
            self.reached = _was_reached()
        _end_failures()
        try:
            return call(*arguments)
        finally:
            self.replies -= 1
            if self.replies == 0 and not hit:
                _set_failure(self.number)


class Scene:
    """One pipeline, operations on it, a server, and the duties of a caller of the core."""

    def __init__(
        self,
        core: Any,
        *operations: Operation,
        near: bool = False,
        msetex: bool = False,
        shielded: bool = False,
        **options: Any,
    ) -> None:
        self.core = core
        self.shield = Shield() if shielded else None
        if self.shield is not None:
            # The core gets its Reader here whenever it starts afresh.
            make = partial(self.shield.reader, _READER)
            hiredis.Reader = make  # type: ignore[assignment, misc]
            hiredis.pack_command = partial(self.shield.past, _PACK)
        else:
            hiredis.Reader = _READER  # type: ignore[misc]
            hiredis.pack_command = _PACK
        self.server = ModelServer()
        for name in (*_OWNERS, "a", "b", "c"):
            self.server.put(name, 1, _text(name))
        self.server.put("big", 1, b'{"name":"big","text":"%s"}' % _BIG.encode())
        self.pipeline = core.Pipeline(
            _LOOP.create_future, lambda: None, address=ADDRESS, timeout=3600.0, **options
        )
        self.pipeline.has_msetex = msetex
        self.entry = self.pipeline
        if near:
            self.entry = self.pipeline.near = core.NearCache(
                _LOOP.create_future, self.pipeline, timeout=3600.0, idle_limit=3600.0
            )
        self.pipeline.connected(near)
        self.operations = operations
        self._calls = [
            partial(getattr(self.entry, one.method), one.argument, *one.rest, **one.options)
            for one in operations
        ]
        # Space for everything that a run leaves, so that the harness itself needs no memory.
        self.waiters: list[Any] = [None] * len(operations)
        self.refused: list[BaseException | None] = [None] * len(operations)
        self.output = b""
        self.replies = b""
        self.reason = ConnectionLost("it was cut")
        self.steps: list[tuple[str, Callable[[], object]]] = []
        self.problems: list[str] = []

    # -- steps

    def issue(self) -> None:
        """Issue each operation; one that raises is over, and the others continue."""
        for i, call in enumerate(self._calls):
            try:
                self.waiters[i] = call()
            except Exception as error:
                self.refused[i] = error

    def flush(self) -> None:
        self.output = self.pipeline.take_output()

    def feed(self) -> None:
        self.pipeline.feed(self.replies)

    def read(self) -> None:
        """Feed the replies as a transport does, through the pipeline's own buffer."""
        self.pipeline.get_buffer(-1)[: len(self.replies)] = self.replies
        self.pipeline.buffer_updated(len(self.replies))

    def lose(self) -> None:
        self.pipeline.connection_lost(self.reason, True)

    def lose_for_good(self) -> None:
        self.pipeline.connection_lost(self.reason, False)

    def fail(self) -> None:
        self.pipeline.fail_all(lambda operation: ConnectionLost(f"{operation}: closed"))

    def expire(self) -> None:
        self.pipeline.expire(math.inf)

    def stats(self) -> None:
        self.entry.stats()

    def answer(self) -> None:
        """Let the server answer the taken output; this step is not the core's."""
        self.replies = self.server.answer(self.output)

    # -- the course of a run

    def after(self, name: str, error: BaseException | None) -> bool:
        """Do what a Connection does after a step that raised; return whether the run continues."""
        if error is None:
            return True
        if not isinstance(error, (MemoryError, DscacheError)):
            self.problems.append(f"{name} raised {error!r}")
        if name in ("flush", "feed", "read"):
            self._again(self.lose)
            return False
        self._again(dict(self.steps)[name])
        return True

    def _again(self, step: Callable[[], object]) -> None:
        try:
            step()
        except Exception as error:
            self.problems.append(f"{step.__name__}, done once more, raised {error!r}")

    def finish(self) -> None:
        """Continue over a new connection; everything has ended, with the results of its owners."""
        self._again(self.lose)
        self.pipeline.connected(self.entry is not self.pipeline)
        self.pipeline.down = None
        probes = [(name, self.pipeline.get(name)) for name in _OWNERS]
        self._serve(self.pipeline)
        self.waiters = [_awaited(waiter) for waiter in self.waiters]
        if not all(waiter is None or waiter.done() for waiter in self._told()):
            self._again(self.expire)
        self._check(probes)
        for counted in self._pipelines():
            stats = counted.stats()
            left = {name: stats[name] for name in _COUNTERS if stats[name]}
            if left:
                self.problems.append(f"not drained: {left}")

    def _pipelines(self) -> list[Any]:
        return [self.pipeline]

    def _told(self) -> list[Any]:
        return self.waiters

    def _serve(self, pipeline: Any) -> None:
        try:
            while output := pipeline.take_output():
                pipeline.feed(self.server.answer(output))
        except Exception as error:
            self.problems.append(f"the next connection raised {error!r}")
            self._again(self.lose_for_good)

    def _check(self, probes: list[tuple[str, Any]]) -> None:
        for name, waiter in probes:
            if not waiter.done() or waiter.exception() is not None or not waiter.result():
                self.problems.append(f"get {name}: {waiter!r}")
            elif waiter.result().name != name or waiter.result().data != _data(name):
                self.problems.append(f"WRONG OWNER: {name} got {waiter.result()!r}")
        for operation, waiter, refused in zip(
            self.operations, self.waiters, self.refused, strict=True
        ):
            error = refused
            if waiter is not None:
                if not waiter.done():
                    self.problems.append(f"{operation} was never told")
                    continue
                error = waiter.exception()
            if error is not None:
                if not isinstance(error, (MemoryError, DscacheError)):
                    self.problems.append(f"{operation} failed with {error!r}")
                continue
            if waiter is not None and operation.method in ("get", "get_bulk"):
                self._check_records(operation, waiter.result())

    def _check_records(self, operation: Operation, found: Any) -> None:
        if operation.method == "get":
            found = {} if found is None else {operation.argument: found}
        for name, record in found.items():
            if record is None or record.name != name or record.data["name"] != name:
                self.problems.append(f"WRONG OWNER: {operation} got {record!r} as {name}")


# -- scenes: each returns a new one, ready for its first step


def _write(method: str, names: Any, **options: Any) -> Operation:
    if method == "set":
        return Operation("set", names, (2, _data(names)), options)
    return Operation("set_bulk", {name: (2, _data(name)) for name in names}, (), options)


_ALL: dict[str, tuple[Operation, ...]] = {
    "get": (Operation("get", "a"), Operation("get", "b"), Operation("get", "a")),
    "get-big": (Operation("get", "big"), Operation("get", "a")),
    "head": (Operation("head", "a"), Operation("head", "none")),
    "set": (_write("set", "a"), _write("set", "b"), _write("set", "a")),
    "set-ttl": (_write("set", "a", ttl=60), _write("set", "b", ttl=60)),
    "if-newer": (_write("set", "a", if_newer=True), _write("set", "b", if_newer=True)),
    "delete": (Operation("delete", "a"), Operation("delete", "none")),
    "get-bulk": (Operation("get_bulk", ["a", "b", "none", "c"]), Operation("get", "a")),
    "head-bulk": (Operation("head_bulk", ["a", "b", "none"]),),
    "set-bulk": (_write("set_bulk", ["a", "b", "new"]), Operation("get", "a")),
    "set-bulk-if-newer": (_write("set_bulk", ["a", "b"], if_newer=True),),
    "delete-bulk": (Operation("delete_bulk", ["a", "b", "none"]), Operation("get", "a")),
    "mixed": (
        Operation("get", "a"),
        _write("set", "a"),
        Operation("get", "a"),
        _write("set", "b", if_newer=True),
        Operation("head", "b"),
        Operation("delete", "c"),
        Operation("get_bulk", ["a", "c"]),
    ),
    "empty": (Operation("get_bulk", []), Operation("set_bulk", {})),
}


def _answered(core: Any, operations: tuple[Operation, ...], read: bool, **options: Any) -> Scene:
    scene = Scene(core, *operations, **options)
    way: tuple[str, Callable[[], object]] = ("read", scene.read) if read else ("feed", scene.feed)
    scene.steps = [("issue", scene.issue), ("flush", scene.flush), ("answer", scene.answer), way]
    return scene


def _ended(core: Any, operations: tuple[Operation, ...], ending: str, sent: bool) -> Scene:
    scene = Scene(core, *operations)
    scene.issue()
    if sent:
        scene.flush()
        scene._calls = scene._calls[:0]
    scene.steps = [(ending, getattr(scene, ending))]
    return scene


def _refusals(core: Any, operations: tuple[Operation, ...], refusal: str, **options: Any) -> Scene:
    """Return a scene whose server refuses every command once."""
    scene = Scene(core, *operations, shielded=True, **options)

    def answer() -> None:
        scene.replies = resp(Refusal(refusal)) * len(commands(scene.output))

    scene.steps = [
        ("issue", scene.issue),
        ("flush", scene.flush),
        ("answer", answer),
        ("feed", scene.feed),
    ]
    return scene


class Redirected(Scene):
    """A node of a cluster redirects everything to another node."""

    def __init__(self, core: Any, *operations: Operation, refusal: str) -> None:
        super().__init__(core, *operations, shielded=True, clustered=True)
        self.other = core.Pipeline(
            _LOOP.create_future, lambda: None, address="other", timeout=3600.0, clustered=True
        )
        self._refusal = refusal
        self._batches: list[Any] = []
        self.steps = [
            ("issue", self.issue),
            ("flush", self.flush),
            ("answer", self.refuse),
            ("feed", self.feed),
            ("answer", self.take),
            ("requeue", self.requeue),
            ("answer", self.move),
            ("take_queued", self.take_queued),
        ]

    def refuse(self) -> None:
        self.replies = resp(Refusal(self._refusal)) * len(commands(self.output))

    def take(self) -> None:
        taken, self.pipeline.redirected = self.pipeline.redirected, []
        self._batches = [batch for _, _, batch in taken]

    def requeue(self) -> None:
        self.other.requeue(self._batches)

    def move(self) -> None:
        self._batches = []

    def take_queued(self) -> None:
        self._batches = self.other.take_queued(lambda kind, name: self.pipeline)

    def finish(self) -> None:
        self.pipeline.redirected, left = [], self.pipeline.redirected
        for _, _, batch in left:
            self.pipeline.requeue([batch])
        for _, batch in self._batches:
            self.pipeline.requeue([batch])
        self._serve(self.other)
        super().finish()
        if not all(waiter is None or waiter.done() for waiter in self._told()):
            self.other.expire(math.inf)

    def _pipelines(self) -> list[Any]:
        return [self.pipeline, self.other]


def _near_fill(core: Any) -> Scene:
    return _answered(core, (*_ALL["get"], *_ALL["get-bulk"]), False, near=True)


def _near_hit(core: Any) -> Scene:
    scene = Scene(core, *_ALL["get"], *_ALL["get-bulk"], *_ALL["head"], near=True)
    names = [*scene.server.values]
    scene.entry.get_bulk(["a", "b", "c", "none"])
    scene._serve(scene.pipeline)
    assert names
    push = b"".join(resp(Push([b"invalidate", [b"a_v", b"b_d"]])) for _ in range(2))

    def invalidate() -> None:
        scene.pipeline.feed(push)

    scene.steps = [
        ("issue", scene.issue),
        ("feed", invalidate),
        ("stats", scene.stats),
        ("issue", scene.issue),
        ("flush", scene.flush),
        ("answer", scene.answer),
        ("feed", scene.feed),
        ("lose", scene.lose),
    ]
    return scene


def _messages(core: Any) -> Scene:
    """Return a scene in which messages are published and received."""
    opening = b'{"t":1,"s":"A","d":'
    scene = Scene(core)
    scene.operations = (Operation("publish", 7), Operation("publish", 7))
    scene._calls = [
        partial(scene.pipeline.publish, 7, opening, {"text": "one"}, False),
        partial(scene.pipeline.publish, 7, opening, {"text": "two"}, False),
    ]
    scene.waiters, scene.refused = [None, None], [None, None]
    scene.server.__dict__["_publish"] = lambda *parts: 1

    def answer() -> None:
        scene.replies = b":1\r\n" * len(commands(scene.output))
        scene.server.executed.clear()

    scene.steps = [
        ("issue", scene.issue),
        ("flush", scene.flush),
        ("answer", answer),
        ("feed", scene.feed),
        ("issue", scene.issue),
        ("fail", scene.fail),
    ]
    return scene


def _commands(core: Any) -> Scene:
    """Return a scene of commands other than records', as of a handshake."""
    scene = Scene(core, shielded=True)
    scene.operations = (Operation("command", "HELLO"),)

    def command() -> Any:
        scene.output, waiter = scene.pipeline.command("HELLO", 3)
        return waiter

    scene._calls = [command]
    scene.waiters, scene.refused = [None], [None]

    def answer() -> None:
        scene.replies = resp({b"server": b"redis", b"modules": [1, 2.5, None, True]})
        scene.replies = scene.replies if scene.output else b""

    scene.steps = [("issue", scene.issue), ("answer", answer), ("feed", scene.feed)]
    return scene


def scenes() -> dict[str, Callable[[Any], Scene]]:
    """Return every scene by its name."""
    found: dict[str, Callable[[Any], Scene]] = {}
    for name, operations in _ALL.items():
        found[name] = partial(_answered, operations=operations, read=False)
        found[f"{name} read"] = partial(_answered, operations=operations, read=True)
        for ending in ("lose", "lose_for_good", "fail", "expire", "stats"):
            for sent in (False, True):
                where = "sent" if sent else "queued"
                found[f"{name} {where} {ending}"] = partial(
                    _ended, operations=operations, ending=ending, sent=sent
                )
        for refusal in ("ERR no", "NOSCRIPT x", "NOPERM x", "READONLY x"):
            found[f"{name} {refusal.split()[0]}"] = partial(
                _refusals, operations=operations, refusal=refusal
            )
        for refusal in ("MOVED 1 127.0.0.1:1", "ASK 1 127.0.0.1:1", "TRYAGAIN x"):
            found[f"{name} {refusal.split()[0]}"] = partial(
                lambda core, one, said: Redirected(core, *one, refusal=said),
                one=operations,
                said=refusal,
            )
    found["set-ttl msetex"] = partial(
        _answered, operations=_ALL["set-ttl"], read=False, msetex=True
    )
    found["near fill"] = _near_fill
    found["near hit"] = _near_hit
    found["messages"] = _messages
    found["commands"] = _commands
    return found


# -- the scan


def _set_failure(number: int) -> None:
    import _testcapi

    _testcapi.set_nomemory(number, number + 1)


def _was_reached() -> bool:
    """Whether the set failure has occurred and was not one of the next allocations."""
    try:
        for _ in _ROOM:
            bytes(100)
    except MemoryError:
        return False
    return True


def _end_failures() -> None:
    import _testcapi

    _testcapi.remove_mem_hooks()


def _strike(
    shield: Shield | None, replies: int, number: int, step: Callable[[], object]
) -> tuple[BaseException | None, bool]:
    """Run a step with a failing allocation; return its exception, and whether it got that far."""
    caught: BaseException | None = None
    if shield is None:
        _set_failure(number)
    else:
        shield.arm(replies, number)
    try:
        step()
    except BaseException as error:
        caught = error
    if shield is None or shield.replies == 0:
        reached = _was_reached()
    else:
        reached = shield.replies < 0 and shield.reached
    _end_failures()
    if shield is not None:
        shield.number = -1
    return caught, reached


def _run(make: Callable[[], Scene], target: int, replies: int, number: int) -> tuple[Scene, bool]:
    """Run a scene in which one allocation of its step ``target`` fails, if it makes that many."""
    scene = make()
    reached = False
    for i, (name, step) in enumerate(scene.steps):
        error = None
        if i == target:
            error, reached = _strike(scene.shield, replies, number, step)
        else:
            step()
        if not scene.after(name, error):
            break
    scene.finish()
    return scene, reached


def _child(backend: str, stride: int, wanted: list[str], progress: str) -> None:
    """Continue from the place in the file ``progress``, where each next one is recorded."""
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, chain=True)  # and then die of it, as a run has no end
    core = importlib.import_module({"fast": "dscache._fast", "pure": "dscache.core.pure"}[backend])
    found = scenes()
    with open(progress, "r+b") as file:
        place = mmap.mmap(file.fileno(), _PLACE.size)
    first = _PLACE.unpack(place)
    runs = first[4]
    for index in range(first[0], len(wanted)):
        name = wanted[index]
        make = partial(found[name], core)
        if index > first[0]:
            place[:] = _PLACE.pack(index, 0, 0, 0, runs)
        for _ in range(2):  # objects made once, at the first use
            scene, _ = _run(make, -1, 0, 0)
        for target, (step, _) in enumerate(scene.steps):
            for replies in range(_REPLIES if scene.shield is not None else 1):
                if step == "answer" or (index, target, replies) < first[:3]:
                    continue
                number = first[3] if (index, target, replies) == first[:3] else 0
                reached = True
                while reached and number < _MOST:
                    place[:] = _PLACE.pack(index, target, replies, number, runs)
                    signal.alarm(_PATIENCE)
                    struck, reached = _run(make, target, replies, number)
                    runs += reached
                    for problem in struck.problems[:3]:
                        print(f"{name}, {step} {replies}.{number}: {problem}", flush=True)
                    number += stride
    signal.alarm(0)
    place[:] = _PLACE.pack(len(wanted), 0, 0, 0, runs)


def scan(backend: str, stride: int = 1, wanted: list[str] | None = None) -> dict[str, Any]:
    """Run the children; return the number of runs, the crashes and the problems."""
    names = wanted or list(scenes())
    place: tuple[int, ...] = (0, 0, 0, 0, 0)
    crashes: list[str] = []
    problems: list[str] = []
    with tempfile.NamedTemporaryFile() as file:
        while place[0] < len(names) and len(crashes) < _CRASHES:
            file.seek(0)
            file.write(_PLACE.pack(*place))
            file.flush()
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "tests.programs.shortage",
                    "--child",
                    file.name,
                    backend,
                    str(stride),
                    *names,
                ],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True,
                text=True,
            )
            problems += done.stdout.splitlines()
            file.seek(0)
            place = _PLACE.unpack(file.read(_PLACE.size))
            if place[0] < len(names):
                index, target, replies, number, runs = place
                where = f"{names[index]}, step {target}, allocation {replies}.{number}"
                crashes.append(_crash(done, where))
                print(crashes[-1], file=sys.stderr, flush=True)
                place = (index, target, replies, number + stride, runs + 1)
    return {"runs": place[4], "crashes": crashes, "problems": problems}


def _crash(done: subprocess.CompletedProcess[str], place: str) -> str:
    """Describe how a child ended: by which signal, and its last output."""
    how = f"exit {done.returncode}"
    if done.returncode < 0:
        how = signal.Signals(-done.returncode).name
    return f"{place}: {how}\n{done.stderr[:4000]}"


def main(arguments: list[str]) -> int:
    if arguments[0] == "--child":
        _child(arguments[2], int(arguments[3]), arguments[4:], arguments[1])
        return 0
    result = scan(arguments[0], int(arguments[1]), arguments[2:])
    print(json.dumps(result, indent=1))
    return 1 if result["crashes"] or result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
