"""Whole workers: one more where memory does not help, one less where it is idle."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

from services.autoscaler.plan import Plan
from services.autoscaler.view import WorkerView
from services.core.registry import Slot

_PATIENCE = 5
"""So many times as long is waited where replicas in memory may still help."""
_NEWCOMER = ""
"""Stands for the worker that is yet to come."""


def add_worker(plan: Plan) -> None:
    """Ask for a worker with the slots that would take an equal part of the load: where the fleet is
    near its limit, or where one worker is and no memory was left for what would relieve it."""
    options = plan.options
    busiest = max(plan.view.ready.values(), key=lambda one: (one.utilization, one.worker_id))
    is_short = plan.lacks_memory and busiest.utilization >= options.scale_out_utilization
    saturation = _saturation(plan)
    if saturation < options.scale_out_utilization and not is_short:
        return
    waited_s = plan.held_for("saturated")
    is_being_helped = bool(plan.loading) or plan.has_purpose("restore", "hot")
    patience_s = options.scale_out_after_s * (_PATIENCE if is_being_helped else 1)
    num_workers, most = len(plan.view.workers), _most(plan)
    if waited_s < patience_s or num_workers >= most:
        return
    if not _may_scale(plan, options.scale_out_after_s):
        return
    slots = _slots_for_newcomer(plan)
    if not plan.may_ask_for_worker() or not slots:
        return
    plan.add_worker(
        slots,
        f"for {waited_s:.0f} s the fleet was {saturation:.0%} saturated or short of memory, "
        f"{busiest.worker_id} is {busiest.utilization:.0%} busy (frames wait "
        f"{busiest.queue_ms:.1f} ms for {busiest.compute_ms:.1f} ms), and no replica in memory at "
        f"hand would help; worker {num_workers + 1} of at most {most}",
    )


def remove_worker(plan: Plan) -> None:
    """Let go the newest worker that others can do without."""
    options = plan.options
    if len(plan.view.ready) <= _fewest(plan) or plan.state.awaited_since is not None:
        return
    spare = next(_spare_workers(plan), None)
    if spare is None:
        return
    idle_s = plan.held_for("spare", spare.worker_id)
    if idle_s >= options.idle_after_s and _may_scale(plan, options.scale_cool_down_s):
        plan.remove_worker(
            spare.worker_id,
            f"for {idle_s:.0f} s the fleet would have been less than "
            f"{options.scale_in_utilization:.0%} saturated without it, and each of its slots has "
            "another replica",
        )


def _saturation(plan: Plan) -> float:
    """The demand as a share of what the fleet could do; 0 where experts are too small a part of a
    step for more of them to help."""
    view = plan.view
    if view.saturation is None:
        return view.mean_utilization
    is_theirs = (view.experts_share or 0.0) >= plan.options.min_experts_share
    return view.saturation if is_theirs else 0.0


def _saturation_after(plan: Plan, after: Mapping[str, float]) -> float:
    """With workers as busy as `after` tells: a layer's experts take as long as the busiest worker
    with them, the rest of a step as before."""
    view = plan.view
    if view.saturation is None:
        return max(after.values())
    before = max(plan.loads.utilization.values())
    longer = max(after.values()) / before if before > 0 else 1.0
    return view.saturation * (1 + (view.experts_share or 0.0) * (longer - 1))


def _fewest(plan: Plan) -> int:
    return plan.options.min_workers or plan.state.first_num_workers


def _most(plan: Plan) -> int:
    return plan.options.max_workers or max(_fewest(plan), plan.state.first_num_workers)


def _may_scale(plan: Plan, rest_s: float) -> bool:
    """Whether nobody is awaited, and the last step was at least `rest_s` ago."""
    state = plan.state
    is_resting = state.scaled_at is not None and plan.now - state.scaled_at < rest_s
    return state.awaited_since is None and not is_resting


def _slots_for_newcomer(plan: Plan) -> tuple[Slot, ...]:
    """From each layer in turn the costliest slot of the worker that is busiest in it, as long as
    that makes the layer's slowest worker faster; at most as many as the largest worker holds."""
    loads = plan.loads.with_newcomer(_NEWCOMER)
    most = max(len(worker.slots) for worker in plan.view.ready.values())
    chosen: set[Slot] = set()
    layers = deque(loads.layers)
    while layers and len(chosen) < most:
        layer = layers.popleft()
        in_layer = loads.in_layer(layer)
        busiest = max(in_layer, key=lambda name: (in_layer[name], name))
        candidates = [
            (load, loads.rows(slot), slot)
            for slot in plan.view.holders
            if slot[0] == layer
            and slot not in chosen
            and (load := loads.of_slot(slot).get(busiest, 0.0)) > 0
            and len(loads.of_slot(slot)) < plan.options.max_replicas
        ]
        if not candidates:
            continue
        slot = max(candidates)[2]
        if max(loads.with_replica(slot, _NEWCOMER).values()) < in_layer[busiest]:
            loads.replicate(slot, _NEWCOMER)
            chosen.add(slot)
            layers.append(layer)
    return tuple(sorted(chosen))


def _spare_workers(plan: Plan) -> Iterator[WorkerView]:
    """Workers whose slots all have enough other replicas and whose load the others can take over,
    the newest first."""
    options, holdings = plan.options, plan.holdings
    for worker in sorted(plan.view.ready.values(), key=lambda w: (-w.started_at, w.worker_id)):
        name = worker.worker_id
        is_replaceable = plan.may_touch(name) and all(
            holdings.num_elsewhere(name, slot) >= options.min_replicas for slot in worker.slots
        )
        if not is_replaceable:
            continue
        after = plan.loads.without([(name, slot) for slot in worker.slots]).utilization
        others = {other: load for other, load in after.items() if other != name}
        if _saturation_after(plan, others) < options.scale_in_utilization:
            yield worker
