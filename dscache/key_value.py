"""A store for py-key-value on an AsyncCache; requires the extra ``key-value``.

Each value is the data of a record, ``kv/<collection>::<key>``. The record's version holds the time
at which the value expires, for ``ttl``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Self, SupportsFloat

from ._limits import MAX_TTL
from .cache import AsyncCache
from .config import Config, load
from .config.sources import Source
from .core import exact_json
from .core.lifetimes import is_over, rest_of, version_for
from .errors import RecordError, shorten
from .net.credentials import check_provider

try:
    from key_value.aio.errors import DeserializationError, InvalidTTLError, SerializationError
    from key_value.aio.protocols.key_value import (
        AsyncDestroyCollectionProtocol,
        AsyncDestroyStoreProtocol,
        AsyncEnumerateCollectionsProtocol,
        AsyncEnumerateKeysProtocol,
        AsyncKeyValueProtocol,
    )
except ImportError as error:
    raise ImportError(
        "dscache.key_value needs py-key-value-aio; install dscache[key-value]"
    ) from error

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from .core.record import Record

__all__ = ["RecordStore"]

_SEPARATOR: Final = "::"
_MOST_PREFIXES: Final = 10_000
_REMOVED_TOGETHER: Final = 1000
_REMEDY: Final = "convert it to JSON first"


class RecordStore(
    AsyncKeyValueProtocol,
    AsyncEnumerateKeysProtocol,
    AsyncEnumerateCollectionsProtocol,
    AsyncDestroyCollectionProtocol,
    AsyncDestroyStoreProtocol,
):
    """A store of py-key-value that keeps its values in records.

    ``source`` is a configuration or an AsyncCache. With a configuration, the store opens an
    AsyncCache at its first use, and closes it in ``close`` or at the end of ``async with``.
    ``credentials`` and ``options`` are then as for ``AsyncCache.from_config``. An AsyncCache is
    used as it is, and stays open. All names of records begin with ``prefix``.

    Operations raise the errors of AsyncCache. ``put`` and ``put_many`` raise py-key-value's
    SerializationError for a value that JSON can't hold, and its InvalidTTLError for a bad ttl.
    Reads raise its DeserializationError for a record that no store has written.
    """

    def __init__(
        self,
        source: Source | Config | AsyncCache,
        *,
        default_collection: str = "default_collection",
        prefix: str = "kv/",
        credentials: CredentialProvider | None = None,
        **options: Any,
    ) -> None:
        for option, text in (("prefix", prefix), ("default_collection", default_collection)):
            given: object = text
            if not isinstance(given, str):
                raise TypeError(f"{option} must be a str, not {shorten(given)}")
        self.default_collection = default_collection
        self._prefix = prefix
        self._given: AsyncCache | None = None
        self._config: Config | None = None
        if isinstance(source, AsyncCache):
            self._given = source
            if options or credentials is not None:
                raise TypeError("an AsyncCache has its options already; give them to it")
        else:
            check_provider(credentials)
            self._config = load(source, options=options)
        self._credentials = credentials
        self._cache = self._given
        self._prefixes: dict[str | None, str] = {}

    @property
    def records(self) -> AsyncCache:
        """The AsyncCache in use: for metrics, or to wait until it is connected."""
        if self._cache is None:
            assert self._config is not None
            self._cache = AsyncCache(self._config, self._credentials)
        return self._cache

    async def __aenter__(self) -> Self:
        if self._given is None:
            await self.records.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the AsyncCache that the store has opened; the next use opens another."""
        cache = self._cache
        if cache is not None and self._given is None:
            self._cache = None
            await cache.close()

    # -- names

    def _prefix_of(self, collection: str | None) -> str:
        """Return the beginning of the names of a collection."""
        if len(self._prefixes) >= _MOST_PREFIXES:
            self._prefixes.clear()
        # No collection's names may begin with those of another one.
        chosen = collection or self.default_collection
        if not isinstance(chosen, str):
            raise RecordError(f"a collection must be a str, not {shorten(chosen)}", name=chosen)
        shown = chosen.replace("%", "%25").replace(":", "%3A")
        prefix = self._prefixes[collection] = f"{self._prefix}{shown}{_SEPARATOR}"
        return prefix

    def _name(self, collection: str | None, key: str) -> str:
        """Return the name of the record of a key."""
        prefix = None
        if isinstance(collection, str | None):
            prefix = self._prefixes.get(collection)
        prefix = prefix or self._prefix_of(collection)
        if not isinstance(key, str):
            raise RecordError(f"a key must be a str, not {shorten(key)}", name=key)
        return prefix + key

    def _names(self, operation: str, collection: str | None, keys: Sequence[str]) -> list[str]:
        if isinstance(keys, (str, bytes)) or not isinstance(keys, Iterable):
            raise RecordError(f"{operation} takes a list of keys, not {shorten(keys)}")
        return [self._name(collection, key) for key in keys]

    # -- operations

    async def get(self, key: str, *, collection: str | None = None) -> dict[str, Any] | None:
        """Return a value, a dict, or None if there is none."""
        try:
            name = (self._prefixes.get(collection) or self._prefix_of(collection)) + key
        except TypeError:
            name = self._name(collection, key)  # which says what is wrong
        record = await (self._cache or self.records).get(name)
        if record is None or is_over(record.version):
            return None
        data = record.data
        return data if type(data) is dict else _not_a_value(record)

    async def ttl(
        self, key: str, *, collection: str | None = None
    ) -> tuple[dict[str, Any] | None, float | None]:
        """Return a value and the seconds it has left, as a pair.

        The seconds are None for a value that doesn't expire. Both are None if there is no value.
        """
        ((value, rest),) = await self._found("ttl", [key], collection)
        return value, rest

    async def put(
        self,
        key: str,
        value: Mapping[str, Any],
        *,
        collection: str | None = None,
        ttl: SupportsFloat | None = None,
    ) -> None:
        """Store a value for ``ttl`` seconds, or until it is removed."""
        seconds, lifetime = _lifetimes(ttl)
        name = self._name(collection, key)
        version = version_for(seconds)
        await self.records.set(name, version, _encoded(value), ttl=lifetime)

    async def delete(self, key: str, *, collection: str | None = None) -> bool:
        """Remove a value; return whether it existed."""
        return await self.records.delete(self._name(collection, key))

    async def get_many(
        self, keys: Sequence[str], *, collection: str | None = None
    ) -> list[dict[str, Any] | None]:
        """Return the values of keys in their order, read together; None for a missing one."""
        found = await self._found("get_many", keys, collection)
        return [value for value, _ in found]

    async def ttl_many(
        self, keys: Sequence[str], *, collection: str | None = None
    ) -> list[tuple[dict[str, Any] | None, float | None]]:
        """Return the results of ``ttl`` for several keys in their order, read together."""
        return await self._found("ttl_many", keys, collection)

    async def _found(
        self, operation: str, keys: Sequence[str], collection: str | None
    ) -> list[tuple[dict[str, Any] | None, float | None]]:
        names = self._names(operation, collection, keys)
        found = await self.records.get_bulk(names)
        values: list[tuple[dict[str, Any] | None, float | None]] = []
        taken: set[str] = set()
        for name in names:
            record = found.get(name)
            if record is None or is_over(record.version):
                values.append((None, None))
                continue
            rest = rest_of(record.version)
            data = record.data if type(record.data) is dict else _not_a_value(record)
            if name in taken:  # a key was given twice, and each value belongs to the caller alone
                data = record.decode(dict)
            taken.add(name)
            values.append((data, None if rest == math.inf else rest))
        return values

    async def put_many(
        self,
        keys: Sequence[str],
        values: Sequence[Mapping[str, Any]],
        *,
        collection: str | None = None,
        ttl: SupportsFloat | None = None,
    ) -> None:
        """Store values together; each is written atomically, but not all at once.

        Raises ValueError if there are not as many keys as values.
        """
        seconds, lifetime = _lifetimes(ttl)
        names = self._names("put_many", collection, keys)
        if isinstance(values, Mapping) or not isinstance(values, Sequence):
            raise SerializationError(f"put_many takes a list of values, not {shorten(values)}")
        if len(keys) != len(values):
            raise ValueError(f"put_many has {len(keys)} keys and {len(values)} values")
        await self.records.set_bulk(
            {
                name: (version_for(seconds), _encoded(value))
                for name, value in zip(names, values, strict=True)
            },
            ttl=lifetime,
        )

    async def delete_many(self, keys: Sequence[str], *, collection: str | None = None) -> int:
        """Remove values together; return how many existed."""
        return await self.records.delete_bulk(self._names("delete_many", collection, keys))

    # -- enumeration and removal

    async def keys(self, collection: str | None = None, *, limit: int | None = None) -> list[str]:
        """Return the keys of a collection, at most ``limit``, in any order.

        It scans the servers.
        """
        prefix = self._prefix_of(collection)
        # A scan may find a name twice.
        found: dict[str, None] = {}
        if limit is None or limit > 0:
            async for name in self.records.scan(prefix):
                found[name[len(prefix) :]] = None
                if len(found) == limit:
                    break
        return [*found]

    async def collections(self, *, limit: int | None = None) -> list[str]:
        """Return the names of the collections that have keys, at most ``limit``, in any order.

        It scans the servers.
        """
        found: dict[str, None] = {}
        if limit is None or limit > 0:
            async for name in self.records.scan(self._prefix):
                shown, separator, _ = name[len(self._prefix) :].partition(_SEPARATOR)
                if separator:
                    found[shown.replace("%3A", ":").replace("%25", "%")] = None
                if len(found) == limit:
                    break
        return [*found]

    async def destroy_collection(self, collection: str) -> bool:
        """Remove all values of a collection; return whether there were any.

        It scans the servers.
        """
        return await self._remove(self._prefix_of(collection))

    async def destroy(self) -> bool:
        """Remove all values of the store; return whether there were any.

        It scans the servers. Other records remain. Raises ValueError if the store has no prefix.
        """
        if not self._prefix:
            raise ValueError("destroy would remove every record, as the store has no prefix")
        return await self._remove(self._prefix)

    async def _remove(self, prefix: str) -> bool:
        records = self.records
        removed = 0
        names: list[str] = []
        async for name in records.scan(prefix):
            names.append(name)
            if len(names) == _REMOVED_TOGETHER:
                removed += await records.delete_bulk(names)
                names.clear()
        removed += await records.delete_bulk(names)
        return removed > 0


def _lifetimes(ttl: SupportsFloat | None) -> tuple[float, int]:
    """Return the exact lifetime, and that of the record, 0 for ever. Raises InvalidTTLError."""
    if ttl is None:
        return math.inf, 0
    try:
        seconds = math.nan if isinstance(ttl, bool) else float(ttl)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds <= MAX_TTL:
        raise InvalidTTLError(ttl=ttl, extra_info={"type": type(ttl).__name__})
    return seconds, math.ceil(seconds)


def _encoded(value: Mapping[str, Any]) -> Any:
    """Return the JSON text of a value. Raises SerializationError."""
    if not isinstance(value, Mapping):
        raise SerializationError(f"a value must be a mapping, not {shorten(value)}")
    try:
        return exact_json.encode(value if type(value) is dict else dict(value), _REMEDY)
    except TypeError as error:
        raise SerializationError(str(error)) from None


def _not_a_value(record: Record) -> dict[str, Any]:
    """Raise DeserializationError for a record that no store wrote."""
    raise DeserializationError(f"record {shorten(record.name)} has no dict as its data")
