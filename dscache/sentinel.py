"""Ask the Sentinels where the primary, or a replica, of a group is; through redis-py."""

from __future__ import annotations

import random
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from .config import Options, SentinelNode
from .errors import ConnectError

_DOWN = ("is_odown", "is_sdown", "is_disconnected")


async def locate(options: Options) -> tuple[str, int]:
    """Return the host and port of the primary of ``options.name``, or of one of its replicas.

    Each Sentinel is asked in turn until one knows. Raises ConnectError, with what each of them
    said, if none does.
    """
    sentinels = options.sentinels or ()
    problems: list[str] = []
    for node in sentinels:
        # Each gets its share of the time in which the connection must be made.
        client = _client(node, options, options.connect_timeout / 1000 / (len(sentinels) + 1))
        try:
            if options.role == "master":
                found = await client.sentinel_get_master_addr_by_name(options.name or "")
            else:
                found = _one_of(await client.sentinel_slaves(options.name or ""))
        except (RedisError, OSError) as error:
            problems.append(f"{node.address}: {error}")
        else:
            if found is not None:
                return str(found[0]), int(found[1])
            problems.append(f"{node.address}: it knows of none that is up")
        finally:
            await client.aclose()
    sought = "primary" if options.role == "master" else "replica"
    raise ConnectError(f'no Sentinel names a {sought} of "{options.name}": {"; ".join(problems)}')


def _client(node: SentinelNode, options: Options, seconds: float) -> Any:
    return Redis(
        host=node.host,
        port=node.port,
        username=options.sentinel_username,
        password=options.sentinel_password,
        socket_connect_timeout=seconds,
        socket_timeout=seconds,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
    )


def _one_of(replicas: list[dict[str, Any]]) -> tuple[str, int] | None:
    """Return the address of any replica that the Sentinel doesn't take for down."""
    up = [one for one in replicas if not any(one.get(flag) for flag in _DOWN)]
    if not up:
        return None
    replica = random.choice(up)
    return replica["ip"], replica["port"]
