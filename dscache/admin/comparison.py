"""Comparison of the records in two places: servers, clusters or export files."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import msgspec

from ..cache import AsyncCache
from ..core import tolerant_json
from ..errors import BulkError, RecordError
from . import ndjson
from .restore import ImportFile

_BATCH = 1000


class Records(Protocol):
    """A place of records, in any order; a name that comes twice counts as it came last.

    Attributes:
        damaged: The errors of records that can't be compared, by name, once all have been read.
    """

    @property
    def damaged(self) -> Mapping[str, Exception]: ...

    def __aiter__(self) -> AsyncIterator[tuple[str, int, bytes]]: ...


@dataclass(frozen=True, slots=True)
class Difference:
    """A record that differs: its version in either place, or None where it doesn't exist."""

    name: str
    left: int | None
    right: int | None

    @property
    def kind(self) -> str:
        """``missing``, ``added``, ``version`` or, with equal versions, ``data``."""
        if self.right is None:
            return "missing"
        if self.left is None:
            return "added"
        return "data" if self.left == self.right else "version"


class StoredRecords:
    """The records of a cache whose names begin with a prefix: name, version and JSON text.

    Attributes:
        damaged: The errors of damaged records, by name, which are left out.
    """

    def __init__(self, cache: AsyncCache, prefix: str) -> None:
        self.damaged: dict[str, Exception] = {}
        self._cache = cache
        self._prefix = prefix

    async def __aiter__(self) -> AsyncIterator[tuple[str, int, bytes]]:
        scan = self._cache.scan(self._prefix, records=True)
        while True:
            try:
                record = await anext(scan)
            except StopAsyncIteration:
                return
            except BulkError as error:
                for name, reason in error.errors.items():
                    if not isinstance(reason, RecordError):
                        raise reason from None
                    self.damaged[name] = reason
            else:
                yield record.name, record.version, record.raw


class ExportedRecords:
    """The records of an export file, whose names begin with a prefix.

    Raises RecordError for a line that isn't a record, and OSError.
    """

    damaged: Mapping[str, Exception] = MappingProxyType({})

    def __init__(self, file: Path, prefix: str) -> None:
        self._file = file
        self._prefix = prefix

    async def __aiter__(self) -> AsyncIterator[tuple[str, int, bytes]]:
        with closing(ImportFile(self._file)) as source:
            lines = ndjson.Lines(source.pieces(0), str(self._file))
            async for some in lines.items(ndjson.decode, _BATCH):
                for line in some:
                    if line.name.startswith(self._prefix):
                        yield line.name, line.version, _text_of(line.data)


def _text_of(data: object) -> bytes:
    return bytes(data) if isinstance(data, msgspec.Raw) else tolerant_json.encode(data)


async def compare(left: Records, right: Records) -> AsyncIterator[Difference]:
    """Yield the differences between two places, in no order; none of a damaged record.

    Keeps the name, version and digest of each record of the left place in memory. Data is equal
    if its JSON is, whatever the white space and the order of keys.
    """
    there = {name: (version, _digest(raw)) async for name, version, raw in left}
    seen: dict[str, Difference | None] = {}
    async for name, version, raw in right:
        known = there.get(name)
        if known is None:
            seen[name] = Difference(name, None, version)
        elif known == (version, _digest(raw)):
            seen[name] = None
        else:
            seen[name] = Difference(name, known[0], version)
    damaged = {*left.damaged, *right.damaged}
    for name, difference in seen.items():
        if difference is not None and name not in damaged:
            yield difference
    for name, (version, _) in there.items():
        if name not in seen and name not in damaged:
            yield Difference(name, version, None)


def _digest(raw: bytes) -> bytes:
    # Text that msgspec refuses is compared as it is.
    with suppress(msgspec.DecodeError, RecursionError):
        raw = msgspec.json.encode(msgspec.json.decode(raw), order="sorted")
    return hashlib.blake2b(raw, digest_size=16).digest()
