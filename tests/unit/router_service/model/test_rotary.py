from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralRotaryEmbedding,
    apply_rotary_pos_emb,
)

from router_service.model.rotary import RotaryTable
from tests.support.forward import TINY_CONFIG

CPU = torch.device("cpu")


def rotate_as_transformers(heads: Tensor, positions: Tensor, rope_theta: float) -> Tensor:
    config = MixtralConfig(
        hidden_size=32,
        num_attention_heads=4,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
    )
    cos, sin = MixtralRotaryEmbedding(config)(heads, positions[None])
    rotated, _ = apply_rotary_pos_emb(heads[None], heads[None], cos, sin, unsqueeze_dim=2)
    result: Tensor = rotated[0]
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope_theta", [10000.0, 1e6])
def test_rotation_equals_that_of_transformers(dtype: torch.dtype, rope_theta: float) -> None:
    table = RotaryTable(replace(TINY_CONFIG, rope_theta=rope_theta), dtype=dtype, device=CPU)
    positions = torch.tensor([0, 1, 2, 300, 31999, 5])
    heads = torch.randn(6, 3, 8).to(dtype)
    rotated = table.rotation(positions, longest=32000).apply(heads)
    assert torch.equal(rotated, rotate_as_transformers(heads, positions, rope_theta))


def test_a_rotation_does_not_depend_on_how_far_the_table_has_grown() -> None:
    short = RotaryTable(TINY_CONFIG, dtype=torch.float32, device=CPU)
    grown = RotaryTable(TINY_CONFIG, dtype=torch.float32, device=CPU)
    grown.rotation(torch.tensor([9000]), longest=9001)
    positions = torch.arange(256)
    expected = short.rotation(positions, longest=256)
    got = grown.rotation(positions, longest=256)
    assert torch.equal(got.cos, expected.cos)
    assert torch.equal(got.sin, expected.sin)


def test_products_of_rotated_vectors_depend_on_the_distance_alone() -> None:
    table = RotaryTable(TINY_CONFIG, dtype=torch.float32, device=CPU)
    query, key = torch.randn(2, 1, 1, 8)

    def product(query_position: int, key_position: int) -> float:
        rotated_query = table.rotation(torch.tensor([query_position]), longest=200).apply(query)
        rotated_key = table.rotation(torch.tensor([key_position]), longest=200).apply(key)
        return float((rotated_query * rotated_key).sum())

    assert product(17, 5) == pytest.approx(product(112, 100), abs=1e-4)
    assert product(17, 5) != pytest.approx(product(17, 6), abs=1e-3)
