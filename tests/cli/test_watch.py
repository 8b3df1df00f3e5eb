"""watch: reported changes, and periods in which changes may be missed."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import redis as redis_py
from rich.console import Console

from dscache.cli import watch as watch_command
from dscache.embedded import EmbeddedServer, ServerBinary
from dscache.net.watch import Change
from tests.support.commands import PATIENCE, invoke, running
from tests.support.documents import PROJECT, code, table

DOCUMENT = PROJECT / "docs" / "cli.md"


@pytest.fixture(scope="module")
def watched(binary: ServerBinary) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(binary) as started:
        yield started


@pytest.fixture
def client(watched: EmbeddedServer) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(watched.url, decode_responses=True) as opened:
        opened.flushall()
        yield opened
        opened.acl_deluser("ada")


class Watching:
    """A watch in its own process, which is subscribed already."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        assert process.stderr
        self.process = process
        self._out, self._err = process.stdout, process.stderr
        self.said = self._err.readline().decode()

    def next(self) -> dict[str, Any]:
        """Return the next event, without its time."""
        event: dict[str, Any] = json.loads(self._out.readline())
        when = datetime.fromisoformat(event.pop("time"))
        assert abs((datetime.now(UTC) - when).total_seconds()) < PATIENCE
        return event

    def until(self, name: str) -> list[dict[str, Any]]:
        """Return the events up to the first change of a record."""
        events = [self.next()]
        while events[-1].get("name") != name:
            events.append(self.next())
        return events


@contextlib.contextmanager
def watching(*words: str) -> Iterator[Watching]:
    with running("watch", *words) as process:
        yield Watching(process)


def write(client: redis_py.Redis, key: str, version: int) -> None:
    client.mset({f"{key}_v": version, f"{key}_d": "{}"})


def test_changes_are_reported_as_they_happen(
    watched: EmbeddedServer, client: redis_py.Redis
) -> None:
    with watching("--url", watched.url) as watch:
        assert watch.said == f"dscache: watching {watched.host}:{watched.port}\n"
        write(client, "a", 7)
        assert watch.next() == {"event": "changed", "name": "a", "version": 7}
        client.delete("a_v", "a_d")
        assert watch.next() == {"event": "deleted", "name": "a", "version": None}
        client.set("no record", 1)
        client.set("half_v", 1)
        assert watch.next() == {"event": "deleted", "name": "half", "version": None}
        write(client, "bad", 1)
        watch.until("bad")
        client.set("bad_v", "x")
        damaged = watch.next()
        assert (damaged["event"], damaged["version"]) == ("damaged", None)
        assert damaged["reason"].startswith("record 'bad': its stored version isn't an integer")
        client.mset({"b_v": 1, "b_d": 1})
        client.pexpire("b_v", 1)
        client.pexpire("b_d", 1)
        client.keys()  # which accesses all keys, and thereby expires them
        events = watch.until("b")
        while events[-1]["event"] != "deleted":
            events.append(watch.next())
        client.flushall()
        # The two keys may have expired apart, and their record been read twice.
        events = [watch.next()]
        while events[-1]["event"] == "deleted":
            events.append(watch.next())
        assert events[-1] == {"event": "flushed"}
        watch.process.send_signal(signal.SIGINT)
        assert watch.process.wait(PATIENCE) == 130
        assert watch._err.read() == b""


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (("user/",), {"user/1": "user/1", "other": None, "{user/2}": None}),
        (("user/", "--layout", "hashtag"), {"{user/1}": "user/1", "user/2": None}),
        (("--layout", "hashtag"), {"{a}": "a", "}{0}}b": "}b", "c": None}),
        (("}", "--layout", "hashtag"), {"{a}": None, "}{0}}b": "}b", "}c": None}),
    ],
)
def test_records_of_a_prefix(
    words: tuple[str, ...],
    keys: dict[str, str | None],
    watched: EmbeddedServer,
    client: redis_py.Redis,
) -> None:
    with watching(*words, "--url", watched.url) as watch:
        for key in [*keys, *keys]:
            write(client, key, 1)
        # The last change may be reported twice, or once if it was quick.
        wanted = [name for name in keys.values() if name]
        events = watch.until(wanted[-1])
        assert {event["name"] for event in events} == set(wanted)


def test_a_gap_is_reported(watched: EmbeddedServer, client: redis_py.Redis) -> None:
    with watching("--url", watched.url) as watch:
        client.client_kill_filter(_type="normal", skipme=True)
        node = f"{watched.host}:{watched.port}"
        gap = watch.next()
        assert (gap["event"], gap["node"]) == ("gap", node)
        assert "lost: " in gap["reason"]
        assert watch.next() == {"event": "resumed", "node": node}
        write(client, "a", 1)
        assert watch.until("a")[-1]["version"] == 1


def test_a_replaced_primary_is_a_gap(watched: EmbeddedServer, client: redis_py.Redis) -> None:
    with watching("--url", watched.url) as watch:
        client.replicaof("127.0.0.1", "1")
        try:
            gap = watch.next()
            assert gap["event"] == "gap"
            assert "has become a replica" in gap["reason"]
        finally:
            client.replicaof("NO", "ONE")
        assert watch.next()["event"] == "resumed"


def test_a_user_without_the_right_to_subscribe(
    watched: EmbeddedServer, client: redis_py.Redis
) -> None:
    client.execute_command(
        "ACL", "SETUSER", "ada", "on", ">secret", "~*", "+@all", "-client|tracking"
    )
    done = invoke("watch", "--url", watched.url.replace("://", "://ada:secret@"))
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("dscache: NOPERM ")
    assert "secret" not in done.err


def test_an_unreachable_server() -> None:
    done = invoke("watch", "--url", "127.0.0.1:1")
    assert (done.status, "Connection refused" in done.err) == (1, True)


# -- output


EVENTS = [
    Change("changed", "user/1", 3),
    Change("deleted", "user/1"),
    Change("damaged", "user/1", reason="record 'user/1': no"),
    Change("flushed"),
    Change("gap", node="a:1", reason="it was unplugged"),
    Change("gap", reason="too many"),
    Change("resumed", node="a:1"),
]


def test_rows_on_a_terminal() -> None:
    console = Console(width=60, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    when = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    for event in [*EVENTS, Change("changed", "\x1b[2Ja\nb", 1)]:
        console.print(watch_command.row(event, when), soft_wrap=True)
    console.file.close()
    assert console.export_text().splitlines() == [
        "03:04:05.678         3  user/1",
        "03:04:05.678   deleted  user/1",
        "03:04:05.678   damaged  user/1  record 'user/1': no",
        "03:04:05.678   flushed  all records were removed",
        "03:04:05.678       gap  changes may be missed from here on: a:1: it was unplugged",
        "03:04:05.678       gap  changes may be missed from here on: too many",
        "03:04:05.678   resumed  a:1: changes are reported again",
        "03:04:05.678         1   [2Ja b",
    ]


def test_the_data_of_changes(watched: EmbeddedServer, client: redis_py.Redis) -> None:
    with watching("--data", "--url", watched.url) as watch:
        client.mset({"a_v": 7, "a_d": '{"b":\n1}'})
        changed = {"event": "changed", "name": "a", "version": 7}
        assert watch.next() == {**changed, "data": {"b": 1}}
        client.set("a_d", "{")
        damaged = watch.next()
        assert (damaged["event"], damaged["name"]) == ("damaged", "a")
        assert "data" not in damaged
        client.delete("a_v", "a_d")
        assert watch.next() == {"event": "deleted", "name": "a", "version": None}


def test_every_event_is_documented() -> None:
    documented = {code(row[0])[0]: {*code(row[2])} for row in table(DOCUMENT, "watch")}
    when = datetime.now(UTC)
    shown: dict[str, set[str]] = {}
    for event in EVENTS:
        keys = json.loads(watch_command.line(event, when)).keys() - {"time", "event"}
        shown.setdefault(event.kind, set()).update(keys)
    assert documented == shown
