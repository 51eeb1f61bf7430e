"""Round trips to a Redis or Valkey that may be slow, full, restarted, hanging or gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from services.core.errors import ConfigurationError, UnavailableError
from services.core.redis_client import unbounded_redis
from services.sessions.circuit_breaker import CircuitBreaker

CONNECT_TIMEOUT_S = 0.5
ROUND_TRIP_TIMEOUT_S = 0.5
RETRY_AFTER_S = 2.0

Command = tuple[str | bytes | int, ...]


class GuardedRedis:
    """A connection pool whose every use is over within `round_trip_timeout_s`.

    After two failures in a row every call fails at once for two seconds, then one is let through.
    The server's refusal of a command (out of memory, no permission) is an error of that call, not
    such a failure. Replies are raw: bytes, int, None. Used from one event loop.
    """

    def __init__(
        self, redis_url: str, *, round_trip_timeout_s: float = ROUND_TRIP_TIMEOUT_S
    ) -> None:
        self._timeout_s = round_trip_timeout_s
        self._breaker = CircuitBreaker(threshold=2, open_s=RETRY_AFTER_S)
        self._client = _client(redis_url, min(CONNECT_TIMEOUT_S, round_trip_timeout_s))

    async def run(self, commands: Sequence[Command], *, is_foreign_ok: bool = False) -> list[Any]:
        """One pipeline, not a transaction. Raises `UnavailableError`, for an error reply too.

        With `is_foreign_ok` a key that holds another type has its error in the result instead.
        """
        if not self._breaker.allow(time.monotonic()):
            raise UnavailableError(
                "the session store did not answer lately and is left alone for "
                f"{RETRY_AFTER_S:g} s; check that the server of REDIS_URL is up"
            )
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.pipeline(transaction=False) as pipeline,
            ):
                for command in commands:
                    pipeline.execute_command(*command)
                replies = await pipeline.execute(raise_on_error=False)
        except (RedisError, OSError, TimeoutError) as error:
            self._breaker.failed(time.monotonic())
            raise UnavailableError(
                f"the session store could not be used ({type(error).__name__}: {error}); "
                "check that the server of REDIS_URL is up"
            ) from error
        self._breaker.succeeded()
        for reply in replies:
            if isinstance(reply, ResponseError) and not (
                is_foreign_ok and str(reply).startswith("WRONGTYPE")
            ):
                raise UnavailableError(f"the session store refused a command: {reply}")
        return replies

    async def close(self) -> None:
        await self._client.aclose()


def _client(redis_url: str, connect_timeout_s: float) -> Redis:
    """No connection is made yet."""
    try:
        return unbounded_redis(redis_url, connect_timeout_s=connect_timeout_s)
    except ValueError as error:
        raise ConfigurationError(
            f"REDIS_URL cannot be used: {error}", setting="redis_url"
        ) from error
