"""Exceptions of every kind in the way of a cache: each caller gets its own record or an error.

The long form is a row of the soak test.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dscache.embedded import EmbeddedServer, ServerBinary
from tests.conftest import BY_AGE
from tests.programs.interruptions import SCENES
from tests.support.blocking import run_child


@pytest.fixture(scope="module")
def server(running: Callable[[ServerBinary], EmbeddedServer]) -> EmbeddedServer:
    """The oldest server alone: the exceptions hit the client.

    A newer server checks the line end behind each text, and so notices lost bytes by itself.
    """
    return running(BY_AGE[0])


@pytest.mark.parametrize(("scene", "loop"), SCENES)
def test_each_record_goes_to_its_owner_and_each_operation_ends(
    server: EmbeddedServer, backend: str, scene: str, loop: str
) -> None:
    result = run_child("interruptions.py", scene, loop, server.url, backend=backend, seconds=240)
    assert result == {"wrong": [], "pending": {}}
