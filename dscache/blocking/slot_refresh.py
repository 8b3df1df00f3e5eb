"""A refresh of a cluster's slots by one thread, beside an operation of its own."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from ..errors import ConfigError, ConnectError, DscacheError, ReplyError
from ..net.cluster_state import ClusterState
from ..net.slots import QUESTIONS, View, read_view
from .foreign_errors import raise_foreign
from .node_connection import NodeConnection
from .waiter import BlockingWaiter

# After the first answer, the other nodes have this long, in seconds, or as long as the first took,
# whichever is longer.
_OTHERS: Final = 0.01


class SlotRefresh:
    """Asks some nodes for their view, until enough of them have answered.

    ``claim`` is the state's. ``until`` is when to call ``go_on`` although no reply came, by
    ``time.monotonic()``.
    """

    def __init__(
        self, state: ClusterState, claim: float, now: float, nodes: Iterable[NodeConnection]
    ) -> None:
        self._state = state
        self._claim = claim
        self._table = state.table
        self._moved = len(self._table.moved)
        self._began = now
        self._timeout = state.timeout
        self._views: list[View] = []
        self._answered: list[NodeConnection] = []
        self._failures: list[Exception] = []
        self._asked: dict[NodeConnection, list[BlockingWaiter]] = {}
        # The nodes without a connection yet, with the failed attempts of each so far.
        self._awaited = {node: node.failures for node in nodes}
        self.until = now + self._timeout / 1000

    def go_on(self, now: float) -> bool:
        """Ask nodes that are connected by now, and take replies; return whether it has ended."""
        for node, failures in list(self._awaited.items()):
            if node.check():
                self._asked[node] = node.ask(QUESTIONS)
            elif node.failures == failures:
                node.wanted = True
                continue
            else:
                trouble = node.info.trouble or ConnectError("no connection")
                self._failures.append(ConnectError(f"{node.info.shown}: {trouble}"))
            del self._awaited[node]
            node.wanted = False
        for node, outcomes in list(self._asked.items()):
            if all(outcome.done for outcome in outcomes):
                del self._asked[node]
                self._take(node, [outcome.reply() for outcome in outcomes], now)
        if now < self.until and (self._awaited or self._asked):
            return False
        self.end()
        return True

    def _take(self, node: NodeConnection, replies: list[object], now: float) -> None:
        slots, info = replies
        try:
            if isinstance(slots, Exception) and not isinstance(slots, ReplyError):
                raise slots
            view = read_view(slots, info, node.info.address, self._state.source, node.node_id)
        except DscacheError as error:
            raise_foreign(error)
            self._failures.append(error)
            return
        node.info.trouble = None
        self._answered.append(node)
        if self._state.is_kin(view) and not any(map(self._state.is_kin, self._views)):
            self.until = min(self.until, now + max(now - self._began, _OTHERS))
        self._views.append(view)

    def end(self) -> None:
        """End with the replies so far: apply the newest view, or note the failure."""
        for node in self._awaited:
            node.wanted = False
        silent = [node.info for node in (*self._awaited, *self._asked)]
        self._awaited.clear()
        self._asked.clear()
        try:
            if self._views:
                self._apply()
                return
        except ConnectError as error:
            raise_foreign(error)
            self._failures.append(error)
        if not self._failures and time.monotonic() < self._began + self._timeout / 1000:
            # The operation ended first, so the missing replies prove no failure of the nodes.
            self.abandon()
            return
        is_late = time.monotonic() >= self._began + self._timeout / 1000
        for info in silent:
            why = f"{info.shown}: no answer to CLUSTER SLOTS in {self._timeout} ms"
            self._failures.append(ConnectError(why))
            if is_late:
                # A node that never answers is tried after others, and counts as gone.
                info.is_tried, info.trouble = True, info.trouble or ConnectError(why)
        self._state.record_failure(self._error())

    def _apply(self) -> None:
        try:
            view = self._state.choose(self._views)
            self._state.apply(view, self._table, self._moved)
        finally:
            for node in self._answered:
                node.check_identity()

    def abandon(self) -> None:
        """Leave the refresh to another thread."""
        self._state.abandon_refresh(self._claim)

    def _error(self) -> Exception:
        """Return the error of a refresh that no node has answered."""
        for error in self._failures:
            if isinstance(error, ConfigError | ReplyError):
                return error
        troubles = "; ".join(str(error) for error in self._failures)
        return ConnectError(f"no node can be reached: {troubles or 'there is none to be asked'}")
