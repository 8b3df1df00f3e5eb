"""A service as it is deployed: records over HTTP, probes and metrics.

    pip install '.[examples,prometheus]'
    CONFIG=examples/operations/config.yml REDIS_HOST=localhost \
        uvicorn --app-dir examples/operations service:app

``compose.yml`` and ``kubernetes.yml`` run it. One process serves one address, so that Prometheus
reads the metrics of each; start more containers for more processes.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import dscache
from dscache.prometheus import register


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # The start ends with the reason if Redis can't be reached or refuses the login.
    async with dscache.AsyncCache(os.environ.get("CONFIG", "config.yml")) as app.state.cache:
        collector = register(app.state.cache, "records")
        yield
        collector.remove("records")


app = FastAPI(lifespan=lifespan)


@app.exception_handler(dscache.DscacheError)
async def unavailable(request: Request, error: dscache.DscacheError) -> JSONResponse:
    """Answer within commandTimeout, even if Redis doesn't."""
    return JSONResponse({"detail": str(error)}, status_code=503)


@app.get("/live")
async def live() -> Response:
    """Answer as long as the event loop runs. A restart would not bring Redis back."""
    return Response()


@app.get("/ready")
async def ready() -> Response:
    """Answer 503 while there is no connection, so that other replicas get the requests."""
    return Response(status_code=200 if app.state.cache.is_ready else 503)


@app.get("/metrics")
async def metrics() -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@app.get("/records/{name:path}")
async def read(name: str) -> Response:
    record = await app.state.cache.get(name)
    if record is None:
        raise HTTPException(404)
    return Response(record.raw, media_type="application/json")
