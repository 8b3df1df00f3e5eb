"""The records that take most of a server's time and bytes, as the server itself counts them.

Redis counts by key since 8.6, from HOTKEYS START on. Other servers keep a rough frequency of each
key while ``maxmemory-policy`` is an LFU one, which OBJECT FREQ returns without counting as a use.

Sources: https://redis.io/docs/latest/commands/hotkeys/,
https://redis.io/docs/latest/commands/object-freq/
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ...aio.control import ControlConnection, RawCommand, Reply
from ...errors import ReplyError, shorten
from ..key_layout import Layout
from .findings import Check, Finding

_CHECK: Final = Check("hot records")
# A record with more than this share of all bytes or time is worth a near cache of its own.
_HOT_SHARE: Final = 0.2
# Below, a share of the total says little.
_LEAST_MS: Final = 10.0
_SHOWN: Final = 3
# OBJECT FREQ is a logarithm: 255 is a million uses and more, and a new key has 5.
_HOT_FREQUENCY: Final = 100
_ADVICE: Final = (
    "serve it from nearCache, which asks the server again only when it changes, or divide it"
)


@dataclass(frozen=True, slots=True)
class Share:
    """The parts of a record in all that the server did while it counted."""

    name: str
    bytes: float
    time: float


@dataclass(frozen=True, slots=True)
class Counted:
    """The counts of a server: over ``seconds``, of which it worked ``busy_ms``."""

    seconds: float
    busy_ms: float
    hottest: Sequence[Share]


async def count_uses(
    server: ControlConnection, layout: Layout, seconds: float
) -> Counted | str | None:
    """Return what a server counted, why it can't count, or None if nothing was asked for.

    With ``seconds``, the server counts for so long, unless it counts already: a count that somebody
    else began is read, and left as it is. Raises ConnectionLost.
    """
    (found,) = await server.execute_many(["HOTKEYS", "GET"])
    if isinstance(found, ReplyError):
        return found.message if seconds else None
    if found is not None:
        return _read(found, layout)
    if not seconds:
        return None
    # With a time limit, so that the count ends also if this process does.
    limit = max(1, round(seconds) + 1)
    how: RawCommand = ["METRICS", 2, "CPU", "NET", "COUNT", 20, "DURATION", limit]
    (begun,) = await server.execute_many(["HOTKEYS", "START", *how])
    if isinstance(begun, ReplyError):
        return begun.message
    try:
        await asyncio.sleep(seconds)
        (found,) = await server.execute_many(["HOTKEYS", "GET"])
    finally:
        await server.execute_many(["HOTKEYS", "STOP"], ["HOTKEYS", "RESET"])
    return found.message if isinstance(found, ReplyError) else _read(found, layout)


def _read(reply: Reply, layout: Layout) -> Counted | str:
    """Return the counts of a reply to HOTKEYS GET, of both keys of a record together."""
    try:
        facts: Mapping[bytes, Any] = _pairs(reply[0])
        by_time = _by_record(_pairs(facts[b"by-cpu-time-us"]), layout)
        by_bytes = _by_record(_pairs(facts[b"by-net-bytes"]), layout)
        busy = int(facts[b"all-commands-all-slots-us"])
        total = int(facts[b"net-bytes-all-commands-all-slots"])
        seconds = int(facts[b"collection-duration-ms"]) / 1000
    except (KeyError, IndexError, TypeError, ValueError):
        return "the reply to HOTKEYS GET has another form than that of Redis 8.6"
    shares = [
        Share(name, by_bytes.get(name, 0) / max(total, 1), by_time.get(name, 0) / max(busy, 1))
        for name in by_bytes.keys() | by_time.keys()
    ]
    hottest = heapq.nlargest(_SHOWN, shares, key=lambda one: max(one.bytes, one.time))
    return Counted(seconds, busy / 1000, hottest)


def _pairs(reply: Reply) -> Mapping[bytes, Any]:
    """Return a map, which is a flat list in RESP2."""
    if isinstance(reply, Mapping):
        return reply
    return dict(zip(reply[::2], reply[1::2], strict=True))


def _by_record(by_key: Mapping[bytes, Any], layout: Layout) -> dict[str, int]:
    found: dict[str, int] = {}
    for key, count in by_key.items():
        name = layout.name_of(key)
        if name is not None:
            found[name] = found.get(name, 0) + int(count)
    return found


async def find_frequent(server: ControlConnection, keys: Iterable[bytes]) -> Mapping[bytes, int]:
    """Return the frequencies of keys: of none if the policy of the server keeps none."""
    asked = list(keys)
    if not asked:
        return {}
    commands: list[RawCommand] = [["OBJECT", "FREQ", key] for key in asked]
    # Only one refusal, which the server counts among its errors.
    [first] = await server.execute_many(commands[0])
    if isinstance(first, ReplyError):
        return {}
    replies = await server.execute_many(*commands)
    return {key: one for key, one in zip(asked, replies, strict=True) if isinstance(one, int)}


def check_counted(counted: Counted | str | None) -> Finding | None:
    """Check that no record takes most of a server; None if nothing was counted."""
    if counted is None:
        return None
    if isinstance(counted, str):
        return _CHECK.unknown(
            f"HOTKEYS is refused: {counted}",
            "counting needs Redis 8.6 or newer and +hotkeys; elsewhere use an LFU maxmemory-policy "
            "for a while, and run the check again",
        )
    shown = "; ".join(
        f"{shorten(one.name)} {one.bytes:.0%} of the bytes and {one.time:.0%} of the time"
        for one in counted.hottest
    )
    within = f"in {counted.seconds:.1f} s the server worked {counted.busy_ms:.0f} ms"
    if not shown:
        return _CHECK.ok(f"{within}, none of it for records")
    top = max(max(one.bytes, one.time) for one in counted.hottest)
    if top < _HOT_SHARE or counted.busy_ms < _LEAST_MS:
        return _CHECK.ok(f"{within}: {shown}")
    return _CHECK.warning(f"{within}: {shown}", _ADVICE)


def check_frequent(frequencies: Mapping[bytes, int], layout: Layout) -> Finding:
    """Check the frequencies that a server with an LFU policy keeps."""
    by_record: dict[str, int] = {}
    for key, frequency in frequencies.items():
        if (name := layout.name_of(key)) is not None:
            by_record[name] = max(by_record.get(name, 0), frequency)
    hottest = heapq.nlargest(_SHOWN, by_record, key=by_record.__getitem__)
    shown = ", ".join(f"{shorten(name)} {by_record[name]}" for name in hottest)
    found = f"frequencies from 0 to 255 in a sample of {len(by_record):,}: {shown}"
    hot = sum(one >= _HOT_FREQUENCY for one in by_record.values())
    # Where many are used often, none of them stands out.
    if 0 < hot <= _SHOWN:
        return _CHECK.warning(found, _ADVICE)
    return _CHECK.ok(found)
