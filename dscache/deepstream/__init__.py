"""A Python server among deepstream's: the protocol of their messages."""

from __future__ import annotations

from . import protocol
from .protocol import check

__all__ = ["check", "protocol"]
