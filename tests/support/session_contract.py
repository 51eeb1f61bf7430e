"""What every session store must do. Subclassed by the tests of each implementation."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from typing import Protocol

import pytest

from services.sessions.block_codec import HEADER_BYTES, encode_block
from services.sessions.store import (
    BlockLayout,
    RefusalReason,
    SessionRef,
    SessionStore,
    StoredBlock,
)
from tests.support.eventually import eventually
from tests.support.session_blocks import (
    ALICE,
    LAYOUT,
    OTHER_MODEL,
    OTHER_SHAPE,
    as_bytes,
    hashes_of,
    payloads_of,
    random_blocks,
)

VALUE_BYTES = HEADER_BYTES + LAYOUT.payload_bytes


class StoreHarness(Protocol):
    """A way around the store, to what it keeps."""

    @property
    def store(self) -> SessionStore: ...

    async def read(self, block_hash: bytes) -> bytes | None: ...

    async def write(self, block_hash: bytes, value: bytes) -> None:
        """Replace what is kept of a session's block, as somebody else might."""
        ...

    async def write_checkpoint(self, block_hash: bytes, value: bytes) -> None:
        """The same of a checkpoint."""
        ...


class SessionStoreContract:
    @pytest.fixture
    async def harness(self) -> AsyncIterator[StoreHarness]:
        raise NotImplementedError
        yield

    @pytest.fixture
    def store(self, harness: StoreHarness) -> SessionStore:
        return harness.store

    async def test_blocks_come_back_as_they_were_put(self, store: SessionStore) -> None:
        blocks = random_blocks(5)
        await store.put(ALICE, blocks, num_tokens=20, ttl_s=60)
        found = await store.fetch(hashes_of(blocks))
        assert as_bytes(found) == payloads_of(blocks)
        assert all(payload is not None and payload.readonly for payload in found)

    async def test_a_payload_may_be_a_view_of_something_larger(self, store: SessionStore) -> None:
        (block,) = random_blocks(1)
        pool = bytearray(b"x" * 7 + bytes(block.payload) + b"y" * 9)
        view = memoryview(pool)[7:-9]
        await store.put(ALICE, [type(block)(hash=block.hash, payload=view)], num_tokens=4, ttl_s=60)
        pool[:] = bytes(len(pool))
        assert as_bytes(await store.fetch([block.hash])) == [block.payload]

    async def test_a_payload_of_another_size_is_the_callers_mistake(
        self, store: SessionStore
    ) -> None:
        (block,) = random_blocks(1, OTHER_SHAPE)
        short = type(block)(hash=block.hash, payload=bytes(block.payload)[:-2])
        with pytest.raises(ValueError, match="payload has"):
            await store.put(ALICE, [short], num_tokens=4, ttl_s=60)

    async def test_a_checkpoint_is_found_until_it_is_forgotten(self, store: SessionStore) -> None:
        blocks = random_blocks(5)
        await store.put_checkpoint(blocks, ttl_s=60)
        assert as_bytes(await store.fetch(hashes_of(blocks))) == payloads_of(blocks)
        assert await count(store, blocks) == (0, 5)
        await store.forget_checkpoint(hashes_of(blocks[3:]))
        assert await count(store, blocks) == (0, 3)
        await store.forget_checkpoint([*hashes_of(blocks), os.urandom(16)])
        assert await count(store, blocks) == (0, 0)

    async def test_a_session_does_not_count_on_a_checkpoint(self, store: SessionStore) -> None:
        blocks = random_blocks(4)
        await store.put_checkpoint(blocks[:3], ttl_s=60)
        await store.put(ALICE, [blocks[0], blocks[2]], num_tokens=16, ttl_s=60)
        assert await count(store, blocks) == (1, 3)
        await store.touch(ALICE, hashes_of(blocks[:3]), num_tokens=16, ttl_s=60)
        assert await count(store, blocks) == (1, 3), "to be touched is not to be stored"
        assert as_bytes(await store.fetch(hashes_of(blocks))) == [*payloads_of(blocks[:3]), None]
        info = await store.get_session(ALICE.tenant, ALICE.session_id)
        assert info is not None
        assert info.num_blocks == 2
        await store.put(ALICE, [blocks[1], blocks[3]], num_tokens=16, ttl_s=60)
        await store.forget_checkpoint(hashes_of(blocks))
        assert await count(store, blocks) == (4, 4)
        assert as_bytes(await store.fetch(hashes_of(blocks))) == payloads_of(blocks)

    @pytest.mark.parametrize("session_ttl_s", [30, 600])
    async def test_a_session_outlives_a_checkpoint_whatever_its_time_to_live(
        self, store: SessionStore, session_ttl_s: float
    ) -> None:
        before, after = random_blocks(2)
        await store.put(ALICE, [before], num_tokens=4, ttl_s=session_ttl_s)
        await store.put_checkpoint([before, after], ttl_s=60)
        await store.put(ALICE, [after], num_tokens=8, ttl_s=session_ttl_s)
        await store.forget_checkpoint(hashes_of([before, after]))
        assert await count(store, [before, after]) == (2, 2)
        assert as_bytes(await store.fetch(hashes_of([before, after]))) == payloads_of(
            [before, after]
        )

    async def test_deleting_a_session_leaves_the_checkpoints_of_others(
        self, store: SessionStore
    ) -> None:
        blocks = random_blocks(2)
        await store.put(ALICE, blocks, num_tokens=8, ttl_s=60)
        await store.put_checkpoint(blocks[:1], ttl_s=60)
        await store.delete_session(ALICE.tenant, ALICE.session_id)
        assert await count(store, blocks) == (0, 1)

    async def test_a_checkpoint_put_again_lives_on(self, store: SessionStore) -> None:
        again, once = random_blocks(2)
        await store.put_checkpoint([again, once], ttl_s=0.3)
        await store.put_checkpoint([again], ttl_s=60)
        await store.put_checkpoint([again], ttl_s=0.1)
        await eventually(lambda: is_gone(store, once))
        assert await count(store, [again]) == (0, 1)

    async def test_a_sound_checkpoint_replaces_the_damaged_block_of_a_session(
        self, harness: StoreHarness
    ) -> None:
        blocks, store = random_blocks(3), harness.store
        await store.put(ALICE, blocks, num_tokens=12, ttl_s=60)
        await store.put_checkpoint(blocks, ttl_s=60)
        await harness.write(blocks[1].hash, b"torn")
        assert as_bytes(await store.fetch(hashes_of(blocks))) == payloads_of(blocks)
        assert sum(store.refusals().values()) == 1
        assert await count(store, blocks) == (3, 3), "the session counts on it"
        await store.forget_checkpoint(hashes_of(blocks))
        assert as_bytes(await store.fetch(hashes_of(blocks))) == payloads_of(blocks)
        assert sum(store.refusals().values()) == 1

    async def test_a_damaged_checkpoint_is_refused_counted_and_deleted(
        self, harness: StoreHarness
    ) -> None:
        blocks, store = random_blocks(4), harness.store
        await store.put_checkpoint(blocks, ttl_s=60)
        await store.put(ALICE, [blocks[1], blocks[3]], num_tokens=16, ttl_s=60)
        await harness.write_checkpoint(blocks[1].hash, b"never read: the session's is sound")
        await harness.write_checkpoint(blocks[2].hash, b"torn")
        found = await store.fetch(hashes_of(blocks))
        assert as_bytes(found) == [*payloads_of(blocks[:2]), None, None]
        assert store.refusals() == {"foreign": 1}
        assert await count(store, blocks) == (0, 2)

    async def test_what_is_damaged_twice_is_gone(self, harness: StoreHarness) -> None:
        blocks, store = random_blocks(2), harness.store
        await store.put(ALICE, blocks, num_tokens=8, ttl_s=60)
        await store.put_checkpoint(blocks, ttl_s=60)
        await harness.write(blocks[1].hash, b"torn")
        await harness.write_checkpoint(blocks[1].hash, b"torn too")
        assert as_bytes(await store.fetch(hashes_of(blocks))) == [blocks[0].payload, None]
        assert store.refusals() == {"foreign": 2}
        assert await count(store, blocks) == (1, 1)

    async def test_a_checkpoint_that_nobody_forgets_expires(self, store: SessionStore) -> None:
        blocks = random_blocks(2)
        await store.put_checkpoint(blocks, ttl_s=0.2)

        async def is_gone() -> bool:
            return await count(store, blocks) == (0, 0)

        await eventually(is_gone)

    async def test_the_prefix_ends_at_the_first_gap(self, store: SessionStore) -> None:
        blocks = random_blocks(6)
        await store.put(ALICE, [*blocks[:3], *blocks[4:]], num_tokens=24, ttl_s=60)
        assert await count(store, blocks) == (3, 3)
        assert await count(store, blocks[3:]) == (0, 0)
        assert await count(store, []) == (0, 0)
        found = await store.fetch(hashes_of(blocks))
        assert as_bytes(found) == [*payloads_of(blocks[:3]), None, None, None]

    async def test_a_long_prefix_is_found_whole(self, store: SessionStore) -> None:
        blocks = random_blocks(1200)
        await store.put(ALICE, blocks, num_tokens=4800, ttl_s=60)
        assert await count(store, blocks) == (1200, 1200)
        assert await count(store, [*blocks[:1100], *random_blocks(1)]) == (1100, 1100)
        assert as_bytes(await store.fetch(hashes_of(blocks))) == payloads_of(blocks)
        info = await store.get_session(ALICE.tenant, ALICE.session_id)
        assert info is not None
        assert info.num_blocks == 1200

    async def test_a_session_tells_what_is_stored_of_it(self, store: SessionStore) -> None:
        blocks = random_blocks(3)
        before = time.time()
        await store.put(ALICE, blocks[:2], num_tokens=9, ttl_s=60)
        await store.put(ALICE, blocks[2:], num_tokens=14, ttl_s=90)
        after = time.time()
        info = await store.get_session("alice", "s1")
        assert info is not None
        assert (info.tenant, info.session_id) == ("alice", "s1")
        assert (info.num_tokens, info.num_blocks) == (14, 3)
        assert info.stored_bytes == 3 * VALUE_BYTES
        assert before <= info.created_at <= info.updated_at <= after
        assert before + 90 <= info.expires_at <= after + 90

    async def test_a_session_is_known_by_tenant_and_id_together(self, store: SessionStore) -> None:
        refs = [
            SessionRef(tenant="a", session_id="bc"),
            SessionRef(tenant="ab", session_id="c"),
            SessionRef(tenant="tenant:ü/ x", session_id="*{}\n"),
        ]
        for num_tokens, ref in enumerate(refs):
            await store.put(ref, random_blocks(1), num_tokens=num_tokens, ttl_s=60)
        for num_tokens, ref in enumerate(refs):
            info = await store.get_session(ref.tenant, ref.session_id)
            assert info is not None
            assert (info.num_tokens, info.num_blocks) == (num_tokens, 1)
        assert await store.get_session("bc", "a") is None

    async def test_deleting_a_session_deletes_its_blocks(self, store: SessionStore) -> None:
        mine, others = random_blocks(3), random_blocks(2)
        bob = SessionRef(tenant="bob", session_id="s1")
        await store.put(ALICE, mine, num_tokens=12, ttl_s=60)
        await store.put(bob, others, num_tokens=8, ttl_s=60)
        assert await store.delete_session("alice", "s1")
        assert await store.get_session("alice", "s1") is None
        for block in mine:
            assert await is_gone(store, block)
        assert await count(store, others) == (2, 2)
        assert not await store.delete_session("alice", "s1")
        assert not await store.delete_session("alice", "unknown")

    async def test_touched_blocks_belong_to_the_session(self, store: SessionStore) -> None:
        shared = random_blocks(2)
        second = SessionRef(tenant="alice", session_id="s2")
        await store.put(ALICE, shared, num_tokens=8, ttl_s=60)
        await store.touch(second, hashes_of(shared), num_tokens=11, ttl_s=60)
        info = await store.get_session("alice", "s2")
        assert info is not None
        assert (info.num_tokens, info.num_blocks) == (11, 2)
        await store.delete_session("alice", "s2")
        assert await count(store, shared) == (0, 0)

    async def test_a_session_and_its_blocks_end_with_their_time(self, store: SessionStore) -> None:
        blocks = random_blocks(2)
        await store.put(ALICE, blocks, num_tokens=8, ttl_s=0.2)
        assert await count(store, blocks) == (2, 2)
        await eventually(lambda: is_gone(store, blocks[0]))
        await eventually(lambda: is_gone(store, blocks[1]))
        assert await store.get_session("alice", "s1") is None
        assert await store.fetch(hashes_of(blocks)) == [None, None]

    async def test_a_shared_block_lives_as_long_as_the_longer_session(
        self, store: SessionStore
    ) -> None:
        shared, own = random_blocks(1), random_blocks(1)
        brief = SessionRef(tenant="alice", session_id="brief")
        await store.put(ALICE, shared, num_tokens=4, ttl_s=60)
        await store.put(brief, [*shared, *own], num_tokens=8, ttl_s=0.2)
        await eventually(lambda: is_gone(store, own[0]))
        assert await count(store, shared) == (1, 1)

    async def test_a_session_that_goes_on_keeps_its_early_blocks(self, store: SessionStore) -> None:
        early, late = random_blocks(2), random_blocks(1)
        lone = random_blocks(1)
        await store.put(ALICE, early, num_tokens=8, ttl_s=0.3)
        await store.put(SessionRef(tenant="b", session_id="b"), lone, num_tokens=4, ttl_s=0.3)
        await store.put(ALICE, late, num_tokens=12, ttl_s=60)
        await eventually(lambda: is_gone(store, lone[0]))
        assert await count(store, [*early, *late]) == (3, 3)

    async def test_putting_a_block_again_replaces_a_damaged_value_nobody_read(
        self, harness: StoreHarness
    ) -> None:
        blocks = random_blocks(3)
        await harness.store.put(ALICE, blocks, num_tokens=12, ttl_s=60)
        for block in blocks:
            await harness.write(block.hash, b"torn")
        await harness.store.put(ALICE, blocks, num_tokens=12, ttl_s=60)
        assert as_bytes(await harness.store.fetch(hashes_of(blocks))) == payloads_of(blocks)

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            ("flipped payload", "tampered"),
            ("flipped fingerprint", "tampered"),
            ("cut in the payload", "torn"),
            ("cut in the header", "torn"),
            ("longer", "torn"),
            ("empty", "foreign"),
            ("garbage", "foreign"),
            ("newer format", "version"),
            ("other model", "foreign"),
            ("other layout", "foreign"),
            ("another block", "tampered"),
        ],
    )
    async def test_a_block_that_is_not_sound_is_refused_counted_and_deleted(
        self, harness: StoreHarness, damage: str, reason: RefusalReason
    ) -> None:
        blocks = random_blocks(4)
        store, victim = harness.store, blocks[2]
        await store.put(ALICE, blocks, num_tokens=16, ttl_s=60)
        value = await harness.read(victim.hash)
        assert value is not None
        await harness.write(victim.hash, damaged(value, damage, victim.hash))
        found = await store.fetch(hashes_of(blocks))
        assert as_bytes(found) == [*payloads_of(blocks[:2]), None, None]
        assert store.refusals() == {reason: 1}
        assert await count(store, blocks) == (2, 2)
        await store.put(ALICE, [victim], num_tokens=16, ttl_s=60)
        assert as_bytes(await store.fetch(hashes_of(blocks))) == payloads_of(blocks)
        assert store.refusals() == {reason: 1}


async def count(store: SessionStore, blocks: list[StoredBlock]) -> tuple[int, int]:
    """Leading blocks that are stored for sessions, and that are restorable."""
    prefix = await store.count_prefix(hashes_of(blocks))
    return prefix.num_stored, prefix.num_restorable


async def is_gone(store: SessionStore, block: StoredBlock) -> bool:
    return await count(store, [block]) == (0, 0)


def damaged(value: bytes, damage: str, block_hash: bytes) -> bytes:
    def sound(layout: BlockLayout, own_hash: bytes = block_hash) -> bytes:
        return encode_block(layout, own_hash, os.urandom(layout.payload_bytes))

    def flipped(position: int) -> bytes:
        return value[:position] + bytes([value[position] ^ 0x10]) + value[position + 1 :]

    return {
        "flipped payload": flipped(HEADER_BYTES + 5),
        "flipped fingerprint": flipped(10),
        "cut in the payload": value[:-1],
        "cut in the header": value[:50],
        "longer": value + b"\0",
        "empty": b"",
        "garbage": os.urandom(len(value) - 1) + b"\0",
        "newer format": value[:4] + b"\x09\0" + value[6:],
        "other model": sound(OTHER_MODEL),
        "other layout": sound(OTHER_SHAPE),
        "another block": sound(LAYOUT, os.urandom(16)),
    }[damage]
