from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry

from router_service.engine.engine import Engine
from router_service.engine.engine_stats import EngineMetrics
from router_service.session_tier.session_tier import SessionTier
from services.core import telemetry
from services.core.tracing import span_carrier
from tests.support.fake_decoder import (
    FakeDecoder,
    collect,
    fake_engine,
    fake_layout,
    fake_request,
)
from tests.support.flaky_store import FlakyStore


class _Traced:
    """An engine whose spans are kept. Requests get a root span as their parent."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=ParentBased(ALWAYS_ON))
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("test")
        self.decoder = FakeDecoder(4, num_yields=1)
        self.engine: Engine = fake_engine(tracer=self.tracer, decoder=self.decoder, **options)
        self.root = self.tracer.start_span("root")

    async def __aenter__(self) -> _Traced:
        self.engine.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.engine.stop(timeout_s=1)

    async def complete(self, prompt: list[int], max_tokens: int, **options: Any) -> None:
        request = fake_request(prompt, max_tokens, trace_context=span_carrier(self.root), **options)
        await collect(self.engine.generate(request))

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    @property
    def traced_steps(self) -> list[int]:
        return [context.step for context, _ in self.decoder.batches if context.trace is not None]


def _parent_id(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


async def test_a_request_s_span_hangs_under_its_caller_s_and_has_its_phases_in_order() -> None:
    async with _Traced() as traced:
        await traced.complete(list(range(9)), 5, request_id="r1")
    (generate,) = traced.spans(telemetry.SPAN_GENERATE)
    assert _parent_id(generate) == traced.root.get_span_context().span_id
    attributes = dict(generate.attributes or {})
    assert attributes[telemetry.ATTR_REQUEST_ID] == "r1"
    assert attributes[telemetry.GEN_AI_USAGE_INPUT_TOKENS] == 9
    assert attributes[telemetry.GEN_AI_USAGE_OUTPUT_TOKENS] == 5
    assert attributes[telemetry.GEN_AI_RESPONSE_FINISH_REASONS] == ("length",)
    phases = [
        traced.spans(name)[0]
        for name in (telemetry.SPAN_QUEUE, telemetry.SPAN_PREFILL, telemetry.SPAN_DECODE)
    ]
    assert {_parent_id(phase) for phase in phases} == {generate.context.span_id}
    times = [generate.start_time]
    for phase in phases:
        times += [phase.start_time, phase.end_time]
    times.append(generate.end_time)
    assert times[1::2] == times[::2], "each phase begins when the one before it ended"
    assert all(time is not None for time in times)


async def test_a_traced_request_has_a_sampled_prefill_and_a_sampled_decode_step() -> None:
    async with _Traced(max_num_batched_tokens=4) as traced:
        await traced.complete(list(range(10)), 20)
    steps = traced.spans(telemetry.SPAN_STEP)
    (generate,) = traced.spans(telemetry.SPAN_GENERATE)
    assert [_parent_id(step) for step in steps] == [generate.context.span_id] * 2
    attributes = [dict(step.attributes or {}) for step in steps]
    assert [item[telemetry.ATTR_STEP] for item in attributes] == [0, 3] == traced.traced_steps
    assert [item[telemetry.ATTR_NUM_PREFILL_TOKENS] for item in attributes] == [4, 0]
    assert [item[telemetry.ATTR_NUM_DECODE_TOKENS] for item in attributes] == [0, 1]


async def test_the_layers_of_a_sampled_step_are_given_its_span() -> None:
    async with _Traced() as traced:
        await traced.complete([1], 1)
    (step,) = traced.spans(telemetry.SPAN_STEP)
    context = traced.decoder.batches[0][0]
    assert context.trace is not None
    assert context.trace.span.get_span_context().span_id == step.context.span_id


async def test_every_so_many_steps_one_is_sampled() -> None:
    async with _Traced(step_sample_interval=8) as traced:
        await traced.complete([1], 33)
    assert traced.traced_steps == [0, 1, 8, 16, 24, 32]


async def test_a_sampled_step_links_to_the_other_requests_in_it() -> None:
    async with _Traced(step_sample_interval=1) as traced:
        await asyncio.gather(*(traced.complete([i] * 3, 12) for i in range(3)))
    shared = [step for step in traced.spans(telemetry.SPAN_STEP) if len(step.links) == 2]
    assert shared
    requests = {span.context.span_id for span in traced.spans(telemetry.SPAN_GENERATE)}
    for step in shared:
        linked = {link.context.span_id for link in step.links}
        assert linked | {_parent_id(step)} == requests


async def test_a_request_that_is_not_sampled_makes_no_span_and_no_sampled_step() -> None:
    unsampled = TracerProvider(sampler=ALWAYS_OFF).get_tracer("test").start_span("root")
    async with _Traced(step_sample_interval=1) as traced:
        traced.root = unsampled
        await traced.complete([1], 5)
    assert traced.exporter.get_finished_spans() == ()
    assert traced.traced_steps == []


async def test_without_a_tracer_nothing_is_sampled() -> None:
    decoder = FakeDecoder(4)
    engine = fake_engine(decoder=decoder, step_sample_interval=1)
    engine.start()
    await collect(engine.generate(fake_request([1], 5)))
    await engine.stop(1)
    assert not any(context.trace for context, _ in decoder.batches)


async def test_a_failed_and_an_aborted_request_end_their_spans() -> None:
    def before(batch: Any, context: Any) -> None:
        if 66 in batch.token_ids:
            raise ZeroDivisionError

    async with _Traced() as traced:
        traced.decoder.before = before
        await asyncio.gather(traced.complete([66], 5), return_exceptions=True)
        deltas = traced.engine.generate(
            fake_request([1], 200, trace_context=span_carrier(traced.root))
        )
        await anext(deltas)
        await deltas.aclose()
    failed, aborted = traced.spans(telemetry.SPAN_GENERATE)
    assert failed.status.status_code is StatusCode.ERROR
    assert "ZeroDivisionError" in (failed.status.description or "")
    assert aborted.status.status_code is StatusCode.UNSET
    assert (aborted.attributes or {})[telemetry.GEN_AI_RESPONSE_FINISH_REASONS] == ("aborted",)


async def test_a_restore_is_a_phase_of_the_request() -> None:
    store = FlakyStore(fake_layout(4))
    for _ in range(2):
        tier = SessionTier(store, layout=fake_layout(4), queue_bytes=1 << 20, default_ttl_s=60.0)
        async with _Traced(session_tier=tier) as traced:
            await traced.complete(list(range(30)), 2, session_id="s")
    (restore,) = traced.spans(telemetry.SPAN_RESTORE)
    assert (restore.attributes or {})[telemetry.ATTR_NUM_RESTORED_TOKENS] == 28
    (generate,) = traced.spans(telemetry.SPAN_GENERATE)
    assert (generate.attributes or {})[telemetry.GEN_AI_CONVERSATION_ID] == "s"


async def test_metrics_are_read_from_the_engine_at_scrape() -> None:
    registry = CollectorRegistry()
    engine = fake_engine(metrics=EngineMetrics(registry))
    engine.start()
    for _ in range(2):
        await collect(engine.generate(fake_request(list(range(18)), 5)))
    values = {
        name: registry.get_sample_value(name)
        for name in (
            telemetry.METRIC_PROMPT_TOKENS,
            telemetry.METRIC_PREFILLED_TOKENS,
            telemetry.METRIC_CACHED_TOKENS,
            telemetry.METRIC_GENERATED_TOKENS,
            telemetry.METRIC_RESTORED_TOKENS,
            telemetry.METRIC_PREEMPTIONS,
            telemetry.METRIC_RUNNING,
            telemetry.METRIC_KV_USED,
            telemetry.METRIC_KV_TOTAL,
            telemetry.METRIC_STEP + "_count",
        )
    }
    await engine.stop(1)
    assert list(values.values()) == [36, 20, 16, 10, 0, 0, 0, 0, 64, 10]


async def test_how_steps_were_split_and_where_their_time_went_is_told() -> None:
    registry = CollectorRegistry()
    async with _Traced(
        step_sample_interval=1, num_micro_batches=2, metrics=EngineMetrics(registry)
    ) as traced:
        await asyncio.gather(*(traced.complete([i] * 3, 12) for i in range(4)))
        stats = traced.engine.stats()
        seconds = {
            part: registry.get_sample_value(telemetry.METRIC_STEP_PARTS, {"part": part})
            for part in stats.timings.parts()
        }
        last = registry.get_sample_value(telemetry.METRIC_MICRO_BATCHES)
    counts = [
        (step.attributes or {})[telemetry.ATTR_NUM_MICRO_BATCHES]
        for step in traced.spans(telemetry.SPAN_STEP)
    ]
    assert 2 in counts
    assert last == stats.num_micro_batches == counts[-1]
    assert seconds == pytest.approx(stats.timings.parts())
    assert sum(value or 0.0 for value in seconds.values()) > 0


async def test_what_became_of_session_blocks_is_counted() -> None:
    registry = CollectorRegistry()
    store = FlakyStore(fake_layout(4))
    tier = SessionTier(store, layout=fake_layout(4), queue_bytes=1 << 20, default_ttl_s=60.0)
    engine = fake_engine(metrics=EngineMetrics(registry), session_tier=tier)
    engine.start()
    await collect(engine.generate(fake_request(list(range(30)), 3, session_id="s")))
    await tier.flush(5)
    stored = registry.get_sample_value(telemetry.METRIC_SESSION_BLOCKS, {"outcome": "stored"})
    await engine.stop(1)
    assert stored == 8


async def test_phases_and_sampled_steps_are_measured_and_lead_to_the_trace() -> None:
    registry = CollectorRegistry()
    async with _Traced(metrics=EngineMetrics(registry)) as traced:
        await traced.complete([1, 2, 3], 5)
        await traced.complete([4, 5], 1)
    trace_id = f"{traced.root.get_span_context().trace_id:032x}"
    samples = [sample for family in registry.collect() for sample in family.samples]
    counts = {
        sample.labels["phase"]: sample.value
        for sample in samples
        if sample.name == f"{telemetry.METRIC_REQUEST_PHASE}_count"
    }
    assert counts == {"queue": 2, "prefill": 2, "decode": 2}
    for metric in (telemetry.METRIC_REQUEST_PHASE, telemetry.METRIC_STEP):
        exemplars = [each.exemplar for each in samples if each.name == f"{metric}_bucket"]
        labels = [exemplar.labels for exemplar in exemplars if exemplar is not None]
        assert labels
        assert all(label == {"trace_id": trace_id} for label in labels)


async def test_phases_of_requests_that_nobody_samples_are_measured_without_a_trace() -> None:
    registry = CollectorRegistry()
    engine = fake_engine(metrics=EngineMetrics(registry))
    engine.start()
    await collect(engine.generate(fake_request([1, 2], 2)))
    await engine.stop(timeout_s=1)
    samples = [sample for family in registry.collect() for sample in family.samples]
    phase = {"phase": "prefill"}
    assert registry.get_sample_value(f"{telemetry.METRIC_REQUEST_PHASE}_count", phase) == 1
    assert all(sample.exemplar is None for sample in samples)
