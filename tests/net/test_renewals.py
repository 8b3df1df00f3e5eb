"""Listeners for the new credentials of providers."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from redis.auth.token_manager import CredentialsListener

from dscache.net import renewals
from dscache.net.credentials import NOTHING


class Latest:
    """Keeps the latest callbacks, as redis-py's own class does."""

    def __init__(self) -> None:
        self.listener: Any = CredentialsListener()

    def on_next(self, callback: Callable[[Any], Any]) -> None:
        self.listener.on_next = callback

    def on_error(self, callback: Callable[[Exception], Any]) -> None:
        self.listener.on_error = callback


@dataclass
class Every:
    """Keeps all callbacks, is equal to others, and has no hash."""

    kept: list[Any] = field(default_factory=list, compare=False)

    def on_next(self, callback: Callable[[Any], Any]) -> None:
        self.kept.append(callback)


class Slotted:
    """Admits no weak reference."""

    __slots__ = ("kept",)

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def on_next(self, callback: Callable[[Any], Any]) -> None:
        self.kept.append(callback)


class Owner:
    """Hears of tokens."""

    def __init__(self, provider: Any, address: str = "here:1") -> None:
        self.heard: list[object] = []
        heard = self.heard
        renewals.listen(provider, weakref.ref(self), heard.append, address)


def test_all_listeners_hear_of_a_token(caplog: pytest.LogCaptureFixture) -> None:
    provider = Latest()
    owners = [Owner(provider), Owner(provider), Owner(provider, "there:2")]
    assert provider.listener.on_next("t") is NOTHING  # which some providers await
    assert [one.heard for one in owners] == [["t"]] * 3
    with caplog.at_level(logging.WARNING, "dscache"):
        assert provider.listener.on_error(ValueError("t")) is NOTHING
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"no new credentials for {at}: ValueError" for at in ("here:1", "there:2")]


def test_a_provider_of_another_kind() -> None:
    """One that announces nothing, or that has no callback for failures."""
    assert Owner(None).heard == Owner(object()).heard == []
    provider = Every()
    owners = [Owner(provider), Owner(provider)]
    (callback,) = provider.kept
    callback("t")
    assert [one.heard for one in owners] == [["t"], ["t"]]


def test_equal_providers_are_told_apart() -> None:
    first, second = Every(), Every()
    assert first == second
    of_first, of_second = Owner(first), Owner(second)
    second.kept[0]("t")
    assert (of_first.heard, of_second.heard) == ([], ["t"])


def test_a_provider_without_weak_references() -> None:
    provider = Slotted()
    owners = [Owner(provider), Owner(provider)]
    for callback in provider.kept:
        callback("t")
    assert [one.heard for one in owners] == [["t"], ["t"]]


def test_listeners_that_are_gone_are_forgotten() -> None:
    provider = Every()
    heard = [Owner(provider).heard for _ in range(100)]
    gc.collect()
    kept = Owner(provider)
    (callback,) = provider.kept
    callback("t")
    assert (kept.heard, any(heard)) == (["t"], False)
    assert len(callback.__self__._present) == 1


def test_a_provider_that_is_gone_is_forgotten() -> None:
    before = len(renewals._known)
    for _ in range(10):  # the ids of which are used again
        provider = Latest()
        owner = Owner(provider)
        provider.listener.on_next("t")
        assert owner.heard == ["t"]
        assert len(renewals._known) == before + 1
        del provider
        gc.collect()
    assert len(renewals._known) == before


def test_an_id_that_is_used_again() -> None:
    """The callback may outlive its provider, and the entry with it for a moment."""
    provider, another = Latest(), Latest()
    Owner(another)
    renewals._known[id(provider)] = renewals._known[id(another)]
    owner = Owner(provider)
    provider.listener.on_next("t")
    assert owner.heard == ["t"]
