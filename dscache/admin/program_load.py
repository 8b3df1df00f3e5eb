"""The load of a program's caches, by the metrics that ``dscache.prometheus`` exports of them."""

from __future__ import annotations

import asyncio
import http.client
import math
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from .._metrics import NAMESPACE
from ..errors import DscacheError, clean

# Seconds for the endpoint to answer, and the most that is read of its answer.
_PATIENCE: Final = 5.0
_MOST_BYTES: Final = 32 * 1024 * 1024
_LINE: Final = re.compile(rf"{NAMESPACE}_(\w+)(?:\{{(.*)\}})? (\S+)(?: -?\d+)?")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPED: Final = {r"\\": "\\", r"\"": '"', r"\n": " "}
_DURATION: Final = "operation_duration_seconds"

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class OperationLoad:
    """The calls of one operation since the look before."""

    per_second: float
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True, slots=True)
class ProgramNode:
    """A node of a cluster, from the program's side."""

    operations: float | None
    failed: float | None
    in_flight: int


@dataclass(frozen=True, slots=True)
class CacheLoad:
    """The load of one cache since the look before; rates are in a second."""

    name: str
    ready: bool
    calls: float | None
    hits: float | None
    """The share of the records read from Redis that it had."""
    near: float | None
    """The share of the records read that the near cache had; None without one."""
    writes: float | None
    failed: float | None
    pending: int
    connections: int
    operations: Mapping[str, OperationLoad]
    nodes: Mapping[str, ProgramNode]


@dataclass(frozen=True, slots=True)
class ProgramLoad:
    """The load of all caches of a program."""

    caches: tuple[CacheLoad, ...]


class WatchedProgram:
    """The metrics endpoint of a program, looked at again and again."""

    def __init__(self, url: str) -> None:
        self.shown = check_url(url)
        self._url = url
        self._last: _Sample | None = None

    async def look(self) -> ProgramLoad:
        """Return the load since the last look; rates are None at the first.

        Raises DscacheError if the endpoint gives no metrics of dscache.
        """
        text = await _in_thread(self._url, self.shown)
        sample = _Sample(time.monotonic(), _values(text))
        if not any(name == "ready" for name, _ in sample.values):
            raise DscacheError(
                f"{self.shown} has no metrics of dscache; call dscache.prometheus.register(cache) "
                "in the program"
            )
        last, self._last = self._last, sample
        return ProgramLoad(tuple(_cache_load(name, sample, last) for name in sample.caches()))


def check_url(url: str) -> str:
    """Return the URL of an endpoint as errors show it; raises DscacheError for another one."""
    with suppress(ValueError):  # brackets without an IPv6 address, or a port that is no number
        parts = urlsplit(url)
        is_http = parts.scheme in ("http", "https")
        if is_http and parts.hostname and parts.port != 0 and "@" not in parts.netloc:
            return clean(f"{parts.scheme}://{parts.netloc}{parts.path}")
    raise DscacheError(
        "the metrics endpoint must be http://host:port/path or https://, without a user and a "
        "password"
    )


async def _in_thread(url: str, shown: str) -> str:
    """Return the text of an endpoint, read by a thread that doesn't delay the exit."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str] = loop.create_future()

    def settle(text: str | None, error: Exception | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(text or "")

    def work() -> None:
        text: str | None = None
        failure: Exception | None = None
        try:
            text = _fetched(url, shown)
        except Exception as error:  # the caller waits for the outcome
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, text, failure)

    threading.Thread(target=work, name="dscache metrics", daemon=True).start()
    return await answer


def _fetched(url: str, shown: str) -> str:
    request = urllib.request.Request(url, headers={"Accept": "text/plain"})
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as reply:
            text: bytes = reply.read(_MOST_BYTES)
    except urllib.error.HTTPError as error:
        error.close()
        raise DscacheError(f"{shown} answers {error.code} {clean(str(error.reason))}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or reason
        raise DscacheError(f"no metrics from {shown}: {clean(str(reason))}") from None
    return text.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class _Sample:
    """The values of all metrics at one time, by name and labels."""

    at: float
    values: Mapping[tuple[str, Labels], float]

    def caches(self) -> list[str]:
        """Return the names of the caches."""
        found = {dict(labels).get("cache", "") for name, labels in self.values if name == "ready"}
        return sorted(found)

    def get(self, name: str, **labels: str) -> float | None:
        """Return the value of a metric, or None."""
        return self.values.get((name, frozenset(labels.items())))

    def labels_of(self, name: str, cache: str, label: str) -> list[str]:
        """Return the values that a label has with a metric of a cache."""
        found = [dict(labels) for one, labels in self.values if one == name]
        return sorted({one[label] for one in found if one.get("cache") == cache and label in one})


def _values(text: str) -> dict[tuple[str, Labels], float]:
    """Return the values of dscache in an exposition of Prometheus."""
    found = {}
    for line in text.splitlines():
        if match := _LINE.fullmatch(line.strip()):
            labels = frozenset(
                (name, clean(re.sub(r"\\.", lambda one: _ESCAPED.get(one[0], one[0]), value)))
                for name, value in _LABEL.findall(match[2] or "")
            )
            with suppress(ValueError):
                value = float(match[3])
                if math.isfinite(value):
                    found[match[1], labels] = value
    return found


def _cache_load(cache: str, sample: _Sample, last: _Sample | None) -> CacheLoad:
    seconds = 1.0 if last is None else max(sample.at - last.at, 1e-6)

    def grown(name: str, **labels: str) -> float | None:
        new = sample.get(name, cache=cache, **labels)
        if new is None or last is None:
            return None
        old = last.get(name, cache=cache, **labels) or 0.0
        return new if new < old else new - old  # a program that was restarted counts from zero

    def rate(name: str, **labels: str) -> float | None:
        count = grown(name, **labels)
        return None if count is None else count / seconds

    def gauge(name: str, **labels: str) -> int:
        return int(sample.get(name, cache=cache, **labels) or 0)

    nodes = {
        node: ProgramNode(
            operations=rate("node_operations_total", node=node),
            failed=rate("node_failed_records_total", node=node),
            in_flight=gauge("node_in_flight_records", node=node),
        )
        for node in sample.labels_of("node_in_flight_records", cache, "node")
    }
    return CacheLoad(
        name=cache,
        ready=bool(sample.get("ready", cache=cache)),
        calls=rate("operations_total"),
        hits=_share(grown("reads_total", result="hit"), [grown("reads_total", result="miss")]),
        near=_share(
            grown("near_reads_total", result="hit"),
            [grown("near_reads_total", result=one) for one in ("miss", "join")],
        ),
        writes=rate("writes_total", result="written"),
        failed=rate("failed_records_total"),
        pending=gauge("pending_operations"),
        connections=gauge("connections"),
        operations=_operations(cache, sample, last, seconds),
        nodes=nodes,
    )


def _share(part: float | None, others: Iterable[float | None]) -> float | None:
    if part is None:
        return None
    total = part + sum(one or 0.0 for one in others)
    return part / total if total else None


def _operations(
    cache: str, sample: _Sample, last: _Sample | None, seconds: float
) -> dict[str, OperationLoad]:
    """Return the calls of each operation that had some since the last sample."""
    found: dict[str, OperationLoad] = {}
    if last is None:
        return found
    bounds = sorted(sample.labels_of(f"{_DURATION}_bucket", cache, "le"), key=float)
    for operation in sample.labels_of(f"{_DURATION}_count", cache, "operation"):
        rows = []
        for one in (sample, last):
            values = (
                one.get(f"{_DURATION}_bucket", cache=cache, operation=operation, le=bound)
                for bound in bounds
            )
            rows.append([value or 0.0 for value in values])
        new, old = rows
        if not new or new[-1] < old[-1]:
            continue
        buckets = [after - before for after, before in zip(new, old, strict=True)]
        if buckets[-1]:
            edges = list(map(float, bounds))
            found[operation] = OperationLoad(
                buckets[-1] / seconds,
                _percentile(edges, buckets, 0.5),
                _percentile(edges, buckets, 0.99),
            )
    return found


def _percentile(bounds: list[float], counts: list[float], share: float) -> float | None:
    """Return a percentile in milliseconds, interpolated within its bucket as PromQL does it."""
    wanted = share * counts[-1]
    low, below = 0.0, 0.0
    for bound, count in zip(bounds, counts, strict=True):
        if count >= wanted:
            if bound == float("inf"):
                return low * 1000
            return (low + (bound - low) * (wanted - below) / (count - below)) * 1000
        low, below = bound, count
    return None
