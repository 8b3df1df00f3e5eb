"""A Python server among deepstream's: events, records, RPCs, and the protocol of their messages."""

from __future__ import annotations

from ..errors import RPCError, RPCTimeout
from . import protocol
from .changes import RecordChange
from .events import Event
from .peer import Peer
from .presence import PresenceChange
from .protocol import check
from .rpc import Reject

__all__ = [
    "Event",
    "Peer",
    "PresenceChange",
    "RPCError",
    "RPCTimeout",
    "RecordChange",
    "Reject",
    "check",
    "protocol",
]
