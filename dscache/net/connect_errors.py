"""Errors of failed attempts to connect: how callers see them, and which are final."""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Iterable
from typing import Any, Final

from ..core.constants import PASSING
from ..core.failures import ErrorOf, remedy_of
from ..errors import ConfigError, ConnectError, DscacheError, ProtocolError, ReplyError, clean
from .sockets import EndOfTls, NoneAccepts

# A server that is full for the moment says so in these words. Whether it then ends the connection
# differs.
_FULL: Final = re.compile(r"max(imum)? number of (clients|connections)", re.IGNORECASE)
# Codes of errors to a handshake after which another attempt may succeed.
_PASSING: Final = (*PASSING, "MASTERDOWN")
# Errors of a server that turns a client away for good. Whatever else it says may pass.
_LASTING: Final = ("DENIED", "NOAUTH", "NOPERM", "WRONGPASS")


# Hints for a client with TLS at a server without it, or the other way round. Such a server says
# nothing: it closes the connection, or waits for more.
IF_TLS: Final = "; if it speaks TLS on this port, use rediss:// or tls: true"
IF_PLAIN: Final = "; if it speaks no TLS on this port, use redis:// or leave tls out"
# OpenSSL's names for bytes that are no TLS.
_NO_TLS: Final = (
    "HTTP_REQUEST",
    "PACKET_LENGTH_TOO_LONG",
    "UNKNOWN_PROTOCOL",
    "WRONG_VERSION_NUMBER",
)


class UnsuitableServer(ConnectError):
    """The server lacks something that the configuration asks of it."""


class UnsuitableConfig(ConfigError):
    """The configuration asks for something that the server doesn't have, such as a ``db``."""


class TurnedAway(ReplyError):
    """The server has ended the handshake, and this error reply was the last that came from it."""


def end_of_handshake(replies: Iterable[Any], reason: Exception) -> Exception:
    """Return why a handshake has ended: the last error among the ``replies``, else ``reason``.

    A server that turns a client away, such as for having too many, sends an error and closes.
    """
    said = [reply for reply in replies if isinstance(reply, ReplyError)]
    return TurnedAway(said[-1].message) if said else reason


def as_connect_error(
    error: Exception, connect_timeout: int, tried: str = "", *, in_tls: bool = False
) -> Exception:
    """Return the error that callers see for a failed attempt to connect.

    Errors of this package stay as they are; all others become a ConnectError. ``connect_timeout``
    is in milliseconds; ``tried`` states the addresses that were tried in vain, if several. With
    ``in_tls``, the attempt has come to the TLS handshake.
    """
    if isinstance(error, DscacheError):
        return error
    if isinstance(error, NoneAccepts):
        return ConnectError(clean(error.strerror or ""))
    if isinstance(error, TimeoutError):
        tried = tried and f" ({tried})"
        if in_tls:
            tried += IF_PLAIN
        return ConnectError(f"no answer within {connect_timeout} ms{tried}")
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConnectError(f"the server's certificate is refused: {error.verify_message}")
    if _is_end_of_tls(error):
        return ConnectError(f"the server closed it during the TLS handshake{IF_PLAIN}")
    if isinstance(error, ssl.SSLError) and error.reason in _NO_TLS:
        return ConnectError(f"the server answers without TLS{IF_PLAIN}")
    if isinstance(error, ssl.SSLError) and "ALERT_" in (error.reason or ""):
        return ConnectError(_refusal_of_tls(error.reason))
    if isinstance(error, OSError):
        text = error.strerror
        if error.errno and not isinstance(error, (ssl.SSLError, socket.gaierror)):
            text = os.strerror(error.errno)  # asyncio puts a text of its own into strerror
        return ConnectError(clean(text or str(error)) or type(error).__name__)
    return ConnectError(clean(f"{type(error).__name__}: {error}"))


def _is_end_of_tls(error: Exception) -> bool:
    """Return whether a connection ended in the middle of a TLS handshake, or right behind it."""
    return isinstance(error, (EndOfTls, ssl.SSLEOFError, ssl.SSLZeroReturnError))


def _refusal_of_tls(reason: str) -> str:
    """Return the words of a TLS alert, such as TLSV13_ALERT_CERTIFICATE_REQUIRED, and a remedy."""
    said = reason.partition("ALERT_")[2].lower().replace("_", " ")
    remedy = ""
    if said in ("certificate required", "handshake failure"):
        remedy = "; if it asks clients for a certificate, set tls.cert and tls.key"
    elif "certificate" in said or said == "unknown ca":
        remedy = "; check tls.cert"
    return f"the server refuses the TLS connection: {said}{remedy}"


def connect_failure(error: Exception, address: str, said: Exception) -> DscacheError:
    """Return the error to raise for an attempt to connect that ended with ``error``.

    ``said`` is the result of ``as_connect_error`` for it.
    """
    if isinstance(error, ReplyError):
        return ReplyError(error.message, context=f"connect at {address}{remedy_of(error.message)}")
    return ConnectError(f"no connection to {address}: {said}")


def permanent_failure(error: Exception, shown: Exception, address: str) -> ErrorOf | None:
    """Return how operations fail at once, or None if the next attempt may help soon.

    ``shown`` is the result of ``as_connect_error`` for the error. Final are a refusal by the
    server that doesn't pass, a server that is unsuitable, and errors of TLS and of RESP.
    """
    if isinstance(error, ReplyError) and not _may_pass(error):
        message = error.message
        remedy = remedy_of(message)
        return lambda operation: ReplyError(message, context=f"{operation} at {address}{remedy}")
    if isinstance(error, UnsuitableConfig):
        return lambda operation: ConfigError(f"{operation} at {address}: {shown}")
    if isinstance(error, UnsuitableServer):
        return lambda operation: ConnectError(f"{operation}: {shown}")
    if isinstance(error, (ssl.SSLError, ProtocolError)) and not _is_end_of_tls(error):
        kind = ProtocolError if isinstance(error, ProtocolError) else ConnectError
        said = str(shown) if str(shown).startswith(address) else f"{address}: {shown}"
        return lambda operation: kind(f"{operation}: {said}")
    return None


def _may_pass(error: ReplyError) -> bool:
    """Whether a refusal may be over at the next attempt: of a server that is loading, busy or full.

    A replica that has lost its primary may find it again, or the name may lead to another server.
    """
    if isinstance(error, TurnedAway) and error.code not in _LASTING:
        return True
    return error.code in _PASSING or is_full(error.message)


def says_to_hello(reply: object) -> str:
    """Return the words of a refusal of HELLO in parentheses, or an empty text."""
    return f' (it says "{reply.message}" to HELLO)' if isinstance(reply, ReplyError) else ""


def is_full(text: str) -> bool:
    """Whether a server says that it has too many clients."""
    return _FULL.search(text) is not None
