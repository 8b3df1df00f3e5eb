"""Sentinels, sans-IO: the commands to send them, and which of their replies to believe.

Source: the Redis pages "High availability with Redis Sentinel" and "Sentinel client spec".
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from ..config import Options, SentinelNode
from ..config.address import read_address
from ..errors import ConnectError, clean
from .credentials import hidden, masked

# A Sentinel shows a replica that it can't reach with one of these flags.
_DOWN: Final = frozenset(("o_down", "s_down", "disconnected"))

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """The address that one Sentinel names.

    A higher epoch is a newer configuration of the group; -1 if the Sentinel doesn't state it.
    """

    epoch: int
    address: Address


class SentinelGroup:
    """The Sentinels of one group: what to ask each of them, and the newest answer so far.

    ``commands`` go to each Sentinel, and ``read`` makes an Answer of the replies. Any thread may
    use it.
    """

    def __init__(self, options: Options) -> None:
        self.nodes: tuple[SentinelNode, ...] = tuple(options.sentinels or ())
        self.name = options.name or ""
        self.seeks_primary = options.role == "master"
        self.commands: tuple[tuple[str, ...], ...] = (("SENTINEL", "SLAVES", self.name),)
        if self.seeks_primary:
            # The epoch is read first: if both change in between, the answer is newer than its
            # epoch says, and never older.
            self.commands = (
                ("SENTINEL", "MASTER", self.name),
                ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name),
            )
        self._sought = "primary" if self.seeks_primary else "replica"
        self._password = hidden(options.sentinel_password)
        self._numbers = count(1)
        # The answers of surveys by their numbers. Only the latest counts.
        self._concluded = {0: Answer(-1, ("", 0))}

    @property
    def _newest(self) -> Answer:
        """The answer of the latest survey that has ended."""
        concluded = self._concluded.copy()  # in one step: other threads change it
        return concluded[max(concluded)]

    def seconds_each(self, seconds: float) -> float:
        """Return the time limit for each Sentinel, out of all the seconds of an attempt.

        A share is left for the server itself.
        """
        return seconds / (len(self.nodes) + 1)

    def read(self, replies: Sequence[Any]) -> Answer | None:
        """Return the answer that the replies to ``commands`` state, or None if they name no server.

        An error reply stands among them as an exception. Raises that error, or a ValueError,
        TypeError, LookupError or AttributeError for replies of another shape.
        """
        return _read_primary(*replies) if self.seeks_primary else _read_replica(*replies)

    def begin(self) -> int:
        """Return the number of a survey that begins now; pass it to ``conclude``."""
        return next(self._numbers)

    def is_enough(self, answers: Collection[Answer]) -> bool:
        """Whether these answers decide a survey, without the outstanding ones.

        For a replica, one answer is enough. For the primary, it takes a majority: otherwise a
        Sentinel that went down with the old primary would delay finding the new one by its time
        limit. Answers older than the newest known configuration don't decide.
        """
        if not self.seeks_primary:
            return bool(answers)
        is_majority = len(answers) > len(self.nodes) // 2
        return is_majority and max(one.epoch for one in answers) >= self._newest.epoch

    def conclude(self, number: int, replies: Collection[Answer | str | None]) -> Address:
        """Return the address to believe: of the newest epoch, the one named most often.

        If a survey that began later has ended before, its address is returned. If every Sentinel
        has answered with an older epoch than before, they are other Sentinels, and are believed.
        The ``replies`` hold the problems of Sentinels without an answer, and None for an
        outstanding answer. Raises ConnectError, with the problems, if there is no answer.
        """
        answers = [one for one in replies if isinstance(one, Answer)]
        if not answers:
            problems = [one for one in replies if isinstance(one, str)]
            raise ConnectError(
                f'no Sentinel names a {self._sought} of "{self.name}": {"; ".join(problems)}'
            )
        if not self.seeks_primary:
            return answers[0].address
        epoch = max(one.epoch for one in answers)
        newest = [one for one in answers if one.epoch == epoch]
        # Without a lock: surveys may end in several threads at once, in any order.
        concluded = self._concluded
        concluded[number] = max(newest, key=newest.count)
        latest = max(concluded.copy())
        for earlier in concluded.copy():
            if earlier < latest:
                concluded.pop(earlier, None)
        return self._newest.address

    def names_none(self, node: SentinelNode) -> str:
        """Return the problem of a Sentinel that names no server."""
        return f"{node.address}: it reports no {self._sought} that is up"

    def shown(self, error: Exception, seconds: float) -> str:
        """Return the text of a failed query with the password masked.

        ``seconds`` is the time that the query had.
        """
        if isinstance(error, TimeoutError):
            return f"no answer within {seconds * 1000:.0f} ms"
        return masked(clean(str(error)), [self._password]) or type(error).__name__


def without_introduction(connection: Callable[..., Any]) -> dict[str, None]:
    """Return the arguments for which a connection of redis-py sends no CLIENT SETINFO.

    It would ignore the error with which a Sentinel turns a client away.
    """
    known = inspect.signature(connection).parameters
    return (
        {"driver_info": None} if "driver_info" in known else {"lib_name": None, "lib_version": None}
    )


def pairs(flat: Sequence[str]) -> dict[str, str]:
    """Return the names and values that a reply lists in turn."""
    return dict(zip(flat[::2], flat[1::2], strict=False))


def _read_primary(state: Any, address: Any) -> Answer | None:
    if isinstance(address, Exception):
        raise address
    if address is None:
        return None
    # An ACL may forbid SENTINEL MASTER and allow the other.
    facts = {} if isinstance(state, Exception) else pairs(state)
    host, port = address
    return Answer(read_epoch(facts.get("config-epoch")), read_address(host, port))


def _read_replica(replicas: Any) -> Answer | None:
    """Return one of the replicas that the Sentinel doesn't take for down, at random."""
    if isinstance(replicas, Exception):
        raise replicas
    facts = [pairs(replica) for replica in replicas]
    up = [one for one in facts if _DOWN.isdisjoint(one["flags"].split(","))]
    if not up:
        return None
    replica = random.choice(up)
    return Answer(-1, read_address(replica["ip"], replica["port"]))


def read_epoch(text: object) -> int:
    """Return the epoch that a Sentinel states as text, or -1 if that is none."""
    return int(text) if type(text) is str and text.isdecimal() and len(text) < 20 else -1
