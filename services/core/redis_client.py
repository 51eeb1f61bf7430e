"""Clients of Redis or Valkey whose callers bound every call themselves."""

from __future__ import annotations

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff


def unbounded_redis(redis_url: str, *, connect_timeout_s: float) -> Redis:
    """To be used inside `asyncio.timeout`: but for connecting there is no timeout of its own.

    redis-py's (`socket_timeout`) sends within `asyncio.wait_for`, which before Python 3.12 loses a
    cancellation that comes as the sending ends: a cancelled task would go on, and whoever waits for
    its end wait for ever. No connection is made yet. Raises `ValueError` for a URL it cannot read.
    """
    return Redis.from_url(
        redis_url,
        socket_connect_timeout=connect_timeout_s,
        socket_timeout=None,
        # Once more at once: a pooled connection may have died with the server's last restart.
        retry=Retry(NoBackoff(), 1),
    )
