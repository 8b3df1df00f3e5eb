"""``dscache edit``: change a record's data in an editor."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from ..admin import ndjson
from ..admin.cache import open_cache
from ..admin.indent import indented
from ..config import Config
from ..core.markers import KEEP, Ttl
from ..errors import DscacheError, RecordError, RecordMissing, shorten
from . import signals
from .options import Chosen, flag, with_all_options
from .output import complain
from .settings import run
from .words import quotable

if TYPE_CHECKING:
    from ..core.pure import Record

# Seconds that an editor has to end after a signal.
_EDITOR_SECONDS = 5.0


@with_all_options
def edit(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the record.")],
    create: Annotated[bool, flag("--create", "Begin a record that doesn't exist.")] = False,
    *,
    chosen: Chosen,
) -> None:
    """Change the data of a record in $VISUAL, $EDITOR or vi.

    The edited data becomes the next version. Nothing is written if the text stays the same, or if
    another client has written the record in the meantime. Edited text that was not written, for
    whatever reason, stays in a file that the command names. The record keeps its lifetime. The exit
    status is 1 if an edited record was not written.
    """
    config = chosen.load()
    record = run(_read(config, name))
    if record is None and not create:
        raise RecordMissing(f"no record {shorten(name)}; --create begins one", name=name)
    version, text = (0, b"{}") if record is None else (record.version, indented(record.raw))
    file = _file_with(text + b"\n")
    written = False
    try:
        edited = _edited(file)
        if edited == text.strip():
            complain("unchanged; nothing was written")
            return
        written = run(_write(config, name, version, edited, existed=record is not None))
        if not written:
            complain(f"{shorten(name)} was written by another client in the meantime")
            raise typer.Exit(1)
    finally:
        # After an error or an interrupt, too, the text is worth something.
        if written or not _differs(file, text):
            file.unlink(missing_ok=True)
        else:
            complain(f"the edited text is in {file}")
    complain(f"{shorten(name)} written as version {version + 1}")


def _file_with(text: bytes) -> Path:
    """Return a new temporary file with a text. Raises DscacheError."""
    file = None
    try:
        handle, path = tempfile.mkstemp(prefix="dscache-", suffix=".json")
        file = Path(path)
        with open(handle, "wb") as opened:
            opened.write(text)
    except OSError as error:
        if file is not None:
            file.unlink(missing_ok=True)
        raise DscacheError(
            f"no temporary file for the text: {error.strerror or error}; "
            "set TMPDIR to a folder with room"
        ) from error
    return file


async def _read(config: Config, name: str) -> Record | None:
    async with open_cache(config) as cache:
        return await cache.get(name)


async def _write(config: Config, name: str, version: int, text: bytes, *, existed: bool) -> bool:
    async with open_cache(config) as cache:
        expected = version if existed else None
        raw = msgspec.Raw(text)
        ttl: Ttl = KEEP if existed else None
        return await cache.set(name, version + 1, raw, ttl=ttl, if_version=expected)


def _edited(file: Path) -> bytes:
    """Let the user edit a file until it has JSON; return that text without space around it."""
    while True:
        _run_editor(file)
        try:
            text = file.read_bytes().strip()
        except OSError as error:
            raise DscacheError(
                f"the editor left no text: {file}: {error.strerror}; nothing was written"
            ) from error
        try:
            ndjson.encode("", 0, text)
        except RecordError as error:
            problem = f"the text isn't JSON: {error.__cause__ or error}"
        else:
            return text
        if not (
            sys.stdin.isatty() and typer.confirm(quotable(f"{problem}. Edit it again?"), err=True)
        ):
            complain(f"{problem}; nothing was written")
            raise typer.Exit(1)


def _run_editor(file: Path) -> None:
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor:
        editor = "vi"
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise typer.BadParameter(
                "vi needs a terminal; set another editor", param_hint="VISUAL or EDITOR"
            )
    try:
        process = subprocess.Popen([*shlex.split(editor), str(file)])
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise typer.BadParameter(
            f"{editor!r} can't be run: {reason}; set it to an editor", param_hint="VISUAL or EDITOR"
        ) from None
    try:
        with signals.left_to_editor():
            status = process.wait()
    except KeyboardInterrupt:
        _end_editor(process)
        raise
    if status:
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        complain(f"the editor ended {how}; nothing was written")
        raise typer.Exit(1)


def _end_editor(process: subprocess.Popen[bytes]) -> None:
    """Pass the signal on to the editor, and wait until it has ended, which it may be made to."""
    process.send_signal(signals.received())
    try:
        process.wait(_EDITOR_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _differs(file: Path, text: bytes) -> bool:
    """Return whether a file has other text than it was given; False if it can't be read."""
    try:
        return file.read_bytes().strip() != text.strip()
    except OSError:
        return False
