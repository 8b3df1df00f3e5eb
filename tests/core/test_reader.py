"""The limits of announced lengths in the pure core, whose exact check is put off if it can be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscache.core import constants as c
from dscache.core import pure
from dscache.core.reader import LengthGuard
from dscache.errors import ProtocolError
from tests.support.wire import Waiter

TEXT = b'{"a":"\n*2 or > 3"}'


def texts(count: int) -> bytes:
    return b"$1\r\n7\r\n" * (count - 1) + b"$%d\r\n%s\r\n" % (len(TEXT), TEXT)


ELEMENTS = [
    *(b"$1\r\n7\r\n", texts(1), b"$-1\r\n", b":7\r\n", b"+OK\r\n", b"_\r\n", b"*0\r\n", b"%0\r\n"),
    *(b"*2\r\n", b"%1\r\n", b">3\r\n", b"~1\r\n", b"*1\r\n" * c.MAX_DEPTH, b"*600000\r\n"),
    *(b"$900\r\n" + b"x" * 900 + b"\r\n", b"$1001\r\n", b"$0000000003\r\nabc\r\n", b"*1048577\r\n"),
    *(b"%524289\r\n", b"*00000000000000000000000002\r\n", b"$" + b"9" * 70 + b"\r\n"),
]


@given(st.lists(st.sampled_from(ELEMENTS)), st.lists(st.integers(1, 40)))
def test_the_check_is_never_put_off_too_long(elements: list[bytes], cuts: list[int]) -> None:
    """The same bytes are the first to be refused as by a guard that puts off nothing."""
    guard, exact = LengthGuard(1000), LengthGuard(1000)
    data = b"".join(elements)
    while data:
        size = cuts.pop() if cuts else len(data)
        part, data = data[:size], data[size:]
        errors = []
        for inspect in (guard.inspect, exact._inspect_exactly):
            try:
                inspect(part, "here")
            except ProtocolError as error:
                errors.append(str(error))
        if errors:
            assert len(errors) == 2
            assert errors[0] == errors[1]
            return


@pytest.mark.parametrize("size", [1 << 16, 1000, 80])
def test_replies_to_reads_need_no_exact_check(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inspected = []
    monkeypatch.setattr(LengthGuard, "_inspect_exactly", lambda *_: inspected.append(1))
    pipeline: Any = pure.Pipeline(Waiter, lambda: None)
    names = [f"user/{i}" for i in range(1000)]
    waiters = [pipeline.get_bulk(names) for _ in range(10)]
    while pipeline.queued:
        pipeline.take_output()
        data = b"".join(
            b"*%d\r\n" % (2 * count) + b'$1\r\n7\r\n$14\r\n{"a":"* or >"}\r\n' * count
            for _, count in pipeline.slots
        )
        for start in range(0, len(data), size):
            pipeline.feed(data[start : start + size])
    assert all(list(waiter.value) == names for waiter in waiters)
    assert not inspected


def test_a_reply_that_ended_no_longer_counts() -> None:
    pipeline: Any = pure.Pipeline(Waiter, lambda: None)
    for i in range(5 * c.MAX_DEPTH):
        waiter = pipeline.get(f"user/{i}")
        pipeline.take_output()
        pipeline.feed(b"*2\r\n$1\r\n7\r\n")
        pipeline.feed(b"$1\r\n1\r\n")
        assert waiter.value.version == 7
    pipeline.get("user/1")
    pipeline.take_output()
    with pytest.raises(ProtocolError, match="1048577"):
        pipeline.feed(b"*2\r\n*1048577\r\n")
