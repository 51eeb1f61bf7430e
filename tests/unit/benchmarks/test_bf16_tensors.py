from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.peers.bf16_tensors import Bf16Tensors


def test_values_are_read_exactly_from_any_of_the_files(tmp_path: Path) -> None:
    first, second = (torch.randn(5, 7).to(torch.bfloat16) for _ in range(2))
    save_file({"a": torch.zeros(3, dtype=torch.bfloat16), "b": first}, tmp_path / "1.safetensors")
    save_file({"c": second}, tmp_path / "2.safetensors")

    tensors = Bf16Tensors(tmp_path)

    assert tensors.shape("c") == (5, 7)
    assert torch.equal(torch.from_numpy(tensors.read("b")), first.float())
    assert torch.equal(torch.from_numpy(tensors.read("c")), second.float())


def test_another_dtype_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "1.safetensors")

    with pytest.raises(ValueError, match="a is F32"):
        Bf16Tensors(tmp_path)
