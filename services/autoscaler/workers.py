"""Whole workers: one more where memory does not help, one less where it is idle."""

from __future__ import annotations

import math
from collections.abc import Iterator

from services.autoscaler.plan import Plan
from services.autoscaler.view import WorkerView
from services.core.registry import Slot


def add_worker(plan: Plan) -> None:
    """Ask for a worker with the slots that would take an equal part of the load: where all are busy
    on average, or where one is and no memory was left for what would relieve it."""
    options = plan.options
    if plan.has_purpose("restore", "hot"):
        return
    measured = {name: worker.utilization for name, worker in plan.view.ready.items()}
    busiest = max(measured, key=lambda name: (measured[name], name))
    mean = math.fsum(measured.values()) / len(measured)
    is_short = plan.lacks_memory and measured[busiest] >= options.scale_out_utilization
    if mean < options.scale_out_utilization and not is_short:
        return
    waited_s = plan.held_for("saturated")
    num_workers, most = len(plan.view.workers), _most(plan)
    if waited_s < options.scale_out_after_s or num_workers >= most:
        return
    if not _may_scale(plan, options.scale_out_after_s):
        return
    slots = _slots_for_newcomer(plan)
    if not plan.may_ask_for_worker() or not slots:
        return
    worker = plan.view.ready[busiest]
    plan.add_worker(
        slots,
        f"for {waited_s:.0f} s workers were {mean:.0%} busy, {busiest} {measured[busiest]:.0%} "
        f"(frames wait {worker.queue_ms:.1f} ms for {worker.compute_ms:.1f} ms), and no replica in "
        f"memory at hand would help; worker {num_workers + 1} of at most {most}",
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
            f"for {idle_s:.0f} s the others would have been below "
            f"{options.scale_in_utilization:.0%} on average without it, and each of its slots has "
            "another replica",
        )


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
    """The slot of each layer with most load per replica, then the second of each, until as much
    load as an equal part would move over; at most as many slots as the largest worker holds."""
    loads, ready, holdings = plan.loads, plan.view.ready, plan.holdings
    wanted = math.fsum(loads.utilization.values()) / (len(ready) + 1)
    most = max(len(worker.slots) for worker in ready.values())
    share = {
        slot: loads.total(slot) / max(1, len(holdings.holders(slot))) for slot in plan.view.holders
    }
    of_layer: dict[int, list[Slot]] = {}
    for slot in sorted(share, key=lambda slot: (-share[slot], -loads.rows(slot), slot)):
        of_layer.setdefault(slot[0], []).append(slot)
    ranked = sorted(
        (rank, -share[slot], slot) for slots in of_layer.values() for rank, slot in enumerate(slots)
    )
    chosen: list[Slot] = []
    moved = 0.0
    for _, _, slot in ranked:
        if moved >= wanted or len(chosen) >= most:
            break
        num_replicas = len(holdings.holders(slot))
        if num_replicas < plan.options.max_replicas and share[slot] > 0:
            chosen.append(slot)
            moved += loads.total(slot) / (num_replicas + 1)
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
        others = [load for other, load in after.items() if other != name]
        mean = math.fsum(others) / len(others)
        if mean < options.scale_in_utilization and max(others) < options.scale_out_utilization:
            yield worker
