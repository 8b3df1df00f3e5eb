"""Move records from one key layout to the other, while servers go on with either.

Each record is copied if it is newer than what is there, the copy is read again, and only then are
the old keys removed, if they still hold what was copied. What can't be moved safely stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..cache import AsyncCache
from ..core.keys import slot_of_key
from ..errors import BulkError, RecordError, shorten
from .compare_and_set import DONE, REMOVE, SWAP, run_script
from .export import lifetimes_of
from .key_layout import DEEPSTREAM, HASHTAG, Layout
from .primaries import SCAN_COUNT, Primaries, Primary
from .progress import BYTES, RECORDS, TOLD

# How often a record is tried again that is written meanwhile, and seconds in between.
_ROUNDS = 4
_PAUSE = 0.05


@dataclass(slots=True)
class Count:
    """What came of the records that were found in the old layout."""

    done: int = 0
    total: int = 0
    """Of the keys, for a bar."""
    found: int = 0
    copied: int = 0
    """Written in the new layout."""
    present: int = 0
    """In the new layout already, the same or newer."""
    removed: int = 0
    """Whose old keys are gone, with a verified record in the new layout."""
    changing: int = 0
    """Written again and again meanwhile, and left alone."""
    conflicts: int = 0
    """Of one version in both layouts, with other data."""
    ambiguous: int = 0
    """Whose keys in one layout are those of another record in the other."""
    damaged: int = 0
    halves: int = 0
    already: int = 0
    """Records in the new layout, as far as a dry run has seen."""
    remaining: int = 0
    """Records in the old layout at the end."""
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> int:
        """How many were left in the old layout for a reason."""
        return self.changing + self.conflicts + self.ambiguous + self.damaged

    @property
    def unexplained(self) -> int:
        """How many are in the old layout at the end and were not left there for a reason."""
        return max(self.remaining - self.left - self.halves, 0)

    def note(self, message: str) -> None:
        if len(self.notes) < TOLD:
            self.notes.append(message)


@dataclass(frozen=True, slots=True)
class _Found:
    """A record in the old layout, and its lifetime in seconds."""

    name: str
    version: int
    raw: bytes
    ttl: int | None


class Migration:
    """From one layout, which is that of ``source``, to the other, which is that of ``target``."""

    def __init__(
        self,
        source: AsyncCache,
        target: AsyncCache,
        shards: Primaries,
        *,
        prefix: str,
        count: Count,
        keep: bool,
    ) -> None:
        self._source, self._target = source, target
        self._shards = shards
        self._old, self._new = (Layout.of(cache._config.options) for cache in (source, target))
        key_prefix = target._config.options.key_prefix
        self._tagged, self._untagged = (Layout(kind, key_prefix) for kind in (HASHTAG, DEEPSTREAM))
        self._pattern = self._tagged.pattern("")
        self._prefix = prefix
        self._count = count
        self._keep = keep
        self._at_once = RECORDS

    async def look(self) -> None:
        """Count what is there, and change nothing."""
        count = self._count
        count.total = self._shards.size
        for shard in self._shards.all:
            async for keys in self._scan(shard):
                names = list(self._names(keys))
                count.already += sum(self._is_of(self._new, key) for key in keys)
                while names:
                    some, names = names[: self._at_once], names[self._at_once :]
                    found = await self._read(shard, some)
                    verified, conflicts = await self._verify(found)
                    count.present += len(verified)
                    self._note_conflicts(conflicts)
                    count.copied += len(found) - len(verified) - len(conflicts)

    async def run(self) -> None:
        """Move the records, and count what is left."""
        count = self._count
        count.total = self._shards.size * (1 if self._keep else 2)
        for shard in self._shards.all:
            async for keys in self._scan(shard):
                names = list(self._names(keys))
                while names:
                    some, names = names[: self._at_once], names[self._at_once :]
                    await self._move(shard, some)
        if not self._keep:
            for shard in self._shards.all:
                async for keys in self._scan(shard):
                    count.remaining += sum(self._is_of(self._old, key) for key in keys)

    # -- what there is

    async def _scan(self, shard: Primary) -> Any:
        cursor: Any = b"0"
        while True:
            cursor, keys = await shard.server.execute(
                "SCAN", cursor, "MATCH", self._pattern, "COUNT", SCAN_COUNT
            )
            yield list(dict.fromkeys(keys))
            self._count.done = min(self._count.done + SCAN_COUNT, self._count.total)
            if int(cursor) == 0:
                return

    def _is_of(self, layout: Layout, key: bytes) -> bool:
        """Return whether a key is one of a layout; what may be of both is of hashtag."""
        name = self._tagged.name_of(key)
        if layout.kind != HASHTAG:
            name = self._untagged.name_of(key) if name is None else None
        return name is not None and name.startswith(self._prefix)

    def _names(self, keys: Iterable[bytes]) -> Iterable[str]:
        """Give the names of the records of some keys that may be moved."""
        for key in keys:
            if not self._is_of(self._old, key):
                continue
            name = self._old.name_of(key)
            assert name is not None
            self._count.found += 1
            if self._tagged.name_of(self._untagged.keys(name)[0]) is not None:
                # Moved, it would be taken for a record of the old layout.
                self._count.ambiguous += 1
                self._count.note(
                    f"record {shorten(name)}: its keys in the deepstream layout would be those of "
                    "another record in the hashtag layout; it stays where it is"
                )
                continue
            yield name

    async def _read(self, shard: Primary, names: Sequence[str]) -> list[_Found]:
        """Return those records that are there whole, in the old layout."""
        count = self._count
        halves = self._source.stats()["halves"]
        records, damaged = await self._get(self._source, names)
        self._note_damaged(damaged)
        # What is gone since its key was found is no half.
        count.halves += self._source.stats()["halves"] - halves
        keys = [self._old.keys(name)[0] for name in records]
        lifetimes = await lifetimes_of(shard, keys)
        found = []
        size = 0
        for (name, record), ttl in zip(records.items(), lifetimes, strict=True):
            size += len(record.raw)
            if not record.raw:
                count.damaged += 1
                count.note(f"record {shorten(name)}: its stored data is empty")
            elif ttl is None or ttl > 0:
                found.append(_Found(name, record.version, record.raw, ttl))
        if records:
            self._at_once = max(min(RECORDS, BYTES * len(records) // (size + 1)), 1)
        return found

    async def _get(
        self, cache: AsyncCache, names: Sequence[str]
    ) -> tuple[dict[str, Any], dict[str, Exception]]:
        """Return the records of some names that are whole, and the errors of those damaged."""
        try:
            return await cache.get_bulk(names), {}
        except BulkError as error:
            for reason in error.errors.values():
                if not isinstance(reason, RecordError):
                    raise
            return error.result, error.errors

    # -- moving

    async def _move(self, shard: Primary, names: Sequence[str]) -> None:
        """Copy, verify and remove some records; what changes meanwhile, some times over."""
        count = self._count
        waiting = await self._read(shard, names)
        copied: set[str] = set()
        present: set[str] = set()
        for turn in range(_ROUNDS):
            if turn:
                await asyncio.sleep(_PAUSE * turn)
                waiting = await self._read_again(shard, waiting)
            written, damaged = await self._copy(waiting)
            copied |= written
            self._note_damaged(damaged)
            verified, conflicts = await self._verify(waiting)
            self._note_conflicts(conflicts)
            done = {one.name for one in verified}
            present |= done
            if not self._keep:
                done = await self._remove(verified)
            done |= conflicts | damaged.keys()
            waiting = [one for one in waiting if one.name not in done]
            if not waiting:
                break
        count.changing += len(waiting)
        for one in waiting:
            count.note(
                f"record {shorten(one.name)}: it is written all the time, or half of it is there "
                "already; run this again"
            )
        count.copied += len(copied)
        count.present += len(present - copied)

    async def _read_again(self, shard: Primary, records: Sequence[_Found]) -> list[_Found]:
        count = self._count
        halves, damaged = count.halves, count.damaged
        found = await self._read(shard, [one.name for one in records])
        # They were counted as whole already; what is gone by now, somebody else has removed.
        count.halves, count.damaged = halves, damaged
        return found

    def _note_damaged(self, errors: Mapping[str, Exception]) -> None:
        for error in errors.values():
            self._count.damaged += 1
            self._count.note(str(error))

    def _note_conflicts(self, names: Iterable[str]) -> None:
        for name in names:
            self._count.conflicts += 1
            self._count.note(
                f"record {shorten(name)}: both layouts have the same version of it, with other "
                "data; write a newer version, or delete one of them"
            )

    async def _copy(self, records: Sequence[_Found]) -> tuple[set[str], Mapping[str, Exception]]:
        """Write records in the new layout unless it has newer ones.

        Returns which were written, and the errors of those that the new layout has damaged.
        """
        apart = [one for one in records if self._is_apart(self._new, one.name)]
        written = await self._copy_apart(apart) if apart else set()
        others = {one.name: one for one in records}
        for one in apart:
            del others[one.name]
        # In one tick, and so in few commands; each has a lifetime of its own.
        outcomes = await asyncio.gather(
            *(
                self._target.set(
                    one.name, one.version, msgspec.Raw(one.raw), ttl=one.ttl or 0, if_newer=True
                )
                for one in others.values()
            ),
            return_exceptions=True,
        )
        damaged: dict[str, Exception] = {}
        for name, outcome in zip(others, outcomes, strict=True):
            if isinstance(outcome, RecordError):
                damaged[name] = outcome
            elif isinstance(outcome, BaseException):
                raise outcome
            elif outcome:
                written.add(name)
        return written, damaged

    async def _verify(self, records: Sequence[_Found]) -> tuple[list[_Found], set[str]]:
        """Return what the new layout has, the same or newer, and names with other data there."""
        there, _ = await self._get(self._target, [one.name for one in records])
        verified = []
        conflicts = set()
        for one in records:
            copy = there.get(one.name)
            if copy is None or copy.version < one.version:
                continue
            if copy.version == one.version and copy.raw != one.raw:
                conflicts.add(one.name)
            else:
                verified.append(one)
        return verified, conflicts

    async def _remove(self, records: Sequence[_Found]) -> set[str]:
        """Remove the old keys that hold what was copied; return whose are gone."""
        old = self._old
        whole = [one for one in records if not self._is_apart(old, one.name)]
        apart = [one for one in records if self._is_apart(old, one.name)]
        outcomes = await run_script(
            self._shards,
            REMOVE,
            [(old.keys(one.name), (b"%d" % one.version, one.raw)) for one in whole],
        )
        # Somebody else may have removed some: another run of this, which has copied them too.
        gone = {one.name for one, outcome in zip(whole, outcomes, strict=True) if outcome == DONE}
        self._count.removed += len(gone)
        return gone | await self._remove_apart(apart)

    # -- records whose two keys lie on different nodes

    def _is_apart(self, layout: Layout, name: str) -> bool:
        if not self._shards.is_cluster:
            return False
        version, data = layout.keys(name)
        return slot_of_key(version) != slot_of_key(data)

    async def _copy_apart(self, records: Sequence[_Found]) -> set[str]:
        """Write each of the two keys only if it still holds what was found there before."""
        there, _ = await self._get(self._target, [one.name for one in records])
        older = [
            one
            for one in records
            if (copy := there.get(one.name)) is None or copy.version < one.version
        ]
        swaps = []
        for one in older:
            version, data = self._new.keys(one.name)
            ms = b"%d" % (one.ttl * 1000 if one.ttl else 0)
            held = there.get(one.name)
            was = (b"0", b"") if held is None else (b"1", held.raw)
            swaps.append(((data,), (*was, one.raw, ms)))
            was = (b"0", b"") if held is None else (b"1", b"%d" % held.version)
            swaps.append(((version,), (*was, b"%d" % one.version, ms)))
        outcomes = await run_script(self._shards, SWAP, swaps)
        pairs = zip(older, outcomes[::2], outcomes[1::2], strict=True)
        return {one.name for one, data, version in pairs if data == version == DONE}

    async def _remove_apart(self, records: Sequence[_Found]) -> set[str]:
        """Remove the version first: a writer who comes in between leaves a whole record again."""
        if not records:
            return set()
        now, _ = await self._get(self._source, [one.name for one in records])
        same = [
            one
            for one in records
            if (still := now.get(one.name)) is not None
            and (still.version, still.raw) == (one.version, one.raw)
        ]
        for position, of in enumerate(("version", "raw")):
            outcomes = await run_script(
                self._shards,
                REMOVE,
                [
                    (
                        (self._old.keys(one.name)[position],),
                        (b"%d" % one.version if of == "version" else one.raw,),
                    )
                    for one in same
                ],
            )
            same = [one for one, outcome in zip(same, outcomes, strict=True) if outcome == DONE]
        self._count.removed += len(same)
        return {one.name for one in same}
