"""Which experts were chosen is told of every token once, however it came to be computed.

The fake gate's choices are a hash of the layer and of all tokens so far, read from the KV cache.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from router_service.engine import step_runner
from router_service.engine.engine import Engine
from router_service.engine.recording_experts import RecordingExperts
from router_service.experts import ExpertBackend, StepContext
from router_service.model.batch import ForwardBatch
from router_service.session_tier.restore_policy import RestorePolicy
from router_service.session_tier.session_tier import SessionTier
from services.core.errors import InvalidRequestError
from services.core.expert_choices import MAX_EXPERT_CHOICES
from services.core.generation import ResumedChoice
from tests.support.fake_decoder import (
    EOS,
    VOCAB_SIZE,
    Completion,
    FakeDecoder,
    FakeKVCache,
    collect,
    fake_config,
    fake_engine,
    fake_layout,
    fake_request,
    greedy_tokens,
    next_token,
)
from tests.support.flaky_store import FlakyStore

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2
PROMPT = [(7 * i) % 100 for i in range(30)]


def gates(token_ids: list[int]) -> NDArray[np.int64]:
    """[tokens, layers, 2 different experts in no order]."""
    chosen, digest = [], 0
    for token_id in token_ids:
        digest = zlib.crc32(bytes((token_id,)), digest)
        for layer in range(NUM_LAYERS):
            first, step = divmod(zlib.crc32(bytes((layer,)), digest), NUM_EXPERTS - 1)
            first %= NUM_EXPERTS
            chosen.append((first, (first + 1 + step) % NUM_EXPERTS))
    return np.array(chosen).reshape(len(token_ids), NUM_LAYERS, TOP_K)


def choices_of(token_ids: list[int]) -> bytes:
    """What must be told of a sequence whose tokens were all run through the model."""
    return gates(token_ids).astype(np.uint8).tobytes()


class GatedDecoder(FakeDecoder):
    async def forward(
        self,
        batch: ForwardBatch,
        kv_cache: FakeKVCache,
        experts: ExpertBackend,
        context: StepContext,
    ) -> torch.Tensor:
        logits = await super().forward(batch, kv_cache, experts, context)
        chosen = []
        for row in range(batch.num_seqs):
            num_new = batch.query_start[row + 1] - batch.query_start[row]
            chosen.append(gates(self._read_back(batch, kv_cache, row))[-num_new:])
        by_token = torch.from_numpy(np.concatenate(chosen))
        rows = torch.zeros(batch.num_tokens, 1)
        for layer in range(NUM_LAYERS):
            topk_ids = by_token[:, layer]
            await experts.forward(layer, rows, topk_ids, torch.ones(topk_ids.shape), context)
            await asyncio.sleep(0)
        return logits


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Engine]:
    config = fake_config(
        num_hidden_layers=NUM_LAYERS, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K
    )
    arguments: dict[str, Any] = {"decoder": GatedDecoder(4), "config": config}
    engine = fake_engine(**arguments | options)
    engine.start()
    try:
        yield engine
    finally:
        await engine.stop(timeout_s=2)


async def complete(engine: Engine, prompt: list[int], **options: Any) -> list[Completion]:
    request = fake_request(prompt, **{"return_expert_choices": True, "seed": 1} | options)
    return await collect(engine.generate(request))


@settings(max_examples=8, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=4),
    n=st.integers(1, 3),
    budget=st.sampled_from([3, 8, 64]),
    num_blocks=st.sampled_from([20, 64]),
    num_micro_batches=st.integers(1, 3),
)
def test_choices_are_those_of_every_token_in_order(
    prompts: list[list[int]], n: int, budget: int, num_blocks: int, num_micro_batches: int
) -> None:
    """In chunks, micro-batches and with evictions, beside requests that do not ask and leave the
    same prompts in the cache."""

    async def run() -> None:
        options = {
            "num_blocks": num_blocks,
            "max_num_batched_tokens": budget,
            "num_micro_batches": num_micro_batches,
        }
        async with running(**options) as engine:
            for prompt in prompts[:2]:
                await complete(engine, prompt, return_expert_choices=False)
            asking = [complete(engine, p, n=n, temperature=1.5, max_tokens=24) for p in prompts]
            silent = [complete(engine, p, return_expert_choices=False) for p in prompts]
            told, *_ = await asyncio.gather(asyncio.gather(*asking), asyncio.gather(*silent))
            assert engine.stats().kv_blocks_used == 0
        for prompt, completions in zip(prompts, told, strict=True):
            for completion in completions:
                last = None if completion.finish_reason == "stop" else -1
                run_tokens = [*prompt, *completion.token_ids][:last]
                assert completion.expert_choices == choices_of(run_tokens)

    asyncio.run(run())


async def test_a_preempted_sequence_tells_each_token_once() -> None:
    async with running(num_blocks=24, max_num_batched_tokens=16) as engine:
        prompts = [[i] * 30 for i in range(4)]
        told = await asyncio.gather(*(complete(engine, p, max_tokens=40) for p in prompts))
        assert engine.stats().num_preemptions > 0
    for prompt, (completion,) in zip(prompts, told, strict=True):
        tokens = greedy_tokens(prompt, 40)
        assert completion.token_ids == tokens
        assert completion.expert_choices == choices_of([*prompt, *tokens[:-1]])


async def test_nothing_is_taken_from_the_prefix_cache_but_left_there_for_others() -> None:
    async with running() as engine:
        await complete(engine, PROMPT, return_expert_choices=False)
        (asking,) = await complete(engine, PROMPT)
        (silent,) = await complete(engine, PROMPT, return_expert_choices=False)
    assert asking.num_cached_tokens == 0
    assert silent.num_cached_tokens == 28, "seven full blocks before the last token"
    assert asking.expert_choices == choices_of([*PROMPT, *asking.token_ids[:-1]])
    assert silent.expert_choices == b""


async def test_siblings_share_the_prompt_and_each_tells_all_of_it() -> None:
    async with running() as engine:
        told = await complete(engine, PROMPT, n=3, temperature=1.5)
        num_prefilled = engine.stats().num_prefilled_tokens
    assert num_prefilled <= 30 + 2 * 4, "the last block's tokens only are their own"
    for completion in told:
        assert completion.expert_choices == choices_of([*PROMPT, *completion.token_ids[:-1]])


async def test_a_token_that_ends_the_completion_leaves_none_untold() -> None:
    def ends_soon(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.eye(VOCAB_SIZE)[EOS if len(tokens) >= 33 else next_token(tokens)] * 20

    async with running(decoder=GatedDecoder(4, logits_of=ends_soon)) as engine:
        (completion,) = await complete(engine, PROMPT)
    assert (completion.finish_reason, completion.stop_token_id) == ("stop", EOS)
    assert len(completion.token_ids) == 3
    assert completion.expert_choices == choices_of([*PROMPT, *completion.token_ids])


@pytest.mark.parametrize("cut", [0, 1, 5, 19])
async def test_a_resumed_completion_tells_what_was_not_told_before(cut: int) -> None:
    tokens = greedy_tokens(PROMPT, 20)
    known = len(PROMPT) + cut - 1 if cut else 0
    async with running(num_micro_batches=2, max_num_batched_tokens=8) as engine:
        resumed = (ResumedChoice(token_ids=tuple(tokens[:cut])),)
        (rest,) = await complete(engine, PROMPT, max_tokens=20, resumed=resumed)
    assert rest.token_ids == tokens[cut:]
    expected = choices_of([*PROMPT, *tokens[:-1]])
    assert rest.expert_choices == expected[known * NUM_LAYERS * TOP_K :]


async def test_a_choice_that_had_not_begun_tells_all_beside_one_that_had() -> None:
    async with running() as engine:
        whole = await complete(engine, PROMPT, n=2, temperature=1.5, max_tokens=12)
        resumed = (ResumedChoice(token_ids=tuple(whole[0].token_ids[:6])), ResumedChoice())
        first, second = await complete(
            engine, PROMPT, n=2, temperature=1.5, max_tokens=12, resumed=resumed
        )
    known = (len(PROMPT) + 5) * NUM_LAYERS * TOP_K
    assert first.expert_choices == whole[0].expert_choices[known:]
    assert second.expert_choices == whole[1].expert_choices
    assert first.num_cached_tokens > 0, "what is known of the tokens need not be computed again"


async def test_a_session_is_recomputed_and_stays_stored() -> None:
    layout = fake_layout(block_size=4)
    store = FlakyStore(layout)

    def tier() -> SessionTier:
        policy = RestorePolicy(block_size=4, block_bytes=layout.payload_bytes, max_wait_s=5.0)
        return SessionTier(
            store, layout=layout, queue_bytes=1 << 20, default_ttl_s=60.0, policy=policy
        )

    options: dict[str, Any] = {"session_id": "s", "session_ttl_s": 60.0}
    async with running(session_tier=tier()) as engine:
        await complete(engine, PROMPT, return_expert_choices=False, **options)
    num_stored = sum(len(hashes) for _, hashes, _, _ in store.puts)
    async with running(session_tier=tier()) as engine:
        (asking,) = await complete(engine, PROMPT, **options)
        assert engine.stats().num_restored_tokens == 0
    assert store.num_fetched == 0
    num_written = sum(len(hashes) for _, hashes, _, _ in store.puts) - num_stored
    assert num_written == 2, "the blocks behind the prompt: its seven were there already"
    async with running(session_tier=tier()) as engine:
        (silent,) = await complete(engine, PROMPT, return_expert_choices=False, **options)
    assert asking.expert_choices == choices_of([*PROMPT, *asking.token_ids[:-1]])
    assert silent.num_restored_tokens == 28


async def test_steps_without_an_asking_sequence_keep_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[RecordingExperts] = []

    class Counted(RecordingExperts):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(step_runner, "RecordingExperts", Counted)
    async with running() as engine:
        await complete(engine, PROMPT, return_expert_choices=False)
        assert not made
        await complete(engine, PROMPT, max_tokens=3)
        assert len(made) == 3


@pytest.mark.parametrize(
    ("changes", "options", "what"),
    [
        ({"num_local_experts": 0}, {}, "no experts"),
        ({"num_local_experts": 512}, {}, "at most 256"),
        ({"num_hidden_layers": 2000, "num_experts_per_tok": 2}, {"max_tokens": 240}, "1048576"),
    ],
)
async def test_what_cannot_be_told_is_refused(
    changes: dict[str, Any], options: dict[str, Any], what: str
) -> None:
    assert MAX_EXPERT_CHOICES == 1048576
    async with running(config=fake_config(**changes), num_blocks=128) as engine:
        with pytest.raises(InvalidRequestError, match=what) as refused:
            await complete(engine, PROMPT, **options)
    assert refused.value.details["param"] == "return_expert_choices"
