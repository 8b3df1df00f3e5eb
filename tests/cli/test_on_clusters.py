"""The commands on clusters: they scan, watch and check every primary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dscache import ConnectionLost
from dscache.admin import ndjson, progress, scan
from dscache.admin.key_layout import DEEPSTREAM, HASHTAG, Layout
from dscache.embedded import ServerBinary
from tests.conftest import BY_AGE
from tests.support.clusters import ClusterGroup, ClusterNode
from tests.support.commands import failing_after, invoke, running

PASSWORD = "pass@word"
NAMES = [*(f"r/{number}" for number in range(1000)), "}brace", "ü", "{tag}/a"]


@pytest.fixture(scope="module")
def shared_group(binary: ServerBinary) -> Iterator[ClusterGroup]:
    """Three primaries, all with one password."""
    with ClusterGroup(binary, primaries=3, replicas=0, passwords=PASSWORD) as started:
        yield started


@pytest.fixture
def url(group: ClusterGroup) -> tuple[str, str]:
    node = group.nodes[0]
    return "--url", f"redis://:pass%40word@{node.host}:{node.port}"


Url = tuple[str, str]


def place(node: ClusterNode) -> str:
    return f"{node.host}:{node.port}"


def lines(names: list[str] = NAMES) -> bytes:
    texts = (
        json.dumps({"name": name, "version": version, "data": [name]}, ensure_ascii=False)
        for version, name in enumerate(names)
    )
    return "\n".join(texts).encode()


def fill(url: Url, layout: str = HASHTAG, names: list[str] = NAMES) -> None:
    done = invoke("import", "-", *url, "--layout", layout, stdin=lines(names))
    assert (done.status, done.document["records"]) == (0, len(names))


def exported(url: Url, layout: str = HASHTAG) -> list[Any]:
    found = invoke("export", "-", *url, "--layout", layout).lines
    return sorted(found, key=lambda line: line["version"])


def keys(group: ClusterGroup) -> set[str]:
    return {key for node in group.nodes for key in node.ask("KEYS", "*")}


def keys_of(layout: str) -> set[str]:
    return {key.decode() for name in NAMES for key in Layout(layout).keys(name)}


EXPECTED = [json.loads(line) for line in lines().splitlines()]


def test_a_url_leads_to_all_nodes(url: Url, group: ClusterGroup) -> None:
    names = NAMES[:50]
    assert invoke("set", *url, stdin=lines(names)).status == 0
    done = invoke("get", *names, *url)
    assert (done.status, [line["name"] for line in done.lines]) == (0, names)
    assert all(node.ask("DBSIZE") for node in group.nodes)
    assert all(line["deleted"] for line in invoke("delete", *names, *url).lines)


@pytest.mark.parametrize("layout", [HASHTAG, DEEPSTREAM])
def test_export_and_import(layout: str, url: Url, group: ClusterGroup, tmp_path: Path) -> None:
    fill(url, layout)
    assert keys(group) == keys_of(layout)
    file = tmp_path / "all.ndjson.gz"
    words = (str(file), *url, "--layout", layout)
    assert invoke("export", *words).document["records"] == len(NAMES)
    for node in group.nodes:
        node.ask("FLUSHALL")
    assert invoke("import", *words).status == 0
    assert exported(url, layout) == EXPECTED


def test_an_export_resumes_on_each_node(
    url: Url, group: ClusterGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SAVE_INTERVAL", 0)
    monkeypatch.setattr(scan, "SCAN_COUNT", 100)
    fill(url)
    file = tmp_path / "all.ndjson"
    broken = failing_after(len(NAMES) // 2, ndjson.encode, ConnectionLost("it was unplugged"))
    with mock.patch.object(ndjson, "encode", broken):
        assert invoke("export", str(file), *url).status == 1
    state = json.loads((tmp_path / "all.ndjson.resume").read_bytes())
    assert state["cursor"]
    # Lines of a batch that was still being read are not counted.
    written = (tmp_path / "all.ndjson.partial").read_bytes()[: state["size"]]
    assert written.count(b"\n") == state["records"]
    done = invoke("export", str(file), *url)
    assert (done.status, done.document["resumed"] > 0) == (0, True)
    found = [json.loads(line)["name"] for line in file.read_text().splitlines()]
    assert sorted(found) == sorted(NAMES)


def test_records_whose_slots_move_meanwhile_are_exported(
    url: Url, group: ClusterGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "SCAN_COUNT", 100)
    fill(url)
    source, target, _ = group.nodes
    encode = ndjson.encode
    done = 0

    def moving(*record: Any) -> bytes:
        nonlocal done
        done += 1
        if done == 50:
            group.migrate(group.slots_of(source)[::4], source, target)
            group.migrate(group.slots_of(target)[::4], target, source)
        return encode(*record)

    file = tmp_path / "all.ndjson"
    with mock.patch.object(ndjson, "encode", moving):
        assert invoke("export", str(file), *url).status == 0
    found = {json.loads(line)["name"] for line in file.read_text().splitlines()}
    assert found == {*NAMES}


@pytest.mark.parametrize("to", [DEEPSTREAM, HASHTAG])
def test_migrate(to: str, url: Url, group: ClusterGroup) -> None:
    old = HASHTAG if to == DEEPSTREAM else DEEPSTREAM
    fill(url, old)
    done = invoke("migrate", "--to", to, "--dry-run", *url)
    assert (done.document["found"], done.document["copied"]) == (len(NAMES), len(NAMES))
    assert keys(group) == keys_of(old)
    done = invoke("migrate", "--to", to, "--keep", *url)
    assert (done.status, done.document["copied"]) == (0, len(NAMES))
    assert keys(group) == keys_of(old) | keys_of(to)
    # One that was written since, and one that is newer at the target.
    invoke("set", "r/1", "10000", "[1]", *url, "--layout", old)
    invoke("set", "r/2", "10001", "[2]", *url, "--layout", to)
    done = invoke("migrate", "--yes", "--to", to, *url)
    assert (done.status, done.err) == (0, "")
    assert (done.document["copied"], done.document["removed"]) == (1, len(NAMES))
    assert keys(group) == keys_of(to)
    found = exported(url, to)
    assert found[-2:] == [
        {"name": "r/1", "version": 10000, "data": [1]},
        {"name": "r/2", "version": 10001, "data": [2]},
    ]
    assert found[:-2] == [line for line in EXPECTED if line["name"] not in ("r/1", "r/2")]


FEW = NAMES[-50:]


def one_key(name: str) -> str:
    return json.dumps({"_v": FEW.index(name), "_d": [name]}, ensure_ascii=False)


@pytest.mark.parametrize("to", [HASHTAG, DEEPSTREAM])
def test_migrate_from_one_key(to: str, group: ClusterGroup, tmp_path: Path) -> None:
    """Records of deepstream 1 to 3 behind a key prefix, and others beside them."""
    file = tmp_path / "config.yml"
    nodes = [{"host": node.host, "port": node.port} for node in group.nodes[:1]]
    options = {"nodes": nodes, "keyPrefix": "app:", "redisOptions": {"password": PASSWORD}}
    file.write_text(json.dumps({"cache": {"name": "redis", "options": options}}))
    for name in FEW:
        group.owner(f"app:{name}").ask("SET", f"app:{name}", one_key(name))
    group.owner("app:ü").ask("PEXPIRE", "app:ü", 500_000)
    group.owner("other").ask("SET", "other", one_key("ü"))
    words = ("--from", "deepstream3", "--to", to, "--config", str(file), "--json")
    found = {
        one["check"]: one for one in invoke("doctor", "--config", str(file)).document["findings"]
    }
    assert found["one-key records"]["verdict"] == "bad"
    assert found["one-key records"]["found"].startswith(f"{len(FEW)} records of deepstream")
    dry = invoke("migrate", *words, "--dry-run")
    assert (dry.status, dry.document["found"], dry.document["copied"]) == (0, *[len(FEW)] * 2)
    done = invoke("migrate", "--yes", *words)
    assert (done.status, done.err) == (0, "")
    for count in ("found", "copied", "removed"):
        assert done.document[count] == len(FEW)
    layout = Layout(to, "app:")
    assert keys(group) == {key.decode() for name in FEW for key in layout.keys(name)} | {"other"}
    for number, name in enumerate(FEW):
        version, data = layout.keys(name)
        assert group.owner(version).ask("GET", version) == str(number)
        assert json.loads(group.owner(data).ask("GET", data)) == [name]
    for key in layout.keys("ü"):
        assert 0 < group.owner(key).ask("PTTL", key) <= 500_000
    again = invoke("migrate", "--yes", *words)
    assert (again.status, again.document["found"], again.document["remaining"]) == (0, 0, 0)


def test_ttls_and_conflicts_of_two_nodes(url: Url, group: ClusterGroup) -> None:
    invoke("set", "a", "1", "[]", "--ttl", "500", *url)
    invoke("set", "b", "1", "[1]", *url)
    invoke("set", "b", "1", "[2]", *url, "--layout", DEEPSTREAM)
    done = invoke("migrate", "--yes", "--to", DEEPSTREAM, *url)
    assert (done.status, done.document["conflicts"], done.document["removed"]) == (1, 1, 1)
    for key in ("a_v", "a_d"):
        assert 400 < group.owner(key).ask("TTL", key) <= 500
    # Older ones at the target are replaced, key by key.
    invoke("set", "b", "2", "[3]", *url)
    done = invoke("migrate", "--yes", "--to", DEEPSTREAM, *url)
    assert (done.status, done.document["copied"], done.document["removed"]) == (0, 1, 1)
    assert group.owner("b_d").ask("GET", "b_d") == "[3]"


def test_watch(url: Url, group: ClusterGroup) -> None:
    with running("watch", "r/", *url) as process:
        assert process.stdout
        assert process.stderr
        said = process.stderr.readline().decode()
        assert all(f"{node.host}:{node.port}" in said for node in group.nodes)
        names = NAMES[:30]
        invoke("set", *url, stdin=lines(names))
        heard: dict[str, int] = {}
        while heard.keys() != set(names):
            event = json.loads(process.stdout.readline())
            assert event["event"] == "changed"
            heard[event["name"]] = event["version"]
        assert heard == {name: version for version, name in enumerate(names)}


@pytest.mark.parametrize("is_lost", [False, True], ids=["handed over", "lost"])
def test_watch_continues_with_another_primary(is_lost: bool) -> None:
    """The time in between is reported as a gap, and later changes are shown."""
    with ClusterGroup(BY_AGE[-1], primaries=3, replicas=1, passwords=PASSWORD) as group:
        old = group.primaries()[0]
        new = group.replica_of(old)
        name = next(one for one in NAMES if group.owner(f"{{{one}}}_v") is old)
        seed = next(node for node in group.nodes if node not in (old, new))
        url = "--url", f"redis://:pass%40word@{seed.host}:{seed.port}"
        with running("watch", "r/", *url) as process:
            assert process.stdout
            assert process.stderr
            assert place(old) in process.stderr.readline().decode()
            if is_lost:
                group.kill(old)
            group.failover(new, "TAKEOVER" if is_lost else "")
            events = []
            while not events or (events[-1]["event"], events[-1]["node"]) != (
                "resumed",
                place(new),
            ):
                events.append(json.loads(process.stdout.readline()))
            gaps = {one["node"] for one in events if one["event"] == "gap"}
            assert place(new) in gaps
            assert gaps <= {place(old), place(new)}
            # There is a gap all the time until the new primary is subscribed to.
            open_gaps: set[str] = set()
            for one in events[:-1]:
                (open_gaps.add if one["event"] == "gap" else open_gaps.discard)(one["node"])
                assert open_gaps
            assert invoke("set", name, "7", "[]", *url).status == 0
            while events[-1]["event"] != "changed":
                events.append(json.loads(process.stdout.readline()))
            assert (events[-1]["name"], events[-1]["version"]) == (name, 7)


def test_doctor(url: Url, group: ClusterGroup, tmp_path: Path) -> None:
    url = (url[0], f"{url[1]}?socket_connect_timeout=20")  # this machine may pause
    fill(url)
    done = invoke("doctor", *url)
    found = {one["check"]: one for one in done.document["findings"]}
    assert "connection" not in found, found["connection"]
    assert found["cluster"]["verdict"] == "warning"
    assert "no replicas" in found["cluster"]["found"]
    assert found["role"]["verdict"] == found["halves"]["verdict"] == "ok"
    assert found["key layout"]["found"] == "hashtag, as configured"
    group.owner("{r/1}_v").ask("DEL", "{r/1}_v")
    # A program can't use a configuration that names a single server.
    node = group.nodes[0]
    options = {"host": node.host, "port": node.port, "password": PASSWORD}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"name": "redis", "options": options}))
    done = invoke("doctor", "--config", str(file))
    found = {one["check"]: one for one in done.document["findings"]}
    assert (done.status, found["cluster"]["verdict"]) == (2, "bad")
    assert found["halves"]["verdict"] == "warning"
    invoke("migrate", "--yes", "--to", DEEPSTREAM, *url)
    found = {one["check"]: one for one in invoke("doctor", *url).document["findings"]}
    assert found["key layout"]["verdict"] == "bad"


def test_an_unreachable_primary(url: Url, group: ClusterGroup, tmp_path: Path) -> None:
    fill(url, names=NAMES[:30])
    *_, away = group.nodes
    group.kill(away)
    try:
        done = invoke("doctor", *url)
        assert done.status == 2
        done = invoke("export", str(tmp_path / "all.ndjson"), *url)
        assert done.status == 1
        assert f"{away.host}:{away.port}" in done.err
        assert not (tmp_path / "all.ndjson").exists()
    finally:
        group.start(away)
        group.wait_until_ok()
