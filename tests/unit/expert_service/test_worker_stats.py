from __future__ import annotations

import torch
from prometheus_client import CollectorRegistry, generate_latest

from expert_service.compute import Job, Outcome
from expert_service.held_experts import HeldExperts
from expert_service.worker_stats import WorkerStats
from protos import experts_pb2
from services.core.expert_ffn import Assignments
from services.core.wire import RequestFrame

NOTHING_HELD = HeldExperts(
    layers={}, digests={}, dtype=torch.float32, device=torch.device("cpu"), hidden_size=2
)


def outcome(layer: int, rows: dict[int, int], queue_us: int = 0, compute_us: int = 0) -> Outcome:
    num_rows = sum(rows.values())
    frame = RequestFrame(
        call_id=1,
        layer=layer,
        hidden_states=torch.zeros(num_rows, 2),
        assignments=Assignments(
            expert_ids=tuple(rows),
            rows_per_expert=tuple(rows.values()),
            token_rows=torch.arange(num_rows),
            topk_weights=torch.ones(num_rows),
        ),
        combine=True,
        traceparent="",
    )
    return Outcome(
        job=Job(
            frame=frame,
            held=NOTHING_HELD,
            arrived_ns=0,
            is_wanted=lambda: True,
            on_done=lambda _: None,
        ),
        result=frame.hidden_states,
        queue_us=queue_us,
        compute_us=compute_us,
        batch_rows=num_rows,
    )


def test_assignments_are_counted_per_slot_and_scraped() -> None:
    registry = CollectorRegistry()
    stats = WorkerStats(registry)
    stats.record_computed(outcome(0, {1: 3, 4: 2}))
    stats.record_computed(outcome(0, {1: 1}))
    stats.record_computed(outcome(2, {4: 5}))
    stats.record_refused(experts_pb2.DISPATCH_STATUS_DRAINING)
    assert stats.tokens() == {(0, 1): 4, (0, 4): 2, (2, 4): 5}
    assert stats.num_frames == 3
    page = generate_latest(registry).decode()
    assert 'expertfleet_worker_tokens_total{expert="1",layer="0"} 4.0' in page
    assert 'expertfleet_worker_frames_total{status="ok"} 3.0' in page
    assert 'expertfleet_worker_frames_total{status="draining"} 1.0' in page
    assert "expertfleet_worker_batch_rows_sum 11.0" in page


def test_the_interval_has_means_of_its_own_frames_only() -> None:
    stats = WorkerStats(CollectorRegistry())
    stats.record_computed(outcome(0, {0: 1}, queue_us=1000, compute_us=2000))
    stats.record_computed(outcome(0, {0: 1}, queue_us=3000, compute_us=6000))
    means = stats.read_interval()
    assert (means.queue_ms, means.compute_ms) == (2.0, 4.0)
    assert (stats.read_interval().queue_ms, stats.read_interval().compute_ms) == (0.0, 0.0)
    stats.record_computed(outcome(0, {0: 1}, queue_us=500))
    assert stats.read_interval().queue_ms == 0.5


def test_computations_loads_and_unloads_are_counted_and_scraped() -> None:
    registry = CollectorRegistry()
    stats = WorkerStats(registry)
    stats.record_busy(250_000)
    stats.record_busy(500_000)
    stats.record_loaded(3, 0.5)
    stats.record_unloaded(2)
    assert stats.busy_s == 0.75
    page = generate_latest(registry).decode()
    assert "expertfleet_worker_busy_seconds_total 0.75" in page
    assert "expertfleet_worker_slots_loaded_total 3.0" in page
    assert "expertfleet_worker_slots_unloaded_total 2.0" in page
    assert "expertfleet_worker_load_seconds_sum 0.5" in page
