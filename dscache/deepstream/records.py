"""Records that deepstream's clients hold open: each write is told to the servers.

A write in Redis is guarded: it has the version above the one there. The peer then tells the
servers, as they tell each other: UPDATE after a write, DELETED after a deletion, NOTIFY after an
expiry. A peer that dies between the two leaves its write untold. If the message can't be sent, the
name is told later, as soon as Redis takes messages again.

Servers don't guard their own writes. Two of them, or a server and a peer, may write the same
version of a record at the same moment, and their messages may arrive in another order than their
writes. A peer that notices such messages waits until no more messages of that record come. It then
has the servers read the record again, by NOTIFY.
"""

from __future__ import annotations

import asyncio
import heapq
import inspect
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from .. import _backend
from .._seconds import whole_seconds
from ..aio.background_task import BackgroundTask
from ..core.changes import check_change
from ..core.failures import bad_names, check_iterable, closed, of_call
from ..core.markers import DELETE, KEEP, OMITTED, Ttl
from ..core.patches import patch_of
from ..errors import (
    ConnectionLost,
    DeadlineExceeded,
    DscacheError,
    MessageError,
    RecordError,
    UsageError,
    shorten,
)
from ..pubsub.encoding import flaw
from .changes import RecordChanges
from .patterns import check_pattern
from .protocol import MAX_VERSION, Deleted, Notify, RecordAction, Topic, Update
from .settings import Settings

if TYPE_CHECKING:
    from ..cache import AsyncCache
    from ..core.pure import Message, Record
    from ..messages import MessageNode

_logger = logging.getLogger("dscache")

# Names in one NOTIFY.
_BATCH: Final = 100
# Seconds without a message of a record after which servers read it again.
_QUIET: Final = 0.3
# Records whose last version on the bus is remembered.
_MAX_KNOWN: Final = 20_000
# Records that wait to be told, or for their expiry.
_MAX_WAITING: Final = 100_000
# Expired keys are gone for every reader at once, by Redis's clock.
_EXPIRY_MARGIN: Final = 0.05
_RETRY: Final = 0.5


class Received(msgspec.Struct, rename="camel"):
    """The fields of a message on Topic.RECORD."""

    action: int
    name: str | None = None
    names: list[str] | None = None
    version: int | None = None
    data: str | UnsetType | None = UNSET
    parsed_data: Any = UNSET


class Records:
    """The records of a peer: ``peer.records``."""

    def __init__(
        self, cache: AsyncCache, node: MessageNode, settings: Settings, *, reconcile: bool
    ) -> None:
        self._cache = cache
        self._node = node
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._untold: dict[str, None] = {}
        self._untold_added = asyncio.Event()
        self._expiries: list[tuple[float, str]] = []
        self._expiry_added = asyncio.Event()
        self._changes: set[RecordChanges] = set()
        self._known: OrderedDict[str, int] = OrderedDict()
        self._told: OrderedDict[str, float] = OrderedDict()
        self._crossed: dict[str, float] = {}
        self._crossed_added = asyncio.Event()
        self._unsubscribe: Callable[[], None] | None = None
        self._is_damage_logged = False
        self._is_closed = False
        self._is_reconciling = reconcile
        self.written = self.deleted = self.told_late = self.reconciled = self.expired = 0
        self._tasks = [
            BackgroundTask(self._tell_late, "dscache peer tells late"),
            BackgroundTask(self._tell_expired, "dscache peer tells expiries"),
        ]
        if reconcile:
            self._tasks.append(BackgroundTask(self._reconcile, "dscache peer reconciles"))
            self._subscribe()

    # -- operations

    def get(self, name: str) -> Awaitable[Record | None]:
        """Read a record from Redis; the result is a Record, or None if there is none.

        The call raises the errors of ``AsyncCache.get``.
        """
        self._check_open()
        return self._cache.get(name)

    async def set(self, name: str, data: Any, *, ttl: Ttl = None) -> Record:
        """Write a record, and tell the subscribers; the result is the Record written.

        ``data`` is an object or an array, because deepstream takes everything else for a missing
        record. The version is the one in Redis plus 1, or 1 for a new record. Under a prefix of
        ``record.storageHotPathPrefixes`` it is always 0. ``ttl`` is that of ``AsyncCache.set``.

        If the message to the servers can't be sent, the call returns normally, and the message is
        sent later. Raises RecordError for a bad name or data. The call also raises the errors of
        ``AsyncCache.update``.
        """
        self._check_open()
        text = _record_text(name, data)
        if self._settings.is_hot(name):
            setting = self._cache.set(name, 0, msgspec.Raw(text), ttl=ttl)
            await self._guarded("set", name, setting)
            written: Record = _backend.core.Record(name, 0, text)
        else:
            raw = msgspec.Raw(text)
            updating = self._cache.update(name, lambda _: raw, default={}, ttl=ttl)
            written = await self._guarded("set", name, updating)
        self.written += 1
        await self._tell_written(written, ttl)
        return written

    async def update(
        self,
        name: str,
        change: Callable[[Any], Any],
        *,
        default: Any = OMITTED,
        ttl: Ttl = None,
    ) -> Record | None:
        """Change a record's data, and tell the subscribers; the result is the Record, or None.

        The arguments and errors are as for ``AsyncCache.update``: ``change`` gets the data and
        returns the new data, ``dscache.KEEP`` or ``dscache.DELETE``, and may be called again. The
        result is None if the record was removed.

        Raises UsageError under a prefix of ``record.storageHotPathPrefixes``, since version 0
        guards nothing. Raises RecordError if the new data isn't an object or array.
        """
        return await self._update("update", name, change, default, ttl)

    async def _update(
        self,
        operation: str,
        name: str,
        change: Callable[[Any], Any],
        default: Any,
        ttl: Ttl,
    ) -> Record | None:
        self._check_guarded(operation, name)
        check_change(operation, change)
        outcome: Any = KEEP

        def checked(result: Any) -> Any:
            nonlocal outcome
            outcome = result
            if result is KEEP or result is DELETE:
                return result
            return msgspec.Raw(_record_text(name, result))

        async def awaited(result: Awaitable[Any]) -> Any:
            return checked(await result)

        def apply(data: Any) -> Any:
            result = change(data)
            return awaited(result) if inspect.isawaitable(result) else checked(result)

        updating = self._cache.update(name, apply, default=default, ttl=ttl)
        written: Record | None = await self._guarded(operation, name, updating)
        if outcome is DELETE:
            if written is None:
                await self._tell_deleted(name)
        elif outcome is not KEEP and written is not None:
            self.written += 1
            await self._tell_written(written, ttl)
        return written

    async def patch(
        self,
        name: str,
        path: str,
        value: Any = OMITTED,
        *,
        default: Any = OMITTED,
        ttl: Ttl = None,
    ) -> Record:
        """Change one value of a record, and tell the subscribers; the result is the Record.

        ``path`` is a path as in deepstream's client, such as ``address.street``. Without a
        ``value``, the value at that path is removed. A patch that changes nothing writes and tells
        nothing, unless its ``ttl`` is a lifetime. ``default`` and ``ttl`` are those of
        ``AsyncCache.update``.

        Raises UsageError under a prefix of ``record.storageHotPathPrefixes``. The call also raises
        the errors of ``AsyncCache.patch``.
        """
        self._check_guarded("patch", name)
        patched = patch_of(name, OMITTED, path, value)
        keeps = ttl is None or ttl is KEEP

        def change(data: Any) -> Any:
            before = _backend.core.encode_data(name, data)
            after = patched(data)
            unchanged = keeps and _backend.core.encode_data(name, after) == before
            return KEEP if unchanged else after

        record = await self._update("patch", name, change, default, ttl)
        if record is None:  # a default that the patch has not changed is not written
            record = await self._update("patch", name, patched, default, ttl)
        assert record is not None
        return record

    async def delete(self, name: str) -> bool:
        """Delete a record, and tell the subscribers; the result is whether it existed.

        The subscribers are told even if it didn't exist, as a client may still hold the record
        open. The call raises the errors of ``AsyncCache.delete``.
        """
        self._check_open()
        try:
            existed = await self._cache.delete(name)
        except (ConnectionLost, DeadlineExceeded):
            self._tell_later(name)
            raise
        await self._tell_deleted(name)
        return existed

    async def notify(self, names: str | Iterable[str]) -> None:
        """Have the servers read records again, and tell their subscribers the present state.

        This is for records that another program has written or deleted, or that have expired.
        Raises RecordError for a bad name. The call also raises the errors of ``MessageNode.send``.
        """
        self._check_open()
        wanted = _listed("notify", names)
        for name in wanted:
            _backend.core.check_name(name)
        for start in range(0, len(wanted), _BATCH):
            await self._node.send(Notify(names=wanted[start : start + _BATCH]))

    def changes(self, pattern: str = "*", *, max_pending: int = 10_000) -> RecordChanges:
        """Return an iterator over the changes of records: ``async for change in ...``.

        In the pattern ``*`` stands for any text, and ``?`` for one character. The iterator reports
        the writes of any program, from Redis and from the servers' messages, and each version once.
        The last change of a name has the record as it is in Redis, unless a gap is reported. At
        most ``max_pending`` changes wait to be taken. Beyond that, changes of one name are merged.

        Raises UsageError for a bad argument. Beginning the iteration raises the errors of
        ``AsyncCache.watch``.
        """
        self._check_open()
        check_pattern("changes", pattern)
        if not isinstance(max_pending, int) or isinstance(max_pending, bool) or max_pending < 1:
            raise UsageError(f"changes: max_pending must be at least 1, not {shorten(max_pending)}")
        self._subscribe()
        opened = RecordChanges(self._cache, pattern, max_pending, self._changes.discard)
        self._changes.add(opened)
        return opened

    # -- writes

    def _check_guarded(self, operation: str, name: str) -> None:
        self._check_open()
        if self._settings.is_hot(_backend.core.check_name(name)):
            raise UsageError(
                f"{operation} {shorten(name)}: the name begins with a prefix of "
                "record.storageHotPathPrefixes, so its version is always 0 and guards nothing; "
                "write the whole record by set"
            )

    async def _guarded(self, operation: str, name: str, writing: Awaitable[Any]) -> Any:
        """Await a write; tell the servers later of a write that may have happened."""
        try:
            return await writing
        except DscacheError as error:
            of_call(error, operation, name)
            is_lost = isinstance(error, (ConnectionLost, DeadlineExceeded))
            if is_lost and "may have happened" in str(error):
                self._tell_later(name)
            raise

    def _check_open(self) -> None:
        if self._is_closed:
            raise closed("peer")

    # -- telling

    async def _tell_written(self, record: Record, ttl: Ttl) -> None:
        name = record.name
        lifetime = self._cache.config.options.ttl if ttl is None else whole_seconds(ttl)
        if lifetime and len(self._expiries) < _MAX_WAITING:
            heapq.heappush(self._expiries, (self._loop.time() + lifetime + _EXPIRY_MARGIN, name))
            self._expiry_added.set()
        if record.version > MAX_VERSION:
            await self._tell(name, Notify(names=[name]))
            return
        self._note_told(name, record.version)
        text = record.raw.decode("utf-8", "replace")
        await self._tell(name, Update(name=name, version=record.version, data=text))

    async def _tell_deleted(self, name: str) -> None:
        self.deleted += 1
        self._note_told(name, -1)
        await self._tell(name, Deleted(name=name))

    async def _tell(self, name: str, message: Any) -> None:
        try:
            # Name, version and data have been checked.
            await self._node.send(message, unchecked=True)
        except DscacheError as error:
            if isinstance(error, (MessageError, UsageError)):
                raise
            _logger.info("record %s is told later: %s", shorten(name), error)
            self._tell_later(name)

    def _tell_later(self, name: str) -> None:
        if len(self._untold) >= _MAX_WAITING:
            oldest = next(iter(self._untold))
            del self._untold[oldest]
            _logger.error("record %s was written, and its subscribers aren't told", shorten(oldest))
        self._untold[name] = None
        self._untold_added.set()

    async def _tell_late(self) -> None:
        """Tell names by NOTIFY, until it succeeds."""
        while True:
            while not self._untold:
                self._untold_added.clear()
                await self._untold_added.wait()
            names = [name for name, _ in zip(self._untold, range(_BATCH), strict=False)]
            try:
                await self._node.send(Notify(names=names))
            except DscacheError:
                await asyncio.sleep(_RETRY)
                continue
            self.told_late += len(names)
            for name in names:
                self._untold.pop(name, None)

    async def _tell_expired(self) -> None:
        """Tell records that this peer wrote with a ttl, once they have expired."""
        while True:
            self._expiry_added.clear()
            now = self._loop.time()
            due: list[str] = []
            while self._expiries and self._expiries[0][0] <= now and len(due) < _BATCH:
                due.append(heapq.heappop(self._expiries)[1])
            if due:
                await self._tell_if_gone(list(dict.fromkeys(due)))
                continue
            seconds = self._expiries[0][0] - now if self._expiries else None
            try:
                async with asyncio.timeout(seconds):
                    await self._expiry_added.wait()
            except TimeoutError:
                pass

    async def _tell_if_gone(self, names: list[str]) -> None:
        try:
            found = await self._cache.head_bulk(names)
        except DscacheError:
            # Told without a look; servers read the records themselves.
            found = {}
        gone = [name for name in names if name not in found]
        self.expired += len(gone)
        for name in gone:
            self._note_told(name, -1)
            self._tell_later(name)

    # -- the servers' messages

    def _subscribe(self) -> None:
        if self._unsubscribe is None:
            self._unsubscribe = self._node.subscribe(Topic.RECORD, self._on_message)

    def _on_message(self, message: Message, sender: str) -> None:
        try:
            received = message.decode(Received)
        except MessageError as error:
            if not self._is_damage_logged:
                self._is_damage_logged = True
                _logger.warning("a message of a record was ignored: %s", error)
            return
        if received.action == RecordAction.NOTIFY:
            for name in received.names or ():
                self._note_notified(name)
            return
        if received.name is None:
            return
        if self._is_reconciling:
            self._note_heard(received.name, received.action, received.version)
        for one in list(self._changes):
            one.take(received, sender)

    # -- messages that crossed

    def _note_told(self, name: str, version: int) -> None:
        """Note a message of this peer's own."""
        if self._is_reconciling:
            last = self._known.get(name)
            # A message of a later version has been faster.
            if last is not None and 0 < version <= last:
                self._cross(name)
            self._note_version(name, version)
            self._note_notified(name)

    def _note_heard(self, name: str, action: int, version: int | None) -> None:
        """Note a server's message, and whether it crossed another one."""
        if action == RecordAction.DELETED:
            version = -1
        if version is None:
            return
        last = self._known.get(name)
        told = self._told.get(name)
        now = self._loop.time()
        is_hot = version <= 0
        if not is_hot and last is not None and version <= last:
            self._cross(name)
        elif told is not None and now - told < _QUIET:
            # A client's write may have been under way while the servers were told.
            self._cross(name)
        elif name in self._crossed:
            self._crossed[name] = now
        self._note_version(name, version)

    def _note_version(self, name: str, version: int) -> None:
        self._known[name] = version
        self._known.move_to_end(name)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)

    def _note_notified(self, name: str) -> None:
        if self._is_reconciling:
            now = self._loop.time()
            if name in self._crossed:
                self._crossed[name] = now
            self._told[name] = now
            self._told.move_to_end(name)
            if len(self._told) > _MAX_KNOWN:
                self._told.popitem(last=False)

    def _cross(self, name: str) -> None:
        if len(self._crossed) < _MAX_WAITING:
            self._crossed[name] = self._loop.time()
            self._crossed_added.set()

    async def _reconcile(self) -> None:
        """Have servers read records again whose messages crossed, once no more of them come."""
        while True:
            while not self._crossed:
                self._crossed_added.clear()
                await self._crossed_added.wait()
            await asyncio.sleep(_QUIET / 3)
            now = self._loop.time()
            quiet = [name for name, at in self._crossed.items() if now - at >= _QUIET]
            for start in range(0, len(quiet), _BATCH):
                names = quiet[start : start + _BATCH]
                for name in names:
                    del self._crossed[name]
                    self._note_notified(name)
                try:
                    await self._node.send(Notify(names=names))
                except DscacheError:
                    for name in names:
                        self._tell_later(name)
                self.reconciled += len(names)

    def on_gap(self) -> None:
        """Have servers read again all records of which messages may have been lost."""
        if self._is_reconciling:
            for name in self._known:
                self._cross(name)

    async def close(self) -> None:
        """End the iterations, and try once more to send late messages."""
        for one in list(self._changes):
            await one.aclose()
        for task in self._tasks:
            task.cancel()
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        if self._untold:
            names = list(self._untold)
            try:
                async with asyncio.timeout(1.0):
                    await self.notify(names)
            except (DscacheError, TimeoutError):
                _logger.error(
                    "%d records were written, and their subscribers aren't told: %s",
                    len(names),
                    shorten(names),
                )
        self._is_closed = True

    def stats(self) -> dict[str, int]:
        """Return the counts of records."""
        return {
            "records_written": self.written,
            "records_deleted": self.deleted,
            "records_expired": self.expired,
            "records_told_late": self.told_late,
            "records_untold": len(self._untold),
            "records_reconciled": self.reconciled,
        }


def _listed(operation: str, names: Any) -> list[str]:
    """Return names as a list; raises RecordError for no names."""
    if isinstance(names, str):
        return [names]
    if isinstance(names, bytes):
        raise bad_names(operation, names)
    try:
        return list(names)
    except TypeError as error:
        check_iterable(operation, names, error)
        raise


def _record_text(name: str, data: Any) -> bytes:
    """Return the JSON text of a record's data; raises RecordError unless deepstream takes it."""
    text: bytes = _backend.core.encode_data(_backend.core.check_name(name), data)
    if (reason := flaw(text)) is not None:
        raise RecordError(
            f"record {shorten(name)}: a msgspec.Raw in its data isn't JSON: {reason}", name=name
        )
    if text[:1] not in (b"{", b"[") and text.lstrip()[:1] not in (b"{", b"["):
        raise RecordError(
            f"record {shorten(name)}: deepstream's records are objects or arrays, and its servers "
            f"take anything else for missing; write such as {{'value': {shorten(data)}}}",
            name=name,
        )
    return text
