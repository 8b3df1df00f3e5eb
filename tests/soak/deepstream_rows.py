"""Soak row on deepstream: real servers and clients with peers beside them, which end equal."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import dscache
from dscache.deepstream import Peer, RPCError
from dscache.embedded import EmbeddedServer, ServerBinary
from dscache.errors import DscacheError
from tests.soak.figures import Figures
from tests.support.deepstream import FAST, Client, NotInstalledError, World, install

NAMES = [f"room/{number}" for number in range(8)]
EVENTS = ("e/1", "e/2")
RPCS = ("py/add", "js/add")
# Seconds within which every side must be equal, once nobody writes.
_SETTLE = 30.0


async def converge(
    figures: Figures, binary: ServerBinary, *, seconds: float = 300.0, seed: int = 1
) -> None:
    """Let clients and peers write, delete, emit and call at random, and kill Redis once."""
    try:
        packages = install()
    except NotInstalledError as error:
        figures.notes.append(f"left out: {error}")
        return
    # Each write that Redis has acknowledged survives its death.
    durable = ("--appendonly", "yes", "--appendfsync", "always")
    with (
        EmbeddedServer(binary, args=durable) as redis,
        tempfile.TemporaryDirectory() as folder,
    ):
        world = World(packages, redis, Path(folder))
        try:
            await _Run(figures, world, seconds, random.Random(seed)).run()
        finally:
            await world.close()


class _Run:
    """Two servers, three clients and two peers for a time."""

    def __init__(self, figures: Figures, world: World, seconds: float, dice: random.Random) -> None:
        self.figures = figures
        self.world = world
        self.seconds = seconds
        self.dice = dice
        self.outcomes: Counter[str] = Counter()
        self.counted = 0
        self.mirrors: dict[str, dict[str, Any]] = {}

    async def run(self) -> None:
        world = self.world
        servers = [await world.server(**FAST) for _ in range(2)]
        clients = [await world.client(server) for server in (*servers, servers[0])]
        peers = [await world.peer(more=FAST) for _ in range(2)]
        tasks = [asyncio.create_task(self._mirror(peer)) for peer in peers]
        tasks += [asyncio.create_task(self._listen(peer)) for peer in peers]
        for peer in peers:
            peer.rpc.provide("py/add", lambda data: data["a"] + data["b"])
        for client in clients:
            await client.do("provide", name="js/add", kind="add")
            for name in EVENTS:
                await client.do("subscribe", name=name)
        await asyncio.sleep(0.5)
        counts = await self._work_all(clients, peers)
        for count in counts:
            self.outcomes.update({f"js {name}": number for name, number in count.items()})
        self.figures.outcomes.update(self.outcomes)
        self.figures.operations = sum(self.outcomes.values())
        await self._compare(peers[0], clients)
        await self._look_for_lost(peers[0], clients, counts)
        for task in tasks:
            task.cancel()
        died = [one for one in (*servers, *clients) if not one.is_running]
        self.figures.problems += [f"{one} has died" for one in died]
        reconciled = sum(peer.stats()["records_reconciled"] for peer in peers)
        self.figures.notes.append(f"{reconciled} reconciled")

    async def _work_all(self, clients: list[Client], peers: list[Peer]) -> list[dict[str, int]]:
        end = time.monotonic() + self.seconds
        stress = [
            client.do(
                "stress",
                names=NAMES,
                own=f"own/{client.username}",
                rpcs=RPCS,
                milliseconds=self.seconds * 1000,
                pause=40,
                patience=self.seconds + 60,
            )
            for client in clients
        ]
        works = [self._work(peer, end) for peer in peers]
        *counts, _, _, _ = await asyncio.gather(*stress, *works, self._kill_once())
        return [dict(count) for count in counts]  # type: ignore[call-overload] # of clients

    async def _kill_once(self) -> None:
        await asyncio.sleep(self.seconds / 2)
        self.world.redis.kill()
        await asyncio.sleep(min(1.0, self.seconds / 20))
        await asyncio.to_thread(self.world.redis.start)

    async def _work(self, peer: Peer, end: float) -> None:
        dice = self.dice
        while time.monotonic() < end:
            kind = dice.random()
            name = dice.choice(NAMES)
            try:
                async with asyncio.timeout(5):
                    await self._do(peer, kind, name)
            except RPCError:
                self.outcomes["py unmade"] += 1
            except dscache.RecordError:
                raise
            except (DscacheError, TimeoutError):
                self.outcomes["py failed"] += 1
            await asyncio.sleep(dice.random() * 0.03)

    async def _do(self, peer: Peer, kind: float, name: str) -> None:
        dice, outcomes = self.dice, self.outcomes
        if kind < 0.35:
            path = dice.choice(("a", "b", "c.d"))
            await peer.records.patch(name, path, dice.randrange(10**6), default={})
            outcomes["py patched"] += 1
        elif kind < 0.5:
            await peer.records.set(name, {"whole": dice.random()})
            outcomes["py set"] += 1
        elif kind < 0.53:
            await peer.records.delete(name)
            outcomes["py deleted"] += 1
        elif kind < 0.56:
            await peer.records.set(name, {"brief": True}, ttl=1)
            outcomes["py set with ttl"] += 1
        elif kind < 0.7:
            await peer.events.emit(dice.choice(EVENTS), {"by": peer.server_name})
            outcomes["py emitted"] += 1
        elif kind < 0.85:
            made = await peer.rpc.make(dice.choice(RPCS), {"a": 1, "b": 2}, timeout=2)
            if made != 3:
                self.figures.problems.append(f"an RPC returned {made}")
            outcomes["py made"] += 1
        else:
            await peer.records.update("count", _one_more, default={"n": 0})
            self.counted += 1
            outcomes["py counted"] += 1

    async def _mirror(self, peer: Peer) -> None:
        """Keep the version and data of each room by their changes."""
        state = self.mirrors[peer.server_name] = {}
        async for change in peer.records.changes("room/*"):
            if change.kind == "changed":
                state[change.name] = [change.version, change.data]
            elif change.kind == "deleted":
                state[change.name] = None
            elif change.kind in ("resumed", "flushed"):
                for name in NAMES:
                    state[name] = await _read(peer, name)

    async def _listen(self, peer: Peer) -> None:
        async for _ in peer.events.listen("e/*"):
            self.outcomes["py heard"] += 1

    async def _compare(self, peer: Peer, clients: list[Client]) -> None:
        """Wait until all clients with a record open, and the mirrors, have it as Redis has."""
        began = time.monotonic()
        differences = ["nothing was compared"]
        while differences and time.monotonic() < began + _SETTLE:
            await asyncio.sleep(0.5)
            differences = []
            stored = {name: await _read(peer, name) for name in NAMES}
            for client in clients:
                open_records = await client.do("state")
                differences += [
                    f"{client.username} has {name} {open_records[name]}, Redis {stored[name]}"
                    for name in NAMES
                    if name in open_records and open_records[name] != stored[name]
                ]
            for who, state in self.mirrors.items():
                differences += [
                    f"{who} saw {name} {state.get(name)}, Redis has {stored[name]}"
                    for name in NAMES
                    if state.get(name) != stored[name]
                ]
        self.figures.problems += differences
        self.figures.recovery = time.monotonic() - began

    async def _look_for_lost(
        self, peer: Peer, clients: list[Client], counts: list[dict[str, int]]
    ) -> None:
        """Compare the acknowledged writes of the records that one side alone writes."""
        for client, count in zip(clients, counts, strict=True):
            found = await _read(peer, f"own/{client.username}")
            kept = found[1].get("n", 0) if found is not None else 0
            if kept < count["own"]:
                self.figures.problems.append(
                    f"{client.username}: {count['own']} acknowledged, {kept} kept"
                )
        found = await _read(peer, "count")
        kept = found[1]["n"] if found is not None else 0
        if kept < self.counted:
            self.figures.problems.append(f"peers: {self.counted} acknowledged, {kept} kept")


def _one_more(data: dict[str, int]) -> dict[str, int]:
    return {"n": data["n"] + 1}


async def _read(peer: Peer, name: str) -> list[Any] | None:
    with contextlib.suppress(dscache.ConnectionLost):
        record = await peer.records.get(name)
        return None if record is None else [record.version, record.data]
    record = await peer.records.get(name)
    return None if record is None else [record.version, record.data]
