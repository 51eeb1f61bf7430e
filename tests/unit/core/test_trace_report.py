from __future__ import annotations

import random
from dataclasses import replace

import pytest

from services.core import telemetry
from services.core.span_file import AttributeValue, SpanRecord
from services.core.trace_report import (
    find_trace,
    load_by_expert,
    slowest_requests,
    summarise_requests,
    time_by_phase,
    trace_tree,
)
from tests.support.spans import span_record


def request_spans(
    *, start_ms: float, ms: float, request_id: str, parent: SpanRecord | None = None
) -> list[SpanRecord]:
    request = span_record(
        telemetry.SPAN_REQUEST,
        parent=parent,
        start_ms=start_ms,
        ms=ms,
        service="expertfleet-gateway",
        attributes={
            telemetry.ATTR_REQUEST_ID: request_id,
            telemetry.GEN_AI_USAGE_INPUT_TOKENS: 7,
            telemetry.GEN_AI_USAGE_OUTPUT_TOKENS: 5,
        },
    )
    generate = span_record(
        telemetry.SPAN_GENERATE,
        parent=request,
        start_ms=start_ms + 1,
        ms=ms - 2,
        attributes={
            telemetry.GEN_AI_USAGE_OUTPUT_TOKENS: 5,
            telemetry.ATTR_NUM_CACHED_TOKENS: 4,
        },
    )
    phases = [
        span_record(name, parent=generate, start_ms=start_ms + 1 + at, ms=length)
        for name, at, length in [
            (telemetry.SPAN_QUEUE, 0, 2),
            (telemetry.SPAN_PREFILL, 2, 3),
            (telemetry.SPAN_DECODE, 5, ms - 7),
        ]
    ]
    return [request, generate, *phases]


def test_a_request_is_summed_up_from_its_spans_in_any_order() -> None:
    spans = request_spans(start_ms=0, ms=50, request_id="r1")
    random.shuffle(spans)
    (summary,) = summarise_requests(spans)
    assert (summary.request_id, summary.service) == ("r1", "expertfleet-gateway")
    assert summary.duration_ms == pytest.approx(50)
    assert summary.phase_ms == pytest.approx({"queue": 2, "restore": 0, "prefill": 3, "decode": 43})
    assert (summary.num_input_tokens, summary.num_output_tokens) == (7, 5)
    assert summary.num_cached_tokens == 4
    assert summary.error == ""


def test_a_clients_trace_can_hold_several_requests() -> None:
    client = span_record("client", start_ms=-5, ms=500, service="app")
    spans = [client]
    for number in range(3):
        spans += request_spans(
            start_ms=100 * number, ms=20 + number, request_id=f"r{number}", parent=client
        )
    summaries = summarise_requests(spans)
    assert [summary.request_id for summary in summaries] == ["r0", "r1", "r2"]
    assert [summary.phase_ms["decode"] for summary in summaries] == pytest.approx([13, 14, 15])


def test_without_a_gateways_span_the_shards_span_is_the_request() -> None:
    spans = request_spans(start_ms=0, ms=50, request_id="r1")[1:]
    (summary,) = summarise_requests(spans)
    assert summary.service == "expertfleet-shard"
    assert summary.duration_ms == pytest.approx(48)


def test_the_shards_error_is_the_requests_but_a_dispatch_that_was_sent_again_is_not() -> None:
    spans = request_spans(start_ms=0, ms=50, request_id="r1")
    spans.append(span_record(telemetry.SPAN_DISPATCH, parent=spans[1], error="stream broke"))
    assert summarise_requests(spans)[0].error == ""
    spans[1] = replace(spans[1], error="expert (3, 1) has no replica")
    assert summarise_requests(spans)[0].error == "expert (3, 1) has no replica"


def test_the_slowest_requests_come_first() -> None:
    spans = []
    for number, ms in enumerate([30, 90, 10, 60]):
        spans += request_spans(start_ms=number, ms=ms, request_id=str(ms))
    assert [summary.request_id for summary in slowest_requests(spans, 3)] == ["90", "60", "30"]
    assert slowest_requests([], 3) == []


def test_phases_have_their_times_in_the_order_of_a_request() -> None:
    spans = [span_record(telemetry.SPAN_DECODE, ms=ms) for ms in range(1, 101)]
    spans += [span_record(telemetry.SPAN_QUEUE, ms=7), span_record("other", ms=1000)]
    queue, decode = time_by_phase(spans)
    assert (queue.phase, queue.count, queue.p50_ms, queue.p95_ms) == ("queue", 1, 7, 7)
    assert (decode.phase, decode.count) == ("decode", 100)
    assert (decode.total_ms, decode.mean_ms) == (5050, 50.5)
    assert (decode.p50_ms, decode.p95_ms, decode.max_ms) == (50, 95, 100)


def told(layer: int, tokens: dict[int, int]) -> dict[str, AttributeValue]:
    return {
        telemetry.ATTR_LAYER: layer,
        telemetry.ATTR_EXPERT_IDS: tuple(tokens),
        telemetry.ATTR_TOKENS_PER_EXPERT: tuple(tokens.values()),
    }


def test_tokens_that_shard_and_worker_both_tell_are_counted_once() -> None:
    step = span_record(telemetry.SPAN_STEP)
    spans = [step]
    for layer in range(2):
        in_layer = span_record(telemetry.SPAN_LAYER, parent=step)
        one = span_record(
            telemetry.SPAN_DISPATCH, parent=in_layer, attributes=told(layer, {0: 3, 1: 1})
        )
        other = span_record(
            telemetry.SPAN_DISPATCH, parent=in_layer, attributes=told(layer, {5: 4})
        )
        computed = span_record(
            telemetry.SPAN_EXPERT, parent=one, attributes=told(layer, {0: 3, 1: 1})
        )
        spans += [in_layer, one, other, computed]
    load = load_by_expert(reversed(spans))
    assert load.tokens == {(0, 0): 3, (0, 1): 1, (0, 5): 4, (1, 0): 3, (1, 1): 1, (1, 5): 4}
    assert load.by_expert() == {0: 6, 1: 2, 5: 8}
    assert load.num_steps == 1


def test_the_workers_own_spans_count_where_nobody_else_tells() -> None:
    lone = span_record(telemetry.SPAN_EXPERT, attributes=told(3, {2: 9}))
    assert load_by_expert([lone]).tokens == {(3, 2): 9}


def test_spans_with_half_of_the_figures_are_passed_over() -> None:
    spans = [
        span_record("x", attributes={telemetry.ATTR_EXPERT_IDS: (1,), telemetry.ATTR_LAYER: 1}),
        span_record("x", attributes={**told(1, {1: 1, 2: 2}), telemetry.ATTR_EXPERT_IDS: (1,)}),
        span_record("x", attributes={telemetry.ATTR_LAYER: 1}),
    ]
    assert load_by_expert(spans).tokens == {}


def test_a_trace_is_found_by_the_start_of_its_id_or_by_its_request() -> None:
    spans = request_spans(start_ms=0, ms=50, request_id="req-77")
    trace_id = spans[0].trace_id
    assert find_trace(spans, trace_id) == trace_id
    assert find_trace(spans, trace_id.upper()[:31]) == trace_id
    assert find_trace(spans, "req-77") == trace_id
    assert find_trace(spans, "req-7") is None


def test_a_tree_has_children_below_parents_and_siblings_by_start() -> None:
    spans = request_spans(start_ms=10, ms=50, request_id="r1")
    elsewhere = request_spans(start_ms=0, ms=50, request_id="r2")
    orphan = span_record("orphan", start_ms=30, trace_id=spans[0].trace_id, parent=elsewhere[0])
    rows = trace_tree([orphan, *reversed(spans), *elsewhere], spans[0].trace_id)
    assert [(row.depth, row.span.name) for row in rows] == [
        (0, telemetry.SPAN_REQUEST),
        (1, telemetry.SPAN_GENERATE),
        (2, telemetry.SPAN_QUEUE),
        (2, telemetry.SPAN_PREFILL),
        (2, telemetry.SPAN_DECODE),
        (0, "orphan"),
    ]
    assert [row.offset_ms for row in rows] == pytest.approx([0, 1, 1, 3, 6, 20])
    assert trace_tree(spans, "unknown") == []


def test_spans_that_are_each_others_parents_do_not_hang_the_report() -> None:
    one = span_record("a")
    two = span_record("b", parent=one)
    looped = SpanRecord(
        trace_id=one.trace_id,
        span_id=one.span_id,
        parent_id=two.span_id,
        name="a",
        service="s",
        instance="i",
        start_ns=0,
        end_ns=1,
    )
    assert trace_tree([looped, two], one.trace_id) == []
    assert load_by_expert([looped, two]).tokens == {}
