"""Soak rows for announced maintenance: a hosted server that moves, and slots that move."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from functools import partial
from itertools import groupby
from typing import Any

import dscache
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.soak.figures import Figures, until
from tests.soak.load import Load
from tests.support.announcer import SLOTS, Announcer, Stage, staged
from tests.support.blocking import ThreadedCache

_TIMEOUT = 10.0
_THREADS = 16
_TASKS = 100


async def tasks(figures: Figures, binary: ServerBinary, *, rounds: int = 100) -> None:
    """Maintain a server and a cluster under the tasks of an AsyncCache."""
    with EmbeddedServer(binary) as server, staged(server) as stage:
        async with _async(_server(stage)) as cache:
            await _maintain_server(figures, stage, cache, rounds)
        async with _async(_cluster(stage)) as cache:
            await _maintain_cluster(figures, stage, cache, rounds)


async def threads(figures: Figures, binary: ServerBinary, *, rounds: int = 100) -> None:
    """Maintain a server and a cluster under the threads of a Cache."""
    with EmbeddedServer(binary) as server, staged(server) as stage:
        for where, maintain in (
            (_server(stage), _maintain_server),
            (_cluster(stage), _maintain_cluster),
        ):
            async with ThreadedCache(dscache.Cache.from_config(where), _THREADS) as cache:
                await maintain(figures, stage, cache, rounds)


def _async(where: dict[str, Any]) -> dscache.AsyncCache:
    return dscache.AsyncCache.from_config(where)


def _server(stage: Stage) -> dict[str, Any]:
    first, _ = stage.server(), stage.server()
    return _options({"host": "127.0.0.1", "port": first.port})


def _cluster(stage: Stage) -> dict[str, Any]:
    first, second, _ = stage.node(), stage.node(), stage.node()
    stage.slots.divide(first, second)
    return _options({"nodes": [{"host": "127.0.0.1", "port": first.port}]})


def _options(where: dict[str, Any]) -> dict[str, Any]:
    options = {**where, "maintNotifications": "on", "commandTimeout": _TIMEOUT * 1000}
    return {"name": "redis", "options": options}


async def _maintain_server(figures: Figures, stage: Stage, cache: Any, rounds: int) -> None:
    usual, other = stage.open[:2]
    now = usual
    serial = moves = 0
    async with _loaded(figures, cache, "server"):
        for _ in range(rounds):
            serial += 2
            seconds = random.randrange(30, 60)
            kind = random.choice(("named", "named", "unnamed", "migrating", "failing"))
            if kind in ("migrating", "failing"):
                begun, ended = (
                    ("MIGRATING", "MIGRATED")
                    if kind == "migrating"
                    else ("FAILING_OVER", "FAILED_OVER")
                )
                stage.push(begun.encode(), serial, seconds, by=now)
                await asyncio.sleep(random.uniform(0, 0.05))
                stage.push(ended.encode(), serial + 1, by=now)
                continue
            before, moves = now, moves + 1
            now = usual if kind == "unnamed" or now is other else other
            endpoint = None if kind == "unnamed" else now.address
            stage.push(b"MOVING", serial, 1 if endpoint is None else seconds, endpoint, by=before)
            await _served(cache, moves)
            await asyncio.sleep(random.uniform(0, 0.1))
    counted = cache.stats()["maintenance"]
    figures.notes.append(f"{counted['moves']} moves, {counted['relaxed']} times more time")
    if counted["moves"] != moves:
        figures.problems.append(f"{counted['moves']} of {moves} moves")


async def _served(cache: Any, moves: int) -> None:
    await until(lambda: cache.stats()["maintenance"]["moves"] >= moves, "a move")


async def _maintain_cluster(figures: Figures, stage: Stage, cache: Any, rounds: int) -> None:
    nodes = stage.slots.nodes
    async with _loaded(figures, cache, "cluster"):
        for number in range(rounds):
            first, last = sorted(random.sample(range(SLOTS), 2))
            target = random.choice(nodes)
            for node in nodes:
                stage.push(b"SMIGRATING", 2 * number, b"%d-%d" % (first, last), by=node)
            await asyncio.sleep(random.uniform(0, 0.02))
            told = _moves(stage, first, last, target)
            stage.do(partial(stage.slots.give, first, last, target))
            for node in random.sample(nodes, len(nodes)):
                stage.push(b"SMIGRATED", 2 * number + 1, told, by=node)
            await asyncio.sleep(random.uniform(0, 0.2))
    stats = cache.stats()
    counted = stats["maintenance"]
    figures.notes.append(
        f"{counted['moved_slots']} slots moved, {stats['redirections']} redirections"
    )
    if not counted["moved_slots"]:
        figures.problems.append("no slots moved")


def _moves(stage: Stage, first: int, last: int, target: Announcer) -> list[list[bytes]]:
    moves = []
    for source, run in groupby(range(first, last + 1), stage.slots.owners.__getitem__):
        slots = list(run)
        if source is not target:
            moves.append([source.address, target.address, b"%d-%d" % (slots[0], slots[-1])])
    return moves


@contextlib.asynccontextmanager
async def _loaded(figures: Figures, cache: Any, prefix: str) -> AsyncIterator[None]:
    """Load the cache meanwhile: no operation may fail."""
    # As many as there are threads: an operation that waits for a thread would seem late.
    count = (_TASKS if isinstance(cache, dscache.AsyncCache) else _THREADS) // 2
    load = Load(cache, timeout=_TIMEOUT, names=count, readers=count, pause=0.001, prefix=prefix)
    async with load:
        yield
    await load.verify()
    figures.take(load)
    failed = {one: times for one, times in load.outcomes.items() if one != "ok"}
    if failed:
        figures.problems.append(f"operations failed: {failed}")
