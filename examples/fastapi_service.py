"""A FastAPI service whose WebSocket clients see a record change, whoever changes it.

    pip install '.[examples]'
    REDIS_URL=redis://localhost:6379 uvicorn --app-dir examples fastapi_service:app

    curl -X PUT 'localhost:8000/records/room/1?version=1' --json '{"open": true}'
    curl -i localhost:8000/records/room/1
    python -m websockets ws://localhost:8000/watch/room/1

No record is decoded on its way out: what Redis holds is JSON text already.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import Body, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import JSONResponse

import dscache

URL = os.environ.get("REDIS_URL", "redis://localhost:6379")
# With a near cache, to look at a record that hasn't changed costs no round trip.
CONFIG = {"name": "redis", "options": {"url": URL, "nearCache": True}}
LOOK_EVERY = 0.02


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with dscache.AsyncCache.from_config(CONFIG) as app.state.cache:
        yield


app = FastAPI(lifespan=lifespan)


@app.exception_handler(dscache.DscacheError)
async def unavailable(request: Request, error: dscache.DscacheError) -> JSONResponse:
    mine = isinstance(error, dscache.RecordError)  # a bad name or version is the client's fault
    return JSONResponse({"detail": str(error)}, status_code=422 if mine else 503)


@app.get("/records/{name:path}")
async def read(name: str) -> Response:
    record = await app.state.cache.get(name)
    if record is None:
        raise HTTPException(404)
    etag = {"ETag": f'"{record.version}"'}
    return Response(record.raw, headers=etag, media_type="application/json")


@app.put("/records/{name:path}", status_code=204)
async def write(name: str, version: int, data: Annotated[Any, Body()]) -> None:
    if not await app.state.cache.set(name, version, data, if_newer=True):
        raise HTTPException(409, f"{name} has version {await app.state.cache.head(name)} already")


@app.websocket("/watch/{name:path}")
async def watch(socket: WebSocket, name: str) -> None:
    await socket.accept()
    forwarding = asyncio.create_task(forward(socket, name))
    try:
        async for _ in socket.iter_text():
            pass  # until the client leaves: it has nothing to say
    finally:
        forwarding.cancel()
        await asyncio.gather(forwarding, return_exceptions=True)


async def forward(socket: WebSocket, name: str) -> None:
    """Send a record's JSON text now, and whenever it has changed."""
    seen = None
    while True:
        with suppress(dscache.DscacheError):  # while Redis is away, there is nothing new
            record = await app.state.cache.get(name)
            if record is not None and record.version != seen:
                await socket.send_text(record.raw.decode())
                seen = record.version
        await asyncio.sleep(LOOK_EVERY)
