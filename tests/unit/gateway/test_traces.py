from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.core import telemetry
from services.core.settings import load_settings
from services.core.span_file import SpanEvent, SpanRecord
from services.core.trace_files import FoundTrace
from services.core.tracing import configure_tracing
from services.gateway.trace_view import trace_json
from tests.support.fake_shard import FakeShard, repeats
from tests.support.spans import span_record
from tests.unit.gateway.http import client_of, error_of


def found(*spans: SpanRecord, linked: tuple[tuple[SpanRecord, ...], ...] = ()) -> FoundTrace:
    return FoundTrace(
        trace_id=spans[0].trace_id, spans=spans, linked_steps=linked, is_truncated=False
    )


def test_steps_are_taken_out_of_the_waterfall_and_nested() -> None:
    request = span_record(
        telemetry.SPAN_REQUEST,
        ms=90,
        service="expertfleet-gateway",
        attributes={telemetry.ATTR_REQUEST_ID: "req-1", telemetry.GEN_AI_CONVERSATION_ID: "secret"},
    )
    generate = span_record(telemetry.SPAN_GENERATE, parent=request, start_ms=1, ms=80)
    step = span_record(telemetry.SPAN_STEP, parent=generate, start_ms=5, ms=3)
    layer = span_record(telemetry.SPAN_LAYER, parent=step, start_ms=5.5)
    dispatch = span_record(telemetry.SPAN_DISPATCH, parent=layer, start_ms=5.75, error="gone")
    foreign = span_record(telemetry.SPAN_STEP, start_ms=4, ms=2)
    told = trace_json(
        found(request, generate, step, layer, dispatch, linked=((foreign,),)),
    )
    assert (told["request_id"], told["duration_ms"]) == ("req-1", 90)
    assert [span["name"] for span in told["spans"]] == [
        telemetry.SPAN_REQUEST,
        telemetry.SPAN_GENERATE,
    ]
    assert told["spans"][0]["attributes"] == {telemetry.ATTR_REQUEST_ID: "req-1"}
    assert told["spans"][0]["parent_id"] is None
    first, second = told["steps"]
    assert (first["is_linked"], first["trace_id"], first["children"]) == (
        True,
        foreign.trace_id,
        [],
    )
    assert (first["start_ms"], first["duration_ms"]) == (4, 2)
    assert second["is_linked"] is False
    ((layer_told,), (dispatch_told,)) = second["children"], second["children"][0]["children"]
    assert (layer_told["start_ms"], layer_told["error"]) == (5.5, None)
    assert (dispatch_told["error"], dispatch_told["parent_id"]) == ("gone", layer.span_id)


def test_a_trace_is_partial_until_what_the_shard_did_is_there() -> None:
    served = {"http.response.status_code": 200}
    request = span_record(telemetry.SPAN_REQUEST, attributes=served)
    generate = span_record(telemetry.SPAN_GENERATE, parent=request)
    prefill = span_record(telemetry.SPAN_PREFILL, parent=generate)
    assert trace_json(found(request))["is_partial"]
    assert trace_json(found(request, prefill))["is_partial"]
    assert not trace_json(found(request, generate, prefill))["is_partial"]
    refused = span_record(telemetry.SPAN_REQUEST, attributes={"http.response.status_code": 400})
    assert not trace_json(found(refused))["is_partial"]


def test_a_gateways_span_under_its_callers_is_no_part_of_a_partial_trace() -> None:
    caller = span_record("client")
    request = span_record(telemetry.SPAN_REQUEST, parent=caller)
    generate = span_record(telemetry.SPAN_GENERATE, parent=request)
    assert not trace_json(found(request, generate))["is_partial"]


def test_events_and_links_are_told() -> None:
    span = SpanRecord(
        trace_id="1" * 32,
        span_id="2" * 16,
        parent_id=None,
        name="any",
        service="s",
        instance="i",
        start_ns=5_000_000_000,
        end_ns=6_000_000_000,
        links=(("3" * 32, "4" * 16),),
        events=(SpanEvent(name="lost", at_ns=5_250_000_000, attributes={"reason": "died"}),),
    )
    told = trace_json(found(span))
    assert (told["started_at"], told["request_id"]) == (5.0, None)
    assert told["spans"][0]["links"] == [{"trace_id": "3" * 32, "span_id": "4" * 16}]
    assert told["spans"][0]["events"] == [
        {"name": "lost", "at_ms": 250.0, "attributes": {"reason": "died"}}
    ]


@pytest.mark.parametrize("url", ["/v1/traces", "/v1/traces/req-1"])
@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({}, "EXPERTFLEET_STATE_DIR"),
        ({"state_dir": Path("s"), "otlp_endpoint": "http://collector:4317"}, "collector:4317"),
    ],
)
async def test_without_span_files_it_is_said_where_spans_are(
    model_folder: Path, url: str, settings: dict[str, Any], what: str
) -> None:
    async with client_of(FakeShard(repeats([])), model_folder, **settings) as client:
        response = await client.get(url)
    assert response.status_code == 404
    assert what in error_of(response)["message"]


async def test_requests_are_listed_and_found_newest_first(
    model_folder: Path, tmp_path: Path
) -> None:
    tracing = configure_tracing(
        load_settings(state_dir=tmp_path), telemetry.SERVICE_GATEWAY, instance_id="0"
    )
    shard = FakeShard(repeats([7]))
    async with client_of(shard, model_folder, tracer=tracing.tracer, state_dir=tmp_path) as client:
        assert (await client.get("/v1/traces")).json() == {"traces": []}
        for name in ("one", "two", "three"):
            headers = {"x-request-id": name}
            response = await client.post("/v1/completions", json={"prompt": [5]}, headers=headers)
        tracing.flush()
        listed = (await client.get("/v1/traces", params={"limit": 2})).json()["traces"]
        assert [line["request_id"] for line in listed] == ["three", "two"]
        assert listed[0]["response_id"] == response.json()["id"]
        by_answer = await client.get(f"/v1/traces/{response.json()['id']}")
        assert by_answer.json()["trace_id"] == listed[0]["trace_id"]
        absent = await client.get("/v1/traces/four")
        assert absent.status_code == 404
        assert "'four'" in error_of(absent)["message"]
    tracing.shutdown()


@pytest.mark.parametrize("limit", ["0", "101", "x", "-1", "", "²"])
async def test_a_limit_that_is_none_is_refused(
    model_folder: Path, tmp_path: Path, limit: str
) -> None:
    async with client_of(FakeShard(repeats([])), model_folder, state_dir=tmp_path) as client:
        response = await client.get("/v1/traces", params={"limit": limit})
    assert response.status_code == 400
    assert error_of(response)["param"] == "limit"


async def test_traces_need_a_key_where_the_api_does(model_folder: Path, tmp_path: Path) -> None:
    shard = FakeShard(repeats([]))
    async with client_of(shard, model_folder, state_dir=tmp_path, api_keys="k") as client:
        for url in ("/v1/traces", "/v1/traces/x"):
            assert (await client.get(url)).status_code == 401
