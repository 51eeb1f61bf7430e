"""Packing and the ways to and from a device, on a CPU."""

from __future__ import annotations

import torch

from services.core.cuda.staging import StagingBuffers, pack, unpack
from tests.unit.core.cuda.oracle import CPU


def _tensors() -> list[torch.Tensor]:
    return [
        torch.randn(3, 5).bfloat16(),
        torch.arange(7),
        torch.empty(0, 4),
        torch.randn(2, 3).t(),
        torch.tensor([True, False]),
    ]


def test_packed_tensors_come_back_as_they_were() -> None:
    tensors = _tensors()
    packed = pack(tensors, pinned=False)
    assert packed.dtype == torch.uint8
    for got, want in zip(unpack(packed, tensors), tensors, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_unpacked_tensors_are_aligned_views_of_the_packed_one() -> None:
    tensors = _tensors()
    packed = pack(tensors, pinned=False)
    for view in unpack(packed, tensors):
        if view.numel():
            assert (view.data_ptr() - packed.data_ptr()) % 256 == 0
            assert view.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_on_a_cpu_tensors_pass_uncopied() -> None:
    staging = StagingBuffers(CPU)
    tensors = _tensors()
    there = staging.to_device(tensors)
    back = staging.to_host(there)
    assert back.is_done
    for got, want in zip(back.wait(), tensors, strict=True):
        assert got is want
