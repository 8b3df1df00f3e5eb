"""Errors as values: pickled, copied, and sent from one process to another."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

import dscache
from dscache import errors
from dscache.errors import BulkError, ConnectError, DscacheError, RecordError, ReplyError
from dscache.net.connect_errors import UnsuitableServer

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def kinds(base: type[DscacheError] = DscacheError) -> Iterator[type[DscacheError]]:
    """Yield each class of the tree of errors."""
    if base.__module__ == "dscache.errors":
        yield base
    for one in base.__subclasses__():
        yield from kinds(one)


KINDS = sorted(set(kinds()), key=lambda kind: kind.__name__)


def made(kind: type[DscacheError]) -> DscacheError:
    """Return an error with every attribute that its class may have."""
    error: DscacheError
    if kind is BulkError:
        part = RecordError("record 'a': bad", name="a")
        part.__cause__ = ValueError("of the text")
        record = dscache.Record("b", 1, b"[1]", True)
        error = BulkError("get_bulk", {"a": part, "c": ReplyError("OOM full")}, {"b": record})
    elif issubclass(kind, RecordError):
        error = kind("record ('a', 1): name must be a str", name=("a", 1))
    elif kind is ReplyError:
        error = ReplyError("OOM command not allowed", context="set 'a' at localhost:6379")
    else:
        error = kind(f"a text of {kind.__name__}")
    error.__cause__ = ConnectError("no connection")
    error.__cause__.__cause__ = OSError(111, "refused")
    error.add_note("a note")
    error.add_note("another")
    return error


def shown(error: BaseException | None) -> Any:
    """Return the content of an error as a comparable value."""
    if error is None:
        return None
    own = {
        name: shown_value(value) for name, value in vars(error).items() if name != "__traceback__"
    }
    return (type(error), str(error), error.args, own, shown(error.__cause__))


def shown_value(value: Any) -> Any:
    if isinstance(value, BaseException):
        return shown(value)
    if isinstance(value, dict):
        return {name: shown_value(one) for name, one in value.items()}
    if isinstance(value, dscache.Record):
        return (value.name, value.version, value.raw, value.stale)
    return value


WAYS: dict[str, Callable[[Any], Any]] = {
    **{
        f"protocol {protocol}": lambda error, protocol=protocol: pickle.loads(
            pickle.dumps(error, protocol)
        )
        for protocol in PROTOCOLS
    },
    "python": lambda error: pickle._loads(pickle._dumps(error)),  # type: ignore[attr-defined]
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def test_the_tree_is_complete() -> None:
    public = (getattr(dscache, name) for name in dscache.__all__)
    classes = {one for one in public if isinstance(one, type)}
    assert {one for one in classes if issubclass(one, DscacheError)} == set(KINDS)
    assert len(KINDS) == 17


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_every_error_survives_pickling(kind: type[DscacheError], way: str) -> None:
    error = made(kind)
    back = WAYS[way](error)
    assert back is not error
    assert shown(back) == shown(error)
    assert back.__notes__ == ["a note", "another"]
    assert back.__suppress_context__ is True
    # And any number of times.
    assert shown(WAYS[way](back)) == shown(error)


def raise_one(name: str) -> None:
    raise made(getattr(errors, name)) from made(ReplyError)


def test_every_error_is_returned_by_a_worker_process() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for kind in KINDS:
            with pytest.raises(kind) as caught:
                pool.submit(raise_one, kind.__name__).result(timeout=60)
            expected = made(kind)
            error = caught.value
            assert (type(error), str(error)) == (kind, str(expected))
            assert {*vars(expected)} <= {*vars(error)}
            if isinstance(error, BulkError):
                assert list(error.errors) == ["a", "c"]
                assert error.errors["c"].code == "OOM"  # type: ignore[attr-defined]
                assert error.result["b"].stale is True
            elif isinstance(error, ReplyError):
                assert (error.code, error.message) == ("OOM", "OOM command not allowed")
            elif isinstance(error, RecordError):
                assert error.name == ("a", 1)


def test_an_error_is_pickled_without_its_unpicklable_parts() -> None:
    class Misfit(Exception):
        """An error that can be pickled but not unpickled."""

        def __init__(self, one: str, two: str) -> None:
            super().__init__(one)

    error = RecordError("record 5: bad", name=threading.Lock())
    error.__cause__ = Misfit("a", "b")
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back)) == (RecordError, "record 5: bad")
    assert "lock" in back.name
    assert back.__cause__ is None
    copied = copy.copy(error)
    assert copied.name is error.name
    assert copied.__cause__ is error.__cause__


def test_a_deepcopy_is_deep_and_a_copy_is_not() -> None:
    error = made(BulkError)
    assert isinstance(error, BulkError)
    deep, flat = copy.deepcopy(error), copy.copy(error)
    assert flat.errors["a"] is error.errors["a"]
    assert flat.__cause__ is error.__cause__
    assert deep.errors["a"] is not error.errors["a"]
    assert deep.__cause__ is not error.__cause__
    assert deep.result is not error.result


def test_a_private_class_is_pickled_as_its_public_base() -> None:
    back = pickle.loads(pickle.dumps(UnsuitableServer("too old")))
    assert type(back) is ConnectError
    assert str(back) == "too old"
    assert type(copy.copy(UnsuitableServer("too old"))) is UnsuitableServer


class Own(ReplyError):
    """A program's error, derived from one of dscache's."""


def test_a_class_of_a_program_keeps_its_type() -> None:
    back = pickle.loads(pickle.dumps(Own("ERR no", context="here")))
    assert (type(back), back.code, str(back)) == (Own, "ERR", "ERR no (here)")
