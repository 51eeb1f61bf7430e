"""A collector gets the whole trace of a request: gateway, shard and the workers' own processes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from router_service.shard import AttentionShard
from services.core import telemetry
from services.core.kernels.library import native_library
from services.core.model_config import load_model_config
from services.core.settings import Settings, load_settings
from services.core.span_file import SpanRecord
from services.core.tracing import configure_tracing
from services.gateway.app import create_app
from tests.support.otlp_collector import OtlpCollector, running_collector
from tests.support.product import DEMO_MODEL
from tests.support.worker_process import WorkerProcess, running_worker

NUM_LAYERS = load_model_config(DEMO_MODEL).num_hidden_layers
TIMEOUT_S = 60.0
TRACE_IDS = {
    "grpc": "4bf92f3577b34da6a3ce929d0e0e4736",
    "lane": "0af7651916cd43dd8448eb211c80319c",
}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def collector() -> Iterator[OtlpCollector]:
    with running_collector() as running:
        yield running


@pytest.fixture(scope="module")
def workers(collector: OtlpCollector) -> Iterator[list[WorkerProcess]]:
    """Two processes that hold half of the experts each, and tell the collector."""
    environment = {"EXPERTFLEET_OTLP_ENDPOINT": collector.endpoint}
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                running_worker(
                    DEMO_MODEL,
                    experts,
                    *("--worker-id", f"expert-{experts[0]}"),
                    environment=environment,
                    wait_ready=False,
                )
            )
            for experts in ("0-3", "4-7")
        ]
        for worker in started:
            worker.wait_ready(TIMEOUT_S)
        yield started


@pytest.mark.parametrize("transport", ["grpc", "lane"])
async def test_the_workers_spans_hang_under_the_dispatch_that_sent_them_their_frame(
    transport: str, collector: OtlpCollector, workers: list[WorkerProcess]
) -> None:
    if transport == "lane" and native_library() is None:
        pytest.skip("lanes need the native library")
    settings = load_settings(
        model=str(DEMO_MODEL),
        workers=",".join(worker.endpoint for worker in workers),
        dispatch_transport=transport,
        otlp_endpoint=collector.endpoint,
        num_micro_batches=2,
    )
    trace_id = TRACE_IDS[transport]
    await asyncio.to_thread(_complete, settings, trace_id)
    spans = await asyncio.to_thread(
        collector.wait_for, lambda spans: _is_whole(spans, trace_id), timeout_s=TIMEOUT_S
    )
    trace = {span.span_id: span for span in spans if span.trace_id == trace_id}
    below: dict[str, int] = {}
    for span in trace.values():
        if span.name == telemetry.SPAN_EXPERT:
            lineage = _lineage(span, trace)
            assert [ancestor.name for ancestor in lineage] == [
                telemetry.SPAN_DISPATCH,
                telemetry.SPAN_LAYER,
                telemetry.SPAN_STEP,
                telemetry.SPAN_GENERATE,
                telemetry.SPAN_REQUEST,
            ]
            dispatch = lineage[0]
            assert span.service == telemetry.SERVICE_WORKER
            for attribute in (
                telemetry.ATTR_LAYER,
                telemetry.ATTR_WORKER_ID,
                telemetry.ATTR_EXPERT_IDS,
                telemetry.ATTR_TOKENS_PER_EXPERT,
            ):
                assert span.attributes[attribute] == dispatch.attributes[attribute]
            assert (
                lineage[1].attributes[telemetry.ATTR_LAYER] == span.attributes[telemetry.ATTR_LAYER]
            )
            below[dispatch.span_id] = below.get(dispatch.span_id, 0) + 1
    dispatches = {key for key, span in trace.items() if span.name == telemetry.SPAN_DISPATCH}
    assert below == dict.fromkeys(dispatches, 1), "each frame was computed once"
    assert {span.service for span in trace.values()} == {
        telemetry.SERVICE_GATEWAY,
        telemetry.SERVICE_SHARD,
        telemetry.SERVICE_WORKER,
    }
    computed_by = {s.instance for s in trace.values() if s.service == telemetry.SERVICE_WORKER}
    assert computed_by == {"expert-0", "expert-4"}
    (request,) = [span for span in trace.values() if span.name == telemetry.SPAN_REQUEST]
    assert request.parent_id == "00f067aa0ba902b7", "the caller's span"
    phases = {span.name for span in trace.values() if _parent(span, trace) is not None}
    assert {telemetry.SPAN_QUEUE, telemetry.SPAN_PREFILL, telemetry.SPAN_DECODE} <= phases


def _complete(settings: Settings, trace_id: str) -> None:
    """One completion through a gateway and a shard of this process, which end with it."""
    shard = AttentionShard.start(settings, in_process_experts=False)
    tracing = configure_tracing(settings, telemetry.SERVICE_GATEWAY, instance_id="gateway")
    try:
        app = create_app(settings, shard, None, model_folder=DEMO_MODEL, tracer=tracing.tracer)

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                return await client.post(
                    "/v1/completions",
                    json={
                        "prompt": f"def traced_{trace_id}(request):\n    return request\n" * 3,
                        "max_tokens": 6,
                        "temperature": 0,
                        "ignore_eos": True,
                    },
                    headers={"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"},
                    timeout=TIMEOUT_S,
                )

        asyncio.run(ask()).raise_for_status()
    finally:
        tracing.shutdown()
        shard.stop_now()


def _is_whole(spans: list[SpanRecord], trace_id: str) -> bool:
    """A sampled prefill and a sampled decode step with all their layers, and an answer of a
    worker to each frame, under the request's own span."""
    by_name: dict[str, list[SpanRecord]] = {}
    for span in spans:
        if span.trace_id == trace_id:
            by_name.setdefault(span.name, []).append(span)
    steps = by_name.get(telemetry.SPAN_STEP, [])
    layers = by_name.get(telemetry.SPAN_LAYER, [])
    frames = {span.span_id for span in by_name.get(telemetry.SPAN_DISPATCH, [])}
    answered = {span.parent_id for span in by_name.get(telemetry.SPAN_EXPERT, [])}
    return (
        {telemetry.SPAN_REQUEST, telemetry.SPAN_GENERATE, telemetry.SPAN_DECODE} <= by_name.keys()
        and len(steps) >= 2
        and len(layers) >= NUM_LAYERS * len(steps)
        and frames == answered != set()
    )


def _parent(span: SpanRecord, trace: dict[str, SpanRecord]) -> SpanRecord | None:
    return trace.get(span.parent_id or "")


def _lineage(span: SpanRecord, trace: dict[str, SpanRecord]) -> list[SpanRecord]:
    """Its ancestors, the nearest first."""
    parent = _parent(span, trace)
    return [] if parent is None else [parent, *_lineage(parent, trace)]
