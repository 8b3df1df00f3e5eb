"""doctor: each check alone, and well and badly configured servers."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from rich.console import Console

from dscache.admin.cluster_report import ClusterReport, NodeReport
from dscache.admin.doctor import findings as findings
from dscache.admin.doctor import record_checks as of_records
from dscache.admin.doctor import server_checks as of_server
from dscache.admin.doctor import topology_checks as of_topology
from dscache.admin.doctor.findings import BAD, OK, UNKNOWN, WARNING, Checkup, Finding
from dscache.admin.doctor.record_checks import Sample
from dscache.admin.doctor.topology_checks import SentinelReport
from dscache.cli import doctor
from dscache.embedded import EmbeddedServer, ServerBinary, TLSFiles
from dscache.messages import MessageNode
from dscache.pubsub.protocol import Topic
from tests.conftest import BY_AGE
from tests.support.clusters import ClusterGroup
from tests.support.commands import invoke, plain, run_on_terminal
from tests.support.documents import PROJECT, code, table
from tests.support.faults import FaultProxy
from tests.support.sentinels import GROUP, SentinelGroup

DOCUMENT = PROJECT / "docs" / "cli.md"
CHECKS = (
    *(
        "round trip",
        "commands",
        "server",
        "role",
        "tls",
        "login",
        "persistence",
        "memory",
        "connections",
    ),
    *("scripts", "tracking", "rights", "clock", "key layout", "halves", "large records"),
)
# Checks that depend more on the test machine than on the server.
FICKLE = {"round trip", "commands", "clock"}


@pytest.fixture(scope="module")
def restored_server(binary: ServerBinary) -> Iterator[EmbeddedServer]:
    """A server whose settings tests change; each test gets it in its original state."""
    with EmbeddedServer(binary) as started:
        yield started


@pytest.fixture
def client(restored_server: EmbeddedServer) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(restored_server.url, decode_responses=True) as opened:
        opened.flushall()
        yield opened
        opened.replicaof("NO", "ONE")
        opened.config_set("maxmemory", 0)
        opened.config_set("maxmemory-policy", "noeviction")
        opened.config_set("save", "")
        opened.config_resetstat()
        opened.acl_deluser("ada")


def look(*words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the exit status of doctor, and its findings by check."""
    done = invoke("doctor", *words)
    assert done.err == ""
    document = done.document
    assert document["verdict"] == findings.worst(one["verdict"] for one in document["findings"])
    for one in document["findings"]:
        assert (one["advice"] is None) == (one["verdict"] == OK), one
    return done.status, {one.pop("check"): one for one in document["findings"]}


# -- real servers


def test_a_healthy_server(restored_server: EmbeddedServer, client: redis_py.Redis) -> None:
    client.config_set("save", "3600 1")
    client.mset({"a_v": 1, "a_d": "{}", "another": 1})
    status, found = look("--url", restored_server.url)
    assert tuple(found) == CHECKS
    assert {name for name, one in found.items() if one["verdict"] != OK} <= FICKLE
    assert status == (0 if all(one["verdict"] == OK for one in found.values()) else 1)
    assert found["server"]["found"] == restored_server.binary.name.replace("-", " ")
    assert found["persistence"]["found"] == "snapshots (save 3600 1)"
    assert found["halves"]["found"] == "none in a sample of 1 record"
    assert found["key layout"]["found"] == "deepstream, as configured"


def test_a_server_that_evicts(restored_server: EmbeddedServer, client: redis_py.Redis) -> None:
    client.config_set("maxmemory-policy", "allkeys-random")
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 2_000_000)
    for number in range(600):
        client.mset({f"r{number}_v": 1, f"r{number}_d": "x" * 10_000})
    status, found = look("--url", restored_server.url)
    assert status == 2
    assert found["memory"]["verdict"] == BAD
    assert "allkeys-random; " in found["memory"]["found"]
    assert "noeviction" in found["memory"]["advice"]
    assert found["halves"]["verdict"] == WARNING
    assert found["persistence"]["verdict"] == WARNING


def test_large_records_are_found(restored_server: EmbeddedServer, client: redis_py.Redis) -> None:
    client.mset({"a_v": 1, "a_d": "x" * 2048, "{b}_v": 1, "{b}_d": 1, "other": "x" * 10**6})
    client.rpush("list_d", "x" * 10**6)
    _, found = look("--url", restored_server.url)
    assert found["large records"]["verdict"] == OK
    assert (
        found["large records"]["found"] == "the largest in a sample of 2 records has 2 KiB, 'a_d'"
    )
    client.mset({"big_v": 1, "big_d": "x" * 2**20, "large_v": 1, "large_d": "x" * 2**19})
    _, found = look("--url", restored_server.url)
    assert found["large records"]["verdict"] == WARNING
    assert found["large records"]["found"] == (
        "2 of 4 sampled records have 512 KiB or more; the largest has 1,024 KiB, 'big_d'"
    )


def test_sizes_that_may_not_be_measured(
    restored_server: EmbeddedServer, client: redis_py.Redis
) -> None:
    client.mset({"a_v": 1, "a_d": "x"})
    client.acl_setuser("ada", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-strlen"])
    _, found = look("--url", restored_server.url.replace("redis://", "redis://ada:any@"))
    assert found["large records"]["verdict"] == UNKNOWN
    assert found["large records"]["found"].startswith("STRLEN is refused: ")
    assert "+strlen" in found["large records"]["advice"]


@pytest.mark.parametrize(
    ("policy", "verdict"), [("allkeys-lrm", BAD), ("volatile-lrm", WARNING), ("noeviction", OK)]
)
def test_policies_of_newer_servers(policy: str, verdict: str) -> None:
    """Redis 8.6 evicts by the last change, too."""
    memory = {"used_memory": "1000", "maxmemory": "1000000"}
    found = of_server.check_memory(memory, {}, policy)
    assert found is not None
    assert found.verdict == verdict
    assert policy in found.found


def test_halves_are_found_by_either_key(
    restored_server: EmbeddedServer, client: redis_py.Redis
) -> None:
    client.mset({"a_v": 1, "b_d": "{}", "{c}_v": 1, "{c}_d": "{}", "d_v": 1, "d_d": 1})
    _, found = look("--url", restored_server.url)
    assert found["halves"]["found"].startswith("2 of 4 sampled records have only one key")


@pytest.mark.parametrize(
    ("keys", "words", "verdict"),
    [
        (("a",), (), OK),
        (("{a}",), ("--layout", "hashtag"), OK),
        (("{a}",), (), BAD),
        (("a",), ("--layout", "hashtag"), BAD),
        (("a", "{b}"), (), WARNING),
        (("{room}/a",), (), OK),
        ((), (), OK),
    ],
)
def test_the_layout_is_detected(
    keys: tuple[str, ...],
    words: tuple[str, ...],
    verdict: str,
    restored_server: EmbeddedServer,
    client: redis_py.Redis,
) -> None:
    for key in keys:
        client.mset({f"{key}_v": 1, f"{key}_d": "{}"})
    _, found = look("--url", restored_server.url, *words)
    assert found["key layout"]["verdict"] == verdict
    assert (verdict == OK) or "dscache migrate --to" in found["key layout"]["advice"]


def test_a_replica(restored_server: EmbeddedServer, client: redis_py.Redis) -> None:
    client.replicaof("127.0.0.1", "1")
    status, found = look("--url", restored_server.url)
    assert (status, found["role"]["verdict"]) == (2, BAD)
    assert found["role"]["found"] == "replica of 127.0.0.1:1"


def test_a_forbidden_check_is_unknown(
    restored_server: EmbeddedServer, client: redis_py.Redis
) -> None:
    client.execute_command(
        *("ACL", "SETUSER", "ada", "on", ">secret", "~*", "+@all"),
        *("-config", "-info", "-time", "-eval", "-client|tracking"),
    )
    client.mset({"a_v": 1, "a_d": "{}"})
    status, found = look("--url", restored_server.url.replace("://", "://ada:secret@"))
    unknown = {name for name, one in found.items() if one["verdict"] == UNKNOWN}
    assert unknown == {"role", "persistence", "memory", "clock"}
    assert found["scripts"]["verdict"] == WARNING
    assert found["tracking"]["verdict"] == WARNING
    assert found["tracking"]["found"].startswith("NOPERM ")
    assert "connections" not in found
    assert status == 1
    assert found["login"]["found"] == "as 'ada', with a password"
    client.execute_command("ACL", "SETUSER", "ada", "+info", "+time", "+eval", "+client")
    _, found = look("--url", restored_server.url.replace("://", "://ada:secret@"))
    assert found["persistence"]["verdict"] == UNKNOWN
    assert found["memory"]["verdict"] == OK


def test_an_unreachable_server_and_a_wrong_password(
    restored_server: EmbeddedServer, client: redis_py.Redis
) -> None:
    status, found = look("--url", "127.0.0.1:1")
    assert (status, list(found)) == (2, ["connection"])
    assert found["connection"]["found"].endswith("Connection refused")
    status, found = look("--url", restored_server.url.replace("://", "://eve:hidden-one@"))
    assert (status, list(found)) == (2, ["connection"])
    assert found["connection"]["found"].startswith("WRONGPASS ")
    assert "hidden-one" not in str(found)


def test_a_terminal(restored_server: EmbeddedServer, client: redis_py.Redis) -> None:
    status, written = run_on_terminal("doctor", "--url", restored_server.url, columns=60)
    assert status == 1  # as nothing is kept
    assert "\x1b[33mwarning" in written
    lines = plain(written).splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[0].split()[:2] == ["verdict", "check"]
    assert "1 warning" in lines[-1] or "warnings" in lines[-1]


async def test_tls(tls_proxy: FaultProxy, certificates: TLSFiles) -> None:
    async def found_by(*words: str) -> tuple[int, dict[str, dict[str, Any]]]:
        return await asyncio.to_thread(look, *words)

    _, found = await found_by("--url", f"{tls_proxy.url}?ssl_ca_certs={certificates.authority}")
    assert found["tls"] == {"verdict": OK, "found": "TLSv1.3", "advice": None}
    _, found = await found_by("--url", f"{tls_proxy.url}?ssl_cert_reqs=none")
    assert found["tls"]["verdict"] == WARNING
    status, found = await found_by("--url", tls_proxy.url)
    assert status == 2
    assert "certificate" in found["connection"]["found"]


def test_sentinels(tmp_path: Path) -> None:
    with SentinelGroup(BY_AGE[0], replicas=1) as group:
        file = tmp_path / "config.json"
        file.write_text(json.dumps({"name": "redis", "options": group.options}))
        _, found = look("--config", str(file))
        assert tuple(found) == ("sentinels", *CHECKS)
        assert found["sentinels"]["found"] == (
            f"3 of 3 answer, the primary is 127.0.0.1:{group.primary().port}, 1 replica"
        )
        nodes: Any = group.options["sentinels"]
        options = {**group.options, "sentinels": [{"host": "127.0.0.1", "port": 1}, *nodes]}
        file.write_text(json.dumps({"name": "redis", "options": options}))
        _, found = look("--config", str(file))
        assert found["sentinels"]["verdict"] == WARNING
        assert "127.0.0.1:1: " in found["sentinels"]["found"]
        options = {**group.options, "name": "others"}
        file.write_text(json.dumps({"name": "redis", "options": options}))
        status, found = look("--config", str(file))
        assert (status, found["sentinels"]["verdict"]) == (2, BAD)
        assert "No such master" in found["sentinels"]["found"]
    assert GROUP


# -- checks


@pytest.mark.parametrize(
    ("times", "verdict", "advice"),
    [
        ([0.2] * 200, OK, ""),
        ([2.0] * 200, WARNING, "gets 500 a second at most"),
        ([0.2] * 190 + [30.0] * 10, WARNING, "one operation in a hundred takes 30 ms"),
        ([0.5], OK, ""),
    ],
)
def test_round_trips(times: list[float], verdict: str, advice: str) -> None:
    found = of_server.check_round_trip(times)
    assert found.verdict == verdict
    assert advice in found.advice


@pytest.mark.parametrize(
    ("found", "verdict", "words"),
    [
        (of_server.check_tls("", verified=False, is_local=False), WARNING, "another machine"),
        (of_server.check_login(None, False, is_local=False), WARNING, "without a password"),
        (of_server.check_commands({}), OK, "none for records yet"),
        (
            of_server.check_commands(
                {
                    "latency_percentiles_usec_mget": "p50=20.031,p99=100.351,p99.9=1003.519",
                    "latency_percentiles_usec_get": "p50=1.003,p99=90000.351",
                }
            ),
            OK,
            "on the server, mget p50 20 µs, p99 100 µs",
        ),
        (
            of_server.check_commands({"latency_percentiles_usec_mset": "p50=9.023,p99=12001.1"}),
            WARNING,
            "mset p50 9 µs, p99 12001 µs",
        ),
        (of_server.check_commands({"latency_percentiles_usec_mset": "p50=x"}), OK, "none for"),
        (of_server.check_server(""), UNKNOWN, "does not report"),
        (of_server.check_server("redis 6.0.20"), BAD, "redis 6.0.20"),
        (of_server.check_server("redis 10.2.0"), OK, "redis 10.2.0"),
        (of_server.check_server("valkey 8.0.0"), OK, "valkey 8.0.0"),
        (of_server.check_role({"role": "master"}, "slave"), WARNING, "primary"),
        (
            of_server.check_role({"role": "slave", "master_link_status": "up"}, "slave"),
            OK,
            "replica of",
        ),
        (of_server.check_role({"role": "slave"}, "slave"), BAD, "without a link"),
        (of_server.check_persistence({"loading": "1"}, ""), BAD, "is loading"),
        (
            of_server.check_persistence({"rdb_last_bgsave_status": "err"}, ""),
            BAD,
            "snapshot failed",
        ),
        (
            of_server.check_persistence({"aof_last_write_status": "err"}, ""),
            BAD,
            "can't be written",
        ),
        (of_server.check_persistence({"aof_enabled": "1"}, ""), OK, "append-only"),
        (of_server.check_persistence({"aof_enabled": "0"}, ""), WARNING, "loses all records"),
        (
            of_server.check_memory({"used_memory": "95", "maxmemory": "100"}, {}, "noeviction"),
            WARNING,
            "95%",
        ),
        (
            of_server.check_memory({"used_memory": "5", "maxmemory": "100"}, {}, "noeviction"),
            OK,
            "5 B used of 100 B",
        ),
        (
            of_server.check_memory({"used_memory": "5", "maxmemory": "100"}, {}, "volatile-lru"),
            WARNING,
            "volatile-lru",
        ),
        (
            of_server.check_memory(
                {"used_memory": "5", "maxmemory": "100"}, {"evicted_keys": "7"}, "volatile-lru"
            ),
            BAD,
            "7 keys were evicted",
        ),
        (
            of_server.check_memory({"used_memory": "5", "maxmemory": "9"}, {}, None),
            UNKNOWN,
            "9 B",
        ),
        (of_server.check_clock(3.25), WARNING, "3.2 s ahead of ours"),
        (of_server.check_clock(-90.0), WARNING, "90.0 s behind ours"),
        (
            of_server.check_connections({"connected_clients": "90"}, "100"),
            WARNING,
            "90 of 100",
        ),
        (
            of_records.check_layout(Sample(deepstream=3), "deepstream", on_cluster=True),
            WARNING,
            "on a cluster",
        ),
        (
            of_records.check_layout(Sample(others=3), "hashtag", on_cluster=True),
            OK,
            "3 other keys",
        ),
    ],
)
def test_checks(found: Finding, verdict: str, words: str) -> None:
    assert found.verdict == verdict
    assert words in found.found
    assert bool(found.advice) == (verdict != OK)


def says(**parse_info: Any) -> SentinelReport:
    return SentinelReport(**{"address": "s:1", "primary": "a:1", "replicas": 1, **parse_info})


@pytest.mark.parametrize(
    ("said", "verdict", "words"),
    [
        ([says()] * 3, OK, "3 of 3 answer, the primary is a:1, 1 replica"),
        ([says()] * 2, WARNING, "of 2 Sentinels configured"),
        ([says(trouble="gone")] * 3, BAD, "s:1: gone"),
        ([says(), says(), says(primary="b:1")], BAD, "they disagree"),
        ([says(flags="master,s_down")] * 3, BAD, "consider it down"),
        ([says(quorum="NOQUORUM 1 usable")] * 3, BAD, "NOQUORUM 1 usable"),
        ([says(replicas=0)] * 3, WARNING, "without replicas"),
    ],
)
def test_checks_of_sentinels(said: list[SentinelReport], verdict: str, words: str) -> None:
    found = of_topology.check_sentinels(said)
    assert (found.verdict, words in found.found) == (verdict, True)


def test_checks_of_clusters() -> None:
    primary = NodeReport(address="a:1", role="primary", slots=((0, 16383),))
    replica = NodeReport(address="a:2", role="replica", primary="a:1")
    judge = of_topology.check_cluster
    assert judge(ClusterReport((primary, replica)), is_configured=True).verdict == OK
    assert judge(ClusterReport((primary,)), is_configured=True).verdict == WARNING
    single = judge(ClusterReport((primary, replica)), is_configured=False)
    assert (single.verdict, "give nodes" in single.advice) == (BAD, True)
    short = NodeReport(address="a:1", role="primary", slots=((0, 5),))
    assert judge(ClusterReport((short, replica)), is_configured=True).verdict == BAD


def test_the_worst_finding_of_several_nodes_is_shown() -> None:
    good, bad = Finding("a", OK, "fine"), Finding("a", BAD, "broken", "mend it")
    assert findings.merged({"x": [good], "y": [good]}) == [good]
    assert findings.merged({"x": [good], "y": [bad]}) == [Finding("a", BAD, "y: broken", "mend it")]


# -- output


def test_server_texts_are_shown_without_control_characters() -> None:
    checkup = Checkup("a:1", (Finding("tracking", WARNING, "\x1b[2J\nboo", "\x07"),))
    written = io.StringIO()
    Console(file=written, width=80).print(doctor.page(checkup))
    assert "\x1b[2J" not in written.getvalue()
    assert "\x07" not in written.getvalue()


def test_every_check_is_documented() -> None:
    documented = [one for row in table(DOCUMENT, "doctor") for one in code(row[0])]
    more = ["hot records", "one-key records", "messages", "server name"]
    checks = ["connection", "cluster", "sentinels", *CHECKS, *more]
    assert [one for one in documented if not one.startswith("--")] == [*checks, *findings.VERDICTS]


def test_records_of_deepstream_1_to_3(
    restored_server: EmbeddedServer, client: redis_py.Redis
) -> None:
    client.mset({"user/1": '{"_v":7,"_d":{}}', "user/2_d": '{"_d":1,"_v":2}'})
    client.mset({"two_v": "1", "two_d": '{"_v":1,"_d":2}'})
    status, found = look("--url", restored_server.url)
    assert status == 2
    assert found["one-key records"]["verdict"] == BAD
    assert found["one-key records"]["found"].startswith("2 records of deepstream 1 to 3")
    assert "dscache migrate --from deepstream3" in found["one-key records"]["advice"]
    assert found["halves"]["found"] == "none in a sample of 1 record"


async def test_a_server_that_closes_may_speak_tls() -> None:
    """The advice names TLS for a server that ends the connection, or never answers."""
    closing = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = closing.sockets[0].getsockname()[1]
    async with closing:
        for scheme, advice in (("redis", "use rediss:// or tls: true"), ("rediss", "use redis://")):
            _, found = await asyncio.to_thread(look, "--url", f"{scheme}://127.0.0.1:{port}")
            assert advice in found["connection"]["advice"]


def deepstream_file(path: Path, server: EmbeddedServer, **sections: Any) -> Path:
    """Write a file with both sections, and return its path."""
    options = {"host": server.host, "port": server.port}
    cluster_node = {"name": "redis", "options": options}
    written = {"cache": {"name": "redis", "options": options}, "clusterNode": cluster_node}
    file = path / "config.json"
    file.write_text(json.dumps(written | sections))
    return file


async def test_a_cluster_node_and_its_listeners(
    restored_server: EmbeddedServer, client: redis_py.Redis, tmp_path: Path
) -> None:
    file = str(deepstream_file(tmp_path, restored_server))
    _, found = await asyncio.to_thread(look, "--config", file)
    assert found["messages"]["verdict"] == WARNING
    assert "no other server listens" in found["messages"]["found"]
    assert "server name" not in found
    async with MessageNode.from_config(file) as node:
        for topic in (Topic.EVENT, Topic.RECORD):
            node.subscribe(topic, print)
        await node.when_ready()
        _, found = await asyncio.to_thread(look, "--config", file)
    assert found["messages"]["verdict"] == OK
    assert found["messages"]["found"].endswith("and 1 other server can be reached")


def test_a_cluster_node_with_a_name_for_all(
    restored_server: EmbeddedServer, client: redis_py.Redis, tmp_path: Path
) -> None:
    file = deepstream_file(tmp_path, restored_server, serverName="one")
    _, found = look("--config", str(file))
    assert found["server name"]["verdict"] == WARNING
    assert "'one'" in found["server name"]["found"]
    assert "server_name=" in found["server name"]["advice"]


def test_a_cluster_node_that_refuses(
    restored_server: EmbeddedServer, client: redis_py.Redis, tmp_path: Path
) -> None:
    client.acl_setuser("ada", True, True, keys=["*"], categories=["+@all"], reset_channels=True)
    options = {"host": restored_server.host, "port": restored_server.port, "username": "ada"}
    client.acl_setuser("ada", True, passwords=["+secret"])
    options["password"] = "secret"
    section = {"name": "redis", "options": options}
    status, found = look(
        "--config", str(deepstream_file(tmp_path, restored_server, clusterNode=section))
    )
    assert status == 2
    assert found["messages"]["verdict"] == BAD
    assert "NOPERM" in found["messages"]["found"]
    assert "ACL SETUSER" in found["messages"]["advice"]


def test_a_cluster_node_that_is_away(
    restored_server: EmbeddedServer, client: redis_py.Redis, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    section = {"name": "redis", "options": {"port": port, "connectTimeout": 500}}
    file = deepstream_file(tmp_path, restored_server, clusterNode=section)
    status, found = look("--config", str(file))
    assert status == 2
    assert found["messages"]["verdict"] == BAD
    assert "refused" in found["messages"]["found"]
    assert found["messages"]["advice"].startswith("start the server")


async def test_a_cluster_node_on_a_cluster(
    group: ClusterGroup, restored_server: EmbeddedServer, client: redis_py.Redis, tmp_path: Path
) -> None:
    section = {"name": "redis", "options": group.options}
    file = str(deepstream_file(tmp_path, restored_server, clusterNode=section))
    async with MessageNode.from_config(file) as node:
        for topic in (Topic.EVENT, Topic.RECORD):
            node.subscribe(topic, print)
        await node.when_ready()
        _, found = await asyncio.to_thread(look, "--config", file)
    assert found["messages"]["found"].endswith("and 1 other server can be reached")
