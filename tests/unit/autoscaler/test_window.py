from __future__ import annotations

from typing import Any

import pytest

from services.autoscaler.window import LoadWindow
from services.core.registry import FleetSnapshot
from tests.support.records import shard_record, worker_record


def seen(*counts: tuple[float, int, int, float], **changes: Any) -> LoadWindow:
    """A window over readings of one worker: (written at, tokens, frames, busy seconds)."""
    window = LoadWindow(window_s=2.0)
    for at, tokens, frames, busy_s in counts:
        record = worker_record(
            "w", {(0, 0)}, tokens={(0, 0): tokens}, num_frames=frames, busy_s=busy_s,
            written_at=at, **changes,
        )  # fmt: skip
        window.add(FleetSnapshot.of([record]), now=at + 0.4)
    return window


def test_rates_are_over_the_time_between_leases_not_between_readings() -> None:
    worker = seen((10.0, 0, 0, 0.0), (11.0, 50, 10, 0.25), (11.0, 50, 10, 0.25)).view()
    assert worker.workers["w"].rows == {(0, 0): 50.0}
    assert worker.workers["w"].utilization == pytest.approx(0.25)


def test_what_is_older_than_the_window_does_not_count() -> None:
    window = seen((0.0, 0, 0, 0.0), (1.0, 900, 9, 0.9), (2.0, 900, 9, 0.9), (3.0, 900, 9, 0.9))
    assert window.view().workers["w"].rows == {(0, 0): 0.0}


def test_a_worker_that_started_anew_is_counted_from_its_start() -> None:
    window = seen((1.0, 900, 90, 5.0), (2.0, 20, 2, 0.1), (3.0, 30, 3, 0.2))
    assert window.view().workers["w"].rows == {(0, 0): 10.0}


def test_without_busy_seconds_frames_and_their_mean_time_tell() -> None:
    window = seen((1.0, 0, 0, 0.0), (2.0, 9, 40, 0.0), compute_ms=5.0)
    assert window.view().workers["w"].utilization == pytest.approx(0.2)


def test_many_rows_of_a_slot_in_a_frame_are_one_activation_shared_by_replicas_as_rows() -> None:
    window = LoadWindow()
    for at in (0, 1):
        records = [
            worker_record(
                name, {(0, 0)}, tokens={(0, 0): 300 * at}, num_frames=10 * at, written_at=5.0 + at
            )
            for name in ("a", "b")
        ]
        window.add(FleetSnapshot.of(records), now=float(at))
    activations = [worker.activations[0, 0] for worker in window.view().workers.values()]
    assert activations == pytest.approx([5.0, 5.0])


def test_the_phase_follows_what_shards_do_and_does_not_flicker() -> None:
    window = LoadWindow(window_s=1.0)
    prefilled = generated = 0
    phases = []
    for at, (more_prefilled, more_generated) in enumerate(
        [(0, 0), (0, 100), (2000, 100), (600, 100), (200, 100)]
    ):
        prefilled, generated = prefilled + more_prefilled, generated + more_generated
        record = shard_record(
            num_prefilled_tokens=prefilled, num_generated_tokens=generated, written_at=1.0 + at
        )
        window.add(FleetSnapshot.of([record]), now=float(at))
        phases.append(window.view().phase)
    assert phases == ["idle", "decode", "prefill", "prefill", "decode"]


def test_shards_tell_how_saturated_they_are_and_what_of_it_experts_are() -> None:
    window = LoadWindow(saturation_window_s=4.0)
    for at in range(9):
        # The first four seconds lie before the window.
        full_s = 3.5 + 0.5 * (at - 4) if at > 4 else 0.9 * at
        steps: dict[str, Any] = {"step_s": 1.0 * at, "full_s": full_s, "experts_s": 0.75 * at}
        idle = shard_record("shard-1", step_s=0.5, written_at=1.0 + at)
        busy = shard_record("shard-0", **steps, written_at=1.0 + at)
        window.add(FleetSnapshot.of([worker_record("w"), busy, idle]), now=float(at))
    seen = window.view()
    assert seen.saturation == pytest.approx((5.5 - 3.6) / 4 / 2)
    assert seen.experts_share == pytest.approx(0.75)


def test_saturation_starts_over_with_every_change_of_workers() -> None:
    window = LoadWindow()
    seen = []
    for at, workers in enumerate(["a", "a", "a", "ab", "ab", "ab"]):
        records = [worker_record(name) for name in workers]
        shard = shard_record(
            step_s=1.0 * at, full_s=1.0 * at if at < 4 else 4.0, written_at=1.0 + at
        )
        window.add(FleetSnapshot.of([*records, shard]), now=float(at))
        seen.append(window.view().saturation)
    assert seen == [None, 1.0, 1.0, 0.0, 1.0, 0.5]


def test_shards_of_an_older_version_tell_nothing() -> None:
    window = LoadWindow()
    window.add(FleetSnapshot.of([worker_record("w"), shard_record(written_at=1.0)]), now=0.0)
    assert (window.view().saturation, window.view().experts_share) == (None, None)


def test_a_prompt_that_only_one_lease_has_seen_is_no_heat() -> None:
    """Two workers with half of every prompt each; b's lease was written just before the third."""
    window = LoadWindow(window_s=2.0)
    half = {"a": (0, 0), "b": (0, 1)}
    for at, num_prompts in ((0.0, {"a": 0, "b": 0}), (2.0, {"a": 3, "b": 2})):
        records = [
            worker_record(
                name,
                {slot},
                tokens={slot: 100 * num_prompts[name]},
                busy_s=0.2 * num_prompts[name],
                num_frames=num_prompts[name],
                written_at=10.0 + at,
            )
            for name, slot in half.items()
        ]
        load = dict.fromkeys(half.values(), 100 * num_prompts["a"])
        shard = shard_record(
            expert_load=load, num_prefilled_tokens=100 * num_prompts["a"], written_at=10.0 + at
        )
        window.add(FleetSnapshot.of([*records, shard]), now=at)
    workers = window.view().workers
    assert workers["a"].rows[0, 0] == workers["b"].rows[0, 1] == 150.0
    assert workers["a"].utilization == pytest.approx(0.3)
    assert workers["b"].utilization == pytest.approx(0.3)
