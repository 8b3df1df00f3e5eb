"""Waiters: objects that get the result or the error of an operation. Both cores use them."""

from __future__ import annotations

from asyncio import Future, InvalidStateError
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, Protocol

from . import failures

# The waiters of a record that is read again: its first reply has no effect.
DISCARDED: Final[list[Any]] = []


class Waiter(Protocol):
    """The receiver of an operation's outcome: ``asyncio.Future``, or an object with its methods."""

    def set_result(self, result: Any, /) -> None: ...
    def set_exception(self, error: Exception, /) -> None: ...


def arguments_of_future(create_waiter: Callable[[], Any]) -> dict[str, Any] | None:
    """Return the arguments of the ``asyncio.Future`` that a function makes, or None.

    It is None unless the function is ``create_future`` of an event loop without futures of its own.
    """
    if getattr(create_waiter, "__name__", "") != "create_future":
        return None
    loop = getattr(create_waiter, "__self__", None)
    return {"loop": loop} if loop and type(create_waiter()) is Future else None


class SupersededWrite:
    """The waiters of a refused write, attached to a newer write of the same name.

    The newer write would have overwritten the refused one at once, so the refused write counts
    as done if the newer one is. With ``always`` the newer one is a removal: both get True,
    because the record existed between them.
    """

    __slots__ = ("_always", "_refusal", "_waiter")

    def __init__(self, waiter: Any, refusal: Callable[[], Exception], always: bool) -> None:
        self._waiter = waiter
        self._refusal = refusal
        self._always = always

    def set_result(self, done: bool, /) -> None:
        if done or self._always:
            resolve(self._waiter, True)
        else:
            reject(self._waiter, self._refusal)

    def set_exception(self, error: Exception, /) -> None:
        reject(self._waiter, partial(failures.copy_error, error))


class Part:
    """The waiter of one part of an operation, the part that ``key`` names.

    ``whole`` gets the outcome by ``take`` or ``take_error``; again, if settling the first time has
    raised.
    """

    __slots__ = ("_key", "_whole")

    def __init__(self, whole: Any, key: Any) -> None:
        self._whole = whole
        self._key = key

    def set_result(self, result: object, /) -> None:
        self._whole.take(self._key, result)

    def set_exception(self, error: Exception, /) -> None:
        self._whole.take_error(self._key, error)


def with_waiter(earlier: Any, waiter: Any) -> list[Any]:
    """Return the waiters of one record with one more added."""
    if type(earlier) is not list:
        return [earlier, waiter]
    earlier.append(waiter)
    return earlier


def resolve(waiter: Any, result: object) -> None:
    """Give a waiter, or each of a list, the result, unless it was cancelled."""
    for one in waiter if type(waiter) is list else (waiter,):
        try:  # noqa: SIM105 # suppress() takes three times as long
            one.set_result(result)
        except InvalidStateError:
            pass


def reject(waiter: Any, make: Callable[[], Exception]) -> None:
    """Give a waiter, or each of a list, an error of its own, unless it was cancelled."""
    for one in waiter if type(waiter) is list else (waiter,):
        with suppress(InvalidStateError):
            one.set_exception(make())
