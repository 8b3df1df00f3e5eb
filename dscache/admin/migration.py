"""Migration of records from one key layout to the other, while both layouts are in use.

It copies each record unless the new layout has a version as new, verifies the copy, and only then
removes the old keys, if they are unchanged. A record that can't be moved safely stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from ..core.keys import slot_of_key
from ..errors import RecordError, shorten
from ..net.scan import KeyScan
from .cache import AdminCache
from .compare_and_set import DONE, REMOVE, SWAP, run_script
from .key_layout import DEEPSTREAM, HASHTAG, Layout
from .primaries import Primaries
from .progress import JobProgress
from .scan import Found, RecordReader, get_whole, scan

# Attempts for a record that keeps changing, and the seconds between them.
_ROUNDS = 4
_PAUSE = 0.05


@dataclass(slots=True)
class Count(JobProgress):
    """The counts of a migration, by the outcomes of the ``records`` of the old layout."""

    copied: int = 0
    """Written in the new layout."""
    present: int = 0
    """In the new layout already, with the same or a newer version."""
    removed: int = 0
    """Removed from the old layout, after the copy was verified."""
    changing: int = 0
    """Left in place, as they kept changing."""
    conflicts: int = 0
    """Left in place: both layouts have one version with different data."""
    ambiguous: int = 0
    """Left in place: their keys mean another record in the other layout."""
    already: int = 0
    """Records in the new layout, counted by a dry run."""
    remaining: int = 0
    """Records in the old layout at the end."""

    @property
    def left(self) -> int:
        """The number of records left in the old layout for a known reason."""
        return self.changing + self.conflicts + self.ambiguous + self.damaged

    @property
    def unexplained(self) -> int:
        """The number of records in the old layout at the end without a known reason."""
        return max(self.remaining - self.left - self.halves, 0)


class Migration:
    """A migration from the layout of ``source`` to that of ``target``.

    With ``keep``, the keys of the old layout stay.
    """

    def __init__(
        self,
        source: AdminCache,
        target: AdminCache,
        primaries: Primaries,
        *,
        prefix: str,
        count: Count,
        keep: bool,
    ) -> None:
        self._source, self._target = source, target
        self._primaries = primaries
        self._old, self._new = (Layout.of(cache.config.options) for cache in (source, target))
        key_prefix = target.config.options.key_prefix
        self._tagged, self._untagged = (Layout(kind, key_prefix) for kind in (HASHTAG, DEEPSTREAM))
        self._pattern = self._tagged.pattern("")
        self._prefix = prefix
        self._count = count
        self._keep = keep
        self._reader = RecordReader(source, primaries, self._old, count)

    async def count(self) -> None:
        """Count the records, and change nothing."""
        count = self._count
        count.total = self._primaries.size
        async for _, keys in self._scan():
            count.already += sum(self._is_of(self._new, key) for key in keys)
            async for found in self._read(list(self._names(keys))):
                verified, conflicts = await self._verify(found)
                count.present += len(verified)
                self._note_conflicts(conflicts)
                count.copied += len(found) - len(verified) - len(conflicts)

    async def run(self) -> None:
        """Move the records, and count those that remain."""
        count = self._count
        count.total = self._primaries.size * (1 if self._keep else 2)
        async for _, keys in self._scan():
            async for found in self._read(list(self._names(keys))):
                await self._move(found)
        if not self._keep:
            await self._count_remaining()

    async def _count_remaining(self) -> None:
        async for _, keys in self._scan():
            self._count.remaining += sum(self._is_of(self._old, key) for key in keys)

    # -- reading

    def _scan(self) -> AsyncIterator[tuple[str, list[bytes]]]:
        return scan(self._source, KeyScan, self._pattern, self._count)

    def _is_of(self, layout: Layout, key: bytes) -> bool:
        """Return whether a key belongs to a layout; a key of both counts as hashtag."""
        name = self._tagged.name_of(key)
        if layout.kind != HASHTAG:
            name = self._untagged.name_of(key) if name is None else None
        return name is not None and name.startswith(self._prefix)

    def _names(self, keys: Iterable[bytes]) -> Iterable[str]:
        """Yield the names of the records of keys that can be moved."""
        for key in keys:
            if not self._is_of(self._old, key):
                continue
            name = self._old.name_of(key)
            assert name is not None
            self._count.records += 1
            if self._tagged.name_of(self._untagged.keys(name)[0]) is not None:
                # Its keys in deepstream layout would read as another record in hashtag layout.
                self._count.ambiguous += 1
                self._count.note(
                    f"record {shorten(name)}: its keys in the deepstream layout would be keys of "
                    "another record in the hashtag layout; it is not moved"
                )
                continue
            yield name

    async def _read(self, names: Sequence[str]) -> AsyncIterator[list[Found]]:
        """Yield the whole records of the old layout in batches, and count the others."""
        async for found in self._reader.read(names):
            for one in found:
                if not one.raw:
                    self._count.note_damaged(
                        f"record {shorten(one.name)}: its stored data is empty"
                    )
            yield [one for one in found if one.raw]

    # -- moving

    async def _move(self, waiting: Sequence[Found]) -> None:
        """Copy, verify and remove records; retries those that change meanwhile."""
        count = self._count
        copied: set[str] = set()
        present: set[str] = set()
        for turn in range(_ROUNDS):
            if turn:
                await asyncio.sleep(_PAUSE * turn)
                waiting = await self._read_again(waiting)
            written, damaged = await self._copy(waiting)
            copied |= written
            for error in damaged.values():
                count.note_damaged(error)
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
                f"record {shorten(one.name)}: it keeps changing, or the new layout has half of it; "
                "run this again"
            )
        count.copied += len(copied)
        count.present += len(present - copied)

    async def _read_again(self, records: Sequence[Found]) -> list[Found]:
        count = self._count
        halves, damaged = count.halves, count.damaged
        batches = self._read([one.name for one in records])
        found = [one async for batch in batches for one in batch]
        # They have been counted as whole already; the missing ones were removed by another process.
        count.halves, count.damaged = halves, damaged
        return found

    def _note_conflicts(self, names: Iterable[str]) -> None:
        for name in names:
            self._count.conflicts += 1
            self._count.note(
                f"record {shorten(name)}: both layouts have the same version of it, with different "
                "data; write a newer version, or delete one of them"
            )

    async def _copy(self, records: Sequence[Found]) -> tuple[set[str], Mapping[str, Exception]]:
        """Write records in the new layout unless it has newer ones.

        Returns the names written, and the errors of records that are damaged in the new layout.
        """
        whole, apart = self._by_nodes(self._new, records)
        written = await self._copy_apart(apart) if apart else set()
        # One by one, as each has its own lifetime; calls of one tick share commands.
        outcomes = await asyncio.gather(
            *(
                self._target.set(
                    one.name, one.version, msgspec.Raw(one.raw), ttl=one.ttl or 0, if_newer=True
                )
                for one in whole
            ),
            return_exceptions=True,
        )
        damaged: dict[str, Exception] = {}
        for one, outcome in zip(whole, outcomes, strict=True):
            if isinstance(outcome, RecordError):
                damaged[one.name] = outcome
            elif isinstance(outcome, BaseException):
                raise outcome
            elif outcome:
                written.add(one.name)
        return written, damaged

    async def _verify(self, records: Sequence[Found]) -> tuple[list[Found], set[str]]:
        """Return the records that the new layout has, the same or newer, and the conflicts."""
        there, _ = await get_whole(self._target, [one.name for one in records])
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

    async def _remove(self, records: Sequence[Found]) -> set[str]:
        """Remove old keys that are unchanged; return the names whose keys are gone."""
        whole, apart = self._by_nodes(self._old, records)
        gone = await self._remove_keys(whole)
        if apart:
            now, _ = await get_whole(self._source, [one.name for one in apart])
            same = [
                one
                for one in apart
                if (still := now.get(one.name)) is not None
                and (still.version, still.raw) == (one.version, one.raw)
            ]
            # The version first: a write in between leaves a whole record again.
            for key in (0, 1):
                same = await self._remove_keys(same, [key])
            gone += same
        self._count.removed += len(gone)
        return {one.name for one in gone}

    async def _remove_keys(
        self, records: Sequence[Found], which: Sequence[int] = (0, 1)
    ) -> list[Found]:
        """Remove both keys or one of each record, if unchanged; return those whose keys are gone.

        Keys may be gone already: removed by another run, which has copied them too.
        """
        calls = []
        for one in records:
            keys, values = self._old.keys(one.name), (b"%d" % one.version, one.raw)
            calls.append(([keys[i] for i in which], [values[i] for i in which]))
        outcomes = await run_script(self._primaries, REMOVE, calls)
        return [one for one, outcome in zip(records, outcomes, strict=True) if outcome == DONE]

    # -- records whose two keys lie on different nodes

    def _by_nodes(
        self, layout: Layout, records: Iterable[Found]
    ) -> tuple[list[Found], list[Found]]:
        """Return the records whose keys lie on one node, and those whose keys lie on two."""
        together: list[Found] = []
        apart: list[Found] = []
        for one in records:
            slots = set(map(slot_of_key, layout.keys(one.name)))
            is_apart = self._primaries.is_cluster and len(slots) > 1
            (apart if is_apart else together).append(one)
        return together, apart

    async def _copy_apart(self, records: Sequence[Found]) -> set[str]:
        """Write each of the two keys only if it still has the value found before."""
        there, _ = await get_whole(self._target, [one.name for one in records])
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
        outcomes = await run_script(self._primaries, SWAP, swaps)
        pairs = zip(older, outcomes[::2], outcomes[1::2], strict=True)
        return {one.name for one, data, version in pairs if data == version == DONE}
