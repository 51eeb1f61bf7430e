"""Session store in this process: for tests, and for a fleet of one without a Redis."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.core.generation import SessionInfo
from services.sessions.block_codec import (
    HEADER_BYTES,
    BlockRefusedError,
    decode_block,
    encode_block,
)
from services.sessions.store import BlockLayout, RefusalReason, SessionRef, StoredBlock


@dataclass(slots=True, kw_only=True)
class _Session:
    created_at: float
    updated_at: float
    expires_at: float
    num_tokens: int
    hashes: set[bytes] = field(default_factory=set)


class MemorySessionStore:
    """`SessionStore` in a dict. Past `max_bytes` the block that was used longest ago is dropped.

    `clock` gives Unix seconds. `values` are the stored values by hash, as a Redis would hold them.
    """

    def __init__(
        self,
        layout: BlockLayout,
        *,
        max_bytes: int = 1 << 30,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._layout = layout
        self._max_blocks = max_bytes // (HEADER_BYTES + layout.payload_bytes)
        self._clock = clock
        self.values: OrderedDict[bytes, bytes] = OrderedDict()
        self._expiry: dict[bytes, float] = {}
        self._sessions: dict[SessionRef, _Session] = {}
        self._refusals: Counter[RefusalReason] = Counter()

    async def put(
        self,
        session: SessionRef,
        blocks: Sequence[StoredBlock],
        *,
        num_tokens: int,
        ttl_s: float,
    ) -> None:
        self._write(blocks, ttl_s)
        hashes = [block.hash for block in blocks]
        await self.touch(session, hashes, num_tokens=num_tokens, ttl_s=ttl_s)

    async def put_checkpoint(self, blocks: Sequence[StoredBlock], *, ttl_s: float) -> None:
        self._write([block for block in blocks if not self._is_stored(block.hash)], ttl_s)

    async def forget_checkpoint(self, hashes: Sequence[bytes], *, ttl_s: float) -> None:
        until = self._clock() + ttl_s
        for block_hash in hashes:
            if self._expiry.get(block_hash, 0.0) <= until:
                self._drop(block_hash)

    async def touch(
        self, session: SessionRef, hashes: Sequence[bytes], *, num_tokens: int, ttl_s: float
    ) -> None:
        now = self._clock()
        self._drop_expired_sessions(now)
        state = self._sessions.get(session)
        if state is None:
            state = _Session(created_at=now, updated_at=now, expires_at=0.0, num_tokens=0)
            self._sessions[session] = state
        state.updated_at, state.expires_at, state.num_tokens = now, now + ttl_s, num_tokens
        state.hashes.update(hashes)
        for block_hash in state.hashes:
            if self._is_stored(block_hash):
                self._expiry[block_hash] = max(self._expiry[block_hash], now + ttl_s)
        for block_hash in hashes:
            if block_hash in self.values:
                self.values.move_to_end(block_hash)

    async def count_prefix(self, hashes: Sequence[bytes]) -> int:
        for count, block_hash in enumerate(hashes):
            if not self._is_stored(block_hash):
                return count
        return len(hashes)

    async def fetch(self, hashes: Sequence[bytes]) -> list[memoryview | None]:
        payloads: list[memoryview | None] = []
        for block_hash in hashes:
            if not self._is_stored(block_hash):
                break
            try:
                payload = decode_block(self._layout, block_hash, self.values[block_hash])
            except BlockRefusedError as error:
                self._refusals[error.reason] += 1
                self._drop(block_hash)
                break
            self.values.move_to_end(block_hash)
            payloads.append(payload)
        return payloads + [None] * (len(hashes) - len(payloads))

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None:
        self._drop_expired_sessions(self._clock())
        state = self._sessions.get(SessionRef(tenant=tenant, session_id=session_id))
        if state is None:
            return None
        stored = [block_hash for block_hash in state.hashes if self._is_stored(block_hash)]
        return SessionInfo(
            session_id=session_id,
            tenant=tenant,
            num_tokens=state.num_tokens,
            num_blocks=len(stored),
            stored_bytes=sum(len(self.values[block_hash]) for block_hash in stored),
            created_at=state.created_at,
            updated_at=state.updated_at,
            expires_at=state.expires_at,
        )

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        self._drop_expired_sessions(self._clock())
        state = self._sessions.pop(SessionRef(tenant=tenant, session_id=session_id), None)
        if state is None:
            return False
        for block_hash in state.hashes:
            self._drop(block_hash)
        return True

    def refusals(self) -> dict[RefusalReason, int]:
        return dict(self._refusals)

    async def close(self) -> None:
        self.values.clear()
        self._expiry.clear()
        self._sessions.clear()

    def _write(self, blocks: Sequence[StoredBlock], ttl_s: float) -> None:
        for block in blocks:
            self.values[block.hash] = encode_block(self._layout, block.hash, block.payload)
            until = self._clock() + ttl_s
            self._expiry[block.hash] = max(until, self._expiry.get(block.hash, until))
            self._evict()

    def _is_stored(self, block_hash: bytes) -> bool:
        if block_hash not in self.values:
            return False
        if self._expiry[block_hash] <= self._clock():
            self._drop(block_hash)
            return False
        return True

    def _drop(self, block_hash: bytes) -> None:
        self.values.pop(block_hash, None)
        self._expiry.pop(block_hash, None)

    def _evict(self) -> None:
        while len(self.values) > self._max_blocks:
            self._drop(next(iter(self.values)))

    def _drop_expired_sessions(self, now: float) -> None:
        expired = [ref for ref, state in self._sessions.items() if state.expires_at <= now]
        for ref in expired:
            del self._sessions[ref]
