"""Every snippet of the documentation is run, and its output is compared with the shown one."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import doctest
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from typer.main import get_group

import dscache
from dscache import _backend, _fast, config
from dscache.cli.app import make_app
from dscache.config import messages as message_config
from dscache.embedded import EmbeddedServer
from tests.support.documents import DOCUMENTS, PROJECT, Block, blocks

README = PROJECT / "README.md"
BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
PATIENCE = 60
# The environment that the examples of the documentation expect.
ENVIRON = {"REDIS_HOST": "10.0.0.1", "REDIS_PORT": "7000", "REDIS_PASSWORD": "secret"}


def in_language(*languages: str) -> pytest.MarkDecorator:
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: block.place)


def with_sessions() -> pytest.MarkDecorator:
    chosen = {block.document: None for block in BLOCKS if block.language == "pycon"}
    return pytest.mark.parametrize("document", chosen, ids=lambda document: document.name)


@pytest.fixture(scope="module")
def private_server() -> Iterator[EmbeddedServer]:
    """The server that the documentation's examples find at REDIS_PORT."""
    with EmbeddedServer() as started:
        yield started


@pytest.fixture
def folder(private_server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the README's config.yml in it; the server is empty."""
    with redis_py.Redis.from_url(private_server.url) as client:
        client.flushall()
    text = next(block.text for block in blocks(README) if block.language == "yaml")
    (tmp_path / "config.yml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIS_PORT", str(private_server.port))
    return tmp_path


def test_every_block_is_of_a_tested_kind() -> None:
    printed = {block.expected for block in BLOCKS}
    for block in BLOCKS:
        assert block.language in ("python", "pycon", "yaml", "sh", "text"), block.place
        # A text block is a program's output, a drawing, or the result of a run.
        told = block.text in printed or "──" in block.text or "records/s" in block.text
        told |= block.text.startswith("ACL SETUSER")  # see test_operating.py
        told |= block.text.startswith("user/1  version 3, 19 bytes")  # see cli/test_records.py
        assert block.language != "text" or told, block.place


# -- Python


class Session:
    """Runs the statements of one document as ``python -m asyncio`` does."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.names: dict[str, Any] = {"__name__": "__console__"}
        self._runner = runner

    def run(self, example: doctest.Example, place: str) -> str:
        """Run one statement; return its output, or the last line of its traceback."""
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        compiled = compile(example.source, place, "single", flags=flags, dont_inherit=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                self._runner.run(self._evaluate(compiled))
            except Exception as error:  # a documented one is compared, another one differs
                return traceback.format_exception_only(error)[-1]
        return printed.getvalue()

    async def _evaluate(self, compiled: types.CodeType) -> None:
        result = types.FunctionType(compiled, self.names)()
        if inspect.iscoroutine(result):
            await result

    def close(self) -> None:
        for value in list(self.names.values()):
            if isinstance(value, dscache.AsyncCache):
                self._runner.run(value.close())


@pytest.fixture
def session(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    # The documentation shows the output with the compiled core.
    fast = __import__("dscache._fast", fromlist=["core"])
    monkeypatch.setattr(_backend, "core", fast)
    monkeypatch.setattr(_backend, "BACKEND", "fast")
    monkeypatch.setattr(dscache, "BACKEND", "fast")
    monkeypatch.setattr(dscache, "Record", fast.Record)
    with asyncio.Runner() as runner:
        made = Session(runner)
        yield made
        made.close()


@with_sessions()
def test_session(document: Path, session: Session) -> None:
    check = doctest.OutputChecker().check_output
    for block in blocks(document):
        if block.language != "pycon":
            continue
        examples = doctest.DocTestParser().get_examples(block.text)
        assert examples, f"{block.place}: a session without a prompt"
        for example in examples:
            place = f"{document.name}:{block.line + example.lineno}"
            got = session.run(example, place)
            want = example.exc_msg or example.want
            assert check(want, got, 0), f"{place}: {example.source}gave {got}instead of {want}"


@in_language("python")
def test_program(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.document.name in ("messages.md", "deepstream.md"):
        own = next(one.text for one in blocks(block.document) if one.language == "yaml")
        (folder / "config.yml").write_text(own, encoding="utf-8")
    if block.document.name == "django.md":
        settings = next(one.text for one in blocks(block.document) if one.language == "python")
        (folder / "settings.py").write_text(settings, encoding="utf-8")
        monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "settings")
    program = folder / "program.py"
    program.write_text(block.text, encoding="utf-8")
    printed = run(folder, sys.executable, "-W", "error", str(program))
    assert printed == (block.expected or ""), block.place


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}"
    return done.stdout


# -- configuration


@in_language("yaml")
def test_configuration(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yml"
    path.write_text(block.text, encoding="utf-8")
    # Constructed, not only parsed: an unsupported option must not be shown as an example.
    if "clusterNode" in block.text:
        dscache.MessageNode(message_config.load(path, environ=ENVIRON))
    elif "shared: true" in block.text:
        monkeypatch.setattr(_backend, "BACKEND", "fast")
        monkeypatch.setattr(_backend, "core", _fast)
        dscache.Cache(config.load(path, environ=ENVIRON))
    else:
        dscache.AsyncCache(config.load(path, environ=ENVIRON))


def test_the_demo_has_the_configuration_of_the_readme(folder: Path) -> None:
    source = (PROJECT / "examples" / "demo.py").read_text(encoding="utf-8")
    assigned = {
        statement.targets[0].id: statement.value
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    readme = (folder / "config.yml").read_text(encoding="utf-8")
    assert ast.literal_eval(assigned["CONFIG"]) == readme


# -- the shell


def check_pip(words: list[str], folder: Path) -> None:
    """Check that the installed name is this project, with existing extras."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words[0] == "install"
    assert words[1:]
    for word in words[1:]:
        match = re.fullmatch(r"(\.|dscache)(?:\[([\w,]+)\])?", word)
        assert match, f"pip installs {word!r}"
        extras = set((match[2] or "").split(",")) - {""}
        assert extras <= project["optional-dependencies"].keys(), word


def check_make(words: list[str], folder: Path) -> None:
    """Check that the Makefile has these targets and variables."""
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert phony
    for word in words:
        name, sign, _ = word.partition("=")
        known = re.search(rf"\$[({{]{name}[)}}]", makefile) if sign else name in phony[1].split()
        assert known, f"the Makefile knows no {name}"


def check_python(words: list[str], folder: Path) -> None:
    """Run it."""
    run(folder, sys.executable, *words)


def check_dscache(words: list[str], folder: Path) -> None:
    """Check that this command exists with these options, without running it."""
    name, *arguments = words
    if name == "--version":
        assert run(folder, sys.executable, "-m", "dscache", name).startswith("dscache ")
        return
    get_group(make_app()).commands[name].make_context(name, arguments)


CHECKS: dict[str, Callable[[list[str], Path], None]] = {
    "pip": check_pip,
    "make": check_make,
    "python": check_python,
    "dscache": check_dscache,
}


@in_language("sh")
def test_commands(block: Block, folder: Path) -> None:
    assert block.text.strip(), block.place
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
        assert words, f"{block.place}: a line without a command: {line}"
        assert words[0] in CHECKS, f"{block.place}: no check for {line!r}"
        CHECKS[words[0]](words[1:], folder)


def test_the_readme_names_demo_and_test() -> None:
    commands = [block.text for block in blocks(README) if block.language == "sh"]
    lines = os.linesep.join(commands).splitlines()
    assert {"make demo", "make test"} <= {line.partition("#")[0].strip() for line in lines}
