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
from . import failures
from .condition import ANY, IfVersion
from .keys import KeyLayout
from .markers import Ttl
from .stats import Latencies
from .waiters import Part


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
        return {**counts, "records": records, "latency": self._latencies.stats()}

    # -- operations on one record

    def get(self, name: str) -> Any:
        """Read both keys; the waiter gets the Record, or None."""
        return self._read(name, self._begin(c.READ_KEY, name))

    def read(self, name: str, waiter: Any, kind: int = c.GET) -> None:
        """Read both keys for ``waiter``, which gets the Record or the version, or None."""
        read = self._read if kind == c.GET else self._look
        read(name, self._begin(c.READ_KEY, name, waiter=waiter))

    def head(self, name: str) -> Any:
        """Read the version, and whether there is data; the waiter gets the int, or None."""
        return self._look(name, self._begin(c.READ_KEY, name))

    def set(
        self,
        name: str,
        version: int,
        data: Any,
        ttl: Ttl,
        if_newer: bool,
        if_version: IfVersion = ANY,
    ) -> Any:
        """Write both keys; the waiter gets True. Raises RecordError for a condition."""
        if if_newer or if_version is not ANY:
            raise _unguardable(name)
        number = self._core.check_version(name, version)
        seconds = self._ttl if ttl is None else failures.check_ttl(name, ttl, False)
        text = self._core.encode_data(name, data)
        waiter = self._begin(c.WRITE_KEY, name, len(text))
        return self._write(name, number, text, seconds, waiter)

    def delete(self, name: str, if_version: IfVersion = ANY) -> Any:
        """Remove both keys; the waiter gets whether there were both.

        Raises RecordError for a condition.
        """
        if if_version is not ANY:
            raise _unguardable(name)
        return self._remove(name, self._begin(c.WRITE_KEY, name))

    # -- bulk operations

    def check_bulk(self, kind: int, records: Mapping[str, Any]) -> None:
        """Raise the error that keeps a bulk of split records from being queued.

        RecordError for an option that split records can't have, Overloaded if a node is full.
        """
        if kind in (c.SET_IF_NEWER, c.DELETE_IF):
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

    def _read(self, name: str, waiter: Any) -> Any:
        def record_of(stored: Any, raw: Any) -> Any:
            return self._record(name, stored, raw)

        return self._send(c.READ_KEY, c.GET, name, waiter, record_of, ("GET",), ("GET",))

    def _look(self, name: str, waiter: Any) -> Any:
        def version_of(stored: Any, kind: Any) -> Any:
            record = self._record(name, stored, b"" if kind == c.STRING else None)
            return None if record is None else record.version

        return self._send(c.READ_KEY, c.HEAD, name, waiter, version_of, ("GET",), ("TYPE",))

    def _write(self, name: str, version: int, text: bytes, ttl: int, waiter: Any) -> Any:
        def written(*_replies: Any) -> bool:
            self._counts["writes"] += 1
            return True

        lifetime = ("EX", str(ttl)) if ttl else ()
        commands = (("SET", value, *lifetime) for value in (str(version), text))
        return self._send(c.WRITE_KEY, c.SET, name, waiter, written, *commands)

    def _remove(self, name: str, waiter: Any) -> Any:
        def removed(*replies: Any) -> bool:
            self._counts["deletes"] += 1
            self._counts["halves"] += replies.count(1) == 1
            return replies.count(1) == 2

        return self._send(c.WRITE_KEY, c.SET + 1, name, waiter, removed, ("DEL",), ("DEL",))

    def _begin(self, kind: int, name: str, size: int = 0, waiter: Any = None) -> Any:
        """Count an operation whose two commands are admitted; return its waiter."""
        self._admit(kind, {name: size})
        self._counts["operations"] += 1
        return self._create_waiter() if waiter is None else waiter

    def _send(
        self,
        kind: int,
        row: int,
        name: str,
        waiter: Any,
        finish: Callable[[Any, Any], Any],
        *commands: tuple[Any, ...],
    ) -> Any:
        """Queue a command for each key of an operation, or of a record of a bulk.

        ``commands`` are given without their keys, and ``row`` is that of the latency.
        """
        began = time.monotonic()
        single = type(waiter) is not _OfBulk

        def note(failed: bool) -> None:
            if failed:
                self._counts["failed"] += 1
            elif single:
                self._latencies.add(row, time.monotonic() - began, 1)

        pair = _Pair(waiter, finish, note)
        for key, half, (verb, *rest) in zip(self._keys(name), pair.halves, commands, strict=True):
            self.router.target_of(kind, key).key_command(kind, key, half, verb, key, *rest)
        return waiter

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
            raise failures.damaged_version(name, stored)
        self._counts["hits"] += 1
        return self._core.Record(name, version, raw)


class _Pair:
    """The outcomes of two commands, combined to the outcome of one operation.

    ``note`` is called with whether that is an error.
    """

    def __init__(
        self, waiter: Any, finish: Callable[[Any, Any], Any], note: Callable[[bool], None]
    ) -> None:
        self.halves = (Part(self, 0), Part(self, 1))
        self._replies = [None, None]
        self._errors: dict[int, Exception] = {}
        self._waiter = waiter
        self._finish = finish
        self._note = note
        self._awaited = {0, 1}

    def take(self, half: int, reply: Any) -> None:
        """Add the reply to one of the commands."""
        self._replies[half] = reply
        self._count(half)

    def take_error(self, half: int, error: Exception) -> None:
        """Add the error of one of the commands."""
        self._errors[half] = error
        self._count(half)

    def _count(self, half: int) -> None:
        """Count an outcome; settle the waiter with the second one."""
        self._awaited.discard(half)
        if self._awaited:
            return
        error = self._errors.get(0) or self._errors.get(1)
        with suppress(InvalidStateError):
            if error is None:
                try:
                    result = self._finish(*self._replies)
                except RecordError as damage:
                    error = damage
                else:
                    self._note(False)
                    self._waiter.set_result(result)
                    return
            self._note(True)
            self._waiter.set_exception(error)


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
        "neither if_newer nor if_version can be kept; use keyLayout hashtag, or a name with a hash "
        'tag such as "{room}/a"',
        name=name,
    )
