"""One autoscaler acts at a time: a lease in the store of the fleet."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable
from typing import Protocol, cast

from redis.exceptions import RedisError

from services.core.redis_client import unbounded_redis

_RENEW = """
local holder = redis.call('get', KEYS[1])
if holder == ARGV[1] then return redis.call('pexpire', KEYS[1], ARGV[2]) end
if holder then return 0 end
redis.call('set', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_RELEASE = """
if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end
return 0
"""
_logger = logging.getLogger(__name__)


class Leadership(Protocol):
    async def holds(self) -> bool:
        """Take or renew the lead; true if this process has it now."""
        ...

    async def release(self) -> None: ...


class SoleLeader:
    """Where nobody else can be: inside the launcher."""

    async def holds(self) -> bool:
        return True

    async def release(self) -> None: ...


class RedisLeader:
    """Leads while its key lives. With the store away nobody leads: there are no leases to go by.

    `ttl_s` must outlast a few intervals; after a leader's death the next one takes over by then.
    """

    def __init__(
        self, redis_url: str, *, fleet: str, ttl_s: float = 5.0, timeout_s: float = 1.0
    ) -> None:
        self._key = f"expertfleet:{fleet}:autoscaler"
        self._token = secrets.token_hex(8)
        self._ttl_ms = round(ttl_s * 1000)
        self._timeout_s = timeout_s
        self._redis = unbounded_redis(redis_url, connect_timeout_s=timeout_s)

    async def holds(self) -> bool:
        return await self._call(_RENEW, self._ttl_ms)

    async def release(self) -> None:
        await self._call(_RELEASE, 0)
        await self._redis.aclose()

    async def _call(self, script: str, argument: int) -> bool:
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await cast(
                    "Awaitable[int]",
                    self._redis.eval(script, 1, self._key, self._token, str(argument)),
                )
        except (RedisError, OSError, TimeoutError) as error:
            _logger.debug("the lead could not be taken: %s", error)
            return False
        return int(answer) == 1
