from __future__ import annotations

import pytest

from router_service.engine.step_fill import StepFill
from router_service.scheduling.sequence import Sequence
from router_service.scheduling.step_plan import ScheduledSequence, ScheduledStep, SchedulerConfig
from services.core.generation import SamplingParams
from tests.support.fake_decoder import fake_config, fake_engine, fake_request

MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("tokens", "limits", "fill"),
    [
        ([1], {}, 1 / 64),
        ([1] * 16, {}, 1 / 4),
        ([1] * 16, {"max_num_seqs": 16}, 1),
        ([240, 1], {}, 1),
        ([24], {"max_num_batched_tokens": 32}, 3 / 4),
    ],
)
def test_fill_is_the_share_of_the_tokens_that_gain_by_being_computed_together(
    tokens: list[int], limits: dict[str, int], fill: float
) -> None:
    assert _fill(StepFill(fake_config(**MIXTRAL), _limits(**limits)), tokens) == fill


def test_a_dense_model_is_filled_by_as_many_rows_as_one_expert() -> None:
    dense = fake_config(num_local_experts=0, num_experts_per_tok=0)
    assert _fill(StepFill(dense, _limits()), [1] * 4) == 1 / 4


async def test_one_stream_never_pauses_and_yet_leaves_nearly_all_room() -> None:
    engine = fake_engine(config=fake_config(**MIXTRAL))
    engine.start()
    try:
        async for _ in engine.generate(fake_request([1], 20)):
            pass
        timings = engine.stats().timings
    finally:
        await engine.stop()
    assert timings.num_steps == 20
    assert timings.full_s == pytest.approx(timings.step_s / 64, rel=0.5)


def _limits(**changes: int) -> SchedulerConfig:
    return SchedulerConfig(block_size=4, num_blocks=64, max_model_len=256, **changes)


def _fill(fill: StepFill, tokens: list[int]) -> float:
    entries = [
        ScheduledSequence(
            sequence=Sequence(
                order=order,
                index=0,
                prompt_token_ids=[1] * count,
                sampling=SamplingParams(max_tokens=1),
                seed=0,
                root=b"",
            ),
            start=0,
            num_tokens=count,
            is_prefill=count > 1,
            samples=True,
        )
        for order, count in enumerate(tokens)
    ]
    return fill.of(ScheduledStep(entries=tuple(entries)))
