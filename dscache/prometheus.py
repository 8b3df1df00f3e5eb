"""Metrics of caches for Prometheus; requires the extra ``prometheus``.

An operation costs nothing more: each scrape calls ``stats()``. A scrape may come from any thread,
such as the one of ``prometheus_client.start_http_server``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from . import _backend
from ._cache import check_cache, check_label
from ._metrics import NAMESPACE, counters, gauges
from ._version import __version__

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
    """Export a cache's metrics in a registry, with the label ``cache`` set to ``name``.

    Each cache of a registry needs its own name. Returns the registry's CacheCollector. Its
    ``remove(name)`` ends the export. Raises TypeError if ``cache`` isn't a cache, and ValueError if
    another cache has that name.
    """
    check_cache("register", cache)
    check_label("register", name, "registry")
    if not isinstance(registry, CollectorRegistry):
        raise TypeError(
            f"register: registry must be a CollectorRegistry, not {type(registry).__name__}"
        )
    collector = _registered.get(registry)
    if collector is None or not _is_in(registry, collector):
        collector = _registered[registry] = CacheCollector()
        registry.register(collector)
    collector.add(cache, name)
    return collector


def _is_in(registry: CollectorRegistry, collector: CacheCollector) -> bool:
    """Return whether a registry still has a collector: a program may have unregistered it."""
    # No public method tells.
    return collector in getattr(registry, "_collector_to_names", (collector,))


class CacheCollector(Collector):
    """A ``prometheus_client`` collector for caches.

    ``caches`` is a mapping of name to AsyncCache or Cache. The names are values of the label
    ``cache``.
    """

    def __init__(self, caches: Mapping[str, AsyncCache | Cache] | None = None) -> None:
        self._caches: dict[str, AsyncCache | Cache] = {}
        if not isinstance(caches, Mapping | None):
            raise TypeError(
                f"CacheCollector takes a mapping of names to caches, not {type(caches).__name__}"
            )
        for name, cache in (caches or {}).items():
            self.add(cache, name)

    def add(self, cache: AsyncCache | Cache, name: str) -> None:
        """Export another cache.

        Raises TypeError if ``cache`` isn't a cache, and ValueError if a different cache has that
        name.
        """
        check_cache("add", cache)
        check_label("add", name, "registry")
        if self._caches.setdefault(name, cache) is not cache:
            raise ValueError(
                f'a cache "{name}" is registered already; give each cache its own name, or call '
                f"remove({name!r}) of the collector first, which register returns"
            )

    def remove(self, name: str) -> None:
        """Stop exporting the cache of that name, if there is one."""
        self._caches.pop(name, None)

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the metrics depend on the caches."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Return the current metrics of all caches, for a scrape."""
        build = GaugeMetricFamily(
            f"{NAMESPACE}_build_info",
            "The version of dscache and its core, fast or pure; always 1.",
            labels=("version", "core"),
        )
        build.add_metric((__version__, _backend.BACKEND), 1)
        ready = GaugeMetricFamily(
            f"{NAMESPACE}_ready", "Whether the cache is ready to serve: 1 or 0.", labels=("cache",)
        )
        latency = HistogramMetricFamily(
            f"{NAMESPACE}_operation_duration_seconds",
            "Time of operations, from the call to the result.",
            labels=("cache", "operation"),
        )
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for name, cache in list(self._caches.items()):
            ready.add_metric((name,), float(cache.is_ready))
            stats = cache.stats()
            for kind, samples in (
                (GaugeMetricFamily, gauges(stats)),
                (CounterMetricFamily, counters(stats)),
            ):
                for one in samples:
                    if one.name not in families:
                        families[one.name] = kind(
                            f"{NAMESPACE}_{one.name}", one.text, labels=("cache", *one.labels)
                        )
                    families[one.name].add_metric((name, *one.labels.values()), one.value)
            if "latency" in stats:
                _add_latency(latency, name, stats["latency"])
        yield from (build, ready, *families.values(), latency)


def _add_latency(family: HistogramMetricFamily, cache: str, latency: Mapping[str, Any]) -> None:
    bounds = [*map(_shown, latency["bounds"]), "+Inf"]
    for operation, row in latency["operations"].items():
        buckets = list(zip(bounds, accumulate(row["buckets"]), strict=True))
        family.add_metric((cache, operation), buckets=buckets, sum_value=row["sum"])


def _shown(bound: float) -> str:
    """Return a bound in Prometheus's usual form: 0.0001, not 1e-04."""
    return f"{bound:.5f}".rstrip("0").removesuffix(".") + (".0" if bound >= 1 else "")
