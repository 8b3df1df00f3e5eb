"""docs/architecture.md names paths, functions and floors that the package has."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.support.documents import PROJECT, blocks, code, prose

PAGE = PROJECT / "docs" / "architecture.md"
PACKAGE = PROJECT / "dscache"
DRAWINGS = "\n".join(block.text for block in blocks(PAGE))
# A file, or a folder with its slash.
_PATH = re.compile(r"(?:\w+/)*\w+\.(?:pyx|pyi|pxi|py|md)\b|\b(?:\w+/)+(?![\w*])")
_STEP = re.compile(r"(\w+/\w+\.py|\w+\.py)[ `]+\(?`?(?:\w+\.)?(\w+)(?=:|`?\))")


def paths() -> list[str]:
    words = [*code(prose(PAGE)), *re.split(r"[\s`]+", DRAWINGS)]
    return sorted({path for word in words for path in _PATH.findall(word)})


@pytest.mark.parametrize("path", paths())
def test_every_path_exists(path: str) -> None:
    assert (PACKAGE / path).exists() or (PROJECT / path).exists()


def test_the_paths_are_found() -> None:
    assert {"core/router.py", "cli/", "core/resp.pxi", "_fast.pyx", "docs/configuration.md"} <= {
        *paths()
    }


def test_every_function_is_in_the_file_beside_it() -> None:
    steps = _STEP.findall(PAGE.read_text(encoding="utf-8"))
    assert ("aio/connection.py", "_wake") in steps
    assert ("core/recovery.py", "drop_late") in steps
    for path, name in steps:
        source = (PACKAGE / path).read_text(encoding="utf-8")
        assert re.search(rf"\bdef {name}\b", source), f"{path}: {name}"


def test_the_drawing_of_the_folders_is_what_lint_checks() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    layers, *_ = project["tool"]["importlinter"]["contracts"]
    drawing, *_ = blocks(PAGE)
    floors = []
    for layer in layers["layers"]:
        names = re.findall(r"dscache\.(\w+)", layer)
        places = [re.search(rf"\b{name}(?:/|\.py)", drawing.text) for name in names]
        assert all(places), layer
        floors.append(min(place.start() for place in places if place))
    assert floors == sorted(floors)
