"""Keeps what the gate chose in one micro-batch, for sequences whose choices are to be told."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from router_service.engine.step_timings import StepTimings, TimedExperts
from router_service.experts import ExpertBackend, StepContext, StepLayers


class RecordingExperts(TimedExperts):
    """The experts, and beside them the ids that each layer's gate handed over."""

    def __init__(
        self, experts: ExpertBackend, timings: StepTimings, on_dispatch: Callable[[], None]
    ) -> None:
        super().__init__(experts, timings, on_dispatch)
        self._topk_ids: list[torch.Tensor] = []

    async def forward(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        context: StepContext,
    ) -> torch.Tensor:
        self._topk_ids.append(topk_ids)
        return await super().forward(layer, hidden_states, topk_ids, topk_weights, context)

    async def forward_layers(
        self,
        first: int,
        layers: StepLayers,
        x: torch.Tensor,
        update: torch.Tensor,
        context: StepContext,
    ) -> None:
        """Each layer's ids are wanted here."""

    def choices(self) -> NDArray[np.uint8]:
        """uint8 [T, layers, K] of the batch's tokens, best first. After the whole forward pass."""
        chosen: NDArray[np.uint8] = (
            torch.stack(self._topk_ids, dim=1).to(device="cpu", dtype=torch.uint8).numpy()
        )
        return chosen
