"""Checks of the records that a Redis holds, on a sample of its keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...errors import shorten
from ..key_layout import DEEPSTREAM, HASHTAG
from .findings import Check, Finding, number

LARGE_BYTES = 512 * 1024
"""The text of a large record: it takes a server about a millisecond to copy and send it."""


@dataclass(slots=True)
class Sample:
    """Counts of the sampled keys by kind."""

    deepstream: int = 0
    hashtag: int = 0
    """The version keys in each layout."""
    records: int = 0
    """The records whose two keys were looked up."""
    halves: list[bytes] = field(default_factory=list)
    """The keys whose record lacks its other key."""
    others: int = 0
    """The keys that belong to no record."""
    one_key: int = 0
    """The records of deepstream 1 to 3, each under one key."""
    first_one_key: bytes = b""
    sizes: dict[bytes, int] = field(default_factory=dict)
    """The bytes of text of the data keys that were measured."""
    unscanned: str = ""
    """Why a server refuses to list keys."""
    unread: list[str] = field(default_factory=list)
    """Why servers refuse to show the beginnings of values."""
    unmeasured: str = ""
    """Why the server refuses to tell sizes."""
    frequencies: dict[str, dict[bytes, int]] = field(default_factory=dict)
    """By server, how often each key is used, where servers know."""

    def add_frequencies(self, address: str, found: Mapping[bytes, int]) -> None:
        """Add what a server knows of the uses of some keys."""
        if found:
            self.frequencies.setdefault(address, {}).update(found)


def _unscanned(check: Check, sample: Sample) -> Finding:
    return check.unknown(
        f"SCAN is refused: {sample.unscanned}", "allow +scan to have the records checked"
    )


def check_halves(sample: Sample) -> Finding:
    """Check for records that have lost one of their keys."""
    check = Check("halves")
    if sample.unscanned:
        return _unscanned(check, sample)
    halves = sample.halves
    if not sample.records:
        return check.ok("no records yet")
    if not halves:
        return check.ok(f"none in a sample of {number(sample.records, 'record')}")
    first = shorten(halves[0].decode(errors="replace"))
    return check.warning(
        f"{len(halves):,} of {sample.records:,} sampled records have only one key, such as {first}",
        "dscache treats them as missing, and deepstream reads no data: set or delete them, and see "
        "the check of memory for the cause",
    )


def check_sizes(sample: Sample) -> Finding:
    """Check for records so large that each read or write of one delays all others."""
    check = Check("large records")
    if sample.unscanned:
        return _unscanned(check, sample)
    if sample.unmeasured and not sample.sizes:
        return check.unknown(
            f"STRLEN is refused: {sample.unmeasured}", "allow +strlen to have sizes checked"
        )
    if not sample.sizes:
        return check.ok("no records yet")
    largest = max(sample.sizes, key=sample.sizes.__getitem__)
    shown = f"{_kilobytes(sample.sizes[largest])}, {shorten(largest.decode(errors='replace'))}"
    large = [size for size in sample.sizes.values() if size >= LARGE_BYTES]
    if not large:
        measured = number(len(sample.sizes), "record")
        return check.ok(f"the largest in a sample of {measured} has {shown}")
    return check.warning(
        f"{len(large):,} of {len(sample.sizes):,} sampled records have {_kilobytes(LARGE_BYTES)} "
        f"or more; the largest has {shown}",
        "the server and the connection serve nothing else while they pass, and each change sends "
        "all of it: divide them into several records",
    )


def _kilobytes(size: int) -> str:
    return f"{size / 1024:,.0f} KiB" if size >= 1024 else number(size, "byte")


def check_one_key(sample: Sample) -> list[Finding]:
    """Check for records of deepstream 1 to 3; no finding if the servers say that there are none."""
    check = Check("one-key records")
    if sample.unread and not sample.one_key:
        return [
            check.unknown(
                f"GETRANGE is refused: {sample.unread[0]}",
                "allow +getrange to have records of deepstream 1 to 3 found",
            )
        ]
    if not sample.one_key:
        return []
    first = shorten(sample.first_one_key.decode(errors="replace"))
    return [
        check.bad(
            f"{number(sample.one_key, 'record')} of deepstream 1 to 3 in a sample, each under one "
            f"key, such as {first}",
            "dscache and deepstream 4 or newer find none of them: run "
            "dscache migrate --from deepstream3",
        )
    ]


def check_layout(sample: Sample, configured: str, *, on_cluster: bool) -> Finding:
    """Check that the keys are in the configured layout."""
    check = Check("key layout")
    if sample.unscanned:
        return _unscanned(check, sample)
    counts = {DEEPSTREAM: sample.deepstream, HASHTAG: sample.hashtag}
    other = HASHTAG if configured == DEEPSTREAM else DEEPSTREAM
    if not counts[other]:
        if not counts[configured]:
            strangers = f", and {sample.others:,} other keys" if sample.others else ""
            return check.ok(f"{configured}; no records yet{strangers}")
        if on_cluster and configured == DEEPSTREAM:
            return check.warning(
                f"{configured}, on a cluster",
                "the two keys of a record lie on two nodes and are not written atomically: unless "
                "deepstream itself uses them, run dscache migrate --to hashtag",
            )
        return check.ok(f"{configured}, as configured")
    remedy = f"run dscache migrate --to {configured}, or configure keyLayout: {other}"
    if not counts[configured]:
        return check.bad(
            f"{other}, and {configured} is configured",
            f"a cache finds none of these records: {remedy}",
        )
    return check.warning(
        f"mixed: in a sample {counts[DEEPSTREAM]:,} deepstream and {counts[HASHTAG]:,} hashtag",
        f"a cache does not find the {other} records: {remedy}",
    )
