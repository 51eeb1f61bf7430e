"""The seam between the decoder and its experts: in process, or dispatched over the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What travels with one micro-batch of one step through the layers.

    `micro_batch` picks the stream to each worker. `trace_context` is the W3C carrier of the
    step's span when this step is sampled, else empty.
    """

    step: int = 0
    micro_batch: int = 0
    trace_context: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_traced(self) -> bool:
        return bool(self.trace_context)


class ExpertBackend(Protocol):
    """Computes the experts' part of a MoE layer.

    `hidden_states` [T, H] in the activation dtype, `topk_ids` int64 [T, K] distinct within a
    row, `topk_weights` float32 [T, K]. Returns [T, H] in the activation dtype: per token the sum
    over its experts of weight * FFN(row), each weighted row rounded to the activation dtype first;
    for K > 2 rows are summed in ascending expert id. The input is not written to.

    Raises `ExpertUnavailableError` when an expert has no replica for longer than `expert_wait_s`.
    An expert is never skipped.
    """

    async def forward(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        context: StepContext,
    ) -> torch.Tensor: ...

    async def wait_ready(self) -> None:
        """Return when every slot of the model has a replica; raise `UnavailableError` if not
        within `expert_wait_s`, naming the missing slots."""
        ...

    def check_ready(self) -> None:
        """Raise `UnavailableError` naming missing slots; return at once otherwise."""
        ...

    def slot_digests(self) -> Mapping[tuple[int, int], bytes]:
        """Digest of every (layer, expert) slot's weights, for the model fingerprint."""
        ...

    async def close(self) -> None: ...
