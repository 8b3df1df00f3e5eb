"""Hosts, ports and ``host:port`` in the configuration: patterns, types and comparison.

The pieces of a ``host:port`` text are joined by ``core.constants.join_address``.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Final

from msgspec import Meta

_PORT: Final = (
    r"(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"
)
_HOST: Final = r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/@\[\]]+)"

HOST_AND_PORT: Final = re.compile(rf"{_HOST}:([0-9]{{1,5}})")
"""``host:port`` as a source; the port's range is checked with the option ``port``."""

Host = Annotated[
    str,
    Meta(
        pattern=r"[^\s/@\[\]]+", extra={"expected": "a host name or an address (a URL is for url)"}
    ),
]
Port = Annotated[int, Meta(ge=1, le=65535)]
HostAndPort = Annotated[
    str,
    Meta(
        pattern=rf"{_HOST}:{_PORT}",
        extra={"expected": "host:port, with brackets around an IPv6 address"},
    ),
]


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of a text that matches HostAndPort; IPv6 loses its brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def canonical(host: str, port: int) -> tuple[str, int]:
    """Return the address in a form that is equal for every spelling of it."""
    try:
        return str(ipaddress.ip_address(host)), port
    except ValueError:
        return host.lower(), port
