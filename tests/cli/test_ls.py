"""ls: the records of a prefix, in an order, with their sizes and lifetimes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import redis as redis_py

from dscache.admin import listing
from dscache.admin.listing import Order, Row
from dscache.embedded import EmbeddedServer
from tests.support.clusters import ClusterGroup
from tests.support.commands import invoke, plain, run_on_terminal


@pytest.fixture(scope="module")
def listed_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as started:
        yield started


@pytest.fixture
def url(listed_server: EmbeddedServer) -> tuple[str, str]:
    """Return the option that names a server with four records, a half and a damaged one."""
    with redis_py.Redis.from_url(listed_server.url) as client:
        client.flushall()
        for name, version, data in (
            ("user/1", 3, '"x"'),
            ("user/2", 20, "[1,2,3]"),
            ("user/3", 1, "0"),
            ("other", 5, "{}"),
        ):
            client.mset({f"{name}_v": version, f"{name}_d": data})
        client.expire("user/1_v", 1000)
        client.expire("user/1_d", 1000)
        client.set("half_v", 1)
        client.mset({"bad_v": "x", "bad_d": "{}"})
    return "--url", listed_server.url


def test_a_prefix_without_records(url: tuple[str, str]) -> None:
    assert invoke("ls", "none/", *url).err == ""
    _, written = run_on_terminal("ls", "none/", *url)
    assert written == "dscache: no records begin with 'none/'\r\n"


def names(done: Any) -> list[str]:
    return [line["name"] for line in done.lines]


def test_records_of_a_prefix(url: tuple[str, str]) -> None:
    done = invoke("ls", "user/", *url)
    assert (done.status, done.err) == (0, "")
    lines = sorted(done.lines, key=lambda line: line["name"])
    assert lines == [
        {"name": "user/1", "version": 3, "bytes": 3, "ttl": lines[0]["ttl"]},
        {"name": "user/2", "version": 20, "bytes": 7, "ttl": None},
        {"name": "user/3", "version": 1, "bytes": 1, "ttl": None},
    ]
    assert 900 < lines[0]["ttl"] <= 1000


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--sort", "name"), ["user/1", "user/2", "user/3"]),
        (("--sort", "version"), ["user/2", "user/1", "user/3"]),
        (("--sort", "bytes"), ["user/2", "user/1", "user/3"]),
        (("--sort", "ttl"), ["user/2", "user/3", "user/1"]),
        (("--top", "2"), ["user/2", "user/1"]),
        (("--sort", "name", "--top", "1"), ["user/1"]),
    ],
)
def test_orders(words: tuple[str, ...], wanted: list[str], url: tuple[str, str]) -> None:
    assert names(invoke("ls", "user/", *words, *url)) == wanted


def test_damaged_records_are_named(url: tuple[str, str]) -> None:
    done = invoke("ls", *url)
    assert done.status == 1
    assert sorted(names(done)) == ["other", "user/1", "user/2", "user/3"]
    assert done.err.startswith("dscache: record 'bad': its stored version isn't an integer")


def test_a_table_on_a_terminal(url: tuple[str, str]) -> None:
    status, written = run_on_terminal("ls", "user/", "--sort", "name", *url)
    assert status == 0
    shown = plain(written)
    lines = [line.split() for line in shown.splitlines() if "user/" in line]
    assert [line[:3] for line in lines] == [
        ["user/1", "3", "3"],
        ["user/2", "20", "7"],
        ["user/3", "1", "1"],
    ]
    assert ["name", "version", "bytes", "ttl"] in [line.split() for line in shown.splitlines()]


def test_bad_options(url: tuple[str, str]) -> None:
    assert invoke("ls", "--top", "0", *url).status == 2
    assert invoke("ls", "--sort", "size", *url).status == 2


async def test_the_first_of_many_take_memory_for_as_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listing, "RECORDS", 10)
    rows = [Row(f"n/{number}", number, number * 7 % 1000, None) for number in range(1000)]

    async def found() -> Any:
        for first in range(0, 1000, 10):
            yield rows[first : first + 10]
            yield rows[first : first + 1]  # found twice
            await asyncio.sleep(0)

    first = await listing.sorted_records(found(), Order.BYTES, 5)
    assert first == sorted(rows, key=lambda row: -row.size)[:5]


def test_a_cluster(shared_group: ClusterGroup) -> None:
    node = shared_group.primaries()[0]
    url = ("--url", f"redis://127.0.0.1:{node.port}")
    records = "".join(f'{{"name":"n/{one}","version":1,"data":[]}}\n' for one in range(300))
    assert invoke("set", *url, stdin=records.encode()).status == 0
    done = invoke("ls", "n/", "--sort", "name", *url)
    assert done.status == 0
    assert names(done) == sorted(f"n/{one}" for one in range(300))
