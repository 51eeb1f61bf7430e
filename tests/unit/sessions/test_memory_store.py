from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from services.sessions.block_codec import HEADER_BYTES
from services.sessions.memory_store import MemorySessionStore
from tests.support.session_blocks import (
    ALICE,
    LAYOUT,
    as_bytes,
    hashes_of,
    payloads_of,
    random_blocks,
)
from tests.support.session_contract import SessionStoreContract, StoreHarness

VALUE_BYTES = HEADER_BYTES + LAYOUT.payload_bytes


class MemoryHarness:
    def __init__(self) -> None:
        self.store = MemorySessionStore(LAYOUT)

    async def read(self, block_hash: bytes) -> bytes | None:
        return self.store.values.get(block_hash)

    async def write(self, block_hash: bytes, value: bytes) -> None:
        self.store.values[block_hash] = value

    async def write_checkpoint(self, block_hash: bytes, value: bytes) -> None:
        self.store.checkpoint_values[block_hash] = value


class TestMemorySessionStore(SessionStoreContract):
    @pytest.fixture
    async def harness(self) -> AsyncIterator[StoreHarness]:
        yield MemoryHarness()

    async def test_a_full_store_drops_what_was_used_longest_ago(self) -> None:
        store = MemorySessionStore(LAYOUT, max_bytes=4 * VALUE_BYTES + 1)
        blocks = random_blocks(4)
        await store.put(ALICE, blocks, num_tokens=16, ttl_s=60)
        await store.fetch(hashes_of(blocks[:2]))
        await store.touch(ALICE, hashes_of(blocks[3:]), num_tokens=16, ttl_s=60)
        more = random_blocks(2)
        await store.put(ALICE, more, num_tokens=24, ttl_s=60)
        kept = [block.hash for block in [*blocks, *more] if block.hash in store.values]
        assert set(kept) == set(hashes_of([blocks[1], blocks[3], *more]))

    async def test_a_full_store_drops_checkpoints_before_blocks_of_sessions(self) -> None:
        store = MemorySessionStore(LAYOUT, max_bytes=4 * VALUE_BYTES)
        blocks, checkpoints = random_blocks(3), random_blocks(2)
        await store.put(ALICE, blocks[:2], num_tokens=8, ttl_s=60)
        await store.put_checkpoint(checkpoints, ttl_s=600)
        await store.put(ALICE, blocks[2:], num_tokens=12, ttl_s=60)
        assert list(store.values) == hashes_of(blocks)
        assert list(store.checkpoint_values) == hashes_of(checkpoints[1:])

    async def test_a_clock_decides_what_has_expired(self) -> None:
        now = 1000.0
        store = MemorySessionStore(LAYOUT, clock=lambda: now)
        blocks = random_blocks(2)
        await store.put(ALICE, blocks, num_tokens=8, ttl_s=10)
        now = 1009.0
        assert as_bytes(await store.fetch(hashes_of(blocks))) == payloads_of(blocks)
        await store.touch(ALICE, [], num_tokens=8, ttl_s=10)
        now = 1018.0
        assert (await store.count_prefix(hashes_of(blocks))).num_stored == 2
        now = 1019.0
        assert (await store.count_prefix(hashes_of(blocks))).num_stored == 0
        assert await store.get_session("alice", "s1") is None
