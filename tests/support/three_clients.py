"""Three clients that change few records at once, and a model that explains their results.

An operation is one step on a record, and an update several: it reads, and then writes under the
version read, and begins again if that is another one by now. The results of a round, and the
records after it, must be those of one order of all steps. Every write has a number of its own, and
an update adds its number to those that it has read. So a lost update, a write that was refused but
done, and one that was acknowledged but isn't there have no such order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import redis as redis_py
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dscache
from tests.support.blocking import ThreadedCache
from tests.support.faults import FaultProxy
from tests.support.wire import plain

Stored: TypeAlias = tuple[int, list[int], bool] | None
"""The version and data of a record, and whether it is permanent; None without one."""

NAMES: Final = ("a", "b")
_PATIENT: Final = {"connectTimeout": 600_000, "commandTimeout": 600_000}
_TTL: Final = 1000

_NO_RESULT, _UNKNOWN, _DONE, _MISSING = object(), object(), object(), object()


@dataclass(frozen=True)
class Call:
    """One operation of one client; ``outcome`` is what the change of an update returns.

    As drawn, versions are relative to that of the record before the round.
    """

    method: str
    name: str
    version: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    outcome: Any = None

    def on(self, stored: Stored) -> Call:
        """Return the operation with the versions for a record."""
        version = 0 if stored is None else stored[0]
        options = dict(self.options)
        expected = options.get("if_version")
        if expected is not None:
            is_none = stored is None and expected == 0 and self.method == "set"
            options["if_version"] = None if is_none else max(0, version + expected)
        return replace(self, version=max(0, version + self.version), options=options)

    def issue(self, cache: Any, number: int) -> Any:
        """Issue it; its write has that number."""
        match self.method:
            case "set":
                return cache.set(self.name, self.version, [number], **self.options)
            case "update":
                outcome = self.outcome

                def change(data: list[int]) -> Any:
                    return [*data, number] if outcome is None else outcome

                return cache.update(self.name, change, **self.options)
        return getattr(cache, self.method)(self.name, **self.options)

    def step(self, stored: Stored, begun: Any, number: int) -> tuple[Stored, Any, Any]:
        """Return the record after the next step, what the update has begun, and the result."""
        version = None if stored is None else stored[0]
        permanent = not self.options.get("ttl")
        match self.method:
            case "get":
                return stored, None, stored and stored[:2]
            case "delete":
                if self.options.get("if_version", version) != version:
                    return stored, None, False
                return None, None, stored is not None
            case "set":
                is_expected = self.options.get("if_version", version) == version
                is_newer = version is None or version < self.version
                if not is_expected or not (is_newer or "if_newer" not in self.options):
                    return stored, None, False
                return (self.version, [number], permanent), None, True
        if begun is not None:
            expected, new = begun
            if expected != version:
                return stored, None, _NO_RESULT  # it reads again
            return new, None, new and new[:2]
        if stored is None and "default" not in self.options:
            return stored, None, _MISSING
        if self.outcome is dscache.KEEP or (stored is None and self.outcome is dscache.DELETE):
            return stored, None, stored and stored[:2]
        if self.outcome is dscache.DELETE:
            return stored, (version, None), _NO_RESULT
        data = [] if stored is None else stored[1]
        following = 1 if version is None else version + 1
        return stored, (version, (following, [*data, number], permanent)), _NO_RESULT

    def __str__(self) -> str:
        return f"{self.method} {self.name!r} {self.version} {self.options} {self.outcome}"


@dataclass(frozen=True)
class Round:
    """An operation of each client at the same time.

    Before it, the record ``ended`` expires if it has a lifetime. During it, the connection of the
    last client is cut after some bytes of requests or of replies. If that one ``is_ahead``, the
    others follow once it is cut.
    """

    calls: tuple[Call, Call, Call]
    ended: str | None
    cut: tuple[int, Any] | None
    is_ahead: bool


@dataclass(frozen=True)
class _Repeat:
    """A step that is done again, as its reply was lost, and what the update had begun.

    Redis compares versions alone. So a repeat takes a record for the one before if another client
    has removed that, and has created it again with the same version.
    """

    begun: Any


def _calls() -> st.SearchStrategy[Call]:
    names = st.sampled_from([*NAMES, NAMES[0]])
    expected, versions = st.sampled_from([0, 0, 1, -1]), st.sampled_from([1, 1, 2, 0])
    ttl = st.sampled_from([{}, {}, {"ttl": _TTL}])
    condition = st.one_of(
        st.just({}),
        st.just({"if_newer": True}),
        st.fixed_dictionaries({"if_version": expected}),
        st.fixed_dictionaries({"if_version": st.one_of(st.none(), expected)}),
    )
    options = st.builds(lambda one, other: one | other, condition, ttl)
    sets = st.builds(Call, st.just("set"), names, versions, options)
    held = st.one_of(st.just({}), st.fixed_dictionaries({"if_version": expected}))
    removals = st.builds(Call, st.just("delete"), names, st.just(0), held)
    default = st.sampled_from([{}, {"default": []}])
    updates = st.builds(
        Call,
        *(st.just("update"), names, st.just(0)),
        st.builds(lambda one, other: one | other, default, ttl),
        st.sampled_from([None, None, None, dscache.KEEP, dscache.DELETE]),
    )
    return st.one_of(sets, sets, updates, updates, removals, st.builds(Call, st.just("get"), names))


_rounds = st.lists(
    st.builds(
        Round,
        st.tuples(_calls(), _calls(), _calls()),
        st.one_of(st.none(), st.none(), st.sampled_from(NAMES)),
        st.one_of(
            st.none(),
            st.tuples(st.integers(0, 300), st.just("requests")),
            st.tuples(st.integers(0, 5), st.just("replies")),
        ),
        st.booleans(),
    ),
    max_size=12,
)


def check(host: str, port: int, examples: int) -> int:
    """Try that many examples on a server that nobody else uses; return the number of operations.

    Raises AssertionError for the smallest example that the model can't explain.
    """
    operations = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(rounds=_rounds)
    def run(rounds: list[Round]) -> None:
        nonlocal operations
        asyncio.run(_play(host, port, rounds))
        operations += 3 * len(rounds)

    run()
    return operations


async def _play(host: str, port: int, rounds: list[Round]) -> None:
    async with FaultProxy(host, port) as proxy:
        with redis_py.Redis(host, port) as redis:
            redis.flushdb()
            known = redis.client_list()
            async with (
                _opened(dscache.AsyncCache, host, port) as first,
                ThreadedCache(_opened(dscache.Cache, host, port), 1) as second,
                _opened(dscache.AsyncCache, proxy.host, proxy.port) as third,
            ):
                await third.when_ready()
                stored: dict[str, Stored] = {}
                for number, one in enumerate(rounds):
                    ended = stored.get(one.ended or "")
                    if ended is not None and not ended[2]:
                        _expire(redis, str(one.ended))
                        del stored[str(one.ended)]
                    is_cut = one.cut is not None and "if_newer" not in one.calls[2].options
                    if one.cut is not None and is_cut:
                        proxy.cut_after(*one.cut)
                    numbers = range(3 * number, 3 * number + 3)
                    calls = [call.on(stored.get(call.name)) for call in one.calls]
                    last = asyncio.ensure_future(calls[2].issue(third, numbers[2]))
                    # The others come between it and its repeat.
                    while one.is_ahead and proxy.is_cut_due and not last.done():
                        await asyncio.sleep(0)
                    issued = [
                        *(calls[0].issue(first, numbers[0]), calls[1].issue(second, numbers[1])),
                        last,
                    ]
                    results = await asyncio.gather(*issued, return_exceptions=True)
                    proxy.heal()
                    # A server reads the last request of a connection before its end.
                    while len(redis.client_list()) > len(known) + 3:
                        await asyncio.sleep(0)
                    found = _stored(redis)
                    told = [_told(result) for result in results]
                    issues = list(zip(calls, numbers, told, strict=True))
                    repeating = 2 if is_cut else None
                    assert _explains(stored, issues, (None, None, None), found, repeating), (
                        stored,
                        [str(call) for call in calls],
                        results,
                        found,
                    )
                    stored = found


def _opened(kind: Any, host: str, port: int) -> Any:
    at_once = {"first": 1, "cap": 2}
    options = {"host": host, "port": port, "retryStrategy": at_once, **_PATIENT}
    return kind.from_config({"name": "redis", "options": options})


def _expire(redis: redis_py.Redis, name: str) -> None:
    with redis.pipeline(transaction=True) as pipe:
        pipe.pexpireat(f"{name}_v", 1)
        pipe.pexpireat(f"{name}_d", 1)
        pipe.execute()


def _stored(redis: redis_py.Redis) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for name in NAMES:
        record = dscache.Record(name, 0, redis.get(f"{name}_d") or b"null")
        version = redis.get(f"{name}_v")
        ends = redis.pexpiretime(f"{name}_v"), redis.pexpiretime(f"{name}_d")
        assert ends[0] == ends[1], "half of a record outlives the other one"
        if version is not None:
            stored[name] = (int(version), record.data, ends[0] == -1)
    return stored


def _told(result: Any) -> Any:
    """Return a result for the model; raises what is no outcome of a working server."""
    if isinstance(result, dscache.RecordMissing):
        return _MISSING
    if isinstance(result, dscache.ConnectionLost) and "may have happened" in str(result):
        return _UNKNOWN
    if isinstance(result, BaseException):
        raise AssertionError("an operation has failed") from result
    return plain(result)


def _explains(
    records: Mapping[str, Stored],
    issues: Sequence[tuple[Call, int, Any]],
    begun: tuple[Any, ...],
    found: Mapping[str, Stored],
    repeating: int | None,
) -> bool:
    """Return whether some order of the steps that are left gives all results and records.

    The write or removal of the client ``repeating`` may be done twice if its condition holds twice.
    """
    if all(one is _DONE for one in begun):
        return {name: one for name, one in records.items() if one is not None} == found
    for at, (call, number, told) in enumerate(issues):
        state = begun[at]
        if state is _DONE:
            continue
        is_repeat = isinstance(state, _Repeat)
        before = state.begun if is_repeat else state
        after, following, result = call.step(records.get(call.name), before, number)
        is_over = result is not _NO_RESULT
        ways: list[tuple[Mapping[str, Stored], Any]] = []
        changed = {**records, call.name: after}
        if is_repeat and (result is False or not is_over):
            is_over = False  # it would say that it may have happened
        elif not is_over or told is _UNKNOWN or result == told:
            ways.append((changed, _DONE if is_over else following))
        if told is _UNKNOWN:
            ways.append((records, _DONE))  # it was not done, or not again
        if (
            at == repeating
            and is_over
            and not is_repeat
            and (before or "if_version" in call.options)
        ):
            ways.append((changed, _Repeat(before)))
        for others, then in ways:
            steps = (*begun[:at], then, *begun[at + 1 :])
            if _explains(others, issues, steps, found, repeating):
                return True
    return False
