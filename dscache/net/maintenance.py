"""Announcements of maintenance by Redis Cloud and Redis Software: the request for them, and pushes.

A server that was asked by ``CLIENT MAINT_NOTIFICATIONS ON`` pushes ``MOVING`` before its address
changes, and ``MIGRATING`` or ``FAILING_OVER`` before it may be slow for a while, which
``MIGRATED`` or ``FAILED_OVER`` ends. This module does no I/O.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

from ..config import Options
from ..config.address import is_address
from ..core.constants import PASSING
from ..errors import shorten
from .credentials import Word
from .foreign_errors import foreign

_logger = logging.getLogger("dscache")

# The deadline of operations, and the longest silence of a server, during maintenance, in seconds.
RELAXED: Final = 10.0
# Maintenance of which no end is announced is over this long after it was to begin, in seconds.
LASTS: Final = 60.0
# The longest time that an announcement may state, in seconds.
_MOST_SECONDS: Final = 3600
# The longest number of a port, in digits.
_PORT_DIGITS: Final = 5
# A server that has refused the request is not asked again for this long, in seconds.
_REFUSED_FOR: Final = 3600.0
# Refusals that say nothing about the command.
_UNTOLD: Final = (*PASSING, "NOAUTH")

MOVING: Final = b"MOVING"
BEGINNINGS: Final = (b"MIGRATING", b"FAILING_OVER")
ENDINGS: Final = (b"MIGRATED", b"FAILED_OVER")


@dataclass(frozen=True, slots=True)
class Notice:
    """One announcement.

    ``seconds`` is the time until it happens. ``endpoint`` is the new address of a server that
    moves; None if the configured one leads there.
    """

    kind: bytes
    serial: int
    seconds: int = 0
    endpoint: tuple[str, int] | None = None


class Announcements:
    """The request for announcements of one server, and whether the server has refused it.

    With ``maintNotifications: auto`` it is only sent where the service could be a hosted one: not
    to this machine, not behind Sentinels, and not to a known proxy. A refusal is remembered.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._refused_until = -math.inf
        self._complained = False

    @property
    def are_required(self) -> bool:
        """Whether a server without announcements is refused."""
        return self._options.maint_notifications == "on"

    def request(self, peer: str) -> list[Word] | None:
        """Return the command for a connection to the IP address ``peer``; None to send none."""
        mode = self._options.maint_notifications
        if mode == "off":
            return None
        if mode == "auto" and (self._is_plain(peer) or time.monotonic() < self._refused_until):
            return None
        kind = _endpoint_type(self._options.host, peer)
        return ["CLIENT", "MAINT_NOTIFICATIONS", "ON", "moving-endpoint-type", kind]

    def _is_plain(self, peer: str) -> bool:
        options = self._options
        if options.path or options.sentinels or options.proxied:
            return True
        found = _ip(peer)
        return found is None or found.is_loopback

    def note(self, code: str | None) -> None:
        """Note the reply: None for consent, or the code of an error."""
        if code is not None and code not in _UNTOLD:
            self._refused_until = time.monotonic() + _REFUSED_FOR

    def read(self, push: list[Any], address: str) -> Notice | None:
        """Return the announcement in a push; None for any other, or one that is malformed.

        The first malformed one is logged.
        """
        if push[0] != MOVING and push[0] not in BEGINNINGS and push[0] not in ENDINGS:
            return None
        try:
            return parse(push)
        except (ValueError, UnicodeDecodeError) as error:
            if foreign(error) is not None:
                raise
            if not self._complained:
                self._complained = True
                _logger.warning(
                    "%s has announced maintenance in an unknown form, which is ignored: %s",
                    address,
                    shorten(list(push)),
                )
        return None


def parse(push: list[Any]) -> Notice:
    """Return the announcement in a push of a kind that is known. Raises ValueError."""
    kind, serial = push[0], push[1] if len(push) > 1 else None
    if type(serial) is not int:
        raise ValueError("no serial number")
    if kind in ENDINGS:
        return Notice(kind, serial)
    seconds = push[2] if len(push) > 2 else None
    if type(seconds) is not int or not 0 <= seconds <= _MOST_SECONDS:
        raise ValueError("no time")
    if kind in BEGINNINGS:
        return Notice(kind, serial, seconds)
    return Notice(kind, serial, seconds, _endpoint(push[3] if len(push) > 3 else None))


def _endpoint(value: Any) -> tuple[str, int] | None:
    if value is None:
        return None
    host, colon, digits = value.decode().rpartition(":") if type(value) is bytes else ("", "", "")
    is_number = digits.isascii() and digits.isdigit() and len(digits) <= _PORT_DIGITS
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not is_number or not is_address(host, int(digits)):
        raise ValueError("no address")
    return host, int(digits)


def _endpoint_type(host: str, peer: str) -> str:
    """Return the kind of address that is wanted: like the configured one, and its network."""
    found = _ip(peer)
    if found is None:
        return "none"
    where = "internal" if found.is_private else "external"
    return f"{where}-{'fqdn' if _ip(host) is None else 'ip'}"


def _ip(text: str) -> Any:
    try:
        return ip_address(text.partition("%")[0])
    except ValueError as error:
        if foreign(error) is not None:
            raise  # a signal handler has raised it
        return None
