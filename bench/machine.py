"""Facts about the machine and the run that are needed to read the numbers."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform

from dscache.embedded import EmbeddedServer
from workload import DOCUMENT, encode

LIBRARIES = ("hiredis", "redis", "msgspec", "uvloop")


def facts(server: EmbeddedServer, placing: str, rounds: int) -> list[str]:
    """Return the lines above the tables."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    return [
        f"{datetime.datetime.now().astimezone():%Y-%m-%d}, {processor()}, {platform.system()}",
        f"{server.binary.name}, Python {platform.python_version()}, {versions}",
        f"{placing}, loopback",
        f"documents of {len(encode(DOCUMENT))} bytes; median of {rounds} interleaved rounds",
    ]


def processor() -> str:
    """Return the processor's name and how many cores this machine has."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            models = [line.partition(":")[2].strip() for line in file if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


def stolen_seconds() -> float | None:
    """Return the processor time stolen by other machines; None if unknown."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return None
