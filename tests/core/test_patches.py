"""JSON merge patches against the table of RFC 7396, and paths against deepstream's client."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dscache.core.markers import OMITTED
from dscache.core.patches import MAX_FILL, merged, parse_path, patch_of, with_value
from dscache.errors import RecordError

GOLDEN = Path(__file__).parents[1] / "api" / "golden" / "paths_by_client.json"
BY_CLIENT: list[dict[str, Any]] = json.loads(GOLDEN.read_text("utf-8"))

# Appendix A of RFC 7396: original, patch, result.
RFC_7396 = [
    ('{"a":"b"}', '{"a":"c"}', '{"a":"c"}'),
    ('{"a":"b"}', '{"b":"c"}', '{"a":"b","b":"c"}'),
    ('{"a":"b"}', '{"a":null}', "{}"),
    ('{"a":"b","b":"c"}', '{"a":null}', '{"b":"c"}'),
    ('{"a":["b"]}', '{"a":"c"}', '{"a":"c"}'),
    ('{"a":"c"}', '{"a":["b"]}', '{"a":["b"]}'),
    ('{"a":{"b":"c"}}', '{"a":{"b":"d","c":null}}', '{"a":{"b":"d"}}'),
    ('{"a":[{"b":"c"}]}', '{"a":[1]}', '{"a":[1]}'),
    ('["a","b"]', '["c","d"]', '["c","d"]'),
    ('{"a":"b"}', '["c"]', '["c"]'),
    ('{"a":"foo"}', "null", "null"),
    ('{"a":"foo"}', '"bar"', '"bar"'),
    ('{"e":null}', '{"a":1}', '{"e":null,"a":1}'),
    ("[1,2]", '{"a":"b","c":null}', '{"a":"b"}'),
    ("{}", '{"a":{"bb":{"ccc":null}}}', '{"a":{"bb":{}}}'),
]


@pytest.mark.parametrize(("original", "patch", "result"), RFC_7396)
def test_the_examples_of_rfc_7396(original: str, patch: str, result: str) -> None:
    changes = json.loads(patch)
    assert merged(json.loads(original), changes) == json.loads(result)
    assert changes == json.loads(patch)  # it serves further attempts


def test_a_merge_patch_may_be_nested_deeper_than_any_recursion() -> None:
    patch: dict[str, Any] = {"leaf": 1, "gone": None}
    for _ in range(50_000):
        patch = {"n": patch}
    node = merged({}, patch)
    for _ in range(50_000):
        node = node["n"]
    assert node == {"leaf": 1}


def by_path(data: Any, path: str, value: object) -> Any:
    return with_value("rec", copy.deepcopy(data), path, parse_path("rec", path), value)


def is_refused(case: dict[str, Any]) -> bool:
    """Return whether dscache refuses what the client ignores or fails at."""
    scalar = not isinstance(case["data"], dict | list)
    return "error" in case or "lost" in case or scalar or case["path"] == "a[0]b"


def test_paths_do_what_they_do_in_deepstreams_client() -> None:
    kept = [case for case in BY_CLIENT if not is_refused(case)]
    assert len(kept) > 400
    for case in kept:
        found = by_path(case["data"], case["path"], case.get("value", OMITTED))
        assert found == case["result"], case


@pytest.mark.parametrize("path", ["a[", "a]", "a[]", "a[["])
def test_a_bracket_without_an_index_does_not_count(path: str) -> None:
    assert by_path({"a": [1, 2], "b": 3}, path, "x") == {"a": "x", "b": 3}


def test_values_that_the_client_loses_or_fails_at_are_refused() -> None:
    refused = [case for case in BY_CLIENT if is_refused(case)]
    assert len(refused) > 100
    for case in refused:
        with pytest.raises(RecordError, match="'rec'") as caught:
            by_path(case["data"], case["path"], case.get("value", OMITTED))
        assert caught.value.name == "rec"


@pytest.mark.parametrize("path", ["", " ", ".", " . ", "a[x]", "a[1e3]", f"a[{10**20}]", 5, None])
def test_paths_that_name_nothing_are_refused(path: Any) -> None:
    with pytest.raises(RecordError, match="path"):
        parse_path("rec", path)


def test_a_list_grows_by_a_bounded_number_of_elements() -> None:
    grown = by_path({"a": [1]}, f"a[{MAX_FILL}]", 2)["a"]
    assert (len(grown), grown[0], grown[1], grown[-1]) == (MAX_FILL + 1, 1, None, 2)
    for path, value in ((f"a[{MAX_FILL + 1}]", 2), (f"b[{MAX_FILL + 1}]", OMITTED)):
        with pytest.raises(RecordError, match="at most 1000000 are added"):
            by_path({"a": [1]}, path, value)


@pytest.mark.parametrize(
    "arguments",
    [
        (OMITTED, None, OMITTED),
        (OMITTED, None, 1),
        ({}, None, 1),
        ({}, "a", 1),
        ({"a": object()}, None, OMITTED),
        (OMITTED, "a", object()),
    ],
)
def test_a_patch_is_either_a_merge_or_a_path(arguments: tuple[Any, Any, Any]) -> None:
    with pytest.raises(RecordError):
        patch_of("rec", *arguments)


def test_a_patch_is_what_it_was_at_the_call() -> None:
    given = {"a": [1]}
    merge, set_value = (
        patch_of("n", *args) for args in ((given, None, OMITTED), (OMITTED, "b", given))
    )
    given["a"].append(2)
    assert merge({}) == {"a": [1]}
    assert set_value({}) == {"b": {"a": [1]}}
