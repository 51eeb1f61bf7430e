"""Checkpoints of running sequences: their KV outlives the shard, so that another can go on.

Only what a sequence needs while it runs is kept: its blocks are forgotten when it ends. Blocks are
copied out within a share of the time that steps take, so a rush of prompts is stored late or not
at all rather than computed slowly. Engine's thread only.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Final

from router_service.scheduling.sequence import Sequence, SequenceStatus
from router_service.session_tier.block_transfer import BlockTransfer
from router_service.session_tier.session_tier import SessionTier
from router_service.session_tier.write_behind import CheckpointWrite
from services.sessions.store import StoredBlock

TIME_SHARE: Final = 0.003
"""Of the time that steps take, what may be spent on copying blocks out."""
MAX_BURST_S: Final = 0.002
"""What unused time may add up to, and so about the most that one step can be late by."""


class CheckpointWriter:
    """Copies blocks of sequences as they fill. `num_saved_blocks` of a sequence says how far it is.

    A block that several sequences share is stored once, and forgotten when the last of them ends.
    """

    def __init__(self, tier: SessionTier, transfer: BlockTransfer, *, block_size: int) -> None:
        self._tier = tier
        self._transfer = transfer
        self._block_size = block_size
        self._lagging: OrderedDict[int, Sequence] = OrderedDict()
        self._num_users: dict[bytes, int] = {}
        self._allowance_s = 0.0

    def adopt(self, sequence: Sequence, num_restorable: int) -> None:
        """The store can give the first `num_restorable` blocks: another shard's checkpoint."""
        if sequence.num_saved_blocks is None:
            for block_hash in sequence.block_hashes(num_restorable, self._block_size):
                self._num_users[block_hash] = self._num_users.get(block_hash, 0) + 1
            sequence.num_saved_blocks = num_restorable

    def committed(self, sequence: Sequence) -> None:
        """More of the sequence's KV is computed."""
        full = sequence.num_computed_tokens // self._block_size
        if full > (sequence.num_saved_blocks or 0):
            self._lagging[sequence.order] = sequence

    def save(self, step_s: float) -> None:
        """Copy what there is time for after a step that took `step_s`."""
        self._allowance_s = min(self._allowance_s + TIME_SHARE * step_s, MAX_BURST_S)
        if not self._lagging or self._allowance_s <= 0 or not self._tier.takes_checkpoints:
            return
        started = time.perf_counter()
        blocks: list[StoredBlock] = []
        while self._lagging and time.perf_counter() - started < self._allowance_s:
            order, sequence = next(iter(self._lagging.items()))
            if not self._save_next(sequence, blocks):
                del self._lagging[order]
        if blocks:
            self._tier.save_checkpoint(
                CheckpointWrite(ttl_s=self._tier.checkpoint_ttl_s, blocks=tuple(blocks))
            )
        self._allowance_s -= time.perf_counter() - started

    def ended(self, sequence: Sequence, *, forget: bool) -> None:
        """The sequence is over. With `forget` nobody will want its checkpoint."""
        self._lagging.pop(sequence.order, None)
        unused: list[bytes] = []
        for block_hash in sequence.block_hashes(sequence.num_saved_blocks or 0, self._block_size):
            self._num_users[block_hash] -= 1
            if not self._num_users[block_hash]:
                del self._num_users[block_hash]
                unused.append(block_hash)
        if unused and forget:
            self._tier.save_checkpoint(
                CheckpointWrite(ttl_s=self._tier.checkpoint_ttl_s, forgotten_hashes=tuple(unused))
            )

    def _save_next(self, sequence: Sequence, blocks: list[StoredBlock]) -> bool:
        """Save one block more; False when there is none, or none that can be used."""
        index = sequence.num_saved_blocks or 0
        is_running = sequence.status is SequenceStatus.RUNNING
        if not is_running or index >= sequence.num_computed_tokens // self._block_size:
            return False
        block_hash = sequence.block_hashes(index + 1, self._block_size)[index]
        num_users = self._num_users.get(block_hash, 0)
        if not num_users:
            payload = self._transfer.export_block(sequence.block_table[index])
            if payload is None:
                return False
            blocks.append(StoredBlock(hash=block_hash, payload=payload))
        self._num_users[block_hash] = num_users + 1
        sequence.num_saved_blocks = index + 1
        return True
