"""Consecutive decoder layers as one native call, see native/client_layers.h.

Shapes: T tokens, H hidden_size.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor

from services.core.kernels.attention import NativeAttention
from services.core.kernels.attention_part import LayerAttention

_STEP_WORDS = 8
_ATTENDED_WORD = 7
_WORD_BYTES = 8


class LayersRequest:
    """Which layers run, and how far they came; reused from step to step.

    `rounds` [layers] are the addresses of `RoundRequest`s, all of which read `hidden_states`,
    `topk_ids` and `topk_weights`, where each layer's attention writes.
    """

    __slots__ = ("_held", "_scratch_bytes", "_steps", "_words", "address")

    def __init__(
        self,
        layers: Sequence[LayerAttention],
        rounds: Sequence[int],
        *,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
    ) -> None:
        written = hidden_states, topk_ids, topk_weights
        self._steps = array("q")
        for layer, round_ in zip(layers, rounds, strict=True):
            self._steps.extend((layer.part.address, layer.keys.data_ptr(), layer.values.data_ptr()))
            self._steps.extend(tensor.data_ptr() for tensor in written)
            self._steps.extend((round_, 0))
        self._scratch_bytes = max(layer.part.scratch_bytes for layer in layers)
        self._words = array("q", bytes(15 * _WORD_BYTES))
        self.address = self._words.buffer_info()[0]
        self._held: tuple[object, ...] = (layers, written)

    def prepare(self, first: int, attention: NativeAttention, x: Tensor, update: Tensor) -> None:
        """Run from the layer `first` to the last. `x` and `update` [T, H] are contiguous; x is
        added to in place."""
        num_layers = len(self._steps) // _STEP_WORDS
        scratch = attention.scratch(self._scratch_bytes)
        self._held = *self._held[:2], attention, x, update, scratch
        words = [
            attention.address,
            x.data_ptr(),
            update.data_ptr(),
            scratch.data_ptr(),
            num_layers - first,
            self._steps.buffer_info()[0] + first * _STEP_WORDS * _WORD_BYTES,
        ]
        words += [0] * (len(self._words) - len(words))
        self._words[:] = array("q", words)

    @property
    def num_whole(self) -> int:
        """Layers from the first on whose output is there."""
        return self._words[6]

    @property
    def num_events(self) -> int:
        """Left to take when `LaneClient.run_layers` returned."""
        return self._words[7]

    @property
    def num_parts(self) -> int:
        """Frames of the layers that are whole."""
        return self._words[8]

    @property
    def attention_ns(self) -> int:
        """What came before experts, in these layers and the one after them."""
        return self._words[9]

    @property
    def call_times_ns(self) -> array[int]:
        """pack_ns, wire_ns, queue_ns, expert_ns and combine_ns of the layers that are whole."""
        return self._words[10:15]

    def attended_ns(self, layer: int) -> int:
        """When what comes before its experts was done, by `time.perf_counter_ns`."""
        return self._steps[layer * _STEP_WORDS + _ATTENDED_WORD]
