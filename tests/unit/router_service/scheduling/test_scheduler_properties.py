"""The scheduler under any order of arrivals, aborts, failures and steps."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router_service.scheduling.block_hash import root_hash
from router_service.scheduling.scheduler import Scheduler
from router_service.scheduling.sequence import Sequence, SequenceStatus
from router_service.scheduling.step_plan import ScheduledStep, SchedulerConfig
from services.core.generation import SamplingParams

ROOT = root_hash(tenant="t", model_fingerprint=b"f", block_size=1)


class SchedulerMachine(RuleBasedStateMachine):
    """Prompts come from few tokens, so that prefixes are often shared; blocks are scarce."""

    @initialize(
        block_size=st.integers(1, 4),
        num_blocks=st.integers(4, 12),
        budget=st.integers(1, 12),
        max_num_seqs=st.integers(1, 6),
        imports=st.integers(1, 3),
    )
    def begin(
        self, block_size: int, num_blocks: int, budget: int, max_num_seqs: int, imports: int
    ) -> None:
        self.config = SchedulerConfig(
            block_size=block_size,
            num_blocks=num_blocks,
            max_model_len=64,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_imports_per_step=imports,
        )
        self.scheduler = Scheduler(self.config)
        self.alive: dict[int, Sequence] = {}
        self.finished: list[Sequence] = []
        self.next_order = 0

    @rule(data=st.data(), held=st.booleans())
    def add(self, data: st.DataObject, held: bool) -> None:
        room = self.config.max_sequence_tokens
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=room - 1))
        max_tokens = data.draw(st.integers(1, room - len(prompt)))
        sequence = Sequence(
            order=self.next_order,
            index=data.draw(st.integers(0, 1)),
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=max_tokens),
            seed=0,
            root=ROOT,
        )
        self.next_order += 1
        self.alive[sequence.order] = sequence
        self.scheduler.add(sequence, held=held)

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
        self.finished.append(sequence)

    def _in_state(self, *states: SequenceStatus) -> list[Sequence]:
        return [item for item in self.alive.values() if item.status in states]


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
