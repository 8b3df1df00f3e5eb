"""Ask the Sentinels where the primary, or a replica, of a group is; through redis-py."""

from __future__ import annotations

import random
from collections.abc import Iterable

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError

from .config import Options
from .errors import ConnectError


async def locate(options: Options) -> tuple[str, int]:
    """Return the host and port of the primary of ``options.name``, or of one of its replicas.

    Each Sentinel is asked in turn until one knows. Raises ConnectError if none does.
    """
    assert options.sentinels is not None
    # Each gets its share of the time in which the connection must be made.
    seconds = options.connect_timeout / 1000 / (len(options.sentinels) + 1)
    directory = Sentinel(  # type: ignore[no-untyped-call]
        [(one.host, one.port) for one in options.sentinels],
        sentinel_kwargs={
            "username": options.sentinel_username,
            "password": options.sentinel_password,
            "socket_connect_timeout": seconds,
            "socket_timeout": seconds,
            "retry": Retry(NoBackoff(), 0),
        },
    )
    clients: list[Redis] = list(directory.sentinels)
    try:
        return await _ask(directory, options)
    except AuthenticationError as error:
        raise ConnectError(
            f"the Sentinels refuse sentinelUsername or sentinelPassword: {error}"
        ) from None
    except MasterNotFoundError:
        raise ConnectError(
            f'no Sentinel of {_addresses(options)} knows a primary "{options.name}" that is up'
        ) from None
    except RedisError as error:
        raise ConnectError(f"the Sentinels of {_addresses(options)} fail: {error}") from None
    finally:
        for client in clients:
            await client.aclose()


async def _ask(directory: Sentinel, options: Options) -> tuple[str, int]:
    name = options.name or ""
    if options.role == "master":
        host, port = await directory.discover_master(name)
        return str(host), int(port)
    replicas = list(await directory.discover_slaves(name))
    if not replicas:
        raise ConnectError(
            f'no Sentinel of {_addresses(options)} knows a replica of "{options.name}" that is up'
        )
    host, port = random.choice(replicas)
    return _text(host), int(port)


def _addresses(options: Options) -> str:
    return _join(one.address for one in options.sentinels or ())


def _join(addresses: Iterable[str]) -> str:
    return ", ".join(addresses)


def _text(host: object) -> str:
    return host.decode() if isinstance(host, bytes) else str(host)
