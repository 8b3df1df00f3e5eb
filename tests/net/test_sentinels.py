"""The choice among the answers of Sentinels."""

from __future__ import annotations

from collections.abc import Callable

from dscache.config import load
from dscache.net.sentinels import Answer, SentinelGroup

OLD, NEW = ("10.0.0.1", 6379), ("10.0.0.2", 6379)


class Slow(Answer):
    """An answer at whose first use something else happens."""

    def __init__(self, answer: Answer, meanwhile: Callable[[], object]) -> None:
        object.__setattr__(self, "address", answer.address)
        self.__dict__.update(answer=answer, meanwhile=[meanwhile])

    @property
    def epoch(self) -> int:  # type: ignore[override] # a field there
        while self.__dict__["meanwhile"]:
            self.__dict__["meanwhile"].pop()()
        answer: Answer = self.__dict__["answer"]
        return answer.epoch


def group() -> SentinelGroup:
    options = {"sentinels": [{"host": "10.0.0.9", "port": 26379}], "name": "main"}
    return SentinelGroup(load({"name": "redis", "options": options}).options)


def test_an_earlier_survey_does_not_replace_a_later_one_that_ends_before() -> None:
    sentinels = group()
    first, second = sentinels.begin(), sentinels.begin()
    assert sentinels.conclude(second, [Answer(2, NEW)]) == NEW
    assert sentinels.conclude(first, [Answer(1, OLD)]) == NEW
    third = sentinels.begin()
    assert sentinels.conclude(third, [Answer(1, OLD)]) == OLD  # they are other Sentinels


def test_a_later_survey_may_end_while_an_earlier_one_does() -> None:
    """In another thread, between any two steps."""
    sentinels = group()
    first, second = sentinels.begin(), sentinels.begin()
    slow = Slow(Answer(1, OLD), lambda: sentinels.conclude(second, [Answer(2, NEW)]))
    assert sentinels.conclude(first, [slow]) == NEW
    assert not sentinels.is_enough([Answer(1, OLD)])  # it is older than what is known
    assert sentinels.is_enough([Answer(2, NEW)])
