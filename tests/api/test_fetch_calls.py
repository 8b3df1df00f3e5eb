"""The calls of ``fetch``: the future of an AsyncCache, the options of a call, and subclasses."""

from __future__ import annotations

import asyncio
import gc
import inspect
from contextvars import ContextVar
from typing import Any

import msgspec
import pytest

import dscache
from dscache.core.notes import note_of
from dscache.embedded import EmbeddedServer
from tests.api.test_fetch import OPTIONS, PLACES, Source, in_place, opened
from tests.conftest import SERVERS, MakeCache, _server_id
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.parametrize("server", SERVERS[-1:], indirect=True, ids=_server_id)

variable: ContextVar[str] = ContextVar("variable", default="of no caller")


class User(msgspec.Struct):
    name: str


def unwanted(name: str) -> Any:
    raise AssertionError(f"{name} is missing")


@PLACES
async def test_a_call_returns_a_future_and_takes_effect_unawaited(
    make_cache: MakeCache, place: str
) -> None:
    cache = await in_place(make_cache, place)
    loads: list[str] = []
    call = cache.fetch("n", loads.append, ttl=60, keep_missing=60)
    assert isinstance(call, asyncio.Future)
    assert not isinstance(call, asyncio.Task)
    await until(lambda: loads)
    assert await call is None
    assert await cache.set("n", 3, [1])
    assert await cache.get("n") is not None
    hit = cache.fetch("n", unwanted, ttl=60)
    assert type(hit) is type(cache.get("n")), "a hit isn't of the type that get returns"
    assert hit.done() == (place in ("near", "memory"))
    record = await hit
    assert record == await hit
    assert record is not None
    assert record.data == [1]


@PLACES
async def test_the_load_runs_in_the_context_of_its_caller(
    make_cache: MakeCache, place: str
) -> None:
    cache = await in_place(make_cache, place)

    async def load(name: str) -> str:
        return variable.get()

    token = variable.set("of the caller")
    call = cache.fetch("n", load, ttl=60)
    aged = cache.fetch("m", load, ttl=60, refresh_after=30)
    variable.reset(token)
    for record in (await call, await aged):
        assert record is not None
        assert record.data == "of the caller"


@PLACES
@pytest.mark.parametrize("options", [{}, {"refresh_after": 30}], ids=["plain", "aged"])
async def test_a_cancelled_call_ends_alone(
    make_cache: MakeCache, place: str, options: dict[str, Any]
) -> None:
    cache = await in_place(make_cache, place)
    source = Source("data")
    early = cache.fetch("n", source, ttl=60, **options)
    early.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    assert (await asyncio.wait_for(cache.get("x"), PATIENCE)) is None
    source.open.clear()
    calls = [cache.fetch("n", source, ttl=60, **options) for _ in range(3)]
    await until(lambda: source.loads)
    calls[0].cancel()
    waits = asyncio.ensure_future(asyncio.wait_for(calls[1], PATIENCE))
    await asyncio.sleep(0)
    waits.cancel()
    await asyncio.wait([calls[0], waits])
    source.open.set()
    record = await calls[2]
    assert record is not None
    assert record.data == "data"
    assert [call.cancelled() for call in (early, *calls)] == [True, True, True, False]
    assert source.loads == 1


@PLACES
async def test_a_dropped_failure_is_logged_once_and_an_awaited_one_never(
    make_cache: MakeCache, place: str
) -> None:
    cache = await in_place(make_cache, place)
    logged: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: logged.append(context["message"]))
    source = Source(ValueError("no data"))
    with pytest.raises(dscache.LoadError):
        await cache.fetch("n", source, ttl=60)
    dropped = cache.fetch("n", source, ttl=60)
    await asyncio.wait([dropped])
    del dropped
    gc.collect()
    await asyncio.sleep(0)
    assert logged == ["Future exception was never retrieved"]
    assert source.loads == 1


def named(name: str) -> dict[str, str]:
    return {"name": name}


class Loads:
    def named(self, name: str) -> dict[str, str]:
        return named(name)

    __call__ = named


@pytest.mark.parametrize("kind", ["async", "blocking"])
@pytest.mark.parametrize("load", [named, Loads().named, Loads()], ids=["def", "method", "object"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("n", {}),
        ("n", {"type": User}),
        ("n", {"refresh_after": 30}),
        ("path", {}),  # ends as the name of a note does
        ("\xfc", {}),
        ("\u4f60h", {}),
    ],
)
async def test_a_cached_record_is_served_without_a_read(
    server: EmbeddedServer,
    make_cache: MakeCache,
    kind: str,
    load: Any,
    name: str,
    options: dict[str, Any],
) -> None:
    cache = await in_place(make_cache, "near")
    with opened(server, **OPTIONS["near"]) as blocking:
        chosen = cache if kind == "async" else blocking

        async def fetch() -> Any:
            found: Any = chosen.fetch(name, load, ttl=60, **options)
            return await found if kind == "async" else found

        def counted(what: str) -> int:
            count: int = chosen.stats()["near_cache"][what]
            return count

        async def is_cached() -> bool:
            before = counted("hits")
            record: Any = chosen.get(name)
            if kind == "async":
                await record
            return counted("hits") > before

        assert (await fetch()).version > 0
        async with asyncio.timeout(PATIENCE):
            while not await is_cached():
                await asyncio.sleep(0.002)
        hits, misses = counted("hits"), counted("misses")
        for _ in range(5):
            record = await fetch()
            assert record.name == name
            assert record.data == (User(name) if "type" in options else {"name": name})
        assert counted("hits") == hits + 5
        assert counted("misses") == misses


async def test_bad_arguments_are_refused_at_the_call(cache: dscache.AsyncCache) -> None:
    await cache.set("n", 1, [1])
    fetch: Any = cache.fetch
    for _ in range(3):  # also once a call is known
        for bad in ({"ttl": -1}, {"ttl": 9, "jitter": 1}, {"ttl": 9, "refresh_after": 9}):
            with pytest.raises(dscache.RecordError):
                fetch("n", unwanted, **bad)
        for name in ("", 5, None, "\ud800", note_of("n")):
            with pytest.raises(dscache.RecordError):
                fetch(name, unwanted, ttl=60)
        for arguments, options in (
            (("n", 5), {"ttl": 60}),
            (("n", unwanted), {}),
            (("n",), {"ttl": 60}),
            (("n", unwanted, 60), {}),
            (("n", unwanted), {"ttl": 60, "tll": 1}),
            (("n", unwanted), {"ttl": 60, "type": complex}),
        ):
            with pytest.raises(TypeError):
                fetch(*arguments, **options)
        record = await fetch(load=unwanted, name="n", ttl=60)
        assert record.data == [1]


@pytest.mark.parametrize("kind", ["async", "blocking"])
async def test_options_of_one_call_are_not_those_of_another(
    server: EmbeddedServer, cache: dscache.AsyncCache, backend: str, kind: str
) -> None:
    def one(fetch: Any, name: str, value: Any) -> Any:
        return fetch(name, lambda name: {"name": name}, ttl=value)

    def other(fetch: Any, name: str, value: Any) -> Any:
        return fetch(name, lambda name: {"name": name}, ttl=100_000, type=value)

    with opened(server) as blocking:
        for i in range(150):
            for call, value in ((one, 1000 + i), (other, User), (other, dict[str, str])):
                name = f"{call.__name__}/{i}"
                answer = call(cache.fetch if kind == "async" else blocking.fetch, name, value)
                record = await answer if kind == "async" else answer
                assert type(record.data) is (User if value is User else dict)
        with pytest.raises(dscache.RecordError):
            one(cache.fetch if kind == "async" else blocking.fetch, "one/1", -1)
        ttls = [blocking.get_bulk([f"one/{i}" for i in range(150)])]
        assert len(ttls[0]) == 150


@PLACES
async def test_a_record_that_does_not_fit_its_type_fails(make_cache: MakeCache, place: str) -> None:
    cache = await in_place(make_cache, place)
    await cache.set("n", 1, {"name": 5})
    await cache.get("n")
    for _ in range(2):
        with pytest.raises(dscache.RecordError, match="name"):
            await cache.fetch("n", unwanted, ttl=60, type=User)
    with pytest.raises(dscache.RecordError, match="name"):
        await cache.fetch("m", lambda name: {"name": 5}, ttl=60, type=User)
    found = await cache.fetch("o", lambda name: {"name": name}, ttl=60, type=User)
    assert found is not None
    assert found.data == User("o")


async def test_a_closed_cache_refuses_the_call(make_cache: MakeCache) -> None:
    cache = await make_cache()
    kept = cache.fetch
    assert await kept("n", lambda name: name, ttl=60) is not None
    await cache.close()
    for fetch in (kept, cache.fetch):
        with pytest.raises(dscache.UsageError):
            await fetch("n", unwanted, ttl=60)


@pytest.mark.parametrize("kind", [dscache.AsyncCache, dscache.Cache])
async def test_help_knows_fetch_of_an_open_cache(
    server: EmbeddedServer, backend: str, kind: Any
) -> None:
    cache = kind.from_config({"name": "memory"})
    assert await until_done(cache.get("n")) is None
    assert cache.fetch.__qualname__ != kind.fetch.__qualname__
    text = inspect.getdoc(cache.fetch)
    assert text is not None
    assert text.splitlines()[0] == inspect.getdoc(kind.fetch).splitlines()[0]
    own = inspect.signature(cache.fetch).parameters
    expected = [*inspect.signature(kind.fetch).parameters.values()][1:]
    assert [(one.name, one.kind, one.default) for one in own.values()] == [
        (one.name, one.kind, one.default) for one in expected
    ]
    await until_done(cache.close())


async def until_done(result: Any) -> Any:
    """Return a result, which an AsyncCache lets await."""
    return await result if inspect.isawaitable(result) else result


async def test_a_subclass_may_replace_fetch(server: EmbeddedServer, backend: str) -> None:
    class Counting(dscache.AsyncCache):
        calls = 0

        def fetch(self, *arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return super().fetch(*arguments, **options)

    class BlockingCounting(dscache.Cache):
        calls = 0

        def fetch(self, *arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return super().fetch(*arguments, **options)

    async with Counting.from_config({"name": "memory"}) as cache:
        for _ in range(3):
            record = await cache.fetch("n", lambda name: name, ttl=60)
            assert record.data == "n"
        assert cache.calls == 3
    with BlockingCounting.from_config({"name": "memory"}) as blocking:
        for _ in range(3):
            assert blocking.fetch("n", lambda name: name, ttl=60).data == "n"
        assert blocking.calls == 3
