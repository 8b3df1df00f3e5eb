"""The schedule of the refreshes of a cluster's slots, for both caches.

It does no I/O and runs nothing in the background. ``record_stale`` marks the slots as possibly
outdated, and ``refresh_at`` says when to ask the nodes for them again. ``start_refresh`` claims
that refresh for one caller. ``abandon_refresh`` ends the claim, as do ``apply`` and
``record_failure`` of a ClusterState. The AsyncCache refreshes in a task. In a blocking Cache, the
next thread that uses the cluster refreshes the slots beside its own operation, while the others
use the current table. A claim also ends by itself, since an exception may strike its holder at
any line.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from typing import Final

from .._locks import make_lock
from ..config import Options
from .backoff import half_jitter
from .slots import GAP, GAP_CAP, GAP_GROWTH

# A claim lasts this much longer, in seconds, than the nodes have to answer.
_CLAIM_GRACE: Final = 0.25


class RefreshSchedule:
    """When to ask the nodes for the slots; one caller at a time does so, and claims it.

    ``on_due`` is called when ``refresh_at`` moves closer. It must not raise, block or call back.
    Any thread may use it.
    """

    def __init__(self, options: Options, on_due: Callable[[], object] | None) -> None:
        self.timeout = options.slots_refresh_timeout
        """How long the nodes have to answer a refresh, in milliseconds."""
        self.refresh_at = 0.0
        """When the next refresh is due, by ``time.monotonic()``; during one, when its claim ends.
        """
        self.lock = make_lock()
        self._on_due = on_due
        self._interval = (options.slots_refresh_interval or 0) / 1000 or inf
        self._claim = 0.0
        self._is_stale = False
        self._is_unready = False
        self._asked_at = -inf
        self._fruitless = 0
        self._failures = 0

    def record_stale(self) -> None:
        """Have the slots refreshed soon; during a refresh, once more after it."""
        with self.lock:
            if self._claim:
                self._is_stale = True
            else:
                self._bring_forward(self._asked_at + self.gap())

    def record_unready(self) -> None:
        """Have the slots refreshed soon, as some have no ready node after the last refresh.

        Each refresh in a row that changes nothing makes the next one later.
        """
        with self.lock:
            self._is_unready = True
            self.record_stale()

    def expedite_refresh(self) -> None:
        """End the pause after a failed refresh, as another node can be asked now."""
        with self.lock:
            if self._failures and not self._claim:
                self._bring_forward(0.0)

    def start_refresh(self, now: float) -> float:
        """Claim the refresh; returns the claim, or 0 if it isn't due or another caller has it."""
        with self.lock:
            if now < self.refresh_at:
                return 0.0
            self._claim = self.refresh_at = now + self.timeout / 1000 + _CLAIM_GRACE
            self._is_stale = False
            return self._claim

    def abandon_refresh(self, claim: float) -> None:
        """End a claim without an answer; the refresh stays due."""
        with self.lock:
            if claim == self._claim:
                self._is_stale = True
                self._end_claim(time.monotonic())

    def gap(self) -> float:
        """Return the shortest time from one refresh to the next, in seconds."""
        return half_jitter(GAP, GAP_CAP, self._fruitless, GAP_GROWTH)

    def _bring_forward(self, when: float) -> None:
        if when < self.refresh_at:
            self.refresh_at = when
            if self._on_due is not None:
                self._on_due()

    def _end_claim(self, now: float) -> None:
        self._claim, self._asked_at = 0.0, now
        self.refresh_at = now + (self.gap() if self._is_stale else self._interval)
