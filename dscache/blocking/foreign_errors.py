"""The deadline of an attempt to connect, and errors that come from elsewhere than a socket."""

from __future__ import annotations

from ..errors import DscacheError
from ..net.foreign_errors import foreign, is_own


class ConnectTimeout(TimeoutError):
    """The deadline of an attempt to connect is past."""


def raise_foreign(error: Exception) -> None:
    """Raise an error again that comes from elsewhere than a socket: a signal handler may raise any.

    Errors of the system have a number.
    """
    if (cause := foreign(error)) is not None:
        raise cause
    if isinstance(error, DscacheError) or (isinstance(error, ConnectTimeout) and is_own(error)):
        return
    if isinstance(error, OSError) and error.errno is None:
        raise error
