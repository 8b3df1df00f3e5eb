"""Record: lazy, immutable, and not shared."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from dscache import _backend, _fast
from dscache.core import constants as c
from dscache.core import pure
from dscache.errors import RecordError
from tests.support.wire import CORES, Waiter

DEEP = 20_000


class Address(msgspec.Struct):
    city: str
    zip: int = 0


class User(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    home: Address


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


@pytest.fixture(params=CORES)
def core(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def record(core: Any) -> Any:
    return core.Record("user/1", 3, b'{"name":"Ada"}')


# -- what it holds


def test_fields(record: Any) -> None:
    assert (record.name, record.version, record.raw) == ("user/1", 3, b'{"name":"Ada"}')
    assert record.data == {"name": "Ada"}
    assert record.stale is False


def test_stale(core: Any) -> None:
    assert core.Record("a", 1, b"1", True).stale is True
    assert core.Record("a", 1, b"1", stale=True).stale is True
    assert core.Record(name="a", version=1, raw=b"1").stale is False


@pytest.mark.parametrize("version", [0, 1, 2**31, 2**53 + 1, 2**63 - 1])
def test_every_version_is_an_exact_int(core: Any, version: int) -> None:
    record = core.Record("a", version, b"1")
    assert record.version == version
    assert type(record.version) is int


def test_it_unpacks_into_version_and_data(record: Any) -> None:
    version, data = record
    assert (version, data) == (3, {"name": "Ada"})
    assert data is record.data
    assert list(record) == [3, {"name": "Ada"}]
    assert dict([record]) == {3: {"name": "Ada"}}


def test_data_is_decoded_at_first_access_and_kept(core: Any) -> None:
    broken = core.Record("a", 1, b"no json")
    assert broken.raw == b"no json"
    assert repr(broken)
    assert broken == core.Record("a", 1, b"no json")
    with pytest.raises(RecordError):
        _ = broken.data
    record = core.Record("a", 1, b"[1]")
    assert record.data is record.data


def test_null_data_is_decoded_once_too(core: Any) -> None:
    record = core.Record("a", 1, b"null")
    assert record.data is None
    assert record.data is None


def test_two_records_share_no_data(core: Any) -> None:
    one, two = core.Record("a", 1, b'{"x":[]}'), core.Record("a", 1, b'{"x":[]}')
    one.data["x"].append(1)
    assert two.data == {"x": []}


# -- immutable


@pytest.mark.parametrize("name", ["name", "version", "raw", "stale", "data", "_data", "other"])
def test_nothing_can_be_set_or_deleted(record: Any, name: str) -> None:
    with pytest.raises(AttributeError, match=rf"^a Record is immutable: {name} can't be set$"):
        setattr(record, name, 1)
    with pytest.raises(AttributeError, match=rf"^a Record is immutable: {name} can't be deleted$"):
        delattr(record, name)
    assert record.data == {"name": "Ada"}


def test_a_record_has_slots(record: Any) -> None:
    assert not hasattr(record, "__dict__")


def test_a_record_is_freed(core: Any) -> None:
    """A Record of the compiled core is not tracked by the garbage collector, and needn't be."""

    class Witness:
        pass

    witness = Witness()
    record = core.Record("a", 1, b"[]")
    record.data.append(witness)
    gone = weakref.ref(witness)
    gc.disable()
    try:
        del witness, record
        assert gone() is None
    finally:
        gc.enable()


# -- as a value


def test_equality(core: Any, record: Any) -> None:
    assert record == core.Record("user/1", 3, b'{"name":"Ada"}')
    assert record == core.Record("user/1", 3, b'{"name":"Ada"}', stale=True)
    others = [
        core.Record("user/2", 3, b'{"name":"Ada"}'),
        core.Record("user/1", 4, b'{"name":"Ada"}'),
        core.Record("user/1", 3, b'{"name": "Ada"}'),
    ]
    for other in (*others, None, 3, (3, {"name": "Ada"}), "user/1", object()):
        assert record != other
        assert other != record
    assert record.__eq__(3) is NotImplemented


def test_hash(core: Any, record: Any) -> None:
    same = core.Record("user/1", 3, b'{"name":"Ada"}', stale=True)
    assert hash(record) == hash(same)
    assert {record: 1}[same] == 1
    assert len({record, same, core.Record("user/1", 4, b"1")}) == 2


def test_records_have_no_order(record: Any) -> None:
    with pytest.raises(TypeError, match="'<' not supported between"):
        _ = record < record


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("user/1", 3, b"{}"), "Record('user/1', 3, b'{}')"),
        (("user/1", 3, b"{}", True), "Record('user/1', 3, b'{}', stale=True)"),
        (("a'\n", 0, b"'"), 'Record("a\'\\n", 0, b"\'")'),
        (("n" * 200, 1, b"d" * 10_000), f"Record('{'n' * 79}…, 1, b'{'d' * 78}…)"),
    ],
)
def test_repr(core: Any, arguments: tuple[Any, ...], text: str) -> None:
    assert repr(core.Record(*arguments)) == text


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("stale", [False, True])
def test_pickle(
    core: Any, protocol: int, decoded: bool, stale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_backend, "core", core)
    record = core.Record("é", 2**63 - 1, b'{"x":[1]}', stale)
    if decoded:
        record.data["x"].append(2)
    back = pickle.loads(pickle.dumps(record, protocol))
    assert type(back) is core.Record
    assert back == record
    assert back.stale is stale
    assert back.data == {"x": [1]}


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy])
def test_a_copy_shares_no_data(core: Any, copy_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "core", core)
    record = core.Record("a", 1, b"[1]", True)
    record.data.append(2)
    other = copy_of(record)
    assert other == record
    assert other.stale is True
    assert other.data == [1]


def test_records_of_different_cores_are_not_equal() -> None:
    assert _fast.Record("a", 1, b"1") != pure.Record("a", 1, b"1")


def test_garbage_collection_skips_the_records_of_a_bulk() -> None:
    """Tracking would cost a large bulk a quarter of its time. The pure core can't avoid it."""
    pairs = {f"r{i}": (1, b"text") for i in range(1000)}
    pipeline = _fast.Pipeline(Waiter, lambda: None)
    gc.collect()
    before = len(gc.get_objects())
    pipeline.set_bulk({name: (1, i) for i, name in enumerate(pairs)})
    records = [_fast.Record(name, *pair) for name, pair in pairs.items()]
    assert len(gc.get_objects()) - before < 100
    assert pipeline.queued == len(records) == 1000


# -- JSON


@pytest.mark.parametrize(
    ("raw", "data"),
    [
        (b"null", None),
        (b"true", True),
        (b"0", 0),
        (b"-1.5e3", -1500.0),
        (b'""', ""),
        (b"[]", []),
        (b' {"a" : [1, {"b" : null}]} \n', {"a": [1, {"b": None}]}),
        (b'{"a":1,"a":2}', {"a": 2}),
        (b"9223372036854775808", 2**63),
        (b"18446744073709551616", 2**64),
        (b"123456789012345678901234567890", 123456789012345678901234567890),
        # values that msgspec refuses and JSON.parse accepts
        (b"1e400", math.inf),
        (b'{"a":[-1e400]}', {"a": [-math.inf]}),
        (rb'"\ud800"', "\ud800"),
        (rb'{"\udc00":["\ud83d"]}', {"\udc00": ["\ud83d"]}),
        (b'"\xff\xfe"', "\ufffd\ufffd"),
        (b'"\xed\xa0\x80"', "\ufffd\ufffd\ufffd"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_json(core: Any, raw: bytes, data: object) -> None:
    record = core.Record("a", 1, raw)
    assert record.data == data
    assert type(record.data) is type(data)
    assert record.data is record.data
    assert record.raw == raw


def test_deep_json(core: Any) -> None:
    data = core.Record("a", 1, b"[" * DEEP + b"]" * DEEP).data
    for _ in range(DEEP - 1):
        [data] = data
    assert data == []


# -- bounds of data that is encoded


def nested(levels: int, kind: str) -> object:
    data: object = []
    for _ in range(levels - 1):
        data = [data] if kind == "list" else {"[": data} if kind == "dict" else Pair(data, ["}"])
    return data


class Pair(msgspec.Struct):
    left: object
    right: object


def doubled(levels: int, kind: str) -> object:
    """Return a value in which 2**levels paths lead to one number."""
    data: object = 1
    for _ in range(levels):
        data = [data, data] if kind == "list" else Pair(data, data)
    return data


def at_depth(frames: int, call: Callable[[], Any]) -> Any:
    return call() if frames == 0 else at_depth(frames - 1, call)


@pytest.mark.parametrize("frames", [0, 200])
@pytest.mark.parametrize("kind", ["list", "dict"])
def test_data_of_the_last_allowed_level(core: Any, kind: str, frames: int) -> None:
    text = at_depth(frames, lambda: core.encode_data("a", nested(c.MAX_DATA_DEPTH, kind)))
    opening, closing = (b"[", b"]") if kind == "list" else (b'{"[":', b"}")
    levels = c.MAX_DATA_DEPTH - 1
    assert text == opening * levels + b"[]" + closing * levels


@pytest.mark.parametrize("levels", [c.MAX_DATA_DEPTH + 1, 5000, DEEP])
@pytest.mark.parametrize("kind", ["list", "dict", "struct"])
def test_data_beyond_it(core: Any, kind: str, levels: int) -> None:
    data = nested(levels, kind)
    with pytest.raises(RecordError, match=rf"it has {levels} levels, and 1000 are the most$"):
        core.encode_data("a", data)
    with pytest.raises(RecordError, match=r"^record 'a': data can't be encoded: \$\.k[.\[]"):
        core.encode_data("a", {"k": data, "v": ["x" * 2**20]})


@pytest.mark.parametrize("kind", ["list", "struct"])
@pytest.mark.parametrize("levels", [30, 60, 900])
def test_data_whose_parts_have_too_many_paths(core: Any, kind: str, levels: int) -> None:
    with pytest.raises(RecordError, match=r"\$: its JSON text has more than 536870912 bytes$"):
        core.encode_data("a", doubled(levels, kind))


def test_data_whose_parts_have_too_many_paths_and_levels(core: Any) -> None:
    with pytest.raises(RecordError, match="it has 20000 levels, and 1000 are the most"):
        core.encode_data("a", doubled(20_000, "list"))
    assert len(core.encode_data("a", doubled(15, "list"))) == 4 * 2**15 - 3


def test_brackets_in_strings_are_no_levels(core: Any) -> None:
    data = [
        {"[{" * 3000: ['"]' * 3000, "\\[" * 3000, '\\"[' * 3000]},
        "]}" * 3000,
        nested(500, "list"),
    ]
    assert core.encode_data("a", data) == msgspec.json.encode(data)
    # Brackets that close in strings hide no levels.
    hidden: object = 1
    for _ in range(1001):
        hidden = ['"]\\"}', hidden, "]"]
    with pytest.raises(RecordError, match="it has 1001 levels"):
        core.encode_data("a", hidden)


def test_text_given_as_it_is_has_no_bound_of_depth(core: Any) -> None:
    text = b"[" * 5000 + b"]" * 5000
    assert core.encode_data("a", msgspec.Raw(text)) == text


@pytest.mark.parametrize("buffer", [4096, *c.DATA_BUFFERS[:2]])
def test_texts_about_as_long_as_the_buffers(core: Any, buffer: int) -> None:
    for size in (buffer - 1, buffer, buffer + 1, buffer * 2):
        data = [*[{"a": [1, "b"]}] * (buffer // 64), ""]
        data[-1] = "x" * (size - len(msgspec.json.encode(data)))
        assert core.encode_data("a", data) == msgspec.json.encode(data)
    assert core.encode_data("a", {"a": 1}) == b'{"a":1}'


def test_a_type_may_encode_data_while_it_is_encoded(core: Any) -> None:
    class Model:
        def model_dump_json(self, by_alias: bool) -> str:
            return str(core.encode_data("b", ["x" * 100]), "utf-8")

    expected = b'["yyy",["' + b"x" * 100 + b'"],["' + b"x" * 100 + b'"]]'
    assert core.encode_data("a", ["yyy", Model(), Model()]) == expected


BROKEN = [
    b"",
    b"undefined",
    b"NaN",
    b"{",
    b"[1,]",
    b"012",
    b"'a'",
    b"\xef\xbb\xbf1",
    b"\xc2\xa01",
    b'"\n"',
    b"1 2",
    b"\0",
    b"\xff",
    b"[" * DEEP,
]


@pytest.mark.parametrize("raw", BROKEN, ids=lambda raw: repr(raw)[:20])
def test_broken_json_names_the_record(core: Any, raw: bytes) -> None:
    record = core.Record("user/1", 7, raw)
    for _ in range(2):
        with pytest.raises(
            RecordError, match=r"^record 'user/1', version 7: the stored data isn't JSON: "
        ) as broken:
            _ = record.data
        assert broken.value.name == "user/1"
        assert broken.value.__cause__ is not None
    with pytest.raises(RecordError):
        list(record)


# -- decode


@pytest.mark.parametrize(
    ("raw", "kind", "value"),
    [
        (b'{"name":"Ada","home":{"city":"L"}}', User, User("Ada", Address("L"))),
        (b'{"x":1,"y":2,"z":3}', Point, Point(1, 2)),
        (b"[1,2]", list[int], [1, 2]),
        (b"[1,2]", tuple[int, float], (1, 2.0)),
        (b'{"a":[1]}', dict[str, list[int]], {"a": [1]}),
        (b"5", int, 5),
        (b"null", int | None, None),
        (b'{"a":1}', Any, {"a": 1}),
        (b'{"city":"L","zip":5}', Address | int, Address("L", 5)),
        # through the tolerant decoder
        (rb'{"city":"\ud800"}', Address, Address("\ud800")),
        (b'{"city":"\xff"}', Address, Address("\ufffd")),
        (b"[1e400]", list[float], [math.inf]),
    ],
    ids=str,
)
def test_decode(core: Any, raw: bytes, kind: Any, value: object) -> None:
    record = core.Record("a", 1, raw)
    first, second = record.decode(kind), record.decode(kind)
    assert first == second == value
    assert type(first) is type(value)
    if isinstance(value, (list, dict, msgspec.Struct)):
        assert first is not second


@pytest.mark.parametrize(
    ("raw", "kind", "reason"),
    [
        (b'{"name":"Ada","home":{"city":5}}', User, "Expected `str`, got `int` - at `$.home.city`"),
        (b'{"name":"Ada"}', User, "Object missing required field `home`"),
        (
            b'{"name":"Ada","home":{"city":"L"},"x":1}',
            User,
            "Object contains unknown field `x`",
        ),
        (b'[1,"2"]', list[int], "Expected `int`, got `str` - at `$[1]`"),
        (b'{"x":1.5}', Point, "Expected `int`, got `float` - at `$.x`"),
        (rb'{"city":"\ud800","zip":"x"}', Address, "Expected `int`, got `str` - at `$.zip`"),
        (b"1e400", int, "Expected `int`, got `float`"),
    ],
    ids=str,
)
def test_decode_names_the_path_of_a_mismatch(core: Any, raw: bytes, kind: Any, reason: str) -> None:
    with pytest.raises(RecordError) as misfit:
        core.Record("user/1", 7, raw).decode(kind)
    assert str(misfit.value) == f"record 'user/1', version 7: {reason}"
    assert misfit.value.name == "user/1"
    assert isinstance(misfit.value.__cause__, msgspec.ValidationError)


@pytest.mark.parametrize("raw", BROKEN, ids=lambda raw: repr(raw)[:20])
def test_decode_refuses_broken_json(core: Any, raw: bytes) -> None:
    with pytest.raises(
        RecordError, match=r"^record 'user/1', version 7: the stored data isn't JSON: "
    ):
        core.Record("user/1", 7, raw).decode(User)


def test_decode_takes_its_type_only_by_position(record: Any) -> None:
    with pytest.raises(TypeError):
        record.decode(type=dict)
    with pytest.raises(TypeError):
        record.decode()


def test_decode_into_a_type_unknown_to_msgspec(core: Any) -> None:
    """The caller made the mistake, not the record."""
    with pytest.raises(TypeError, match="not supported"):
        core.Record("a", 1, b"1").decode(list[int] | list[str])
