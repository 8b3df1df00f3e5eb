"""Loads of missing and ageing records, once for all callers (sans-IO); for ``fetch``.

Theory of operation
-------------------
Beside each record that is loaded lies a **note**, a record of its own whose name ends with
``NOTE_SUFFIX``. Under every layout of keys that keeps a record in one slot, its note is in the same
slot. The version of a note is a random token, its data tells a state, and it always expires:

* ``loading``: a caller holds the lease and renews it while its load runs. A dead caller's lease
  ends by itself.
* ``fresh``: the record is younger than ``refresh_after``. The end of this note, not a clock, tells
  all processes that the record is due.
* ``missing``: the load found nothing, and that is remembered for ``keep_missing``.
* ``failed``: the load has failed, and is not repeated for a moment.
* ``stale``: a refresh has failed. It is not repeated for a tenth of ``refresh_after``, but if the
  record ends, it is loaded at once.

A lease is taken by a write that expects no note, or exactly the note that was read. It is renewed
and released by writes that expect its token. So nothing but conditional writes is needed, which
work on every kind of server, and are repeated safely when a connection is lost.

The result of a load is written on condition that the record is still the one that was read when
the load began, so that a load never undoes a newer write.

Loads that fetch each other's records in a ring would wait for ever. A **flight** knows the flights
that its load waits for, so a ring in one process is refused at the call that closes it. Over
several processes, a lease tells the names that its load waits for. A caller that waits for a lease
follows them from note to note; if they lead back to its own name for some seconds, it fails.

A generator yields steps: operations of a Pipeline, loads and pauses. The asyncio and the blocking
driver execute them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from random import SystemRandom
from typing import Any, Final, TypeAlias

import msgspec

from .. import _backend
from ..errors import BulkError, DscacheError, LoadError, RecordError, ReplyError, shorten
from .failures import copy_error, of_call
from .fetch_terms import AwaitedLoad, Checks, Terms
from .flights import Rings
from .keys import NOTE_SUFFIX
from .notes import (
    FAILED,
    FRESH,
    LEASE_SECONDS,
    LOADING,
    MISSING,
    RENEW_SECONDS,
    STALE,
    content_of,
    note_of,
    state_of,
    with_notes,
)

_logger = logging.getLogger("dscache")

FAILURE_SECONDS: Final = 1

# How long a caller waits before it reads a lease again, in seconds: at first, and at last.
_FIRST_PAUSE: Final = 0.005
_LAST_PAUSE: Final = 0.1
# Jitter of a bulk's ttl takes at most this many values, since each needs a command of its own.
_SPREAD: Final = 16

# Children of one parent share the state of the usual generator.
_random = SystemRandom()


@dataclass(frozen=True, slots=True)
class Loaded:
    """The result of a load that chooses the version of its record, beside the data.

    ``version`` is an int from 0 to 2^63-1. ``data`` is any value that msgspec encodes.
    None is stored as JSON's null.
    """

    version: int
    data: Any


# -- steps


@dataclass(frozen=True, slots=True)
class Do:
    """An operation of a Pipeline; the step's result is that of the operation."""

    operation: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """A load of records, during which a renewal is done every ``RENEW_SECONDS``.

    ``renewal`` returns it, given the names that the load waits for. The step's result is a mapping
    of name to data; a name without data has no record.
    """

    names: tuple[str, ...]
    renewal: Callable[[list[str]], Do]


@dataclass(frozen=True, slots=True)
class LoadEach:
    """Loads of records, each by itself; the first such step of a generator begins them.

    The step's result maps the names whose loads have ended, perhaps none after ``seconds``, to data
    or Failed.
    """

    names: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The result of a load that has raised an exception."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause in seconds, without a result."""

    seconds: float


@dataclass(slots=True)
class Outcome:
    """The records that a load has found, and the errors of the others."""

    records: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    nothing: set[str] = field(default_factory=set)
    """Names of which a note tells that there is nothing."""

    def of(self, name: str) -> Any:
        """Return the record of a name, or None; raises its error."""
        if name in self.errors:
            raise self.errors[name]
        return self.records.get(name)


Step: TypeAlias = Do | Load | LoadEach | Pause
Steps: TypeAlias = Generator[Step, Any, Outcome]
_Part: TypeAlias = Generator[Step, Any, Any]


# -- the generators


def load_missing(names: Iterable[str], terms: Terms) -> Steps:
    """Load records that were not found, or wait until other callers have loaded them."""
    outcome = Outcome()
    waiting = dict.fromkeys(names)
    rings = Rings()
    pauses = 0
    while waiting:
        vacant = yield from _look(waiting, rings, outcome)
        leases = (yield from _acquire(vacant, outcome)) if vacant else {}
        if leases:
            held = dict(leases)
            yield from _release(held, _load(held, terms, outcome, refresh=False))
        for name in (*leases, *outcome.errors):
            waiting.pop(name, None)
        if waiting and not leases:
            longest = min(_LAST_PAUSE, _FIRST_PAUSE * 1.5 ** min(pauses, 20))
            yield Pause(longest * _random.uniform(0.5, 1))
            pauses += 1
    return outcome


def refresh(records: Mapping[str, Any], found: Mapping[str, Any], terms: Terms) -> Steps:
    """Load records anew whose notes have ended, unless another caller does; none is lost.

    ``found`` has the notes that were read with them. Only if they are unchanged is a lease taken.
    """
    outcome = Outcome(dict(records))
    vacant = {name: version_of(found.get(note_of(name))) for name in records}
    load = partial(_load, terms=terms, outcome=outcome, refresh=True)
    yield from _refresh(vacant, load, outcome)
    return outcome


def refresh_each(
    vacant: Mapping[str, int | None], terms: Terms, waits_of: Callable[[str], list[str]]
) -> Steps:
    """Load records anew as ``refresh`` does, but by a load for each; none waits for another's.

    ``vacant`` has the versions of their notes. ``waits_of`` returns the names that the load of a
    name waits for.
    """
    outcome = Outcome()
    # One lifetime for all, since each needs a command of its own.
    terms = terms.settled()
    load = partial(_load_each, terms=terms, outcome=outcome, waits_of=waits_of)
    yield from _refresh(vacant, load, outcome)
    return outcome


def _refresh(
    vacant: Mapping[str, int | None], load: Callable[[dict[str, int]], _Part], outcome: Outcome
) -> _Part:
    try:
        leases = yield from _acquire(vacant, outcome)
        if leases:
            yield from _release(leases, load(leases))
    except DscacheError as error:
        outcome.errors.setdefault(next(iter(vacant)), error)
    for name, reason in outcome.errors.items():
        _logger.warning("record %s was not refreshed: %s", shorten(name), reason)
    outcome.errors.clear()


def end_missing(names: Iterable[str]) -> Steps:
    """End the notes that there is nothing, beside records that another program has written.

    The record may be removed again, by a program that knows no notes, before such a note ends.
    """
    outcome = Outcome()
    try:
        notes = yield from _read(map(note_of, names), outcome)
        yield from _end_missing(names, notes)
    except DscacheError:
        pass  # a note that stays ends by itself
    outcome.errors.clear()
    return outcome


def _end_missing(names: Iterable[str], notes: Mapping[str, Any]) -> _Part:
    beside = {name: notes.get(note_of(name)) for name in names}
    ended = {
        name: note.version
        for name, note in beside.items()
        if note is not None and state_of(note) == MISSING
    }
    if ended:
        yield from _quietly(_drop_notes(ended))


def _look(
    waiting: dict[str, None], rings: Rings, outcome: Outcome
) -> Generator[Step, Any, dict[str, Any]]:
    """Take the names that need no load out of ``waiting``.

    Returns the names without a lease, each with the version of its note or None.
    """
    known = set(outcome.errors)
    found = yield from _read([*with_notes(waiting), *map(note_of, rings.others)], outcome)
    for name in rings.others:
        if name not in known:
            outcome.errors.pop(name, None)
    rings.look(waiting, found, outcome.errors)
    vacant: dict[str, int | None] = {}
    written: list[str] = []
    for name in list(waiting):
        note = found.get(note_of(name))
        state = state_of(note)
        if name in outcome.errors:
            del waiting[name]
        elif name in found:
            outcome.records[name] = found[name]
            del waiting[name]
            written.append(name)
        elif state == MISSING:
            outcome.nothing.add(name)
            del waiting[name]
        elif state == FAILED:
            outcome.errors[name] = _failed_before(name, note)
            del waiting[name]
        elif state != LOADING:
            vacant[name] = version_of(note)
    yield from _end_missing(written, found)
    return vacant


def version_of(note: Any) -> int | None:
    """Return the version of a note, or None without one."""
    return None if note is None else int(note.version)


def _is_due(note: Any) -> bool:
    """Return whether a record beside such a note is to be loaded anew.

    A note that there is nothing says nothing of a record that was written behind it.
    """
    return state_of(note) in ("", MISSING)


def _read(names: Iterable[str], outcome: Outcome) -> _Part:
    """Read records and notes; an error counts for the record."""
    try:
        return (yield Do("get_bulk", (list(names),)))
    except BulkError as error:
        _note_errors(error, outcome)
        return error.result


def _note_errors(error: BulkError, outcome: Outcome) -> None:
    for name, reason in error.errors.items():
        outcome.errors[name.removesuffix(NOTE_SUFFIX)] = reason


def _acquire(
    vacant: Mapping[str, int | None], outcome: Outcome
) -> Generator[Step, Any, dict[str, int]]:
    """Take the leases of names, as far as no other caller does; return their tokens."""
    tokens = {name: _random.getrandbits(63) for name in vacant}
    refused: Iterable[str]
    try:
        refused = yield _write_notes(
            {"state": LOADING},
            LEASE_SECONDS,
            tokens,
            {note_of(name): version for name, version in vacant.items()},
        )
    except BulkError as error:
        _note_errors(error, outcome)
        refused = (*error.result, *error.errors)
    except RecordError as error:
        name = next(iter(vacant))
        raise RecordError(
            f"record {shorten(name)}: fetch can't take its lease: {error}", name=name
        ) from error
    refused = set(refused)
    return {name: token for name, token in tokens.items() if note_of(name) not in refused}


def _write_notes(
    content: Any, ttl: int, tokens: Mapping[str, int], expected: Mapping[str, Any] | None = None
) -> Do:
    """Write notes with a token for each name, by default in place of notes with the same token."""
    notes = {note_of(name): (token, content) for name, token in tokens.items()}
    if expected is None:
        expected = {note: token for note, (token, _) in notes.items()}
    return Do("set_bulk", (notes, ttl, False, expected))


def _drop_notes(tokens: Mapping[str, int]) -> Do:
    expected = {note_of(name): token for name, token in tokens.items()}
    return Do("delete_bulk", (list(expected), expected))


def _quietly(step: Step) -> _Part:
    """Execute a step whose failure changes no result: a note ends by itself."""
    with suppress(DscacheError):
        yield step


def _release(held: dict[str, int], part: _Part) -> _Part:
    """Execute a part, and end the leases that it leaves in ``held``."""
    try:
        return (yield from part)
    except GeneratorExit:
        held.clear()  # its driver is gone, and executes nothing any more
        raise
    finally:
        if held:
            yield from _quietly(_drop_notes(held))


def _load(held: dict[str, int], terms: Terms, outcome: Outcome, *, refresh: bool) -> _Part:
    """Load the names of leases and write the results; take the leases that end from ``held``."""
    found = yield from _read(held, outcome)
    outcome.records |= found  # perhaps written since they were read or missed
    done = outcome.errors if refresh else {**outcome.errors, **found}
    tokens = {name: token for name, token in held.items() if name not in done}
    if not tokens:
        return
    wanted = tuple(tokens)

    def renewal(waits: list[str]) -> Do:
        return _write_notes(_lease(waits), LEASE_SECONDS, tokens)

    said = ""
    try:
        loaded = yield Load(wanted, renewal)
        if not isinstance(loaded, Mapping):
            wanted_kind = "load_many must return a mapping of name to data"
            said = f"returned {type(loaded).__name__}; {wanted_kind}"
            raise TypeError(f"{wanted_kind}, not {type(loaded).__name__}")
    except Exception as error:
        for name in wanted:
            del held[name]
        said = said or (str(error) if isinstance(error, AwaitedLoad) else f"raised {_shown(error)}")
        yield from _fail(tokens, terms, outcome, error, said, refresh=refresh)
    else:
        yield from _store(held, wanted, loaded, found, terms, outcome, refresh=refresh)


def _lease(waits: list[str]) -> Any:
    return {"state": LOADING, **({"waits": waits} if waits else {})}


def _load_each(
    held: dict[str, int], terms: Terms, outcome: Outcome, waits_of: Callable[[str], list[str]]
) -> _Part:
    """Load each name of leases anew, and write its result; take the lease from ``held``."""
    found = yield from _read(held, outcome)
    left = [name for name in held if name not in outcome.errors]
    renewed = time.monotonic()
    while left:
        seconds = renewed + RENEW_SECONDS - time.monotonic()
        ended: Mapping[str, Any] = yield LoadEach(tuple(left), max(0.0, seconds))
        part = {name: held.pop(name) for name in ended}
        if part:
            yield from _release(part, _store_each(part, ended, found, terms, outcome))
            left = [name for name in left if name not in ended]
        if left and time.monotonic() - renewed >= RENEW_SECONDS:
            yield from _renew({name: held[name] for name in left}, waits_of)
            renewed = time.monotonic()


def _store_each(
    held: dict[str, int],
    ended: Mapping[str, Any],
    bases: Mapping[str, Any],
    terms: Terms,
    outcome: Outcome,
) -> _Part:
    loaded = {name: data for name, data in ended.items() if not isinstance(data, Failed)}
    for name, failed in ended.items():
        # A load that was cancelled has told nothing of its source.
        if isinstance(failed, Failed) and isinstance(failed.error, Exception):
            token = {name: held.pop(name)}
            said = f"raised {_shown(failed.error)}"
            yield from _fail(token, terms, outcome, failed.error, said, refresh=True)
    if loaded:
        yield from _store(held, loaded, loaded, bases, terms, outcome, refresh=True)


def _renew(tokens: Mapping[str, int], waits_of: Callable[[str], list[str]]) -> _Part:
    """Renew leases, each of which tells the names that its load waits for."""
    waiting = {name: waits for name in tokens if (waits := waits_of(name))}
    for name, waits in waiting.items():
        yield from _quietly(_write_notes(_lease(waits), LEASE_SECONDS, {name: tokens[name]}))
    if others := {name: token for name, token in tokens.items() if name not in waiting}:
        yield from _quietly(_write_notes(_lease([]), LEASE_SECONDS, others))


def _fail(
    tokens: Mapping[str, int],
    terms: Terms,
    outcome: Outcome,
    error: Exception,
    said: str,
    *,
    refresh: bool,
) -> _Part:
    """Fail the names of a load, so that no caller repeats it soon; ``said`` names its fault."""
    pause = FAILURE_SECONDS
    if refresh:
        pause = max(pause, (terms.refresh_after or 0) // 10)
    content = {"state": STALE if refresh else FAILED, "error": type(error).__name__}
    yield from _quietly(_write_notes(content, pause, tokens))
    for name in tokens:
        failure = LoadError(f"record {shorten(name)}: its load {said}", name=name)
        failure.__cause__ = error
        outcome.errors[name] = failure


def _shown(error: Exception) -> str:
    """Return the class of a load's exception, and of a load that can't be called so its text.

    Other texts may contain a secret of the load's source.
    """
    shown = type(error).__name__
    if type(error) is not TypeError or "argument" not in str(error):
        return shown
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    # Python refuses the arguments of a call in the frame of the caller.
    caller = "" if frame is None else str(frame.tb_frame.f_globals.get("__name__"))
    if not caller.startswith("dscache."):
        return shown
    wanted = "a load takes one argument, the name, and load_many a list of names"
    return f"{shown}: {str(error)[:200]}; {wanted}"


def _failed_before(name: str, note: Any) -> LoadError:
    kind = shorten(content_of(note).get("error", "an error"))
    return LoadError(
        f"record {shorten(name)}: its load has just failed in another call ({kind}), and is not "
        "repeated at once; try again in a second",
        name=name,
    )


def _store(
    held: dict[str, int],
    wanted: Iterable[str],
    loaded: Mapping[str, Any],
    bases: Mapping[str, Any],
    terms: Terms,
    outcome: Outcome,
    *,
    refresh: bool,
) -> _Part:
    """Write the results of a load, and end the leases of ``held`` that have one."""
    made: dict[str, Any] = {}
    absent: list[str] = []
    for name in wanted:
        base = bases.get(name)
        if loaded.get(name) is None:
            absent.append(name)
            continue
        try:
            record = record_of(name, loaded[name], base)
        except RecordError as error:
            token = {name: held.pop(name)}
            reason = str(error).removeprefix(f"record {shorten(name)}: ")
            said = f"returned data that can't be stored: {reason}"
            yield from _fail(token, terms, outcome, error, said, refresh=refresh)
            continue
        # A source that is behind what Redis holds moves no record back.
        is_behind = base is not None and record.version < base.version
        outcome.records[name] = base if is_behind else record
        if not is_behind:
            made[name] = record
    yield from _write(made, bases, terms, outcome)
    yield from _remove({name: bases[name] for name in absent if name in bases}, outcome)
    stored = {name: held[name] for name in wanted if name in outcome.records}
    nothing = {name: held[name] for name in absent if name not in outcome.records}
    if terms.refresh_after is not None:
        for ttl, names in _spread(stored, terms.refresh_after, terms).items():
            tokens = {name: held.pop(name) for name in names}
            yield from _quietly(_write_notes({"state": FRESH}, ttl, tokens))
    if terms.keep_missing is not None and nothing:
        for name in nothing:
            del held[name]
        outcome.nothing.update(nothing)
        yield from _quietly(_write_notes({"state": MISSING}, terms.keep_missing, nothing))


def record_of(name: str, loaded: Any, base: Any) -> Any:
    """Return the record that a load has made; raises RecordError.

    Without a version it gets the time in milliseconds, or one more than the version before it if
    that is higher: a version grows even over the end of a record.
    """
    core = _backend.core
    if isinstance(loaded, Loaded):
        version, data = core.check_version(name, loaded.version), loaded.data
    else:
        version, data = time.time_ns() // 1_000_000, loaded
        if base is not None:
            version = core.check_version(name, max(version, base.version + 1))
    return core.Record(name, version, core.encode_data(name, data))


def _write(
    made: Mapping[str, Any], bases: Mapping[str, Any], terms: Terms, outcome: Outcome
) -> _Part:
    """Write records in place of the ones read before; of another one, that is the result."""
    refused: set[str] = set()
    for ttl, names in _spread(made, terms.ttl, terms).items():
        records = {n: (made[n].version, msgspec.Raw(made[n].raw)) for n in names}
        expected = {n: bases[n].version if n in bases else None for n in names}
        try:
            refused |= yield Do("set_bulk", (records, ttl, False, expected))
        except BulkError as error:
            refused |= error.result
            _fail_names(error, outcome)
    if refused:
        outcome.records |= yield from _read(refused, outcome)


def _fail_names(error: BulkError, outcome: Outcome) -> None:
    _note_errors(error, outcome)
    for name in error.errors:
        outcome.records.pop(name, None)


def _remove(gone: Mapping[str, Any], outcome: Outcome) -> _Part:
    """Remove records whose load has found nothing, unless they have changed meanwhile."""
    if not gone:
        return
    for name in gone:
        outcome.records.pop(name, None)
    expected = {name: base.version for name, base in gone.items()}
    try:
        yield Do("delete_bulk", (list(expected), expected))
    except BulkError as error:
        _fail_names(error, outcome)
    outcome.records |= yield from _read(gone, outcome)


def _spread(names: Iterable[str], seconds: int, terms: Terms) -> dict[int, list[str]]:
    """Return the names by their lifetimes, of which there are few."""
    names = list(names)
    lifetimes = [terms.lifetime(seconds) for _ in names[:_SPREAD]]
    spread: dict[int, list[str]] = {}
    for name in names:
        spread.setdefault(_random.choice(lifetimes), []).append(name)
    return spread


def bulk_failure(error: BulkError, names: Iterable[str]) -> BulkError:
    """Return the error of a ``fetch_bulk`` whose read of records and notes has failed in part."""
    errors: dict[str, Exception] = {}
    for name, reason in error.errors.items():
        errors.setdefault(name.removesuffix(NOTE_SUFFIX), reason)
    found = {name: error.result[name] for name in names if name in error.result}
    return BulkError("fetch_bulk", errors, found)


def refusal_of_missing(
    error: ReplyError, missing: Iterable[str], found: Mapping[str, Any]
) -> DscacheError:
    """Return the error of a ``fetch_bulk`` if Redis refuses to load any of the missing records."""
    of_call(error, "fetch_bulk", next(iter(missing)))
    if not found:
        return error
    return BulkError("fetch_bulk", {name: copy_error(error) for name in missing}, found)


def due_names(
    found: Mapping[str, Any], names: Iterable[str], checks: Checks, terms: Terms
) -> dict[str, Any]:
    """Return the records that are due to be loaded anew, out of some that were read with notes."""
    due: dict[str, Any] = {}
    for name in names:
        checks.note(name, terms)
        record = found.get(name)
        is_old = record is not None and not record.stale
        if is_old and _is_due(found.get(note_of(name))):
            due[name] = record
    return due


def another(record: Any) -> Any:
    """Return a copy of a record for another caller, as decoded data is shared with none."""
    if record is None:
        return None
    return _backend.core.Record(record.name, record.version, record.raw, record.stale)
