"""More replicas for hot slots."""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.autoscaler.plan import Plan
from services.core.registry import Slot

_CANDIDATE_SLOTS = 4
"""Costliest slots of a hot worker that are tried."""
_REPLICAS_PER_LAYER = 4
"""New replicas in one layer in one round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    slot: Slot
    to: str
    load_after: float


def level_layers(plan: Plan) -> None:
    """Share the costliest slots of workers that are slower in a layer than the others."""
    if plan.is_settling:
        return
    options, loads = plan.options, plan.loads
    hot = [
        (layer, name)
        for layer in loads.layers
        for name in loads.in_layer(layer)
        if _is_hot(plan, layer, name) and plan.held_for("hot", layer, name) >= options.hot_after_s
    ]
    hot.sort(key=lambda key: (-loads.in_layer(key[0])[key[1]], key))
    for layer, name in hot:
        for _ in range(_REPLICAS_PER_LAYER):
            if loads.ratio(layer, name) <= options.hot_ratio or not _relieve(plan, layer, name):
                break


def level_workers(plan: Plan) -> None:
    """Share slots of a worker near its limit, whatever their layer, with the least busy ones: for
    where no layer stands out, but the sum of all does."""
    if plan.is_settling or plan.has_purpose("hot", "restore"):
        return
    loads = plan.loads
    for _ in range(plan.options.max_slots_per_action):
        busiest = loads.busiest
        before = loads.utilization[busiest]
        slot = _costliest(plan, busiest)
        if before < plan.options.scale_out_utilization or slot is None or busiest in plan.loading:
            return
        takers = [
            name
            for name in loads.utilization
            if plan.can_load(name, slot)
            and loads.are_uneven(busiest, name)
            and loads.utilization[name] + loads.new_share(slot, name)
            < before / plan.options.cool_ratio
        ]
        with_room = [name for name in takers if plan.holdings.has_room(name)]
        if not with_room:
            plan.lacks_memory |= bool(takers)
            return
        to = min(with_room, key=lambda name: (loads.utilization[name], name))
        why = (
            f"{busiest} is {before:.0%} busy and {to} {loads.utilization[to]:.0%}; layer {slot[0]} "
            f"expert {slot[1]} is of those that cost it most"
        )
        plan.load(to, slot, "hot", why)


def _is_hot(plan: Plan, layer: int, name: str) -> bool:
    loads = plan.loads
    return (
        name not in plan.loading
        and loads.utilization[name] >= plan.options.min_utilization
        and loads.ratio(layer, name) > plan.options.hot_ratio
        and loads.is_significant(layer, name)
    )


def _relieve(plan: Plan, layer: int, hot_worker: str) -> bool:
    """One further replica of one slot of this worker; false if none would help or fits."""
    loads = plan.loads
    before = loads.in_layer(layer)[hot_worker]
    ratio = loads.ratio(layer, hot_worker)
    for move in _moves(plan, layer, hot_worker):
        if move.load_after > (1 - plan.options.min_gain) * before:
            return False
        expert = move.slot[1]
        gain = loads.spared_by_one_more(move.slot)
        why = (
            f"{hot_worker} has {_times(ratio)} the load of the others in layer {layer} "
            f"({plan.view.phase}); expert {expert} gets {loads.rows(move.slot):.0f} "
            f"rows/s, and a replica on {move.to} would bring the most loaded from "
            f"{before:.1%} to {move.load_after:.1%} of a worker's time"
        )
        if plan.make_room(
            move.to,
            lambda name, copy, gain=gain: _cost_of_loss(plan, name, copy, gain=gain),  # type: ignore[misc]
            f"a copy with less to do gives way to hot layer {layer} expert {expert}",
        ):
            plan.load(move.to, move.slot, "hot", why)
            return True
        plan.lacks_memory = True
    return False


def _moves(plan: Plan, layer: int, hot_worker: str) -> list[_Move]:
    """What could be replicated where, the best first: the lowest load of those concerned, then
    the slot with most rows, then a host that has no replica of it, then most memory."""
    loads, holdings = plan.loads, plan.holdings
    slots = [slot for slot in _replicable(plan, hot_worker) if slot[0] == layer]
    found: list[tuple[tuple[float, float, bool, int, str], _Move]] = []
    for slot in slots[:_CANDIDATE_SLOTS]:
        hosts = plan.hosts(holdings.holders(slot))
        for name, worker in plan.view.ready.items():
            if not plan.can_load(name, slot):
                continue
            after = max(loads.with_replica(slot, name).values())
            move = _Move(slot=slot, to=name, load_after=after)
            key = (round(after, 4), -loads.rows(slot), worker.host in hosts)
            found.append(((*key, -holdings.free_bytes(name), name), move))
    return [move for _, move in sorted(found, key=lambda item: item[0])]


def _costliest(plan: Plan, worker_id: str) -> Slot | None:
    return next(iter(_replicable(plan, worker_id)), None)


def _replicable(plan: Plan, worker_id: str) -> list[Slot]:
    """Slots of this worker with something to do that may have a replica more, the costliest
    first."""
    costs = {
        slot: plan.loads.of_slot(slot).get(worker_id, 0.0) for slot in plan.holdings.of(worker_id)
    }
    slots = [
        slot
        for slot, cost in costs.items()
        if cost > 0
        and not plan.is_cooling(slot)
        and len(plan.holdings.holders(slot)) < plan.options.max_replicas
    ]
    return sorted(slots, key=lambda slot: (-costs[slot], -plan.loads.rows(slot), slot))


def _cost_of_loss(
    plan: Plan, worker_id: str, slot: Slot, *, gain: float
) -> tuple[float, ...] | None:
    """What giving this copy up costs; None where it must stay: it has just come, the slot would
    have too few, or what the others would have more to do is not clearly less than `gain`."""
    cost = plan.loads.added_by_one_less(slot)
    has_enough = plan.holdings.num_elsewhere(worker_id, slot) >= plan.options.min_replicas
    is_dear = cost > 0 and cost * plan.options.hot_ratio >= gain
    if plan.is_cooling(slot) or not has_enough or is_dear:
        return None
    return (cost, float(not plan.is_extra(worker_id, slot)))


def _times(ratio: float) -> str:
    return "all" if math.isinf(ratio) else f"{ratio:.1f} times"
