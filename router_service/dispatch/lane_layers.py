"""Layers in a row as one native call, while nothing has to be decided between them.

Where every expert has one worker, a decode step's layers need Python for nothing: what comes
before their experts and the rounds to them are native already. Shapes: T tokens, H hidden_size, K
experts per token, E experts.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from router_service.dispatch.lane_rounds import LaneRound, LaneRounds
from router_service.dispatch.worker_pool import PoolView
from router_service.experts import StepLayers
from services.core.kernels.attention_part import Gated, LayerAttention
from services.core.lane.client import DTYPES, MAX_TOP_K, RoundRequest, result_words
from services.core.lane.layers import LayersRequest

MAX_TOKENS = 64
"""With more, what lies between two layers does not count."""


class LayersRun(NamedTuple):
    """Layers from `first` on that are over, up to `stop`; `round_` is that of the layer `stop`, if
    it was sent."""

    prepared: PreparedLayers
    first: int
    stop: int
    round_: LaneRound | None


class PreparedLayers:
    """The requests of all layers to the workers of one view, of steps of up to `MAX_TOKENS`.

    `rows_per_expert` int64 [layers, E] and `results` int64 [layers, words] are what the requests of
    the last run tell.
    """

    def __init__(
        self,
        layers: Sequence[LayerAttention],
        view: PoolView,
        rounds: LaneRounds,
        *,
        max_rows: array[int],
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        top_k = layers[0].part.num_experts_per_tok
        self.layers = layers
        self.view = view
        self._hidden_states = torch.empty((MAX_TOKENS, hidden_size), dtype=dtype)
        self._topk_ids = torch.empty(MAX_TOKENS * top_k, dtype=torch.int64)
        self._topk_weights = torch.empty(MAX_TOKENS * top_k, dtype=torch.float32)
        self._output = torch.empty_like(self._hidden_states)
        self._num_tokens = MAX_TOKENS
        self._top_k = top_k
        num_layers, num_experts = len(layers), len(view.table.resolve(0))
        self.rows_per_expert = np.zeros((num_layers, num_experts), dtype=np.int64)
        self.results = np.zeros((num_layers, result_words(len(view.links))), dtype=np.int64)
        connections = rounds.connections_of(view.links, stream=0)
        self.requests = [
            RoundRequest(
                layer=layer,
                hidden_states=self._hidden_states,
                topk_ids=self._topk_ids.view(MAX_TOKENS, top_k),
                topk_weights=self._topk_weights,
                worker_of_expert=view.table.resolve(layer),
                connections=connections,
                max_rows=max_rows,
                shares=array("q"),
                output=self._output,
                rows_per_expert=self.rows_per_expert[layer],
                result=self.results[layer],
            )
            for layer in range(num_layers)
        ]
        self.request = LayersRequest(
            layers,
            [request.address for request in self.requests],
            hidden_states=self._hidden_states,
            topk_ids=self._topk_ids,
            topk_weights=self._topk_weights,
        )

    def is_of(self, layers: StepLayers, view: PoolView) -> bool:
        return self.layers is layers.layers and self.view is view

    def run(
        self, rounds: LaneRounds, first: int, layers: StepLayers, x: Tensor, update: Tensor
    ) -> tuple[int, LaneRound | None]:
        """The layer that is not whole, if any, and its round if it was sent."""
        if len(x) != self._num_tokens:
            self._num_tokens = len(x)
            for request in self.requests:
                request.resize(len(x))
        self.request.prepare(first, layers.attention, x, update)
        round_ = rounds.run_layers(self.request, lambda whole: self.requests[first + whole])
        return first + self.request.num_whole, round_

    @property
    def output(self) -> Tensor:
        """[T, H] of the last layer that is whole, until the next run."""
        return self._output[: self._num_tokens]

    def gated(self) -> tuple[Tensor, Gated]:
        """Copies of what the layer that is not whole has for its experts: [T, H], and [T, K]."""
        num_tokens, shape = self._num_tokens, (self._num_tokens, self._top_k)
        ids = self._topk_ids[: num_tokens * self._top_k].view(shape)
        weights = self._topk_weights[: num_tokens * self._top_k].view(shape)
        return self._hidden_states[:num_tokens].clone(), (ids.clone(), weights.clone())


def can_run(layers: StepLayers, x: Tensor, update: Tensor) -> bool:
    """Whether native rounds carry such rows."""
    return (
        len(x) <= MAX_TOKENS
        and x.dtype in DTYPES
        and 0 < layers.layers[0].part.num_experts_per_tok <= MAX_TOP_K
        and x.is_contiguous()
        and update.is_contiguous()
    )
