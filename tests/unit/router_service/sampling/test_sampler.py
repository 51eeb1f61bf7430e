from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from router_service.sampling.draws import philox, uniform
from router_service.sampling.filters import (
    _top_p_floors,
    _top_p_floors_cpu,
    draw,
    largest,
    token_weights,
)
from router_service.sampling.penalties import penalise
from router_service.sampling.sampler import SampledToken, Sampler, SamplingRow
from services.core.errors import NonFiniteError
from services.core.generation import SamplingParams
from services.core.kernels.library import native_library
from services.core.kernels.row_ops import greedy_tokens
from tests.support.checkpoints import fresh_seed

VOCAB_SIZE = 300
needs_native = pytest.mark.skipif(native_library() is None, reason="kernels are not built")


def row(
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    *,
    seed: int = 0,
    position: int = 0,
    eos: tuple[int, ...] = (2,),
    **params: Any,
) -> SamplingRow:
    return SamplingRow(
        params=SamplingParams(max_tokens=100, **params),
        prompt_token_ids=prompt,
        output_token_ids=output,
        seed=seed,
        position=position,
        eos_token_ids=eos,
    )


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    tokens = Sampler().sample(logits, rows)
    assert all(isinstance(token, SampledToken) for token in tokens)
    return [token for token in tokens if isinstance(token, SampledToken)]


def random_logits(num_rows: int = 4, vocab_size: int = VOCAB_SIZE) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=generator()) * 3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(fresh_seed())


def probabilities(logits: Tensor, **params: Any) -> Tensor:
    rows = [SamplingParams(max_tokens=1, **params)] * len(logits)
    weights = token_weights(logits, rows)
    return weights / weights.sum(-1, keepdim=True)


# Greedy


def test_greedy_takes_the_likeliest_and_of_equals_the_first() -> None:
    logits = random_logits()
    logits[1, [7, 90, 200]] = 50.0
    tokens = sample(logits, [row(temperature=0.0)] * 4)
    assert [token.token_id for token in tokens] == logits.argmax(-1).tolist()
    assert tokens[1].token_id == 7


@needs_native
@pytest.mark.parametrize("vocab_size", [1, 5, 16, 255, 256, 257, 32000])
def test_the_native_greedy_token_is_the_first_of_the_largest_and_what_is_not_finite_is_told(
    vocab_size: int,
) -> None:
    library = native_library()
    assert library is not None
    # With many equals, and zeros of both signs.
    logits = torch.randn(40, vocab_size).mul_(3).round_()
    logits[1::8] = -logits[1::8].abs()
    logits[2::8] = -float(torch.finfo(torch.float32).max)
    for row, bad in ((3, float("nan")), (11, float("inf")), (19, -float("inf"))):
        logits[row, int(torch.randint(vocab_size, ()))] = bad
    token_ids, is_finite = greedy_tokens(library, logits)
    assert is_finite == logits.isfinite().all(-1).tolist()
    likeliest = logits.numpy().argmax(-1).tolist()
    for token_id, expected, is_sound in zip(token_ids, likeliest, is_finite, strict=True):
        assert token_id == expected if is_sound else 0 <= token_id < vocab_size


def test_no_rows_give_no_tokens() -> None:
    assert Sampler().sample(torch.empty(0, VOCAB_SIZE), []) == []


# Filters, against those of transformers


@pytest.mark.parametrize("k", [1, 2, 50, 299, 300, 1000])
def test_top_k_equals_that_of_transformers(k: int) -> None:
    logits = random_logits()
    expected = TopKLogitsWarper(k)(torch.empty(4, 0), logits).softmax(-1)
    torch.testing.assert_close(probabilities(logits, top_k=k), expected)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 5000])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_top_p_equals_that_of_transformers(p: float, vocab_size: int, spread: float) -> None:
    """A wide vocabulary with a small spread needs more than the first tokens sorted.

    Rows whose cut is nearer to a token's edge than float32 can tell are left out.
    """
    logits = random_logits(10, vocab_size).double() * spread
    reached = logits.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    logits = logits[(reached - p).abs().amin(-1) > 1e-6]
    assert len(logits) > 4
    expected = TopPLogitsWarper(p)(torch.empty(len(logits), 0), logits).softmax(-1).float()
    torch.testing.assert_close(probabilities(logits.float(), top_p=p), expected)


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 1.0])
def test_min_p_equals_that_of_transformers(p: float) -> None:
    logits = random_logits()
    expected = MinPLogitsWarper(p)(torch.empty(4, 0), logits).softmax(-1)
    torch.testing.assert_close(probabilities(logits, min_p=p), expected)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_all_filters_together_equal_those_of_transformers_in_their_order(
    temperature: float,
) -> None:
    logits = random_logits(16).double()
    expected = logits
    for warper in (
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.8),
        MinPLogitsWarper(0.1),
    ):
        expected = warper(torch.empty(16, 0), expected)
    got = probabilities(logits.float(), temperature=temperature, top_k=40, top_p=0.8, min_p=0.1)
    torch.testing.assert_close(got, expected.softmax(-1).float())


@pytest.mark.parametrize("vocab_size", [5, 256, 2000, 5000])
@pytest.mark.parametrize("k", [1, 5, 19, 400])
def test_the_largest_are_those_of_the_whole_row_and_where_they_lie(k: int, vocab_size: int) -> None:
    values = random_logits(6, vocab_size)
    values[0, -3:] = float("-inf")
    values[1] = float("-inf")
    k = min(k, vocab_size)
    found, where = largest(values, k)
    assert torch.equal(found, values.topk(k).values)
    assert torch.equal(values.gather(1, where), found)
    assert all(len(set(row)) == k for row in where[[0, 2, 3, 4, 5]].tolist())


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("vocab_size", [3, 1000, 5000])
def test_sorting_only_what_may_be_kept_gives_the_floor_of_sorting_all(
    vocab_size: int, spread: float
) -> None:
    logits = random_logits(20, vocab_size) * spread
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    shares = torch.rand(20, 1, generator=generator(), dtype=torch.float64)
    shares[:3, 0] = torch.tensor([0.0, 1e-9, 1 - 1e-9])
    assert torch.equal(_top_p_floors_cpu(weights, shares), _top_p_floors(weights, shares))


def test_every_row_has_its_own_filters() -> None:
    logits = random_logits(5)
    params = [
        SamplingParams(max_tokens=1, top_k=3),
        SamplingParams(max_tokens=1),
        SamplingParams(max_tokens=1, top_p=0.5),
        SamplingParams(max_tokens=1, temperature=0.5, top_k=7, min_p=0.2),
        SamplingParams(max_tokens=1, top_p=0.9, top_k=5),
    ]
    together = token_weights(logits, params)
    for index, one in enumerate(params):
        assert torch.equal(together[index], token_weights(logits[index : index + 1], [one])[0])


def test_tokens_as_likely_as_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert probabilities(logits, top_k=2).count_nonzero() == 3
    assert probabilities(logits, top_p=0.65).count_nonzero() == 3


def test_the_likeliest_token_is_always_left() -> None:
    logits = random_logits()
    for params in ({"top_p": 0.0}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-30}):
        assert (probabilities(logits, **params).argmax(-1) == logits.argmax(-1)).all()


# Bias, penalties, min_tokens


@pytest.mark.parametrize("penalty", [0.5, 1.2, 2.0])
def test_repetition_penalty_equals_that_of_transformers(penalty: float) -> None:
    logits = random_logits(2)
    prompts, outputs = [[5, 5, 80], [1, 299]], [[80, 7, 7], []]
    rows = [
        row(prompt, output, repetition_penalty=penalty)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        expected = processor(torch.tensor([prompt + output]), logits[index : index + 1])[0]
        torch.testing.assert_close(penalise(logits, rows)[index], expected)


def test_logit_bias_equals_the_sequence_bias_of_transformers() -> None:
    logits = random_logits(1)
    processor = SequenceBiasLogitsProcessor([[[4], -100.0], [[299], 3.5]])
    expected = processor(torch.tensor([[1, 2]]), logits.clone())
    got = penalise(logits, [row(logit_bias={4: -100.0, 299: 3.5})])
    torch.testing.assert_close(got, expected)


def test_frequency_and_presence_penalties_count_the_completion_only() -> None:
    logits = random_logits(1)
    rows = [row([9, 9, 9], [3, 4, 3], frequency_penalty=0.5, presence_penalty=0.25)]
    expected = logits.clone()
    expected[0, 3] -= 2 * 0.5 + 0.25
    expected[0, 4] -= 0.5 + 0.25
    torch.testing.assert_close(penalise(logits, rows), expected)


def test_bias_comes_before_the_repetition_penalty_and_that_before_the_counted_ones() -> None:
    logits = torch.full((1, VOCAB_SIZE), 1.0)
    rows = [
        row([], [6], logit_bias={6: 3.0}, repetition_penalty=2.0, presence_penalty=0.5),
    ]
    assert penalise(logits, rows)[0, 6].item() == pytest.approx((1.0 + 3.0) / 2.0 - 0.5)


def test_penalties_touch_only_the_rows_that_ask_and_not_the_logits_given() -> None:
    logits = random_logits(3)
    before = logits.clone()
    rows = [row([1], [2]), row([1], [2], repetition_penalty=1.5), row([1], [2])]
    scores = penalise(logits, rows)
    assert torch.equal(logits, before)
    assert torch.equal(scores[[0, 2]], before[[0, 2]])
    assert not torch.equal(scores[1], before[1])


def test_logits_are_not_copied_when_no_row_asks_for_anything() -> None:
    logits = random_logits(2)
    assert penalise(logits, [row([1], [2]), row([1], [2], temperature=0.0)]) is logits


def test_ends_are_forbidden_until_min_tokens_are_there() -> None:
    logits = random_logits(1)
    logits[0, 2], logits[0, 50] = 90.0, 80.0
    params: dict[str, Any] = {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": (50,)}
    early, late = row([], [1, 1], **params), row([], [1, 1, 1], **params)
    assert sample(logits, [early])[0].token_id not in (2, 50)
    assert sample(logits, [late])[0].token_id == 2


def test_an_ignored_end_of_sequence_may_come_before_min_tokens() -> None:
    logits = random_logits(1)
    logits[0, 2] = 90.0
    rows = [row(temperature=0.0, min_tokens=3, ignore_eos=True)]
    assert sample(logits, rows)[0].token_id == 2


def test_bias_and_stop_ids_outside_the_vocabulary_have_no_effect() -> None:
    logits = random_logits(1)
    rows = [
        row(logit_bias={VOCAB_SIZE: 9.0, -1: 9.0}, min_tokens=1, stop_token_ids=(9999,), eos=())
    ]
    assert torch.equal(penalise(logits, rows), logits)


# Draws


def test_philox_equals_numpys() -> None:
    """NumPy adds one to the counter before its first words."""
    random = np.random.default_rng(fresh_seed())
    for _ in range(20):
        key, counter = (int(word) for word in random.integers(2**63, size=2))
        expected = np.random.Philox(counter=[counter, 0, 0, 0], key=[key, 0]).random_raw(4)
        assert philox((counter + 1, 0, 0, 0), (key, 0)) == tuple(expected.tolist())


def test_uniform_numbers_are_uniform() -> None:
    """Kolmogorov's distance of 4000 draws; 0.031 is exceeded once in a thousand runs by chance,
    but the seed is fixed."""
    draws = sorted(uniform(7, position) for position in range(4000))
    distance = max(abs(value - index / 4000) for index, value in enumerate(draws))
    assert 0.0 <= draws[0] < draws[-1] < 1.0
    assert distance < 0.031


def test_seeds_of_any_size_and_neighbouring_positions_give_different_numbers() -> None:
    numbers = {uniform(seed, position) for seed in (0, 1, 2**64 - 1, -5) for position in range(50)}
    assert len(numbers) == 200
    assert uniform(2**64 + 3, 9) == uniform(3, 9)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 12},
        {"top_p": 0.7},
        {"min_p": 0.15},
        {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
        {"repetition_penalty": 1.8, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square over 6000 draws against a distribution computed in numpy, step by step."""
    num_draws = 6000
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(5)) * 2
    prompt, output = [1, 2, 3], [3, 3, 4]
    expected = reference_distribution(logits[0].double().numpy(), prompt, output, params)
    rows = [row(prompt, output, seed=11, position=p, eos=(), **params) for p in range(num_draws)]
    tokens = sample(logits.expand(num_draws, -1), rows)
    counts = np.bincount([token.token_id for token in tokens], minlength=40)
    assert (counts[expected == 0] == 0).all()
    is_common = expected * num_draws >= 5
    rare = ~is_common & (expected > 0)
    observed = [*counts[is_common], counts[rare].sum()]
    wanted = [*(expected[is_common] * num_draws), expected[rare].sum() * num_draws]
    terms = [(o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True) if w > 0]
    freedom = len(terms) - 1
    assert sum(terms) < freedom + 4 * math.sqrt(2 * freedom) + 4


def reference_distribution(
    logits: np.ndarray[Any, Any], prompt: list[int], output: list[int], params: dict[str, Any]
) -> np.ndarray[Any, Any]:
    options = SamplingParams(max_tokens=1, **params)
    scores = [float(value) for value in logits]
    for token in set(prompt) | set(output):
        penalty = options.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(output):
        scores[token] -= options.frequency_penalty * output.count(token) + options.presence_penalty
    ranked = sorted(range(len(scores)), key=lambda token: -scores[token])
    shares = {token: math.exp(scores[token] / options.temperature) for token in ranked}
    if options.top_k:
        shares = {token: shares[token] for token in ranked[: options.top_k]}
    total, reached, kept = sum(shares.values()), 0.0, {}
    for token, share in shares.items():
        if reached < options.top_p * total:
            kept[token] = share
        reached += share
    best = max(kept.values())
    kept = {token: share for token, share in kept.items() if share >= options.min_p * best}
    result = np.zeros(len(scores))
    for token, share in kept.items():
        result[token] = share / sum(kept.values())
    return result


@pytest.mark.parametrize("vocab_size", [3, 256, 300, 1000])
def test_a_draw_inverts_the_cumulative_distribution(vocab_size: int) -> None:
    weights = torch.rand(1, vocab_size, generator=generator())
    weights[weights < 0.3] = 0.0
    weights[0, 0] = 1.0
    cumulative = weights[0].double().cumsum(0)
    uniforms = [*torch.rand(200, generator=generator(), dtype=torch.float64).tolist(), 0.0]
    drawn = draw(weights.expand(201, -1), uniforms)
    targets = torch.tensor(uniforms, dtype=torch.float64) * cumulative[-1]
    assert torch.equal(drawn, torch.searchsorted(cumulative, targets, right=True))


def test_no_draw_gives_a_token_of_weight_zero_even_at_the_ends() -> None:
    weights = torch.zeros(1, 1000)
    weights[0, [300, 301, 700]] = torch.tensor([0.1, 1.0, 0.3])
    uniforms = [0.0, 5e-324, 0.0714, 0.5, 0.786, 1 - 2**-53]
    assert set(draw(weights.expand(6, -1), uniforms).tolist()) == {300, 301, 700}
    assert draw(weights, [1 - 2**-53]).item() == 700
    assert draw(weights, [0.0]).item() == 300


def test_a_draw_depends_on_seed_and_position_and_not_on_the_rows_beside_it() -> None:
    logits = random_logits(1, 5000).expand(12, -1)
    rows = [
        row([1], [5], seed=seed, position=position, top_p=0.99, repetition_penalty=1.1)
        for seed in (1, 2, 3)
        for position in (10, 11, 12, 13)
    ]
    mixed = [replace(r, params=replace(r.params, temperature=2.0)) for r in rows]
    alone = [sample(logits[:1], [r])[0] for r in rows]
    assert sample(logits, rows) == alone
    assert sample(logits, [rows[0], *mixed[:5], rows[7]])[::6] == [alone[0], alone[7]]
    assert len({token.token_id for token in alone}) > 6


# Log-probabilities


def test_logprobs_are_those_of_the_raw_logits_best_first() -> None:
    logits = random_logits(3)
    rows = [
        row(temperature=0.0, logprobs=3, logit_bias={17: 1000.0}),
        row(temperature=0.0),
        row(temperature=0.0, logprobs=0),
    ]
    tokens = sample(logits, rows)
    expected = logits.log_softmax(-1)
    first, second, third = (token.logprob for token in tokens)
    assert first is not None and third is not None
    assert second is None
    assert first.token_id == tokens[0].token_id == 17
    assert first.logprob == pytest.approx(expected[0, 17].item())
    best = expected[0].topk(3)
    assert [token_id for token_id, _ in first.top] == best.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(best.values.tolist())
    assert third.top == ()
    assert third.logprob == pytest.approx(expected[2].max().item())


def test_more_alternatives_than_tokens_give_all_tokens() -> None:
    (token,) = sample(random_logits(1, 5), [row(temperature=0.0, logprobs=20, eos=())])
    assert token.logprob is not None
    assert sorted(token_id for token_id, _ in token.logprob.top) == list(range(5))


# What is not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_gives_an_error_and_the_others_a_token(
    bad: float, temperature: float
) -> None:
    logits = random_logits(3)
    rows = [
        row(temperature=temperature, seed=i, logprobs=2, top_p=0.9, position=4) for i in range(3)
    ]
    expected = Sampler().sample(logits, rows)
    logits[1, 33] = bad
    first, second, third = Sampler().sample(logits, rows)
    assert [first, third] == [expected[0], expected[2]]
    assert isinstance(second, NonFiniteError)
    assert "1 of 300 logits at position 4" in second.message


def test_large_finite_logits_are_no_error() -> None:
    logits = torch.full((1, VOCAB_SIZE), 3e38)
    logits[0, 5] = 3.2e38
    assert sample(logits, [row(temperature=0.0)])[0].token_id == 5
    assert sample(logits, [row(seed=3)])[0].token_id == 5


def test_a_row_in_which_every_token_is_forbidden_gives_an_error() -> None:
    logits = random_logits(2, 4)
    rows = [row(min_tokens=1, stop_token_ids=(0, 1, 2, 3)), row(temperature=0.0)]
    first, second = Sampler().sample(logits, rows)
    assert isinstance(first, NonFiniteError)
    assert "forbids all" in first.message
    assert isinstance(second, SampledToken)
