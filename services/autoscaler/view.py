"""The fleet as the policy sees it: plain values, rates per second over the window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from services.core.expert_costs import ROWS_PER_READ
from services.core.registry import Slot

Phase = Literal["idle", "decode", "prefill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker.

    `host` and `device` name the memory it shares with others. `free_bytes` is what further slots
    may take, `slot_bytes` what one takes (0: unknown). `utilization` is the share of the window
    spent computing. `rows` and `activations` are expert rows and distinct (frame, expert) pairs per
    second and slot, `frames` those of all layers. `queue_ms` and `compute_ms` are means per frame.
    """

    worker_id: str
    host: str
    device: str
    started_at: float
    is_ready: bool
    slots: frozenset[Slot]
    slot_bytes: int
    free_bytes: int
    sampled_s: float = 0.0
    utilization: float = 0.0
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    frames: float = 0.0
    rows: Mapping[Slot, float] = field(default_factory=dict)
    activations: Mapping[Slot, float] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """Further slots that fit."""
        return self.free_bytes // self.slot_bytes if self.slot_bytes > 0 else 0

    @property
    def memory_pool(self) -> tuple[str, str]:
        return (self.host, self.device)

    @property
    def num_steps(self) -> float:
        """In the window, as frames of one layer."""
        num_layers = len({layer for layer, _ in self.slots})
        return self.frames * self.sampled_s / num_layers if num_layers else 0.0

    def costs(self, phase: Phase) -> Mapping[Slot, float]:
        """What each slot costs here, in units that compare within a phase.

        Decoding reads an expert's weights for a few rows, so it is activations that cost, and many
        rows of one expert on top of them; in prefill arithmetic on the rows takes the time.
        """
        if phase == "prefill":
            return self.rows
        rows = self.rows
        return {
            slot: count + rows.get(slot, 0.0) / ROWS_PER_READ
            for slot, count in self.activations.items()
        }


@dataclass(frozen=True)
class FleetView:
    """Workers by id; `workers` are those whose lease is alive.

    `saturation` is the mean share of their time that shards spend in full steps (a half full step
    counts half): about the demand as a share of what the fleet could do. `experts_share` is what of
    their steps shards wait for experts. None where no shard tells.
    """

    workers: Mapping[str, WorkerView]
    phase: Phase = "idle"
    saturation: float | None = None
    experts_share: float | None = None

    @cached_property
    def ready(self) -> Mapping[str, WorkerView]:
        return {name: worker for name, worker in self.workers.items() if worker.is_ready}

    @cached_property
    def holders(self) -> Mapping[Slot, frozenset[str]]:
        """Ready workers by slot."""
        found: dict[Slot, set[str]] = {}
        for name, worker in self.ready.items():
            for slot in worker.slots:
                found.setdefault(slot, set()).add(name)
        return {slot: frozenset(names) for slot, names in found.items()}

    @cached_property
    def mean_utilization(self) -> float:
        """Of the ready workers; 0 without any."""
        shares = [worker.utilization for worker in self.ready.values()]
        return math.fsum(shares) / len(shares) if shares else 0.0

    @cached_property
    def imbalance(self) -> float:
        """The busiest ready worker's utilisation over the mean; 1 when all are idle."""
        shares = [worker.utilization for worker in self.ready.values()]
        total = math.fsum(shares)
        return max(shares) * len(shares) / total if total > 0 else 1.0
