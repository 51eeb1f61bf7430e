from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from router_service.session_tier.write_behind import CheckpointWrite, SessionWrite, WriteBehind
from services.sessions.store import SessionRef, StoredBlock
from tests.support.eventually import eventually
from tests.support.fake_decoder import fake_layout
from tests.support.flaky_store import FlakyStore

LAYOUT = fake_layout(block_size=4)
ALICE, BOB = SessionRef(tenant="t", session_id="alice"), SessionRef(tenant="t", session_id="bob")


def _write(session: SessionRef, *numbers: int, stored: tuple[bytes, ...] = ()) -> SessionWrite:
    blocks = tuple(
        StoredBlock(hash=bytes([number]) * 16, payload=bytes(LAYOUT.payload_bytes))
        for number in numbers
    )
    return SessionWrite(
        session=session, num_tokens=4, ttl_s=60.0, blocks=blocks, stored_hashes=stored
    )


@asynccontextmanager
async def _writing(writer: WriteBehind) -> AsyncIterator[None]:
    task = asyncio.ensure_future(writer.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_writes_queued_together_are_put_together_per_session() -> None:
    store = FlakyStore(LAYOUT)
    writer = WriteBehind(store, max_bytes=1 << 20)
    for write in (_write(ALICE, 1), _write(ALICE, 2), _write(BOB, 3), _write(ALICE, 4)):
        writer.enqueue(write)
    async with _writing(writer):
        assert await writer.drain(5)
    assert [(session, len(hashes)) for session, hashes, _, _ in store.puts] == [
        (ALICE, 2),
        (BOB, 1),
        (ALICE, 1),
    ]
    assert (writer.num_stored, writer.num_dropped, writer.queued_bytes) == (4, 0, 0)


async def test_a_full_queue_drops_and_counts_and_takes_more_when_it_is_empty_again() -> None:
    store = FlakyStore(LAYOUT)
    writer = WriteBehind(store, max_bytes=_write(ALICE, 1).num_bytes * 2)
    assert [writer.enqueue(_write(ALICE, number)) for number in range(3)] == [True, True, False]
    assert writer.num_dropped == 1
    async with _writing(writer):
        assert await writer.drain(5)
        assert writer.enqueue(_write(ALICE, 9))
        assert await writer.drain(5)
    assert writer.num_stored == 3


async def test_a_failing_store_is_counted_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = FlakyStore(LAYOUT)
    store.is_down = True
    writer = WriteBehind(store, max_bytes=1 << 20)
    with caplog.at_level(logging.INFO):
        async with _writing(writer):
            for number, session in enumerate((ALICE, BOB, ALICE)):
                writer.enqueue(_write(session, number))
            assert await writer.drain(5)
            store.is_down = False
            writer.enqueue(_write(ALICE, 9))
            assert await writer.drain(5)
    assert (writer.num_failed, writer.num_stored) == (3, 1)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_blocks_that_are_stored_already_are_touched() -> None:
    store = FlakyStore(LAYOUT)
    writer = WriteBehind(store, max_bytes=1 << 20)
    writer.enqueue(_write(ALICE, stored=(b"x" * 16,)))
    async with _writing(writer):
        assert await writer.drain(5)
    assert store.touches == [(ALICE, [b"x" * 16], 4, 60.0)]
    assert store.puts == []


async def test_a_session_without_a_full_block_is_told_of_all_the_same() -> None:
    store = FlakyStore(LAYOUT)
    writer = WriteBehind(store, max_bytes=1 << 20)
    writer.enqueue(_write(ALICE))
    async with _writing(writer):
        assert await writer.drain(5)
    assert store.puts == [(ALICE, [], 4, 60.0)]


async def test_draining_gives_up_after_its_time() -> None:
    store = FlakyStore(LAYOUT)
    store.delay_s = 60.0
    writer = WriteBehind(store, max_bytes=1 << 20)
    writer.enqueue(_write(ALICE, 1))
    async with _writing(writer):
        assert not await writer.drain(0.05)


def _checkpoint(*numbers: int, forgotten: tuple[int, ...] = ()) -> CheckpointWrite:
    return CheckpointWrite(
        ttl_s=60.0,
        blocks=tuple(
            StoredBlock(hash=bytes([number]) * 16, payload=bytes(LAYOUT.payload_bytes))
            for number in numbers
        ),
        forgotten_hashes=tuple(bytes([number]) * 16 for number in forgotten),
    )


def _stored(store: FlakyStore) -> set[int]:
    inner = store.inner
    return {block_hash[0] for block_hash in (*inner.values, *inner.checkpoint_values)}


async def test_checkpoints_are_put_after_all_that_sessions_wait_for() -> None:
    store = FlakyStore(LAYOUT)
    writer = WriteBehind(store, max_bytes=1 << 20)
    writer.enqueue_checkpoint(_checkpoint(1))
    writer.enqueue(_write(ALICE, 2))
    store.delay_s = 0.05
    async with _writing(writer):
        await eventually(lambda: bool(store.puts))
        assert store.checkpoints == []
        assert await writer.drain(5)
    assert _stored(store) == {1, 2}
    assert writer.num_stored == 2


async def test_checkpoints_make_way_for_sessions_when_the_queue_is_full() -> None:
    store = FlakyStore(LAYOUT)
    writer = WriteBehind(store, max_bytes=_write(ALICE, 1).num_bytes * 3)
    assert writer.takes_checkpoints
    for number in (1, 2):
        writer.enqueue_checkpoint(_checkpoint(number))
    assert not writer.takes_checkpoints
    assert all(writer.enqueue(_write(ALICE, number)) for number in (3, 4, 5))
    assert not writer.enqueue(_write(ALICE, 6))
    assert writer.num_dropped == 3
    async with _writing(writer):
        assert await writer.drain(5)
    assert _stored(store) == {3, 4, 5}
    assert writer.queued_bytes == 0


async def test_what_is_forgotten_before_it_was_put_is_never_put() -> None:
    store = FlakyStore(LAYOUT)
    writer = WriteBehind(store, max_bytes=1 << 20)
    for write in (_checkpoint(1, 2, 3), _checkpoint(forgotten=(1, 2)), _checkpoint(2)):
        writer.enqueue_checkpoint(write)
    async with _writing(writer):
        assert await writer.drain(5)
        assert _stored(store) == {2, 3}
        assert [len(hashes) for hashes in store.checkpoints] == [2]
        writer.enqueue_checkpoint(_checkpoint(forgotten=(2, 3)))
        assert await writer.drain(5)
    assert _stored(store) == set()


async def test_checkpoints_are_gathered_for_a_while_and_then_put_without_a_push() -> None:
    store = FlakyStore(LAYOUT)
    writer = WriteBehind(store, max_bytes=1 << 20)
    async with _writing(writer):
        writer.enqueue_checkpoint(_checkpoint(1))
        await eventually(lambda: _stored(store) == {1})
        for number in (2, 3, 4):
            writer.enqueue_checkpoint(_checkpoint(number))
            await asyncio.sleep(0)
        await eventually(lambda: _stored(store) == {1, 2, 3, 4})
    assert [len(hashes) for hashes in store.checkpoints] == [1, 3]


async def test_a_store_that_fails_loses_checkpoints_and_nothing_else() -> None:
    store = FlakyStore(LAYOUT)
    store.is_down = True
    writer = WriteBehind(store, max_bytes=1 << 20)
    async with _writing(writer):
        writer.enqueue_checkpoint(_checkpoint(1, 2))
        assert await writer.drain(5)
        store.is_down = False
        writer.enqueue_checkpoint(_checkpoint(3))
        assert await writer.drain(5)
    assert (writer.num_failed, writer.num_stored) == (2, 1)
