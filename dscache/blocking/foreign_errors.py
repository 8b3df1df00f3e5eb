"""Telling the errors of a socket from those that a signal handler raises in the middle of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import partial
from types import CodeType, FrameType
from typing import Any

from ..errors import DscacheError, ProtocolError


class ConnectTimeout(TimeoutError):
    """The deadline of an attempt to connect is past."""


def raise_foreign(error: Exception) -> None:
    """Raise an error again that comes from elsewhere than a socket: a signal handler may raise any.

    Errors of this package have passed only its own frames, errors of the system have a number, and
    an error of a signal handler has passed the handler's frame. While a reply is read, most
    exceptions become a ProtocolError, of which they are the cause.
    """
    cause = error.__cause__
    if isinstance(error, ProtocolError) and cause is not None and not _is_own(cause):
        raise cause
    if isinstance(error, (DscacheError, ConnectTimeout)):
        is_not_from_socket = not _is_own(error)
    elif isinstance(error, OSError) and error.errno is None:
        is_not_from_socket = True
    else:
        is_not_from_socket = is_of_handler(error)
    if is_not_from_socket:
        raise error


def is_of_handler(error: BaseException) -> bool:
    """Whether an error comes from a signal handler, or through one."""
    strangers = [frame.f_code for frame in _frames(error) if not _is_ours(frame)]
    return bool(strangers) and not _handlers().isdisjoint(strangers)


def _is_own(error: BaseException) -> bool:
    return all(map(_is_ours, _frames(error)))


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Yield the frames that an error has passed, from the outermost to the one that raised it."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _is_ours(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__")
    return isinstance(module, str) and module.partition(".")[0] == "dscache"


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
