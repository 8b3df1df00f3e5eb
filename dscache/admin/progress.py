"""What long work over many records shares: how far it is, and where that is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ..config import Config
from ..errors import DscacheError

# What is read of Redis at a time, or is on its way to it: records, and bytes of text.
RECORDS = 1000
BYTES = 4 * 1024 * 1024
# Seconds between two notes of where it stands.
NOTE_EVERY = 2.0
# Work of this kind has time: milliseconds for an operation, if less is configured.
_COMMAND_MS = 10_000
# Of what is wrong, so many are told one by one.
TOLD = 10


def with_long_timeouts(config: Config) -> Config:
    """Return a configuration under which operations have time, and wait for room."""
    options = config.options
    replace = msgspec.structs.replace
    milliseconds = max(options.command_timeout, _COMMAND_MS)
    shared = replace(options.redis_options, command_timeout=milliseconds)
    options = replace(options, command_timeout=milliseconds, redis_options=shared, when_full="wait")
    return replace(config, options=options)


@dataclass(slots=True)
class JobProgress:
    """How far it is, and what came of it; ``done`` of ``total`` is what a bar shows."""

    done: int = 0
    total: int = 0
    records: int = 0
    halves: int = 0
    damaged: int = 0
    not_newer: int = 0
    broken: int = 0
    resumed: int = 0
    """The records of ``records`` that an earlier run had done."""
    notes: list[str] = field(default_factory=list)
    """What is wrong, one by one, as long as there is not too much of it."""
    warnings: list[str] = field(default_factory=list)

    def note(self, message: str) -> None:
        if len(self.notes) < TOLD:
            self.notes.append(message)


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Make what the system says of a file an error that names it."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DscacheError):  # those of connections are of both kinds
            raise
        raise DscacheError(f"{path}: {error.strerror}") from error


def read_state(path: Path, kind: type[Any]) -> Any:
    """Return what a file keeps of where work stands, or None; raises DscacheError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise DscacheError(f"{path}: {error}; begin anew with --restart") from error


def write_state(path: Path, state: msgspec.Struct) -> None:
    """Keep in a file where work stands; what it had stays until all of the new is there."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(msgspec.json.encode(state))
    new.replace(path)
