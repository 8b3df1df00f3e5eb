"""The metrics of caches for Prometheus; wants the extra ``prometheus``.

Nothing is counted here: ``stats()`` is asked when Prometheus asks. It may be asked from any thread,
such as that of ``prometheus_client.start_http_server``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ._metrics import NAMESPACE, Sample, counters, gauges

try:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import REGISTRY, Collector, CollectorRegistry
except ImportError as error:
    raise ImportError(
        "dscache.prometheus needs prometheus_client; install dscache[prometheus]"
    ) from error

if TYPE_CHECKING:
    from .cache import AsyncCache
    from .sync import Cache

__all__ = ["CacheCollector", "register"]

_registered: WeakKeyDictionary[CollectorRegistry, CacheCollector] = WeakKeyDictionary()


def register(
    cache: AsyncCache | Cache, name: str = "default", registry: CollectorRegistry = REGISTRY
) -> CacheCollector:
    """Show a cache's metrics in a registry, with the label ``cache`` being its name.

    Several caches of one registry have a name each. Returns the collector that has the cache, for
    ``remove``. Raises ValueError if the registry has a cache of that name already.
    """
    collector = _registered.get(registry)
    if collector is None:
        collector = _registered[registry] = CacheCollector()
        registry.register(collector)
    collector.add(cache, name)
    return collector


class CacheCollector(Collector):
    """A collector of ``prometheus_client`` for some caches, by name."""

    def __init__(self, caches: Mapping[str, AsyncCache | Cache] | None = None) -> None:
        self._caches: dict[str, AsyncCache | Cache] = dict(caches or {})

    def add(self, cache: AsyncCache | Cache, name: str) -> None:
        """Show one more cache. Raises ValueError if there is one of that name."""
        if self._caches.setdefault(name, cache) is not cache:
            raise ValueError(f'there is a cache "{name}" already; give each a name of its own')

    def remove(self, name: str) -> None:
        """Show a cache no more, if there is one of that name."""
        self._caches.pop(name, None)

    def describe(self) -> Iterable[Metric]:
        """Return nothing: which metrics there are depends on the caches."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Return the metrics of all caches as they are now."""
        ready = GaugeMetricFamily(
            f"{NAMESPACE}_ready", "Whether the cache is ready to serve: 1 or 0.", labels=("cache",)
        )
        latency = HistogramMetricFamily(
            f"{NAMESPACE}_operation_duration_seconds",
            "How long operations took, from the call to the answer.",
            labels=("cache", "operation"),
        )
        counted: dict[str, CounterMetricFamily] = {}
        present: dict[str, GaugeMetricFamily] = {}
        for name, cache in list(self._caches.items()):
            ready.add_metric((name,), float(cache.is_ready))
            stats = cache.stats()
            _add(counted, CounterMetricFamily, name, counters(stats))
            _add(present, GaugeMetricFamily, name, gauges(stats))
            if "latency" in stats:
                _add_latency(latency, name, stats["latency"])
        yield from (ready, *present.values(), *counted.values(), latency)


def _add(families: dict[str, Any], kind: Any, cache: str, samples: Iterable[Sample]) -> None:
    for one in samples:
        family = families.get(one.name)
        if family is None:
            labels = ("cache", *one.labels)
            family = families[one.name] = kind(f"{NAMESPACE}_{one.name}", one.text, labels=labels)
        family.add_metric((cache, *one.labels.values()), one.value)


def _add_latency(family: HistogramMetricFamily, cache: str, latency: Mapping[str, Any]) -> None:
    bounds = [*map(_shown, latency["bounds"]), "+Inf"]
    for operation, row in latency["operations"].items():
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip(bounds, row["buckets"], strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric((cache, operation), buckets=buckets, sum_value=row["sum"])


def _shown(bound: float) -> str:
    """Return a bound as Prometheus is used to it: 0.0001, not 1e-04."""
    return f"{bound:.5f}".rstrip("0").removesuffix(".") + (".0" if bound >= 1 else "")
