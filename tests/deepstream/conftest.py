"""Fixtures: deepstream's own packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.deepstream import NotInstalledError, install


@pytest.fixture(scope="session")
def packages() -> Path:
    """The folder with deepstream's packages from npm; without Node the test is skipped."""
    try:
        return install()
    except NotInstalledError as error:
        pytest.skip(str(error))
