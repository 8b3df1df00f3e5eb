"""Server texts of any length and content become one short line in errors, logs and terminals.

Whatever servers report about their cluster or group, the error is one of dscache's.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import dscache
from dscache.admin.cluster_survey import _parse_nodes
from dscache.config.address import is_address, read_address
from dscache.core import failures
from dscache.errors import (
    MAX_TEXT,
    ConfigError,
    ConnectError,
    DscacheError,
    ProtocolError,
    ReplyError,
    clean,
    shorten,
)
from dscache.net.sentinels import pairs, read_epoch
from dscache.net.slots import parse_epoch, parse_info, parse_redirection, parse_slots, read_view
from tests.support.commands import invoke
from tests.support.faults import FakeServer

ASKED = ("127.0.0.1", 7000)
# A line break, terminal control sequences in both forms, and right-to-left text.
FORGED = "x\nERROR forged \x1b[2J \x9b2J ‮ ⁦ \x00 \x7f"
LONG = 2_000_000
REPEATED = "ERR unknown command 'AUTH', with args beginning with: 'app' 'pass\nword' "


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def assert_shown_well(text: str, limit: int = 2 * MAX_TEXT) -> None:
    assert text.isprintable(), ascii(text)
    assert len(text) <= limit


# -- texts


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("ERR no", "ERR no"),
        ("ERR a\nb", "ERR a\\nb"),
        ("ERR \x1b[2J\x9b‮", "ERR \\x1b[2J\\x9b\\u202e"),
        ("ERR \udc80", "ERR \\udc80"),
        (REPEATED, "ERR unknown command 'AUTH'"),
        ("ERR unknown command `A`, with args beginning with: ", "ERR unknown command `A`"),
        ("ERR unknown command 'A' With Args Beginning With: x", "ERR unknown command 'A'"),
        ("x" * MAX_TEXT, "x" * MAX_TEXT),
        ("x" * 1000, "x" * (MAX_TEXT - 19) + "… (1000 characters)"),
    ],
)
def test_clean_texts_are_short_lines(said: str, shown: str) -> None:
    assert clean(said) == shown


@given(st.text(st.characters(exclude_categories=())) | st.text().map(lambda text: text * 400))
@example("‮" * 1000)
@example(REPEATED * 100)
def test_clean_texts_are_unchanged(text: str) -> None:
    once = clean(text)
    assert_shown_well(once, MAX_TEXT)
    assert clean(once) == once
    if text.isprintable() and len(text) <= MAX_TEXT and "with args" not in text.lower():
        assert once == text


def test_an_error_gives_the_length_of_text_it_cut() -> None:
    error = ReplyError("OOM " + "x" * LONG, context="get 'a'")
    assert str(error).endswith(f"… ({LONG + 4} characters) (get 'a')")
    assert error.message.startswith("OOM xxx")
    assert error.code == "OOM"
    assert_shown_well(str(error))
    # Cleaned again, it is cut no further.
    assert ReplyError(error.message).message == error.message


def test_a_long_path_of_redirections_is_kept_whole() -> None:
    trail = tuple(f"127.0.0.1:{port}: MOVED 1 127.0.0.1:{port + 1}" for port in range(7000, 7040))
    error = failures.too_many_redirections(
        "MOVED 1 127.0.0.1:7041", trail, 40, 16, "get 'a' at 127.0.0.1:7040"
    )
    assert all(one in str(error) for one in trail)
    assert str(error).startswith("MOVED 1 127.0.0.1:7041 (redirected 40 times, and ")
    assert str(error).endswith(") (get 'a' at 127.0.0.1:7040)")


def test_an_object_without_a_repr_is_named_by_its_type() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise OSError("no")

    assert shorten(nested(100_000)) == "a list that can't be shown (RecursionError)"
    assert shorten(Odd()) == "a Odd that can't be shown (OSError)"


HOSTILE = {
    "long": b"-ERR " + b"x" * LONG + b"\r\n",
    "forged": b"!%d\r\nERR %b\r\n" % (len(FORGED.encode()) + 4, FORGED.encode()),
    "nested": b"*1\r\n" * 900 + b":1\r\n",
    "a long name": b"%%1\r\n+server\r\n$%d\r\n%b\r\n" % (LONG, b"n" * LONG),
    "a forged name": b"%%1\r\n+server\r\n$%d\r\n%b\r\n" % (len(FORGED.encode()), FORGED.encode()),
}


@pytest.mark.parametrize("command", ["HELLO", "MGET"])
@pytest.mark.parametrize("way", HOSTILE)
async def test_server_texts_are_shown_as_short_lines(
    way: str, command: str, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    async with FakeServer({command: HOSTILE[way]}) as fake:
        options = {"host": fake.host, "port": fake.port, "commandTimeout": 2000}
        config = {"name": "redis", "options": options}
        cache = dscache.AsyncCache.from_config(config)
        try:
            await cache.get("a")
        except DscacheError as error:
            told.append(str(error))
        told += [str(cache.stats()["last_loss"]), cache.description]
        await cache.close()

        def block() -> None:
            blocking = dscache.Cache.from_config(config)
            try:
                blocking.get("a")
            except DscacheError as error:
                told.append(str(error))
            told.extend((str(blocking.stats()["last_loss"]), blocking.description))
            blocking.close()

        await asyncio.to_thread(block)
        done = await asyncio.to_thread(invoke, "doctor", "--url", fake.url)
    for text in (*told, *(record.getMessage() for record in caplog.get_records("call"))):
        assert_shown_well(text, 2000)
    assert any(told)
    for line in (done.out + done.err).splitlines():
        assert_shown_well(line, 20_000)


# -- replies of clusters


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.binary(max_size=12)
    | st.text(max_size=12)
    | st.just(ReplyError("ERR no"))
    | st.sampled_from([b"", b"?", b"a\nb", b"\xff", "‮".encode(), b"h" * 300, 0, 16383, 7000]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.integers() | st.binary(max_size=3), inner, max_size=3)
    ),
    max_leaves=20,
)
number = st.integers(-1, 20_000) | junk
node = st.lists(junk, max_size=4) | st.tuples(st.binary(max_size=9), number).map(list) | junk
entry = (
    st.tuples(number, number, st.lists(node, max_size=3)).map(lambda it: [it[0], it[1], *it[2]])
    | junk
)
view = st.lists(entry, max_size=4) | junk


@given(view)
@example([[0, 1, [b"a\nERROR forged", 7000]]])
@example([[0.0, 1.0, [b"a", 7000]]])
@example([[True, True, [b"a", 7000]]])
@example([[0, 1, [b"a", 7000.0]]])
@example([[0, 1, [b"a", True]]])
@example([[0, 1, {0: b"a", 1: 7000}]])
@example([[0, 1, {}]])
@example([[0, 1, [b"", 7000], ReplyError("ERR no")]])
@example({0: 1})
@example([[0, 1, [b"a", 7000]]] * 16_385)
@example([[0, 16_383, [b"a", 7000, b"id"], [b"b", 7001]], [5, 6, [b"", 7002]]])
def test_slots_are_ranges_or_a_protocol_error(reply: Any) -> None:
    try:
        ranges = parse_slots(reply, ASKED)
    except ProtocolError as error:
        assert_shown_well(str(error))
        return
    for one in ranges:
        assert type(one.first) is type(one.last) is int
        assert 0 <= one.first <= one.last < 16384
        for host, port in (one.primary, *one.replicas):
            assert is_address(host, port)
            assert host.isprintable()


def test_deeply_nested_slots_are_a_protocol_error() -> None:
    # Not given to hypothesis, which would print it.
    for reply in ([nested(100_000)], nested(100_000), [[0, 1, [nested(100_000), 7000]]]):
        with pytest.raises(ProtocolError, match="CLUSTER SLOTS was answered with a list that"):
            parse_slots(reply, ASKED)


@given(view, junk | st.binary())
def test_a_view_is_parsed_or_an_expected_error(slots: Any, info: Any) -> None:
    try:
        seen = read_view(slots, info, ASKED, "mapping")
    except (ProtocolError, ReplyError, ConfigError) as error:
        assert_shown_well(str(error))
    else:
        assert seen.epoch >= -1


@given(junk | st.binary().map(lambda text: b"cluster_current_epoch:" + text))
@example(b"cluster_current_epoch:" + b"9" * 5000)
@example(b"cluster_current_epoch:\xb2")
def test_an_epoch_is_a_number(reply: Any) -> None:
    assert parse_epoch(reply) >= -1


@given(st.text(st.characters(exclude_categories=())))
@example("9" * 5000)
@example("[::1]:7000")
@example("a\x1b[2J:7000")
@example(":7000")
@example("a:²")
def test_a_redirection_is_an_address_or_none(where: str) -> None:
    found = parse_redirection(f"MOVED 5 {where}", 5, ASKED)
    assert found is None or is_address(*found)


@given(junk | st.binary() | st.text().map(str.encode))
def test_parse_info_keeps_only_short_lines(reply: Any) -> None:
    for name, value in parse_info(reply).items():
        assert_shown_well(name + value)


@given(junk | st.text().map(str.encode))
@example(b"id 127.0.0.1:%b@1 master - 0 0 1 connected 0-1" % (b"9" * 5000))
def test_nodes_are_parsed_or_a_protocol_error(reply: Any) -> None:
    try:
        lines = _parse_nodes(reply)
    except ProtocolError as error:
        assert_shown_well(str(error))
    else:
        assert all(line.id.isprintable() for line in lines)


SLOTS = {
    "a host in two lines": b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\na\nFORGED!\r\n:7000\r\n",
    "a port too many": b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$1\r\na\r\n:70000\r\n",
    "fractions": b"*1\r\n*3\r\n,0.5\r\n,9.5\r\n*2\r\n$1\r\na\r\n:7000\r\n",
    "a map": b"%1\r\n:0\r\n:1\r\n",
    "nested": b"*1\r\n" * 900 + b":1\r\n",
    "a node as a map": b"*1\r\n*3\r\n:0\r\n:1\r\n%1\r\n:0\r\n:1\r\n",
    "an error inside": b"*1\r\n*3\r\n:0\r\n:1\r\n-ERR no\r\n",
    "a text": b"$2\r\nno\r\n",
}


@pytest.mark.parametrize("way", SLOTS)
async def test_a_hostile_view_is_reported(way: str, backend: str) -> None:
    def answer(command: list[bytes]) -> bytes:
        return SLOTS[way] if command[1] == b"SLOTS" else b"$0\r\n\r\n"

    async with FakeServer({"CLUSTER": answer}) as fake:
        config = {
            "name": "redis",
            "options": {
                "nodes": [{"host": fake.host, "port": fake.port}],
                "redisOptions": {"commandTimeout": 400, "connectTimeout": 400},
            },
        }
        cache = dscache.AsyncCache.from_config(config)
        with pytest.raises(DscacheError) as caught:
            await cache.get("a")
        assert_shown_well(str(caught.value), 2000)
        assert_shown_well(repr(cache.stats()["last_loss"]), 2000)
        await cache.close()

        def block() -> None:
            blocking = dscache.Cache.from_config(config)
            with pytest.raises(DscacheError) as caught:
                blocking.get("a")
            assert_shown_well(str(caught.value), 2000)
            blocking.close()

        await asyncio.to_thread(block)


# -- Sentinels


@given(junk, junk)
@example("a", "9" * 5000)
@example("a\nb", "7000")
@example("a", "70000")
@example("a", "²")
def test_a_sentinel_names_an_address_or_nothing(host: Any, port: Any) -> None:
    try:
        assert is_address(*read_address(host, port))
    except ValueError as error:
        assert_shown_well(str(error))


@given(junk | st.text(st.characters(categories=["Nd", "No"])))
@example("9" * 5000)
def test_an_epoch_of_a_sentinel_is_a_number(text: Any) -> None:
    assert read_epoch(text) >= -1


PLACES = {
    "a host in two lines": b"*2\r\n$9\r\na\nFORGED!\r\n$4\r\n6379\r\n",
    "a port too many": b"*2\r\n$1\r\na\r\n$5\r\n70000\r\n",
    "a port of many digits": b"*2\r\n$1\r\na\r\n$5000\r\n" + b"9" * 5000 + b"\r\n",
    "no pair": b"*1\r\n$1\r\na\r\n",
    "a number": b":5\r\n",
    "a long error": b"-ERR " + b"x" * LONG + b"\r\n",
}


@pytest.mark.parametrize("way", PLACES)
async def test_a_hostile_sentinel_yields_no_address(way: str, backend: str) -> None:
    async with FakeServer({"SENTINEL": PLACES[way]}) as fake:
        options = {
            "sentinels": [{"host": fake.host, "port": fake.port}],
            **{"name": "group", "commandTimeout": 400, "connectTimeout": 400},
        }
        config = {"name": "redis", "options": options}
        cache = dscache.AsyncCache.from_config(config)
        with pytest.raises(ConnectError, match="no Sentinel names a primary") as caught:
            await cache.get("a")
        assert_shown_well(str(caught.value), 2000)
        await cache.close()

        def block() -> None:
            blocking = dscache.Cache.from_config(config)
            with pytest.raises(ConnectError, match="no Sentinel names a primary") as caught:
                blocking.get("a")
            assert_shown_well(str(caught.value), 2000)
            blocking.close()

        await asyncio.to_thread(block)


def test_an_odd_number_of_values_is_no_map() -> None:
    assert pairs(["a", "1", "b"]) == {"a": "1"}
