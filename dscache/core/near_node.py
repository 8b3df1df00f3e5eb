"""The state of one server, as a near cache of threads knows it, for both cores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._locks import make_lock
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

    ``identity`` tells which server it is, while there is a link. Reads take the ``epoch`` without
    the lock: it is whole before it is there, and is never begun anew. The fields that hits compare
    are set by the cache, which may have a lock for them.
    """

    __slots__ = ("_lock", "_near", "_reach", "epoch", "identity")

    def __init__(self, near: SharedNearCache, reach: Reachability) -> None:
        self._lock = make_lock()  # of the link's thread, and of one that logs in anew
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
        with self._lock:
            self._end_epoch(LOST)
            self.identity = identity
            self.epoch = self._near.new_epoch(self._reach, since)

    def confirm(self, known: float) -> None:
        """Note that every change from before a time has been reported."""
        epoch = self.epoch
        if epoch is not None:
            self._near.confirm(epoch, known)

    def disconnected(self, reason: str, is_trusted: bool = True) -> None:
        """End all entries of the server; unless ``is_trusted``, none may be served as stale."""
        with self._lock:
            was_live = self.is_live
            self._end_epoch(LOST if is_trusted else OVER)
            if was_live:
                self._near.count_flush(reason)

    def unreachable(self) -> None:
        """Note that the server can't be reached: stale entries may be served at once."""
        with self._lock:
            self._near.set_up(self._reach, False)

    def reachable(self) -> None:
        """Note that the server can be reached, though perhaps not by its link."""
        with self._lock:
            self._near.set_up(self._reach, True)

    def take_push(self, push: Any) -> None:
        """Drop the entries of changed keys. Raises ProtocolError for a push of a wrong shape."""
        if is_of_keys(push) and self._near.invalidate(push[1]):
            with self._lock:
                epoch = self.epoch
                if epoch is not None:  # no other thread has ended it
                    self.disconnected("flushall", False)
                    self.connected(self.identity, epoch.known)

    def _end_epoch(self, state: int) -> None:
        # In this order: what was cached is ended, whatever strikes here.
        self._reach = self._near.end_epoch(self.epoch, self._reach, state)
        self.epoch = None
