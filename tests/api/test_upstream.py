"""Faults of deepstream's connector, and the behaviour of dscache in their place.

One section for each fault observed with the real connector; the golden vectors cover its correct
behaviour. Clusters and configurations have their own tests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
import redis as redis_py

import dscache
from dscache.embedded import EmbeddedServer, TLSFiles
from tests.conftest import SERVERS, _server_id
from tests.support.faults import FaultProxy

MakeCache = Callable[..., Awaitable[dscache.AsyncCache]]
MakeServer = Callable[..., EmbeddedServer]

# Seconds until something must have ended: far more than any machine needs, since it measures
# nothing.
PATIENCE = 60


def put(redis: redis_py.Redis, name: str, version: object, data: object) -> None:
    redis.mset({f"{name}_v": version, f"{name}_d": data})


def get_error(results: list[Any], index: int) -> BaseException:
    error = results[index]
    assert isinstance(error, BaseException), error
    return error


# -- stored data is read back unchanged


@pytest.mark.parametrize(
    ("text", "data"),
    [
        (rb'{"s":"a\ud800b"}', {"s": "a\ud800b"}),
        (rb'{"\udfff":"\ude00\ud83d"}', {"\udfff": "\ude00\ud83d"}),
        (b'{"s":"\xff(\xc0\xaf\xed\xa0\x80"}', {"s": "\ufffd(" + "\ufffd" * 5}),
        (b'{"n":1e400,"m":-1e400}', {"n": float("inf"), "m": float("-inf")}),
        (b'{"n":9007199254740993}', {"n": 9007199254740993}),
        (b'{"n":12345678901234567890123}', {"n": 12345678901234567890123}),
        (b' \n\t{"a":1,"a":2}\r\n', {"a": 2}),
    ],
)
async def test_text_that_msgspec_refuses_is_read_as_javascript_reads_it(
    cache: dscache.AsyncCache, redis: redis_py.Redis, text: bytes, data: object
) -> None:
    put(redis, "a", 1, text)
    record = await cache.get("a")
    assert record.data == data
    assert record.data is record.data
    assert record.raw == text
    assert tuple(record) == (1, data)
    assert (await cache.get_bulk(["a"]))["a"].data == data


@pytest.mark.parametrize("data", ["\ud800", {"k\udfff": ["\ud83d", 2**70, float("nan")]}])
async def test_half_a_surrogate_pair_is_stored_and_read(
    cache: dscache.AsyncCache, redis: redis_py.Redis, data: Any
) -> None:
    await cache.set("a", 1, data)
    assert redis.get("a_d").isascii()
    expected = {"k\udfff": ["\ud83d", 2**70, None]} if isinstance(data, dict) else data
    assert (await cache.get("a")).data == expected


# -- a version is decimal digits, not anything that JavaScript turns into a number


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (b"0", 0),
        (b"007", 7),
        (b"9007199254740993", 9007199254740993),
        (b"9223372036854775807", 2**63 - 1),
        (b"0" * 40 + b"9223372036854775807", 2**63 - 1),
    ],
)
async def test_decimal_digits_are_a_version(
    cache: dscache.AsyncCache, redis: redis_py.Redis, text: bytes, version: int
) -> None:
    put(redis, "a", text, "[]")
    assert (await cache.get("a")).version == version
    assert await cache.head("a") == version


@pytest.mark.parametrize(
    "text",
    [
        b"", b" ", b"abc", b"5x", b" 5", b"5\n", b"+5", b"-1", b"-0", b"5.0", b".5", b"1e3",
        b"0x10", b"0o17", b"0b11", b"1_000", b'"5"', b"5\0", b"\xff", "\u0665".encode(), b"null",
        b"NaN", b"Infinity", b"9223372036854775808", b"9" * 30, b"9" * 5000,
    ],
    ids=repr,
)  # fmt: skip
async def test_any_other_version_is_an_error_of_only_that_record(
    cache: dscache.AsyncCache, redis: redis_py.Redis, text: bytes
) -> None:
    put(redis, "bad", text, "[]")
    put(redis, "good", 3, "[3]")
    results = await asyncio.gather(
        cache.get("bad"),
        cache.get("good"),
        cache.head("bad"),
        cache.head("good"),
        cache.get_bulk(["good", "bad"]),
        cache.head_bulk(["bad", "good"]),
        return_exceptions=True,
    )
    for index in (0, 2):
        error = get_error(results, index)
        assert isinstance(error, dscache.RecordError)
        assert error.name == "bad"
    assert (results[1].version, results[1].data, results[3]) == (3, [3], 3)
    for index, of_good in ((4, results[1]), (5, 3)):
        error = get_error(results, index)
        assert isinstance(error, dscache.BulkError)
        assert list(error.errors) == ["bad"]
        assert isinstance(error.errors["bad"], dscache.RecordError)
        assert error.result == {"good": of_good}


async def test_a_write_repairs_a_bad_version(
    cache: dscache.AsyncCache, redis: redis_py.Redis
) -> None:
    put(redis, "a", "abc", "[]")
    with pytest.raises(dscache.RecordError):
        await cache.set("a", 1, [1], if_newer=True)
    assert await cache.set("a", 1, [1]) is True
    assert tuple(await cache.get("a")) == (1, [1])


# -- broken data is an error at .data, and affects no other record


@pytest.mark.parametrize("text", [b"", b'{"a":', b"[1,]", b"undefined", b"\xef\xbb\xbf{}", b"NaN"])
async def test_broken_data_affects_no_other_record(
    cache: dscache.AsyncCache, redis: redis_py.Redis, text: bytes
) -> None:
    put(redis, "broken", 1, text)
    put(redis, "good", 2, "[2]")
    broken, good, bulk, head = await asyncio.gather(
        cache.get("broken"),
        cache.get("good"),
        cache.get_bulk(["broken", "good"]),
        cache.head("broken"),
    )
    assert (broken.version, broken.raw, head) == (1, text, 1)
    assert tuple(good) == (2, [2])
    assert tuple(bulk["good"]) == (2, [2])
    for record in (broken, broken, bulk["broken"]):
        with pytest.raises(
            dscache.RecordError, match="'broken', version 1: the stored data isn't JSON"
        ):
            _ = record.data
    assert tuple(await cache.get("good")) == (2, [2])


# -- half a record is a miss, and counted


@pytest.mark.parametrize("half", [{"a_v": "5"}, {"a_d": "[]"}], ids=["version", "data"])
async def test_half_a_record_is_a_counted_miss(
    cache: dscache.AsyncCache, redis: redis_py.Redis, half: dict[str, str]
) -> None:
    redis.mset(half)
    assert await cache.get("a") is None
    assert await cache.head("a") is None
    assert await cache.get_bulk(["a", "b"]) == {}
    assert await cache.head_bulk(["a", "b"]) == {}
    stats = cache.stats()
    assert (stats["reads"], stats["hits"], stats["halves"]) == (6, 0, 4)
    assert redis.keys("*") == [key.encode() for key in half]

    assert await cache.delete("a") is False
    assert redis.keys("*") == []
    redis.mset(half)
    assert await cache.delete_bulk(["a", "b"]) == 0
    assert redis.keys("*") == []


@pytest.mark.parametrize("half", [{"a_v": "5"}, {"a_d": "[]"}], ids=["version", "data"])
async def test_a_write_completes_half_a_record(
    cache: dscache.AsyncCache, redis: redis_py.Redis, half: dict[str, str]
) -> None:
    # There is no record, and so no version to compare with.
    redis.mset(half)
    assert await cache.set("a", 1, [1], if_newer=True) is True
    assert tuple(await cache.get("a")) == (1, [1])


@pytest.mark.parametrize("suffix", ["_v", "_d"])
async def test_a_key_of_another_type_is_half_a_record(
    cache: dscache.AsyncCache, redis: redis_py.Redis, suffix: str
) -> None:
    put(redis, "a", 1, "[]")
    redis.delete(f"a{suffix}")
    redis.rpush(f"a{suffix}", "x")
    assert await cache.get("a") is None
    assert await cache.head("a") is None
    assert cache.stats()["halves"] == 2
    assert await cache.set("a", 2, [2]) is True
    assert tuple(await cache.get("a")) == (2, [2])


# -- two names never share keys


@pytest.mark.parametrize("name", ["x\ud800", "\udfff", "a\ude00\ud83db"])
async def test_names_with_half_a_surrogate_pair_are_refused(
    cache: dscache.AsyncCache, redis: redis_py.Redis, name: str
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: cache.get(name),
        lambda: cache.head(name),
        lambda: cache.set(name, 1, []),
        lambda: cache.delete(name),
        lambda: cache.get_bulk(["good", name]),
        lambda: cache.head_bulk(["good", name]),
        lambda: cache.set_bulk({"good": (1, []), name: (1, [])}),
        lambda: cache.delete_bulk(["good", name]),
    ]
    for call in calls:
        with pytest.raises(dscache.RecordError, match="lone surrogate") as caught:
            call()
        assert caught.value.name == name
    assert redis.keys("*") == []
    assert cache.stats()["commands"] == 0


@pytest.mark.parametrize(
    "name", ["a", "a_v", "_d", " ", "\n\0", "{tag}", "}", "é\u0301", "\U0001f600", "x" * 10_000]
)
async def test_any_other_name_works(
    cache: dscache.AsyncCache, redis: redis_py.Redis, name: str
) -> None:
    await cache.set(name, 1, [name])
    assert sorted(redis.keys("*")) == [f"{name}_d".encode(), f"{name}_v".encode()]
    assert tuple(await cache.get(name)) == (1, [name])


# -- two writes of a name in one tick: both end


async def test_only_the_last_of_two_writes_in_a_tick_is_sent_and_both_end(
    cache: dscache.AsyncCache, redis: redis_py.Redis
) -> None:
    results = await asyncio.gather(cache.set("a", 1, "one"), cache.set("a", 2, "two"))
    assert results == [True, True]
    assert tuple(await cache.get("a")) == (2, "two")
    stats = cache.stats()
    assert stats["commands"] == 2  # one MSET and one MGET


async def test_set_and_delete_in_a_tick_both_end(
    cache: dscache.AsyncCache, redis: redis_py.Redis
) -> None:
    assert await asyncio.gather(cache.set("a", 1, 1), cache.delete("a")) == [True, True]
    assert redis.keys("*") == []
    assert await asyncio.gather(cache.delete("a"), cache.set("a", 2, 2)) == [False, True]
    assert tuple(await cache.get("a")) == (2, 2)


async def test_reads_of_one_name_in_a_tick_share_a_command_and_no_data(
    cache: dscache.AsyncCache, redis: redis_py.Redis
) -> None:
    put(redis, "a", 1, '{"list":[]}')
    records = await asyncio.gather(*(cache.get("a") for _ in range(10)))
    assert cache.stats()["commands"] == 1
    records[0].data["list"].append("changed")
    assert all(record.data == {"list": []} for record in records[1:])


# -- program order for each name, across operations


async def test_a_read_before_a_write_sees_the_earlier_record(
    cache: dscache.AsyncCache, redis: redis_py.Redis
) -> None:
    put(redis, "a", 1, '"old"')
    before, _, after, _, gone = await asyncio.gather(
        cache.get("a"), cache.set("a", 2, "new"), cache.get("a"), cache.delete("a"), cache.get("a")
    )
    assert tuple(before) == (1, "old")
    assert tuple(after) == (2, "new")
    assert gone is None


async def test_heads_and_bulks_keep_their_order(
    cache: dscache.AsyncCache, redis: redis_py.Redis
) -> None:
    results = await asyncio.gather(
        cache.head("a"),
        cache.set("a", 1, [1]),
        cache.head("a"),
        cache.head_bulk(["a", "b"]),
        cache.set_bulk({"a": (2, [2]), "b": (3, [3])}),
        cache.get("b"),
        cache.head_bulk(["a", "b"]),
        cache.delete_bulk(["a", "b"]),
        cache.head_bulk(["a", "b"]),
        cache.set("b", 4, [4]),
        cache.get_bulk(["a", "b"]),
    )
    assert results[:5] == [None, True, 1, {"a": 1}, set()]
    assert tuple(results[5]) == (3, [3])
    assert results[6:10] == [{"a": 2, "b": 3}, 2, {}, True]
    assert {name: tuple(record) for name, record in results[10].items()} == {"b": (4, [4])}


async def test_data_is_encoded_at_the_call(cache: dscache.AsyncCache) -> None:
    data = {"n": [1]}
    written = cache.set("a", 1, data)
    data["n"].append(2)
    await written
    assert (await cache.get("a")).data == {"n": [1]}


# -- a TTL is set on both keys in one step


@pytest.mark.parametrize("if_newer", [False, True])
async def test_both_keys_expire_at_the_same_instant(
    cache: dscache.AsyncCache, redis: redis_py.Redis, if_newer: bool
) -> None:
    await cache.set("a", 1, [1], ttl=1000, if_newer=if_newer)
    await cache.set_bulk({"b": (1, [1]), "c": (1, [1])}, ttl=1000, if_newer=if_newer)
    for name in "abc":
        instants = {redis.pexpiretime(f"{name}_v"), redis.pexpiretime(f"{name}_d")}
        assert len(instants) == 1
        assert instants.pop() > 0
    # A write without a TTL removes an earlier one, from both.
    await cache.set("a", 2, [2], if_newer=if_newer)
    assert (redis.ttl("a_v"), redis.ttl("a_d")) == (-1, -1)


@pytest.mark.parametrize("options", [{}, {"ttl": 60}, {"ttl": 60, "if_newer": True}])
async def test_a_refused_write_leaves_no_half(
    make_cache: MakeCache, make_server: MakeServer, options: dict[str, Any]
) -> None:
    server = make_server("--maxmemory-policy", "noeviction")
    cache = await make_cache(url=server.url)
    await cache.set("a", 1, "old")
    with redis_py.Redis.from_url(server.url) as redis:
        redis.config_set("maxmemory", 1)
        with pytest.raises(dscache.ReplyError, match="OOM") as caught:
            await cache.set("a", 2, "new", **options)
        assert caught.value.code == "OOM"
        assert tuple(await cache.get("a")) == (1, "old")
        redis.config_set("maxmemory", 0)
        assert await cache.set("a", 2, "new", **options) is True
        assert redis.mget("a_v", "a_d") == [b"2", b'"new"']


@pytest.mark.parametrize("options", [{}, {"ttl": 60}, {"ttl": 60, "if_newer": True}])
async def test_a_user_without_permission_for_one_key_writes_neither(
    make_cache: MakeCache, make_server: MakeServer, options: dict[str, Any]
) -> None:
    server = make_server("--user", "half", "on", ">secret", "+@all", "~*_v")
    with redis_py.Redis.from_url(server.url) as redis:
        cache = await make_cache(
            host=server.host, port=server.port, username="half", password="secret"
        )
        with pytest.raises(dscache.ReplyError, match="NOPERM"):
            await cache.set("a", 1, [1], **options)
        assert redis.keys("*") == []


# -- data that can't be encoded stops nothing


def cycle() -> object:
    data: list[object] = []
    data.append({"again": data})
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (cycle(), r"\$\[0\]\.again: nested too deeply or cyclic"),
        ({"users": [{"photo": object()}]}, r"\$\.users\[0\]\.photo: .*type object is unsupported"),
        ([10**5000], r"\$\[0\]: Exceeds the limit"),
        (msgspec.UNSET, r"\$: .*UnsetType is unsupported"),
        (msgspec.Raw(b""), "empty msgspec.Raw"),
        (["\ud800", msgspec.Raw(b"")], r"\$\[1\]: an empty msgspec.Raw"),
    ],
)
async def test_data_that_cannot_be_encoded_is_refused_at_the_call(
    cache: dscache.AsyncCache, redis: redis_py.Redis, data: object, message: str
) -> None:
    before = cache.set("before", 1, [1])
    with pytest.raises(dscache.RecordError, match=message) as caught:
        cache.set("bad", 1, data)
    assert caught.value.name == "bad"
    with pytest.raises(dscache.RecordError, match=message) as caught:
        cache.set_bulk({"good": (1, [1]), "bad": (1, data)})
    assert caught.value.name == "bad"
    after = cache.set("after", 1, [1])
    assert await asyncio.gather(before, after) == [True, True]
    assert sorted(redis.keys("*")) == [b"after_d", b"after_v", b"before_d", b"before_v"]


# -- an empty bulk sends nothing


async def test_empty_bulks_have_empty_results_and_send_nothing(cache: dscache.AsyncCache) -> None:
    assert await cache.get_bulk([]) == {}
    assert await cache.head_bulk(iter(())) == {}
    assert await cache.set_bulk({}) == set()
    assert await cache.delete_bulk(()) == 0
    stats = cache.stats()
    assert (stats["commands"], stats["bytes_out"], stats["pending"]) == (0, 0, 0)


# -- close completes issued operations, and always ends


async def test_operations_issued_before_close_complete(
    make_cache: MakeCache, redis: redis_py.Redis
) -> None:
    cache = await make_cache()
    written = cache.set("a", 1, [1])
    bulk = cache.set_bulk({f"b{n}": (n, n) for n in range(5000)})
    read = cache.get("a")
    async with asyncio.timeout(PATIENCE):
        await cache.close()
        assert await written is True
        assert await bulk == set()
        assert tuple(await read) == (1, [1])
    assert redis.dbsize() == 2 + 2 * 5000
    with pytest.raises(dscache.UsageError, match="closed"):
        cache.get("a")


async def test_close_may_be_called_again(make_cache: MakeCache) -> None:
    cache = await make_cache()
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(cache.close(), cache.close())
        await cache.close()


async def test_close_ends_while_redis_is_down(
    make_cache: MakeCache, make_server: MakeServer
) -> None:
    server = make_server()
    cache = await make_cache(url=server.url, commandTimeout=600_000, closeTimeout=100)
    await cache.set("a", 1, [1])
    server.kill()
    pending = cache.set("a", 2, [2])
    async with asyncio.timeout(PATIENCE):
        await cache.close()
        with pytest.raises(dscache.ConnectionLost):
            await pending
        await cache.close()


async def test_close_ends_while_redis_is_silent(make_cache: MakeCache, proxy: FaultProxy) -> None:
    cache = await make_cache(url=proxy.url, commandTimeout=600_000, closeTimeout=100)
    await cache.set("a", 1, [1])
    proxy.stall()
    pending = cache.set("a", 2, [2])
    async with asyncio.timeout(PATIENCE):
        await cache.close()
        with pytest.raises(dscache.ConnectionLost):
            await pending


# -- a missing database is never replaced by another


async def test_without_its_database_a_cache_never_writes(
    make_cache: MakeCache, make_server: MakeServer
) -> None:
    server = make_server("--databases", "2")
    cache = dscache.AsyncCache.from_config(
        {"options": {"url": server.url, "db": 99}, "name": "redis"}
    )
    try:
        with pytest.raises((dscache.ReplyError, dscache.ConfigError), match="DB index"):
            await cache.when_ready()
        assert not cache.is_ready
        with pytest.raises((dscache.ReplyError, dscache.ConfigError), match="DB index"):
            await cache.set("a", 1, [1])
        assert not cache.is_ready
    finally:
        await cache.close()
    with redis_py.Redis.from_url(server.url) as redis:
        assert redis.info("keyspace") == {}


# -- a URL is taken literally


async def test_a_url_with_user_password_and_database(
    make_cache: MakeCache, make_server: MakeServer
) -> None:
    server = make_server("--user", "m\u00fcller", "on", ">p@ss:w/rd%#", "+@all", "~*")
    address = f"{server.host}:{server.port}"
    cache = await make_cache(url=f"redis://m%C3%BCller:p%40ss%3Aw%2Frd%25%23@{address}/1")
    await cache.set("a", 1, [1])
    assert "p@ss" not in cache.description
    assert "p%40ss" not in cache.description
    with redis_py.Redis.from_url(server.url) as redis:
        assert list(redis.info("keyspace")) == ["db1"]
        names = {client["user"] for client in redis.client_list()}
        assert "m\u00fcller" in names


# The proxy speaks TLS, whatever server is behind it.
@pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)
async def test_rediss_is_tls(
    make_cache: MakeCache, tls_proxy: FaultProxy, certificates: TLSFiles
) -> None:
    assert tls_proxy.url.startswith("rediss://")
    # The proxy forwards only TLS: working at all is the proof.
    cache = await make_cache(url=tls_proxy.url, tls={"ca": certificates.authority})
    assert await cache.set("a", 1, [1]) is True
    with pytest.raises((dscache.ConnectError, dscache.ReplyError), match="certificate"):
        await make_cache(url=tls_proxy.url)
    with pytest.raises(dscache.ConnectError):
        await make_cache(url=tls_proxy.url.replace("rediss://", "redis://"), connectTimeout=1000)


async def test_a_url_with_only_host_and_port(
    server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    async with dscache.AsyncCache.from_config(f"{server.host}:{server.port}") as cache:
        assert await cache.set("a", 1, [1]) is True


# -- numbers for texts, and texts for numbers


async def test_numeric_texts_and_numbers_are_converted(
    make_cache: MakeCache, make_server: MakeServer
) -> None:
    server = make_server("--requirepass", "12345")
    cache = await make_cache(host=server.host, port=str(server.port), db="3", password=12345)
    await cache.set("a", 1, [1])
    with redis_py.Redis(host=server.host, port=server.port, db=3, password="12345") as redis:
        assert redis.mget("a_v", "a_d") == [b"1", b"[1]"]


# -- a refused password fails at once


@pytest.mark.parametrize("options", [{}, {"password": "wrong"}], ids=["none", "wrong"])
async def test_a_refused_password_fails_at_once_and_is_hidden(
    make_cache: MakeCache, make_server: MakeServer, options: dict[str, str]
) -> None:
    server = make_server("--requirepass", "right")
    with pytest.raises(dscache.ReplyError) as caught:
        await make_cache(url=server.url, connectTimeout=600_000, **options)
    assert caught.value.code in {"NOAUTH", "WRONGPASS"}
    assert "wrong" not in str(caught.value).replace("WRONGPASS", "")


# -- logging goes through Python's logging


async def test_logging_uses_the_name_dscache(
    make_cache: MakeCache, make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="dscache")
    server = make_server()
    cache = await make_cache(url=server.url, commandTimeout=600_000)
    server.kill()
    pending = cache.get("a")
    server.start()
    async with asyncio.timeout(PATIENCE):
        assert await pending is None
    own = [r for r in caplog.records if r.name == "dscache" or r.name.startswith("dscache.")]
    assert own
    assert any(f"{server.host}:{server.port}" in record.getMessage() for record in own)
