"""The products of the sources: the wheel, the pure wheel, the sdist, and failures."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import yaml

import dscache
from tests.packaging import minimum
from tests.support.checkers import check_schema

PROJECT = Path(__file__).parents[2]
# Not the whole folder: it may hold an environment and the files of an earlier build.
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile")
FOLDERS = ("dscache", "tests")
MODULES = {path.relative_to(PROJECT).as_posix() for path in PROJECT.glob("dscache/**/*.py")}
PROBE = "import sys; sys.path[:0] = sys.argv[1:]; import dscache; print(dscache.BACKEND)"
PATIENCE = 300


def run(
    *command: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {key: text for key, text in os.environ.items() if not key.startswith("DSCACHE_")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def copy_sources(target: Path) -> Path:
    target.mkdir()
    for name in SOURCES:
        shutil.copy2(PROJECT / name, target)
    built = shutil.ignore_patterns("*.so", "*.c", "*.html", "__pycache__")
    for name in FOLDERS:
        shutil.copytree(PROJECT / name, target / name, ignore=built)
    return target


def build_wheel(sources: Path, output: Path, **environment: str) -> Path:
    done = run(
        *("-m", "pip", "wheel", "--disable-pip-version-check", "--no-index", "--no-deps"),
        *("--no-build-isolation", "--wheel-dir", str(output), str(sources)),
        **environment,
    )
    assert done.returncode == 0, done.stdout
    (wheel,) = output.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def unpack(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def backend_of(installed: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Ask a fresh interpreter that finds dscache only there.

    Without ``site``, as an editable install hooks itself in there and would lend the unpacked
    package the modules that it lacks.
    """
    others = [path for path in sys.path if Path(path).resolve() not in (PROJECT, PROJECT / "tests")]
    # A free-threaded Python warns when the pure core imports hiredis, which needs the GIL.
    options = ("-X", "gil=0") if sysconfig.get_config_var("Py_GIL_DISABLED") else ()
    return run("-I", "-S", *options, "-c", PROBE, str(installed), *others, **environment)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("compiled") / "sources")


@pytest.fixture(scope="module")
def wheel(sources: Path) -> Path:
    # Unoptimised: the compiler finishes sooner, and the files are the same.
    return build_wheel(sources, sources.parent / "wheel", CFLAGS="-O0")


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pure")
    sources = copy_sources(folder / "sources")
    return build_wheel(sources, folder / "wheel", DSCACHE_NO_EXTENSIONS="1", CC="no-compiler")


def test_the_wheel_holds_the_package_and_no_sources_of_the_core(wheel: Path) -> None:
    names = names_in(wheel)
    (extension,) = (name for name in names if name.endswith(".so"))
    assert extension.startswith("dscache/_fast.")
    assert names == MODULES | {"dscache/py.typed", "dscache/_fast.pyi", extension}


def flaw_of(materials: dict[str, Any]) -> Any:
    """Return how the contents break their schema, or None."""
    # Here, as its grammars take a second of each process that collects the tests.
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(materials))


def materials_of(wheel: Path) -> dict[str, Any]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if ".dist-info/sboms/" in one)
        assert name.endswith(".cdx.json")
        (record,) = (one for one in archive.namelist() if one.endswith(".dist-info/RECORD"))
        assert f"{name},sha256=" in archive.read(record).decode()
        found: dict[str, Any] = json.loads(archive.read(name))
    return found


def test_the_wheels_say_what_they_contain(wheel: Path, pure_wheel: Path) -> None:
    for built, parts in ((wheel, ["Cython"]), (pure_wheel, [])):
        found = materials_of(built)
        assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
        own = found["metadata"]["component"]
        assert (own["name"], own["version"]) == ("dscache", dscache.__version__)
        assert own["purl"] == f"pkg:pypi/dscache@{dscache.__version__}"
        assert [part["name"] for part in found["components"]] == parts
        assert all(part["version"] and part["licenses"] for part in found["components"])
        refs = {own["bom-ref"], *(part["bom-ref"] for part in found["components"])}
        assert {one["ref"] for one in found["dependencies"]} == refs
        assert flaw_of(found) is None
        # It is complete: no library of others is in the wheel.
        assert {name.partition("/")[0] for name in names_in(built)} == {"dscache"}


def test_the_schema_of_the_contents_is_checked(pure_wheel: Path) -> None:
    found = materials_of(pure_wheel)
    found["components"] = [{"name": "a part without a type"}]
    assert flaw_of(found) is not None


GITHUB = PROJECT / ".github"


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("vendor.github-workflows", "workflows/*.yml"),
        ("custom.github-workflows-require-timeout", "workflows/*.yml"),
        ("vendor.dependabot", "dependabot.yml"),
        ("vendor.github-issue-forms", "ISSUE_TEMPLATE/[!c]*.yml"),
        ("vendor.github-issue-config", "ISSUE_TEMPLATE/config.yml"),
    ],
)
def test_the_files_of_the_host_fit_their_schemas(schema: str, pattern: str) -> None:
    files = [*GITHUB.glob(pattern)]
    assert files
    check_schema(schema, *files)


def test_dependabot_keeps_the_pinned_actions_new() -> None:
    settings = yaml.safe_load((GITHUB / "dependabot.yml").read_text(encoding="utf-8"))
    updated = {(one["package-ecosystem"], one["directory"]) for one in settings["updates"]}
    assert updated == {("github-actions", "/"), ("pip", "/")}


def test_the_wheels_of_a_release_are_for_every_claimed_python() -> None:
    built = project()["tool"]["cibuildwheel"]["build"]
    prefix = "Programming Language :: Python :: 3."
    minors = [
        name.removeprefix(prefix)
        for name in project()["project"]["classifiers"]
        if name.startswith(prefix)
    ]
    wanted = [f"cp3{minor}-*" for minor in minors if minor.isdecimal()]
    assert wanted == [f"cp3{minor}-*" for minor in (11, 12, 13, 14, 15)]
    assert {*built} == {*wanted, "cp314t-*", "cp315t-*"}
    text = (GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8")
    wheels = yaml.safe_load(text)["jobs"]["wheels"]
    machines = wheels["strategy"]["matrix"]["machine"]
    # Linux and macOS, each on both processors, without emulation.
    assert [name.partition("-")[0] for name in machines] == ["ubuntu", "ubuntu", "macos", "macos"]
    assert any("cibuildwheel" in step.get("run", "") for step in wheels["steps"])


def test_a_vulnerability_has_a_way_to_be_told() -> None:
    text = (PROJECT / "SECURITY.md").read_text(encoding="utf-8")
    for said in ("Report a vulnerability", "within a week", "latest minor version"):
        assert said in text
    assert "](SECURITY.md)" in (PROJECT / "README.md").read_text(encoding="utf-8")


def test_a_name_that_goes_is_announced() -> None:
    text = (PROJECT / "docs" / "supported-versions.md").read_text(encoding="utf-8")
    assert "gives a `DeprecationWarning` first, for at least two minor versions and six months" in (
        " ".join(text.split())
    )


def test_every_action_is_pinned_to_a_commit() -> None:
    for path in (PROJECT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        actions = re.findall(r"uses: *(.+)", text)
        assert actions
        for action in actions:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action), action


def test_the_continuous_integration_runs_every_claimed_python() -> None:
    text = (PROJECT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    prefix = "Programming Language :: Python :: "
    claimed = [name.removeprefix(prefix) for name in project()["project"]["classifiers"]]
    pythons = [name for name in claimed if name.startswith("3.")]
    assert jobs["test"]["strategy"]["matrix"]["python"] == pythons
    assert pythons == ["3.11", "3.12", "3.13", "3.14", "3.15"]
    # The oldest versions of the dependencies are tested as well.
    assert jobs["minimum"]["steps"][-1]["run"] == "make test-minimum"


def test_the_metadata_lists_the_dependencies(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(entry).decode().splitlines()
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
    assert {"Name: dscache", "License-Expression: Apache-2.0", "Requires-Python: >=3.11"} <= {
        *lines
    }
    assert f"Version: {dscache.__version__}" in lines
    needed = {line.split(": ")[1].split(">")[0] for line in lines if line.startswith("Requires-D")}
    assert {"hiredis", "msgspec", "PyYAML", "redis"} <= needed
    extras = {line.split(": ")[1] for line in lines if line.startswith("Provides-Extra")}
    assert {"uvloop", "cli", "embedded"} <= extras


def metadata_of(sources: Path, folder: Path, **environment: str) -> Message:
    """Return the metadata of a wheel, without the wheel."""
    prepare = (
        "import sys; from setuptools.build_meta import prepare_metadata_for_build_wheel as prepare;"
        "prepare(sys.argv[1])"
    )
    folder.mkdir()
    done = run("-c", prepare, str(folder), cwd=sources, DSCACHE_NO_EXTENSIONS="1", **environment)
    assert done.returncode == 0, done.stdout
    (path,) = folder.glob("*.dist-info/METADATA")
    return email.message_from_string(path.read_text(encoding="utf-8"))


def test_a_release_names_its_repository(tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "sources")
    address = "https://code.example/team/dscache"
    found = metadata_of(sources, tmp_path / "release", DSCACHE_REPOSITORY=f"{address}/")
    urls = dict(line.split(", ") for line in found.get_all("Project-URL", []))
    at = f"{address}/%s/v{dscache.__version__}"
    assert urls == {
        "Source": address,
        "Documentation": at % "tree" + "/docs/",
        "Changelog": at % "blob" + "/CHANGELOG.md",
        "Issues": f"{address}/issues",
        "Security": at % "blob" + "/SECURITY.md",
    }
    assert found["Description-Content-Type"] == "text/markdown"
    shown = found.get_payload()
    assert isinstance(shown, str)
    targets = re.findall(r"\]\(([^)]+)\)", shown)
    # Every link of the README leads to a file of the release.
    assert len(targets) > 30
    for target in targets:
        if not target.startswith(address):
            assert target.startswith("https://"), target
            continue
        _, _, path = target.partition(f"/v{dscache.__version__}/")
        assert (PROJECT / path.partition("#")[0]).exists(), target
    assert at % "raw" + "/docs/speed.svg" in targets
    # The workflow says where, and passes it into the containers.
    text = (GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["env"] == {
        "DSCACHE_REPOSITORY": "${{ github.server_url }}/${{ github.repository }}"
    }
    assert project()["tool"]["cibuildwheel"]["linux"]["environment-pass"] == ["DSCACHE_REPOSITORY"]


def test_a_build_without_a_repository_names_none(tmp_path: Path) -> None:
    found = metadata_of(copy_sources(tmp_path / "sources"), tmp_path / "own")
    assert found.get_all("Project-URL") is None
    assert found.get_payload() == (PROJECT / "README.md").read_text(encoding="utf-8")


def test_the_wheel_uses_the_compiled_core_and_obeys_the_variable(
    wheel: Path, tmp_path: Path
) -> None:
    installed = unpack(wheel, tmp_path)
    assert backend_of(installed).stdout == "fast\n"
    assert backend_of(installed, DSCACHE_BACKEND="fast").stdout == "fast\n"
    assert backend_of(installed, DSCACHE_BACKEND="pure").stdout == "pure\n"


def test_the_pure_wheel_is_for_any_machine(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert names_in(pure_wheel) == MODULES | {"dscache/py.typed", "dscache/_fast.pyi"}


def test_the_pure_wheel_uses_the_pure_core_silently(pure_wheel: Path, tmp_path: Path) -> None:
    installed = unpack(pure_wheel, tmp_path)
    assert backend_of(installed).stdout == "pure\n"
    assert backend_of(installed, DSCACHE_BACKEND="pure").stdout == "pure\n"
    refused = backend_of(installed, DSCACHE_BACKEND="fast")
    assert refused.returncode != 0
    assert (
        "ImportError: DSCACHE_BACKEND=fast: dscache._fast can't be loaded: "
        "No module named 'dscache._fast'" in refused.stdout
    )


def test_the_source_tree_says_that_it_is_not_built(tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "sources")
    warned, chosen = backend_of(sources).stdout.splitlines()
    assert chosen == "pure"
    assert warned.startswith(
        f"{sources} is the source tree of dscache, and not built: falling back"
    )
    assert "run make build" in warned
    assert backend_of(sources, DSCACHE_BACKEND="pure").stdout == "pure\n"


def test_the_check_tells_of_the_installed_package_in_every_folder(
    wheel: Path, tmp_path: Path
) -> None:
    """Also in the folder of the sources, which ``import dscache`` would find there."""
    installed = unpack(wheel, tmp_path / "installed")
    sources = copy_sources(tmp_path / "sources")
    command = tmp_path / "dscache"
    command.write_text("import sys\nfrom dscache.cli import main\nsys.exit(main())\n")
    for folder in (tmp_path, sources, sources / "dscache", installed):
        done = run(str(command), "--version", cwd=folder, PYTHONPATH=str(installed))
        assert done.returncode == 0, done.stdout
        first, libraries = done.stdout.splitlines()
        assert first.startswith(f"dscache {dscache.__version__}, fast core")
        assert first.endswith(f", in {installed / 'dscache'}")
        assert {"hiredis", "msgspec", "redis"} <= {*libraries.replace(",", "").split()}


def test_a_core_for_another_python_is_not_passed_over_silently(
    pure_wheel: Path, tmp_path: Path
) -> None:
    installed = unpack(pure_wheel, tmp_path)
    (installed / "dscache" / "_fast.cpython-39-x86_64-linux-gnu.so").touch()
    warned, chosen = backend_of(installed).stdout.splitlines()
    assert chosen == "pure"
    assert warned.startswith("the compiled core can't be loaded (No module named 'dscache._fast')")


def test_an_unknown_backend_is_refused(pure_wheel: Path, tmp_path: Path) -> None:
    installed = unpack(pure_wheel, tmp_path)
    refused = backend_of(installed, DSCACHE_BACKEND="fats")
    assert refused.returncode != 0
    assert 'DSCACHE_BACKEND=\'fats\': must be "fast" or "pure"' in refused.stdout


def test_the_sdist_has_everything_to_build_and_test(
    sources: Path, wheel: Path, tmp_path: Path
) -> None:
    # After the wheel, which leaves generated C in the folder.
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    done = run("-c", build, str(tmp_path), cwd=sources)
    assert done.returncode == 0, done.stdout
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"dscache/_fast.pyx", "dscache/_fast.pyi", "dscache/py.typed", "tests/conftest.py"}
    assert MODULES | set(SOURCES) | wanted <= names
    assert [name for name in names if name.endswith((".so", ".c", ".pyc", ".whl"))] == []


def test_pytest_finds_the_plugin(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        assert "[pytest11]\ndscache.testing = dscache.testing" in archive.read(entry).decode()


# -- releases


def project() -> dict[str, Any]:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_is_stated_once() -> None:
    assert "version" not in project()["project"]
    assert "version" in project()["project"]["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab]\d+|rc\d+)?", dscache.__version__)


def test_wheels_are_built_for_the_claimed_pythons() -> None:
    prefix = "Programming Language :: Python :: 3."
    claimed = [
        f"cp3{name.removeprefix(prefix)}-*"
        for name in project()["project"]["classifiers"]
        if name.startswith(prefix)
    ]
    built = project()["tool"]["cibuildwheel"]["build"]
    assert [one for one in built if "t-" not in one] == claimed
    told = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert "Python 3.{} to 3.{} on Linux and macOS".format(*range_of(claimed)) in told


def range_of(identifiers: list[str]) -> tuple[str, str]:
    minors = [name.removeprefix("cp3").removesuffix("-*") for name in identifiers]
    return minors[0], minors[-1]


def test_the_documented_gil_mode_is_the_declared_one(sources: Path, wheel: Path) -> None:
    generated = (sources / "build" / "cython" / "dscache" / "_fast.c").read_text(encoding="utf-8")
    # The last definition is the one used without an external macro.
    *_, declared = re.findall(r"define __Pyx_FREETHREADING_COMPATIBLE (\w+)", generated)
    is_free = sys.version_info >= (3, 14)
    assert declared == ("Py_MOD_GIL_NOT_USED" if is_free else "Py_MOD_GIL_USED")
    told = (PROJECT / "docs" / "building.md").read_text(encoding="utf-8")
    assert "run on a free-threaded Python? Yes, from 3.14 on, with the compiled core" in told
    assert [name for name in project()["project"]["classifiers"] if "Free Threading" in name]
    built = project()["tool"]["cibuildwheel"]["build"]
    assert [one for one in built if "t-" in one] == ["cp314t-*", "cp315t-*"]


def test_the_workflows_name_existing_targets() -> None:
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    for path in (PROJECT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        for step in (step for job in jobs.values() for step in job["steps"]):
            assert step.keys() & {"uses", "run"}
            words = step.get("run", "").split()
            if words == ["make", "${{", "matrix.target", "}}"]:
                (alone,) = (job for job in jobs.values() if step in job["steps"])
                assert set(alone["strategy"]["matrix"]["target"]) <= set(targets.split())
            elif words[:1] == ["make"]:
                assert words[1] in targets.split()
            elif words[:1] == [".ci/run"]:
                assert (PROJECT / ".ci" / "run").stat().st_mode & 0o100
    assert {path.name for path in (PROJECT / ".github" / "workflows").iterdir()} == {
        "ci.yml",
        "release.yml",
    }


ALONE = ("demo", "test", "docs", "lint", "bench-smoke", "instructions", "wheel")
# The packages of tools whose names differ.
PACKAGES = {"mypy.stubtest": "mypy"}


def test_the_continuous_integration_runs_targets_alone() -> None:
    """The targets of the README, each in a checkout of its own; ``test`` comes first in .ci/run."""
    workflow = PROJECT / ".github" / "workflows" / "ci.yml"
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    alone = jobs["alone"]["strategy"]["matrix"]["target"]
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^make (\S+)", readme, re.MULTILINE)
    assert {*named, "bench-smoke"} <= {*alone, "test"}
    script = (PROJECT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^make (\S+)", script, re.MULTILINE)[0] == "test"


@pytest.mark.parametrize("target", ALONE)
def test_a_target_installs_what_it_runs(target: str, tmp_path: Path) -> None:
    """In a fresh clone: make tells its commands without running them."""
    clone = copy_sources(tmp_path / "clone")
    (clone / "bench").mkdir(exist_ok=True)
    done = subprocess.run(
        ["make", "-n", "-f", str(PROJECT / "Makefile"), target, f"PYTHON={sys.executable}"],
        cwd=clone,
        env={
            name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "VENV")
        },
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.replace("\\\n", " ").splitlines()
    at = {line: number for number, line in reversed([*enumerate(lines)])}
    (created,) = [at[line] for line in at if "-m venv --clear .venv" in line]
    installed = {
        extra: at[line] for line in at for extra in re.findall(r"-e '\.\[([\w,]+)\]'", line)
    }
    assert installed
    assert min(installed.values()) > created
    extras = project()["project"]["optional-dependencies"]

    def packages(names: str) -> set[str]:
        """Return the packages of some extras, with those of the extras that they name."""
        found: set[str] = set()
        for one in names.split(","):
            for needed in extras[one]:
                if own := re.fullmatch(r"dscache\[([\w,]+)\]", needed):
                    found |= packages(own[1])
                else:
                    found.add(re.split(r"[\[<>=;! ]", needed)[0].lower())
        return found

    here = set().union(*(packages(names) for names in installed))
    for line, number in at.items():
        for tool in re.findall(r"\.venv/bin/python -m ([\w.]+)", line):
            if tool not in ("pip", "build"):
                assert number > max(installed.values()), line
            if tool != "pip":
                assert PACKAGES.get(tool, tool.split(".")[0]) in here, f"{target}: {line}"


def test_a_commit_is_checked_by_what_make_lint_runs() -> None:
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^lint: .*\n((?:\t.+\n)+)", makefile, re.MULTILINE)
    settings = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (local,) = settings["repos"]
    entries = "\n".join(hook["entry"] for hook in local["hooks"])

    def tools(commands: str) -> list[str]:
        known = r"(?:ruff \w+|mypy|lint-imports|cython-lint|mypy\.stubtest)(?= |\"|$)"
        return re.findall(known, commands, re.MULTILINE)

    assert tools(entries) == tools(recipe)
    assert len(tools(recipe)) == len(recipe.splitlines())


def test_the_forms_of_issues_are_whole() -> None:
    forms = [*(PROJECT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")]
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form.keys() == {"name", "description", "labels", "body"}
        identifiers = [part["id"] for part in form["body"]]
        assert len({*identifiers}) == len(identifiers)
        for part in form["body"]:
            assert part["type"] in ("textarea", "checkboxes")
            assert part["attributes"]["label"]


@pytest.mark.parametrize(
    ("core", "compiler"),
    [("def broken(:\n", None), ("answer = 42\n", "no-such-compiler")],
    ids=["cython", "compiler"],
)
def test_a_failed_build_is_loud_and_names_the_remedy(
    tmp_path: Path, core: str, compiler: str | None
) -> None:
    sources = copy_sources(tmp_path / "sources")
    (sources / "dscache" / "_fast.pyx").write_text(core)
    environment = {"CC": compiler} if compiler else {}
    done = run("setup.py", "build_ext", cwd=sources, **environment)
    assert done.returncode != 0
    assert "the compiled core (dscache._fast) could not be built" in done.stdout
    assert "set DSCACHE_NO_EXTENSIONS=1" in done.stdout


def test_the_oldest_versions_are_read_from_the_project(tmp_path: Path) -> None:
    """``make test-minimum`` installs these, so that they are stated once."""
    found = list(minimum.constraints())
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = list(declared["dependencies"])
    for extra in minimum.EXTRAS:
        wanted += declared["optional-dependencies"][extra]
    assert found == [one.replace(">=", "==") for one in wanted]
    assert len(found) >= 10
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\ndependencies = ["redis"]\n[project.optional-dependencies]\n')
    with pytest.raises(ValueError, match="'redis' must begin with name>=version"):
        list(minimum.constraints(project))
