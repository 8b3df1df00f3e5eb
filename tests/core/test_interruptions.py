"""Exceptions of signal handlers and trace functions while JSON is read or written.

Each reaches the caller as it is, and none is taken for a flaw of the data.
"""

from __future__ import annotations

import functools
import gc
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pydantic
import pytest

from dscache import errors
from dscache.core import typed
from dscache.core.envelope import decode_as, read, stated_topic
from dscache.errors import MessageError, RecordError
from dscache.pubsub import encoding
from tests.support.wire import CORES, Waiter

FOLDER = str(Path(errors.__file__).parent)
MEGABYTES = b"[" + b"1," * 1_000_000 + b"1]"

ERRORS: list[Callable[[], Exception]] = [
    functools.partial(ValueError, "late"),
    functools.partial(TypeError, "late"),
    functools.partial(RecursionError, "late"),
    functools.partial(msgspec.ValidationError, "late"),
    functools.partial(json.JSONDecodeError, "late", "text", 0),
    functools.partial(UnicodeEncodeError, "utf-8", "text", 0, 1, "late"),
    functools.partial(RecordError, "late"),
    functools.partial(MessageError, "late"),
]


def name_of(make: Callable[[], Exception]) -> str:
    return type(make()).__name__


@pytest.fixture(params=CORES)
def core(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=ERRORS, ids=name_of)
def error(request: pytest.FixtureRequest) -> Iterator[Exception]:
    """An exception of a signal handler."""
    error: Exception = request.param()

    def handle(number: int, frame: FrameType | None) -> None:
        raise error

    with HandledBy(handle):
        yield error


class HandledBy:
    """Sets the handler of SIGUSR1 and SIGALRM, and restores the ones before."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __enter__(self) -> None:
        numbers = (signal.SIGUSR1, signal.SIGALRM)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handle in self._before.items():
            signal.signal(number, handle)


def interrupt() -> None:
    signal.raise_signal(signal.SIGUSR1)


def publish(core: Any, message: Any) -> None:
    core.Pipeline(Waiter, lambda: None, timeout=3600).publish(4, b"{", message, False)


def outcome(call: Callable[[], Any]) -> Any:
    """Return what a call raises."""
    try:
        call()
    except Exception as error:
        return error
    return None


def interrupted_late(call: Callable[[], Any]) -> Any:
    """Return what a call raises that a signal interrupts after about a millisecond."""

    def arm_and_call() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        call()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pass  # where a signal that is on its way strikes at once

    # A handler that runs in a callback of the garbage collector, such as hypothesis's, can't raise.
    gc.disable()
    try:
        return outcome(arm_and_call)
    finally:
        gc.enable()


# -- in the program's own code, which msgspec calls


class Interrupted(pydantic.BaseModel):
    """A signal arrives while its text is written, or it is read."""

    name: str = ""

    def model_dump_json(self, **options: Any) -> str:
        interrupt()
        return super().model_dump_json(**options)

    @classmethod
    def model_validate_json(cls, json_data: Any, **options: Any) -> Any:
        interrupt()
        return super().model_validate_json(json_data, **options)


class Checked(msgspec.Struct):
    name: str

    def __post_init__(self) -> None:
        interrupt()


class Holder(msgspec.Struct):
    model: Interrupted


ENCODED = [Interrupted(), [1, {"a": Interrupted()}], ("\ud800", Interrupted())]


@pytest.mark.parametrize("value", ENCODED, ids=["model", "within", "tolerant"])
def test_while_data_is_encoded(core: Any, error: Exception, value: Any) -> None:
    assert outcome(lambda: core.encode_data("user/1", value)) is error
    assert outcome(lambda: publish(core, value)) is error
    assert outcome(lambda: encoding.encode_text("data", value)) is error


@pytest.mark.parametrize(
    ("raw", "type_"),
    [
        (b'{"name":"Ada"}', Checked),
        (b'{"name":"\\ud800"}', Checked),
        (b'{"model":{"name":"Ada"}}', Holder),
        (b'{"name":"Ada"}', Interrupted),
    ],
    ids=["struct", "tolerant", "model within", "model"],
)
def test_while_a_type_is_decoded(core: Any, error: Exception, raw: bytes, type_: Any) -> None:
    record = core.Record("user/1", 1, raw, type=type_)
    assert outcome(lambda: record.data) is error
    assert outcome(lambda: core.Record("user/1", 1, raw).decode(type_)) is error
    waiter, bulk = Future[Any](), Future[Any]()
    typed.TypedRead(waiter, type_).set_result(record)
    assert outcome(waiter.result) is error
    typed.TypedBulkRead(bulk, type_).set_result({"user/1": record})
    assert outcome(bulk.result) is error


def test_while_a_message_is_decoded_into_a_type(error: Exception) -> None:
    assert outcome(lambda: decode_as(4, "A", b'{"name":"Ada"}', None, Checked)) is error


def test_while_a_pair_of_a_bulk_is_taken_apart(core: Any, error: Exception) -> None:
    class Pair:
        def __iter__(self) -> Iterator[int]:
            interrupt()
            return iter((1, 2))

    pipeline = core.Pipeline(Waiter, lambda: None, timeout=3600)
    assert outcome(lambda: pipeline.set_bulk({"user/1": Pair()})) is error


# -- at any line


@pytest.mark.parametrize("error", [ERRORS[0], ERRORS[2]], ids=name_of, indirect=True)
def test_while_a_large_text_is_read_or_written(core: Any, error: Exception) -> None:
    """A handler runs as soon as Python's code goes on, perhaps in a block that takes errors."""
    record = core.Record("user/1", 1, MEGABYTES)
    message = core.Message(4, "A", MEGABYTES)
    data = json.loads(MEGABYTES)
    assert interrupted_late(lambda: record.data) is error
    assert interrupted_late(lambda: message.data) is error
    assert interrupted_late(lambda: core.encode_data("user/1", data)) is error
    assert interrupted_late(lambda: publish(core, data)) is error


class Strike:
    """Raises an exception from a trace function, at one line of the core."""

    def __init__(self, line: int, error: Exception) -> None:
        self.line = line
        self.error = error
        self.seen = 0

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        # The finalizers of other tests' garbage have lines of the package too.
        gc.disable()
        sys.settrace(self.trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        gc.enable()

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.line:
                raise self.error
        return self.trace


def apart(call: Callable[[Any], Any], core: Any) -> Iterator[Any]:
    """Call in a generator, which has handled exceptions of its own.

    One that is struck while it is handled stays the handled one of the thread, from Python 3.14 on.
    """
    yield call(core)


def broken(raw: bytes) -> Callable[[Any], Any]:
    return lambda core: core.Record("user/1", 1, raw).data


def tolerant(value: Any) -> Callable[[Any], Any]:
    return lambda core: core.encode_data("user/1", value)


@pytest.mark.parametrize(
    "call",
    [
        broken(b'{"a":["\\ud800",1,-2,12e3]}'),
        broken(b'{"a":[NaN,1]}'),
        broken(b'{"a":["b",tru]}'),
        broken(b'["\\ud800",' + b"1" * 5000 + b"]"),
        tolerant({"a": ["\ud800", 1, msgspec.Raw(b'"text"')]}),
        tolerant({"a": [1, {"b": object()}]}),
        tolerant({(1, 2): 1}),
        lambda core: core.Record("user/1", 1, b'{"name":1}').decode(Checked),
        lambda core: core.Message(4, "A", b'{"name":"\\ud800"}').data,
        lambda core: stated_topic(4, core.Message(4, "A", b'{"topic":4,"name":"\\ud800"}')),
        lambda core: read(b'{"fromServer":"A","message":"\\ud800"}'),
        lambda core: publish(core, {"a": object()}),
    ],
)
@pytest.mark.parametrize("make", [ERRORS[0], ERRORS[4]], ids=name_of)
def test_at_each_line(core: Any, call: Callable[[Any], Any], make: Callable[[], Exception]) -> None:
    line, raised = 0, 0
    while True:
        line += 1
        error = make()
        strike = Strike(line, error)
        result = None
        try:
            with strike:
                next(apart(call, core))
        except Exception as caught:
            result = caught
        if strike.seen < line:
            break
        assert result is error, line
        raised += 1
    assert raised > 2
