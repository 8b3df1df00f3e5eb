"""A connection's life: its loop and process, attempts to connect, logging, and closing."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis as redis_py
import uvloop

import dscache
from dscache import _backend
from dscache.aio import connection
from dscache.aio.protocol import SocketProtocol
from dscache.embedded import EmbeddedServer, TLSFiles
from tests.conftest import SERVERS, _server_id
from tests.support.faults import FakeServer, FaultProxy
from tests.support.waiting import PATIENCE, until

MakeCache = Callable[..., Awaitable[dscache.AsyncCache]]
MakeServer = Callable[..., EmbeddedServer]

# Timeouts for operations that must not end by a deadline.
PATIENT = {"connectTimeout": 600_000, "commandTimeout": 600_000}

# No test here depends on the server's version.
pytestmark = [
    pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id),
    pytest.mark.usefixtures("server"),
]

OPERATIONS: list[Callable[[dscache.AsyncCache], Any]] = [
    lambda cache: cache.get("a"),
    lambda cache: cache.head("a"),
    lambda cache: cache.set("a", 1, []),
    lambda cache: cache.set("a", 1, [], ttl=9, if_newer=True),
    lambda cache: cache.delete("a"),
    lambda cache: cache.get_bulk(["a"]),
    lambda cache: cache.head_bulk(["a"]),
    lambda cache: cache.set_bulk({"a": (1, [])}),
    lambda cache: cache.delete_bulk(["a"]),
    lambda cache: cache.get_bulk([]),
]


def lazy_cache(url: str, **options: Any) -> dscache.AsyncCache:
    return dscache.AsyncCache.from_config({"name": "redis", "options": {"url": url, **options}})


def cache_of(kind: str, server: EmbeddedServer) -> dscache.AsyncCache:
    return dscache.AsyncCache.from_config({"name": "memory"} if kind == "memory" else server.url)


async def results_of(*issued: Awaitable[Any]) -> list[Any]:
    async with asyncio.timeout(PATIENCE):
        return await asyncio.gather(*issued, return_exceptions=True)


def own_records(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "dscache"]


# -- one cache, one loop

LOOPS = pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
KINDS = pytest.mark.parametrize("kind", ["redis", "memory"])


@LOOPS
@KINDS
def test_use_in_another_loop_is_refused(
    server: EmbeddedServer, backend: str, kind: str, new_loop: Any
) -> None:
    cache = cache_of(kind, server)

    async def use_it() -> None:
        async with asyncio.timeout(PATIENCE):
            for call in OPERATIONS:
                with pytest.raises(dscache.UsageError, match="another"):
                    call(cache)
            if kind == "redis":
                for method in (cache.when_ready, cache.close):
                    with pytest.raises(dscache.UsageError, match="another"):
                        await method()

    async def still_works() -> None:
        assert await cache.set("a", 1, [1]) is True
        assert tuple(await cache.get("a")) == (1, [1])
        await cache.close()

    with asyncio.Runner(loop_factory=new_loop) as own:
        own.run(cache.when_ready())
        with asyncio.Runner(loop_factory=new_loop) as other:
            other.run(use_it())
        own.run(still_works())


@LOOPS
@pytest.mark.parametrize("size", [1, 200_000], ids=["small", "large"])
def test_a_part_of_a_tick_is_sent_before_its_end(
    server: EmbeddedServer, backend: str, new_loop: Any, size: int
) -> None:
    """The socket takes part of the large ones, and the transport has to send the rest."""
    names = [f"early/{number}" for number in range(100)]
    text = "x" * size

    async def use_it() -> None:
        async with lazy_cache(server.url, **PATIENT) as cache, asyncio.timeout(PATIENCE):
            for version in range(1, 4):
                before = cache.stats()["flushes"]
                writes = [cache.set(name, version, [name, text]) for name in names]
                # No other callback has run since.
                assert cache.stats()["flushes"] > before
                assert 0 < cache.stats()["in_flight"] < len(names)
                assert all(await asyncio.gather(*writes))
            before = cache.stats()["flushes"]
            reads = [cache.get(name) for name in names]
            assert cache.stats()["flushes"] == before + 1
            found = await asyncio.gather(*reads)
            assert cache.stats()["flushes"] == before + 2
            assert [record.version for record in found] == [3] * len(names)
            assert [record.data for record in found] == [[name, text] for name in names]
            await cache.delete_bulk(names)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(use_it())


@LOOPS
def test_over_tls_a_tick_is_sent_at_its_end(
    server: EmbeddedServer, certificates: TLSFiles, backend: str, new_loop: Any
) -> None:
    """Writing directly would bypass TLS."""

    async def use_it() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates.certificate, certificates.key)
        async with (
            asyncio.timeout(PATIENCE),
            FaultProxy(server.host, server.port, tls=context) as proxy,
            lazy_cache(proxy.url, tls={"ca": certificates.authority}, **PATIENT) as cache,
        ):
            before = cache.stats()["flushes"]
            writes = [cache.set(f"tls/{number}", 1, number) for number in range(100)]
            assert cache.stats()["flushes"] == before
            assert all(await asyncio.gather(*writes))
            names = [f"tls/{number}" for number in range(100)]
            found = await asyncio.gather(*map(cache.get, names))
            assert [record.data for record in found] == list(range(100))
            assert await cache.delete_bulk(names) == 100

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(use_it())


@LOOPS
def test_an_ended_socket_is_never_written_to(
    server: EmbeddedServer, backend: str, new_loop: Any
) -> None:
    """Between its end and the event for it, another file may get its number."""

    async def use_it() -> None:
        async with lazy_cache(server.url, **PATIENT) as cache, asyncio.timeout(PATIENCE):
            await cache.set("early", 1, 1)
            connection = cache._topology
            connection.link.abort(dscache.ConnectionLost("cut by the test"))
            sent = cache.stats()["flushes"]
            reads = [cache.get("early"), *(cache.get(f"none/{number}") for number in range(100))]
            assert cache.stats()["flushes"] == sent
            found = await asyncio.gather(*reads)
            assert [record.version for record in found if record] == [1]
            await cache.delete("early")

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(use_it())


@KINDS
def test_use_outside_of_its_loop_is_refused(
    server: EmbeddedServer, backend: str, kind: str
) -> None:
    cache = cache_of(kind, server)
    for call in OPERATIONS:
        with pytest.raises(dscache.UsageError, match="loop"):
            call(cache)
    with asyncio.Runner() as runner:
        runner.run(cache.when_ready())
        for call in OPERATIONS:
            with pytest.raises(dscache.UsageError, match="outside"):
                call(cache)
        # Reading attributes needs no loop.
        assert cache.is_ready
        assert cache.stats()["pending"] == 0
        assert cache.description
        runner.run(cache.close())


@KINDS
async def test_use_in_another_thread_is_refused(
    server: EmbeddedServer, backend: str, kind: str
) -> None:
    cache = cache_of(kind, server)
    await cache.when_ready()
    errors: list[BaseException] = []

    def use_it() -> None:
        for call in OPERATIONS:
            try:
                call(cache)
            except dscache.UsageError as error:
                errors.append(error)

    thread = threading.Thread(target=use_it)
    thread.start()
    await asyncio.to_thread(thread.join, PATIENCE)
    assert len(errors) == len(OPERATIONS)
    assert await cache.set("a", 1, [1]) is True
    await cache.close()


def test_a_cache_of_a_closed_loop_is_closed(server: EmbeddedServer, backend: str) -> None:
    cache = dscache.AsyncCache.from_config(server.url)
    asyncio.run(cache.when_ready())

    async def look() -> None:
        assert not cache.is_ready
        for call in OPERATIONS:
            with pytest.raises((dscache.ConnectionLost, dscache.UsageError)):
                call(cache)
        await cache.close()

    asyncio.run(look())


# -- the process


def run_python(program: str, *arguments: str, backend: str) -> subprocess.CompletedProcess[str]:
    """Run a program in its own interpreter, which must end by itself."""
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", textwrap.dedent(program), *arguments],
        env={**os.environ, "DSCACHE_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_a_forked_child_never_uses_the_socket_of_its_parent(
    server: EmbeddedServer, redis: redis_py.Redis, backend: str
) -> None:
    program = """
        import asyncio, os, sys
        import dscache

        async def child_uses_its_own(url):
            async with dscache.AsyncCache.from_config(url) as cache:
                return await cache.head("a")

        async def refused(call):
            try:
                await call()
            except dscache.UsageError as error:
                return "fork" in str(error)
            return False

        def child(cache, url):
            names = ["get", "head", "delete"]
            told = [asyncio.run(refused(lambda: getattr(cache, name)("a"))) for name in names]
            told.append(asyncio.run(refused(cache.when_ready)))
            told.append(asyncio.run(refused(cache.close)))
            try:
                cache.set("a", 9, [9])
            except dscache.UsageError as error:
                told.append("fork" in str(error))
            told.append(asyncio.run(child_uses_its_own(url)) == 1)
            print(told, flush=True)
            del cache
            return 0 if told == [True] * 7 else 1

        async def main(url):
            async with dscache.AsyncCache.from_config(url) as cache:
                await cache.set("a", 1, [1])
                unsent = cache.set("b", 1, [1])
                pid = os.fork()
                if not pid:
                    code = 2
                    try:
                        code = child(cache, url)
                    finally:
                        os._exit(code)
                _, status = os.waitpid(pid, 0)
                assert os.waitstatus_to_exitcode(status) == 0
                assert await unsent is True
                assert tuple(await cache.get("a")) == (1, [1])
                assert cache.stats()["connects"] == 1
            print("parent done")

        asyncio.run(main(sys.argv[1]))
        """
    done = run_python(program, server.url, backend=backend)
    assert (done.returncode, "parent done" in done.stdout) == (0, True), done.stdout + done.stderr
    # The write that the parent had not yet sent was sent once.
    assert redis.mget("a_v", "b_v") == [b"1", b"1"]


ENDINGS = {
    "asyncio.run": "asyncio.run(use())",
    "uvloop.run": "uvloop.run(use())",
    "a closed loop": "loop.run_until_complete(use()); loop.close()",
    "a loop left open": "loop.run_until_complete(use())",
    "a closed loop of uvloop": "loop = uvloop.new_event_loop(); loop.run_until_complete(use()); "
    "loop.close()",
    "sys.exit": "asyncio.run(use(lambda: sys.exit()))",
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("state", ["idle", "waiting", "connecting"])
def test_an_interpreter_ends_with_an_open_cache(
    server: EmbeddedServer, ending: str, state: str
) -> None:
    program = f"""
        import asyncio, sys, uvloop
        import dscache

        async def use(last=lambda: None):
            global cache, waiting
            if {state!r} == "connecting":
                cache = dscache.AsyncCache.from_config(sys.argv[2])
            else:
                cache = dscache.AsyncCache.from_config(sys.argv[1])
                await cache.set("a", 1, [1])
            if {state!r} != "idle":
                waiting = asyncio.ensure_future(asyncio.gather(
                    cache.get("a"), cache.set("b", 1, [1]), return_exceptions=True
                ))
                await asyncio.sleep(0)
            print("used", flush=True)
            last()

        loop = asyncio.new_event_loop()
        {ENDINGS[ending]}
        if loop.is_closed() or {ending!r}.endswith("run"):
            try:
                cache.get("a")
            except (dscache.UsageError, dscache.ConnectionLost):
                pass
        """
    # If the server never answers, the handshake never ends.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        done = run_python(program, server.url, address, backend=_backend.BACKEND)
    assert (done.returncode, done.stdout) == (0, "used\n"), done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr


# -- attempts to connect


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (dscache.ReplyError("WRONGPASS struck"), "request"),
        (dscache.ProtocolError("struck"), "request"),
        (dscache.ProtocolError("struck"), "reading"),
    ],
)
async def test_an_error_of_a_signal_handler_is_no_refusal(
    server: EmbeddedServer,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: dscache.DscacheError,
    where: str,
) -> None:
    """It strikes in the handshake, and has one of the classes that are final from a server."""
    caplog.set_level(logging.INFO)
    due = [error]

    def handler(number: int, frame: object) -> None:
        raise due.pop()

    def striking(call: Callable[..., Any]) -> Callable[..., Any]:
        def struck(*args: Any) -> Any:
            if due:
                signal.raise_signal(signal.SIGUSR1)
            return call(*args)

        return struck

    if where == "request":
        greet = striking(connection.request_greeting)
        monkeypatch.setattr(connection, "request_greeting", greet)
    else:
        reading = striking(SocketProtocol._note_progress)
        monkeypatch.setattr(SocketProtocol, "_note_progress", reading)
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        async with lazy_cache(server.url) as cache:
            assert due == []
            assert await cache.set("a", 1, [])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert f"interrupted by {type(error).__name__}" in "\n".join(own_records(caplog))


async def attempts_in_two_seconds(hello: bytes | None, **options: Any) -> int:
    async with FakeServer({"HELLO": hello} | ({"PING": None} if hello is None else {})) as fake:
        cache = lazy_cache(fake.url, closeTimeout=100, **PATIENT, **options)
        issued = [cache.get("a"), cache.set("a", 1, [])]
        await until(lambda: fake.accepted)
        before = fake.accepted
        await asyncio.sleep(2)
        count = fake.accepted - before
        await cache.close()
        for error in await results_of(*issued):
            assert isinstance(error, dscache.DscacheError)
        await until(lambda: not fake.connections)
        return count


async def test_reconnections_are_paced(backend: str) -> None:
    refusal = b"-WRONGPASS invalid\r\n"
    hasty = {"retryStrategy": {"first": 1, "cap": 5}}
    slow = {"retryStrategy": {"first": 600_000, "cap": 600_000}}
    counts = await asyncio.gather(
        attempts_in_two_seconds(None),
        attempts_in_two_seconds(refusal),
        attempts_in_two_seconds(b"HTTP/1.1 400\r\n\r\n"),
        attempts_in_two_seconds(b"-LOADING wait\r\n"),
        attempts_in_two_seconds(refusal, **hasty),
        attempts_in_two_seconds(refusal, **slow),
    )
    # Far fewer than possible, and more than one, unless configured otherwise.
    assert all(2 <= count <= 60 for count in counts[:4]), counts
    assert counts[4] > 2 * max(counts[:4]), counts
    assert counts[5] <= 1


async def attempts_continue(fake: FakeServer) -> bool:
    # The last one may have been abandoned before the server saw it.
    await asyncio.sleep(0.1)
    await until(lambda: not fake.connections)
    before = fake.accepted
    await asyncio.sleep(0.2)
    return fake.accepted > before


async def test_close_ends_the_attempts(backend: str) -> None:
    async with FakeServer({"HELLO": None, "PING": None}) as fake:
        cache = lazy_cache(fake.url, retryStrategy={"first": 1, "cap": 2}, **PATIENT)
        ready = asyncio.ensure_future(cache.when_ready())
        await until(lambda: fake.accepted > 3)
        async with asyncio.timeout(PATIENCE):
            await cache.close()
        with pytest.raises(dscache.ConnectionLost, match="closed"):
            await ready
        assert not await attempts_continue(fake)


async def test_cancelling_when_ready_cancels_nothing_else(backend: str, proxy: FaultProxy) -> None:
    proxy.stall()
    cache = lazy_cache(proxy.url, **PATIENT)
    waiting = [asyncio.ensure_future(cache.when_ready()) for _ in range(3)]
    issued = cache.set("a", 1, [1])
    await until(lambda: proxy.accepted)
    waiting[0].cancel()
    proxy.resume()
    results = await results_of(*waiting, issued)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [None, None, True]
    assert proxy.accepted == 1
    await cache.close()


async def test_when_ready_waits_again_after_a_loss(
    make_cache: MakeCache, proxy: FaultProxy
) -> None:
    cache = await make_cache(url=proxy.url, **PATIENT)
    assert cache.is_ready
    for losses in range(1, 4):
        await proxy.refuse()
        proxy.cut()
        await until(lambda: not cache.is_ready)
        waiting = asyncio.ensure_future(cache.when_ready())
        issued = [cache.get("a"), cache.set("a", losses, losses), cache.get("a")]
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await proxy.listen()
        ready, before, written, after = await results_of(waiting, *issued)
        assert (ready, cache.is_ready, written) == (None, True, True)
        assert (before and before.version) == (losses - 1 if losses > 1 else None)
        assert tuple(after) == (losses, losses)
        assert cache.stats()["connects"] == losses + 1
        assert cache.stats()["last_loss"]
        await cache.delete("b")


async def test_a_handshake_may_take_connect_timeout(
    make_cache: MakeCache, proxy: FaultProxy
) -> None:
    # Slower than a command may be: operations expire meanwhile, and the connection succeeds.
    proxy.delay(0.15)
    cache = lazy_cache(proxy.url, commandTimeout=100, connectTimeout=PATIENCE * 1000)
    ready = asyncio.ensure_future(cache.when_ready())
    while not ready.done():
        (error,) = await results_of(cache.get("a"))
        assert isinstance(error, (dscache.ConnectError, dscache.DeadlineExceeded))
    assert await results_of(ready) == [None]
    assert cache.stats()["connects"] == proxy.accepted == 1
    await cache.close()


# -- logging


async def test_each_change_of_state_is_logged_once(
    backend: str, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="dscache")
    options = {"retryStrategy": {"first": 1, "cap": 5}, "password": None, **PATIENT}
    cache = lazy_cache(proxy.url, **options)
    address = f"{proxy.host}:{proxy.port}"
    await cache.when_ready()
    (connected,) = own_records(caplog)
    assert connected.startswith(f"connected to {address}")

    for _ in range(2):
        caplog.clear()
        await proxy.refuse()
        accepted = proxy.accepted
        proxy.cut()
        await until(lambda: not cache.is_ready)
        # Any number of attempts that fail for the same reason are logged once.
        await asyncio.sleep(0.2)
        await proxy.listen()
        await asyncio.wait_for(cache.when_ready(), PATIENCE)
        lost, failing, connected = own_records(caplog)
        assert lost.startswith(f"connection to {address} lost")
        assert failing.startswith(f"can't connect to {address}")
        assert connected.startswith(f"connected to {address}")
        assert proxy.accepted == accepted + 1
        levels = [record.levelname for record in caplog.records if record.name == "dscache"]
        assert levels == ["WARNING", "WARNING", "INFO"]

    caplog.clear()
    async with asyncio.timeout(PATIENCE):
        await cache.close()
    assert [line for line in own_records(caplog) if "lost" in line or "can't" in line] == []


async def test_operations_and_their_errors_are_not_logged(
    make_cache: MakeCache, redis: redis_py.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    cache = await make_cache()
    redis.mset({"bad_v": "abc", "bad_d": "[]"})
    caplog.set_level(logging.DEBUG, logger="dscache")
    caplog.clear()
    results = await results_of(cache.get("bad"), cache.get("a"), cache.set("a", 1, [1]))
    assert isinstance(results[0], dscache.RecordError)
    assert own_records(caplog) == []


# -- closing


async def test_close_ends_by_its_timeout(make_cache: MakeCache, proxy: FaultProxy) -> None:
    cache = await make_cache(url=proxy.url, closeTimeout=200, **PATIENT)
    proxy.stall()
    issued = [
        cache.get("a"),
        # More than all buffers on the way hold, so that a part was never sent.
        cache.set_bulk({f"r{n}": (n, "x" * 1_000_000) for n in range(60)}),
        cache.set("b", 1, [1], if_newer=True),
    ]
    await asyncio.sleep(0.05)
    closing = [asyncio.ensure_future(cache.close()) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(dscache.UsageError, match="closed"):
        cache.get("a")
    assert await results_of(*closing) == [None, None]
    for error in await results_of(*issued):
        assert isinstance(error, dscache.ConnectionLost)
        assert "closed" in str(error)
    assert cache.stats()["pending"] == cache.stats()["queued"] == cache.stats()["in_flight"] == 0
    await until(lambda: not proxy.connections or proxy.resume())


async def test_close_waits_for_a_slow_server(
    make_cache: MakeCache, redis: redis_py.Redis, proxy: FaultProxy
) -> None:
    cache = await make_cache(url=proxy.url, closeTimeout=PATIENCE * 1000, **PATIENT)
    proxy.delay(0.1)
    issued = [cache.set("a", 1, [1]), cache.get("a"), cache.set_bulk({"b": (2, [2])}, ttl=1000)]
    async with asyncio.timeout(PATIENCE):
        await cache.close()
    assert [future.done() for future in issued] == [True] * 3
    assert redis.mget("a_v", "b_v") == [b"1", b"2"]


async def test_close_sends_waiting_operations_if_the_server_returns(
    make_cache: MakeCache, redis: redis_py.Redis, proxy: FaultProxy
) -> None:
    options = {"closeTimeout": PATIENCE * 1000, "retryStrategy": {"first": 1, "cap": 5}, **PATIENT}
    cache = await make_cache(url=proxy.url, **options)
    await proxy.refuse()
    proxy.cut()
    await until(lambda: not cache.is_ready)
    written = cache.set("a", 1, [1])
    closing = asyncio.ensure_future(cache.close())
    await asyncio.sleep(0.02)
    assert not closing.done()
    await proxy.listen()
    assert await results_of(closing, written) == [None, True]
    assert redis.get("a_v") == b"1"


async def test_a_cancelled_close_still_closes(make_cache: MakeCache, proxy: FaultProxy) -> None:
    cache = await make_cache(url=proxy.url, closeTimeout=600_000, **PATIENT)
    proxy.stall()
    issued = cache.get("a")
    closing = asyncio.ensure_future(cache.close())
    await asyncio.sleep(0.02)
    closing.cancel()
    results = await results_of(closing, issued)
    assert isinstance(results[0], asyncio.CancelledError)
    assert isinstance(results[1], dscache.ConnectionLost)
    await until(lambda: cache.stats()["pending"] == 0)
    with pytest.raises(dscache.UsageError, match="closed"):
        cache.get("a")
    proxy.resume()


@pytest.mark.parametrize("lost", ["deadlines", "heartbeat"])
async def test_a_timer_that_was_struck_twice_is_set_again(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """A signal handler has raised at the beginning of a flush, and of both calls of a timer."""
    cache = await make_cache(commandTimeout=50)
    node: Any = cache._topology
    beat = node._heartbeat
    monkeypatch.setattr(beat, "_ping_after", 0.05)
    beat._beat()
    timer = {"deadlines": node._deadlines, "heartbeat": beat}[lost]

    def lose() -> float:
        for handle in timer.handles:
            handle.cancel()
        return max(handle.when() for handle in timer.handles)

    with monkeypatch.context() as patched:
        patched.setattr(node, "_flush", lambda: None)
        pending = cache.get("a")
        over = lose()
        await asyncio.sleep(0)
    if lost == "deadlines":
        with pytest.raises(dscache.DeadlineExceeded):
            await asyncio.wait_for(pending, PATIENCE)
    else:
        await asyncio.wait([pending], timeout=PATIENCE)
        await until(lambda: asyncio.get_running_loop().time() > over)
        await asyncio.wait([cache.get("a")], timeout=PATIENCE)
    await until(lambda: not timer.handles or timer.handles[-1].when() > over)
    assert await cache.get("a") is None
    await cache.close()


async def test_a_failed_entry_leaves_nothing_behind(backend: str) -> None:
    async with FakeServer({"HELLO": b"-WRONGPASS invalid\r\n"}) as fake:
        cache = lazy_cache(fake.url, retryStrategy={"first": 1, "cap": 2}, **PATIENT)
        for error in (dscache.ReplyError, dscache.UsageError):
            with pytest.raises(error):
                async with cache:
                    pytest.fail("it was entered")
        assert not await attempts_continue(fake)
        # Only this test remains in the loop.
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("dscache")]


@pytest.mark.parametrize("pushes", [False, True], ids=["bytes", "pushes"])
async def test_a_reply_that_never_comes_to_its_end_ends_the_connection(
    backend: str, pushes: bool
) -> None:
    """A byte, or a push, now and then is no sign that the answer is coming."""
    async with FakeServer() as fake:
        trickling: list[asyncio.Task[None]] = []

        async def trickle(writer: asyncio.StreamWriter) -> None:
            if not pushes:
                writer.write(b"*2\r\n$1\r\n1\r\n$1000000\r\n")
            while not writer.is_closing():
                writer.write(b">1\r\n+hello\r\n" if pushes else b"x")
                await asyncio.sleep(0.03)

        def answer(_command: list[bytes]) -> bytes:
            (writer,) = fake._tasks
            trickling.append(asyncio.create_task(trickle(writer)))
            return b""

        fake.answers["MGET"] = answer
        options = {"connectTimeout": 30_000, "commandTimeout": 300}
        async with lazy_cache(fake.url, **options) as cache:
            (error,) = await results_of(cache.get("a"))
            assert isinstance(error, dscache.DeadlineExceeded)
            await until(lambda: "silent" in cache.stats()["last_loss"])
            await until(lambda: cache.is_ready)
            assert fake.accepted >= 2  # more, if this machine is too busy to answer in time
        await asyncio.gather(*trickling, return_exceptions=True)
