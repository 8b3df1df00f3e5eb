"""Records of deepstream 1 to 3, which keep each under one key, and their migration to two keys.

Such a key is called like the record, and holds ``{"_v":7,"_d":{...}}``.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from ..aio.control import Reply
from ..core import json_text, tolerant_json
from ..core.failures import refuses
from ..core.keys import is_version_key, partner
from ..errors import ReplyError, shorten
from . import progress
from .compare_and_set import DONE, REMOVE, run_script
from .key_layout import Layout
from .migration import Migration
from .primaries import Primaries
from .progress import RECORDS
from .scan import Found, lifetimes, seconds

# The beginnings of a record's text as JSON.stringify writes it, in either order of its members.
_HEADS: Final = (b'{"_v":', b'{"_d":')
_HEAD_SIZE: Final = 24
_AS_WRITTEN: Final = (
    re.compile(rb'\{"_v":[0-9]+,"_d":(.*)\}', re.DOTALL),
    re.compile(rb'\{"_d":(.*),"_v":[0-9]+\}', re.DOTALL),
)
_DECIMAL: Final = re.compile(rb"[0-9]+")
_MAX_VERSION: Final = 2**63 - 1
_MOVING: Final = ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "WRONGTYPE")


class _OneKey(msgspec.Struct, forbid_unknown_fields=True):
    version: Any = msgspec.field(name="_v")
    data: msgspec.Raw = msgspec.field(name="_d")


_decode: Final = msgspec.json.Decoder(_OneKey).decode


@dataclass(frozen=True, slots=True)
class OneKeyRecord(Found):
    """A record under one key, with the value of the key."""

    value: bytes


def parse(value: bytes) -> tuple[int, bytes] | None:
    """Return version and JSON text of a key's value, or None if it isn't a record."""
    version: Any
    try:
        if json_text.is_too_deep(value):
            raise RecursionError  # as msgspec does on some Pythons alone
        found = _decode(value)
        version, raw = found.version, bytes(found.data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        try:
            tolerated = tolerant_json.decode(value)
        except (ValueError, RecursionError):
            return None
        if not isinstance(tolerated, dict) or tolerated.keys() != {"_v", "_d"}:
            return None
        try:
            version, raw = tolerated["_v"], _data_in(value) or tolerant_json.encode(tolerated["_d"])
        except ValueError:  # nested too deeply to be encoded again
            return None
    if isinstance(version, float) and version.is_integer():
        version = int(version)
    if isinstance(version, bool) or not isinstance(version, int):
        return None
    return (version, raw) if 0 <= version <= _MAX_VERSION else None


def _data_in(value: bytes) -> bytes | None:
    """Return the JSON text of the data, as it is in a value that JSON.stringify has written."""
    for pattern in _AS_WRITTEN:
        if match := pattern.fullmatch(value):
            with suppress(ValueError, RecursionError):
                tolerant_json.decode(match[1])
                return match[1]
    return None


async def find_keys(
    primaries: Primaries, keys: Sequence[bytes], refusals: list[str] | None = None
) -> list[bytes]:
    """Return the keys whose value begins like a record of deepstream 1 to 3.

    The data of a record under two keys may begin so too: it isn't among them. With ``refusals``,
    keys that the user may not read aren't either, and a refusal of GETRANGE itself goes there.
    """
    found = [
        key
        for key, head in zip(keys, await _heads(primaries, keys, refusals), strict=True)
        if head.startswith(_HEADS)
    ]
    data = [key for key in found if key.endswith(b"_d") and not is_version_key(key)]
    versions = await _heads(primaries, [partner(key) for key in data], refusals)
    of_two = {key for key, head in zip(data, versions, strict=True) if _DECIMAL.fullmatch(head)}
    return [key for key in found if key not in of_two]


async def _heads(
    primaries: Primaries, keys: Sequence[bytes], refusals: list[str] | None = None
) -> list[bytes]:
    """Return the first bytes of the values of keys; none of a key that is absent or no text."""
    commands = [(key, ("GETRANGE", key, 0, _HEAD_SIZE - 1)) for key in keys]
    return [_text(reply, refusals) for reply in await primaries.execute_by_key(commands)]


def _text(reply: Reply, refusals: list[str] | None = None) -> bytes:
    if refusals is not None and isinstance(reply, ReplyError):
        if refuses("getrange", reply):
            refusals.append(reply.message)
            return b""
        if reply.code == "NOPERM":
            return b""
    if isinstance(reply, ReplyError) and reply.code not in _MOVING:
        raise reply
    return reply if isinstance(reply, bytes) else b""


class OneKeyMigration(Migration):
    """A migration of records under one key to the two keys of the target's layout."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._pattern = self._untagged.pattern("").removesuffix(b"_v")

    async def _count_remaining(self) -> None:
        count = self._count
        before = count.records, count.damaged, count.ambiguous
        count.records = 0
        async for _, keys in self._scan():
            async for _found in self._read(list(self._names(keys))):
                pass
        count.remaining = count.records
        count.records, count.damaged, count.ambiguous = before

    def _is_of(self, layout: Layout, key: bytes) -> bool:
        # Every key is scanned here, and each record in the new layout has two.
        return is_version_key(key) and super()._is_of(layout, key)

    def _names(self, keys: Iterable[bytes]) -> Iterable[str]:
        """Yield the names that keys of one record each would have."""
        key_prefix = self._untagged.keys("")[0].removesuffix(b"_v")
        for key in keys:
            if not key.startswith(key_prefix):
                continue
            try:
                name = key.removeprefix(key_prefix).decode()
            except UnicodeDecodeError:
                continue
            if name and name.startswith(self._prefix):
                yield name

    def _key(self, name: str) -> bytes:
        return self._untagged.keys(name)[0].removesuffix(b"_v")

    async def _read(self, names: Sequence[str]) -> AsyncIterator[list[Found]]:
        """Yield the records among some keys in batches; counts damaged and ambiguous ones."""
        count = self._count
        names_by_key = {self._key(name): name for name in names}
        keys = await find_keys(self._primaries, list(names_by_key))
        count.records += len(keys)
        keys = await self._unambiguous(keys, names_by_key)
        for some in await self._batches(keys):
            values = await self._primaries.execute_by_key([(key, ("GET", key)) for key in some])
            left = await lifetimes(self._primaries, some)
            batch: list[Found] = []
            for key, reply, ttl in zip(some, values, left, strict=True):
                value, name = _text(reply), names_by_key[key]
                if not value:
                    count.records -= 1  # removed meanwhile
                elif (parsed := parse(value)) is None:
                    count.note_damaged(
                        f"record {shorten(name)}: it isn't "
                        '{"_v": version, "_d": data} with a version from 0 to 2^63-1'
                    )
                else:
                    batch.append(OneKeyRecord(name, *parsed, seconds(ttl), value))
            yield batch

    async def _batches(self, keys: Sequence[bytes]) -> list[list[bytes]]:
        """Return the keys in batches of some megabytes at most."""
        sizes = await self._primaries.execute_by_key([(key, ("STRLEN", key)) for key in keys])
        batches: list[list[bytes]] = []
        total = progress.BYTES
        for key, size in zip(keys, sizes, strict=True):
            total += size if isinstance(size, int) else 0
            if total >= progress.BYTES or len(batches[-1]) >= RECORDS:
                batches.append([])
                total = size if isinstance(size, int) else 0
            batches[-1].append(key)
        return batches

    async def _unambiguous(
        self, keys: Sequence[bytes], names_by_key: dict[bytes, str]
    ) -> list[bytes]:
        """Return the keys whose record's new keys are not the only keys of other records."""
        new = [self._new.keys(names_by_key[key]) for key in keys]
        versions = await _heads(self._primaries, [version for version, _ in new])
        data = await _heads(self._primaries, [data for _, data in new])
        clear = []
        for key, version, text in zip(keys, versions, data, strict=True):
            is_free = not text.startswith(_HEADS) or _DECIMAL.fullmatch(version)
            if not version.startswith(_HEADS) and is_free:
                clear.append(key)
                continue
            self._count.ambiguous += 1
            self._count.note(
                f"record {shorten(names_by_key[key])}: one of its new keys is the only key of "
                "another record; run this again once that has moved"
            )
        return clear

    async def _read_again(self, records: Sequence[Found]) -> list[Found]:
        count = self._count
        before = count.records, count.ambiguous
        found = await super()._read_again(records)
        count.records, count.ambiguous = before
        return found

    async def _remove(self, records: Sequence[Found]) -> set[str]:
        """Remove old keys that are unchanged; return the names whose keys are gone."""
        calls = [
            ([self._key(one.name)], [one.value]) for one in records if isinstance(one, OneKeyRecord)
        ]
        outcomes = await run_script(self._primaries, REMOVE, calls)
        gone = {one.name for one, reply in zip(records, outcomes, strict=True) if reply == DONE}
        self._count.removed += len(gone)
        return gone
