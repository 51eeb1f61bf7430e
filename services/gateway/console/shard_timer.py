"""How long one request takes its shard, as the gateway sees it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from services.core.generation import GenerateRequest, GenerationDelta


class ShardTimer:
    """Starts when the request goes out; `take` is called with whatever comes.

    Costs a clock reading and a sum for each batch of tokens.
    """

    def __init__(self, request: GenerateRequest) -> None:
        self._num_choices = request.n
        self._is_resumed = bool(request.resumed)
        self._sent_at = time.perf_counter()
        self._first_at = self._last_at = 0.0
        self._num_tokens = self._num_first = 0

    def take(self, deltas: Sequence[GenerationDelta]) -> None:
        self._last_at = time.perf_counter()
        for delta in deltas:
            self._num_tokens += len(delta.token_ids)
        if not self._first_at:
            self._first_at, self._num_first = self._last_at, self._num_tokens

    @property
    def ttft_s(self) -> float | None:
        """None before a token, and for a request that another shard had begun."""
        return self._first_at - self._sent_at if self._first_at and not self._is_resumed else None

    @property
    def tpot_s(self) -> float | None:
        """Of one choice, on average; the tokens that came with the first one are not counted."""
        num_further = self._num_tokens - self._num_first
        if num_further <= 0:
            return None
        return (self._last_at - self._first_at) * self._num_choices / num_further
