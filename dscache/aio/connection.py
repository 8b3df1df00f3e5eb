"""The connection to one node: made, watched and made again, while operations wait for it.

A Connection owns the Pipeline of its node, which outlives every socket. ``endpoint.py`` opens a
socket and logs in. ``protocol.py`` is the socket.

A Connection is in one of four states:

- *connecting*: operations wait until their deadline
- *ready*
- *refused*: the server has refused the handshake, and operations fail at once with its error;
  attempts go on, since a password may be put right
- *closed*
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import _backend
from .._forks import after_fork_in_child
from ..config import Options
from ..core import constants
from ..core.failures import EndedHere, ErrorOf
from ..core.refusals import settle_doubts
from ..errors import ConnectError, ConnectionLost, ProtocolError
from ..net.backoff import half_jitter
from ..net.connect_errors import IF_PLAIN, as_connect_error, permanent_failure
from ..net.credentials import Hidden, Word
from ..net.foreign_errors import foreign
from ..net.handshake import ServerInfo
from ..net.maintenance import Announcements, NewAddress, Notice
from ..net.slot_table import NodeInfo
from .background_task import BackgroundTask
from .deadlines import Deadlines, SureTimer, wait_at_most
from .endpoint import Endpoint
from .heartbeat import Heartbeat
from .lifecycle import LoopBound, check_loop, check_process, closed
from .maintenance import Maintenance
from .protocol import PushProtocol, SocketProtocol, request, request_greeting, send_control
from .reconnect import Reconnect
from .resolver import Resolver

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from ..core.batch import Batch
    from ..core.pure import MessageDispatcher, NearCache, Pipeline

_logger = logging.getLogger("dscache")

# Operations of one tick expire together, up to this many seconds early.
_DEADLINE_GRAIN = 0.02
# A connection that lasted this many seconds was a good one: the next attempt comes soon.
_STEADY_AFTER = 1.0
# A step that is this many seconds late never comes.
_GRACE = 1.0


class NodeListener:
    """Hears of the events of nodes; here it does nothing."""

    def on_connected(self, node: Connection) -> None:
        """Operations can be sent to the node."""

    def check_identity(self, node: Connection, node_id: str) -> None:
        """A node tells its id, which may be empty. Raises ConnectError if it is a wrong one."""

    def on_disconnected(self, node: Connection) -> None:
        """The node was lost, or could not be reached."""

    def on_redirected(self, node: Connection) -> None:
        """The node has redirected operations: they are in ``pipeline.redirected``."""

    def on_progress(self, node: Connection) -> None:
        """A reply has arrived while the connection was ``watched``."""

    def on_slots_moved(self, notice: Notice) -> None:
        """A node announces that slots have moved, or that it moves itself."""

    def check_timers(self) -> None:
        """Set lost timers again; each node calls it now and then."""


class Connection(LoopBound):
    """The connection to one node: made, kept, made again, and closed.

    With a ``cluster`` it is one of several. With ``read_only`` a replica answers reads. Operations
    go to ``entry``: its pipeline, or a near cache before that. On a cluster all nodes have the same
    near cache, ``near``. ``endpoint`` replaces the one server that ``options`` name. ``inbox``
    takes the messages that arrive. The nodes of a cluster share a ``resolver``, and the
    ``announcements`` of their maintenance.
    """

    info: NodeInfo
    """The node of a cluster that it leads to, even while it is leaving."""

    def __init__(
        self,
        options: Options,
        credentials: CredentialProvider | None = None,
        *,
        cluster: NodeListener | None = None,
        read_only: bool = False,
        near: NearCache | None = None,
        endpoint: Endpoint | None = None,
        inbox: MessageDispatcher | None = None,
        resolver: Resolver | None = None,
        announcements: Announcements | None = None,
        owner: str = "an AsyncCache",
    ) -> None:
        super().__init__(owner)
        self.server = self.zone = ""
        self.watched = False
        """Whether the cluster hears of every reply."""
        self.redirections = 0
        """How many operations the node has redirected; the cluster counts them."""
        self._options = options
        self._cluster = cluster
        self._announcements: Announcements | None = None
        """The announcements that are this connection's alone."""
        if cluster is None and inbox is None and endpoint is None:
            self._announcements = announcements = Announcements(options)
        is_near = near is not None or (cluster is None and options.near_cache is not None)
        self._endpoint = endpoint or Endpoint(
            options,
            credentials,
            read_only=read_only,
            is_near=is_near,
            of_cluster=cluster is not None,
            resolver=resolver,
            may_be_proxy=cluster is None and inbox is None and options.sentinels is None,
            announcements=announcements,
        )
        self._endpoint.on_tls = self._on_tls
        self._endpoint.credentials.on_renewal(self._log_in_again, options.address)
        self.pipeline: Pipeline = _backend.core.Pipeline(
            self._loop.create_future,
            self._wake,
            begin=self._begin,
            address=self._endpoint.address,
            refuse_when_full=options.when_full == "error",
            clustered=cluster is not None,
            bound=True,
            **options.for_pipeline(),
        )
        self.pipeline.down = ConnectError("still connecting")
        self.pipeline.inbox = inbox
        self.pipeline.reconnects = options.leaves_replicas
        self.entry: Pipeline | NearCache = self.pipeline
        self._own_near: NearCache | None = None
        if is_near and near is None:
            self.entry = self._own_near = near = _backend.core.NearCache(
                self._loop.create_future,
                self.pipeline,
                check=self._check_owner,
                **options.for_near_cache(),
            )
        self._near = self.pipeline.near = near
        kept = options.near_cache if is_near else None
        idle_limit = None if kept is None else kept.idle_limit / 1000
        self._heartbeat = Heartbeat(self.pipeline, idle_limit, self._check)
        self._maintenance = Maintenance(
            self,
            self._endpoint,
            self._heartbeat,
            announcements,
            None if cluster is None else cluster.on_slots_moved,
        )
        self._reconnect = Reconnect(options.retry_strategy, self.pipeline)
        self.link: SocketProtocol | None = None
        """The socket of a connection that is ready."""
        # The socket that is being opened, is ready, or has ended without ``_settle``.
        self._socket: SocketProtocol | None = None
        self.refusal: ErrorOf | None = None
        """How operations fail while the server refuses the handshake."""
        self._attempting = False
        # When the next step of the keeper task is overdue.
        self._stuck_at = math.inf
        # Set while the state is ready, refused or closed: ``when_ready`` has a result then.
        self._decided = asyncio.Event()
        self._flush_due = False
        self._deadlines = Deadlines(self._expire)
        self._first_attempt: asyncio.Future[Exception | None] | None = None
        self._connects = 0
        self._renewed: list[str | Hidden] = []
        self.renewals = 0
        """How often there were new credentials."""
        self.last_loss = ""
        self._keeper = BackgroundTask(self._keep, f"dscache {self.address}", self._end)
        self._tasks = [self._keeper]
        if self._endpoint.may_move:
            follow = partial(self._endpoint.follow, self._check_place)
            self._tasks.append(BackgroundTask(follow, f"dscache follows {self.address}"))
        self._heartbeat.watch(None)
        # Operations that a busy server refuses are sent again by a timer.
        self._again = SureTimer(self._go_on)
        self._put_off_at = -math.inf
        self._put_offs = 0
        after_fork_in_child(self, Connection._reset_after_fork)

    @property
    def address(self) -> str:
        """The address of the server; the last known one, if Sentinels name it."""
        return self._endpoint.address

    @property
    def new_address(self) -> NewAddress:
        """The address to which the server has moved."""
        return self._endpoint.new_address

    @property
    def is_ready(self) -> bool:
        """Whether operations are sent at once."""
        return self.link is not None

    def requeue(self, batches: Iterable[Batch]) -> None:
        """Take over operations of another node, with the time that they have left.

        They are sent with this tick's flush: the queue may have operations that are still to be
        moved to other nodes.
        """
        self.pipeline.requeue(batches)
        # Behind that flush, as it may send what is due.
        self._deadlines.start(0)

    async def ask(self, *commands: Sequence[Word]) -> list[Any]:
        """Send commands at once; return the replies, error replies included.

        Raises ConnectionLost if the node is not ready, or is lost before the last reply.
        """
        if self.link is None:
            raise ConnectionLost(f"no connection to {self.address}")
        return await request(self.link, *commands)

    def leave(self, reason: str) -> None:
        """End the present socket; another one follows."""
        if self.link is not None:
            self.link.abort(EndedHere(reason))

    async def when_ready(self) -> None:
        """Wait until the connection is ready.

        Raises ConnectError if it isn't within ``connectTimeout``, and the server's error at once
        if the server refuses the handshake.
        """
        self._check_owner()
        timeout = self._options.connect_timeout
        if not await wait_at_most(self._decided, timeout / 1000):
            down = self.pipeline.down
            if self._attempting and self.last_loss == "":  # the first attempt ends by now, too
                down = as_connect_error(
                    TimeoutError(), timeout, self._endpoint.tried, in_tls=self._endpoint.in_tls
                )
            reason = f": {down}" if down else ""
            raise ConnectError(
                f"no connection to {self.address} within {timeout} ms{reason}"
            ) from down
        self._check_open()
        if self.refusal is not None:
            raise self.refusal("connect")

    async def first_attempt(self) -> None:
        """Wait until the first attempt to connect has ended; raises the error that ended it.

        Must be called in the tick that created the connection.
        """
        self._first_attempt = self._loop.create_future()
        error = await self._first_attempt
        if error is not None:
            raise error

    def _end_first_attempt(self, error: Exception | None) -> None:
        if self._first_attempt is not None and not self._first_attempt.done():
            self._first_attempt.set_result(error)

    async def close(self) -> None:
        """Finish the operations under way within ``closeTimeout``, and end the connection."""
        if self._closed:
            return
        self._check_owner()
        self._closed = True
        if self._own_near is not None:
            self._own_near.close()
        end = self._loop.time() + self._options.close_timeout / 1000
        link = self.link
        await self._maintenance.close()
        try:
            self._flush()
            await self._drain(lambda: self.pipeline.queued or self.pipeline.in_flight, end)
        finally:
            for task in self._tasks:
                task.cancel()
        await asyncio.wait([task.task for task in self._tasks])
        # Again, as an exception may have struck ``_end``.
        self._give_up()
        if link is not None:
            await asyncio.wait([link.lost], timeout=max(end - self._loop.time(), 0))
            link.abort(ConnectionLost("it was closed"))

    @property
    def connects(self) -> int:
        """How often the connection was made."""
        return self._connects

    def stats(self) -> dict[str, Any]:
        stats = {
            **self.pipeline.stats(),
            "connections": int(self.is_ready),
            "connects": self._connects,
            "reconnections": max(self._connects - 1, 0),
            "redirections": self.redirections,
            "last_loss": self.last_loss,
        }
        if self._own_near is not None:
            stats["near_cache"] = self._own_near.stats()
        if self._announcements is not None:
            stats["maintenance"] = self._announcements.stats()
        return stats

    # -- sending

    def _wake(self) -> None:
        """Schedule this tick's flush; the pipeline calls it before a tick's first operation."""
        # The body of _check_owner, to save a call in each tick.
        check_process(self._pid, self._owner)
        check_loop(self._loop, self._owner)
        self._check_open()
        if not self._flush_due:
            self._loop.call_soon(self._flush)
            self._flush_due = True  # set behind call_soon, which may raise
        self._deadlines.ensure(self._options.command_timeout / 1000)
        if self.link is None:
            self._reconnect.expedite()
            self._keeper.check()

    def _begin(self) -> None:
        if self.link is not None:
            self.link.begin()

    def _flush(self) -> None:
        self.pipeline.end_tick()
        self._flush_due = False  # behind it: ``_expire`` flushes after an exception in either
        link = self.link
        if link is not None:
            link.flush()
        # An attempt under way may end the refusal, and its commands are in the pipeline.
        elif self.refusal is not None and not self._attempting:
            self.pipeline.fail_all(self.refusal)

    # -- receiving, called by the socket

    def on_replies(self) -> None:
        """Go on after replies: send the operations that the window held back."""
        if self._cluster is not None:
            if self.pipeline.redirected:
                self._cluster.on_redirected(self)
            elif self.watched:
                self._cluster.on_progress(self)
        if self.pipeline.away:
            self._on_away()
        if self.pipeline.queued and not self._flush_due:
            self._flush()

    def _on_away(self) -> None:
        """Leave a server that is no longer the right one, or wait for a busy one.

        Nothing more is sent, and the commands under way get their replies first. Otherwise it would
        be unknown whether their writes have happened.
        """
        pipeline, link, code = self.pipeline, self.link, self.pipeline.away
        leaves = code in constants.LEFT_FOR
        if link is None or not (leaves or code in constants.PASSING):
            pipeline.away = ""
            self._endpoint.doubt()
            return
        if code == "READONLY" and not (pipeline.reconnects or self._endpoint.may_move):
            pipeline.away = ""  # as was said: it is a replica, and stays in use
            return
        link.hold(True)
        if pipeline.in_flight:
            return
        pipeline.away = ""
        settle_doubts(pipeline)
        if leaves:
            self._endpoint.note_useless()
            self.leave(constants.LEFT_FOR[code])
            return
        now = self._loop.time()
        if now - self._put_off_at > _STEADY_AFTER:
            self._put_offs = 0
        self._put_off_at = now
        self._again.start(
            half_jitter(constants.PUT_OFF_FIRST, constants.PUT_OFF_CAP, self._put_offs)
        )
        self._put_offs += 1

    def _go_on(self) -> None:
        """Send again the operations that a busy server has put off."""
        self._again.stop()
        if self.link is not None:
            self.link.hold(False)
            self._flush()

    def on_writable(self) -> None:
        """Go on after the transport's buffer was full."""
        if not self._flush_due:
            self._flush()

    def _expire(self, now: float) -> float | None:
        """Fail the operations whose deadline is past, and end a socket that is silent."""
        self._check()
        deadline: float | None = self.pipeline.expire(now)
        if self._flush_due:
            self._flush()  # call_soon is late, or lost with an interruption of the loop
        timeout = self.pipeline.timeout  # longer during maintenance
        if self.link is not None and self.link.unanswered_for() >= timeout:
            # Operations about to expire fail by their deadline, not with the connection.
            deadline = self.pipeline.expire(now + _DEADLINE_GRAIN)
            self.leave(f"the server was silent for {timeout * 1000:.0f} ms")
        return deadline

    # -- the socket's life

    async def _keep(self) -> None:
        """Keep a connection until cancelled by ``close``, or by a loop that ends."""
        while True:
            self._settle()
            was_well = await self._live()
            self._stuck_at = self._loop.time() + self._options.retry_strategy.cap / 1000 + _GRACE
            await self._reconnect.pause(was_well=was_well, is_refused=self.refusal is not None)

    async def _live(self) -> bool:
        """Open one socket and wait until it is lost; return whether it lasted."""
        timeout = self._options.connect_timeout / 1000
        self._stuck_at = self._loop.time() + timeout + _GRACE
        self._attempting = True
        link = self._socket = (SocketProtocol if self.pipeline.inbox is None else PushProtocol)(
            self, self.pipeline
        )
        try:
            async with asyncio.timeout(timeout):
                await self._endpoint.open(link)
                self.pipeline.address = self.address
                renewals = self.renewals
                greeting = await self._endpoint.greet(partial(request_greeting, link))
                if self._cluster is not None:
                    self._cluster.check_identity(self, greeting.node_id)
        except Exception as error:
            # Any class: redis-py may raise anything for a Sentinel's replies. The next attempt must
            # follow, or the cache would stay without a connection.
            if (cause := foreign(error)) is not None:
                error = ConnectError(f"it was interrupted by {type(cause).__name__}")
            link.abort(error)
            self._endpoint.note_failure()
            self._failed(error)
            self._socket = None
            return False
        began = self._loop.time()
        self._stuck_at = math.inf
        self._on_connected(link, greeting)
        self.catch_up(renewals)
        reason = await asyncio.shield(link.lost)
        while self._socket is not link and self._socket is not None:  # its successor is in use
            link = self._socket
            reason = await asyncio.shield(link.lost)
        self._on_disconnected(reason)
        self._socket = None
        return self._loop.time() - began > _STEADY_AFTER

    def replace(
        self, link: SocketProtocol, greeting: ServerInfo, address: str, reason: str
    ) -> None:
        """Go on over another socket, while no reply is due from the present one."""
        before = self._socket
        assert before is not None
        assert not self.pipeline.in_flight
        try:
            before.abort(EndedHere(reason))
            # The near cache believes nothing that the former socket has brought.
            self.pipeline.connection_lost(EndedHere(reason), retry=True)
            link.adopt(self, self.pipeline)
            self.pipeline.address = self._endpoint.address = address
            self._socket = link
            self._on_connected(link, greeting)
        except BaseException:
            link.abort(EndedHere("it was interrupted"))
            raise

    def expire_soon(self) -> None:
        """Look at the deadlines now, since they have changed."""
        self._deadlines.start(0)

    def _settle(self) -> None:
        """Handle the end of a socket that an exception has kept from being handled."""
        link = self._socket
        if link is None:
            return
        reason = EndedHere("it was interrupted")
        link.abort(reason)
        self._on_disconnected(reason)
        self._socket = None

    def _check(self) -> None:
        """Begin again what an exception has ended or lost: the keeper task, and timers."""
        now = self._loop.time()
        self._deadlines.restart_if_lost()
        self._heartbeat.restart_if_lost()
        if self.pipeline.operations:
            self._deadlines.ensure(0)
        for task in self._tasks:
            task.check()
        link = self._socket
        if link is not None and link.is_cut and self._stuck_at == math.inf:
            self._stuck_at = now + _GRACE
        if now > self._stuck_at:
            # An exception in the loop has lost the future or timer that the task awaits.
            self._stuck_at = now + _GRACE
            self._keeper.begin_again()
        if self._cluster is not None:
            self._cluster.check_timers()

    def _end(self) -> None:
        """Close: the keeper task has ended for good."""
        self._closed = True
        link = self._socket
        if link is not None:
            if self.link is link:
                link.close()
            else:
                link.abort(ConnectionLost("it was closed"))
        # On a closed loop no future can be set.
        if not self._loop.is_closed():
            self._give_up()

    def share_tokens(self, other: Connection) -> None:
        """Let no text of either connection show the tokens that the provider gave the other."""
        other._endpoint.credentials.given = self._endpoint.credentials.given

    def _log_in_again(self, words: list[str | Hidden]) -> None:
        """Send renewed credentials."""
        self.renewals += 1
        self._renewed = words
        self._send_renewed()

    def catch_up(self, renewals: int) -> None:
        """Send credentials that were renewed since a login began, at ``renewals`` of them."""
        if self.renewals != renewals:
            self._send_renewed()

    def _send_renewed(self) -> None:
        if self.link is not None and not self.link.is_cut:
            self.pipeline.forget("login")
            secrets = self._endpoint.credentials.given
            send_control(self.link, "AUTH", *self._renewed, secrets=secrets)

    def _check_place(self) -> None:
        """Disconnect from a server that the Sentinels no longer name."""
        if self._endpoint.has_moved:
            self.leave(f"the Sentinels name another primary, {self._endpoint.named}")

    # -- changes of state

    def _on_tls(self) -> None:
        if not self._connects and self.last_loss == "":
            self.pipeline.down = ConnectError(f"still in the TLS handshake{IF_PLAIN}")

    def _on_connected(self, link: SocketProtocol, greeting: ServerInfo) -> None:
        self.link = link
        self.server, self.zone = greeting.server, greeting.zone
        # On a cluster, Valkey 9.1 serves MSETEX even for keys of a slot that is being moved away,
        # where it redirects every other command: a record would be on two nodes.
        self.pipeline.has_msetex = greeting.has_msetex and self._cluster is None
        self.pipeline.single_writes = greeting.is_proxied
        self.pipeline.whole_scripts = False
        self.pipeline.resp2_pubsub = not greeting.has_pushes and self.pipeline.inbox is not None
        self.pipeline.connected(greeting.is_tracked)
        if self._near is not None and not greeting.is_tracked:
            _logger.warning(
                "%s announces no changes: its records are not kept in the near cache", self.address
            )
        self._attempting = False
        self._connects += 1
        self.refusal = None
        self.pipeline.down = None
        self._decided.set()
        self._heartbeat.watch(link)
        self._end_first_attempt(None)
        _logger.info("connected to %s (%s)", self.address, self.server or "server unknown")
        self._maintenance.on_connected()
        self._flush()
        if self._cluster is not None:
            self._cluster.on_connected(self)

    def _on_disconnected(self, reason: Exception) -> None:
        self.link = None
        self.pipeline.away = ""
        self._heartbeat.watch(None)
        self._decided.clear()
        self.last_loss = str(reason)
        self.pipeline.down = ConnectionLost(f"connection lost: {reason}")
        self.pipeline.connection_lost(reason, retry=not isinstance(reason, ProtocolError))
        _logger.warning("connection to %s lost: %s", self.address, reason)
        if self._cluster is not None:
            if self.pipeline.redirected:
                self._cluster.on_redirected(self)
            self._cluster.on_disconnected(self)

    def _failed(self, error: Exception) -> None:
        self._attempting = False
        self.pipeline.connection_lost(error, retry=True)
        endpoint = self._endpoint
        timeout = self._options.connect_timeout
        said = as_connect_error(error, timeout, endpoint.tried, in_tls=endpoint.in_tls)
        if self.pipeline.down is None or str(self.pipeline.down) != str(said):
            _logger.warning("can't connect to %s: %s", self.address, said)
        self.pipeline.down = said
        self.last_loss = str(said)
        self.refusal = permanent_failure(error, said, self.address)
        if endpoint.is_at_new_address:
            self.refusal = None  # the usual address is tried next
        if self.refusal is None:
            self._decided.clear()
        else:
            self._decided.set()
            self.pipeline.fail_all(self.refusal)
        self._end_first_attempt(error)
        if self._cluster is not None:
            self._cluster.on_disconnected(self)

    def _give_up(self) -> None:
        self.link = None
        self._decided.set()
        self._heartbeat.stop()
        self._deadlines.stop()
        self._again.stop()
        self._maintenance.stop()
        self.pipeline.fail_all(closed)

    def _reset_after_fork(self) -> None:
        # Otherwise an operation of the child could join a batch of the parent's unfinished tick
        # without the check of its process.
        self.pipeline.end_tick()
        # Invalidations reach the parent alone.
        self.pipeline.forget("fork")
