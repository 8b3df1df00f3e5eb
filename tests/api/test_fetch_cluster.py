"""``fetch`` and ``fetch_bulk`` on a cluster, where a record and its lease share a slot."""

from __future__ import annotations

from typing import Any

import pytest

import dscache
from dscache import RecordError
from dscache.core.keys import KeyLayout
from dscache.core.notes import note_of
from tests.conftest import PATIENT
from tests.support.clusters import ClusterGroup

KINDS = pytest.mark.parametrize("kind", ["async", "blocking"])


def config_of(group: ClusterGroup, **options: Any) -> dict[str, Any]:
    node = group.primaries()[0]
    nodes = [{"host": node.host, "port": node.port}]
    return {"name": "redis", "options": {**PATIENT, "nodes": nodes, **options}}


def echo(names: list[str]) -> dict[str, str]:
    return {name: name for name in names}


@pytest.mark.parametrize("name", ["user/1", "}", "}{a", "a}b", "{room}/a", "{{", "é"])
def test_a_note_is_in_the_slot_of_its_record(name: str) -> None:
    layout = KeyLayout("p:", hash_tag=True)
    assert layout.slot(name) == layout.slot(note_of(name)) >= 0
    assert layout.name_of(layout.keys(note_of(name))[0]) == note_of(name)


def test_a_note_is_in_the_slot_of_a_tagged_name() -> None:
    layout = KeyLayout("", hash_tag=False)
    assert layout.slot("{room}/a") == layout.slot(note_of("{room}/a")) >= 0


@KINDS
async def test_on_a_cluster(group: ClusterGroup, backend: str, kind: str) -> None:
    names = [f"fetch-{kind}-{backend}-{i}" for i in range(20)]
    first = "}{" + names[0]
    if kind == "async":
        async with dscache.AsyncCache.from_config(config_of(group)) as cache:
            record = await cache.fetch(first, lambda name: name, ttl=60)
            many = await cache.fetch_bulk(names, echo, ttl=60)
            assert await cache.get_bulk(names) == many
    else:
        with dscache.Cache.from_config(config_of(group)) as blocking:
            record = blocking.fetch(first, lambda name: name, ttl=60)
            many = blocking.fetch_bulk(names, echo, ttl=60)
            assert blocking.get_bulk(names) == many
    assert record is not None
    assert record.data == first
    assert {name: one.data for name, one in many.items()} == echo(names)


async def test_split_records_are_refused(group: ClusterGroup, backend: str) -> None:
    config = config_of(group, keyLayout="deepstream")
    async with dscache.AsyncCache.from_config(config) as cache:
        with pytest.raises(RecordError, match="'split': fetch can't take its lease"):
            await cache.fetch("split", lambda name: name, ttl=60)
        assert await cache.fetch("{tagged}/a", lambda name: name, ttl=60)
