"""Sequences with known keys and values in a scrambled paged cache, and attention over them."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from router_service.model.attention import AttentionPlan, NativeAttentionPlan
from router_service.model.batch import ForwardBatch
from router_service.model.kv_cache import KVCache
from router_service.model.rotary import Rotation
from router_service.model.torch_attention import TorchAttentionPlan
from services.core.kernels.library import native_library
from tests.support.forward import TINY_CONFIG

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8
NO_ROTATION = Rotation(cos=torch.ones(8192, HEAD_DIM), sin=torch.zeros(8192, HEAD_DIM))
CPU = torch.device("cpu")


class Scene:
    """Some last tokens of every sequence are this step's queries; slots of nobody hold NaN."""

    def __init__(
        self,
        sequences: list[tuple[int, int]],
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        num_heads: int = NUM_HEADS,
        num_kv_heads: int = NUM_KV_HEADS,
        head_dim: int = HEAD_DIM,
        block_size: int = 4,
    ) -> None:
        """`sequences` are (tokens in all, tokens of this step)."""
        torch.manual_seed(seed)
        self.sequences = sequences
        self.dtype = dtype
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.block_size = block_size
        num_blocks = 2 + sum(-(-length // block_size) for length, _ in sequences)
        self._free_blocks = list(range(1, num_blocks))
        random.Random(seed).shuffle(self._free_blocks)
        self.cache = KVCache(
            replace(
                TINY_CONFIG,
                num_hidden_layers=1,
                num_attention_heads=num_heads,
                num_key_value_heads=num_kv_heads,
                head_dim=head_dim,
            ),
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=dtype,
            device=CPU,
        )
        self.cache.tensor.fill_(float("nan"))
        self.keys = [
            torch.randn(length, num_kv_heads, head_dim).to(dtype) for length, _ in sequences
        ]
        self.values = [torch.randn_like(keys) for keys in self.keys]
        self.queries = [torch.randn(count, num_heads, head_dim).to(dtype) for _, count in sequences]
        self.tables = [
            [self._free_blocks.pop() for _ in range(-(-length // block_size))]
            for length, _ in sequences
        ]
        self.slots = [
            torch.tensor(
                [table[p // block_size] * block_size + p % block_size for p in range(length)]
            )
            for table, (length, _) in zip(self.tables, sequences, strict=True)
        ]

    def part(self, sequence: int, length: int, num_queries: int) -> Scene:
        """One sequence alone, cut off after `length` tokens; its last tokens are queries."""
        whole, count = self.sequences[sequence]
        first = length - num_queries - (whole - count)
        other = Scene(
            [(length, num_queries)],
            seed=length,
            dtype=self.dtype,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
        )
        other.keys = [self.keys[sequence][:length]]
        other.values = [self.values[sequence][:length]]
        other.queries = [self.queries[sequence][first : first + num_queries]]
        return other

    def batch(self) -> ForwardBatch:
        counts = [count for _, count in self.sequences]
        width = max(map(len, self.tables))
        positions = [torch.arange(length - count, length) for length, count in self.sequences]
        return ForwardBatch(
            token_ids=torch.zeros(sum(counts), dtype=torch.int64),
            positions=torch.cat(positions),
            slot_mapping=torch.cat(self._new(self.slots)),
            query_start=(0, *accumulate(counts)),
            context_lens=tuple(length for length, _ in self.sequences),
            block_tables=torch.tensor([t + [0] * (width - len(t)) for t in self.tables]),
            sample_rows=torch.empty(0, dtype=torch.int64),
        )

    def attend(self, sliding_window: int | None, *, native: bool = True) -> list[Tensor]:
        """The attention of every sequence [queries, heads, head_dim], natively or by torch, after
        its earlier tokens were put into the cache."""
        for keys, values, slots, (length, count) in zip(
            self.keys, self.values, self.slots, self.sequences, strict=True
        ):
            earlier = slice(0, length - count)
            self.cache.write(0, slots[earlier], keys[earlier], values[earlier])
        heads = [torch.cat(self._new(one)) for one in (self.queries, self.keys, self.values)]
        qkv = torch.cat(heads, dim=1).flatten(1)
        output = self.plan(sliding_window, native=native).attend(0, qkv, self.cache)
        starts = self.batch().query_start
        shape = (-1, self.num_heads, self.head_dim)
        return [output[start:stop].view(shape) for start, stop in pairwise(starts)]

    def expected(self, sequence: int, sliding_window: int | None) -> Tensor:
        """Query by query and head by head, in float64."""
        length, count = self.sequences[sequence]
        keys, values = self.keys[sequence].double(), self.values[sequence].double()
        rows = []
        for offset, position in enumerate(range(length - count, length)):
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            for head in range(self.num_heads):
                kv_head = head // (self.num_heads // self.num_kv_heads)
                query = self.queries[sequence][offset, head].double()
                seen = keys[first : position + 1, kv_head]
                shares = torch.softmax(seen @ query / self.head_dim**0.5, 0)
                rows.append(shares @ values[first : position + 1, kv_head])
        return torch.stack(rows).view(count, self.num_heads, self.head_dim).float()

    def plan(self, sliding_window: int | None, *, native: bool = True) -> AttentionPlan:
        longest = max(length for length, _ in self.sequences)
        rotation = Rotation(
            cos=torch.ones(longest, self.head_dim, dtype=self.dtype),
            sin=torch.zeros(longest, self.head_dim, dtype=self.dtype),
        )
        batch = self.batch()
        if not native:
            return TorchAttentionPlan.build(
                batch, self.cache, sliding_window=sliding_window, rotation=rotation
            )
        library = native_library()
        assert library is not None
        return NativeAttentionPlan(
            library,
            batch,
            self.cache,
            num_heads=self.num_heads,
            sliding_window=sliding_window,
            rotation=rotation,
        )

    def _new(self, tensors: list[Tensor]) -> list[Tensor]:
        counts = [count for _, count in self.sequences]
        return [tensor[-count:] for tensor, count in zip(tensors, counts, strict=True)]
