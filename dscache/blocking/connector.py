"""The server of a blocking cache as the configuration names it: by address, path or Sentinels.

Each attempt to connect begins anew: hosts, certificates, Sentinels and credentials may all have
changed since the last one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import Options
from ..core.constants import join_address
from ..net.credentials import Login
from .credentials import current_login

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from .sentinel import Sentinels


class Connector:
    """One server, or the primary or a replica of a group."""

    def __init__(self, options: Options, provider: CredentialProvider | None) -> None:
        self.options = options
        self._provider = provider
        self._sentinels: Sentinels | None = None
        if options.sentinels is not None:
            # Imported here: redis-py takes longer to import than all of dscache.
            from .sentinel import Sentinels

            self._sentinels = Sentinels(options)

    def locate(self, deadline: float) -> tuple[str, int]:
        """Return the host and port of the server; for a path they have no meaning.

        Raises ConnectError if the Sentinels name none by the deadline.
        """
        if self._sentinels is None:
            return self.options.host, self.options.port
        return self._sentinels.locate(deadline)

    def address(self, host: str, port: int) -> str:
        """Return the address of the server for messages."""
        return self.options.path or join_address(host, port)

    def login(self) -> Login:
        """Return the username and password. Raises ConnectError if the provider fails."""
        return current_login(self.options, self._provider)
