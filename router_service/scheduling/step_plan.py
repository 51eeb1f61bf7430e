"""What the scheduler is told, and what it plans for one step."""

from __future__ import annotations

from dataclasses import dataclass

from router_service.scheduling.sequence import Payload, Sequence
from services.core.errors import ContextLengthError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Bounds of one engine. Token counts are per step unless they say otherwise.

    `max_waiting_tokens` bounds the prompt tokens of all waiting sequences together,
    `max_waiting_seqs` their number and `max_ttft_s` the predicted time to a first token (0: not);
    `max_imports_per_step` the restored blocks copied into the KV cache in one step.
    """

    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_waiting_tokens: int = 1 << 20
    max_waiting_seqs: int = 4096
    max_ttft_s: float = 0.0
    max_imports_per_step: int = 64

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt + completion that can be served at all."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    def check_fits(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raise `ContextLengthError` when such a sequence could never finish."""
        if num_prompt_tokens + max_tokens <= self.max_sequence_tokens:
            return
        limit = f"the model's context is {self.max_model_len} tokens"
        if self.num_blocks * self.block_size < self.max_model_len:
            limit = (
                f"the KV cache holds {self.num_blocks * self.block_size} tokens "
                f"({self.num_blocks} blocks of {self.block_size})"
            )
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, together "
            f"{num_prompt_tokens + max_tokens}, but {limit}; shorten the prompt or lower "
            f"max_tokens",
            param="max_tokens" if num_prompt_tokens < self.max_sequence_tokens else "prompt",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledSequence:
    """What one sequence does in a step: first the imports, then `num_tokens` tokens from `start`.

    `num_tokens` is 0 while imports are still left for a later step. `samples` says that the chunk
    reaches the sequence's last token, so that the next one can be drawn.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    is_prefill: bool
    samples: bool
    imports: tuple[tuple[int, Payload], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledStep:
    """Decodes first, then prefill. `admitted` and `preempted` changed state for this step.

    `num_moved_tokens` are tokens that waited for prefill and do no longer: computed in this step,
    restored, or found in the cache.
    """

    entries: tuple[ScheduledSequence, ...]
    num_moved_tokens: int = 0
    admitted: tuple[Sequence, ...] = ()
    preempted: tuple[Sequence, ...] = ()
