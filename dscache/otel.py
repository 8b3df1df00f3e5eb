"""Metrics and spans of caches for OpenTelemetry; requires the extra ``otel``.

Metrics are observable instruments over ``stats()``, so they cost an operation nothing. Calls
inside a sampled trace get spans, so that the sampling of traces covers them. Names follow the
semantic conventions for databases (opentelemetry.io/docs/specs/semconv/db). Other names begin with
``dscache.``. Metrics and spans contain no names and no data of records.
"""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sized
from functools import partial, wraps
from itertools import accumulate
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

from . import _metrics
from ._cache import check_cache, check_label
from ._metrics import NAMESPACE, Metric, Sample
from ._version import __version__
from .core.constants import LATENCY_BOUNDS
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

__all__ = ["Measuring", "Tracing", "measure", "observe", "trace"]

# The first version of the semantic conventions in which those for databases are stable.
_SCHEMA: Final = "https://opentelemetry.io/schemas/1.33.0"
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

    Each cache of a provider needs its own name. The default provider is the global one. The export
    ends when the cache is garbage-collected. Raises ValueError if another cache has that name.
    """
    check_cache("observe", cache)
    check_label("observe", name, "meter_provider")
    _instruments_of(meter_provider or metrics_api.get_meter_provider()).add(cache, name)


def _instruments_of(provider: MeterProvider) -> _Instruments:
    """Return the instruments of a provider, which are made at the first call."""
    instruments = _observed.get(provider)
    if instruments is None and provider is metrics_api.get_meter_provider():
        # Until the program sets the global provider, OpenTelemetry has a stand-in for it. The
        # stand-in passes its instruments on, and a second one of the same name would be ignored.
        stand_ins = [one for one in _observed if type(one).__name__ == "_ProxyMeterProvider"]
        instruments = _observed[stand_ins[0]] if stand_ins else None
    if instruments is None:
        instruments = _Instruments(provider.get_meter(NAMESPACE, __version__, _SCHEMA))
    _observed[provider] = instruments
    return instruments


class _Instruments:
    """The instruments of one provider, and the observed caches."""

    def __init__(self, meter: Meter) -> None:
        self._caches: WeakValueDictionary[str, AsyncCache | Cache] = WeakValueDictionary()
        _declare(
            meter.create_observable_counter,
            (*_metrics.COUNTERS, *_metrics.NEAR_COUNTERS, *_metrics.MAINTENANCE_COUNTERS),
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
        dotted = f"{of}.{rest}" if of in ("near", "node", "maintenance") else name
        text = f"Of one node: {metric.text}" if of == "node" else metric.text
        create(f"{NAMESPACE}.{dotted}", [partial(observe, name)], metric.unit, text)


def _shown(operation: str, batch: bool) -> str:
    """Return ``db.operation.name``; a batch is named after its single operation."""
    single = operation.removesuffix("_bulk")
    return f"BATCH {single}" if batch and single != operation else single


# -- wrappers


_CallT = TypeVar("_CallT")


class _Wrappers(ABC, Generic[_CallT]):
    """Functions around the operations of one cache, which are told of its calls.

    They are set on the instance, so that a cache without them pays nothing. Wrappers of several
    objects surround each other.
    """

    def __init__(self, cache: AsyncCache | Cache) -> None:
        self._cache = cache
        self._stopped = False
        self._attributes = attributes_of(cache.config)
        self._wrappers: dict[str, Callable[..., Any]] = {}

    def _install(self) -> None:
        """Begin; other threads may call at once."""
        self._wrappers = {name: self._wrapped(name) for name in (*_SINGLE, *_BULK)}
        self._cache.__dict__.update(self._wrappers)

    def stop(self) -> None:
        """Leave further calls alone; calls under way still end as they would."""
        self._stopped = True
        for name, wrapper in self._wrappers.items():
            if self._cache.__dict__.get(name) is wrapper:
                inner = vars(wrapper)["inner"]
                while _is_wrapper(inner) and vars(inner)["owner"]._stopped:
                    inner = vars(inner)["inner"]
                if _is_wrapper(inner):
                    self._cache.__dict__[name] = inner
                else:
                    del self._cache.__dict__[name]

    @abstractmethod
    def _is_wanted(self) -> bool:
        """Whether to begin a call."""

    @abstractmethod
    def _begin(self, operation: str, is_batch: bool, size: int | None) -> _CallT:
        """Return a description of a call that begins now."""

    @abstractmethod
    def _end(self, call: _CallT, operation: str, result: Any) -> None:
        """End a call that has a result."""

    @abstractmethod
    def _fail(self, call: _CallT, error: BaseException) -> None:
        """End a call that has failed."""

    def _wrapped(self, operation: str) -> Callable[..., Any]:
        own: Callable[..., Any] | None = self._cache.__dict__.get(operation)
        if own is None or not _is_wrapper(own):
            # The near cache may have put its own function there, which is gone once it closes.
            own = getattr(type(self._cache), operation).__get__(self._cache)
        assert own is not None
        inner = own
        is_bulk = operation in _BULK
        parameter = "records" if operation == "set_bulk" else "names"

        @wraps(inner)
        def call(*arguments: Any, **options: Any) -> Any:
            if self._stopped or not self._is_wanted():
                return inner(*arguments, **options)
            size = None
            if is_bulk and (arguments or parameter in options):
                many = arguments[0] if arguments else options[parameter]
                if isinstance(many, Iterable) and not isinstance(many, Sized):
                    many = list(many)  # an iterator can be read only once
                    if arguments:
                        arguments = (many, *arguments[1:])
                    else:
                        options[parameter] = many
                if isinstance(many, Sized):
                    size = len(many)
            # By the conventions, a batch of one operation is a single operation.
            begun = self._begin(operation, is_bulk and size != 1, size)
            try:
                result = inner(*arguments, **options)
            except BaseException as error:
                self._fail(begun, error)
                raise
            if isinstance(result, asyncio.Future):
                if result.done():  # of the near cache, which took no turn of the loop
                    self._settled(begun, operation, result)
                else:
                    result.add_done_callback(partial(self._settled, begun, operation))
            elif asyncio.iscoroutine(result):
                return self._awaited(begun, operation, result)
            else:
                self._end(begun, operation, result)
            return result

        vars(call).update(inner=inner, owner=self)
        return call

    def _settled(self, call: _CallT, operation: str, future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            error: BaseException | None = asyncio.CancelledError()
        else:
            # Its exception() would count as the caller's, and asyncio reports an error that no
            # caller has looked at.
            error = future._exception
        if error is None:
            self._end(call, operation, future.result())
        else:
            self._fail(call, error)

    async def _awaited(
        self, call: _CallT, operation: str, coroutine: Coroutine[Any, Any, Any]
    ) -> Any:
        try:
            result = await coroutine
        except BaseException as error:
            self._fail(call, error)
            raise
        self._end(call, operation, result)
        return result


def _is_wrapper(function: Callable[..., Any]) -> bool:
    return isinstance(getattr(function, "owner", None), _Wrappers)


def _attributes_of(error: BaseException) -> dict[str, str]:
    """Return the attributes of a call that failed."""
    if isinstance(error, ReplyError):
        return {"error.type": error.code, "db.response.status_code": error.code}
    return {"error.type": type(error).__qualname__}


# -- spans


def trace(
    cache: AsyncCache | Cache,
    *,
    sample: float = 1.0,
    roots: bool = False,
    tracer_provider: TracerProvider | None = None,
) -> Tracing:
    """Start spans for operations of a cache, from the call to the result; return a Tracing.

    Call ``stop()`` of the Tracing to end that. In a sampled trace, a random share ``sample`` of the
    operations gets a span. With ``roots``, operations outside of any trace are sampled too. For any
    other operation, only the current span is looked up.

    Raises ValueError if ``sample`` isn't from 0 to 1.
    """
    check_cache("trace", cache)
    if not isinstance(sample, (int, float)) or not 0 <= sample <= 1:
        raise ValueError(f"sample must be from 0 to 1, not {sample!r}")
    provider = tracer_provider or trace_api.get_tracer_provider()
    tracer = provider.get_tracer(NAMESPACE, __version__, schema_url=_SCHEMA)
    return Tracing(cache, tracer, sample, roots)


class Tracing(_Wrappers[Span]):
    """The spans of one cache, made by ``trace``. ``stop`` ends the tracing."""

    def __init__(
        self, cache: AsyncCache | Cache, tracer: Tracer, sample: float, roots: bool
    ) -> None:
        super().__init__(cache)
        self._tracer = tracer
        self._sample = sample
        self._roots = roots
        server = (self._attributes.get(f"server.{part}") for part in ("address", "port"))
        self._server = ":".join(str(part) for part in server if part is not None)
        self._install()

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

    def _end(self, call: Span, operation: str, result: Any) -> None:
        if operation in _READS:
            found = len(result) if operation in _BULK else int(result is not None)
            call.set_attribute("db.response.returned_rows", found)
        call.end()

    def _fail(self, call: Span, error: BaseException) -> None:
        call.set_attributes(_attributes_of(error))
        # The error's text is left out, as it contains the record's name.
        call.set_status(Status(StatusCode.ERROR))
        call.end()


# -- durations


def measure(
    cache: AsyncCache | Cache, name: str = "default", meter_provider: MeterProvider | None = None
) -> Measuring:
    """Record each operation's duration as ``db.client.operation.duration``; return a Measuring.

    The metric is a histogram of the semantic conventions, in seconds. A duration lasts from the
    call until the caller may continue. The attribute ``dscache.cache`` is ``name``. Call ``stop()``
    of the Measuring to end the recording.

    Recording costs each operation some microseconds. ``observe`` exports the cache's own latencies
    without this cost.
    """
    check_cache("measure", cache)
    check_label("measure", name, "meter_provider")
    provider = meter_provider or metrics_api.get_meter_provider()
    return Measuring(cache, provider.get_meter(NAMESPACE, __version__, _SCHEMA), name)


_Measured: TypeAlias = tuple[float, dict[str, Any]]


class Measuring(_Wrappers[_Measured]):
    """The durations of one cache, made by ``measure``. ``stop`` ends the recording."""

    def __init__(self, cache: AsyncCache | Cache, meter: Meter, name: str) -> None:
        super().__init__(cache)
        self._durations = meter.create_histogram(
            "db.client.operation.duration",
            "s",
            "Duration of database client operations.",
            # These contain the bounds that the conventions advise, from 1 ms to 10 s.
            explicit_bucket_boundaries_advisory=LATENCY_BOUNDS,
        )
        own = {**self._attributes, f"{NAMESPACE}.cache": name}
        shown = {_shown(one, batch) for one in (*_SINGLE, *_BULK) for batch in (False, True)}
        self._by_name = {one: {**own, "db.operation.name": one} for one in shown}
        self._install()

    def _is_wanted(self) -> bool:
        return True

    def _begin(self, operation: str, is_batch: bool, size: int | None) -> _Measured:
        return perf_counter(), self._by_name[_shown(operation, is_batch)]

    def _end(self, call: _Measured, operation: str, result: Any) -> None:
        began, attributes = call
        self._durations.record(perf_counter() - began, attributes)

    def _fail(self, call: _Measured, error: BaseException) -> None:
        began, attributes = call
        self._durations.record(perf_counter() - began, attributes | _attributes_of(error))
