"""Operations issued by the core's own callbacks, and exceptions in the middle of its work."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from dscache.core import constants as c
from dscache.errors import ConnectionLost, ProtocolError
from tests.support.wire import CORES, Exchange, Waiter, flushed

NAMES = [f"n{i}" for i in range(20)]


@pytest.fixture(params=CORES)
def exchange(request: pytest.FixtureRequest) -> Exchange:
    """A pipeline of each core, and records to read."""
    exchange = Exchange(request.param)
    for name in NAMES:
        exchange.server.put(name, 1, b'"%s"' % name.encode())
    return exchange


def assert_owners(exchange: Exchange, waiters: dict[str, list[Waiter]]) -> None:
    """Assert that each read has ended with the record of its own name."""
    exchange.run()
    for name, own in waiters.items():
        assert own
        assert [waiter.result().data for waiter in own] == [name] * len(own)


@pytest.mark.parametrize("issue", ["get", "set", "get_bulk", "delete"])
def test_create_waiter_may_issue_operations(exchange: Exchange, issue: str) -> None:
    """Each is made before the batch is chosen that its operation joins."""
    create = exchange._waiter
    nested: dict[str, list[Waiter]] = {}
    pipeline = exchange.pipeline

    def create_waiter() -> Waiter:
        if len(nested) < 10:
            name = NAMES[len(nested)]
            nested[name] = []
            nested[name].append(pipeline.get(name))
        return create()

    core = type(pipeline)
    pipeline = core(create_waiter, exchange._wake, timeout=3600)
    exchange.pipeline = pipeline
    arguments: dict[str, tuple[Any, ...]] = {
        "get": ("n15",),
        "set": ("other", 1, "data"),
        "get_bulk": (["n15", "n16"],),
        "delete": ("n17",),
    }
    getattr(pipeline, issue)(*arguments[issue])
    assert len(nested) == 10
    assert_owners(exchange, nested)


def test_wake_may_issue_and_send_operations(exchange: Exchange) -> None:
    """A batch is queued with its first record in it: an empty one would be dropped."""
    waiters: dict[str, list[Waiter]] = {name: [] for name in NAMES}
    sent: list[bytes] = []

    def wake() -> None:
        for name in NAMES[:10]:
            waiters[name].append(exchange.pipeline.get(name))
        sent.append(flushed(exchange.pipeline))

    core = type(exchange.pipeline)
    armed = [wake]
    exchange.pipeline = core(
        exchange._waiter, lambda: armed.pop()() if armed else None, timeout=3600
    )
    waiters["n15"].append(exchange.pipeline.get("n15"))
    exchange.pipeline.feed(exchange.server.answer(b"".join(sent)))
    waiters.update({name: [exchange.pipeline.get(name)] for name in NAMES[10:15]})
    assert_owners(exchange, {name: own for name, own in waiters.items() if own})


def test_finalizers_may_issue_operations_while_a_bulk_is_prepared(exchange: Exchange) -> None:
    nested: dict[str, list[Waiter]] = {name: [] for name in NAMES}
    count = [0]

    class Finalized:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            name = NAMES[count[0] % 20]
            count[0] += 1
            nested[name].append(exchange.pipeline.get(name))

    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for turn in range(40):
            Finalized()
            exchange.pipeline.get_bulk(NAMES)
            Finalized()
            exchange.pipeline.set(f"w{turn}", 1, turn)
            exchange.run()
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert count[0] >= 70
    assert_owners(exchange, {name: own for name, own in nested.items() if own})


@pytest.mark.parametrize("retry", [True, False])
def test_no_reply_counts_after_an_exception(exchange: Exchange, retry: bool) -> None:
    """A waiter's own exception may have left its slot half settled."""
    pipeline = exchange.pipeline

    class Broken(Waiter):
        is_broken = True

        def set_result(self, result: Any, /) -> None:
            if self.is_broken:
                raise MemoryError
            super().set_result(result)

    first, second = Broken(), Waiter()
    pipeline.read("n1", first)
    output = flushed(pipeline)
    pipeline.read("n2", second)
    output += flushed(pipeline)
    replies = exchange.server.answer(output)
    with pytest.raises(MemoryError):
        pipeline.feed(replies)
    with pytest.raises(ProtocolError):
        pipeline.feed(replies)
    assert not second.done
    pipeline.connection_lost(ConnectionError("cut"), retry)
    if retry:
        first.is_broken = False
        exchange.run()
        assert second.result().data == "n2"
    else:
        assert isinstance(second.error, ConnectionLost)
    exchange.assert_drained()


def test_a_failure_that_strikes_the_telling_of_failures_is_made_good(exchange: Exchange) -> None:
    pipeline = exchange.pipeline
    strikes = [MemoryError, MemoryError]

    class Broken(Waiter):
        def set_exception(self, error: Exception, /) -> None:
            if strikes:
                raise strikes.pop()
            super().set_exception(error)

    waiters = [Waiter(), Broken(), Waiter(), Broken()]
    for name, waiter in zip(NAMES, waiters, strict=False):
        pipeline.read(name, waiter)
    flushed(pipeline)
    for _ in range(2):
        with pytest.raises(MemoryError):
            pipeline.connection_lost(ConnectionError("cut"), False)
    pipeline.connection_lost(ConnectionError("cut"), False)
    assert [type(waiter.error) for waiter in waiters] == [ConnectionLost] * 4
    exchange.assert_drained()


# -- replies of a few bytes that announce very much


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"*1048576\r\n", id="arrays"),
        pytest.param(b"%524288\r\n", id="maps"),
        pytest.param(b"~1048576\r\n", id="sets"),
        pytest.param(b"|524288\r\n", id="attributes"),
        pytest.param(b"*600000\r\n", id="arrays of half as many"),
    ],
)
def test_nested_replies_may_announce_a_million_elements_in_sum(
    exchange: Exchange, header: bytes
) -> None:
    exchange.pipeline.get("n1")
    flushed(exchange.pipeline)
    with pytest.raises(ProtocolError, match="announced a reply of length"):
        exchange.pipeline.feed(header * 3)


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_a_reply_may_be_nested_so_deep(exchange: Exchange, pieces: int) -> None:
    pipeline = exchange.pipeline
    deep = b"*2\r\n:1\r\n" * c.MAX_DEPTH
    _, waiter = pipeline.command("X")
    replies = deep + b"+end\r\n"
    for at in range(0, len(replies), pieces):
        pipeline.feed(replies[at : at + pieces])
    assert waiter.done
    pipeline.command("X")
    with pytest.raises(ProtocolError, match="nested"):
        pipeline.feed(deep + b"*1\r\n+end\r\n")


def test_many_replies_are_no_large_one(exchange: Exchange) -> None:
    """Elements that have come are no more owed, however their replies are nested."""
    pipeline = exchange.pipeline
    reply = b"*2\r\n*2\r\n:1\r\n$3\r\nabc\r\n%1\r\n+a\r\n*0\r\n"
    for _ in range(300):
        _, waiter = pipeline.command("X")
        pipeline.feed(reply)
        assert waiter.done
    pipeline.command("X")
    pipeline.feed(b"*%d\r\n" % c.MAX_ELEMENTS)
    assert pipeline.in_flight == 1
