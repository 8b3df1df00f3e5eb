"""Soak rows on a cluster of three primaries and three replicas.

Replication is asynchronous: a primary that is killed or replaced by force loses writes that it
acknowledged and had not replicated. The rows then assert that nothing fails, that no caller gets
another's record, and that writes acknowledged by the new primary stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from redis.crc import key_slot

import dscache
from dscache.embedded import ServerBinary
from tests.soak.figures import PATIENCE, Figures, resident, until
from tests.soak.load import Load
from tests.support.clusters import SLOTS, ClusterGroup, ClusterNode, Failover

# For caches: findings of the next slot refresh should not take long.
CURIOUS = {"slotsRefreshInterval": 50}
KINDS: tuple[Failover, ...] = ("", "FORCE", "TAKEOVER")
NODE_TIMEOUT_MS = 1000
# While a shard is down, the others keep at least this part of their rate.
KEPT_RATE = 0.8
_WRITERS = 10
_READERS = 10
_AT_ONCE = 1000
# Objects made once, by the first use of each operation and layout.
_KEPT_BLOCKS = 5000


def start(binary: ServerBinary) -> ClusterGroup:
    """Return a cluster for these rows, to be entered."""
    return ClusterGroup(
        binary,
        node_timeout_ms=NODE_TIMEOUT_MS,
        # One shard's fault must not affect the others, and a shard without slots stays a primary.
        full_coverage=False,
        args=("--cluster-allow-replica-migration", "no"),
    )


def open_cache(group: ClusterGroup, **options: Any) -> dscache.AsyncCache:
    """Return a cache on a cluster, with these options as in the YAML."""
    return dscache.AsyncCache.from_config({"name": "redis", "options": group.options | options})


def slot_of(name: str) -> int:
    """Return the slot of a record under the layout hashtag."""
    return key_slot(f"{{{name}}}".encode())


def prefix_on(group: ClusterGroup, node: ClusterNode) -> str:
    """Return a prefix whose names all share one slot, served by that node."""
    slots = set(group.slots_of(node))
    # The tag of "{{prefix}/name}_v" ends at the first brace.
    return next(tag for i in range(10**6) if slot_of(tag := f"{{shard-{i}}}") in slots)


def a_name_each(group: ClusterGroup) -> dict[str, ClusterNode]:
    """Return the name of a record of each primary, to find that primary by."""
    found: dict[str, ClusterNode] = {}
    for node in group.primaries():
        slots = set(group.slots_of(node))
        found[next(name for i in range(10**6) if slot_of(name := f"on/{i}") in slots)] = node
    return found


@contextlib.contextmanager
def leaving_soon(
    binary: ServerBinary,
) -> Iterator[tuple[ClusterGroup, ClusterNode, ClusterNode]]:
    """Yield a new cluster, and the nodes from which and to which its slots move.

    The first has few slots at the beginning, so that the move is quick.
    """
    args = ("--cluster-allow-replica-migration", "no")
    with ClusterGroup(binary, primaries=3, replicas=0, args=args) as group:
        leaving, heir = group.primaries()[:2]
        first, last = group.slots_of(leaving)[100], group.slots_of(leaving)[-1]
        for node in group.nodes:
            node.ask("CLUSTER", "DELSLOTSRANGE", first, last)
        heir.ask("CLUSTER", "ADDSLOTSRANGE", first, last)
        group.wait_until_ok()
        yield group, leaving, heir


def replicate(group: ClusterGroup) -> None:
    """Wait until the replicas have all writes; raises AssertionError if they don't get them."""
    for node in group.primaries():
        with node.client() as client:
            client.set(f"{{{prefix_on(group, node)}}}", "marker")
            assert client.wait(1, 20_000) == 1


@contextlib.asynccontextmanager
async def on_cluster(
    figures: Figures, binary: ServerBinary, **options: Any
) -> AsyncIterator[tuple[ClusterGroup, dscache.AsyncCache]]:
    """Open a cache on a new cluster."""
    group = await asyncio.to_thread(start(binary).__enter__)
    try:
        async with open_cache(group, **options) as cache:
            yield group, cache
            figures.drained(cache)
    finally:
        await asyncio.to_thread(group.close)


# -- records


async def records(
    figures: Figures, binary: ServerBinary, *, count: int = 100_000, reads: int = 1_000_000
) -> None:
    """Write many records, single and in bulk, in both layouts; and read while others write."""
    blocks: list[int] = []
    for layout in ("hashtag", "deepstream"):
        options = {"keyLayout": layout, "commandTimeout": 60_000}
        async with on_cluster(figures, binary, **options) as (group, cache):
            for single in (False, True):
                await keep_records(figures, group, cache, layout, count, single)
                gc.collect()
                blocks.append(sys.getallocatedblocks())
            if layout == "hashtag":
                await tear_none(figures, cache, reads)
    # That many records at once fragment the heap: only the memory in use counts.
    figures.memory = (resident(), resident())
    figures.notes.append(f"blocks in use {' > '.join(map(str, blocks))}")
    if blocks[-1] - blocks[0] > _KEPT_BLOCKS:
        figures.problems.append(f"{blocks[-1] - blocks[0]} blocks of memory are kept")


async def keep_records(
    figures: Figures,
    group: ClusterGroup,
    cache: dscache.AsyncCache,
    layout: str,
    count: int,
    single: bool,
) -> None:
    """Write records with ordinary names; all can be read, and each key is on its node."""
    kind = "single" if single else "bulk"
    names = [f"{kind}/{i}" for i in range(count - len(_ODD))] + [f"{kind}{odd}" for odd in _ODD]
    names[:2] = "}", "{}"
    contents = {name: (i, {"name": name}) for i, name in enumerate(names)}
    if single:
        await _in_turn(names, lambda name: cache.set(name, *contents[name]))
        found = dict(zip(names, await _in_turn(names, cache.get), strict=True))
        heads = dict(zip(names, await _in_turn(names, cache.head), strict=True))
    else:
        if unwritten := await cache.set_bulk(contents):
            figures.problems.append(f"{len(unwritten)} records were not written")
        found = await cache.get_bulk(names)
        heads = await cache.head_bulk(names)
    bad = sum(
        record is None or (record.version, record.data) != contents[name]
        for name, record in found.items()
    )
    if bad or list(found) != names:
        figures.problems.append(f"{layout}, {kind}: {bad} of {len(found)} records came back wrong")
    if heads != {name: version for name, (version, _) in contents.items()}:
        figures.problems.append(f"{layout}, {kind}: heads are wrong")
    figures.operations += 3 * count
    figures.outcomes["ok"] += 3 * count
    stored = 0
    for node in await asyncio.to_thread(group.primaries):
        keys, astray = await asyncio.to_thread(_keys_of, group, node)
        stored += keys
        if astray:
            figures.problems.append(f"{node!r} has {len(astray)} keys of others: {astray[:3]}")
    if stored != 2 * count:
        figures.problems.append(f"{layout}, {kind}: {stored} keys of {count} records")
    if single:
        gone = sum(await _in_turn(names, cache.delete))
    else:
        gone = await cache.delete_bulk(names)
    if gone != count:
        figures.problems.append(f"{layout}, {kind}: {gone} of {count} records were removed")


# Unusual names, and names that begin with a brace.
_ODD = ("{tag}/a", "{}", "}", "}{", "a{b}c", "ä/ö", "x y", "{", "{{x}}")


async def _in_turn(names: list[str], issue: Callable[[str], Any]) -> list[Any]:
    results: list[Any] = []
    for first in range(0, len(names), _AT_ONCE):
        results += await asyncio.gather(*map(issue, names[first : first + _AT_ONCE]))
    return results


def _keys_of(group: ClusterGroup, node: ClusterNode) -> tuple[int, list[str]]:
    """Return how many keys a node has, and those of slots that it doesn't serve."""
    slots = set(group.slots_of(node))
    count, astray = 0, []
    with node.client() as client:
        for key in client.scan_iter(count=10_000):
            count += 1
            if key_slot(key.encode(errors="surrogateescape")) not in slots:
                astray.append(key)
    return count, astray


async def tear_none(figures: Figures, cache: dscache.AsyncCache, reads: int) -> None:
    """Read while writers write: version and data must be of one write."""
    names = [f"torn/{i}" for i in range(10 * _WRITERS)]
    done = 0
    torn: list[str] = []

    def check(record: dscache.Record | None) -> None:
        if record is not None and record.data["version"] != record.version:
            torn.append(repr(record))

    async def write(own: list[str]) -> None:
        version = 0
        while done < reads:
            version += 1
            await cache.set(random.choice(own), version, {"version": version, "text": "x" * 50})
            await cache.set_bulk({name: (version, {"version": version}) for name in own})

    async def read() -> None:
        nonlocal done
        while done < reads:
            some = random.sample(names, 50)
            for record in (await cache.get_bulk(some)).values():
                check(record)
            for record in await asyncio.gather(*map(cache.get, some)):
                check(record)
            done += 2 * len(some)

    async with asyncio.TaskGroup() as tasks:
        for number in range(_WRITERS):
            tasks.create_task(write(names[10 * number : 10 * number + 10]))
        for _ in range(_READERS):
            tasks.create_task(read())
    figures.operations += done
    figures.notes.append(f"{done} reads beside writes, {len(torn)} torn")
    if torn:
        figures.problems.append(f"{len(torn)} reads were of two writes: {torn[0]}")


# -- moving slots


async def reshard(figures: Figures, binary: ServerBinary, *, slots: int = 4000) -> None:
    """Move slots to another primary and back, under mixed load."""
    async with on_cluster(figures, binary, commandTimeout=5000) as (group, cache):
        await move_slots(figures, group, cache, slots)


async def move_slots(
    figures: Figures,
    group: ClusterGroup,
    cache: dscache.AsyncCache,
    count: int,
    *,
    atomically: bool = False,
) -> None:
    """Move that many slots there and back: no error, nothing lost, and nothing out of order."""
    move = group.migrate_atomically if atomically else partial(group.migrate, at_once=32)
    source, target = (await asyncio.to_thread(group.primaries))[:2]
    owned = await asyncio.to_thread(group.slots_of, source)
    load = Load(cache, timeout=5.0, names=150, pause=0.002, prefix="moving")
    used = {slot for name in load.names if (slot := slot_of(name)) in set(owned)}
    # Those that have records first.
    moved = sorted(used)[:count]
    moved += [slot for slot in owned if slot not in used][: count - len(moved)]
    ballast = {f"ballast/{i}": (i, {"number": i}) for i in range(2000)}
    await cache.set_bulk(ballast)
    before = cache.stats()["redirections"]
    async with load:
        await asyncio.sleep(0.1)
        for there, back in ((source, target), (target, source)):
            began = time.monotonic()
            await asyncio.to_thread(move, moved, there, back)
            figures.notes.append(f"{len(moved)} slots in {time.monotonic() - began:.1f} s")
        await asyncio.sleep(0.1)
    await load.verify()
    figures.take(load)
    stats = cache.stats()
    figures.notes.append(f"{stats['redirections'] - before} redirections")
    if failed := figures.outcomes.total() - figures.outcomes["ok"]:
        figures.problems.append(f"{failed} operations failed: {dict(figures.outcomes)}")
    if await cache.head_bulk(ballast) != {name: version for name, (version, _) in ballast.items()}:
        figures.problems.append("records that nobody wrote to are gone")
    if stats["redirections"] == before:
        figures.problems.append("nothing was redirected")


# -- lost primaries


async def kill(figures: Figures, binary: ServerBinary, *, rounds: int = 3) -> None:
    """Kill a primary under load: the other shards don't notice, and its own is back soon."""
    async with on_cluster(figures, binary) as (group, cache):
        for number in range(rounds):
            await kill_primary(figures, group, cache, number)
            await asyncio.to_thread(group.wait_until_ok)


async def kill_primary(
    figures: Figures, group: ClusterGroup, cache: dscache.AsyncCache, number: int = 0
) -> None:
    """Kill one primary, and start it again once its replica has been promoted."""
    shard = number % 3
    primaries = await asyncio.to_thread(group.primaries)
    victim = await asyncio.to_thread(group.primary_of, shard * (SLOTS // 3))
    await _may_vote(group, shard)
    heir = await asyncio.to_thread(group.replica_of, victim)
    own = await asyncio.to_thread(prefix_on, group, victim)
    prefixes = [
        await asyncio.to_thread(prefix_on, group, node) for node in primaries if node is not victim
    ]
    lost = Load(cache, timeout=1.0, names=8, readers=4, guarded_only=True, prefix=f"{own}{number}")
    others = [
        Load(cache, timeout=1.0, names=8, readers=4, prefix=f"{prefix}{number}")
        for prefix in prefixes
    ]
    async with contextlib.AsyncExitStack() as stack:
        for load in (lost, *others):
            await stack.enter_async_context(load)
        usual = await _rates(others, 0.5)
        began = time.monotonic()
        await asyncio.to_thread(group.kill, victim)
        promoted = asyncio.create_task(asyncio.to_thread(_wait_for_role, heir))
        rates = await _rates(others, 1.0)
        await promoted
        at_promotion = _votes[group][shard] = time.monotonic()
        last = lost.last_success
        await until(lambda: lost.last_success > last, "the shard of the killed primary")
        figures.recovered(time.monotonic() - at_promotion)
        figures.notes.append(
            f"promoted after {at_promotion - began:.2f} s, served after "
            f"{time.monotonic() - began:.2f} s"
        )
        after = Load(cache, timeout=1.0, names=8, readers=4, prefix=f"{own}after{number}")
        async with after:
            await until(lambda: after.acknowledged > 20, "writes to the promoted replica")
            await asyncio.to_thread(group.start, victim)
    for load in (*others, after):
        await load.verify()
        figures.take(load)
        if failed := load.outcomes.total() - load.outcomes["ok"]:
            # A busy machine delays a few beyond their second, since the promotion and the start of
            # a server take its processors; a held-up shard fails most. Load alone neither ends a
            # connection nor makes a server refuse, so any other failure is a problem.
            is_late_only = failed == load.outcomes["DeadlineExceeded"]
            few = is_late_only and failed < 0.05 * load.outcomes.total()
            found = figures.slow if few else figures.problems
            found.append(f"{failed} failed on other shards: {dict(load.outcomes)}")
    # Its last acknowledged writes are lost with it, but no caller gets another's record.
    figures.problems += [wrong for wrong in lost.wrong if "another's" in wrong]
    for before, during in zip(usual, rates, strict=True):
        if during < KEPT_RATE * before:
            figures.slow.append(f"another shard fell from {before:.0f} to {during:.0f}/s")


async def _rates(loads: list[Load], seconds: float) -> list[float]:
    before, began = [load.outcomes["ok"] for load in loads], time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    return [(load.outcomes["ok"] - count) / took for load, count in zip(loads, before, strict=True)]


def _wait_for_role(node: ClusterNode) -> None:
    end = time.monotonic() + PATIENCE
    while node.role() != "primary":
        if time.monotonic() > end:
            raise AssertionError(f"{node!r} was not promoted within {PATIENCE:g} s")
        time.sleep(0.02)


# When the other primaries were last asked to vote on a shard of a cluster.
_votes: WeakKeyDictionary[ClusterGroup, dict[int, float]] = WeakKeyDictionary()


async def _may_vote(group: ClusterGroup, shard: int) -> None:
    """Wait until the other primaries vote again on a shard, which they do only now and then.

    An orderly failover without their votes keeps the shard's writes waiting for five seconds.
    """
    votes = _votes.setdefault(group, {})
    while time.monotonic() < votes.get(shard, 0.0) + 2.5 * NODE_TIMEOUT_MS / 1000:
        await asyncio.sleep(0.01)
    votes[shard] = time.monotonic()


async def failover(
    figures: Figures, binary: ServerBinary, *, rounds: int = 3, patience: float = 1.0
) -> None:
    """Replace a primary by its replica, in each of the three ways, under load."""
    async with on_cluster(figures, binary, commandTimeout=round(patience * 1000)) as (group, cache):
        for number in range(rounds):
            for shard, kind in enumerate(KINDS):
                await fail_over(figures, group, cache, kind, number + shard, patience)


async def fail_over(
    figures: Figures,
    group: ClusterGroup,
    cache: dscache.AsyncCache,
    kind: Failover,
    number: int,
    patience: float,
) -> None:
    """Replace one primary: no call gets an error, and an orderly failover loses nothing."""
    shard = number % 3
    primary = await asyncio.to_thread(group.primary_of, shard * (SLOTS // 3))
    replica = await asyncio.to_thread(group.replica_of, primary)
    await _may_vote(group, shard)
    before = Load(cache, timeout=patience, names=48, prefix=f"before{kind}{number}")
    after = Load(cache, timeout=patience, names=48, prefix=f"after{kind}{number}")
    async with before:
        await asyncio.sleep(0.2)
        began = time.monotonic()
        await asyncio.to_thread(group.failover, replica, kind)
        figures.notes.append(f"{kind or 'orderly'} {time.monotonic() - began:.2f} s")
        async with after:
            await asyncio.sleep(0.2)
    for load in (before, after):
        if load is after or not kind:
            await load.verify()
            figures.problems += load.wrong
        else:
            figures.problems += [wrong for wrong in load.wrong if "another's" in wrong]
        load.wrong.clear()
        figures.take(load)
        if failed := load.outcomes.total() - load.outcomes["ok"]:
            figures.problems.append(f"{kind or 'orderly'}: {failed} failed: {dict(load.outcomes)}")
