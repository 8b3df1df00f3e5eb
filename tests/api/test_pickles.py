"""Records and messages as pickles: from either core to the other, and from dscache 0.1."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest

import dscache
from dscache import _backend
from tests.core.test_backend import run

# The pickles of dscache 0.1 were made by that release itself, with both cores and every protocol.
OLD = json.loads((Path(__file__).parents[1] / "data" / "pickles_0.1.json").read_text())
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
# How a process chooses its core: the variable, and which extension is missing.
PROCESSES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "fast": (None, ()),
    "pure": ("pure", ()),
    "pure, without the extension": ("pure", ("fast",)),
    "fallen back on pure": (None, ("fast",)),
}
READ = """
import base64, copy, pickle
import dscache
record = dscache.Record("user/é", 7, b'{"a":1}', True)
message = dscache.Message(4, "server-é", b'{"b":2}')
count = 0
for kind, text in %r:
    value = pickle.loads(base64.b64decode(text))
    if kind == "record":
        assert type(value) is dscache.Record, type(value)
        assert value == record and hash(value) == hash(record)
        assert (value.stale, value.data) == (True, {"a": 1})
    else:
        assert type(value) is dscache.Message, type(value)
        assert value == message and hash(value) == hash(message)
        assert value.data == {"b": 2}
    for copied in (copy.copy(value), copy.deepcopy(value)):
        assert type(copied) is type(value) and copied == value
    count += 1
print(dscache.BACKEND, count)
"""


def values(core: Any) -> dict[str, Any]:
    return {
        "record": core.Record("user/é", 7, b'{"a":1}', True),
        "message": core.Message(4, "server-é", b'{"b":2}'),
    }


def read(pickles: list[tuple[str, str]], process: str) -> None:
    """Load pickles in a separate process, and compare them with the objects of its core."""
    variable, missing = PROCESSES[process]
    ended = run(READ % (pickles,), variable, sabotaged=missing)
    assert ended.returncode == 0, ended.stderr
    chosen = "fast" if process == "fast" else "pure"
    assert ended.stdout == f"{chosen} {len(pickles)}\n"


def test_old_pickles_cover_both_cores_and_all_protocols() -> None:
    made = {(one["core"], one["kind"], one["protocol"]) for one in OLD}
    kinds = ("record", "message")
    assert made == {
        (core, kind, protocol)
        for core in ("fast", "pure")
        for kind in kinds
        for protocol in PROTOCOLS
    }
    names = {
        str(argument)
        for one in OLD
        for opcode, argument, _ in pickletools.genops(base64.b64decode(one["pickle"]))
        if opcode.name == "GLOBAL"
    }
    assert {name for name in names if name.startswith("dscache")} == {
        *("dscache._fast Record", "dscache._fast Message"),
        *("dscache._pure_record Record", "dscache._pure_messages Message"),
    }


@pytest.mark.parametrize("process", PROCESSES)
def test_pickles_of_the_first_release_are_loaded(process: str) -> None:
    read([(one["kind"], one["pickle"]) for one in OLD], process)


@pytest.mark.parametrize("process", PROCESSES)
def test_pickles_of_either_core_are_loaded(process: str, backend: str) -> None:
    pickles = [
        (kind, base64.b64encode(pickle.dumps(value, protocol)).decode())
        for kind, value in values(_backend.core).items()
        for protocol in PROTOCOLS
    ]
    read(pickles, process)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickle_names_only_the_package(backend: str, protocol: int) -> None:
    for kind, value in values(_backend.core).items():
        text = pickle.dumps(value, protocol)
        assert f"make_{kind}".encode() in text
        assert b"_fast" not in text
        assert b"_pure" not in text
        assert pickle.loads(text) == value


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy])
def test_a_copy_is_equal(backend: str, copy_of: Any) -> None:
    for value in values(_backend.core).values():
        copied = copy_of(value)
        assert type(copied) is type(value)
        assert copied == value


def test_unpickling_makes_objects_of_the_chosen_core(backend: str) -> None:
    made = dscache.make_record("a", 1, b"[]", True)
    assert made == _backend.core.Record("a", 1, b"[]")
    assert made.stale is True
    assert dscache.make_record("a", 1, b"[]").stale is False
    assert dscache.make_message(4, "A", b"{}") == _backend.core.Message(4, "A", b"{}")


def test_the_module_that_replaces_the_extension_is_no_core() -> None:
    ended = run(
        "import dscache\n"
        "from dscache import _backend\n"
        "try:\n    from dscache._fast import Pipeline\n"
        "except ImportError as error: print(type(error).__name__)\n"
        "try:\n    _backend.choose('fast')\n"
        "except ImportError as error: print(error)\n"
        "print(_backend.choose(None)[0])\n",
        "pure",
        sabotaged=("fast",),
    )
    first, second, third = ended.stdout.splitlines()
    assert (first, third) == ("ImportError", "pure")
    assert "it was not built" in second
    # If the extension is there, it may still be chosen.
    ended = run("from dscache import _backend\nprint(_backend.choose('fast')[1].Pipeline)", "pure")
    assert ended.stdout == "<class 'dscache._fast.Pipeline'>\n"
