"""The documentation of names, options, defaults and errors matches the code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import yaml
from msgspec.inspect import Field

import dscache
from dscache import config, errors
from dscache.config import messages as message_config
from dscache.config import url as urls
from dscache.embedded import EmbeddedServer
from option_reference import Part, fields, parts
from tests.support.documents import (
    DOCUMENTS,
    PROJECT,
    anchors,
    blocks,
    code,
    links,
    section,
    table,
)

README = PROJECT / "README.md"
RECORDS = PROJECT / "docs" / "records.md"
FAILURES = PROJECT / "docs" / "failures.md"
CONFIGURATION = PROJECT / "docs" / "configuration.md"
MESSAGES = PROJECT / "docs" / "messages.md"
BUILDING = PROJECT / "docs" / "building.md"


# -- the configuration


PARTS = parts()


def shown(field: Field) -> str | None:
    """Return a default as the tables show it; None for one with its own table."""
    default = field.default
    if field.default_factory is not msgspec.NODEFAULT:
        return None
    if default is None or default is msgspec.NODEFAULT:
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return '`""`' if default == "" else f"`{default}`"


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.heading)
def test_every_option_and_its_default(part: Part) -> None:
    documented = {code(row[0])[0]: row[1] for row in table(CONFIGURATION, part.heading)}
    declared = fields(part.struct)
    assert documented.keys() == declared.keys() | set(part.struct.consumed)
    for name, default in documented.items():
        expected = "none" if name in part.struct.consumed else shown(declared[name])
        assert expected == default or (expected is None and "below" in default), name


def mistakes() -> Iterator[Any]:
    for part in PARTS:
        for row in table(CONFIGURATION, part.heading):
            match = re.fullmatch(r"`(.+?)`: (.+)", row[3])
            assert match, f"{part.heading}: {row[0]}: no mistake: {row[3]!r}"
            yield pytest.param(part, match[1], match[2], id=f"{part.heading}-{match[1]}")


@pytest.mark.parametrize(("part", "written", "error"), list(mistakes()))
def test_every_mistake_and_its_error(part: Part, written: str, error: str) -> None:
    said: dict[str, Any] = yaml.safe_load(written)
    (option,) = said
    with pytest.raises(dscache.ConfigError) as caught:
        config.load({"cache": {"name": "redis", "options": part.as_options(said)}})
    assert str(caught.value) == f"mapping: {part.place}.{option}: {error}"


def test_every_option_of_messages() -> None:
    documented = {code(row[0])[0]: row[1] for row in table(MESSAGES, "Options")}
    of_caches = fields(config.Options)
    own = {
        name: shown(field)
        for name, field in fields(message_config.MessageOptions).items()
        if name not in of_caches
    }
    assert documented == own
    assert message_config.RECORD_OPTIONS.keys() <= set(code(section(MESSAGES, "Options")))


def test_options_without_effect() -> None:
    top, nested = config.Options.no_effect, config.RedisOptions.no_effect
    everywhere, inside = section(CONFIGURATION, "Accepted without effect").split("Inside")
    assert set(code(everywhere)) == top.keys()
    assert set(code(inside)) == (nested.keys() - top.keys()) | {"redisOptions"}


def test_unsupported_options() -> None:
    assert set(code(section(CONFIGURATION, "Not supported"))) == config.Options.unsupported.keys()


def test_options_of_a_url() -> None:
    documented = [name for row in table(CONFIGURATION, "URL") for name in code(row[0])]
    assert sorted(documented) == sorted(urls.QUERY_OPTIONS)


# -- the API


def test_every_error() -> None:
    rows = {code(row[0])[0]: row[2] for row in table(FAILURES, "The errors")}
    tree = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.DscacheError)
    }
    assert rows.keys() == tree.keys() - {"DscacheError"}
    for name, also in rows.items():
        others = [base.__name__ for base in tree[name].__bases__ if base is not errors.DscacheError]
        assert code(also) == others, name
        assert getattr(dscache, name) is tree[name]


def test_every_operation() -> None:
    told = {
        match[1]
        for text in code(section(RECORDS, "Operations"))
        if (match := re.match(r"(\w+)(\(|$)", text)) is not None
    }
    public = {name for name in vars(dscache.AsyncCache) if not name.startswith("_")}
    assert public <= told, "of AsyncCache"
    record = {name for name in vars(dscache.Record) if not name.startswith("_")}
    assert record - {"stale"} <= told, "of Record"


def test_every_operation_of_messages() -> None:
    rows = [name for row in table(MESSAGES, "Messages") for name in code(row[0])]
    told = {name.partition("(")[0]: name for name in rows}
    public = {name for name in vars(dscache.MessageNode) if not name.startswith("_")}
    assert told.keys() == public - {"from_config"} | {"on_gap"}
    for name in ("send", "send_direct", "subscribe", "messages"):
        parameters = inspect.signature(getattr(dscache.MessageNode, name)).parameters
        keywords = [
            f"{one.name}={one.default}"
            for one in parameters.values()
            if one.kind is one.KEYWORD_ONLY
        ]
        assert re.findall(r"\w+=\w+", told[name]) == keywords
    message = {name for name in vars(dscache.Message) if not name.startswith("_")}
    of_mappings = {"get", "keys", "values", "items"}
    assert message - of_mappings <= {
        name.partition("(")[0] for name in code(section(MESSAGES, "Messages"))
    }


async def test_every_counter_of_messages(server: EmbeddedServer) -> None:
    documented = [name for row in table(MESSAGES, "Counters") for name in code(row[0])]
    async with dscache.MessageNode.from_config(server.url) as node:
        of_clusters = ["redirections", "refreshes"]
        assert [*node.stats(), *of_clusters] == documented


def test_signatures() -> None:
    rows = table(RECORDS, "Operations")
    assert rows
    for row in rows:
        for text in code(row[0]):
            name, _, arguments = text.rstrip(")").partition("(")
            parameters = inspect.signature(getattr(dscache.AsyncCache, name)).parameters
            keywords = [
                f"{one.name}={one.default}" if one.default != "" else f'{one.name}=""'
                for one in parameters.values()
                if one.default is not one.empty
            ]
            assert re.findall(r'\w+=(?:[\w.]+|"")', arguments) == keywords, text


# -- figures


def test_the_readme_shows_figures_of_the_documented_run() -> None:
    heading = r"^(\S.+?) +records/s +best.*\n((?:  .+\n)+)"
    rates = {
        (group, client): int(rate.replace(",", "")) / 1000
        for block in blocks(PROJECT / "docs" / "benchmarks.md")
        for group, rows in re.findall(heading, block.text, re.M)
        for client, rate in re.findall(r"^  (.+?) +([\d,]+) +[\d,]+ +[\d.]+ x$", rows, re.M)
    }
    chart = (PROJECT / "docs" / "speed.svg").read_text(encoding="utf-8")
    drawn = re.findall(r">([^<>]+)</text>", chart)
    rows = table(README, "Beside redis-py")
    assert len(rows) > 4
    for group, fast, pure, other, ratio in rows:
        peers = [rate for (of, who), rate in rates.items() if of == group and "redis-py" in who]
        wanted = [rates[group, f"dscache, {core} core"] for core in ("fast", "pure")] + [max(peers)]
        for shown, rate in zip((fast, pure, other), wanted, strict=True):
            assert float(shown.replace(",", "")) == pytest.approx(rate, rel=0.03), group
        assert float(ratio) == pytest.approx(wanted[0] / wanted[2], abs=0.05), group
        if group in drawn:
            first = drawn.index(group) + 1
            assert drawn[first : first + 6] == ["fast", fast, "pure", pure, "redis-py", other]
    assert len({row[0] for row in rows} & {*drawn}) >= 3


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_block_that_installs_can_be_pasted_whole() -> None:
    """It leaves the compiled core, and ends with the check."""
    first = next(block for block in blocks(README) if block.language == "sh")
    *installs, check = first.text.splitlines()
    assert check == "dscache --version"
    assert [line.split()[:2] for line in installs] == [["pip", "install"]] * len(installs)
    assert "DSCACHE_NO_EXTENSIONS" not in first.text


@pytest.mark.parametrize(
    "part", ["type=", "if_newer=True", ".update(", "nearCache", '["hits"]', "dscache.prometheus"]
)
def test_the_first_program_shows_each_part(part: str) -> None:
    first = next(block for block in blocks(README) if block.language == "python")
    assert part in first.text


# -- everything


def test_variables() -> None:
    sources = [
        *PROJECT.glob("dscache/**/*.py"),
        PROJECT / "setup.py",
        PROJECT / "tests" / "conftest.py",
    ]
    pattern = r"\bDSCACHE_[A-Z_]+"
    used = {name for path in sources for name in re.findall(pattern, path.read_text("utf-8"))}
    documented = {name for row in table(BUILDING, "Switches") for name in code(row[0])}
    assert used == {match for name in documented for match in re.findall(pattern, name)}
    for document in DOCUMENTS:
        assert set(re.findall(pattern, document.read_text("utf-8"))) <= used, document.name


LINKING = {document: links(document) for document in DOCUMENTS if links(document)}


def test_documents_have_links() -> None:
    assert {README, CONFIGURATION, MESSAGES, BUILDING} <= LINKING.keys()


@pytest.mark.parametrize("document", LINKING, ids=lambda document: document.name)
def test_links(document: Any) -> None:
    for target in LINKING[document]:
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
