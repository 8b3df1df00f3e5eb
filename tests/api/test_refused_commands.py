"""Servers that refuse commands, to everybody or to this user: each alone, and all together.

What needs none of them works; what does says which command is missing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.admin.doctor.rights import check_rights
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.conftest import BY_AGE, OLDEST_AND_NEWEST, PATIENT
from tests.soak.cluster_rows import CURIOUS, a_name_each
from tests.support.blocking import ThreadedCache
from tests.support.clusters import ClusterGroup
from tests.support.commands import invoke
from tests.support.faults import FakeServer
from tests.support.waiting import PATIENCE
from tests.support.wire import resp

# None of these is needed for records.
DISPENSABLE = ("hello", "client", "info", "config", "script", "evalsha", "ping", "role", "scan")
ALL = "all of them"
USER, PASSWORD = "ada", "s3cret"
CASES = [
    *((BY_AGE[0], missing) for missing in DISPENSABLE),
    *((binary, ALL) for binary in OLDEST_AND_NEWEST),
]

Refuse = Callable[..., Any]


@pytest.fixture(params=["async", "blocking"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def refusing() -> Iterator[Refuse]:
    """A function that starts a server which refuses commands, and returns the URL for clients."""
    started: list[EmbeddedServer] = []

    def start(binary: ServerBinary, way: str, *commands: str) -> str:
        if way == "renamed":
            args = [word for command in commands for word in ("--rename-command", command, "")]
        else:
            rights = [f"-{command}" for command in commands]
            args = ["--user", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all", *rights]
        server = EmbeddedServer(binary, args=args)
        started.append(server)
        server.start()
        login = f"{USER}:{PASSWORD}@" if way == "by ACL" else ""
        return f"redis://{login}127.0.0.1:{server.port}"

    yield start
    for server in started:
        server.close()


@asynccontextmanager
async def opened(kind: str, config: Any, **options: Any) -> AsyncIterator[Any]:
    if isinstance(config, str):
        config = {"url": config}
    config = {"name": "redis", "options": {**config, **PATIENT, **options}}
    async with asyncio.timeout(PATIENCE):
        if kind == "async":
            async with dscache.AsyncCache.from_config(config) as cache:
                yield cache
        else:
            async with ThreadedCache(dscache.Cache.from_config(config), 2) as threaded:
                yield threaded


async def use(cache: Any, names: list[str]) -> None:
    """Do every operation that needs no further right, and check its results."""
    a, b = names[:2]
    await cache.set(a, 1, {"a": 1})
    await cache.set_bulk({name: (2, name) for name in names})
    found = await cache.get_bulk(names)
    assert {name: record.data for name, record in found.items()} == {n: n for n in names}
    assert await cache.head_bulk(names) == dict.fromkeys(names, 2)
    assert (await cache.get(a)).version == 2
    assert await cache.set(a, 1, "old", if_newer=True) is False
    assert await cache.set(a, 3, "new", if_newer=True) is True
    assert await cache.set(b, 3, "mine", if_version=2) is True
    assert await cache.set(b, 4, "theirs", if_version=2) is False
    # Those under way together are refused together. Threads would write one record in any order.
    at_once = 5 if isinstance(cache, dscache.AsyncCache) else 1
    for first in range(10, 15, at_once):
        versions = range(first, first + at_once)
        done = await asyncio.gather(
            *(cache.set(name, version, 1, if_newer=True) for version in versions for name in names)
        )
        assert done == [True] * len(done)
    assert await cache.head_bulk(names) == dict.fromkeys(names, 14)
    assert not await cache.set_bulk({name: (15, name) for name in names}, ttl=1000)
    assert (await cache.update(a, lambda data: [data, "updated"])).data == [a, "updated"]
    assert (await cache.fetch("loaded", lambda name: {"of": name}, ttl=100)).data == {
        "of": "loaded"
    }
    assert await cache.delete(a) is True
    assert await cache.delete(b, if_version=15) is True
    assert await cache.get(a) is None


@pytest.mark.parametrize("way", ["renamed", "by ACL"])
@pytest.mark.parametrize(
    ("binary", "missing"), CASES, ids=lambda one: getattr(one, "name", str(one))
)
async def test_records_without_a_command(
    refusing: Refuse, binary: ServerBinary, way: str, missing: str, kind: str, backend: str
) -> None:
    commands = DISPENSABLE if missing == ALL else (missing,)
    async with opened(kind, refusing(binary, way, *commands)) as cache:
        await use(cache, [f"user/{number}" for number in range(20)])
        assert cache.is_ready


async def test_records_of_a_cluster_without_a_command(
    group: ClusterGroup, kind: str, backend: str
) -> None:
    """Of CLUSTER, SLOTS is needed, INFO and MYID."""
    refused = ["-cluster|shards", "-cluster|nodes", *(f"-{name}" for name in DISPENSABLE)]
    for node in group.nodes:
        node.ask("ACL", "SETUSER", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all", *refused)
    login = {"username": USER, "password": PASSWORD}
    try:
        async with opened(kind, group.options, redisOptions=login, **CURIOUS) as cache:
            await use(cache, [*a_name_each(group), *(f"user/{number}" for number in range(20))])
    finally:
        for node in group.nodes:
            node.ask("ACL", "DELUSER", USER)


class LoggingOut:
    """A server that ends the login of its connections, and wants another one."""

    def __init__(self) -> None:
        self.is_out = False
        self.lasts = True
        self.logins = 0
        self.writes: list[bytes] = []
        answers: dict[str, Any] = dict.fromkeys(("MGET", "MSET", "EVALSHA", "DEL"), self._serve)
        self.fake = FakeServer({**answers, "HELLO": self._log_in, "CLUSTER": self._tell})

    def _serve(self, command: list[bytes]) -> bytes:
        if self.is_out:
            return b"-NOAUTH Authentication required.\r\n"
        self.writes += [command[0]] if command[0] != b"MGET" else []
        served = {
            b"MGET": b"*2\r\n$1\r\n5\r\n$3\r\n[5]\r\n",
            b"MSET": b"+OK\r\n",
            b"DEL": b":2\r\n",
        }
        return served.get(command[0], b":1\r\n")

    def _log_in(self, command: list[bytes]) -> bytes:
        self.logins += 1
        self.is_out = self.is_out and not self.lasts
        return b"%1\r\n$6\r\nserver\r\n$5\r\nredis\r\n"

    def _tell(self, command: list[bytes]) -> bytes:
        if command[1] == b"SLOTS":
            return resp([[0, 16383, [self.fake.host.encode(), self.fake.port]]])
        return b"-ERR no\r\n"


async def test_a_login_that_the_server_has_ended_is_repeated(kind: str, backend: str) -> None:
    server = LoggingOut()
    async with server.fake as fake, opened(kind, fake.url, password=PASSWORD) as cache:
        for operation in (
            lambda: cache.get("a"),
            lambda: cache.set("a", 6, [6]),
            lambda: cache.set("a", 6, [6], if_newer=True),
            lambda: cache.delete("a"),
        ):
            before = server.logins
            server.is_out = True
            assert await operation()
            assert server.logins > before
        assert server.writes == [b"MSET", b"EVALSHA", b"DEL"]


async def test_a_login_that_does_not_help_is_not_repeated_for_ever(kind: str, backend: str) -> None:
    server = LoggingOut()
    server.lasts = False
    async with server.fake as fake, opened(kind, fake.url, password=PASSWORD) as cache:
        server.is_out = True
        with pytest.raises(dscache.ReplyError, match=r"NOAUTH .* set password"):
            await cache.set("a", 6, [6])
        assert server.writes == []


async def test_a_node_that_has_ended_the_login_is_connected_to_again(
    kind: str, backend: str
) -> None:
    server = LoggingOut()
    async with server.fake as fake:
        nodes = {"nodes": [{"host": fake.host, "port": fake.port, "password": PASSWORD}]}
        async with opened(kind, nodes) as cache:
            assert (await cache.get("a")).version == 5
            for bulk in (False, True):
                server.is_out = True
                names = ["a", "b"] if bulk else ["a"]
                with pytest.raises(dscache.ReplyError, match="NOAUTH"):
                    await cache.set_bulk(dict.fromkeys(names, (1, 1)))
                # Each connection of a Cache meets one refusal.
                for _ in range(2):
                    await asyncio.gather(cache.get("a"), return_exceptions=True)
                assert (await cache.get("a")).version == 5
                assert not server.is_out


@pytest.mark.parametrize("way", ["renamed", "by ACL"])
async def test_the_missing_command_is_named(
    refusing: Refuse, way: str, kind: str, backend: str
) -> None:
    """And, where Redis says so, the user who lacks it."""
    url = refusing(BY_AGE[0], way, "eval", "evalsha", "client", "select", "scan", "mget")
    async with opened(kind, url) as cache:
        await cache.set("a", 1, {})
        for attempt, command in (
            (lambda: cache.set("a", 2, {}, if_newer=True), "eval"),
            (lambda: cache.get_bulk(["a", "b"]), "mget"),
            (lambda: names_of(kind, cache), "scan"),
        ):
            with pytest.raises(dscache.ReplyError) as caught:
                await attempt()
            told = str(caught.value).lower()
            assert f"'{command}'" in told
            assert way == "renamed" or f"user {USER} " in told
    for options, command in (({"db": 1}, "select"), ({"nearCache": True}, "client")):
        with pytest.raises(dscache.DscacheError) as refused:
            async with opened(kind, url, **options):
                pass
        assert command in str(refused.value).lower()


LONG_NAME = "0e6f3b2c-7c2d-4c5e-9a53-3f2d94a1c0de@records.example.com"


async def test_scripts_of_a_user_with_a_long_name(
    refusing: Refuse, kind: str, backend: str
) -> None:
    """Services name their users by ids or by addresses."""
    url = refusing(BY_AGE[0], "by ACL")
    with redis_py.Redis.from_url(url) as admin:
        rights = ("on", f">{PASSWORD}", "~*", "+@all", "-evalsha", "-mget")
        admin.execute_command("ACL", "SETUSER", LONG_NAME, *rights)
    async with opened(kind, url, username=LONG_NAME, password=PASSWORD) as cache:
        assert await cache.set("a", 1, {}, if_newer=True) is True
    login = url.replace(USER, LONG_NAME.replace("@", "%40"))
    done = await asyncio.to_thread(invoke, "doctor", "--url", login)
    found = {one["check"]: one for one in done.document["findings"]}
    assert "mget, evalsha" in found["rights"]["found"]


# What a script asks before it writes, and what it writes with.
OF_SCRIPTS = ("get", "mget", "strlen", "exists", "time", "pexpiretime", "set", "mset")
GUARDS: list[dict[str, Any]] = [
    {"if_newer": True},
    {"if_newer": True, "ttl": 100},
    {"if_version": 4},
    {"if_version": 4, "ttl": dscache.KEEP},
]


@pytest.mark.parametrize("way", ["renamed", "by ACL"])
@pytest.mark.parametrize("missing", OF_SCRIPTS)
async def test_a_script_without_a_command_overwrites_no_newer_record(
    refusing: Refuse, way: str, missing: str, kind: str, backend: str
) -> None:
    url = refusing(BY_AGE[0], way, missing)
    async with opened(kind, url) as cache:
        with redis_py.Redis.from_url(url, username=None, password=None) as admin:
            for key, value in (("a_v", "5"), ("a_d", "[5]")):
                admin.execute_command("GETSET", key, value)
            for guard in GUARDS:
                (done,) = await asyncio.gather(
                    cache.set("a", 3, "old", **guard), return_exceptions=True
                )
                assert done is False or re.search(f"'{missing}'|Unknown Redis command", str(done))
                assert admin.getrange("a_v", 0, -1) == b"5"
                assert admin.getrange("a_d", 0, -1) == b"[5]"


@pytest.mark.parametrize("binary", OLDEST_AND_NEWEST, ids=lambda one: one.name)
@pytest.mark.parametrize(
    ("missing", "how"),
    [
        ("strlen", {"if_newer": True}),
        ("pexpiretime", {"if_version": 5, "ttl": dscache.KEEP}),
        ("time", {"if_version": 5, "ttl": 100}),
    ],
    ids=["strlen", "pexpiretime", "time"],
)
def test_an_unknown_command_of_a_script_is_named(
    refusing: Refuse, binary: ServerBinary, missing: str, how: dict[str, Any]
) -> None:
    url = refusing(binary, "renamed", missing)
    with dscache.Cache.from_config(url) as cache:
        cache.set("a", 5, [5])
        with pytest.raises(dscache.ReplyError, match=f"called from script: {missing.upper()} "):
            cache.set("a", 3, "old", **how)
        assert cache.head("a") == 5


@pytest.mark.parametrize("way", ["renamed", "by ACL"])
@pytest.mark.parametrize("missing", ["pexpiretime", "time", "exists", "mset"])
async def test_a_refusal_within_a_script_is_of_its_record_alone(
    refusing: Refuse, way: str, missing: str, backend: str
) -> None:
    """A write that was done isn't reported as refused."""
    url = refusing(BY_AGE[0], way, missing)
    async with opened("async", url) as cache:
        with redis_py.Redis.from_url(url, username=None, password=None) as admin:
            for name in ("kept", "there"):
                for key, value in ((f"{name}_v", "1"), (f"{name}_d", "[1]")):
                    admin.execute_command("GETSET", key, value)
        done = await asyncio.gather(
            cache.set("with ttl", 2, "new", if_newer=True, ttl=100),
            cache.set("kept", 2, "new", if_version=1, ttl=dscache.KEEP),
            cache.set("there", 2, "new", if_version=1, ttl=100),
            cache.set("for good", 2, "new", if_newer=True),
            return_exceptions=True,
        )
        found = await cache.get_bulk(["with ttl", "kept", "there", "for good"])
        written = [name in found and found[name].version == 2 for name in found]
    failed = {"time": 2, "pexpiretime": 1}.get(missing, 0)
    assert [one for one in done if one is True] == [True] * (4 - failed)
    assert sum(written) == 4 - failed


@pytest.mark.parametrize("way", ["renamed", "by ACL"])
async def test_lifetimes_without_msetex(
    refusing: Refuse, way: str, kind: str, backend: str
) -> None:
    """A server that was upgraded knows the command, and its users lack the right to it."""
    newest = BY_AGE[-1]
    knows = newest.name.startswith("valkey") and newest.version >= (9, 1)
    url = refusing(newest, way, *(["msetex"] if knows else []))
    async with opened(kind, url) as cache:
        await use(cache, [f"user/{number}" for number in range(20)])
        names = [f"n{number}" for number in range(3000)]
        assert await cache.set_bulk(dict.fromkeys(names, (1, "bulk")), ttl=100) == set()
    async with opened(kind, url) as cache:
        # Those under way together are refused together.
        writes = [cache.set(name, 2, "alone", ttl=100) for name in names[:50]]
        writes.append(cache.set_bulk(dict.fromkeys(names[50:], (2, "bulk")), ttl=200))
        assert await asyncio.gather(*writes) == [True] * 50 + [set()]
        assert await cache.head_bulk(names) == dict.fromkeys(names, 2)
    with redis_py.Redis.from_url(url) as redis:
        assert 0 < redis.ttl("n0_v") <= 100 < redis.ttl("n50_d") <= 200


async def test_fetch_bulk_gives_what_it_found(refusing: Refuse, kind: str, backend: str) -> None:
    """A user that may only read gets the records that are there."""
    url = refusing(BY_AGE[0], "by ACL")
    async with opened(kind, url) as cache:
        await cache.set("there", 1, [1])
        with redis_py.Redis.from_url(url) as admin:
            admin.execute_command("ACL", "SETUSER", USER, "resetkeys", "%R~*")
        with pytest.raises(dscache.BulkError) as caught:
            await cache.fetch_bulk(["there", "a", "b"], dict.fromkeys, ttl=100)
        assert {name: one.data for name, one in caught.value.result.items()} == {"there": [1]}
        assert {*caught.value.errors} == {"a", "b"}
        for error in caught.value.errors.values():
            assert isinstance(error, dscache.ReplyError)
            assert "fetch_bulk 'a'" in str(error)
        with pytest.raises(dscache.ReplyError, match=r"NOPERM .*fetch_bulk 'a'"):
            await cache.fetch_bulk(["a", "b"], dict.fromkeys, ttl=100)


@pytest.mark.parametrize("way", ["renamed", "by ACL"])
async def test_a_watch_tells_of_a_refused_read(
    refusing: Refuse, way: str, kind: str, backend: str
) -> None:
    url = refusing(BY_AGE[0], way, "get", "mget")
    for records in (False, True):
        async with opened(kind, url) as cache:
            change = await first_change_of(kind, cache, records=records)
        assert (change.kind, change.name) == ("damaged", "a")
        assert re.search(r"(unknown command|permissions to run the) 'm?get'", change.reason, re.I)


async def first_change_of(kind: str, cache: Any, *, records: bool) -> Any:
    if kind == "async":
        async with cache.watch("a", records=records) as changes:
            await cache.set("a", 1, {})
            return await anext(changes)

    def watch() -> Any:
        with cache.cache.watch("a", records=records) as changes:
            cache.cache.set("a", 1, {})
            return next(changes)

    return await asyncio.to_thread(watch)


async def test_a_refused_hello_is_named(refusing: Refuse, kind: str, backend: str) -> None:
    url = refusing(BY_AGE[0], "renamed", "hello")
    with pytest.raises(dscache.ConnectError, match=r"unknown command 'HELLO'. to HELLO"):
        async with opened(kind, url, nearCache=True):
            pass
    async with opened(kind, url) as cache:
        with pytest.raises(dscache.ReplyError, match=r"'HELLO' \(watch: without HELLO, .* RESP3"):
            await first_change_of(kind, cache, records=False)


async def names_of(kind: str, cache: Any) -> list[str]:
    if kind == "async":
        return [name async for name in cache.scan()]
    return await asyncio.to_thread(lambda: list(cache.cache.scan()))


@pytest.mark.parametrize("way", ["renamed", "by ACL"])
@pytest.mark.parametrize(
    ("missing", "verdict"),
    [
        ((), "ok"),
        (("ping", "evalsha"), "ok"),
        (("time", "strlen"), "warning"),
        (("mget",), "bad"),
        (("mset", "time"), "bad"),
    ],
)
def test_the_doctor_lists_the_missing_rights(
    refusing: Refuse, way: str, missing: tuple[str, ...], verdict: str
) -> None:
    url = refusing(BY_AGE[0], way, *missing)
    found = {one["check"]: one for one in invoke("doctor", "--url", url).document["findings"]}
    rights = found["rights"]
    assert rights["verdict"] == verdict
    for name in missing:
        assert name in rights["found"]
    if verdict != "ok":
        user = USER if way == "by ACL" else "default"
        assert f"ACL SETUSER {user} " in rights["advice"]
        assert {f"+{name}" for name in missing} <= {*rights["advice"].replace(",", " ").split()}


@pytest.mark.parametrize(
    ("missing", "effect"),
    [
        ("cluster|info", "a failover may be noticed late"),
        ("cluster|myid", "a failover may be noticed late"),
        ("cluster|nodes", "scan may fail"),
        ("strlen", "ttl and guarded writes may fail"),
    ],
)
def test_the_doctor_tells_what_a_missing_right_is_for(missing: str, effect: str) -> None:
    finding = check_rights([missing, "asking"], USER)
    assert finding.verdict == "warning"
    assert finding.advice.startswith(f"{effect}: ACL SETUSER {USER} +{missing} +asking")


def test_the_doctor_tells_of_keys_that_are_refused(refusing: Refuse) -> None:
    url = refusing(BY_AGE[0], "by ACL")
    with redis_py.Redis.from_url(url) as admin:
        admin.mset({"user/1_v": "1", "user/1_d": "1"})
        admin.execute_command("ACL", "SETUSER", USER, "resetkeys", "~other/*")
    found = {one["check"]: one for one in invoke("doctor", "--url", url).document["findings"]}
    assert found["rights"]["verdict"] == "bad"
    assert "the names of records" in found["rights"]["found"]
    assert "pattern of the keys" in found["rights"]["advice"]


OF_A_CACHE = (
    *("-@all", "+hello", "+auth", "+ping", "+select", "+client|setname", "+client|tracking"),
    *("+command|info", "+mget", "+mset", "+del", "+get", "+type", "+eval", "+evalsha"),
    *("+script|load", "+set", "+strlen", "+exists", "+time", "+pexpiretime", "+scan", "+info"),
    "+role",
)


def test_the_doctor_examines_records_with_the_documented_rights(refusing: Refuse) -> None:
    admin = refusing(BY_AGE[0], "by ACL")
    with redis_py.Redis.from_url(admin) as redis:
        redis.mset({f"user/{n}{end}": "1" for n in range(3) for end in ("_v", "_d")})
        redis.mset({"other": "1"})
        for keys, verdict in (("~*", "ok"), ("~user/*", "unknown"), ("%R~*", "warning")):
            redis.execute_command("ACL", "SETUSER", "app", "reset", "on", ">word", keys)
            redis.execute_command("ACL", "SETUSER", "app", *OF_A_CACHE)
            url = f"redis://app:word@{admin.rpartition('@')[2]}"
            done = invoke("doctor", "--url", url)
            found = {one["check"]: one for one in done.document["findings"]}
            assert "connection" not in found
            assert found["key layout"]["verdict"] == found["halves"]["verdict"] == "ok"
            assert found["large records"]["verdict"] == "ok"
            assert "GETRANGE is refused" in found["one-key records"]["found"]
            assert found["rights"]["verdict"] == verdict
        redis.execute_command("ACL", "SETUSER", "app", "~*", "-mset")
        found = {one["check"]: one for one in invoke("doctor", "--url", url).document["findings"]}
        assert found["rights"]["found"] == "no mset"
        assert redis.dbsize() == 7


def test_the_doctor_goes_on_without_scan(refusing: Refuse) -> None:
    for way in ("renamed", "by ACL"):
        url = refusing(BY_AGE[0], way, "scan", "time")
        found = {one["check"]: one for one in invoke("doctor", "--url", url).document["findings"]}
        assert "no scan, time" in found["rights"]["found"]
        for check in ("key layout", "halves", "large records"):
            assert found[check]["verdict"] == "unknown"
            assert "SCAN is refused" in found[check]["found"]


def test_the_doctor_writes_nothing(refusing: Refuse) -> None:
    url = refusing(BY_AGE[0], "by ACL")
    invoke("doctor", "--url", url)
    with redis_py.Redis.from_url(url) as admin:
        assert admin.dbsize() == 0
        assert admin.info("persistence")["rdb_changes_since_last_save"] == 0
