from __future__ import annotations

import pytest
import torch
from torch import Tensor

from router_service.model.decoder_layer import DecoderLayer, SelfAttention
from router_service.model.gate import TopKGate
from router_service.model.norm import RMSNorm
from services.core.checkpoints.checkpoint import ExpertWeights
from services.core.expert_ffn import PackedExpert
from services.core.kernels.library import native_library
from services.core.packed_linear import PackedLinear
from services.core.quantization.formats import QuantizedFormat
from tests.support.attention_scene import CPU, Scene

HIDDEN_SIZE, NUM_EXPERTS = 75, 7
MIXED = [(1, 1), (40, 1), (70, 33), (9, 9), (600, 2)]
SHAPES = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 24}
NUM_TOKENS = sum(count for _, count in MIXED)

pytestmark = pytest.mark.skipif(native_library() is None, reason="kernels are not built")


def layer(
    seed: int,
    dtype: torch.dtype,
    *,
    native: bool,
    weight_format: QuantizedFormat | None = None,
    is_moe: bool = True,
) -> DecoderLayer:
    torch.manual_seed(seed)
    q_size, kv_size = 6 * 24, 2 * 24
    norms = [RMSNorm(torch.rand(HIDDEN_SIZE).to(dtype), eps) for eps in (1e-5, 1e-5)]

    def linear(outputs: int, inputs: int) -> PackedLinear:
        weight = torch.randn(outputs, inputs) / inputs**0.5
        return PackedLinear(weight, dtype=dtype, device=CPU, weight_format=weight_format)

    attention = SelfAttention(
        linear(q_size + 2 * kv_size, HIDDEN_SIZE), linear(HIDDEN_SIZE, q_size)
    )
    gate = TopKGate(torch.randn(NUM_EXPERTS, HIDDEN_SIZE).to(dtype), num_experts_per_tok=3)
    matrices = [
        torch.randn(40, HIDDEN_SIZE),
        torch.randn(HIDDEN_SIZE, 40),
        torch.randn(40, HIDDEN_SIZE),
    ]
    dense = PackedExpert(
        ExpertWeights(w1=matrices[0], w2=matrices[1], w3=matrices[2]), dtype=dtype, device=CPU
    )
    return DecoderLayer(
        input_norm=norms[0],
        attention=attention,
        post_attention_norm=norms[1],
        feed_forward=gate if is_moe else dense,
        native=native,
    )


def outcome(one: DecoderLayer, scene: Scene, x: Tensor, update: Tensor | None) -> list[Tensor]:
    """All that a layer leaves behind."""
    scene.cache.tensor.zero_()
    x = x.clone()
    h, gated = one.attend(0, x, update, scene.plan(500), scene.cache)
    return [h, x, scene.cache.tensor.clone(), *(gated or ())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_format", [None, "int8", "int4"])
@pytest.mark.parametrize("is_moe", [True, False])
def test_one_call_gives_the_bits_of_the_parts_one_by_one(
    dtype: torch.dtype, weight_format: QuantizedFormat | None, is_moe: bool
) -> None:
    seed = int(torch.randint(1 << 30, ()))
    scene = Scene(MIXED, seed=seed, dtype=dtype, **SHAPES)
    x, update = (torch.randn(NUM_TOKENS, HIDDEN_SIZE).to(dtype) for _ in range(2))
    for added in (None, update, update.t().contiguous().t()):
        together, apart = (
            outcome(
                layer(seed, dtype, native=native, weight_format=weight_format, is_moe=is_moe),
                scene,
                x,
                added,
            )
            for native in (True, False)
        )
        assert len(together) == len(apart) == (5 if is_moe else 3)
        for one, other in zip(together, apart, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other), f"seed {seed}"
        assert not torch.equal(together[1], x)


def test_rows_and_choices_of_one_layer_are_not_those_of_the_next() -> None:
    """What was given to the experts may still be sent when the next layer is computed."""
    scene = Scene([(20, 3)], seed=1, dtype=torch.bfloat16, **SHAPES)
    scene.cache.tensor.zero_()
    plan, x = scene.plan(None), torch.randn(3, HIDDEN_SIZE).to(torch.bfloat16)
    h, gated = layer(1, torch.bfloat16, native=True).attend(0, x, None, plan, scene.cache)
    assert gated is not None
    kept = [one.clone() for one in (h, *gated)]
    layer(2, torch.bfloat16, native=True).attend(0, x, h, plan, scene.cache)
    for one, copy in zip((h, *gated), kept, strict=True):
        assert torch.equal(one, copy)
