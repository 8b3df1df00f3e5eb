"""Servers, clients and peers that all write at random end equal, and none of them dies."""

from __future__ import annotations

from pathlib import Path

from dscache.embedded import find_server
from tests.soak import rows


async def test_every_side_ends_equal(packages: Path) -> None:
    figures = await rows.run("deepstream", find_server(), seconds=10.0, seed=7)
    print(figures.line())
    assert figures.problems == []
    for outcome in ("py patched", "py deleted", "py made", "py heard", "js written", "js own"):
        assert figures.outcomes[outcome] > 0


async def test_no_call_makes_a_server_or_client_complain(packages: Path) -> None:
    figures = await rows.run("deepstream-calls", find_server(), calls=3000, seed=7)
    print(figures.line())
    assert figures.problems == []
    assert figures.operations >= 3000
    assert figures.outcomes["ok"] > 500
