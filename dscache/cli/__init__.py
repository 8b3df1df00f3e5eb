"""The command line: ``dscache COMMAND ...``, which is also ``python -m dscache``.

Exit status: 0 if all is well; 1 if it isn't, or after an error of dscache, which is one line on
standard error; 2 for a wrong command line or core; 128 plus the number of the signal after Ctrl-C,
SIGTERM or SIGHUP.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from .._start import CommandImports

with CommandImports():
    from ..errors import DscacheError, reason_of
    from . import signals
    from .streams import discard_rest
    from .words import quotable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# The packages of the extra ``cli``, which dscache itself doesn't need.
_EXTRA = ("typer", "rich")


def main() -> None:
    """Run the command that the command line names. Raises SystemExit."""
    try:
        _open_standard_files()
        # A free-threaded Python warns when redis-py imports hiredis. A command has one busy thread.
        warnings.filterwarnings("ignore", "The global interpreter lock", RuntimeWarning)
        with signals.handled_as_interrupt():
            # The version needs no extra.
            app = _print_version if sys.argv[1:] == ["--version"] else _imported_app()
            try:
                app()
            finally:
                sys.stdout.flush()
    except OutputError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            sys.exit(1)  # a reader such as head has closed the pipe on purpose
        _fail(str(error))
    except DscacheError as error:
        _fail(str(error))
    except OSError as error:
        named = isinstance(error.filename, str | bytes)
        where = f"{os.fsdecode(error.filename)}: " if named else ""
        _fail(f"{where}{error.strerror or error}")
    except BaseException as ended:
        # Also an error in which Python or an import has wrapped the KeyboardInterrupt.
        if not signals.have_caused(ended):
            raise
        # Python notes an interrupt that came while it executed text, as dataclasses do, and would
        # end by SIGINT in place of the status. Other text removes the note.
        exec("")
        sys.exit(signals.exit_status())


def _print_version() -> None:
    from . import versions

    print(versions.described())


def _imported_app() -> Callable[[], object]:
    try:
        from .app import make_app

        return make_app(sys.argv[1:])
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        _fail(f"the command line needs {missing}; install it with: pip install 'dscache[cli]'")


class OutputError(Exception):
    """Standard output can't be written.

    It is no OSError, since ``main`` reports those as errors of other files.
    """


class _Output(io.FileIO):
    """Standard output that raises OutputError when it can't be written.

    A signal interrupts a write, so that a command ends before its reader has read everything.
    """

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            if self.isatty():  # which doesn't keep a command waiting, and may show a whole screen
                return super().write(data)
            with signals.raised_at_once():
                return super().write(data)
        except KeyboardInterrupt:
            discard_rest(self)
            raise
        except OSError as error:
            discard_rest(self)
            raise OutputError(f"standard output can't be written: {reason_of(error)}") from error


class _Errors(io.FileIO):
    """Standard error whose text is lost when it can't be written: there is no other place."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            discard_rest(self)
            return super().write(data)


def _open_standard_files() -> None:
    """Make standard output raise OutputError, and replace other closed files by /dev/null.

    Standard error raises nothing.
    """
    if sys.stdin is None:
        # Otherwise a socket may get its number, which uvloop aborts at.
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        _fail("standard output is closed; redirect it, for example to /dev/null")
    # Others have been replaced by the calling program.
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        sys.stderr = _replaced(sys.stderr, _Errors)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        sys.stdout = _replaced(sys.stdout, _Output)


def _replaced(stream: io.TextIOWrapper, kind: type[io.FileIO]) -> io.TextIOWrapper:
    """Return a stream to the same file, whose bytes an object of another class writes."""
    # The strict modes fail at a character that the encoding of a terminal lacks.
    is_strict = stream.errors in ("strict", "surrogateescape")
    return io.TextIOWrapper(
        io.BufferedWriter(kind(stream.fileno(), "wb", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace" if is_strict else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _fail(message: str) -> NoReturn:
    sys.exit(f"dscache: {quotable(message)}")
