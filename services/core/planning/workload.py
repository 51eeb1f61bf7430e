"""What a fleet is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.errors import ConfigurationError
from services.core.model_config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`users` streams decode at any time, each with `context` tokens of KV cache.

    A stream's requests have `prompt_tokens` that are in no cache and `output_tokens`. `hot_share`
    is the share of tokens routed to the busiest expert, None where all are alike. `tpot_target_s`
    bounds the time per output token; None: the fleet with the lowest cost per token.
    """

    users: int
    context: int
    prompt_tokens: int
    output_tokens: int
    hot_share: float | None = None
    tpot_target_s: float | None = None

    def check(self, config: ModelConfig) -> None:
        """Raise `ConfigurationError` naming what cannot be asked of this model."""
        if not config.is_moe:
            raise ConfigurationError(
                "the model has no experts to place; plan needs a mixture of experts",
                setting="model",
            )
        if min(self.users, self.context, self.prompt_tokens, self.output_tokens) < 1:
            raise ConfigurationError(
                "users, context, prompt and output tokens must be at least 1", setting="users"
            )
        if self.context > config.max_position_embeddings:
            raise ConfigurationError(
                f"--context {self.context} is beyond the model's limit of "
                f"{config.max_position_embeddings} tokens",
                setting="context",
            )
        if self.prompt_tokens + self.output_tokens > self.context:
            raise ConfigurationError(
                f"{self.prompt_tokens} prompt and {self.output_tokens} output tokens do not fit "
                f"--context {self.context}; give fewer, or a larger context",
                setting="prompt_tokens",
            )
        self._check_share(config)
        if self.tpot_target_s is not None and self.tpot_target_s <= 0:
            raise ConfigurationError("--tpot-target must be above 0", setting="tpot_target")

    def _check_share(self, config: ModelConfig) -> None:
        even = config.num_experts_per_tok / config.num_local_experts
        if self.hot_share is not None and not even <= self.hot_share <= 1:
            raise ConfigurationError(
                f"--skew {self.hot_share:g} cannot be: each token goes to "
                f"{config.num_experts_per_tok} of {config.num_local_experts} experts, so the "
                f"busiest gets from {even:g} (all alike) to 1 of the tokens",
                setting="skew",
            )
