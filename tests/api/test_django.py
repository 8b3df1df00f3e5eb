"""``dscache.django``: the contract of Django's caches, on one server and in memory."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import decimal
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import django
import django.conf
import django.test
import msgspec
import pytest
import redis as redis_py
from django.core.cache import CacheHandler, InvalidCacheBackendError, caches
from django.core.cache.backends.base import CacheKeyWarning
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.utils.safestring import mark_safe

import dscache
from dscache import django as backend_module
from dscache.django import RecordCache, close_all
from dscache.embedded import EmbeddedServer
from tests.conftest import PATIENT
from tests.support.documents import PROJECT

Make = Callable[..., RecordCache]


@pytest.fixture
def make(server: EmbeddedServer, backend: str, redis: redis_py.Redis) -> Iterator[Make]:
    """Make a backend on ``server``, with settings as in CACHES."""

    def make_backend(**settings: Any) -> RecordCache:
        settings["OPTIONS"] = PATIENT | settings.get("OPTIONS", {})
        return RecordCache(server.url, settings)

    yield make_backend
    close_all()


@pytest.fixture(params=["redis", "near", "memory"])
def cache(request: pytest.FixtureRequest, make: Make) -> RecordCache:
    """A backend with the default settings, with a near cache, and in memory."""
    if request.param == "memory":
        return RecordCache({"name": "memory"}, {})
    return make(OPTIONS={"nearCache": True} if request.param == "near" else {})


def lifetime(redis: redis_py.Redis, name: str) -> int:
    """Return the seconds that both keys of a record have left; -1 for ever."""
    version, data = redis.pttl(f"{name}_v"), redis.pttl(f"{name}_d")
    assert version == data or abs(version - data) < 1000
    return -1 if version == -1 else -(-version // 1000)


# -- values


def test_json_comes_back_as_it_was(cache: RecordCache) -> None:
    values = ["text", "", "Iñtërnâtiônàlizætiøn", 0, 42, -7, 2**63, 10**30, 1.5, -0.0, True, False]
    for value in (*values, None, [], {}, [1, [2, None]], {"a": {"b": [True]}, "": 1}):
        cache.set("key", value)
        found = cache.get("key", "missing")
        assert (found, type(found)) == (value, type(value))


def test_a_tuple_comes_back_as_a_list(cache: RecordCache) -> None:
    cache.set("key", {"pair": (1, (2, 3))})
    assert cache.get("key") == {"pair": [1, [2, 3]]}


class Celsius(float):
    pass


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (mark_safe("<b>"), "<b>"),  # what a template fragment is
        ({"messages": [mark_safe("<b>"), 1, True]}, {"messages": ["<b>", 1, True]}),
        ((mark_safe("half \ud800"),), ["half \ud800"]),
        ({mark_safe("key"): Celsius(36.6)}, {"key": 36.6}),
        ([signal.SIGINT, Celsius(1)], [2, 1.0]),
    ],
    ids=repr,
)
def test_a_subclass_comes_back_as_a_plain_value(cache: RecordCache, value: Any, plain: Any) -> None:
    cache.set("key", value)
    assert repr(cache.get("key")) == repr(plain)


class Point(NamedTuple):
    x: int


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"bytes", "the value is of the type bytes, which isn't JSON"),
        ({"a": [0, datetime.date(2020, 1, 1)]}, "the value['a'][1] is of the type date"),
        ([decimal.Decimal("1.5")], "the value[0] is of the type Decimal"),
        ({1, 2}, "the value is of the type set"),
        (Point(1), "the value is of the type Point"),
        ({1: "one"}, "the value has the key 1, and keys in JSON are strings"),
        ([float("nan")], "the value[0] is nan, and JSON has no such number"),
        (object(), "the value is of the type object"),
    ],
    ids=lambda given: given if isinstance(given, str) else type(given).__name__,
)
def test_a_value_that_json_would_alter_is_refused(value: Any, said: str) -> None:
    cache = RecordCache({"name": "memory"}, {"KEY_PREFIX": "refused"})
    for write in (cache.set, cache.add):
        with pytest.raises(TypeError) as caught:
            write("key", value)
        assert str(caught.value).startswith(said)
        assert str(caught.value).endswith('or choose OPTIONS: {"SERIALIZER": "pickle"}')
    with pytest.raises(TypeError):
        cache.set_many({"one": 1, "key": value})
    assert cache.get_many(["one", "key"]) == {}


def test_a_value_that_is_nested_too_deep_is_refused() -> None:
    value: Any = ()
    for _ in range(600):
        value = (value,)
    with pytest.raises(TypeError, match="nested more than 500 deep"):
        RecordCache({"name": "memory"}, {}).set("key", value)


def test_a_change_of_a_value_that_was_read_stays_outside(cache: RecordCache) -> None:
    cache.set("key", {"list": [1]})
    cache.get("key")["list"].append(2)
    assert cache.get("key") == {"list": [1]}


def test_pickled_values(make: Make, redis: redis_py.Redis) -> None:
    cache = make(OPTIONS={"SERIALIZER": "pickle"})
    values = {
        "tuple": (1, 2),
        "bytes": b"\x00\xff",
        "date": datetime.date(2020, 1, 1),
        "text": "text",
        "flag": True,
        "number": 42,
    }
    cache.set_many(values)
    assert cache.get_many(values) == values
    assert cache.incr("number") == 43
    # Numbers remain readable for other programs; all else is text.
    assert redis.get(":1:number_d") == b"43"
    assert isinstance(msgspec.json.decode(redis.get(":1:text_d")), str)
    assert cache.get("flag") is True


class Shouting:
    """A serializer of a project."""

    def dumps(self, value: Any) -> Any:
        return str(value).upper()

    def loads(self, data: Any) -> Any:
        return data + "!"


@pytest.mark.parametrize("serializer", [Shouting, Shouting(), f"{__name__}.Shouting"])
def test_a_serializer_of_a_project(make: Make, serializer: Any) -> None:
    cache = make(OPTIONS={"SERIALIZER": serializer})
    cache.set("key", "value")
    assert cache.get("key") == "VALUE!"


def test_records_are_those_of_other_programs(
    make: Make, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    cache = make(KEY_PREFIX="site", TIMEOUT=50)
    cache.set("user/1", {"name": "Ada"}, version=3)
    with dscache.Cache(server.url, **PATIENT) as records:
        record = records.get("site:3:user/1")
        assert record is not None
        assert record.raw == b'{"name":"Ada"}'
        records.set("site:1:count", 7, 1)
    # It doesn't say when it expires, so that it gets the default.
    assert cache.incr("count") == 2
    assert 45 <= lifetime(redis, "site:1:count") <= 50


# -- operations


def test_get_and_default(cache: RecordCache) -> None:
    assert cache.get("key") is None
    assert cache.get("key", "default") == "default"
    cache.set("key", None)
    assert cache.get("key", "default") is None
    assert cache.has_key("key")
    assert "key" in cache


def test_add(cache: RecordCache) -> None:
    assert cache.add("key", "first") is True
    assert cache.add("key", "second") is False
    assert cache.get("key") == "first"


def test_one_of_many_adds_succeeds(make: Make) -> None:
    caches = [make(OPTIONS={"commandTimeout": 30_000 + index}) for index in range(4)]
    assert len({id(cache.records) for cache in caches}) == 4
    with ThreadPoolExecutor(8) as threads:
        for number in range(20):
            added = threads.map(RecordCache.add, caches * 2, [f"key{number}"] * 8, range(8))
            assert sum(added) == 1


def test_delete(cache: RecordCache) -> None:
    cache.set("key", 1)
    assert cache.delete("key") is True
    assert cache.delete("key") is False
    assert cache.get("key") is None
    assert not cache.has_key("key")


def test_many(cache: RecordCache) -> None:
    assert cache.set_many({}) == []
    assert cache.set_many({"a": 1, "b": None, "c": [3]}) == []
    assert cache.get_many(iter(["a", "b", "c", "d"])) == {"a": 1, "b": None, "c": [3]}
    assert cache.get_many([]) == {}
    cache.delete_many(iter(["a", "c", "d"]))
    cache.delete_many([])
    assert cache.get_many("abcd") == {"b": None}


def test_get_or_set(cache: RecordCache) -> None:
    assert cache.get_or_set("key", 42) == 42
    assert cache.get_or_set("key", lambda: pytest.fail("called")) == 42
    assert cache.get_or_set("other", lambda: None) is None
    assert cache.get("other", "default") is None


def test_incr_and_decr(cache: RecordCache) -> None:
    cache.set("key", 41)
    assert cache.incr("key") == 42
    assert cache.incr("key", 10) == 52
    assert cache.decr("key", 2) == 50
    assert cache.get("key") == 50
    for change in (cache.incr, cache.decr):
        with pytest.raises(ValueError, match="Key 'missing' not found"):
            change("missing")
    cache.set("key", "text")
    with pytest.raises(TypeError):
        cache.incr("key")
    assert cache.get("key") == "text"


def test_no_increment_is_lost(make: Make) -> None:
    """Threads share a cache, and others have their own, as other processes do."""
    caches = [make(OPTIONS={"commandTimeout": 30_000 + index}) for index in range(3)]
    caches[0].set("key", 0)
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(lambda number: caches[number % 3].incr("key"), range(120)))
    assert sorted(results) == list(range(1, 121))


def test_an_increment_is_not_written_over_a_set(make: Make) -> None:
    """A value that was replaced by an equal one is another one: its version tells."""
    cache, other = make(), make(OPTIONS={"commandTimeout": 30_001})
    cache.set("key", 1, timeout=None)
    calls = []

    class Interrupting(backend_module.JSONSerializer):
        def loads(self, data: Any) -> Any:
            calls.append(data)
            if len(calls) == 1:
                other.set("key", 100, timeout=None)
            return data

    assert make(OPTIONS={"SERIALIZER": Interrupting()}).incr("key") == 101
    assert calls == [1, 100]


def test_touch(cache: RecordCache) -> None:
    cache.set("key", "value", timeout=1)
    assert cache.touch("key", 60) is True
    assert cache.get("key") == "value"
    assert cache.touch("missing") is False
    assert cache.touch("key", 0) is True
    assert cache.get("key") is None
    assert cache.touch("key", 0) is False


def test_versions(cache: RecordCache) -> None:
    cache.set("key", "one")
    cache.set("key", "two", version=2)
    assert (cache.get("key"), cache.get("key", version=2)) == ("one", "two")
    assert cache.incr_version("key", version=2) == 3
    assert (cache.get("key", version=2), cache.get("key", version=3)) == (None, "two")
    assert cache.decr_version("key", 3, version=3) == 0
    assert cache.get("key", version=0) == "two"
    with pytest.raises(ValueError, match="not found"):
        cache.incr_version("missing")


def test_a_key_that_memcached_would_refuse_is_warned_of(cache: RecordCache) -> None:
    for call in (cache.get, cache.delete, cache.has_key, cache.touch):
        with pytest.warns(CacheKeyWarning, match="memcached"):
            call("with space")
    with pytest.warns(CacheKeyWarning, match="longer than 250"):
        cache.set("a" * 250, 1)


# -- timeouts


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((), 300), ((7,), 7), ((6.2,), 7), ((None,), -1), ((60 * 60 * 24 * 400,), 34_560_000)],
    ids=str,
)
def test_timeouts(make: Make, redis: redis_py.Redis, arguments: Any, expected: int) -> None:
    cache = make()
    cache.set("set", 1, *arguments)
    cache.add("add", 1, *arguments)
    cache.set_many({"many": 1}, *arguments)
    cache.set("touched", 1, 20)
    cache.touch("touched", *arguments)
    for name in ("set", "add", "many", "touched"):
        left = lifetime(redis, f":1:{name}")
        assert left == expected if expected == -1 else expected - 30 <= left <= expected, name


def test_the_default_may_be_for_ever(make: Make, redis: redis_py.Redis) -> None:
    cache = make(TIMEOUT=None)
    cache.set("key", 1)
    assert lifetime(redis, ":1:key") == -1
    assert cache.incr("key") == 2
    assert lifetime(redis, ":1:key") == -1


@pytest.mark.parametrize("timeout", [0, -1, -0.5])
def test_a_timeout_that_is_over_keeps_nothing(cache: RecordCache, timeout: float) -> None:
    cache.set("key", 1)
    assert cache.add("key", 2, timeout) is False
    cache.set("key", 2, timeout)
    assert cache.get("key") is None
    assert cache.add("key", 2, timeout) is True
    assert cache.get("key") is None
    cache.set("key", 1)
    assert cache.set_many({"key": 1, "other": 2}, timeout) == []
    assert cache.get_many(["key", "other"]) == {}


@pytest.mark.parametrize("timeout", [math.inf, -math.inf, math.nan, "60"], ids=str)
def test_a_timeout_that_is_none(cache: RecordCache, timeout: Any) -> None:
    cache.set("key", 1)
    said = f"timeout must be a number of seconds, or None for ever, not {timeout!r}"
    for call in (cache.set, cache.add):
        with pytest.raises(dscache.RecordError) as caught:
            call("key", 2, timeout)
        assert str(caught.value) == said
    with pytest.raises(dscache.RecordError):
        cache.touch("key", timeout)
    assert cache.get("key") == 1


def test_increments_keep_the_timeout(make: Make, redis: redis_py.Redis) -> None:
    """Or a limit of requests an hour, counted by ``add`` and ``incr``, would never end."""
    cache = make()
    cache.set("key", 1, 3600)
    for number in range(2, 6):
        assert cache.incr("key") == number
    redis.pexpire(":1:key_v", 10_000)  # as if most of the time had passed for the server alone
    redis.pexpire(":1:key_d", 10_000)
    cache.incr("key")
    assert 3570 <= lifetime(redis, ":1:key") <= 3600


def test_values_expire(make: Make) -> None:
    caches = [make(), make(OPTIONS={"nearCache": True}), RecordCache({"name": "memory"}, {})]
    for number, cache in enumerate(caches):
        cache.key_prefix = f"cache{number}"
        cache.set("key", 1, 1)
        for timeout in (1, 10, 30):  # more, if the machine was too slow
            cache.set("counted", 1, timeout)
            with contextlib.suppress(ValueError):
                cache.incr("counted")
                break
    deadline = time.monotonic() + 60
    for cache in caches:
        while cache.has_key("key") or cache.has_key("counted"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert cache.add("key", 2) is True


# -- clear


def test_clear_leaves_what_is_not_its_own(
    make: Make, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    cache, prefixed = make(), make(KEY_PREFIX="site")
    prefixed.set_many({f"key{number}": number for number in range(1500)})
    prefixed.set("key", 1, version=2)
    cache.set("key", "kept")
    with dscache.Cache(server.url, **PATIENT) as records:
        records.set("user/1", 1, "kept")
        prefixed.clear()
        assert prefixed.get("key", version=2) is None
        assert prefixed.get_many(f"key{number}" for number in range(1500)) == {}
        assert cache.get("key") == "kept"
        cache.clear()
        assert [*records.scan()] == ["user/1"]


def own_name(key: str, key_prefix: str, version: int) -> str:
    return f"own-{version}-{key}"


def test_clear_with_a_key_function(make: Make, redis: redis_py.Redis) -> None:
    cache = make(KEY_FUNCTION=own_name)
    cache.set("key", 1)
    cache.set("key", 1, version=2)
    make().set("key", "kept")
    assert redis.exists("own-1-key_v")
    cache.clear()
    assert cache.get("key") is cache.get("key", version=2) is None
    assert make().get("key") == "kept"


def test_clear_refuses_to_remove_the_values_of_other_prefixes(make: Make) -> None:
    def by_version(key: str, key_prefix: str, version: int) -> str:
        return f"v{version}:{key_prefix}:{key}"

    cache = make(KEY_FUNCTION=by_version, KEY_PREFIX="shop")
    cache.set("key", 1)
    cache.records.set("visits/1", 1, "kept")
    with pytest.raises(ImproperlyConfigured, match="let them begin with KEY_PREFIX"):
        cache.clear()
    assert cache.get("key") == 1
    assert cache.records.head("visits/1") == 1


def test_clear_refuses_to_remove_everything(make: Make) -> None:
    cache = make(KEY_FUNCTION=lambda key, prefix, version: key)
    cache.set("key", 1)
    with pytest.raises(ImproperlyConfigured, match="would remove every record"):
        cache.clear()
    assert cache.get("key") == 1


# -- async


async def test_async_forms(cache: RecordCache) -> None:
    await cache.aset("key", 1)
    assert await cache.aget("key") == 1
    assert await cache.aadd("key", 2) is False
    assert await cache.aincr("key", 2) == 3
    assert await cache.adecr("key") == 2
    assert await cache.atouch("key", 60) is True
    assert await cache.ahas_key("key") is True
    assert await cache.aset_many({"a": 1, "b": 2}) == []
    assert await cache.aget_many(["a", "b", "c"]) == {"a": 1, "b": 2}
    await cache.adelete_many(["a"])
    assert await cache.adelete("b") is True
    assert await cache.aget_or_set("c", lambda: 7) == 7
    assert await cache.aincr_version("c") == 2
    await cache.aclear()
    assert await cache.aget("key", "default") == "default"
    await cache.aclose()


async def test_increments_of_tasks(make: Make) -> None:
    cache = make()
    await cache.aset("key", 0)
    assert sorted(await asyncio.gather(*(cache.aincr("key") for _ in range(40)))) == [*range(1, 41)]


class Places(backend_module.JSONSerializer):
    """A serializer that tells in which threads it has worked."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def dumps(self, value: Any) -> Any:
        self.threads.add(threading.get_ident())
        return super().dumps(value)

    def loads(self, data: Any) -> Any:
        self.threads.add(threading.get_ident())
        return data


async def test_async_forms_leave_the_event_loop_alone(make: Make) -> None:
    places = Places()
    cache = make(OPTIONS={"SERIALIZER": places})
    await cache.aset("key", 1)
    await cache.aincr("key")
    await cache.aset_many({f"key{number}": number for number in range(50)})
    assert await cache.aget("key") == 2
    before = cache.records.stats()["operations"]
    assert len(await cache.aget_many([f"key{number}" for number in range(50)])) == 50
    assert cache.records.stats()["operations"] == before + 1
    assert places.threads
    assert threading.get_ident() not in places.threads


async def count_a_visit(request: HttpRequest, name: str) -> JsonResponse:
    visits = caches["default"]
    await visits.aadd(name, 0, timeout=None)
    told = {"visits": await visits.aincr(name)}
    return JsonResponse(told | await visits.aget_many([name, "missing"]))


async def test_an_async_view(
    server: EmbeddedServer, backend: str, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty requests at a time, through Django's handler for ASGI: no visit is lost."""
    if not django.conf.settings.configured:
        django.conf.settings.configure(ALLOWED_HOSTS=["*"], SECRET_KEY="-", DEBUG=False)
        django.setup()
    urls = ModuleType("urls_of_visits")
    vars(urls)["urlpatterns"] = [path("visits/<name>", count_a_visit)]
    monkeypatch.setitem(sys.modules, urls.__name__, urls)
    settings = {
        "BACKEND": "dscache.django.RecordCache",
        "LOCATION": server.url,
        "OPTIONS": {"nearCache": True, **PATIENT},
    }
    with django.test.override_settings(
        ROOT_URLCONF=urls.__name__, CACHES={"default": settings}, ALLOWED_HOSTS=["*"]
    ):
        client = django.test.AsyncClient()
        answers = await asyncio.gather(*(client.get("/visits/home") for _ in range(40)))
    assert {answer.status_code for answer in answers} == {200}
    told = [answer.json() for answer in answers]
    assert sorted(one["visits"] for one in told) == [*range(1, 41)]
    assert all(one["visits"] <= one["home"] <= 40 for one in told)
    close_all()


# -- settings


def test_backends_of_equal_settings_share_a_cache(make: Make) -> None:
    """Django makes a backend in each thread, and asks it to close after each request."""
    first = make()
    first.set("key", 1)
    found: list[Any] = []

    def other_thread() -> None:
        second = make()
        found.extend((second.records, second.get("key")))
        second.close()

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert found == [first.records, 1]
    assert make(KEY_PREFIX="other").records is first.records
    assert make(OPTIONS={"nearCache": True}).records is not first.records


def test_a_file_is_read_once(tmp_path: Path) -> None:
    """Django makes a backend for each request of an ASGI server."""
    file = tmp_path / "config.yml"
    file.write_text("cache: {name: memory}")
    RecordCache(str(file), {}).set("key", 1)
    file.unlink()
    assert RecordCache(str(file), {}).get("key") == 1
    close_all()
    with pytest.raises(ImproperlyConfigured, match="there is no file"):
        RecordCache(str(file), {})


def test_close_all(make: Make) -> None:
    cache = make()
    cache.set("key", 1)
    closed = cache.records
    close_all()
    with pytest.raises(dscache.DscacheError):
        closed.get("key")
    assert cache.get("key") == 1
    assert cache.records is not closed


def test_by_settings_and_a_file(server: EmbeddedServer, make: Make, tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text(f"cache:\n  name: redis\n  options: {{url: '{server.url}'}}\n")
    handler = CacheHandler(
        {
            "default": {
                "BACKEND": "dscache.django.RecordCache",
                "LOCATION": str(file),
                "TIMEOUT": 60,
                "KEY_PREFIX": "site",
                "VERSION": 4,
                "OPTIONS": {"commandTimeout": 9000, "near_cache": True, "MAX_ENTRIES": 9},
            },
            "bare": {
                "BACKEND": "dscache.django.RecordCache",
                "OPTIONS": {"host": server.host, "port": server.port},
            },
        }
    )
    cache = handler["default"]
    assert cache.records.config.options.command_timeout == 9000
    assert cache.records.config.options.near_cache is not None
    cache.set("key", 1)
    assert handler["bare"].records.get("site:4:key") is not None


def test_the_class_of_another_module() -> None:
    handler = CacheHandler({"default": {"BACKEND": "dscache.django.Cache"}})
    with pytest.raises(InvalidCacheBackendError, match=r"BACKEND: dscache\.django\.RecordCache"):
        _ = handler["default"]
    assert not hasattr(backend_module, "Other")


@pytest.mark.parametrize(
    ("location", "options", "said"),
    [
        ("redis.example", {}, "CACHES: redis.example: a configuration is a file"),
        (["redis://a", "redis://b"], {}, "CACHES: LOCATION must be a URL, a path or a mapping"),
        (None, {}, "not None; is the variable set that it comes from?"),
        ("redis://localhost", {"credentials": "secret"}, "CACHES: credentials must be a redis."),
        ("redis://localhost", {"nearCach": 1}, 'did you mean "nearCache"'),
        ("redis://localhost", {"ttl": 1}, "CACHES: OPTIONS has ttl; set TIMEOUT"),
        ("redis://localhost", {"SERIALIZER": "jsn"}, 'SERIALIZER must be "json", "pickle"'),
        ("redis://localhost", {"SERIALIZER": "os.sep"}, "has no methods dumps and loads"),
        ("redis://localhost", {"SERIALIZER": object}, "has no methods dumps and loads"),
    ],
)
def test_bad_settings(location: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ImproperlyConfigured) as caught:
        RecordCache(location, {"OPTIONS": options})
    assert said in str(caught.value)


def test_no_password_in_errors() -> None:
    with pytest.raises(ImproperlyConfigured) as caught:
        RecordCache("redis://:secret@localhost:port", {})
    assert "secret" not in str(caught.value)


def test_an_outage_is_told(make: Make, server: EmbeddedServer) -> None:
    cache = RecordCache("127.0.0.1:1", {"OPTIONS": {"commandTimeout": 50}})
    for call in (cache.get, cache.incr, cache.delete, cache.touch):
        with pytest.raises(dscache.ConnectError):
            call("key")
    with pytest.raises(dscache.ConnectError):
        cache.set_many({"key": 1})


FORKS = """
import os, sys
from dscache.django import RecordCache, close_all

cache = RecordCache(sys.argv[1], {"OPTIONS": {"commandTimeout": 30_000}})
cache.set("key", 0)
children = []
for _ in range(3):
    child = os.fork()
    if not child:
        for _ in range(20):
            cache.incr("key")
        os._exit(0)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children], cache.get("key"))
close_all()
"""


def test_a_forked_child_has_connections_of_its_own(
    server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKS, server.url],
        env={**os.environ, "DSCACHE_BACKEND": backend, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stderr, done.stdout) == ("", "[0, 0, 0] 60\n")
