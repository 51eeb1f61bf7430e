"""What the engine hands to the session tier after a step: the blocks that became full."""

from __future__ import annotations

from router_service.scheduling.sequence import Sequence
from router_service.session_tier.block_transfer import BlockTransfer
from router_service.session_tier.session_tier import SessionTier
from router_service.session_tier.write_behind import SessionWrite
from services.core.generation import GenerateRequest
from services.sessions.store import SessionRef, StoredBlock


class SessionWriter:
    """Copies full, computed blocks of sequences with a session out of the KV cache.

    Blocks must be saved before the sequence is finished, while their KV is still its own.
    """

    def __init__(self, tier: SessionTier, transfer: BlockTransfer, *, block_size: int) -> None:
        self._tier = tier
        self._transfer = transfer
        self._block_size = block_size

    def save_new_blocks(self, request: GenerateRequest, sequence: Sequence) -> None:
        """Save what the last step completed; waits for the store to say what it has already."""
        if sequence.num_saved_blocks is None:
            return
        blocks = self._unsaved_blocks(sequence)
        if blocks:
            self._tier.save(self._write(request, sequence, blocks=blocks))

    def save_last(self, request: GenerateRequest, sequence: Sequence, num_stored: int) -> None:
        """Save the rest and prolong what the store had: the first `num_stored` blocks."""
        stored_hashes = tuple(sequence.block_hashes(num_stored, self._block_size))
        blocks = self._unsaved_blocks(sequence)
        self._tier.save(self._write(request, sequence, blocks=blocks, stored_hashes=stored_hashes))

    def _unsaved_blocks(self, sequence: Sequence) -> tuple[StoredBlock, ...]:
        first = sequence.num_saved_blocks or 0
        full = sequence.num_computed_tokens // self._block_size
        if full <= first:
            return ()
        hashes = sequence.block_hashes(full, self._block_size)
        sequence.num_saved_blocks = full
        blocks = []
        for index in range(first, full):
            payload = self._transfer.export_block(sequence.block_table[index])
            if payload is None:
                break
            blocks.append(StoredBlock(hash=hashes[index], payload=payload))
        return tuple(blocks)

    def _write(
        self,
        request: GenerateRequest,
        sequence: Sequence,
        *,
        blocks: tuple[StoredBlock, ...],
        stored_hashes: tuple[bytes, ...] = (),
    ) -> SessionWrite:
        assert request.session_id is not None
        return SessionWrite(
            session=SessionRef(tenant=request.tenant, session_id=request.session_id),
            num_tokens=sequence.num_tokens,
            ttl_s=request.session_ttl_s or self._tier.default_ttl_s,
            blocks=blocks,
            stored_hashes=stored_hashes,
        )
