"""Whether one more request may wait, or is refused at once. Pure: time is an argument.

A request is refused when too many tokens or sequences wait already (memory), or when its first
token is predicted to be too far away. The prediction is the tokens ahead of it in the queue over
the rate at which tokens leave it, measured only while something is left waiting: then a step takes
all it can, whatever it is that binds, computing, KV blocks or the number of sequences.

What its own prompt takes is left out on purpose. Coming back later would not shorten it; and if it
counted, long prompts would be refused for good wherever short ones keep the queue near its bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from router_service.scheduling.step_plan import SchedulerConfig
from services.core.errors import OverloadedError

MEMORY_S: Final = 30.0
"""Time constant of the measured rate."""
MIN_MOVING_STEPS: Final = 4
"""Nothing is predicted before so many measured steps have moved the queue."""
MAX_RETRY_AFTER_S: Final = 300.0
"""Further ahead, a prediction is worth nothing."""


class QueueRate:
    """Tokens that leave the queue per second while there is one, the recent past weighing most.

    Both sums, tokens and seconds, fade alike, so their ratio is an average over time, not over
    steps: a long step counts for its length, and so does a wait during which nothing moves.
    """

    def __init__(self, memory_s: float = MEMORY_S) -> None:
        self._memory_s = memory_s
        self._tokens = 0.0
        self._seconds = 0.0
        self._num_moving_steps = 0
        self._backlog_since: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """None while too little was measured."""
        if self._num_moving_steps < MIN_MOVING_STEPS or not self._seconds:
            return None
        return self._tokens / self._seconds

    def observe(
        self, *, started_at: float, ended_at: float, num_tokens: int, has_backlog: bool
    ) -> None:
        """A step moved `num_tokens` out of the queue; did it leave any that it could have taken?

        Times are readings of one monotonic clock. Between two steps that leave a backlog all time
        counts, in the steps and between them.
        """
        since = started_at if self._backlog_since is None else self._backlog_since
        self._backlog_since = ended_at if has_backlog else None
        if not has_backlog:
            return
        elapsed_s = max(0.0, ended_at - since)
        kept = math.exp(-elapsed_s / self._memory_s)
        self._tokens = self._tokens * kept + num_tokens
        self._seconds = self._seconds * kept + elapsed_s
        self._num_moving_steps += num_tokens > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """What waits now. `tokens_ahead` are those that come before the new request."""

    waiting_tokens: int
    waiting_seqs: int
    tokens_ahead: int


def predicted_wait_s(tokens_ahead: int, tokens_per_s: float | None) -> float:
    """Seconds until the turn of a prompt behind `tokens_ahead`; 0 where nothing was measured."""
    if not tokens_ahead or tokens_per_s is None:
        return 0.0
    return tokens_ahead / tokens_per_s if tokens_per_s else math.inf


def check_admission(
    queue: QueueState, num_tokens: int, tokens_per_s: float | None, limits: SchedulerConfig
) -> None:
    """Raise `OverloadedError` unless a prompt of `num_tokens` may wait.

    Its `retry_after_s` is when the queue is predicted to be short enough. An empty queue takes
    anything. Monotone: what is refused stays so with more waiting or with a longer prompt.
    """
    waiting, most = queue.waiting_tokens, limits.max_waiting_tokens
    if waiting and waiting + num_tokens > most:
        excess = min(waiting, waiting + num_tokens - most)
        raise OverloadedError(
            f"{waiting} prompt tokens wait already and {num_tokens} more would pass the limit of "
            f"{most}; try again later",
            retry_after_s=_retry_after_s(excess, tokens_per_s),
        )
    if queue.waiting_seqs >= limits.max_waiting_seqs:
        raise OverloadedError(
            f"{queue.waiting_seqs} completions wait already, and the limit is "
            f"{limits.max_waiting_seqs}; try again later",
            retry_after_s=_retry_after_s(waiting // queue.waiting_seqs, tokens_per_s),
        )
    wait_s = predicted_wait_s(queue.tokens_ahead, tokens_per_s)
    if limits.max_ttft_s and wait_s > limits.max_ttft_s:
        raise OverloadedError(
            f"the first token is predicted to take {wait_s:.0f} s ({queue.tokens_ahead} prompt "
            f"tokens are before it), and the limit is {limits.max_ttft_s:g} s; try again later",
            retry_after_s=_bounded(wait_s - limits.max_ttft_s),
        )


def _retry_after_s(excess_tokens: int, tokens_per_s: float | None) -> float:
    return _bounded(predicted_wait_s(excess_tokens, tokens_per_s))


def _bounded(seconds: float) -> float:
    return min(max(seconds, 1.0), MAX_RETRY_AFTER_S)
