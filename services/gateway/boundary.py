"""The outermost layer: request ids, the request's span, counters, and errors become answers."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from dataclasses import dataclass, field

from opentelemetry import trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.core import telemetry
from services.core.tracing import extract_context, trace_exemplar
from services.gateway.console.activity import Activity, Served
from services.gateway.errors import (
    ClientDisconnectedError,
    error_response,
    http_status,
)
from services.gateway.intake import Place
from services.gateway.metrics import GatewayMetrics

STATUS_CLIENT_GONE = 499
_SCOPE_KEY = "expertfleet.request"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class RequestInfo:
    """What is known of the request in hand. `started_at` is a reading of `time.perf_counter`.

    `status` is what is counted: an error in mid-stream counts as that error, not as the 200 that
    was sent before. `place` is where it waits until its first token. `served` is what came of its
    generation, once that is over.
    """

    request_id: str
    span: trace.Span
    started_at: float = field(default_factory=time.perf_counter)
    status: int = 0
    place: Place | None = None
    served: Served | None = None

    def stop_waiting(self) -> None:
        """Its first token has come."""
        if self.place is not None:
            self.place.leave()

    def fail(self, error: Exception) -> None:
        """Count and log an error that the client is told of."""
        self.status = http_status(error)
        if self.status < 500:
            return
        self.span.set_status(trace.StatusCode.ERROR, str(error))
        cause = None if self.status in (503, 504) else error
        _logger.error("request %s failed: %r", self.request_id, error, exc_info=cause)


def request_info(scope: Scope) -> RequestInfo:
    info = scope[_SCOPE_KEY]
    assert isinstance(info, RequestInfo)
    return info


class RequestBoundary:
    """ASGI middleware around the whole application.

    Takes `x-request-id` from the caller where it is sane, else makes one; sends it back. A POST
    gets a span that honours `traceparent`. Whatever is raised inside becomes one error answer, or,
    if the answer had begun, ends the connection.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: GatewayMetrics, tracer: trace.Tracer, activity: Activity
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer
        self._activity = activity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given_id = headers.get("x-request-id", "")
        request_id = given_id if _REQUEST_ID.fullmatch(given_id) else f"req-{uuid.uuid4().hex}"
        span = self._start_span(scope, headers, request_id)
        info = RequestInfo(request_id=request_id, span=span)
        scope[_SCOPE_KEY] = info
        try:
            with trace.use_span(span, end_on_exit=False, record_exception=False):
                await self._run(scope, receive, send, info)
        finally:
            if info.place is not None:
                info.place.end()
            route = str(getattr(scope.get("route"), "path", "unknown"))
            status = info.status or STATUS_CLIENT_GONE
            duration_s = time.perf_counter() - info.started_at
            self._metrics.observe_request(route, status, duration_s, span)
            if info.served is not None:
                self._activity.request_ended(
                    info.served,
                    request_id=request_id,
                    trace_id=(trace_exemplar(span) or {}).get("trace_id"),
                    status=status,
                    took_s=duration_s,
                )
            span.set_attribute("http.route", route)
            span.set_attribute("http.response.status_code", status)
            span.end()

    def _start_span(self, scope: Scope, headers: Headers, request_id: str) -> trace.Span:
        if scope["method"] != "POST":
            return trace.INVALID_SPAN
        return self._tracer.start_span(
            telemetry.SPAN_REQUEST,
            context=extract_context(headers),
            kind=trace.SpanKind.SERVER,
            attributes={telemetry.ATTR_REQUEST_ID: request_id, "http.request.method": "POST"},
        )

    async def _run(self, scope: Scope, receive: Receive, send: Send, info: RequestInfo) -> None:
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                info.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = info.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnectedError:
            info.status = STATUS_CLIENT_GONE
        except asyncio.CancelledError:
            info.status = STATUS_CLIENT_GONE
            raise
        except Exception as error:
            info.fail(error)
            if is_started:
                raise
            await error_response(error, info.request_id)(scope, receive, send_with_id)
