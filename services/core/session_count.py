"""How many sessions a fleet's store holds, from an index that the shards keep beside them.

The index is a sorted set: a member for each session, scored with the Unix time at which it ends.
The store may lose it, or entries of it, at any time; each use of a session writes its entry again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from services.core.redis_client import unbounded_redis


def session_index_key(fleet: str) -> str:
    return f"expertfleet:{fleet}:sessions"


class RedisSessionCount:
    """Used from one event loop; a call is over within `timeout_s`."""

    def __init__(
        self,
        redis_url: str,
        *,
        fleet: str,
        timeout_s: float = 1.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._key = session_index_key(fleet)
        self._timeout_s = timeout_s
        self._clock = clock
        self._redis = unbounded_redis(redis_url, connect_timeout_s=timeout_s)

    async def __call__(self) -> int | None:
        """Sessions that have not ended; None when the store cannot tell."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return int(await self._redis.zcount(self._key, self._clock(), "+inf"))
        except (RedisError, OSError, TimeoutError):
            return None

    async def close(self) -> None:
        await self._redis.aclose()
