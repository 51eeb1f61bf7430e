"""The scheduler under any order of arrivals, aborts, failures, losses and steps."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router_service.scheduling.block_hash import root_hash
from router_service.scheduling.scheduler import Scheduler
from router_service.scheduling.sequence import Sequence, SequenceStatus
from router_service.scheduling.step_plan import ScheduledStep, SchedulerConfig
from services.core.errors import OverloadedError
from services.core.generation import SamplingParams

ROOT = root_hash(tenant="t", model_fingerprint=b"f", block_size=1)


class SchedulerMachine(RuleBasedStateMachine):
    """Prompts come from few tokens, so that prefixes are often shared; blocks are scarce.

    A level of priority is worth 30 s, as the clock's longest jumps are: sequences overtake others,
    and do not.
    """

    @initialize(
        block_size=st.integers(1, 4),
        num_blocks=st.integers(4, 12),
        budget=st.integers(1, 12),
        max_num_seqs=st.integers(1, 6),
        imports=st.integers(1, 3),
        max_waiting=st.sampled_from([16, 1000]),
        max_ttft_s=st.sampled_from([0.0, 1.0, 30.0]),
    )
    def begin(
        self,
        block_size: int,
        num_blocks: int,
        budget: int,
        max_num_seqs: int,
        imports: int,
        max_waiting: int,
        max_ttft_s: float,
    ) -> None:
        self.config = SchedulerConfig(
            block_size=block_size,
            num_blocks=num_blocks,
            max_model_len=64,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_imports_per_step=imports,
            max_waiting_tokens=max_waiting,
            max_ttft_s=max_ttft_s,
        )
        self.scheduler = Scheduler(self.config)
        self.alive: dict[int, Sequence] = {}
        self.finished: list[Sequence] = []
        self.next_order = 0
        self.now = 0.0
        self.priorities: dict[int, int] = {}
        self.places: dict[int, tuple[float, int]] = {}
        self.parked: dict[int, Sequence] = {}

    @rule(data=st.data(), held=st.booleans(), priority=st.integers(-2, 2))
    def add(self, data: st.DataObject, held: bool, priority: int) -> None:
        room = self.config.max_sequence_tokens
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=room - 1))
        max_tokens = data.draw(st.integers(1, room - len(prompt)))
        scheduler = self.scheduler
        try:
            scheduler.check_admission(len(prompt), now=self.now, priority=priority)
        except OverloadedError as error:
            assert scheduler.backlog_tokens, "an empty queue takes anything"
            assert error.details["retry_after_s"] >= 1
            with pytest.raises(OverloadedError):
                scheduler.check_admission(len(prompt) + 1, now=self.now, priority=priority)
            return
        self._add(
            Sequence(
                order=self.next_order,
                index=data.draw(st.integers(0, 1)),
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=max_tokens),
                seed=0,
                root=ROOT,
                priority=priority,
                arrived_at=self.now,
            ),
            priority=priority,
            held=held,
        )
        assert scheduler.waiting_tokens in (len(prompt), *range(self.config.max_waiting_tokens + 1))

    @rule(seconds=st.sampled_from([0.1, 5.0, 100.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self._in_state(SequenceStatus.RUNNING))
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self._in_state(SequenceStatus.RUNNING)))
        self.scheduler.park(sequence)
        self.parked[sequence.order] = sequence

    @precondition(lambda self: self.parked)
    @rule(data=st.data())
    def unpark(self, data: st.DataObject) -> None:
        self._unpark(data.draw(st.sampled_from(list(self.parked.values()))))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), held=st.booleans())
    def lose_and_resume(self, data: st.DataObject, held: bool) -> None:
        """Another shard had it, and its tokens come along; this one has seen it or not."""
        lost = data.draw(st.sampled_from(list(self.alive.values())))
        priority = self.priorities[lost.order]
        self._finish(lost)
        self._add(
            Sequence(
                order=self.next_order,
                index=lost.index,
                prompt_token_ids=lost.prompt_token_ids,
                output_token_ids=lost.output_token_ids,
                sampling=lost.sampling,
                seed=0,
                root=ROOT,
                priority=priority,
                arrived_at=self.now,
                is_resumed=True,
            ),
            priority=priority,
            held=held,
            is_resumed=True,
        )

    @precondition(lambda self: self._in_state(SequenceStatus.HELD))
    @rule(data=st.data())
    def release_hold(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self._in_state(SequenceStatus.HELD)))
        first, last = sorted(data.draw(st.tuples(st.integers(0, 6), st.integers(0, 6))))
        self.scheduler.release_hold(sequence, dict.fromkeys(range(first, last), b"kv"))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), forget=st.booleans())
    def abort(self, data: st.DataObject, forget: bool) -> None:
        sequence = data.draw(st.sampled_from(list(self.alive.values())))
        self._finish(sequence, forget=forget)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        step = self._plan()
        failed = (
            data.draw(st.sets(st.sampled_from(range(len(step.entries))))) if step.entries else ()
        )
        for index, entry in enumerate(step.entries):
            if index in failed:
                self._finish(entry.sequence)
            else:
                token = data.draw(st.integers(0, 1)) if entry.samples else None
                self._complete(entry.sequence, step, index, token)
        began, self.now = self.now, self.now + 0.1
        self.scheduler.observe_step(step, started_at=began, ended_at=self.now)

    @invariant()
    def reference_counts_equal_the_tables(self) -> None:
        held: dict[int, int] = {}
        for sequence in self.alive.values():
            for block in sequence.block_table:
                held[block] = held.get(block, 0) + 1
        blocks = self.scheduler.blocks
        for block in range(self.config.num_blocks):
            assert blocks.ref_count(block) == held.get(block, 0)
        assert blocks.num_used == len(held)
        assert all(not sequence.block_table for sequence in self.finished)

    @invariant()
    def no_sequence_is_lost(self) -> None:
        running = self._in_state(SequenceStatus.RUNNING)
        waiting = self._in_state(SequenceStatus.WAITING, SequenceStatus.HELD)
        assert self.scheduler.num_running == len(running) <= self.config.max_num_seqs
        assert self.scheduler.num_waiting == len(waiting)
        assert len(running) + len(waiting) == len(self.alive)
        assert self.scheduler.waiting_tokens == sum(item.waiting_cost for item in waiting)
        assert all(not item.block_table for item in waiting)

    @invariant()
    def only_full_blocks_are_shared_and_they_are_never_written(self) -> None:
        running = self._in_state(SequenceStatus.RUNNING)
        for sequence in running:
            computed = sequence.num_computed_tokens // self.config.block_size
            for block in sequence.block_table[computed:]:
                assert self.scheduler.blocks.ref_count(block) == 1

    def teardown(self) -> None:
        """Every sequence finishes when nothing more comes in."""
        if not hasattr(self, "scheduler"):
            return
        for sequence in self._in_state(SequenceStatus.HELD):
            self.scheduler.release_hold(sequence)
        for sequence in tuple(self.parked.values()):
            self._unpark(sequence)
        for _ in range(5000):
            if not self.alive:
                break
            step = self._plan()
            assert step.entries, "work is left but nothing is scheduled"
            for index, entry in enumerate(step.entries):
                self._complete(entry.sequence, step, index, 1 if entry.samples else None)
        assert not self.alive, "sequences starve"
        assert self.scheduler.blocks.num_used == 0

    def _plan(self) -> ScheduledStep:
        step = self.scheduler.schedule()
        self._check_order(step)
        found = sum(sequence.num_computed_tokens for sequence in step.admitted)
        imported = sum(len(entry.imports) for entry in step.entries) * self.config.block_size
        computed = sum(entry.num_tokens for entry in step.entries if entry.is_prefill)
        assert step.num_moved_tokens == found + imported + computed
        assert sum(entry.num_tokens for entry in step.entries) <= self.config.max_num_batched_tokens
        sequences = [entry.sequence for entry in step.entries]
        assert len({sequence.order for sequence in sequences}) == len(sequences)
        for entry in step.entries:
            sequence = entry.sequence
            end = entry.start + entry.num_tokens
            imported = len(entry.imports) * self.config.block_size
            assert sequence.status is SequenceStatus.RUNNING
            assert entry.start == sequence.num_computed_tokens + imported
            assert entry.start < sequence.num_tokens
            assert end <= len(sequence.block_table) * self.config.block_size
            assert entry.num_tokens or entry.imports
        return step

    def _check_order(self, step: ScheduledStep) -> None:
        """By rank, whatever it is: decodes, prefill, admission, and from the end, eviction."""

        def place(sequence: Sequence) -> tuple[float, int]:
            return self.places[sequence.order]

        for is_prefill in (False, True):
            ranks = [place(e.sequence) for e in step.entries if e.is_prefill is is_prefill]
            assert ranks == sorted(ranks)
        waiting = [place(item) for item in self._in_state(SequenceStatus.WAITING)]
        admitted = [place(item) for item in step.admitted]
        assert not waiting or not admitted or max(admitted) < min(waiting)
        stayed = [
            place(item)
            for item in self._in_state(SequenceStatus.RUNNING)
            if item not in step.admitted
        ]
        evicted = [place(item) for item in step.preempted]
        assert not evicted or not stayed or max(stayed) < min(evicted)

    def _add(
        self, sequence: Sequence, *, priority: int, held: bool, is_resumed: bool = False
    ) -> None:
        self.next_order += 1
        self.alive[sequence.order] = sequence
        self.priorities[sequence.order] = priority
        levels = priority - 1 if is_resumed else priority
        self.places[sequence.order] = (self.now + 30 * levels, sequence.order)
        self.scheduler.add(sequence, held=held)

    def _unpark(self, sequence: Sequence) -> None:
        self.scheduler.unpark(sequence)
        del self.parked[sequence.order]

    def _complete(
        self, sequence: Sequence, step: ScheduledStep, index: int, token: int | None
    ) -> None:
        self.scheduler.commit(step.entries[index])
        if token is not None:
            sequence.append(token)
            if len(sequence.output_token_ids) == sequence.sampling.max_tokens:
                self._finish(sequence)

    def _finish(self, sequence: Sequence, *, forget: bool = False) -> None:
        self.scheduler.finish(sequence, forget=forget)
        del self.alive[sequence.order]
        self.parked.pop(sequence.order, None)
        self.finished.append(sequence)

    def _in_state(self, *states: SequenceStatus) -> list[Sequence]:
        return [item for item in self.alive.values() if item.status in states]


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
