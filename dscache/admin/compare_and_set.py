"""Change keys on several servers, each only if it still holds what was found there."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

from ..errors import ReplyError
from .control import RawCommand
from .primaries import Primaries

# KEYS: some keys. ARGV: what each must hold; of a version, without leading zeros. Removes all of
# them if they do. Returns whether they are gone now, or were before.
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

# KEYS: one key. ARGV: 1 and what it must hold, or 0 and anything if it must be absent; what it
# shall hold; for how many milliseconds, or 0 for ever. Returns whether that was so.
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

DONE = 1


async def run_script(
    shards: Primaries, script: bytes, calls: Sequence[tuple[Sequence[bytes], Sequence[bytes]]]
) -> list[Any]:
    """Run a script for each of some keys and arguments; return its answers.

    A slot that has just moved is an answer like any other that nothing was done. Raises
    ReplyError for all other refusals.
    """
    sha = hashlib.sha1(script, usedforsecurity=False).hexdigest().encode()
    answers: list[Any] = [None] * len(calls)
    by_server: dict[Any, list[int]] = {}
    for number, (keys, _) in enumerate(calls):
        by_server.setdefault(shards.owner(keys[0]), []).append(number)

    async def ask(server: Any, numbers: Sequence[int]) -> None:
        commands: list[RawCommand] = [("SCRIPT", "LOAD", script)]
        for number in numbers:
            keys, arguments = calls[number]
            commands.append(("EVALSHA", sha, len(keys), *keys, *arguments))
        loaded, *its = await server.execute_many(*commands)
        if isinstance(loaded, ReplyError):
            raise loaded
        for number, answer in zip(numbers, its, strict=True):
            answers[number] = answer

    await asyncio.gather(*(ask(server, numbers) for server, numbers in by_server.items()))
    for answer in answers:
        if isinstance(answer, ReplyError) and answer.code not in (
            "MOVED",
            "ASK",
            "TRYAGAIN",
            "CLUSTERDOWN",
        ):
            raise answer
    return answers
