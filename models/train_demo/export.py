"""Write the trained network as the files that any Mixtral server reads."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .network import Decoder
from .recipe import Architecture
from .tokenizer import BOS_ID, EOS_ID, PAD_ID


def write_model(decoder: Decoder, folder: Path) -> None:
    """Write weights (bfloat16) and both configurations; a reader never sees half a weights file."""
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in classic_layout(decoder)
    }
    unfinished = folder / "model.safetensors.partial"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)  # safetensors leaves it readable by its owner alone
    unfinished.replace(folder / "model.safetensors")
    _write_json(folder / "config.json", model_config(decoder.arch))
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    _write_json(folder / "generation_config.json", generation)


def classic_layout(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as Mistral published them: the gate; `w1`, `w3`, `w2` of each expert."""
    for name, tensor in decoder.state_dict().items():
        if ".experts." not in name:
            yield (name if name.startswith("lm_head") else f"model.{name}"), tensor
            continue
        prefix, _, kind = name.partition(".experts.")
        block = f"model.{prefix}.block_sparse_moe"
        projection, _, expert = kind.partition(".")
        if projection == "gate_up_proj":
            gate, up = tensor.chunk(2)
            yield f"{block}.experts.{expert}.w1.weight", gate
            yield f"{block}.experts.{expert}.w3.weight", up
        elif projection == "down_proj":
            yield f"{block}.experts.{expert}.w2.weight", tensor
        else:
            yield f"{block}.gate.weight", tensor


def model_config(arch: Architecture) -> dict[str, object]:
    """The `config.json` of a Mixtral with this shape, in Hugging Face's field names."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.num_hidden_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_key_value_heads,
        "head_dim": arch.hidden_size // arch.num_attention_heads,
        "num_local_experts": arch.num_local_experts,
        "num_experts_per_tok": arch.num_experts_per_tok,
        "hidden_act": "silu",
        "max_position_embeddings": arch.max_position_embeddings,
        "rms_norm_eps": arch.rms_norm_eps,
        "rope_theta": arch.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": arch.rope_theta},
        "sliding_window": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def _write_json(path: Path, content: dict[str, object] | dict[str, int]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
