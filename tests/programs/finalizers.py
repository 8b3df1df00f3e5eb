"""Let finalizers use the pipeline in the middle of its work.

``python tests/programs/finalizers.py BACKEND COUNT`` prints its findings as JSON. Garbage
collection runs at every allocation, including those of the core. The garbage has a ``__del__``, or
a callback of a weak reference, that issues a read, a write or a bulk on the same pipeline and
leaves new garbage for the next allocation.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import logging
import random
import sys
import time
import weakref
from typing import Any

from dscache.errors import ConnectionLost, DscacheError
from tests.support.wire import ADDRESS, ModelServer, Operation

_NAMES = [f"n{i}" for i in range(30)]
_COUNTERS = ("queued", "in_flight", "pending", "pending_bytes")
_EXAMPLES = 20


def _data(name: str) -> dict[str, str]:
    return {"name": name}


class _Loop:
    """Part of a cycle, so that only garbage collection can find it."""

    def __init__(self, scene: Finalizers, more: int) -> None:
        self.own = self
        self.scene = scene
        self.more = more


class _Mourned(_Loop):
    """Garbage whose finalizer uses the pipeline."""

    def __del__(self) -> None:
        self.scene.interfere(self.more)


class Finalizers:
    """A pipeline, the operations that finalizers and others issue on it, and a server."""

    def __init__(self, core: Any, seed: int) -> None:
        self.finalized = 0
        self.problems: list[str] = []
        self._calm = False
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._issued: list[tuple[Operation, Any]] = []
        self._references: set[Any] = set()
        self._server = ModelServer()
        for name in _NAMES:
            self._server.put(name, 1, b'{"name":"%s"}' % name.encode())
        self._pipeline = core.Pipeline(
            self._loop.create_future, self._wake, address=ADDRESS, timeout=3600.0
        )

    def run(self, count: int) -> None:
        """Continue until that many finalizers have run."""
        usual = gc.get_threshold()
        gc.disable()
        gc.set_threshold(1)
        try:
            while self.finalized < count and len(self.problems) < _EXAMPLES:
                self._round()
        finally:
            gc.set_threshold(*usual)
            gc.enable()
            self._loop.close()

    def interfere(self, more: int) -> None:
        """Issue an operation from within a finalizer."""
        self.finalized += 1
        self._issue(self._operation())
        if more:
            self._leave(more - 1)

    def _leave(self, more: int) -> None:
        """Leave garbage that interferes, and that leaves more such garbage."""
        if self._random.random() < 0.7:
            _Mourned(self, more)
            return
        plain = _Loop(self, 0)
        self._references.add(weakref.ref(plain, lambda _, more=more: self.interfere(more)))

    def _wake(self) -> None:
        if self._random.random() < 0.3 and not self._calm:
            self._leave(1)

    def _round(self) -> None:
        pipeline = self._pipeline
        self._calm = False
        for _ in range(self._random.randrange(1, 6)):
            self._amid(self._issue, self._operation())
        for turn in range(1000):
            self._calm = turn > 10  # otherwise there would always be more to send
            output = self._amid(pipeline.take_output)
            if not output:
                break
            if self._random.random() < 0.05:
                self._amid(pipeline.connection_lost, ConnectionLost("it was cut"), True)
                continue
            replies = self._server.answer(output)
            self._server.executed.clear()
            cut = self._random.randrange(len(replies) + 1)
            self._amid(pipeline.feed, replies[:cut])
            self._amid(pipeline.expire, time.monotonic())
            self._amid(pipeline.feed, replies[cut:])
        else:
            self.problems.append("there is always more to send")
        if self._random.random() < 0.02:
            self._amid(pipeline.fail_all, lambda operation: ConnectionLost(f"{operation}: closed"))
            self._amid(pipeline.connection_lost, ConnectionLost("it was closed"), True)
        if pipeline.queued:
            return  # finalizers of the last step have issued more: the next round has them
        self._references.clear()
        stats = pipeline.stats()
        left = {name: stats[name] for name in _COUNTERS if stats[name]}
        if left:
            self.problems.append(f"not drained: {left}")
        issued, self._issued = self._issued, []
        for operation, waiter in issued:
            self._check(operation, waiter)

    def _amid(self, step: Any, *arguments: Any) -> Any:
        """Call the core while there is garbage, which its allocations find."""
        for _ in range(0 if self._calm else self._random.randrange(1, 4)):
            self._leave(self._random.randrange(4))
        gc.enable()
        try:
            return step(*arguments)
        except Exception as error:
            self.problems.append(f"{step} raised {error!r}"[:300])
            self._pipeline.connection_lost(error, False)
        finally:
            gc.disable()

    def _issue(self, operation: Operation) -> None:
        self._issued.append((operation, operation.on(self._pipeline)))

    def _operation(self) -> Operation:
        chance = self._random
        name = chance.choice(_NAMES)
        some = chance.sample(_NAMES, 4)
        guarded = {"if_newer": chance.random() < 0.5}
        match chance.randrange(6):
            case 0 | 1:
                return Operation("get", name)
            case 2:
                return Operation("set", name, (chance.randrange(1, 9), _data(name)), guarded)
            case 3:
                return Operation("get_bulk", some)
            case 4:
                records = {name: (chance.randrange(1, 9), _data(name)) for name in some}
                return Operation("set_bulk", records, (), guarded)
            case _:
                return Operation("head", name)

    def _check(self, operation: Operation, waiter: Any) -> None:
        if not waiter.done():
            self.problems.append(f"{operation} was never told")
            return
        error = waiter.exception()
        if error is not None:
            if not isinstance(error, DscacheError):
                self.problems.append(f"{operation} failed with {error!r}")
            return
        found = waiter.result()
        if operation.method == "get":
            found = {operation.argument: found}
        elif operation.method != "get_bulk":
            return
        for name, record in found.items():
            if record is None or record.name != name or record.data != _data(name):
                self.problems.append(f"WRONG OWNER: {operation} got {record!r} as {name}")


def main(backend: str, count: int, seed: int = 0) -> dict[str, Any]:
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # errors that were never retrieved
    finalizers = Finalizers(
        importlib.import_module({"fast": "dscache._fast", "pure": "dscache.core.pure"}[backend]),
        seed,
    )
    finalizers.run(count)
    return {"finalized": finalizers.finalized, "problems": finalizers.problems}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
