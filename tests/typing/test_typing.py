"""Type checkers infer the documented types of the public API and refuse misuse of it.

The other files here state the types by ``assert_type``. A line that must be refused carries an
ignore comment for each checker, and both report a comment that ignores nothing. basedpyright is
pyright in a wheel that brings its own Node; in the mode "standard" both report the same.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import blocks

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
STATED = sorted(HERE.glob("[!_]*.py"))
# Seconds; without a cache, mypy reads every dependency.
PATIENCE = 300


def run(*command: str) -> subprocess.CompletedProcess[str]:
    # In the folder of the project: neither checker follows an editable install.
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def mypy(cache: Path, *files: Path | str) -> subprocess.CompletedProcess[str]:
    # Errors in dscache itself are for `make lint`, which has all stubs.
    settings = ("--config-file=", "--strict", "--python-version=3.11", "--follow-imports=silent")
    return run("mypy", *settings, f"--cache-dir={cache}", *map(str, files))


def pyright(settings: Path) -> subprocess.CompletedProcess[str]:
    return run("basedpyright", f"--project={settings}", f"--pythonpath={sys.executable}")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of mypy, which reads every dependency for the first test only."""
    return tmp_path_factory.mktemp("cache")


def test_mypy_infers_the_documented_types(cache: Path) -> None:
    done = mypy(cache, *STATED)
    assert done.returncode == 0, done.stdout


def test_mypy_accepts_the_typed_programs_of_the_pages(tmp_path: Path, cache: Path) -> None:
    programs = []
    for page in ("frameworks", "watch"):
        for block in blocks(PROJECT / "docs" / f"{page}.md"):
            if block.language == "python" and "->" in block.text:
                programs.append(tmp_path / f"{page}_{block.line}.py")
                programs[-1].write_text(block.text, encoding="utf-8")
    assert len(programs) == 3
    done = mypy(cache, "--allow-untyped-defs", *programs)
    assert done.returncode == 0, done.stdout


def test_pyright_infers_the_documented_types() -> None:
    done = pyright(HERE)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_wrong_type_is_reported(checker: str, tmp_path: Path, cache: Path) -> None:
    """A checker that fails to find dscache would take every name in it for Any."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from typing import assert_type\n\nimport dscache\n\n"
        "def wrong(cache: dscache.Cache) -> None:\n"
        '    assert_type(cache.head("n"), str)\n'
        '    cache.head("n")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]\n'
    )
    settings = (HERE / "pyrightconfig.json").read_text(encoding="utf-8")
    (tmp_path / "pyrightconfig.json").write_text(settings.replace("../..", str(PROJECT)))
    done = mypy(cache, wrong) if checker == "mypy" else pyright(tmp_path)
    assert done.returncode == 1, done.stdout
    assert "int | None" in done.stdout
    assert "2 errors" in done.stdout
