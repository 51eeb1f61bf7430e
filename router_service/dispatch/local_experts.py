"""All experts in this process: `--no-workers`, and the oracle that dispatch is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from opentelemetry.trace import NoOpTracer, Tracer
from prometheus_client import CollectorRegistry
from torch import Tensor

from router_service.dispatch.dispatch_plan import GatedTokens, all_assignments, group_by_expert
from router_service.dispatch.dispatch_telemetry import record_layer
from router_service.dispatch.dispatch_timings import DispatchTimings
from router_service.dispatch.expert_load import ExpertLoad
from router_service.experts import StepContext
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.expert_ffn import (
    Assignments,
    PackedExpert,
    computed_digest,
    moe_forward,
)
from services.core.kernels.moe import NativeLayer
from services.core.quantization.formats import WeightsSetting, chosen_format
from services.core.quantization.quantized_rows import stored_format
from services.core.registry import Slot
from services.core.settings import WireDTypeName
from services.core.wire_dtype import WireFormat


class LocalExperts:
    """An `ExpertBackend` that computes where it is called; its coroutines never wait."""

    def __init__(
        self,
        layers: Sequence[Mapping[int, PackedExpert]],
        digests: Mapping[Slot, bytes],
        *,
        wire_format: WireFormat | None = None,
        tracer: Tracer | None = None,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        """`layers` has all of the model's experts, `digests` is of their weights as computed.

        `wire_format`: round rows as that wire would.
        """
        self._layers = layers
        self._native_layers = [_native_layer(experts) for experts in layers]
        self._digests = digests
        self._num_experts = len(layers[0])
        self._wire_format = wire_format
        self._timings = DispatchTimings()
        self._tracer = tracer or NoOpTracer()
        self._load = ExpertLoad(len(layers), self._num_experts)
        self._load.export(metrics)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        wire_dtype: WireDTypeName = "auto",
        expert_weights: WeightsSetting = "auto",
        tracer: Tracer | None = None,
        metrics: CollectorRegistry | None = None,
        on_layer: Callable[[int, int], None] | None = None,
    ) -> LocalExperts:
        """Read and pack every expert; `on_layer(done, total)` is told of progress.

        `expert_weights` says what they are held as; auto: as they are stored.

        With a `wire_dtype` other than auto, rows are rounded as on the way to workers and back.

        Raises `CheckpointError` naming file and tensor, `ConfigurationError` where `wire_dtype`
        does not go with `dtype`.
        """
        config = checkpoint.config
        num_layers, num_experts = config.num_hidden_layers, config.num_local_experts
        slots = [(layer, expert) for layer in range(num_layers) for expert in range(num_experts)]
        checkpoint.require(slots=slots, non_expert=False)
        layers: list[dict[int, PackedExpert]] = []
        for layer in range(num_layers):
            layers.append({})
            for expert in range(num_experts):
                weights = checkpoint.expert_rows(layer, expert)
                layers[layer][expert] = PackedExpert(
                    weights,
                    dtype=dtype,
                    device=device,
                    hidden_act=config.hidden_act,
                    quantized=chosen_format(expert_weights, stored_format(weights.w1)),
                )
            if on_layer is not None:
                on_layer(layer + 1, num_layers)
        digests = {
            (layer, expert): computed_digest(
                checkpoint.slot_digest(layer, expert), layers[layer][expert].weight_format
            )
            for layer, expert in slots
        }
        wire_format = None if wire_dtype == "auto" else WireFormat.of(wire_dtype, dtype)
        return cls(layers, digests, wire_format=wire_format, tracer=tracer, metrics=metrics)

    async def forward(
        self,
        layer: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        context: StepContext,
    ) -> Tensor:
        started_ns = time.perf_counter_ns()
        native = self._native_layers[layer]
        if native is not None and self._wire_format is None:
            output, rows_per_expert = native.forward(hidden_states, topk_ids, topk_weights)
        else:
            gated = self._grouped(topk_ids, topk_weights)
            rows_per_expert = gated.rows_per_expert
            assignments = all_assignments(gated).to(hidden_states.device)
            output = self._compute(layer, hidden_states, assignments)
        self._load.add(layer, rows_per_expert)
        ended_ns = time.perf_counter_ns()
        self._timings.num_calls += 1
        self._timings.expert_ns += ended_ns - started_ns
        if context.trace is not None:
            trace = context.trace
            trace.later(
                lambda: record_layer(
                    self._tracer,
                    trace,
                    layer,
                    self._grouped(topk_ids, topk_weights),
                    started_ns=started_ns,
                    ended_ns=ended_ns,
                )
            )
        return output

    def take_timings(self) -> DispatchTimings:
        """Where the time of layer calls went since the last call of this; all of it is experts'."""
        return self._timings.take()

    def _grouped(self, topk_ids: Tensor, topk_weights: Tensor) -> GatedTokens:
        return group_by_expert(topk_ids.cpu(), topk_weights.cpu(), self._num_experts)

    def _compute(self, layer: int, hidden_states: Tensor, assignments: Assignments) -> Tensor:
        experts, wire_format = self._layers[layer], self._wire_format
        if wire_format is None:
            return moe_forward(experts, hidden_states, assignments, combine=True)
        received = wire_format.received(hidden_states)
        if not wire_format.narrows_answers:
            return moe_forward(experts, received, assignments, combine=True)
        # Answered rows are in the activation dtype again; the dispatcher adds them in this order.
        rows = wire_format.answered(moe_forward(experts, received, assignments, combine=False))
        return torch.zeros_like(hidden_states).index_add_(0, assignments.token_rows, rows)

    async def wait_ready(self) -> None:
        return

    def check_ready(self) -> None:
        return

    def slot_digests(self) -> Mapping[Slot, bytes]:
        return self._digests

    def expert_load(self) -> NDArray[np.int64]:
        """Assignments since start, int64 [layers, experts]."""
        return self._load.counts()

    async def close(self) -> None:
        return


def _native_layer(experts: Mapping[int, PackedExpert]) -> NativeLayer | None:
    native = [experts[expert].native for expert in range(len(experts))]
    found = [expert for expert in native if expert is not None]
    return NativeLayer(found) if found and len(found) == len(native) else None
