from __future__ import annotations

import time

from router_service.scheduling.sequence import Sequence, SequenceStatus
from router_service.session_tier.checkpoint_writer import (
    MAX_BURST_S,
    TIME_SHARE,
    CheckpointWriter,
)
from router_service.session_tier.write_behind import CheckpointWrite
from services.core.generation import SamplingParams

BLOCK = 4


class SlowTransfer:
    """Takes `seconds` to copy a block, by turning round; None is a block with NaN."""

    def __init__(self, seconds: float = 0.0, payload: bytes | None = b"kv") -> None:
        self.seconds = seconds
        self.payload = payload

    def export_block(self, block_id: int) -> bytes | None:
        until = time.perf_counter() + self.seconds
        while time.perf_counter() < until:
            pass
        return self.payload


class RecordingTier:
    checkpoint_ttl_s = 60.0

    def __init__(self) -> None:
        self.takes_checkpoints = True
        self.writes: list[CheckpointWrite] = []

    def save_checkpoint(self, write: CheckpointWrite) -> None:
        self.writes.append(write)

    @property
    def num_blocks(self) -> int:
        return sum(len(write.blocks) for write in self.writes)


def _running(order: int, num_tokens: int, first: int = 0) -> Sequence:
    sequence = Sequence(
        order=order,
        index=0,
        prompt_token_ids=range(first, first + num_tokens),
        sampling=SamplingParams(max_tokens=1),
        seed=0,
        root=b"root",
    )
    sequence.status = SequenceStatus.RUNNING
    sequence.num_computed_tokens = num_tokens
    sequence.block_table.extend(range(num_tokens // BLOCK))
    return sequence


def _writer(tier: RecordingTier, transfer: SlowTransfer) -> CheckpointWriter:
    return CheckpointWriter(tier, transfer, block_size=BLOCK)  # type: ignore[arg-type]


def test_copying_takes_no_more_than_its_share_of_the_steps() -> None:
    tier = RecordingTier()
    writer = _writer(tier, SlowTransfer(seconds=3 * MAX_BURST_S))
    writer.committed(_running(0, 40))
    step_s = MAX_BURST_S / TIME_SHARE / 4
    saved = []
    for _ in range(40):
        writer.save(step_s)
        saved.append(tier.num_blocks)
    assert saved[0] == 1, "a block is begun while there is any time left"
    steps_per_block = 3 * MAX_BURST_S / (TIME_SHARE * step_s)
    assert saved[-1] <= 40 / steps_per_block + 1 < 10


def test_blocks_that_sequences_share_are_copied_once_and_forgotten_with_the_last() -> None:
    tier = RecordingTier()
    writer = _writer(tier, SlowTransfer())
    short, longer = _running(0, 8), _running(1, 16)
    for sequence in (short, longer):
        writer.committed(sequence)
    writer.save(1.0)
    assert tier.num_blocks == 4
    tier.writes.clear()
    writer.ended(longer, forget=True)
    assert tier.writes[0].forgotten_hashes == tuple(longer.block_hashes(4, BLOCK)[2:])
    writer.ended(short, forget=True)
    assert tier.writes[1].forgotten_hashes == tuple(short.block_hashes(2, BLOCK))


def test_a_lost_sequence_leaves_its_checkpoint_behind_and_another_shard_adopts_it() -> None:
    tier = RecordingTier()
    writer = _writer(tier, SlowTransfer())
    lost = _running(0, 16)
    writer.committed(lost)
    writer.save(1.0)
    writer.ended(lost, forget=False)
    assert [write.forgotten_hashes for write in tier.writes] == [()]
    other = RecordingTier()
    adopter = _writer(other, SlowTransfer())
    sequence = _running(0, 24)
    adopter.adopt(sequence, num_restorable=4)
    adopter.committed(sequence)
    adopter.save(1.0)
    assert other.num_blocks == 2
    adopter.ended(sequence, forget=True)
    assert other.writes[-1].forgotten_hashes == tuple(sequence.block_hashes(6, BLOCK))


def test_what_is_not_running_or_not_finite_is_not_copied() -> None:
    tier = RecordingTier()
    evicted = _running(0, 8)
    writer = _writer(tier, SlowTransfer())
    writer.committed(evicted)
    evicted.status = SequenceStatus.WAITING
    evicted.num_computed_tokens = 0
    del evicted.block_table[:]
    writer.save(1.0)
    writer.ended(evicted, forget=True)
    broken = _writer(tier, SlowTransfer(payload=None))
    broken.committed(_running(1, 8))
    broken.save(1.0)
    assert not tier.writes


def test_nothing_is_copied_while_the_queue_has_no_room() -> None:
    tier = RecordingTier()
    tier.takes_checkpoints = False
    writer = _writer(tier, SlowTransfer())
    writer.committed(_running(0, 8))
    writer.save(1.0)
    assert not tier.writes
    tier.takes_checkpoints = True
    writer.save(1.0)
    assert tier.num_blocks == 2
