"""Changes of records, from Redis and from the servers' messages, each version once.

Redis reports the name of a changed record, and the watch then reads the record. So it always finds
the present state, but several quick changes are one. A server's message has each version at once,
but may be late or lost. So both are used, and a version that was given already isn't given again. A
version from a message that Redis hasn't confirmed within a second is compared with the record.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import msgspec
from msgspec import UNSET

from ..errors import BulkError, DscacheError, MessageError, UsageError, shorten
from ..pubsub.encoding import decode_text
from .patterns import matcher, prefix_of
from .protocol import RecordAction

if TYPE_CHECKING:
    from ..aio.watch import AsyncChange, AsyncWatch
    from ..cache import AsyncCache
    from ..core.pure import Record
    from .records import Received

Kind = Literal["changed", "deleted", "damaged", "flushed", "gap", "resumed"]

_CONFIRM_AFTER: Final = 1.0
# Names whose last change is remembered.
_MAX_KNOWN: Final = 100_000


class RecordChange(msgspec.Struct, frozen=True, kw_only=True):
    """A change of a record, of all records, or of the iteration itself.

    ``kind`` is that of ``AsyncCache.watch``. For "changed", ``version`` and ``data`` are those of
    the record. ``sender`` is the server whose message told it first, or None if Redis did.
    ``reason`` is given for "damaged" and "gap".
    """

    kind: Kind
    name: str = ""
    version: int | None = None
    data: Any = None
    sender: str | None = None
    reason: str | None = None


class _Last(msgspec.Struct):
    """The last change given of a name; ``version`` is None if it was deleted."""

    version: int | None
    data: Any
    is_confirmed: bool = True


class RecordChanges(AsyncIterator[RecordChange]):
    """The changes of the records of a pattern, by ``async for``; made by ``peer.records.changes``.

    It reports changes from its first ``async for`` or ``async with`` until it or the peer is
    closed.
    """

    def __init__(
        self,
        cache: AsyncCache,
        pattern: str,
        max_pending: int,
        on_close: Callable[[RecordChanges], object],
    ) -> None:
        self.pattern = pattern
        self.dropped = 0
        self._cache = cache
        self._matches = matcher(pattern)
        self._max_pending = max_pending
        self._on_close = on_close
        self._last: OrderedDict[str, _Last] = OrderedDict()
        self._unconfirmed: dict[str, float] = {}
        self._found: deque[RecordChange] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._watch: AsyncWatch | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._beginning: asyncio.Lock = asyncio.Lock()
        self._is_closed = False
        self._is_busy = False
        self._error: BaseException | None = None

    # -- the iteration

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RecordChange:
        if self._watch is None and not self._is_closed:
            try:
                await self._begin()
            except (DscacheError, asyncio.CancelledError):
                # A cache that is closed cancels the beginning of its watches.
                task = asyncio.current_task()
                if not self._has_ended() or (task is not None and task.cancelling()):
                    raise
        while not self._found:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._is_closed:
                raise StopAsyncIteration
            if self._is_busy:
                raise UsageError(
                    "this iterator is in use already; call changes() once per consumer"
                )
            self._news.clear()
            self._is_busy = True
            try:
                await self._news.wait()
            finally:
                self._is_busy = False
        change = self._found.popleft()
        self._room.set()
        return change

    async def _begin(self) -> None:
        async with self._beginning:
            if self._watch is not None or self._is_closed:
                return
            watch = self._cache.watch(prefix_of(self.pattern), records=True)
            await watch.__aenter__()
            if self._has_ended():
                await watch.close()
                return
            self._watch = watch
            self._tasks = [
                asyncio.create_task(self._follow(watch), name="dscache peer watches records"),
                asyncio.create_task(self._confirm(), name="dscache peer confirms records"),
            ]

    def _has_ended(self) -> bool:
        return self._is_closed  # another task may have closed it during an await

    async def aclose(self) -> None:
        """Report no more changes; the iteration ends after the waiting ones."""
        if self._is_closed:
            return
        self._is_closed = True
        self._on_close(self)
        self._news.set()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        # Their tracebacks lead here, and would keep the watch's buffers until a garbage collection.
        self._tasks = []
        if self._watch is not None:
            await self._watch.close()

    # -- from Redis

    async def _follow(self, watch: AsyncWatch) -> None:
        try:
            async for change in watch:
                while len(self._found) >= self._max_pending:
                    # The watch itself merges changes that wait, or reports a gap.
                    self._room.clear()
                    await self._room.wait()
                await self._take_watched(change)
        except DscacheError as error:
            self._error = error
        self._news.set()

    async def _take_watched(self, change: AsyncChange) -> None:
        if change.is_loss or change.kind == "gap":
            self._last.clear()
            self._give(RecordChange(kind=change.kind, reason=change.reason))
            return
        if not self._matches(change.name):
            return
        if change.kind == "damaged":
            self._last.pop(change.name, None)
            self._give(RecordChange(kind="damaged", name=change.name, reason=change.reason))
            return
        record = change.record
        last = self._last.get(change.name)
        if last is not None and _is_below(record, last):
            # A message was faster than this read, or the record was made anew.
            with suppress(DscacheError):
                record = await change.read()
        self._give_present(change.name, record)

    def _give_present(self, name: str, record: Record | None) -> None:
        """Give the present state of a record, unless it was the last one given."""
        self._unconfirmed.pop(name, None)
        last = self._last.get(name)
        if record is None:
            if last is None or last.version is not None:
                self._remember(name, _Last(None, None))
                self._give(RecordChange(kind="deleted", name=name))
            return
        try:
            data = record.data
        except DscacheError as error:
            self._last.pop(name, None)
            self._give(RecordChange(kind="damaged", name=name, reason=str(error)))
            return
        if last is not None and last.version == record.version and last.data == data:
            return
        self._remember(name, _Last(record.version, data))
        self._give(
            RecordChange(kind="changed", name=name, version=record.version, data=record.data)
        )

    # -- from the servers

    def take(self, received: Received, sender: str) -> None:
        """Take a server's message, if it has a whole record of a version not given yet."""
        name = received.name
        if self._watch is None or name is None or not self._matches(name):
            return
        if received.action != RecordAction.UPDATE or received.version is None:
            return
        last = self._last.get(name)
        # Redis alone tells whether a record of an unknown, deleted or hot name is new.
        if last is None or last.version is None or received.version <= last.version:
            return
        if len(self._found) >= self._max_pending:
            self.dropped += 1
            return
        try:
            data = decode_text(f"record {shorten(name)}", received.data, received.parsed_data)
            given = decode_text(f"record {shorten(name)}", received.data, UNSET)
        except MessageError:
            return
        self._remember(name, _Last(received.version, data, False))
        self._unconfirmed[name] = asyncio.get_running_loop().time()
        self._give(
            RecordChange(
                kind="changed",
                name=name,
                version=received.version,
                data=data if given is None else given,
                sender=sender,
            )
        )

    async def _confirm(self) -> None:
        """Compare the versions of messages with the records, if Redis hasn't reported them."""
        while True:
            await asyncio.sleep(_CONFIRM_AFTER)
            before = asyncio.get_running_loop().time() - _CONFIRM_AFTER
            names = [name for name, at in self._unconfirmed.items() if at <= before]
            if not names:
                continue
            try:
                found = await self._cache.get_bulk(names)
            except BulkError as error:
                found = error.result
                names = [name for name in names if name not in error.errors]
            except DscacheError:
                continue
            for name in names:
                if name in self._unconfirmed:
                    self._give_present(name, found.get(name))

    def _remember(self, name: str, last: _Last) -> None:
        self._last[name] = last
        self._last.move_to_end(name)
        if len(self._last) > _MAX_KNOWN:
            forgotten, _ = self._last.popitem(last=False)
            self._unconfirmed.pop(forgotten, None)

    def _give(self, change: RecordChange) -> None:
        self._found.append(change)
        self._news.set()


def _is_below(record: Record | None, last: _Last) -> bool:
    if last.version is None:
        return False
    return record is None or record.version < last.version
