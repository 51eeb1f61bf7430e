"""Tiny tokenisers, and model folders with all that a gateway reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. def main(): return 0",
    "Grüße aus Köln, 你好世界, привет мир, こんにちは",
    "import os\nfor name in os.listdir('.'):\n    print(name)\n",
] * 4
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'tool' -%}{{ raise_exception('no tools here') }}{%- endif -%}"
    "{%- if loop.first -%}{{ bos_token }}{%- endif -%}"
    "<{{ message.role }}>{{ message.content }}"
    "{%- if message.role == 'assistant' -%}{{ eos_token }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)
VOCAB_SIZE = 640


def train_byte_level() -> Tokenizer:
    """Byte-level BPE that prepends `<s>` (id 1), as GPT-2's family and models/demo have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def train_sentencepiece_like() -> Tokenizer:
    """BPE with byte fallback and `▁` for spaces, as Mixtral 8x7B's tokenizer.json has it."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = sorted({character for text in CORPUS[:3] for character in text.replace(" ", "▁")})
    vocab = {
        token: position
        for position, token in enumerate(["<unk>", "<s>", "</s>", *byte_tokens, *pieces])
    }
    merges = [("▁", "T"), ("h", "e"), ("▁T", "he"), ("o", "x"), ("▁", "f"), ("▁f", "ox")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def write_model_folder(folder: Path, tokenizer: Tokenizer | None, **config: Any) -> Path:
    """A folder with all that the gateway reads: no weights."""
    shape = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape | config))
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
        (folder / "tokenizer_config.json").write_text(
            json.dumps(tokens | {"chat_template": CHAT_TEMPLATE})
        )
    return folder
