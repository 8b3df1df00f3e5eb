"""A pytest plug-in that measures which lines of dscache run: ``make coverage``.

``-p`` loads it before the plug-ins that are installed, and so before ``dscache.testing`` imports
the package: with pytest-cov the lines that run at import would count as never run. Each xdist
worker loads it too and writes a data file of its own.
"""

from __future__ import annotations

import os

import coverage

# The suffix keeps the data files of the workers apart, for ``coverage combine``.
_coverage = coverage.Coverage(data_suffix=True)
_coverage.start()
_pid = os.getpid()


def pytest_unconfigure() -> None:
    """Save the data of this process, at the end of its run."""
    if os.getpid() == _pid:
        _coverage.stop()
        _coverage.save()
