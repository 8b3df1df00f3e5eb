"""Pushes of a server: messages, subscriptions and changed keys; the pure twin of ``pushes.pxi``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import constants as c
from . import envelope as e
from . import failures, replies

if TYPE_CHECKING:
    from .pipeline import Pipeline


def take_push(pipeline: Pipeline, push: Any) -> None:
    """Take a message, or let the near cache drop the records that changed.

    All other pushes go to ``on_push``.
    """
    if not failures.is_push(push):
        raise failures.no_push(pipeline.address, push)
    if pipeline.inbox is not None:
        if push[0] in e.MESSAGES:
            return take_message(pipeline, push)
        if push[0] in e.SUBSCRIPTIONS:
            return take_subscription(pipeline, push)
    if push[0] != b"invalidate" or pipeline.near is None:
        if pipeline.on_push is not None:
            pipeline.on_push(push)
        return None
    if len(push) != 2 or not (push[1] is None or type(push[1]) is list):
        raise replies.wrong_shape(pipeline, "a change of keys", push)
    if pipeline.near.invalidate(push[1]):
        pipeline.forget("flushall")
    return None


def take_message(pipeline: Pipeline, push: list[Any]) -> None:
    if pipeline.inbox is None or len(push) != 3 or not type(push[1]) is type(push[2]) is bytes:
        raise replies.wrong_shape(pipeline, "a subscription", push)
    pipeline.inbox.take(push[1], push[2])


def take_subscription(pipeline: Pipeline, push: list[Any]) -> None:
    """Take the push that confirms a subscription, or ends one unasked."""
    assert pipeline.inbox is not None
    batch = pipeline.slots[0][0] if pipeline.slots else None
    asked = batch is not None and batch.kind == c.COMMAND and not batch.abandoned()
    if asked and batch.names[0].lower().encode() == push[0]:  # type: ignore[union-attr] # asked
        replies.answer(pipeline, list(push))
    else:
        pipeline.inbox.on_ended(pipeline, list(push))
