"""The files that the processes of a host share for a near cache, and the locks that come with them.

A segment is a file that every process maps, and two empty ones beside it. Each lock is an
``flock``, which the system releases at the death of its process:

- on the file itself, shared, while a process uses it. A process that gets this lock for itself
  alone knows that no other process is left, and removes the files, also those of killed processes.
- on ``.lock``, while a process changes the segment.
- on ``.owner``, by the process that hears of the changes.

A file gets its name once it is complete, and is never emptied: a new one takes its place.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import stat
import struct
import sys
import tempfile
import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from .._locks import make_lock
from ..config import NearCacheOptions, Options
from ..errors import ConfigError

if TYPE_CHECKING:
    from .._fast import HostNearCache

# The layout of the segment and the meaning of its words: another one has another name.
_FORMAT: Final = 1
_MEMORY: Final = Path("/dev/shm")
_MODE: Final = 0o600
_FLAGS: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
# Where the number stands that the names of the files beside a segment have.
_NUMBER_AT: Final = 5 * 8
_NUMBER: Final = struct.Struct("=Q")
# For how many seconds a process tries to attach while others begin or end, and how often.
_PATIENCE: Final = 2.0
_GLANCE: Final = 0.002
# Processes in different ones may mean different servers by one address, or have other clocks.
_NAMESPACES: Final = ("net", "mnt", "time")

_segments: WeakSet[Segment] = WeakSet()

# Held while files are opened and closed. So a fork comes before or after, and the child can close
# all files of its parent: with an open one, it would also keep the parent's locks. The child
# inherits the lock, held by the thread that has forked.
_opening = make_lock()
os.register_at_fork(
    before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_opening.release
)


class Segment:
    """The files of a near cache as one process uses them; ``core`` has the entries."""

    def __init__(self, core: HostNearCache, options: Options) -> None:
        self._core = core
        self._options = options
        self._folder = _folder()
        self._prefix = f"dscache-{os.geteuid()}-"
        self.path = self._folder / (self._prefix + digest_of(options))
        self._files: list[int] = []
        self._owner = -1
        # A closed number may soon be that of another file, so it isn't closed while it is locked.
        # A signal handler may close the cache meanwhile.
        self._lock = make_lock()

    # -- a process

    def attach(self) -> None:
        """Begin to use the segment, which is made if there is none. Raises ConfigError."""
        limit = time.monotonic() + _PATIENCE
        try:
            while not self._open():
                if time.monotonic() > limit:
                    raise self._error("is not given free by other processes")
                time.sleep(_GLANCE)
        except OSError as error:
            raise self._error(f"can't be used: {error.strerror}") from None
        _segments.add(self)

    def detach(self) -> None:
        """Leave the segment, and remove its files if no other process uses them."""
        _segments.discard(self)
        with _opening, self._lock:
            self._core.detach()
            files, self._files = self._files, []
            self._owner = -1
            for file in files[1:]:
                os.close(file)
            if files:
                with suppress(OSError):
                    if _try_lock(files[0], fcntl.LOCK_EX) and _is_at(self.path, files[0]):
                        _remove(self.path, files[0])
                os.close(files[0])

    def leave(self) -> None:
        """Close the files in a forked child, which the parent goes on using."""
        _segments.discard(self)
        files, self._files = self._files, []
        self._owner = -1
        for file in files:
            os.close(file)

    # -- the process that hears of changes

    def try_lead(self) -> bool:
        """Become the process that hears of changes; return whether it is this one now."""
        with self._lock:
            return self._owner >= 0 and _try_lock(self._owner, fcntl.LOCK_EX)

    def resign(self) -> None:
        """Let another process hear of changes."""
        with self._lock:
            if self._owner >= 0:
                fcntl.flock(self._owner, fcntl.LOCK_UN)

    # -- helpers

    def _open(self) -> bool:
        """Use the segment that there is, or a new one; return whether this process uses one now."""
        with _opening:
            # An exception may have struck the thread that has opened it.
            return bool(self._files) or self._join() or self._publish()

    def _join(self) -> bool:
        """Use the segment that there is; return whether there was one to use."""
        try:
            file = os.open(self.path, _FLAGS)
        except FileNotFoundError:
            return False
        files = [file]
        try:
            self._check_owner(file)
            if _try_lock(file, fcntl.LOCK_EX):  # of processes that have ended
                if _is_at(self.path, file):
                    _remove(self.path, file)
                return False
            if not (_try_lock(file, fcntl.LOCK_SH) and _is_at(self.path, file)):
                return False
            for name in _names_beside(self.path, file):
                files.append(os.open(name, _FLAGS))
                self._check_owner(files[-1])
            if os.fstat(file).st_size != self._core.size or not self._core.attach(*files[:2]):
                raise self._error("is of another version of dscache")
            self._files, files = files, []
            self._owner = self._files[2]
        finally:
            for one in files:
                os.close(one)
        return True

    def _publish(self) -> bool:
        """Make a segment, and use it; return False if another process was faster."""
        self._remove_stale()
        number = int.from_bytes(os.urandom(8), "little")
        early = self.path.with_name(f"{self.path.name}-{number:016x}.new")
        beside = _beside(self.path, number)
        files: list[int] = []
        try:
            for name in (early, *beside):
                files.append(os.open(name, _FLAGS | os.O_CREAT | os.O_EXCL, _MODE))
                if len(files) == 1 and not _try_lock(files[0], fcntl.LOCK_SH):
                    return False
            seed = int.from_bytes(os.urandom(8), "little")
            if not self._core.create(files[0], seed, number):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if not self._core.attach(*files[:2]):
                raise OSError(errno.ENOMEM, "it can't be mapped")
            try:
                os.link(early, self.path)
            except (FileExistsError, FileNotFoundError):
                self._core.detach()
                return False
            self._files, files, beside = files, [], ()
            self._owner = self._files[2]
        finally:
            for name in (*beside, early):
                with suppress(FileNotFoundError):
                    os.unlink(name)
            for file in files:
                os.close(file)
        return True

    def _remove_stale(self) -> None:
        """Remove the files of this user that processes with other options left when killed."""
        for path in self._folder.glob(self._prefix + "*"):
            if path.suffix in (".lock", ".owner"):
                continue
            with suppress(OSError):
                file = os.open(path, _FLAGS)
                try:
                    is_mine = os.fstat(file).st_uid == os.geteuid()
                    if is_mine and _try_lock(file, fcntl.LOCK_EX) and _is_at(path, file):
                        _remove(path, file)
                finally:
                    os.close(file)

    def _check_owner(self, file: int) -> None:
        """Raise ConfigError for a file that another user could have written."""
        about = os.fstat(file)
        if about.st_uid != os.geteuid() or not stat.S_ISREG(about.st_mode):
            raise self._error("is not a file of this user")
        if stat.S_IMODE(about.st_mode) & ~_MODE:
            raise self._error("may be used by other users")

    def _error(self, problem: str) -> ConfigError:
        near = self._options.near_cache or NearCacheOptions()
        return ConfigError(
            f"nearCache: shared: {self.path} {problem}; it needs up to maxBytes "
            f"({near.max_bytes}) of memory; remove the file if no process uses it, or leave "
            "shared out"
        )


def digest_of(options: Options) -> str:
    """Return a text that processes have in common if they may share records."""
    near = options.near_cache or NearCacheOptions()
    namespaces = []
    for name in _NAMESPACES:
        with suppress(OSError):
            about = os.stat(f"/proc/self/ns/{name}")
            namespaces.append((name, about.st_dev, about.st_ino))
    parts = (
        *(_FORMAT, sys.byteorder, namespaces, options.host, options.port, options.path),
        *(options.family, options.username, options.db, bool(options.tls)),
        *(options.key_prefix, options.hash_tag, options.name, options.role),
        [(one.host, one.port) for one in options.sentinels or ()],
        *(near.max_records, near.max_bytes, near.max_age, near.idle_limit, sorted(near.prefixes)),
    )
    text = repr(parts).encode("utf-8", "backslashreplace")
    return blake2b(text, digest_size=12).hexdigest()


def _folder() -> Path:
    """Return where files take memory alone, or the folder for temporary files."""
    return _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())


def _try_lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, file: int) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file))
    except FileNotFoundError:
        return False


def _beside(path: Path, number: int) -> tuple[Path, ...]:
    return tuple(path.with_name(f"{path.name}-{number:016x}{end}") for end in (".lock", ".owner"))


def _names_beside(path: Path, file: int) -> tuple[Path, ...]:
    """Return the names of the files beside an open segment."""
    content = os.pread(file, _NUMBER.size, _NUMBER_AT)
    return _beside(path, *_NUMBER.unpack(content)) if len(content) == _NUMBER.size else ()


def _remove(path: Path, file: int) -> None:
    """Remove a segment that this process has for itself."""
    if path.suffix == ".new":  # its name has the number, which the file may not have yet
        shared = path.with_suffix("")
        names = tuple(shared.with_name(shared.name + end) for end in (".lock", ".owner"))
    else:
        names = _names_beside(path, file)
    for name in (*names, path):
        with suppress(FileNotFoundError):
            os.unlink(name)


def _detach_all() -> None:
    """Remove the files at the end of the last process, if its caches weren't closed."""
    for segment in list(_segments):
        segment.detach()


atexit.register(_detach_all)
