"""Addresses of servers: ``host:port``."""

from __future__ import annotations

from typing import Final

from ..errors import shorten

# Of the name of a host, in characters.
MAX_HOST: Final = 255


def join_address(host: str, port: int) -> str:
    """Return ``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_address(host: object, port: object) -> bool:
    """Return whether a host and port are valid. Servers may announce invalid ones.

    A host with control characters would forge lines of a log.
    """
    return (
        type(host) is str
        and 0 < len(host) <= MAX_HOST
        and host.isprintable()
        and " " not in host
        and type(port) is int
        and 0 < port < 65536
    )


def read_address(host: object, port: object) -> tuple[str, int]:
    """Return the host and port that a Sentinel states as text. Raises ValueError for no such."""
    number = int(port) if type(port) is str and port.isdecimal() and len(port) < 6 else -1
    if type(host) is not str or not is_address(host, number):
        raise ValueError(f"it names {shorten((host, port))} as host and port")
    return host, number
