"""The Sentinels of a group, on an event loop: the address they name, and news of another primary.

All of it goes through redis-py's connections. Its clients won't do: they make a lost subscription
again at once and without a pause, and don't notice one that fell silent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

from redis.asyncio import Connection
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from ..config import Options, SentinelNode
from ..errors import ConnectError
from ..net.backoff import full_jitter
from ..net.sentinels import Address, Answer, SentinelGroup, without_introduction
from ..net.sockets import ATTEMPT_DELAY, NoneAccepts, interleaved, shown_address
from .resolver import Resolver

# Not all versions of redis-py know the same arguments.
_QUIET: Any = without_introduction(AbstractConnection)

_logger = logging.getLogger("dscache")

# The Sentinel that promotes a replica publishes the first of these at once, when it already names
# the new primary, and the other once the remaining replicas follow it. All others publish only the
# other.
_EVENTS = ("+promoted-slave", "+switch-master")
# A PING goes out on a subscription after this many seconds without a message, and the reply must
# come within the other figure: a dead Sentinel is found within 10 s.
_PING_AFTER = 5.0
_PING_ANSWER = 4.0
# The pause before the next subscription: up to the first, doubled up to the other.
_PAUSE = 1.0
_LONGEST_PAUSE = 5.0


class Sentinels:
    """The Sentinels of one group, on the event loop that runs."""

    def __init__(self, options: Options, resolver: Resolver) -> None:
        self._options = options
        self._resolver = resolver
        self._group = SentinelGroup(options)
        self._nodes = self._group.nodes
        self._seconds = self._group.seconds_each(options.connect_timeout / 1000)
        self._loop = asyncio.get_running_loop()
        # Addresses of Sentinels that have published since the primary was last looked for.
        self._news: set[str] = set()
        self._is_news = asyncio.Event()
        self._ending: set[asyncio.Task[None]] = set()

    async def locate(self) -> Address:
        """Return the host and port of the group's primary, or of one of its replicas.

        Raises ConnectError, with the reason of each Sentinel, if none names one.
        """
        if self._group.seeks_primary:
            return await self._locate_primary(())
        replies: list[Answer | str] = []
        for node in self._nodes:
            replies.append(await self._query(node))
            if isinstance(replies[-1], Answer):
                break
        return self._group.conclude(self._group.begin(), replies)

    async def follow(self, moved: Callable[[str, int], None]) -> None:
        """Call ``moved`` with the host and port of the primary at every sign of a new one.

        The address may be the same as before. Runs until it is cancelled, and raises nothing else.
        """
        async with asyncio.TaskGroup() as tasks:
            for node in self._nodes:
                tasks.create_task(self._listen(node), name=f"dscache listens to {node.address}")
            tasks.create_task(self._report(moved), name="dscache looks for a new primary")

    async def execute(self, node: SentinelNode, commands: Sequence[Sequence[str]]) -> list[object]:
        """Return one Sentinel's replies to some commands, over a connection of their own.

        An error reply stands among them as a ResponseError. Raises RedisError or OSError if the
        Sentinel can't be reached or refuses the login, or any other error if its replies are no
        RESP.
        """
        connection: Connection | None = None
        refusal: ResponseError | None = None
        try:
            connection = await self._connect(node)
            replies: list[object] = []
            # All at once: one that closes has often said why, which a failed write would hide.
            packed = connection.pack_commands([list(command) for command in commands])
            await connection.send_packed_command(packed)
            for _ in commands:
                try:
                    replies.append(await _read(connection))
                except ResponseError as error:
                    refusal = error
                    replies.append(error)
            return replies
        except (RedisError, OSError):
            if refusal is None:
                raise
            raise refusal from None
        finally:
            await self._disconnect(connection)

    def shown(self, error: Exception, seconds: float) -> str:
        """Return why a Sentinel gave no answer within so many seconds, without its password."""
        return self._group.shown(error, seconds)

    def look(self) -> None:
        """Look for the primary now, if ``follow`` runs: there is a sign of a new one."""
        self._is_news.set()

    # -- the address of the primary

    async def _locate_primary(self, needed: Collection[str]) -> Address:
        """Survey all Sentinels at once; return the primary of the newest configuration."""
        number = self._group.begin()
        return self._group.conclude(number, await self._survey(needed))

    async def _survey(self, needed: Collection[str]) -> list[Answer | str | None]:
        """Return the answer or the problem of each Sentinel; None for one still outstanding.

        Ends as soon as the answers are enough and those of the addresses ``needed`` are there.
        """
        tasks = [
            self._loop.create_task(self._query(node), name=f"dscache asks {node.address}")
            for node in self._nodes
        ]
        try:
            while True:
                replies = [task.result() if task.done() else None for task in tasks]
                answers = [one for one in replies if isinstance(one, Answer)]
                is_missing = any(
                    one is None and node.address in needed
                    for one, node in zip(replies, self._nodes, strict=True)
                )
                is_enough = self._group.is_enough(answers) and not is_missing
                if is_enough or None not in replies:
                    return replies
                await asyncio.wait(
                    [task for task in tasks if not task.done()],
                    return_when=asyncio.FIRST_COMPLETED,
                )
        finally:
            # On a loop that was stopped for good nothing can be awaited: it drops the tasks.
            if self._loop.is_running():
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)

    async def _query(self, node: SentinelNode) -> Answer | str:
        """Return a Sentinel's answer, or its address and why it has none."""
        try:
            async with asyncio.timeout(self._seconds):
                replies = await self.execute(node, self._group.commands)
            answer = self._group.read(replies)
        except Exception as error:  # redis-py may raise anything for replies that are no RESP
            return f"{node.address}: {self.shown(error, self._seconds)}"
        return answer or self._group.names_none(node)

    # -- news

    async def _report(self, moved: Callable[[str, int], None]) -> None:
        failures = 0
        while True:
            await self._is_news.wait()
            self._is_news.clear()
            needed, self._news = self._news, set()
            try:
                address = await self._locate_primary(needed)
            except ConnectError:
                # Survey again: the news would be lost otherwise.
                await _pause(failures)
                failures += 1
                self._note(*needed)
            else:
                failures = 0
                moved(*address)

    def _note(self, *addresses: str) -> None:
        self._news.update(addresses)
        self._is_news.set()

    async def _listen(self, node: SentinelNode) -> None:
        """Keep a subscription to a Sentinel, and note when it has news."""
        failures = 0
        complained = False
        while True:
            began = self._loop.time()
            connection: Connection | None = None
            try:
                async with asyncio.timeout(_PING_ANSWER):
                    connection = await self._connect(node)
                    await connection.send_command("SUBSCRIBE", *_EVENTS)
                    for _ in _EVENTS:
                        await _read(connection)
                if complained:
                    _logger.info("subscribed to the Sentinel %s again", node.address)
                complained = False
                self._note(node.address)  # for news published before the subscription
                await self._hear(connection, node.address)
            except Exception as error:  # redis-py may raise anything, as above
                if not self._loop.is_running():
                    return
                if not complained:
                    reason = self.shown(error, _PING_ANSWER)
                    _logger.warning("can't subscribe to the Sentinel %s: %s", node.address, reason)
                complained = True
                # An ACL may forbid SUBSCRIBE and allow SENTINEL.
                if isinstance(error, ResponseError):
                    self._note(node.address)
            finally:
                await self._disconnect(connection)
            failures = 0 if self._loop.time() - began > _PING_AFTER else failures + 1
            await _pause(failures)

    async def _hear(self, connection: Connection, address: str) -> None:
        """Note each message about this group; raises TimeoutError if a PING isn't answered."""
        is_pinged = False
        while True:
            wait = _PING_ANSWER if is_pinged else _PING_AFTER
            match await _read(connection, wait):
                case None if is_pinged:
                    raise TimeoutError
                case None:
                    is_pinged = True
                    await connection.send_command("PING")
                    continue
                case ["message", _, str(text)] if self._group.name in text.split(" "):
                    self._note(address)
            is_pinged = False

    # -- connections

    async def _connect(self, node: SentinelNode) -> Connection:
        """Return a connection to a Sentinel, by the first of its addresses that answers."""
        found = await self._resolver.look_up(node.host, node.port)
        addresses = [address for *_, address in interleaved(found)]
        attempts: dict[asyncio.Task[Connection], str] = {}
        tried: dict[str, str] = {}
        failure: Exception = OSError("it has no address")
        try:
            while addresses or attempts:
                if addresses:
                    host, port, *_ = address = addresses.pop(0)
                    attempt = self._loop.create_task(self._connect_to(host, port))
                    attempts[attempt] = shown_address(address)
                done, _ = await asyncio.wait(
                    attempts,
                    timeout=ATTEMPT_DELAY if addresses else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for attempt in done:
                    try:
                        connection = attempt.result()
                    except (RedisError, OSError) as error:
                        failure = error
                        tried[attempts.pop(attempt)] = str(error) or type(error).__name__
                        if isinstance(error, (AuthenticationError, ResponseError)):
                            raise  # the Sentinel has answered, and refuses the login
                    else:
                        del attempts[attempt]
                        return connection
        finally:
            for attempt in attempts:
                attempt.cancel()
                attempt.add_done_callback(self._abandoned)
        if len(tried) > 1:
            reasons = "; ".join(f"{address}: {reason}" for address, reason in tried.items())
            raise NoneAccepts(getattr(failure, "errno", None), reasons)
        raise failure

    def _abandoned(self, attempt: asyncio.Task[Connection]) -> None:
        """End the connection of an attempt that another one has overtaken."""
        if not attempt.cancelled() and attempt.exception() is None:
            self._ending.add(ending := self._loop.create_task(self._disconnect(attempt.result())))
            ending.add_done_callback(self._ending.discard)

    async def _connect_to(self, host: str, port: int) -> Connection:
        # An address, not a name: the loop would look that up in an executor of the program's.
        connection = Connection(
            host=host,
            port=port,
            username=self._options.sentinel_username,
            password=self._options.sentinel_password,
            # Callers have one time limit for all steps together.
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            decode_responses=True,
            **_QUIET,
        )
        try:
            await connection.connect()  # type: ignore[no-untyped-call] # untyped in redis-py
        except BaseException:
            if self._loop.is_running():
                await self._disconnect(connection)
                raise
            # The program has ended, and Python closes this coroutine. redis-py's own cleanup needs
            # a running loop, and its error would be printed.
        return connection

    async def _disconnect(self, connection: Connection | None) -> None:
        if connection is not None and self._loop.is_running():
            with suppress(RedisError, OSError):
                await connection.disconnect(nowait=True)


async def _read(connection: Connection, seconds: float | None = None) -> Any:
    """Read a reply; return None if none arrives in so many seconds.

    The caller disconnects after an error. redis-py's own attempt needs a running loop, so it would
    print an error if Python closes this coroutine at the end of the program.
    """
    return await connection.read_response(timeout=seconds, disconnect_on_error=False)


async def _pause(failures: int) -> None:
    await asyncio.sleep(full_jitter(_PAUSE, _LONGEST_PAUSE, failures))
