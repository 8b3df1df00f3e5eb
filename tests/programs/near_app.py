"""A WSGI application with a warm near cache, which gunicorn preloads.

``NEAR_URL`` in the environment names the server. A request for the path ``/NAME`` reads a record
and tells of the process that did.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

import dscache
from tests.support.near_truth import counters, is_at_hand, version_of

_OPTIONS = {
    "url": os.environ["NEAR_URL"],
    "connectionName": "near-reader",
    "commandTimeout": 60_000,
    # Nothing but messages ends what is kept.
    "nearCache": {"idleLimit": 600_000, "maxAge": 3_600_000},
}
cache = dscache.Cache.from_config({"name": "redis", "options": _OPTIONS})
for _ in range(3):
    cache.get("warm")
MASTER = os.getpid()
HITS = counters(cache)["hits"]


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    name = environ["PATH_INFO"].strip("/")
    told = {
        "version": version_of(cache, name),
        "is_at_hand": is_at_hand(cache, name),
        "process": os.getpid(),
        "master": MASTER,
        "warm": HITS > 0,
        "threads": threading.active_count(),
    }
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(told).encode()]
