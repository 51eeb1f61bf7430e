"""`GET /v1/traces` and `GET /v1/traces/{id}`: what this machine's span files say."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, Depends, Request

from services.core.errors import InvalidRequestError, NotFoundError
from services.core.settings import Settings
from services.core.trace_files import find_trace_spans, newest_requests
from services.core.tracing import trace_folder
from services.gateway.gateway import Gateway
from services.gateway.trace_view import request_json, trace_json

_MAX_LISTED: Final = 100


def traces_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(dependencies=[Depends(gateway.authenticate)])
    reading = asyncio.Lock()  # one lookup at a time, each in a thread

    async def newest(request: Request) -> dict[str, Any]:
        folder = _folder(gateway.settings)
        limit = _limit(request.query_params.get("limit", "20"))
        async with reading:
            spans = await asyncio.to_thread(newest_requests, folder, limit)
        return {"traces": [request_json(span) for span in spans]}

    async def one(key: str) -> dict[str, Any]:
        folder = _folder(gateway.settings)
        async with reading:
            trace = await asyncio.to_thread(_read_trace, folder, key)
        if trace is None:
            raise NotFoundError(
                f"no trace or request {key!r} is in the span files; spans are written about a "
                "second after they end, and the oldest are dropped"
            )
        return trace

    router.add_api_route("/v1/traces", newest, methods=["GET"])
    router.add_api_route("/v1/traces/{key}", one, methods=["GET"])
    return router


def _read_trace(folder: Path, key: str) -> dict[str, Any] | None:
    found = find_trace_spans(folder, key)
    return None if found is None else trace_json(found)


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= _MAX_LISTED:
        raise InvalidRequestError(f"limit is {text!r}, must be 1 to {_MAX_LISTED}", param="limit")
    return int(text)


def _folder(settings: Settings) -> Path:
    if settings.otlp_endpoint:
        raise NotFoundError(
            f"spans go to the collector at {settings.otlp_endpoint}; open the trace there"
        )
    if settings.state_dir is None:
        raise NotFoundError(
            "no spans are recorded: set EXPERTFLEET_STATE_DIR to keep them in files, or "
            "EXPERTFLEET_OTLP_ENDPOINT to send them to a collector"
        )
    return trace_folder(settings.state_dir)
