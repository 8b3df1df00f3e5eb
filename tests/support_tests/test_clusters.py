"""The test clusters form, reshard, fail over, move and leave nothing behind."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.cluster import ClusterNode as StartupNode
from redis.cluster import RedisCluster
from redis.crc import key_slot

from dscache import DscacheError
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.conftest import BY_AGE
from tests.support import clusters
from tests.support.clusters import SLOTS, ClusterGroup, ClusterNode, Failover

PASSWORD = "of-all-nodes"
OWN_PASSWORDS = ("of-the-first", "of-the-second", None)


@pytest.fixture(scope="module")
def binary() -> ServerBinary:
    """The oldest server, which needs the most care; test_cluster.py works on newer ones, too."""
    return BY_AGE[0]


@pytest.fixture(scope="module")
def shared_group(binary: ServerBinary) -> Iterator[ClusterGroup]:
    """Three primaries with a replica each, all with one password."""
    with ClusterGroup(binary, passwords=PASSWORD) as started:
        yield started


@pytest.fixture
def client(group: ClusterGroup) -> Iterator[RedisCluster]:
    """A plain client of the whole cluster that follows redirections."""
    nodes = [StartupNode(node.host, node.port) for node in group.nodes]
    with RedisCluster(startup_nodes=nodes, password=PASSWORD, decode_responses=True) as opened:
        yield opened


def in_one_slot(count: int) -> list[str]:
    return [f"{{moving}}/{number}" for number in range(count)]


def test_all_slots_are_served_and_replicated(group: ClusterGroup, client: RedisCluster) -> None:
    nodes = [{"host": "127.0.0.1", "port": node.port} for node in group.nodes]
    assert group.options == {"nodes": nodes, "redisOptions": {"password": PASSWORD}}
    assert len({node.port for node in group.nodes}) == len({node.id for node in group.nodes}) == 6
    primaries, replicas = group.primaries(), group.replicas()
    assert (len(primaries), len(replicas)) == (3, 3)
    assert {node.role() for node in primaries} == {"primary"}
    assert {node.role() for node in replicas} == {"replica"}
    assert {group.replica_of(node) for node in primaries} == set(replicas)
    owned = [slot for node in primaries for slot in group.slots_of(node)]
    assert sorted(owned) == list(range(SLOTS))
    assert not any(group.slots_of(node) for node in replicas)
    for number in range(300):
        client.set(f"key/{number}", number)
    assert [client.get(f"key/{number}") for number in range(300)] == [str(n) for n in range(300)]
    for key in ("key/0", "key/1", "key/2"):
        owner = group.owner(key)
        assert group.primary_of(key_slot(key.encode())) is owner
        with owner.client() as direct:
            assert direct.get(key) is not None
            # WAIT covers the writes of its own connection.
            direct.set(key, "replicated")
            assert direct.wait(1, 5000) == 1
        with group.replica_of(owner).client() as direct:
            direct.readonly()
            assert direct.get(key) == "replicated"


def test_slots_move_while_a_client_works(group: ClusterGroup, client: RedisCluster) -> None:
    source, target, _ = group.primaries()
    owned = set(group.slots_of(source))
    keys = [key for key in map(str, range(1000)) if key_slot(key.encode()) in owned][:40]
    written = dict.fromkeys(keys, "0")
    client.mset_nonatomic(written)
    done = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not done.is_set():
                for key in keys:
                    assert client.get(key) == written[key]
                    value = str(int(written[key]) + 1)
                    client.set(key, value)
                    written[key] = value
        except BaseException as error:
            failures.append(error)

    slots = sorted({key_slot(key.encode()) for key in keys})
    worker = threading.Thread(target=work)
    worker.start()
    try:
        group.migrate(slots, source, target)
        assert set(slots) <= set(group.slots_of(target))
        group.migrate(slots[:5], target, source, pause=0.01, at_once=1)
        group.migrate(slots[5:], target, source, pause=0.01)
    finally:
        done.set()
        worker.join()
    assert failures == []
    assert {key: client.get(key) for key in keys} == written
    assert set(slots) <= set(group.slots_of(source))
    group.wait_until_ok()


def where(keys: list[str], *nodes: ClusterNode) -> list[int]:
    """Return how many of the keys each node holds, all of them in one slot."""
    slot = key_slot(keys[0].encode())
    return [node.ask("CLUSTER", "COUNTKEYSINSLOT", slot) for node in nodes]


def test_a_move_can_be_paused_and_cancelled(group: ClusterGroup, client: RedisCluster) -> None:
    keys = in_one_slot(250)
    slot = key_slot(keys[0].encode())
    source = group.primary_of(slot)
    target = next(node for node in group.primaries() if node is not source)
    for key in keys:
        client.set(key, key)

    group.begin_migration(slot, source, target)
    assert group.move_keys(slot, source, target, limit=7) == 7
    assert group.move_keys(slot, source, target, limit=120) == 120
    assert where(keys, source, target) == [123, 127]
    redirected = 0
    with source.client() as direct:
        for key in keys:
            try:
                assert direct.get(key) == key
            except redis.ResponseError as error:
                assert str(error) == f"{slot} {target.host}:{target.port}"  # noqa: PT017
                redirected += 1
    assert redirected == 127
    assert [client.get(key) for key in keys] == keys

    group.cancel_migration(slot, source, target)
    assert group.primary_of(slot) is source
    assert where(keys, source, target) == [250, 0]
    assert [client.get(key) for key in keys] == keys

    group.begin_migration(slot, source, target)
    group.cancel_migration(slot, source, target)
    assert where(keys, source, target) == [250, 0]
    for node in (source, target):
        assert "[" not in node.ask("CLUSTER", "NODES")

    group.begin_migration(slot, source, target)
    assert group.move_keys(slot, source, target) == 250
    assert group.move_keys(slot, source, target) == 0
    group.end_migration(slot, source, target)
    assert [client.get(key) for key in keys] == keys
    group.wait_until_ok()
    assert group.primary_of(slot) is target
    group.migrate([slot], target, source)


def test_binary_keys_are_moved(group: ClusterGroup) -> None:
    key = b"\xff\x00{no text}\xfe"
    source = group.owner(key)
    target = next(node for node in group.primaries() if node is not source)
    with source.client() as direct:
        direct.set(key, "v")
    group.migrate([key_slot(key)], source, target)
    with target.client() as direct:
        assert direct.get(key) == "v"
    group.migrate([key_slot(key)], target, source)


@pytest.mark.parametrize("kind", ["", "FORCE", "TAKEOVER"])
def test_a_replica_is_promoted(kind: Failover, group: ClusterGroup, client: RedisCluster) -> None:
    client.set("key", kind)
    old = group.owner("key")
    new = group.replica_of(old)
    slots = group.slots_of(old)
    with old.client() as direct:
        direct.set("key", kind)
        assert direct.wait(1, 5000) == 1
    group.failover(new, kind)
    assert group.owner("key") is new
    assert group.slots_of(new) == slots
    assert (new.role(), old.role()) == ("primary", "replica")
    with pytest.raises(ValueError, match="can't be promoted"):
        group.failover(new)
    group.wait_until_ok()
    assert group.replica_of(new) is old
    assert client.get("key") == kind


def test_a_killed_primary_is_replaced_and_returns(
    group: ClusterGroup, client: RedisCluster
) -> None:
    old = group.owner("key")
    new = group.replica_of(old)
    with old.client() as direct:
        direct.set("key", "v")
        assert direct.wait(1, 5000) == 1
    port = old.port
    group.kill(old)
    assert not old.server.is_running
    group.wait_until_ok()
    assert group.owner("key") is new
    assert old not in group.primaries() + group.replicas()
    assert client.get("key") == "v"
    with pytest.raises(LookupError, match="no replica"):
        group.replica_of(new)
    group.start(old)
    group.wait_until_ok()
    assert (old.port, old.role()) == (port, "replica")
    assert group.replica_of(new) is old


def test_a_primary_elected_with_old_votes_is_accepted(binary: ServerBinary) -> None:
    # Its death is noticed while the votes of the first promotion still count.
    with ClusterGroup(binary, node_timeout_ms=200) as group:
        old = group.owner("key")
        new = group.replica_of(old)
        group.failover(new)
        group.failover(old, "TAKEOVER")
        group.kill(old)
        group.wait_until_ok()
        assert group.owner("key") is new
        epochs = [node.view()[new.id].epoch for node in group.nodes if node is not old]
        assert max(epochs) == min(epochs) > new.view()[old.id].epoch


def test_a_paused_node_is_silent_and_returns(group: ClusterGroup) -> None:
    replica = group.replicas()[0]
    group.pause(replica)
    with (
        redis.Redis(port=replica.port, socket_timeout=0.1, retry=None) as direct,
        pytest.raises(redis.TimeoutError),
    ):
        direct.ping()
    group.wait_until_ok()
    assert replica not in group.replicas()
    group.resume(replica)
    group.wait_until_ok()
    assert replica in group.replicas()


def test_all_nodes_return_at_other_addresses_with_their_data(
    group: ClusterGroup, client: RedisCluster
) -> None:
    values = {f"key/{number}": str(number) for number in range(300)}
    client.mset_nonatomic(values)
    ports = {node.port for node in group.nodes}
    roles = {node.id: group.slots_of(node) for node in group.primaries()}
    group.stop_all()
    assert not any(node.server.is_running for node in group.nodes)
    group.start_all()
    assert not ports & {node.port for node in group.nodes}
    assert roles == {node.id: group.slots_of(node) for node in group.primaries()}
    nodes = [StartupNode(node.host, node.port) for node in group.nodes]
    with RedisCluster(startup_nodes=nodes, password=PASSWORD, decode_responses=True) as moved:
        assert {key: moved.get(key) for key in values} == values


def test_each_node_may_have_its_own_password(binary: ServerBinary) -> None:
    with ClusterGroup(binary, primaries=2, replicas=1, passwords=OWN_PASSWORDS) as group:
        first, second, third = group.nodes
        nodes = [{"host": "127.0.0.1", "port": node.port} for node in group.nodes]
        assert group.options == {
            "nodes": [
                nodes[0] | {"password": "of-the-first"},
                nodes[1] | {"password": "of-the-second"},
                nodes[2],
            ]
        }
        with (
            redis.Redis(port=first.port, password="of-the-second", retry=None) as direct,
            pytest.raises(redis.AuthenticationError),
        ):
            direct.ping()
        slot = group.slots_of(first)[0]
        group.migrate([slot], first, second)
        group.migrate([slot], second, first)
        # Any new replica can log in to any former primary.
        group.failover(third)
        group.wait_until_ok()
        group.failover(first)
        group.wait_until_ok()
        assert group.replica_of(first) is third
        # Keys can be migrated to a node with a password too.
        key = next(key for key in map(str, range(100)) if group.owner(key) is first)
        first.ask("SET", key, "v")
        group.migrate([key_slot(key.encode())], first, second)
        assert second.ask("GET", key) == "v"


def test_nodes_are_removed(binary: ServerBinary) -> None:
    keep = ("--cluster-allow-replica-migration", "no")
    with ClusterGroup(binary, primaries=6, replicas=1, args=keep, full_coverage=False) as group:
        first, second, third, *others, last, replica = group.nodes
        rest = [second, third, *others]
        with pytest.raises(ValueError, match="still owns slots"):
            group.forget(first)
        slots = group.slots_of(first)
        group.migrate(slots, first, second, at_once=512)
        assert group.primaries() == [first, *rest, last]
        assert group.replica_of(first) is replica
        group.forget(first)
        assert group.nodes == [*rest, last, replica]
        assert group.replica_of(second) is replica
        assert set(slots) < set(group.slots_of(second))
        group.forget(replica)
        assert group.nodes == [*rest, last]
        # They still run, each alone.
        for left in (first, replica):
            assert list(left.view()) == [left.id]
            with pytest.raises(ValueError, match="has left"):
                group.start(left)

        # The slots of a primary without replicas are lost. The others keep serving, as configured
        # here.
        group.kill(last)
        group.wait_until_noticed()
        assert group.primaries() == rest
        assert group.primary_of(SLOTS - 1) is last
        assert third.ask("CLUSTER", "INFO").startswith("cluster_state:ok")
        servers = [node.server for node in (*group.nodes, first, replica)]
    assert not any(server.is_running for server in servers)


def test_a_failed_wait_names_what_is_missing(
    group: ClusterGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = group.replicas()[0]
    group.kill(lost)
    monkeypatch.setattr(clusters, "_PATIENCE_SECONDS", 0.0)
    with pytest.raises(TimeoutError, match=f"has not noticed that .*{lost.port}.* is down"):
        group.wait_until_ok()


def test_a_failed_start_leaves_nothing_behind(
    binary: ServerBinary, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    make_folder = ClusterGroup._make_folder

    def noted(self: ClusterGroup, parent: Path | None) -> Path:
        folders.append(make_folder(self, parent))
        return folders[-1]

    servers: list[EmbeddedServer] = []
    start = EmbeddedServer.start

    def third_fails(self: EmbeddedServer) -> None:
        servers.append(self)
        if len(servers) == 3:
            raise DscacheError("no third one")
        start(self)

    monkeypatch.setattr(ClusterGroup, "_make_folder", noted)
    monkeypatch.setattr(EmbeddedServer, "start", third_fails)
    with pytest.raises(DscacheError, match="no third one"), ClusterGroup(binary):
        pass
    assert len(servers) == 3
    assert not any(server.is_running for server in servers)
    assert folders
    assert not any(folder.exists() for folder in folders)


def test_a_lone_primary_on_contested_ports(
    binary: ServerBinary, monkeypatch: pytest.MonkeyPatch
) -> None:
    with clusters.hold_port() as taken:
        taken.listen()
        hold = clusters.hold_port
        # A taken bus port: the server has opened its other one by then.
        ports = iter([hold(), taken.dup(), hold(), hold()])
        monkeypatch.setattr(clusters, "hold_port", lambda: next(ports))
        with ClusterGroup(binary, primaries=1, replicas=0) as group:
            assert next(ports, None) is None
            (node,) = group.nodes
            assert node.bus_port != taken.getsockname()[1]
            assert group.slots_of(node) == list(range(SLOTS))
            node.ask("SET", "key", "v")
            port = node.port
            group.stop_all()
            # Meanwhile neither another server nor a client can get its port.
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((node.host, port))
            group.start_all(on_new_ports=False)
            assert node.port == port
            assert node.ask("GET", "key") == "v"


def test_mistakes_are_reported(binary: ServerBinary) -> None:
    with pytest.raises(ValueError, match="2 passwords for 6 nodes"):
        ClusterGroup(binary, passwords=["a", "b"])
    with pytest.raises(ValueError, match="needs a primary"):
        ClusterGroup(binary, primaries=0)
