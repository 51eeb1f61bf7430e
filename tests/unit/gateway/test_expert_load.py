from __future__ import annotations

from services.core.registry import FleetSnapshot, ShardRecord, Slot
from services.gateway.expert_load import LoadHistory, expert_tokens, layer_loads


def shard(name: str, load: dict[Slot, int], *, started_at: float = 0.0) -> ShardRecord:
    return ShardRecord(
        shard_id=name,
        pid=1,
        host="here",
        started_at=started_at,
        num_running=0,
        num_waiting=0,
        waiting_tokens=0,
        kv_blocks_used=0,
        kv_blocks_total=1,
        num_generated_tokens=0,
        num_prefilled_tokens=0,
        expert_load=load,
    )


def fleet(*shards: ShardRecord) -> FleetSnapshot:
    return FleetSnapshot(shards=shards)


def test_the_load_is_summed_over_shards() -> None:
    snapshot = fleet(shard("a", {(0, 0): 3, (0, 1): 1}), shard("b", {(0, 1): 5}))
    assert expert_tokens(snapshot) == {(0, 0): 3, (0, 1): 6}


def test_imbalance_is_the_largest_over_the_mean() -> None:
    (even, uneven, idle) = layer_loads(
        {(0, 0): 5, (0, 1): 5, (1, 1): 8}, None, num_layers=3, num_experts=2
    )
    assert (even.imbalance, uneven.imbalance, idle.imbalance) == (1.0, 2.0, None)
    assert idle.share == [0.0, 0.0]


def test_rates_need_two_readings_and_say_their_window() -> None:
    history = LoadHistory()
    assert history.rates(fleet(shard("a", {(0, 0): 10})), 100.0) is None
    assert history.rates(fleet(shard("a", {(0, 0): 30})), 104.0) == ({(0, 0): 5.0}, 4.0)


def test_readings_too_close_to_each_other_count_as_one() -> None:
    history = LoadHistory(min_interval_s=1.0)
    history.rates(fleet(shard("a", {(0, 0): 10})), 100.0)
    assert history.rates(fleet(shard("a", {(0, 0): 30})), 100.5) is None


def test_the_window_slides_and_never_holds_more_than_it_needs() -> None:
    history = LoadHistory(window_s=10.0)
    for second in range(100):
        measured = history.rates(fleet(shard("a", {(0, 0): second**2})), float(second))
    assert measured is not None
    rates, window_s = measured
    assert window_s == 10.0
    assert rates == {(0, 0): (99**2 - 89**2) / 10}


def test_a_restarted_shard_counts_from_zero_and_one_first_seen_not_at_all() -> None:
    history = LoadHistory()
    history.rates(fleet(shard("a", {(0, 0): 100}, started_at=1.0)), 100.0)
    restarted = shard("a", {(0, 0): 8}, started_at=101.0)
    first_seen = shard("old", {(0, 0): 1000}, started_at=2.0)
    measured = history.rates(fleet(restarted, first_seen), 104.0)
    assert measured == ({(0, 0): 2.0}, 4.0)
