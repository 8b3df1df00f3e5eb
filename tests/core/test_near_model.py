"""Random operations on a near cache with delayed invalidations: it serves nothing too old.

Two nodes serve two slots, other clients write too, connections end, slots move, and the servers'
output waits in the stream until it arrives, byte by byte. A read may return the value at the time
it was issued or any newer one; changes whose invalidation has not arrived may be missing. This
cache's own writes count from the moment they were issued.

Both cores go through the same steps, and must do the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dscache import _fast
from dscache.core import pure as _pure
from dscache.errors import ConnectionLost, DscacheError, ProtocolError
from tests.core.test_twins import shown
from tests.support.near_wire import FOREVER, Call, Promise, TrackingServer, size_of
from tests.support.wire import Operation, commands, keys_of

NAMES = ("{x}a", "{x}b", "{y}c")
SLOTS = {name: _pure.slot_of_key(keys_of(name)[0]) for name in NAMES}
X, Y = SLOTS["{x}a"], SLOTS["{y}c"]
NODES = (0, 1)
MAX_RECORDS = 2


def address(node: int) -> str:
    """Return a node's address."""
    return f"node{node}.test:6379"


@dataclass
class State:
    """A record from some moment on: its version and data, or None."""

    content: tuple[int, int] | None
    node: int
    mark: int
    """How long its node's stream was when all had been said of this change."""
    stream: int
    """Which of the node's streams that was."""
    is_said: bool
    """Whether the stream says that the record has changed."""
    has_arrived: bool = False
    """Whether that has arrived."""


@dataclass
class Write:
    """A write of this cache's own."""

    operation: Operation
    call: Call
    state: int
    """The number of the record's state when it was issued."""
    answered: int = 0
    """How many states there were when it was answered."""

    def floor(self, name: str, states: list[State]) -> int:
        """Return the number of the earliest state that a later reader may see."""
        if not self.call.done or self.call.error is not None:
            return self.state
        result, argument = self.call.value, self.operation.argument
        if "delete" in self.operation.method:
            if result == (1 if self.operation.method == "delete" else len(set(argument))):
                for number in range(self.state + 1, self.answered):
                    if states[number].content is None:
                        return number
            return self.state
        if self.operation.method == "set":
            content = self.operation.rest if result else None
        else:
            content = argument[name] if name not in result else None
        for number in range(self.state + 1, len(states)):
            if content is not None and states[number].content == content:
                return number
        # Of two writes in one tick only the later one is sent.
        return self.state


@dataclass
class Read:
    """A read of one name (a bulk is one for each), and the states it may return."""

    name: str
    call: Call
    last_known: int
    """The number of the last state that was known when it was issued."""
    written: list[Write]
    last_invalidated: int
    """The last of which the stream has said that it is another one."""

    def value(self) -> tuple[str, Any]:
        """Return the result: a record, a version, or an error."""
        error, result = self.call.error, self.call.value
        if error is not None:
            errors = getattr(error, "errors", None)
            if errors is None or self.name in errors:
                return "error", None
            result = error.result  # type: ignore[attr-defined]
        kind = self.call.operation.method
        if kind.endswith("_bulk"):
            result = result.get(self.name)
        return ("version" if kind.startswith("head") else "record"), result


class World:
    """One core's near cache, the nodes, and the history of every record."""

    def __init__(self, core: Any, serve_stale: bool, is_tracked: bool) -> None:
        self.core = core
        self.serve_stale = serve_stale
        self.promises: list[Promise] = []
        self.servers = [TrackingServer() for _ in NODES]
        self.pipelines = [self._new_pipeline(address(node)) for node in NODES]
        self.router = core.Router(self._promise, self.pipelines[0], None)
        self.near = core.NearCache(
            self._promise,
            self.router,
            clustered=True,
            max_records=MAX_RECORDS,
            serve_stale=serve_stale,
            timeout=FOREVER,
            max_age=FOREVER,
            idle_limit=FOREVER,
        )
        self.requests: list[list[list[bytes]]] = [[] for _ in NODES]
        self.streams = [0 for _ in NODES]
        self.is_up = [False for _ in NODES]
        self.owner = {X: 0, Y: 1}
        self.known_owner = dict(self.owner)
        # Operations on a slot that has moved wait here: a pipeline, and how far the former owners
        # must have answered before anything goes to the new one.
        self.held: dict[int, tuple[Any, dict[int, int]]] = {}
        self.states = {name: [State(None, self.owner[SLOTS[name]], 0, 0, False)] for name in NAMES}
        # States known for other reasons than an invalidation.
        self.base = dict.fromkeys(NAMES, 0)
        self.reads: list[Read] = []
        self.open_reads: list[Read] = []
        self.writes: dict[str, list[Write]] = {name: [] for name in NAMES}
        self.calls: list[Call] = []
        for slot, node in self.owner.items():
            self._refuse_elsewhere(slot, node)
            self._route(slot)
        for node in NODES:
            self.pipelines[node].near = self.near
            self.connect(node, is_tracked)

    # -- operations

    def issue(self, operation: Operation) -> None:
        argument = operation.argument
        on = [argument] if isinstance(argument, str) else list(dict.fromkeys(argument))
        floors = [(self._last_known(name), self._last_invalidated(name)) for name in on]
        before = [len(self.states[name]) - 1 for name in on]
        written = [list(self.writes[name]) for name in on]
        call = Call(operation, operation.on(self.near))
        self.calls.append(call)
        for number, name in enumerate(on):
            if operation.method.startswith(("get", "head")):
                last_known, by_name = floors[number]
                read = Read(name, call, last_known, written[number], by_name)
                self.reads.append(read)
                self.open_reads.append(read)
            else:
                self.writes[name].append(Write(operation, call, before[number]))

    def _last_known(self, name: str) -> int:
        """Return the number of the last state of a record that is known here."""
        states, node = self.states[name], self.known_owner[SLOTS[name]]
        server = self.servers[node]
        arrived = server.offset - len(server.sent)
        for number in range(len(states) - 1, self.base[name], -1):
            if states[number].node == node and states[number].mark <= arrived:
                return number
        return self.base[name]

    def _last_invalidated(self, name: str) -> int:
        arrived = [number for number, state in enumerate(self.states[name]) if state.has_arrived]
        return max(arrived, default=0)

    # -- other clients

    def elsewhere(self, name: str, kind: str, version: int, serial: int) -> None:
        node = self.owner[SLOTS[name]]
        keys = keys_of(name)
        match kind:
            case "write":
                self.servers[node].write(name, version, b"%d" % serial)
            case "remove":
                self.servers[node].remove(name)
            case "remove data":
                self.servers[node].elsewhere(b"DEL", keys[1])
            case "remove version":
                self.servers[node].elsewhere(b"DEL", keys[0])
        self._observe(node)

    def flush(self, node: int) -> None:
        self.servers[node].flush()
        self._observe(node, by_name=False)

    def _observe(self, node: int, *, by_name: bool = True) -> None:
        """Record the changes made by the last command on a node.

        A report that names no key concerns the slots that the client knows to be there.
        """
        server = self.servers[node]
        for name in NAMES:
            if self.owner[SLOTS[name]] == node:
                keys = keys_of(name)
                version, data = (server.values.get(key) for key in keys)
                content = None if version is None or data is None else (int(version), int(data))
                if content != self.states[name][-1].content:
                    is_said = not server.named.isdisjoint(keys)
                    is_said &= by_name or self.known_owner[SLOTS[name]] == node
                    state = State(content, node, server.offset, self.streams[node], is_said)
                    self.states[name].append(state)

    # -- transport

    def send(self) -> None:
        """Flush all nodes that are up."""
        for node in NODES:
            if self.is_up[node]:
                self.requests[node] += commands(self.pipelines[node].take_output())

    def execute(self, node: int, count: int) -> None:
        for command in self.requests[node][:count]:
            self.servers[node].serve(command)
            self._observe(node)
        del self.requests[node][:count]

    def arrive(self, node: int, size: int) -> None:
        """Deliver that many bytes, and handle redirections as a cluster's client does."""
        if received := self.servers[node].receive(size):
            self.pipelines[node].feed(received)
        server = self.servers[node]
        arrived = server.offset - len(server.sent)
        for states in self.states.values():
            for state in states:
                if (state.node, state.stream) == (node, self.streams[node]):
                    state.has_arrived = state.has_arrived or (
                        state.is_said and state.mark <= arrived
                    )
        self._redirected(node)
        self._release_held()

    def catch_up(self) -> None:
        """Deliver all bytes in transit."""
        for node in NODES:
            if self.is_up[node]:
                self.execute(node, len(self.requests[node]))
                self.arrive(node, 2**30)

    # -- connections

    def lose(self, node: int, executed: int, broken: bool) -> None:
        if not self.is_up[node]:
            return
        self.execute(node, executed)
        self.requests[node].clear()
        self.servers[node].disconnect()
        self.streams[node] += 1
        self.is_up[node] = False
        reason: Exception = ProtocolError("nonsense") if broken else ConnectionLost("cut")
        self.pipelines[node].connection_lost(reason, not broken)
        self._requeue(self.pipelines[node])
        self._release_held()

    def connect(self, node: int, is_tracked: bool) -> None:
        if self.is_up[node]:
            return
        self.is_up[node] = True
        self.servers[node].is_tracking = is_tracked
        self.pipelines[node].connected(is_tracked)
        for name in NAMES:
            # The records of another connection aren't served any more.
            if self.owner[SLOTS[name]] == node == self.known_owner[SLOTS[name]]:
                self.base[name] = len(self.states[name]) - 1

    def forget(self, node: int) -> None:
        self.pipelines[node].forget("login")

    def expire(self) -> None:
        for pipeline in (*self.pipelines, *(queue for queue, _ in self.held.values())):
            pipeline.expire(math.inf)

    # -- moving slots

    def move_slot(self, slot: int) -> None:
        """Move a slot to the other node without notice to this client.

        It does not return within the round trip of a command: everything sent is executed and
        answered before. Otherwise a read could go to the former owner behind a write that was
        redirected, and be served there.
        """
        if slot in self.held or self.owner[slot] != self.known_owner[slot]:
            for node in NODES:
                self.execute(node, len(self.requests[node]))
                if self.is_up[node]:
                    self.arrive(node, 2**30)
        source, target = self.owner[slot], 1 - self.owner[slot]
        self.owner[slot] = target
        for name in NAMES:
            if SLOTS[name] == slot:
                for key in keys_of(name):
                    value = self.servers[source].values.get(key)
                    if value is not None:
                        self.servers[target].elsewhere(b"SET", key, value)
                self.servers[source].remove(name)
        self._refuse_elsewhere(slot, target)

    def _refuse_elsewhere(self, slot: int, owner: int) -> None:
        for node, server in enumerate(self.servers):
            for name in NAMES:
                for key in keys_of(name) if SLOTS[name] == slot else ():
                    if node == owner:
                        server.moved.pop(key, None)
                    else:
                        server.moved[key] = f"MOVED {slot} {address(owner)}"

    def learn(self, slot: int, source: int, target: int) -> None:
        """Learn that a slot has moved to another node."""
        if self.known_owner[slot] != target:
            self.known_owner[slot] = target
            self.near.slots_moved([slot])
            for name in NAMES:
                if SLOTS[name] == slot:
                    self.base[name] = len(self.states[name]) - 1
        queue, fences = self.held.setdefault(slot, (self._new_pipeline("queue"), {}))
        fences[source] = self.pipelines[source].fence()
        self.router.owners[slot] = self.router.readers[slot] = queue
        self._requeue(self.pipelines[source])

    def look_at_slots(self) -> None:
        """Look up the owner of each slot."""
        for slot, owner in self.owner.items():
            if owner != self.known_owner[slot]:
                self.learn(slot, self.known_owner[slot], owner)
        self._release_held()

    def _redirected(self, node: int) -> None:
        redirected, self.pipelines[node].redirected = self.pipelines[node].redirected, []
        for words, slot, batch in redirected:
            target = int(words.partition(" node")[2][0])
            self.learn(slot, node, target)
            self.held[slot][0].requeue([batch])

    def _release_held(self) -> None:
        for slot, (queue, fences) in list(self.held.items()):
            if all(self.pipelines[node].settled >= fence for node, fence in fences.items()):
                del self.held[slot]
                self._route(slot)
                self._requeue(queue)

    def _route(self, slot: int) -> None:
        pipeline = self.pipelines[self.known_owner[slot]]
        self.router.owners[slot] = self.router.readers[slot] = pipeline

    def _requeue(self, pipeline: Any) -> None:
        for target, batch in pipeline.take_queued(self.router.target_of):
            target.requeue([batch])

    # -- invariants

    def look(self) -> None:
        """Check the reads that have ended since the last call."""
        for writes in self.writes.values():
            for write in writes:
                if not write.answered and write.call.look():
                    write.answered = 2**30
        for name, writes in self.writes.items():
            for write in writes:
                write.answered = min(write.answered, len(self.states[name]))
        for read in self.open_reads:
            read.call.look()
        self.check(self.open_reads)
        self.open_reads = [
            read for read in self.open_reads if not read.call.done and not read.call.cancelled
        ]
        stats = self.near.stats()
        assert stats["records"] <= MAX_RECORDS
        assert stats["records"] * size_of(self.core, "") <= stats["bytes"]

    def check(self, reads: list[Read]) -> None:
        """Assert that reads that have ended returned nothing too old."""
        for read in reads:
            if not read.call.done:
                continue
            kind, found = read.value()
            if kind == "error":
                continue
            states = self.states[read.name]
            is_stale = kind == "record" and found is not None and found.stale
            assert self.serve_stale or not is_stale
            floors = [read.last_invalidated if is_stale else read.last_known]
            floors += [write.floor(read.name, states) for write in read.written]
            allowed = [state.content for state in states[max(floors) :]]
            if kind == "version":
                versions = [content and content[0] for content in allowed]
                assert found in versions, (read, floors, states)
            else:
                content = None if found is None else (found.version, found.data)
                assert content in allowed, (read, floors, states)

    def finish(self) -> None:
        """Bring everything to its end, and assert that the known records are current."""
        for node in NODES:
            if not self.servers[node].is_tracking:
                self.lose(node, 0, False)
        for _ in range(100):
            for node in NODES:
                self.connect(node, True)
            self.look_at_slots()
            self.send()
            self.catch_up()
            if not any(self.requests) and not self.held and not self._is_busy():
                break
        assert not self._is_busy()
        self.look()
        assert not self.open_reads
        self.check(self.reads)
        assert all(one.done or one.cancelled for one in self.promises)
        for name in NAMES:
            [state] = self.states[name][-1:]
            for _ in range(2):
                call = Call(Operation("get", name), self.near.get(name))
                self.send()
                self.catch_up()
                assert call.look()
                record = call.result()
                assert (record and (record.version, record.data)) == state.content, name
            assert call.was_at_hand

    def _is_busy(self) -> bool:
        return any(one.queued or one.in_flight for one in self.pipelines)

    def _new_pipeline(self, where: str) -> Any:
        return self.core.Pipeline(
            self._promise, lambda: None, address=where, timeout=FOREVER, clustered=True
        )

    def _promise(self) -> Promise:
        self.promises.append(Promise())
        return self.promises[-1]


# -- operations and mishaps

names = st.sampled_from(NAMES)
some_names = st.lists(names, min_size=1, max_size=3)
versions = st.integers(0, 9)
write_options = st.sampled_from(
    [{}, {}, {"ttl": 60}, {"if_newer": True}, {"ttl": 60, "if_newer": True}]
)
reads = st.one_of(
    st.builds(Operation, st.sampled_from(["get", "get", "head"]), names),
    st.builds(Operation, st.sampled_from(["get_bulk", "get_bulk", "head_bulk"]), some_names),
)
writes = st.one_of(
    st.builds(Operation, st.just("delete"), names),
    st.builds(Operation, st.just("delete_bulk"), some_names),
    st.builds(
        lambda name, version, options: Operation("set", name, (version, 0), options),
        names,
        versions,
        write_options,
    ),
    st.builds(
        lambda names, version, options: Operation(
            "set_bulk", dict.fromkeys(names, (version, 0)), (), options
        ),
        some_names,
        versions,
        write_options,
    ),
)
nodes = st.sampled_from(NODES)
slots = st.sampled_from((X, Y))


class Near(RuleBasedStateMachine):
    """Both cores in two worlds, to which the same happens."""

    @initialize(
        serve_stale=st.booleans(),
        is_tracked=st.sampled_from([True, True, True, True, False]),
        known=st.booleans(),
    )
    def begin(self, serve_stale: bool, is_tracked: bool, known: bool) -> None:
        self.worlds = [World(core, serve_stale, is_tracked) for core in (_fast, _pure)]
        self.serial = 0
        for name in NAMES:
            self.elsewhere(name, "write", 5)
        if known:
            for name in NAMES:
                self.read(name)
            self.catch_up()

    # -- operations

    @rule(operations=st.lists(st.one_of(reads, reads, writes), min_size=1, max_size=4))
    def issue(self, operations: list[Operation]) -> None:
        for drawn in operations:
            self._issue(self._with_data(drawn))

    @rule(name=names)
    def read(self, name: str) -> None:
        self._issue(Operation("get", name))

    @rule(operation=writes, send=st.booleans())
    def write_between_reads(self, operation: Operation, send: bool) -> None:
        argument = operation.argument
        on = [argument] if isinstance(argument, str) else list(argument)
        self._issue(Operation("get_bulk", on))
        if send:
            self.send()
        self._issue(self._with_data(operation))
        self._issue(Operation("get", on[-1]))

    def _issue(self, operation: Operation) -> None:
        for world in self.worlds:
            world.issue(operation)

    def _with_data(self, operation: Operation) -> Operation:
        """Return an operation with the data to write, which never repeats."""
        self.serial += 1
        if operation.method == "set":
            return replace(operation, rest=(operation.rest[0], self.serial))
        if operation.method == "set_bulk":
            records = {n: (version, self.serial) for n, (version, _) in operation.argument.items()}
            return replace(operation, argument=records)
        return operation

    @rule(which=st.integers(0, 9))
    def cancel(self, which: int) -> None:
        for world in self.worlds:
            if which < len(world.calls):
                world.calls[-1 - which].cancel()

    # -- other clients

    @rule(
        name=names,
        kind=st.sampled_from(["write", "write", "remove", "remove data", "remove version"]),
        version=versions,
    )
    def elsewhere(self, name: str, kind: str, version: int) -> None:
        self.serial += 1
        for world in self.worlds:
            world.elsewhere(name, kind, version, self.serial)

    # -- transport

    @rule()
    def send(self) -> None:
        for world in self.worlds:
            world.send()

    @rule(node=nodes, executed=st.integers(0, 6))
    def execute(self, node: int, executed: int) -> None:
        for world in self.worlds:
            world.send()
            world.execute(node, executed)

    @rule(node=nodes)
    def execute_one_after_the_other(self, node: int) -> None:
        """Deliver the reply to each command before the next is executed."""
        for world in self.worlds:
            world.send()
            world.execute(node, 1)
            world.arrive(node, 2**30)

    @rule(node=nodes, arrived=st.integers(0, 150))
    def arrive(self, node: int, arrived: int) -> None:
        for world in self.worlds:
            world.arrive(node, arrived)

    @rule()
    def catch_up(self) -> None:
        for world in self.worlds:
            world.send()
            world.catch_up()

    # -- mishaps

    @rule(
        kind=st.sampled_from(["lose", "lose", "break", "flush", "log in", "expire", "move"]),
        node=nodes,
        executed=st.integers(0, 6),
    )
    def mishap(self, kind: str, node: int, executed: int) -> None:
        for world in self.worlds:
            match kind:
                case "lose" | "break":
                    world.lose(node, executed, kind == "break")
                case "flush":
                    world.flush(node)
                case "log in":
                    world.forget(node)
                case "expire":
                    world.expire()
                case "move":
                    world.move_slot((X, Y)[node])

    @rule(node=nodes, executed=st.integers(0, 3), flushed=st.booleans())
    def reconnect(self, node: int, executed: int, flushed: bool) -> None:
        for world in self.worlds:
            world.lose(node, executed, False)
            world.connect(node, True)
            if flushed:
                world.flush(node)
                world.arrive(node, 2**30)

    @rule(is_tracked=st.sampled_from([True, True, True, False]))
    def connect(self, is_tracked: bool) -> None:
        for world in self.worlds:
            for node in NODES:
                world.connect(node, is_tracked)

    @rule()
    def look_at_slots(self) -> None:
        for world in self.worlds:
            world.look_at_slots()

    # -- invariants

    @invariant()
    def nothing_is_too_old(self) -> None:
        for world in getattr(self, "worlds", ()):
            world.look()

    @invariant()
    def twins_are_equal(self) -> None:
        if not hasattr(self, "worlds"):
            return
        fast, pure = self.worlds
        # An entry takes more bytes in the pure core.
        assert fast.near.stats() | {"bytes": 0} == pure.near.stats() | {"bytes": 0}
        assert fast.requests == pure.requests
        for one, other in zip(fast.calls, pure.calls, strict=True):
            assert (one.done, one.cancelled) == (other.done, other.cancelled)
            if one.done:
                assert shown(one.error) == shown(other.error)
                assert shown(one.value) == shown(other.value)
                assert one.error is None or isinstance(one.error, DscacheError)

    def teardown(self) -> None:
        for world in getattr(self, "worlds", ()):
            world.finish()
        self.twins_are_equal()


TestNear = Near.TestCase
TestNear.settings = settings(max_examples=300, stateful_step_count=30)
