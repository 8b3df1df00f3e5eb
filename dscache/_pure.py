"""The core in plain Python: what ``_fast`` does, with the same names, results and errors.

Its parts stand in ``_pure_record.py`` (records and their checks), ``_pure_batch.py`` (operations
that travel together), ``_pure_wire.py`` (RESP and keys), ``_pure_pipeline.py`` (one node, with the
theory of operation), ``_pure_router.py`` (the nodes of a cluster), ``_pure_near.py`` (records
kept in the process) and ``_pure_messages.py`` (messages, and where they wait).
"""

from __future__ import annotations

from ._pure_messages import Inbox, Mailbox
from ._pure_messages import PureMessage as Message
from ._pure_near import NEAR_ENTRY_BYTES, NearCache
from ._pure_pipeline import Pipeline
from ._pure_record import PureRecord as Record
from ._pure_record import check_name, check_version, encode_data, parse_version
from ._pure_router import Router
from ._pure_wire import slot_of_key

__all__ = [
    "NEAR_ENTRY_BYTES",
    "Inbox",
    "Mailbox",
    "Message",
    "NearCache",
    "Pipeline",
    "Record",
    "Router",
    "check_name",
    "check_version",
    "encode_data",
    "parse_version",
    "slot_of_key",
]
