"""The command line without usable output: a full disk, a pipe without a reader, no stream."""

from __future__ import annotations

import gzip
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis as redis_py
from typer.main import get_group

from dscache import cli
from dscache.cli.app import make_app
from dscache.embedded import EmbeddedServer
from tests.conftest import BY_AGE, SERVERS, _server_id
from tests.support.clusters import ClusterGroup
from tests.support.commands import PATIENCE, invoke, run

# These tests don't depend on the server's version.
pytestmark = [
    pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id),
    pytest.mark.usefixtures("server"),
]

BOM = b"\xef\xbb\xbf"
# What each command writes on standard output. A name that begins like another is a form of it.
COMMANDS = {
    "get": ("get", "a"),
    "get many": ("get", *(f"n{i}" for i in range(500))),
    "get --watch": ("get", "a", "--watch"),
    "head": ("head", "a"),
    "set": ("set", "a", "2", "{}"),
    "delete": ("delete", "a"),
    "edit": ("edit", "a"),
    "ls": ("ls",),
    "ls --top": ("ls", "--top", "3"),
    "diff": ("diff", "records.ndjson"),
    "doctor": ("doctor",),
    "top": ("top", "--once"),
    "top --json": ("top", "--json", "--interval", "0.1"),
    "export": ("export", "all.ndjson"),
    "export -": ("export", "-"),
    "import": ("import", "records.ndjson"),
    "bench": ("bench", "--seconds", "0.2", "--json"),
    "watch": ("watch",),
    "migrate": ("migrate", "--to", "hashtag", "--dry-run"),
    "migrate --yes": ("migrate", "--to", "hashtag", "--yes"),
    "cluster": ("cluster",),
    "version": ("--version",),
    "help": ("--help",),
    "help of a command": ("bench", "--help"),
}
# The command that writes nothing there; its editor may.
SILENT = "edit"


@pytest.fixture(scope="module")
def node() -> Iterator[str]:
    """The URL of a cluster of one node."""
    with ClusterGroup(BY_AGE[-1], primaries=1, replicas=0) as started:
        (primary,) = started.primaries()
        yield f"redis://{primary.host}:{primary.port}"


@pytest.fixture
def records(redis: redis_py.Redis, tmp_path: Path) -> Path:
    for name in ("a", *(f"n{i}" for i in range(500))):
        redis.mset({f"{name}_v": 1, f"{name}_d": '{"text":"%s"}' % ("x" * 300)})
    path = tmp_path / "records.ndjson"
    path.write_text('{"name":"b","version":1,"data":1}\n')
    return tmp_path


@contextmanager
def no_reader() -> Iterator[int]:
    reads, writes = os.pipe()
    os.close(reads)
    try:
        yield writes
    finally:
        os.close(writes)


@contextmanager
def full_disk() -> Iterator[int]:
    try:
        descriptor = os.open("/dev/full", os.O_WRONLY)
    except FileNotFoundError:
        pytest.fail("this system has no /dev/full, which stands for a full disk; Linux has it")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def result_of(name: str, stdout: int, cwd: Path, url: str) -> tuple[int, str]:
    """Run a command; return its exit status and its standard error. A live one is given changes."""
    words = COMMANDS[name]
    where = () if {"--version", "--help"} & set(words) else ("--url", url)
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "dscache", *words, *where],
        cwd=cwd,
        env={**os.environ, "EDITOR": "true"},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        try:
            begun = ""
            if name == "watch":
                assert process.stderr is not None
                begun = process.stderr.readline()
                assert begun.startswith("dscache: watching ")
                with redis_py.Redis.from_url(url) as client:
                    client.mset({"a_v": 2, "a_d": "{}"})
            _, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    return process.returncode, err


def test_every_command_is_here() -> None:
    named = {words[0] for words in COMMANDS.values() if not words[0].startswith("-")}
    assert named == set(get_group(make_app()).commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(command: str, records: Path, server: EmbeddedServer, node: str) -> None:
    with full_disk() as descriptor:
        done = result_of(command, descriptor, records, node if command == "cluster" else server.url)
    if command == SILENT:
        assert done == (0, "dscache: unchanged; nothing was written\n")
        return
    assert done == (
        1,
        "dscache: standard output can't be written: No space left on device; make room, or "
        "write elsewhere\n",
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_without_a_reader(
    command: str, records: Path, server: EmbeddedServer, node: str
) -> None:
    with no_reader() as descriptor:
        done = result_of(command, descriptor, records, node if command == "cluster" else server.url)
    # The reader left on purpose.
    assert done == (
        (0, "dscache: unchanged; nothing was written\n") if command == SILENT else (1, "")
    )


def test_no_output_at_all(records: Path, server: EmbeddedServer) -> None:
    done = subprocess.run(
        ["sh", "-c", '"$0" -m dscache get a --url "$1" >&-', sys.executable, server.url],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "dscache: standard output is closed; redirect it, for example to /dev/null\n"
    )


def test_no_standard_input(records: Path, server: EmbeddedServer) -> None:
    """No socket gets its number, which would end the process behind the write."""
    command = '"$0" -m dscache set new 1 {} --url "$1" <&-'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, server.url],
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_no_stream_for_errors(records: Path, server: EmbeddedServer) -> None:
    """An error text must not land among the results."""
    for where in (">&-", ">/dev/full"):
        command = f'"$0" -m dscache get no a --url "$1" 2{where}'
        done = subprocess.run(
            ["sh", "-c", command, sys.executable, server.url],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 1
        assert done.stdout.startswith('{"name":"a","version":1,')
        assert done.stdout.count("\n") == 1


def test_no_room_for_a_note(records: Path, server: EmbeddedServer) -> None:
    """The command does its work, and a wrong one has the status of a wrong one."""
    for words, status, written in (("get a", 0, '{"name":"a"'), ("gte a", 2, "")):
        done = subprocess.run(
            ["sh", "-c", f'"$0" -m dscache {words} 2>/dev/full', sys.executable],
            env={**os.environ, "DSCACHE_URL": server.url},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            timeout=PATIENCE,
            check=False,
        )
        assert (done.returncode, done.stdout[:11]) == (status, written)


@pytest.mark.parametrize("name", ["all.ndjson", "all.ndjson.gz"])
def test_an_export_to_a_file_of_limited_size(
    name: str, records: Path, server: EmbeddedServer
) -> None:
    """The same command resumes as soon as there is space."""
    status, err = limited(800, records, "export", name, "--url", server.url)
    assert status == 1
    assert err == f"dscache: {name}.partial: File too large; make room, or write elsewhere\n"
    again = run("export", name, "--url", server.url, cwd=records)
    assert again.returncode == 0
    found = (records / name).read_bytes()
    lines = gzip.decompress(found) if name.endswith(".gz") else found
    assert len(set(lines.splitlines())) == 501


def test_a_chart_for_which_there_is_no_room(records: Path, server: EmbeddedServer) -> None:
    """The figures are printed, and the records removed."""
    words = ("bench", "--seconds", "0.1", "--records", "10", "--plot", "latency.svg")
    status, err = limited(0, records, *words, "--url", server.url)
    assert status == 1
    assert err == "dscache: latency.svg: File too large; make room, or write elsewhere\n"
    with redis_py.Redis.from_url(server.url) as client:
        assert client.keys("dscache-bench/*") == []


def test_an_import_whose_progress_has_no_room(records: Path, server: EmbeddedServer) -> None:
    """It only loses the progress, as in a folder that can't be written."""
    status, err = limited(0, records, "import", "records.ndjson", "--url", server.url)
    assert (status, err) == (0, "")
    assert [one.name for one in records.iterdir()] == ["records.ndjson"]


@pytest.mark.parametrize("size", [0, 50])
def test_an_edit_without_room_for_the_text(
    size: int, records: Path, server: EmbeddedServer
) -> None:
    words = ("edit", "a", "--url", server.url)
    status, err = limited(size, records, *words, EDITOR="true", TMPDIR=str(records))
    assert status == 1
    assert err.startswith("dscache: no temporary file for the text: ")
    assert err.endswith("; set TMPDIR to a folder with room\n")
    assert [one.name for one in records.iterdir()] == ["records.ndjson"]


def limited(size: int, folder: Path, *words: str, **environment: str) -> tuple[int, str]:
    """Run a command whose files can't exceed a size; return its status and standard error."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    done = subprocess.run(
        [sys.executable, "-m", "dscache", *words],
        cwd=folder,
        env={**os.environ, **environment},
        preexec_fn=limit,
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stderr


# -- input with a byte order mark


@pytest.mark.parametrize("source", ["file", "gz", "standard input", "set"])
def test_records_behind_a_byte_order_mark(
    source: str, redis: redis_py.Redis, server: EmbeddedServer, tmp_path: Path
) -> None:
    text = BOM + b'{"name":"x","version":3,"data":1}\n{"name":"y","version":4,"data":2}\n'
    path = tmp_path / ("all.gz" if source == "gz" else "all")
    path.write_bytes(gzip.compress(text) if source == "gz" else text)
    words = {
        "standard input": ("import", "-"),
        "set": ("set",),
    }.get(source, ("import", str(path)))
    done = invoke(*words, "--url", server.url, stdin=text)
    assert done.status == 0, done.err
    assert redis.mget("x_v", "x_d", "y_v") == [b"3", b"1", b"4"]


def test_names_behind_a_byte_order_mark(redis: redis_py.Redis, server: EmbeddedServer) -> None:
    redis.mset({"a_v": 1, "a_d": "1"})
    done = invoke("get", "--url", server.url, stdin=BOM + b"a\n")
    assert (done.status, done.lines) == (0, [{"name": "a", "version": 1, "data": 1}])


def test_only_a_byte_order_mark(server: EmbeddedServer) -> None:
    for command in ("import", "set"):
        words = (command, "-") if command == "import" else (command,)
        assert invoke(*words, "--url", server.url, stdin=BOM + b"\n").status == 0


def test_the_streams_of_a_calling_program_are_kept(server: EmbeddedServer) -> None:
    """A program that calls the command line in its own process keeps its streams."""
    before = sys.stdout
    done = invoke("get", "no", "--url", server.url)
    assert done.status == 1
    assert sys.stdout is before
    assert issubclass(cli.OutputError, Exception)
