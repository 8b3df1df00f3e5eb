"""edit: one record's data in an editor."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis as redis_py

from dscache import Cache
from dscache.embedded import EmbeddedServer
from tests.support.commands import Done, invoke, plain, run_on_terminal

Edit = Callable[..., Done]


@pytest.fixture(scope="module")
def edited_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as started:
        yield started


@pytest.fixture
def cache(edited_server: EmbeddedServer) -> Iterator[Cache]:
    with Cache(edited_server.url) as opened:
        opened.set("user/1", 3, {"firstname": "Ada", "visits": 1})
        opened.delete_bulk(["user/2"])
        yield opened


@pytest.fixture
def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make an editor of Python statements, which change ``text``, the text of the file."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("VISUAL", raising=False)

    def make(code: str) -> None:
        program = tmp_path / "editor.py"
        program.write_text(
            "import pathlib, sys\nfile = pathlib.Path(sys.argv[1])\ntext = file.read_text()\n"
            f"{code}\nfile.write_text(text)\n"
        )
        monkeypatch.setenv("EDITOR", shlex.join([sys.executable, str(program)]))

    return make


def left(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob("dscache-*"))


def test_a_change_is_the_next_version(
    cache: Cache, edited_server: EmbeddedServer, editor: Callable[[str], None], tmp_path: Path
) -> None:
    editor("assert '  \"firstname\": \"Ada\"' in text; text = text.replace('Ada', 'Augusta')")
    done = invoke("edit", "user/1", "--url", edited_server.url)
    assert (done.status, done.out) == (0, "")
    assert done.err == "dscache: 'user/1' written as version 4\n"
    record = cache.get("user/1")
    assert record is not None
    assert (record.version, record.data) == (4, {"firstname": "Augusta", "visits": 1})
    assert left(tmp_path) == []


def test_the_record_keeps_its_lifetime(
    cache: Cache, edited_server: EmbeddedServer, editor: Callable[[str], None]
) -> None:
    cache.set("user/1", 3, {"firstname": "Ada"}, ttl=1000)
    with redis_py.Redis(port=edited_server.port) as redis:
        end = redis.pexpiretime("user/1_v")
        editor("text = text.replace('Ada', 'Augusta')")
        assert invoke("edit", "user/1", "--url", edited_server.url).status == 0
        assert redis.pexpiretime("user/1_v") == redis.pexpiretime("user/1_d") == end > 0
    assert cache.head("user/1") == 4


def test_the_same_text_is_not_written(
    cache: Cache, edited_server: EmbeddedServer, editor: Callable[[str], None], tmp_path: Path
) -> None:
    editor("text += ' '")
    done = invoke("edit", "user/1", "--url", edited_server.url)
    assert (done.status, done.err) == (0, "dscache: unchanged; nothing was written\n")
    assert cache.head("user/1") == 3
    assert left(tmp_path) == []


def test_another_writer_is_not_overwritten(
    cache: Cache, edited_server: EmbeddedServer, editor: Callable[[str], None], tmp_path: Path
) -> None:
    editor(
        f"import dscache; dscache.Cache({edited_server.url!r}).set('user/1', 9, {{}}); text = '[]'"
    )
    done = invoke("edit", "user/1", "--url", edited_server.url)
    assert done.status == 1
    assert "written by another client in the meantime" in done.err
    (kept,) = left(tmp_path)
    assert (str(kept) in done.err, kept.read_text()) == (True, "[]")
    assert cache.head("user/1") == 9


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("text = '{'", "the text isn't JSON"),
        ("text = ''", "the text isn't JSON"),
        ("raise SystemExit(7)", "the editor ended with status 7; nothing was written"),
    ],
)
def test_what_is_not_written(
    code: str,
    error: str,
    cache: Cache,
    edited_server: EmbeddedServer,
    editor: Callable[[str], None],
    tmp_path: Path,
) -> None:
    editor(code)
    done = invoke("edit", "user/1", "--url", edited_server.url)
    assert (done.status, error in done.err) == (1, True)
    assert cache.head("user/1") == 3


def test_a_missing_record_needs_an_option(
    cache: Cache, edited_server: EmbeddedServer, editor: Callable[[str], None]
) -> None:
    editor("text = '[1]'")
    done = invoke("edit", "user/2", "--url", edited_server.url)
    assert done.status == 1
    assert done.err == "dscache: no record 'user/2'; --create begins one\n"
    done = invoke("edit", "user/2", "--create", "--url", edited_server.url)
    assert (done.status, cache.head("user/2")) == (0, 1)


def test_a_new_record_whose_text_is_left_as_it_is_is_not_written(
    cache: Cache, edited_server: EmbeddedServer, editor: Callable[[str], None], tmp_path: Path
) -> None:
    editor("assert text == '{}\\n'")
    done = invoke("edit", "user/2", "--create", "--url", edited_server.url)
    assert (done.status, done.err) == (0, "dscache: unchanged; nothing was written\n")
    assert cache.head("user/2") is None
    assert left(tmp_path) == []


def test_an_editor_that_does_not_exist(
    cache: Cache, edited_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISUAL", "/no/such/editor")
    done = invoke("edit", "user/1", "--url", edited_server.url)
    assert done.status == 2
    assert "'/no/such/editor' can't be run: No such file or directory; set it to an ed" in done.err


def test_the_default_editor_needs_a_terminal(
    cache: Cache, edited_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.delenv("EDITOR", raising=False)
    done = invoke("edit", "user/1", "--url", edited_server.url)
    assert done.status == 2
    assert "vi needs a terminal; set another editor" in done.err


def test_an_editor_that_removes_the_file(
    cache: Cache, edited_server: EmbeddedServer, editor: Callable[[str], None], tmp_path: Path
) -> None:
    editor("file.unlink(); raise SystemExit")
    done = invoke("edit", "user/1", "--url", edited_server.url)
    assert done.status == 1
    assert re.fullmatch(
        rf"dscache: the editor left no text: {tmp_path}/dscache-\w+\.json: "
        "No such file or directory; nothing was written\n",
        done.err,
    )


def test_a_terminal_is_asked_to_edit_again(
    cache: Cache, edited_server: EmbeddedServer, editor: Callable[[str], None], tmp_path: Path
) -> None:
    # The first time the text is broken, and the second time right.
    editor("text = '{' if '{}' not in text and text != '{' else '{\"a\":2}'")
    environment = {name: os.environ[name] for name in ("EDITOR", "TMPDIR")}
    status, written = run_on_terminal(
        "edit", "user/1", "--url", edited_server.url, typed=b"y\n", **environment
    )
    assert (status, "Edit it again?" in plain(written)) == (0, True)
    record = cache.get("user/1")
    assert record is not None
    assert json.loads(record.raw) == {"a": 2}
