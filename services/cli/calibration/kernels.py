"""Measures matrix products as the product runs them, on two widths and every number of threads.

Figures are seconds, keyed by threads, width and rows; `fit` turns them into kernels.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from router_service.dispatch.local_experts import LocalExperts
from router_service.experts import StepContext
from router_service.model.batch import ForwardBatch
from router_service.model.decoder import MixtralDecoder
from router_service.model.kv_cache import KVCache
from services.cli.calibration.random_weights import (
    NUM_EXPERTS,
    TOP_K,
    RandomDecoderWeights,
    RandomFfn,
    random_config,
    random_matrix,
)
from services.cli.calibration.timing import time_s, typical_s
from services.core.expert_ffn import Assignments, PackedExpert, moe_forward
from services.core.kernels.choice import native_kernels_for, set_num_threads
from services.core.packed_linear import PackedLinear
from services.core.planning.calibration import thread_counts

WIDTHS = ((512, 1792), (1024, 3584))
EXPERT_ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
ATTENTION_ROWS = (1, 4, 8, 16, 32, 64)
HEAD_ROWS = (1, 8, 32, 64)
HEAD_SHAPES = ((8000, 512), (32000, 1024))
LOCAL_TOKENS = (1, 8, 32)
SHORT_CONTEXT, LONG_CONTEXT = 32, 1024
CONTEXT_ROWS = 8
CHUNK_TOKENS, CHUNK_CONTEXTS = 256, (256, 2048)
NUM_DECODER_LAYERS = 6
BLOCK_SIZE = 16
CACHE_BYTES = 64 << 20
"""Read between two measurements, so that weights come from memory as they do in a step."""
_CPU = torch.device("cpu")
_DTYPE = torch.bfloat16
_IS_NATIVE = native_kernels_for(_DTYPE, _CPU) is not None


def measure_kernels(num_cores: int) -> dict[str, Any]:
    torch.manual_seed(0)
    experts = {width: _experts(*width) for width in WIDTHS}
    with torch.inference_mode():
        measured: dict[str, Any] = {"expert_rows": EXPERT_ROWS, "experts": {}, "local_s": {}}
        for threads in thread_counts(num_cores):
            set_num_threads(threads, is_native=_IS_NATIVE)
            measured["experts"][threads] = [
                {
                    "bytes": _expert_bytes(width),
                    "seconds": [_expert_s(packed, width[0], rows) for rows in EXPERT_ROWS],
                }
                for width, packed in experts.items()
            ]
        measured["local_tokens"] = LOCAL_TOKENS
        measured["local_width"] = WIDTHS[-1]
        measured["local_s"] = _local_s(experts[WIDTHS[-1]], WIDTHS[-1][0])
        experts.clear()
        measured |= _measure_shard(num_cores)
    return measured


def _experts(hidden_size: int, intermediate_size: int) -> dict[int, PackedExpert]:
    """Eight, or more of narrow ones, so that they exceed the cache."""
    count = max(NUM_EXPERTS, 2 * CACHE_BYTES // (6 * hidden_size * intermediate_size))
    return {
        expert: PackedExpert(
            RandomFfn.of(hidden_size, intermediate_size), dtype=_DTYPE, device=_CPU
        )
        for expert in range(count)
    }


def _expert_bytes(width: tuple[int, int]) -> int:
    return 3 * width[0] * width[1] * _DTYPE.itemsize


def _expert_s(experts: Mapping[int, PackedExpert], hidden_size: int, rows: int) -> float:
    """Of one expert with `rows` of a batch that has four times as many tokens."""
    num_tokens = NUM_EXPERTS // TOP_K * rows
    hidden_states = torch.randn(num_tokens, hidden_size, dtype=_DTYPE)
    chosen = [torch.randperm(num_tokens)[:rows].sort().values for _ in experts]
    assignments = Assignments(
        expert_ids=tuple(experts),
        rows_per_expert=(rows,) * len(experts),
        token_rows=torch.cat(chosen),
        topk_weights=torch.full((rows * len(experts),), 0.5),
    )
    seconds = time_s(lambda: moe_forward(experts, hidden_states, assignments, combine=True))
    return seconds / len(experts)


def _local_s(experts: Mapping[int, PackedExpert], hidden_size: int) -> list[float]:
    """Of a layer call with the experts in process, all cores, by `LOCAL_TOKENS`."""
    held = {expert: experts[expert] for expert in range(NUM_EXPERTS)}
    local = LocalExperts([held], {})
    context = StepContext()

    async def typical(num_tokens: int) -> float:
        hidden_states = torch.randn(num_tokens, hidden_size, dtype=_DTYPE)
        times = []
        for _ in range(40):
            weights, ids = torch.randn(num_tokens, NUM_EXPERTS).softmax(-1).topk(TOP_K)
            started = time.perf_counter()
            await local.forward(0, hidden_states, ids, weights, context)
            times.append(time.perf_counter() - started)
        return typical_s(times)

    return [asyncio.run(typical(num_tokens)) for num_tokens in LOCAL_TOKENS]


def _measure_shard(num_cores: int) -> dict[str, Any]:
    decoders = {
        width: MixtralDecoder.load(
            RandomDecoderWeights(random_config(*width, num_layers=NUM_DECODER_LAYERS)),
            dtype=_DTYPE,
            device=_CPU,
        )
        for width in WIDTHS
    }
    heads = {
        shape: PackedLinear(random_matrix(*shape), dtype=_DTYPE, device=_CPU)
        for shape in HEAD_SHAPES
    }
    measured: dict[str, Any] = {
        "attention_rows": ATTENTION_ROWS,
        "attention": {},
        "head_rows": HEAD_ROWS,
        "head": {},
    }
    for threads in (num_cores,):
        set_num_threads(threads, is_native=_IS_NATIVE)
        measured["attention"][threads] = [
            {
                "bytes": _attention_bytes(decoder),
                "seconds": [_decode_s(decoder, rows, SHORT_CONTEXT) for rows in ATTENTION_ROWS],
            }
            for decoder in decoders.values()
        ]
        measured["head"][threads] = [
            {
                "bytes": shape[0] * shape[1] * _DTYPE.itemsize,
                "seconds": [_head_s(head, shape[1], rows) for rows in HEAD_ROWS],
            }
            for shape, head in heads.items()
        ]
    widest = decoders[WIDTHS[-1]]
    token_bytes = widest.config.kv_bytes_per_token(_DTYPE.itemsize) / NUM_DECODER_LAYERS
    chunk_flops = 4 * CHUNK_TOKENS * widest.config.hidden_size
    return measured | {
        "context_bytes": CONTEXT_ROWS * (LONG_CONTEXT - SHORT_CONTEXT) * token_bytes,
        "context_s": [
            _decode_s(widest, CONTEXT_ROWS, context) for context in (SHORT_CONTEXT, LONG_CONTEXT)
        ],
        "chunk_flops": chunk_flops * (CHUNK_CONTEXTS[1] - CHUNK_CONTEXTS[0]),
        "chunk_s": [_chunk_s(widest, context) for context in CHUNK_CONTEXTS],
    }


def _attention_bytes(decoder: MixtralDecoder) -> int:
    config = decoder.config
    rows = 2 * (config.num_attention_heads + config.num_key_value_heads)
    return rows * config.head_dim * config.hidden_size * _DTYPE.itemsize


def _head_s(head: PackedLinear, hidden_size: int, rows: int) -> float:
    x = torch.randn(rows, hidden_size, dtype=_DTYPE)
    return time_s(lambda: head(x).float())


def _decode_s(decoder: MixtralDecoder, rows: int, context: int) -> float:
    """Of one layer's attention and gate, for `rows` sequences with one query each."""
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.arange(rows * blocks).view(rows, blocks)
    batch = ForwardBatch(
        token_ids=torch.randint(decoder.config.vocab_size, (rows,)),
        positions=torch.full((rows,), context - 1),
        slot_mapping=tables[:, -1] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE,
        query_start=tuple(range(rows + 1)),
        context_lens=(context,) * rows,
        block_tables=tables,
        sample_rows=torch.arange(rows),
    )
    return _layer_s(decoder, batch, rows * blocks)


def _chunk_s(decoder: MixtralDecoder, context: int) -> float:
    """The same for a chunk of one prompt, the last of `context` tokens."""
    blocks = context // BLOCK_SIZE
    positions = torch.arange(context - CHUNK_TOKENS, context)
    batch = ForwardBatch(
        token_ids=torch.randint(decoder.config.vocab_size, (CHUNK_TOKENS,)),
        positions=positions,
        slot_mapping=positions,
        query_start=(0, CHUNK_TOKENS),
        context_lens=(context,),
        block_tables=torch.arange(blocks).view(1, blocks),
        sample_rows=torch.tensor([CHUNK_TOKENS - 1]),
    )
    return _layer_s(decoder, batch, blocks)


def _layer_s(decoder: MixtralDecoder, batch: ForwardBatch, num_blocks: int) -> float:
    cache = KVCache(
        decoder.config, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=_DTYPE, device=_CPU
    )
    experts = _NoExperts()

    def forward() -> None:
        experts.begin()
        asyncio.run(decoder.forward(batch, cache, experts, StepContext()))

    time_s(forward, seconds=0.5)
    return typical_s(experts.layer_s)


class _NoExperts:
    """An `ExpertBackend` that returns its input and notes how long the layer before it took."""

    def __init__(self) -> None:
        self.layer_s: list[float] = []
        self._left_at: float | None = None
        self._evicting = torch.zeros(CACHE_BYTES // 4)

    def begin(self) -> None:
        """A new step, whose first layer begins with other things."""
        self._left_at = None

    async def forward(
        self,
        layer: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        context: StepContext,
    ) -> Tensor:
        now = time.perf_counter()
        if self._left_at is not None:
            self.layer_s.append(now - self._left_at)
        self._evicting.sum()
        self._left_at = time.perf_counter()
        return hidden_states

    async def wait_ready(self) -> None:
        return

    def check_ready(self) -> None:
        return

    def slot_digests(self) -> Mapping[tuple[int, int], bytes]:
        return {}

    async def close(self) -> None:
        return
