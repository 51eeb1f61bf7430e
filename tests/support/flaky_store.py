"""A session store whose faults a test decides."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from services.core.errors import UnavailableError
from services.core.generation import SessionInfo
from services.sessions.memory_store import MemorySessionStore
from services.sessions.store import (
    BlockLayout,
    RefusalReason,
    SessionRef,
    StoredBlock,
    StoredPrefix,
)


class FlakyStore:
    """`SessionStore` in memory. `delay_s` passes before each answer, less if it is set to less
    meanwhile, and `fetch_delay_s` more before a payload; `is_down` makes calls fail;
    `payload_limit` cuts payloads that are fetched. Counts what it was asked."""

    def __init__(self, layout: BlockLayout) -> None:
        self.inner = MemorySessionStore(layout)
        self.delay_s = 0.0
        self.fetch_delay_s = 0.0
        self.is_down = False
        self.payload_limit: int | None = None
        self.num_counts = 0
        self.num_fetched = 0
        self.puts: list[tuple[SessionRef, list[bytes], int, float]] = []
        self.touches: list[tuple[SessionRef, list[bytes], int, float]] = []
        self.checkpoints: list[list[bytes]] = []
        self.is_closed = False

    async def put(
        self,
        session: SessionRef,
        blocks: Sequence[StoredBlock],
        *,
        num_tokens: int,
        ttl_s: float,
    ) -> None:
        await self._answer()
        self.puts.append((session, [block.hash for block in blocks], num_tokens, ttl_s))
        await self.inner.put(session, blocks, num_tokens=num_tokens, ttl_s=ttl_s)

    async def touch(
        self, session: SessionRef, hashes: Sequence[bytes], *, num_tokens: int, ttl_s: float
    ) -> None:
        await self._answer()
        self.touches.append((session, list(hashes), num_tokens, ttl_s))
        await self.inner.touch(session, hashes, num_tokens=num_tokens, ttl_s=ttl_s)

    async def put_checkpoint(self, blocks: Sequence[StoredBlock], *, ttl_s: float) -> None:
        await self._answer()
        self.checkpoints.append([block.hash for block in blocks])
        await self.inner.put_checkpoint(blocks, ttl_s=ttl_s)

    async def forget_checkpoint(self, hashes: Sequence[bytes]) -> None:
        await self._answer()
        await self.inner.forget_checkpoint(hashes)

    async def count_prefix(self, hashes: Sequence[bytes]) -> StoredPrefix:
        self.num_counts += 1
        await self._answer()
        return await self.inner.count_prefix(hashes)

    async def fetch(self, hashes: Sequence[bytes]) -> list[memoryview | None]:
        await self._answer(self.fetch_delay_s)
        payloads = await self.inner.fetch(hashes)
        self.num_fetched += sum(payload is not None for payload in payloads)
        return [None if payload is None else payload[: self.payload_limit] for payload in payloads]

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None:
        await self._answer()
        return await self.inner.get_session(tenant, session_id)

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        await self._answer()
        return await self.inner.delete_session(tenant, session_id)

    def refusals(self) -> dict[RefusalReason, int]:
        return self.inner.refusals()

    async def close(self) -> None:
        self.is_closed = True

    async def _answer(self, more_s: float = 0.0) -> None:
        if self.is_down:
            raise UnavailableError("the store is down")
        began = time.monotonic()
        while (left_s := began + self.delay_s + more_s - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(left_s, 0.01))
