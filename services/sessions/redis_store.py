"""Session store in Redis or Valkey, shared by all shards of a fleet.

Keys, with the first eight hex digits of the model's fingerprint:

- `expertfleet:{fleet}:kv:{fingerprint}:{hash}` a session's block (see block_codec), with a time to
  live; `expertfleet:{fleet}:ckpt:{fingerprint}:{hash}` the same of a checkpoint;
- `expertfleet:{fleet}:session:{fingerprint}:{digest of tenant and session id}` a hash of what
  `SessionInfo` tells, and the same key with `:blocks` the set of the session's block hashes;
- `expertfleet:{fleet}:sessions` the index of all sessions, for those who count them (see
  services.core.session_count).

A block two sessions share lives as long as the longer-lived one. The server may evict anything at
any time. With its header a payload of exactly 2^k bytes falls into the next size class of a server
built with jemalloc, which charges it 1.25 times; size `maxmemory` for that.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any, TypeVar

from redis.exceptions import ResponseError

from services.core.errors import UnavailableError
from services.core.generation import SessionInfo
from services.core.session_count import session_index_key
from services.sessions.block_codec import (
    HEADER_BYTES,
    BlockRefusedError,
    decode_block,
    encode_block,
)
from services.sessions.guarded_redis import ROUND_TRIP_TIMEOUT_S, Command, GuardedRedis
from services.sessions.store import (
    BlockLayout,
    RefusalReason,
    SessionRef,
    StoredBlock,
    StoredPrefix,
)

_BATCH_BYTES = 4 << 20
_BATCH_COMMANDS = 512
_REFRESH_FRACTION = 0.1
_FIELDS = ("num_tokens", "created_at", "updated_at", "expires_at")
_logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")


class RedisSessionStore:
    """`SessionStore` over one connection pool; used from one event loop.

    A round trip carries at most 4 MiB of blocks (twice that where what is fetched is stored and
    checkpointed) or 512 small commands, and is bounded and guarded as `GuardedRedis` says. `clock`
    gives Unix seconds. Raises `ConfigurationError` on a URL of another kind.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        fleet: str,
        layout: BlockLayout,
        round_trip_timeout_s: float = ROUND_TRIP_TIMEOUT_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._layout = layout
        self._clock = clock
        fingerprint = layout.model_fingerprint.hex()[:8]
        self._block_prefix = f"expertfleet:{fleet}:kv:{fingerprint}:"
        self._checkpoint_prefix = f"expertfleet:{fleet}:ckpt:{fingerprint}:"
        self._session_prefix = f"expertfleet:{fleet}:session:{fingerprint}:"
        self._session_index = session_index_key(fleet)
        self._blocks_per_batch = max(1, _BATCH_BYTES // (HEADER_BYTES + layout.payload_bytes))
        self._refusals: Counter[RefusalReason] = Counter()
        self._redis = GuardedRedis(redis_url, round_trip_timeout_s=round_trip_timeout_s)

    async def put(
        self,
        session: SessionRef,
        blocks: Sequence[StoredBlock],
        *,
        num_tokens: int,
        ttl_s: float,
    ) -> None:
        """See `SessionStore.put`. The index is written first, so that whatever was stored when a
        call failed half-way can be deleted."""
        hashes = [block.hash for block in blocks]
        await self._record(session, hashes, num_tokens=num_tokens, ttl_s=ttl_s)
        for batch in _batches(blocks, self._blocks_per_batch):
            commands: list[Command] = []
            for block in batch:
                key = self._block_key(block.hash)
                # Written even where a value is: it may be a damaged one that nobody has read yet.
                # The longer life of a session that shares the block stays.
                value = encode_block(self._layout, block.hash, block.payload)
                commands += [("SET", key, value, "KEEPTTL")]
                commands += [("PEXPIRE", key, _milliseconds(ttl_s), "NX")]
            await self._redis.run(commands)

    async def put_checkpoint(self, blocks: Sequence[StoredBlock], *, ttl_s: float) -> None:
        ttl_ms = _milliseconds(ttl_s)
        for batch in _batches(blocks, self._blocks_per_batch):
            commands: list[Command] = []
            for block in batch:
                key = self._checkpoint_key(block.hash)
                value = encode_block(self._layout, block.hash, block.payload)
                commands += [("SET", key, value, "NX", "PX", ttl_ms)]
                commands += [("PEXPIRE", key, ttl_ms, "GT")]
            await self._redis.run(commands)

    async def forget_checkpoint(self, hashes: Sequence[bytes]) -> None:
        for batch in _batches(hashes, _BATCH_COMMANDS):
            await self._redis.run([("UNLINK", *map(self._checkpoint_key, batch))])

    async def touch(
        self, session: SessionRef, hashes: Sequence[bytes], *, num_tokens: int, ttl_s: float
    ) -> None:
        await self._record(session, hashes, num_tokens=num_tokens, ttl_s=ttl_s)

    async def count_prefix(self, hashes: Sequence[bytes]) -> StoredPrefix:
        num_stored = num_restorable = 0
        for batch in _batches(hashes, _BATCH_COMMANDS):
            commands: list[Command] = []
            for item in batch:
                # A key that is named twice counts twice: 1 is a checkpoint only, 2 and 3 a block.
                block_key = self._block_key(item)
                commands.append(("EXISTS", self._checkpoint_key(item), block_key, block_key))
            for num_found in await self._redis.run(commands):
                if not num_found:
                    return StoredPrefix(num_stored=num_stored, num_restorable=num_restorable)
                num_stored += num_found >= 2 and num_stored == num_restorable
                num_restorable += 1
        return StoredPrefix(num_stored=num_stored, num_restorable=num_restorable)

    async def fetch(self, hashes: Sequence[bytes]) -> list[memoryview | None]:
        """See `SessionStore.fetch`. A failure after the first batch ends the prefix there."""
        payloads: list[memoryview] = []
        for batch in _batches(hashes, self._blocks_per_batch):
            try:
                values = await self._redis.run(
                    [
                        ("GET", key(item))
                        for key in (self._block_key, self._checkpoint_key)
                        for item in batch
                    ],
                    is_foreign_ok=True,
                )
            except UnavailableError:
                if not payloads:
                    raise
                break
            found = await self._verify(batch, values[: len(batch)], values[len(batch) :])
            payloads += found
            if len(found) < len(batch):
                break
        return payloads + [None] * (len(hashes) - len(payloads))

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None:
        key = self._session_key(SessionRef(tenant=tenant, session_id=session_id))
        fields, hashes = await self._redis.run(
            [("HMGET", key, *_FIELDS), ("SMEMBERS", key + ":blocks")]
        )
        numbers = _numbers(fields)
        if numbers is None:
            return None
        num_blocks = 0
        for batch in _batches(list(hashes), _BATCH_COMMANDS):
            keys = [self._block_key(item) for item in batch]
            num_blocks += (await self._redis.run([("EXISTS", *keys)]))[0]
        num_tokens, created_at, updated_at, expires_at = numbers
        return SessionInfo(
            session_id=session_id,
            tenant=tenant,
            num_tokens=int(num_tokens),
            num_blocks=num_blocks,
            stored_bytes=num_blocks * (HEADER_BYTES + self._layout.payload_bytes),
            created_at=created_at,
            updated_at=updated_at,
            expires_at=expires_at,
        )

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        """See `SessionStore.delete_session`. The index goes last: a call that failed half-way can
        be repeated."""
        key = self._session_key(SessionRef(tenant=tenant, session_id=session_id))
        (hashes,) = await self._redis.run([("SMEMBERS", key + ":blocks")])
        for batch in _batches(list(hashes), _BATCH_COMMANDS):
            await self._redis.run([("UNLINK", *(self._block_key(item) for item in batch))])
        deleted, _ = await self._redis.run(
            [("UNLINK", key, key + ":blocks"), ("ZREM", self._session_index, key)],
            is_foreign_ok=True,
        )
        return bool(deleted)

    def refusals(self) -> dict[RefusalReason, int]:
        return dict(self._refusals)

    async def close(self) -> None:
        await self._redis.close()

    async def _record(
        self, session: SessionRef, hashes: Sequence[bytes], *, num_tokens: int, ttl_s: float
    ) -> None:
        """Enter blocks in the session's index and extend the lives of those that are stored."""
        key, now, ttl_ms = self._session_key(session), self._clock(), _milliseconds(ttl_s)
        commands: list[Command] = [
            ("HSETNX", key, "blocks_live_until", repr(now + ttl_s)),
            ("HGET", key, "blocks_live_until"),
            ("HSETNX", key, "created_at", repr(now)),
            (
                *("HSET", key, "num_tokens", num_tokens),
                *("updated_at", repr(now), "expires_at", repr(now + ttl_s)),
            ),
            ("PEXPIRE", key, ttl_ms),
        ]
        commands += [
            ("SADD", key + ":blocks", *batch) for batch in _batches(hashes, _BATCH_COMMANDS)
        ]
        commands.append(("PEXPIRE", key + ":blocks", ttl_ms))
        indexing: list[Command] = [
            ("ZREMRANGEBYSCORE", self._session_index, "-inf", repr(now)),
            ("ZADD", self._session_index, repr(now + ttl_s), key),
            ("PEXPIRE", self._session_index, ttl_ms, "NX"),
            ("PEXPIRE", self._session_index, ttl_ms, "GT"),
        ]
        replies = await self._redis.run(commands + indexing, is_foreign_ok=True)
        indexed, replies = replies[len(commands) :], replies[: len(commands)]
        if any(isinstance(reply, ResponseError) for reply in indexed):
            _logger.warning("%s is no index of sessions: made anew", self._session_index)
            await self._redis.run([("UNLINK", self._session_index), *indexing])
        if any(isinstance(reply, ResponseError) for reply in replies):
            _logger.warning("the index of a session, %s, holds another type: made anew", key)
            await self._redis.run([("UNLINK", key, key + ":blocks")])
            replies = await self._redis.run(commands)
        await self._extend_lives(hashes, ttl_ms)
        # What is no number is as good as none: the lives of all blocks are extended.
        (blocks_live_until,) = _numbers(replies[1:2]) or (0.0,)
        if blocks_live_until < now + ttl_s * (1 - _REFRESH_FRACTION):
            (every_hash,) = await self._redis.run([("SMEMBERS", key + ":blocks")])
            await self._extend_lives(list(every_hash), ttl_ms)
            await self._redis.run([("HSET", key, "blocks_live_until", repr(now + ttl_s))])

    async def _extend_lives(self, hashes: Sequence[bytes], ttl_ms: int) -> None:
        """Let blocks live at least `ttl_ms` from now."""
        for batch in _batches(hashes, _BATCH_COMMANDS):
            await self._redis.run(
                [("PEXPIRE", self._block_key(item), ttl_ms, "GT") for item in batch]
            )

    async def _verify(
        self, hashes: Sequence[bytes], values: Sequence[Any], checkpoints: Sequence[Any]
    ) -> list[memoryview]:
        """The leading payloads that are sound as a block or as a checkpoint of one; what is refused
        on the way is counted and deleted."""
        payloads: list[memoryview] = []
        for block_hash, value, checkpoint in zip(hashes, values, checkpoints, strict=True):
            key, checkpoint_key = self._block_key(block_hash), self._checkpoint_key(block_hash)
            payload = await self._decode(block_hash, key, value)
            if payload is None:
                payload = await self._decode(block_hash, checkpoint_key, checkpoint)
                if payload is None:
                    break
                if value is not None:
                    # Sessions count on it. It lives as long as the checkpoint would, or as a
                    # session that uses it again extends that.
                    await self._mend(("COPY", checkpoint_key, key))
            payloads.append(payload)
        return payloads

    async def _decode(self, block_hash: bytes, key: str, value: Any) -> memoryview | None:
        if value is None:
            return None
        try:
            if isinstance(value, ResponseError):
                raise BlockRefusedError("foreign", str(value))
            return decode_block(self._layout, block_hash, value)
        except BlockRefusedError as error:
            self._refusals[error.reason] += 1
            _logger.warning("refused stored block %s as %s: %s", key, error.reason, error)
            await self._mend(("UNLINK", key))
            return None

    async def _mend(self, command: Command) -> None:
        try:
            await self._redis.run([command])
        except UnavailableError:
            _logger.debug("a refused block could not be deleted or replaced: %s", command)

    def _block_key(self, block_hash: bytes) -> str:
        return self._block_prefix + block_hash.hex()

    def _checkpoint_key(self, block_hash: bytes) -> str:
        return self._checkpoint_prefix + block_hash.hex()

    def _session_key(self, session: SessionRef) -> str:
        tenant, session_id = session.tenant.encode(), session.session_id.encode()
        name = b"%d:%b%b" % (len(tenant), tenant, session_id)
        return self._session_prefix + blake2b(name, digest_size=16).hexdigest()


def _batches(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _numbers(fields: Sequence[Any]) -> list[float] | None:
    """Fields of an index as finite numbers; None where one is missing or is none."""
    try:
        numbers = [float(field) for field in fields]
    except (TypeError, ValueError):
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
