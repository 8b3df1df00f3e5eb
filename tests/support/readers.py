"""The two readers of the compiled core, hiredis and its own, fed the same replies."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from dscache import _fast
from tests.support.grammar import Grammar
from tests.support.wire import ADDRESS, Waiter

READERS = ("hiredis", "own")
_EXAMPLES = 20
# Commands that wait for the replies of a case: some replies are left over now and then.
_COMMANDS = 5


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Let pipelines of the compiled core that are made meanwhile use one reader."""
    before = _fast.READER
    _fast._choose_reader(name)
    try:
        yield
    finally:
        _fast._choose_reader(before)


class _FastWithOwnReader:
    """The compiled core, of which each pipeline reads without hiredis."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_fast, name)

    def Pipeline(self, *arguments: Any, **options: Any) -> _fast.Pipeline:  # noqa: N802
        with reading("own"):
            return _fast.Pipeline(*arguments, **options)


# A core for ``@pytest.mark.parametrize``, beside those of ``tests.support.wire.CORES``.
FAST_WITH_OWN_READER = pytest.param(_FastWithOwnReader(), id="own-reader")


@dataclass
class Found:
    """Everything that a reader makes of data in pieces."""

    replies: list[Any] = field(default_factory=list)
    pushes: list[Any] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  # of both, after each piece
    error: tuple[str, str] | None = None

    def shown(self) -> Any:
        return ([*map(shown, self.replies)], [*map(shown, self.pushes)], self.counts, self.error)


def shown(value: Any) -> Any:
    """Return a reply as a value that is equal for equal replies, NaN and nested errors included."""
    if isinstance(value, list):
        return (type(value).__name__, [*map(shown, value)])
    if isinstance(value, dict):
        return ("dict", [(shown(key), shown(one)) for key, one in value.items()])
    return (type(value).__name__, repr(value))


def found_by(
    reader: str, pieces: Iterable[bytes], *, commands: int = _COMMANDS, in_place: bool = False
) -> Found:
    """Return what a reader makes of data, as replies to commands."""
    with reading(reader):
        pipeline = _fast.Pipeline(Waiter, lambda: None, address=ADDRESS, timeout=3600.0)
    found = Found()
    pipeline.on_push = found.pushes.append
    waiters = [pipeline.command("PING")[1] for _ in range(commands)]
    try:
        for piece in pieces:
            if in_place:
                _put(pipeline, piece)
            else:
                pipeline.feed(piece)
            found.counts.append(sum(one.done for one in waiters) + len(found.pushes))
    except Exception as error:
        found.error = (type(error).__name__, str(error))
    found.replies = [one.value if one.error is None else one.error for one in waiters if one.done]
    return found


def _put(pipeline: Any, piece: bytes) -> None:
    """Let data arrive in the pipeline's own buffer."""
    at = 0
    while at < len(piece):
        buffer = pipeline.get_buffer(-1)
        size = min(len(buffer), len(piece) - at)
        buffer[:size] = piece[at : at + size]
        pipeline.buffer_updated(size)
        at += size


def difference(pieces: Sequence[bytes], *, in_place: bool = False) -> str | None:
    """Return how the readers differ, if they do."""
    seen = [found_by(reader, pieces, in_place=in_place).shown() for reader in READERS]
    if seen[0] == seen[1]:
        return None
    return f"{str(seen[0])[:600]}, and {str(seen[1])[:600]}, from {[*pieces]!r:.600}"


class ReaderFuzzer:
    """Feeds both readers the same replies, valid and not, and notes each difference."""

    def __init__(self, seed: int) -> None:
        self.cases = 0
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self._seed = seed
        self._chance = random.Random(seed)
        self._grammar = Grammar(self._chance)

    def run(self, cases: int) -> None:
        """Run so many cases more."""
        chance, grammar = self._chance, self._grammar
        for _ in range(cases):
            count = chance.randrange(1, _COMMANDS)
            text = b"".join(grammar.any(4) for _ in range(count))
            how = chance.choices(("valid", "broken", "hostile"), (50, 35, 15))[0]
            if how == "broken":
                text = grammar.broken(text)
            elif how == "hostile":
                text = grammar.hostile(text)
            pieces = grammar.pieces(text)
            self.cases += 1
            self.outcomes[how] += 1
            problem = difference(pieces, in_place=chance.random() < 0.5)
            if problem is not None and len(self.problems) < _EXAMPLES:
                self.problems.append(f"case {self.cases} of seed {self._seed}: {problem}")
