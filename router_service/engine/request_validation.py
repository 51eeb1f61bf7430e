"""What a request must be before the engine takes it; the gateway may check more and earlier."""

from __future__ import annotations

import math
from typing import Final

from services.core.errors import InvalidRequestError
from services.core.generation import (
    MAX_PRIORITY,
    MIN_PRIORITY,
    GenerateRequest,
    SamplingParams,
)

MAX_COMPLETIONS: Final = 128


def validate_request(request: GenerateRequest, *, vocab_size: int) -> None:
    """Raise `InvalidRequestError` naming the field, the value seen and what is allowed."""
    prompt = request.prompt_token_ids
    if not prompt:
        raise InvalidRequestError("the prompt is empty; give at least one token", param="prompt")
    lowest, highest = min(prompt), max(prompt)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InvalidRequestError(
            f"prompt token {wrong} is outside the vocabulary of {vocab_size}", param="prompt"
        )
    _check(1 <= request.n <= MAX_COMPLETIONS, "n", request.n, f"1 to {MAX_COMPLETIONS}")
    _check(
        MIN_PRIORITY <= request.priority <= MAX_PRIORITY,
        "priority",
        request.priority,
        f"{MIN_PRIORITY} to {MAX_PRIORITY}",
    )
    _validate_sampling(request.sampling, vocab_size)
    if request.resumed:
        _validate_resumed(request, vocab_size)


def _validate_resumed(request: GenerateRequest, vocab_size: int) -> None:
    """Its completions must be able to go on just as they were."""
    resumed, params = request.resumed, request.sampling
    _check(len(resumed) == request.n, "resumed", f"of {len(resumed)}", f"of n ({request.n})")
    _check(params.seed is not None, "seed", params.seed, "given where completions are resumed")
    _check(not all(choice.is_finished for choice in resumed), "resumed", "finished", "unfinished")
    for choice in resumed:
        if choice.is_finished:
            continue
        num_tokens, limit = len(choice.token_ids), params.max_tokens - 1
        _check(num_tokens <= limit, "resumed", f"{num_tokens} tokens", f"at most {limit}")
        for token_id in choice.token_ids:
            allowed = f"token 0 to {vocab_size - 1}"
            _check(0 <= token_id < vocab_size, "resumed", token_id, allowed)


def _validate_sampling(params: SamplingParams, vocab_size: int) -> None:
    _check(params.max_tokens >= 1, "max_tokens", params.max_tokens, "1 or more")
    _check(
        0 <= params.min_tokens <= params.max_tokens,
        "min_tokens",
        params.min_tokens,
        f"0 to max_tokens ({params.max_tokens})",
    )
    _check(_is_at_least(params.temperature, 0), "temperature", params.temperature, "0 or more")
    _check(params.top_k >= 0, "top_k", params.top_k, "0 (off) or more")
    _check(0 < params.top_p <= 1, "top_p", params.top_p, "above 0 and at most 1")
    _check(0 <= params.min_p <= 1, "min_p", params.min_p, "0 to 1")
    penalty = params.repetition_penalty
    _check(_is_at_least(penalty, 0) and penalty > 0, "repetition_penalty", penalty, "above 0")
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(params, name)
        _check(math.isfinite(value), name, value, "a finite number")
    _check(
        params.logprobs is None or 0 <= params.logprobs <= vocab_size,
        "logprobs",
        params.logprobs,
        f"0 to {vocab_size}",
    )
    for token_id, bias in params.logit_bias.items():
        _check(0 <= token_id < vocab_size, "logit_bias", token_id, f"token 0 to {vocab_size - 1}")
        _check(not math.isnan(bias), "logit_bias", bias, "a number")


def _is_at_least(value: float, least: float) -> bool:
    return math.isfinite(value) and value >= least


def _check(is_right: bool, param: str, value: object, allowed: str) -> None:
    if not is_right:
        raise InvalidRequestError(f"{param} is {value}, must be {allowed}", param=param)
