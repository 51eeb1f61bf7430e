"""The shape of a model, as `config.json` (Hugging Face) or `params.json` (Mistral) states it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.core.checkpoints.json_fields import JsonFields
from services.core.checkpoints.quantization_config import why_not_read
from services.core.checkpoints.safetensors_files import read_header
from services.core.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Field names are those of Hugging Face's `MixtralConfig`.

    `num_local_experts` is 0 for a dense Mistral; its FFN then runs in the attention shard.
    `dtype` is the checkpoint's own: "bfloat16", "float16" or "float32".
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    tie_word_embeddings: bool
    hidden_act: str
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def is_moe(self) -> bool:
        return self.num_local_experts > 0

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of KV cache one token takes over all layers: 2 x layers x KV heads x head_dim."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * dtype_bytes

    def expert_bytes(self, dtype_bytes: int) -> int:
        """Bytes of one (layer, expert) slot: w1, w3 [F, H] and w2 [H, F]."""
        return 3 * self.hidden_size * self.intermediate_size * dtype_bytes


DTYPES = ("bfloat16", "float16", "float32")


def load_model_config(folder: Path) -> ModelConfig:
    """Read `config.json`, or Mistral's `params.json` where there is no `config.json`.

    End-of-sequence ids of `generation_config.json` take precedence over those of `config.json`.
    Raises `UnsupportedModelError` naming what the decoder does not serve, `CheckpointError` when a
    file is missing or a field cannot be used.
    """
    if (folder / "config.json").is_file():
        config = _from_hugging_face(JsonFields(folder / "config.json"), folder)
        path = folder / "config.json"
    elif (folder / "params.json").is_file():
        config = _from_mistral(JsonFields(folder / "params.json"), folder)
        path = folder / "params.json"
    else:
        raise CheckpointError(
            f"{folder} holds neither config.json nor params.json; "
            "give the folder of a Mixtral or Mistral checkpoint",
            file=str(folder),
        )
    _check(config, path)
    return config


def _from_hugging_face(fields: JsonFields, folder: Path) -> ModelConfig:
    """Defaults are those of transformers' `MixtralConfig` and `MistralConfig`."""
    architecture = _architecture(fields)
    is_moe = architecture == "MixtralForCausalLM"
    if "quantization_config" in fields:
        problem = why_not_read(fields.get("quantization_config"))
        if problem is not None:
            raise _unsupported(fields, "quantization_config", f"{problem}; give a bf16 checkpoint")
    hidden_act = fields.text("hidden_act", "silu")
    if hidden_act != "silu":
        raise _unsupported(fields, "hidden_act", f"activation {hidden_act!r}; silu is")
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    default_window = None if is_moe or fields.has_key("sliding_window") else 4096
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", hidden_size // num_heads),
        vocab_size=fields.integer("vocab_size"),
        num_local_experts=fields.integer("num_local_experts", 8) if is_moe else 0,
        num_experts_per_tok=fields.integer("num_experts_per_tok", 2) if is_moe else 0,
        max_position_embeddings=fields.integer("max_position_embeddings", 4096 * 32),
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-5 if is_moe else 1e-6),
        rope_theta=_rope_theta(fields, 1e6 if is_moe else 1e4),
        sliding_window=fields.optional_integer("sliding_window") or default_window,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        hidden_act=hidden_act,
        dtype=_dtype(fields, folder),
        bos_token_id=fields.integer("bos_token_id", 1, minimum=0),
        eos_token_ids=_eos_token_ids(fields, folder),
    )


def _from_mistral(fields: JsonFields, folder: Path) -> ModelConfig:
    """Field names and the rotary base are those of Mistral's reference code.

    Where `rope_theta` is not given, that code takes 1e6 without a sliding window and 1e4 with one;
    it precomputes 128,000 positions. Token ids are those of Mistral's tokenizers: <s> 1, </s> 2.
    """
    for key in _MISTRAL_UNSUPPORTED:
        if fields.get(key):
            raise _unsupported(fields, key, f"{key} {fields.get(key)!r}")
    if fields.text("model_type", "transformer") != "transformer":
        raise _unsupported(fields, "model_type", f"model type {fields.get('model_type')!r}")
    window_key = "sliding_window" if "sliding_window" in fields else "_sliding_window"
    if isinstance(fields.get(window_key), list):
        raise _unsupported(fields, window_key, "a sliding window that differs between layers")
    sliding_window = fields.optional_integer(window_key)
    moe = fields.child("moe") if "moe" in fields else None
    num_heads = fields.integer("n_heads")
    hidden_size = fields.integer("dim")
    return ModelConfig(
        architecture="MixtralForCausalLM" if moe else "MistralForCausalLM",
        hidden_size=hidden_size,
        intermediate_size=fields.integer("hidden_dim"),
        num_hidden_layers=fields.integer("n_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=fields.integer("n_kv_heads", num_heads),
        head_dim=fields.integer("head_dim", hidden_size // num_heads),
        vocab_size=fields.integer("vocab_size"),
        num_local_experts=moe.integer("num_experts") if moe else 0,
        num_experts_per_tok=moe.integer("num_experts_per_tok") if moe else 0,
        max_position_embeddings=fields.integer(
            "max_position_embeddings", fields.integer("max_seq_len", 128_000)
        ),
        rms_norm_eps=fields.positive("norm_eps"),
        rope_theta=fields.positive("rope_theta", 1e4 if sliding_window else 1e6),
        sliding_window=sliding_window,
        tie_word_embeddings=fields.boolean("tied_embeddings", False),
        hidden_act="silu",
        dtype=_dtype(fields, folder),
        bos_token_id=1,
        eos_token_ids=_eos_token_ids(fields, folder),
    )


_MISTRAL_UNSUPPORTED = (
    "lora",
    "quantization",
    "vision_encoder",
    "multimodal",
    "yarn",
    "llama_4_scaling",
    "q_lora_rank",
)


def _architecture(fields: JsonFields) -> str:
    named = fields.get("architectures") or []
    for architecture in ("MixtralForCausalLM", "MistralForCausalLM"):
        if architecture in named:
            return architecture
    by_type = {"mixtral": "MixtralForCausalLM", "mistral": "MistralForCausalLM"}
    if not named and fields.get("model_type") in by_type:
        return by_type[fields.text("model_type")]
    seen = ", ".join(map(str, named)) or f"model_type {fields.get('model_type')!r}"
    raise _unsupported(
        fields, "architectures", f"{seen}; MixtralForCausalLM and MistralForCausalLM are"
    )


def _rope_theta(fields: JsonFields, default: float) -> float:
    """transformers 5 writes `rope_parameters`; before it, `rope_theta` with `rope_scaling`."""
    theta = fields.positive("rope_theta", default)
    for key in ("rope_parameters", "rope_scaling"):
        if key not in fields:
            continue
        rope = fields.child(key)
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        if rope_type != "default":
            raise _unsupported(fields, key, f"rotary embeddings of type {rope_type!r}")
        if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
            raise _unsupported(fields, key, "rotary embeddings of a part of each head")
        theta = rope.positive("rope_theta", theta)
    return theta


def _dtype(fields: JsonFields, folder: Path) -> str:
    """As the file states it, else that of the first weight file there, else bfloat16.

    `params.json` states none; Mistral publishes bfloat16.
    """
    stated = fields.text("dtype", fields.text("torch_dtype", "")).removeprefix("torch.")
    if stated in DTYPES:
        return stated
    if stated:
        raise _unsupported(fields, "dtype", f"weights in {stated!r}; {', '.join(DTYPES)} are")
    for path in sorted(folder.glob("*.safetensors")):
        for tensor in read_header(path).values():
            if tensor.dtype in DTYPES:
                return tensor.dtype
    return "bfloat16"


def _eos_token_ids(fields: JsonFields, folder: Path) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    if path.is_file() and "eos_token_id" in (generation := JsonFields(path)):
        return generation.integers("eos_token_id")
    return fields.integers("eos_token_id", (2,))


def _check(config: ModelConfig, path: Path) -> None:
    problem = None
    if config.num_attention_heads % config.num_key_value_heads:
        problem = (
            f"{config.num_attention_heads} attention heads cannot share "
            f"{config.num_key_value_heads} KV heads evenly"
        )
    elif config.head_dim % 2:
        problem = f"head_dim is {config.head_dim}, but rotary embeddings need an even one"
    elif config.num_experts_per_tok > config.num_local_experts:
        problem = (
            f"num_experts_per_tok is {config.num_experts_per_tok}, but there are "
            f"{config.num_local_experts} experts"
        )
    elif any(token >= config.vocab_size for token in config.eos_token_ids):
        problem = f"eos_token_id {config.eos_token_ids} is outside of vocab_size"
    if problem:
        raise CheckpointError(f"{path}: {problem}", file=str(path))


def _unsupported(fields: JsonFields, field: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{fields.path}: not served: {what}", file=str(fields.path), field=field
    )
