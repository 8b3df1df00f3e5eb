"""The progress of long jobs over many records, and the files that keep it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from ..config import Config
from ..errors import DscacheError, reason_of

StateT = TypeVar("StateT", bound=msgspec.Struct)

RECORDS = 1000
"""Records in one request, at most."""
BYTES = 4 * 1024 * 1024
"""Bytes of JSON text in one request, about."""
SAVE_INTERVAL = 2.0
"""Seconds between two saves of the state."""
MAX_NOTES = 10
"""Faults that are reported one by one."""
# The least commandTimeout of a job, in milliseconds.
_COMMAND_TIMEOUT = 10_000


def with_long_timeouts(config: Config) -> Config:
    """Return a configuration with a ``commandTimeout`` of 10 s or more and ``whenFull: wait``."""
    options = config.options
    milliseconds = max(options.command_timeout, _COMMAND_TIMEOUT)
    shared = replace(options.redis_options, command_timeout=milliseconds)
    options = replace(options, command_timeout=milliseconds, redis_options=shared, when_full="wait")
    return replace(config, options=options)


@dataclass(slots=True)
class JobProgress:
    """The progress and the counts of a job; a progress bar shows ``done`` of ``total``."""

    done: int = 0
    total: int = 0
    records: int = 0
    halves: int = 0
    damaged: int = 0
    """Records, or lines of a file, that can't be read."""
    resumed: int = 0
    """The part of ``records`` that an earlier run had done."""
    notes: list[str] = field(default_factory=list)
    """The first faults, one text each."""

    def position(self) -> tuple[int, int, int]:
        """Return the work done, its total, and the records of this run, for a progress bar."""
        return self.done, self.total, self.records - self.resumed

    def note(self, message: str) -> None:
        """Add the text of a fault, unless there are enough."""
        if len(self.notes) < MAX_NOTES:
            self.notes.append(message)

    def note_damaged(self, error: object) -> None:
        """Count a damaged record, and add the text of its error."""
        self.damaged += 1
        self.note(str(error))


def save_nowhere(state: object) -> None:
    """Save nothing: a stream can't be resumed."""


async def cancel_all(tasks: Collection[asyncio.Future[Any]]) -> None:
    """Cancel tasks, and wait until all have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as DscacheError that names the file."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DscacheError):  # ConnectError is an OSError too
            raise
        raise DscacheError(f"{path}: {reason_of(error)}") from error


def read_state(path: Path, kind: type[StateT]) -> StateT | None:
    """Return the state of a job from its file, or None without a file.

    Raises DscacheError if the file can't be read or is damaged.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DscacheError(f"{path}: {error.strerror}; start over with --restart") from error
    except msgspec.DecodeError as error:
        raise DscacheError(f"{path}: it is damaged; start over with --restart") from error


def write_state(path: Path, state: msgspec.Struct) -> None:
    """Write the state of a job to its file, which is replaced atomically."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_bytes(msgspec.json.encode(state))
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
