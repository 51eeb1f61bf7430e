"""The worker's own spans, under the span of the shard that sent the frame."""

from __future__ import annotations

import time

from opentelemetry.trace import Tracer

from expert_service.compute import Outcome
from services.core.telemetry import (
    ATTR_COMPUTE_MS,
    ATTR_EXPERT_IDS,
    ATTR_LAYER,
    ATTR_NUM_TOKENS,
    ATTR_QUEUE_MS,
    ATTR_TOKENS_PER_EXPERT,
    ATTR_WORKER_ID,
    SPAN_EXPERT,
)
from services.core.tracing import extract_context, record_span


class FrameSpans:
    """Records a span for each computed frame that names its parent: from arrival to result."""

    def __init__(self, tracer: Tracer, *, worker_id: str) -> None:
        self._tracer = tracer
        self._worker_id = worker_id

    def record(self, outcome: Outcome) -> None:
        frame = outcome.job.frame
        if not frame.traceparent:
            return
        start_ns = time.time_ns() - (time.perf_counter_ns() - outcome.job.arrived_ns)
        record_span(
            self._tracer,
            SPAN_EXPERT,
            parent=extract_context({"traceparent": frame.traceparent}),
            start_ns=start_ns,
            end_ns=start_ns + 1000 * (outcome.queue_us + outcome.compute_us),
            attributes={
                ATTR_WORKER_ID: self._worker_id,
                ATTR_LAYER: frame.layer,
                ATTR_NUM_TOKENS: frame.hidden_states.shape[0],
                ATTR_EXPERT_IDS: frame.assignments.expert_ids,
                ATTR_TOKENS_PER_EXPERT: frame.assignments.rows_per_expert,
                ATTR_QUEUE_MS: outcome.queue_us / 1000,
                ATTR_COMPUTE_MS: outcome.compute_us / 1000,
            },
        )
