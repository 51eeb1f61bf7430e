from __future__ import annotations

import math
from itertools import pairwise

import pytest

from services.core.checkpoints.tensor_names import (
    dense_tensor_names,
    expert_tensor_names,
    non_expert_tensor_names,
    slot_tensor_names,
    tensor_sources,
)
from services.core.errors import CheckpointError
from services.core.model_config import ModelConfig


def config(num_local_experts: int = 4, tie_word_embeddings: bool = False) -> ModelConfig:
    return ModelConfig(
        architecture="MixtralForCausalLM" if num_local_experts else "MistralForCausalLM",
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        vocab_size=32,
        num_local_experts=num_local_experts,
        num_experts_per_tok=min(num_local_experts, 2),
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=None,
        tie_word_embeddings=tie_word_embeddings,
        hidden_act="silu",
        dtype="float32",
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_shapes_follow_the_config_even_with_a_head_dim_of_its_own() -> None:
    shapes = {name: tensor_sources(name, config())[0].shape for name in _all_names(config())}
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (24, 8)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (12, 8)
    assert shapes["model.layers.1.self_attn.o_proj.weight"] == (8, 24)
    assert shapes["model.layers.1.block_sparse_moe.gate.weight"] == (4, 8)
    assert shapes["model.layers.1.block_sparse_moe.experts.3.w1.weight"] == (12, 8)
    assert shapes["model.layers.1.block_sparse_moe.experts.3.w2.weight"] == (8, 12)
    assert shapes["model.layers.1.input_layernorm.weight"] == (8,)
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (32, 8)


def test_runs_of_all_experts_tile_a_fused_tensor_without_gap_or_overlap() -> None:
    """gate_up_proj, down_proj, and the w1, w2 and w3 of Mistral's first release."""
    runs: dict[str, list[tuple[int, int]]] = {}
    sizes: dict[str, int] = {}
    for expert in range(4):
        for name in expert_tensor_names(0, expert):
            for source in tensor_sources(name, config()):
                count = math.prod(source.shape)
                runs.setdefault(source.name, []).append((source.start, source.start + count))
                sizes[source.name] = math.prod(source.stored_shape)
    assert len(runs) == 2 + 3 + 2 * 3 * 4
    for name, covered in runs.items():
        covered.sort()
        assert covered[0][0] == 0, name
        assert covered[-1][1] == sizes[name], name
        assert all(a[1] == b[0] for a, b in pairwise(covered)), name


def test_a_tied_head_is_the_embedding_whatever_else_is_stored() -> None:
    names = [s.name for s in tensor_sources("lm_head.weight", config(tie_word_embeddings=True))]
    assert names == ["model.embed_tokens.weight", "tok_embeddings.weight"]
    assert "lm_head.weight" not in non_expert_tensor_names(config(tie_word_embeddings=True))


def test_only_q_and_k_of_mistrals_files_change_the_order_of_their_rows() -> None:
    reordered = {
        name
        for name in _all_names(config())
        for source in tensor_sources(name, config())
        if source.order == "rotary_pairs" and not source.name.startswith("model.")
    }
    assert reordered == {
        f"model.layers.{layer}.self_attn.{which}_proj.weight" for layer in (0, 1) for which in "qk"
    }


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.block_sparse_moe.experts.4.w1.weight",
        "model.layers.0.block_sparse_moe.experts.0.w4.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "lm_head.bias",
        "",
    ],
)
def test_a_name_that_the_model_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="no tensor") as caught:
        tensor_sources(name, config())
    assert caught.value.details == {"tensor": name}


def test_a_dense_model_has_projections_and_no_experts() -> None:
    dense = config(num_local_experts=0)
    assert set(dense_tensor_names(1)) <= set(non_expert_tensor_names(dense))
    for name in (*expert_tensor_names(0, 0), "model.layers.0.block_sparse_moe.gate.weight"):
        with pytest.raises(CheckpointError):
            tensor_sources(name, dense)


def _all_names(model: ModelConfig) -> tuple[str, ...]:
    slots = [(layer, expert) for layer in range(2) for expert in range(model.num_local_experts)]
    return non_expert_tensor_names(model) + slot_tensor_names(frozenset(slots))
