"""A decoder whose KV cache holds token ids, so that any mistake with blocks changes what it says.

The KV of a token is (its id, its position). To draw the next token the decoder reads all slots of
a sequence back through its block table, checks the positions, and hashes the ids it finds there.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from router_service.engine.engine import Engine
from router_service.experts import ExpertBackend, StepContext
from router_service.model.batch import ForwardBatch
from router_service.sampling.sampler import Sampler
from router_service.scheduling.step_plan import SchedulerConfig
from services.core.generation import FinishReason, GenerateRequest, GenerationDelta, SamplingParams
from services.core.model_config import ModelConfig
from services.sessions.store import BlockLayout

VOCAB_SIZE = 101
EOS = 100


def next_token(token_ids: Sequence[int]) -> int:
    """What the fake model says after these tokens; never the end-of-sequence token."""
    return zlib.crc32(np.asarray(token_ids, dtype=np.int64).tobytes()) % EOS


def greedy_tokens(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The completion that every engine must give, whatever its batches looked like."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeKVCache:
    """float32 [1 layer, 2 (token id, position), num_blocks, block_size, 1, 1], at first NaN."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.tensor = torch.full((1, 2, num_blocks, block_size, 1, 1), float("nan"))
        self.ids, self.positions = self.tensor[0, 0].view(-1), self.tensor[0, 1].view(-1)
        self.num_imports = 0

    def export_block(self, block_id: int) -> torch.Tensor:
        return self.tensor[:, :, block_id].clone()

    def import_block(self, block_id: int, block: torch.Tensor) -> None:
        self.num_imports += 1
        self.tensor[:, :, block_id] = block


class FakeExperts:
    """Experts that the fake decoder does not ask."""

    def __init__(self) -> None:
        self.is_closed = False

    async def forward(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        context: StepContext,
    ) -> torch.Tensor:
        return hidden_states

    async def wait_ready(self) -> None:
        return

    def check_ready(self) -> None:
        return

    def slot_digests(self) -> Mapping[tuple[int, int], bytes]:
        return {}

    def expert_load(self) -> NDArray[np.int64]:
        return np.zeros((1, 2), dtype=np.int64)

    async def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeDecoder:
    """`before` is awaited with every batch before anything is written, and may raise; `logits_of`
    may change a row's logits given the tokens before it."""

    block_size: int
    before: Callable[[ForwardBatch, StepContext], Any] | None = None
    logits_of: Callable[[list[int], torch.Tensor], torch.Tensor] | None = None
    num_yields: int = 0
    batches: list[tuple[StepContext, ForwardBatch]] = field(default_factory=list)

    async def forward(
        self,
        batch: ForwardBatch,
        kv_cache: FakeKVCache,
        experts: ExpertBackend,
        context: StepContext,
    ) -> torch.Tensor:
        self.batches.append((context, batch))
        if self.before is not None:
            waiting = self.before(batch, context)
            if waiting is not None:
                await waiting
        kv_cache.ids[batch.slot_mapping] = batch.token_ids.float()
        kv_cache.positions[batch.slot_mapping] = batch.positions.float()
        for _ in range(self.num_yields):
            await asyncio.sleep(0)
        contexts = [self._read_back(batch, kv_cache, row) for row in range(batch.num_seqs)]
        last_rows = {batch.query_start[row + 1] - 1: row for row in range(batch.num_seqs)}
        rows = [self._logits(contexts[last_rows[int(row)]]) for row in batch.sample_rows]
        return torch.stack(rows) if rows else torch.empty(0, VOCAB_SIZE)

    def _read_back(self, batch: ForwardBatch, kv_cache: FakeKVCache, row: int) -> list[int]:
        length = batch.context_lens[row]
        places = torch.arange(length)
        slots = batch.block_tables[row][places // self.block_size] * self.block_size
        slots += places % self.block_size
        first, last = batch.query_start[row], batch.query_start[row + 1]
        assert torch.equal(batch.slot_mapping[first:last], slots[length - (last - first) :])
        assert torch.equal(kv_cache.positions[slots], places.float()), "a slot holds another token"
        return [int(token) for token in kv_cache.ids[slots]]

    def _logits(self, tokens: list[int]) -> torch.Tensor:
        logits = torch.zeros(VOCAB_SIZE)
        logits[next_token(tokens)] = 20.0
        return self.logits_of(tokens, logits) if self.logits_of is not None else logits


def fake_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "architecture": "MixtralForCausalLM",
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 1,
        "vocab_size": VOCAB_SIZE,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_ids": (EOS,),
    }
    return ModelConfig(**values | changes)


def fake_layout(block_size: int, fingerprint: bytes = b"fake-weights-0001") -> BlockLayout:
    """The layout of `FakeKVCache`'s blocks."""
    return BlockLayout(
        model_fingerprint=fingerprint,
        num_layers=1,
        block_size=block_size,
        num_kv_heads=1,
        head_dim=1,
        dtype="float32",
    )


def fake_engine(
    *, num_blocks: int = 64, block_size: int = 4, decoder: FakeDecoder | None = None, **options: Any
) -> Engine:
    """An engine over fakes, not started. Scheduler settings and engine arguments in `options`."""
    scheduler = {
        name: options.pop(name)
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_waiting_tokens",
            "max_waiting_seqs",
            "max_ttft_s",
            "max_imports_per_step",
            "max_model_len",
        )
        if name in options
    }
    arguments: dict[str, Any] = {
        "config": fake_config(),
        "scheduler_config": SchedulerConfig(
            block_size=block_size,
            num_blocks=num_blocks,
            **{"max_model_len": 4096, **scheduler},
        ),
        "decoder": decoder or FakeDecoder(block_size),
        "kv_cache": FakeKVCache(num_blocks, block_size),
        "experts": FakeExperts(),
        "sampler": Sampler(),
        "model_fingerprint": b"fake-weights-0001",
    }
    return Engine(**arguments | options)


def fake_request(prompt: Sequence[int], max_tokens: int = 8, **options: Any) -> GenerateRequest:
    """A greedy request; `GenerateRequest` fields by name, all else goes to `SamplingParams`."""
    own: dict[str, Any] = {
        name: options.pop(name)
        for name in (
            "n",
            "tenant",
            "session_id",
            "session_ttl_s",
            "trace_context",
            "request_id",
            "resumed",
            "priority",
            "return_expert_choices",
        )
        if name in options
    }
    sampling = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0} | options)
    return GenerateRequest(
        **{"request_id": "test"} | own, prompt_token_ids=tuple(prompt), sampling=sampling
    )


@dataclass
class Completion:
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    num_restored_tokens: int = 0
    expert_choices: bytes = b""


async def collect(deltas: AsyncIterator[tuple[GenerationDelta, ...]]) -> list[Completion]:
    """Read a stream to its end; completions by index."""
    by_index: dict[int, Completion] = {}
    async for batch in deltas:
        for delta in batch:
            completion = by_index.setdefault(delta.index, Completion())
            assert completion.finish_reason is None, "a delta after the finish"
            completion.token_ids += delta.token_ids
            completion.finish_reason = delta.finish_reason
            completion.stop_token_id = delta.stop_token_id
            completion.num_cached_tokens = delta.num_cached_tokens
            completion.num_restored_tokens = delta.num_restored_tokens
            completion.expert_choices += delta.expert_choices
    return [by_index[index] for index in sorted(by_index)]
