"""Continuous batching: which sequences compute how many tokens in the next step.

Pure bookkeeping; the engine calls `schedule`, runs the step, then `commit`s or `finish`es each
entry. Rules:
- Every running decode comes first, the oldest before the younger, one token each. What is left of
  `max_num_batched_tokens` goes to prefill in chunks, in order of arrival.
- A sequence is admitted when blocks for all its present tokens are free (plus one spare per running
  sequence, so that it is not evicted at once) and takes them then; prefill never runs out half way.
- When a decode finds no block, the youngest running sequence gives up all of its blocks and goes
  back to its place in the queue, to be recomputed (its published blocks are probably still there).
  The oldest therefore always goes on, so everything finishes.
- The queue is strictly first come, first served among sequences that are not held.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping

from router_service.scheduling.block_manager import BlockManager
from router_service.scheduling.sequence import Payload, Sequence, SequenceStatus
from router_service.scheduling.step_plan import ScheduledSequence, ScheduledStep, SchedulerConfig
from services.core.errors import OverloadedError


class Scheduler:
    """Queues and block tables of one engine. Not thread-safe; belongs to the engine's thread."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager | None = None) -> None:
        self.config = config
        self.blocks = blocks or BlockManager(config.num_blocks)
        self.num_preemptions = 0
        self.waiting_tokens = 0
        self._held: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for room, for a sibling or for a restore."""
        return len(self._waiting) + len(self._held)

    @property
    def restored_bytes(self) -> int:
        """Host memory of payloads that were fetched and not yet imported."""
        sequences = (*self._waiting, *self._running)
        return sum(
            sum(len(payload) for payload in sequence.restored.values())
            + sum(len(payload) for _, payload in sequence.pending_imports)
            for sequence in sequences
            if sequence.restored or sequence.pending_imports
        )

    def check_admission(self, num_prompt_tokens: int) -> None:
        """Raise `OverloadedError` when too much waits already; an empty queue takes anything."""
        waiting, limit = self.waiting_tokens, self.config.max_waiting_tokens
        if waiting and waiting + num_prompt_tokens > limit:
            raise OverloadedError(
                f"{waiting} prompt tokens wait already and {num_prompt_tokens} more would pass the "
                f"limit of {limit}; try again later",
                retry_after_s=1,
            )

    def add(self, sequence: Sequence, *, held: bool = False) -> None:
        """Queue a new sequence. A held one waits for `release_hold`.

        Raises `ContextLengthError` when it can never fit. A held sibling that will share its
        sibling's blocks counts only what it will compute itself as waiting.
        """
        self.config.check_fits(sequence.num_prompt_tokens, sequence.sampling.max_tokens)
        sequence.waiting_cost = sequence.num_tokens
        if sequence.index > 0:
            full = self._full_blocks_to_match(sequence) * self.config.block_size
            sequence.waiting_cost -= full
        self.waiting_tokens += sequence.waiting_cost
        if held:
            sequence.status = SequenceStatus.HELD
            self._held[sequence.order] = sequence
        else:
            self._enqueue(sequence)

    def release_hold(
        self, sequence: Sequence, restored: Mapping[int, Payload] | None = None
    ) -> None:
        """Let a held sequence take its place in the queue; `restored` maps block index to KV."""
        if self._held.pop(sequence.order, None) is not None:
            sequence.restored = restored or {}
            self._enqueue(sequence)

    def count_cached_blocks(self, sequence: Sequence) -> int:
        """Leading blocks of the sequence that are in the cache now; they become recently used."""
        matched = self.blocks.match(self._hashes_to_match(sequence))
        self.blocks.touch(matched)
        return len(matched)

    def schedule(self) -> ScheduledStep:
        """Plan a step. Empty only when nothing is running and nothing can be admitted."""
        budget = self.config.max_num_batched_tokens
        imports_left = self.config.max_imports_per_step
        entries: list[ScheduledSequence] = []
        admitted: list[Sequence] = []
        preempted: list[Sequence] = []
        for sequence in tuple(self._running):
            if sequence.is_decoding and self._make_room(sequence, preempted):
                entries.append(_decode(sequence))
                budget -= 1
        # Never below 0: to become a decode, a sequence needed budget beside all other decodes.
        for sequence in self._running:
            if not sequence.is_decoding:
                entry = self._prefill(sequence, budget, imports_left)
                if entry is not None:
                    entries.append(entry)
                    budget -= entry.num_tokens
                    imports_left -= len(entry.imports)
        while budget and self._waiting and self._admit(self._waiting[0]):
            sequence = self._running_from_queue()
            admitted.append(sequence)
            entry = self._prefill(sequence, budget, imports_left)
            if entry is not None:
                entries.append(entry)
                budget -= entry.num_tokens
                imports_left -= len(entry.imports)
        return ScheduledStep(
            entries=tuple(entries), admitted=tuple(admitted), preempted=tuple(preempted)
        )

    def commit(self, entry: ScheduledSequence) -> None:
        """The entry's KV is in its blocks: count its tokens and publish the blocks now full."""
        sequence = entry.sequence
        sequence.num_computed_tokens = entry.start + entry.num_tokens
        full = sequence.num_computed_tokens // self.config.block_size
        first = sequence.num_published_blocks
        if full > first:
            hashes = sequence.block_hashes(full, self.config.block_size)
            for index in range(first, full):
                self.blocks.publish(sequence.block_table[index], hashes[index])
            sequence.num_published_blocks = full

    def finish(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Take a sequence out, whatever its state, and release its blocks.

        `forget` also withdraws its blocks from the prefix cache: their content is in doubt.
        """
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
        elif sequence.status is not SequenceStatus.FINISHED:
            if self._held.pop(sequence.order, None) is None:
                self._waiting.remove(sequence)
            self.waiting_tokens -= sequence.waiting_cost
        sequence.status = SequenceStatus.FINISHED
        if forget:
            self.blocks.unpublish(sequence.block_table)
        self._release_blocks(sequence)

    def _make_room(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Give a decode the slot of its next token. False when it was itself evicted."""
        if sequence.num_tokens <= len(sequence.block_table) * self.config.block_size:
            return True
        while not self.blocks.num_free:
            victim = self._running[-1]
            self._preempt(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        sequence.block_table.append(self.blocks.allocate())
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release_blocks(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        sequence.waiting_cost = sequence.num_tokens
        self.waiting_tokens += sequence.waiting_cost
        self._enqueue(sequence)

    def _prefill(
        self, sequence: Sequence, budget: int, imports_left: int
    ) -> ScheduledSequence | None:
        """The next chunk of a running sequence, or None when the step has no room for any of it."""
        pending = sequence.pending_imports
        imports = tuple(pending.popleft() for _ in range(min(len(pending), imports_left)))
        start = sequence.num_computed_tokens + len(imports) * self.config.block_size
        num_tokens = 0 if pending else min(budget, sequence.num_tokens - start)
        if not imports and not num_tokens:
            return None
        return ScheduledSequence(
            sequence=sequence,
            start=start,
            num_tokens=num_tokens,
            is_prefill=True,
            samples=num_tokens > 0 and start + num_tokens == sequence.num_tokens,
            imports=imports,
        )

    def _admit(self, sequence: Sequence) -> bool:
        """Give the head of the queue blocks for all its tokens, cached ones where there are."""
        if len(self._running) >= self.config.max_num_seqs:
            return False
        matched = self.blocks.match(self._hashes_to_match(sequence))
        num_fresh = -(-sequence.num_tokens // self.config.block_size) - len(matched)
        spare = self.blocks.num_free - self.blocks.count_unheld(matched) - num_fresh
        if spare < len(self._running):
            return False
        self.blocks.hold(matched)
        sequence.block_table.extend(matched)
        sequence.block_table.extend(self.blocks.allocate() for _ in range(num_fresh))
        sequence.num_computed_tokens = len(matched) * self.config.block_size
        sequence.num_published_blocks = len(matched)
        self._plan_imports(sequence, len(matched))
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_restored_tokens = len(sequence.pending_imports) * self.config.block_size
            sequence.num_cached_tokens = sequence.num_computed_tokens + sequence.num_restored_tokens
        return True

    def _plan_imports(self, sequence: Sequence, first: int) -> None:
        """Queue the restored payloads that continue the blocks found in the cache."""
        for index in range(first, self._full_blocks_to_match(sequence)):
            payload = sequence.restored.get(index)
            if payload is None:
                break
            sequence.pending_imports.append((sequence.block_table[index], payload))
        sequence.restored = {}

    def _running_from_queue(self) -> Sequence:
        sequence = self._waiting.pop(0)
        self.waiting_tokens -= sequence.waiting_cost
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, sequence, key=_order)
        return sequence

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        insort(self._waiting, sequence, key=_order)

    def _release_blocks(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        del sequence.block_table[:]
        sequence.num_computed_tokens = 0
        sequence.pending_imports.clear()
        sequence.restored = {}

    def _full_blocks_to_match(self, sequence: Sequence) -> int:
        """Full blocks before the last token, which is always computed: its logits are wanted."""
        return (sequence.num_tokens - 1) // self.config.block_size

    def _hashes_to_match(self, sequence: Sequence) -> list[bytes]:
        return sequence.block_hashes(self._full_blocks_to_match(sequence), self.config.block_size)


def _decode(sequence: Sequence) -> ScheduledSequence:
    return ScheduledSequence(
        sequence=sequence,
        start=sequence.num_computed_tokens,
        num_tokens=1,
        is_prefill=False,
        samples=True,
    )


def _order(sequence: Sequence) -> int:
    return sequence.order
