"""The slowest requests of the last minutes, so that a person can look at their traces."""

from __future__ import annotations

from services.gateway.console.contract import SlowRequestView

_MAX_BUCKETS = 10


class SlowRequests:
    """The `limit` slowest of the last `window_s` seconds, within a tenth of the window.

    Kept in ten buckets of time, each with its own `limit` slowest, so that what is held is bounded
    whatever comes. Times are Unix seconds.
    """

    def __init__(self, *, limit: int = 20, window_s: float = 600.0) -> None:
        self._limit = limit
        self._bucket_s = window_s / _MAX_BUCKETS
        self._buckets: dict[int, list[SlowRequestView]] = {}

    def add(self, request: SlowRequestView, now: float) -> None:
        bucket = self._buckets.setdefault(int(now // self._bucket_s), [])
        if len(bucket) < self._limit:
            bucket.append(request)
            return
        fastest = min(range(len(bucket)), key=lambda index: bucket[index]["duration_s"])
        if bucket[fastest]["duration_s"] < request["duration_s"]:
            bucket[fastest] = request

    def slowest(self, now: float) -> list[SlowRequestView]:
        """The slowest first."""
        newest = int(now // self._bucket_s)
        for number in [each for each in self._buckets if each <= newest - _MAX_BUCKETS]:
            del self._buckets[number]
        kept = [request for bucket in self._buckets.values() for request in bucket]
        return sorted(kept, key=lambda request: -request["duration_s"])[: self._limit]
