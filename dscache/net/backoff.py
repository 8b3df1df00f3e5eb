"""Pauses between attempts: exponential backoff with jitter.

Jitter keeps the clients of a server that restarts from coming back all at once.
"""

from __future__ import annotations

import random
from typing import Final

from ..config import RetryStrategy

# Every cap is reached long before; hundreds of doublings would overflow a float.
_MAX_FAILURES: Final = 30
# While operations wait for a connection, attempts are no further apart, in seconds.
MAX_PAUSE_WHILE_WAITING: Final = 0.25


def longest_pause(first: float, cap: float, failures: int, growth: float = 2) -> float:
    """Return ``first`` times ``growth`` once per failure, at most ``cap``, in the unit of both."""
    return min(cap, first * growth ** min(failures, _MAX_FAILURES))


def full_jitter(first: float, cap: float, failures: int) -> float:
    """Return a random pause between zero and the longest one after so many failures."""
    return random.uniform(0, longest_pause(first, cap, failures))


def pause_while_waiting(retry: RetryStrategy, failures: int) -> float:
    """Return the pause before the next attempt to connect, in seconds, if operations wait."""
    longest = min(retry.cap / 1000, MAX_PAUSE_WHILE_WAITING)
    return full_jitter(retry.first / 1000, longest, failures)


def half_jitter(first: float, cap: float, failures: int, growth: float = 2) -> float:
    """Return a random pause between half and all of the longest one after so many failures.

    For waits that make no sense when they are short: a server that refuses, a slot that moves.
    """
    longest = longest_pause(first, cap, failures, growth)
    return random.uniform(longest / 2, longest)
