"""A FastAPI service beside deepstream's server: a page shows its writes, and it hears the clicks.

    uvicorn service:app

It runs in this folder, with the variables and after the ``npm install`` of README.md. The page is
at http://localhost:8000/. Its text is a record that the service writes, and each click is an event
that the service counts in that record.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse, HTMLResponse
from pydantic import BaseModel

from dscache.deepstream import Peer

HERE = Path(__file__).parent
BUNDLE = Path("node_modules", "@deepstream", "client", "dist", "bundle", "ds.min.js")
# The folder in which `npm install` was called.
PACKAGES = Path(os.environ.get("PACKAGES", HERE))


class Text(BaseModel):
    text: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with Peer.from_config(HERE / "config.yml") as peer:
        app.state.peer = peer
        counting = asyncio.create_task(count_clicks(peer))
        peer.rpc.provide("greet", lambda name: f"Hello {name}, from Python")
        await peer.when_ready()
        yield
        counting.cancel()


async def count_clicks(peer: Peer) -> None:
    """Count the clicks of all pages; the pages see the count, as they have the record open."""

    def count(data: dict[str, int]) -> dict[str, int]:
        return {**data, "clicks": data.get("clicks", 0) + 1}

    async for _ in peer.events.listen("page/click"):
        await peer.records.update("page", count, default={})


app = FastAPI(lifespan=lifespan)


@app.get("/")
async def page() -> HTMLResponse:
    html = (HERE / "page.html").read_text(encoding="utf-8")
    return HTMLResponse(html.replace("DEEPSTREAM_PORT", os.environ["DEEPSTREAM_PORT"]))


@app.get("/client.js")
async def client() -> FileResponse:
    return FileResponse(PACKAGES / BUNDLE, media_type="text/javascript")


@app.put("/text", status_code=204)
async def write(body: Text) -> Response:
    await app.state.peer.records.patch("page", "text", body.text, default={})
    return Response(status_code=204)


@app.get("/clicks")
async def clicks() -> int:
    record = await app.state.peer.records.get("page")
    return 0 if record is None else record.data.get("clicks", 0)
