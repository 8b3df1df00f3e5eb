"""Tolerant JSON: what msgspec refuses and deepstream's records may hold."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import math
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dscache.core import tolerant_json

DEEP = 50_000


def decode_tolerantly(raw: bytes) -> object:
    return tolerant_json.decode_tolerantly(str(raw, "utf-8", "replace"))


def decode_deep(raw: bytes) -> object:
    return tolerant_json.decode_deep(str(raw, "utf-8", "replace"))


# The full decoder, and each of its later stages alone.
DECODERS = [tolerant_json.decode, decode_tolerantly, decode_deep]


@pytest.fixture(params=DECODERS)
def decode(request: pytest.FixtureRequest) -> Callable[[bytes], Any]:
    chosen: Callable[[bytes], Any] = request.param
    return chosen


# -- decode: what JSON.parse accepts


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        # one half of a surrogate pair, or two in the wrong order
        (rb'"\ud800"', "\ud800"),
        (rb'"a\uDFFFb"', "a\udfffb"),
        (rb'"\ude00\ud83d"', "\ude00\ud83d"),
        (rb'"\ud83d\ude00"', "\U0001f600"),
        (rb'"\ud83d\ud83d\ude00"', "\ud83d\U0001f600"),
        (rb'"\ud83d\u0041"', "\ud83dA"),
        (rb'"\ud83d\\ude00"', "\ud83d\\ude00"),
        (rb'{"\ud800":{"\udfff":[]}}', {"\ud800": {"\udfff": []}}),
        # invalid UTF-8: as many U+FFFD as the WHATWG's decoder makes
        (b'"\xff\xfe"', "\ufffd\ufffd"),
        (b'"\xc3("', "\ufffd("),
        (b'"\xe2\x82"', "\ufffd"),
        (b'"\xe2\x28\xa1"', "\ufffd(\ufffd"),
        (b'"\xf0\x9f\x98"', "\ufffd"),
        (b'"\xf0\x9f\x98x"', "\ufffdx"),
        (b'"\xed\xa0\x80"', "\ufffd\ufffd\ufffd"),
        (b'"\xc0\xaf"', "\ufffd\ufffd"),
        (b'"\xf4\x90\x80\x80"', "\ufffd" * 4),
        (b'{"\xff":"\xff"}', {"\ufffd": "\ufffd"}),
        # strings
        (rb'"\"\\\/\b\f\n\r\t\u00e9\u00E9\u0000"', '"\\/\b\f\n\r\téé\0'),
        ('"\x7f\x80\x9f\u2028\u2029\ufeff"'.encode(), "\x7f\x80\x9f\u2028\u2029\ufeff"),
        (b'""', ""),
        # numbers
        (b"1e400", math.inf),
        (b"-1e400", -math.inf),
        (b'{"n":[1e400,-1E+400]}', {"n": [math.inf, -math.inf]}),
        (b"1e" + b"9" * 400, math.inf),
        (b"1e-" + b"9" * 400, 0.0),
        (b"0e999999999999", 0.0),
        (b"5e-324", 5e-324),
        (b"1.0", 1.0),
        (b"-0", 0),
        (b"-0.0", -0.0),
        (b"12.50E1", 125.0),
        (b"9007199254740993", 9007199254740993),
        (b"-123456789012345678901234567890", -123456789012345678901234567890),
        (b"9" * 4300, 10**4300 - 1),
        (b"-" + b"9" * 4300, 1 - 10**4300),
        (b"9" * 4301, math.inf),
        (b"-" + b"9" * 4301, -math.inf),
        (b"9" * 4301 + b"e-4301", 1.0),
        # containers
        (b"[]", []),
        (b"{}", {}),
        (b'[[],{},[{}],{"":[]}]', [[], {}, [{}], {"": []}]),
        (b'{"a":1,"b":2,"a":3}', {"a": 3, "b": 2}),
        (b'{"__proto__":{"x":1},"toJSON":2}', {"__proto__": {"x": 1}, "toJSON": 2}),
        (b"[true,false,null]", [True, False, None]),
        # white space
        (
            b' \t\r\n{ "a" :\n[ 1 , 2 ] , "b" : { } , "c" : [\t] }\r\n',
            {"a": [1, 2], "b": {}, "c": []},
        ),
    ],
)
def test_reads_what_javascript_reads(
    decode: Callable[[bytes], Any], raw: bytes, value: object
) -> None:
    decoded = decode(raw)
    assert decoded == value
    assert type(decoded) is type(value)
    assert not isinstance(value, dict) or list(decoded) == list(value)


def test_integers_stay_integers_and_floats_floats(decode: Callable[[bytes], Any]) -> None:
    kinds = [type(n) for n in decode(b"[1,-1,0,1.0,1e2,1E2,18446744073709551616,1e400]")]
    assert kinds == [int, int, int, float, float, float, int, float]


def test_reads_more_digits_than_the_interpreter_converts(
    decode: Callable[[bytes], Any],
) -> None:
    # The interpreter's own limit may be lower or lifted; the result must not depend on it.
    assert decode(b"[" + b"1" * 1_000_000 + b"]") == [math.inf]


# -- decode: what JSON.parse refuses


@pytest.mark.parametrize(
    "raw",
    [
        b"", b" ", b"\n", b"undefined", b"nul", b"nulll", b"True", b"NaN", b"-NaN", b"Infinity",
        b"-Infinity", b"[NaN]", b'{"a":Infinity}', b'{"a":[-Infinity]}', b"'a'",
        b"012", b"-012", b"00", b"1.", b"-", b"-.5", b".5", b"+1", b"1e", b"1e+", b"1.e3", b"0x10",
        b"1_000", b"1 2", b"- 1", "\u0663".encode(), b"1n",
        b"[", b"]", b"[1", b"[1,", b"[1,]", b"[,1]", b"[,]", b"[1 2]", b"[1]]", b"[1}", b"[1:2]",
        b"{", b"}", b'{"a"', b'{"a":', b'{"a":1', b'{"a":1,', b'{"a":1,}', b'{"a":1]', b'{"a",1}',
        b"{,}", b"{1:2}", b"{a:1}", b"{'a':1}", b'{"a":1 "b":2}', b'{"a":}', b'{"a"}', b'{"a":1}}',
        b'"', b'"a', b'"\\"', b'"\\', b'"\\u', b'"\\u12', b'"\\u12"', b'"\\u00zz"', b'"\\u+123"',
        b'"\\u 123"', b'"\\u0x12"', b'"\\u1_23"', b'"\\x41"', b'"\\U0041"', b"\"\\'\"", b'"\\ud800',
        b'"\\ud83d\\u"', b'"a\nb"', b'"\t"', b'"\x00"', b'"\x1f"', b'{"\n":1}', b'"a" "b"',
        b"\xef\xbb\xbf1", b"\xc2\xa01", b"1\xc2\xa0", b"[1,\xe2\x80\xa82]", b"\x0b1", b"1\x0c",
        b"\xff1", b"1\xff", b"\x00", b"1\x00", b"{} // c", b"/* */1", b"[1]x", b"true false",
        b'{"\\ud800":1,}', b'["\\ud800",]', b'"\\ud800"x', b'["\xff"',
    ],
)  # fmt: skip
def test_refuses_what_javascript_refuses(decode: Callable[[bytes], Any], raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"^character \d+: ") as caught:
        decode(raw)
    assert type(caught.value) is ValueError
    # Python's own error would keep the whole text alive and show it in a traceback.
    assert not isinstance(caught.value.__context__, json.JSONDecodeError)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "character 0: expected a value, found the end"),
        (b"[1, x]", "character 4: expected a value, found 'x'"),
        (b"[ x", "character 2: expected a value or ']', found 'x'"),
        (b"[1,]", "character 3: expected a value, found ']'"),
        (b"[1 2]", "character 3: expected ',' or ']', found '2'"),
        (b'{"a":1]', "character 6: expected ',' or '}', found ']'"),
        (b"{x", "character 1: expected a name or '}', found 'x'"),
        (b'{"a":1, }', "character 8: expected a name in quotes, found '}'"),
        (b'{"a" 1}', "character 5: expected ':', found '1'"),
        (b"012", "character 1: expected the end, found '1'"),
        (b'["\xff", nan]', "character 6: expected a value, found 'n'"),
        (b'"a', "character 0: unterminated string"),
        (b'"a\nb"', "character 2: invalid control character"),
        (b'["\\x"]', "character 2: invalid \\escape"),
    ],
)
def test_errors_name_the_position_and_the_expectation(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=r"^character") as caught:
        decode_deep(raw)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("raw", [b"[1,NaN]", b'{"a":-Infinity}', b"[Infinity]"])
def test_constants_of_python_are_refused_with_their_position(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"^character \d: expected a value.*, found '[NI-]'$"):
        tolerant_json.decode(raw)


# -- decode: depth


def depth_of(value: Any) -> int:
    depth = 0
    while value:
        value = value[0] if isinstance(value, list) else value["a"]
        depth += 1
    return depth


def test_reads_nesting_beyond_any_recursion_limit() -> None:
    assert depth_of(tolerant_json.decode(b"[" * DEEP + b"]" * DEEP)) == DEEP - 1
    assert depth_of(tolerant_json.decode(b'{"a":' * DEEP + b"{}" + b"}" * DEEP)) == DEEP
    mixed = tolerant_json.decode(b'[{"a":' * DEEP + rb'"\ud800"' + b"}]" * DEEP)
    assert isinstance(mixed, list)


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * DEEP,
        b'{"a":' * DEEP,
        b"[" * DEEP + b"]" * (DEEP - 1),
        b"[" * DEEP + b"]" * (DEEP + 1),
        b"[" * DEEP + b"NaN" + b"]" * DEEP,
        b"[" * DEEP + b"}" + b"]" * DEEP,
        b'{"":' * DEEP + b"1" + b"]" * DEEP,
    ],
    ids=["open", "open objects", "one short", "one over", "nan", "other bracket", "mixed up"],
)
def test_refuses_broken_deep_text(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"^character \d+: expected "):
        tolerant_json.decode(raw)


# Each is so large that a quadratic step would take minutes.
@pytest.mark.parametrize(
    ("raw", "is_json"),
    [
        (b'"' + rb"\ud800" * 300_000 + b'"', True),
        (b'"' + b"\xff" * 1_000_000 + b'"', True),
        (b'"' + b"\\" * 1_000_001, False),
        (b'["' + b'","'.join([rb"\ud800"] * 100_000) + b'"]', True),
        (b"1" * 3_000_000, True),
        (b"0." + b"3" * 3_000_000 + b"e99999", True),
        (b"1e" + b"9" * 3_000_000, True),
        (b" " * 3_000_000, False),
        (b"[" + b" " * 3_000_000 + b"NaN", False),
        (b"[" * 300_000, False),
        (b'{"":' * 300_000, False),
        (b'{"\xff":' + b"1," * 300_000, False),
        (b"-" * 1_000_000, False),
        (b'"' * 1_000_000, False),
    ],
    ids=[
        "surrogates", "invalid bytes", "backslashes", "strings", "digits", "fraction", "exponent",
        "space", "space before NaN", "arrays", "objects", "commas", "signs", "quotes",
    ],
)  # fmt: skip
def test_large_hostile_text_takes_linear_time(raw: bytes, is_json: bool) -> None:
    if is_json:
        assert tolerant_json.decode(raw) is not None
    else:
        with pytest.raises(ValueError, match=r"^character \d+: "):
            tolerant_json.decode(raw)


# -- encode


class Colour(enum.Enum):
    RED = "r\ud800"
    NUMBERED = {1: "\ud800"}  # noqa: RUF012 - msgspec encodes such values, so we do
    BYTES = b"ab"


class Strength(enum.IntEnum):
    HIGH = 3


class Person(msgspec.Struct, rename="camel"):
    first_name: object
    age: int | msgspec.UnsetType = msgspec.UNSET


class Point(msgspec.Struct, array_like=True, tag="point"):
    x: object
    y: object = 0


@dataclasses.dataclass
class Pair:
    left: object
    right: object = None


class Image:
    pass


MOMENT = datetime.datetime(2020, 2, 29, 12, 30, 15, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("\ud800", rb'"\ud800"'),
        ('a\udfffé\n"\\/\x1f\x7f', rb'"a\udfff' + 'é\\n\\"\\\\/\\u001f\x7f"'.encode()),
        ("\\\ud800", rb'"\\\ud800"'),
        ("\ud800\U0001f600", rb'"\ud800' + "\U0001f600".encode() + b'"'),
        ({"\ud800": 1, "é": "\udfff"}, rb'{"\ud800":1,"' + 'é":"'.encode() + rb'\udfff"}'),
        (["\ud800", [], {}, (), [[]], {"a": {}}], rb'["\ud800",[],{},[],[[]],{"a":{}}]'),
        (["\ud800", math.nan, math.inf, -math.inf], rb'["\ud800",null,null,null]'),
        ({"\ud800": math.nan, "b": [math.inf]}, rb'{"\ud800":null,"b":[null]}'),
        (["\ud800", 2**64, -(2**63) - 1], rb'["\ud800",18446744073709551616,-9223372036854775809]'),
        (["\ud800", 10**4299], rb'["\ud800",1' + b"0" * 4299 + b"]"),
        (["\ud800", True, None, 1.5, -0.0], rb'["\ud800",true,null,1.5,-0.0]'),
        ([uuid.UUID(int=1), "\ud800"], rb'["00000000-0000-0000-0000-000000000001","\ud800"]'),
        (["\ud800", MOMENT], rb'["\ud800","2020-02-29T12:30:15Z"]'),
        (["\ud800", MOMENT.date(), decimal.Decimal("1.50")], rb'["\ud800","2020-02-29","1.50"]'),
        (
            ["\ud800", b"ab", bytearray(b"ab"), memoryview(b"ab")],
            rb'["\ud800","YWI=","YWI=","YWI="]',
        ),
        (["\ud800", {1}, frozenset([2]), (3, 4)], rb'["\ud800",[1],[2],[3,4]]'),
        ({1: "\ud800", 1.5: 2, Strength.HIGH: Strength.HIGH}, rb'{"1":"\ud800","1.5":2,"3":3}'),
        (Person("\ud800"), rb'{"firstName":"\ud800"}'),
        (Person(Point("\ud800"), 3), rb'{"firstName":["point","\ud800",0],"age":3}'),
        (Pair("\ud800", Pair(1)), rb'{"left":"\ud800","right":{"left":1,"right":null}}'),
        ([Colour.RED, Colour.BYTES], rb'["r\ud800","YWI="]'),
        ([Colour.NUMBERED, math.nan], rb'[{"1":"\ud800"},null]'),
        (
            ["\ud800", msgspec.Raw(b'{"x" : 1.0}'), {"r": msgspec.Raw(b"[ ]")}],
            rb'["\ud800",{"x" : 1.0},{"r":[ ]}]',
        ),
    ],
)
def test_writes_what_msgspec_refuses(data: object, text: bytes) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        msgspec.json.encode(data)
    assert tolerant_json.encode(data) == text
    json.loads(text)


@pytest.mark.parametrize(
    "data",
    [
        None, True, 0, 2**70, 1.5, math.nan, "é\n\x1f", [], {}, {"a": [1, {"b": None}]}, {1: 2},
        MOMENT, b"ab", {1}, Strength.HIGH, Person("a"), Person("a", 3), Point(1), Pair(1, [2]),
        msgspec.Raw(b" [1 , 2.0]"), [msgspec.Raw(b'{"a":1}'), math.inf], [1e300, 0.1, -2.5e-9],
    ],
)  # fmt: skip
def test_writes_the_rest_as_msgspec_does(data: object) -> None:
    assert json.loads(tolerant_json.encode(data)) == json.loads(msgspec.json.encode(data))


def cyclic_dict() -> object:
    data: dict[str, Any] = {"a": {}}
    data["a"]["b"] = [data["a"]]
    return data


def cyclic_list() -> object:
    data: list[Any] = [1]
    data.append(data)
    return data


def deep(levels: int) -> object:
    data: object = 1
    for _ in range(levels):
        data = {"a": data}
    return data


def shared(levels: int, data: object) -> object:
    """Return lists in which 2**levels paths lead to the innermost ``data``."""
    for _ in range(levels):
        data = [data, data]
    return data


def half_made() -> Person:
    person = Person("a")
    del person.first_name
    return person


UNSUPPORTED = "Encoding objects of type Image is unsupported"
CYCLIC = "nested too deeply or cyclic"


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (Image(), TypeError, f"$: {UNSUPPORTED}"),
        (Image, TypeError, "$: Encoding objects of type type is unsupported"),
        (
            {"users": [1, "b", {}, {"photo": Image()}]},
            TypeError,
            f"$.users[3].photo: {UNSUPPORTED}",
        ),
        ({"a b": (1, Image())}, TypeError, f"$['a b'][1]: {UNSUPPORTED}"),
        ({"\ud800": [Image()]}, TypeError, rf"$['\ud800'][0]: {UNSUPPORTED}"),
        ({"k" * 90: Image()}, TypeError, f"$['{'k' * 79}…]: {UNSUPPORTED}"),
        ({1: {2.5: Image()}}, TypeError, f"$[1][2.5]: {UNSUPPORTED}"),
        ([frozenset([Image()])], TypeError, f"$[0][0]: {UNSUPPORTED}"),
        (
            {"p": Person(Pair(1, Point(Image())))},
            TypeError,
            f"$.p.firstName.right.x: {UNSUPPORTED}",
        ),
        ([{"a": "\ud800"}, {"b": "\udfff", "c": Image()}], TypeError, f"$[1].c: {UNSUPPORTED}"),
        ({"a": {None: 1}}, TypeError, "$.a: Only dicts with str-like or number-like keys"),
        ({"a": [{(1, 2): 1}]}, TypeError, "$.a[0]: Only dicts with str-like"),
        ({"a": msgspec.UNSET}, TypeError, "$.a: Encoding objects of type msgspec.UnsetType"),
        ([1, 10**5000], ValueError, "$[1]: Exceeds the limit"),
        (msgspec.Raw(b""), ValueError, "$: an empty msgspec.Raw isn't JSON text"),
        (["\ud800", {"r": msgspec.Raw(b"")}], ValueError, "$[1].r: an empty msgspec.Raw"),
        ({"p": half_made()}, ValueError, "$.p: AttributeError: "),
        ({"m": memoryview(b"abcd")[::2]}, ValueError, "$.m: BufferError: "),
        (cyclic_dict(), ValueError, f"$.a.b[0]: {CYCLIC}: it holds itself"),
        (cyclic_list(), ValueError, f"$[1]: {CYCLIC}: it holds itself"),
        (deep(DEEP), ValueError, f"$.a.a.a.a.a.a.a…: {CYCLIC}: it has {DEEP} levels"),
        ({"ok": [1, {}], "a": deep(DEEP)}, ValueError, f"$.a.a.a.a.a.a.a…: {CYCLIC}"),
        (shared(40, Image()), TypeError, f"${'[0]' * 7}…{'[0]' * 8}: {UNSUPPORTED}"),
        (shared(20_000, 1), ValueError, f"$[0][0][0][0][0][0][0]…: {CYCLIC}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_name_the_path_and_the_reason(
    data: object, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        tolerant_json.encode(data)
    assert str(caught.value).startswith(message)
    assert type(caught.value) is kind
    assert caught.value.__context__ is None


def test_data_may_contain_one_object_many_times() -> None:
    part = {"s": "\ud800"}
    assert tolerant_json.decode(tolerant_json.encode([part, [part, part]])) == [part, [part, part]]


def test_encoding_leaves_the_data_alone() -> None:
    data: dict[str, Any] = {"s": "\ud800", "n": [math.nan, {"t": (1, 2)}]}
    tolerant_json.encode(data)
    assert list(data) == ["s", "n"]
    assert math.isnan(data["n"][0])
    assert data["n"][1] == {"t": (1, 2)}


# -- round trips


def joined(text: str) -> str:
    """Return text with each surrogate pair joined, as JSON and JavaScript see it."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


any_text = st.text(
    st.one_of(st.characters(), st.characters(categories=["Cs"]), st.sampled_from('"\\/\n\x00\x7f'))
).map(joined)
json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(2**63 - 2, 2**65),
        st.floats(allow_nan=False, allow_infinity=False),
        any_text,
    ),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(any_text, inner, max_size=5),
    max_leaves=25,
)


@given(json_values)
def test_every_json_value_survives_a_round_trip(value: object) -> None:
    text = tolerant_json.encode(value)
    for decode in DECODERS:
        assert decode(text) == value
    # The NaN beside it forces writing it piece by piece.
    text = tolerant_json.encode([math.nan, value])
    for decode in DECODERS:
        assert decode(text) == [None, value]


@given(json_values, st.sampled_from([None, 1, "\t"]))
def test_what_msgspec_accepts_the_tolerant_decoders_read_equally(
    value: object, indent: int | str | None
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "replace")
    expected = msgspec.json.decode(text)
    for decode in DECODERS:
        assert decode(text) == expected


fragments = st.lists(
    st.sampled_from(
        [
            b"[", b"]", b"{", b"}", b",", b":", b'"', b'"a"', b'"a":', b"0", b"12", b"-", b".5",
            b"e9", b"1e400", b"true", b"null", b"NaN", b"-Infinity", b" ", b"\n", b"\x0b", b"\\",
            rb"\ud83d", rb"\ude00", rb"\u00", b"\xff", b"\xe2\x82", b"\xef\xbb\xbf", b"\x00",
        ]
    ),
    max_size=12,
).map(b"".join)  # fmt: skip


@given(st.one_of(fragments, st.binary(max_size=20), fragments.map(lambda raw: b"[" + raw + b"]")))
@example(b"")
def test_all_stages_agree_on_any_bytes(raw: bytes) -> None:
    outcomes = []
    for decode in DECODERS:
        try:
            outcomes.append(("value", repr(decode(raw))))
        except ValueError as error:
            outcomes.append(("refused", str(error).partition(":")[0].rstrip("0123456789")))
    assert outcomes[0] == outcomes[1] == outcomes[2]
