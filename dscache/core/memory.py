"""The cache ``name: memory``: records in this process, with the API and results of the others.

It is for tests and a first try, and has the life of its cache. Operations take effect at
the call, so that their order is the order of the calls. Their futures are done already.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from .. import _backend
from . import constants, failures
from . import stats as counters
from .condition import (
    ANY,
    IfVersion,
    IfVersions,
    IfVersionsHeld,
    check_many,
    check_one,
    expected_of,
    guard_of,
    guard_of_removal,
)
from .markers import Ttl

NO_CONNECTIONS: Final = {
    **dict.fromkeys(("connections", "connects", "reconnections", "redirections"), 0),
    "last_loss": "",
}


class MemoryPipeline:
    """The operations of a Pipeline on a dict. ``ttl`` is the default lifetime in seconds."""

    def __init__(
        self,
        create_waiter: Callable[[], Any],
        wake: Callable[[], object],
        ttl: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.closed = False
        self._core = _backend.core
        self._create_waiter = create_waiter
        self._wake = wake
        self._ttl = ttl or 0
        self._clock = clock
        # name → (version, JSON text, when it expires or infinity)
        self._records: dict[str, tuple[int, bytes, float]] = {}
        self._expiries: list[tuple[float, str]] = []
        self._counts = dict.fromkeys(counters.NAMES, 0)
        self._listeners: tuple[Callable[[Iterable[str]], object], ...] = ()

    def get(self, name: str) -> Any:
        """Return a done waiter with the Record, or None."""
        return self._done(self._read(self._checked(name)))

    def read(self, name: str, waiter: Any) -> None:
        """Give ``waiter`` the Record, or None."""
        self._done(self._read(self._checked(name)), waiter)

    def head(self, name: str) -> Any:
        """Return a done waiter with the version, or None."""
        record = self._read(self._checked(name))
        return self._done(None if record is None else record.version)

    def set(
        self,
        name: str,
        version: int,
        data: Any,
        ttl: Ttl = None,
        if_newer: bool = False,
        if_version: IfVersion = ANY,
    ) -> Any:
        """Write; return a done waiter with True, or False if its condition doesn't hold."""
        name = self._checked(name)
        conditional = bool(if_newer) or if_version is not ANY
        content = self._content(name, version, data, ttl, conditional)
        if if_version is not ANY:
            check_one(name, if_newer)
            guard_of(name, if_version)
        return self._done(self._write(name, *content, if_newer, if_version))

    def delete(self, name: str, if_version: IfVersion = ANY) -> Any:
        """Remove; return a done waiter with whether there was such a record, of that version."""
        name = self._checked(name)
        if if_version is not ANY:
            guard_of_removal(name, if_version)
        return self._done(self._remove(name, if_version))

    def get_bulk(self, names: Iterable[str]) -> Any:
        """Return a done waiter with a dict of the records found."""
        return self._done(self._found("get_bulk", names))

    def read_bulk(self, kind: int, names: Iterable[str], waiter: Any) -> None:
        """Give ``waiter`` a dict of the records found; ``kind`` is GET."""
        self._done(self._found(f"{constants.OPERATIONS[kind]}_bulk", names), waiter)

    def head_bulk(self, names: Iterable[str]) -> Any:
        """Return a done waiter with a dict of the versions found."""
        found = self._found("head_bulk", names)
        return self._done({name: record.version for name, record in found.items()})

    def set_bulk(
        self,
        records: Mapping[str, tuple[int, Any]],
        ttl: Ttl = None,
        if_newer: bool = False,
        if_version: IfVersions = ANY,
    ) -> Any:
        """Write many; return a done waiter with the set of names not written."""
        self._use()
        if not isinstance(records, Mapping):
            raise failures.bad_records(records)
        if if_version is not ANY:
            check_many("set_bulk", if_newer, if_version)
        conditional = bool(if_newer) or if_version is not ANY
        contents: dict[str, tuple[int, bytes, int, bool, IfVersion]] = {}
        for given, pair in records.items():
            name = self._core.check_name(given)
            try:
                version, data = pair
            except (TypeError, ValueError):
                raise failures.bad_pair(name, pair) from None
            expected: IfVersion = ANY
            if if_version is not ANY:
                expected = expected_of("set_bulk", name, if_version)
            content = self._content(name, version, data, ttl, conditional)
            if expected is not ANY:
                guard_of(name, expected)
            contents[name] = *content, if_newer, expected
        written = {name: self._write(name, *it) for name, it in contents.items()}
        return self._done({name for name, done in written.items() if not done})

    def delete_bulk(self, names: Iterable[str], if_version: IfVersionsHeld = ANY) -> Any:
        """Remove many; return a done waiter with how many were removed."""
        expected: dict[str, IfVersion] = dict.fromkeys(self._checked_all("delete_bulk", names), ANY)
        if if_version is not ANY:
            check_many("delete_bulk", False, if_version)
            for name in expected:
                expected[name] = expected_of("delete_bulk", name, if_version)
                guard_of_removal(name, expected[name])
        return self._done(sum(self._remove(*each) for each in expected.items()))

    def names(self) -> list[str]:
        """Return the names of all records, in no order."""
        self._use()
        now = self._clock()
        return [name for name, (_, _, expiry) in list(self._records.items()) if expiry > now]

    def seconds_to_expiry(self) -> float | None:
        """Return the seconds until the next record may end; None without any that does."""
        return max(0.0, self._expiries[0][0] - self._clock()) if self._expiries else None

    def expire(self) -> None:
        """Remove the records that have ended, and tell the listeners."""
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            self._stored(heapq.heappop(self._expiries)[1])

    def listen(self, listener: Callable[[Iterable[str]], object]) -> None:
        """Have a function called with the names of records that change; it must not block."""
        self._listeners = (*self._listeners, listener)

    def forget(self, listener: Callable[[Iterable[str]], object]) -> None:
        """Remove a listener; does nothing if it isn't there."""
        self._listeners = tuple(one for one in self._listeners if one != listener)

    def _tell(self, name: str) -> None:
        # A finalizer may remove a listener meanwhile. The others hear of the change all the same.
        for listener in self._listeners:
            listener((name,))

    def stats(self) -> dict[str, Any]:
        """Return the counters of a Pipeline; the counters of traffic stay zero."""
        counts = self._counts
        records = counts["reads"] + counts["writes"] + counts["not_newer"] + counts["deletes"]
        return counters.merged([{**counts, "records": records}])

    def check_open(self) -> None:
        """Raise UsageError if it was closed."""
        if self.closed:
            raise failures.closed("cache")

    def close(self) -> None:
        """Forget all records."""
        self.closed = True
        self._records.clear()
        self._expiries.clear()

    # -- arguments

    def _use(self) -> None:
        self._wake()
        self.check_open()

    def _checked(self, name: object) -> str:
        self._use()
        checked: str = self._core.check_name(name)
        return checked

    def _checked_all(self, operation: str, names: Iterable[str]) -> dict[str, None]:
        self._use()
        if isinstance(names, (str, bytes)):
            raise failures.bad_names(operation, names)
        return dict.fromkeys(map(self._core.check_name, names))

    def _content(
        self, name: str, version: object, data: object, ttl: Ttl, conditional: bool
    ) -> tuple[int, bytes, int]:
        number = self._core.check_version(name, version)
        seconds = self._ttl if ttl is None else failures.check_ttl(name, ttl, conditional)
        return number, self._core.encode_data(name, data), seconds

    # -- the records

    def _done(self, result: object, waiter: Any = None) -> Any:
        self._counts["operations"] += 1
        if waiter is None:
            waiter = self._create_waiter()
        waiter.set_result(result)
        return waiter

    def _stored(self, name: str) -> tuple[int, bytes, float] | None:
        record = self._records.get(name)
        if record is not None and record[2] <= self._clock():
            del self._records[name]
            self._tell(name)
            return None
        return record

    def _read(self, name: str) -> Any:
        self._counts["reads"] += 1
        record = self._stored(name)
        if record is None:
            self._counts["misses"] += 1
            return None
        self._counts["hits"] += 1
        return self._core.Record(name, record[0], record[1])

    def _found(self, operation: str, names: Iterable[str]) -> dict[str, Any]:
        records = {name: self._read(name) for name in self._checked_all(operation, names)}
        return {name: record for name, record in records.items() if record is not None}

    def _write(
        self,
        name: str,
        version: int,
        text: bytes,
        ttl: int,
        if_newer: bool,
        if_version: IfVersion,
    ) -> bool:
        if if_newer:
            stored = self._stored(name)
            if stored is not None and stored[0] >= version:
                self._counts["not_newer"] += 1
                return False
        elif not self._holds(name, if_version):
            return False
        expiry = self._expiry(name, ttl)
        self._records[name] = (version, text, expiry)
        if ttl > 0:
            heapq.heappush(self._expiries, (expiry, name))
        self.expire()
        self._counts["writes"] += 1
        self._tell(name)
        return True

    def _expiry(self, name: str, ttl: int) -> float:
        """Return when a record is to end that is written now; ``ttl`` is in seconds or KEPT_TTL."""
        if ttl == constants.KEPT_TTL:
            stored = self._stored(name)
            return float("inf") if stored is None else stored[2]
        return self._clock() + ttl if ttl else float("inf")

    def _holds(self, name: str, if_version: IfVersion) -> bool:
        """Return whether a condition holds, and count it if it doesn't."""
        if if_version is ANY:
            return True
        stored = self._stored(name)
        if if_version == (None if stored is None else stored[0]):
            return True
        self._counts["not_newer"] += 1
        return False

    def _remove(self, name: str, if_version: IfVersion) -> bool:
        if not self._holds(name, if_version):
            return False
        self._counts["deletes"] += 1
        self._stored(name)  # drops an expired record
        existed = self._records.pop(name, None) is not None
        if existed:
            self._tell(name)
        return existed
