"""Checks of the loop and the process that own an object."""

from __future__ import annotations

import asyncio

import pytest

from dscache.aio import lifecycle


@pytest.mark.parametrize("check", ["running_loop", "check_loop"])
async def test_a_recursion_error_is_not_taken_for_a_missing_loop(
    check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a RuntimeError too, as the one of ``get_running_loop`` is."""
    loop = asyncio.get_running_loop()

    def deep() -> None:
        raise RecursionError("maximum recursion depth exceeded")

    with monkeypatch.context() as patched, pytest.raises(RecursionError):
        patched.setattr(asyncio, "get_running_loop", deep)
        if check == "running_loop":
            lifecycle.running_loop("a cache")
        else:
            lifecycle.check_loop(loop, "a cache")
