"""Test the wheel in dist/ as its users get it: a new environment, no compiler, the whole suite.

    python tests/packaging/installed.py [ARGUMENTS OF PYTEST]

The tests run in a folder that has everything but the package, so that the sources are out of
reach. Tests that need the sources are left out. ``make wheel`` builds the wheel and runs this.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
WORK = PROJECT / "build" / "wheel"
ENVIRONMENT = WORK / "environment"
SUITE = WORK / "suite"
PROGRAMS = WORK / "programs"
# Files that the suite reads; dscache/ and setup.py must not be among them.
NEEDED = (
    "tests",
    "docs",
    "examples",
    "bench",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
)
NEEDED += ("LICENSE", "Makefile", "MANIFEST.in", "pyproject.toml", ".github")
UNWANTED = shutil.ignore_patterns("__pycache__", "node_modules", "results")
COMPILER = re.compile(r"(.+-)?(cc|c89|c99|gcc|clang|g\+\+|c\+\+|clang\+\+|cpp|tcc)(-[\d.]+)?")
OF_SOURCES = (
    "--ignore=tests/packaging/test_packaging.py",
    "--ignore=tests/docs/test_architecture.py",
    "--deselect=tests/docs/test_docs.py::test_variables",
)


def main(arguments: list[str]) -> int:
    (wheel,) = (PROJECT / "dist").glob("*.whl")
    shutil.rmtree(WORK, ignore_errors=True)
    lend_programs()
    environ = {
        **{
            name: text
            for name, text in os.environ.items()
            if not name.startswith(("DSCACHE_", "PYTHON"))
        },
        "PATH": os.pathsep.join([str(ENVIRONMENT / "bin"), str(PROGRAMS)]),
        "CC": "/bin/false",
        "CXX": "/bin/false",
    }
    found = [name for name in ("cc", "gcc", "clang") if shutil.which(name, path=environ["PATH"])]
    assert not found, f"a compiler is within reach: {found}"

    venv.create(ENVIRONMENT, with_pip=True)
    python = str(ENVIRONMENT / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "--only-binary=:all:", f"{wheel}[test]"], env=environ, check=True)

    SUITE.mkdir()
    for name in NEEDED:
        if (PROJECT / name).is_dir():
            shutil.copytree(PROJECT / name, SUITE / name, ignore=UNWANTED)
        else:
            shutil.copy2(PROJECT / name, SUITE / name)
    where = "import dscache; print(dscache.__file__, dscache.__version__, dscache.BACKEND)"
    told = subprocess.run(
        [python, "-c", where], cwd=SUITE, env=environ, check=True, capture_output=True, text=True
    )
    file, version, backend = told.stdout.split()
    assert Path(file).is_relative_to(ENVIRONMENT), f"not the installed package: {file}"
    assert (f"-{version}-" in wheel.name, backend) == (True, "fast"), told.stdout
    print(f"{wheel.name}: {backend} core, from {Path(file).parent}", flush=True)
    run = [python, "-m", "pytest", "-p", "no:benchmark", *OF_SOURCES, *arguments]
    return subprocess.run(run, cwd=SUITE, env=environ, check=False).returncode


def lend_programs() -> None:
    """Fill a folder with links to every program in PATH except compilers."""
    PROGRAMS.mkdir(parents=True)
    for folder in os.get_exec_path():
        for path in sorted(Path(folder).glob("*")):
            link = PROGRAMS / path.name
            if not COMPILER.fullmatch(path.name) and not link.is_symlink():
                link.symlink_to(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
