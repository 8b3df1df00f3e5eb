"""Versioned JSON records in Redis, as deepstream.io keeps them, for fast Python servers."""

from ._start import CommandImports

with CommandImports():
    from importlib import import_module
    from typing import TYPE_CHECKING, Any

    from ._backend import BACKEND, core, make_message, make_record
    from ._version import __version__
    from .core.condition import ANY
    from .core.loading import Loaded
    from .core.markers import DELETE, KEEP
    from .errors import (
        BulkError,
        ConfigError,
        ConnectError,
        ConnectionLost,
        DeadlineExceeded,
        DscacheError,
        LoadError,
        MessageError,
        Overloaded,
        ProtocolError,
        RecordDamaged,
        RecordError,
        RecordMissing,
        ReplyError,
        RPCError,
        RPCTimeout,
        UsageError,
    )

if TYPE_CHECKING:
    # Both cores have the same interface; type checkers read the one written in Python.
    from . import deepstream as deepstream
    from .cache import AsyncCache
    from .core.pure import Message, Record
    from .messages import MessageNode
    from .sync import Cache
else:
    Message = core.Message
    Record = core.Record

    def __getattr__(name: str) -> Any:
        # The import of a cache or of MessageNode is paid only by the programs that use it. That of
        # redis-py, for Cache, takes longer than all the others.
        if name in ("cache", "deepstream"):
            return import_module(f".{name}", __name__)
        module = {"AsyncCache": "cache", "Cache": "sync", "MessageNode": "messages"}.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(f".{module}", __name__), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "ANY",
    "BACKEND",
    "DELETE",
    "KEEP",
    "AsyncCache",
    "BulkError",
    "Cache",
    "ConfigError",
    "ConnectError",
    "ConnectionLost",
    "DeadlineExceeded",
    "DscacheError",
    "LoadError",
    "Loaded",
    "Message",
    "MessageError",
    "MessageNode",
    "Overloaded",
    "ProtocolError",
    "RPCError",
    "RPCTimeout",
    "Record",
    "RecordDamaged",
    "RecordError",
    "RecordMissing",
    "ReplyError",
    "UsageError",
    "__version__",
    "make_message",
    "make_record",
]
