"""All experts in this process: `--no-workers`, and the oracle that dispatch is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from opentelemetry.trace import NoOpTracer, Tracer
from prometheus_client import CollectorRegistry
from torch import Tensor

from router_service.dispatch.dispatch_plan import all_assignments, group_by_expert
from router_service.dispatch.dispatch_telemetry import layer_span
from router_service.dispatch.expert_load import ExpertLoad
from router_service.experts import StepContext
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.expert_ffn import PackedExpert, computed_digest, moe_forward, weight_format
from services.core.registry import Slot


class LocalExperts:
    """An `ExpertBackend` that computes where it is called; its coroutines never wait."""

    def __init__(
        self,
        layers: Sequence[Mapping[int, PackedExpert]],
        digests: Mapping[Slot, bytes],
        *,
        tracer: Tracer | None = None,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        """`layers` has all of the model's experts, `digests` is of their weights as computed."""
        self._layers = layers
        self._digests = digests
        self._num_experts = len(layers[0])
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
        tracer: Tracer | None = None,
        metrics: CollectorRegistry | None = None,
        on_layer: Callable[[int, int], None] | None = None,
    ) -> LocalExperts:
        """Read and pack every expert; `on_layer(done, total)` is told of progress.

        Raises `CheckpointError` naming file and tensor.
        """
        config = checkpoint.config
        num_layers, num_experts = config.num_hidden_layers, config.num_local_experts
        slots = [(layer, expert) for layer in range(num_layers) for expert in range(num_experts)]
        checkpoint.require(slots=slots, non_expert=False)
        layers: list[dict[int, PackedExpert]] = []
        for layer in range(num_layers):
            layers.append(
                {
                    expert: PackedExpert(
                        checkpoint.expert(layer, expert),
                        dtype=dtype,
                        device=device,
                        hidden_act=config.hidden_act,
                    )
                    for expert in range(num_experts)
                }
            )
            if on_layer is not None:
                on_layer(layer + 1, num_layers)
        held_as = weight_format(dtype)
        digests = {slot: computed_digest(checkpoint.slot_digest(*slot), held_as) for slot in slots}
        return cls(layers, digests, tracer=tracer, metrics=metrics)

    async def forward(
        self,
        layer: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        context: StepContext,
    ) -> Tensor:
        gated = group_by_expert(topk_ids.cpu(), topk_weights.cpu(), self._num_experts)
        self._load.add(layer, gated.rows_per_expert)
        with layer_span(self._tracer, layer, gated, context):
            assignments = all_assignments(gated).to(hidden_states.device)
            return moe_forward(self._layers[layer], hidden_states, assignments, combine=True)

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
