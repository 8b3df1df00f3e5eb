"""dscache against deepstream's real connector: see golden/README.md for the vectors."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis as redis_py

import dscache

GOLDEN = Path(__file__).parent / "golden"
STORED: dict[str, Any] = json.loads((GOLDEN / "stored_by_connector.json").read_bytes())
ANSWERED: dict[str, Any] = json.loads((GOLDEN / "answered_by_connector.json").read_bytes())

Vector = dict[str, Any]


class OwnFields(msgspec.Struct):
    a: object = msgspec.UNSET
    b: object = msgspec.UNSET
    own: object = msgspec.UNSET
    c: object = msgspec.UNSET


# The JavaScript expressions in Python, by the vector's id.
DATA_IN_PYTHON: dict[str, object] = {
    "g039": {"n": math.nan, "i": math.inf, "j": -math.inf, "arr": [math.nan, math.inf]},
    "g060": OwnFields(b=1, c=[None, None, None]),
    "g062": msgspec.UNSET,
    "g063": lambda: 1,
    "g067": {"a": 3, "b": "s", "c": False},
    "g068": OwnFields(own=2),
    "g121": msgspec.Raw(b""),
}
# An invalid Date, a RegExp and toJSON have no counterpart.
ONLY_IN_JAVASCRIPT = {"g061", "g064", "g066"}
VERSIONS_IN_PYTHON: dict[str, object] = {
    "g102": math.nan,
    "g103": math.inf,
    "g104": -0,
    "g108": True,
    "g109": 12345678901234567890,
    "g110": [1, 2],
}
NAMES_IN_PYTHON = {"g076": "lone\ud800name", "g077": "lone\udfff"}
# dscache refuses these at the call. The connector stored them unreadably, stored them under another
# name's keys, or failed.
REFUSED = {
    "g062": "data can't be encoded",
    "g063": "data can't be encoded",
    "g121": "empty msgspec.Raw",
    "g076": "lone surrogate",
    "g077": "lone surrogate",
    "g100": "version must be",
    "g101": "version must be",
    "g102": "version must be",
    "g103": "version must be",
    "g108": "version must be",
    "g109": "version must be",
    "g110": "version must be",
    "g119": "ttl must be",
    "g123": "ttl must be",
}
JAVASCRIPT_NUMBERS = {"<NaN>": math.nan, "<-0>": -0.0, "<Infinity>": math.inf}


def vectors(source: dict[str, Any], *, without: set[str] | dict[str, str]) -> list[Any]:
    return [pytest.param(v, id=v["id"]) for v in source["vectors"] if v["id"] not in without]


def as_javascript(value: object) -> object:
    """Return a value as JavaScript has it, where every number is a double."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list):
        return [as_javascript(item) for item in value]
    if isinstance(value, dict):
        return {key: as_javascript(item) for key, item in value.items()}
    return value


def callback_value(value: object) -> object:
    """Return a value of the connector's callback, decoded from the vectors' notation."""
    if isinstance(value, str) and value in JAVASCRIPT_NUMBERS:
        return JAVASCRIPT_NUMBERS[value]
    if value == "<-Infinity>":
        return -math.inf
    if isinstance(value, list):
        return [callback_value(item) for item in value]
    if isinstance(value, dict):
        return {key: callback_value(item) for key, item in value.items()}
    return value


def as_json(text: bytes) -> object:
    """Return JSON text as JavaScript reads it, by Python's own decoder."""
    return as_javascript(json.loads(text))


def argument(vector: Vector, field: str, in_python: dict[str, Any]) -> Any:
    """Return an argument of the connector, in Python if the vector has JavaScript."""
    return in_python[vector["id"]] if f"{field}_js" in vector else vector[field]


def arguments(vector: Vector) -> tuple[str, Any, Any, Any]:
    """Return the connector's arguments: name, version, data and ttl."""
    data = argument(vector, "data", DATA_IN_PYTHON)
    if "data" in vector:
        data = json.loads(data)
    ttl = vector["ttl"]
    if isinstance(ttl, str):  # deepstream's configuration may quote it
        ttl = int(ttl)
    return (
        argument(vector, "name", NAMES_IN_PYTHON),
        argument(vector, "version", VERSIONS_IN_PYTHON),
        data,
        ttl,
    )


def stored_values(vector: Vector) -> dict[bytes, bytes]:
    return {
        base64.b64decode(entry["key"]): base64.b64decode(entry["value"])
        for entry in vector["stored"]
    }


def test_every_vector_is_used() -> None:
    ids = {vector["id"] for vector in STORED["vectors"]}
    in_javascript = {v["id"] for v in STORED["vectors"] if "data_js" in v}
    assert in_javascript == DATA_IN_PYTHON.keys() | ONLY_IN_JAVASCRIPT
    assert {v["id"] for v in STORED["vectors"] if "version_js" in v} == VERSIONS_IN_PYTHON.keys()
    assert {v["id"] for v in STORED["vectors"] if "name_js" in v} == NAMES_IN_PYTHON.keys()
    assert REFUSED.keys() <= ids
    assert len(ids) == len(STORED["vectors"])


# -- writes


@pytest.mark.parametrize("vector", vectors(STORED, without=REFUSED.keys() | ONLY_IN_JAVASCRIPT))
async def test_writes_equal_those_of_the_connector(
    cache: dscache.AsyncCache, redis: redis_py.Redis, vector: Vector
) -> None:
    name, version, data, ttl = arguments(vector)
    expected = stored_values(vector)
    # A record with a TTL of one second might expire before the check.
    assert await cache.set(name, version, data, ttl=3600 if ttl == 1 else ttl) is True

    keys = redis.keys("*")
    assert sorted(keys) == sorted(expected)
    for key in keys:
        written = redis.get(key)
        if key.endswith(b"_v"):
            assert written == expected[key]
        else:
            assert as_json(written) == as_json(expected[key])
        assert (redis.ttl(key) > 0) is bool(ttl)
    record = await cache.get(name)
    assert record.version == version
    assert as_javascript(record.data) == as_json(expected[f"{name}_d".encode()])


@pytest.mark.parametrize(
    "vector",
    [pytest.param(v, id=v["id"]) for v in STORED["vectors"] if v["id"] in REFUSED],
)
async def test_data_that_the_connector_stored_unreadably_is_refused(
    cache: dscache.AsyncCache, redis: redis_py.Redis, vector: Vector
) -> None:
    name, version, data, ttl = arguments(vector)
    with pytest.raises(dscache.RecordError, match=REFUSED[vector["id"]]):
        cache.set(name, version, data, ttl=ttl)
    assert redis.keys("*") == []


# -- reads


@pytest.mark.parametrize(
    "vector", [pytest.param(v, id=v["id"]) for v in STORED["vectors"] if v["stored"]]
)
async def test_records_of_the_connector_are_read(
    cache: dscache.AsyncCache, redis: redis_py.Redis, vector: Vector
) -> None:
    stored = stored_values(vector)
    redis.mset(stored)
    [version_key] = [key for key in stored if key.endswith(b"_v")]
    name = version_key.removesuffix(b"_v").decode()
    version, data = stored[version_key], stored[name.encode() + b"_d"]

    if not version.isdigit() or int(version) > 2**63 - 1:
        with pytest.raises(dscache.RecordError, match="version"):
            await cache.get(name)
        with pytest.raises(dscache.RecordError, match="version"):
            await cache.head(name)
        return
    assert await cache.head(name) == int(version)
    record = await cache.get(name)
    assert (record.version, record.raw) == (int(version), data)
    if data:
        assert as_javascript(record.data) == as_json(data)
        _, called_version, called_data = vector["get_callback"]["args"]
        assert as_javascript(record.data) == as_javascript(callback_value(called_data))
        assert record.version == called_version
    else:
        with pytest.raises(dscache.RecordError, match="isn't JSON"):
            _ = record.data


def put(redis: redis_py.Redis, key: str, state: dict[str, Any], vector_id: str) -> bytes | None:
    """Bring a key into a vector's raw state; return its bytes if it is a string."""
    match state["state"]:
        case "string" if "base64" in state:
            text = base64.b64decode(state["base64"])
            redis.set(key, text)
            return text
        case "string":
            assert vector_id == "d-deep"
            text = b"[" * 5000 + b"]" * 5000
            redis.set(key, text)
            return text
        case "list":
            redis.rpush(key, "1", "2")
        case "hash":
            redis.hset(key, "a", "1")
        case "set":
            redis.sadd(key, "1")
        case "stream":
            redis.xadd(key, {"a": "1"})
        case "absent":
            pass
        case other:
            raise AssertionError(f"{vector_id}: unknown state {other}")
    return None


@pytest.mark.parametrize("vector", vectors(ANSWERED, without=set()))
async def test_results_equal_those_of_the_connector_or_are_better(
    cache: dscache.AsyncCache, redis: redis_py.Redis, vector: Vector
) -> None:
    version = put(redis, "rec_v", vector["v"], vector["id"])
    data = put(redis, "rec_d", vector["d"], vector["id"])

    if version is None or data is None:
        # A record exists only if both of its keys do: anything else is a miss.
        assert await cache.get("rec") is None
        assert await cache.head("rec") is None
        assert await cache.get_bulk(["rec"]) == {}
        assert await cache.head_bulk(["rec"]) == {}
        is_half = (version is None) is not (data is None)
        assert cache.stats()["halves"] == (4 if is_half else 0)
        assert cache.stats()["hits"] == 0
        return
    if not version.isdigit() or int(version) > 2**63 - 1:
        for operation in (cache.get, cache.head):
            with pytest.raises(dscache.RecordError, match=r"'rec'.*version") as caught:
                await operation("rec")
            assert caught.value.name == "rec"
        for bulk in (cache.get_bulk, cache.head_bulk):
            with pytest.raises(dscache.BulkError) as failed:
                await bulk(["rec", "other"])
            assert failed.value.result == {}
            assert isinstance(failed.value.errors["rec"], dscache.RecordError)
            assert list(failed.value.errors) == ["rec"]
        assert cache.stats()["damaged"] == 4
        return

    assert await cache.head("rec") == int(version)
    assert await cache.head_bulk(["rec"]) == {"rec": int(version)}
    record = await cache.get("rec")
    assert (record.version, record.raw) == (int(version), data)
    [bulk_record] = (await cache.get_bulk(["rec"])).values()
    assert bulk_record == record
    if "never" in vector["get"]:
        # The connector crashed on this one.
        for broken in (record, bulk_record):
            with pytest.raises(dscache.RecordError, match=r"'rec'.*isn't JSON: character \d+"):
                _ = broken.data
    elif vector["id"] == "d-deep":
        value, depth = record.data, 1
        while value:
            [value] = value
            depth += 1
        assert depth == 5000
    else:
        _, called_version, called_data = vector["get"]["args"]
        assert float(record.version) == called_version
        assert as_javascript(record.data) == as_javascript(callback_value(called_data))


async def test_integers_stay_exact_where_javascript_rounds_them(
    cache: dscache.AsyncCache, redis: redis_py.Redis
) -> None:
    redis.mset({"rec_v": "9007199254740993", "rec_d": '{"n":9007199254740993,"m":2e1}'})
    record = await cache.get("rec")
    assert record.version == 9007199254740993
    assert record.data == {"n": 9007199254740993, "m": 20.0}


@pytest.mark.parametrize(
    "vector",
    [pytest.param(v, id=",".join(v["names"]) or "empty") for v in ANSWERED["headBulk_names"]],
)
async def test_heads_of_several_names(
    cache: dscache.AsyncCache, redis: redis_py.Redis, vector: Vector
) -> None:
    there = {"a": 1, "b": 2, "5": 5, "10": 10, "constructor": 7, "x_v": 3, "__proto__": 9}
    for name, version in there.items():
        redis.mset({f"{name}_v": version, f"{name}_d": "{}"})
    names = vector["names"]
    if "" in names:
        with pytest.raises(dscache.RecordError, match="must not be empty"):
            cache.head_bulk(names)
        return
    _, called_versions, called_missing = vector["result"]["args"]
    # The connector lists `__proto__` neither among the versions nor among the missing.
    expected = {**called_versions, **({"__proto__": 9} if "__proto__" in names else {})}
    versions = await cache.head_bulk(names)
    assert versions == expected
    assert list(versions) == list(dict.fromkeys(name for name in names if name in there))
    assert set(names) - set(versions) == set(called_missing)
