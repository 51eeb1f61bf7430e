"""Tensors as bytes and dtypes as names. Bytes are row-major and little-endian."""

from __future__ import annotations

import math
import warnings

import torch

from protos import experts_pb2
from services.core.errors import CheckpointError, ConfigurationError

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

DTYPE_TO_PROTO: dict[torch.dtype, experts_pb2.DType] = {
    torch.float32: experts_pb2.DTYPE_FLOAT32,
    torch.float16: experts_pb2.DTYPE_FLOAT16,
    torch.bfloat16: experts_pb2.DTYPE_BFLOAT16,
}
PROTO_TO_DTYPE: dict[int, torch.dtype] = {
    int(number): dtype for dtype, number in DTYPE_TO_PROTO.items()
}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of "float32", "float16" or "bfloat16"; `CheckpointError` for any other."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise CheckpointError(f"dtype {name!r} is not served; {', '.join(_DTYPES)} are") from None


def dtype_name(dtype: torch.dtype) -> str:
    """The inverse of `torch_dtype`; `CheckpointError` for any other dtype."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise CheckpointError(f"dtype {dtype} is not served; {', '.join(_DTYPES)} are") from None


def tensor_to_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, flat. Shares memory with a contiguous CPU tensor, else copies."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_from_buffer(
    buffer: bytes | bytearray | memoryview,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The tensor that `tensor_to_bytes` gave the bytes of.

    On the CPU it shares the buffer's memory and keeps it alive; a read-only buffer must not be
    written to through it. Raises `ValueError` when the length does not fit dtype and shape.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = memoryview(buffer)
    if raw.nbytes != num_bytes:
        raise ValueError(f"{raw.nbytes} bytes do not hold {dtype} {list(shape)}: {num_bytes} do")
    if not num_bytes:
        return torch.empty(shape, dtype=dtype, device=device)
    tensor = torch.frombuffer(raw, dtype=dtype).view(shape)
    return tensor if device == "cpu" else tensor.to(device)


def resolve_device(name: str) -> torch.device:
    """The device of "cpu", "cuda", "cuda:N" or "auto" (CUDA where there is any).

    Raises `ConfigurationError` when torch does not see it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(
            f"device {name!r} is none that torch knows; give cpu, cuda, cuda:N or auto",
            setting="device",
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"device {name!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices",
            setting="device",
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(
            f"device {name!r} is not served; give cpu, cuda, cuda:N or auto", setting="device"
        )
    return device


def _spend_read_only_warning() -> None:
    """torch warns once a process that a tensor over read-only memory could be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)


_spend_read_only_warning()
