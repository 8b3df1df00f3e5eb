"""A TCP server on uvloop that keeps the scores of a game as typed records.

    pip install '.[examples]'
    REDIS_URL=redis://localhost:6379 python examples/uvloop_server.py 7777

    echo '{"do":"score","player":"ada","points":5}' | nc -N localhost 7777

Each line is a request, and the reply is one line. Requests, records and replies are Structs, so
that invalid data is refused with the place of the mistake.
"""

import asyncio
import os
import sys
from contextlib import suppress

import msgspec
import uvloop

import dscache


class Player(msgspec.Struct):
    """The record of a player."""

    points: int = 0
    games: int = 0


class Score(msgspec.Struct, tag_field="do", tag="score"):
    """A request that adds points to a player."""

    player: str
    points: int


class Show(msgspec.Struct, tag_field="do", tag="show"):
    """A request for the record of a player."""

    player: str


requests = msgspec.json.Decoder(Score | Show)


async def score(cache: dscache.AsyncCache, request: Score) -> Player:
    def add(player: Player) -> Player:
        player.points += request.points
        player.games += 1
        return player

    name = f"player/{request.player}"
    record = await cache.update(name, add, default=Player(), type=Player)
    assert record is not None  # as the change never removes it
    return record.data


async def show(cache: dscache.AsyncCache, request: Show) -> msgspec.Raw | None:
    record = await cache.get(f"player/{request.player}")
    return record and msgspec.Raw(record.raw)  # the stored text, not decoded


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
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal() or int(sys.argv[1]) > 65535:
        sys.exit("usage: python examples/uvloop_server.py PORT")
    try:
        with suppress(KeyboardInterrupt):
            uvloop.run(main(int(sys.argv[1])))
    except (dscache.DscacheError, OSError) as error:  # no Redis, or the port is in use
        sys.exit(f"uvloop_server.py: {error}")
