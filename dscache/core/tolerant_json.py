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
import re
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import msgspec

from .._interruptions import raise_interruption
from ..errors import shorten
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
_words = {"true": True, "false": False, "null": None}
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
    try:
        return _standard.decode(text)
    except json.JSONDecodeError as error:
        raise_interruption(error)
        reason = _explain(error)
    except (RecursionError, LookupError) as error:
        raise_interruption(error)
        reason = ""  # too deep, or NaN and its like, whose position is found on the way
    # Raised here and not in the handler: Python's own error would keep the whole text alive.
    if reason:
        raise ValueError(reason)
    return decode_deep(text)


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
        return b"".join(_pieces(data))
    except Exception as error:
        raise_interruption(error)
        # All of them: msgspec hands on whatever an object raises while its fields are read.
        path, reason = _locate(data, error)
        kind = TypeError if isinstance(error, TypeError) else ValueError
    # Outside of the handler: this error says all that the first one said.
    raise kind(f"{path}: {reason}")


def _pieces(data: object) -> Iterator[bytes]:
    """Yield the JSON text of ``data`` in pieces; raises as msgspec does, without a path."""
    plain = msgspec.to_builtins(
        data, str_keys=True, builtin_types=(msgspec.Raw,), enc_hook=encode_model
    )
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
        elif text := _write_scalar(value):
            yield text
        else:
            raise ValueError("an empty msgspec.Raw is no JSON text")


def _to_name(key: object) -> str:
    """Return a key of a dict as text, with the results and errors of msgspec."""
    [name] = msgspec.to_builtins({key: None}, str_keys=True)
    return str(name)


def _locate(data: object, error: Exception) -> tuple[str, str]:
    """Return the path of the first part of ``data`` that can't be encoded, and the reason.

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
            return _join(path), _reason(refusal)
        if type(value) in _always_fine or id(value) in done:
            continue
        path.append(step)
        if id(value) in inside:
            return _join(path), "nested too deeply or cyclic: it holds itself"
        if len(path) > depth:
            depth, deepest = len(path), "".join(path[:_PATH_STEPS])
        inside[id(value)] = value
        members.append(_members(value))
    if isinstance(error, RecursionError):
        return f"{deepest}…", f"nested too deeply or cyclic: it has {depth} levels"
    return "$", _reason(error)


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
