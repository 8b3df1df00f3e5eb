"""The result of a blocking operation."""

from __future__ import annotations

from typing import Any


class BlockingWaiter:
    """The result or error of one operation, in the shape of a future."""

    __slots__ = ("_result", "done", "error")

    def __init__(self) -> None:
        self.done = False
        self._result: Any = None
        self.error: Exception | None = None

    def set_result(self, result: Any, /) -> None:
        self._result = result
        self.done = True

    def set_exception(self, error: Exception, /) -> None:
        self.error = error
        self.done = True

    def reply(self) -> Any:
        """Return the result or the error."""
        return self._result if self.error is None else self.error

    def take(self) -> Any:
        """Return the result, or raise the error."""
        error = self.error
        if error is None:
            return self._result
        try:
            raise error
        finally:
            # Its traceback holds this frame: break the cycle.
            self.error = None
            del error
