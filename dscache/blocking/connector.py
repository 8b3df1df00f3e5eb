"""The server of a blocking cache as the configuration names it, and the login there.

Each attempt to connect begins anew: hosts, certificates, Sentinels and credentials may all have
changed since the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakMethod

from ..config import Options
from ..net.credentials import Logins
from ..net.handshake import Attempt, ClosedHandshakes
from ..net.maintenance import NewAddress
from ..net.renewals import listen

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from .sentinel import Sentinels


class Connector:
    """One server, or the primary or a replica of a group.

    Several connectors of a server that may move share its ``new_address``.
    """

    def __init__(
        self,
        options: Options,
        provider: CredentialProvider | None,
        new_address: NewAddress | None = None,
    ) -> None:
        self._options = options
        self.new_address = new_address or NewAddress()
        self.logins = Logins(provider)
        self._sentinels: Sentinels | None = None
        self._closed: ClosedHandshakes | None = None
        if options.sentinels is None:
            self._closed = ClosedHandshakes(tls=bool(options.tls))
        else:
            # Imported here: redis-py takes longer to import than all of dscache.
            from .sentinel import Sentinels

            self._sentinels = Sentinels(options)

    def locate(self, deadline: float) -> tuple[str, int]:
        """Return the host and port of the server; for a path they have no meaning.

        Raises ConnectError if the Sentinels name none by the deadline.
        """
        if self._sentinels is None:
            return self.new_address.get() or (self._options.host, self._options.port)
        return self._sentinels.locate(deadline)

    def attempt(self, address: tuple[str, int]) -> Attempt | None:
        """Return the next handshake with a server that may be a proxy.

        None behind Sentinels, or at a new address: a server that has announced one knows all
        commands.
        """
        is_usual = address == (self._options.host, self._options.port)
        return self._closed.attempt() if self._closed is not None and is_usual else None


def on_renewal(
    provider: CredentialProvider | None, renewed: Callable[[], None], address: str
) -> None:
    """Have a bound method called, in any thread, whenever a provider has new credentials.

    The provider keeps no reference to the method's object. ``address`` is for the log.
    """
    method = WeakMethod(renewed)

    def on_token(token: object) -> None:
        if (call := method()) is not None:
            with suppress(RuntimeError):
                call()

    listen(provider, method, on_token, address)
