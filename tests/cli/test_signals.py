"""SIGTERM and SIGHUP end every command as Ctrl-C does, wherever it is."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from typer.main import get_group

from dscache.cli.app import make_app
from dscache.embedded import EmbeddedServer
from tests.support.commands import PATIENCE
from tests.support.stalling import stalling

DEFAULT = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
RESUMES = "dscache: interrupted; the same command resumes\n"
# What each command may be doing, and the request at which the server stalls.
AT_WORK: Mapping[str, tuple[tuple[str, ...], bytes]] = {
    "get": (("get", "a"), b"MGET"),
    "get --watch": (("get", "a", "--watch"), b"MGET"),
    "set": (("set", "a", "1", "{}"), b"SET"),
    "head": (("head", "a"), b"a_v"),
    "delete": (("delete", "a"), b"DEL"),
    "edit": (("edit", "a"), b"MGET"),
    "ls": (("ls",), b"PTTL"),
    "ls --top": (("ls", "--top", "3"), b"SCAN"),
    "diff": (("diff", "empty.ndjson"), b"SCAN"),
    "doctor": (("doctor",), b"CONFIG"),
    "top": (("top",), b"INFO"),
    "top --json": (("top", "--json"), b"INFO"),
    "export": (("export", "all.ndjson.gz"), b"PTTL"),
    "export -": (("export", "-"), b"PTTL"),
    "import": (("import", "empty.ndjson"), b"HELLO"),
    "bench": (("bench", "--seconds", "60"), b"\r\nMGET\r\n"),
    "watch": (("watch", "--data"), b"TRACKING"),
    "migrate": (("migrate", "--to", "hashtag", "--yes"), b"SCAN"),
    "cluster": (("cluster",), b"CLUSTER"),
}
FROM_INPUT = {
    "get": ("get",),
    "set": ("set",),
    "head": ("head",),
    "delete": ("delete",),
    "import": ("import", "-"),
}
EXPECTED = {
    "export": RESUMES,
    "export -": "dscache: interrupted\n",
    "import": RESUMES,
    "migrate": RESUMES,
    "ls": "dscache: interrupted; there are more records\n",
    "ls --top": "dscache: interrupted; there are more records\n",
    "diff": "dscache: interrupted; not all records were compared\n",
}


def alternately(names: Iterable[str], *numbers: signal.Signals) -> list[object]:
    """Return a case for each name, with the signals in turn, as all end a command the same way."""
    return [
        pytest.param(name, number, id=f"{name}-{number.name}")
        for name, number in zip(names, itertools.cycle(numbers), strict=False)
    ]


@pytest.fixture(scope="module")
def holder() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as started:
        yield started


@pytest.fixture
def client(holder: EmbeddedServer) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(holder.url) as opened:
        opened.flushall()
        opened.mset({f"{name}_{half}": 1 for name in "abc" for half in "vd"})
        yield opened


@contextmanager
def started(
    folder: Path, number: signal.Signals, *words: str, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a folder, with the signal's usual effect, which nohup would change."""
    (folder / "empty.ndjson").touch()
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(
        [sys.executable, "-m", "dscache", *words],
        cwd=folder,
        env={**os.environ, **environment},
        preexec_fn=partial(signal.signal, number, DEFAULT[number]),
        text=True,
        **pipes,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_command_is_here() -> None:
    commands = {one.partition(" ")[0] for one in AT_WORK}
    assert commands == set(get_group(make_app()).commands)


@pytest.mark.parametrize(("name", "number"), alternately(AT_WORK, signal.SIGTERM, signal.SIGHUP))
def test_a_command_whose_server_stalls(
    name: str,
    number: signal.Signals,
    holder: EmbeddedServer,
    client: redis_py.Redis,
    tmp_path: Path,
) -> None:
    """It ends, although no answer comes, and leaves no process and no file of its own."""
    words, request = AT_WORK[name]
    with stalling(holder.port, request) as server:
        url = f"redis://{server.address}"
        with started(tmp_path, number, *words, "--url", url, TMPDIR=str(tmp_path)) as process:
            assert server.reached.wait(PATIENCE)
            process.send_signal(number)
            out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == STATUS[number], err
    if name == "bench":
        first, second = err.splitlines()
        assert first == "dscache: interrupted"
        assert second.startswith("dscache: records that begin with dscache-bench/")
        assert json.loads(out)["records"] == 10_000
        return
    assert err.removeprefix(f"dscache: watching {server.address}\n") == EXPECTED.get(name, "")
    # An export resumes by its own files.
    left = {one.name for one in tmp_path.iterdir()} - {"empty.ndjson"}
    assert left <= {"all.ndjson.gz.partial", "all.ndjson.gz.resume"}


@pytest.mark.parametrize(
    ("name", "number"), alternately(("watch", "bench", "top --json"), signal.SIGTERM, signal.SIGHUP)
)
def test_a_command_in_the_background_of_a_script(
    name: str,
    number: signal.Signals,
    holder: EmbeddedServer,
    client: redis_py.Redis,
    tmp_path: Path,
) -> None:
    """Shells let it ignore SIGINT; it does, and still ends by other signals."""

    def in_background() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(number, signal.SIG_DFL)

    words, request = AT_WORK[name]
    with stalling(holder.port, request) as server:
        command = [sys.executable, "-m", "dscache", *words, "--url", f"redis://{server.address}"]
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen(command, cwd=tmp_path, preexec_fn=in_background, **pipes) as process:
            try:
                assert server.reached.wait(PATIENCE)
                process.send_signal(signal.SIGINT)
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.3)
                process.send_signal(number)
                process.communicate(timeout=PATIENCE)
            finally:
                process.kill()
    assert process.returncode == STATUS[number]


@pytest.mark.parametrize(("name", "number"), alternately(FROM_INPUT, *STATUS))
def test_a_command_that_waits_for_input(
    name: str,
    number: signal.Signals,
    holder: EmbeddedServer,
    client: redis_py.Redis,
    tmp_path: Path,
) -> None:
    before = client.info("stats")["total_connections_received"]
    with started(tmp_path, number, *FROM_INPUT[name], "--url", holder.url) as process:
        wait_for(
            lambda: client.info("stats")["total_connections_received"] > before,
            process,
        )
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    expected = "dscache: interrupted\n" if name == "import" else ""
    assert (process.returncode, out, err) == (STATUS[number], "", expected)


@pytest.mark.parametrize(
    ("name", "number"), alternately(("get", "export -", "ls"), *STATUS, signal.SIGTERM)
)
def test_a_command_whose_reader_pauses(
    name: str,
    number: signal.Signals,
    holder: EmbeddedServer,
    client: redis_py.Redis,
    tmp_path: Path,
) -> None:
    """It ends before anything more is read."""
    client.mset({f"long/{n:0300}_{half}": 1 for n in range(500) for half in "vd"})
    client.mset({"long_v": 1, "long_d": '"%s"' % ("a" * 200_000)})
    words = ("get", "long") if name == "get" else AT_WORK[name][0]
    with started(tmp_path, number, *words, "--url", holder.url) as process:
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        size = fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
        held = bytearray(4)

        def is_full() -> bool:
            fcntl.ioctl(pipe, termios.FIONREAD, held)
            return int.from_bytes(held, sys.byteorder) > size - 4096

        wait_for(is_full, process)
        process.send_signal(number)
        assert process.wait(PATIENCE) == STATUS[number]
        assert process.stderr is not None
        assert process.stderr.read() == EXPECTED.get(name, "")


def test_a_program_whose_metrics_stall(tmp_path: Path) -> None:
    with stalling() as server:
        url = f"http://{server.address}/metrics"
        with started(tmp_path, signal.SIGHUP, "top", "--metrics", url) as process:
            assert server.reached.wait(PATIENCE)
            process.send_signal(signal.SIGHUP)
            out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (129, "", "")


def test_a_load_that_has_not_begun(tmp_path: Path) -> None:
    with (
        stalling() as server,
        started(tmp_path, signal.SIGTERM, "bench", "--url", server.address) as process,
    ):
        assert server.reached.wait(PATIENCE)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (143, "")
    assert err == "dscache: interrupted; no record was written\n"


# -- edit: a child process, and a file


EDITOR = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
text, mark, *options = sys.argv[1:-1]
if "stubborn" in options:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if text:
    pathlib.Path(sys.argv[-1]).write_text(text)
pathlib.Path(mark).write_text(str(os.getpid()))
while pathlib.Path(mark).exists():
    time.sleep(0.01)
"""


def editor(folder: Path, *words: str) -> str:
    """Return the EDITOR that writes a text, tells its pid in the file ``mark``, and waits."""
    program = folder / "editor.py"
    program.write_text(EDITOR)
    return shlex.join([sys.executable, str(program), words[0], str(folder / "mark"), *words[1:]])


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "number"), [("", signal.SIGTERM), ('{"edited": true}', signal.SIGHUP)]
)
def test_the_editor_ends_with_the_command(
    text: str,
    number: signal.Signals,
    holder: EmbeddedServer,
    client: redis_py.Redis,
    tmp_path: Path,
) -> None:
    """Edited text is kept."""
    mark = tmp_path / "mark"
    with started(
        *(tmp_path, number, "edit", "a", "--url", holder.url),
        **{"VISUAL": editor(tmp_path, text), "TMPDIR": str(tmp_path)},
    ) as process:
        wait_for(lambda: mark.exists() and mark.read_text(), process)
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == STATUS[number]
    assert not is_running(int(mark.read_text()))
    left = [one for one in tmp_path.iterdir() if one.name.startswith("dscache-")]
    if text:
        (kept,) = left
        assert kept.read_text() == text
        assert err == f"dscache: the edited text is in {kept}\n"
    else:
        assert (left, err) == ([], "")
    assert client.get("a_v") == b"1"


def test_an_editor_that_ignores_the_signal_is_killed(
    holder: EmbeddedServer, client: redis_py.Redis, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    with started(
        *(tmp_path, signal.SIGTERM, "edit", "a", "--url", holder.url),
        **{"VISUAL": editor(tmp_path, "", "stubborn"), "TMPDIR": str(tmp_path)},
    ) as process:
        wait_for(lambda: mark.exists() and mark.read_text(), process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (143, "")
    assert not is_running(int(mark.read_text()))


def test_ctrl_c_belongs_to_the_editor(
    holder: EmbeddedServer, client: redis_py.Redis, tmp_path: Path
) -> None:
    """The terminal sends it to both, and an editor uses it for something of its own."""
    mark = tmp_path / "mark"
    with started(
        *(tmp_path, signal.SIGINT, "edit", "a", "--url", holder.url),
        VISUAL=editor(tmp_path, "[2]"),
    ) as process:
        wait_for(lambda: mark.exists() and mark.read_text(), process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        mark.unlink()
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "dscache: 'a' written as version 2\n")
    assert client.get("a_d") == b"[2]"


# -- the exit status


# Python itself would end by SIGINT after the first, and older versions wrap the second.
@pytest.mark.parametrize(
    "work",
    [
        "exec('os.kill(os.getpid(), signal.SIGTERM)', globals())",
        "type('', (), {'a': type('', (), {'__set_name__': end})()})",
    ],
    ids=["executed text", "a class"],
)
def test_an_interrupt_within_an_import_gives_the_status_too(work: str) -> None:
    program = (
        "import os, signal\n"
        "from dscache import cli\n"
        "def end(*_):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "def interrupted():\n"
        f"    {work}\n"
        "cli._imported_app = interrupted\n"
        "cli.main()\n"
    )
    done = run_program(program, signal.SIGTERM, signal.SIG_DFL)
    assert (done.returncode, done.stderr) == (143, b"")


def run_program(
    program: str, number: signal.Signals, handler: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run a program of Python that begins with this handler of a signal."""
    return subprocess.run(
        [sys.executable, "-c", program],
        preexec_fn=partial(signal.signal, number, handler),
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )


def test_ctrl_c_while_the_process_ends() -> None:
    program = (
        "import atexit, os, signal, sys\n"
        "sys.argv = ['dscache', '--version']\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "from dscache import cli\n"
        "cli.main()\n"
    )
    done = run_program(program, signal.SIGINT, signal.default_int_handler)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


STRIKE = """
import os, signal, sys

class Striker:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Striker())
"""
PROGRAM = Path(sys.executable).with_name("dscache")


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ([sys.executable, "-m", "dscache"], "dscache._backend"),
        ([sys.executable, "-m", "dscache"], "dscache.core.loading"),
        ([sys.executable, "-m", "dscache"], "dscache.cli"),
        ([sys.executable, "-m", "dscache"], "dscache.cli.streams"),
        ([sys.executable, "-mdscache"], "msgspec"),
        ([str(PROGRAM)], "dscache._backend"),
        ([str(PROGRAM)], "dscache.errors"),
        ([str(PROGRAM)], "dscache.cli.signals"),
        ([str(PROGRAM)], "dscache.cli.app"),
    ],
    ids=lambda value: value if isinstance(value, str) else Path(value[-1]).name,
)
def test_ctrl_c_during_the_imports(command: list[str], module: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(STRIKE.format(module=module))
    done = subprocess.run(
        [*command, "ls"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_during_the_imports_of_another_program(tmp_path: Path) -> None:
    """It is the program's own affair."""
    (tmp_path / "sitecustomize.py").write_text(STRIKE.format(module="dscache._backend"))
    code = "try:\n import dscache\nexcept KeyboardInterrupt:\n print('its own')"
    done = subprocess.run(
        [sys.executable, "-c", code, "dscache"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("its own\n", "")
