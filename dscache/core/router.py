"""The choice of a pipeline for each operation on a cluster; the pure twin of ``router.pxi``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from . import constants as c
from . import envelope as e
from .batch import Write
from .condition import ANY, IfVersion, IfVersions, IfVersionsHeld
from .entries import kind_of, make_removals, make_writes, new_bulk, unique
from .keys import slot_of_key
from .markers import Ttl
from .near_cache import PendingRead
from .pipeline import Pipeline
from .record import check_name
from .resp import Encoder


class Router:
    """The operations of a Pipeline, each passed to the pipeline of the node that serves its slot.

    ``owners`` holds the pipeline of each slot, and ``readers`` the pipeline for reads. Both begin
    with ``pipeline`` in every slot, and the caller that knows the nodes updates them. ``apart`` has
    the same operations for records with their two keys in different slots.
    """

    def __init__(
        self,
        create_waiter: Callable[[], Any],
        pipeline: Pipeline,
        apart: Any,
        *,
        key_prefix: str = "",
        hash_tag: bool = False,
    ) -> None:
        self.owners = [pipeline] * c.SLOTS
        self.readers = [pipeline] * c.SLOTS
        self._create_waiter = create_waiter
        self._apart = apart
        self._encoder = Encoder(key_prefix, hash_tag)
        self._split = 0

    # -- operations on one record

    def get(self, name: str) -> Any:
        """Queue a read; its waiter gets the Record, or None."""
        name = check_name(name)
        return self._at(self.readers, name).get(name)

    def head(self, name: str) -> Any:
        """Queue a read of the version; its waiter gets the int, or None."""
        name = check_name(name)
        return self._at(self.readers, name).head(name)

    def set(
        self,
        name: str,
        version: int,
        data: Any,
        ttl: Ttl = None,
        if_newer: bool = False,
        if_version: IfVersion = ANY,
    ) -> Any:
        """Queue a write; its waiter gets True, or False if its condition doesn't hold."""
        name = check_name(name)
        return self._at(self.owners, name).set(name, version, data, ttl, if_newer, if_version)

    def delete(self, name: str, if_version: IfVersion = ANY) -> Any:
        """Queue a removal; its waiter gets whether the record existed."""
        name = check_name(name)
        return self._at(self.owners, name).delete(name, if_version)

    # -- bulk operations

    def get_bulk(self, names: Iterable[str]) -> Any:
        """Queue a read of many records; its waiter gets a dict of the records found."""
        return self._bulk(c.GET, unique("get_bulk", names))

    def head_bulk(self, names: Iterable[str]) -> Any:
        """Queue a read of many versions; its waiter gets a dict of the versions found."""
        return self._bulk(c.HEAD, unique("head_bulk", names))

    def set_bulk(
        self,
        records: Mapping[str, tuple[int, Any]],
        ttl: Ttl = None,
        if_newer: bool = False,
        if_version: IfVersions = ANY,
    ) -> Any:
        """Queue a write of many records; its waiter gets the set of names not written."""
        # All pipelines have the same limits and the same default.
        writes, write_ttl, _ = make_writes(self.owners[0].ttl, records, ttl, if_newer, if_version)
        return self._bulk(kind_of(write_ttl, if_newer or if_version is not ANY), writes)

    def delete_bulk(self, names: Iterable[str], if_version: IfVersionsHeld = ANY) -> Any:
        """Queue a removal of many records; its waiter gets the number of records removed."""
        records = unique("delete_bulk", names)
        if if_version is ANY:
            return self._bulk(c.DELETE, records)
        return self._bulk(c.DELETE_IF, make_removals(records, if_version))

    # -- reads for the near cache

    def read(self, name: str, waiter: Any, kind: int = c.GET) -> None:
        """Queue a GET or HEAD, of which ``waiter`` gets the Record or the version, or None."""
        slot = self._encoder.slot(name)
        if type(waiter) is PendingRead:
            waiter.slot = slot  # for ``fill``
        (self._apart if slot < 0 else self.readers[slot]).read(name, waiter, kind)

    def read_bulk(self, kind: int, names: Iterable[str], waiter: Any) -> None:
        """Queue a GET or HEAD of many records; ``waiter`` gets a dict of all found."""
        self._bulk(kind, dict.fromkeys(names), waiter)

    # -- for callers that know the nodes

    def stats(self) -> dict[str, int]:
        """Return the correction to add to the summed counters of the nodes.

        Each node with a part of a bulk counts one operation, but the bulk is only one.
        """
        return {"operations": -self._split}

    def slot_of(self, name: object) -> int:
        """Return the slot of both keys of a record, or -1 if their slots differ."""
        return self._encoder.slot(check_name(name))

    def target_of(self, kind: int, name: str) -> Pipeline:
        """Return the pipeline for an operation of that kind on a record, or on a key."""
        slot = slot_of_key(name.encode()) if kind >= c.READ_KEY else self._encoder.slot(name)
        return (self.readers if kind in (c.GET, c.HEAD, c.READ_KEY) else self.owners)[slot]

    def publish(self, topic: int | None, opening: bytes, message: Any, sharded: bool) -> Any:
        """Queue a message; its waiter gets the number of connections that Redis sent it to."""
        topic = e.topic_of(message) if topic is None else e.check_topic(topic)
        return self.owners[slot_of_key(b"%d" % topic)].publish(topic, opening, message, sharded)

    def admit_keys(self, kind: int, sizes: Mapping[str, int]) -> None:
        """Raise Overloaded, or another error if a node can't accept commands of these keys.

        ``sizes`` maps each key to the bytes of text to be written to it.
        """
        totals: dict[Pipeline, int] = {}
        for key, size in sizes.items():
            pipeline = self.target_of(kind, key)
            totals[pipeline] = totals.get(pipeline, 0) + size
        for pipeline, total in totals.items():
            pipeline.check_capacity(total)
        for pipeline in totals:
            pipeline.notify_pending()

    def _at(self, pipelines: list[Pipeline], name: str) -> Any:
        """Return the one of the pipelines that serves a record, or ``apart``."""
        slot = self._encoder.slot(name)
        return self._apart if slot < 0 else pipelines[slot]

    def _bulk(self, kind: int, records: dict[str, Any], waiter: Any = None) -> Any:
        pipelines = self.readers if kind <= c.HEAD else self.owners
        parts: dict[Pipeline, dict[str, Any]] = {}
        apart: dict[str, Any] = {}
        for name, entry in records.items():
            slot = self._encoder.slot(name)
            part = apart if slot < 0 else parts.setdefault(pipelines[slot], {})
            part[name] = entry
        if apart:
            self._apart.check_bulk(kind, apart)
        sizes: dict[Pipeline, int] = {}
        for pipeline, part in parts.items():
            # A bulk that one pipeline refuses must not be queued in the others.
            size = sizes[pipeline] = sum(len(w.text) for w in part.values() if type(w) is Write)
            pipeline.check_capacity(size)
        for pipeline in parts:
            pipeline.notify_pending()
        if not records:
            pipelines[0].check_capacity(0)
            pipelines[0].notify_pending()
        if waiter is None:
            waiter = self._create_waiter()
        bulk = new_bulk(kind, records, waiter, shared=True)
        self._split += len(parts) - 1
        if not records:
            waiter.set_result(bulk.result)
        for pipeline, part in parts.items():
            pipeline.add_part(bulk, kind, part, sizes[pipeline])
        for name, entry in apart.items():
            self._apart.join_bulk(bulk, kind, name, entry)
        return waiter
