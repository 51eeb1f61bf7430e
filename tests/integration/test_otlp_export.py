from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from opentelemetry.context import Context

from services.core import telemetry
from services.core.settings import load_settings
from services.core.trace_report import load_by_expert, trace_tree
from services.core.tracing import configure_tracing, span_carrier
from tests.support.otlp_collector import OtlpCollector, running_collector

ROOT = Path(__file__).parents[2]

WORKER = """
import json, sys
from services.core import telemetry
from services.core.settings import load_settings
from services.core.tracing import configure_tracing, extract_context, record_span
endpoint, carrier = sys.argv[1], json.loads(sys.argv[2])
tracing = configure_tracing(
    load_settings(otlp_endpoint=endpoint), telemetry.SERVICE_WORKER, instance_id="w0"
)
record_span(
    tracing.tracer,
    telemetry.SPAN_EXPERT,
    parent=extract_context(carrier),
    start_ns=1_700_000_000_000_000_000,
    end_ns=1_700_000_000_004_000_000,
    attributes={
        telemetry.ATTR_LAYER: 3,
        telemetry.ATTR_EXPERT_IDS: [0, 5],
        telemetry.ATTR_TOKENS_PER_EXPERT: [7, 1],
        telemetry.ATTR_COMPUTE_MS: 3.5,
    },
)
tracing.shutdown()
"""


def test_spans_of_two_processes_arrive_as_one_trace_with_the_right_parents() -> None:
    with running_collector() as collector:
        shard = configure_tracing(
            load_settings(otlp_endpoint=collector.endpoint),
            telemetry.SERVICE_SHARD,
            instance_id="s0",
        )
        with (
            shard.tracer.start_as_current_span(telemetry.SPAN_STEP, context=Context()),
            shard.tracer.start_as_current_span(telemetry.SPAN_DISPATCH) as dispatch,
        ):
            carrier = json.dumps(span_carrier(dispatch))
            subprocess.run(
                [sys.executable, "-c", WORKER, collector.endpoint, carrier], check=True, cwd=ROOT
            )
        shard.shutdown()
        spans = collector.wait_for_names(
            telemetry.SPAN_STEP, telemetry.SPAN_DISPATCH, telemetry.SPAN_EXPERT
        )
    assert len({span.trace_id for span in spans}) == 1
    rows = trace_tree(spans, spans[0].trace_id)
    # The worker's times are made up and lie before its parent's: only the depth tells.
    assert [(row.depth, row.span.service, row.span.name) for row in rows] == [
        (0, telemetry.SERVICE_SHARD, telemetry.SPAN_STEP),
        (1, telemetry.SERVICE_SHARD, telemetry.SPAN_DISPATCH),
        (2, telemetry.SERVICE_WORKER, telemetry.SPAN_EXPERT),
    ]
    computed = rows[-1].span
    assert computed.instance == "w0"
    assert computed.duration_ms == 4.0
    assert computed.attributes[telemetry.ATTR_EXPERT_IDS] == (0, 5)
    assert computed.attributes[telemetry.ATTR_COMPUTE_MS] == 3.5
    assert load_by_expert(spans).tokens == {(3, 0): 7, (3, 5): 1}
    assert set(collector.resources[telemetry.SERVICE_WORKER]) == {
        "service.name",
        "service.instance.id",
        "service.version",
    }


def test_batches_leave_without_being_asked_for() -> None:
    with running_collector() as collector:
        tracing = configure_tracing(
            load_settings(otlp_endpoint=collector.endpoint), "svc", instance_id="i"
        )
        for _ in range(1000):
            tracing.tracer.start_span("x", context=Context()).end()
        spans = collector.wait_for(lambda spans: len(spans) == 1000)
        assert len({span.span_id for span in spans}) == 1000
        assert collector.num_calls < 10
        tracing.shutdown()


def test_an_outage_of_the_collector_is_told_once_and_survived(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    collector = OtlpCollector()
    tracing = configure_tracing(
        load_settings(otlp_endpoint=collector.endpoint), "svc", instance_id="i"
    )
    tracing.tracer.start_span("before", context=Context()).end()
    tracing.flush()
    assert [span.name for span in collector.spans()] == ["before"]
    collector.stop()
    for _ in range(3):
        tracing.tracer.start_span("lost", context=Context()).end()
        tracing.flush()
    revived = OtlpCollector(collector.port)
    deadline = time.monotonic() + 120
    while not revived.spans():
        assert time.monotonic() < deadline
        tracing.tracer.start_span("after", context=Context()).end()
        tracing.flush()
    tracing.shutdown()
    revived.stop()
    assert {span.name for span in revived.spans()} == {"after"}
    messages = [record.getMessage() for record in caplog.records]
    assert sum("takes no spans" in message for message in messages) == 1
    assert sum("is back" in message for message in messages) == 1
    assert len(messages) == 2
