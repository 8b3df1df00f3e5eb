"""Errors of failed attempts to connect: how callers see them, and which are final."""

from __future__ import annotations

import os
import socket
import ssl

from ..core.constants import ErrorOf
from ..errors import ConnectError, DscacheError, ProtocolError, ReplyError, clean
from .sockets import NoneAccepts


class UnsuitableServer(ConnectError):
    """The server can't do what the configuration asks of it."""


def as_connect_error(error: Exception, connect_timeout: int, tried: str = "") -> Exception:
    """Return the error that callers see for a failed attempt to connect.

    Errors of this package stay as they are; all others become a ConnectError. ``connect_timeout``
    is in milliseconds; ``tried`` states the addresses that were tried in vain, if several.
    """
    if isinstance(error, DscacheError):
        return error
    if isinstance(error, NoneAccepts):
        return ConnectError(clean(error.strerror or ""))
    if isinstance(error, TimeoutError):
        tried = tried and f" ({tried})"
        return ConnectError(f"no answer within {connect_timeout} ms{tried}")
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConnectError(f"the server's certificate is refused: {error.verify_message}")
    if isinstance(error, OSError):
        text = error.strerror
        if error.errno and not isinstance(error, (ssl.SSLError, socket.gaierror)):
            text = os.strerror(error.errno)  # asyncio puts a text of its own into strerror
        return ConnectError(clean(text or str(error)) or type(error).__name__)
    return ConnectError(clean(f"{type(error).__name__}: {error}"))


def permanent_failure(error: Exception, shown: Exception, address: str) -> ErrorOf | None:
    """Return how operations fail at once, or None if the next attempt may help soon.

    ``shown`` is the result of ``as_connect_error`` for the error. Final are a refusal by the
    server other than LOADING, a server that is unsuitable, and errors of TLS and of RESP.
    """
    if isinstance(error, ReplyError) and error.code != "LOADING":
        message = error.message
        return lambda operation: ReplyError(message, context=f"{operation} at {address}")
    if isinstance(error, UnsuitableServer):
        return lambda operation: ConnectError(f"{operation}: {shown}")
    if isinstance(error, (ssl.SSLError, ProtocolError)):
        kind = ProtocolError if isinstance(error, ProtocolError) else ConnectError
        return lambda operation: kind(f"{operation}: {address}: {shown}")
    return None
