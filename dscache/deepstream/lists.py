"""deepstream's lists: records whose data is an array of texts, mostly names of records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..core.failures import of_call
from ..core.markers import KEEP
from ..errors import DscacheError, RecordError, UsageError, shorten

if TYPE_CHECKING:
    from ..core.pure import Record
    from .records import Records


class Lists:
    """The lists of a peer: ``peer.lists``."""

    def __init__(self, records: Records) -> None:
        self._records = records

    async def entries(self, name: str) -> list[str]:
        """Return the entries of a list, a list of texts; empty if there is no list.

        Raises RecordError if the record isn't a list of texts. The call also raises the errors of
        ``AsyncCache.get``.
        """
        record = await self._records.get(name)
        return [] if record is None else _entries(name, record.data)

    async def set(self, name: str, entries: list[str]) -> Record:
        """Replace the entries of a list, and tell the subscribers; the result is the Record.

        A missing list is created. Raises UsageError for an entry that isn't text. The call also
        raises the errors of ``peer.records.set``.
        """
        given: object = entries
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise UsageError(f"set: entries must be a list of texts, not {shorten(given)}")
        entries = list(given)
        for entry in entries:
            _check_entry("set", entry)
        return await self._records.set(name, entries)

    async def add(
        self, name: str, entry: str, *, index: int | None = None, unique: bool = True
    ) -> list[str]:
        """Add an entry, and tell the subscribers; the result is all entries.

        The entry is added at ``index``, by default at the end. If the list already has the entry,
        it isn't added again, unless ``unique`` is False. A missing list is created.

        Raises UsageError for an entry that isn't text, or an index outside of the list. Raises
        RecordError if the record isn't a list of texts. The call also raises the errors of
        ``peer.records.update``.
        """
        _check_entry("add", entry)

        def change(data: Any) -> Any:
            found = _entries(name, data)
            if unique and entry in found:
                return KEEP
            at = len(found) if index is None else index
            if not isinstance(at, int) or isinstance(at, bool) or not 0 <= at <= len(found):
                raise UsageError(
                    f"add to {shorten(name)}: index must be an int from 0 to {len(found)}, "
                    f"not {shorten(index)}"
                )
            found.insert(at, entry)
            return found

        return await self._change("add", name, change)

    async def remove(self, name: str, entry: str) -> list[str]:
        """Remove all occurrences of an entry, and tell the subscribers; the result is all entries.

        Raises UsageError for an entry that isn't text. Raises RecordError if the record isn't a
        list of texts. The call also raises the errors of ``peer.records.update``.
        """
        _check_entry("remove", entry)

        def change(data: Any) -> Any:
            found = _entries(name, data)
            left = [one for one in found if one != entry]
            return KEEP if len(left) == len(found) else left

        return await self._change("remove", name, change)

    async def _change(self, operation: str, name: str, change: Any) -> list[str]:
        try:
            record = await self._records.update(name, change, default=[])
        except DscacheError as error:
            of_call(error, operation, name)
            raise
        return [] if record is None else _entries(name, record.data)


def _entries(name: str, data: Any) -> list[str]:
    if data == {}:
        return []  # as a client creates it
    if not isinstance(data, list) or not all(isinstance(entry, str) for entry in data):
        raise RecordError(f"record {shorten(name)}: it isn't a list of texts", name=name)
    return data


def _check_entry(operation: str, entry: object) -> None:
    if not isinstance(entry, str):
        raise UsageError(f"{operation}: an entry must be a text, not {shorten(entry)}")
