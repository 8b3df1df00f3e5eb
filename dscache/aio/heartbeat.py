"""PING on an idle socket, and the end of one whose server no longer answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core.failures import EndedHere
from .deadlines import SureTimer
from .protocol import SocketProtocol, send_control

if TYPE_CHECKING:
    from ..core.pure import Pipeline

# An idle socket is sent a PING after this many seconds, and the reply must come within the other
# figure. So a dead peer is found within 10 s although no operation needs it.
_PING_AFTER = 5.0
_PING_ANSWER = 4.0


class Heartbeat(SureTimer):
    """Watches an idle socket: sends PING, and aborts the socket if no reply comes.

    It runs as long as its Connection, also while that has no socket. ``idle_limit`` is the
    longest silence, in seconds, of a socket that is well. ``check`` is called on each beat.
    """

    def __init__(
        self, pipeline: Pipeline, idle_limit: float | None, check: Callable[[], object]
    ) -> None:
        super().__init__(self._beat)
        self._pipeline = pipeline
        self._check = check
        self._link: SocketProtocol | None = None
        self._ping_after = _PING_AFTER
        self.patience = _PING_ANSWER
        """The longest silence after a PING, in seconds."""
        if idle_limit is not None:
            # Half of it, so that a reply is due twice within the limit.
            self._ping_after = min(_PING_AFTER, idle_limit / 2)

    def be_patient(self, seconds: float) -> None:
        """Bear a silence of this many seconds, or of the usual length if that is more."""
        self.patience = max(seconds, _PING_ANSWER)

    def watch(self, link: SocketProtocol | None) -> None:
        self._link = link
        self._beat()

    def _beat(self) -> None:
        # Set first, so that the next beat comes whatever is raised below.
        self.start(self._ping_after)
        self._check()
        link = self._link
        if link is None or link.is_cut:
            return
        # Invalidations that arrive don't prove that none is missing: a reply does.
        wait = self._ping_after - max(link.idle(), self._pipeline.unknown())
        if wait <= 0:
            silence = link.unanswered_for()
            if silence >= self.patience:
                link.abort(EndedHere(f"the server did not answer for {silence:.0f} s"))
                return
            if not silence:
                send_control(link, "PING")
            wait = min(self.patience - silence, self._ping_after)
        self.start(wait)
