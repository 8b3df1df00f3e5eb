"""Routing to the right node of a cluster, with nodes whose replies a test chooses."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

import dscache
from dscache.aio import cluster
from dscache.core import constants, scripts
from dscache.core import stats as counters
from dscache.core.keys import slot_of_key
from dscache.embedded import EmbeddedServer
from dscache.net import refresh_schedule
from dscache.net.slots import parse_epoch, parse_redirection, parse_slots, read_view
from tests.conftest import NamedServer
from tests.soak.figures import open_files
from tests.support.faults import FakeServer, FaultProxy
from tests.support.waiting import PATIENCE, assert_drained, own_tasks, until
from tests.support.wire import ModelRecords, ModelServer, Operation, Refusal, plain, resp

# Timeouts for operations that must not end by a deadline.
PATIENT = {"connectTimeout": 600_000, "commandTimeout": 600_000, "closeTimeout": 600_000}
SECRET = "the-password"


# -- fake nodes


class FakeNode(FakeServer):
    """A node of a FakeCluster: it serves, redirects and refuses as Redis does.

    ``id`` is its id if it isn't made of its port, and ``told_id`` its reply to CLUSTER MYID if that
    is another one.

    ``knows`` is its view of the slots' owners, and ``values`` its data. ``say`` may answer a
    command with keys instead: it gets the command and the slot, and returns a reply, or None to let
    the node answer.
    """

    def __init__(self, fakes: FakeCluster) -> None:
        super().__init__(
            {
                "*": self._serve_keys,
                "ASKING": self._ask,
                "CLUSTER": self._tell,
                "COMMAND": b"*1\r\n_\r\n",
                "READONLY": b"+OK\r\n",
                "SCRIPT": resp(scripts.SET_SCRIPT_SHA),
            }
        )
        self.fakes = fakes
        self.model = ModelServer()
        self.knows: list[FakeNode | None] = [None] * constants.SLOTS
        self.replicas: list[FakeNode] = []
        self.primary: FakeNode | None = None
        self.migrating: dict[int, FakeNode] = {}
        self.importing: set[int] = set()
        self.epoch = 1
        self.id = b""
        self.told_id: bytes | Refusal = b""
        self.announced: tuple[bytes | None, int] | None = None
        self.say: Callable[[list[bytes], int], Any] | None = None
        self.views = 0
        self._asking = False

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def values(self) -> dict[bytes, bytes | None]:
        return self.model.values

    @property
    def moved(self) -> list[list[bytes]]:
        """The commands with keys that it received."""
        own = {b"MGET", b"MSET", b"GET", b"TYPE", b"EXISTS", b"DEL", b"SET", b"EVALSHA", b"EVAL"}
        return [command for command in self.commands if command[0] in own]

    def slots(self) -> list[Any]:
        """Return its reply to CLUSTER SLOTS."""
        answer, first = [], 0
        for owner, group in itertools.groupby(self.knows):
            count = len(list(group))
            if owner is not None:
                nodes = [one.entry() for one in (owner, *owner.replicas)]
                answer.append([first, first + count - 1, *nodes])
            first += count
        return answer

    def entry(self) -> list[Any]:
        host, port = self.announced or (self.host.encode(), self.port)
        return [host, port, self.id or b"%040x" % self.port, []]

    def _ask(self, _command: list[bytes]) -> bytes:
        self._asking = True
        return b"+OK\r\n"

    def _tell(self, command: list[bytes]) -> bytes:
        if command[1] == b"SLOTS":
            self.views += 1
            return resp(self.slots())
        if command[1] == b"MYID":
            return resp(self.told_id or self.entry()[2])
        return resp(b"cluster_state:ok\r\ncluster_current_epoch:%d\r\n" % self.epoch)

    def _serve_keys(self, command: list[bytes]) -> bytes | None:
        asking, self._asking = self._asking, False
        keys = keys_in(command)
        if not keys:
            return b"-ERR unknown command\r\n"
        slot = slot_of_key(keys[0])
        assert all(slot_of_key(key) == slot for key in keys), f"CROSSSLOT {command}"
        self.fakes.step()
        if self.say is not None and (said := self.say(command, slot)) is not None:
            return said if isinstance(said, bytes) else resp(said)
        return resp(self._redirection(command, keys, slot, asking) or self.execute(command))

    def _redirection(
        self, command: list[bytes], keys: list[bytes], slot: int, asking: bool
    ) -> Refusal | None:
        owner = self.knows[slot]
        missing = [key for key in keys if key not in self.values]
        if owner is self:
            if slot not in self.migrating or not missing:
                return None
            if len(missing) < len(keys):
                return Refusal("TRYAGAIN Multiple keys request during rehashing of slot")
            return Refusal(f"ASK {slot} {self.migrating[slot].address}")
        if asking and slot in self.importing:
            if len(keys) > 1 and missing:
                return Refusal("TRYAGAIN Multiple keys request during rehashing of slot")
            return None
        if owner is None:
            return Refusal("CLUSTERDOWN Hash slot not served")
        if owner is self.primary and command[0] in (b"MGET", b"GET", b"TYPE"):
            return None
        return Refusal(f"MOVED {slot} {owner.address}")

    def execute(self, command: list[bytes]) -> Any:
        if command[0] == b"EXISTS":
            return sum(key in self.values for key in command[1:])
        if command[0] == b"SET":
            self.values[command[1]] = command[2]
            return "OK"
        return self.model.execute(command)


class FakeCluster:
    """Nodes among which the slots are divided evenly, and which agree about it at first.

    ``step`` is called before each command with keys, and may change anything.
    """

    def __init__(self, primaries: int = 2, replicas: int = 0) -> None:
        self.nodes = [FakeNode(self) for _ in range(primaries)]
        self.replicas = [FakeNode(self) for _ in range(replicas)]
        self.step: Callable[[], object] = lambda: None
        self._stack = AsyncExitStack()
        for number, replica in enumerate(self.replicas):
            replica.primary = self.nodes[number % primaries]
            replica.primary.replicas.append(replica)
            replica.model = replica.primary.model
        for node in (*self.nodes, *self.replicas):
            node.knows = [self.nodes[slot * primaries // 16384] for slot in range(constants.SLOTS)]

    async def __aenter__(self) -> FakeCluster:
        for node in (*self.nodes, *self.replicas):
            await self._stack.enter_async_context(node)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def give(self, slot: int, target: FakeNode, *, known_to: Iterable[FakeNode] = ()) -> None:
        """Move a slot with its keys to another node; by default all nodes learn it."""
        for node in self.nodes:
            for key in [key for key in node.values if slot_of_key(key) == slot]:
                target.values[key] = node.values.pop(key)
        for node in known_to or (*self.nodes, *self.replicas):
            node.knows[slot] = target


def keys_in(command: list[bytes]) -> list[bytes]:
    match command[0]:
        case b"MSET":
            return command[1::2]
        case b"EVAL" | b"EVALSHA":
            return command[3 : 3 + int(command[2])]
        case b"MGET" | b"DEL" | b"EXISTS":
            return command[1:]
        case b"GET" | b"TYPE" | b"SET":
            return command[1:2]
    return []


def names_in(node: FakeNode, *verbs: bytes) -> list[str]:
    """Return the name of each record requested from a node, in the layout hashtag."""
    return [
        key.decode()[1:-3]
        for command in node.moved
        if command[0] in verbs
        for key in keys_in(command)
        if key.endswith(b"_v")
    ]


def slot_of(name: str) -> int:
    return slot_of_key(name.encode())


def names_of(node: FakeNode, count: int) -> list[str]:
    """Return names whose slots a node serves, each in a different slot."""
    slots: dict[int, str] = {}
    for number in itertools.count():
        name = f"user/{number}"
        if node.knows[slot_of(name)] is node:
            slots.setdefault(slot_of(name), name)
        if len(slots) == count:
            return list(slots.values())
    raise AssertionError


def cache_on(
    *seeds: FakeServer | FaultProxy | FakeCluster | dict[str, Any], **options: Any
) -> dscache.AsyncCache:
    """Return a cache with these configured nodes."""
    nodes: list[dict[str, Any]] = []
    for seed in seeds:
        if isinstance(seed, dict):
            nodes.append(seed)
            continue
        several = seed.nodes if isinstance(seed, FakeCluster) else [seed]
        nodes += [{"host": one.host, "port": one.port} for one in several]
    return dscache.AsyncCache.from_config({"name": "redis", "options": {"nodes": nodes, **options}})


@asynccontextmanager
async def opened(
    *seeds: FakeServer | FaultProxy | FakeCluster | dict[str, Any], **options: Any
) -> AsyncIterator[dscache.AsyncCache]:
    """Open a cache; whatever a test does, it ends and leaves nothing behind."""
    async with asyncio.timeout(PATIENCE):
        async with cache_on(*seeds, **options) as cache:
            yield cache
        assert_drained(cache)
        assert own_tasks() == []


def nodes_of(cache: dscache.AsyncCache) -> set[str]:
    return set(cache.stats()["nodes"])


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses between slot refreshes and between retries."""
    monkeypatch.setattr(refresh_schedule, "GAP", 0.002)
    monkeypatch.setattr(refresh_schedule, "GAP_CAP", 0.02)
    monkeypatch.setattr(cluster, "RETRY_CAP", 0.01)


OPERATIONS = {
    "get": Operation("get", "a"),
    "head": Operation("head", "a"),
    "set": Operation("set", "a", (1, {"b": 2})),
    "set with ttl": Operation("set", "a", (1, {"b": 2}), {"ttl": 60}),
    "set if newer": Operation("set", "a", (1, {"b": 2}), {"if_newer": True}),
    "delete": Operation("delete", "a"),
    "get_bulk": Operation("get_bulk", ["a"]),
    "head_bulk": Operation("head_bulk", ["a"]),
    "set_bulk": Operation("set_bulk", {"a": (1, {"b": 2})}),
    "delete_bulk": Operation("delete_bulk", ["a"]),
}
of_each_kind = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=list(OPERATIONS))


# -- redirections


@of_each_kind
async def test_circular_redirections_end(
    operation: Operation, backend: str, short_pauses: None
) -> None:
    """Two nodes that redirect everything to each other: the error names the path."""
    async with FakeCluster() as fakes:
        first, second = fakes.nodes
        first.say = lambda command, slot: Refusal(f"MOVED {slot} {second.address}")
        second.say = lambda command, slot: Refusal(f"MOVED {slot} {first.address}")
        async with opened(fakes, maxRedirections=5, commandTimeout=60_000) as cache:
            with pytest.raises(dscache.ReplyError) as error:
                await operation.on(cache)
            assert error.value.code == "MOVED"
            said = str(error.value)
            assert "redirected 6 times, and maxRedirections is 5" in said
            assert repr("a") in said
            path = [part.partition(": ")[0] for part in said.split(": ", 1)[1].split("; ")]
            assert first.address in said
            assert second.address in said
            assert len(path) == 6
            assert cache.stats()["redirections"] == 5
            both = [command for node in fakes.nodes for command in node.moved]
            assert len(both) == 6 * (2 if operation.method.startswith("head") else 1)


async def test_no_redirection_is_allowed(backend: str) -> None:
    async with FakeCluster() as fakes:
        fakes.give(slot_of("a"), fakes.nodes[0])
        async with opened(fakes, maxRedirections=0, slotsRefreshInterval=0) as cache:
            fakes.give(slot_of("a"), fakes.nodes[1])
            with pytest.raises(dscache.ReplyError, match="maxRedirections is 0"):
                await cache.get("a")


@of_each_kind
async def test_moved_to_an_unreachable_node(
    operation: Operation, backend: str, short_pauses: None
) -> None:
    """The nodes know better at the next refresh, and until then redirect in circles."""
    async with FakeCluster() as fakes, FaultProxy("127.0.0.1", 1) as nowhere:
        await nowhere.refuse()
        there = f"{nowhere.host}:{nowhere.port}"
        for node in fakes.nodes:
            node.say = lambda command, slot: Refusal(f"MOVED {slot} {there}")
        async with opened(fakes, maxRedirections=3, commandTimeout=60_000) as cache:
            with pytest.raises(dscache.ReplyError) as error:
                await operation.on(cache)
            assert str(error.value).count(there) >= 4
            assert "maxRedirections is 3" in str(error.value)


async def test_moved_to_an_unreachable_node_until_the_deadline(backend: str) -> None:
    """The error of an operation that expires names its redirections."""
    async with FakeCluster() as fakes, FaultProxy("127.0.0.1", 1) as nowhere:
        await nowhere.refuse()
        there = f"{nowhere.host}:{nowhere.port}"
        for node in fakes.nodes:
            node.say = lambda command, slot: Refusal(f"MOVED {slot} {there}")
        async with opened(fakes, commandTimeout=200, maxRedirections=1000) as cache:
            with pytest.raises(dscache.DscacheError, match="200 ms") as error:
                await cache.get("a")
            assert f"MOVED {slot_of('a')} {there}" in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        "MOVED",
        "MOVED {slot}",
        "MOVED x y",
        "MOVED {slot} nowhere",
        "MOVED {slot} nowhere:",
        "MOVED {slot} :0",
        "MOVED {slot} nowhere:65536",
        "MOVED {slot} nowhere:-1",
        "MOVED {slot} {there} more",
        "MOVED {other} {there}",
        "MOVED 16384 {there}",
        "ASK {slot}",
        "ASK {slot} nowhere:x",
        "ASK {other} {there}",
    ],
)
async def test_malformed_redirections(words: str, backend: str, short_pauses: None) -> None:
    async with FakeCluster() as fakes:
        first, second = fakes.nodes
        (name,) = names_of(first, 1)
        slot = slot_of(name)
        said = words.format(slot=slot, other=slot - 1, there=second.address)
        first.say = lambda command, slot: Refusal(said)
        async with opened(fakes, maxRedirections=3, commandTimeout=60_000) as cache:
            with pytest.raises(dscache.ReplyError) as error:
                await cache.get(name)
            assert str(error.value).count(f"{first.address}: {said}") == 4
            assert not second.moved
            # Then it works.
            first.say = None
            assert await cache.set(name, 1, 1) is True


def bulk_of_500(fakes: FakeCluster) -> tuple[list[str], list[str]]:
    """Return 500 names, and five of them, each in a different slot of the first node."""
    some = names_of(fakes.nodes[0], 5)
    slots = set(map(slot_of, some))
    others = (f"other/{number}" for number in itertools.count())
    names = [*itertools.islice((one for one in others if slot_of(one) not in slots), 495), *some]
    random.shuffle(names)
    return names, some


@pytest.mark.parametrize("single", [False, True], ids=["bulk", "single"])
async def test_moved_in_a_batch_of_500(single: bool, backend: str) -> None:
    """Only redirected operations are retried."""
    async with FakeCluster(3) as fakes, opened(fakes) as cache:
        names, moved = bulk_of_500(fakes)
        first, second, _ = fakes.nodes
        await cache.set_bulk({name: (n, [name]) for n, name in enumerate(names)})
        for kind in ("get", "set"):
            for name in moved:
                target = second if kind == "get" else first
                fakes.give(slot_of(name), target)
            before = cache.stats()
            for node in fakes.nodes:
                node.commands.clear()
            if kind == "get":
                if single:
                    records = await asyncio.gather(*map(cache.get, names))
                    found = {record.name: record for record in records if record is not None}
                else:
                    found = await cache.get_bulk(names)
                assert {name: tuple(record) for name, record in found.items()} == {
                    name: (n, [name]) for n, name in enumerate(names)
                }
            else:
                records = {name: (n, [name, 2]) for n, name in enumerate(names, 1000)}
                if single:
                    await asyncio.gather(
                        *(cache.set(name, *each) for name, each in records.items())
                    )
                else:
                    assert await cache.set_bulk(records) == set()
            verb = b"MGET" if kind == "get" else b"MSET"
            asked = Counter(name for node in fakes.nodes for name in names_in(node, verb))
            assert asked == Counter(names) + Counter(moved)
            assert set(names_in(second if kind == "get" else first, verb)) >= set(moved)
            assert cache.stats()["redirections"] == before["redirections"] + len(moved)


@pytest.mark.parametrize("single", [False, True], ids=["bulk", "single"])
async def test_ask_in_a_batch_of_500(single: bool, backend: str) -> None:
    async with FakeCluster(3) as fakes, opened(fakes) as cache:
        names, asked_for = bulk_of_500(fakes)
        first, second, _ = fakes.nodes
        await cache.set_bulk({name: (n, [name]) for n, name in enumerate(names)})
        for name in asked_for:
            slot = slot_of(name)
            first.migrating[slot] = second
            second.importing.add(slot)
            for key in [key for key in first.values if slot_of_key(key) == slot]:
                second.values[key] = first.values.pop(key)
        for node in fakes.nodes:
            node.commands.clear()
        refreshes = cache.stats()["refreshes"]
        if single:
            records = await asyncio.gather(*map(cache.get, names))
            found = {record.name: record for record in records if record is not None}
        else:
            found = await cache.get_bulk(names)
        assert list(found) == names
        asked = Counter(name for node in fakes.nodes for name in names_in(node, b"MGET"))
        assert asked == Counter(names) + Counter(asked_for)
        # Each with its own ASKING, and the next operation goes to the former node.
        assert second.commands.count([b"ASKING"]) == len(asked_for)
        for number, command in enumerate(second.commands):
            if command == [b"ASKING"]:
                assert second.commands[number + 1][0] == b"MGET"
        assert await cache.get(asked_for[0]) is not None
        assert names_in(first, b"MGET").count(asked_for[0]) == 2
        # ASK does not change the owner of the slot.
        assert cache.stats()["refreshes"] == refreshes


@pytest.mark.parametrize(
    "words",
    [
        "TRYAGAIN Multiple keys request during rehashing of slot",
        "CLUSTERDOWN The cluster is down",
        "CLUSTERDOWN Hash slot not served",
        "READONLY You can't write against a read only replica.",
        "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        "LOADING Redis is loading the dataset in memory",
    ],
    ids=lambda words: words.partition(" ")[0],
)
async def test_temporary_refusals_are_retried(words: str, backend: str, short_pauses: None) -> None:
    async with FakeCluster() as fakes, opened(fakes, commandTimeout=60_000) as cache:
        for name, operation in OPERATIONS.items():
            refusals = itertools.count()
            for node in fakes.nodes:
                node.values.clear()
                # A head takes two commands, and both are refused.
                node.say = lambda command, slot, refusals=refusals: (
                    Refusal(words) if next(refusals) < 6 else None
                )
            before = cache.stats()
            assert plain(await operation.on(cache)) == plain(operation.on(ModelRecords())), name
            stats = cache.stats()
            times = 3 if "head" in operation.method else 6
            assert stats["redirections"] == before["redirections"] + times, name
            if "TRYAGAIN" not in words:
                await until(lambda n=before["refreshes"]: cache.stats()["refreshes"] > n)


@pytest.mark.parametrize(
    "words", ["BUSY no", "LOADING no", "CLUSTERDOWN no", "TRYAGAIN no", "READONLY no"]
)
async def test_what_passes_is_no_redirection(words: str, backend: str, short_pauses: None) -> None:
    """A node that refuses for long uses up no maxRedirections, and a redirection still counts."""
    async with FakeCluster() as fakes:
        first, second = fakes.nodes
        refusals = itertools.count()
        for node in fakes.nodes:
            node.say = lambda command, slot: Refusal(words) if next(refusals) < 40 else None
        async with opened(fakes, maxRedirections=2, commandTimeout=60_000) as cache:
            assert await cache.set("a", 1, 1) is True
            assert cache.stats()["redirections"] == 40
            circle = itertools.count()

            def say(command: list[bytes], slot: int) -> Refusal:
                there = random.choice((first.address, second.address))
                return Refusal(words if next(circle) % 2 else f"MOVED {slot} {there}")

            first.say = second.say = say
            with pytest.raises(dscache.ReplyError, match="redirected 3 times") as error:
                await cache.set("a", 2, 2)
            assert error.value.code == "MOVED"


async def test_operations_wait_side_by_side_in_many_slots(backend: str) -> None:
    """Operations that wait in many slots, each for its own time, cost no more than that."""
    async with FakeCluster() as fakes:
        served = False
        for node in fakes.nodes:
            node.say = lambda command, slot: None if served else Refusal("CLUSTERDOWN down")
        async with opened(fakes, commandTimeout=60_000, maxRedirections=1000) as cache:
            loop = asyncio.get_running_loop()
            timers = 0
            call_later = loop.call_later

            def count(*arguments: Any, **others: Any) -> asyncio.TimerHandle:
                nonlocal timers
                timers += 1
                return call_later(*arguments, **others)

            loop.call_later = count  # type: ignore[method-assign]
            try:
                waiters = []
                for number in range(100):
                    waiters.append(cache.set(f"user/{number}", 1, number))
                    await asyncio.sleep(0.005)
                served = True
                assert await asyncio.gather(*waiters) == [True] * 100
            finally:
                del loop.call_later  # type: ignore[method-assign]
            assert timers < 50 * cache.stats()["redirections"]


async def test_the_deadline_covers_redirections(backend: str) -> None:
    async with FakeCluster() as fakes:
        for node in fakes.nodes:
            node.say = lambda command, slot: Refusal("TRYAGAIN later")
        async with opened(fakes, commandTimeout=300, maxRedirections=1000) as cache:
            with pytest.raises(dscache.DscacheError, match="300 ms"):
                await cache.get("a")
            with pytest.raises(dscache.BulkError) as error:
                await cache.set_bulk({"a": (1, 1), "b": (1, 1)})
            assert set(error.value.errors) == {"a", "b"}


async def test_a_bulk_loses_one_node(backend: str) -> None:
    """The other nodes' records are in the result, and their node never noticed."""
    async with FakeCluster(3) as fakes:
        first, second, third = fakes.nodes
        async with opened(fakes, commandTimeout=300) as cache:
            names = [name for node in fakes.nodes for name in names_of(node, 20)]
            await cache.set_bulk({name: (1, name) for name in names})
            second.answers["*"] = b""
            with pytest.raises(dscache.BulkError) as error:
                await cache.get_bulk(names)
            lost = names_of(second, 20)
            assert set(error.value.errors) == set(lost)
            assert set(error.value.result) == set(names) - set(lost)
            assert all(second.address in str(one) for one in error.value.errors.values())
            assert cache.stats()["nodes"][first.address]["connects"] == 1
            assert cache.stats()["nodes"][third.address]["connects"] == 1


# -- order


@pytest.mark.parametrize("layout", ["hashtag", "deepstream"])
async def test_operations_keep_their_order(layout: str, backend: str, short_pauses: None) -> None:
    """Whatever moves meanwhile, operations on one name take effect in the order of their calls.

    The seed repeats the operations and the moves, but not their timing.
    """
    rounds = 20
    seed = int(os.environ.get("DSCACHE_TEST_SEED") or random.SystemRandom().getrandbits(32))
    print(f"to repeat: DSCACHE_TEST_SEED={seed}")
    chance = random.Random(seed)
    async with FakeCluster(3) as fakes:
        tag = "{%s}" if layout == "deepstream" else "%s"
        names = [tag % f"n/{number}" for number in range(6)]
        chaos = Chaos(fakes, sorted({slot_of(name.strip("{}")) for name in names}), chance)
        options = {"maxRedirections": 1000, "commandTimeout": 60_000, "keyLayout": layout}
        async with opened(fakes, **options) as cache:
            fakes.step = chaos.step
            # While all wait for a change, one happens.
            going_on = asyncio.create_task(chaos.go_on())
            model = ModelRecords()
            versions = itertools.count(1)
            for number in range(rounds):
                chaos.new_round(cache)
                issued: list[tuple[Operation, Any, Any]] = []
                for _ in range(chance.randrange(1, 12)):
                    for _ in range(chance.randrange(1, 6)):
                        operation = some_operation(names, versions, chance)
                        expected = plain(operation.on(model))
                        issued.append((operation, operation.on(cache), expected))
                    for _ in range(chance.choice((0, 1, 1, 3))):
                        await asyncio.sleep(0)
                    if chance.random() < 0.2:
                        await asyncio.sleep(chance.uniform(0, 0.01))
                for operation, waiter, expected in issued:
                    where = f"{operation} in round {number} of seed {seed}"
                    assert plain(await waiter) == expected, where
            assert plain(await cache.get_bulk(names)) == model.get_bulk(names), f"seed {seed}"
            going_on.cancel()
            assert cache.stats()["redirections"] > rounds
            assert chaos.moves > 5


async def test_no_operation_is_sent_to_a_former_owner(backend: str) -> None:
    """Two nodes exchange slots in one view, while each has operations that wait to be sent.

    A node that is given the other's operations must not send its own former ones with them: the new
    owner would execute later operations first.
    """
    async with FakeCluster(2) as fakes, opened(fakes) as cache:
        cluster = cache._topology
        nodes = fakes.nodes
        names = [names_of(node, 1)[0] for node in nodes]
        await until(lambda: not cluster.state._claim)  # no refresh brings another view meanwhile
        # Both ways round, as the nodes are handled in no particular order.
        for turn, targets in enumerate((nodes[::-1], nodes)):
            for name, target in zip(names, targets, strict=True):
                fakes.give(slot_of(name), target)
            first = [cache.set(name, 2 * turn + 1, "first") for name in names]
            view = read_view(nodes[0].slots(), b"", ("127.0.0.1", nodes[0].port), "")
            flushes = cache.stats()["flushes"]
            cluster.state.apply(view, cluster.state.table, 0)
            cluster.on_refreshed()
            assert cache.stats()["flushes"] == flushes
            second = [cache.set(name, 2 * turn + 2, "second") for name in names]
            assert await asyncio.gather(*first, *second) == [True] * 4
            assert await cache.head_bulk(names) == dict.fromkeys(names, 2 * turn + 2)
        assert cache.stats()["redirections"] == 0


@pytest.mark.parametrize("state", ["sent", "queued"])
async def test_writes_at_the_primary_of_a_replica_that_redirects(state: str, backend: str) -> None:
    """The replica knows the new owner while a write is still on its way to the former one."""
    async with FakeCluster(2, 2) as fakes, asyncio.timeout(PATIENCE):
        former, heir = fakes.nodes
        async with FaultProxy(former.host, former.port) as way:
            former.announced = way.host.encode(), way.port
            options = {"scaleReads": "slave", "slotsRefreshInterval": 0, **PATIENT}
            async with opened(heir, *fakes.replicas, **options) as cache:
                routing = cache._topology._routing
                await until(lambda: sum(map(len, routing.readers.values())) == 2)
                (name,), (other,) = (names_of(node, 1) for node in fakes.nodes)
                assert await cache.set(name, 1, "before") is True
                if state == "sent":
                    way.stall("requests")
                else:
                    await way.refuse()
                    way.cut()
                    await until(lambda: not cache.is_ready)
                earlier = cache.set(name, 2, "earlier")
                await until(lambda: (cache.stats()["queued"] == 0) == (state == "sent"))
                fakes.give(slot_of(name), heir)
                read = cache.get(name)
                await until(lambda: cache.stats()["redirections"] >= 1)
                later = cache.set(name, 3, "later")
                # By the time of its result, the heir would have the later write as well.
                assert await cache.set(other, 1, "other") is True
                way.resume()
                await way.listen()
                assert await asyncio.gather(earlier, later) == [True, True]
                assert (await read) is not None
                assert heir.values[f"{{{name}}}_v".encode()] == b"3"


def some_operation(
    names: list[str], versions: itertools.count[int], chance: random.Random
) -> Operation:
    name = chance.choice(names)
    kind = chance.choice(("get", "get", "head", "set", "set", "guarded", "ttl", "delete", "bulk"))
    if kind == "bulk":
        some = chance.sample(names, chance.randrange(1, len(names)))
        method = chance.choice(("get_bulk", "head_bulk", "set_bulk", "delete_bulk"))
        if method == "set_bulk":
            return Operation(method, {each: (next(versions), "bulk") for each in some})
        return Operation(method, some)
    if kind in ("get", "head", "delete"):
        return Operation(kind, name)
    options = {"set": {}, "guarded": {"if_newer": True}, "ttl": {"ttl": 60}}[kind]
    version = next(versions) if kind != "guarded" else chance.randrange(next(versions))
    return Operation("set", name, (version, kind), options)


class Chaos:
    """Slots that move between nodes, key by key, as when a cluster is resharded."""

    def __init__(self, fakes: FakeCluster, slots: list[int], chance: random.Random) -> None:
        self.moves = 0
        self._fakes = fakes
        self._slots = slots
        self._chance = chance
        self._visited: dict[int, set[str]] = {slot: set() for slot in slots}

    def new_round(self, cache: dscache.AsyncCache) -> None:
        """Nothing is in flight: slots may return to nodes where they have been.

        A node that redirects operations, and gets their slot back before it has answered everything
        it was sent, executes operations issued after them. A client can't know that.

        A refresh in flight may bring a view of an earlier round. Then the cache sends operations to
        an owner of that round, so the slots don't return to it either.
        """
        is_asking = bool(cache._topology.state._claim)
        for slot in self._slots:
            believed = cache._topology._masters[slot].address
            owner = next(node for node in self._fakes.nodes if node.knows[slot] is node)
            target = owner.migrating.get(slot, owner)
            if not is_asking:
                self._visited[slot].clear()
            self._visited[slot] |= {believed, owner.address, target.address}

    async def go_on(self) -> None:
        """Let things happen at a steady pace, so that a busy machine doesn't wait longer for it."""
        loop = asyncio.get_running_loop()
        before = loop.time()
        while True:
            await asyncio.sleep(0.001)
            before, passed = loop.time(), loop.time() - before
            for _ in range(min(int(passed * 5000) + 1, 50)):
                self.step()

    def step(self) -> None:
        """Let something happen, or nothing."""
        if self._chance.random() < 0.3:
            slot = self._chance.choice(self._slots)
            owner = next(node for node in self._fakes.nodes if node.knows[slot] is node)
            target = owner.migrating.get(slot)
            if target is None:
                self._begin(slot, owner)
                return
            keys = [key for key in owner.values if slot_of_key(key) == slot]
            if keys:
                key = self._chance.choice(keys)
                target.values[key] = owner.values.pop(key)
            elif self._chance.random() < 0.2:
                self._end(slot, owner, target)

    def _begin(self, slot: int, owner: FakeNode) -> None:
        visited = self._visited[slot]
        targets = [node for node in self._fakes.nodes if node.address not in visited]
        if not targets:
            return
        target = self._chance.choice(targets)
        visited.add(target.address)
        owner.migrating[slot] = target
        target.importing.add(slot)

    def _end(self, slot: int, owner: FakeNode, target: FakeNode) -> None:
        del owner.migrating[slot]
        target.importing.discard(slot)
        for node in self._fakes.nodes:
            node.knows[slot] = target
        target.epoch = max(node.epoch for node in self._fakes.nodes) + 1
        self.moves += 1


# -- slot refreshes: which node is asked, and which is believed


async def test_a_plain_server_is_no_cluster(backend: str) -> None:
    said = b"-ERR This instance has cluster support disabled\r\n"
    async with FakeServer({"CLUSTER": said}) as server, asyncio.timeout(PATIENCE):
        cache = cache_on(server)
        with pytest.raises(dscache.ConfigError, match="give host and port instead of nodes") as one:
            await cache.when_ready()
        assert ": nodes: " in str(one.value)
        assert str(server.port) in str(one.value)
        with pytest.raises(dscache.DscacheError, match="cluster support disabled"):
            await cache.get("a")
        await cache.close()
        with pytest.raises(dscache.ConfigError, match="instead of nodes"):
            async with cache_on(server):
                pytest.fail("it was entered")
        assert own_tasks() == []


async def test_a_real_plain_server_is_no_cluster(
    server: EmbeddedServer | NamedServer, backend: str
) -> None:
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(dscache.ConfigError, match="give host and port instead of nodes"):
            async with cache_on({"host": server.host, "port": server.port}):
                pytest.fail("it was entered")


async def test_no_node_can_be_reached(backend: str) -> None:
    async with (
        asyncio.timeout(PATIENCE),
        FaultProxy("127.0.0.1", 1) as refusing,
        FaultProxy("127.0.0.1", 1) as silent,
    ):
        await refusing.refuse()
        silent.deaf()
        cache = cache_on(refusing, silent, connectTimeout=300, commandTimeout=300)
        with pytest.raises(dscache.ConnectError, match="within 300 ms") as error:
            await cache.when_ready()
        for way in (refusing, silent):
            assert str(way.port) in str(error.value)
        with pytest.raises(dscache.ConnectError, match="300 ms"):
            await cache.get("a")
        assert not cache.is_ready
        await cache.close()
        assert own_tasks() == []


async def test_a_refusal_is_reported(backend: str) -> None:
    wrong = b"-WRONGPASS invalid username-password pair\r\n"
    async with FakeServer({"HELLO": wrong}) as server, asyncio.timeout(PATIENCE):
        quick = {"first": 5, "cap": 50}
        options = {"clusterRetryStrategy": quick, "retryStrategy": quick, **PATIENT}
        cache = cache_on({"port": server.port, "password": SECRET}, **options)
        with pytest.raises(dscache.ReplyError, match="WRONGPASS") as error:
            await cache.when_ready()
        with pytest.raises(dscache.DscacheError, match="WRONGPASS") as second:
            await cache.get("a")
        assert SECRET not in str(error.value) + str(second.value) + cache.description
        await cache.close()


@pytest.mark.parametrize(
    "view",
    [
        b"+OK\r\n",
        b"*1\r\n:1\r\n",
        b"*1\r\n*2\r\n:0\r\n:16383\r\n",
        b"*1\r\n*3\r\n:0\r\n:16384\r\n*2\r\n$1\r\na\r\n:1\r\n",
        b"*1\r\n*3\r\n:5\r\n:4\r\n*2\r\n$1\r\na\r\n:1\r\n",
        b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$1\r\na\r\n:0\r\n",
        b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n:1\r\n:1\r\n",
        b"*0\r\n",
    ],
)
async def test_an_invalid_view_is_ignored(view: bytes, backend: str, short_pauses: None) -> None:
    """A node that sends it is asked again, and once its reply makes sense everything works."""
    async with FakeCluster() as fakes, asyncio.timeout(PATIENCE):
        for node in fakes.nodes:
            node.answers["CLUSTER"] = view
        cache = cache_on(fakes, connectTimeout=500, clusterRetryStrategy={"first": 5, "cap": 20})
        with pytest.raises(dscache.ConnectError, match=r"CLUSTER SLOTS|serves any slot"):
            await cache.when_ready()
        for node in fakes.nodes:
            node.answers["CLUSTER"] = node._tell
        await until(lambda: cache.is_ready)
        assert await cache.set("a", 1, 1) is True
        # Once the slots are known, nonsense changes nothing.
        for node in fakes.nodes:
            node.answers["CLUSTER"] = view
        fakes.give(slot_of("a"), fakes.nodes[1])
        assert await cache.get("a") is not None
        await cache.close()


async def test_slots_without_an_owner(backend: str, short_pauses: None) -> None:
    async with FakeCluster() as fakes, asyncio.timeout(PATIENCE):
        slot = slot_of("a")
        for node in fakes.nodes:
            node.knows[slot] = None
        async with opened(fakes, commandTimeout=300) as cache:
            assert not cache.is_ready
            with pytest.raises(dscache.DscacheError, match="serves this slot"):
                await cache.get("a")
            (other,) = names_of(fakes.nodes[0], 1)
            assert await cache.set(other, 1, 1) is True
            for node in fakes.nodes:
                node.knows[slot] = fakes.nodes[0]
            await until(lambda: cache.is_ready)
            assert await cache.set("a", 1, 1) is True


async def test_a_silent_node_is_not_waited_for(backend: str) -> None:
    async with FakeCluster(2) as fakes:
        fakes.nodes[0].answers["CLUSTER"] = b""
        async with opened(fakes, slotsRefreshTimeout=50, closeTimeout=100) as cache:
            (name,) = names_of(fakes.nodes[1], 1)
            assert await cache.set(name, 1, 1) is True


@pytest.mark.parametrize("stale", [0, 1, 2])
async def test_the_newest_view_is_believed(stale: int, short_pauses: None) -> None:
    async with FakeCluster(3) as fakes:
        for node in fakes.nodes:
            node.epoch = 7
        behind = fakes.nodes[stale]
        behind.epoch = 6
        names = names_of(fakes.nodes[(stale + 1) % 3], 20)
        target = fakes.nodes[(stale + 2) % 3]
        for name in names:
            fakes.give(
                slot_of(name), target, known_to=[one for one in fakes.nodes if one is not behind]
            )
        async with opened(fakes, slotsRefreshInterval=20) as cache:
            views = behind.views
            await until(lambda: behind.views > views + 5)
            for name in names:
                assert cache._topology._masters[slot_of(name)].address == target.address
            assert cache.stats()["redirections"] == 0


async def test_a_view_without_slots_is_not_believed(short_pauses: None) -> None:
    """It has left the cluster and kept its epoch."""
    async with FakeCluster(2) as fakes, FakeCluster(1) as alone:
        alone.nodes[0].knows = [None] * constants.SLOTS
        async with opened(fakes, alone, slotsRefreshInterval=20) as cache:
            await until(lambda: cache.stats()["refreshes"] > 10)
            assert cache.is_ready
            assert nodes_of(cache) == {node.address for node in fakes.nodes}


@pytest.mark.parametrize("host", [None, b"", b"?"])
async def test_nodes_without_an_announced_host(host: bytes | None, backend: str) -> None:
    """A node that doesn't know its own host is at the address that was asked."""
    async with FakeCluster(1) as fakes, opened(fakes) as cache:
        (node,) = fakes.nodes
        node.announced = (host, node.port)
        refreshes = cache.stats()["refreshes"]
        cache._topology.look_again()
        await until(lambda: cache.stats()["refreshes"] > refreshes)
        assert await cache.set("a", 1, 1) is True
        assert nodes_of(cache) == {node.address}


async def test_a_redirection_to_another_port_of_the_same_host(backend: str) -> None:
    """``MOVED 5 :6379`` means the host that sent it."""
    async with FakeCluster() as fakes, opened(fakes) as cache:
        first, second = fakes.nodes
        (name,) = names_of(first, 1)
        fakes.give(slot_of(name), second)
        first.say = lambda command, slot: Refusal(f"MOVED {slot} :{second.port}")
        assert await cache.set(name, 1, 1) is True
        assert second.moved


def test_announced_addresses() -> None:
    here = ("10.0.0.9", 7)
    tell = parse_redirection
    assert tell("MOVED 5 10.0.0.1:6379", 5, here) == ("10.0.0.1", 6379)
    assert tell("ASK 5 ::1:6379", 5, here) == ("::1", 6379)
    assert tell("ASK 5 [fd00::1]:6379", 5, here) == ("fd00::1", 6379)
    assert tell("MOVED 5 node-1.example:6379", 5, here) == ("node-1.example", 6379)
    assert tell("MOVED 5 ?:6379", 5, here) == ("10.0.0.9", 6379)
    entry = [0, 16383, [b"fd00::1", 1, b"id", []], [None, 2, b"id"], [b"?", 3], [b"", 4]]
    (only,) = parse_slots([entry], here)
    assert only.primary == ("fd00::1", 1)
    assert only.replicas == (("10.0.0.9", 2), ("10.0.0.9", 3), ("10.0.0.9", 4))
    assert parse_epoch(b"cluster_state:ok\r\ncluster_current_epoch:12\r\n") == 12
    for nothing in (b"", b"cluster_current_epoch:x", None, dscache.ReplyError("NOPERM")):
        assert parse_epoch(nothing) == -1


async def test_addresses_are_mapped(backend: str, short_pauses: None) -> None:
    """Announced addresses, also those in redirections, are unreachable from here."""
    async with FakeCluster() as fakes:
        first, second = fakes.nodes
        first.announced, second.announced = (b"10.1.1.1", 7001), (b"fd00::1", 7002)
        mapped = {
            "10.1.1.1:7001": {"host": first.host, "port": first.port},
            "[fd00::1]:7002": {"host": second.host, "port": second.port},
        }
        async with opened(first, natMap=mapped) as cache:
            (name,) = names_of(first, 1)
            assert await cache.set(name, 1, 1) is True
            fakes.give(slot_of(name), second)
            first.say = lambda command, slot: Refusal(f"MOVED {slot} fd00::1:7002")
            assert await cache.get(name) is not None
            assert nodes_of(cache) == {first.address, second.address}


async def test_names_are_looked_up_again(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes are gone, and the configured name leads to another address by now."""
    resolve = socket.getaddrinfo
    place = "127.0.0.1"

    def look_up(host: str, port: Any, family: int = 0, kind: int = 0, *others: int) -> Any:
        if host != "records.test":
            return resolve(host, port, family, kind, *others)
        if others[-1] & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "no number")
        return resolve(place, port, family, kind)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(FakeCluster(1))
        (node,) = old.nodes
        seed = {"host": "records.test", "port": node.port}
        quick = {"first": 5, "cap": 50}
        cache = await stack.enter_async_context(
            opened(seed, retryStrategy=quick, clusterRetryStrategy=quick, slotsRefreshInterval=20)
        )
        await until(lambda: nodes_of(cache) == {node.address})
        await old.__aexit__()
        await until(lambda: not cache.is_ready)
        new = FakeCluster(1)
        new.nodes[0].host, new.nodes[0].port = "127.0.0.2", node.port
        await stack.enter_async_context(new)
        place = "127.0.0.2"
        await until(lambda: cache.is_ready)
        assert await cache.set("a", 1, 1) is True
        assert new.nodes[0].values


# A busy machine takes its time for so large a view.
SLOW = dict.fromkeys(("connectTimeout", "commandTimeout", "slotsRefreshTimeout"), 60_000)


def announce_a_node_for_each_slot(fakes: FakeCluster) -> list[str]:
    """Let nodes announce one node for each slot, two of which they are; return a name of each."""
    one, other = fakes.nodes
    names = [names_of(node, 1)[0] for node in (one, other)]
    real = {slot_of(name): node for name, node in zip(names, fakes.nodes, strict=True)}

    def entry(slot: int) -> list[Any]:
        if slot in real:
            return real[slot].entry()
        # An address without a listener.
        return [b"127.%d.%d.9" % (1 + slot // 256, slot % 256), 1, b"%040x" % slot, []]

    answer = [[slot, slot, entry(slot)] for slot in range(constants.SLOTS)]
    for node in fakes.nodes:
        node.slots = lambda: answer  # type: ignore[method-assign]
    return names


@pytest.mark.parametrize("layer", ["", "near"])
async def test_each_of_very_many_nodes_is_opened_on_demand(backend: str, layer: str) -> None:
    near: dict[str, Any] = {"nearCache": {"required": False}} if layer else {}
    near |= SLOW
    async with FakeCluster(2) as fakes:
        names = announce_a_node_for_each_slot(fakes)
        async with opened(fakes.nodes[0], **near) as cache:
            assert cache.is_ready
            assert nodes_of(cache) == {fakes.nodes[0].address}
            assert len(own_tasks()) < 10
            assert await cache.set(names[1], 1, 1) is True
            assert nodes_of(cache) == {node.address for node in fakes.nodes}
            assert set(await cache.get_bulk(names)) == {names[1]}
            # A slot whose node is down fails alone, without holding up others.
            lost = next(name for i in range(100) if slot_of(name := f"x{i}") % 256 not in (0, 255))
            waiting = asyncio.ensure_future(cache.get(lost))
            await until(lambda: len(nodes_of(cache)) == 3)
            assert await cache.set_bulk(dict.fromkeys(names, (2, 2))) == set()
            waiting.cancel()
            assert await cache.head_bulk(names) == dict.fromkeys(names, 2)
            await until(lambda: cache.stats()["refreshes"] > 1)
            assert len(nodes_of(cache)) == 3


async def test_operations_issued_before_the_view_of_many_nodes(backend: str) -> None:
    async with FakeCluster(2) as fakes:
        names = announce_a_node_for_each_slot(fakes)
        cache = cache_on(fakes.nodes[0], **SLOW)
        assert await asyncio.gather(*(cache.set(name, 1, 1) for name in names)) == [True, True]
        assert nodes_of(cache) == {node.address for node in fakes.nodes}
        await cache.close()


async def test_a_blocking_cache_of_very_many_nodes(backend: str) -> None:
    async with FakeCluster(2) as fakes:
        names = announce_a_node_for_each_slot(fakes)
        node = fakes.nodes[0]
        options = {"nodes": [{"host": node.host, "port": node.port}], **SLOW}

        def work() -> None:
            with dscache.Cache.from_config({"name": "redis", "options": options}) as cache:
                assert cache.is_ready
                assert set(cache.stats()["nodes"]) == {node.address}
                for name in names:
                    assert cache.set(name, 1, 1) is True
                assert cache.head_bulk(names) == dict.fromkeys(names, 1)
                assert set(cache.stats()["nodes"]) == {one.address for one in fakes.nodes}

        await asyncio.to_thread(work)


async def test_slot_refreshes_are_paced(backend: str) -> None:
    """Whatever many nodes redirect, and however many operations."""
    async with FakeCluster(3) as fakes, opened(fakes) as cache:
        loop = asyncio.get_running_loop()
        began, views = loop.time(), sum(node.views for node in fakes.nodes)
        names = [f"n/{i}" for i in range(60)]
        for turn in range(5):
            for name in names:
                fakes.give(slot_of(name), fakes.nodes[turn % 3])
            await cache.set_bulk(dict.fromkeys(names, (turn, turn)))
        assert cache.stats()["redirections"] > 100
        asked = sum(node.views for node in fakes.nodes) - views
        # Three nodes each time, and at least 50 ms between two times.
        assert asked <= 3 * (2 + (loop.time() - began) / 0.05)


async def test_a_node_that_leaves_is_closed_after_its_replies(
    backend: str, short_pauses: None
) -> None:
    """The node is silent until it is about to leave, and then redirects everything."""
    async with FakeCluster(3) as fakes, asyncio.timeout(PATIENCE):
        leaving, heir, other = fakes.nodes
        async with FaultProxy(leaving.host, leaving.port) as way:
            leaving.announced = way.host.encode(), way.port
            async with opened(other, **PATIENT | {"slotsRefreshTimeout": 50}) as cache:
                names = names_of(leaving, 5)
                await cache.set_bulk({name: (1, name) for name in names})
                leaving.say = lambda command, slot: Refusal(f"MOVED {slot} {heir.address}")
                way.stall("replies")
                waiting = [cache.get(name) for name in names]
                await until(lambda: len(leaving.moved) == 10)
                for slot in range(constants.SLOTS):
                    if leaving.knows[slot] is leaving:
                        heir.knows[slot] = other.knows[slot] = heir
                heir.values.update(leaving.values)
                cache._topology.look_again()
                gone = f"{way.host}:{way.port}"
                await until(lambda: gone not in nodes_of(cache))
                assert leaving.connections == 1
                assert cache.stats()["writes"] == 5
                way.resume()
                records = await asyncio.gather(*waiting)
                assert [record and record.data for record in records] == names
                await until(lambda: leaving.connections == 0)
                assert cache.stats()["writes"] == 5


# -- reads from replicas


@pytest.mark.parametrize("scale", ["slave", "all"])
async def test_replicas_are_read(scale: str, backend: str) -> None:
    async with FakeCluster(2, 2) as fakes, opened(fakes, scaleReads=scale) as cache:
        topology = cache._topology
        await until(
            lambda: (
                sum(map(len, topology._routing.readers.values())) == (2 if scale == "slave" else 4)
            )
        )
        names = [name for node in fakes.nodes for name in names_of(node, 30)]
        assert await cache.set_bulk({name: (1, name) for name in names}) == set()
        assert len(await cache.get_bulk(names)) == 60
        for replica in fakes.replicas:
            assert [b"READONLY"] in replica.commands
            assert names_in(replica, b"MGET")
            assert not names_in(replica, b"MSET")
        for node in fakes.nodes:
            assert bool(names_in(node, b"MGET")) == (scale == "all")


@pytest.mark.parametrize("words", ["LOADING no", "MASTERDOWN no", "CLUSTERDOWN no", "TRYAGAIN no"])
async def test_a_replica_that_can_not_serve(words: str, backend: str) -> None:
    """Reads go to its primary for as long as it refuses."""
    async with (
        FakeCluster(1, 1) as fakes,
        opened(fakes, scaleReads="slave", commandTimeout=60_000) as cache,
    ):
        topology = cache._topology
        await until(lambda: sum(map(len, topology._routing.readers.values())) == 1)
        fakes.replicas[0].say = lambda command, slot: Refusal(words)
        await cache.set("a", 1, 1)
        for _ in range(20):
            assert (await cache.get("a")).version == 1


async def test_a_lost_replica(backend: str) -> None:
    async with FakeCluster(1, 1) as fakes, opened(fakes, scaleReads="slave") as cache:
        topology = cache._topology
        await until(lambda: sum(map(len, topology._routing.readers.values())) == 1)
        await cache.set("a", 1, 1)
        (replica,) = fakes.replicas
        replica.answers["*"] = None
        replica.answers["HELLO"] = None
        for _ in range(20):
            assert (await cache.get("a")).version == 1
        assert names_in(fakes.nodes[0], b"MGET")


# -- statistics, and closing


async def test_statistics_of_a_cluster(backend: str) -> None:
    of_all = {*counters.NAMES, "mean_batch", "latency"}
    of_all |= {"connections", "connects", "reconnections", "redirections", "last_loss"}
    async with FakeCluster() as fakes, opened(fakes) as cache:
        names = [name for node in fakes.nodes for name in names_of(node, 10)]
        await cache.set_bulk({name: (1, name) for name in names})
        await asyncio.gather(*map(cache.get, names))
        fakes.give(slot_of(names[0]), fakes.nodes[1])
        assert await cache.delete(names[0]) is True
        stats = cache.stats()
        assert stats.keys() == of_all | {"refreshes", "nodes", "maintenance"}
        assert stats["operations"] == 22
        assert (stats["reads"], stats["hits"], stats["writes"], stats["deletes"]) == (20, 20, 20, 1)
        assert (stats["connects"], stats["last_loss"], stats["redirections"]) == (2, "", 1)
        assert stats["refreshes"] >= 1
        assert nodes_of(cache) == {node.address for node in fakes.nodes}
        each = stats["nodes"].values()
        assert all(one.keys() == of_all for one in each)
        assert sorted(one["redirections"] for one in each) == [0, 1]
        assert sum(one["bytes_out"] for one in each) == stats["bytes_out"]


async def test_close_completes_redirected_operations(backend: str) -> None:
    """Operations issued before it complete, even if they go from node to node."""
    async with FakeCluster() as fakes, asyncio.timeout(PATIENCE):
        first, second = fakes.nodes
        names = names_of(first, 20)
        cache = cache_on(fakes, **PATIENT)
        await cache.when_ready()
        for number, name in enumerate(names):
            slot = slot_of(name)
            if number % 2:
                fakes.give(slot, second)
            else:
                first.migrating[slot] = second
                second.importing.add(slot)
                for key in (f"{{{name}}}_v", f"{{{name}}}_d"):
                    second.values[key.encode()] = b"1"
        waiting = [cache.set(name, 2, name) for name in names]
        await cache.close()
        assert await asyncio.gather(*waiting) == [True] * 20
        assert second.values[f"{{{names[0]}}}_v".encode()] == b"2"
        assert_drained(cache)
        assert own_tasks() == []
        await cache.close()
        with pytest.raises(dscache.UsageError, match="closed"):
            cache.get("a")


@pytest.mark.parametrize("state", ["unknown", "redirected", "unserved"])
async def test_close_ends_by_its_timeout(state: str, backend: str) -> None:
    """No caller waits for ever, whatever fails to arrive."""
    async with FakeCluster() as fakes, asyncio.timeout(PATIENCE):
        if state == "unknown":
            for node in fakes.nodes:
                node.answers["HELLO"] = b""
        if state == "redirected":
            for node in fakes.nodes:
                node.say = lambda command, slot: Refusal("TRYAGAIN later")
        if state == "unserved":
            for node in fakes.nodes:
                node.knows[slot_of("a")] = None
        options = PATIENT | {"closeTimeout": 200, "maxRedirections": 1000}
        cache = cache_on(fakes, **options)
        waiting = [cache.get("a"), cache.set("a", 1, 1), cache.get_bulk(["a", "b"])]
        ready = asyncio.ensure_future(cache.when_ready())
        if state != "unknown":
            await ready
            await asyncio.sleep(0.05)  # any result of the operations in flight is fine
        await cache.close()
        outcomes = await asyncio.gather(*waiting, ready, return_exceptions=True)
        for outcome in outcomes[:3]:
            assert isinstance(outcome, (dscache.ConnectionLost, dscache.BulkError)), outcome
        assert_drained(cache)
        assert own_tasks() == []


async def test_nothing_stays_open(backend: str) -> None:
    async with FakeCluster(3) as fakes, asyncio.timeout(PATIENCE):
        gc.collect()
        files = open_files()
        for _ in range(3):
            async with cache_on(fakes) as cache:
                await cache.set("a", 1, 1)
            assert own_tasks() == []
        del cache
        await until(lambda: open_files() <= files)


async def test_use_in_another_loop_is_refused(backend: str) -> None:
    async with FakeCluster() as fakes, opened(fakes) as cache:
        await cache.set("a", 1, 1)

        async def elsewhere() -> None:
            for issue in (lambda: cache.get("a"), lambda: cache.get_bulk(["a"])):
                with pytest.raises(dscache.UsageError, match="event loop"):
                    issue()
            for use in (cache.when_ready, cache.close):
                with pytest.raises(dscache.UsageError, match="event loop"):
                    await use()

        await asyncio.to_thread(asyncio.run, elsewhere())
        assert await cache.get("a") is not None


@pytest.mark.parametrize("state", ["served", "unserved"])
async def test_use_in_a_forked_child_is_refused(state: str, backend: str) -> None:
    async with FakeCluster() as fakes:
        if state == "unserved":
            for node in fakes.nodes:
                node.knows[slot_of("a")] = None
        async with opened(fakes, commandTimeout=300) as cache:
            waiting = cache.get("a")  # the tick that the child would join
            child = os.fork()
            if child == 0:
                try:
                    cache.get("a")
                except dscache.UsageError:
                    os._exit(0)
                finally:
                    os._exit(1)
            assert (await asyncio.to_thread(os.waitpid, child, 0))[1] == 0
            (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
            if state == "served":
                assert outcome is None
            else:
                assert isinstance(outcome, dscache.ConnectError)
                assert "no node of the cluster serves this slot" in str(outcome)
