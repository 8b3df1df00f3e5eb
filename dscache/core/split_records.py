"""Records whose two keys lie in different slots of a cluster, and so on different nodes.

That is every record under deepstream's own key layout, unless its name has a hash tag. Each key
is read and written by a command of its own, so that nothing here is atomic: a reader may see the
version of one write and the data of another. Both cores use this module; it is off the hot path.
"""

from __future__ import annotations

import time
from asyncio import InvalidStateError
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ..errors import RecordError, shorten
from . import constants as c
from .keys import KeyLayout
from .latency import Latencies


class SplitRecords:
    """The operations of a Router, for records that lie apart.

    ``router`` is set after construction, since each needs the other.
    """

    router: Any

    def __init__(
        self, core: Any, create_waiter: Callable[[], Any], *, key_prefix: str = "", ttl: int = 0
    ) -> None:
        self._core = core
        self._create_waiter = create_waiter
        self._layout = KeyLayout(key_prefix, hash_tag=False)
        self._ttl = ttl
        names = ("operations", "reads", "hits", "misses", "halves", "damaged", "writes", "deletes")
        self._counts = dict.fromkeys((*names, "failed"), 0)
        self._latencies = Latencies()

    def stats(self) -> dict[str, Any]:
        """Return the counters that a Pipeline has for the records of its own commands."""
        counts = self._counts
        records = counts["reads"] + counts["writes"] + counts["deletes"]
        return {**counts, "records": records, "latency": self._latencies.told()}

    # -- operations on one record

    def get(self, name: str) -> Any:
        """Read both keys; the waiter gets the Record, or None."""
        self._admit(c.READ_KEY, {name: 0})
        waiter = self._new_waiter()
        self._read(name, waiter)
        return waiter

    def read(self, name: str, waiter: Any) -> None:
        """Read both keys for ``waiter``, which gets the Record, or None."""
        self._admit(c.READ_KEY, {name: 0})
        self._counts["operations"] += 1
        self._read(name, waiter)

    def head(self, name: str) -> Any:
        """Read the version, and whether there is data; the waiter gets the int, or None."""
        self._admit(c.READ_KEY, {name: 0})
        waiter = self._new_waiter()
        self._look(name, waiter)
        return waiter

    def set(self, name: str, version: int, data: Any, ttl: int | None, if_newer: bool) -> Any:
        """Write both keys; the waiter gets True. Raises RecordError if it is to be guarded."""
        if if_newer:
            raise _unguardable(name)
        number = self._core.check_version(name, version)
        seconds = self._ttl if ttl is None else c.check_ttl(name, ttl)
        text = self._core.encode_data(name, data)
        self._admit(c.WRITE_KEY, {name: len(text)})
        waiter = self._new_waiter()
        self._write(name, number, text, seconds, waiter)
        return waiter

    def delete(self, name: str) -> Any:
        """Remove both keys; the waiter gets whether there were both."""
        self._admit(c.WRITE_KEY, {name: 0})
        waiter = self._new_waiter()
        self._remove(name, waiter)
        return waiter

    # -- bulk operations

    def check_bulk(self, kind: int, records: Mapping[str, Any]) -> None:
        """Raise the error that keeps a bulk of split records from being queued.

        RecordError for an option that split records can't have, Overloaded if a node is full.
        """
        if kind == c.SET_IF_NEWER:
            raise _unguardable(next(iter(records)))
        sizes = {name: len(w.text) if kind >= c.SET and w else 0 for name, w in records.items()}
        self._admit(c.READ_KEY if kind <= c.HEAD else c.WRITE_KEY, sizes)

    def join_bulk(self, bulk: Any, kind: int, name: str, write: Any) -> None:
        """Do one record's part of a bulk."""
        waiter = _OfBulk(bulk, kind, name)
        if kind == c.GET:
            self._read(name, waiter)
        elif kind == c.HEAD:
            self._look(name, waiter)
        elif kind == c.DELETE:
            self._remove(name, waiter)
        else:
            self._write(name, write.version, write.text, write.ttl, waiter)

    # -- both halves

    def _read(self, name: str, waiter: Any) -> None:
        pair = self._pair(c.GET, waiter, lambda stored, raw: self._record(name, stored, raw))
        version_key, data_key = self._keys(name)
        self.router.key_command(c.READ_KEY, version_key, pair.first, "GET", version_key)
        self.router.key_command(c.READ_KEY, data_key, pair.second, "GET", data_key)

    def _look(self, name: str, waiter: Any) -> None:
        def version_of(stored: Any, kind: Any) -> Any:
            record = self._record(name, stored, b"" if kind == c.STRING else None)
            return None if record is None else record.version

        pair = self._pair(c.HEAD, waiter, version_of)
        version_key, data_key = self._keys(name)
        self.router.key_command(c.READ_KEY, version_key, pair.first, "GET", version_key)
        self.router.key_command(c.READ_KEY, data_key, pair.second, "TYPE", data_key)

    def _write(self, name: str, version: int, text: bytes, ttl: int, waiter: Any) -> None:
        def written(*_replies: Any) -> bool:
            self._counts["writes"] += 1
            return True

        pair = self._pair(c.SET, waiter, written)
        lifetime = ("EX", str(ttl)) if ttl else ()
        for key, half, value in zip(
            self._keys(name), (pair.first, pair.second), (str(version), text), strict=True
        ):
            self.router.key_command(c.WRITE_KEY, key, half, "SET", key, value, *lifetime)

    def _remove(self, name: str, waiter: Any) -> None:
        def removed(*replies: Any) -> bool:
            self._counts["deletes"] += 1
            self._counts["halves"] += replies.count(1) == 1
            return replies.count(1) == 2

        pair = self._pair(c.SET + 1, waiter, removed)
        for key, half in zip(self._keys(name), (pair.first, pair.second), strict=True):
            self.router.key_command(c.WRITE_KEY, key, half, "DEL", key)

    def _new_waiter(self) -> Any:
        self._counts["operations"] += 1
        return self._create_waiter()

    def _pair(self, row: int, waiter: Any, finish: Callable[[Any, Any], Any]) -> _Pair:
        """Return the waiters of the two commands of an operation, or of a record of a bulk."""
        began = time.monotonic()
        single = type(waiter) is not _OfBulk

        def note(failed: bool) -> None:
            if failed:
                self._counts["failed"] += 1
            elif single:
                self._latencies.add(row, time.monotonic() - began, 1)

        return _Pair(waiter, finish, note)

    def _admit(self, kind: int, sizes: Mapping[str, int]) -> None:
        """Let no half of a record be under way where the other is refused."""
        of_keys: dict[str, int] = {}
        for name, size in sizes.items():
            version_key, data_key = self._keys(name)
            of_keys |= {version_key: 0, data_key: size}
        self.router.admit_keys(kind, of_keys)

    def _keys(self, name: str) -> tuple[str, str]:
        version_key, data_key = self._layout.keys(name)
        return version_key.decode(), data_key.decode()

    def _record(self, name: str, stored: Any, raw: Any) -> Any:
        """Return the record that two replies make, or None; raises RecordError."""
        self._counts["reads"] += 1
        if stored is None or raw is None:
            self._counts["misses"] += 1
            self._counts["halves"] += stored is not raw
            return None
        version = self._core.parse_version(stored)
        if version < 0:
            self._counts["damaged"] += 1
            raise c.damaged_version(name, stored)
        self._counts["hits"] += 1
        return self._core.Record(name, version, raw)


class _Pair:
    """The waiters of two commands, and the combination of their replies.

    ``note`` is told whether that is an error.
    """

    def __init__(
        self, waiter: Any, finish: Callable[[Any, Any], Any], note: Callable[[bool], None]
    ) -> None:
        self.first = _Half(self)
        self.second = _Half(self)
        self._waiter = waiter
        self._finish = finish
        self._note = note
        self._missing = 2

    def come(self, again: bool) -> None:
        """Note that one of the two has its outcome; with the other, tell the waiter."""
        self._missing -= not again
        if self._missing:
            return
        error = self.first.error or self.second.error
        with suppress(InvalidStateError):
            if error is None:
                try:
                    result = self._finish(self.first.reply, self.second.reply)
                except RecordError as damage:
                    error = damage
                else:
                    self._note(False)
                    self._waiter.set_result(result)
                    return
            self._note(True)
            self._waiter.set_exception(error)


class _Half:
    """The waiter of one of two commands."""

    def __init__(self, pair: _Pair) -> None:
        self._pair = pair
        self.reply: Any = None
        self.error: Exception | None = None
        self._has_come = False

    def set_result(self, reply: Any, /) -> None:
        self.reply = reply
        self._come()

    def set_exception(self, error: Exception, /) -> None:
        self.error = error
        self._come()

    def _come(self) -> None:
        # It comes once more if whatever followed the first time has failed.
        again, self._has_come = self._has_come, True
        self._pair.come(again)


class _OfBulk:
    """The waiter of one record of a bulk."""

    def __init__(self, bulk: Any, kind: int, name: str) -> None:
        self._bulk = bulk
        self._kind = kind
        self._name = name

    def set_result(self, result: Any, /) -> None:
        self._bulk.take(self._kind, self._name, result)

    def set_exception(self, error: Exception, /) -> None:
        self._bulk.take_error(self._kind, self._name, error)


def _unguardable(name: str) -> RecordError:
    return RecordError(
        f"record {shorten(name)}: its two keys lie on different nodes of the cluster, where "
        "if_newer can't be kept; use keyLayout hashtag, or a name with a hash tag such as "
        '"{room}/a"',
        name=name,
    )
