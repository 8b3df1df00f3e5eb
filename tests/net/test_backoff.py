"""Pauses between attempts: they double, stay under their cap, and never overflow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscache.net.backoff import full_jitter, half_jitter, longest_pause


@pytest.mark.parametrize(
    ("failures", "expected"), [(0, 0.1), (1, 0.2), (3, 0.8), (4, 1.5), (10_000, 1.5)]
)
def test_the_longest_pause_doubles_up_to_its_cap(failures: int, expected: float) -> None:
    assert longest_pause(0.1, 1.5, failures) == pytest.approx(expected)


def test_the_longest_pause_grows_by_a_given_factor() -> None:
    assert longest_pause(1, 10, 2, growth=1.5) == pytest.approx(2.25)


@given(st.floats(0.001, 10), st.floats(0.001, 60), st.integers(0, 100_000))
def test_a_pause_is_random_within_its_bounds(first: float, cap: float, failures: int) -> None:
    longest = longest_pause(first, cap, failures)
    assert longest <= cap
    assert 0 <= full_jitter(first, cap, failures) <= longest
    assert longest / 2 <= half_jitter(first, cap, failures) <= longest
