"""What this gateway served lately: latencies, its own and per shard, and its slow requests.

The serving path calls in here when a request is over, never per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from services.gateway.console.contract import SlowRequestView
from services.gateway.console.latencies import Latencies
from services.gateway.console.slow_requests import SlowRequests

LONG_WINDOW_S: Final = 30.0
_MAX_SHARDS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What came of one request's generation, well or not. TPOT is None below two tokens."""

    model: str
    num_prompt_tokens: int
    num_generated_tokens: int
    ttft_s: float | None
    tpot_s: float | None


class Activity:
    """Used on the gateway's event loop. `clock` gives Unix seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._by_shard: dict[str, Latencies] = {}
        self.latencies = Latencies(LONG_WINDOW_S)
        self.slow_requests = SlowRequests()

    def of_shard(self, shard_id: str, *, num_shards: int) -> Latencies | None:
        """Of this gateway's requests there. Where nobody tells shards apart, as with one in the
        gateway's own process, the only one served all."""
        if not self._by_shard and num_shards == 1:
            return self.latencies
        return self._by_shard.get(shard_id)

    def shard_served(self, shard_id: str, ttft_s: float | None, tpot_s: float | None) -> None:
        """A request on that shard is over; None where there was no such token."""
        if ttft_s is None and tpot_s is None:
            return
        if shard_id not in self._by_shard:
            if len(self._by_shard) >= _MAX_SHARDS:
                # Shards come and go over a long life; the one that was there first goes.
                del self._by_shard[next(iter(self._by_shard))]
            self._by_shard[shard_id] = Latencies(LONG_WINDOW_S)
        self._by_shard[shard_id].add(ttft_s, tpot_s, self._clock())

    def request_ended(
        self, served: Served, *, request_id: str, trace_id: str | None, status: int, took_s: float
    ) -> None:
        now = self._clock()
        self.latencies.add(served.ttft_s, served.tpot_s, now)
        slow: SlowRequestView = {
            "request_id": request_id,
            "trace_id": trace_id,
            "model": served.model,
            "started_at": round(now - took_s, 3),
            "duration_s": round(took_s, 4),
            "ttft_s": None if served.ttft_s is None else round(served.ttft_s, 4),
            "num_prompt_tokens": served.num_prompt_tokens,
            "num_generated_tokens": served.num_generated_tokens,
            "status": status,
        }
        self.slow_requests.add(slow, now)
