"""Fewer replicas where the load has gone."""

from __future__ import annotations

from collections.abc import Sequence

from services.autoscaler.plan import Plan
from services.core.registry import Slot

Copy = tuple[str, Slot]
"""(worker id, slot)"""


def give_back(plan: Plan) -> None:
    """Unload extras that their layer has been level without for a while.

    The copies of a layer may balance each other, so that it is level without all of them and not
    without any one: all are tried together first, then one after the other. What workers came with
    stays.
    """
    copies_of: dict[int, list[Copy]] = {}
    for slot in sorted(plan.state.known):
        copies_of.setdefault(slot[0], []).extend((name, slot) for name in _surplus(plan, slot))
    for layer, copies in copies_of.items():
        if not copies:
            continue
        together = _is_level_without(plan, layer, copies)
        groups = [copies] if together else [[one] for one in copies]
        for group in groups:
            if not together and not _is_level_without(plan, layer, group):
                continue
            waited_s = min([plan.held_for("idle", *one) for one in group])
            is_cooling = any(plan.is_cooling(slot) for slot in plan.state.known if slot[0] == layer)
            if waited_s >= plan.options.idle_after_s and not is_cooling:
                _unload(plan, group, waited_s)


def _unload(plan: Plan, copies: Sequence[Copy], waited_s: float) -> None:
    for name, slot in copies:
        if not plan.can_unload(name, slot):
            continue
        why = (
            f"for {waited_s:.0f} s layer {slot[0]} would have been level without the replica of "
            f"expert {slot[1]} on {name}, one of {len(plan.holdings.holders(slot))}"
        )
        plan.unload(name, slot, "give_back", why)


def _surplus(plan: Plan, slot: Slot) -> list[str]:
    """Workers with an extra replica that is more than the slot needs for safety: first those whose
    loss leaves replicas on most hosts, then those on busy workers."""
    holders = plan.holdings.holders(slot)
    num_hosts = min(2 if plan.options.shadow_copies else 1, len(plan.hosts(holders)))
    extras = {name for name in holders if plan.is_extra(name, slot) and plan.can_unload(name, slot)}
    chosen: list[str] = []
    while extras and len(holders) > plan.options.wanted_copies:
        name = min(
            sorted(extras),
            key=lambda name: (
                -len(plan.hosts(holders - {name})),
                -plan.loads.utilization[name],
            ),
        )
        if len(plan.hosts(holders - {name})) < num_hosts:
            break
        extras.discard(name)
        holders -= {name}
        chosen.append(name)
    return chosen


def _is_level_without(plan: Plan, layer: int, copies: Sequence[Copy]) -> bool:
    """Whether nobody would be slow in this layer, or busy, or all have next to nothing to do."""
    options = plan.options
    after = plan.loads.without(copies)
    floor = options.min_utilization * options.cool_ratio / options.hot_ratio
    return all(
        after.utilization[name] < floor
        or (
            after.utilization[name] < options.scale_in_utilization
            and after.ratio(layer, name) <= options.cool_ratio
        )
        for name in after.in_layer(layer)
    )
