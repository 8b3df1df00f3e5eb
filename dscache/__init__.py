"""Versioned JSON records in Redis, as deepstream.io keeps them, for fast Python servers."""

from typing import TYPE_CHECKING

from ._backend import BACKEND, core
from .cache import AsyncCache
from .errors import (
    BulkError,
    ConfigError,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    DscacheError,
    Overloaded,
    ProtocolError,
    RecordError,
    ReplyError,
    UsageError,
)

if TYPE_CHECKING:
    # The twins have one interface; type checkers read the one written in Python.
    from ._pure import Record
else:
    Record = core.Record

__all__ = [
    "BACKEND",
    "AsyncCache",
    "BulkError",
    "ConfigError",
    "ConnectError",
    "ConnectionLost",
    "DeadlineExceeded",
    "DscacheError",
    "Overloaded",
    "ProtocolError",
    "Record",
    "RecordError",
    "ReplyError",
    "UsageError",
]
