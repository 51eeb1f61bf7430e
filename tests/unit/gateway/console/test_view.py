from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from services.core.registry import FleetSnapshot, ShardRecord, WorkerRecord
from services.gateway.console.activity import Activity, Served
from services.gateway.console.contract import FleetView
from services.gateway.console.fleet_state import FleetState
from services.gateway.console.view import is_news
from services.gateway.intake import Intake
from tests.support.records import shard_record, worker_record
from tests.unit.gateway.console.scene import builder, fleet_state

EXPERTS = range(4)


def worker(name: str, experts: set[int], **changes: Any) -> WorkerRecord:
    slots = [(layer, expert) for layer in range(2) for expert in experts]
    return worker_record(name, slots, **changes)


def read(fleet: FleetState, *records: WorkerRecord | ShardRecord, at: float) -> None:
    fleet.add(FleetSnapshot.of(records), at)


def build(
    folder: Path,
    fleet: FleetState,
    activity: Activity | None = None,
    intake: Intake | None = None,
    now: float | None = None,
) -> FleetView:
    return builder(folder).build(
        fleet,
        activity or Activity(clock=lambda: fleet.read_at),
        intake or Intake(max_requests=9, max_bytes=9),
        num_sessions=None,
        now=fleet.read_at if now is None else now,
    )


def test_a_hot_expert_leads_with_its_share_and_replicas(model_folder: Path) -> None:
    fleet = fleet_state()
    for second in range(3):
        tokens = {(0, 0): 10 * second, (0, 2): 90 * second, (1, 1): 20 * second}
        told = shard_record(expert_load=tokens, written_at=100.0 + second)
        workers = (worker("a", {0, 1, 2}), worker("b", {2, 3}))
        read(fleet, told, *workers, at=100.0 + second)
    load = build(model_folder, fleet)["load"]
    assert (load["source"], load["now_s"], load["window_s"]) == ("shards", 1.0, 2.0)
    top, bottom = load["layers"]
    assert top["now"] == top["window"] == [10.0, 0.0, 90.0, 0.0]
    assert (top["imbalance_now"], bottom["imbalance"]) == (3.6, 4.0)
    assert (top["replicas"], top["tokens"]) == ([1, 1, 2, 1], [20, 0, 180, 0])
    assert load["hottest"][0] == {
        "layer": 0,
        "expert": 2,
        "tokens_per_second": 90.0,
        "share": 0.9,
        "replicas": 2,
    }
    assert [(hot["layer"], hot["expert"]) for hot in load["hottest"]] == [(0, 2), (1, 1), (0, 0)]


def test_before_two_leases_rates_are_unknown_and_not_zero(model_folder: Path) -> None:
    fleet = fleet_state()
    read(fleet, shard_record(expert_load={(0, 0): 5}, written_at=1.0), at=1.0)
    view = build(model_folder, fleet)
    layer = view["load"]["layers"][0]
    assert (layer["now"], layer["imbalance"], view["load"]["hottest"]) == (None, None, [])
    assert view["shards"][0]["tokens_per_second"] is None


def test_without_shards_the_workers_counts_stand_in(model_folder: Path) -> None:
    fleet = fleet_state()
    for second in range(2):
        told = worker("a", {0, 1, 2, 3}, tokens={(0, 1): 8 * second}, written_at=50.0 + second)
        read(fleet, told, at=50.0 + second)
    load = build(model_folder, fleet)["load"]
    assert (load["source"], load["layers"][0]["now"]) == ("workers", [0.0, 8.0, 0.0, 0.0])


def test_a_lost_worker_stays_and_its_replicas_do_not_count(model_folder: Path) -> None:
    fleet = fleet_state()
    both = (worker("a", {0, 1}, written_at=1.0), worker("b", {0}, written_at=1.0))
    read(fleet, *both, at=1.0)
    read(fleet, worker("a", {0, 1}, written_at=6.0), at=6.5)
    view = build(model_folder, fleet)
    assert [(each["worker_id"], each["state"]) for each in view["workers"]] == [
        ("a", "ready"),
        ("b", "lost"),
    ]
    lost = view["workers"][1]
    assert (lost["lost_at"], lost["seen_s"], lost["busy"]) == (6.5, 5.5, None)
    assert view["load"]["layers"][0]["replicas"] == [1, 1, 0, 0]


def test_experts_in_the_shards_process_have_a_replica_in_each_shard(model_folder: Path) -> None:
    fleet = fleet_state()
    read(fleet, shard_record("s-0"), shard_record("s-1"), at=1.0)
    assert build(model_folder, fleet)["load"]["layers"][1]["replicas"] == [2, 2, 2, 2]


def test_workers_and_shards_tell_their_rates_and_latencies(model_folder: Path) -> None:
    fleet, activity = fleet_state(), Activity(clock=lambda: 11.0)
    for second in range(2):
        at = 10.0 + second
        read(
            fleet,
            worker("a", {0}, tokens={(0, 0): 30 * second}, busy_s=0.5 * second, written_at=at),
            shard_record(
                num_generated_tokens=40 * second,
                written_at=at,
                max_num_seqs=16,
                step_s=1.0 + second,
                full_s=0.25 * second,
            ),
            at=at,
        )
    activity.shard_served("shard-0", 0.2, 0.01)
    view = build(model_folder, fleet, activity)
    assert (view["workers"][0]["tokens_per_second"], view["workers"][0]["busy"]) == (30.0, 0.5)
    (shard,) = view["shards"]
    assert (shard["tokens_per_second"], shard["max_num_seqs"]) == (40.0, 16)
    assert shard["saturation"] == 0.25
    assert shard["ttft_ms"] == {"p50": 200.0, "p95": 200.0}
    assert shard["tpot_ms"] == {"p50": 10.0, "p95": 10.0}


def test_this_gateways_requests_are_told(model_folder: Path) -> None:
    fleet, activity = fleet_state(), Activity(clock=lambda: 100.0)
    intake = Intake(max_requests=9, max_bytes=9)
    _waiting, running = intake.enter(), intake.enter()
    running.leave()
    served = Served(model="m", num_prompt_tokens=3, num_generated_tokens=4, ttft_s=0.5, tpot_s=0.02)
    activity.request_ended(served, request_id="r", trace_id="ab", status=200, took_s=1.5)
    view = build(model_folder, fleet, activity, intake, now=100.0)
    requests = view["requests"]
    assert (requests["running"], requests["waiting"]) == (1, 1)
    assert requests["ttft_ms"] == {"p50": 500.0, "p95": 500.0}
    assert requests["tpot_ms"] == {"p50": 20.0, "p95": 20.0}
    assert view["slow_requests"][0]["trace_id"] == "ab"
    running.end()
    assert (intake.num_running, intake.num_requests) == (0, 1)


def test_time_alone_is_no_news(model_folder: Path) -> None:
    fleet = fleet_state()
    for at in (1.0, 2.0, 3.1):
        first = build(model_folder, fleet)
        read(fleet, worker("a", {0}, written_at=at), shard_record(written_at=at), at=at)
    assert not is_news(build(model_folder, fleet), first)
    fleet.miss()
    assert is_news(build(model_folder, fleet), first)


def test_a_view_is_json_and_of_bounded_size_for_the_largest_model(model_folder: Path) -> None:
    fleet = fleet_state()
    for second in range(2):
        load = {(layer, e): 1234567 + 91 * second for layer in range(2) for e in EXPERTS}
        read(fleet, shard_record(expert_load=load, written_at=1.0 + second), at=1.0 + second)
    text = json.dumps(build(model_folder, fleet), allow_nan=False)
    per_layer = len(json.dumps(build(model_folder, fleet)["load"]["layers"])) / 2
    assert per_layer * 56 < 32 << 10, "8x22B"
    assert json.loads(text)["load"]["layers"][0]["now"] == [91.0] * 4
