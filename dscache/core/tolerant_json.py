"""JSON that msgspec refuses, read and written as JavaScript does.

Callers try msgspec first and come here only when it refuses. deepstream's own records may hold
values that msgspec takes for errors: half a surrogate pair, bytes that are no UTF-8, numbers beyond
a double, nesting beyond any recursion limit. ``decode`` reads the same values as ``JSON.parse``
and refuses the same texts; integers alone stay exact where JavaScript rounds them.
``encode`` writes such text, and is where a refusal gets its path and its reason.

Both take time in proportion to their input, at any depth.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import re
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any, NoReturn

import msgspec

from .._interruptions import raise_interruption
from ..errors import shorten
from . import constants as c
from .models import encode_model

# Longer integers are beyond a double by far, so they read as infinity. This is CPython's own
# default limit, fixed here because int() takes quadratic time and the limit can be lifted.
_INTEGER_DIGITS = 4300
_PATH_STEPS = 8  # of a long path, so many are shown at either end


def _to_integer(digits: str) -> int | float:
    try:
        return int(digits) if len(digits.lstrip("-")) <= _INTEGER_DIGITS else float(digits)
    except ValueError as error:
        raise_interruption(error)
        # This interpreter's limit is lower, though never as low as a double's.
        return float(digits)


def _refuse_constant(word: str) -> NoReturn:
    raise LookupError(word)


_comma, _colon = msgspec.Raw(b","), msgspec.Raw(b":")
_write_plain = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":")
).encode
_write_scalar = msgspec.json.Encoder().encode
_standard = json.JSONDecoder(parse_int=_to_integer, parse_constant=_refuse_constant)
_always_fine = (str, float, bool, type(None))
_PLAIN = (int, float, type(None), msgspec.Raw)
_words = {"true": True, "false": False, "null": None}
_string = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_UNIMPORTANT = bytes(set(range(256)) - set(b'[]{}"'))
_STEPS = {ord("["): 1, ord("]"): -1, ord('"'): 0}
_SHALLOW = 500  # levels that ``json`` can read on every Python, if its caller isn't nested itself
# White space, then a sign, a word or a number and its integer, or nothing that JSON knows.
_token = re.compile(
    r"[ \t\n\r]*([\[\]{},:\"]|true|false|null"
    r"|(-?(?:0|[1-9][0-9]*))(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)?"
)


def decode(raw: bytes) -> object:
    """Return the value of JSON text, as JavaScript's ``JSON.parse`` would read these bytes.

    Invalid UTF-8 becomes U+FFFD, half a surrogate pair stays as it is, a number
    beyond a double becomes infinity. Raises ValueError with the position (in characters) and
    the expected token.
    """
    try:
        return msgspec.json.decode(raw)
    except (ValueError, RecursionError) as error:
        raise_interruption(error)
        # Tried again below, outside of this handler: an error there has its own reason.
        text = str(raw, "utf-8", "replace")
    return decode_tolerantly(text)


def decode_tolerantly(text: str) -> object:
    """Return the value of JSON text without msgspec; raises ValueError as ``decode`` does."""
    reason = ""
    if not _is_deep(text):
        try:
            return _standard.decode(text)
        except json.JSONDecodeError as error:
            raise_interruption(error)
            reason = _explain(error)
        except (RecursionError, LookupError) as error:
            raise_interruption(error)
            # Too deep for this stack, or NaN and its like: the position is found on the way.
    # Raised here and not in the handler: Python's own error would keep the whole text alive.
    if reason:
        raise ValueError(reason)
    return decode_deep(text)


def _is_deep(text: str) -> bool:
    """Return whether ``json`` shall not read a text.

    Some Pythons end its recursion after 1000 levels, others after 100,000: the same words for the
    same text come of leaving neither to them.
    """
    return text.count("[") + text.count("{") > _SHALLOW and depth_of(text.encode()) > _SHALLOW


def depth_of(text: bytes | bytearray) -> int:
    """Return how deep JSON text is nested."""
    # Most strings have neither brackets nor escapes: of them, two quotation marks are left.
    bare = text.translate(_ONE_KIND, _UNIMPORTANT).replace(b'""', b"")
    if b'"' in bare or b"\\" in text:
        # A string is left out with its content. One without an end is the last.
        bare = _string.sub(b"", text).translate(_ONE_KIND, _UNIMPORTANT)
    bare += b"]" * (bare.count(b"[") - bare.count(b"]"))
    innermost = 0
    while len(bare) > 4096 and innermost < 4:
        # They are most of an ordinary text.
        bare = bare.replace(b"[]", b"")
        innermost += 1
    return max(accumulate(map(_STEPS.__getitem__, bare)), default=0) + innermost


def decode_deep(text: str) -> object:
    """Return the value of JSON text nested however deep; raises ValueError as ``decode`` does."""
    root: list[Any] = []
    container: Any = root
    around: list[Any] = []
    end = 0
    while True:
        # One value begins here; in an object, its name and a colon come first.
        token, start, end = _next_token(text, end)
        name = ""
        if type(container) is dict:
            if token[1] != '"':
                _refuse(text, start, "a name in quotes" if container else "a name or '}'")
            name, end = _read_string(text, start)
            token, start, end = _next_token(text, end)
            if token[1] != ":":
                _refuse(text, start, "':'")
            token, start, end = _next_token(text, end)
        value: Any
        sign = token[1]
        if sign == '"':
            value, end = _read_string(text, start)
        elif sign == "[" or sign == "{":
            value = [] if sign == "[" else {}
        elif sign is None or sign in "]},:":
            may_end = around and type(container) is list and not container
            _refuse(text, start, "a value or ']'" if may_end else "a value")
        elif sign in _words:
            value = _words[sign]
        else:
            value = _to_integer(sign) if sign == token[2] else float(sign)
        if type(container) is dict:
            container[name] = value
        else:
            container.append(value)

        if sign == "[" or sign == "{":
            token, _, after = _next_token(text, end)
            if token[1] != ("]" if sign == "[" else "}"):
                around.append(container)
                container = value
                continue
            end = after
        # A value is complete, and so is every container that ends here.
        while around:
            token, start, end = _next_token(text, end)
            closing = "}" if type(container) is dict else "]"
            if token[1] == ",":
                break
            if token[1] != closing:
                _refuse(text, start, f"',' or '{closing}'")
            container = around.pop()
        else:
            start = _next_token(text, end)[1]
            if start < len(text):
                _refuse(text, start, "the end")
            return root[0]


def _next_token(text: str, position: int) -> tuple[re.Match[str], int, int]:
    """Return the token after white space, where it begins and where it ends."""
    match = _token.match(text, position)
    assert match is not None, "every part of the pattern is optional"
    end = match.end()
    return match, end if match[1] is None else match.start(1), end


def _read_string(text: str, start: int) -> tuple[str, int]:
    try:
        # At a quotation mark it reads that string alone.
        return _standard.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise_interruption(error)
        reason = _explain(error)
    raise ValueError(reason)


def _explain(error: json.JSONDecodeError) -> str:
    reason = error.msg.removesuffix(" at").removesuffix(" starting")
    return f"character {error.pos}: {reason[0].lower()}{reason[1:]}"


def _refuse(text: str, start: int, expected: str) -> NoReturn:
    found = repr(text[start]) if start < len(text) else "the end"
    raise ValueError(f"character {start}: expected {expected}, found {found}")


def encode(data: object) -> bytes:
    """Return the JSON text of data that msgspec refused, if JSON can say it at all.

    Half a surrogate pair becomes an escape such as ``\\ud800``; everything else is as msgspec
    encodes it. Raises TypeError or ValueError with the JSON path of the part that can't be
    encoded, and the reason: ``$.users[3].photo: ...``.
    """
    try:
        check_bounds(data)
        text = b"".join(_pieces(data))
        if len(text) > c.MAX_DATA_BYTES:
            raise LongError
        return text
    except Exception as error:
        raise_interruption(error)
        # All of them: msgspec hands on whatever an object raises while its fields are read.
        path, reason, kind = _locate(data, error)
    # Outside of the handler: this error says all that the first one said.
    raise kind(f"{path}: {reason}")


class DeepError(RecursionError):
    """Data is nested beyond the bound, or holds itself."""


class LongError(ValueError):
    """Data has a text beyond the bound."""


def check_bounds(data: object, most: float = math.inf) -> None:
    """Raise DeepError or LongError for data whose text is beyond the bounds.

    Each container is counted once, however many paths lead to it, so that this ends soon where
    encoding doesn't. The size is a lower bound: a number counts as one byte. With more than
    ``most`` containers the data is left to encoding. Without ``most``, DeepError has the levels.
    """
    kinds = _Kinds()
    depths: dict[int, int] = {}
    sizes: dict[int, int] = {}
    inside: dict[int, list[Any]] = {}  # the containers that lead to the next one, with their parts
    todo: list[Any] = [data]
    kept: list[Any] = []  # the parts of objects, which may have been made for this call
    while todo:
        value = todo[-1]
        place = id(value)
        if place in depths:
            todo.pop()
            continue
        if place not in inside:
            if len(inside) > c.MAX_DATA_DEPTH and most < math.inf:
                raise DeepError
            if len(depths) + len(todo) > most:
                return
            kind = kinds[type(value)]
            if kind == _MAPPING:
                parts = list(value.values())
            elif kind == _SEQUENCE:
                parts = list(value)
            elif kind == _SCALAR:
                parts = []
            else:
                names = map(_NAME, dataclasses.fields(value)) if kind == _DATACLASS else ()
                names = value.__struct_fields__ if kind == _STRUCT else names
                parts = [getattr(value, name, None) for name in names]
                kept.append(parts)
            unknown = [
                part for part in parts if kinds[type(part)] != _SCALAR and id(part) not in depths
            ]
            inside[place] = parts
            if unknown:
                if any(id(part) in inside for part in unknown):
                    raise DeepError("endless")
                todo += unknown
                continue
        todo.pop()
        parts = inside.pop(place)
        depth, size = 0, 2 + len(parts)
        if isinstance(value, dict):
            size += sum([len(key) + 3 if isinstance(key, str) else 4 for key in value])
        for part in parts:
            if (inner := sizes.get(id(part))) is not None:
                depth = max(depth, depths[id(part)])
                size += inner
            else:
                size += len(part) if isinstance(part, (str, bytes)) else 1
        depths[place] = depth + 1
        sizes[place] = size
    if depths[id(data)] > c.MAX_DATA_DEPTH:
        raise DeepError(depths[id(data)])
    if sizes[id(data)] > c.MAX_DATA_BYTES:
        raise LongError


_SCALAR, _MAPPING, _SEQUENCE, _STRUCT, _DATACLASS = range(5)
_NAME = operator.attrgetter("name")


class _Kinds(dict[type, int]):
    """The kinds of the types met so far."""

    def __missing__(self, type_: type) -> int:
        if issubclass(type_, dict):
            kind = _MAPPING
        elif issubclass(type_, (list, tuple, set, frozenset)):
            kind = _SEQUENCE
        elif issubclass(type_, msgspec.Struct):
            kind = _STRUCT
        else:
            kind = _DATACLASS if dataclasses.is_dataclass(type_) else _SCALAR
        self[type_] = kind
        return kind


def _pieces(data: object) -> Iterator[bytes]:
    """Yield the JSON text of ``data`` in pieces; raises as msgspec does, without a path."""
    try:
        plain = _to_plain(data)
    except RecursionError as error:
        raise_interruption(error)
        plain = data  # within the bound, and yet too deep for this stack
    try:
        yield _write_plain(plain).encode("utf-8", "backslashreplace")
        return
    except (TypeError, ValueError, RecursionError) as error:
        raise_interruption(error)
        # There is more to it than half a pair: NaN, text in a Raw, or a real fault.
    # The values still to be written, the next one last. A Raw is ready text.
    todo: list[object] = [plain]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            # Half a pair has no UTF-8, and Python's backslash form of it is JSON's escape.
            yield _write_plain(value).encode("utf-8", "backslashreplace")
        elif isinstance(value, (dict, list, tuple)):
            parts: list[object] = []
            if isinstance(value, dict):
                for key, member in value.items():
                    parts += (_comma, key if isinstance(key, str) else _to_name(key))
                    parts += (_colon, member)
            else:
                for member in value:
                    parts += (_comma, member)
            opening, closing = (b"{", b"}") if isinstance(value, dict) else (b"[", b"]")
            parts[:1] = [msgspec.Raw(opening)]
            parts.append(msgspec.Raw(closing))
            todo.extend(reversed(parts))
        elif isinstance(value, _PLAIN):
            text = _write_scalar(value)
            if not text:
                raise ValueError("an empty msgspec.Raw isn't JSON text")
            yield text
        else:
            todo.append(_to_plain(value))


def _to_plain(value: object) -> object:
    return msgspec.to_builtins(
        value, str_keys=True, builtin_types=(msgspec.Raw,), enc_hook=encode_model
    )


def _to_name(key: object) -> str:
    """Return a key of a dict as text, with the results and errors of msgspec."""
    [name] = msgspec.to_builtins({key: None}, str_keys=True)
    return str(name)


def _locate(data: object, error: Exception) -> tuple[str, str, type[Exception]]:
    """Return path, reason and error of the first part of ``data`` that can't be encoded.

    ``error`` is the error of encoding all of it, and the reason if no part stands out.
    """
    path, members = ["$"], [_members(data)]
    inside = {id(data): data}  # the containers that the path leads through
    done: dict[int, object] = {}  # those gone through: shared ones must not cost exponential time
    depth, deepest = 0, "$"
    while members:
        try:
            step, value = next(members[-1])
        except StopIteration:
            members.pop()
            path.pop()
            done.update([inside.popitem()])
            continue
        except Exception as refusal:
            raise_interruption(refusal)
            return _join(path), _reason(refusal), _kind(refusal)
        if type(value) in _always_fine or id(value) in done:
            continue
        path.append(step)
        if id(value) in inside:
            return _join(path), "nested too deeply or cyclic: it holds itself", ValueError
        if len(path) > depth:
            depth, deepest = len(path), "".join(path[:_PATH_STEPS])
        inside[id(value)] = value
        members.append(_members(value))
    if isinstance(error, RecursionError):
        levels = error.args[0] if isinstance(error, DeepError) else depth
        reason = f"nested too deeply or cyclic: it has {levels} levels"
        return f"{deepest}…", f"{reason}, and {c.MAX_DATA_DEPTH} are the most", ValueError
    if isinstance(error, LongError):
        return "$", f"its JSON text has more than {c.MAX_DATA_BYTES} bytes", ValueError
    return "$", _reason(error), _kind(error)


def _kind(error: Exception) -> type[Exception]:
    return TypeError if isinstance(error, TypeError) else ValueError


def _reason(error: Exception) -> str:
    known = isinstance(error, (TypeError, ValueError))
    return str(error) if known else f"{type(error).__name__}: {error}"


def _members(value: object) -> Iterator[tuple[str, object]]:
    """Yield a container's items as (step of the path, value); raises if they can't be encoded."""
    names: Iterable[tuple[str, str]] = ()
    if isinstance(value, dict):
        for key, member in value.items():
            if not isinstance(key, str):
                _to_name(key)
            plain_name = isinstance(key, str) and key.isidentifier() and len(key) <= 80
            yield f".{key}" if plain_name else f"[{shorten(key)}]", member
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, member in enumerate(value):
            yield f"[{index}]", member
    elif isinstance(value, msgspec.Struct):
        names = zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = ((field.name, field.name) for field in dataclasses.fields(value))
    elif type(value) is not str:
        for _ in _pieces(value):
            pass
    for attribute, name in names:
        member = getattr(value, attribute)
        if member is not msgspec.UNSET:
            yield f".{name}", member


def _join(path: list[str]) -> str:
    """Return the steps of a path as text, the middle of a very long one left out."""
    if len(path) <= 2 * _PATH_STEPS:
        return "".join(path)
    return "".join([*path[:_PATH_STEPS], "…", *path[-_PATH_STEPS:]])
