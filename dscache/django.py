"""A cache backend for Django; requires the extra ``django``.

Each value is the data of a record. The record's version holds the time at which the value expires,
so that ``incr`` keeps that time. It also holds random bits, so that no write is mistaken for an
earlier one.
"""

from __future__ import annotations

import base64
import math
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol, TypeVar

import msgspec

from . import sync
from .config import load
from .core import exact_json
from .core.changes import Successor
from .core.keys import common_prefix
from .core.lifetimes import rest_of, version_for
from .core.markers import OMITTED
from .errors import ConfigError, RecordError, RecordMissing, shorten

try:
    from asgiref.sync import sync_to_async
    from django.core.cache.backends.base import DEFAULT_TIMEOUT, BaseCache
    from django.core.exceptions import ImproperlyConfigured
    from django.utils.module_loading import import_string
except ImportError as error:
    raise ImportError("dscache.django needs Django; install dscache[django]") from error

__all__ = ["JSONSerializer", "PickleSerializer", "RecordCache", "Serializer", "close_all"]

T = TypeVar("T")


def __getattr__(name: str) -> Any:
    # Django shows the text of an ImportError, but of no AttributeError.
    if name == "Cache":
        raise ImportError("write BACKEND: dscache.django.RecordCache")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# -- values


class Serializer(Protocol):
    """The interface of a serializer: makes JSON data of values, and values of JSON data."""

    def dumps(self, value: Any) -> Any:
        """Return a value that msgspec encodes as JSON."""

    def loads(self, data: Any) -> Any:
        """Return the value for decoded JSON data."""


class JSONSerializer:
    """A serializer of values that JSON can hold; a tuple comes back as a list."""

    def dumps(self, value: Any) -> Any:
        """Return the JSON text of a value. Raises TypeError if it would come back changed."""
        return exact_json.encode(value, _REMEDY)

    def loads(self, data: Any) -> Any:
        """Return the data as it is."""
        return data


class PickleSerializer:
    """A serializer of any value that can be pickled, as in Django's own backends.

    Integers are stored as JSON numbers. A program that can write to the Redis can run code in every
    process that unpickles its values.
    """

    def __init__(self, protocol: int = pickle.HIGHEST_PROTOCOL) -> None:
        self._protocol = protocol

    def dumps(self, value: Any) -> Any:
        """Return an integer as it is, and base64 of the pickle of any other value."""
        if type(value) is int:
            return value
        return base64.b64encode(pickle.dumps(value, self._protocol)).decode()

    def loads(self, data: Any) -> Any:
        """Return the value that was pickled, or the number."""
        if isinstance(data, str):
            return pickle.loads(base64.b64decode(data))
        return data


_SERIALIZERS: Final[dict[str, Callable[[], Serializer]]] = {
    "json": JSONSerializer,
    "pickle": PickleSerializer,
}
_REMEDY: Final = 'convert it, or choose OPTIONS: {"SERIALIZER": "pickle"}'


# -- the cache


class _Entries(sync.Cache):
    """A Cache that also changes a record under a version of the caller's choice."""

    def change(
        self, name: str, change: Callable[[Any], Any], successor: Successor, type: Any = None
    ) -> None:
        """Change the data of a record; raises RecordMissing if it doesn't exist."""
        run = self._changing_run()
        self._changes.apply(
            run, "update", name, change, OMITTED, None, type=type, successor=successor
        )


# Django makes a backend for each thread or task; those of equal settings share a cache.
_shared: dict[str, _Entries] = {}


def close_all() -> None:
    """Close the connections of all Django caches; each opens new ones at its next use."""
    while _shared:
        _, entries = _shared.popitem()
        entries.close()


class RecordCache(BaseCache):  # type: ignore[misc] # Django has no types
    """A cache backend for Django on a blocking Cache, shared by all threads of the process.

    LOCATION is a URL, ``host:port``, the path of a configuration file, or a mapping. OPTIONS are
    the options of dscache, such as ``nearCache``, and ``SERIALIZER``. SERIALIZER is "json",
    "pickle", a class with ``dumps`` and ``loads``, or the dotted path of such a class. Timeouts are
    in seconds.

    Operations raise the errors of Cache, and TypeError for a value that the serializer refuses. Bad
    settings raise ImproperlyConfigured.
    """

    def __init__(self, location: Any, params: Mapping[str, Any]) -> None:
        super().__init__(params)
        options = dict(params.get("OPTIONS") or {})
        for unused in ("MAX_ENTRIES", "CULL_FREQUENCY"):  # Redis evicts by itself
            options.pop(unused, None)
        self._serializer = _serializer_of(options.pop("SERIALIZER", "json"))
        if "ttl" in options:
            raise ImproperlyConfigured(
                "CACHES: OPTIONS has ttl; set TIMEOUT beside OPTIONS instead"
            )
        self._location = location
        self._options = options
        self._key = repr((location, sorted(options.items())))
        # Django makes a backend for each request in some servers. A file is read once.
        if self._key not in _shared:
            self._open()

    def _open(self) -> _Entries:
        source = self._location
        if not isinstance(source, str | os.PathLike | Mapping):
            remedy = "name the nodes of a cluster in OPTIONS, as nodes"
            if source is None:
                remedy = "is the variable set that it comes from?"
            raise ImproperlyConfigured(
                f"CACHES: LOCATION must be a URL, a path or a mapping, not {shorten(source)}; "
                f"{remedy}"
            )
        if not source:
            source = {"name": "redis", "options": {}}
        options = dict(self._options)
        credentials = options.pop("credentials", None)
        try:
            made = _Entries(load(source, options=options), credentials)
        except ConfigError as error:
            raise ImproperlyConfigured(f"CACHES: {error}") from error
        # Of two threads that get here at a time, one has made a cache that is never opened.
        return _shared.setdefault(self._key, made)

    @property
    def records(self) -> sync.Cache:
        """The Cache in use: for metrics, or to wait until it is connected."""
        return self._entries

    @property
    def _entries(self) -> _Entries:
        return _shared.get(self._key) or self._open()

    def get_backend_timeout(self, timeout: Any = DEFAULT_TIMEOUT) -> int | None:
        """Return a timeout as whole seconds: 0 for ever, None for a value never to be found."""
        if timeout == DEFAULT_TIMEOUT:
            timeout = self.default_timeout
        if timeout is None:
            return 0
        try:
            seconds = math.ceil(timeout)
        except (TypeError, ValueError, OverflowError):
            raise RecordError(
                f"timeout must be a number of seconds, or None for ever, not {shorten(timeout)}"
            ) from None
        return seconds if timeout > 0 else None

    def add(
        self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> bool:
        """Store a value if there is none, in one atomic step; return whether it was stored."""
        name = self.make_and_validate_key(key, version=version)
        data = self._serializer.dumps(value)
        ttl = self.get_backend_timeout(timeout)
        if ttl is None:
            return self._entries.head(name) is None
        return self._entries.set(name, _version_of(ttl), data, ttl=ttl, if_version=None)

    def get(self, key: str, default: Any = None, version: int | None = None) -> Any:
        """Return a value, or the default."""
        record = self._entries.get(self.make_and_validate_key(key, version=version))
        return default if record is None else self._serializer.loads(record.data)

    def set(
        self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> None:
        """Store a value; a timeout of 0 or less removes it."""
        name = self.make_and_validate_key(key, version=version)
        data = self._serializer.dumps(value)
        ttl = self.get_backend_timeout(timeout)
        if ttl is None:
            self._entries.delete(name)
        else:
            self._entries.set(name, _version_of(ttl), data, ttl=ttl)

    def touch(self, key: str, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """Give a value a new timeout, in one atomic step; return whether it exists."""
        name = self.make_and_validate_key(key, version=version)
        ttl = self.get_backend_timeout(timeout)
        if ttl is None:
            return self._entries.delete(name)
        try:
            self._entries.change(
                name, lambda raw: raw, lambda _: (_version_of(ttl), ttl), msgspec.Raw
            )
        except RecordMissing:
            return False
        return True

    def delete(self, key: str, version: int | None = None) -> bool:
        """Remove a value; return whether it existed."""
        return self._entries.delete(self.make_and_validate_key(key, version=version))

    def get_many(self, keys: Iterable[str], version: int | None = None) -> dict[str, Any]:
        """Return a dict of the values found by key, read together."""
        by_name = {self.make_and_validate_key(key, version=version): key for key in keys}
        found = self._entries.get_bulk(by_name)
        loads = self._serializer.loads
        return {by_name[name]: loads(record.data) for name, record in found.items()}

    def set_many(
        self,
        data: Mapping[str, Any],
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
    ) -> list[str]:
        """Store values together, and return an empty list.

        Raises BulkError if some values can't be written; the others are written.
        """
        ttl = self.get_backend_timeout(timeout)
        values = {
            self.make_and_validate_key(key, version=version): self._serializer.dumps(value)
            for key, value in data.items()
        }
        if ttl is None:
            self._entries.delete_bulk(values)
        elif values:
            self._entries.set_bulk(
                {name: (_version_of(ttl), value) for name, value in values.items()}, ttl=ttl
            )
        return []

    def delete_many(self, keys: Iterable[str], version: int | None = None) -> None:
        """Remove values together."""
        self._entries.delete_bulk(
            [self.make_and_validate_key(key, version=version) for key in keys]
        )

    def has_key(self, key: str, version: int | None = None) -> bool:
        """Return whether there is a value."""
        return self._entries.head(self.make_and_validate_key(key, version=version)) is not None

    def incr(self, key: str, delta: Any = 1, version: int | None = None) -> Any:
        """Add to a value in one atomic step, and return the sum; its timeout remains.

        Raises ValueError if there is no value, and TypeError if it isn't a number.
        """
        name = self.make_and_validate_key(key, version=version)
        result: Any = None

        def changed(data: Any) -> Any:
            nonlocal result
            result = self._serializer.loads(data) + delta
            return self._serializer.dumps(result)

        try:
            self._entries.change(name, changed, self._successor)
        except RecordMissing:
            raise ValueError(f"Key {key!r} not found") from None
        return result

    def _successor(self, record: Any) -> tuple[int, int | None]:
        """Return the next version and the rest of the lifetime."""
        rest = rest_of(record.version)
        if rest is None:
            ttl = self.get_backend_timeout()
            return record.version + 1, 1 if ttl is None else ttl
        return record.version + 1, 0 if rest == math.inf else max(1, math.ceil(rest))

    def clear(self) -> None:
        """Remove the values of this KEY_PREFIX, in all versions; other records remain.

        Raises ImproperlyConfigured if a KEY_FUNCTION gives names that have no common beginning, or
        one that doesn't depend on KEY_PREFIX although the names do.
        """
        samples = [self.key_func(key, self.key_prefix, of) for key, of in (("a", "0"), ("b", "1"))]
        prefix = common_prefix(samples)
        if not prefix:
            raise ImproperlyConfigured(
                "CACHES: clear() would remove every record, as the names of KEY_FUNCTION have no "
                "common beginning; let them begin with KEY_PREFIX"
            )
        other = self.key_func("a", f"-{self.key_prefix}", "0")
        if self.key_prefix and samples[0] != other and other.startswith(prefix):
            raise ImproperlyConfigured(
                f"CACHES: clear() would remove every record below {shorten(prefix)}, also of other "
                "KEY_PREFIXes, as the names of KEY_FUNCTION have no other common beginning; let "
                "them begin with KEY_PREFIX"
            )
        entries = self._entries
        names: list[str] = []
        with entries.scan(prefix) as scan:
            for name in scan:
                names.append(name)
                if len(names) == _CLEARED_TOGETHER:
                    entries.delete_bulk(names)
                    names.clear()
        entries.delete_bulk(names)

    # Django's own forms of these run a thread for each key, in turns with its views, or aren't
    # atomic. A Cache takes calls from any thread.

    async def aadd(
        self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> bool:
        return await _in_thread(self.add, key, value, timeout, version)

    async def aget(self, key: str, default: Any = None, version: int | None = None) -> Any:
        return await _in_thread(self.get, key, default, version)

    async def aset(
        self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> None:
        await _in_thread(self.set, key, value, timeout, version)

    async def atouch(
        self, key: str, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> bool:
        return await _in_thread(self.touch, key, timeout, version)

    async def adelete(self, key: str, version: int | None = None) -> bool:
        return await _in_thread(self.delete, key, version)

    async def aget_many(self, keys: Iterable[str], version: int | None = None) -> dict[str, Any]:
        return await _in_thread(self.get_many, keys, version)

    async def aset_many(
        self,
        data: Mapping[str, Any],
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
    ) -> list[str]:
        return await _in_thread(self.set_many, data, timeout, version)

    async def adelete_many(self, keys: Iterable[str], version: int | None = None) -> None:
        await _in_thread(self.delete_many, keys, version)

    async def ahas_key(self, key: str, version: int | None = None) -> bool:
        return await _in_thread(self.has_key, key, version)

    async def aincr(self, key: str, delta: Any = 1, version: int | None = None) -> Any:
        return await _in_thread(self.incr, key, delta, version)

    async def aclear(self) -> None:
        await _in_thread(self.clear)


_CLEARED_TOGETHER: Final = 1000


def _version_of(ttl: int) -> int:
    return version_for(ttl or math.inf)


async def _in_thread(call: Callable[..., T], *arguments: Any) -> T:
    found: T = await sync_to_async(call, thread_sensitive=False)(*arguments)
    return found


def _serializer_of(option: Any) -> Serializer:
    """Return the serializer that an option names. Raises ImproperlyConfigured."""
    made = option
    if isinstance(option, str):
        try:
            made = _SERIALIZERS.get(option) or import_string(option)
        except ImportError as error:
            raise ImproperlyConfigured(
                f'CACHES: SERIALIZER must be "json", "pickle" or the path of a class: {error}'
            ) from error
    serializer: Serializer = made() if callable(made) else made
    if not all(callable(getattr(serializer, name, None)) for name in ("dumps", "loads")):
        raise ImproperlyConfigured(
            f"CACHES: SERIALIZER {shorten(option)} has no methods dumps and loads"
        )
    return serializer
