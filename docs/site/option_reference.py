"""The reference of the configuration, generated from its typed model.

The tables of docs/configuration.md give the purpose of each option. Names, types, ranges, units and
defaults come from ``dscache.config``. So does the text of each error: the example of a mistake is
loaded to produce it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import yaml
from msgspec import inspect

import dscache
from dscache import config
from dscache.config.validation import ConfigStruct

_TABLE = re.compile(r"^\|.*\n\|[-| :]+\n((?:\|.*\n)*)", re.MULTILINE)


class Part(NamedTuple):
    """A mapping of options, and its heading in the guide."""

    heading: str
    struct: type[ConfigStruct]
    listed: bool = False
    """Whether the option holds a list of these."""

    @property
    def place(self) -> str:
        """The place of its options in a file."""
        if self.struct is config.Options:
            return "cache.options"
        return f"cache.options.{self.heading}{'[0]' if self.listed else ''}"

    def as_options(self, written: dict[str, Any]) -> dict[str, Any]:
        """Return options that hold ``written`` in this part."""
        if self.struct is config.Options:
            return written
        return {self.heading: [written] if self.listed else written}


def fields(struct: type[ConfigStruct]) -> dict[str, inspect.Field]:
    """Return the options of a part, by their name in a file."""
    described = inspect.type_info(struct)
    assert isinstance(described, inspect.StructType)
    return {field.encode_name: field for field in described.fields}


def parts() -> list[Part]:
    """Return every part of the configuration that has a table in the guide."""
    found = [Part("options", config.Options)]
    for name, field in fields(config.Options).items():
        found += _inner(name, field.type)
    return found


def _inner(name: str, kind: inspect.Type, listed: bool = False) -> Iterator[Part]:
    if isinstance(kind, inspect.UnionType):
        for one in kind.types:
            yield from _inner(name, one, listed)
    elif isinstance(kind, inspect.VarTupleType):
        yield from _inner(name, kind.item_type, listed=True)
    elif isinstance(kind, inspect.StructType) and issubclass(kind.cls, ConfigStruct):
        yield Part(name, kind.cls, listed)


# -- the values of an option


def takes(field: inspect.Field) -> str:
    """Return the type, range and unit of an option, in words."""
    return _kind(field.type)


def _kind(kind: inspect.Type, extra: Mapping[str, Any] | None = None) -> str:
    extra = extra or {}
    match kind:
        case inspect.Metadata():
            return _kind(kind.type, kind.extra)
        case inspect.UnionType():
            (only,) = (one for one in kind.types if not isinstance(one, inspect.NoneType))
            return _kind(only, extra)
        case inspect.BoolType():
            return "`true` or `false`"
        case inspect.LiteralType():
            *others, last = (f"`{value}`" for value in kind.values)
            return f"{', '.join(others)} or {last}"
        case inspect.IntType():
            unit = str(extra.get("unit", "a whole number"))
            if kind.ge is None:
                return unit
            return f"{unit}, {kind.ge} to {kind.le}" if kind.le else f"{unit}, at least {kind.ge}"
        case inspect.StrType():
            return str(
                extra.get("expected", "text, and never shown" if "secret" in extra else "text")
            )
        case inspect.VarTupleType():
            return f"a list, each entry {_kind(kind.item_type)}"
        case inspect.DictType():
            return f"a mapping, each name in it {_kind(kind.key_type)}"
        case inspect.StructType():
            return str(getattr(kind.cls, "expected", "a mapping"))
    raise TypeError(f"no words for an option of type {kind}")


def default(field: inspect.Field) -> str:
    """Return the default of an option, in words."""
    if field.default_factory is not msgspec.NODEFAULT:
        return "its own defaults"
    value = field.default
    if field.required:
        return "none, it must be given"
    if value is None or value is msgspec.NODEFAULT or value == ():
        return "none"
    return '`""`' if value == "" else f"`{msgspec.json.encode(value).decode()}`".replace('"', "")


def mistake(part: Part, written: str) -> str:
    """Return the text of the error that ``written`` causes in this part, without the place."""
    said = yaml.safe_load(written)
    try:
        config.load({"cache": {"name": "redis", "options": part.as_options(said)}})
    except dscache.ConfigError as error:
        return str(error).split(": ", 2)[2]
    raise ValueError(f"{part.place}: {written} is no mistake")


# -- the page


def reference(guide: str) -> str:
    """Return the guide, docs/configuration.md, with a generated entry for each row of its tables.

    Raises ValueError for an option of the model without a row, and for a row without an option.
    """
    for part in parts():
        guide = _with_reference(guide, part)
    return _with_reasons(guide)


def _with_reference(guide: str, part: Part) -> str:
    heading = re.search(rf"^#+ {part.heading}$", guide, re.MULTILINE)
    table = heading and _TABLE.search(guide, heading.end())
    if not table:
        raise ValueError(f"docs/configuration.md has no table under {part.heading!r}")
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table[1].splitlines()]
    told = {row[0].strip("`"): row for row in rows}
    declared = fields(part.struct)
    expected = declared.keys() | set(part.struct.consumed)
    if told.keys() != expected:
        raise ValueError(
            f"docs/configuration.md, under {part.heading!r}: the table and the model differ in "
            f"{', '.join(sorted(told.keys() ^ expected))}"
        )
    entries = [_entry(part, name, declared.get(name), row) for name, row in told.items()]
    return f"{guide[: table.start()]}{''.join(entries)}\n{guide[table.end() :]}"


def _entry(part: Part, name: str, field: inspect.Field | None, row: list[str]) -> str:
    _, _, purpose, example = row
    written = re.match("`(.+?)`", example)
    assert written, f"{part.heading}: {name}: no example of a mistake"
    facts = f"{takes(field)}; default: {default(field)}" if field else "text; default: none"
    return (
        f"\n#### `{name}` {{ #{part.heading}-{name} .option }}\n\n"
        f"{purpose[:1].upper()}{purpose[1:]}.\n\n"
        f"- takes {facts}\n"
        f"- `{written[1]}`: {mistake(part, written[1])}\n"
    )


def _with_reasons(guide: str) -> str:
    """Replace the lists of options without effect by tables that give the reasons."""
    for heading, options in (
        ("Accepted without effect", config.Options.no_effect),
        ("Not supported", config.Options.unsupported),
    ):
        listed = re.search(rf"^### {heading}$.*?(^`.+?\n\n)", guide, re.MULTILINE | re.DOTALL)
        assert listed, heading
        rows = "".join(f"| `{name}` | {why} |\n" for name, why in sorted(options.items()))
        table = f"| option | why |\n|---|---|\n{rows}\n"
        guide = guide[: listed.start(1)] + table + guide[listed.end(1) :]
    return guide
