"""What a device can do, asked once, so that no kernel is chosen by catching its failure."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MIN_FP8_CAPABILITY = (8, 9)
_MIN_TENSOR_CORE_CAPABILITY = (8, 0)
_MIN_GROUPED_CAPABILITY = (9, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSupport:
    """`fp8`, `int8` and `int4` are products on weights that stay in that format; where one is
    false the weights are dequantised for each product. `graphs` and `pinned_copies` are CUDA's.

    On a CPU torch has the same int8 and grouped products (slow), and from 2.13 on the fp8 one, so
    that what runs on a GPU can be tested without one.
    """

    fp8: bool
    int8: bool
    int4: bool
    grouped: bool
    graphs: bool
    pinned_copies: bool

    @staticmethod
    def of(device: torch.device) -> DeviceSupport:
        """Ask torch about `device`, "cpu" or "cuda"."""
        is_cuda = device.type == "cuda"
        capability = torch.cuda.get_device_capability(device) if is_cuda else None
        return DeviceSupport.for_capability(capability)

    @staticmethod
    def for_capability(capability: tuple[int, int] | None) -> DeviceSupport:
        """Of a CUDA compute capability; None is a CPU.

        fp8 tensor cores came with 8.9 (Ada), torch's grouped bf16 product is one kernel from 9.0
        (Hopper) on, and its int4 product needs the bf16 tensor cores of 8.0 (Ampere).
        """
        if capability is None:
            return DeviceSupport(
                fp8=False, int8=True, int4=False, grouped=True, graphs=False, pinned_copies=False
            )
        has_tensor_cores = capability >= _MIN_TENSOR_CORE_CAPABILITY
        return DeviceSupport(
            fp8=capability >= _MIN_FP8_CAPABILITY,
            int8=has_tensor_cores,
            int4=has_tensor_cores,
            grouped=capability >= _MIN_GROUPED_CAPABILITY,
            graphs=True,
            pinned_copies=True,
        )
