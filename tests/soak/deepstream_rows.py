"""Soak row on deepstream: real servers and clients with peers beside them, which end equal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

import dscache
from dscache.deepstream import Peer, Reject, RPCError
from dscache.embedded import EmbeddedServer, ServerBinary
from dscache.errors import DscacheError
from tests.soak.figures import Figures
from tests.support.deepstream import FAST, Client, NotInstalledError, World, install

_logger = logging.getLogger("dscache")

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


# -- any call

_TEXTS = (
    "",
    "a",
    "Ä😀",
    "\x00",
    "a\nb",
    "'\"\\",
    "\ud800",
    "x" * 5000,
    "%_EVERYONE_%",
    "__proto__",
)
_ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, float("nan"), float("inf"), 1e308, 2**53 + 1, 2**70, -0.0),
    *(
        b"bytes",
        {1, 2},
        object(),
        Ellipsis,
        msgspec.Raw(b"{"),
        msgspec.Raw(b""),
        msgspec.Raw(b"[1]"),
    ),
)


def _value(dice: random.Random, depth: int = 3) -> Any:
    kind = dice.random()
    if kind < 0.25 and depth:
        return [_value(dice, depth - 1) for _ in range(dice.randrange(4))]
    if kind < 0.6 and depth:
        return {
            dice.choice((*_TEXTS, "n", "0")): _value(dice, depth - 1)
            for _ in range(dice.randrange(4))
        }
    return dice.choice((*_ODD, *_TEXTS))


def _name(dice: random.Random, names: list[str]) -> Any:
    kind = dice.random()
    if kind < 0.8:
        return dice.choice(names)
    return dice.choice(_TEXTS) if kind < 0.95 else dice.choice(_ODD)


async def any_call(
    figures: Figures, binary: ServerBinary, *, calls: int = 100_000, seed: int = 1
) -> None:
    """Call the public methods of a peer with anything: no server or client complains."""
    try:
        packages = install()
    except NotInstalledError as error:
        figures.notes.append(f"left out: {error}")
        return
    with EmbeddedServer(binary) as redis, tempfile.TemporaryDirectory() as folder:
        world = World(packages, redis, Path(folder))
        # Handlers return anything too, and each failure of one is logged.
        level = _logger.level
        _logger.setLevel(logging.CRITICAL)
        try:
            await _call_anything(figures, world, calls, random.Random(seed))
        finally:
            _logger.setLevel(level)
            await world.close()


async def _call_anything(figures: Figures, world: World, calls: int, dice: random.Random) -> None:
    servers = [await world.server(**FAST) for _ in range(2)]
    clients = [await world.client(server) for server in servers]
    peers = [await world.peer(more=FAST) for _ in range(2)]
    records = [f"any/{number}" for number in range(6)] + ["hot/1"]
    for client in clients:
        for name in EVENTS:
            await client.do("subscribe", name=name)
        for name in records:
            await client.do("open", name=name)
        await client.do("provide", name="js/echo", kind="echo")
        await client.do("provide", name="js/reject", kind="reject")
    await asyncio.sleep(0.5)
    left = calls

    async def work(peer: Peer) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            kind = dice.choice(tuple(_CALLS))
            try:
                async with asyncio.timeout(10):
                    await _CALLS[kind](peer, dice, records)
                outcome = "ok"
            except DscacheError as error:
                outcome = type(error).__name__
            figures.outcomes[outcome] += 1
            figures.operations += 1

    await asyncio.gather(*(work(peer) for peer in peers for _ in range(8)))
    # The last messages must have arrived.
    await peers[0].records.set("any/0", {"last": 1})
    await asyncio.sleep(2.5)
    for server in servers:
        figures.problems += [f"{server.name}: {line}" for line in server.complaints()[:5]]
    for client in clients:
        if not client.is_running:
            figures.problems.append(f"{client.username} has died: {(await client.stop())[-2000:]}")
        else:
            figures.problems += [str(error) for error in (await client.do("errors"))[:5]]
    died = [one for one in (*servers, *clients) if not one.is_running]
    figures.problems += [f"{one} has died" for one in died]


async def _call_events(peer: Peer, dice: random.Random, records: list[str]) -> None:
    if dice.random() < 0.9:
        await peer.events.emit(_name(dice, list(EVENTS)), _value(dice))
        return
    listening = peer.events.listen(_name(dice, ["e/*", "?"]), max_pending=dice.choice((1, 5, 0)))
    await asyncio.sleep(0.01)
    listening.close()


async def _call_set(peer: Peer, dice: random.Random, records: list[str]) -> None:
    data = _value(dice) if dice.random() < 0.5 else {"v": _value(dice)}
    ttl = dice.choice((None, None, None, 0, 1, 60, -1, "1"))
    await peer.records.set(_name(dice, records), data, ttl=ttl)


async def _call_patch(peer: Peer, dice: random.Random, records: list[str]) -> None:
    path = dice.choice(("a", "a.b", "a[0]", "v.n", "", ".", "a[x]", 5, "\ud800"))
    await peer.records.patch(_name(dice, records), path, _value(dice), default={})


async def _call_update(peer: Peer, dice: random.Random, records: list[str]) -> None:
    kept = dice.random()
    value = dscache.KEEP if kept < 0.1 else dscache.DELETE if kept < 0.15 else _value(dice)
    await peer.records.update(_name(dice, records), lambda data: value, default={})


async def _call_delete(peer: Peer, dice: random.Random, records: list[str]) -> None:
    await peer.records.delete(_name(dice, records))


async def _call_notify(peer: Peer, dice: random.Random, records: list[str]) -> None:
    await peer.records.notify([_name(dice, records) for _ in range(dice.randrange(3))])


async def _call_lists(peer: Peer, dice: random.Random, records: list[str]) -> None:
    name = _name(dice, ["any/list"])
    if dice.random() < 0.6:
        await peer.lists.add(name, _name(dice, ["a", "b"]), index=dice.choice((None, 0, 9)))
    else:
        await peer.lists.remove(name, _name(dice, ["a", "b"]))


async def _call_rpc(peer: Peer, dice: random.Random, records: list[str]) -> None:
    names = ["js/echo", "js/reject", "py/any", "none"]
    await peer.rpc.make(_name(dice, names), _value(dice), timeout=dice.choice((2, 5, 0, "x")))


async def _call_provide(peer: Peer, dice: random.Random, records: list[str]) -> None:
    def handler(data: Any) -> Any:
        if dice.random() < 0.2:
            raise Reject
        if dice.random() < 0.2:
            raise RPCError("no", data=_value(dice))
        return _value(dice)

    end = peer.rpc.provide(_name(dice, ["py/any"]), handler)
    await asyncio.sleep(0.02)
    end()


async def _call_changes(peer: Peer, dice: random.Random, records: list[str]) -> None:
    pattern = _name(dice, ["any/*", "*", "any/?"])
    async with peer.records.changes(pattern, max_pending=dice.choice((1, 5, 0))) as changes:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await anext(changes)


async def _call_presence(peer: Peer, dice: random.Random, records: list[str]) -> None:
    await peer.presence.is_online(_name(dice, ["user-1", "OPEN"]))
    async with peer.presence.changes() as changes:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await anext(changes)


_CALLS = {
    "changes": _call_changes,
    "presence": _call_presence,
    "events": _call_events,
    "set": _call_set,
    "patch": _call_patch,
    "update": _call_update,
    "delete": _call_delete,
    "notify": _call_notify,
    "lists": _call_lists,
    "rpc": _call_rpc,
    "provide": _call_provide,
}
