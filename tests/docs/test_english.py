"""The wording of docstrings, comments, error texts and ``--help``.

A text begins with a noun or a verb and names the actor. Pronouns that stand for an unnamed actor or
thing ("who", "what", "those") are rare.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.documents import PROJECT

PACKAGE = PROJECT / "dscache"
PYTHON = sorted(PACKAGE.rglob("*.py"))
CYTHON = sorted(path for kind in ("*.pyx", "*.pxi") for path in PACKAGE.rglob(kind))

FORBIDDEN_FIRST = re.compile(r"(who|what|whose|whoever|nobody|somebody)\b", re.IGNORECASE)
# "Structs whose repr shows no secret" has its noun; "whose" is free at the beginning of a clause.
FREE = re.compile(
    r"\b(who|what|whoever|nobody|somebody|those)\b"
    r"|(^|[.:;(]\s+|\b(?:and|or|but|of|to|for|by|if|that)\s+)whose\b",
    re.IGNORECASE,
)
MOST_FREE = 0.03
_CYTHON_DOCSTRING = re.compile(r'^[ \t]*"""(.*?)"""', re.DOTALL | re.MULTILINE)
_CYTHON_RAISED = re.compile(
    r'\b(?:raise [\w.]+|[A-Z]\w*(?:Error|Lost|Exceeded|Overloaded))\(\s*f?"((?:[^"\\\n]|\\.)+)"'
)
_CODE = re.compile(r"``.*?``", re.DOTALL)


class Text(NamedTuple):
    """A text of the package and its place."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        first = self.text.strip().partition("\n")[0]
        return f"{self.path.relative_to(PROJECT)}:{self.line}: {first}"


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Return every node of a Python file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text())))


def docstrings(path: Path) -> Iterator[Text]:
    """Yield the docstrings of a file, and the texts that describe attributes."""
    if path.suffix != ".py":
        source = path.read_text()
        for found in _CYTHON_DOCSTRING.finditer(source):
            yield Text(path, source.count("\n", 0, found.start()) + 1, found[1])
        return
    for node in nodes(path):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield Text(path, statement.lineno, text)


def comments(path: Path) -> Iterator[Text]:
    """Yield the comments of a file; lines in succession are one comment."""
    lines = path.read_text().splitlines()
    if path.suffix == ".py":
        found = [
            (token.start[0], token.start[1], token.string)
            for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline)
            if token.type == tokenize.COMMENT
        ]
    else:
        found = [
            (number, line.index("#"), line.strip())
            for number, line in enumerate(lines, 1)
            if line.lstrip().startswith("#")
        ]
    before = (-1, -1)
    for number, column, text in found:
        if before != (number - 1, column):
            yield Text(path, number, text.lstrip("#: "))
        before = (number, column)


def messages(path: Path) -> Iterator[Text]:
    """Yield the first words of error texts, log texts and help texts in a file."""
    if path.suffix != ".py":
        source = path.read_text()
        for found in _CYTHON_RAISED.finditer(source):
            yield Text(path, source.count("\n", 0, found.start()) + 1, found[1])
        return
    for node in nodes(path):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        is_error = re.search(r"(Error|Lost|Exceeded|Overloaded|Parameter|^error)$", name)
        is_log = name in ("debug", "info", "warning", "error", "exception")
        given = node.args[:1] if is_error or is_log else []
        given += [keyword.value for keyword in node.keywords if keyword.arg in ("help", "text")]
        for value in given:
            if isinstance(value, ast.JoinedStr) and value.values:
                value = value.values[0]
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield Text(path, value.lineno, value.value)


@pytest.mark.parametrize("kind", [docstrings, comments, messages], ids=lambda kind: kind.__name__)
def test_texts_begin_with_a_noun_or_a_verb(kind: object) -> None:
    assert callable(kind)
    texts = [text for path in (*PYTHON, *CYTHON) for text in kind(path)]
    assert len(texts) > 100
    assert not [str(text) for text in texts if FORBIDDEN_FIRST.match(text.text.strip())]


def test_docstrings_name_the_actor() -> None:
    texts = [text for path in (*PYTHON, *CYTHON) for text in docstrings(path)]
    free = [text for text in texts if FREE.search(_CODE.sub("", text.text))]
    share = len(free) / len(texts)
    listed = "\n".join(map(str, free))
    assert share <= MOST_FREE, f"{len(free)} of {len(texts)} docstrings, {share:.1%}:\n{listed}"
