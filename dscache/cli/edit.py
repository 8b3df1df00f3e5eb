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
from ..errors import DscacheError, RecordError, RecordMissing, shorten
from .options import Chosen, flag, with_all_options
from .output import complain
from .settings import run

if TYPE_CHECKING:
    from ..core.pure import Record


@with_all_options
def edit(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the record.")],
    create: Annotated[bool, flag("--create", "Begin a record that doesn't exist.")] = False,
    *,
    chosen: Chosen,
) -> None:
    """Change the data of a record in $VISUAL or $EDITOR, and write it as the next version.

    Nothing is written if the text stays the same, or if another client has written the record in
    the meantime; the edited text is kept in a file then. A lifetime ends with the write, as with
    set. The exit status is 1 if an edited record was not written.
    """
    config = chosen.load()
    record = run(_read(config, name))
    if record is None and not create:
        raise RecordMissing(f"no record {shorten(name)}; --create begins one", name=name)
    version, text = (0, b"{}") if record is None else (record.version, indented(record.raw))
    handle, path = tempfile.mkstemp(prefix="dscache-", suffix=".json")
    file = Path(path)
    with open(handle, "wb") as opened:
        opened.write(text + b"\n")
    kept = False
    try:
        edited = _edited(file, name)
        if edited == text.strip() and record is not None:
            complain("unchanged")
            return
        kept = True  # from here on the text is worth something
        written = run(_write(config, name, version, edited, existed=record is not None))
        kept = not written
    except DscacheError:
        if kept:
            complain(f"the edited text is in {file}")
        raise
    finally:
        if not kept:
            file.unlink(missing_ok=True)
    if not written:
        complain(
            f"{shorten(name)} was written by another client in the meantime; the edited text is "
            f"in {file}"
        )
        raise typer.Exit(1)
    complain(f"{shorten(name)} written as version {version + 1}")


async def _read(config: Config, name: str) -> Record | None:
    async with open_cache(config) as cache:
        return await cache.get(name)


async def _write(config: Config, name: str, version: int, text: bytes, *, existed: bool) -> bool:
    async with open_cache(config) as cache:
        expected = version if existed else None
        return await cache.set(name, version + 1, msgspec.Raw(text), if_version=expected)


def _edited(file: Path, name: str) -> bytes:
    """Let the user edit a file until it has JSON; return that text without space around it."""
    while True:
        _run_editor(file)
        text = file.read_bytes().strip()
        try:
            ndjson.encode(name, 0, text)
        except RecordError as error:
            problem = f"the text isn't JSON: {error.__cause__ or error}"
        else:
            return text
        if not (sys.stdin.isatty() and typer.confirm(f"{problem}. Edit it again?", err=True)):
            complain(f"{problem}; nothing was written")
            raise typer.Exit(1)


def _run_editor(file: Path) -> None:
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        status = subprocess.run([*shlex.split(editor), str(file)], check=False).returncode
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"{editor!r} can't be run: {error}; set it to an editor", param_hint="VISUAL or EDITOR"
        ) from None
    if status:
        complain(f"the editor ended with status {status}; nothing was written")
        raise typer.Exit(1)
