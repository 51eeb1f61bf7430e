from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.autoscale_simulation import SimulatedAutoscaler, SimulatedFleet, even, skewed
from services.autoscaler.actions import (
    AddWorker,
    LoadSlots,
    Planned,
    RemoveWorker,
    UnloadSlots,
    format_slots,
)
from services.autoscaler.options import PolicyOptions
from services.autoscaler.policy import decide
from services.autoscaler.state import PolicyState
from services.autoscaler.view import FleetView, WorkerView
from services.core.errors import ConfigurationError
from services.core.registry import Slot

LAYERS, EXPERTS = 4, 8
NO_SHADOWS = PolicyOptions(shadow_copies=False)


def worker(
    name: str,
    slots: Iterable[Slot],
    *,
    room: int = 0,
    busy: float = 0.0,
    rows: Mapping[Slot, float] | None = None,
    activations: Mapping[Slot, float] | None = None,
    **changes: Any,
) -> WorkerView:
    values: dict[str, Any] = {
        "worker_id": name,
        "host": f"host-of-{name}",
        "device": "cpu",
        "started_at": 0.0,
        "is_ready": True,
        "slots": frozenset(slots),
        "slot_bytes": 10,
        "free_bytes": 10 * room,
        "sampled_s": 2.0,
        "utilization": busy,
        "frames": 100.0,
        "rows": rows or {},
        "activations": activations or {},
    }
    return WorkerView(**values | changes)


def view(*workers: WorkerView, **changes: Any) -> FleetView:
    return FleetView(workers={one.worker_id: one for one in workers}, **changes)


def rounds(
    options: PolicyOptions, seen: FleetView, seconds: int, state: PolicyState | None = None
) -> tuple[list[Planned], PolicyState]:
    """All that is planned when nothing planned is ever done, deciding once a second."""
    state = state or PolicyState()
    planned: list[Planned] = []
    for now in range(seconds):
        some, state = decide(options, state, seen, float(now))
        planned += some
    return planned, state


def test_prefill_is_judged_by_rows_and_decode_by_activations() -> None:
    """w0 has one expert with many rows, w1 two with few each: in prefill w0 is hot, in decode the
    costlier slot of a busier worker is the one activated more often."""
    w0 = worker("w0", [(0, 0), (0, 1)], busy=0.8, rows={(0, 0): 900.0, (0, 1): 100.0},
                activations={(0, 0): 100.0, (0, 1): 300.0})  # fmt: skip
    w1 = worker("w1", [(0, 2), (0, 3)], room=4, busy=0.2, rows={(0, 2): 100.0, (0, 3): 100.0},
                activations={(0, 2): 100.0, (0, 3): 100.0})  # fmt: skip
    options = replace(NO_SHADOWS, hot_after_s=0, max_slots_per_action=1)
    prefill, _ = decide(options, PolicyState(), view(w0, w1, phase="prefill"), 0.0)
    decode, _ = decide(options, PolicyState(), view(w0, w1, phase="decode"), 0.0)
    assert _first_load(prefill) == ("w1", (0, 0))
    assert _first_load(decode) == ("w1", (0, 1))


def test_chance_is_not_heat() -> None:
    """Twice the load, but of a handful of activations."""
    w0 = worker("w0", [(0, 0)], busy=0.4, activations={(0, 0): 4.0})
    w1 = worker("w1", [(0, 1)], room=4, busy=0.2, activations={(0, 1): 2.0})
    assert rounds(NO_SHADOWS, view(w0, w1, phase="decode"), 10)[0] == []


def test_in_a_few_steps_it_takes_more_to_be_hot() -> None:
    """Two prompts a second: some of their frames take half as long again, and that is no heat."""
    rows = {(0, 0): 450.0, (0, 1): 450.0}
    for times, num_steps, is_hot in ((1.6, 4, False), (5.0, 6, True), (1.6, 40, True)):
        others = {(0, 2): 900.0 / times}
        w0 = worker("w0", rows, busy=0.8, rows=rows, frames=num_steps / 2)
        w1 = worker("w1", others, room=4, busy=0.8 / times, rows=others, frames=num_steps / 2)
        planned, _ = rounds(NO_SHADOWS, view(w0, w1, phase="prefill"), 3)
        assert bool(planned) is is_hot, (times, num_steps)


def test_a_worker_that_loads_replicas_is_slow_for_that_and_not_hot() -> None:
    rows = {(0, 0): 450.0, (0, 1): 450.0}
    w0 = worker("w0", rows, room=1, busy=0.8, rows=rows)
    seen = view(w0, worker("w1", [(0, 2)], room=4, busy=0.4, rows={(0, 2): 450.0}), phase="prefill")
    options, state = replace(NO_SHADOWS, hot_after_s=0), PolicyState()
    under_way = [LoadSlots(worker_id="w0", slots=((0, 2),))]
    assert decide(options, state, seen, 0.0, in_flight=under_way)[0] == ()
    assert _first_load(decide(options, state, seen, 0.0)[0]) == ("w1", (0, 0))


def test_nothing_is_loaded_for_heat_while_a_worker_is_new() -> None:
    rows = {(0, 0): 450.0, (0, 1): 450.0}
    w0 = worker("w0", rows, busy=0.6, rows=rows)
    w1 = worker("w1", [(0, 2)], room=4, busy=0.2, rows={(0, 2): 300.0})
    alone = view(w0, phase="prefill")
    joined = view(w0, w1, phase="prefill")
    _, state = rounds(NO_SHADOWS, alone, 1)
    at = []
    for now in range(1, 20):
        planned, state = decide(NO_SHADOWS, state, joined, float(now))
        at += [now] * bool(planned)
    assert at[0] == 1 + NO_SHADOWS.cool_down_s + NO_SHADOWS.hot_after_s
    assert rounds(NO_SHADOWS, joined, 3)[0], "what is there from the start is not new"


def test_workers_that_share_a_device_do_not_spend_its_memory_twice() -> None:
    slots = [(0, e) for e in range(6)]
    alone: dict[str, Any] = {"host": "one", "device": "cpu"}
    seen = view(
        worker("a", slots[:2], room=3, **alone),
        worker("b", slots[2:4], room=3, **alone),
        worker("c", slots[4:], room=3, **alone),
    )
    planned, _ = decide(PolicyOptions(protect_after_s=0), PolicyState(), seen, 0.0)
    assert sum(len(one.action.slots) for one in planned if isinstance(one.action, LoadSlots)) == 3


def test_a_shadow_copy_is_put_on_another_host_than_the_first() -> None:
    seen = view(
        worker("a", [(0, 0)], host="one"),
        worker("b", [(0, 1)], room=5, host="one"),
        worker("c", [(0, 2)], room=5, host="two"),
    )
    planned, _ = rounds(PolicyOptions(), seen, 6)
    loads = {slot: one.action.worker_id for one in planned
             if isinstance(one.action, LoadSlots) for slot in one.action.slots}  # fmt: skip
    assert loads[0, 0] == "c" and loads[0, 1] == "c" and loads[0, 2] == "b"


def test_a_lost_slot_is_loaded_at_once_in_place_of_a_shadow_copy() -> None:
    options = PolicyOptions()
    before = view(worker("a", [(0, 0)]), worker("b", [(0, 1)]), worker("c", [(0, 1), (0, 2)]))
    _, state = decide(options, PolicyState(), before, 0.0)
    after = view(worker("b", [(0, 1)]), worker("c", [(0, 1), (0, 2)]))
    _, state = decide(options, state, after, 1.0)
    planned, _ = decide(options, state, after, 1.0 + options.restore_after_s)
    assert [one.action for one in planned] == [
        UnloadSlots(worker_id="c", slots=((0, 1),)),
        LoadSlots(worker_id="c", slots=((0, 0),)),
    ]
    assert [one.purpose for one in planned] == ["evict", "restore"]


def test_leases_that_come_back_within_a_heartbeat_are_no_loss() -> None:
    both = view(worker("a", [(0, 0)]), worker("b", [(0, 1)], room=5))
    _, state = decide(NO_SHADOWS, PolicyState(), both, 0.0)
    planned, state = decide(NO_SHADOWS, state, view(worker("b", [(0, 1)], room=5)), 1.0)
    assert planned == ()
    assert decide(NO_SHADOWS, state, both, 2.0)[0] == ()


def test_no_ready_worker_and_no_worker_at_all_decide_nothing() -> None:
    assert decide(NO_SHADOWS, PolicyState(), FleetView(workers={}), 0.0)[0] == ()
    loading = view(worker("a", [], is_ready=False))
    assert decide(NO_SHADOWS, PolicyState(), loading, 0.0)[0] == ()


def test_a_saturated_fleet_without_memory_asks_for_one_worker_and_waits_for_it() -> None:
    busy: dict[str, Any] = {"busy": 0.95, "activations": {(0, 0): 100.0}}
    seen = view(worker("a", [(0, 0)], **busy))
    planned, _ = rounds(replace(NO_SHADOWS, max_workers=3), seen, 100)
    assert [one.action for one in planned] == [AddWorker(slots=((0, 0),))]
    assert rounds(NO_SHADOWS, seen, 100)[0] == []  # the number seen first is the most


def test_workers_that_are_hardly_busy_are_joined_where_the_shards_are_saturated() -> None:
    """They wait for one another and for attention, so that half busy is all that they get."""
    half: dict[str, Any] = {"busy": 0.5, "rows": {(0, 0): 100.0, (0, 1): 100.0}}
    slots = [(0, 0), (0, 1)]
    options = replace(NO_SHADOWS, max_workers=3)
    fleet: dict[str, Any] = {"phase": "prefill", "saturation": 0.8}
    seen = view(worker("a", slots, **half), worker("b", slots, **half), experts_share=0.7, **fleet)
    (added,), _ = rounds(options, seen, 3)
    assert isinstance(added.action, AddWorker) and "80% saturated" in added.reason
    mostly_attention = view(*seen.workers.values(), experts_share=0.2, **fleet)
    assert rounds(options, mostly_attention, 30)[0] == []


def test_replicas_on_their_way_are_waited_for_before_a_worker_is_but_not_for_ever() -> None:
    seen = view(worker("a", [(0, 0)], busy=0.9, activations={(0, 0): 50.0}), saturation=0.9,
                experts_share=0.9)  # fmt: skip
    options = replace(NO_SHADOWS, max_workers=2)
    state, asked_at = PolicyState(), None
    for now in range(30):
        under_way = [LoadSlots(worker_id="a", slots=((0, 1),))]
        planned, state = decide(options, state, seen, float(now), in_flight=under_way)
        if planned and asked_at is None:
            asked_at = now
    assert asked_at == 5 * options.scale_out_after_s


def test_a_single_stream_that_keeps_workers_busy_asks_for_nobody_and_spares_one() -> None:
    busy: dict[str, Any] = {"busy": 0.85, "activations": {(0, 0): 100.0}}
    workers = [worker(name, [(0, 0)], started_at=at, **busy) for name, at in (("a", 1), ("b", 2))]
    seen = view(*workers, phase="decode", saturation=0.02, experts_share=0.9)
    options = replace(NO_SHADOWS, min_workers=1, max_workers=3)
    planned, _ = rounds(options, seen, 40)
    assert [one.action for one in planned] == [RemoveWorker(worker_id="b")]


def test_a_worker_stays_without_which_the_fleet_would_be_saturated() -> None:
    busy: dict[str, Any] = {"busy": 0.3, "rows": {(0, 0): 100.0}}
    workers = [worker(name, [(0, 0)], **busy) for name in "ab"]
    options = replace(NO_SHADOWS, min_workers=1)
    # Alone one would be twice as busy, and a step 1.8 times as long.
    for saturation, goes in ((0.32, False), (0.29, True)):
        seen = view(*workers, phase="prefill", saturation=saturation, experts_share=0.8)
        assert bool(rounds(options, seen, 40)[0]) is goes


def test_a_newcomer_relieves_the_slowest_worker_of_each_layer() -> None:
    """All of a's experts have more rows than any of b's, but a layer takes as long as its slowest
    worker, and that would be b once a has got two copies fewer to do."""
    a, b = [(0, 0), (0, 1), (0, 2), (0, 3)], [(0, 4), (0, 5), (0, 6), (0, 7)]
    seen = view(
        worker("a", a, busy=0.8, rows=dict.fromkeys(a, 110.0)),
        worker("b", b, busy=0.8, rows=dict.fromkeys(b, 100.0)),
        phase="prefill",
        saturation=0.9,
        experts_share=0.9,
    )
    (added,), _ = rounds(replace(NO_SHADOWS, max_workers=3), seen, 3)
    assert isinstance(added.action, AddWorker)
    assert len([slot for slot in added.action.slots if slot in a]) == 2
    assert len([slot for slot in added.action.slots if slot in b]) == 2


def test_the_newest_idle_worker_goes_but_not_below_the_minimum() -> None:
    seen = view(
        worker("a", [(0, 0), (0, 1)], started_at=1.0),
        worker("b", [(0, 0), (0, 1)], started_at=2.0),
        worker("c", [(0, 0), (0, 1)], started_at=3.0),
    )
    options = replace(NO_SHADOWS, min_workers=2)
    planned, state = rounds(options, seen, 40)
    assert [one.action for one in planned] == [RemoveWorker(worker_id="c")]
    # Its lease lives on for a moment: it counts as gone already.
    assert rounds(options, seen, 40, replace(state, scaled_at=None))[0] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"cool_ratio": 1.5},
        {"min_replicas": 0},
        {"min_replicas": 5},
        {"min_workers": 3, "max_workers": 2},
        {"scale_in_ratio": 1.0},
        {"scale_out_utilization": 1.1},
    ],
)
def test_bounds_that_contradict_each_other_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"autoscaler: \w+=.* must be"):
        PolicyOptions(**wrong)


def test_slots_are_written_as_layers_and_experts() -> None:
    assert format_slots(((0, 0), (1, 0), (0, 1), (1, 1), (5, 7))) == "0-1:0-1;5:7"


def test_a_hot_expert_has_a_replica_within_five_seconds_and_loses_it_after_the_load() -> None:
    """70 % of the tokens onto one expert (a simulated fleet)."""
    fleet = SimulatedFleet()
    for index in range(4):
        slots = {(layer, e) for layer in range(LAYERS) for e in (2 * index, 2 * index + 1)}
        fleet.add(f"w{index}", slots, capacity=len(slots) + 4, host=f"host-{index}")
    autoscaler = SimulatedAutoscaler(fleet, replace(NO_SHADOWS, idle_after_s=10))
    shape: dict[str, Any] = {"num_layers": LAYERS, "num_experts": EXPERTS, "rows": 64}
    calm = even(**shape, steps_per_s=60)
    hot = skewed(**shape, hot_share=0.7, steps_per_s=60)
    autoscaler.run(15, calm)
    assert autoscaler.actions == []
    busiest_before = 0.0
    for _ in range(50):
        fleet.tick(hot)
        busiest_before = max(busiest_before, *(w.utilization for w in fleet.workers.values()))
        autoscaler.step()
    assert all(len(fleet.holders((layer, 0))) >= 2 for layer in range(LAYERS))
    assert max(w.utilization for w in fleet.workers.values()) < 0.8 * busiest_before
    autoscaler.run(90, calm)
    assert [len(w.slots) for w in fleet.workers.values()] == [2 * LAYERS] * 4


def _first_load(planned: Iterable[Planned]) -> tuple[str, Slot]:
    action = next(one.action for one in planned if isinstance(one.action, LoadSlots))
    return action.worker_id, action.slots[0]
