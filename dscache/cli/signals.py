"""Signals that end a command in order: SIGTERM and SIGHUP do what Ctrl-C does."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .._start import is_command_line

_received = signal.SIGINT


@contextmanager
def handled_as_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt during the block.

    A signal that the parent process has ignored, as nohup does, stays ignored. So does Ctrl-C in a
    command that a script runs in the background: shells ignore SIGINT there. After the block, a
    signal ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL
    ]
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if is_ignored:
        # asyncio replaces the default handler alone. The signal itself doesn't arrive.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in numbers:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        if is_ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        elif is_command_line() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # Python would print a traceback of another Ctrl-C while it ends.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def left_to_editor() -> Iterator[None]:
    """Ignore Ctrl-C during the block, as the terminal sends it to the editor in front of it too.

    SIGTERM and SIGHUP still raise KeyboardInterrupt.
    """

    def ignore_ctrl_c(number: int, frame: FrameType | None) -> None:
        if _received is not signal.SIGINT:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, ignore_ctrl_c)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def raised_at_once() -> Iterator[None]:
    """Let a signal interrupt what the block waits for, such as the reader of a full pipe.

    Otherwise asyncio would cancel the task, which comes to know of it at its next await. Raises
    KeyboardInterrupt.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if _is_cancelled():
            raise KeyboardInterrupt
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_cancelled() -> bool:
    """Return whether the running task, if there is one, is to end."""
    asyncio = sys.modules.get("asyncio")  # the version is shown without it
    try:
        task = asyncio and asyncio.current_task()
    except RuntimeError:
        return False
    return bool(task and task.cancelling())


def received() -> signal.Signals:
    """Return the signal that has interrupted the command: SIGINT for Ctrl-C."""
    return _received


def exit_status() -> int:
    """Return the exit status after an interrupt, as shells count it: 128 plus the signal."""
    return 128 + _received


def have_caused(error: BaseException) -> bool:
    """Return whether an exception was raised because of an interrupt.

    typer replaces KeyboardInterrupt by exceptions with a status of its own.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            return True
        cause = cause.__context__
    return False


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number)
    # asyncio cancels the main task at SIGINT alone. Its handler is called, since the signal may be
    # blocked.
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(signal.SIGINT, frame)
