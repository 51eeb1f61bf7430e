"""Small random checkpoints in every layout that expertfleet reads, made by transformers itself."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file

Layout = Literal["classic", "fused", "mistral"]

TINY_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def fresh_seed() -> int:
    """A new seed, printed so that a failing run can be repeated (pytest shows it on failure)."""
    seed = secrets.randbits(31)
    print(f"seed: {seed}")
    return seed


def make_checkpoint(
    folder: Path,
    *,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "classic",
    sharded: bool | int = False,
    dense: bool = False,
    **shape: Any,
) -> Path:
    """Write a random Mixtral (`dense`: Mistral) into `folder` and return the folder.

    `shape` overrides fields of `TINY_SHAPE`. `sharded` is the number of shard files wanted, about
    (True: 3); False writes one file. "classic" and "fused" are what `save_pretrained` writes with
    `save_original_format` on and off; "mistral" is `params.json` with `consolidated*.safetensors`.
    """
    model = make_model(seed=seed, dtype=dtype, dense=dense, **shape)
    save_model(model, folder, layout=layout, sharded=sharded)
    return folder


def make_model(
    *,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    dense: bool = False,
    **shape: Any,
) -> Any:
    """A random `MixtralForCausalLM` or `MistralForCausalLM` in `dtype`; norms are not all one."""
    seed = fresh_seed() if seed is None else seed
    fields = TINY_SHAPE | shape
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    if dense:
        del fields["num_local_experts"], fields["num_experts_per_tok"]
        config: Any = transformers.MistralConfig(**fields)
    else:
        config = transformers.MixtralConfig(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model_class = transformers.MistralForCausalLM if dense else transformers.MixtralForCausalLM
        model = model_class(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
    return model.to(dtype)


def load_oracle(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint of a "classic" or "fused" folder in transformers, eager everywhere."""
    config = transformers.AutoConfig.from_pretrained(folder)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    if config.model_type == "mixtral":
        options["experts_implementation"] = "eager"
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def save_model(
    model: Any, folder: Path, *, layout: Layout = "classic", sharded: bool | int = False
) -> None:
    """Save a model of `make_model` in one of the layouts."""
    folder.mkdir(parents=True, exist_ok=True)
    num_shards = 3 if sharded is True else max(int(sharded), 1)
    num_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    shard_bytes = num_bytes // num_shards + 1 if num_shards > 1 else 2 * num_bytes
    if layout == "mistral":
        _save_mistral(model, folder, shard_bytes)
        return
    model.save_pretrained(
        folder, max_shard_size=shard_bytes, save_original_format=layout == "classic"
    )


def mistral_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors under Mistral's own names, q and k rows in interleaved rotary order."""
    config = model.config
    state = model.state_dict()
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    tensors = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        stored, kept = f"layers.{layer}", f"model.layers.{layer}"
        for ours, theirs in (("q", "wq"), ("k", "wk"), ("v", "wv"), ("o", "wo")):
            weight = state[f"{kept}.self_attn.{ours}_proj.weight"]
            if ours in "qk":
                weight = interleave_rotary_rows(weight, head_dim)
            tensors[f"{stored}.attention.{theirs}.weight"] = weight
        tensors[f"{stored}.attention_norm.weight"] = state[f"{kept}.input_layernorm.weight"]
        tensors[f"{stored}.ffn_norm.weight"] = state[f"{kept}.post_attention_layernorm.weight"]
        feed_forward = f"{stored}.feed_forward"
        if f"{kept}.mlp.gate.weight" not in state:
            for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
                tensors[f"{feed_forward}.{theirs}.weight"] = state[f"{kept}.mlp.{ours}_proj.weight"]
            continue
        tensors[f"{feed_forward}.gate.weight"] = state[f"{kept}.mlp.gate.weight"]
        gate_up = state[f"{kept}.mlp.experts.gate_up_proj"]
        down = state[f"{kept}.mlp.experts.down_proj"]
        for expert in range(config.num_local_experts):
            w1, w3 = gate_up[expert].chunk(2)
            for name, weight in (("w1", w1), ("w2", down[expert]), ("w3", w3)):
                tensors[f"{feed_forward}.experts.{expert}.{name}.weight"] = weight
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def interleave_rotary_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder each head's rows from (first halves, second halves) to pairs (0, half, 1, ...)."""
    half = head_dim // 2
    order = [row for pair in range(half) for row in (pair, pair + half)]
    heads = weight.reshape(-1, head_dim, weight.shape[1])
    return heads[:, order].reshape(weight.shape)


def _save_mistral(model: Any, folder: Path, shard_bytes: int) -> None:
    config = model.config
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim or config.hidden_size // config.num_attention_heads,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_seq_len": config.max_position_embeddings,
    }
    if config.sliding_window is not None:
        params["sliding_window"] = config.sliding_window
    if config.model_type == "mixtral":
        params["moe"] = {
            "num_experts_per_tok": config.num_experts_per_tok,
            "num_experts": config.num_local_experts,
        }
    (folder / "params.json").write_text(json.dumps(params))
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in mistral_tensors(model).items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= size
    for number, shard in enumerate(shards):
        name = "consolidated" if len(shards) == 1 else f"consolidated.{number:02d}"
        save_file(shard, folder / f"{name}.safetensors")
