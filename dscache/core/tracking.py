"""The tracking of a pipeline's connection, which tells what its near cache may believe.

An epoch is a period in which one connection is tracked. It is live at first, lost after the
connection is lost, and over when its records are known to be outdated. Both cores use this module.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .pipeline import Pipeline

LIVE: Final = 0
LOST: Final = 1
OVER: Final = 2


def connected(pipeline: Pipeline, is_tracked: bool) -> None:
    """Note that there is a connection, and whether its server reports changed keys."""
    pipeline.reach.up = True
    if is_tracked and pipeline.near is not None:
        pipeline.epoch = pipeline.new_epoch()
        pipeline.near.count_live(1)


def disconnected(pipeline: Pipeline, is_trusted: bool) -> None:
    """Note that the connection ended, and whether its replies can be trusted."""
    _end_epoch(pipeline, LOST if is_trusted else OVER, "connection")
    pipeline.reach.up = False


def unknown(pipeline: Pipeline) -> float:
    """Return the seconds for which the near cache may have missed changes."""
    return 0.0 if pipeline.epoch is None else time.monotonic() - pipeline.epoch.known


def forget(pipeline: Pipeline, reason: str) -> None:
    """Drop every record read so far from the near cache, and count the ``reason``."""
    epoch = pipeline.epoch
    _end_epoch(pipeline, OVER, reason)
    if epoch is not None:
        connected(pipeline, True)
        assert pipeline.epoch is not None
        pipeline.epoch.known = epoch.known


def _end_epoch(pipeline: Pipeline, state: int, reason: str) -> None:
    epoch, pipeline.epoch = pipeline.epoch, None
    if state == OVER:  # and so is what earlier connections brought
        pipeline.reach.over = True
        pipeline.reach = type(pipeline.reach)()
    if epoch is not None and pipeline.near is not None:
        epoch.state = state
        pipeline.near.count_flush(reason)
        pipeline.near.count_live(-1)
