"""The pages generated for the documentation's site are complete and correct."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import yaml

import dscache
from dscache import config
from option_reference import Part, default, fields, mistake, parts, reference, takes
from tests.support.documents import PROJECT

SITE = PROJECT / "docs" / "site"
GUIDE = (PROJECT / "docs" / "configuration.md").read_text(encoding="utf-8")


# -- the reference of the options


def entries() -> dict[str, str]:
    """Return the reference's text about each option, by its anchor."""
    _, *split = re.split(r"^#### .*\{ #(\S+) \.option \}\n", reference(GUIDE), flags=re.MULTILINE)
    return dict(zip(split[::2], split[1::2], strict=True))


def test_every_option_has_an_entry() -> None:
    wanted = {
        f"{part.heading}-{name}"
        for part in parts()
        for name in {*fields(part.struct), *part.struct.consumed}
    }
    assert {part.struct for part in parts()} >= {config.Options, config.Node, config.RedisOptions}
    assert entries().keys() == wanted


@pytest.mark.parametrize("part", parts(), ids=lambda part: part.heading)
def test_every_entry_has_type_default_purpose_and_error(part: Part) -> None:
    told = entries()
    for name, field in fields(part.struct).items():
        purpose, facts, error = re.fullmatch(
            r"\n(.+)\n\n- takes (.+)\n- (`.+`: .+)\n+(?:#[\s\S]*|[^#][\s\S]*)?",
            told[f"{part.heading}-{name}"],
        ).groups()
        assert len(purpose) > 3
        assert facts == f"{takes(field)}; default: {default(field)}"
        assert re.match(r"`(\w+): ", error)[1] == name or "prot" in error


@pytest.mark.parametrize(
    ("struct", "name", "facts"),
    [
        (config.Options, "commandTimeout", "milliseconds, 1 to 2147483647; default: `1000`"),
        (config.Options, "ttl", "seconds, 1 to 10000000000; default: none"),
        (config.Options, "maxPendingBytes", "bytes, 1 to 1099511627776; default: `67108864`"),
        (config.Options, "db", "a whole number, at least 0; default: `0`"),
        (config.Options, "keyPrefix", 'text; default: `""`'),
        (config.Options, "password", "text, and never shown; default: none"),
        (config.Options, "whenFull", "`error` or `wait`; default: `wait`"),
        (config.Options, "tls", "true, false or a mapping of options; default: none"),
        (
            config.Options,
            "nodes",
            "a list, each entry a mapping of options, such as {host: 10.0.0.1, port: 7000}; "
            "default: none",
        ),
        (config.Options, "retryStrategy", "a mapping of options; default: its own defaults"),
        (config.NearCacheOptions, "serveStale", "`true` or `false`; default: `false`"),
        (config.NearCacheOptions, "prefixes", "a list, each entry the beginning of names"),
        (config.Node, "password", "text, and never shown; default: none"),
        (config.NatTarget, "port", "a whole number, 1 to 65535; default: none, it must be given"),
    ],
)
def test_the_types_of_options(struct: Any, name: str, facts: str) -> None:
    field = fields(struct)[name]
    assert f"{takes(field)}; default: {default(field)}".startswith(facts)


def test_documented_errors_are_those_raised() -> None:
    options = parts()[0]
    assert mistake(options, "port: 70000") == "must be a whole number from 1 to 65535, not 70000"
    with pytest.raises(ValueError, match="port: 6379 is no mistake"):
        mistake(options, "port: 6379")


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [("| `family` |", "| `familly` |", "familly, family"), ("| `maxAge` | ", "", "maxAge")],
)
def test_a_table_that_differs_from_the_model_fails_the_build(old: str, new: str, name: str) -> None:
    row = next(line for line in GUIDE.splitlines() if line.startswith(old))
    changed = row.replace(old, new) if new else ""
    with pytest.raises(ValueError, match=rf"the table and the model differ in .*{name.split()[0]}"):
        reference(GUIDE.replace(f"{row}\n", f"{changed}\n" if changed else ""))


def test_options_without_effect_have_their_reasons() -> None:
    made = reference(GUIDE)
    for reasons in (config.Options.no_effect, config.Options.unsupported):
        for name, why in reasons.items():
            assert f"| `{name}` | {why} |" in made


# -- the navigation


def pages(nav: Any) -> set[str]:
    if isinstance(nav, str):
        return {nav}
    return set().union(*map(pages, nav.values() if isinstance(nav, dict) else nav))


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load((SITE / "mkdocs.yml").read_text(encoding="utf-8"))
    made = {"examples.md"}
    # Not imported, as mkdocs may not be installed.
    for statement in ast.parse((SITE / "pages.py").read_text(encoding="utf-8")).body:
        match statement:
            case ast.Assign(targets=[ast.Name("ELSEWHERE")], value=value):
                elsewhere = ast.literal_eval(value)
                made |= {name for name in elsewhere.values() if name.endswith(".md")}
                assert all((PROJECT / path).exists() for path in elsewhere)
    written = {path.name for path in (PROJECT / "docs").glob("*.md")}
    assert pages(settings["nav"]) == written | made
    assert settings["strict"] is True


def test_everything_public_is_in_the_api() -> None:
    pages = sorted((PROJECT / "docs").glob("api*.md"))
    told = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert "::: dscache.errors\n" in told
    for name in dscache.__all__:
        value = getattr(dscache, name)
        if isinstance(value, type) and issubclass(value, dscache.DscacheError):
            assert value.__module__ == "dscache.errors"
        else:
            assert re.search(rf"^(::: dscache\..+\.{name}|`dscache\.{name}`)$", told, re.MULTILINE)
