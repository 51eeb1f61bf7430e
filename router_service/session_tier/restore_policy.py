"""Whether fetching stored KV is faster than computing it again, by what was measured here.

Pure: times are arguments. Both rates are ratios of decayed sums, so long measurements weigh more
than short ones and old ones fade. Until both are known the first fetch is tried and so measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

DECAY: Final = 0.8
"""What a measurement counts for when the next one comes."""
MIN_PREFILL_TOKENS: Final = 32
"""Smaller prefill steps are bound by reading weights and say nothing about the rate."""

MAX_QUESTION_S: Final = 1.0
"""A store that takes longer to say what it has is not asked further."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreDecision:
    """`deadline_s`: after that long the fetch is given up, and what came by then is used."""

    fetch: bool
    deadline_s: float = 0.0


class RestorePolicy:
    """Fetch-or-recompute for blocks of `block_size` tokens and `block_bytes` bytes.

    A fetch never costs more than `max_wait_s`, nor much more than computing the blocks takes. When
    fetching lost, it is tried again after `retry_s`: stores recover.
    """

    def __init__(
        self,
        *,
        block_size: int,
        block_bytes: int,
        min_wait_s: float = 0.25,
        max_wait_s: float = 5.0,
        retry_s: float = 60.0,
    ) -> None:
        self._block_size = block_size
        self._block_bytes = block_bytes
        self._min_wait_s = min_wait_s
        self._max_wait_s = max_wait_s
        self._retry_s = retry_s
        self._fetch = _Rate()
        self._prefill = _Rate()
        self._last_fetch = float("-inf")

    @property
    def fetch_bytes_per_s(self) -> float | None:
        return self._fetch.value

    @property
    def prefill_tokens_per_s(self) -> float | None:
        return self._prefill.value

    def observe_fetch(self, num_bytes: int, seconds: float, now: float) -> None:
        """A fetch ended, well or not; `seconds` is all of it, waiting for the store included."""
        self._fetch.observe(num_bytes, seconds)
        self._last_fetch = now

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """A step computed so many prompt tokens. Ignored when too few to tell a rate."""
        if num_tokens >= MIN_PREFILL_TOKENS:
            self._prefill.observe(num_tokens, seconds)

    def patience_s(self, num_blocks: int) -> float:
        """How long to wait for the word what is stored, of blocks that are not here: no longer
        than computing them takes, by a little at least."""
        prefill = self._prefill.value
        if prefill is None:
            return MAX_QUESTION_S
        recompute_s = num_blocks * self._block_size / prefill
        return min(max(recompute_s, self._min_wait_s), MAX_QUESTION_S)

    def decide(self, num_blocks: int, now: float) -> RestoreDecision:
        """For `num_blocks` stored blocks that are not in the local cache."""
        if num_blocks == 0:
            return RestoreDecision(fetch=False)
        prefill = self._prefill.value
        if prefill is None:
            return RestoreDecision(fetch=True, deadline_s=self._max_wait_s)
        recompute_s = num_blocks * self._block_size / prefill
        deadline_s = min(max(recompute_s, self._min_wait_s), self._max_wait_s)
        fetch = self._fetch.value
        if fetch is None or now - self._last_fetch > self._retry_s:
            return RestoreDecision(fetch=True, deadline_s=deadline_s)
        is_faster = num_blocks * self._block_bytes < fetch * recompute_s
        return RestoreDecision(fetch=is_faster, deadline_s=deadline_s)


class _Rate:
    """Amount per second, as decayed sum over decayed sum. None before the first measurement."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._amount = 0.0
        self._seconds = 0.0

    def observe(self, amount: float, seconds: float) -> None:
        self._amount = self._amount * DECAY + amount
        self._seconds = self._seconds * DECAY + max(seconds, 1e-9)
        self.value = self._amount / self._seconds
