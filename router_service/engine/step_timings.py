"""Where the time of steps goes, measured by a few clock readings per layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import torch

from router_service.dispatch.dispatch_timings import DispatchTimings
from router_service.experts import (
    ExpertBackend,
    LayersDone,
    RunsLayers,
    StepContext,
    StepLayers,
)


@dataclass(slots=True, kw_only=True)
class StepTimings:
    """Seconds on the engine's thread, summed over steps.

    Between two awaits a micro-batch runs alone, so all but `experts_s` are what the thread itself
    was busy with, however many micro-batches there were. `attention_s` is embedding, attention,
    norms and gate; `head_s` the last norm and the lm_head. `experts_s` is the rest of the forward
    pass: packing, wire, queueing, expert compute and combining, as far as no other micro-batch's
    attention hid it. `emit_s` is taking in the tokens: bookkeeping, publishing blocks and deltas;
    waking the callers is part of it only where nothing could hide it. `full_s` is `step_s` with
    every step weighted by its fill, see `StepFill`.

    `pack_s` to `combine_s` are the experts' own account of their layer calls, see
    `DispatchTimings`; calls of several micro-batches overlap, so that they may add up to more than
    `experts_s`.
    """

    num_steps: int = 0
    num_micro_batches: int = 0
    num_tokens: int = 0
    step_s: float = 0.0
    full_s: float = 0.0
    schedule_s: float = 0.0
    prepare_s: float = 0.0
    attention_s: float = 0.0
    head_s: float = 0.0
    sample_s: float = 0.0
    emit_s: float = 0.0
    pack_s: float = 0.0
    wire_s: float = 0.0
    queue_s: float = 0.0
    expert_s: float = 0.0
    combine_s: float = 0.0

    @property
    def experts_s(self) -> float:
        own_s = self.schedule_s + self.prepare_s + self.shard_s + self.emit_s
        return max(0.0, self.step_s - own_s)

    @property
    def shard_s(self) -> float:
        """What the thread computes however often a step is split."""
        return self.attention_s + self.head_s + self.sample_s

    def parts(self) -> dict[str, float]:
        """Seconds by part; together they are `step_s`."""
        return {
            "schedule": self.schedule_s,
            "prepare": self.prepare_s,
            "attention": self.attention_s,
            "experts": self.experts_s,
            "head": self.head_s,
            "sample": self.sample_s,
            "emit": self.emit_s,
        }

    def calls(self) -> dict[str, float]:
        """Seconds of layer calls by part."""
        return {
            "pack": self.pack_s,
            "wire": self.wire_s,
            "queue": self.queue_s,
            "expert": self.expert_s,
            "combine": self.combine_s,
        }

    def add_calls(self, calls: DispatchTimings) -> None:
        self.pack_s += calls.pack_ns * 1e-9
        self.wire_s += calls.wire_ns * 1e-9
        self.queue_s += calls.queue_ns * 1e-9
        self.expert_s += calls.expert_ns * 1e-9
        self.combine_s += calls.combine_ns * 1e-9

    def add(self, other: StepTimings) -> None:
        for name in _NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def since(self, earlier: StepTimings) -> StepTimings:
        """What was added after `earlier` was copied from these sums."""
        return StepTimings(**{n: getattr(self, n) - getattr(earlier, n) for n in _NAMES})


_NAMES = tuple(field.name for field in fields(StepTimings))


@runtime_checkable
class TimesItsCalls(Protocol):
    """Experts that keep account of their layer calls."""

    def take_timings(self) -> DispatchTimings:
        """Since the last call of this, which the engine makes after every step."""
        ...


class TimedExperts:
    """The experts as one micro-batch of one step sees them; adds to the step's `timings`.

    `on_dispatch` is called before the layers' rows are handed over. `finish_forward` must be
    called when the forward pass has returned.
    """

    def __init__(
        self, experts: ExpertBackend, timings: StepTimings, on_dispatch: Callable[[], None]
    ) -> None:
        self._experts = experts
        self._timings = timings
        self._on_dispatch = on_dispatch
        self._resumed_at = time.perf_counter()

    async def forward(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        context: StepContext,
    ) -> torch.Tensor:
        self._timings.attention_s += time.perf_counter() - self._resumed_at
        self._on_dispatch()
        try:
            return await self._experts.forward(
                layer, hidden_states, topk_ids, topk_weights, context
            )
        finally:
            self._resumed_at = time.perf_counter()

    async def forward_layers(
        self,
        first: int,
        layers: StepLayers,
        x: torch.Tensor,
        update: torch.Tensor,
        context: StepContext,
    ) -> LayersDone | None:
        if not isinstance(self._experts, RunsLayers):
            return None
        self._timings.attention_s += time.perf_counter() - self._resumed_at
        try:
            done = await self._experts.forward_layers(first, layers, x, update, context)
        finally:
            self._resumed_at = time.perf_counter()
        if done is not None:
            self._timings.attention_s += done.attention_s
        return done

    def finish_forward(self) -> None:
        self._timings.head_s += time.perf_counter() - self._resumed_at

    async def wait_ready(self) -> None:
        await self._experts.wait_ready()

    def check_ready(self) -> None:
        self._experts.check_ready()

    def slot_digests(self) -> Mapping[tuple[int, int], bytes]:
        return self._experts.slot_digests()

    async def close(self) -> None:
        await self._experts.close()
