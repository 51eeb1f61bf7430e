"""What the policy can ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from services.core.registry import Slot
from services.core.registry_json import format_ranges

Purpose = Literal["restore", "hot", "protect", "evict", "give_back", "scale_out", "scale_in"]
"""restore: a slot without a replica; hot: more room for a hot slot; protect: a shadow copy; evict:
a shadow copy gives way; give_back: a replica that is needed no more; scale_*: whole workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSlots:
    worker_id: str
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadSlots:
    worker_id: str
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AddWorker:
    """A further worker that holds at least `slots`."""

    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveWorker:
    """Drain this worker and end it."""

    worker_id: str


Action = LoadSlots | UnloadSlots | AddWorker | RemoveWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One action with why it is taken, in words."""

    action: Action
    purpose: Purpose
    reason: str


def target(action: Action) -> str:
    """The worker an action is about; empty for a worker that is yet to come."""
    return "" if isinstance(action, AddWorker) else action.worker_id


def slots_of(action: Action) -> tuple[Slot, ...]:
    return () if isinstance(action, RemoveWorker) else action.slots


def describe(action: Action) -> str:
    """ "load 0-3:1 on worker-2" and the like."""
    match action:
        case LoadSlots():
            return f"load {format_slots(action.slots)} on {action.worker_id}"
        case UnloadSlots():
            return f"unload {format_slots(action.slots)} from {action.worker_id}"
        case AddWorker():
            return f"add a worker with {format_slots(action.slots)}"
        case RemoveWorker():
            return f"remove {action.worker_id}"


def format_slots(slots: tuple[Slot, ...]) -> str:
    """Layers and experts, such as "0-3:0,1;5:7"; slots of the same layers are put together."""
    layers_of: dict[int, list[int]] = {}
    for layer, expert in slots:
        layers_of.setdefault(expert, []).append(layer)
    experts_of: dict[str, list[int]] = {}
    for expert in sorted(layers_of):
        experts_of.setdefault(format_ranges(layers_of[expert]), []).append(expert)
    return ";".join(f"{layers}:{format_ranges(them)}" for layers, them in experts_of.items())
