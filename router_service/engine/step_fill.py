"""How full a step is: what tells a fleet at its limit from one that is merely never idle.

An engine that decodes one stream computes without a pause, and could decode many in hardly more
time. So seconds of steps are weighted by their fill before capacity is judged by them.
"""

from __future__ import annotations

from router_service.scheduling.step_plan import ScheduledStep, SchedulerConfig
from services.core.expert_costs import tokens_per_read
from services.core.model_config import ModelConfig


class StepFill:
    """Of one engine's steps: 1 is as many tokens as its steps can take together, or as many as make
    the experts' arithmetic take as long as reading their weights. Past that a step takes longer in
    proportion, so that more of them bring nothing."""

    def __init__(self, config: ModelConfig, scheduler: SchedulerConfig) -> None:
        self._full_tokens = min(scheduler.max_num_batched_tokens, tokens_per_read(config))
        self._full_seqs = scheduler.max_num_seqs

    def of(self, step: ScheduledStep) -> float:
        """A share of 1."""
        num_tokens = sum(entry.num_tokens for entry in step.entries)
        return min(1.0, max(num_tokens / self._full_tokens, len(step.entries) / self._full_seqs))
