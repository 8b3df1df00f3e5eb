"""The iterator that events and changes of presence share: what arrives waits until it is taken."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Self, TypeVar

from ..errors import UsageError

T = TypeVar("T")


class Arrivals(AsyncIterator[T], Generic[T]):
    """Values that arrive until the iteration is closed, by ``async for`` of one consumer."""

    def __init__(self, method: str, on_close: Callable[[Any], object]) -> None:
        self._method = method
        self._on_close = on_close
        self._news = asyncio.Event()
        self._is_closed = False
        self._is_busy = False

    @abstractmethod
    def _has_waiting(self) -> bool:
        """Return whether a value waits."""

    @abstractmethod
    def _take(self) -> T:
        """Remove the oldest waiting value, and return it."""

    def _check_end(self) -> None:
        """Raise the error that ends the iteration, if there is one."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while not self._has_waiting():
            self._check_end()
            if self._is_closed:
                raise StopAsyncIteration
            if self._is_busy:
                raise UsageError(
                    f"this iterator is in use already; call {self._method}() once per consumer"
                )
            self._news.clear()
            self._is_busy = True
            try:
                await self._news.wait()
            finally:
                self._is_busy = False
        return self._take()

    def close(self) -> None:
        """Receive no more values; the iteration ends after the waiting ones."""
        if not self._is_closed:
            self._is_closed = True
            self._on_close(self)
        self._news.set()

    async def aclose(self) -> None:
        """Do the same as ``close``."""
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
