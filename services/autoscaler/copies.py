"""Replicas for safety: slots without any, and shadow copies of the least protected."""

from __future__ import annotations

from services.autoscaler.plan import Plan
from services.core.registry import Slot


def restore(plan: Plan) -> None:
    """Load what no ready worker holds any more, at once, where memory is or can be made.

    This alone overrides the cool-down: no answer is possible without the slot.
    """
    for slot in sorted(plan.state.known):
        if plan.holdings.holders(slot):
            continue
        waited_s = plan.held_for("orphan", slot)
        if waited_s < plan.options.restore_after_s:
            continue
        why = f"no worker holds layer {slot[0]} expert {slot[1]} since {waited_s:.1f} s"
        for name in _by_room(plan, slot):
            if plan.make_room(
                name,
                lambda name, copy: _cost_of_loss(plan, name, copy),
                f"a copy that exists elsewhere gives way: {why}",
            ):
                plan.load(name, slot, "restore", why)
                break


def protect(plan: Plan) -> None:
    """Use spare memory for second copies, on other hosts than the first where there are any."""
    options = plan.options
    num_hosts = len(plan.hosts(plan.view.ready))
    exposed: dict[Slot, tuple[int, int]] = {}
    for slot in sorted(plan.state.known):
        holders = plan.holdings.holders(slot)
        spread = len(plan.hosts(holders))
        lacks_host = options.shadow_copies and spread < min(2, num_hosts)
        is_short = len(holders) < options.wanted_copies
        may_have_more = is_short or (lacks_host and len(holders) < options.max_replicas)
        if (
            holders
            and may_have_more
            and plan.held_for("exposed", slot) >= options.protect_after_s
            and not plan.is_cooling(slot)
        ):
            exposed[slot] = (len(holders), spread)
    for slot in sorted(exposed, key=lambda slot: (exposed[slot], slot)):
        _protect_one(plan, slot, is_short=exposed[slot][0] < options.wanted_copies)


def _protect_one(plan: Plan, slot: Slot, *, is_short: bool) -> None:
    holders = plan.holdings.holders(slot)
    hosts = plan.hosts(holders)
    for name in _by_room(plan, slot):
        is_elsewhere = plan.view.ready[name].host not in hosts
        if not plan.holdings.has_room(name) or not (is_short or is_elsewhere):
            continue
        what = f"layer {slot[0]} expert {slot[1]} is held by {', '.join(sorted(holders))} alone"
        if not is_short:
            what = f"all replicas of layer {slot[0]} expert {slot[1]} are on host {min(hosts)}"
        plan.load(name, slot, "protect", f"{what}; {name} has memory for a shadow copy")
        return


def _cost_of_loss(plan: Plan, worker_id: str, slot: Slot) -> tuple[float, ...]:
    """Extras go first, then slots with many replicas, then those with little to do."""
    num_elsewhere = plan.holdings.num_elsewhere(worker_id, slot)
    is_base = not plan.is_extra(worker_id, slot)
    return (float(is_base), -float(num_elsewhere), plan.loads.total(slot))


def _by_room(plan: Plan, slot: Slot) -> list[str]:
    """Workers that could take the slot: with room first, then on other hosts than its replicas,
    then those with the fewest copies so far, so that they spread."""
    hosts = plan.hosts(plan.holdings.holders(slot))

    def key(name: str) -> tuple[bool, bool, int, float, str]:
        has_room = plan.holdings.has_room(name)
        in_layer = plan.loads.in_layer(slot[0]).get(name, 0.0)
        host = plan.view.ready[name].host
        return (not has_room, host in hosts, plan.num_extras(name), in_layer, name)

    return sorted((name for name in plan.view.ready if plan.can_load(name, slot)), key=key)
