"""The counts of a pipeline of Python after an exception at each line of an operation."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from dscache.core import pipeline as module
from tests.support.wire import Waiter

OPERATIONS: dict[str, Callable[[module.Pipeline], object]] = {
    "get": lambda pipeline: pipeline.get("b"),
    "get again": lambda pipeline: pipeline.get("a"),
    "head": lambda pipeline: pipeline.head("b"),
    "set": lambda pipeline: pipeline.set("b", 1, "text"),
    "set again": lambda pipeline: pipeline.set("w", 1, "another text"),
    "guarded set": lambda pipeline: pipeline.set("b", 1, "text", if_newer=True),
    "delete": lambda pipeline: pipeline.delete("b"),
    "guarded delete": lambda pipeline: pipeline.delete("b", if_version=3),
    "get_bulk": lambda pipeline: pipeline.get_bulk(["b", "c"]),
    "set_bulk": lambda pipeline: pipeline.set_bulk({"b": (1, "text"), "c": (2, "more")}),
    "key_command": lambda pipeline: pipeline.key_command(
        module.c.READ_KEY, "b", Waiter(), "GET", "b"
    ),
}


class Struck(BaseException):
    """Raised at a line."""


def strike(operation: Callable[[], object], line: int) -> bool:
    """Raise at the line of that number in the module; return whether there was one."""
    left = line

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != module.__file__ or frame.f_code.co_name == "recount":
            return None
        if event == "line":
            left -= 1
            if not left:
                raise Struck
        return trace

    sys.settrace(trace)
    try:
        operation()
    except Struck:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("name", OPERATIONS)
def test_counts_after_an_exception(name: str) -> None:
    """Otherwise nothing would be sent while records wait, or what was sent would be counted."""
    for line in itertools.count(1):
        pipeline = module.Pipeline(Waiter, lambda: None, timeout=100.0)
        pipeline.get("a")
        pipeline.set("w", 1, "x")
        was_struck = strike(lambda: OPERATIONS[name](pipeline), line)  # noqa: B023 # called at once
        waiting = sum(batch.waiting() for batch in pipeline.queue)
        assert pipeline.queued == waiting, line
        assert pipeline.pending_bytes == sum(batch.text_size() for batch in pipeline.queue), line
        assert pipeline.operations == sum(
            1 if batch.bulk is not None else batch.waiting() for batch in pipeline.queue
        ), line
        if not was_struck:
            assert line > 5
            return
