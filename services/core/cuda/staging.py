"""Copies between frames in host memory and rows on a device, without waiting where none is due.

A copy from ordinary host memory makes the caller wait for the device; one from pinned memory does
not. Tensors that go together are packed into one piece, since a small copy is all latency.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 256


class StagingBuffers:
    """One thread's way to and from `device`. On a CPU tensors pass as they are, uncopied.

    Pinned memory comes from torch's own pinned pool, which keeps and reuses it, and gives none
    back out while a copy from it is still under way. So what is handed out stays valid as long as
    it is referred to, and no call can overwrite what an earlier one gave.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        is_staged = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if is_staged else None  # type: ignore[no-untyped-call]

    def to_device(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """CPU tensors on the device, of the same shapes and dtypes. Returns at once: kernels that
        this thread launches later on its stream wait for the copy by themselves."""
        if self._copies is None:
            return list(tensors)
        host = pack(tensors, pinned=True)
        with torch.cuda.stream(self._copies):
            packed = host.to(self._device, non_blocking=True)
        compute = torch.cuda.current_stream(self._device)
        compute.wait_stream(self._copies)
        packed.record_stream(compute)
        return unpack(packed, tensors)

    def to_host(self, tensors: Sequence[Tensor]) -> HostCopy:
        """Start copying device tensors to the host, after what was launched before."""
        if self._copies is None:
            return HostCopy(list(tensors), None)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        copied = []
        with torch.cuda.stream(self._copies):
            for tensor in tensors:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._copies)
                copied.append(host)
            done = self._copies.record_event()
        return HostCopy(copied, done)


class HostCopy:
    """Tensors on their way to the host."""

    def __init__(self, tensors: list[Tensor], done: torch.cuda.Event | None) -> None:
        self._tensors = tensors
        self._done = done

    @property
    def is_done(self) -> bool:
        return self._done is None or bool(self._done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> list[Tensor]:
        """The tensors in host memory, once they are all there."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


def pack(tensors: Sequence[Tensor], *, pinned: bool) -> Tensor:
    """uint8 [bytes]: the CPU tensors one after the other, each at a multiple of 256 bytes."""
    packed = torch.empty(_offsets(tensors)[-1], dtype=torch.uint8, pin_memory=pinned)
    for view, tensor in zip(unpack(packed, tensors), tensors, strict=True):
        view.copy_(tensor)
    return packed


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of what `pack` made of tensors of these shapes and dtypes, wherever it lies now."""
    offsets = _offsets(like)
    return [
        packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(offsets, like, strict=False)
    ]


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Where each begins, and the end of all."""
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
    return offsets
