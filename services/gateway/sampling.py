"""From a request's body to `SamplingParams`, once the prompt's length is known."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from services.core.errors import ContextLengthError, InvalidRequestError
from services.core.generation import SamplingParams
from services.gateway.schemas.common import GenerationBody


def build_sampling(
    body: GenerationBody, *, max_tokens: int, logprobs: int | None, vocab_size: int
) -> SamplingParams:
    """Raises `InvalidRequestError` for token ids outside the vocabulary."""
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens: {min_tokens} is more than max_tokens, {max_tokens}", param="min_tokens"
        )
    stop_token_ids = tuple(body.stop_token_ids or ())
    check_token_ids(stop_token_ids, vocab_size, param="stop_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_given(body.temperature, 1.0),
        top_k=max(0, body.top_k or 0),
        top_p=_given(body.top_p, 1.0),
        min_p=_given(body.min_p, 0.0),
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        seed=_given_seed(body.seed),
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(body.ignore_eos),
        logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
        logprobs=logprobs,
    )


def check_token_ids(token_ids: Sequence[int], vocab_size: int, *, param: str) -> None:
    """Raise `InvalidRequestError` naming the first id that the model's vocabulary lacks."""
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    bad = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
    raise InvalidRequestError(
        f"{param}: token id {bad} is outside the vocabulary, 0 to {vocab_size - 1}", param=param
    )


def fit_max_tokens(
    num_prompt_tokens: int, requested: int | None, max_model_len: int, *, param: str
) -> int:
    """The completion's limit: what was asked for, else what the context leaves.

    Raises `ContextLengthError` with the numbers when the prompt or the sum does not fit.
    """
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens, and the prompt has "
            f"{num_prompt_tokens}, which leaves no room for a completion. Shorten the prompt.",
            param=param,
        )
    if requested is not None and requested > room:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens, and "
            f"{num_prompt_tokens + requested} were requested: {num_prompt_tokens} in the prompt "
            f"and {requested} for the completion. Shorten the prompt or lower max_tokens.",
            param=param,
        )
    return room if requested is None else requested


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    try:
        by_id = {int(key): value for key, value in bias.items()}
    except ValueError as error:
        raise InvalidRequestError(
            f"logit_bias: keys must be token ids: {error}", param="logit_bias"
        ) from error
    check_token_ids(tuple(by_id), vocab_size, param="logit_bias")
    return by_id


def _given_seed(seed: int | None) -> int:
    """One of the gateway's own where the client gave none, so that another shard draws alike."""
    return secrets.randbits(63) if seed is None else seed


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
