"""A FastAPI service that sends every change of a record to its WebSocket clients.

    pip install '.[examples]'
    REDIS_URL=redis://localhost:6379 uvicorn --app-dir examples fastapi_service:app

    curl -X PUT 'localhost:8000/records/room/1?version=1' --json '{"open": true}'
    curl -i localhost:8000/records/room/1
    python -m websockets ws://localhost:8000/watch/room/1

It sends records without decoding them, as Redis holds JSON text.
"""

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import Body, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import JSONResponse

import dscache

URL = os.environ.get("REDIS_URL", "redis://localhost:6379")
RETRY_SECONDS = 0.5


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # The clients that wait for a change of each record. One watch serves them all.
    app.state.clients = defaultdict(set)
    async with dscache.AsyncCache.from_config(URL) as app.state.cache:
        following = asyncio.create_task(follow())
        yield
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


app = FastAPI(lifespan=lifespan)


async def follow() -> None:
    """Wake the clients of each record that changes."""
    clients = app.state.clients
    while True:
        with suppress(dscache.DscacheError):  # Redis is unavailable: try again later
            async with app.state.cache.watch() as changes:
                wake(*clients)
                async for change in changes:
                    # Behind a gap, any record may have changed.
                    wake(*clients if change.is_loss else [change.name])
        await asyncio.sleep(RETRY_SECONDS)


def wake(*names: str) -> None:
    for name in names:
        for changed in app.state.clients.get(name, ()):
            changed.set()


@app.exception_handler(dscache.DscacheError)
async def unavailable(request: Request, error: dscache.DscacheError) -> JSONResponse:
    if isinstance(error, dscache.RecordDamaged):
        code = 500  # another program wrote it
    else:
        is_invalid = isinstance(error, dscache.RecordError)  # the client's name or version
        code = 422 if is_invalid else 503
    return JSONResponse({"detail": str(error)}, status_code=code)


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
            pass  # reads until the client leaves, and ignores its messages
    finally:
        forwarding.cancel()
        await asyncio.gather(forwarding, return_exceptions=True)


async def forward(socket: WebSocket, name: str) -> None:
    """Send a record's JSON text now and after each change."""
    changed = asyncio.Event()
    changed.set()
    app.state.clients[name].add(changed)
    try:
        seen = None
        while await changed.wait():
            changed.clear()
            record = await read_patiently(name)
            # A writer may give other data the same version.
            if record is not None and record != seen:
                await socket.send_text(record.raw.decode())
                seen = record
    finally:
        app.state.clients[name].discard(changed)
        if not app.state.clients[name]:
            del app.state.clients[name]


async def read_patiently(name: str) -> dscache.Record | None:
    while True:
        try:
            return await app.state.cache.get(name)
        except dscache.RecordError:
            return None  # damaged: a change will tell when it is whole
        except dscache.DscacheError:  # Redis is unavailable: try again later
            await asyncio.sleep(RETRY_SECONDS)
