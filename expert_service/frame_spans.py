"""The worker's own spans, under the span of the shard that sent the frame."""

from __future__ import annotations

from collections.abc import Sequence

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
from services.core.tracing import extract_context, record_span, unix_ns


class FrameSpans:
    """Records a span for each computed frame that names its parent: from arrival to result."""

    def __init__(self, tracer: Tracer, *, worker_id: str) -> None:
        self._tracer = tracer
        self._worker_id = worker_id

    def record_computed(self, outcome: Outcome) -> None:
        frame = outcome.job.frame
        self.record_frame(
            frame.traceparent,
            layer=frame.layer,
            num_tokens=frame.hidden_states.shape[0],
            expert_ids=frame.assignments.expert_ids,
            rows_per_expert=frame.assignments.rows_per_expert,
            arrived_ns=outcome.job.arrived_ns,
            queue_us=outcome.queue_us,
            compute_us=outcome.compute_us,
        )

    def record_frame(
        self,
        traceparent: str,
        *,
        layer: int,
        num_tokens: int,
        expert_ids: Sequence[int],
        rows_per_expert: Sequence[int],
        arrived_ns: int,
        queue_us: int,
        compute_us: int,
    ) -> None:
        """`arrived_ns` is of `time.perf_counter_ns`. Nothing where `traceparent` is empty."""
        if not traceparent:
            return
        start_ns = unix_ns(arrived_ns)
        record_span(
            self._tracer,
            SPAN_EXPERT,
            parent=extract_context({"traceparent": traceparent}),
            start_ns=start_ns,
            end_ns=start_ns + 1000 * (queue_us + compute_us),
            attributes={
                ATTR_WORKER_ID: self._worker_id,
                ATTR_LAYER: layer,
                ATTR_NUM_TOKENS: num_tokens,
                ATTR_EXPERT_IDS: expert_ids,
                ATTR_TOKENS_PER_EXPERT: rows_per_expert,
                ATTR_QUEUE_MS: queue_us / 1000,
                ATTR_COMPUTE_MS: compute_us / 1000,
            },
        )
