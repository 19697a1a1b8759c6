"""The web application: roads in and out, and who may take them."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from vismem_core.errors import cut

from . import replies
from .exchange import Answered, Service, refusal
from .refused import RefusedError

STARTED = int(time.time())


def application(service: Service) -> FastAPI:
    """The application around a service; it closes the service's batcher when it ends."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.close)

    app = FastAPI(lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        return refusal(error)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return refusal(RefusedError(f"{request.method} {cut(request.url.path)}: {error.detail}", error.status_code))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _authorized(service, request)
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        _authorized(service, request)
        if name != service.name:
            raise RefusedError(f"there is no model {cut(name)!r} here", 404, "model", "model_not_found")
        return _model(service)

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        _authorized(service, request)
        return Answered(service, request)

    @app.post("/load_model")
    async def load(request: Request) -> Response:
        """For ``transformers chat``, which asks for its model before it talks to it."""
        return Response(replies.event({"status": "ready", "cached": True}), media_type="text/event-stream")

    return app


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": STARTED, "owned_by": "vismem"}


def _authorized(service: Service, request: Request) -> None:
    if service.key is None:
        return
    told = request.headers.get("authorization", "")
    if not hmac.compare_digest(told.encode(), f"Bearer {service.key}".encode()):
        raise RefusedError("a wrong API key, or none: send it as a bearer token", 401, code="invalid_api_key")
