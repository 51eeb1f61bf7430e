"""How much may be asked about which experts the gate chose."""

from __future__ import annotations

from typing import Final

from services.core.errors import InvalidRequestError
from services.core.model_config import ModelConfig

MAX_EXPERT_CHOICES: Final = 1 << 20
"""Expert ids that one request may be told: tokens x layers x experts a token."""
_MAX_EXPERTS: Final = 256
"""An id travels as one byte."""
_PARAM = "return_expert_choices"


def check_expert_choices(config: ModelConfig, num_tokens: int) -> None:
    """Raise `InvalidRequestError` where the choices of `num_tokens` cannot be told.

    `num_tokens` is the sum of prompt and longest completion over all choices of the answer.
    """
    if not config.is_moe:
        raise InvalidRequestError(
            f"{_PARAM}: the model has no experts to choose from", param=_PARAM
        )
    if config.num_local_experts > _MAX_EXPERTS:
        raise InvalidRequestError(
            f"{_PARAM}: the model has {config.num_local_experts} experts; choices are told of "
            f"models with at most {_MAX_EXPERTS}",
            param=_PARAM,
        )
    per_token = config.num_hidden_layers * config.num_experts_per_tok
    if num_tokens * per_token > MAX_EXPERT_CHOICES:
        raise InvalidRequestError(
            f"{_PARAM}: prompts and max_tokens come to {num_tokens} tokens, with "
            f"{config.num_hidden_layers} layers x {config.num_experts_per_tok} experts each "
            f"{num_tokens * per_token} ids, but the limit is {MAX_EXPERT_CHOICES}, here "
            f"{MAX_EXPERT_CHOICES // per_token} tokens; lower max_tokens",
            param=_PARAM,
        )
