"""One trace of one request, from the gateway's span to the workers' own, over OTLP."""

from __future__ import annotations

from collections import Counter

import openai

from services.core import telemetry
from services.core.model_config import load_model_config
from services.core.span_file import SpanRecord
from tests.support.otlp_collector import OtlpCollector
from tests.support.product import DEMO_MODEL, Product

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_one_trace_reaches_from_the_gateway_to_the_workers(
    product: Product, client: openai.OpenAI, demo: str, collector: OtlpCollector
) -> None:
    client.completions.create(
        model=demo,
        prompt="def traced(request):\n    return request",
        max_tokens=12,
        temperature=0,
        extra_headers={"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"},
        extra_body={"ignore_eos": True},
    )
    spans = collector.wait_for(_is_complete)
    trace = [span for span in spans if span.trace_id == TRACE_ID]
    by_id = {span.span_id: span for span in trace}
    config = load_model_config(DEMO_MODEL)

    computed = [span for span in trace if span.name == telemetry.SPAN_EXPERT]
    for span in computed:
        assert [ancestor.name for ancestor in _ancestors(span, by_id)] == [
            telemetry.SPAN_DISPATCH,
            telemetry.SPAN_LAYER,
            telemetry.SPAN_STEP,
            telemetry.SPAN_GENERATE,
            telemetry.SPAN_REQUEST,
        ]
    assert {span.service for span in trace} == {
        telemetry.SERVICE_GATEWAY,
        telemetry.SERVICE_SHARD,
        telemetry.SERVICE_WORKER,
    }
    assert {span.instance for span in computed} == {f"expert-{index}" for index in range(4)}

    for step in (span for span in trace if span.name == telemetry.SPAN_STEP):
        below = [span for span in computed if step in _ancestors(span, by_id)]
        tokens: Counter[tuple[int, int]] = Counter()
        for span in below:
            layer = int(str(span.attributes[telemetry.ATTR_LAYER]))
            experts = span.attributes[telemetry.ATTR_EXPERT_IDS]
            counts = span.attributes[telemetry.ATTR_TOKENS_PER_EXPERT]
            assert isinstance(experts, tuple)
            assert isinstance(counts, tuple)
            for expert, count in zip(experts, counts, strict=True):
                tokens[layer, int(expert)] += int(count)
        num_tokens = int(str(step.attributes[telemetry.ATTR_NUM_TOKENS]))
        expected = num_tokens * config.num_experts_per_tok * config.num_hidden_layers
        assert sum(tokens.values()) == expected


def test_counts_of_tokens_per_expert_add_up(
    product: Product, client: openai.OpenAI, demo: str
) -> None:
    shard = product.experts()["shards"][0]["metrics_endpoint"]
    config = load_model_config(DEMO_MODEL)

    def tokens_and_computed() -> tuple[float, float]:
        counted = product.metric(shard, telemetry.METRIC_EXPERT_TOKENS)
        return counted, product.metric(shard, telemetry.METRIC_PREFILLED_TOKENS)

    before = tokens_and_computed()
    answer = client.completions.create(
        model=demo,
        prompt="import a_module_nobody_has_cached_before\n" * 3,
        max_tokens=10,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    after = tokens_and_computed()
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10
    # The first token comes out of the prefill; each later one is the output of a step of its own.
    computed = (after[1] - before[1]) + 9
    expected = computed * config.num_experts_per_tok * config.num_hidden_layers
    assert after[0] - before[0] == expected


def _is_complete(spans: list[SpanRecord]) -> bool:
    """The request's own spans, all layers of its steps, and a worker's span below each call."""
    by_name: dict[str, list[SpanRecord]] = {}
    for span in spans:
        if span.trace_id == TRACE_ID:
            by_name.setdefault(span.name, []).append(span)
    steps = by_name.get(telemetry.SPAN_STEP, [])
    layers = by_name.get(telemetry.SPAN_LAYER, [])
    calls = {span.span_id for span in by_name.get(telemetry.SPAN_DISPATCH, [])}
    answered = {span.parent_id for span in by_name.get(telemetry.SPAN_EXPERT, [])}
    num_layers = load_model_config(DEMO_MODEL).num_hidden_layers
    return (
        {telemetry.SPAN_REQUEST, telemetry.SPAN_GENERATE} <= by_name.keys()
        and len(layers) == num_layers * len(steps) > 0
        and calls == answered
    )


def _ancestors(span: SpanRecord, by_id: dict[str, SpanRecord]) -> list[SpanRecord]:
    found = []
    while span.parent_id in by_id:
        span = by_id[span.parent_id]
        found.append(span)
    return found
