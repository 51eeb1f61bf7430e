"""The console: its page at `/`, and the data it shows."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from services.core.errors import NotFoundError
from services.gateway.console.event_stream import KEEP_ALIVE_S, FleetEventStream
from services.gateway.console.pages import INDEX, load_pages
from services.gateway.gateway import Gateway
from services.gateway.sse import dumps


def console_router(gateway: Gateway) -> APIRouter:
    """The page is open to all and holds nothing; its data needs a key as all of `/v1` does.

    A program that asks `/` for JSON is told what there is.
    """
    router = APIRouter()
    pages = load_pages()

    async def page(request: Request, asset: str = INDEX) -> Response:
        found = pages.get(asset)
        if found is None:
            raise NotFoundError(f"The console has no file {asset!r}", param="asset")
        return found.answer(request.headers.get("if-none-match"))

    async def index(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        if "application/json" in accept and "text/html" not in accept:
            return Response(dumps(_service_index(gateway)), media_type="application/json")
        return await page(request)

    async def view() -> Response:
        content = await gateway.feed.view()
        headers = {"cache-control": "no-store"}
        return Response(content, media_type="application/json", headers=headers)

    async def events() -> Response:
        return FleetEventStream(gateway.feed.listen(keep_alive_s=KEEP_ALIVE_S))

    needs_key = [Depends(gateway.authenticate)]
    router.add_api_route("/", index, methods=["GET", "HEAD"])
    router.add_api_route("/console/{asset:path}", page, methods=["GET", "HEAD"])
    router.add_api_route("/v1/experts/view", view, methods=["GET"], dependencies=needs_key)
    router.add_api_route("/v1/experts/events", events, methods=["GET"], dependencies=needs_key)
    return router


def _service_index(gateway: Gateway) -> dict[str, Any]:
    return {
        "service": "expertfleet",
        "model": gateway.model.name,
        "openai_base": "/v1",
        "endpoints": [
            "/v1/models",
            "/v1/completions",
            "/v1/chat/completions",
            "/v1/sessions/{id}",
            "/v1/experts",
            "/v1/experts/view",
            "/v1/experts/events",
            "/healthz",
            "/readyz",
            "/metrics",
        ],
    }
