"""Limits and defaults that the configuration and the core share."""

from __future__ import annotations

from typing import Final

# Redis stores a lifetime in milliseconds as 64 bits; this is 317 years, in seconds.
MAX_TTL: Final = 10**10

# Defaults of options.
MAX_PENDING: Final = 10_000
MAX_PENDING_BYTES: Final = 64 * 1024 * 1024
# A Redis value is at most 512 MiB.
MAX_REPLY_BYTES: Final = 1024 * 1024 * 1024
NEAR_RECORDS: Final = 100_000
NEAR_BYTES: Final = 64 * 1024 * 1024
# The least size of a near cache that processes share.
NEAR_SHARED_BYTES: Final = 1024 * 1024

# Keys that one SCAN visits; other clients are served between two of them.
SCAN_COUNT: Final = 1000
# Names that a watch keeps for a caller that is slow.
WATCH_PENDING: Final = 100_000
