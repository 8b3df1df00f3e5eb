"""The sections of the API pages are made of the docstrings' sentences."""

from __future__ import annotations

import inspect

import pytest

import dscache
from api_sections import COMPLETE, PARAMETERS, with_sections


def test_results_and_errors_become_sections() -> None:
    made = with_sections(
        """Read a record; the result is a Record, or None if there is none.

        Takes long. Raises RecordError at the call for a bad name,
        and TypeError for a bad type. The future fails with ReplyError if Redis refuses.
        """,
        {"name": "The name."},
    )
    assert (
        made
        == """Read a record.

Takes long.

Args:
    name: The name.

Returns:
    A Record, or None if there is none.

Raises:
    RecordError: At the call for a bad name.
    TypeError: For a bad type.
    ReplyError: When awaited, if Redis refuses."""
    )


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("Raises A or B if it ends.", None),
        ("Raises ConnectionLost or DeadlineExceeded if it may have happened.", 2),
        ("Raises RecordError if the data has no place, and the errors of ``update``.", 1),
        ("Raises what ``change`` raises; RecordMissing if there is none.", 1),
        ("It raises nothing.", None),
    ],
)
def test_sentences_on_errors(text: str, errors: int | None) -> None:
    made = with_sections(f"Do it.\n\n{text}", {})
    told = made.partition("Raises:\n")[2].splitlines()
    assert len(told) == (errors or 0)
    assert errors is not None or text in made
    assert ("Raises what ``change`` raises." in made) == ("change" in text)


@pytest.mark.parametrize("kind", [dscache.AsyncCache, dscache.Cache, dscache.MessageNode])
def test_every_parameter_is_described(kind: type) -> None:
    assert f"{kind.__module__}.{kind.__qualname__}" in COMPLETE
    for name, method in inspect.getmembers(kind, inspect.isroutine):
        if not name.startswith("_"):
            assert {*inspect.signature(method).parameters} - {"self"} <= PARAMETERS.keys(), name
