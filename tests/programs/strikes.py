"""Interrupt a blocking cache at each line of each operation, and check that no reply goes astray.

``python -m tests.programs.strikes OPTIONS`` prints the results as JSON; the options are JSON too. A
trace function raises when an operation reaches its first line of this package, the next time at its
second one, and so on until it completes undisturbed. After each, the records of others are
unchanged, a record written in part contains nothing of another, and no place is lost: there is one
connection, to each node of a cluster, and no waiting thread.
"""

from __future__ import annotations

import ast
import functools
import itertools
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import dscache
from tests.programs.interrupts import KINDS

HERE = os.path.dirname(dscache.__file__)
OWNED = {f"owner/{n}": (n, f"owner/{n} {n}") for n in range(100)}
NAMES = list(OWNED)
BIG = "x" * 400_000

ACTIONS: dict[str, Callable[[dscache.Cache, int], object]] = {
    "get": lambda cache, n: cache.get(NAMES[n % 100]),
    "head": lambda cache, n: cache.head(NAMES[n % 100]),
    "set": lambda cache, n: cache.set("written", n, f"written {n}"),
    "set big": lambda cache, n: cache.set("written", n, f"written {n} {BIG}"),
    "guarded": lambda cache, n: cache.set("written", 10**9 + n, f"written {n}", if_newer=True),
    "delete": lambda cache, n: cache.delete("written"),
    "update": lambda cache, n: cache.update("updated", lambda data: data + 1, default=0),
    "refused": lambda cache, n: _refused(cache),
    "get_bulk": lambda cache, n: cache.get_bulk(NAMES[:7]),
    "set_bulk": lambda cache, n: cache.set_bulk({"written": (n, f"written {n}"), "w/2": (n, 2)}),
    "connect": lambda cache, n: cache.when_ready(),
    "anew": lambda cache, n: cache.get(NAMES[n % 100]),
}
# An exception in a finalizer reaches no caller, and one raised by a type that can't be encoded,
# shown or unpacked is reported in other words; neither concerns a connection.
UNTOUCHED = {"__del__", "encode_data", "encode_json", "encode_within", "shorten", "check_pair"}
# How many hits of frequently executed lines are skipped before one is struck.
STEPS = {"set big": 7, "set_bulk": 3, "get_bulk": 3, "connect": 5, "anew": 5}


def _refused(cache: dscache.Cache) -> None:
    try:
        cache.get("")
    except dscache.RecordError as error:
        if "struck" in str(error):
            raise


@functools.cache
def blocks(path: str) -> frozenset[int]:
    """Return the lines at which a block of ``with`` or ``try`` begins.

    The first is reached once more when it ends, before the lock is released, and the other one is
    outside of what it guards. A signal never strikes there: nothing is called.
    """
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    return frozenset(
        number
        for node in ast.walk(tree)
        if isinstance(node, ast.With | ast.Try)
        for number in range(node.lineno, node.body[0].lineno)
    )


def _names(frame: types.FrameType) -> Iterator[str]:
    """Return the names of a function and of its caller."""
    yield frame.f_code.co_name
    if frame.f_back is not None:
        yield frame.f_back.f_code.co_name


class Striker:
    """A trace function that raises at the line after that many others."""

    def __init__(self, after: int, kind: type[BaseException]) -> None:
        self.left = after
        self.error = kind("struck")
        self.has_struck = False
        self.where = ""

    def __call__(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        path = frame.f_code.co_filename
        if not path.startswith(HERE) or not UNTOUCHED.isdisjoint(_names(frame)):
            return None
        if event == "line" and not self.has_struck and frame.f_lineno not in blocks(path):
            self.left -= 1
            if self.left < 0:
                self.has_struck = True
                self.where = f"{os.path.basename(path)}:{frame.f_lineno}"
                raise self.error
        return self


def strike(action: Callable[[], object], after: int, kind: type[BaseException]) -> str:
    """Run a function that is struck after that many lines; return its result."""
    striker = Striker(after, kind)
    sys.settrace(striker)
    try:
        action()
    except BaseException as error:
        if error is not striker.error:
            return f"{error!r} in place of {striker.error!r}"
        return ""
    finally:
        sys.settrace(None)
        # They keep the locals of all traced calls, even of those that have dropped them.
        striker.error.__traceback__ = striker.error.__context__ = None
    return f"swallowed at {striker.where}" if striker.has_struck else "undisturbed"


def main(options: dict[str, Any]) -> dict[str, Any]:
    config = {
        "name": "redis",
        "options": options
        | {"maxConnections": 1, "whenFull": "error"}
        | {"commandTimeout": 60_000, "connectTimeout": 60_000},
    }
    wrong: list[str] = []
    strikes: dict[str, int] = {}
    with dscache.Cache.from_config(config) as cache:
        cache.delete_bulk(["written", "updated", "w/2"])
        cache.set_bulk(OWNED)
        kinds = itertools.cycle(KINDS)
        for name, action in ACTIONS.items():
            step = STEPS.get(name, 1)
            if "nodes" in options:
                # Connecting takes a thousand lines for each node.
                step *= 45 if name in ("connect", "anew") else 3
            for number in itertools.count():
                kind = next(kinds)
                before = cache if name not in ("connect", "anew") else _new(config)
                told = strike(functools.partial(action, before, number), number * step, kind)
                if told == "undisturbed":
                    strikes[name] = number
                    _check(before, wrong, f"{name}, undisturbed")
                elif told:
                    wrong.append(f"{name}, after {number * step} lines: {kind.__name__} {told}")
                problem = f"{name}, after {number * step} lines, {kind.__name__}"
                _check(before, wrong, problem)
                if before is not cache:
                    before.close()
                if told == "undisturbed" or len(wrong) > 20:
                    break
        if wrong:
            return {"wrong": wrong}
        found = {name: (it.version, it.data) for name, it in cache.get_bulk(NAMES).items()}
        if found != OWNED:
            wrong.append("records went to others")
        stats = cache.stats()
    return {
        "wrong": wrong,
        "strikes": strikes,
        "pending": sum(stats[name] for name in ("pending", "in_flight", "queued", "waiting")),
        "pending_bytes": stats["pending_bytes"],
        "connections": max(
            node["connections"] for node in stats.get("nodes", {"": stats}).values()
        ),
        "left": cache.stats()["connections"],
    }


def _new(config: dict[str, Any]) -> dscache.Cache:
    return dscache.Cache.from_config(config)


def _check(cache: dscache.Cache, wrong: list[str], when: str) -> None:
    try:
        for name in NAMES[:5]:
            record = cache.get(name)
            if record is None or (record.version, record.data) != OWNED[name]:
                wrong.append(f"{when}: {name} is {record!r:.100}")
        written = cache.get("written")
        if written is not None:
            said = written.data.removesuffix(BIG).split()
            if said[0] != "written" or int(said[1]) != written.version % 10**9:
                wrong.append(f"{when}: {written!r:.100} {written.data!r:.100}")
    except dscache.DscacheError as error:
        wrong.append(f"{when}: {error!r}")


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
