"""Lifetimes as callers give them: whole seconds as an int or a timedelta."""

from __future__ import annotations

from datetime import timedelta

Lifetime = int | timedelta
"""A lifetime in whole seconds."""


def whole_seconds(lifetime: object) -> int | None:
    """Return a lifetime in seconds, or None if it is no int and no timedelta of whole seconds.

    A timedelta of nothing is none either: one that a program computes as what is left would make
    a record permanent, which the int 0 means.
    """
    if isinstance(lifetime, int):
        return None if isinstance(lifetime, bool) else int(lifetime)
    if isinstance(lifetime, timedelta) and lifetime and not lifetime.microseconds:
        return lifetime.days * 86_400 + lifetime.seconds
    return None
