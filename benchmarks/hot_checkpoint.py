"""A random checkpoint whose prompts choose whether one expert is hot.

The lower half of the vocabulary is ordinary: its tokens are routed to all experts in turn. Every
token of the upper half is routed to the last expert. Both hold in every layer: a token's expert and
its half are marked in coordinates of its embedding that are large enough to survive the residual
sums. The gate reads the former, the head the latter, so that an answer stays in the half of its
prompt.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.random_checkpoint import RandomShape, write_random_checkpoint

SHAPE = RandomShape(
    hidden_size=1024,
    intermediate_size=14336,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=4,
    vocab_size=2048,
    num_experts_per_tok=1,
)
HOT_EXPERT = SHAPE.num_local_experts - 1
ORDINARY_TOKENS = range(3, SHAPE.vocab_size // 2)
HOT_TOKENS = range(SHAPE.vocab_size // 2, SHAPE.vocab_size)
_MARK = 24.0
_GATE = 4.0


def write_hot_checkpoint(folder: Path, shape: RandomShape = SHAPE) -> Path:
    """Write it to an empty folder, about 1.4 GB unless another shape is given; returns the folder.
    `HOT_TOKENS` and the like are of `SHAPE`."""
    write_random_checkpoint(folder, shape, shard_bytes=1 << 33)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    half = shape.vocab_size // 2
    embeddings, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    num_experts = shape.num_local_experts
    embeddings[:, : 2 + num_experts] = 0
    embeddings[half:, 0] = _MARK
    embeddings[:half, 1] = _MARK
    embeddings[half:, 1 + num_experts] = _MARK
    for expert in range(num_experts):
        embeddings[expert:half:num_experts, 2 + expert] = _MARK
    head[:, : 2 + num_experts] = 0
    head[half:, 0], head[half:, 1] = 1.0, -1.0
    head[:half, 0], head[:half, 1] = -1.0, 1.0
    for expert in range(num_experts):  # an ordinary token is followed by one of the next expert
        head[expert:half:num_experts, 2 + (expert - 1) % num_experts] = 1.0
    for layer in range(shape.num_hidden_layers):
        gate = tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        gate[:, : 2 + num_experts] = 0
        for expert in range(num_experts):
            gate[expert, 2 + expert] = _GATE
    save_file(tensors, file, metadata={"format": "pt"})
    return folder
