"""A scan against a model of a cluster whose slots move at every step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import pytest

from dscache.config import load
from dscache.core.constants import SLOTS
from dscache.core.keys import KeyLayout, slot_of_key
from dscache.errors import ConnectError, ConnectionLost, ProtocolError, ReplyError
from dscache.net import scan as net_scan
from dscache.net.scan import Names, NameScan, Pause, Reply, Request

LAYOUT = KeyLayout("", hash_tag=True)
NODES = ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")
NAMES = [f"n/{number}" for number in range(60)]
OPTIONS = load({"name": "redis", "options": {"nodes": [{"host": "127.0.0.1", "port": 1}]}}).options


class Model:
    """Three nodes, their slots and keys; ``happen`` makes a random step of a migration."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.owner = {slot: NODES[slot * 3 // SLOTS] for slot in range(SLOTS)}
        self.opened: dict[int, str] = {}
        self.epochs = {node: number for number, node in enumerate(NODES, 1)}
        self.keys: dict[str, set[bytes]] = {node: set() for node in NODES}
        for name in NAMES:
            for key in LAYOUT.keys(name):
                self.keys[self.owner[slot_of_key(key)]].add(key)
        self.used = sorted({LAYOUT.slot(name) for name in NAMES})
        self.run_ids = dict.fromkeys(NODES, "r")
        self.sockets = {node: object() for node in NODES}

    def happen(self) -> None:
        slot = self.rng.choice(self.used)
        source, target = self.owner[slot], self.opened.get(slot)
        if target is None:
            self.opened[slot] = self.rng.choice([node for node in NODES if node != source])
            return
        rest = [key for key in sorted(self.keys[source]) if slot_of_key(key) == slot]
        for key in rest[: self.rng.randrange(1, 3)]:
            self.keys[source].remove(key)
            self.keys[target].add(key)
        if not rest:
            del self.opened[slot]
            self.owner[slot] = target
            if self.epochs[target] != max(self.epochs.values()):
                self.epochs[target] = max(self.epochs.values()) + 1

    def restart(self) -> None:
        node = self.rng.choice(NODES)
        self.run_ids[node] += "x"
        self.sockets[node] = object()

    def answer(self, node: str, command: Sequence[Any]) -> Any:
        match command:
            case ("INFO", "server"):
                return f"# Server\r\nrun_id:{self.run_ids[node]}\r\n".encode()
            case ("CLUSTER", "NODES"):
                return self._nodes(node)
            case ("CLUSTER", "COUNTKEYSINSLOT", slot):
                return len(self._in_slot(node, slot))
            case ("CLUSTER", "GETKEYSINSLOT", slot, count):
                return self._in_slot(node, slot)[:count]
            case ("SCAN", cursor, *_, count):
                # The order of keys differs between processes, as cursors do.
                seed = crc32(f"{node} {self.run_ids[node]}".encode())
                ordered = sorted((crc32(key, seed) + 1, key) for key in self.keys[node])
                rest = [one for one in ordered if one[0] >= int(cursor)]
                last = str(rest[count][0]).encode() if len(rest) > count else b"0"
                return [last, [key for _, key in rest[:count] if key.endswith(b"_v")]]
        raise AssertionError(command)

    def _in_slot(self, node: str, slot: int) -> list[bytes]:
        return [key for key in sorted(self.keys[node]) if slot_of_key(key) == slot]

    def _nodes(self, asked: str) -> bytes:
        lines = []
        for node in NODES:
            flags = "myself,master" if node == asked else "master"
            words = [f"id{node[-1]}", f"{node}@1", flags, "-", "0", "0"]
            words += [str(self.epochs[node]), "connected"]
            if node == asked:
                slots = [slot for slot, owner in self.owner.items() if owner == node]
                starts = [slot for slot in slots if self.owner.get(slot - 1) != node]
                ends = [slot for slot in slots if self.owner.get(slot + 1) != node]
                words += [f"{one}-{other}" for one, other in zip(starts, ends, strict=True)]
                for slot, target in self.opened.items():
                    if self.owner[slot] == node:
                        words.append(f"[{slot}->-id{target[-1]}]")
                    elif target == node:
                        words.append(f"[{slot}-<-id{self.owner[slot][-1]}]")
            lines.append(" ".join(words))
        return "\n".join(lines).encode()


def run(
    model: Model,
    moves: float,
    restarts: float,
    resumes: float,
    monkeypatch: pytest.MonkeyPatch,
    steps: int = 300,
) -> list[str]:
    """Return the names that a scan finds while slots move for a number of steps."""
    clock = [0.0]
    monkeypatch.setattr(net_scan.time, "monotonic", lambda: clock[0])
    rng = model.rng
    scan = NameScan(OPTIONS, "n/", 7, None, model.owner.get)
    going, reply, found = scan.steps(), None, []
    for step in range(100 * steps):
        try:
            done = going.send(reply)
        except StopIteration:
            return found
        reply = None
        clock[0] += 0.001
        if isinstance(done, Names):
            if rng.random() < resumes:  # another process goes on, without this batch
                scan = NameScan(OPTIONS, "n/", 7, scan.cursor(), model.owner.get)
                going = scan.steps()
            else:
                found += done.names
        elif isinstance(done, Request):
            answers = []
            for command in done.commands:
                if step < steps and rng.random() < moves:
                    model.happen()
                answers.append(model.answer(done.node, command))
            reply = Reply(model.sockets[done.node], answers)
            if step < steps and rng.random() < restarts:
                model.restart()
        else:
            assert isinstance(done, Pause)
    raise AssertionError("the scan did not end")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("moves", "restarts", "resumes"),
    [(0.0, 0.0, 0.0), (0.3, 0.0, 0.0), (0.9, 0.0, 0.0), (0.3, 0.1, 0.0), (0.5, 0.02, 0.1)],
)
def test_every_name_is_found(
    moves: float, restarts: float, resumes: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(Model(random.Random(seed)), moves, restarts, resumes, monkeypatch)
    assert {*found} == {*NAMES}
    if not moves and not restarts:
        assert len(found) == len(NAMES)


@pytest.mark.parametrize("seed", range(4))
def test_slots_with_many_keys_are_scanned_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_scan, "_MOST_KEYS", 1)
    found = run(Model(random.Random(seed)), 0.2, 0.02, 0.0, monkeypatch)
    assert {*found} == {*NAMES}


@pytest.mark.parametrize("seed", range(4))
def test_slots_that_grow_are_read_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_scan, "_MARGIN", 1)
    found = run(Model(random.Random(seed)), 0.5, 0.02, 0.0, monkeypatch)
    assert {*found} == {*NAMES}


def first_request(scan: NameScan) -> Any:
    steps = scan.steps()
    assert isinstance(next(steps), Request)
    return steps


def test_errors_end_the_scan_once_nothing_moves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(net_scan.time, "monotonic", lambda: now[0])
    looked = []
    scan = NameScan(OPTIONS, "", 10, None, lambda slot: NODES[0], lambda: looked.append(1))
    steps = first_request(scan)
    for _ in range(50):
        assert isinstance(steps.throw(ConnectionLost("gone")), Pause)
        assert isinstance(next(steps), Request)
    assert len(looked) == 50
    loading = [ReplyError("LOADING it is"), b""]
    assert isinstance(steps.send(Reply(None, loading)), Pause)
    assert isinstance(next(steps), Request)
    now[0] = 11.0
    with pytest.raises(ConnectError, match="gone for good"):
        steps.throw(ConnectError("gone for good"))


def test_a_server_that_cuts_every_request_ends_the_scan() -> None:
    """Each time it cuts off the cache's other operations too."""
    steps = first_request(NameScan(OPTIONS, "", 10, None))
    for _ in range(4):
        assert isinstance(steps.throw(ConnectionLost("cut")), Pause)
        assert isinstance(next(steps), Request)
    # An answer shows that it isn't the request.
    assert isinstance(steps.send(Reply(None, [b"", b""])), Request)
    for _ in range(4):
        assert isinstance(steps.throw(ConnectionLost("cut")), Pause)
        assert isinstance(next(steps), Request)
    with pytest.raises(ConnectionLost, match=r"lost 5 times in a row .*: cut \(a proxy"):
        steps.throw(ConnectionLost("cut"))


def test_a_slot_without_an_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(net_scan.time, "monotonic", lambda: now[0])
    steps = NameScan(OPTIONS, "", 10, None, lambda slot: None).steps()
    assert isinstance(next(steps), Pause)
    now[0] = 11.0
    with pytest.raises(ConnectError, match="no node of the cluster serves slot 0"):
        next(steps)


@pytest.mark.parametrize(
    "nodes",
    [
        7,
        b"",
        b"id1 127.0.0.1:1@1 master - 0 0 1 connected 0-16383",
        b"id1 127.0.0.1:1@1 myself,master - 0 0 1 connected 0-99999999999999",
        b"id1 127.0.0.1:1@1 myself,master - 0 0 1 connected x",
        b"id1 127.0.0.1:1@1 myself,master - 0 0 1 connected [16384->-id1]",
        b"id1 127.0.0.1:x@1 myself,master - 0 0 1 connected 0-16383",
    ],
)
def test_unexpected_replies(nodes: object, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(net_scan.time, "monotonic", lambda: now[0])
    steps = first_request(NameScan(OPTIONS, "", 10, None, lambda slot: NODES[0]))
    now[0] = 11.0
    with pytest.raises(ProtocolError, match="CLUSTER NODES"):
        steps.send(Reply(None, [b"", nodes]))


@pytest.mark.parametrize(
    "reply",
    [
        7,
        [b"0"],
        [0, []],
        [99_999_999_999, []],
        [[], []],
        [None, [b"a_v"]],
        [b"0", None],
        [b"0", [7]],
        [b"0", [b"a_v", None]],
        [ReplyError("NOPERM no"), []],
    ],
    ids=repr,
)
def test_unexpected_replies_to_scan(reply: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number as the cursor made the scan begin again for ever, or took that many bytes."""
    now = [0.0]
    monkeypatch.setattr(net_scan.time, "monotonic", lambda: now[0])
    steps = NameScan(load("redis://127.0.0.1").options, "", 10).steps()
    next(steps)
    request = steps.send(Reply(None, [b"", b""]))
    assert isinstance(request, Request)
    assert request.commands[0][0] == "SCAN"
    now[0] = 11.0
    with pytest.raises(ProtocolError, match="unexpected reply to SCAN"):
        steps.send(Reply(None, [reply]))
