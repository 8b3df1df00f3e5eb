"""The sections of the API pages are made of the docstrings' sentences."""

from __future__ import annotations

import inspect
import pkgutil

import pytest

import dscache
from api_sections import COMPLETE, OTHERS, PARAMETERS, known_parameters, with_sections


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


def test_a_parameter_is_described_for_its_own_function() -> None:
    assert known_parameters("dscache.sync.Cache.get")["name"] == PARAMETERS["name"]
    assert "event" in known_parameters("dscache.deepstream.events.Events.emit")["name"]
    assert "metrics" in known_parameters("dscache.prometheus.register")["name"]
    assert known_parameters("dscache.otel.attributes_of") == {}


@pytest.mark.parametrize("path", OTHERS)
def test_described_parameters_exist(path: str) -> None:
    found = pkgutil.resolve_name(path)
    functions = [found] if inspect.isroutine(found) else vars(found).values()
    named = {
        parameter
        for one in functions
        if inspect.isroutine(one)
        for parameter in inspect.signature(getattr(one, "__func__", one)).parameters
    }
    assert OTHERS[path].keys() <= named


def test_a_result_may_have_a_colon_in_a_name() -> None:
    made = with_sections("Return a cache of a URL or ``host:port``: open.", {})
    assert "Returns:\n    A cache of a URL or ``host:port``, open." in made


def test_lists_stay_lists() -> None:
    text = """Return counters.

        - ``reads``: records read,
          found or not
        - ``writes``

        Raises UsageError if closed."""
    made = with_sections(text, {})
    assert "- ``reads``: records read,\n  found or not\n- ``writes``" in made
    assert "Raises:\n    UsageError: If closed." in made
