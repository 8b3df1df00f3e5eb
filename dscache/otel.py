"""Metrics and spans of caches for OpenTelemetry; requires the extra ``otel``.

Metrics are observable instruments over ``stats()``, so they cost an operation nothing. Spans are
started for calls inside a sampled trace, so the sampling of traces covers them. Names follow the
semantic conventions for databases (opentelemetry.io/docs/specs/semconv/database); other names
begin with ``dscache.``. Metrics and spans contain no names and no content of records.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial, wraps
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakValueDictionary

from . import _metrics
from ._metrics import NAMESPACE, Metric, Sample
from .errors import ReplyError

try:
    from opentelemetry import metrics as metrics_api
    from opentelemetry import trace as trace_api
    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, TracerProvider
except ImportError as error:
    raise ImportError("dscache.otel needs opentelemetry-api; install dscache[otel]") from error

if TYPE_CHECKING:
    from .cache import AsyncCache
    from .config import Config
    from .sync import Cache

__all__ = ["Tracing", "observe", "trace"]

_SINGLE: Final = ("get", "head", "set", "delete", "fetch", "update", "patch")
_BULK: Final = ("get_bulk", "head_bulk", "set_bulk", "delete_bulk", "fetch_bulk")
_READS: Final = ("get", "head", "fetch", "get_bulk", "head_bulk", "fetch_bulk")


def attributes_of(config: Config) -> dict[str, str | int]:
    """Return the attributes of a cache's database, as configured."""
    if config.name == "memory":
        return {"db.system.name": "memory"}
    options = config.options
    found: dict[str, str | int] = {"db.system.name": "redis", "db.namespace": str(options.db)}
    if options.sentinels:
        return found | {"server.address": str(options.name)}
    if options.path:
        return found | {"server.address": options.path}
    server = options.seeds[0] if options.nodes else options
    return found | {"server.address": server.host, "server.port": server.port}


# -- metrics


_observed: WeakKeyDictionary[MeterProvider, _Instruments] = WeakKeyDictionary()


def observe(
    cache: AsyncCache | Cache, name: str = "default", meter_provider: MeterProvider | None = None
) -> None:
    """Export a cache's counters, with the attribute ``dscache.cache`` set to ``name``.

    The export ends when the cache is garbage-collected. Each cache of a provider, by default the
    global one, needs its own name. Raises ValueError if another cache has that name.
    """
    provider = meter_provider or metrics_api.get_meter_provider()
    instruments = _observed.get(provider)
    if instruments is None:
        instruments = _observed[provider] = _Instruments(provider.get_meter(NAMESPACE))
    instruments.add(cache, name)


class _Instruments:
    """The instruments of one provider, and the observed caches."""

    def __init__(self, meter: Meter) -> None:
        self._caches: WeakValueDictionary[str, AsyncCache | Cache] = WeakValueDictionary()
        _declare(
            meter.create_observable_counter,
            (*_metrics.COUNTERS, *_metrics.NEAR_COUNTERS),
            partial(self._samples, _metrics.counters),
        )
        _declare(
            meter.create_observable_up_down_counter,
            (*_metrics.GAUGES, *_metrics.NEAR_GAUGES),
            partial(self._samples, _metrics.gauges),
        )
        meter.create_observable_gauge(
            f"{NAMESPACE}.ready", [self._ready], "1", "Whether the cache is ready to serve."
        )
        duration = f"{NAMESPACE}.operation.duration"
        for part, unit, text in (
            ("sum", "s", "Seconds of operations, from the call to the result."),
            ("count", "{operation}", "Operations with a result."),
            ("bucket", "{operation}", "Operations of at most le seconds."),
        ):
            meter.create_observable_counter(
                f"{duration}.{part}", [partial(self._durations, part)], unit, text
            )

    def add(self, cache: AsyncCache | Cache, name: str) -> None:
        """Observe another cache. Raises ValueError if a different cache has that name."""
        if self._caches.setdefault(name, cache) is not cache:
            raise ValueError(f'a cache "{name}" already exists; give each cache its own name')

    def _each(self) -> Iterable[tuple[AsyncCache | Cache, dict[str, Any]]]:
        for name, cache in list(self._caches.items()):
            yield cache, {f"{NAMESPACE}.cache": name, **attributes_of(cache.config)}

    def _samples(
        self, of: Callable[[Mapping[str, Any]], Iterable[Sample]], name: str, _: CallbackOptions
    ) -> Iterable[Observation]:
        for cache, attributes in self._each():
            for one in of(cache.stats()):
                if one.name == name:
                    labels = {f"{NAMESPACE}.{key}": value for key, value in one.labels.items()}
                    yield Observation(one.value, attributes | labels)

    def _ready(self, _: CallbackOptions) -> Iterable[Observation]:
        for cache, attributes in self._each():
            yield Observation(int(cache.is_ready), attributes)

    def _durations(self, part: str, _: CallbackOptions) -> Iterable[Observation]:
        for cache, attributes in self._each():
            latency = cache.stats().get("latency", {"bounds": [], "operations": {}})
            bounds = [*map(str, latency["bounds"]), "+Inf"]
            for operation, row in latency["operations"].items():
                own = attributes | {"db.operation.name": _shown(operation, batch=True)}
                if part != "bucket":
                    yield Observation(row[part], own)
                    continue
                for bound, total in zip(bounds, accumulate(row["buckets"]), strict=True):
                    yield Observation(total, own | {"le": bound})


def _declare(
    create: Callable[..., Any],
    metrics: Iterable[Metric],
    observe: Callable[[str, CallbackOptions], Iterable[Observation]],
) -> None:
    names: dict[str, Metric] = {}
    for metric in metrics:
        names.setdefault(metric.name, metric)
        if metric.key in _metrics.OF_NODES and not metric.name.startswith("near_"):
            names.setdefault(f"node_{metric.name}", metric)
    for name, metric in names.items():
        of, _, rest = name.partition("_")
        dotted = f"{of}.{rest}" if of in ("near", "node") else name
        text = f"Of one node: {metric.text}" if of == "node" else metric.text
        create(f"{NAMESPACE}.{dotted}", [partial(observe, name)], metric.unit, text)


def _shown(operation: str, batch: bool) -> str:
    """Return ``db.operation.name``; a batch is named after its single operation."""
    single = operation.removesuffix("_bulk")
    return f"BATCH {single}" if batch and single != operation else single


# -- spans


def trace(
    cache: AsyncCache | Cache,
    *,
    sample: float = 1.0,
    roots: bool = False,
    tracer_provider: TracerProvider | None = None,
) -> Tracing:
    """Start spans for operations of a cache, from the call to the result.

    In a sampled trace, a random share ``sample`` of the operations (0 to 1) gets a span. With
    ``roots``, operations outside any trace are sampled too. Any other operation costs a look at
    the current span. Returns a Tracing; its ``stop()`` ends the tracing. Raises ValueError if
    ``sample`` is not from 0 to 1.
    """
    if not 0 <= sample <= 1:
        raise ValueError(f"sample must be from 0 to 1, not {sample!r}")
    provider = tracer_provider or trace_api.get_tracer_provider()
    return Tracing(cache, provider.get_tracer(NAMESPACE), sample, roots)


class Tracing:
    """The spans of one cache."""

    def __init__(
        self, cache: AsyncCache | Cache, tracer: Tracer, sample: float, roots: bool
    ) -> None:
        self._cache = cache
        self._tracer = tracer
        self._sample = sample
        self._roots = roots
        self._attributes = attributes_of(cache.config)
        server = (self._attributes.get(f"server.{part}") for part in ("address", "port"))
        self._server = ":".join(str(part) for part in server if part is not None)
        # Set on the instance, so that an untraced cache pays nothing.
        self._wrappers = {name: self._wrapped(name) for name in (*_SINGLE, *_BULK)}
        cache.__dict__.update(self._wrappers)

    def stop(self) -> None:
        """Start no more spans; open spans end with their operations."""
        for name, wrapper in self._wrappers.items():
            if self._cache.__dict__.get(name) is wrapper:
                del self._cache.__dict__[name]

    def _wrapped(self, operation: str) -> Callable[..., Any]:
        own: Callable[..., Any] = getattr(type(self._cache), operation).__get__(self._cache)
        is_bulk = operation in _BULK

        @wraps(own)
        def call(*arguments: Any, **options: Any) -> Any:
            if not self._is_wanted():
                return own(*arguments, **options)
            size = None
            if is_bulk and arguments:
                many, *others = arguments
                if not hasattr(many, "__len__"):
                    many = list(many)  # an iterator can be read only once
                arguments, size = (many, *others), len(many)
            # By the conventions, a batch of one operation is a single operation.
            span = self._begin(operation, is_bulk and size != 1, size)
            try:
                result = own(*arguments, **options)
            except BaseException as error:
                _fail(span, error)
                raise
            if isinstance(result, asyncio.Future):
                if result.done():  # of the near cache, which took no turn of the loop
                    _settled(span, operation, result)
                else:
                    result.add_done_callback(partial(_settled, span, operation))
            elif asyncio.iscoroutine(result):
                return _awaited(span, operation, result)
            else:
                _end(span, operation, result)
            return result

        return call

    def _is_wanted(self) -> bool:
        current = trace_api.get_current_span().get_span_context()
        if not (current.trace_flags.sampled if current.is_valid else self._roots):
            return False
        return self._sample >= 1 or random.random() < self._sample

    def _begin(self, operation: str, is_batch: bool, size: int | None) -> Span:
        name = _shown(operation, is_batch)
        attributes = {**self._attributes, "db.operation.name": name}
        if is_batch and size is not None:
            attributes["db.operation.batch.size"] = size
        target = f"{name} {self._server}".rstrip()
        return self._tracer.start_span(target, kind=SpanKind.CLIENT, attributes=attributes)


def _settled(span: Span, operation: str, future: asyncio.Future[Any]) -> None:
    error = asyncio.CancelledError() if future.cancelled() else future.exception()
    if error is None:
        _end(span, operation, future.result())
    else:
        _fail(span, error)


async def _awaited(span: Span, operation: str, coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        result = await coroutine
    except BaseException as error:
        _fail(span, error)
        raise
    _end(span, operation, result)
    return result


def _end(span: Span, operation: str, result: Any) -> None:
    if operation in _READS:
        found = len(result) if operation in _BULK else int(result is not None)
        span.set_attribute("db.response.returned_rows", found)
    span.end()


def _fail(span: Span, error: BaseException) -> None:
    kind = type(error).__qualname__
    if isinstance(error, ReplyError):
        kind = error.code
        span.set_attribute("db.response.status_code", kind)
    span.set_attribute("error.type", kind)
    # The error's text is left out, as it contains the record's name.
    span.set_status(Status(StatusCode.ERROR))
    span.end()
