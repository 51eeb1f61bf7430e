from __future__ import annotations

from dataclasses import replace

from services.cli.load.lengths import Lengths
from services.cli.load.workload import WorkloadShape, draw_workload

SHAPE = WorkloadShape(
    num_conversations=2000,
    rate=50.0,
    prompt_tokens=Lengths.parse("4-8"),
    output_tokens=Lengths.parse("3"),
    num_turns=1,
    think_s=0.0,
    vocab_size=100,
    seed=1,
)


def test_poisson_arrivals_have_the_rate_and_exponential_gaps() -> None:
    times = [conversation.at_s or 0.0 for conversation in draw_workload(SHAPE)]
    assert times == sorted(times)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert 0.9 / 50 < mean < 1.1 / 50
    assert 0.8 < variance / mean**2 < 1.2  # of an exponential it is 1


def test_the_same_seed_gives_the_same_workload_and_another_seed_another() -> None:
    assert draw_workload(SHAPE) == draw_workload(SHAPE)
    assert draw_workload(replace(SHAPE, seed=2)) != draw_workload(SHAPE)


def test_only_conversations_of_several_turns_are_sessions() -> None:
    single = draw_workload(replace(SHAPE, num_conversations=3))
    several = draw_workload(replace(SHAPE, num_conversations=3, num_turns=2, rate=None))
    assert [conversation.session_id for conversation in single] == [None] * 3
    assert len({conversation.session_id for conversation in several} - {None}) == 3
    assert all(len(conversation.turns) == 2 for conversation in several)
    assert all(conversation.at_s is None for conversation in several)


def test_prompts_stay_within_the_vocabulary_and_share_no_prefix() -> None:
    prompts = [conversation.turns[0].token_ids for conversation in draw_workload(SHAPE)]
    assert all(3 <= token < 100 for prompt in prompts for token in prompt)
    assert len({prompt[:4] for prompt in prompts}) > 1990
