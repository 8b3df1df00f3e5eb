"""Telling the errors of a socket from those that a signal handler raises in the middle of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import partial
from types import CodeType, FrameType
from typing import Any, Final

from ..errors import DscacheError, ProtocolError

# An error that a task, a future or a context manager hands on has passed their frames as well.
_OWN: Final = frozenset(("dscache", "asyncio", "contextlib"))


def foreign(error: BaseException) -> BaseException | None:
    """Return the error from elsewhere that this error is, or was made of; None if there is none.

    Errors of this package have passed only its own frames. An error of a signal handler has passed
    the handler's frame. While a reply is read, most exceptions become a ProtocolError, of which
    they are the cause.
    """
    cause = error.__cause__
    if isinstance(error, ProtocolError) and cause is not None and not is_own(cause):
        return cause
    is_foreign = not is_own(error) if isinstance(error, DscacheError) else is_of_handler(error)
    return error if is_foreign else None


def is_of_handler(error: BaseException) -> bool:
    """Whether an error comes from a signal handler, or through one."""
    strangers = [frame.f_code for frame in _frames(error) if not _is_ours(frame)]
    return bool(strangers) and not _handlers().isdisjoint(strangers)


def is_own(error: BaseException) -> bool:
    """Whether an error has passed only this package's frames."""
    return all(map(_is_ours, _frames(error)))


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Yield the frames that an error has passed, from the outermost to the one that raised it."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _is_ours(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__")
    return isinstance(module, str) and module.partition(".")[0] in _OWN


def _handlers() -> set[CodeType]:
    """Return the code of all signal handlers that are set."""
    found = set()
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, partial):
            handler = handler.func
        if callable(handler) and not hasattr(handler, "__code__"):
            handler = getattr(handler, "__func__", None) or type(handler).__call__
        code = getattr(handler, "__code__", None)
        if isinstance(code, CodeType):
            found.add(code)
    return found
