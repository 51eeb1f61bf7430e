"""The gateway's FastAPI application, put together from its parts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path

from fastapi import FastAPI
from opentelemetry import trace
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from services.core.generation import ShardClient
from services.core.metrics import new_registry
from services.core.registry import Registry
from services.core.settings import Settings
from services.gateway.auth import Authenticator
from services.gateway.boundary import RequestBoundary
from services.gateway.console.activity import Activity
from services.gateway.console.administration import Administration, WorkerControl
from services.gateway.console.assembly import console_feed
from services.gateway.console.feed import ConsoleFeed, CountSessions, nobody_counts
from services.gateway.console.worker_access import WorkerAccess
from services.gateway.errors import status_response
from services.gateway.expert_load import LoadHistory
from services.gateway.gateway import Gateway
from services.gateway.intake import Intake
from services.gateway.metrics import GatewayMetrics
from services.gateway.resubmission import ResubmittingShards
from services.gateway.routes.admin import admin_router
from services.gateway.routes.chat import chat_router
from services.gateway.routes.completions import completions_router
from services.gateway.routes.console import console_router
from services.gateway.routes.experts import experts_router
from services.gateway.routes.models import models_router
from services.gateway.routes.operations import operations_router
from services.gateway.routes.sessions import sessions_router
from services.gateway.routes.traces import traces_router
from services.gateway.served_model import ServedModel

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    settings: Settings,
    shard: ShardClient,
    registry: Registry | None,
    *,
    model_folder: Path,
    tracer: trace.Tracer | None = None,
    metrics_registry: CollectorRegistry | None = None,
    activity: Activity | None = None,
    control: WorkerControl | None = None,
    count_sessions: CountSessions = nobody_counts,
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """The OpenAI-compatible API over `shard`.

    `model_folder` holds the checkpoint's configuration and tokeniser; no weights are read.
    `registry` feeds `/v1/experts` and the console; None leaves the topology empty. `activity` is
    given where `shard` tells it of the shards; `control` is how workers are told, over gRPC by
    default. What is passed in stays the caller's to close, for example in `lifespan`. Raises
    `CheckpointError` for a folder that cannot be served.
    """
    activity = activity or Activity()
    tracer = tracer or trace.NoOpTracer()
    metrics = GatewayMetrics(new_registry() if metrics_registry is None else metrics_registry)
    model = ServedModel.load(settings, model_folder)
    intake = Intake(
        max_requests=settings.max_waiting_requests, max_bytes=settings.max_waiting_bytes
    )
    gateway = Gateway(
        settings=settings,
        shard=shard,
        shards=ResubmittingShards(shard, shard_wait_s=settings.shard_wait_s),
        registry=registry,
        model=model,
        metrics=metrics,
        authenticate=Authenticator(settings.api_keys),
        load_history=LoadHistory(),
        intake=intake,
        feed=console_feed(settings, registry, model, activity, intake, count_sessions),
    )
    app = FastAPI(
        title="expertfleet",
        openapi_url=None,
        redirect_slashes=False,
        lifespan=_with_console(gateway.feed, lifespan),
    )
    for make_router in (
        completions_router,
        chat_router,
        models_router,
        sessions_router,
        experts_router,
        traces_router,
        console_router,
        operations_router,
    ):
        app.include_router(make_router(gateway))
    administration = Administration(registry, control or WorkerAccess(settings), tracer)
    app.include_router(admin_router(gateway, administration))
    app.add_exception_handler(HTTPException, _refused_by_http)
    app.add_middleware(RequestBoundary, metrics=metrics, tracer=tracer, activity=activity)
    return app


def _with_console(feed: ConsoleFeed, inner: Lifespan | None) -> Lifespan:
    """The console reads the registry while the application runs, and ends before what it reads."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with inner(app) if inner is not None else nullcontext():
            feed.start()
            try:
                yield
            finally:
                await feed.close()

    return lifespan


async def _refused_by_http(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    target = f"{request.method} {request.url.path}"
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return status_response(404, f"There is no {target}", "not_found", headers)
    if error.status_code == 405:
        message = f"{target} is not allowed; allowed: {headers.get('Allow', 'another method')}"
        return status_response(405, message, "method_not_allowed", headers)
    return status_response(error.status_code, str(error.detail), "http_error", headers)
