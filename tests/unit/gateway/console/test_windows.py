from __future__ import annotations

from typing import Any

from services.core.registry import FleetSnapshot, ShardRecord
from services.gateway.console.windows import FleetWindows, summed
from tests.support.records import shard_record, worker_record

HOT, COLD = (0, 1), (0, 0)


def shard(written_at: float, hot: int, **changes: Any) -> ShardRecord:
    load = {HOT: hot, COLD: 5}
    values: dict[str, Any] = {
        "expert_load": load,
        "written_at": written_at,
        "num_generated_tokens": hot,
    }
    return shard_record(**values | changes)


def fleet(*shards: ShardRecord) -> FleetSnapshot:
    return FleetSnapshot(shards=shards)


def test_one_lease_makes_no_rate_and_two_make_one_over_the_leases_own_times() -> None:
    windows = FleetWindows()
    windows.add(fleet(shard(100.0, 10)), 100.3)
    assert windows.of("shard-0", 100.3).now is None
    windows.add(fleet(shard(100.0, 10)), 100.8)
    assert windows.of("shard-0", 100.8).now is None, "the same lease read twice is one sample"
    windows.add(fleet(shard(101.0, 40)), 101.9)
    now = windows.of("shard-0", 101.9).now
    assert now is not None
    assert (now.slots, now.span_s, now.counters) == (
        {HOT: 30.0},
        1.0,
        {"generated": 30.0, "full_s": 0.0},
    )


def test_an_expert_that_turns_hot_shows_at_once_now_and_slowly_over_the_window() -> None:
    windows = FleetWindows(long_s=30.0)
    hot = 0
    for second in range(60):
        hot += 100 if second >= 58 else 1
        windows.add(fleet(shard(1000.0 + second, hot)), 1000.0 + second)
    measured = windows.of("shard-0", 1059.0)
    assert measured.now is not None and measured.window is not None
    assert measured.now.slots[HOT] == 100.0
    assert 30.0 <= measured.window.span_s <= 36.0
    assert abs(measured.window.slots[HOT] - 100 * 2 / measured.window.span_s - 1) < 0.5


def test_a_process_that_fell_silent_does_nothing_now() -> None:
    windows = FleetWindows(silent_s=3.0)
    for second in range(3):
        windows.add(fleet(shard(100.0 + second, 50 * second)), 100.0 + second)
    windows.add(fleet(shard(102.0, 100)), 106.0)
    measured = windows.of("shard-0", 106.0)
    assert measured.now is not None and measured.now.slots == {}
    assert measured.window is not None and measured.window.slots[HOT] == 50.0


def test_a_restarted_process_begins_anew() -> None:
    windows = FleetWindows()
    for second in range(3):
        windows.add(fleet(shard(100.0 + second, 1000 + second)), 100.0 + second)
    windows.add(fleet(shard(103.0, 4, started_at=102.5)), 103.0)
    assert windows.of("shard-0", 103.0).window is None
    windows.add(fleet(shard(104.0, 9, started_at=102.5)), 104.0)
    measured = windows.of("shard-0", 104.0).window
    assert measured is not None and measured.slots == {HOT: 5.0}


def test_who_has_left_is_forgotten() -> None:
    windows = FleetWindows()
    for second in range(2):
        windows.add(fleet(shard(100.0 + second, second)), 100.0 + second)
    windows.add(fleet(), 102.0)
    assert windows.of("shard-0", 102.0).now is None


def test_a_worker_tells_its_tokens_and_how_busy_it_is() -> None:
    windows = FleetWindows()
    for second in range(2):
        record = worker_record(
            tokens={HOT: 10 * second, COLD: 3 * second}, busy_s=0.25 * second, written_at=second + 1
        )
        windows.add(FleetSnapshot(workers=(record,)), second + 1)
    now = windows.of("worker-0", 2.0).now
    assert now is not None
    assert now.counters == {"tokens": 13.0, "busy_s": 0.25}


def test_rates_of_several_processes_are_summed() -> None:
    windows = FleetWindows()
    for second in range(2):
        both = [shard(10.0 + second, 7 * second), shard(10.0 + second, second, shard_id="shard-1")]
        windows.add(fleet(*both), 10.0 + second)
    names = ("shard-0", "shard-1", "unknown")
    assert summed(windows.of(name, 11.0).now for name in names) == ({HOT: 8.0}, 1.0)
    assert summed([None]) is None


def test_what_is_kept_is_bounded_whatever_the_heartbeat() -> None:
    windows = FleetWindows()
    for tick in range(4000):
        windows.add(fleet(shard(100.0 + tick / 20, tick)), 100.0 + tick / 20)
    (series,) = windows._series.values()
    assert len(series.recent) + len(series.coarse) < 40
