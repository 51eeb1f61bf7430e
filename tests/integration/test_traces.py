"""Traces over HTTP, read from the span files that gateway, engine and workers wrote themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from services.core import telemetry
from services.core.placement import plan_placement
from services.core.settings import load_settings
from services.core.tracing import configure_tracing
from services.gateway.app import create_app
from tests.support.checkpoints import make_checkpoint
from tests.support.engine_shard import EngineShard
from tests.support.eventually import eventually
from tests.support.fleet import running_engine, running_workers

NUM_LAYERS, NUM_WORKERS = 2, 2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are slower on several threads, more so beside busy workers."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


async def test_a_request_is_told_with_its_phases_and_the_steps_it_took_part_in(
    tmp_path: Path,
) -> None:
    settings = load_settings(model="org/tiny", state_dir=tmp_path / "state")
    folder = make_checkpoint(tmp_path / "model", num_hidden_layers=NUM_LAYERS)
    gateway, shard, workers = (
        configure_tracing(settings, service, instance_id="0")
        for service in (
            telemetry.SERVICE_GATEWAY,
            telemetry.SERVICE_SHARD,
            telemetry.SERVICE_WORKER,
        )
    )
    async with (
        running_workers(
            folder, plan_placement(NUM_LAYERS, 4, NUM_WORKERS), tracer=workers.tracer
        ) as endpoints,
        running_engine(folder, endpoints, tracer=shard.tracer, step_sample_interval=4) as engine,
    ):
        app = create_app(
            settings, EngineShard(engine), None, model_folder=folder, tracer=gateway.tracer
        )
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:

            async def complete(request_id: str, max_tokens: int) -> None:
                response = await client.post(
                    "/v1/completions",
                    json={"prompt": [5, 6, 7], "max_tokens": max_tokens, "ignore_eos": True},
                    headers={"x-request-id": request_id},
                    timeout=120,
                )
                assert response.status_code == 200

            async def whole_trace() -> dict[str, Any]:
                """Once the request's and the workers' spans are there, which are written after the
                answers."""
                told: dict[str, Any] = {}

                async def is_whole() -> bool:
                    for tracing in (gateway, shard, workers):
                        await asyncio.to_thread(tracing.flush)
                    response = await client.get("/v1/traces/short")
                    told.update(response.json())
                    is_told = response.status_code == 200 and not told["is_partial"]
                    return is_told and all(
                        dispatch["children"]
                        for step in told["steps"]
                        for dispatch in _below(step)
                        if dispatch["name"] == telemetry.SPAN_DISPATCH
                    )

                await eventually(is_whole, timeout_s=60)
                return told

            long = asyncio.create_task(complete("long", 350))
            await eventually(lambda: engine.stats().num_running == 1, timeout_s=60)
            await complete("short", 24)
            long.cancel()
            await asyncio.gather(long, return_exceptions=True)
            trace = await whole_trace()
            listed = (await client.get("/v1/traces", params={"limit": 5})).json()["traces"]
            by_id = await client.get(f"/v1/traces/{trace['trace_id']}")
    for tracing in (gateway, shard, workers):
        tracing.shutdown()

    assert by_id.json() == trace
    assert trace["request_id"] == "short"
    assert not trace["is_truncated"]
    names = [span["name"] for span in trace["spans"]]
    assert names[:2] == [telemetry.SPAN_REQUEST, telemetry.SPAN_GENERATE]
    assert sorted(names[2:]) == sorted(
        [telemetry.SPAN_QUEUE, telemetry.SPAN_PREFILL, telemetry.SPAN_DECODE]
    )
    ids = {span["span_id"]: span for span in trace["spans"]}
    for span in trace["spans"]:
        assert 0 <= span["start_ms"] <= span["start_ms"] + span["duration_ms"]
        assert span["start_ms"] + span["duration_ms"] <= trace["duration_ms"] + 0.01
        assert span is trace["spans"][0] or span["parent_id"] in ids

    assert {step["is_linked"] for step in trace["steps"]} == {True, False}
    starts = [step["start_ms"] for step in trace["steps"]]
    assert starts == sorted(starts)
    for step in trace["steps"]:
        _check_step(step, trace)

    assert [line["request_id"] for line in listed] == ["short", "long"]
    assert listed[0]["trace_id"] == trace["trace_id"]
    assert listed[0]["status"] == 200


def _check_step(step: dict[str, Any], trace: dict[str, Any]) -> None:
    """Step -> layer -> dispatch -> worker compute, and of whom it is."""
    own_links = [link for link in step["links"] if link["trace_id"] == trace["trace_id"]]
    if step["is_linked"]:
        assert step["trace_id"] != trace["trace_id"]
        assert own_links
    else:
        assert step["trace_id"] == trace["trace_id"]
        assert step["parent_id"] in {span["span_id"] for span in trace["spans"]}
    layers = step["children"]
    assert [span["attributes"][telemetry.ATTR_LAYER] for span in layers] == list(range(NUM_LAYERS))
    for layer in layers:
        assert layer["name"] == telemetry.SPAN_LAYER
        dispatches = layer["children"]
        assert dispatches
        assert all(span["name"] == telemetry.SPAN_DISPATCH for span in dispatches)
        for dispatch in dispatches:
            (compute,) = dispatch["children"]
            assert compute["name"] == telemetry.SPAN_EXPERT
            assert compute["service"] == telemetry.SERVICE_WORKER
            worker = dispatch["attributes"][telemetry.ATTR_WORKER_ID]
            assert compute["attributes"][telemetry.ATTR_WORKER_ID] == worker


def _below(span: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for child in span["children"]:
        yield child
        yield from _below(child)
