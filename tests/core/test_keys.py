"""Key layouts, and the keys that the compiled core encodes and decodes by itself."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dscache.core.keys import KeyLayout, common_prefix, is_version_key, partner, slot_of_key
from tests.support.near_wire import NearExchange
from tests.support.wire import CORES, commands

# Names and keys that resemble what a layout adds.
PIECES = st.lists(st.sampled_from(["a", "{", "}", "0", "_v", "_d", "é"]), max_size=6).map("".join)
NAMES = PIECES.filter(bool)
PREFIXES = st.sampled_from(["", "p:", "{", "{}", "{p}", "}"])


@given(NAMES, PREFIXES, st.booleans())
@example("}", "", True)
def test_keys_lead_back_to_their_name(name: str, prefix: str, hash_tag: bool) -> None:
    layout = KeyLayout(prefix, hash_tag)
    version, data = layout.keys(name)
    assert layout.name_of(version) == layout.name_of(data) == name
    assert (is_version_key(version), is_version_key(data)) == (True, False)
    assert (partner(version), partner(data)) == (data, version)


@given(PIECES, PREFIXES, st.booleans())
@example("{}a}_v", "", True)
def test_a_key_belongs_to_the_name_that_has_it_and_to_no_other(
    text: str, prefix: str, hash_tag: bool
) -> None:
    layout = KeyLayout(prefix, hash_tag)
    key = text.encode()
    name = layout.name_of(key)
    assert name is None or key in layout.keys(name)


@pytest.mark.parametrize("core", CORES)
@given(name=NAMES, prefix=PREFIXES, hash_tag=st.booleans())
def test_both_cores_send_these_keys(core: Any, name: str, prefix: str, hash_tag: bool) -> None:
    layout = KeyLayout(prefix, hash_tag)
    pipeline = core.Pipeline(object, int, key_prefix=prefix, hash_tag=hash_tag)
    pipeline.delete(name)
    [[_, *keys]] = commands(pipeline.take_output())
    assert tuple(keys) == layout.keys(name)
    router = core.Router(object, pipeline, None, key_prefix=prefix, hash_tag=hash_tag)
    assert router.slot_of(name) == layout.slot(name)
    assert [core.slot_of_key(key) for key in keys] == [slot_of_key(key) for key in keys]


@pytest.mark.parametrize("core", CORES)
@given(name=NAMES, text=PIECES, prefix=PREFIXES, hash_tag=st.booleans())
@example(name="}a", text="{}a}_v", prefix="", hash_tag=True)
@example(name="}a", text="}{0}}a_v", prefix="", hash_tag=True)
@example(name="a", text="{a}_d", prefix="", hash_tag=True)
def test_both_cores_take_a_changed_key_for_that_of_the_same_name(
    core: Any, name: str, text: str, prefix: str, hash_tag: bool
) -> None:
    near = NearExchange(core, key_prefix=prefix, hash_tag=hash_tag)
    near.get(name)
    near.take()
    near.reply([b"1", b"1"])
    key = text.encode()
    near.push(key)
    assert near.has(name) == (KeyLayout(prefix, hash_tag).name_of(key) != name)


@pytest.mark.parametrize(
    ("names", "expected"),
    [([], ""), (["a/b"], "a/b"), (["a/b", "a/bc", "a/c"], "a/"), (["a", "b"], ""), (["", "a"], "")],
)
def test_the_common_prefix_of_names(names: list[str], expected: str) -> None:
    assert common_prefix(names) == expected
