"""Exceptions of code that interrupted a call, told apart from the call's own errors.

A signal handler may raise between any two lines of Python, and so may a trace function: also
inside a ``try`` block whose handler takes the exception for a flaw of the data. The interpreter
gives both the frame that they interrupt, which is their caller's, and no other function has it.
"""

from __future__ import annotations

import inspect
from types import FrameType

import msgspec


def raise_interruption(error: BaseException) -> None:
    """Raise the exception by which other code interrupted the call that raised ``error``, if any.

    For the beginning of an ``except`` block that takes errors for a flaw of the data. msgspec
    raises a ValidationError of its own in place of some errors, with them as the cause.
    """
    cause: BaseException | None = error
    while cause is not None and not _has_interrupted(cause):
        cause = cause.__cause__ if type(cause) is msgspec.ValidationError else None
    if cause is None:
        return
    context = cause.__context__
    try:
        raise cause
    finally:
        cause.__context__ = context  # the error that wraps the cause is none of its reasons
        del cause, error  # each would keep this frame, and the frame each of them


def _has_interrupted(error: BaseException) -> bool:
    step = error.__traceback__
    while step is not None:
        if _interrupts(step.tb_frame):
            return True
        step = step.tb_next
    return False


def _interrupts(frame: FrameType) -> bool:
    """Return whether one of a frame's arguments is the frame of its caller."""
    caller, code = frame.f_back, frame.f_code
    if caller is None:
        return False
    positional = code.co_argcount
    names, values = code.co_varnames, frame.f_locals
    if any(values.get(name) is caller for name in names[:positional]):
        return True
    if not code.co_flags & inspect.CO_VARARGS:
        return False
    more = values.get(names[positional + code.co_kwonlyargcount])
    return type(more) is tuple and any(value is caller for value in more)
