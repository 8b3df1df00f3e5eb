"""The choice of a core, seen from outside: each test starts its own interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dscache

FOLDER = str(Path(dscache.__file__).parents[1])
MODULES = {"fast": "dscache._fast", "pure": "dscache.core.pure"}
SHOW = """
import dscache
from dscache import _backend
print(dscache.BACKEND, _backend.BACKEND, _backend.core.__name__)
print(_backend.core.Pipeline.__module__, dscache.Record is _backend.core.Record)
"""
EXPECTED = {
    "fast": "fast fast dscache._fast\ndscache._fast True\n",
    "pure": "pure pure dscache.core.pure\ndscache.core.pipeline True\n",
}
# Stands in for an extension that was not built, or that fails to load.
SABOTAGE = """
import importlib.abc, importlib.machinery, sys

class Saboteur(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name in {modules}:
            return importlib.machinery.ModuleSpec(name, self)

    def exec_module(self, module):
        raise {error}

sys.meta_path.insert(0, Saboteur())
"""


def run(
    code: str,
    variable: str | None = None,
    *,
    sabotaged: tuple[str, ...] = (),
    error: str = "ImportError('it was not built')",
) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "DSCACHE_BACKEND"}
    environ["PYTHONPATH"] = FOLDER
    if variable is not None:
        environ["DSCACHE_BACKEND"] = variable
    modules = tuple(MODULES[name] for name in sabotaged)
    return subprocess.run(
        [sys.executable, "-c", SABOTAGE.format(modules=modules, error=error) + code],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("variable", "chosen"), [(None, "fast"), ("", "fast"), ("fast", "fast"), ("pure", "pure")]
)
def test_the_environment_variable_chooses_the_core(variable: str | None, chosen: str) -> None:
    ended = run(SHOW, variable)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, EXPECTED[chosen], "")


@pytest.mark.parametrize("variable", ["nonsense", "FAST", " fast", "1"])
def test_an_unknown_value_is_refused(variable: str) -> None:
    ended = run(SHOW, variable)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.endswith(
        f'ImportError: DSCACHE_BACKEND={variable!r}: must be "fast" or "pure"\n'
    )


@pytest.mark.parametrize("variable", ["nonsense", "fast"])
def test_the_command_line_says_in_one_line_that_the_variable_is_wrong(variable: str) -> None:
    code = (
        "import sys; sys.argv = ['/usr/bin/dscache', '--version']; "
        "from dscache.cli import main; main()"
    )
    ended = run(code, variable, sabotaged=("fast",))
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    problem = {
        "nonsense": 'DSCACHE_BACKEND=\'nonsense\': must be "fast" or "pure"',
        "fast": "DSCACHE_BACKEND=fast: dscache._fast can't be loaded: it was not built; ",
    }[variable]
    assert line.startswith(f"dscache: {problem}")


def test_without_the_extension_the_pure_core_is_used_and_the_reason_logged_once() -> None:
    ended = run(SHOW + "import dscache._backend, dscache.cache\n", sabotaged=("fast",))
    assert (ended.returncode, ended.stdout) == (0, EXPECTED["pure"])
    [line] = ended.stderr.splitlines()
    assert line.startswith("the compiled core can't be loaded (it was not built): falling back")
    assert "DSCACHE_BACKEND=pure" in line


def test_the_warning_uses_the_logger_of_the_package() -> None:
    code = "import logging; logging.basicConfig(format='%(name)s %(levelname)s')\n" + SHOW
    ended = run(code, sabotaged=("fast",))
    assert ended.stderr == "dscache WARNING\n"


def test_choosing_the_pure_core_hides_the_warning_of_a_missing_extension() -> None:
    ended = run(SHOW, "pure", sabotaged=("fast",))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, EXPECTED["pure"], "")


@pytest.mark.parametrize("name", ["fast", "pure"])
def test_choosing_a_missing_core_is_an_error(name: str) -> None:
    ended = run(SHOW, name, sabotaged=(name,))
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.splitlines()[-1].startswith(
        f"ImportError: DSCACHE_BACKEND={name}: {MODULES[name]} can't be loaded: it was not built; "
    )


@pytest.mark.parametrize("variable", [None, "fast"])
@pytest.mark.parametrize(
    "error", ["RuntimeError('it is broken')", "AttributeError('no such thing')", "SystemError()"]
)
def test_a_broken_extension_is_an_error(variable: str | None, error: str) -> None:
    ended = run(SHOW, variable, sabotaged=("fast",), error=error)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.splitlines()[-1].startswith(error.partition("(")[0])


OTHER_CONSTANTS = f"""
import sys, types
package = sys.modules["dscache"] = types.ModuleType("dscache")
package.__path__ = [{FOLDER + "/dscache"!r}]
import dscache.core.constants
dscache.core.constants.SET = 77
from dscache import _backend
print(_backend.BACKEND)
"""


def test_an_extension_built_for_other_constants_is_refused() -> None:
    """The constants are compiled into the extension, and the pure core reads them afresh."""
    ended = run(OTHER_CONSTANTS)
    assert (ended.returncode, ended.stdout) == (0, "pure\n")
    assert "was built for another dscache.core.constants; build it again" in ended.stderr


def test_a_cache_uses_the_chosen_core() -> None:
    code = """
import asyncio, dscache
async def main():
    async with dscache.AsyncCache.from_config({"name": "memory"}) as cache:
        await cache.set("a", 1, [1])
        record = await cache.get("a")
        print(type(record) is dscache.Record, cache.description)
asyncio.run(main())
"""
    for name in ("fast", "pure"):
        ended = run(code, name)
        assert ended.stderr == ""
        assert ended.stdout.startswith("True dscache memory cache")
        assert ended.stdout.endswith(f"{name} core\n")


def test_a_cache_is_imported_on_first_use() -> None:
    ended = run(
        "import sys, dscache\n"
        "print({'dscache.cache', 'dscache.sync', 'redis', 'yaml'} & {*sys.modules})\n"
        "print({*dscache.__all__} - {*dir(dscache)})\n"
        "module = dscache.cache\n"
        "from dscache import *\n"
        "print(AsyncCache is module.AsyncCache, 'AsyncCache' in vars(dscache))\n"
    )
    assert (ended.returncode, ended.stdout) == (0, "set()\nset()\nTrue True\n"), ended.stderr
