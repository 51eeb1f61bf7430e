"""Quantised weights as a checkpoint stores them: several tensors for each.

Of a weight `x.weight` [N, K] there are, as in compressed-tensors,

- int8: `x.weight` int8 [N, K] and `x.weight_scale` [N, 1];
- int4: `x.weight_packed` int32 [N, ceil(K / 8)], eight weights in a word from its low bits up, each
  with 8 added; `x.weight_scale` [N, ceil(K / group size)]; `x.weight_shape` int64 [2], N and K.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from services.core.checkpoints.quantization_config import STORED_GROUP_SIZES
from services.core.checkpoints.safetensors_files import StoredTensor
from services.core.errors import CheckpointError
from services.core.model_config import DTYPES
from services.core.quantization.formats import GROUP_SIZE, QuantizedFormat
from services.core.quantization.quantized_rows import QuantizedRows, num_groups

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
"""What is appended to a weight's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredQuantized:
    """Where the parts of a quantised weight [N, K] lie; all were checked against its shape."""

    weight_format: QuantizedFormat
    shape: tuple[int, int]
    values: StoredTensor
    scales: StoredTensor

    @property
    def parts(self) -> tuple[StoredTensor, StoredTensor]:
        return self.values, self.scales

    @property
    def num_bytes(self) -> int:
        return self.values.num_bytes + self.scales.num_bytes


def quantized_format(name: str, stored_names: Collection[str]) -> QuantizedFormat | None:
    """How the weight `name` is quantised, None if it is not."""
    if name + PACKED in stored_names:
        return "int4"
    return "int8" if name + SCALE in stored_names else None


def locate_quantized(
    name: str,
    shape: tuple[int, int],
    weight_format: QuantizedFormat,
    find: Callable[[str], StoredTensor],
) -> StoredQuantized:
    """`find` gives a stored tensor by its name. Raises `CheckpointError` naming file and tensor."""
    num_outputs, num_inputs = shape
    scales = find(name + SCALE)
    if weight_format == "int8":
        values = find(name)
        _check(values, ("I8",), [shape])
        _check(scales, DTYPES, [(num_outputs, 1), (num_outputs,)])
    else:
        values = find(name + PACKED)
        _check(values, ("I32",), [(num_outputs, -(-num_inputs // 8))])
        _check(scales, DTYPES, [(num_outputs, -(-num_inputs // n)) for n in STORED_GROUP_SIZES])
        _check(find(name + SHAPE), ("I64",), [(2,)])
    return StoredQuantized(weight_format=weight_format, shape=shape, values=values, scales=scales)


class StoredQuantizedRows:
    """A quantised weight whose rows are read as they are taken: a `QuantizedSource`, and as
    floats of `dtype` a `RowSource`.

    `read(stored tensor, first row, number of rows)` gives a part's rows in its own dtype.
    """

    def __init__(
        self,
        stored: StoredQuantized,
        *,
        dtype: torch.dtype,
        read: Callable[[StoredTensor, int, int], Tensor],
    ) -> None:
        self.shape: tuple[int, ...] = stored.shape
        self.weight_format = stored.weight_format
        self._stored = stored
        self._dtype = dtype
        self._read = read

    def __getitem__(self, rows: slice, /) -> Tensor:
        return self.quantized(rows).dequantized(self._dtype)

    def quantized(self, rows: slice, /) -> QuantizedRows:
        first, stop, _ = rows.indices(self.shape[0])
        values, scales = (self._read(part, first, stop - first) for part in self._stored.parts)
        if self.weight_format == "int8":
            scales = scales.view(-1).to(torch.float32)
        else:
            values = values.view(torch.uint8)
            scales = _by_group(scales, self.shape[1]).to(torch.bfloat16)
        return QuantizedRows(
            weight_format=self.weight_format,
            num_inputs=self.shape[1],
            values=values,
            scales=scales,
        )


def _by_group(scales: Tensor, num_inputs: int) -> Tensor:
    """Scales of groups of `GROUP_SIZE`, be they stored for groups twice as large."""
    wanted = num_groups(num_inputs)
    if scales.shape[1] == wanted:
        return scales
    return scales.repeat_interleave(STORED_GROUP_SIZES[1] // GROUP_SIZE, dim=1)[:, :wanted]


def _check(
    stored: StoredTensor, dtypes: Collection[str], shapes: Collection[tuple[int, ...]]
) -> None:
    problem = None
    if stored.dtype not in dtypes:
        problem = f"has dtype {stored.dtype}; served are {', '.join(dtypes)}"
    elif stored.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        problem = f"has shape {list(stored.shape)}, but the config implies {wanted}"
    if problem:
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} {problem}",
            file=str(stored.file),
            tensor=stored.name,
        )
