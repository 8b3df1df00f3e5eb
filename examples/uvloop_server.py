"""A TCP server on uvloop that keeps typed records: the scores of a game.

    pip install '.[examples]'
    REDIS_URL=redis://localhost:6379 python examples/uvloop_server.py 7777

    echo '{"do":"score","player":"ada","points":5}' | nc -N localhost 7777

A line is a request, and a line answers it. What a client sends, what Redis holds and what goes
back are Structs: whatever doesn't fit is refused with the place in it that doesn't.
"""

import asyncio
import os
import sys
from contextlib import suppress

import msgspec
import uvloop

import dscache


class Player(msgspec.Struct):
    """What Redis holds of a player."""

    points: int = 0
    games: int = 0


class Score(msgspec.Struct, tag_field="do", tag="score"):
    """A request: a player has made points."""

    player: str
    points: int


class Show(msgspec.Struct, tag_field="do", tag="show"):
    """A request: how many are they?"""

    player: str


requests = msgspec.json.Decoder(Score | Show)


async def score(cache: dscache.AsyncCache, request: Score) -> Player:
    name = f"player/{request.player}"
    while True:
        record = await cache.get(name)
        player = record.decode(Player) if record else Player()
        player.points += request.points
        player.games += 1
        if await cache.set(name, record.version + 1 if record else 0, player, if_newer=True):
            return player


async def show(cache: dscache.AsyncCache, request: Show) -> msgspec.Raw | None:
    record = await cache.get(f"player/{request.player}")
    return record and msgspec.Raw(record.raw)  # as it is: it need not be decoded to be shown


async def answer(cache: dscache.AsyncCache, line: bytes) -> object:
    try:
        match requests.decode(line):
            case Score() as request:
                return await score(cache, request)
            case Show() as request:
                return await show(cache, request)
    except (msgspec.MsgspecError, dscache.DscacheError) as error:
        return {"error": str(error)}


async def main(port: int) -> None:
    url = os.environ.get("REDIS_URL", "redis://localhost:6379")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for line in reader:
            writer.write(msgspec.json.encode(await answer(cache, line)) + b"\n")
            await writer.drain()
        writer.close()

    async with dscache.AsyncCache.from_config(url) as cache:
        server = await asyncio.start_server(serve, "127.0.0.1", port)
        print(f"listening on port {server.sockets[0].getsockname()[1]}", flush=True)
        async with server:
            await server.serve_forever()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        uvloop.run(main(int(sys.argv[1])))
