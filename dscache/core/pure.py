"""The core in plain Python, with the names, results and errors of ``_fast``.

Its parts stand beside this module: ``record.py`` (records and their checks), ``batch.py``
(operations that travel together), ``resp.py`` (RESP and keys), ``pipeline.py`` (one node, with the
theory of operation), ``router.py`` (the nodes of a cluster), ``fetcher.py`` (hits
of ``fetch``), ``near_cache.py`` and
``shared_near.py`` (records kept in the process, for an event loop and for threads) and
``message.py`` (messages and the queues of their subscribers).
"""

from __future__ import annotations

from .fetcher import BlockingFetcher, Fetcher
from .keys import slot_of_key
from .message import Message, MessageDispatcher, SubscriberQueue
from .near_cache import NEAR_ENTRY_BYTES, NearCache
from .pipeline import Pipeline
from .record import Record, check_name, check_version, encode_data, parse_version
from .router import Router
from .shared_near import SharedNearCache, SharedWrite

# The name of the reader of replies.
READER = "hiredis"

__all__ = [
    "NEAR_ENTRY_BYTES",
    "READER",
    "BlockingFetcher",
    "Fetcher",
    "Message",
    "MessageDispatcher",
    "NearCache",
    "Pipeline",
    "Record",
    "Router",
    "SharedNearCache",
    "SharedWrite",
    "SubscriberQueue",
    "check_name",
    "check_version",
    "encode_data",
    "parse_version",
    "slot_of_key",
]
