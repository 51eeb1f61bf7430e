"""Drive the decoder by hand: sequences, blocks and batches without scheduler or engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from router_service.experts import ExpertBackend, StepContext
from router_service.model.batch import ForwardBatch
from router_service.model.decoder import MixtralDecoder
from router_service.model.kv_cache import KVCache
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.model_config import ModelConfig

TINY_CONFIG = ModelConfig(
    architecture="MixtralForCausalLM",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=None,
    tie_word_embeddings=False,
    hidden_act="silu",
    dtype="float32",
    bos_token_id=1,
    eos_token_ids=(2,),
)


@dataclass(slots=True, kw_only=True)
class HandSequence:
    """Tokens known so far, how many of them are in the KV cache, and the blocks they own."""

    token_ids: list[int]
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)


class Part(NamedTuple):
    """`num_tokens` next tokens of a sequence. `sample`: of which of them logits are wanted."""

    sequence: HandSequence
    num_tokens: int
    sample: Sequence[int] = (-1,)


class RandomWeights:
    """A decoder's weights without a checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape) if len(shape) > 1 else 1 + 0.1 * torch.randn(shape)

    def rows_of(self, name: str, shape: tuple[int, int]) -> Tensor:
        weight: Tensor = torch.randn(shape) * shape[1] ** -0.5
        return weight

    def dense_mlp(self, layer: int) -> Any:
        raise NotImplementedError("a model with experts has none")


def random_decoder(config: ModelConfig, dtype: torch.dtype) -> MixtralDecoder:
    return MixtralDecoder.load(RandomWeights(config), dtype=dtype, device=torch.device("cpu"))


class PlainExperts:
    """An ExpertBackend written for obviousness: every expert by itself, unpacked weights."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        config = checkpoint.config
        self.num_calls = 0
        self._experts = {
            (layer, expert): tuple(
                getattr(checkpoint.expert(layer, expert), name).to(dtype)
                for name in ("w1", "w2", "w3")
            )
            for layer in range(config.num_hidden_layers)
            for expert in range(config.num_local_experts)
        }

    async def forward(
        self,
        layer: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        context: StepContext,
    ) -> Tensor:
        self.num_calls += 1
        output = torch.zeros_like(hidden_states)
        for expert in sorted(set(topk_ids.flatten().tolist())):
            w1, w2, w3 = self._experts[layer, expert]
            rows, choice = torch.where(topk_ids == expert)
            x = hidden_states[rows]
            result = F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
            weighted = result.float() * topk_weights[rows, choice, None]
            output.index_add_(0, rows, weighted.to(output.dtype))
        return output

    async def wait_ready(self) -> None: ...

    def check_ready(self) -> None: ...

    def slot_digests(self) -> Mapping[tuple[int, int], bytes]:
        return {}

    async def close(self) -> None: ...


class HandEngine:
    """A decoder with a KV cache whose free blocks are handed out in a scrambled order."""

    def __init__(
        self,
        decoder: MixtralDecoder,
        experts: ExpertBackend,
        *,
        num_blocks: int = 256,
        block_size: int = 4,
    ) -> None:
        self.decoder = decoder
        self.experts = experts
        self.kv_cache = KVCache(
            decoder.config,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=decoder.dtype,
            device=decoder.device,
        )
        order = torch.Generator().manual_seed(num_blocks)
        self._free_blocks = torch.randperm(num_blocks, generator=order).tolist()

    async def step(self, parts: Sequence[Part], context: StepContext | None = None) -> Tensor:
        """Logits of the sampled rows of all parts, in order; the tokens are then computed."""
        batch = self.make_batch(parts)
        context = context or StepContext()
        logits = await self.decoder.forward(batch, self.kv_cache, self.experts, context)
        for part in parts:
            part.sequence.num_computed += part.num_tokens
        return logits

    def make_batch(self, parts: Sequence[Part]) -> ForwardBatch:
        """A batch of the parts; allocates the blocks their tokens need."""
        block_size = self.kv_cache.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sample_rows: list[int] = []
        for sequence, num_tokens, sample in parts:
            stop = sequence.num_computed + num_tokens
            while len(sequence.block_ids) * block_size < stop:
                sequence.block_ids.append(self._free_blocks.pop())
            sample_rows += [len(token_ids) + row % num_tokens for row in sample]
            token_ids += sequence.token_ids[sequence.num_computed : stop]
            for position in range(sequence.num_computed, stop):
                positions.append(position)
                block_id = sequence.block_ids[position // block_size]
                slots.append(block_id * block_size + position % block_size)
        width = max(len(part.sequence.block_ids) for part in parts)
        tables = [
            part.sequence.block_ids + [0] * (width - len(part.sequence.block_ids)) for part in parts
        ]
        device = self.decoder.device
        return ForwardBatch(
            token_ids=torch.tensor(token_ids, device=device),
            positions=torch.tensor(positions, device=device),
            slot_mapping=torch.tensor(slots, device=device),
            query_start=(0, *accumulate(part.num_tokens for part in parts)),
            context_lens=tuple(part.sequence.num_computed + part.num_tokens for part in parts),
            block_tables=torch.tensor(tables, device=device),
            sample_rows=torch.tensor(sample_rows, dtype=torch.int64, device=device),
        )

    async def score(self, token_ids: Sequence[int], chunks: Iterable[int] = ()) -> Tensor:
        """Logits [len(token_ids), V] of one fresh sequence, computed in chunks, then the rest."""
        sequence = HandSequence(token_ids=list(token_ids))
        logits = []
        for wanted in (*chunks, len(token_ids)):
            size = min(wanted, len(token_ids) - sequence.num_computed)
            if size:
                logits.append(await self.step([Part(sequence, size, range(size))]))
        return torch.cat(logits)

    async def greedy(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, *, chunk: int | None = None
    ) -> list[list[int]]:
        """`max_tokens` greedy tokens of every prompt, all in one continuous batch.

        With `chunk`, a prompt enters in pieces of at most so many tokens, beside the sequences
        that decode already.
        """
        sequences = [HandSequence(token_ids=list(prompt)) for prompt in prompts]
        ends = [len(prompt) + max_tokens for prompt in prompts]
        while True:
            running = [
                sequence
                for sequence, end in zip(sequences, ends, strict=True)
                if len(sequence.token_ids) < end
            ]
            if not running:
                break
            parts = [
                Part(sequence, min(len(sequence.token_ids) - sequence.num_computed, chunk or 9999))
                for sequence in running
            ]
            logits = await self.step(parts)
            for sequence, token_id in zip(running, logits.argmax(-1).tolist(), strict=True):
                if sequence.num_computed == len(sequence.token_ids):
                    sequence.token_ids.append(token_id)
        return [s.token_ids[-max_tokens:] for s in sequences]


def hand_engine(
    folder: Path, dtype: torch.dtype = torch.float32, *, block_size: int = 4, num_blocks: int = 256
) -> HandEngine:
    """The checkpoint in `folder` on the CPU with `PlainExperts`."""
    checkpoint = Checkpoint.open(str(folder))
    decoder = MixtralDecoder.load(checkpoint, dtype=dtype, device=torch.device("cpu"))
    experts = PlainExperts(checkpoint, dtype)
    return HandEngine(decoder, experts, num_blocks=num_blocks, block_size=block_size)
