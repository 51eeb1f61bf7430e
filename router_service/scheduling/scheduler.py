"""Continuous batching: which sequences compute how many tokens in the next step.

Pure bookkeeping; the engine calls `schedule`, runs the step, then `commit`s or `finish`es each
entry. Rules:
- Sequences have one order, their rank: by priority and age (see `rank`).
- Every running decode comes first, in that order, one token each. What is left of
  `max_num_batched_tokens` goes to prefill in chunks, in that order too: an urgent prompt that can
  be admitted does not wait for the end of a long one.
- A sequence is admitted when blocks for all its present tokens are free (plus one spare per running
  sequence, so that it is not evicted at once) and takes them then; prefill never runs out half way.
- When a decode finds no block, the last running sequence gives up all of its blocks and goes
  back to its place in the queue, to be recomputed (its published blocks are probably still there).
  The first therefore always goes on, so everything finishes.
- The queue is strictly in order among sequences that are not held. Nothing running makes way for
  what waits: a stream that has begun keeps its pace.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from router_service.scheduling.admission import (
    QueueRate,
    QueueState,
    check_admission,
    predicted_wait_s,
)
from router_service.scheduling.block_manager import BlockManager
from router_service.scheduling.rank import Rank, rank
from router_service.scheduling.sequence import Payload, Sequence, SequenceStatus
from router_service.scheduling.step_plan import ScheduledSequence, ScheduledStep, SchedulerConfig


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
        self._parked: set[int] = set()
        self._rate = QueueRate()

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

    @property
    def backlog_tokens(self) -> int:
        """Tokens that wait or are left of prompts whose prefill has begun."""
        return self.waiting_tokens + sum(_unprefilled(sequence) for sequence in self._running)

    @property
    def queue_tokens_per_s(self) -> float | None:
        """How fast tokens leave the queue while there is one; None while too little is known."""
        return self._rate.tokens_per_s

    @property
    def predicted_wait_s(self) -> float:
        """Seconds until the turn of a prompt that comes after all others; 0 where not known."""
        return predicted_wait_s(self.backlog_tokens, self.queue_tokens_per_s)

    def check_admission(
        self, num_prompt_tokens: int, *, now: float = 0.0, priority: int = 0
    ) -> None:
        """Raise `OverloadedError` when too much waits already; an empty queue takes anything.

        `now` is what `Sequence.arrived_at` would be.
        """
        limits, ahead = self.config, self.backlog_tokens
        rate = self.queue_tokens_per_s
        if limits.max_ttft_s and rate is not None and ahead > limits.max_ttft_s * rate:
            # Only now does it matter who would be before whom.
            ahead = self._tokens_before(
                rank(arrived_at=now, priority=priority, order=1 << 62, is_resumed=False)
            )
        queue = QueueState(
            waiting_tokens=self.waiting_tokens, waiting_seqs=self.num_waiting, tokens_ahead=ahead
        )
        check_admission(queue, num_prompt_tokens, rate, limits)

    def observe_step(self, step: ScheduledStep, *, started_at: float, ended_at: float) -> None:
        """Learn from a step that was run and committed, how fast the queue moves."""
        self._rate.observe(
            started_at=started_at,
            ended_at=ended_at,
            num_tokens=step.num_moved_tokens,
            has_backlog=bool(self._waiting or self._prefilling()),
        )

    def add(self, sequence: Sequence, *, held: bool = False, num_shared_tokens: int = 0) -> None:
        """Queue a new sequence. A held one waits for `release_hold`.

        Raises `ContextLengthError` when it can never fit. Of what it will share with a sibling,
        `num_shared_tokens`, the KV is not its own to compute and does not count as waiting.
        """
        self.config.check_fits(sequence.num_prompt_tokens, sequence.sampling.max_tokens)
        sequence.waiting_cost = sequence.num_tokens - num_shared_tokens
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
        """Plan a step. Empty only when nothing is running that is not parked, and nothing can be
        admitted."""
        draft = _Draft(
            budget=self.config.max_num_batched_tokens,
            imports_left=self.config.max_imports_per_step,
        )
        self._plan_decodes(draft)
        self._plan_prefill(draft)
        return draft.step()

    def park(self, sequence: Sequence) -> None:
        """Pass a running sequence over until `unpark`; it keeps its blocks while there is room."""
        if sequence.status is SequenceStatus.RUNNING:
            self._parked.add(sequence.order)

    def unpark(self, sequence: Sequence) -> None:
        self._parked.discard(sequence.order)

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
        self._parked.discard(sequence.order)
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

    def _plan_decodes(self, draft: _Draft) -> None:
        for sequence in tuple(self._running):
            if not draft.budget:
                return  # only where parked sequences have come back beside new decodes
            if not sequence.is_decoding or sequence.order in self._parked:
                continue
            if self._make_room(sequence, draft.preempted):
                draft.entries.append(_decode(sequence))
                draft.budget -= 1

    def _plan_prefill(self, draft: _Draft) -> None:
        """Chunks of those that run and of those that can be admitted, by rank."""
        prefilling = deque(self._prefilling())
        can_admit = True
        while prefilling or (self._waiting and can_admit and draft.budget):
            is_turn_of_waiting = self._waiting and (
                not prefilling or self._waiting[0].rank < prefilling[0].rank
            )
            if is_turn_of_waiting and can_admit and draft.budget:
                can_admit = self._admit(self._waiting[0])
                if can_admit:
                    sequence = self._running_from_queue()
                    draft.admitted.append(sequence)
                    draft.num_moved_tokens += sequence.num_computed_tokens
                    self._prefill(sequence, draft)
            else:
                self._prefill(prefilling.popleft(), draft)

    def _prefilling(self) -> list[Sequence]:
        """Running sequences that could compute or import more of their tokens, by rank."""
        return [
            sequence
            for sequence in self._running
            if not sequence.is_decoding and sequence.order not in self._parked
        ]

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
        self._parked.discard(sequence.order)
        self._release_blocks(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        sequence.waiting_cost = sequence.num_tokens
        self.waiting_tokens += sequence.waiting_cost
        self._enqueue(sequence)

    def _prefill(self, sequence: Sequence, draft: _Draft) -> None:
        """Add the next chunk of a running sequence, where the step has room for any of it."""
        pending = sequence.pending_imports
        imports = tuple(pending.popleft() for _ in range(min(len(pending), draft.imports_left)))
        start = sequence.num_computed_tokens + len(imports) * self.config.block_size
        num_tokens = 0 if pending else min(draft.budget, sequence.num_tokens - start)
        if not imports and not num_tokens:
            return
        draft.imports_left -= len(imports)
        draft.budget -= num_tokens
        draft.num_moved_tokens += start + num_tokens - sequence.num_computed_tokens
        draft.entries.append(
            ScheduledSequence(
                sequence=sequence,
                start=start,
                num_tokens=num_tokens,
                is_prefill=True,
                samples=num_tokens > 0 and start + num_tokens == sequence.num_tokens,
                imports=imports,
            )
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
        for index in range(first, sequence.num_reusable_blocks(self.config.block_size)):
            payload = sequence.restored.get(index)
            if payload is None:
                break
            sequence.pending_imports.append((sequence.block_table[index], payload))
        sequence.restored = {}

    def _running_from_queue(self) -> Sequence:
        sequence = self._waiting.pop(0)
        self.waiting_tokens -= sequence.waiting_cost
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, sequence, key=_rank)
        return sequence

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        insort(self._waiting, sequence, key=_rank)

    def _release_blocks(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        del sequence.block_table[:]
        sequence.num_computed_tokens = 0
        sequence.pending_imports.clear()
        sequence.restored = {}

    def _tokens_before(self, place: Rank) -> int:
        """Of the backlog, those of sequences that come before `place`."""
        last = bisect(self._waiting, place, key=_rank)
        return (
            sum(sequence.waiting_cost for sequence in self._waiting[:last])
            + sum(item.waiting_cost for item in self._held.values() if item.rank < place)
            + sum(_unprefilled(item) for item in self._running if item.rank < place)
        )

    def _hashes_to_match(self, sequence: Sequence) -> list[bytes]:
        block_size = self.config.block_size
        return sequence.block_hashes(sequence.num_reusable_blocks(block_size), block_size)


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A step while it is planned."""

    budget: int
    imports_left: int
    num_moved_tokens: int = 0
    entries: list[ScheduledSequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    def step(self) -> ScheduledStep:
        return ScheduledStep(
            entries=tuple(self.entries),
            num_moved_tokens=self.num_moved_tokens,
            admitted=tuple(self.admitted),
            preempted=tuple(self.preempted),
        )


def _decode(sequence: Sequence) -> ScheduledSequence:
    return ScheduledSequence(
        sequence=sequence,
        start=sequence.num_computed_tokens,
        num_tokens=1,
        is_prefill=False,
        samples=True,
    )


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank


def _unprefilled(sequence: Sequence) -> int:
    """Tokens that a running sequence has to compute, or to import, before it decodes."""
    return 0 if sequence.is_decoding else sequence.num_tokens - sequence.num_computed_tokens
