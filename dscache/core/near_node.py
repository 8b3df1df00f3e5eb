"""The state of one server, as a near cache of threads knows it, for both cores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ProtocolError, shorten
from .tracking import LOST, OVER

if TYPE_CHECKING:
    from .near_cache import Epoch, Reachability
    from .shared_near import SharedNearCache


def is_of_keys(push: Any) -> bool:
    """Return whether a push reports changed keys. Raises ProtocolError for one of a wrong shape."""
    if not push or push[0] != b"invalidate":
        return False
    if len(push) != 2 or not (push[1] is None or type(push[1]) is list):
        raise ProtocolError(f"a change of keys: unexpected push {shorten(push)}")
    return True


class NearNode:
    """One server as a SharedNearCache knows it: whether its link reports changes.

    ``identity`` tells which server it is, while there is a link.
    """

    __slots__ = ("_near", "_reach", "epoch", "identity")

    def __init__(self, near: SharedNearCache, reach: Reachability) -> None:
        self._near = near
        self._reach = reach
        self._reach.up = True  # unless it is known not to be
        self.epoch: Epoch | None = None
        self.identity: str | None = None

    @property
    def is_live(self) -> bool:
        """Whether the server reports its changes."""
        return self.epoch is not None

    def connected(self, identity: str | None, since: float) -> None:
        """Begin to cache: the server reports every change after ``since``."""
        self._end_epoch(LOST)
        self.identity = identity
        self._reach.up = True
        epoch = self._near.new_epoch(self._reach)
        epoch.known = since
        self.epoch = epoch

    def confirm(self, known: float) -> None:
        """Note that every change from before a time has been reported."""
        epoch = self.epoch
        if epoch is not None:
            epoch.known = known

    def disconnected(self, reason: str, is_trusted: bool = True) -> None:
        """End all entries of the server; unless ``is_trusted``, none may be served as stale."""
        was_live = self.is_live
        self._end_epoch(LOST if is_trusted else OVER)
        if was_live:
            self._near.count_flush(reason)

    def unreachable(self) -> None:
        """Note that the server can't be reached: stale entries may be served at once."""
        self._reach.up = False

    def reachable(self) -> None:
        """Note that the server can be reached, though perhaps not by its link."""
        self._reach.up = True

    def take_push(self, push: Any) -> None:
        """Drop the entries of changed keys. Raises ProtocolError for a push of a wrong shape."""
        epoch = self.epoch
        if is_of_keys(push) and self._near.invalidate(push[1]) and epoch is not None:
            self.disconnected("flushall", False)
            self.connected(self.identity, epoch.known)

    def _end_epoch(self, state: int) -> None:
        epoch, self.epoch = self.epoch, None
        if epoch is not None:
            epoch.state = state
        if state == OVER:  # and so is what earlier links vouched for
            up = self._reach.up
            self._reach.over = True
            self._reach = type(self._reach)()
            self._reach.up = up
