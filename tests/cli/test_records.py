"""get, set, head and delete: with arguments, through pipes, on a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis as redis_py

from dscache import AsyncCache, DscacheError, RecordError
from dscache.admin import ndjson
from dscache.admin.cache import open_cache
from dscache.config import load
from dscache.embedded import EmbeddedServer
from tests.support.commands import (
    PATIENCE,
    invoke,
    on_terminal,
    plain,
    run,
    run_on_terminal,
    running,
)


@pytest.fixture(scope="module")
def records_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as started:
        yield started


@pytest.fixture
def client(records_server: EmbeddedServer) -> Iterator[redis_py.Redis]:
    """A client of the server, which has just been emptied."""
    with redis_py.Redis.from_url(records_server.url) as opened:
        opened.flushall()
        yield opened


@pytest.fixture
def url(records_server: EmbeddedServer, client: redis_py.Redis) -> tuple[str, str]:
    return "--url", records_server.url


Url = tuple[str, str]


def test_a_record_makes_a_round_trip(url: Url) -> None:
    done = invoke("set", "user/1", "3", '{"firstname": "Ada"}', *url)
    assert (done.status, done.err) == (0, "")
    assert done.lines == [{"name": "user/1", "version": 3, "written": True}]
    done = invoke("get", "user/1", *url)
    assert done.out == '{"name":"user/1","version":3,"data":{"firstname": "Ada"}}\n'
    assert invoke("head", "user/1", *url).lines == [{"name": "user/1", "version": 3}]
    assert invoke("delete", "user/1", *url).lines == [{"name": "user/1", "deleted": True}]
    assert invoke("get", "user/1", *url).status == 1


def test_missing_records_are_reported_and_print_no_line(url: Url) -> None:
    invoke("set", "here", "1", "[]", *url)
    for command in ("get", "head"):
        done = invoke(command, "away", "here", *url)
        assert done.status == 1
        assert [line["name"] for line in done.lines] == ["here"]
        assert done.err == "dscache: no record 'away'\n"
    done = invoke("get", *map(str, range(8)), *url)
    assert done.err == "dscache: no record '0', '1', '2', '3', '4' and 3 more\n"
    done = invoke("delete", "away", "here", *url)
    assert (done.status, done.err) == (1, "")
    assert [line["deleted"] for line in done.lines] == [False, True]


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        (b'{ "a" :\r\n\t1}', b'{ "a" :  \t1}'),
        (b'"\\ud800"', b'"\\ud800"'),
        (b'"\xff"', b'"\xef\xbf\xbd"'),
        (b"1e400", b"1e400"),
        (b"12345678901234567890123", b"12345678901234567890123"),
        (b"[" * 3000 + b"]" * 3000, b"[" * 3000 + b"]" * 3000),
        ('"\u2028 ü"'.encode(), '"\u2028 ü"'.encode()),
    ],
    ids=["line-ends", "surrogate", "no-utf8", "infinity", "integer", "deep", "separator"],
)
def test_data_is_unchanged(stored: bytes, shown: bytes, url: Url, client: redis_py.Redis) -> None:
    client.mset({"a_v": 7, "a_d": stored})
    done = invoke("get", "a", *url)
    assert (done.status, done.err) == (0, "")
    assert done.out.encode() == b'{"name":"a","version":7,"data":' + shown + b"}\n"
    # set accepts the output of get.
    client.flushall()
    assert invoke("set", *url, stdin=done.out.encode()).status == 0
    again = invoke("get", "a", *url)
    assert again.out == done.out


def test_damaged_records_are_reported_separately(url: Url, client: redis_py.Redis) -> None:
    client.mset({"a_v": "x", "a_d": "1", "b_v": 2, "b_d": "{", "c_v": 3, "c_d": "[]", "d_v": 4})
    done = invoke("get", "a", "b", "c", "d", *url)
    assert done.status == 1
    assert [line["name"] for line in done.lines] == ["c"]
    told = done.err.splitlines()
    assert len(told) == 3
    assert told[0].startswith("dscache: record 'a': its stored version isn't an integer")
    assert told[1].startswith("dscache: record 'b', version 2: the stored data isn't JSON")
    assert told[2] == "dscache: no record 'd'"
    done = invoke("head", "a", "c", *url)
    assert (done.status, [line["version"] for line in done.lines]) == (1, [3])


def test_names_from_standard_input(url: Url) -> None:
    invoke(
        "set",
        *url,
        stdin=b'{"name":"a b","version":1,"data":{}}\n{"name":"c","version":2,"data":null}',
    )
    done = invoke("head", *url, stdin=b"c\r\n\na b\nno such\nc")
    assert [line["name"] for line in done.lines] == ["c", "a b", "c"]
    # A name given twice in one batch is reported once.
    done = invoke("head", *url, stdin=b"c\nc\n")
    assert [line["name"] for line in done.lines] == ["c"]
    done = invoke("head", *url, stdin=b"c\r\n\na b\nno such\n")
    assert (done.status, done.err) == (1, "dscache: no record 'no such'\n")
    done = invoke("get", *url, stdin=b"a b\n\xff\n")
    assert (done.status, done.out) == (1, "")
    assert done.err == "dscache: standard input, line 2: it is not UTF-8: b'\\xff'\n"
    assert invoke("get", *url).status == 0  # nothing is sent for it


def test_many_names_are_read_in_batches(url: Url) -> None:
    count = 6_000
    lines = b"".join(b'{"name":"n%d","version":%d,"data":[%d]}\n' % (i, i, i) for i in range(count))
    done = invoke("set", *url, stdin=lines)
    assert (done.status, len(done.lines)) == (0, count)
    done = invoke("get", *url, stdin=b"\n".join(b"n%d" % i for i in range(count)))
    assert done.out.encode() == lines
    done = invoke("delete", *url, stdin=b"\n".join(b"n%d" % i for i in range(count)))
    assert all(line["deleted"] for line in done.lines)


def test_a_line_has_its_ttl(url: Url, client: redis_py.Redis) -> None:
    line = b'{"name":"a","version":1,"data":0,"ttl":1000}\n'
    invoke("set", *url, stdin=line)
    assert 990 < client.ttl("a_v") <= 1000
    invoke("set", *url, "--ttl", "50", stdin=line)
    assert 40 < client.ttl("a_d") <= 50
    invoke("set", *url, "--ttl", "0", stdin=line)
    assert client.ttl("a_d") == -1
    invoke("set", "a", "2", "0", "--ttl", "70", *url)
    assert 60 < client.ttl("a_d") <= 70


def test_a_negative_number_is_data(url: Url) -> None:
    assert invoke("set", "a", "1", "-1.5e3", "--ttl", "60", *url).status == 0
    assert invoke("get", "a", *url).lines == [{"name": "a", "version": 1, "data": -1500.0}]


def test_if_newer(url: Url) -> None:
    invoke("set", "a", "5", "[]", *url)
    done = invoke("set", "a", "5", "[1]", "--if-newer", *url)
    assert (done.status, done.lines[0]["written"]) == (1, False)
    assert done.err == "dscache: 1 record not written: Redis holds the same or a newer version\n"
    assert invoke("set", "a", "6", "[1]", "--if-newer", *url).status == 0
    assert invoke("set", "a", "1", "[2]", *url).status == 0
    assert invoke("get", "a", *url).lines[0]["data"] == [2]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"x", "it is not JSON: character 0: expecting value"),
        (b"[1]", "it is not a record, which is "),
        (b"[1]", '"data":...}: it is [1]; the lines after'),
        (b'{"name":"b","version":1}', '"data" is missing'),
        (b'{"name":"b","version":"1","data":1}', "\"version\" must be a whole number, not '1'"),
        (b'{"name":"b","version":true,"data":1}', '"version" must be a whole number, not True'),
        (b'{"name":"b","version":1,"data":1,"ttl":"9"}', "\"ttl\" must be whole seconds, not '9'"),
        (b'{"name":7,"version":1,"data":true,"ttl":null}', '"name" must be a string, not 7'),
        (b'{"name":"b","version":-1,"data":1}', "record 'b': version must be an int from 0"),
        (b'{"name":"","version":1,"data":1}', "record '': a name must not be empty"),
        (b'{"name":"\\ud800","version":1,"data":1}', "a name must be valid Unicode"),
        (b'{"name":"b","version":1,"data":1,"ttl":-1}', "record 'b': ttl must be whole seconds"),
        (b'{"name":"b","version":1,"data":1,"tll":1}', "'tll' isn't part of it"),
    ],
)
def test_a_broken_line_ends_the_command_with_its_number(line: bytes, error: str, url: Url) -> None:
    done = invoke("set", *url, stdin=b'\n{"name":"a","version":1,"data":1}\n' + line + b"\n")
    assert done.status == 1
    assert done.err.startswith("dscache: standard input, line 3: ")
    assert error in done.err
    assert done.err.endswith("; the lines after it weren't tried\n")
    assert done.err.count("\n") == 1
    assert [one["name"] for one in done.lines] == ["a"]
    assert invoke("head", "a", *url).status == 0


@pytest.mark.parametrize("command", ["get", "head", "delete", "set"])
@pytest.mark.parametrize("stdin", [b"", b"\n"])
def test_an_empty_input_is_told(command: str, stdin: bytes, url: Url) -> None:
    done = invoke(command, *url, stdin=stdin)
    what = "record" if command == "set" else "name"
    assert (done.status, done.out, done.err) == (0, "", f"dscache: no {what} was given\n")


@pytest.mark.parametrize("word", ["", "\udcff"], ids=["empty", "surrogate"])
def test_a_wrong_name_removes_nothing(word: str, url: Url) -> None:
    invoke("set", "a", "1", "1", *url)
    done = invoke("delete", "a", word, "b", *url)
    assert (done.status, done.out) == (1, "")
    assert invoke("head", "a", *url).status == 0


def test_a_name_that_is_not_utf8_is_not_written(url: Url, client: redis_py.Redis) -> None:
    line = b'{"name":"%b","version":1,"data":1}\n'
    done = invoke("set", *url, stdin=line % "a\ufffd".encode() + line % b"a\xff")
    assert (done.status, len(done.lines)) == (1, 1)
    assert done.err == (
        "dscache: standard input, line 2: record 'a\ufffd': its name is not UTF-8; the lines after "
        "it weren't tried\n"
    )


def test_an_endless_stream_is_answered_as_it_arrives(url: Url) -> None:
    invoke("set", "a", "1", "[]", *url)
    with running("get", *url) as process:
        assert process.stdin
        assert process.stdout
        for _ in range(3):
            process.stdin.write(b"a\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["name"] == "a"
        process.stdin.close()
        assert process.wait(PATIENCE) == 0


def test_a_reader_that_stops_ends_the_command_quietly(url: Url) -> None:
    invoke("set", "a", "1", "[]", *url)
    with running("get", *url) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        process.stdin.write(b"a\n")
        process.stdin.flush()
        assert process.wait(PATIENCE) == 1
        assert process.stderr.read() == b""


def test_ctrl_c_ends_the_command_quietly(url: Url) -> None:
    invoke("set", "a", "1", "[]", *url)
    with running("get", *url) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(b"a\n")
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert process.stderr.read() == b""


# -- a terminal


def test_a_terminal_gets_a_table(url: Url) -> None:
    long = "x" * 300
    for name, data in (("user/1", '{"a":1}'), ("user/2", json.dumps(long))):
        invoke("set", name, "7", data, *url)
    status, written = run_on_terminal("head", "user/1", "user/2", long, *url, columns=60)
    assert status == 1
    assert "\x1b[33mno record" in written
    lines = plain(written).splitlines()
    assert max(map(len, lines)) <= 60
    assert re.split("  +", lines[0].strip()) == ["name", "version"]
    assert re.split("  +", lines[2].strip()) == ["user/1", "7"]
    # A long name is folded.
    assert plain(written).count("x") == 300


def test_a_terminal_gets_indented_data_with_its_size_and_lifetime(
    url: Url, client: redis_py.Redis
) -> None:
    data = rb'{"a":[1,{"b":1e400}],"c":[],"d":"\ud800 {\"","e":12345678901234567890123}'
    client.mset({"user/1_v": 7, "user/1_d": data, "user/2_v": 8})
    client.set("user/2_d", '"' + "x" * 300 + '"')
    for half in ("user/2_v", "user/2_d"):
        client.expire(half, 7200 + 30)
    status, written = run_on_terminal("get", "user/1", "user/2", "away", *url, columns=60)
    assert status == 1
    assert "\x1b[33mno record" in written
    assert plain(written).splitlines() == [
        f"user/1  version 7, {len(data)} bytes, no expiry",
        "{",
        '  "a": [',
        "    1,",
        "    {",
        '      "b": 1e400',
        "    }",
        "  ],",
        '  "c": [],',
        r'  "d": "\ud800 {\"",',
        '  "e": 12345678901234567890123',
        "}",
        "",
        "user/2  version 8, 302 bytes, expires in 2 h",
        # Whole, and folded by the terminal alone.
        '"' + "x" * 300 + '"',
        "",
        "away  no record",
    ]
    status, written = run_on_terminal("get", "user/1", *url, NO_COLOR="1")
    assert status == 0
    assert "\x1b[3" not in written


def test_data_is_indented_however_it_is_nested(url: Url, client: redis_py.Redis) -> None:
    deep = b"[" * 3000 + b"]" * 3000
    client.mset({"a_v": 1, "a_d": deep, "b_v": 1, "b_d": "[1"})
    status, written = run_on_terminal("get", "a", "b", *url)
    assert status == 1
    assert re.sub(r"\s", "", plain(written).partition("expiry")[2]).startswith(deep.decode())
    assert "record 'b', version 1: the stored data isn't JSON" in plain(written)


def test_a_user_who_may_not_read_lifetimes_gets_the_records(
    records_server: EmbeddedServer, url: Url, client: redis_py.Redis
) -> None:
    invoke("set", "a", "1", "[]", *url)
    client.acl_setuser("bob", enabled=True, nopass=True, keys="*", commands=["+@all", "-pttl"])
    try:
        limited = records_server.url.replace("://", "://bob:x@")
        status, written = run_on_terminal("get", "a", "--url", limited)
    finally:
        client.acl_deluser("bob")
    assert (status, plain(written)) == (0, "a  version 1, 2 bytes\n[]\n")


# -- at each change


def test_a_record_is_printed_at_each_change(url: Url, client: redis_py.Redis) -> None:
    client.mset({"a_v": 1, "a_d": "[]"})
    with running("get", "a", "ab", "--watch", *url) as process:
        assert process.stdout
        assert process.stderr
        assert json.loads(process.stdout.readline()) == {"name": "a", "version": 1, "data": []}
        assert process.stderr.readline() == b"dscache: no record 'ab'\n"
        client.mset({"abc_v": 1, "abc_d": "1"})  # another record that begins so
        client.mset({"ab_v": 5, "ab_d": '{"n": 1}'})
        assert process.stdout.readline() == b'{"name":"ab","version":5,"data":{"n": 1}}\n'
        client.delete("ab_v", "ab_d")
        gone = {"name": "ab", "version": None, "data": None}
        assert json.loads(process.stdout.readline()) == gone
        client.flushall()
        assert json.loads(process.stdout.readline()) == {**gone, "name": "a"}
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert (process.stdout.read(), process.stderr.read()) == (b"", b"")


def test_a_damaged_record_does_not_end_a_watch(url: Url, client: redis_py.Redis) -> None:
    invoke("set", "a", "1", "1", *url)
    client.mset({"b_v": "no version", "b_d": "1"})
    with running("get", "a", "b", "--watch", "--json", *url) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["version"] == 1
        client.client_kill_filter(_type="normal", skipme=True)
        client.mset({"a_v": 2, "a_d": "2"})
        assert json.loads(process.stdout.readline())["version"] == 2
        client.mset({"a_v": 3, "a_d": "3"})
        assert json.loads(process.stdout.readline())["version"] == 3


def test_what_changed_in_a_gap_is_printed_behind_it(url: Url, client: redis_py.Redis) -> None:
    client.mset({"a_v": 1, "a_d": "1"})
    with running("get", "a", "--watch", *url) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        for version in (2, 3):
            with client.pipeline() as together:
                together.client_kill_filter(_type="normal", skipme=True)
                together.mset({"a_v": version, "a_d": "2"})
                together.execute()
            assert json.loads(process.stdout.readline())["version"] == version
        process.terminate()
        assert process.wait(PATIENCE) == 143
        assert b"changes may be missed from here on" in process.stderr.read()


def test_a_terminal_shows_the_time_of_each_change(url: Url, client: redis_py.Redis) -> None:
    client.mset({"a_v": 1, "a_d": "[]"})
    with on_terminal("get", "a", "--watch", *url) as terminal:
        terminal.until(r"a  \d\d:\d\d:\d\d, version 1, 2 bytes, no expiry\n\[\]\n")
        client.mset({"a_v": 2, "a_d": '{"n":1}'})
        terminal.until(r'\n\na  [\d:]{8}, version 2, 7 bytes, no expiry\n{\n  "n": 1\n}\n')
        client.delete("a_v", "a_d")
        terminal.until(r"\n\na  no record\n")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.rest()[0] == 130


def test_a_watch_needs_names(url: Url) -> None:
    done = invoke("get", "--watch", *url, stdin=b"a\n")
    assert (done.status, done.out) == (2, "")
    assert "--watch needs the names as arguments" in done.err


def test_a_terminal_without_colours_and_with_json(url: Url) -> None:
    invoke("set", "a", "1", '"\\u001b[2J"', *url)
    status, written = run_on_terminal("delete", "away", *url, NO_COLOR="1")
    assert (status, "no record" in written) == (1, True)
    assert "\x1b[3" not in written
    status, written = run_on_terminal("get", "a", *url, "--json")
    assert (status, json.loads(written)["version"]) == (0, 1)
    _, written = run_on_terminal("set", "a", "1", "[]", "--if-newer", *url)
    assert "not written: Redis holds the same or a newer version" in plain(written)


def test_a_terminal_without_unicode(url: Url) -> None:
    invoke("set", "a\u65e5", "1", '"\xe9"', *url)
    for words, shown in (
        (("get", "a\u65e5"), '"\\xe9"'),
        (("ls",), "a\\u65e5"),
        (("top", "--once"), "\\xb5s/op"),
    ):
        status, written = run_on_terminal(*words, *url, PYTHONIOENCODING="ascii")
        assert (status, shown in plain(written)) == (0, True)


def test_stored_data_is_shown_without_control_characters(url: Url, client: redis_py.Redis) -> None:
    client.mset({"a_v": 1, "a_d": b'"\xc2\x9b2J\x7f"'})
    _, written = run_on_terminal("get", "a", *url)
    assert "\x9b" not in written
    assert "\x7f" not in written


# -- invalid command lines


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("set", "a"), "a name needs a version and data"),
        (("set", "a", "1"), "a name needs a version and data"),
        (
            ("set", "a", "x", "[]"),
            "it must be a whole number from 0 to 9,223,372,036,854,775,807, not 'x'",
        ),
        (("set", "a", "-12", "-5"), "VERSION"),
        (("set", "a", "1", "-5", "--ttll", "6"), "--ttll"),
        (("set", "a", "1", "[]", "--ttl", "-5"), "it must be a whole number from 0 to "),
        (("get", "-1"), "a name or data that begins with - goes behind --"),
        (("ls", "--top", "0"), "it must be a whole number of 1 or more, not '0'"),
        (("bench", "--read-ratio", "nan"), "it must be a number from 0 to 1, not 'nan'"),
        (("bench", "--read-ratio", "some"), "it must be a number from 0 to 1, not 'some'"),
        (("ls", "--sort", "size"), "'--sort': 'size' is not one of 'name', "),
        (("set", "a", "1", "text"), "it is not JSON"),
        (("set", "a", "1", "{'a': 1}"), "it is not JSON"),
        (("set", "a", "1", "Ada L."), "(a string needs quotes: '\"Ada L.\"')"),
        (("get", "a", "--layout", "hash"), "'deepstream', 'hashtag'"),
    ],
)
def test_a_wrong_command_line(words: tuple[str, ...], error: str) -> None:
    done = invoke(*words, "--url", "127.0.0.1:1")
    assert (done.status, done.out) == (2, "")
    assert error in done.err


@pytest.mark.parametrize("command", ["get", "head", "delete", "set", "import"])
def test_a_terminal_is_not_read_from(command: str) -> None:
    ours, its = pty.openpty()
    words = (command, "-") if command == "import" else (command,)
    with open(ours), open(its) as terminal:
        done = invoke(*words, "--url", "127.0.0.1:1", source=terminal)
    assert (done.status, done.out) == (2, "")
    assert "nothing is piped into standard input" in done.err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("get", "\udcff"), "record '\\udcff': a name must be valid Unicode"),
        (("get", ""), "record '': a name must not be empty"),
    ],
)
def test_invalid_records(words: tuple[str, ...], error: str, url: Url) -> None:
    done = invoke(*words, *url)
    assert (done.status, done.out) == (1, "")
    assert error in done.err


def test_an_unreachable_server() -> None:
    done = run("get", "a", "--url", "127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "dscache: no connection to 127.0.0.1:1: Connection refused\n"


def test_no_names_ask_whether_the_server_can_be_reached(url: Url) -> None:
    """A script tells a missing record from a lost server so, as the status of both is 1."""
    assert invoke("head", *url).status == 0
    assert invoke("head", "a", *url).status == 1
    assert invoke("head", "--url", "127.0.0.1:1").status == 1


def test_a_refused_connection_has_its_remedy(url: Url) -> None:
    for command in ("ls", "get"):
        done = invoke(command, "a", "--url", f"{url[1]}/99")
        assert (done.status, done.out) == (1, "")
        assert "DB index is out of range" in done.err
        assert "choose a smaller db, or raise the server's number of databases" in done.err


def test_tls_to_a_server_without_it_has_its_remedy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = {"host": "127.0.0.1", "port": silent.getsockname()[1], "connectTimeout": 200}
        file = tmp_path / "config.yml"
        file.write_text(json.dumps({"name": "redis", "options": {**options, "tls": True}}))
        done = invoke("ls", "--config", str(file))
    assert (done.status, done.out) == (1, "")
    assert "no answer within 200 ms" in done.err
    assert done.err.endswith("if it speaks no TLS on this port, use redis:// or leave tls out\n")


def test_a_wrong_password_is_not_shown() -> None:
    with EmbeddedServer(args=("--requirepass", "right-one")) as server:
        done = invoke("get", "a", "--url", server.url.replace("://", "://:hidden-one@"))
    assert done.status == 1
    assert "hidden-one" not in done.err
    assert done.err.startswith("dscache: WRONGPASS ")


# -- layouts and addresses


def test_the_layout_and_the_prefix(
    records_server: EmbeddedServer, client: redis_py.Redis, tmp_path: Path
) -> None:
    client.mset({"{a}_v": 1, "{a}_d": "[]", "p:b_v": 2, "p:b_d": "{}"})
    url = ("--url", records_server.url)
    assert invoke("head", "a", *url).status == 1
    assert invoke("head", "a", *url, "--layout", "hashtag").lines[0]["version"] == 1
    options = {"port": records_server.port, "host": "127.0.0.1", "keyPrefix": "p:"}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"name": "redis", "options": options}))
    assert invoke("head", "b", "--config", str(file)).lines[0]["version"] == 2


async def test_the_primaries_are_read(
    records_server: EmbeddedServer, client: redis_py.Redis
) -> None:
    options = {"url": records_server.url, "nearCache": {}, "scaleReads": "slave"}
    async with open_cache(load({"name": "redis", "options": options})) as cache:
        assert cache.config.options.near_cache is None
        assert cache.config.options.scale_reads == "master"
        assert cache.config.options.key_layout == "auto"


def test_a_socket(records_server: EmbeddedServer, client: redis_py.Redis) -> None:
    client.mset({"a_v": 1, "a_d": "[]"})
    assert invoke("get", "a", "--url", f"unix://{records_server.path}").lines[0]["data"] == []


def test_a_cache_in_memory_can_not_be_reached(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text("cache: {name: memory}")
    done = invoke("get", "a", "--config", str(file))
    assert done.status == 1
    assert done.err == "dscache: config.yml: the cache is inside its process; name a server\n"


def test_both_cores_print_the_same(url: Url, backend: str) -> None:
    text = b'{"name":"a","version":9223372036854775807,"data":[1,"\xc3\xbc"]}\n'
    assert invoke("set", *url, stdin=text).status == 0
    assert invoke("get", "a", *url).out.encode() == text


# -- lines


async def _lines(*pieces: bytes) -> list[list[bytes]]:
    async def given():
        for piece in pieces:
            yield piece

    return [lines async for lines in ndjson.Lines(given(), "file")]


async def test_lines_are_returned_as_soon_as_they_are_complete() -> None:
    assert await _lines(b"a\nb\nc", b"d", b"e\n", b"f") == [[b"a", b"b"], [b"cde"], [b"f"]]
    assert await _lines() == []
    assert await _lines(b"\n", b"\n") == [[b""], [b""]]


async def test_an_endless_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ndjson, "_LONGEST", 1000)
    with pytest.raises(DscacheError, match=r"^file, line 1: it has no line end$"):
        await _lines(*[b"x" * 100] * 20)


async def test_a_pipe_and_a_file_are_read_alike(tmp_path: Path) -> None:
    text = b"x" * 200_000
    ours, its = os.pipe()
    writing = asyncio.get_running_loop().run_in_executor(None, _write_all, its, text)
    assert b"".join([piece async for piece in ndjson.pieces_of(ours)]) == text
    await writing
    os.close(ours)
    (tmp_path / "file").write_bytes(text)
    with (tmp_path / "file").open("rb") as file:
        assert b"".join([piece async for piece in ndjson.pieces_of(file.fileno())]) == text


def _write_all(file: int, text: bytes) -> None:
    with open(file, "wb") as opened:
        opened.write(text)


def test_a_record_of_invalid_json_prints_no_line() -> None:
    with pytest.raises(RecordError, match=r"^record 'a', version 1: the stored data isn't JSON"):
        ndjson.encode("a", 1, b'1,"x":2')


@pytest.mark.parametrize(
    ("line", "raw"),
    [
        (b'{"name":"a","version":1,"data":{"b":1},"ttl":5}', b'{"b":1}'),
        (b'{"name":"a","version":1,"data":{"b":"\\ud800","ttl":6},"ttl":5}', None),
        (b'{"name":"a","version":1,"data":"\\ud800\\"","ttl":5}', b'"\\ud800\\""'),
        # Not in the format written by dscache, and therefore in other words.
        (b'{"version":1,"ttl":5,"name":"a","data":["\\uD800", 1]}', b'["\\ud800",1]'),
        (b'{"name":"a","version":1,"data":1,"data":"\\uD800","ttl":5}', b'"\\ud800"'),
    ],
)
async def test_the_documented_lines_are_what_a_cache_holds(line: bytes, raw: bytes | None) -> None:
    stated = ndjson.decode(line)
    assert (stated.name, stated.version, stated.ttl) == ("a", 1, 5)
    async with AsyncCache.from_config({"name": "memory"}) as cache:
        await cache.set(stated.name, stated.version, stated.data)
        record = await cache.get("a")
        assert record is not None
        assert record.raw == (b'{"b":"\\ud800","ttl":6}' if raw is None else raw)
