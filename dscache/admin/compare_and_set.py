"""Scripts that change keys only if they are unchanged, run on several servers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Sequence

from ..aio.control import Reply
from ..core.failures import refuses
from ..errors import ReplyError
from .primaries import Primaries

# KEYS: keys of one record. ARGV: the value that each must have; a version without leading zeros.
# Removes all of them if they do. Returns 1 if they are gone, now or before, else 0.
REMOVE = b"""
local missing = 0
for k = 1, #KEYS do
  local held = redis.pcall('GET', KEYS[k])
  if not held then
    missing = missing + 1
  elseif held ~= ARGV[k] and
      (type(held) ~= 'string' or string.match(held, '^0+(%d+)$') ~= ARGV[k]) then
    return 0
  end
end
if missing == #KEYS then return 1 end
if missing > 0 then return 0 end
redis.call('DEL', unpack(KEYS))
return 1
"""

# KEYS: one key. ARGV: 1 and the value it must have, or 0 and any value if it must be absent; the
# new value; its lifetime in milliseconds, or 0 for none. Returns 1 if it was written, else 0.
SWAP = b"""
local held = redis.pcall('GET', KEYS[1])
if ARGV[1] == '0' then
  if held then return 0 end
elseif held ~= ARGV[2] then
  return 0
end
if ARGV[4] == '0' then
  redis.call('SET', KEYS[1], ARGV[3])
else
  redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
end
return 1
"""

_MOVING = ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN")
DONE = 1
"""The reply of both scripts that means success."""


async def run_script(
    primaries: Primaries, script: bytes, calls: Sequence[tuple[Sequence[bytes], Sequence[bytes]]]
) -> list[Reply]:
    """Run a script once for each pair of keys and arguments; return its replies in order.

    The reply is a ReplyError where the slot has just moved. Raises ReplyError for any other error
    reply, and ConnectionLost.
    """
    if not calls:
        return []
    sha = hashlib.sha1(script, usedforsecurity=False).hexdigest().encode()
    how: tuple[str, bytes] = ("EVALSHA", sha)
    load = ("SCRIPT", "LOAD", script)
    try:
        await asyncio.gather(*(primary.server.execute(*load) for primary in primaries.all))
    except ReplyError as error:
        if not refuses("script", error):
            raise
        how = ("EVAL", script)

    def run() -> Awaitable[list[Reply]]:
        return primaries.execute_by_key(
            [(keys[0], (*how, len(keys), *keys, *arguments)) for keys, arguments in calls]
        )

    replies = await run()
    if any(isinstance(reply, ReplyError) and refuses("evalsha", reply) for reply in replies):
        # Nothing of a refused call was done, and all of them are refused alike.
        how = ("EVAL", script)
        replies = await run()
    for reply in replies:
        if isinstance(reply, ReplyError) and reply.code not in _MOVING:
            raise reply
    return replies
