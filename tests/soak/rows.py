"""The rows of the soak test: each makes something fail, and writes its findings into Figures.

``problems`` are never allowed; the sizes are those of the long form.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import redis as redis_py
import trustme

import dscache
from dscache import _backend, _fast
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.programs.injection import TIMEOUT
from tests.programs.interruptions import SCENES
from tests.programs.shortage import scan
from tests.soak import (
    cluster_rows,
    deepstream_rows,
    maintenance_rows,
    message_rows,
    near_fault_rows,
    near_host_rows,
    near_rows,
    near_thread_rows,
    record_rows,
    thread_rows,
)
from tests.soak.figures import (
    ATTEMPTS_A_MINUTE,
    DEAD_PEER,
    LATENESS,
    LEFT,
    MEMORY,
    PATIENCE,
    Figures,
    Samples,
    held,
    measured,
    open_files,
    resident,
    until,
)
from tests.soak.load import Load
from tests.support.blocking import run_child
from tests.support.faults import FaultProxy, ProxyProcess
from tests.support.grammar import TwinFuzzer
from tests.support.mutation import Fuzzer
from tests.support.readers import ReaderFuzzer, reading
from tests.support.sentinels import SentinelGroup


class Row(Protocol):
    """A row: makes things fail, and writes its findings into ``figures``."""

    async def __call__(self, figures: Figures, binary: ServerBinary, **sizes: Any) -> None: ...


def open_cache(**options: Any) -> dscache.AsyncCache:
    """Return a cache with these options, as in the YAML."""
    return dscache.AsyncCache.from_config({"name": "redis", "options": options})


def _behind(proxy: FaultProxy | ProxyProcess, **options: Any) -> dscache.AsyncCache:
    return open_cache(host=proxy.host, port=proxy.port, **options)


async def rate(load: Load, seconds: float) -> float:
    """Return how many operations a second succeed."""
    before, began = load.outcomes["ok"], time.monotonic()
    await asyncio.sleep(seconds)
    return (load.outcomes["ok"] - before) / (time.monotonic() - began)


async def back_to(load: Load, usual: float) -> float:
    """Wait until operations succeed at most of the usual rate; return for how long it took."""
    began = time.monotonic()
    while await rate(load, 0.1) < 0.8 * usual:
        if time.monotonic() - began > PATIENCE:
            raise AssertionError(f"not back to {usual:.0f} operations/s within {PATIENCE:g} s")
    return max(time.monotonic() - began - 0.1, 0.0)


# -- the rows


async def kill(figures: Figures, binary: ServerBinary, *, rounds: int = 20) -> None:
    """Kill the server and start it again, under load; it keeps the acknowledged writes."""
    safe = ("--appendonly", "yes", "--appendfsync", "always")
    with EmbeddedServer(binary, args=safe) as server:
        async with open_cache(host=server.host, port=server.port) as cache:
            load = Load(cache, timeout=1.0)
            for _ in range(rounds):
                async with load:
                    await asyncio.sleep(random.uniform(0.2, 0.5))
                    await asyncio.to_thread(server.kill)
                    await asyncio.sleep(random.uniform(0, 0.5))
                    await asyncio.to_thread(server.start)
                    answers = load.last_success
                    figures.recovered(await until(lambda a=answers: load.last_success > a, "kill"))
                    await asyncio.sleep(0.1)
                await load.verify()
            figures.take(load)
            figures.drained(cache)
            figures.notes.append(f"{rounds} kills, {cache.stats()['connects']} connections")


async def storm(
    figures: Figures,
    binary: ServerBinary,
    *,
    operations: int = 1_000_000,
    delays: tuple[float, ...] = (0.0, 0.05, 0.5),
) -> None:
    """Cancel random operations whose replies come late, and check the results of all others."""
    with EmbeddedServer(binary) as server:
        async with FaultProxy(server.host, server.port) as proxy:
            for delay in delays:
                proxy.delay(delay)
                async with open_cache(
                    host=proxy.host, port=proxy.port, commandTimeout=60_000, connectTimeout=60_000
                ) as cache:
                    await _storm(figures, cache, operations // len(delays), delay)
                    stats = cache.stats()
                    if (stats["connects"], stats["last_loss"]) != (1, ""):
                        figures.problems.append(f"connection lost: {stats['last_loss']}")
                    # A cancelled bulk may still be in flight.
                    await until(lambda s=cache.stats: not s()["pending"], "draining")
                    figures.drained(cache)
    figures.operations = figures.outcomes.total()


async def _storm(
    figures: Figures, cache: dscache.AsyncCache, operations: int, delay: float
) -> None:
    names = [f"storm/{i}" for i in range(1000)]
    await cache.set_bulk({name: (1, {"name": name}) for name in names})
    loop = asyncio.get_running_loop()
    width = min(operations, 10_000)

    def check(name: str, record: Any) -> None:
        if record is None or record.name != name or record.data["name"] != name:
            figures.problems.append(f"asked for {name}, got {record!r}")

    async def one(name: str, kind: int) -> None:
        for _ in range(kind % 3):  # one await point more or less before the operation
            await asyncio.sleep(0)
        if kind == 0:
            check(name, await cache.get(name))
        elif kind == 1:
            version = await cache.head(name)
            if version is None:
                figures.problems.append(f"no head of {name}")
        elif kind == 2:
            some = random.sample(names, 5)
            found = await cache.get_bulk(some)
            for each in some:
                check(each, found.get(each))
        elif kind == 3:
            if await cache.set(name, 1, {"name": name}) is not True:
                figures.problems.append(f"{name} was not written")
            check(name, await cache.get(name))
        elif kind == 4:
            await cache.set(name, random.choice((0, 1)), {"name": name}, if_newer=True)
            check(name, await cache.get(name))
        else:
            try:
                async with asyncio.timeout(random.uniform(0, 2 * delay + 0.002)):
                    check(name, await cache.get(name))
            except TimeoutError:
                figures.outcomes["timeout"] += 1
                return
        figures.outcomes["ok"] += 1

    issued = 0
    while issued < operations:
        tasks = [
            asyncio.create_task(one(random.choice(names), random.randrange(6)))
            for _ in range(width)
        ]
        issued += width
        for task in tasks:
            if random.random() < 0.5:
                loop.call_later(random.uniform(0, 3 * delay + 0.01), task.cancel)
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, asyncio.CancelledError):
                figures.outcomes["cancelled"] += 1
            elif outcome is not None:
                figures.problems.append(repr(outcome))
        if figures.memory == (0, 0):  # memory that so many tasks take once is reused
            figures.memory = (held(), 0)
    figures.memory = (figures.memory[0], held())


async def blackhole(
    figures: Figures, binary: ServerBinary, *, seconds: float = 60.0, flood: int = 1000
) -> None:
    """Swallow everything for a while, like a dead network, then heal."""
    with EmbeddedServer(binary) as server:
        async with FaultProxy(server.host, server.port) as proxy, _behind(proxy) as cache:
            await _silence(
                figures, cache, proxy.stall, proxy.resume, seconds, late=True, flood=flood
            )


async def freeze(
    figures: Figures, binary: ServerBinary, *, seconds: float = 10.0, flood: int = 1000
) -> None:
    """Stop the server's process, whose sockets stay open, then resume it."""
    with EmbeddedServer(binary) as server:
        async with open_cache(host=server.host, port=server.port) as cache:
            await _silence(
                figures, cache, server.pause, server.resume, seconds, late=False, flood=flood
            )


async def _silence(
    figures: Figures,
    cache: dscache.AsyncCache,
    begin: Callable[[], None],
    end: Callable[[], None],
    seconds: float,
    *,
    late: bool,
    flood: int,
) -> None:
    load = Load(cache, timeout=1.0, late=late, flood=flood)
    async with load:
        usual = await rate(load, 1.0)
        before = resident()
        begin()
        try:
            await asyncio.sleep(seconds)
            figures.memory = (before, resident())
        finally:
            end()
        figures.recovered(await back_to(load, usual))
    await load.verify()
    figures.take(load)
    figures.drained(cache)
    figures.notes.append(f"{usual:.0f} operations/s, {cache.stats()['connects']} connections")


async def cut(figures: Figures, binary: ServerBinary, *, step: int = 1) -> None:
    """Cut the connection after every byte of a reply, and of a request."""
    with EmbeddedServer(binary) as server:
        for number, (direction, ending) in enumerate(
            (way, end) for way in ("replies", "requests") for end in ("fin", "rst")
        ):
            length = await _exchanged(server, direction)
            gate = asyncio.Semaphore(32)

            async def one(
                count: int, name: str, way: Any = direction, end: Any = ending, gate: Any = gate
            ) -> None:
                async with gate:
                    await _cut_once(figures, server, name, count, way, end)

            cuts = range(0, length + 1, step)
            await asyncio.gather(*(one(count, f"cut/{number}/{count}") for count in cuts))
            figures.notes.append(f"{len(cuts)} cuts of {direction} by {ending}")
            # Memory that so many concurrent proxies take once is reused.
            now = held()
            figures.memory = (figures.memory[0] or now, now)


async def _exchanged(server: EmbeddedServer, direction: Any) -> int:
    """Return how many bytes the operations of a cut exchange in a direction."""
    async with FaultProxy(server.host, server.port) as proxy, _behind(proxy) as cache:
        await _prepare(cache, "cut/0")
        before = proxy.forwarded[direction]
        await asyncio.gather(*_operations(cache, "cut/0"))
        return proxy.forwarded[direction] - before


async def _prepare(cache: dscache.AsyncCache, name: str) -> None:
    await cache.set_bulk({name: (1, {"name": name, "text": "x" * 100}), f"{name}/w": (1, name)})


def _operations(cache: dscache.AsyncCache, name: str) -> list[Awaitable[Any]]:
    """Issue a read, a head, a write and a guarded write; the last two are of the same record."""
    return [
        cache.get(name),
        cache.head(name),
        cache.set(f"{name}/w", 2, [name, 2]),
        cache.set(f"{name}/w", 3, [name, 3], if_newer=True),
    ]


async def _cut_once(
    figures: Figures, server: EmbeddedServer, name: str, count: int, direction: Any, ending: Any
) -> None:
    async with FaultProxy(server.host, server.port) as proxy:
        options = {"host": proxy.host, "port": proxy.port, "commandTimeout": 20_000}
        async with open_cache(connectTimeout=20_000, **options) as cache:
            await _prepare(cache, name)
            proxy.cut_after(count, direction, ending)
            async with asyncio.timeout(PATIENCE):
                outcomes = await asyncio.gather(*_operations(cache, name), return_exceptions=True)
                proxy.heal()  # a cut that came too late must not hit the next operations
                stored = await cache.get(f"{name}/w")
            for outcome in outcomes:
                is_error = isinstance(outcome, BaseException)
                figures.outcomes[type(outcome).__name__ if is_error else "ok"] += 1
            figures.operations += len(outcomes)
            record, version, plain, guarded = outcomes
            where = f"cut after {count} bytes of {direction}"
            # Reads and guarded writes are sent again, with the right results.
            if getattr(record, "data", None) != {"name": name, "text": "x" * 100} or version != 1:
                figures.problems.append(f"{where}: read {record!r}, version {version!r}")
            if guarded is not True or stored is None or stored.data != [name, 3]:
                figures.problems.append(f"{where}: guarded {guarded!r}, and stored is {stored!r}")
            if plain is not True and not (
                isinstance(plain, dscache.ConnectionLost) and "may have happened" in str(plain)
            ):
                figures.problems.append(f"{where}: plain {plain!r}")
            figures.drained(cache)


async def fuzz(
    figures: Figures,
    binary: ServerBinary,
    *,
    replies: int = 1_000_000,
    seed: int = 0,
    seconds: float = 3600.0,
) -> None:
    """Feed replies made by a grammar to both cores, which must do the same with each."""
    fuzzer = TwinFuzzer(seed)
    began = time.monotonic()
    before = 0
    while fuzzer.replies < replies and time.monotonic() < began + seconds:
        fuzzer.run(100)
        await asyncio.sleep(0)
        if not before and fuzzer.replies > replies / 10:
            before = held()
    took = time.monotonic() - began
    figures.memory, figures.most_growth = (before, held()), LEFT
    figures.operations = fuzzer.replies
    figures.outcomes = fuzzer.outcomes
    figures.problems += fuzzer.problems
    if fuzzer.replies < replies:
        figures.slow.append(f"{fuzzer.replies} of {replies} replies within {seconds:.0f} s")
    figures.notes.append(f"{fuzzer.cases} exchanges, seed {seed}, {took:.0f} s")


async def mutations(
    figures: Figures, binary: ServerBinary, *, cases: int = 1_000_000, seed: int = 0
) -> None:
    """Feed mutated replies to the core: an error at worst, and no caller gets another's record."""
    fuzzer = Fuzzer(_backend.core, seed)
    before, began = 0, time.monotonic()
    while fuzzer.cases < cases:
        fuzzer.run(min(100, cases - fuzzer.cases))
        await asyncio.sleep(0)
        if not before and fuzzer.cases > cases / 10:
            before = held()
    figures.memory, figures.most_growth = (before, held()), LEFT
    figures.operations = fuzzer.cases
    figures.outcomes = fuzzer.outcomes
    figures.problems += fuzzer.problems
    figures.notes.append(f"{fuzzer.cases / (time.monotonic() - began):.0f} cases/s, seed {seed}")


async def own_reader(
    figures: Figures, binary: ServerBinary, *, cases: int = 1_000_000, seed: int = 0
) -> None:
    """Let the compiled core read without hiredis, beside hiredis, the pure core, and mutations."""
    began = time.monotonic()
    with reading("own"):
        fuzzers = (ReaderFuzzer(seed), TwinFuzzer(seed), Fuzzer(_fast, seed))
        before = 0
        for fuzzer in fuzzers:
            while fuzzer.cases < cases / len(fuzzers):
                fuzzer.run(50)
                await asyncio.sleep(0)
                if not before and fuzzer is fuzzers[-1]:  # the others hold what they hold
                    before = held()
            figures.operations += fuzzer.cases
            figures.outcomes += fuzzer.outcomes
            figures.problems += fuzzer.problems
    figures.memory, figures.most_growth = (before, held()), LEFT
    figures.notes.append(f"seed {seed}, {time.monotonic() - began:.0f} s")


async def injection(figures: Figures, binary: ServerBinary, *, every: bool = True) -> None:
    """Raise each exception on each line that an operation executes, in separate processes."""
    with EmbeddedServer(binary) as server:
        options = {"host": server.host, "port": server.port, "commandTimeout": TIMEOUT}
        options["retryStrategy"] = {"first": 1, "cap": 20}
        near = {**options, "nearCache": {"idleLimit": 500}}
        kinds = [(kind, options) for kind in ("async", "blocking", "messages", "coroutines")]
        for kind, used in (*kinds, ("blocking", near)):
            where = {"options": used, "kind": kind, "every": every, "seconds": 6 * 3600}
            where |= {"uvloop": False, "reconnect": True, "step": 1, "offset": 0}
            try:
                result = await asyncio.to_thread(
                    run_child,
                    "injection.py",
                    json.dumps(where),
                    backend=_backend.BACKEND,
                    seconds=6 * 3600.0,
                )
            except AssertionError as error:
                figures.problems.append(f"{kind}: {error}")
                continue
            figures.operations += result["cases"]
            figures.problems += result["problems"]
            with_near = ", near cache" if used is near else ""
            figures.notes.append(f"{result['cases']} of {kind}{with_near}")


async def interruptions(figures: Figures, binary: ServerBinary, *, rounds: int = 20) -> None:
    """Raise in the way of an AsyncCache in every way, in processes of their own."""
    with EmbeddedServer(binary) as server:
        for number in range(rounds):
            for scene, loop in SCENES:
                figures.operations += 1
                try:
                    result = await asyncio.to_thread(
                        run_child,
                        "interruptions.py",
                        *(scene, loop, server.url, "long"),
                        backend=_backend.BACKEND,
                        seconds=600.0,
                    )
                except AssertionError as error:
                    figures.problems.append(f"{scene}, {loop}, round {number}: {error}")
                    continue
                if result != {"wrong": [], "pending": {}}:
                    figures.problems.append(f"{scene}, {loop}, round {number}: {result}")
    figures.notes.append(f"{len(SCENES)} scenes {rounds} times")


async def shortage(
    figures: Figures, binary: ServerBinary, *, stride: int = 1, scenes: list[str] | None = None
) -> None:
    """Let each single allocation of the core fail, in separate processes."""
    result = await asyncio.to_thread(scan, _backend.BACKEND, stride, scenes)
    figures.operations = result["runs"]
    figures.problems += result["crashes"] + result["problems"]
    figures.notes.append(f"{len(result['crashes'])} crashes")


async def finalizers(figures: Figures, binary: ServerBinary, *, count: int = 100_000) -> None:
    """Let finalizers use a pipeline in the middle of its work."""
    result = await asyncio.to_thread(
        run_child, "finalizers.py", _backend.BACKEND, str(count), backend=_backend.BACKEND
    )
    figures.operations = result["finalized"]
    figures.problems += result["problems"]


async def refused(figures: Figures, binary: ServerBinary, *, seconds: float = 60.0) -> None:
    """Rotate a password and spoil certificates: errors at once, paced attempts, then recovery."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [_wrong_password(figures, binary, seconds)]
        rows += [
            _wrong_certificate(figures, binary, seconds, Path(folder), what)
            for what in ("authority", "expired", "host")
        ]
        await asyncio.gather(*rows)


async def _wrong_password(figures: Figures, binary: ServerBinary, seconds: float) -> None:
    with EmbeddedServer(binary, args=("--requirepass", "first")) as server:
        async with (
            FaultProxy(server.host, server.port) as proxy,
            _behind(proxy, password="first") as cache,
        ):

            def rotate(password: str, known: str) -> None:
                with redis_py.Redis(port=server.port, password=known) as admin:
                    admin.config_set("requirepass", password)
                    admin.client_kill_filter(_type="normal", skipme=True)

            faults = (
                "WRONGPASS",
                lambda: rotate("second", "first"),
                lambda: rotate("first", "second"),
            )
            await _refused(figures, cache, proxy, seconds, faults, "password")


async def _wrong_certificate(
    figures: Figures, binary: ServerBinary, seconds: float, folder: Path, what: str
) -> None:
    authority = trustme.CA()
    past = datetime.now(UTC) - timedelta(days=1)
    bad = {
        "authority": lambda: trustme.CA().issue_cert("127.0.0.1"),
        "expired": lambda: authority.issue_cert(
            "127.0.0.1", not_before=past - timedelta(days=9), not_after=past
        ),
        "host": lambda: authority.issue_cert("elsewhere.example"),
    }[what]()
    paths = _write_certificates(folder / what, authority.issue_cert("127.0.0.1"), bad)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(paths[0])
    trusted = authority.cert_pem.bytes().decode()
    with EmbeddedServer(binary) as server:
        async with (
            FaultProxy(server.host, server.port, tls=context) as inner,
            # A proxy in front of TLS counts every attempt to connect.
            FaultProxy(inner.host, inner.port) as proxy,
            open_cache(host=proxy.host, port=proxy.port, tls={"ca": trusted}) as cache,
        ):

            def present(path: str) -> None:
                context.load_cert_chain(path)
                proxy.cut()

            faults = ("certificate", lambda: present(paths[1]), lambda: present(paths[0]))
            await _refused(figures, cache, proxy, seconds, faults, what)


def _write_certificates(folder: Path, *certificates: trustme.LeafCert) -> list[str]:
    folder.mkdir()
    paths = [folder / f"{number}.pem" for number in range(len(certificates))]
    for path, certificate in zip(paths, certificates, strict=True):
        certificate.private_key_and_cert_chain_pem.write_to_path(str(path))
    return [str(path) for path in paths]


async def _refused(
    figures: Figures,
    cache: dscache.AsyncCache,
    proxy: FaultProxy,
    seconds: float,
    fault: tuple[str, Callable[[], None], Callable[[], None]],
    label: str,
) -> None:
    said, spoil, repair = fault
    load = Load(cache, timeout=1.0, names=8, readers=4, pause=0.02)
    async with load:
        await asyncio.sleep(0.2)
        spoil()
        before, began = proxy.accepted, time.monotonic()
        await until(lambda: not cache.is_ready, f"{said}: the connection to end")
        while True:  # in between, operations wait for the next attempt
            error = await _error_of(cache.get("refused"))
            if said in str(error):
                break
        while (left := seconds - (time.monotonic() - began)) > 0:
            error = await _error_of(cache.get("refused"))
            if said not in str(error):
                figures.problems.append(f"{said} was told as {error!r}")
                break
            await asyncio.sleep(min(left, 0.1))
        attempts = proxy.accepted - before
        # The first attempts come soon, as with every loss.
        if attempts > ATTEMPTS_A_MINUTE * max(seconds / 60, 0.6):
            figures.problems.append(f"{label}: {attempts} attempts in {seconds:.0f} s")
        repair()
        again = await until(lambda at=load.last_success: load.last_success > at, said)
        figures.notes.append(f"{label}: {attempts} attempts, well after {again:.1f} s")
    await load.verify()
    figures.take(load)
    figures.drained(cache)


async def _error_of(waiter: Awaitable[Any]) -> BaseException | None:
    (outcome,) = await asyncio.gather(waiter, return_exceptions=True)
    return outcome if isinstance(outcome, BaseException) else None


async def away(figures: Figures, binary: ServerBinary, *, operations: int = 100_000) -> None:
    """Queue operations while the server is down: refused beyond a limit, or all served later."""
    with EmbeddedServer(binary) as server:
        for when_full in ("error", "wait"):
            async with FaultProxy(server.host, server.port) as proxy:
                options = {"host": proxy.host, "port": proxy.port, "whenFull": when_full}
                async with open_cache(commandTimeout=60_000, **options) as cache:
                    await _away(figures, cache, proxy, operations, when_full)


async def _away(
    figures: Figures, cache: dscache.AsyncCache, proxy: FaultProxy, operations: int, when_full: str
) -> None:
    limit = min(operations, 10_000) if when_full == "error" else operations
    await proxy.refuse()
    proxy.cut()
    await until(lambda: not cache.is_ready, "the connection to end")
    before = resident()
    waiters = []
    for i in range(operations):
        try:
            waiters.append(cache.set(f"away/{i}", i, {"number": i, "text": "x" * 100}))
        except dscache.Overloaded:
            figures.outcomes["Overloaded"] += 1
        if i % 1000 == 0:
            await asyncio.sleep(0)
    figures.operations += operations
    grown = resident() - before
    if len(waiters) != limit or cache.stats()["pending"] != limit:
        figures.problems.append(f"{when_full}: {len(waiters)} queued, not {limit}")
    figures.notes.append(f"{when_full}: {len(waiters)} queued in {grown / 2**20:.1f} MiB")
    if grown > 4096 * len(waiters) + MEMORY:
        figures.problems.append(f"{when_full}: {grown} bytes for {len(waiters)} operations")
    await proxy.listen()
    began = time.monotonic()
    async with asyncio.timeout(PATIENCE):
        results = await asyncio.gather(*waiters, return_exceptions=True)
    figures.notes.append(f"served within {time.monotonic() - began:.2f} s")
    figures.outcomes["ok"] += results.count(True)
    if results.count(True) != limit:
        figures.problems.append(f"{when_full}: {results.count(True)} of {limit} were written")
    figures.drained(cache)
    heads = await cache.head_bulk([f"away/{i}" for i in range(operations)])
    if when_full == "wait" and heads != {f"away/{i}": i for i in range(operations)}:
        figures.problems.append("what was acknowledged is not all there")


async def silent(figures: Figures, binary: ServerBinary) -> None:
    """Let the peer fall silent for good: it is found while idle, and while in use."""
    with EmbeddedServer(binary) as server:
        async with FaultProxy(server.host, server.port) as proxy, _behind(proxy) as cache:
            await cache.set("silent", 1, "here")
            proxy.stall()
            found = await until(lambda: not cache.is_ready, "an idle link to be found dead")
            figures.notes.append(f"found after {found:.1f} s idle")
            if found > DEAD_PEER:
                figures.slow.append(f"{found:.1f} s until an idle link was found dead")
            proxy.resume()
            await until(lambda: cache.is_ready, "a new connection")
            proxy.stall()
            began = time.monotonic()
            error = await _error_of(cache.get("silent"))
            # Without a connection, if it was found dead before that.
            if not isinstance(error, (dscache.DeadlineExceeded, dscache.ConnectError)):
                figures.problems.append(f"a read without an answer: {error!r}")
            await until(lambda: not cache.is_ready, "a link in use to be found dead")
            found = time.monotonic() - began
            figures.notes.append(f"{found:.2f} s in use")
            if found > 1 + LATENESS:
                figures.slow.append(f"{found:.2f} s until a link in use was found dead")
            proxy.resume()
            record = await cache.get("silent")
            if record is None or record.data != "here":
                figures.problems.append(f"read {record!r} at last")
            figures.operations = 3
            figures.drained(cache)


async def failover(figures: Figures, binary: ServerBinary, *, rounds: int = 3) -> None:
    """Kill the primary behind Sentinels, or replace it, under load of guarded writes."""
    for _ in range(rounds):
        for happen in (_fail_over, _replace):
            # A new group each time: Sentinels may repeat a recent failover by themselves, and a
            # former primary loses the writes that it acknowledges.
            with SentinelGroup(binary) as group:
                async with open_cache(**group.options) as cache:
                    await happen(figures, group, cache)


async def _fail_over(figures: Figures, group: SentinelGroup, cache: dscache.AsyncCache) -> None:
    load = Load(cache, timeout=1.0, guarded_only=True)
    async with load:
        await asyncio.sleep(0.5)
        old = group.primary()
        with group.ask(old.port) as client:
            await asyncio.to_thread(client.wait, len(group.servers) - 1, 4000)
        killed = time.monotonic()
        old.kill()
        agreed = await asyncio.to_thread(group.wait_for_primary, old)
        before = load.acknowledged
        await until(lambda: load.acknowledged > before, "writes after a failover")
        figures.recovered(time.monotonic() - agreed)
        figures.notes.append(f"Sentinels took {agreed - killed:.1f} s")
        await asyncio.sleep(0.2)
    await load.verify()
    figures.take(load)
    figures.drained(cache)


async def _replace(figures: Figures, group: SentinelGroup, cache: dscache.AsyncCache) -> None:
    # The last writes acknowledged by the old primary are lost: it answers before it replicates, and
    # the replica leaves it before the Sentinels announce that. Hence two loads.
    before = Load(cache, timeout=1.0, guarded_only=True, prefix="before")
    after = Load(cache, timeout=1.0, guarded_only=True, prefix="after")
    connects = cache.stats()["connects"]
    async with before:
        await asyncio.sleep(0.5)
        began = time.monotonic()
        old = await asyncio.to_thread(group.fail_over)
        waiting = asyncio.create_task(asyncio.to_thread(group.wait_for_primary, old))
        await until(
            lambda: cache.is_ready and cache.stats()["connects"] > connects, "a replaced primary"
        )
        moved = time.monotonic()
        async with after:
            await until(lambda: after.acknowledged > 0, "writes to the new primary")
            agreed = await waiting
            await asyncio.sleep(0.5)
    figures.recovered(max(moved - agreed, 0.0))
    figures.notes.append(f"replaced within {moved - began:.2f} s, agreed {agreed - began:.2f} s")
    if "name another primary" not in (loss := cache.stats()["last_loss"]):
        figures.problems.append(f"lost because {loss}")
    await after.verify()
    with group.ask(old.port) as client:
        if client.role()[0] != "master":
            figures.problems.append("the old primary was told that it is none")
        if misled := client.keys("after/*"):
            figures.problems.append(f"{len(misled)} keys were written to the old primary")
    figures.take(after)
    figures.operations += before.operations
    figures.outcomes += before.outcomes
    figures.drained(cache)


async def mixed(figures: Figures, binary: ServerBinary, *, minutes: float = 30.0) -> None:
    """Load of every kind, and one fault after the other, at random."""
    with EmbeddedServer(binary) as server:
        async with ProxyProcess(server.host, server.port) as proxy, _behind(proxy) as cache:
            await _mixed(figures, cache, proxy, server, minutes * 60)


async def _mixed(
    figures: Figures,
    cache: dscache.AsyncCache,
    proxy: ProxyProcess,
    server: EmbeddedServer,
    seconds: float,
) -> None:
    load = Load(cache, timeout=1.0, late=True)
    counts: Counter[str] = Counter()
    samples = Samples(int(seconds / 0.35) + 1)  # no fault takes less
    end = time.monotonic() + seconds
    # One client for all: redis-py keeps a little memory for each.
    with redis_py.Redis(port=server.port) as admin:
        faults = _faults(proxy, server, admin)
        admin.ping()
        fewest = most = open_files()
        async with load:
            while time.monotonic() < end:
                name = random.choice(list(faults))
                counts[name] += 1
                await faults[name]()
                await asyncio.sleep(random.uniform(0.05, 0.5))
                await proxy.do("heal")
                await proxy.do("listen")
                served = load.last_success
                await until(lambda at=served: load.last_success > at, f"life after {name}")
                await asyncio.sleep(0.3)
                samples.take()
                fewest, most = min(fewest, open_files()), max(most, open_files())
    await load.verify()
    figures.take(load)
    figures.drained(cache)
    figures.grew(samples)
    figures.notes.append(f"files {fewest} to {most}")
    figures.notes.append(", ".join(f"{name} {count}" for name, count in counts.most_common()))


def _faults(
    proxy: ProxyProcess, server: EmbeddedServer, admin: redis_py.Redis
) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return the faults by name. None of them duplicates or alters delivered data."""

    def ask(*command: str) -> Awaitable[object]:
        return asyncio.to_thread(admin.execute_command, *command)

    async def pause() -> None:
        server.pause()
        await asyncio.sleep(random.uniform(0, 2))
        server.resume()

    async def stall() -> None:
        await proxy.do("stall")
        await asyncio.sleep(random.uniform(0, 3))

    async def refuse_and_cut() -> None:
        await proxy.do("refuse")
        await proxy.do("cut")

    def either_way() -> str:
        return random.choice(("requests", "replies"))

    return {
        "nothing": lambda: asyncio.sleep(0.1),
        "delay": lambda: proxy.do("delay", random.uniform(0, 0.1)),
        "stall": stall,
        "half stall": lambda: proxy.do("stall", either_way()),
        "deaf": lambda: proxy.do("deaf"),
        "cut": lambda: proxy.do("cut", random.choice(("fin", "rst"))),
        "cut after": lambda: proxy.do("cut_after", random.randrange(3000), either_way()),
        "refuse and cut": refuse_and_cut,
        "split": lambda: proxy.do("split", random.randrange(1, 50)),
        "garbage": lambda: proxy.do("garble"),
        "pause": pause,
        "no script": lambda: ask("SCRIPT", "FLUSH"),
        "client kill": lambda: ask("CLIENT", "KILL", "TYPE", "normal"),
    }


# -- all of them

ROWS: dict[str, Row] = {
    "kill": kill,
    "storm": storm,
    "blackhole": blackhole,
    "freeze": freeze,
    "cut": cut,
    "fuzz": fuzz,
    "mutations": mutations,
    "own-reader": own_reader,
    "injection": injection,
    "interruptions": interruptions,
    "shortage": shortage,
    "finalizers": finalizers,
    "failover": failover,
    "refused": refused,
    "near": near_rows.near,
    "away": away,
    "silent": silent,
    "mixed": mixed,
    "cluster-records": cluster_rows.records,
    "reshard": cluster_rows.reshard,
    "cluster-kill": cluster_rows.kill,
    "cluster-failover": cluster_rows.failover,
    "maintenance": maintenance_rows.tasks,
    "sync-maintenance": maintenance_rows.threads,
    "messages": message_rows.everything,
    "messages-kill": message_rows.kill,
    "messages-slow": message_rows.slow,
    "deepstream": deepstream_rows.converge,
    "deepstream-calls": deepstream_rows.any_call,
    "sync-threads": thread_rows.threads,
    "sync-interrupts": thread_rows.interrupts,
    "sync-kill": thread_rows.kill,
    "sync-reshard": thread_rows.reshard,
    "records-updates": record_rows.updates,
    "records-crowd": record_rows.crowd,
    "records-model": record_rows.model,
    "records-mirror": record_rows.mirror,
    "records-scans": record_rows.scans,
    "records-expiry": record_rows.expiry,
    "sync-near": near_thread_rows.threads,
    "sync-near-disturbed": near_thread_rows.disturbed,
    "sync-near-race": near_thread_rows.race,
    "sync-near-writes": near_thread_rows.writes,
    "sync-near-memory": near_thread_rows.memory,
    "sync-near-faults": near_fault_rows.faults,
    "sync-near-host": near_host_rows.threads,
    "sync-near-host-killed": near_host_rows.killed,
}


async def run(row: str, binary: ServerBinary, **sizes: Any) -> Figures:
    """Run one row and return its figures."""
    figures = Figures(row)
    async with measured(figures):
        try:
            await ROWS[row](figures, binary, **sizes)
        except (
            AssertionError,
            TimeoutError,
            subprocess.SubprocessError,
            dscache.DscacheError,
        ) as error:
            figures.problems.append(f"{type(error).__name__}: {error}")
    return figures
