"""What a thread of a blocking cache asks the nodes of a cluster, beside an operation of its own."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from ..errors import ConfigError, ConnectError, DscacheError, ReplyError
from ..net.cluster_state import ClusterState
from ..net.slots import QUESTIONS, View, newest, read_view
from .foreign_errors import raise_foreign
from .node_connection import NodeConnection
from .waiter import BlockingWaiter

# After the first answer, the others have this long, in seconds, or as long again as that took.
_OTHERS: Final = 0.01


class SlotRefresh:
    """Nodes that are asked for their view, until enough of them have answered.

    ``claim`` is the map's. ``until`` is when to look again though nothing came.
    """

    def __init__(
        self, cluster_map: ClusterState, claim: float, now: float, nodes: Iterable[NodeConnection]
    ) -> None:
        self._map = cluster_map
        self._claim = claim
        self._table = cluster_map.table
        self._moved = len(self._table.moved)
        self._began = now
        self._timeout = cluster_map.timeout
        self._views: list[View] = []
        self._failures: list[Exception] = []
        self._asked: dict[NodeConnection, list[BlockingWaiter]] = {}
        # Those that are being connected to, and how often they had failed at that.
        self._awaited = {node: node.failures for node in nodes}
        self.until = now + self._timeout / 1000

    def go_on(self, now: float) -> bool:
        """Ask who can be asked by now, and hear who has answered; return whether that was all."""
        for node, failures in list(self._awaited.items()):
            if node.check():
                self._asked[node] = node.ask(QUESTIONS)
            elif node.failures == failures:
                node.wanted = True
                continue
            else:
                trouble = node.place.trouble or ConnectError("no connection")
                self._failures.append(ConnectError(f"{node.place.shown}: {trouble}"))
            del self._awaited[node]
            node.wanted = False
        for node, outcomes in list(self._asked.items()):
            if all(outcome.done for outcome in outcomes):
                del self._asked[node]
                self._hear(node, [outcome.reply() for outcome in outcomes], now)
        if now < self.until and (self._awaited or self._asked):
            return False
        self.end()
        return True

    def _hear(self, node: NodeConnection, replies: list[object], now: float) -> None:
        slots, info = replies
        try:
            if isinstance(slots, Exception) and not isinstance(slots, ReplyError):
                raise slots
            view = read_view(slots, info, node.place.address, self._map.source)
        except DscacheError as error:
            raise_foreign(error)
            self._failures.append(error)
            return
        if not self._views:
            self.until = min(self.until, now + max(now - self._began, _OTHERS))
        self._views.append(view)

    def end(self) -> None:
        """Come to a conclusion with the answers that there are."""
        for node in self._awaited:
            node.wanted = False
        silent = [node.place.shown for node in (*self._awaited, *self._asked)]
        self._awaited.clear()
        self._asked.clear()
        try:
            if self._views:
                self._map.apply(newest(self._views), self._table, self._moved)
                return
        except ConnectError as error:
            raise_foreign(error)
            self._failures.append(error)
        if not self._failures and time.monotonic() < self._began + self._timeout / 1000:
            # The operation was over first: that says nothing of the nodes.
            self.abandon()
            return
        self._failures += [
            ConnectError(f"{shown}: no answer to CLUSTER SLOTS in {self._timeout} ms")
            for shown in silent
        ]
        self._map.record_failure(self._error())

    def abandon(self) -> None:
        """Leave it to somebody else."""
        self._map.abandon_refresh(self._claim)

    def _error(self) -> Exception:
        """Return what to tell of an inquiry that nobody has answered."""
        for error in self._failures:
            if isinstance(error, ConfigError | ReplyError):
                return error
        troubles = "; ".join(str(error) for error in self._failures)
        return ConnectError(f"no node can be reached: {troubles or 'there is none to be asked'}")
