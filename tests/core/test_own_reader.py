"""The compiled core's own reader of replies, beside hiredis."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from dscache import _fast
from dscache.core import constants as c
from dscache.errors import ConnectionLost, ProtocolError, ReplyError
from tests.support.grammar import BROKEN, VALUES
from tests.support.readers import READERS, ReaderFuzzer, difference, found_by, reading
from tests.support.wire import Exchange, Operation, Push, Refusal, Waiter, commands, resp

# Values of each type in each other, and texts of several lines.
NESTED = [
    resp([1, [b"two", None, [3.5, True, {b"k": [b"v", {b"w": b"x"}]}]], {1, 2}, "last"]),
    resp({b"a": {b"b": {b"c": [Refusal("ERR within"), []]}}, b"d": {}}),
    resp(Push([b"kind", [1, Push([b"inner"])], {b"k": b"v"}])) + resp("behind it"),
    resp([b"one\r\ntwo\r\n", "", b"", b"\r\n", Refusal(""), b"\r"]),
    b"|1\r\n+ttl\r\n:3600\r\n+OK\r\n",
    b"*3\r\n|1\r\n+k\r\n:1\r\n:2\r\n=8\r\nmkd:text\r\n",
    b"%2\r\n+same\r\n:1\r\n+same\r\n:2\r\n",
    b"%3\r\n+a\r\n:1\r\n+b\r\n*1\r\n:2\r\n+a\r\n:3\r\n",
    b"%2\r\n:1\r\n+one\r\n#t\r\n+true\r\n",
    b"%2\r\n,nan\r\n+one\r\n_\r\n+two\r\n",
    b"%1\r\n-ERR key\r\n+value\r\n",
    b"$1\r\nxAB:7\r\n",
    b">3\r\n+message\r\n$1\r\nc\r\n$1\r\nm\r\n:1\r\n",
]
DOUBLES = [
    *("1.", ".5", "-.5", "+1", "1e5", "1e+5", "1E-5", "1e+", "1.e5", ".", "-", "", "00", "01"),
    *("1_0", " 1", "1e-999", "0e-999", "0.0e999", "4.9e-324", "2e-324", "2.5e-324", "-0"),
    *("1e308", "1.8e308", "1e999", "0x1", "infinity", "InF", "-INF", "NaN", "-nAn", "nan(1)"),
    *("1" * 309, "1" * 325, "1" * 326, "0." + "0" * 320 + "1", "--1", "-e5", ".e5", "1.2.3"),
    *("1e00005", "1e99999999999999999999", "0e99999999999999999999", "1e-99999999999999999999"),
    *("1f", "9007199254740993", "1.7976931348623157e308", "1.7976931348623159e308", "1\0", "inf\0"),
    *("0.1", "-123.456e-7", "3.14159265358979323846264338327950288"),
]  # fmt: skip
INTEGERS = [
    *("0", "-0", "00", "-1", "-01", "1", "12345678901234567", "999999999999999999", "+1", "", "-"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775808", "1" * 18, "1" * 19),
    *("-9223372036854775809", "18446744073709551616", "1" * 20, "1" * 60, "1 ", " 1", "1\n", "1.0"),
]  # fmt: skip
# Each byte as a mark, and as the only one of a boolean.
MARKS = [bytes([byte]) for byte in range(256)]


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reader of the pipelines that the test makes."""
    with reading(request.param):
        yield request.param


@pytest.mark.parametrize("text", [*VALUES, *BROKEN, *NESTED], ids=repr)
def test_readers_agree_wherever_the_data_is_cut(text: bytes) -> None:
    text += b"+behind\r\n"
    for at in range(len(text)):
        assert difference([text[:at], text[at:]]) is None
        assert difference([text[:at], text[at : at + 1], text[at + 1 :]], in_place=True) is None
    assert difference([text[at : at + 1] for at in range(len(text))]) is None


def test_readers_agree_about_numbers() -> None:
    for number in DOUBLES:
        assert difference([b",%s\r\n:1\r\n" % number.encode()]) is None
    for number in INTEGERS:
        for mark in (b":", b"(", b"$", b"*", b"%", b"=", b"~", b"|"):
            assert difference([mark + number.encode() + b"\r\n:1\r\n:2\r\n"]) is None


def test_readers_agree_about_each_byte() -> None:
    for mark in MARKS:
        assert difference([mark]) is None
        assert difference([mark + b"1\r\n", b":1\r\n"]) is None
        assert difference([b"#" + mark + b"\r\n"]) is None


def test_readers_agree_about_replies_of_a_grammar() -> None:
    fuzzer = ReaderFuzzer(seed=7)
    fuzzer.run(3000)
    assert fuzzer.problems == []
    assert min(fuzzer.outcomes[how] for how in ("valid", "broken", "hostile")) > 100


def test_a_fuzzer_notes_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(reader: str, pieces: Any, **options: Any) -> Any:
        seen = found_by(reader, pieces, **options)
        seen.counts.append(len(reader))
        return seen

    monkeypatch.setattr("tests.support.readers.found_by", found)
    fuzzer = ReaderFuzzer(seed=7)
    fuzzer.run(2)
    assert len(fuzzer.problems) == 2


# -- the results, whichever reader


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"$3\r\nabc\r\n", b"abc"),
        (b"$-1\r\n", None),
        (b"*-1\r\n", None),
        (b"_\r\n", None),
        (b":-42\r\n", -42),
        (b"#t\r\n", True),
        (b"#F\r\n", False),
        (b",-2.5e3\r\n", -2500.0),
        (b",-inf\r\n", float("-inf")),
        (b"(-34928903284092385093\r\n", b"-34928903284092385093"),
        (b"=7\r\nmkd:abc\r\n", b"abc"),
        (b"~2\r\n:1\r\n:1\r\n", [1, 1]),
        (b"%1\r\n+k\r\n*1\r\n+v\r\n", {b"k": [b"v"]}),
        (b"|1\r\n+k\r\n:1\r\n", [b"k", 1]),
        (b"*2\r\n*0\r\n%0\r\n", [[], {}]),
    ],
)
def test_value_of_each_type(reader: str, text: bytes, value: object) -> None:
    [found] = found_by(reader, [text]).replies
    assert (type(found), found) == (type(value), value)


def test_error_within_an_array_is_an_object(reader: str) -> None:
    [found] = found_by(reader, [b"*2\r\n-WRONGTYPE a \xff\r\n:1\r\n"]).replies
    assert isinstance(found[0], ReplyError)
    assert (found[0].code, found[0].message, found[1]) == ("WRONGTYPE", "WRONGTYPE a \ufffd", 1)


@pytest.mark.parametrize("size", [0, 1, 1000, c.READ_BUFFER_BYTES - 9, 3 * c.READ_BUFFER_BYTES])
@pytest.mark.parametrize("mark", [b"$", b"=", b"+"])
def test_text_of_any_size(reader: str, mark: bytes, size: int) -> None:
    """Also one that is larger than the buffer for received data, in many pieces."""
    text = b"x" * size
    sent = mark + (text if mark == b"+" else b"%d\r\ntxt:%s" % (size + 4, text)) + b"\r\n"
    wanted = text if mark != b"$" else b"txt:" + text
    for step in (len(sent), 10_007, 65_536):
        pieces = [sent[at : at + step] for at in range(0, len(sent), step)]
        found = found_by(reader, [*pieces, b"*1\r\n$2\r\nok\r\n"])
        assert found.replies == [wanted, [b"ok"]]


def test_large_array_in_pieces(reader: str) -> None:
    value = [[b"%d" % i, i, None] for i in range(20_000)]
    sent = resp(value)
    pieces = [sent[at : at + 4099] for at in range(0, len(sent), 4099)]
    assert found_by(reader, pieces).replies == [value]


@pytest.mark.parametrize("mark", [b"*", b"~", b">", b"%", b"|", b"$"])
def test_nothing_is_reserved_for_an_announcement(mark: bytes) -> None:
    """A server may announce a million elements or half a gigabyte, and send nothing."""
    with reading("own"):
        pipelines = [_fast.Pipeline(Waiter, lambda: None, timeout=3600.0) for _ in range(20)]
    announced = mark + (b"%d\r\n" % (c.MAX_ELEMENTS // 4 if mark != b"$" else 500_000_000))
    for one in pipelines:
        one.command("PING")
        one.get_buffer(-1)
    tracemalloc.start()
    try:
        for one in pipelines:
            one.feed(announced)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 20 * 10_000


def test_memory_of_a_large_text_is_given_back() -> None:
    with reading("own"):
        pipeline = _fast.Pipeline(Waiter, lambda: None, timeout=3600.0)
    waiter = pipeline.command("PING")[1]
    piece = b"x" * 100_000
    tracemalloc.start()
    try:
        pipeline.feed(b"$10000000\r\n")
        for _ in range(100):
            pipeline.feed(piece)
        pipeline.feed(b"\r\n")
        assert waiter.value == piece * 100
        del waiter
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 1_000_000


# -- errors


def test_a_reader_that_failed_reads_nothing_more(reader: str) -> None:
    with reading(reader):
        pipeline = _fast.Pipeline(Waiter, lambda: None, timeout=3600.0)
    waiter = pipeline.command("PING")[1]
    for text in (b"*2\r\n:x\r\n", b":1\r\n", b"+PONG\r\n"):
        with pytest.raises(ProtocolError, match="sent no valid reply"):
            pipeline.feed(text)
    pipeline.connection_lost(ConnectionLost("gone"), False)
    pipeline.reset_reader()
    assert isinstance(waiter.error, ConnectionLost)
    waiter = pipeline.command("PING")[1]
    pipeline.feed(b"+PONG\r\n")
    assert waiter.value == b"PONG"


def test_half_a_reply_is_dropped_with_its_connection(reader: str) -> None:
    with reading(reader):
        pipeline = _fast.Pipeline(Waiter, lambda: None, timeout=3600.0)
    for part in (
        b"*3\r\n:1\r\n%1\r\n+k",
        b"$10\r\nabc",
        b"+PON",
        b"*1\r\n$3\r\nab",
        b"%1\r\n+k\r\n",
    ):
        pipeline.command("PING")
        pipeline.feed(part)
        pipeline.connection_lost(ConnectionLost("gone"), False)
        pipeline.reset_reader()
        waiter = pipeline.command("PING")[1]
        pipeline.feed(b"+PONG\r\n")
        assert waiter.value == b"PONG"


def test_data_that_arrives_while_an_error_is_made_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A finalizer or signal handler may run there, and use the pipeline."""
    with reading("own"):
        pipeline = _fast.Pipeline(Waiter, lambda: None, timeout=3600.0)
    make = ReplyError.__init__
    refused: list[ProtocolError] = []

    def feed_more(self: ReplyError, message: str) -> None:
        if not refused:
            with pytest.raises(ProtocolError, match="could not be read") as caught:
                pipeline.feed(b"+PONG\r\n")
            refused.append(caught.value)
        make(self, message)

    pipeline.command("PING")
    with monkeypatch.context() as patch:
        patch.setattr(ReplyError, "__init__", feed_more)
        with pytest.raises(ProtocolError):
            pipeline.feed(b"*1\r\n-ERR no\r\n")
    assert len(refused) == 1


def test_connection_that_ends_while_an_error_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    with reading("own"):
        pipeline = _fast.Pipeline(Waiter, lambda: None, timeout=3600.0)
    make = ReplyError.__init__

    def end(self: ReplyError, message: str) -> None:
        monkeypatch.undo()
        pipeline.connection_lost(ConnectionLost("gone"), False)
        make(self, message)

    waiters = [pipeline.command("PING")[1] for _ in range(2)]
    monkeypatch.setattr(ReplyError, "__init__", end)
    with pytest.raises(ProtocolError, match="its connection ended while it was read"):
        pipeline.feed(b"*2\r\n-ERR no\r\n:1\r\n+PONG\r\n")
    assert [str(one.error) for one in waiters] == [str(waiters[0].error)] * 2
    assert isinstance(waiters[0].error, ConnectionLost)
    pipeline.reset_reader()
    waiter = pipeline.command("PING")[1]
    pipeline.feed(b"+PONG\r\n")
    assert waiter.value == b"PONG"


# -- the rest of an MGET


@pytest.mark.parametrize(
    "odd", [b"$1\r\n7XY", b"+7\r\n", b"=5\r\ntxt:7\r\n", b":7\r\n", b"-ERR x\r\n"]
)
def test_mget_that_is_read_in_place_up_to_an_unusual_value(reader: str, odd: bytes) -> None:
    names = [f"n{i}" for i in range(6)]
    usual = b"$1\r\n7\r\n$2\r\n{}\r\n"
    for before in range(6):
        texts = [usual] * 6
        texts[before] = odd + b"$2\r\n{}\r\n"
        sent = b"*12\r\n" + b"".join(texts)
        outcomes = []
        for cut in (0, 6, len(sent) // 2, len(sent) - 3):
            exchange = Exchange(_fast)
            [waiter] = exchange.issue(Operation("get_bulk", names))
            [command] = commands(exchange.pipeline.take_output())
            assert command[0] == b"MGET"
            try:
                exchange.pipeline.feed(sent[:cut])
                exchange.pipeline.feed(sent[cut:])
            except ProtocolError as error:
                outcomes.append(str(error))
                continue
            behind = exchange.pipeline.command("PING")[1]
            exchange.pipeline.feed(b"+PONG\r\n")
            assert behind.value == b"PONG"
            outcomes.append(repr(waiter.value or waiter.error))
        wanted = "Record(" if odd[:1] in b"$+=" else "unexpected reply to MGET"
        assert len({*outcomes}) == 1
        assert wanted in outcomes[0]


# -- where hiredis isn't imported

WITHOUT = """
import json, sys
sys._is_gil_enabled = lambda: {gil}
from dscache import _fast
from dscache.errors import ReplyError
class Waiter:
    done = lambda self: False
    def set_result(self, value): found.append(repr(value))
    def set_exception(self, error): found.append(repr(error))
found = []
pipeline = _fast.Pipeline(Waiter, lambda: None, timeout=60.0)
pipeline.on_push = lambda push: found.append([type(push).__name__, *map(repr, push)])
sent, _ = pipeline.command("HELLO", 3, b"AUTH", "ü", "")
pipeline.feed(b">1\\r\\n+server\\r\\n%1\\r\\n+k\\r\\n*1\\r\\n-ERR x\\r\\n")
print(json.dumps([_fast.READER, "hiredis" in sys.modules, sent.decode(), found]))
"""


@pytest.mark.parametrize(("gil", "name"), [(True, "hiredis"), (False, "own")])
def test_hiredis_is_imported_only_with_the_gil(gil: bool, name: str) -> None:
    # A Python without the GIL warns where it is turned on.
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT.format(gil=gil)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    push = "PushNotification" if gil else "_Push"
    assert json.loads(done.stdout) == [
        name,
        gil,
        "*5\r\n$5\r\nHELLO\r\n$1\r\n3\r\n$4\r\nAUTH\r\n$2\r\nü\r\n$0\r\n\r\n",
        [[push, "b'server'"], "{b'k': [ReplyError('ERR x')]}"],
    ]


def test_an_unknown_reader_is_refused() -> None:
    before = _fast.READER
    with pytest.raises(ValueError, match='must be "hiredis" or "own", not \'libvalkey\''):
        _fast._choose_reader("libvalkey")
    assert before == _fast.READER
