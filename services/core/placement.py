"""How the experts of a model are spread over workers. Pure arithmetic."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from services.core.errors import ConfigurationError
from services.core.registry import Slot
from services.core.registry_json import format_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSlots:
    """What one worker holds: its `experts` in each of its `layers`."""

    experts: tuple[int, ...]
    layers: range

    def slots(self) -> frozenset[Slot]:
        return frozenset((layer, expert) for layer in self.layers for expert in self.experts)


def plan_placement(num_layers: int, num_experts: int, num_workers: int) -> tuple[WorkerSlots, ...]:
    """Give every (layer, expert) slot to exactly one of `num_workers` workers.

    Up to as many workers as experts, a worker has a run of experts in all layers. With more, an
    expert is shared by several workers, each with a run of its layers. Runs differ in length by
    at most one. Raises `ConfigurationError` where a worker would be left without a slot.
    """
    if not 1 <= num_workers <= num_layers * num_experts:
        raise ConfigurationError(
            f"{num_layers} layers of {num_experts} experts cannot be spread over {num_workers} "
            f"workers; choose 1 to {num_layers * num_experts} workers",
            setting="workers",
        )
    if num_workers <= num_experts:
        layers = range(num_layers)
        return tuple(
            WorkerSlots(experts=tuple(experts), layers=layers)
            for experts in _runs(num_experts, num_workers)
        )
    return tuple(
        WorkerSlots(experts=(expert,), layers=layers)
        for expert, sharers in enumerate(_runs(num_workers, num_experts))
        for layers in _runs(num_layers, len(sharers))
    )


def worker_threads(num_cores: int, num_workers: int) -> int:
    """Threads of each of so many workers that share a machine: twice their fair share of its cores,
    for seldom do all compute at once; at most one for each core."""
    fair_share = max(1, num_cores // max(1, num_workers))
    return min(num_cores, 2 * fair_share)


def format_slots(slots: Iterable[Slot]) -> str:
    """Slots as a worker's `--slots` takes them: layers, a colon and the experts of each of them,
    several of these joined by semicolons ("0-3:0,1;5:7")."""
    layers_of: defaultdict[int, set[int]] = defaultdict(set)
    for layer, expert in slots:
        layers_of[expert].add(layer)
    experts_of: defaultdict[str, list[int]] = defaultdict(list)
    for expert in sorted(layers_of):
        experts_of[format_ranges(layers_of[expert])].append(expert)
    return ";".join(f"{layers}:{format_ranges(of)}" for layers, of in experts_of.items())


def _runs(num_items: int, num_runs: int) -> list[range]:
    """0..num_items in consecutive runs whose lengths differ by at most one, longer ones first."""
    length, longer = divmod(num_items, num_runs)
    starts = [index * length + min(index, longer) for index in range(num_runs + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]
