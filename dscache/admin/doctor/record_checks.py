"""How good the records are that a Redis holds already, as far as a sample of its keys tells."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import shorten
from ..key_layout import DEEPSTREAM, HASHTAG
from .findings import BAD, OK, WARNING, Finding, number


@dataclass(slots=True)
class Sample:
    """Some keys of the records: how many were looked at, and what they are."""

    deepstream: int = 0
    hashtag: int = 0
    """Version keys of the one layout, and of the other."""
    records: int = 0
    """Records of which both keys were looked for."""
    halves: list[bytes] = field(default_factory=list)
    """Keys without the other one of their record."""
    others: int = 0
    """Keys of no record."""


def check_halves(sample: Sample) -> Finding:
    """Judge how many records have lost one of their keys."""
    halves = sample.halves
    if not sample.records:
        return Finding("halves", OK, "no records yet")
    if not halves:
        return Finding("halves", OK, f"none in a sample of {number(sample.records, 'record')}")
    first = shorten(halves[0].decode(errors="replace"))
    return Finding(
        "halves",
        WARNING,
        f"{len(halves):,} of {sample.records:,} sampled records have one key alone, such as "
        f"{first}",
        "dscache takes them for missing, deepstream reads nothing for their data: set or delete "
        "them, and look at memory for what lost the other key",
    )


def check_layout(sample: Sample, configured: str, *, on_cluster: bool) -> Finding:
    """Judge whether the layout of the keys is the configured one."""
    name = "key layout"
    counts = {DEEPSTREAM: sample.deepstream, HASHTAG: sample.hashtag}
    other = HASHTAG if configured == DEEPSTREAM else DEEPSTREAM
    if not counts[other]:
        if not counts[configured]:
            strangers = f", and {sample.others:,} keys of something else" if sample.others else ""
            return Finding(name, OK, f"{configured}; no records yet{strangers}")
        if on_cluster and configured == DEEPSTREAM:
            return Finding(
                name,
                WARNING,
                f"{configured}, on a cluster",
                "the two keys of a record lie on two nodes, and are not written in one step: "
                "unless deepstream itself shares them, dscache migrate --to hashtag",
            )
        return Finding(name, OK, f"{configured}, as configured")
    remedy = f"dscache migrate --to {configured}, or configure keyLayout: {other}"
    if not counts[configured]:
        return Finding(
            name,
            BAD,
            f"{other}, and {configured} is configured",
            f"none of these records is found: {remedy}",
        )
    return Finding(
        name,
        WARNING,
        f"mixed: in a sample {counts[DEEPSTREAM]:,} deepstream and {counts[HASHTAG]:,} hashtag",
        f"those of {other} are not found: {remedy}",
    )
