from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from router_service.experts import StepContext
from router_service.model.decoder import MixtralDecoder
from services.core.checkpoints.checkpoint import Checkpoint, ExpertWeights
from services.core.model_config import ModelConfig
from tests.support.checkpoints import make_checkpoint
from tests.support.forward import (
    TINY_CONFIG,
    HandEngine,
    HandSequence,
    Part,
    PlainExperts,
    hand_engine,
)

CPU = torch.device("cpu")
TOKENS = [5, 9, 200, 31, 77, 8, 8, 120, 64, 3, 250, 19, 42]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(folder: Path) -> HandEngine:
    return hand_engine(folder)


def sequence(tokens: list[int] = TOKENS) -> HandSequence:
    return HandSequence(token_ids=list(tokens))


async def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(engine: HandEngine) -> None:
    whole = await engine.score(TOKENS)
    for chunks in ([1] * 12, [4, 4], [3, 1, 5], [12]):
        torch.testing.assert_close(await engine.score(TOKENS, chunks), whole, atol=2e-5, rtol=1e-5)


async def test_logits_are_float32_and_those_of_the_sampled_rows_only(engine: HandEngine) -> None:
    whole = await engine.score(TOKENS)
    logits = await engine.step(
        [Part(sequence(), 13, sample=(2, 7)), Part(sequence(), 13, sample=())]
    )
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, whole[[2, 7]], atol=2e-5, rtol=1e-5)


async def test_a_step_in_which_nothing_is_sampled_fills_the_cache_all_the_same(
    engine: HandEngine,
) -> None:
    whole = await engine.score(TOKENS)
    fed = sequence()
    assert (await engine.step([Part(fed, 8, sample=())])).shape == (0, 256)
    logits = await engine.step([Part(fed, 5)])
    torch.testing.assert_close(logits, whole[-1:], atol=2e-5, rtol=1e-5)


async def test_a_sequence_that_shares_computed_blocks_goes_on_from_them(
    engine: HandEngine,
) -> None:
    first = sequence()
    whole = await engine.step([Part(first, 13, range(13))])
    second = HandSequence(token_ids=list(TOKENS), num_computed=8, block_ids=first.block_ids[:2])
    logits = await engine.step([Part(second, 5, range(5))])
    torch.testing.assert_close(logits, whole[8:], atol=2e-5, rtol=1e-5)


async def test_blocks_restored_into_another_cache_give_the_same_bits(folder: Path) -> None:
    engine, other = hand_engine(folder), hand_engine(folder, num_blocks=40)
    first, second = sequence(), sequence()
    for one in (first, second):
        await engine.step([Part(one, 8)])
    second.block_ids = [20, 3]
    for source, target in zip(first.block_ids, second.block_ids, strict=True):
        other.kv_cache.import_block(target, engine.kv_cache.export_block(source))
    computed = await engine.step([Part(first, 5, range(5))])
    restored = await other.step([Part(second, 5, range(5))])
    assert torch.equal(restored, computed)


async def test_a_mixed_batch_gives_each_sequence_the_logits_it_has_alone(
    engine: HandEngine,
) -> None:
    prompts = [TOKENS, TOKENS[3:], TOKENS[::-1], [7]]
    alone = [await engine.score(prompt) for prompt in prompts]
    sequences = [sequence(prompt) for prompt in prompts]
    await engine.step([Part(sequences[0], 12), Part(sequences[2], 4)])
    logits = await engine.step(
        [
            Part(sequences[0], 1),
            Part(sequences[1], 10, range(10)),
            Part(sequences[2], 9, range(9)),
            Part(sequences[3], 1),
        ]
    )
    expected = torch.cat([alone[0][12:], alone[1], alone[2][4:], alone[3]])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


async def test_what_is_not_finite_stays_in_its_own_sequence(folder: Path) -> None:
    """Neither rows of the same batch nor the next owner of a block see another's NaN."""
    engine = hand_engine(folder)
    clean = await engine.score(TOKENS)
    poisoned, healthy = sequence(), sequence()
    await engine.step([Part(poisoned, 13), Part(healthy, 12)])
    engine.kv_cache.tensor[:, :, poisoned.block_ids] = float("nan")
    poisoned.token_ids.append(4)
    logits = await engine.step([Part(poisoned, 1), Part(healthy, 1)])
    assert logits[0].isnan().all()
    torch.testing.assert_close(logits[1], clean[12], atol=2e-5, rtol=1e-5)
    heir = HandSequence(token_ids=list(TOKENS), block_ids=list(poisoned.block_ids))
    logits = await engine.step([Part(heir, 13, range(13))])
    torch.testing.assert_close(logits, clean, atol=2e-5, rtol=1e-5)


class SlowExperts(PlainExperts):
    """Lets every other task run before each answer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, torch.float32)
        self.order: list[int] = []

    async def forward(
        self,
        layer: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        context: StepContext,
    ) -> Tensor:
        self.order.append(context.micro_batch)
        await asyncio.sleep(0)
        return await super().forward(layer, hidden_states, topk_ids, topk_weights, context)


async def test_micro_batches_that_take_turns_have_the_bits_they_have_one_after_the_other(
    folder: Path,
) -> None:
    results = []
    for concurrent in (False, True):
        engine = hand_engine(folder)
        experts = SlowExperts(Checkpoint.open(str(folder)))
        batches = [
            engine.make_batch([Part(sequence(), 13)]),
            engine.make_batch([Part(sequence(TOKENS[::-1]), 9, range(9))]),
        ]
        tasks = [
            engine.decoder.forward(batch, engine.kv_cache, experts, StepContext(micro_batch=index))
            for index, batch in enumerate(batches)
        ]
        results.append(await asyncio.gather(*tasks) if concurrent else [await t for t in tasks])
        assert experts.order == ([0, 1, 0, 1] if concurrent else [0, 0, 1, 1])
    for alone, together in zip(*results, strict=True):
        assert torch.equal(alone, together)


async def test_an_error_of_the_experts_comes_through(folder: Path) -> None:
    class Broken(PlainExperts):
        async def forward(self, *args: object, **kwargs: object) -> Tensor:
            raise ConnectionError("gone")

    engine = hand_engine(folder)
    engine.experts = Broken(Checkpoint.open(str(folder)), torch.float32)
    with pytest.raises(ConnectionError, match="gone"):
        await engine.step([Part(sequence(), 13)])


async def test_a_dense_model_asks_no_experts(tmp_path: Path) -> None:
    engine = hand_engine(make_checkpoint(tmp_path, dense=True))
    assert (await engine.score(TOKENS)).isfinite().all()
    assert isinstance(engine.experts, PlainExperts)
    assert engine.experts.num_calls == 0


class Recorder:
    """A checkpoint of random tensors that notes which were asked for."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.names: list[str] = []

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.names.append(name)
        return torch.randn(shape)

    def rows_of(self, name: str, shape: tuple[int, int]) -> Tensor:
        return self.tensor(name, shape)

    def dense_mlp(self, layer: int) -> ExpertWeights:
        raise AssertionError("a MoE model has no dense FFN")


@pytest.mark.parametrize("tied", [False, True])
def test_only_tensors_outside_the_experts_are_read_each_once(tied: bool) -> None:
    recorder = Recorder(replace(TINY_CONFIG, tie_word_embeddings=tied))
    MixtralDecoder.load(recorder, dtype=torch.float32, device=CPU)
    assert len(recorder.names) == len(set(recorder.names)) == (2 if tied else 3) + 3 * 7
    assert ("lm_head.weight" in recorder.names) is not tied
    assert not any("experts" in name for name in recorder.names)
