"""Attention of one layer over the paged cache: the native kernels beside torch's.

    python -m benchmarks.attention [--heads 16 --kv-heads 4 --head-dim 64] [--dtype bfloat16]

Both get the same cache, blocks in random order, and take turns; least and median milliseconds of a
layer, rotary embedding and the cache's writes included, and the keys and values read per second.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import accumulate

import torch

from benchmarks.machine import describe_machine
from router_service.model.attention import AttentionPlan, NativeAttentionPlan
from router_service.model.batch import ForwardBatch
from router_service.model.kv_cache import KVCache
from router_service.model.rotary import Rotation
from router_service.model.torch_attention import TorchAttentionPlan
from services.core.kernels.choice import native_kernels_for
from services.core.model_config import ModelConfig

BLOCK_SIZE = 16
CPU = torch.device("cpu")
CASES: dict[str, list[tuple[int, int]]] = {
    "decode 1 x 128": [(128, 1)],
    "decode 8 x 128": [(128, 1)] * 8,
    "decode 32 x 128": [(128, 1)] * 32,
    "decode 8 x 2048": [(2048, 1)] * 8,
    "decode 1 x 32768": [(32768, 1)],
    "prefill 512": [(512, 512)],
    "prefill 512 at 4096": [(4096, 512)],
}
"""Sequences as (tokens in all, tokens of the step)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    heads = (options.heads, options.kv_heads, options.head_dim)
    sys.stdout.write(f"{describe_machine()}\n{heads[0]} heads, {heads[1]} key-value heads of ")
    sys.stdout.write(f"{heads[2]}, {options.dtype}\n\n")
    sys.stdout.write("| step | torch ms (median) | native ms (median) | ratio | native GB/s |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    for name, sequences in CASES.items():
        scene = _Scene(sequences, heads, dtype)
        times: dict[str, list[float]] = {"torch": [], "native": []}
        for _ in range(options.rounds):
            for way in times:
                times[way].append(scene.layer_ms(way))
        least = {way: min(values) for way, values in times.items()}
        shown = {way: f"{least[way]:.3f} ({statistics.median(v):.3f})" for way, v in times.items()}
        speed = scene.kv_bytes / least["native"] / 1e6
        ratio = least["torch"] / least["native"]
        sys.stdout.write(
            f"| {name} | {shown['torch']} | {shown['native']} | {ratio:.1f} | {speed:.1f} |\n"
        )
        sys.stdout.flush()


class _Scene:
    def __init__(
        self, sequences: Sequence[tuple[int, int]], heads: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        num_heads, num_kv_heads, head_dim = heads
        tables = [-(-length // BLOCK_SIZE) for length, _ in sequences]
        num_blocks = sum(tables)
        self._cache = KVCache(
            _config(num_heads, num_kv_heads, head_dim),
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            dtype=dtype,
            device=CPU,
        )
        self._cache.tensor.normal_()
        longest = max(length for length, _ in sequences)
        rotation = Rotation(
            cos=torch.ones(longest, head_dim, dtype=dtype),
            sin=torch.zeros(longest, head_dim, dtype=dtype),
        )
        batch = _batch(sequences, tables)
        self.kv_bytes = sum(length for length, _ in sequences) * self._cache.layer_token_bytes
        width = (num_heads + 2 * num_kv_heads) * head_dim
        self._qkv = torch.randn(batch.num_tokens, width).to(dtype)
        library = native_kernels_for(dtype, CPU)
        if library is None:
            raise SystemExit("build the kernels first: python -m services.core.kernels.build")
        self._plans: dict[str, AttentionPlan] = {
            "native": NativeAttentionPlan(
                library,
                batch,
                self._cache,
                num_heads=num_heads,
                sliding_window=None,
                rotation=rotation,
            ),
            "torch": TorchAttentionPlan.build(
                batch, self._cache, sliding_window=None, rotation=rotation
            ),
        }

    def layer_ms(self, way: str) -> float:
        with torch.inference_mode():
            started = time.perf_counter()
            self._plans[way].attend(0, self._qkv, self._cache)
            return (time.perf_counter() - started) * 1e3


def _batch(sequences: Sequence[tuple[int, int]], tables: Sequence[int]) -> ForwardBatch:
    blocks = list(range(sum(tables)))
    random.Random(0).shuffle(blocks)
    block_tables = torch.zeros(len(sequences), max(tables), dtype=torch.int64)
    for row, count in enumerate(tables):
        block_tables[row, :count] = torch.tensor([blocks.pop() for _ in range(count)])
    positions = [torch.arange(length - count, length) for length, count in sequences]
    slots = [
        block_tables[row, where // BLOCK_SIZE] * BLOCK_SIZE + where % BLOCK_SIZE
        for row, where in enumerate(positions)
    ]
    counts = [count for _, count in sequences]
    return ForwardBatch(
        token_ids=torch.zeros(sum(counts), dtype=torch.int64),
        positions=torch.cat(positions),
        slot_mapping=torch.cat(slots),
        query_start=(0, *accumulate(counts)),
        context_lens=tuple(length for length, _ in sequences),
        block_tables=block_tables,
        sample_rows=torch.empty(0, dtype=torch.int64),
    )


def _config(num_heads: int, num_kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        architecture="MixtralForCausalLM",
        hidden_size=num_heads * head_dim,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=1,
        num_local_experts=1,
        num_experts_per_tok=1,
        max_position_embeddings=1 << 20,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        tie_word_embeddings=False,
        hidden_act="silu",
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_ids=(),
    )


if __name__ == "__main__":
    main()
