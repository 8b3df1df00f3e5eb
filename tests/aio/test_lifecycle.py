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

    checks = {
        "running_loop": lambda: lifecycle.running_loop("a cache"),
        "check_loop": lambda: lifecycle.check_loop(loop, "a cache"),
    }
    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "get_running_loop", deep)
        with pytest.raises(RecursionError):
            checks[check]()
