"""The command line as a user sees it: on a terminal, in a pipe, on healthy and broken clusters."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.main import get_group

from dscache import ConfigError, ProtocolError, cli
from dscache.admin import cluster_survey
from dscache.admin.cache import on_cluster
from dscache.admin.cluster_report import ClusterReport, NodeReport
from dscache.admin.cluster_survey import survey
from dscache.cli import cluster as cluster_command
from dscache.cli import settings
from dscache.cli.app import make_app
from dscache.config import Config, load
from dscache.embedded import EmbeddedServer, ServerBinary, TLSFiles
from dscache.errors import DscacheError
from tests.support.clusters import SLOTS, ClusterGroup, ClusterNode
from tests.support.commands import PATIENCE, invoke, plain, run, run_on_terminal
from tests.support.documents import PROJECT, code, prose, section, table

DOCUMENT = PROJECT / "docs" / "cli.md"
COMMANDS = get_group(make_app()).commands
PASSWORD = "pass@word"
IN_URL = "pass%40word"
# An address without a listener.
NOBODY = "127.0.0.1:1"
COLUMNS = ("node", "role", "its primary", "slots", "count", "round trip", "server", "health")


@pytest.fixture(scope="module")
def shared_group(binary: ServerBinary) -> Iterator[ClusterGroup]:
    """Three primaries with a replica each, all with one password."""
    with ClusterGroup(binary, passwords=PASSWORD) as started:
        yield started


@pytest.fixture(scope="module")
def lonely(binary: ServerBinary) -> Iterator[ClusterGroup]:
    """A cluster of one node."""
    with ClusterGroup(binary, primaries=1, replicas=0) as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def place(node: ClusterNode) -> str:
    return f"{node.host}:{node.port}"


def url_of(node: ClusterNode, password: str = IN_URL) -> str:
    return f"redis://:{password}@{place(node)}"


def config_of(options: dict[str, Any]) -> Config:
    return load({"name": "redis", "options": options})


def look(node: ClusterNode) -> ClusterReport:
    """Return the report of a survey that begins at one node."""
    return asyncio.run(survey(on_cluster(load(url_of(node)))))


def shown(report: ClusterReport, width: int = 130) -> list[str]:
    """Return the lines of a report as shown by a terminal of that width."""
    written = io.StringIO()
    Console(file=written, width=width).print(cluster_command.page(report, width))
    return [line.rstrip() for line in written.getvalue().splitlines()]


def entries(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {node["address"]: node for node in json.loads(done.stdout)["nodes"]}


# -- a healthy cluster


def test_a_pipe_gets_json_of_all_nodes(group: ClusterGroup) -> None:
    done = run("cluster", "--url", url_of(group.replicas()[0]))
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert (document["ok"], document["problems"], document["warnings"]) == (True, [], [])
    assert document["slots"] == {"total": SLOTS, "covered": SLOTS, "uncovered": []}
    primaries = sorted(group.primaries(), key=lambda node: group.slots_of(node)[0])
    order = [one for node in primaries for one in (node, group.replica_of(node))]
    assert [node["address"] for node in document["nodes"]] == [place(node) for node in order]
    for node, entry in zip(order, document["nodes"], strict=True):
        assert entry["round_trip_ms"] > 0
        binary, _, version = node.server.binary.name.partition("-")
        assert entry["server"] == f"{binary} {version}"
        slots = group.slots_of(node)
        is_primary = node in primaries
        assert {key: entry[key] for key in ("id", "role", "primary", "slots", "slot_count")} == {
            "id": node.id,
            "role": "primary" if is_primary else "replica",
            "primary": None if is_primary else place(order[order.index(node) - 1]),
            "slots": [[slots[0], slots[-1]]] if is_primary else [],
            "slot_count": len(slots),
        }
        assert (entry["down"], entry["health"]) == (None, "ok")


def test_a_terminal_gets_a_table_unless_json_is_requested(group: ClusterGroup) -> None:
    url = url_of(group.nodes[0])
    status, written = run_on_terminal("cluster", "--url", url)
    assert status == 0
    assert "\x1b[32mok" in written
    lines = plain(written).splitlines()
    assert re.split("  +", lines[0].rstrip()) == list(COLUMNS)
    for node in group.nodes:
        (line,) = (line for line in lines if line.startswith(place(node)))
        assert line.rstrip().endswith(" ok")
    assert f"6 nodes, 3 primaries, 3 replicas, {SLOTS} of {SLOTS} slots covered" in lines
    assert PASSWORD not in written
    status, written = run_on_terminal("cluster", "--url", url, "--json")
    assert (status, json.loads(written)["ok"]) == (0, True)
    assert "\x1b" not in written


def test_the_table_shows_each_node_and_its_slots(group: ClusterGroup) -> None:
    report = look(group.nodes[0])
    lines = shown(report)
    for node in group.primaries():
        slots = group.slots_of(node)
        ranges, count = re.escape(f"{slots[0]}-{slots[-1]}"), len(slots)
        server = node.server.binary.name.replace("-", " ")
        rest = rf" +[\d.]+ ms +{re.escape(server)} +ok"
        assert any(
            re.fullmatch(rf"{place(node)} +primary +{ranges} +{count}{rest}", one) for one in lines
        )
        replica = group.replica_of(node)
        assert any(
            re.fullmatch(rf"{place(replica)} +replica +{place(node)}{rest}", one) for one in lines
        )


@pytest.mark.parametrize("width", [60, 80, 99])
def test_a_narrow_table_omits_the_least_important_columns(width: int) -> None:
    down = NodeReport(
        address="127.0.0.1:50002",
        role="replica",
        primary="127.0.0.1:50001",
        down="Connection refused",
        health="disconnected",
    )
    up = NodeReport(
        address="127.0.0.1:50001",
        role="primary",
        slots=((0, SLOTS - 1),),
        round_trip_ms=0.5,
        server="redis 7.0.15",
    )
    lines = shown(ClusterReport((up, down)), width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert [line.split()[0] for line in lines if line.startswith("127")] == [
        up.address,
        down.address,
    ]
    if width >= 80:
        assert re.split("  +", lines[0]) == [
            one for one in COLUMNS if one not in ("count", "server")
        ]
        assert re.split("  +", lines[2]) == [up.address, "primary", "0-16383", "0.50 ms", "ok"]
        assert re.split("  +", lines[3]) == [
            *(down.address, "replica", up.address),
            *("down", "disconnected"),
        ]
    told = " ".join(text.split())
    assert f"1 primary, 1 replica, {SLOTS} of {SLOTS} slots covered, redis 7.0.15" in told
    assert f"warning: {down.address}, replica, is down: Connection refused" in told
    # Differing versions may be the reason for looking.
    other = NodeReport(address="a:1", role="primary", round_trip_ms=1.0, server="valkey 9.1.2")
    assert "redis 7.0.15" not in shown(ClusterReport((up, other)), width)[-1]
    assert width < 80 or "server" in shown(ClusterReport((up, other)), width)[0].split()


def test_the_configuration_may_be_a_file(group: ClusterGroup, folder: Path) -> None:
    nodes = [{"host": node.host, "port": node.port} for node in group.nodes]
    options = {"nodes": nodes[:1], "redisOptions": {"password": "${REDIS_PASSWORD}"}}
    written = json.dumps({"cache": {"name": "redis", "options": options}})
    (folder / "cluster.json").write_text(written)
    asked = run("cluster", "--config", "cluster.json", REDIS_PASSWORD=PASSWORD)
    assert (asked.returncode, asked.stderr, len(entries(asked))) == (0, "", 6)
    # Without either option, and with a server not marked as one of a cluster.
    options = {**nodes[1], "password": PASSWORD}
    written = json.dumps({"cache": {"name": "redis", "options": options}})
    (folder / "config.yml").write_text(written)
    default = run("cluster")
    assert (default.returncode, default.stderr) == (0, "")
    assert entries(default).keys() == entries(asked).keys()


def test_warnings_of_the_configuration_are_shown_once(group: ClusterGroup, folder: Path) -> None:
    options = {**group.options, "username": "ada"}
    written = json.dumps({"cache": {"name": "redis", "options": options}})
    (folder / "config.yml").write_text(written)
    done = run("cluster")
    assert done.returncode == 0
    assert re.fullmatch(
        r"dscache: warning: config\.yml: cache\.options\.username has no effect .*\n", done.stderr
    )
    (folder / "config.yml").rename(folder / "\x1b[2J.yml")
    done = run("cluster", "--config", "\x1b[2J.yml")
    assert done.returncode == 0
    assert done.stderr.startswith("dscache: warning:  [2J.yml: cache.options.username has no ")
    done = run("cluster", DSCACHE_URL="a\x1bb:1")
    assert (done.returncode, "\x1b" in done.stderr) == (1, False)


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


@pytest.mark.parametrize("is_killed", [False, True], ids=["whole", "wounded"])
async def test_nothing_stays_open(is_killed: bool, group: ClusterGroup, backend: str) -> None:
    if is_killed:
        killed, paused, _ = group.replicas()
        group.kill(killed)
        group.pause(paused)
    config = config_of({**group.options, "connectTimeout": 300})
    tasks, files = asyncio.all_tasks(), open_files()
    report = await survey(config)
    assert [node.down is None for node in report.nodes].count(False) == 2 * is_killed
    assert asyncio.all_tasks() == tasks
    await asyncio.sleep(0)  # in which transports close their sockets
    assert open_files() == files


# -- problems


def test_a_killed_replica_is_a_warning(group: ClusterGroup) -> None:
    replica = group.replicas()[0]
    group.kill(replica)
    # At once, when the other nodes may still believe it is up, and later.
    for others_know in (False, True):
        done = run("cluster", "--url", url_of(group.primaries()[0]))
        assert (done.returncode, done.stderr) == (0, "")
        document = json.loads(done.stdout)
        assert document["ok"]
        assert document["problems"] == []
        (warning,) = document["warnings"]
        assert warning.startswith(f"{place(replica)}, replica, is down: ")
        entry = entries(done)[place(replica)]
        assert (entry["role"], entry["round_trip_ms"], entry["server"]) == ("replica", None, "")
        assert warning.endswith(entry["down"])
        if others_know:
            assert entry["health"] == "failed"
        else:
            assert entry["health"] in ("unreachable", "disconnected", "suspected", "failed")
            group.wait_until_ok()
    report = look(group.primaries()[0])
    (line,) = (line for line in shown(report, width=200) if line.startswith(place(replica)))
    assert re.search(r" down: .+ failed$", line)
    assert shown(report, width=200)[-1] == f"warning: {warning}"


def test_a_killed_primary_is_a_problem(group: ClusterGroup) -> None:
    primary, *others = group.primaries()
    replica = group.replica_of(primary)
    slots = group.slots_of(primary)
    for node in (replica, primary):
        group.kill(node)
    group._wait(group._unacquainted)
    done = run("cluster", "--url", url_of(others[0]))
    assert (done.returncode, done.stderr) == (1, "")
    document = json.loads(done.stdout)
    assert not document["ok"]
    assert document["slots"]["covered"] == SLOTS  # they still belong to it, and to no other
    lost = entries(done)[place(primary)]
    assert (lost["health"], lost["slot_count"]) == ("failed", len(slots))
    assert document["problems"] == [
        f"{place(primary)}, primary of {len(slots)} slots, is down: {lost['down']}",
        "2 of the primaries refuse to serve, as cluster_state is fail",
    ]
    (warning,) = document["warnings"]
    assert warning.startswith(f"{place(replica)}, replica, is down: ")
    assert {entries(done)[place(node)]["health"] for node in others} == {"cluster down"}
    status, written = run_on_terminal("cluster", "--url", url_of(others[0]))
    assert status == 1
    assert f"problem: {document['problems'][0]}" in plain(written).splitlines()


def test_a_replaced_primary_is_a_warning(group: ClusterGroup) -> None:
    old = group.primaries()[0]
    new = group.replica_of(old)
    group.kill(old)
    group.wait_until_ok()
    report = look(new)
    assert report.problems == []
    (remark,) = report.remarks
    assert remark.startswith(f"{place(old)}, primary, is down: ")
    # Without slots it comes after all nodes that have some.
    assert report.nodes[-1].address == place(old)
    assert report.nodes[-1].slots == ()


def test_a_silent_node_times_out(group: ClusterGroup) -> None:
    replica = group.replicas()[0]
    group.pause(replica)
    report = asyncio.run(survey(config_of({**group.options, "connectTimeout": 300})))
    (silent,) = (node for node in report.nodes if node.address == place(replica))
    assert silent.down == "no answer within 300 ms"
    assert report.problems == []


def test_a_single_node_may_refuse(group: ClusterGroup) -> None:
    refusing = group.replicas()[0]
    nodes: list[dict[str, Any]] = [
        {"host": refusing.host, "port": refusing.port, "password": "wrong-one"},
        {"host": group.nodes[0].host, "port": group.nodes[0].port},
    ]
    if refusing is group.nodes[0]:
        nodes[1] |= {"port": group.nodes[1].port}
    report = asyncio.run(
        survey(config_of({"nodes": nodes, "redisOptions": {"password": PASSWORD}}))
    )
    down = {node.address: node.down for node in report.nodes if node.down is not None}
    assert down.keys() == {place(refusing)}
    assert down[place(refusing)].startswith("WRONGPASS ")
    assert "wrong-one" not in repr(report)


def test_slots_without_a_primary_are_a_problem(lonely: ClusterGroup) -> None:
    (node,) = lonely.nodes
    node.ask("CLUSTER", "DELSLOTS", 0, 7, 8)
    try:
        done = run("cluster", "--url", place(node))
        assert (done.returncode, done.stderr) == (1, "")
        document = json.loads(done.stdout)
        assert document["slots"] == {
            "total": SLOTS,
            "covered": SLOTS - 3,
            "uncovered": [[0, 0], [7, 8]],
        }
        assert document["problems"][-1] == "3 slots have no primary: 0, 7-8"
        assert entries(done)[place(node)]["slots"] == [[1, 6], [9, SLOTS - 1]]
        node.ask("CLUSTER", "FLUSHSLOTS")
        report = asyncio.run(survey(on_cluster(load(place(node)))))
        assert report.problems == [f"{SLOTS} slots have no primary: 0-{SLOTS - 1}"]
        assert [one.address for one in report.nodes] == [place(node)]
    finally:
        node.ask("CLUSTER", "FLUSHSLOTS")
        node.ask("CLUSTER", "ADDSLOTSRANGE", 0, SLOTS - 1)
        lonely.wait_until_ok()


def test_without_cluster_nodes_the_slots_name_the_nodes(lonely: ClusterGroup) -> None:
    (node,) = lonely.nodes
    node.ask("ACL", "SETUSER", "ada", "on", ">secret", "~*", "+@all", "-cluster|nodes", "-info")
    try:
        report = asyncio.run(survey(on_cluster(load(f"redis://ada:secret@{place(node)}"))))
    finally:
        node.ask("ACL", "DELUSER", "ada")
    (only,) = report.nodes
    assert (only.address, only.id, only.role, only.primary) == (place(node), "", "primary", None)
    assert (only.slots, only.down, only.health) == (((0, SLOTS - 1),), None, "ok")


# -- errors that end it


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """Return the single line of an error of dscache."""
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("dscache: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("dscache: ").rstrip()


def test_a_wrong_password(group: ClusterGroup) -> None:
    said = failure(run("cluster", "--url", url_of(group.nodes[0], "wrong-one")))
    assert said.startswith("WRONGPASS ")
    where = place(group.nodes[0])
    assert said.endswith(f"(connect at {where}; check username and password)")
    assert "wrong-one" not in said
    said = failure(run("cluster", "--url", f"redis://{place(group.nodes[0])}"))
    assert said.startswith("NOAUTH ")


def test_a_single_server_is_no_cluster(binary: ServerBinary) -> None:
    with EmbeddedServer(binary) as server:
        said = failure(run("cluster", "--url", server.url))
        address = f"{server.host}:{server.port}"
        assert said.startswith(f"redis://{address}: {address} is not a cluster node (it says ")
        assert said.endswith("; use dscache doctor for a single server")


def test_no_node_is_reachable(folder: Path) -> None:
    options = {"nodes": [{"host": "127.0.0.1", "port": 1}], "connectTimeout": 100}
    (folder / "config.yml").write_text(json.dumps({"name": "redis", "options": options}))
    said = failure(run("cluster"))
    assert said.startswith(f"no node of the cluster {NOBODY} is ready within 100 ms: {NOBODY}: ")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ("--url", "h"),
            "--url: must begin with redis://, rediss:// or unix://, or be like 127.0.0.1:6379",
        ),
        (
            ("--url", "http://h:1"),
            "--url: must begin with redis://, rediss:// or unix://, not",
        ),
        (("--url", f"{NOBODY}?"), "--url: must begin with redis://, rediss:// or unix://"),
        (("--url", f"redis://{NOBODY}/3"), f"redis://{NOBODY}/3: a cluster has database 0 alone"),
        (("--url", "unix:///s"), "unix:///s: a cluster has no socket; name one of its nodes"),
        (("--config", "none.yml"), "none.yml: there is no file none.yml"),
    ],
)
def test_mistakes_in_the_configuration(
    words: Sequence[str], error: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["dscache", "cluster", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    # Python prints it and ends with status 1.
    said = ended.value.code
    assert isinstance(said, str)
    assert said.startswith(f"dscache: {error}")
    assert "secret" not in said


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("cluster", "--url", NOBODY, "--config", "c.yml"), "give only one of them"),
        (("cluster", "--ulr", NOBODY), "No such option: --ulr"),
        (("cluster", "--url", "c.yml"), "--url: a file is the value of --config"),
        (
            ("cluster", "--config", "redis://:secret@h"),
            "a URL or host:port is the value of --url",
        ),
        (("cluster", "--config", "all.ndjson"), "a file ending in .yml, .yaml or .json;"),
        (("clutser",), "No such command 'clutser'"),
        (("redis://:secret@h",), "No such command 'redis://***@h'"),
        (("doctor", "redis://:secret@h"), "(redis://***@h)"),
        (("get", "--layout", "rediss://:secret@h"), "'rediss://***@h' is not one of"),
        (("ls", "\udcff"), "'PREFIX': it is not UTF-8"),
        (("export", "all.ndjson", "--prefix", "\udcff"), "'--prefix': it is not UTF-8"),
        (("migrate", "--to", "hashtag", "--dry-run", "--prefix", "\udcff"), "it is not UTF-8"),
        (("--url", NOBODY, "get", "a"), "--url; an option of a command follows its name"),
    ],
)
def test_a_wrong_command_line(words: Sequence[str], error: str, folder: Path) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert error in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


def test_without_a_command_there_is_help(folder: Path) -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert lines[0].startswith("Usage: ")
    assert "Commands:" in lines


def test_a_name_with_an_at_sign_is_no_login(folder: Path) -> None:
    done = run("get", "--config", "redis/cache@prod.yml", "a")
    assert "redis/cache@prod.yml" in done.stderr


def test_a_wrong_command_line_on_a_terminal() -> None:
    status, written = run_on_terminal("cluster", "--url", NOBODY, "--config", "c.yml")
    assert status == 2
    assert "give only one of them" in plain(written)
    status, written = run_on_terminal("export", "away\x1b]0;t\x07/a.ndjson")
    assert status == 2
    assert "there is no folder away ]0;t" in plain(written)


# -- the Redis to use


@pytest.fixture
def without_variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (settings.OWN_VARIABLE, settings.COMMON_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("files", "variables", "address", "said"),
    [
        ((), {}, "localhost:6379", "without --url, --config, DSCACHE_URL, REDIS_URL, config.yml"),
        ((), {"REDIS_URL": "redis://:secret@r:1"}, "r:1", "as REDIS_URL says"),
        ((), {"REDIS_URL": "redis://:secret@r/3"}, "r:6379", "database 3, as REDIS_URL says"),
        ((), {"REDIS_URL": "redis://r:1/0"}, "r:1", "as REDIS_URL says"),
        ((), {"REDIS_URL": "redis://r:1", "DSCACHE_URL": "d:2"}, "d:2", "as DSCACHE_URL says"),
        ((), {"REDIS_URL": "redis://r:1", "DSCACHE_URL": ""}, "r:1", "as REDIS_URL says"),
        (("conf/config.yml",), {"REDIS_URL": "redis://r:1"}, "conf.config.yml:6", ""),
        (("conf/config.yml", "config.yml"), {}, "config.yml:6", ""),
        (("config.yml",), {"DSCACHE_URL": "d:2"}, "d:2", "as DSCACHE_URL says"),
    ],
)
def test_the_default_redis(
    files: Sequence[str],
    variables: dict[str, str],
    address: str,
    said: str,
    folder: Path,
    without_variables: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(
            f"name: redis\noptions: {{host: {name.replace('/', '.')}, port: 6}}\n"
        )
    for name, value in variables.items():
        without_variables.setenv(name, value)
    assert settings.load(None, None).address == address
    told = capsys.readouterr().err
    lines = told.splitlines()
    assert len(lines) == bool(said)
    assert all(line.startswith(f"dscache: using {address}, {said}") for line in lines)
    assert "secret" not in told


def test_a_variable_that_is_no_url_is_named(
    folder: Path, without_variables: pytest.MonkeyPatch
) -> None:
    without_variables.setenv("DSCACHE_URL", "redis//h")
    with pytest.raises(ConfigError, match=r"^DSCACHE_URL: must begin with redis://"):
        settings.load(None, None)
    without_variables.setenv("DSCACHE_URL", "redis://h/three")
    with pytest.raises(ConfigError, match=r"^DSCACHE_URL: the path must be the number of a data"):
        settings.load(None, None)


@pytest.mark.parametrize("words", [("-h",), ("get", "-h"), ("ls", "-h")])
def test_the_short_option_of_help(words: Sequence[str]) -> None:
    assert invoke(*words) == invoke(*words[:-1], "--help")


def test_completion_is_offered() -> None:
    assert "--install-completion" in invoke("--help").out


@pytest.mark.parametrize(
    ("typed", "offered"), [("dscache mi", ["migrate"]), ("dscache export --re", ["--restart"])]
)
def test_completion_is_installed_and_works(typed: str, offered: list[str], tmp_path: Path) -> None:
    """By the name of the command, which is the one that a shell completes."""
    command = tmp_path / "dscache"
    command.write_text("import sys\nfrom dscache.cli import main\nsys.exit(main())\n")
    # typer looks for a shell among the parents of a process, and tests may have none.
    undetected = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}

    def started(*words: str, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, str(command), *words],
            env={**os.environ, "HOME": str(tmp_path), **undetected, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        return done.stdout

    assert "installed" in started("--install-completion", "bash")
    (script,) = (tmp_path / ".bash_completions").iterdir()
    assert str(script) in (tmp_path / ".bashrc").read_text()
    assert "complete -o default -F _dscache_completion dscache" in script.read_text()
    # As the installed function does.
    last = str(typed.count(" "))
    words = {"COMP_WORDS": typed, "COMP_CWORD": last, "_DSCACHE_COMPLETE": "complete_bash"}
    assert started(**words).split() == offered


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({"name": "memory"}, "mapping: the cache is inside its process"),
        (
            {"name": "redis", "options": {"sentinels": [{}], "name": "g"}},
            "mapping: a cluster has no Sentinels",
        ),
    ],
)
def test_invalid_nodes(entry: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(error)}"):
        on_cluster(load(entry))


def test_a_url_gives_a_node_and_the_options_of_all(certificates: TLSFiles) -> None:
    url = (
        f"rediss://ada:secret@h:7000?ssl_ca_certs={certificates.authority}"
        "&client_name=me&socket_connect_timeout=0.5"
    )
    one = load(url)
    options = on_cluster(one).options
    assert [node.address for node in options.nodes or ()] == ["h:7000"]
    for host in ("h", "another"):
        node = options.for_node(host, 7000)
        for name in ("username", "password", "tls", "connection_name", "connect_timeout"):
            assert getattr(node, name) == getattr(one.options, name), name
    nodes = config_of({"nodes": [{"host": "h"}]})
    assert on_cluster(nodes) is nodes


# -- installation


BLOCKED = """\
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from dscache.cli import main
main()
"""


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_the_error_says_what_to_install(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED, package],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert failure(done) == (
        f"the command line needs {package}; install it with: pip install 'dscache[cli]'"
    )


def test_other_import_errors_are_not_a_missing_extra() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, "statistics"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1
    # Python 3.15 says it in other words.
    assert "\nModuleNotFoundError: " in done.stderr
    assert "'statistics'" in done.stderr.splitlines()[-1]


def test_the_package_names_its_command() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (name, value), *others = project["scripts"].items()
    assert (name, others) == ("dscache", [])
    main = EntryPoint(name, value, "console_scripts").load()
    assert main.__module__ == "dscache.cli"
    needed = {re.split("[<>=]", one)[0] for one in project["optional-dependencies"]["cli"]}
    assert needed == {"typer", "rich"}


@pytest.mark.parametrize("name", ["", *sorted(COMMANDS)])
def test_help(name: str) -> None:
    done = invoke(*([name] if name else []), "--help")
    assert (done.status, done.err) == (0, "")
    assert "│" not in done.out  # no frames in a pipe
    wanted = {"--config FILE", "--url URL", "--json"} if name else set(COMMANDS)
    for one in wanted:
        assert one in done.out


def test_a_whole_sentence_describes_each_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = invoke("--help").out.partition("\nCommands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


# The words without which a command would use a Redis; the others read names, or need nothing.
INCOMPLETE = {
    "set": (("a",), "a name needs a version and data"),
    "edit": ((), "NAME"),
    "diff": ((), "OTHER"),
    "export": ((), "FILE"),
    "import": ((), "FILE"),
    "migrate": ((), "--to"),
    "get": (("--watch",), "--watch needs the names as arguments"),
}
WITHOUT_ARGUMENTS = {"bench", "cluster", "delete", "doctor", "head", "ls", "top", "watch"}


def test_the_arguments_of_every_command_are_tested() -> None:
    assert {*INCOMPLETE} | WITHOUT_ARGUMENTS == set(COMMANDS)


@pytest.mark.parametrize("name", INCOMPLETE)
def test_a_missing_argument_is_named(name: str) -> None:
    words, missing = INCOMPLETE[name]
    done = invoke(name, *words, "--url", NOBODY)
    assert (done.status, done.out) == (2, "")
    told = " ".join(done.err.split())
    assert f"dscache {name} " in told.partition(" Try ")[0]
    assert missing in told.partition(" Error: ")[2]


@pytest.mark.parametrize("columns", [60, 130])
def test_help_on_a_terminal(columns: int) -> None:
    for words in (("--help",), ("export", "--help")):
        status, written = run_on_terminal(*words, columns=columns)
        assert status == 0
        assert "Options" in plain(written)
        assert max(map(len, plain(written).splitlines())) <= columns


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert re.fullmatch(
        r"dscache [\d.]+\S*, (fast|pure) core( with its own reader)?, Python [\d.]+\S*, in .+",
        first,
    )
    assert first.endswith(f"in {PROJECT / 'dscache'}")
    assert "hiredis " in second
    assert f"redis {metadata.version('redis')}" in second


def test_version_names_the_own_reader() -> None:
    code = (
        "import sys; sys._is_gil_enabled = lambda: False; sys.argv = ['dscache', '--version']; "
        "from dscache.cli import main; main()"
    )
    environ = {**os.environ, "DSCACHE_BACKEND": "fast"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert ", fast core with its own reader, Python " in done.stdout.splitlines()[0]


def test_version_needs_no_extra() -> None:
    code = (
        "import sys; sys.modules['typer'] = None; sys.argv = ['dscache', '--version']; "
        "from dscache.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (run("--version").stdout, "")


def test_without_a_command_the_help_is_shown() -> None:
    done = run()
    assert done.returncode in (0, 2)  # versions of typer differ
    assert "Show the nodes of a cluster" in done.stdout + done.stderr


# -- nodes' replies


ASKED = ("10.0.0.9", 7000)
TAIL = "0 1600000000000 1 connected"


def members(text: str, slots: Sequence[Any] = (), **options: Any) -> dict[str, Any]:
    """Return the addresses in a reply to CLUSTER NODES, by node id."""
    configured = config_of({"nodes": [{"host": "h"}], **options}).options
    lines = cluster_survey._parse_nodes(text.encode())
    found = cluster_survey._members(lines, slots, ASKED, configured)
    return {member.report.id: member for member in found}


@pytest.mark.parametrize(
    ("line", "address"),
    [
        (f"a 10.0.0.1:7000@17000 master - {TAIL}", "10.0.0.1:7000"),
        (f"a 10.0.0.1:7000 master - {TAIL}", "10.0.0.1:7000"),
        (f"a 10.0.0.1:7000@17000,,tls-port=0,shard-id=1 master - {TAIL}", "10.0.0.1:7000"),
        (f"a 10.0.0.1:7000@17000,shard-id=1 master - {TAIL}", "10.0.0.1:7000"),
        (f"a 10.0.0.1:7000@17000,node.example master - {TAIL}", "10.0.0.1:7000"),
        (f"a ::1:7000@17000 master - {TAIL}", "[::1]:7000"),
        (f"a :7000@17000 myself,master - {TAIL}", "10.0.0.9:7000"),
        (f"a :0@0 master,noaddr - {TAIL}", None),
        (f"a 10.0.0.1:7000@17000 master,noaddr - {TAIL}", None),
    ],
)
def test_the_address_of_a_node(line: str, address: str | None) -> None:
    member = members(line)["a"]
    assert (member.place is None) == (address is None)
    assert member.report.address == (address or "a")
    assert member.report.role == "primary"


def test_the_address_of_a_node_by_the_slots_and_the_nat_map() -> None:
    a, b, c, d, e, f = (letter * 40 for letter in "abcdef")
    lines = "\n".join(
        [
            f"{a} 10.0.0.1:7000@17000,one.example master - {TAIL} 0-5 [7->-b]",
            f"{b} 10.0.0.2:7000@17000,two.example master,fail - {TAIL} 8 10-12",
            f"{c} 10.0.0.3:7000@17000,three.example slave {a} {TAIL}",
            f"{d} 10.0.0.4:7000@17000 handshake - {TAIL}",
            f"{e} 10.0.0.5:7000@17000 slave {f} {TAIL}",
        ]
    )
    slots = [
        [0, 5, [b"one.example", 7000, a.encode(), {}]],
        [8, 8, [b"two.example", 7000, b.encode(), {}]],
    ]
    nat = {"two.example:7000": {"host": "127.0.0.1", "port": 7002}}
    found = members(lines, slots, natMap=nat)
    assert {name: one.place for name, one in found.items()} == {
        a: ("one.example", 7000),
        b: ("127.0.0.1", 7002),
        # Not among the slots, but named in the same way.
        c: ("three.example", 7000),
        e: ("10.0.0.5", 7000),
    }
    assert list(found) == [a, c, b, e]
    assert found[a].report.slots == ((0, 5),)
    assert found[b].report.slots == ((8, 8), (10, 12))
    assert found[c].report.primary == "one.example:7000"
    assert found[e].report.primary is None


@pytest.mark.parametrize(
    ("flags", "link", "health"),
    [
        ("master", "connected", "ok"),
        ("master,fail?", "disconnected", "suspected"),
        ("master,fail", "disconnected", "failed"),
        ("master", "disconnected", "disconnected"),
        ("myself,master", "disconnected", "ok"),
    ],
)
def test_the_state_of_a_node_reported_by_others(flags: str, link: str, health: str) -> None:
    line = f"a 10.0.0.1:7000@17000 {flags} - 0 0 1 {link}"
    assert members(line)["a"].report.health == health


@pytest.mark.parametrize(
    ("cluster", "replication", "health"),
    [
        ({"cluster_state": "ok"}, {"master_link_status": "up"}, "ok"),
        ({}, {}, "ok"),
        ({"cluster_state": "ok"}, {"master_link_status": "down"}, "not replicating"),
        (
            {"cluster_state": "fail"},
            {"master_link_status": "down", "master_sync_in_progress": "1"},
            "synchronizing",
        ),
        ({"cluster_state": "fail"}, {"master_link_status": "up"}, "cluster down"),
    ],
)
def test_the_state_a_replica_reports_for_itself(
    cluster: dict[str, str], replication: dict[str, str], health: str
) -> None:
    well = NodeReport(address="a", role="replica")
    assert cluster_survey._health(well, cluster, replication) == health
    failed = NodeReport(address="a", role="replica", health="failed")
    assert cluster_survey._health(failed, cluster, replication) == "failed"


@pytest.mark.parametrize("reply", [None, 1, b"a", b"a :x@1 master - 0 0 1 connected", [b"a"]])
def test_invalid_replies_to_cluster_nodes(reply: Any) -> None:
    with pytest.raises(ProtocolError, match=r"^unexpected reply to CLUSTER NODES: "):
        cluster_survey._parse_nodes(reply)


def test_many_ranges_are_shortened_and_control_characters_removed() -> None:
    ranges = tuple((first, first) for first in range(0, 20, 2))
    report = ClusterReport(
        (NodeReport(address="a:1", role="primary", slots=ranges, down="\x1b[2J\nboo"),)
    )
    text = "\n".join(shown(report))
    assert "0, 2, 4, 6, 8, 10 and 4 more" in text
    assert "\x1b[2J" not in text
    assert report.problems[0] == "a:1, primary of 10 slots, is down: \x1b[2J\nboo"
    assert report.nodes[0].slot_count == 10


def test_a_command_is_imported_alone() -> None:
    # The imports of all take longer than most commands run.
    code = """
import sys
from dscache.cli.app import make_app
make_app(["get", "doctor"])
print(*sorted(name for name in sys.modules if name.startswith(("dscache.admin.doctor", "redis"))))
make_app(["--version"])
print("dscache.admin.doctor" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.stdout, done.stderr) == ("\nTrue\n", "")


def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise DscacheError("ERR \x1b[2J\nboo")

    monkeypatch.setattr("dscache.cli.app.make_app", lambda words: fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == "dscache: ERR  [2J boo"


# -- documentation


SHARED = ("--config", "--url", "--layout", "--json")
# The section for options that no other command has.
HEADINGS = {
    "get": "Records",
    "top": "top",
    "set": "Records",
    "edit": "Records",
    "ls": "ls",
    "diff": "diff",
    "doctor": "doctor",
    "watch": "Options of watch",
    "export": "export and import",
    "import": "export and import",
    "bench": "bench",
    "migrate": "migrate",
}


def test_every_option_is_documented() -> None:
    shared = {code(row[0])[0].split()[0] for row in table(DOCUMENT, "What all commands share")}
    assert shared == set(SHARED)
    documented: dict[str, set[str]] = {}
    given: dict[str, set[str]] = {}
    for name, command in COMMANDS.items():
        options = {
            word for one in command.params if one.param_type_name == "option" for word in one.opts
        }
        missing = {"--layout"} if name in ("cluster", "migrate", "top") else set()
        assert shared - missing <= options, name
        if own := options - shared - {"--help"}:
            given.setdefault(HEADINGS[name], set()).update(own)
    for heading in given:
        tables = re.findall(r"^\| `(--[a-z-]+)", section(DOCUMENT, heading), re.MULTILINE)
        documented[heading] = set(tables)
    assert given == documented


def test_every_command_is_documented() -> None:
    told = {
        name for row in re.findall(r"^\| \[(.+?)\]\(#", prose(DOCUMENT), re.M) for name in code(row)
    }
    assert told == set(COMMANDS)


def test_every_key_is_documented() -> None:
    report = ClusterReport((NodeReport(address="a:1", role="primary"),))
    document = cluster_command.document(report)
    node = document["nodes"][0]
    for heading, keys in (("JSON of cluster", document), ("Nodes in the JSON", node)):
        assert [code(row[0])[0] for row in table(DOCUMENT, heading)] == list(keys)
    described = table(DOCUMENT, "JSON of cluster")[3][1]
    assert set(document["slots"]) <= set(code(described))
