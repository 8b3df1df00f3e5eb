"""Typed Records, and reads whose Records have data of a type."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import math
import numbers
import os
import pickle
import subprocess
import sys
import typing
from collections.abc import Generator
from typing import Annotated, Any, TypedDict

import attrs
import msgspec
import pydantic
import pytest

from dscache import _backend
from dscache.core import typed
from dscache.core.memory import MemoryPipeline
from dscache.errors import BulkError, ConnectionLost, DscacheError, RecordDamaged, RecordError
from tests.support.near_wire import NearExchange
from tests.support.wire import CORES, ClusterExchange, Exchange, ModelServer, Waiter


class Address(msgspec.Struct):
    city: str


class User(msgspec.Struct):
    name: str
    age: int = 0


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


@attrs.define
class Size:
    width: int


class Profile(TypedDict):
    name: str
    links: list[str]


class Proud(msgspec.Struct):
    """A type whose own code raises an exception that says nothing of JSON."""

    error: str

    def __post_init__(self) -> None:
        raise {"key": KeyError, "stop": StopIteration, "value": ValueError}[self.error]("too proud")


class Future:
    """The waiter of a caller, as far as an ``asyncio.Future`` has to be one."""

    def __init__(self) -> None:
        self._waiter = Waiter()
        self.set_result = self._waiter.set_result
        self.set_exception = self._waiter.set_exception
        self.cancel = self._waiter.cancel
        self.result = self._waiter.result

    @property
    def is_done(self) -> bool:
        return self._waiter.done

    def cancelled(self) -> bool:
        return self._waiter.cancelled

    def __await__(self) -> Generator[Future, None, Any]:
        while not self.is_done:
            yield self
        return self.result()


@pytest.fixture(params=CORES)
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(_backend, "core", request.param)
    return request.param


def user(core: Any, raw: bytes = b'{"name":"Ada","age":36}', stale: bool = False) -> Any:
    return core.Record("user/1", 7, raw, stale, User)


# -- records


@pytest.mark.parametrize(
    ("raw", "kind", "value"),
    [
        (b'{"name":"Ada","age":36}', User, User("Ada", 36)),
        (b'{"x":1}', Point, Point(1)),
        (b'{"width":3}', Size, Size(3)),
        (b'{"name":"Ada","links":[]}', Profile, {"name": "Ada", "links": []}),
        (b'[{"name":"Ada"}]', list[User], [User("Ada")]),
        (b'{"3":[1,2]}', dict[int, tuple[int, float]], {3: (1, 2.0)}),
        (b"null", User | None, None),
        (b"null", type(None), None),
        (b'{"a":1}', Any, {"a": 1}),
        (b'{"a":1}', dict, {"a": 1}),
        (rb'{"city":"\ud800"}', Address, Address("\ud800")),  # by the tolerant decoder
        (rb'{"3":"\ud800"}', dict[int, str], {3: "\ud800"}),
    ],
    ids=str,
)
def test_data_is_of_the_type(core: Any, raw: bytes, kind: Any, value: Any) -> None:
    record = core.Record("a", 1, raw, type=kind)
    assert record.data == value
    assert type(record.data) is type(value)
    assert record.data is record.data
    assert tuple(record) == (1, value)
    assert record.raw == raw


def test_a_type_whose_annotations_have_no_hash(core: Any) -> None:
    kind = Annotated[int, msgspec.Meta(ge=3), {"made": "elsewhere"}]
    with pytest.raises(TypeError):
        hash(kind)
    assert core.Record("a", 1, b"5", type=kind).data == 5
    with pytest.raises(RecordError, match="Expected `int` >= 3"):
        _ = core.Record("a", 1, b"2", type=kind).data


def test_a_mismatch_names_the_record_and_the_path(core: Any) -> None:
    record = user(core, b'{"name":"Ada","age":"old"}')
    for _ in range(2):
        with pytest.raises(RecordError) as misfit:
            _ = record.data
        text = "record 'user/1', version 7: Expected `int`, got `str` - at `$.age`"
        assert str(misfit.value) == text
        assert misfit.value.name == "user/1"
    assert record.decode(dict) == {"name": "Ada", "age": "old"}


def test_the_mismatch_of_a_key_is_named_as_such(core: Any) -> None:
    """Keys of JSON objects are text, which an int may be made of."""
    with pytest.raises(RecordError, match=r"Expected `int`, got `str` - at `\$\[\.\.\.\]`$"):
        core.Record("a", 1, b'{"1":"x"}').decode(dict[int, int])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("key", "KeyError('too proud')"),
        ("stop", "StopIteration('too proud')"),
        ("value", "too proud"),
    ],
)
def test_whatever_a_type_raises_belongs_to_the_record(core: Any, error: str, reason: str) -> None:
    record = core.Record("a", 1, b'{"error":"%b"}' % error.encode(), type=Proud)
    for decode in (lambda: record.data, lambda: record.decode(Proud)):
        with pytest.raises(RecordError) as failure:
            decode()
        assert str(failure.value) == f"record 'a', version 1: {reason}"
        assert failure.value.__cause__ is not None


def test_equality_looks_at_name_version_and_text_alone(core: Any) -> None:
    record, untyped = user(core), core.Record("user/1", 7, b'{"name":"Ada","age":36}')
    assert record == untyped
    assert hash(record) == hash(untyped)
    assert repr(record) == repr(untyped)
    assert record.data != untyped.data


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("decoded", [False, True])
def test_a_pickle_keeps_the_type(core: Any, protocol: int, decoded: bool) -> None:
    record = user(core, stale=True)
    if decoded:
        record.data.name = "Bob"
    back = pickle.loads(pickle.dumps(record, protocol))
    assert type(back) is core.Record
    assert back == record
    assert back.stale is True
    assert back.data == User("Ada", 36)


@pytest.mark.parametrize("kind", [list[User], User | None, Annotated[User, "text"]])
def test_a_pickle_keeps_any_type_that_can_be_pickled(core: Any, kind: Any) -> None:
    back = pickle.loads(pickle.dumps(core.Record("a", 1, b"1", False, kind)))
    assert back.__reduce__()[1][4] == kind


def test_the_pickle_of_a_record_without_a_type_is_what_it_was(core: Any) -> None:
    assert core.Record("a", 1, b"1", True).__reduce__()[1] == ("a", 1, b"1", True)


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", [User, User | None])
def test_a_copy_keeps_the_type_and_shares_no_data(core: Any, copy_of: Any, kind: Any) -> None:
    record = core.Record("user/1", 7, b'{"name":"Ada","age":36}', False, kind)
    record.data.name = "Bob"
    other = copy_of(record)
    assert other == record
    assert other.data == User("Ada", 36)


def test_the_class_has_a_parameter(core: Any) -> None:
    alias = core.Record[User]
    assert typing.get_origin(alias) is core.Record
    assert typing.get_args(alias) == (User,)
    assert alias("a", 1, b'{"name":"Ada"}', type=User).data == User("Ada")
    assert type(alias("a", 1, b"1")) is core.Record


def test_a_record_still_has_no_dict(core: Any) -> None:
    with pytest.raises(AttributeError):
        _ = user(core).__dict__


def test_a_type_can_not_be_set(core: Any) -> None:
    with pytest.raises(AttributeError, match="immutable"):
        user(core)._type = None


# -- models of pydantic


class Model(pydantic.BaseModel):
    name: str
    age: int = pydantic.Field(0, alias="years")
    born: datetime.date | None = None


class Strict(pydantic.BaseModel, strict=True):
    born: datetime.date


ADA = Model(name="Ada", years=36, born=datetime.date(1815, 12, 10))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (ADA, Model),
        (ADA, Model | None),
        ([ADA, ADA], list[Model]),
        ({"a": {"b": ADA}}, dict[str, dict[str, Model]]),
        (Strict(born=datetime.date(1815, 12, 10)), Strict),
        ([Strict(born=datetime.date(1815, 12, 10))], list[Strict]),
    ],
    ids=repr,
)
def test_a_model_is_written_and_read(core: Any, value: Any, kind: Any) -> None:
    record = core.Record("a", 1, core.encode_data("a", value), type=kind)
    assert record.data == value
    assert pickle.loads(pickle.dumps(record)).data == value


def test_a_model_is_written_as_its_own_json(core: Any) -> None:
    text = b'{"name":"Ada","years":36,"born":"1815-12-10"}'
    assert core.encode_data("a", ADA) == text
    assert core.encode_data("a", [ADA, "\ud800"]) == b"[" + text + rb',"\ud800"]'


class Measured(pydantic.BaseModel, ser_json_inf_nan="constants"):
    value: float
    text: str = ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_that_writes_no_json_is_refused(core: Any, value: float) -> None:
    model = Measured(value=value)
    for data, path in ((model, "$"), ([0, {"n": model}], "$[1].n"), (["\ud800", model], "$[1]")):
        with pytest.raises(RecordError) as refused:
            core.encode_data("a", data)
        assert str(refused.value) == (
            f"record 'a': data can't be encoded: {path}: the model Measured writes NaN or "
            'Infinity, which isn\'t JSON; set its ser_json_inf_nan to "null" or "strings"'
        )


def test_a_model_may_have_such_words_in_its_text(core: Any) -> None:
    model = Measured(value=1.5, text="NaN, Infinity")
    assert core.encode_data("a", model) == b'{"value":1.5,"text":"NaN, Infinity"}'


@pytest.mark.parametrize("backend", ["fast", "pure"])
def test_the_libraries_of_models_are_optional(backend: str) -> None:
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['attr', 'attrs', 'pydantic']))\n"
        "import dscache\n"
        "with dscache.Cache({'name': 'memory'}) as cache:\n"
        "    cache.set('a', 1, {'n': 2})\n"
        "    assert cache.get('a', type=dict[str, int]).data == {'n': 2}\n"
        "    try: cache.set('a', 2, object())\n"
        "    except dscache.RecordError as error: print(error)\n"
        "    try: cache.get('a', type=sys.__class__)\n"
        "    except TypeError: print(dscache.BACKEND)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "DSCACHE_BACKEND": backend},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("record 'a': ")
    assert second == backend


class OfAnotherLibrary:
    """Has the method of a model alone."""

    def model_dump_json(self, *, by_alias: bool) -> str:
        return f'{{"by_alias":{str(by_alias).lower()}}}'


def test_whatever_has_the_method_of_a_model_is_written(core: Any) -> None:
    text = b'{"by_alias":true}'
    assert core.encode_data("a", OfAnotherLibrary()) == text
    assert core.encode_data("a", {"n": [OfAnotherLibrary()]}) == b'{"n":[' + text + b"]}"


@pytest.mark.parametrize(
    ("raw", "kind", "reason"),
    [
        (b'{"name":"Ada","years":"old"}', Model, "years: Input should be a valid integer, "),
        (b'[{"name":5}]', list[Model], "name: Input should be a valid string - at `$[0]`"),
        (b"[{}]", list[Model], "name: Field required - at `$[0]`"),
        (b'{"years":"x","born":7.5}', Model, "name: Field required and 2 more"),
        (b"[]", Model, "Input should be an object"),
        (rb'{"name":"\ud800"}', Model, ""),
        (b"{", Model, "the stored data isn't JSON"),
    ],
    ids=str,
)
def test_a_misfit_of_a_model_names_the_field(core: Any, raw: bytes, kind: Any, reason: str) -> None:
    with pytest.raises(RecordError) as misfit:
        core.Record("a", 1, raw).decode(kind)
    assert str(misfit.value).startswith(f"record 'a', version 1: {reason}")
    assert "old" not in str(misfit.value)
    assert "\n" not in str(misfit.value)


def test_a_class_unknown_to_msgspec_is_still_refused(core: Any) -> None:
    class Plain:
        pass

    with pytest.raises(RecordError, match="Expected `Plain`, got `list`"):
        core.Record("a", 1, b"[]").decode(Plain)
    with pytest.raises(
        RecordError,
        match=r"\$\.b: Encoding objects of type Plain is unsupported; convert it to a dict",
    ):
        core.encode_data("a", {"a": ADA, "b": Plain()})


# -- reads


class TypedNear(NearExchange):
    """A NearExchange whose operations return a Future."""

    def _promise(self) -> Any:
        return Future()


class Nodes:
    """A ClusterExchange whose nodes share one ModelServer."""

    def __init__(self, core: Any, key_prefix: str) -> None:
        self.server = ModelServer()
        self.cluster = ClusterExchange(core, key_prefix=key_prefix)
        self.pipeline = self.cluster.pipelines[0]

    def run(self) -> None:
        for node in range(3):
            self.cluster.serve(node, self.server)
        self.cluster.assert_drained()


class Reads:
    """The operations of one core on servers, with or without a near cache, or on a dict."""

    def __init__(self, core: Any, where: str) -> None:
        self.exchange: Any = None
        self.operations: Any
        # With a hash tag, both keys of a record are in one slot.
        self.prefix = "{app}" if where == "cluster" else ""
        if where == "memory":
            self.operations = MemoryPipeline(Waiter, lambda: None, None)
        elif where == "near cache":
            self.exchange = TypedNear(core)
            self.operations = self.exchange.near
        elif where in ("cluster", "split records"):
            self.exchange = Nodes(core, self.prefix)
            self.operations = self.exchange.cluster.router
        else:
            self.exchange = Exchange(core)
            self.operations = self.exchange.pipeline

    def put(self, name: str, raw: bytes, version: int = 1) -> None:
        if self.exchange is None:
            self.operations.set(name, version, msgspec.Raw(raw))
        else:
            self.exchange.server.put(self.prefix + name, version, raw)

    def issue(self, name: str, kind: Any) -> Future:
        waiter = Future()
        typed.get(self.operations, waiter, name, kind)
        return waiter

    def issue_bulk(self, names: list[str], kind: Any) -> Future:
        waiter = Future()
        typed.get_bulk(self.operations, waiter, names, kind)
        return waiter

    def run(self) -> None:
        if self.exchange is not None:
            self.exchange.run()

    def get(self, name: str, kind: Any) -> Any:
        waiter = self.issue(name, kind)
        self.run()
        return waiter.result()

    def get_bulk(self, names: list[str], kind: Any) -> Any:
        waiter = self.issue_bulk(names, kind)
        self.run()
        return waiter.result()


SERVERS = ("pipeline", "near cache", "cluster", "split records")
ON_A_SERVER = pytest.mark.parametrize("reads", SERVERS, indirect=True)


@pytest.fixture(params=[*SERVERS, "memory"])
def reads(core: Any, request: pytest.FixtureRequest) -> Reads:
    return Reads(core, request.param)


def test_a_read_gives_a_record_of_the_type(core: Any, reads: Reads) -> None:
    reads.put("a", b'{"name":"Ada"}', 7)
    for _ in range(2):  # the second one from the near cache
        record = reads.get("a", User)
        assert type(record) is core.Record
        assert (record.name, record.version, record.raw) == ("a", 7, b'{"name":"Ada"}')
        assert record.data == User("Ada")
        assert reads.get("b", User) is None


def test_a_read_of_a_record_that_does_not_fit_fails(reads: Reads) -> None:
    reads.put("a", b'{"name":5}')
    for _ in range(2):
        with pytest.raises(RecordError) as misfit:
            reads.get("a", User)
        assert str(misfit.value) == (
            "record 'a', version 1: Expected `str`, got `int` - at `$.name`"
        )
        assert misfit.value.name == "a"
    assert reads.get("a", Profile | Any).data == {"name": 5}


def test_a_bulk_gives_records_of_the_type(reads: Reads) -> None:
    for name in "abc":
        reads.put(name, b'{"name":"%b"}' % name.encode())
    for _ in range(2):
        found = reads.get_bulk(["c", "x", "a", "b"], User)
        assert list(found) == ["c", "a", "b"]
        assert [record.data for record in found.values()] == [User("c"), User("a"), User("b")]
        assert reads.get_bulk(["x"], User) == {}


def test_a_bulk_fails_with_the_records_that_do_not_fit(reads: Reads) -> None:
    reads.put("a", b'{"name":"Ada"}')
    reads.put("b", b"[]")
    reads.put("c", b'{"error":"stop"}')
    reads.put("d", b"no JSON")
    for _ in range(2):
        with pytest.raises(BulkError) as failure:
            reads.get_bulk([*"abcdx"], User)
        errors = failure.value.errors
        assert list(errors) == ["b", "c", "d"]
        assert all(type(error) is RecordDamaged for error in errors.values())
        assert str(errors["b"]) == "record 'b', version 1: Expected `object`, got `array`"
        assert "the stored data isn't JSON" in str(errors["d"])
        assert list(failure.value.result) == ["a"]
        assert failure.value.result["a"].data == User("Ada")


def test_a_read_fails_with_whatever_the_type_raises(reads: Reads) -> None:
    reads.put("a", b'{"error":"stop"}')
    with pytest.raises(RecordError, match=r"^record .a., version 1: StopIteration"):
        reads.get("a", Proud)
    with pytest.raises(BulkError, match="StopIteration"):
        reads.get_bulk(["a"], Proud)
    assert reads.get("a", dict).data == {"error": "stop"}


def test_an_unknown_type_is_refused_at_the_call(reads: Reads) -> None:
    """The caller made the mistake, not the record."""
    before = reads.operations.stats()
    with pytest.raises(TypeError, match="not supported"):
        reads.issue("a", list[int] | list[str])
    with pytest.raises(TypeError, match="not supported"):
        reads.issue_bulk(["a"], list[int] | list[str])
    assert reads.operations.stats() == before
    if reads.exchange is not None:
        assert reads.exchange.pipeline.take_output() == b""


class Unknown:
    """A class of which msgspec knows no form."""


class Inside(msgspec.Struct):
    deep: dict[str, list[Unknown | None]]


@pytest.mark.parametrize("kind", [Unknown, Inside, list[Unknown], set[Unknown], complex])
def test_a_class_that_msgspec_can_not_make_is_refused_at_the_call(reads: Reads, kind: Any) -> None:
    for _ in range(2):
        with pytest.raises(TypeError, match=r"^type=.*: msgspec can't decode JSON into [UIc]"):
            reads.issue("a", kind)
        with pytest.raises(TypeError, match=r"^type=.*: msgspec can't decode JSON into [UIc]"):
            reads.issue_bulk(["a"], kind)


class Node(msgspec.Struct):
    inner: Node | None
    models: list[Model]


@pytest.mark.parametrize(
    "kind", [Node, Point, Profile, Size, list[Model], numbers.Number, dict[int, Any], Any]
)
def test_a_type_that_is_made_by_other_means_is_known(kind: Any) -> None:
    typed.check_type(kind)


def test_each_caller_gets_the_type_it_asked_for(reads: Reads) -> None:
    reads.put("a", b'{"name":"Ada"}')
    for _ in range(2):
        kinds: list[Any] = [User, dict[str, str], dict, User, Point]
        callers = [reads.issue("a", kind) for kind in kinds]
        bulk = reads.issue_bulk(["a"], User)
        reads.run()
        with pytest.raises(RecordError, match="missing required field `x`"):
            callers.pop().result()
        records = [caller.result() for caller in callers] + [bulk.result()["a"]]
        data = [record.data for record in records]
        assert [type(value) for value in data] == [User, dict, dict, User, User]
        assert len({id(value) for value in data}) == len(data)


def test_a_read_without_a_type_is_apart_from_one_with_a_type(core: Any) -> None:
    near = TypedNear(core)
    near.server.put("a", 1, b'{"name":"Ada"}')
    for _ in range(2):
        one, other = near.near.get("a"), near.near.get("a", type=User)
        near.run()
        assert one.result().data == {"name": "Ada"}
        assert other.result().data == User("Ada")
    assert near.near.get("a", User).is_done
    with pytest.raises(RecordError, match="name"):
        near.near.get("", type=User)


@ON_A_SERVER
def test_a_cancelled_read_decodes_nothing(reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    reads.put("a", b'{"name":"Ada"}')
    callers = [reads.issue("a", User), reads.issue_bulk(["a"], User), reads.issue("a", User)]
    monkeypatch.setattr(typed, "with_type", lambda record, kind: decoded.append(record.name))
    for caller in callers[:2]:
        caller.cancel()
    reads.run()
    assert decoded == ["a"]
    assert [caller.is_done for caller in callers] == [False, False, True]


def test_a_lost_read_fails_as_any_other(core: Any) -> None:
    reads = Reads(core, "pipeline")
    one, bulk = reads.issue("a", User), reads.issue_bulk(["b"], User)
    reads.exchange.pipeline.fail_all(lambda operation: ConnectionLost(f"{operation}: lost"))
    with pytest.raises(ConnectionLost, match=r"^get 'a': lost$"):
        one.result()
    with pytest.raises(DscacheError, match="lost"):
        bulk.result()


def test_a_bulk_adds_its_misfits_to_the_damaged_records(core: Any) -> None:
    reads = Reads(core, "pipeline")
    reads.put("a", b'{"name":"Ada"}')
    reads.exchange.server.put("b", "x", b"{}")
    reads.put("c", b"[]")
    with pytest.raises(BulkError) as failure:
        reads.get_bulk([*"abc"], User)
    assert list(failure.value.errors) == ["b", "c"]
    assert "its stored version isn't an integer" in str(failure.value.errors["b"])
    assert failure.value.result["a"].data == User("Ada")


def test_the_last_known_record_has_the_type_too(core: Any) -> None:
    near = TypedNear(core, serve_stale=True)
    near.server.put("a", 1, b'{"name":"Ada"}')
    reads = Reads(core, "near cache")
    reads.exchange, reads.operations = near, near.near
    assert reads.get("a", User).stale is False
    near.lose()
    record = reads.issue("a", User).result()
    assert record.stale is True
    assert record.data == User("Ada")
