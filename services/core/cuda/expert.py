"""One expert's SwiGLU FFN on a CUDA device, its weights in 16, 8 or 4 bit.

Shapes: R rows, H hidden_size, F intermediate_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from services.core.cuda.device_support import DeviceSupport
from services.core.cuda.graph_cache import GraphCache
from services.core.cuda.linears import CudaLinear, PlainLinear, WeightFormat, make_linear
from services.core.errors import UnsupportedModelError
from services.core.expert_ffn import FfnWeights
from services.core.row_source import RowSource


class CudaExpert:
    """Takes the place of `PackedExpert` on a CUDA device; on a CPU the same code runs unaided.

    w1 and w3 are stacked and applied in one product. Rows of several batches are computed
    together: a row's bits may depend on how many there are, as they do in cuBLAS.
    """

    native: None = None
    """It has nothing that the native CPU kernels could compute with."""

    def __init__(
        self,
        weights: FfnWeights,
        *,
        dtype: torch.dtype,
        device: torch.device,
        hidden_act: str = "silu",
        weight_format: WeightFormat = "bf16",
        graphs: GraphCache | None = None,
    ) -> None:
        """`graphs` is shared by experts; None computes without graphs. Packing
        needs the memory of the unpacked w1 and w3 beside the result for a moment."""
        if hidden_act not in ("silu", "swish"):
            raise UnsupportedModelError(
                f"hidden_act {hidden_act!r} is not served; experts must use 'silu'"
            )
        support = DeviceSupport.of(device)
        self.weight_format = weight_format
        self._graphs = graphs
        w13 = torch.cat([_whole(w).to(device, dtype) for w in (weights.w1, weights.w3)])
        self._gate_up: CudaLinear = make_linear(w13, weight_format, support)
        del w13
        w2 = _whole(weights.w2).to(device, dtype)
        self._down: CudaLinear = make_linear(w2, weight_format, support)

    @classmethod
    def of_stacked(cls, w13: Tensor, w2: Tensor, *, graphs: GraphCache | None = None) -> CudaExpert:
        """Over w13 [2F, H] (w1 above w3) and w2 [H, F] as they are, in their dtype; no copies."""
        expert = cls.__new__(cls)
        expert.weight_format = "bf16"
        expert._graphs = graphs
        expert._gate_up, expert._down = PlainLinear(w13), PlainLinear(w2)
        return expert

    @property
    def weight_bytes(self) -> int:
        return self._gate_up.weight_bytes + self._down.weight_bytes

    def forward(self, rows: Tensor) -> Tensor:
        """w2(silu(w1 x) * w3 x) of every row: [R, H] -> [R, H] in the dtype of the rows."""
        if self._graphs is None or not len(rows):
            return self._compute(rows)
        result = torch.empty_like(rows)
        self._graphs.run(self, self._compute, rows, result)
        return result

    def forward_each(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """`forward` of several batches of rows, computed as one."""
        if len(batches) == 1:
            return [self.forward(batches[0])]
        result = self.forward(torch.cat(list(batches)))
        return list(torch.split_with_sizes(result, [len(rows) for rows in batches]))

    def forward_into(self, rows: Tensor, result: Tensor) -> None:
        """`forward` written to `result` [R, H]."""
        if not len(rows):
            return
        if self._graphs is None:
            result.copy_(self._compute(rows))
        else:
            self._graphs.run(self, self._compute, rows, result)

    def release(self) -> None:
        """Call before the expert is dropped: its graphs read its weights."""
        if self._graphs is not None:
            self._graphs.drop(self)

    def stackable(self) -> tuple[PlainLinear, PlainLinear] | None:
        """Its products if both are in the activation dtype, for `CudaLayer` to stack."""
        if isinstance(self._gate_up, PlainLinear) and isinstance(self._down, PlainLinear):
            return self._gate_up, self._down
        return None

    def dequantised(self) -> tuple[Tensor, Tensor, Tensor]:
        """w1, w2 and w3 in float32 as they are computed with."""
        w1, w3 = self._gate_up.dequantised().chunk(2)
        return w1, self._down.dequantised(), w3

    def _compute(self, rows: Tensor) -> Tensor:
        return self._down(swiglu(self._gate_up(rows)))


def _whole(source: RowSource) -> Tensor:
    return source[0 : source.shape[0]]


def swiglu(gate_up: Tensor) -> Tensor:
    """[R, 2F], gates beside ups -> silu(gate) * up [R, F]."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate).mul_(up)
