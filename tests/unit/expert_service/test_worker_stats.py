from __future__ import annotations

import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from expert_service.compute import Job, Outcome
from expert_service.held_experts import HeldExperts
from expert_service.worker_stats import WorkerStats
from protos import experts_pb2
from services.core.expert_ffn import Assignments
from services.core.metrics import exposition
from services.core.wire import RequestFrame

NOTHING_HELD = HeldExperts(
    layers={}, digests={}, dtype=torch.float32, device=torch.device("cpu"), hidden_size=2
)


TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


def outcome(
    layer: int,
    rows: dict[int, int],
    queue_us: int = 0,
    compute_us: int = 0,
    traceparent: str = "",
) -> Outcome:
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
        traceparent=traceparent,
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


def test_the_busy_ratio_is_of_the_last_seconds_and_not_of_the_time_between_scrapes() -> None:
    registry, now = CollectorRegistry(), [0.0]
    stats = WorkerStats(registry, clock=lambda: now[0])

    def scraped_at(seconds: float) -> float | None:
        now[0] = seconds
        return registry.get_sample_value("expertfleet_worker_busy_ratio")

    assert scraped_at(10.0) == 0.0
    stats.record_busy(1_500_000)
    now[0] = 20.0
    stats.record_busy(4_500_000)
    assert [scraped_at(20.0) for _ in range(3)] == [0.4] * 3
    assert scraped_at(26.0) == 0.3
    assert scraped_at(60.0) == 0.0


def test_frames_of_sampled_steps_lead_to_their_trace() -> None:
    registry = CollectorRegistry()
    stats = WorkerStats(registry)
    stats.record_computed(outcome(0, {1: 3}, compute_us=700))
    stats.record_computed(
        outcome(0, {1: 3}, compute_us=1500, traceparent=f"00-{TRACE_ID}-00f067aa0ba902b7-01")
    )
    page, content_type = exposition(registry, "application/openmetrics-text;version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    exemplars = [
        (sample.labels["le"], sample.exemplar.labels, sample.exemplar.value)
        for family in text_string_to_metric_families(page.decode())  # type: ignore[no-untyped-call]
        for sample in family.samples
        if family.name == "expertfleet_worker_compute_seconds" and sample.exemplar
    ]
    assert exemplars == [("0.0025", {"trace_id": TRACE_ID}, 0.0015)]


def test_what_a_worker_holds_is_shown_from_its_lease() -> None:
    registry = CollectorRegistry()
    WorkerStats(registry).show_held(num_slots=8, weight_bytes=640, memory_free_bytes=160)
    names = ("slots", "weight_bytes", "memory_free_bytes")
    shown = [registry.get_sample_value(f"expertfleet_worker_{name}") for name in names]
    assert shown == [8, 640, 160]
