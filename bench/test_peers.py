"""dscache with each core beside redis-py: the same work on the same server.

They run one after the other here; ``compare.py`` interleaves them and prints the ratios.
"""

from __future__ import annotations

import pytest

from conftest import Measure
from workload import RECORDS, Client, from_tasks, repeatedly


@pytest.mark.benchmark(group="await get, one task")
def test_get_sequentially(measure: Measure, client: Client) -> None:
    measure(lambda: from_tasks(client.get, 1, RECORDS))


@pytest.mark.benchmark(group="await get, 100 tasks")
def test_get(measure: Measure, client: Client) -> None:
    measure(lambda: from_tasks(client.get, 100, RECORDS))


@pytest.mark.benchmark(group="await get, 100 tasks, decoded")
def test_get_decoded(measure: Measure, client: Client) -> None:
    measure(lambda: from_tasks(client.get_decoded, 100, RECORDS))


@pytest.mark.benchmark(group="await set, 100 tasks")
def test_set(measure: Measure, client: Client) -> None:
    measure(lambda: from_tasks(client.set, 100, RECORDS))


@pytest.mark.benchmark(group="1,000 names in bulk, raw")
def test_get_bulk(measure: Measure, client: Client) -> None:
    measure(lambda: repeatedly(client.get_bulk, 1))


@pytest.mark.benchmark(group="1,000 names in bulk, decoded")
def test_get_bulk_decoded(measure: Measure, client: Client) -> None:
    measure(lambda: repeatedly(client.get_bulk_decoded, 1))


@pytest.mark.benchmark(group="1,000 records written in bulk")
def test_set_bulk(measure: Measure, client: Client) -> None:
    measure(lambda: repeatedly(client.set_bulk, 1))
