"""Ask the Sentinels where the primary, or a replica, of a group is, and hear of each new one.

All of it goes through redis-py, and through its connections rather than its clients: those make
a lost subscription again at once and without a pause, and don't notice one that fell silent.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Connection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from ..config import Options, SentinelNode
from ..core import constants
from ..errors import ConnectError, clean
from ..net.credentials import hidden, masked
from .resolver import Resolver

_logger = logging.getLogger("dscache")

_DOWN = {"o_down", "s_down", "disconnected"}
# The one that promotes a replica says so first, when it already names that one, and that it has
# switched once the other replicas follow it; all the others say the latter alone.
_EVENTS = ("+promoted-slave", "+switch-master")
# A PING goes out on a subscription on which nothing came for so long, and must be answered
# within the other: a dead Sentinel is found within 10 s.
_PING_AFTER = 5.0
_PING_ANSWER = 4.0
# The pause before the next subscription: up to the first, doubled up to the other.
_PAUSE = 1.0
_LONGEST_PAUSE = 5.0


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one Sentinel knows: the higher the epoch, the newer; -1 if it doesn't tell."""

    epoch: int
    place: tuple[str, int]


_Question = Callable[[Any], Awaitable[_Answer | None]]


class Sentinels:
    """The Sentinels of one group, and the newest that they said."""

    def __init__(self, options: Options, resolver: Resolver) -> None:
        self._options = options
        self._resolver = resolver
        self._nodes = options.sentinels or ()
        # Each attempt to connect begins here, and needs most of its time for the rest.
        self._seconds = options.connect_timeout / 1000 / (len(self._nodes) + 1)
        self._loop = asyncio.get_running_loop()
        self._newest = _Answer(-1, ("", 0))
        self._begun = self._ended = 0
        # The addresses of Sentinels that have had news since the primary was last looked for.
        self._news: set[str] = set()
        self._is_news = asyncio.Event()

    async def locate(self) -> tuple[str, int]:
        """Return the host and port of the group's primary, or of one of its replicas.

        Raises ConnectError, with what each of the Sentinels said, if none names one.
        """
        if self._options.role == "master":
            return await self._locate_primary(())
        problems: list[str] = []
        for node in self._nodes:
            answer = await self._ask(node, self._replica)
            if isinstance(answer, _Answer):
                return answer.place
            problems.append(answer)
        raise self._nobody_knows("replica", problems)

    async def follow(self, moved: Callable[[str, int], None]) -> None:
        """Call ``moved`` with the host and port of the primary at every sign of a new one.

        It may be the same as before. Runs until it is cancelled, and raises nothing else.
        """
        async with asyncio.TaskGroup() as tasks:
            for node in self._nodes:
                tasks.create_task(self._listen(node), name=f"dscache listens to {node.address}")
            tasks.create_task(self._tell(moved), name="dscache looks for a new primary")

    # -- questions

    async def _locate_primary(self, needed: Collection[str]) -> tuple[str, int]:
        """Ask all Sentinels at once, and believe the one that knows the newest."""
        self._begun += 1
        number = self._begun
        said = await self._survey(needed)
        answers = [one for one in said if isinstance(one, _Answer)]
        if not answers:
            raise self._nobody_knows("primary", [one for one in said if isinstance(one, str)])
        # Where it was found out by what began later, that is newer than all of these.
        if number > self._ended:
            self._ended = number
            epoch = max(answer.epoch for answer in answers)
            places = [answer.place for answer in answers if answer.epoch == epoch]
            self._newest = _Answer(epoch, max(places, key=places.count))
        return self._newest.place

    async def _survey(self, needed: Collection[str]) -> list[_Answer | str | None]:
        """Return what each Sentinel answered, or what kept it from that; None if it still may.

        A majority is enough, or the new primary would be found no sooner than a Sentinel that is
        gone with the old one is given up; but not one that knows less than was known before, nor
        one without those whose addresses are ``needed``.
        """
        tasks = [
            self._loop.create_task(
                self._ask(node, self._primary), name=f"dscache asks {node.address}"
            )
            for node in self._nodes
        ]
        try:
            while True:
                said = [task.result() if task.done() else None for task in tasks]
                epochs = [answer.epoch for answer in said if isinstance(answer, _Answer)]
                missing = [
                    one
                    for one, node in zip(said, self._nodes, strict=True)
                    if one is None and node.address in needed
                ]
                enough = len(epochs) > len(tasks) // 2 and max(epochs) >= self._newest.epoch
                if (enough and not missing) or None not in said:
                    return said
                await asyncio.wait(
                    [task for task in tasks if not task.done()],
                    return_when=asyncio.FIRST_COMPLETED,
                )
        finally:
            # A loop that was left behind ends its tasks where they stand: nothing can be awaited.
            if self._loop.is_running():
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)

    async def _ask(self, node: SentinelNode, question: _Question) -> _Answer | str:
        """Return a Sentinel's answer, or its address and why it has none."""
        connection: Any = None
        try:
            async with asyncio.timeout(self._seconds):
                connection = await self.connect(node)
                answer = await question(connection)
        except Exception as error:  # redis-py may make anything of a Sentinel's nonsense
            return f"{node.address}: {self.as_connect_error(error, self._seconds)}"
        finally:
            await self.disconnect(connection)
        return answer or f"{node.address}: it knows of none that is up"

    async def _primary(self, connection: Any) -> _Answer | None:
        # The epoch first: should they change in between, the answer is newer than it looks, and
        # not the other way round.
        await connection.send_command("SENTINEL", "MASTER", self._options.name)
        await connection.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._options.name)
        try:
            state = pairs(await connection.read_response())
        except ResponseError:  # an ACL may allow no more than the other
            state = {}
        place = await connection.read_response()
        if place is None:
            return None
        host, port = place
        epoch = constants.read_epoch(state.get("config-epoch"))
        return _Answer(epoch, constants.read_address(host, port))

    async def _replica(self, connection: Any) -> _Answer | None:
        """Return any replica that the Sentinel doesn't take for down."""
        await connection.send_command("SENTINEL", "SLAVES", self._options.name)
        replicas = [pairs(replica) for replica in await connection.read_response()]
        up = [one for one in replicas if _DOWN.isdisjoint(one["flags"].split(","))]
        if not up:
            return None
        replica = random.choice(up)
        return _Answer(-1, constants.read_address(replica["ip"], replica["port"]))

    def _nobody_knows(self, sought: str, problems: list[str]) -> ConnectError:
        return ConnectError(
            f'no Sentinel names a {sought} of "{self._options.name}": {"; ".join(problems)}'
        )

    # -- news

    async def _tell(self, moved: Callable[[str, int], None]) -> None:
        """Look for the primary whenever there may be another one."""
        failures = 0
        while True:
            await self._is_news.wait()
            self._is_news.clear()
            needed, self._news = self._news, set()
            try:
                place = await self._locate_primary(needed)
            except ConnectError:
                # What one of them had to tell must not be missed because of a bad moment.
                await _pause(failures)
                failures += 1
                self._note(*needed)
            else:
                failures = 0
                moved(*place)

    def _note(self, *addresses: str) -> None:
        self._news.update(addresses)
        self._is_news.set()

    async def _listen(self, node: SentinelNode) -> None:
        """Keep a subscription to a Sentinel, and note when it has news."""
        failures = 0
        complained = False
        while True:
            began = self._loop.time()
            connection: Any = None
            try:
                async with asyncio.timeout(_PING_ANSWER):
                    connection = await self.connect(node)
                    await connection.send_command("SUBSCRIBE", *_EVENTS)
                    for _ in _EVENTS:
                        await connection.read_response()
                if complained:
                    _logger.info("the Sentinel %s is there again", node.address)
                complained = False
                self._note(node.address)  # for what happened before
                await self._hear(connection, node.address)
            except Exception as error:  # as above
                if not self._loop.is_running():
                    return
                if not complained:
                    _logger.warning(
                        "can't hear from the Sentinel %s of a new primary: %s",
                        node.address,
                        self.as_connect_error(error, _PING_ANSWER),
                    )
                complained = True
                if isinstance(error, ResponseError):  # it may be asked, and not listened to
                    self._note(node.address)
            finally:
                await self.disconnect(connection)
            failures = 0 if self._loop.time() - began > _PING_AFTER else failures + 1
            await _pause(failures)

    async def _hear(self, connection: Any, address: str) -> None:
        """Note what a Sentinel says of this group, for as long as it gives a sign of life."""
        asked = False
        while True:
            wait = _PING_ANSWER if asked else _PING_AFTER
            match await connection.read_response(timeout=wait):
                case None if asked:
                    raise TimeoutError
                case None:
                    asked = True
                    await connection.send_command("PING")
                    continue
                case ["message", _, str(words)] if self._options.name in words.split(" "):
                    self._note(address)
            asked = False

    # -- connections

    async def connect(self, node: SentinelNode) -> Any:
        """Return a connection to a Sentinel, of whose addresses each is tried in turn."""
        failure: Exception = OSError("it has no address")
        for *_, (host, port, *_) in await self._resolver.look_up(node.host, node.port):
            connection = self._connection(host, port)
            try:
                await connection.connect()
            except (RedisError, OSError) as error:
                await self.disconnect(connection)
                failure = error
                if isinstance(error, (AuthenticationError, ResponseError)):
                    break  # it is there, and says no
            except BaseException:
                await self.disconnect(connection)
                raise
            else:
                return connection
        raise failure

    def _connection(self, host: str, port: int) -> Any:
        # With a name, the loop would look it up in an executor that the program needs as well.
        return Connection(
            host=host,
            port=port,
            username=self._options.sentinel_username,
            password=self._options.sentinel_password,
            # Whoever uses it has a limit of his own for all of it together.
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            decode_responses=True,
        )

    async def disconnect(self, connection: Any) -> None:
        """End a connection to a Sentinel; None is ignored."""
        if connection is not None and self._loop.is_running():
            with suppress(RedisError, OSError):
                await connection.disconnect(nowait=True)

    def as_connect_error(self, error: Exception, seconds: float) -> str:
        """Return why a Sentinel could not be asked, without its password."""
        if isinstance(error, TimeoutError):
            return f"no answer within {seconds * 1000:.0f} ms"
        said = masked(clean(str(error)), [hidden(self._options.sentinel_password)])
        return said or type(error).__name__


def pairs(flat: list[str]) -> dict[str, str]:
    """Return the names and values that a reply lists in turn."""
    return dict(zip(flat[::2], flat[1::2], strict=False))


async def _pause(failures: int) -> None:
    # Full jitter: the clients of a Sentinel that restarts must not come all at once.
    await asyncio.sleep(random.uniform(0, min(_LONGEST_PAUSE, _PAUSE * 2 ** min(failures, 30))))
