from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.core.errors import CheckpointError, UnsupportedModelError
from services.core.model_config import ModelConfig, load_model_config

# As published for Mixtral 8x7B, before transformers 5.
OLD_MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
PARAMS: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}
MIXTRAL_8X7B = ModelConfig(
    architecture="MixtralForCausalLM",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=32000,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    sliding_window=None,
    tie_word_embeddings=False,
    hidden_act="silu",
    dtype="bfloat16",
    bos_token_id=1,
    eos_token_ids=(2,),
)


def load(folder: Path, fields: dict[str, Any], file: str = "config.json") -> ModelConfig:
    (folder / file).write_text(json.dumps(fields))
    return load_model_config(folder)


def test_a_config_of_before_transformers_5_is_read(tmp_path: Path) -> None:
    assert load(tmp_path, OLD_MIXTRAL) == MIXTRAL_8X7B


def test_a_config_of_transformers_5_reads_the_same(tmp_path: Path) -> None:
    fields = OLD_MIXTRAL | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "dtype": "bfloat16",
        "head_dim": None,
    }
    del fields["rope_theta"], fields["torch_dtype"]
    assert load(tmp_path, fields) == MIXTRAL_8X7B


def test_params_json_reads_the_same_save_for_what_it_does_not_state(tmp_path: Path) -> None:
    config = load(tmp_path, PARAMS | {"max_seq_len": 32768}, "params.json")
    assert config == MIXTRAL_8X7B
    assert load(tmp_path, PARAMS, "params.json").max_position_embeddings == 128_000


def test_config_json_is_preferred_to_params_json(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(PARAMS | {"dim": 1}))
    assert load(tmp_path, OLD_MIXTRAL) == MIXTRAL_8X7B


@pytest.mark.parametrize(
    ("extra", "expected"),
    [({}, 1e6), ({"sliding_window": 4096}, 1e4), ({"rope_theta": 5e5}, 5e5)],
)
def test_the_rotary_base_of_params_json_follows_mistrals_rule(
    tmp_path: Path, extra: dict[str, Any], expected: float
) -> None:
    assert load(tmp_path, PARAMS | extra, "params.json").rope_theta == expected


def test_a_sliding_window_given_as_a_string_in_params_json_is_read(tmp_path: Path) -> None:
    fields = {key: value for key, value in PARAMS.items() if key != "moe"}
    config = load(tmp_path, fields | {"sliding_window": "4096"}, "params.json")
    assert config.sliding_window == 4096
    assert config.architecture == "MistralForCausalLM"
    assert not config.is_moe


def test_a_dense_mistral_has_no_experts_and_its_own_defaults(tmp_path: Path) -> None:
    fields = {
        key: value
        for key, value in OLD_MIXTRAL.items()
        if "expert" not in key and key not in ("sliding_window", "rope_theta", "rms_norm_eps")
    } | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    config = load(tmp_path, fields)
    assert (config.num_local_experts, config.num_experts_per_tok) == (0, 0)
    assert (config.sliding_window, config.rope_theta, config.rms_norm_eps) == (4096, 1e4, 1e-6)
    assert load(tmp_path, fields | {"sliding_window": None}).sliding_window is None


@pytest.mark.parametrize(("experts", "per_token"), [(2, 1), (4, 2), (16, 4), (64, 8)])
def test_any_number_of_experts_is_read(tmp_path: Path, experts: int, per_token: int) -> None:
    fields = {"num_local_experts": experts, "num_experts_per_tok": per_token}
    config = load(tmp_path, OLD_MIXTRAL | fields)
    assert (config.num_local_experts, config.num_experts_per_tok) == (experts, per_token)


def test_an_own_head_dim_window_and_tied_embeddings_are_read(tmp_path: Path) -> None:
    fields = {"head_dim": 160, "sliding_window": 512, "tie_word_embeddings": True}
    config = load(tmp_path, OLD_MIXTRAL | fields)
    assert (config.head_dim, config.sliding_window, config.tie_word_embeddings) == (160, 512, True)


def test_generation_config_overrides_the_end_of_sequence_ids(tmp_path: Path) -> None:
    assert load(tmp_path, OLD_MIXTRAL | {"eos_token_id": [2, 7]}).eos_token_ids == (2, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_model_config(tmp_path).eos_token_ids == (5, 6)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert load_model_config(tmp_path).eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": None, "model_type": "qwen2_moe"}, "qwen2_moe"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "yarn"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_what_the_decoder_does_not_serve_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        load(tmp_path, OLD_MIXTRAL | changes)
    assert caught.value.details["file"] == str(tmp_path / "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": [None, 32768]},
        {"vision_encoder": {"hidden_size": 1024}},
        {"quantization": {"qformat_weight": "fp8_e4m3"}},
        {"model_type": "mamba"},
    ],
)
def test_params_json_of_another_model_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=next(iter(changes)).replace("_", ".")):
        load(tmp_path, PARAMS | changes, "params.json")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"vocab_size": "many"}, "vocab_size is 'many', but must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, but must be an integer of at least 1"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"num_key_value_heads": 5}, "32 attention heads cannot share 5 KV heads"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but there are 8 experts"),
        ({"eos_token_id": 32000}, "outside of vocab_size"),
        ({"head_dim": 3}, "head_dim is 3"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named) as caught:
        load(tmp_path, OLD_MIXTRAL | changes)
    assert str(tmp_path / "config.json") in caught.value.message


def test_a_folder_without_config_says_what_it_must_hold(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither config.json nor params.json"):
        load_model_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config.json"):
        load_model_config(tmp_path)
