"""Notes above the benchmarks of the cores.

Every one of them handles 1,000 records a call, so that microseconds in the table are nanoseconds a
record.
"""

from __future__ import annotations

import importlib.metadata


def pytest_report_header() -> str:
    libraries = ("hiredis", "redis", "msgspec")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    return f"libraries: {versions}; 1,000 records a call"
