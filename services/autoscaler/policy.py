"""The policy: a pure function from what is seen and remembered to what is to be done.

One round goes from the urgent to the thrifty: slots without any replica, more room for hot slots,
more or fewer workers, shadow copies from spare memory, and giving back. All parts add to one
`Plan`, so a round as a whole keeps to memory and never takes a last replica.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import replace

from services.autoscaler import copies, give_back, heat, workers
from services.autoscaler.actions import Action, Planned, RemoveWorker
from services.autoscaler.options import PolicyOptions
from services.autoscaler.plan import Plan
from services.autoscaler.state import BaseSlots, PolicyState
from services.autoscaler.view import FleetView
from services.core.registry import Slot

_LEAVING_S = 60.0
"""How long a worker that was told to end is taken for gone while its lease lives on."""
_REMEMBER_S = 300.0
"""How long what a vanished worker came with is kept, for when its lease comes back."""


def decide(
    options: PolicyOptions,
    state: PolicyState,
    view: FleetView,
    now: float,
    *,
    in_flight: Iterable[Action] = (),
    untouchable: frozenset[str] = frozenset(),
    refused: frozenset[Slot] = frozenset(),
) -> tuple[tuple[Planned, ...], PolicyState]:
    """What to do at `now` (seconds, only growing), and what to remember.

    `in_flight` are actions still under way. Nothing is asked of workers in `untouchable` (an empty
    name there: no further worker is asked for), and slots in `refused` are not asked for: the model
    has no such slot. Without a ready worker nothing is decided.
    """
    state = _remember(options, state, view, now, refused)
    in_flight = list(in_flight)
    gone = {one.worker_id for one in in_flight if isinstance(one, RemoveWorker)}
    view = _without(view, gone | state.leaving_since.keys())
    if not view.ready:
        return (), state
    plan = Plan(options, state, view, now, in_flight=in_flight, untouchable=untouchable)
    copies.restore(plan)
    heat.level_layers(plan)
    heat.level_workers(plan)
    if options.scale_workers:
        workers.add_worker(plan)
        workers.remove_worker(plan)
    copies.protect(plan)
    give_back.give_back(plan)
    return plan.actions(), plan.next_state()


def _remember(
    options: PolicyOptions,
    state: PolicyState,
    view: FleetView,
    now: float,
    refused: frozenset[Slot],
) -> PolicyState:
    base = {name: known for name, known in state.base.items() if now - known.seen_at < _REMEMBER_S}
    for name, worker in view.ready.items():
        known = base.get(name)
        if known is None or known.started_at != worker.started_at:
            known = BaseSlots(started_at=worker.started_at, slots=worker.slots, seen_at=now)
        base[name] = replace(known, seen_at=now)
    newcomers = view.ready.keys() - state.seen_workers
    awaited_since = state.awaited_since
    if awaited_since is not None and (
        newcomers or now - awaited_since >= options.worker_start_timeout_s
    ):
        awaited_since = None
    joined_at = now if newcomers and state.seen_workers else state.joined_at
    leaving = {
        name: at
        for name, at in state.leaving_since.items()
        if name in view.workers and now - at < _LEAVING_S
    }
    cooling = {slot: at for slot, at in state.changed_at.items() if now - at < options.cool_down_s}
    return replace(
        state,
        known=(state.known | view.holders.keys()) - refused,
        base=base,
        changed_at=cooling,
        awaited_since=awaited_since,
        joined_at=joined_at,
        leaving_since=leaving,
        seen_workers=state.seen_workers | view.ready.keys(),
        first_num_workers=state.first_num_workers or len(view.workers),
    )


def _without(view: FleetView, leaving: Set[str]) -> FleetView:
    """Workers that were told to end count as gone, though their leases live on for a while."""
    staying = {
        name: replace(worker, is_ready=worker.is_ready and name not in leaving)
        for name, worker in view.workers.items()
    }
    return replace(view, workers=staying)
