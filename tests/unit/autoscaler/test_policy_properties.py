"""Whatever happens to a fleet, the policy keeps its promises (a simulated fleet)."""

from __future__ import annotations

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from benchmarks.autoscale_simulation import (
    Costs,
    Demand,
    SimulatedAutoscaler,
    SimulatedFleet,
    even,
    skewed,
)
from services.autoscaler.actions import Action, AddWorker, LoadSlots, RemoveWorker, UnloadSlots
from services.autoscaler.options import PolicyOptions
from services.core.registry import Slot

LAYERS, EXPERTS = 2, 4
ALL = {(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)}


@st.composite
def fleets(draw: st.DrawFn) -> SimulatedFleet:
    """2 to 4 workers on 1 to 3 hosts that hold every slot once, with 0 to 8 slots of room each."""
    num_workers = draw(st.integers(2, 4))
    fleet = SimulatedFleet(Costs(load_s=draw(st.sampled_from([0.0, 0.3, 1.7]))), tick_s=0.5)
    num_hosts = draw(st.integers(1, 3))
    for index in range(num_workers):
        slots = {(layer, e) for layer, e in ALL if e % num_workers == index}
        room = draw(st.integers(0, 8))
        host = f"host-{index % num_hosts}"
        fleet.add(f"w{index}", slots, capacity=len(slots) + room, host=host)
    return fleet


demands = st.builds(
    lambda hot_share, rows, steps: skewed(
        num_layers=LAYERS, num_experts=EXPERTS, rows=rows, hot_share=hot_share, steps_per_s=steps
    ),
    st.sampled_from([0.25, 0.5, 0.7, 0.9]),
    st.sampled_from([2.0, 32.0, 256.0]),
    st.sampled_from([0.0, 10.0, 100.0]),
)
policies = st.builds(
    PolicyOptions,
    shadow_copies=st.booleans(),
    max_replicas=st.integers(2, 4),
    min_workers=st.just(1),
    max_workers=st.integers(4, 6),
    idle_after_s=st.just(5.0),
    cool_down_s=st.just(3.0),
)


@settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(fleets(), policies, st.lists(demands, min_size=1, max_size=4))
def test_no_last_replica_is_unloaded_and_no_bound_is_exceeded(
    fleet: SimulatedFleet, options: PolicyOptions, loads: list[Demand]
) -> None:
    autoscaler = SimulatedAutoscaler(fleet, options)
    for demand in loads:
        for _ in range(40):
            fleet.tick(demand)  # asserts memory, and that a replica is left
            autoscaler.step()
            assert len(fleet.workers) <= (options.max_workers or 0)
            assert all(fleet.holders(slot) for slot in ALL)
            for slot in ALL:
                held = sum(slot in w.slots and "added" not in w.worker_id for w in _all(fleet))
                assert held <= options.max_replicas


@settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(fleets(), policies, demands)
def test_under_constant_load_it_comes_to_rest(
    fleet: SimulatedFleet, options: PolicyOptions, demand: Demand
) -> None:
    autoscaler = SimulatedAutoscaler(fleet, options)
    autoscaler.run(120, demand)
    del autoscaler.actions[:]
    autoscaler.run(60, demand)
    assert autoscaler.actions == []


@settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(fleets(), policies, st.lists(demands, min_size=2, max_size=4))
def test_no_slot_is_loaded_and_unloaded_within_a_cool_down(
    fleet: SimulatedFleet, options: PolicyOptions, loads: list[Demand]
) -> None:
    autoscaler = SimulatedAutoscaler(fleet, options)
    for demand in loads:
        autoscaler.run(15, demand)
    changed: dict[tuple[str, Slot], float] = {}
    for at, action, _ in autoscaler.actions:
        if isinstance(action, AddWorker | RemoveWorker):
            continue
        for slot in action.slots:
            key = (action.worker_id, slot)
            assert at - changed.get(key, -1e9) >= options.cool_down_s
            changed[key] = at


@settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(fleets(), st.booleans(), st.randoms(use_true_random=False), demands)
def test_no_slot_stays_without_a_replica_while_there_is_memory_for_one(
    fleet: SimulatedFleet, shadow_copies: bool, random: object, demand: Demand
) -> None:
    options = PolicyOptions(shadow_copies=shadow_copies, scale_workers=False)
    autoscaler = SimulatedAutoscaler(fleet, options)
    autoscaler.run(15, demand)
    while len(fleet.workers) > 1:
        names = sorted(fleet.workers)
        fleet.kill(names[random.randrange(len(names))])  # type: ignore[attr-defined]
        autoscaler.run(30, demand)
        capacity = sum(worker.capacity for worker in _all(fleet))
        held = {slot for worker in _all(fleet) for slot in worker.slots}
        assert len(held) == min(len(ALL), capacity)


@settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(fleets())
def test_with_memory_for_two_of_each_no_loss_leaves_an_expert_without_a_replica(
    fleet: SimulatedFleet,
) -> None:
    for worker in _all(fleet):
        worker.capacity = len(ALL)
    demand = even(num_layers=LAYERS, num_experts=EXPERTS, rows=8, steps_per_s=20)
    SimulatedAutoscaler(fleet, PolicyOptions()).run(30, demand)
    num_hosts = len({worker.host for worker in _all(fleet)})
    for slot in ALL:
        holders = fleet.holders(slot)
        assert len(holders) >= 2
        assert len({worker.host for worker in holders}) >= min(2, num_hosts)


def test_the_actions_of_a_simulation_are_of_all_four_kinds() -> None:
    """Guards the tests above against a simulation in which nothing happens."""
    fleet = SimulatedFleet()
    for index in range(2):
        slots = {(layer, e) for layer, e in ALL if e % 2 == index}
        fleet.add(f"w{index}", slots, capacity=len(slots) + 2)
    options = PolicyOptions(shadow_copies=False, max_workers=4, min_workers=2, idle_after_s=5)
    autoscaler = SimulatedAutoscaler(fleet, options)
    heavy = skewed(num_layers=2, num_experts=4, rows=256, hot_share=0.7, steps_per_s=120)
    autoscaler.run(60, heavy)
    autoscaler.run(60, even(num_layers=2, num_experts=4, rows=8, steps_per_s=5))
    kinds: set[type[Action]] = {type(action) for _, action, _ in autoscaler.actions}
    assert kinds == {LoadSlots, UnloadSlots, AddWorker, RemoveWorker}


def _all(fleet: SimulatedFleet) -> list:  # type: ignore[type-arg]
    return list(fleet.workers.values())
