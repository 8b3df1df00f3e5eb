"""Maintenance of the server of a Connection, as the server announces it.

Before the server moves, a second socket is opened to the new address, with the whole handshake,
by a pipeline of its own. Then operations wait for a moment, until each one under way has its
reply over the old socket, and go on over the new one. So none is lost, and none is in doubt.

On a cluster, the nodes announce which slots have moved, and ``cluster.py`` follows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import _backend
from ..config.address import join_address
from ..core.recovery import change_timeout
from ..errors import ConnectionLost, DscacheError
from ..net.backoff import full_jitter
from ..net.maintenance import (
    MOVE_PAUSE,
    MOVE_PAUSE_CAP,
    MOVING,
    SLOTS_MOVED,
    Announcements,
    Leeway,
    NewAddress,
    Notice,
)
from .deadlines import SureTimer
from .endpoint import Endpoint
from .heartbeat import Heartbeat
from .protocol import SocketProtocol, request_greeting

if TYPE_CHECKING:
    from .connection import Connection

_logger = logging.getLogger("dscache")

# How often to look whether the replies that are due have come, in seconds.
_GLANCE = 0.002


class _Quiet:
    """The listener of a socket without operations."""

    def on_replies(self) -> None: ...

    def on_writable(self) -> None: ...


class Maintenance:
    """Follows the announcements of a server: gives operations more time, and moves with it.

    Without ``announcements`` it does nothing. ``on_slots_moved`` is given for a node of a cluster,
    which doesn't move: it is called with each new announcement of slots that have.
    """

    def __init__(
        self,
        node: Connection,
        endpoint: Endpoint,
        heartbeat: Heartbeat,
        announcements: Announcements | None,
        on_slots_moved: Callable[[Notice], object] | None = None,
    ) -> None:
        self._node = node
        self._endpoint = endpoint
        self._heartbeat = heartbeat
        self._announcements = announcements
        self._loop = asyncio.get_running_loop()
        self._on_slots_moved = on_slots_moved
        self._usual = node.pipeline.timeout
        self._leeway = Leeway(self._usual)
        self._over = SureTimer(self._end_if_over)
        self._task: asyncio.Task[None] | None = None
        # A move that was announced during the login, and when.
        self._early: tuple[Notice, float] | None = None
        if announcements is not None:
            node.pipeline.on_push = self._on_push

    async def close(self) -> None:
        """End the move under way; the present socket stays in use."""
        self.stop()
        if self._task is not None and self._task is not asyncio.current_task():
            await asyncio.wait([self._task])

    def stop(self) -> None:
        """Stop the timers, and have a move end soon."""
        self._announcements = None
        self._over.stop()
        if self._task is not None and not self._loop.is_closed():
            self._task.cancel()

    def _on_push(self, push: list[Any]) -> None:
        """Take a push, while the pipeline reads replies."""
        if self._announcements is None:
            return
        notice = self._announcements.read(push, self._node.address)
        if notice is not None:
            self._loop.call_soon(self._follow, notice)

    def _follow(self, notice: Notice) -> None:
        announcements = self._announcements
        if announcements is None:
            return
        is_new = announcements.is_new(notice, self._node.address)
        now = time.monotonic()
        seconds = self._leeway.follow(notice, now)
        if self._leeway.until is not None:
            self._over.start(self._leeway.until - now)
        if seconds is not None:
            self._change(seconds, notice.kind.decode())
        if is_new and notice.kind == MOVING and self._on_slots_moved is None:
            self._move(notice, self._loop.time())
        elif is_new and notice.kind in (MOVING, SLOTS_MOVED) and self._on_slots_moved is not None:
            self._on_slots_moved(notice)

    # -- more time

    def _end_if_over(self) -> None:
        """End the maintenance at its latest time; a timer may be early, and is set again then."""
        now = time.monotonic()
        if (seconds := self._leeway.end_if_over(now)) is not None:
            self._change(seconds)
        elif self._leeway.until is not None:
            self._over.start(self._leeway.until - now)

    def _change(self, seconds: float, kind: str = "") -> None:
        """Change the timeout of operations, after the announcement of a kind."""
        node = self._node
        change_timeout(node.pipeline, seconds)
        if self._leeway.until is not None:
            self._heartbeat.be_patient(seconds)
            if self._announcements is not None:
                self._announcements.count_relaxed()
            _logger.info(
                "%s announces %s: operations have %.0f s until it is over",
                node.address,
                kind,
                seconds,
            )
            return
        self._over.stop()
        self._heartbeat.be_patient(0)
        node.expire_soon()
        _logger.info("the maintenance of %s is over", node.address)

    # -- another address

    def on_connected(self) -> None:
        """Follow the server, if it has announced during the login that it moves."""
        early, self._early = self._early, None
        if early is not None and self._announcements is not None:
            self._move(*early)

    def _move(self, notice: Notice, since: float) -> None:
        """Follow the server, which has announced at a time of the loop that it moves."""
        link = self._node.link
        if link is None:
            self._early = notice, since
            return
        if self._task is not None:
            self._task.cancel()
        _logger.info(
            "%s announces MOVING within %d s: it is followed to %s",
            self._node.address,
            notice.seconds,
            "its usual address" if notice.endpoint is None else join_address(*notice.endpoint),
        )
        self._task = self._loop.create_task(
            self._follow_server(notice, since, link),
            name=f"dscache moves from {self._node.address}",
        )

    async def _follow_server(self, notice: Notice, since: float, old: SocketProtocol) -> None:
        """Move to the new address in time, unless the old socket is lost before."""
        until = since + notice.patience
        if notice.endpoint is None:
            # The name leads to the new server only after a while.
            await asyncio.sleep(since + notice.seconds / 2 - self._loop.time())
        self._endpoint.move(notice.endpoint, until - self._loop.time())
        failures = 0
        while self._node.link is old and self._loop.time() < until:
            if await self._try_to_move(notice, old, until):
                return
            failures += 1
            await asyncio.sleep(full_jitter(MOVE_PAUSE, MOVE_PAUSE_CAP, failures))

    async def _try_to_move(self, notice: Notice, old: SocketProtocol, until: float) -> bool:
        # The address of the node stays that of the present socket until the other one is in use.
        node, endpoint = self._node, copy(self._endpoint)
        # A watch may have failed at the new address, so that the usual one is next for the others.
        endpoint.new_address = NewAddress()
        endpoint.move(notice.endpoint, until - self._loop.time())
        options = endpoint.options
        pipeline = _backend.core.Pipeline(
            self._loop.create_future,
            lambda: None,
            address=node.address,
            **options.for_pipeline(),
        )
        pipeline.on_push = self._on_push
        link = SocketProtocol(_Quiet(), pipeline)
        is_moved = False
        try:
            async with asyncio.timeout(options.connect_timeout / 1000):
                await endpoint.open(link)
                address = pipeline.address = endpoint.address
                renewals = node.renewals
                greeting = await endpoint.greet(partial(request_greeting, link))
            old.hold(True)
            try:
                # As long as this, each operation waits.
                patience = min(until, self._loop.time() + self._usual / 2)
                while node.pipeline.in_flight and node.link is old and not link.is_cut:
                    if self._loop.time() >= patience:
                        return False
                    await asyncio.sleep(_GLANCE)
                if node.link is old and not (old.is_cut or link.is_cut or pipeline.partial):
                    is_moved = True
                    node.replace(link, greeting, address, "the server has moved")
                    node.catch_up(renewals)
                    if self._announcements is not None:
                        self._announcements.count_move()
                return is_moved
            finally:
                old.hold(False)
                if not is_moved:
                    node.on_writable()
        except (OSError, DscacheError, UnicodeError) as error:
            _logger.info("can't move to %s yet: %s", endpoint.address, error)
            return False
        finally:
            if not is_moved:
                link.abort(ConnectionLost("it was closed"))
