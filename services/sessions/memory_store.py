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
from services.sessions.store import (
    BlockLayout,
    RefusalReason,
    SessionRef,
    StoredBlock,
    StoredPrefix,
)


@dataclass(slots=True, kw_only=True)
class _Session:
    created_at: float
    updated_at: float
    expires_at: float
    num_tokens: int
    hashes: set[bytes] = field(default_factory=set)


class MemorySessionStore:
    """`SessionStore` in dicts. Past `max_bytes` what was used longest ago is dropped: checkpoints
    first, then blocks of sessions.

    `clock` gives Unix seconds. `values` are the stored values of sessions by hash, as a Redis would
    hold them, and `checkpoint_values` those of checkpoints.
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
        self._blocks = _Shelf(clock)
        self._checkpoints = _Shelf(clock)
        self.values = self._blocks.values
        self.checkpoint_values = self._checkpoints.values
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
        for block in blocks:
            self._write(self._blocks, block, ttl_s)
        hashes = [block.hash for block in blocks]
        await self.touch(session, hashes, num_tokens=num_tokens, ttl_s=ttl_s)

    async def put_checkpoint(self, blocks: Sequence[StoredBlock], *, ttl_s: float) -> None:
        for block in blocks:
            if block.hash in self._checkpoints:
                self._checkpoints.prolong(block.hash, ttl_s)
            else:
                self._write(self._checkpoints, block, ttl_s)

    async def forget_checkpoint(self, hashes: Sequence[bytes]) -> None:
        for block_hash in hashes:
            self._checkpoints.drop(block_hash)

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
            if block_hash in self._blocks:
                self._blocks.prolong(block_hash, ttl_s)
        for block_hash in hashes:
            if block_hash in self.values:
                self.values.move_to_end(block_hash)

    async def count_prefix(self, hashes: Sequence[bytes]) -> StoredPrefix:
        num_stored = num_restorable = 0
        for block_hash in hashes:
            is_stored = block_hash in self._blocks
            if not is_stored and block_hash not in self._checkpoints:
                break
            num_stored += is_stored and num_stored == num_restorable
            num_restorable += 1
        return StoredPrefix(num_stored=num_stored, num_restorable=num_restorable)

    async def fetch(self, hashes: Sequence[bytes]) -> list[memoryview | None]:
        payloads: list[memoryview | None] = []
        for block_hash in hashes:
            was_stored = block_hash in self._blocks
            payload = self._read(self._blocks, block_hash)
            if payload is None:
                payload = self._read(self._checkpoints, block_hash)
                if payload is None:
                    break
                if was_stored:
                    self._blocks.copy_from(self._checkpoints, block_hash)
            payloads.append(payload)
        return payloads + [None] * (len(hashes) - len(payloads))

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None:
        self._drop_expired_sessions(self._clock())
        state = self._sessions.get(SessionRef(tenant=tenant, session_id=session_id))
        if state is None:
            return None
        stored = [block_hash for block_hash in state.hashes if block_hash in self._blocks]
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
            self._blocks.drop(block_hash)
        return True

    def refusals(self) -> dict[RefusalReason, int]:
        return dict(self._refusals)

    async def close(self) -> None:
        self._blocks.clear()
        self._checkpoints.clear()
        self._sessions.clear()

    def _write(self, shelf: _Shelf, block: StoredBlock, ttl_s: float) -> None:
        shelf.write(block.hash, encode_block(self._layout, block.hash, block.payload), ttl_s)
        while len(self.values) + len(self.checkpoint_values) > self._max_blocks:
            victims = self._checkpoints if self.checkpoint_values else self._blocks
            victims.drop(next(iter(victims.values)))

    def _read(self, shelf: _Shelf, block_hash: bytes) -> memoryview | None:
        """The payload, None when it is absent or was refused."""
        if block_hash not in shelf:
            return None
        try:
            payload = decode_block(self._layout, block_hash, shelf.values[block_hash])
        except BlockRefusedError as error:
            self._refusals[error.reason] += 1
            shelf.drop(block_hash)
            return None
        shelf.values.move_to_end(block_hash)
        return payload

    def _drop_expired_sessions(self, now: float) -> None:
        expired = [ref for ref, state in self._sessions.items() if state.expires_at <= now]
        for ref in expired:
            del self._sessions[ref]


class _Shelf:
    """Values by hash, each with the time it expires, in the order of their last use."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.values: OrderedDict[bytes, bytes] = OrderedDict()
        self._expiry: dict[bytes, float] = {}

    def __contains__(self, block_hash: bytes) -> bool:
        if block_hash not in self.values:
            return False
        if self._expiry[block_hash] <= self._clock():
            self.drop(block_hash)
            return False
        return True

    def write(self, block_hash: bytes, value: bytes, ttl_s: float) -> None:
        self.values[block_hash] = value
        self.prolong(block_hash, ttl_s)

    def prolong(self, block_hash: bytes, ttl_s: float) -> None:
        """It lives at least `ttl_s` from now."""
        until = self._clock() + ttl_s
        self._expiry[block_hash] = max(until, self._expiry.get(block_hash, until))

    def copy_from(self, other: _Shelf, block_hash: bytes) -> None:
        """Value and life of what the other one has."""
        self.values[block_hash] = other.values[block_hash]
        self._expiry[block_hash] = other._expiry[block_hash]

    def drop(self, block_hash: bytes) -> None:
        self.values.pop(block_hash, None)
        self._expiry.pop(block_hash, None)

    def clear(self) -> None:
        self.values.clear()
        self._expiry.clear()
