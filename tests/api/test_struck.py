"""A fetch, a scan and a watch that an exception strikes where no block can clean up.

A signal handler may raise between any two lines. Here the call behind such a line raises. What it
had begun must not keep the next call from its turn, nor lose what was found.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

import dscache
from dscache.aio import loading as aio_loading
from dscache.blocking import loading as blocking_loading
from dscache.blocking.memory import MemoryPool
from dscache.blocking.sentinel_pool import SentinelPool
from dscache.config import Options, load
from dscache.core import notes
from dscache.core.flights import Flight
from dscache.core.holder import Holder, Place, nothing
from dscache.core.loading import Do
from dscache.embedded import EmbeddedServer
from dscache.net.finds import Finds, MemoryScan
from dscache.net.watch import Change, Changes
from tests.conftest import SERVERS, _server_id
from tests.support.either import Either
from tests.support.waiting import PATIENCE

ON_ONE_SERVER = pytest.mark.parametrize("server", SERVERS[-1:], indirect=True, ids=_server_id)
KEY = (False, frozenset({"n"}))


class Struck(BaseException):
    """The error of a signal handler."""


@pytest.fixture(params=["AsyncCache", "Cache"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
async def either(kind: str, backend: str) -> AsyncIterator[Either]:
    """A cache in memory."""
    async with Either(kind, name="memory") as either:
        yield either


async def next_of(either: Either, iterator: Any) -> Any:
    return await asyncio.wait_for(either.next(iterator), PATIENCE)


def strike_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """Let the next call of a method do its work, and raise; return where its calls are counted."""
    method = getattr(owner, name)
    calls = [0]

    def call(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            method(*arguments)
            raise Struck
        return method(*arguments)

    monkeypatch.setattr(owner, name, call)
    return calls


# -- the place of one caller


def test_a_place_is_free_when_its_holder_is_gone() -> None:
    place = Place()
    holder = place.take()
    assert holder is not None
    assert place.take() is None
    del holder
    assert place.take() is not None


def test_a_place_is_free_after_an_exception_behind_the_line_that_takes_it() -> None:
    place = Place()

    def call() -> None:
        holder = place.take()
        assert holder is not None
        raise Struck

    with pytest.raises(Struck):
        call()
    # Until here the traceback had the frame that has the holder.
    assert place.take() is not None


def test_of_two_threads_that_come_at_once_one_gets_the_place() -> None:
    place = Place()
    holders: list[Holder | None] = []
    other = threading.Thread(target=lambda: holders.append(place.take()))

    def look() -> None:
        """Find the place free, and let the other thread look too before it is taken."""
        place.holder = nothing
        other.start()
        other.join(0.2)  # with nothing to wait for, it ends at once

    place.holder = look
    holder = place.take()
    other.join()
    assert holder is not None
    assert holders == [None]


# -- fetch


def test_a_fetch_that_interrupts_one_of_the_same_record_is_refused(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler that waited for the call that it has interrupted would wait for ever."""
    cache = dscache.Cache({"name": "memory"})
    run = MemoryPool.run
    said: list[str] = []
    found: list[Any] = []

    def interrupted(pool: MemoryPool, operation: str, *arguments: Any) -> Any:
        if operation == "set_bulk" and not said:
            said.append("")
            with pytest.raises(dscache.UsageError) as caught:
                cache.fetch("a", str.upper, ttl=None)
            said.append(str(caught.value))
            cache.fetch("b", str.upper, ttl=None)
        return run(pool, operation, *arguments)

    def fetch() -> None:
        found.append(cache.fetch("a", str.upper, ttl=None))

    monkeypatch.setattr(MemoryPool, "run", interrupted)
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert [record.data for record in found] == ["A"]
    assert "record 'a': fetched by a signal handler or a finalizer" in said[1]
    assert cache.get("b").data == "B"  # type: ignore[union-attr]


# -- the question to the Sentinels


def test_a_struck_look_for_the_primary_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"sentinels": [{"host": "10.0.0.9", "port": 26379}], "name": "main"}
    pool = SentinelPool(load({"name": "redis", "options": options}).options)
    connection: Any = SimpleNamespace(pipeline=SimpleNamespace(address="10.0.0.1:6379"))
    looks = 0

    def locate(_: float) -> tuple[str, int]:
        nonlocal looks
        looks += 1
        return "10.0.0.1", 6379

    def look() -> None:
        pool._look_at = 0.0
        pool.look(connection)

    def raise_struck(*_: object) -> None:
        raise Struck

    monkeypatch.setattr(pool._connector, "locate", locate)
    before = signal.signal(signal.SIGALRM, raise_struck)
    gc.disable()  # in its callbacks, such as hypothesis's, a handler can't raise
    try:
        for i in range(1000):
            with pytest.raises(Struck):  # noqa: PT012 # at any line
                signal.setitimer(signal.ITIMER_REAL, 2e-5 + i * 1e-7)
                while True:
                    look()
            count = looks
            look()
            assert looks == count + 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        gc.enable()
        signal.signal(signal.SIGALRM, before)


# -- scan


async def test_a_struck_scan_can_go_on(either: Either, monkeypatch: pytest.MonkeyPatch) -> None:
    await either.do("set", "a", 1, "data")
    scan = either.cache.scan("")
    calls = strike_after(monkeypatch, scan._finds, "enter")
    with pytest.raises(Struck):
        await next_of(either, scan)
    assert await next_of(either, scan) == "a"
    assert calls == [2]


def test_records_of_a_struck_scan_are_read_again() -> None:
    finds: Finds[Any] = Finds(MemoryScan(lambda: [], "", 10, None), records=True)
    finds.unread = ["a", "b"]
    with pytest.raises(AttributeError):  # an object without the text of a record
        finds.add_records(["a", "b"], {"a": object()})
    assert finds.unread == ["a", "b"]
    finds.add_records(["a"], {"a": dscache.Record("a", 1, b"1")})
    assert finds.unread == ["b"]


# -- watch


async def test_a_struck_watch_can_go_on(either: Either, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = either.cache.watch("")
    async with Entered(either, watch):
        watching = watch._watching
        place = watching._place
        watching._place = SimpleNamespace(take=place.take)
        strike_after(monkeypatch, watching._place, "take")
        await either.do("set", "a", 1, "data")
        with pytest.raises(Struck):
            await next_of(either, watch)
        assert (await next_of(either, watch)).name == "a"


async def test_names_of_a_struck_watch_are_read_again(
    either: Either, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = either.cache.watch("")
    async with Entered(either, watch):
        calls = strike_after(monkeypatch, watch._watching.changes, "take_names")
        await either.do("set", "a", 1, "data")
        with pytest.raises(Struck):
            await next_of(either, watch)
        assert (await next_of(either, watch)).name == "a"
        assert calls == [2]


@ON_ONE_SERVER
async def test_a_watch_looks_for_news_whose_call_was_struck(
    server: EmbeddedServer, kind: str, backend: str
) -> None:
    async with (
        asyncio.timeout(PATIENCE),
        Either(kind, host=server.host, port=server.port) as either,
    ):
        watch = either.cache.watch("")
        async with Entered(either, watch):
            watch._watching.changes._on_news = lambda: None
            coming = asyncio.ensure_future(next_of(either, watch))
            await asyncio.sleep(0.05)
            await either.do("set", "a", 1, "data")
            assert (await coming).name == "a"


@ON_ONE_SERVER
async def test_a_watch_does_not_wait_for_a_listener_that_is_over(
    server: EmbeddedServer, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def struck(*_: Any) -> None:
        return

    async with (
        asyncio.timeout(PATIENCE),
        Either("AsyncCache", host=server.host, port=server.port) as either,
    ):
        watch = either.cache.watch("")
        monkeypatch.setattr(watch._watching, "_listen", struck)
        entering = asyncio.ensure_future(watch.__aenter__())
        await asyncio.wait([entering], timeout=PATIENCE / 4)
        ended = entering.done()
        entering.cancel()
        await asyncio.wait([entering])
        assert ended
        assert entering.cancelled()


@ON_ONE_SERVER
async def test_a_watch_closes_beside_a_task_that_does_not_end(
    server: EmbeddedServer, backend: str
) -> None:
    released = asyncio.Event()

    async def endless() -> None:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue  # as if the loop had lost the task's next step

    async with (
        asyncio.timeout(PATIENCE),
        Either("AsyncCache", host=server.host, port=server.port, closeTimeout=50) as either,
    ):
        watch = either.cache.watch("")
        await watch.__aenter__()
        task = watch._watching._listening["endless"] = asyncio.create_task(endless())
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(watch.close())
        done, _ = await asyncio.wait([closing], timeout=PATIENCE / 4)
        released.set()
        await asyncio.gather(closing, task)
        assert done


@ON_ONE_SERVER
def test_a_watch_closes_beside_a_thread_that_was_not_begun(
    server: EmbeddedServer, backend: str
) -> None:
    with dscache.Cache(server.url) as cache, cache.watch("") as watch:
        watching = watch._watching
        [listener] = watching._listening.values()
        never = SimpleNamespace(thread=threading.Thread(target=lambda: None), stop=lambda: None)
        watching._listening["never"] = never
        watch.close()
        assert not listener.thread.is_alive()


class Entered:
    """The block of a watch of either cache."""

    def __init__(self, either: Either, watch: Any) -> None:
        self._either = either
        self._watch = watch

    async def __aenter__(self) -> None:
        if self._either.kind == "AsyncCache":
            await self._watch.__aenter__()
        else:
            await asyncio.to_thread(self._watch.__enter__)

    async def __aexit__(self, *exc_info: object) -> None:
        if self._either.kind == "AsyncCache":
            await self._watch.close()
        else:
            await asyncio.to_thread(self._watch.close)


def changes() -> Changes:
    return Changes(
        Options(),
        "",
        lambda: None,
        records=False,
        max_pending=100,
        read=lambda name: None,
        kind=Change,
    )


def test_events_are_kept_until_they_have_been_given() -> None:
    class Full(deque[Any]):
        def extend(self, _: Any) -> None:
            raise Struck

    found: deque[Any] = deque()
    pending = changes()
    pending.lose("A", "gone")
    with pytest.raises(Struck):
        pending.move_events(Full())
    pending.move_events(found)
    assert [event.kind for event in found] == ["gap"]
    pending.move_events(found)
    assert len(found) == 1


def test_names_are_given_again_until_they_have_been_read() -> None:
    pending = changes()
    pending.note_changed(["a", "b"])
    assert pending.take_names() == ["a", "b"]
    pending.note_changed(["c", "a"])
    assert sorted(pending.take_names()) == ["a", "b", "c"]
    pending.finish()
    assert pending.take_names() == []


# -- fetch


async def test_a_load_that_is_over_keeps_no_later_one_from_beginning(
    backend: str,
) -> None:
    """The exception has struck before the task's end was noted."""

    async with asyncio.timeout(PATIENCE), Either("AsyncCache", name="memory") as either:
        task = asyncio.ensure_future(asyncio.wait_for(asyncio.Event().wait(), 0))
        await asyncio.wait([task])
        assert isinstance(task.exception(), TimeoutError)
        either.cache._loads._tasks[KEY] = task, Flight(["n"])

        async def load(name: str) -> str:
            return "data"

        assert (await either.cache.fetch("n", load, ttl=60)).data == "data"


async def test_leases_of_a_task_that_is_over_are_not_renewed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notes, "RENEW_SECONDS", 0.001)
    renewed = asyncio.Event()
    release = asyncio.Event()

    class Entry:
        async def set_bulk(self) -> None:
            renewed.set()

    driver = asyncio.ensure_future(release.wait())
    renewing = asyncio.ensure_future(
        aio_loading._renew(lambda _: Do("set_bulk", ()), Entry(), Flight(["n"]), driver)
    )
    async with asyncio.timeout(PATIENCE):
        await renewed.wait()
        release.set()
        await renewing


def test_a_load_of_a_struck_thread_is_done_by_the_next(backend: str) -> None:
    """The thread was struck before it could say that it has ended."""
    with dscache.Cache.from_config({"name": "memory"}) as cache:
        flight = blocking_loading._Flight(["n"], Holder())
        cache._loads._flights[KEY] = flight
        assert flight.is_over()
        found: list[Any] = []
        thread = threading.Thread(
            target=lambda: found.append(cache.fetch("n", lambda _: "data", ttl=60)), daemon=True
        )
        thread.start()
        thread.join(PATIENCE)
        assert [record.data for record in found] == ["data"]


def test_a_thread_that_waits_for_a_struck_one_goes_on(backend: str) -> None:
    with dscache.Cache.from_config({"name": "memory"}) as cache:
        holder = Holder()
        flight = blocking_loading._Flight(["n"], holder)
        cache._loads._flights[KEY] = flight
        found: list[Any] = []
        thread = threading.Thread(
            target=lambda: found.append(cache.fetch("n", lambda _: "data", ttl=60)), daemon=True
        )
        thread.start()
        thread.join(0.1)
        assert found == []
        del holder
        thread.join(PATIENCE)
        assert [record.data for record in found] == ["data"]


def test_leases_of_a_struck_thread_are_not_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "RENEW_SECONDS", 0.001)
    holder = Holder()
    renewed = threading.Event()
    thread = threading.Thread(
        target=blocking_loading._renew,
        args=(
            lambda _: Do("set_bulk", ()),
            lambda operation: renewed.set(),
            Flight(["n"]),
            threading.Event(),
            weakref.ref(holder),
        ),
        daemon=True,
    )
    thread.start()
    assert renewed.wait(PATIENCE)
    del holder
    thread.join(PATIENCE)
    assert not thread.is_alive()
