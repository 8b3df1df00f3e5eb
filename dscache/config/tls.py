"""TLS options: verification of the server, and the client's own certificate."""

from __future__ import annotations

import os
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from msgspec.structs import replace

from .._locks import make_lock
from ..errors import ConfigError
from . import files as regular_files
from .validation import Location, Secret, SwitchedStruct

_Stamp = tuple[int, ...] | None


class Tls(SwitchedStruct, frozen=True, kw_only=True):
    """Verification of the server, and the client's certificate.

    ``ca``, ``cert`` and ``key`` are PEM text, or the path of a PEM file.
    """

    ca: str | None = None
    cert: Secret | None = None
    key: Secret | None = None
    passphrase: Secret | None = None
    servername: str | None = None
    reject_unauthorized: bool = True
    check_hostname: bool = True

    def context(self, where: str = "cache.options.tls") -> ssl.SSLContext:
        """Return the SSLContext; a changed file makes a new one, so renewed certificates work.

        All connections share it, because making one takes milliseconds. Raises ConfigError, which
        begins with ``where``, if a file or PEM text is bad; the next call tries again.
        """
        # Taken before the files are read: the next call notices a change during the reading.
        system = ssl.get_default_verify_paths() if self.ca is None else None
        trusted = (system.cafile, system.capath) if system else ()
        stamps = tuple(_stamp(path) for path in (*self._paths().values(), *trusted) if path)
        with _making:
            found = _made.get(self)
            if found is not None and found[0] == stamps:
                return found[1]
            context = self._new_context(where)
            _made.pop(self, None)
            newest = max((stamp[0] for stamp in stamps if stamp), default=0)
            if time.time_ns() - newest >= _SETTLED_NS:
                if len(_made) >= _KEPT:
                    del _made[next(iter(_made))]
                _made[self] = stamps, context
            return context

    def _paths(self) -> dict[str, str]:
        """Return the options that are paths of files."""
        given = {"ca": self.ca, "cert": self.cert, "key": self.key}
        return {name: value for name, value in given.items() if value and not _is_pem(value)}

    def _new_context(self, where: str) -> ssl.SSLContext:
        context = _trusting(self.ca, f"{where}.ca")
        if not (self.reject_unauthorized and self.check_hostname):
            context.check_hostname = False
        if not self.reject_unauthorized:
            context.verify_mode = ssl.CERT_NONE
        if self.key and not self.cert:
            raise ConfigError(f"{where}.cert: is missing; a key needs its certificate")
        if self.cert:
            with (
                _as_file(self.cert, f"{where}.cert") as cert,
                _as_file(self.key or self.cert, f"{where}.key") as key,
            ):
                try:
                    context.load_cert_chain(cert, key, self.passphrase or _no_passphrase(where))
                except ssl.SSLError as error:
                    raise ConfigError(
                        f"{where}.{'key' if self.key else 'cert'}: certificate and key are no PEM, "
                        f"don't belong together, or the passphrase is wrong ({error.reason})"
                    ) from None
        return context

    def located(self, folder: str, place: Location) -> Tls:
        """Return a copy with absolute paths; relative ones start at ``folder``.

        Raises ConfigError if no SSLContext can be made of it.
        """
        located = replace(
            self, **{name: os.path.join(folder, path) for name, path in self._paths().items()}
        )
        located.context(str(place))
        return located


# The latest contexts, with the stamps of their files. The lock is held across a fork, because the
# thread that was making a context doesn't exist in the child.
_KEPT: Final = 64
# File systems have a coarse clock: two changes within this time may have the same stamp.
_SETTLED_NS: Final = 100_000_000
_made: dict[Tls, tuple[tuple[_Stamp, ...], ssl.SSLContext]] = {}
_making = make_lock()
os.register_at_fork(
    before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release
)


def _stamp(path: str) -> _Stamp:
    """Return a stamp that changes when a file is written, replaced or removed."""
    with suppress(OSError, ValueError):
        found = os.stat(path)
        return found.st_ctime_ns, found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev
    return None


def _is_pem(value: str) -> bool:
    return "-----BEGIN " in value


def _trusting(ca: str | None, where: str) -> ssl.SSLContext:
    """Return a context that trusts the certificates of ``ca``, or the system's for None."""
    if ca is None:
        return ssl.create_default_context()
    try:
        if not _is_pem(ca):
            ca = regular_files.read(ca, regular_files.MAX_PEM_BYTES).decode("ascii", "ignore")
        # OpenSSL reads ASCII alone, but comments between certificates may contain anything.
        ca = ca.encode("ascii", "ignore").decode()
        # Without a certificate Python would silently trust the system's.
        if _is_pem(ca):
            return ssl.create_default_context(cadata=ca)
        problem = "no certificate in it"
    except ssl.SSLError as error:
        problem = str(error.reason)
    except regular_files.UnsuitableFile as error:
        problem = f"it {error}"
    except (OSError, ValueError) as error:
        problem = str(error)
    raise ConfigError(f"{where}: must be PEM text or a PEM file of certificates: {problem}")


@contextmanager
def _as_file(pem: str, where: str) -> Iterator[str]:
    """Yield the path of a file with ``pem``, because OpenSSL loads keys from files alone."""
    if _is_pem(pem):
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".pem") as file:
            file.write(pem)
            file.flush()
            yield file.name
        return
    try:
        regular_files.check(pem, regular_files.MAX_PEM_BYTES)
        open(pem, "rb").close()
    except (OSError, ValueError) as error:
        # A key without its PEM frame looks like a path: don't show it.
        problem = getattr(error, "strerror", None) or "it isn't a path"
        if isinstance(error, regular_files.UnsuitableFile):
            problem = f"it {error}"
        raise ConfigError(f"{where}: must be PEM text or a PEM file: {problem}") from None
    yield pem


def _no_passphrase(where: str) -> Callable[[], str]:
    # Without this, OpenSSL asks at the terminal and blocks.
    def refuse() -> str:
        raise ConfigError(f"{where}.passphrase: is missing; the key is encrypted")

    return refuse
