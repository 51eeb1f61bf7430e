from __future__ import annotations

from typing import Any

import pytest

from router_service.scheduling.block_hash import root_hash
from router_service.scheduling.rank import LEVEL_S
from router_service.scheduling.scheduler import Scheduler
from router_service.scheduling.sequence import Sequence, SequenceStatus
from router_service.scheduling.step_plan import ScheduledStep, SchedulerConfig
from services.core.errors import ContextLengthError, OverloadedError
from services.core.generation import SamplingParams

BLOCK = 4


def _scheduler(num_blocks: int = 64, **options: Any) -> Scheduler:
    values = {"max_model_len": 1000, "max_num_batched_tokens": 16} | options
    return Scheduler(SchedulerConfig(block_size=BLOCK, num_blocks=num_blocks, **values))


def _sequence(order: int, prompt: range | list[int], max_tokens: int = 8, **place: Any) -> Sequence:
    """`place`: `priority`, `arrived_at` and `is_resumed`."""
    return Sequence(
        order=order,
        index=0,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens),
        seed=0,
        root=root_hash(tenant="t", model_fingerprint=b"f", block_size=BLOCK),
        **place,
    )


def _run_step(scheduler: Scheduler) -> ScheduledStep:
    """Plan and complete a step; each sequence that samples draws its own order as token."""
    step = scheduler.schedule()
    for entry in step.entries:
        scheduler.commit(entry)
        if entry.samples:
            entry.sequence.append(entry.sequence.order)
    return step


def _chunks(step: ScheduledStep) -> list[tuple[int, int]]:
    return [(entry.sequence.order, entry.num_tokens) for entry in step.entries]


def test_a_long_prompt_is_prefilled_in_chunks_of_the_budget() -> None:
    scheduler = _scheduler()
    scheduler.add(_sequence(0, range(40)))
    assert [_chunks(_run_step(scheduler)) for _ in range(4)] == [
        [(0, 16)],
        [(0, 16)],
        [(0, 8)],
        [(0, 1)],
    ]


def test_only_the_chunk_that_ends_the_prompt_samples() -> None:
    scheduler = _scheduler()
    scheduler.add(_sequence(0, range(20)))
    assert [scheduler.schedule().entries[0].samples] == [False]
    _run_step(scheduler)
    assert [scheduler.schedule().entries[0].samples] == [True]


def test_decodes_come_before_prefill_and_prefill_gets_the_rest_of_the_budget() -> None:
    scheduler = _scheduler()
    scheduler.add(_sequence(0, range(4)))
    scheduler.add(_sequence(1, range(50, 55)))
    _run_step(scheduler)
    scheduler.add(_sequence(2, range(100, 140)))
    assert _chunks(_run_step(scheduler)) == [(0, 1), (1, 1), (2, 14)]


def test_prompts_are_prefilled_in_order_of_arrival() -> None:
    scheduler = _scheduler()
    for order in range(3):
        scheduler.add(_sequence(order, range(order * 100, order * 100 + 10)))
    assert _chunks(_run_step(scheduler)) == [(0, 10), (1, 6)]
    assert _chunks(_run_step(scheduler)) == [(0, 1), (1, 4), (2, 10)]


def test_no_more_sequences_run_than_allowed() -> None:
    scheduler = _scheduler(max_num_seqs=2)
    for order in range(3):
        scheduler.add(_sequence(order, [order]))
    assert len(_run_step(scheduler).entries) == 2
    assert scheduler.num_waiting == 1


def test_a_prompt_seen_before_computes_only_what_is_new() -> None:
    scheduler = _scheduler()
    first, second = _sequence(0, range(10)), _sequence(1, [*range(10), 77])
    scheduler.add(first)
    _run_step(scheduler)
    scheduler.add(second)
    step = _run_step(scheduler)
    assert _chunks(step) == [(0, 1), (1, 3)]
    assert second.num_cached_tokens == 8
    assert second.block_table[:2] == first.block_table[:2]


def test_a_wholly_cached_prompt_still_computes_its_last_block() -> None:
    scheduler = _scheduler()
    first, second = _sequence(0, range(8)), _sequence(1, range(8))
    scheduler.add(first)
    _run_step(scheduler)
    scheduler.add(second)
    assert _chunks(_run_step(scheduler)) == [(0, 1), (1, 4)]
    assert second.num_cached_tokens == 4
    assert second.block_table[1] != first.block_table[1]


def test_blocks_of_a_step_that_was_not_committed_are_not_reused() -> None:
    scheduler = _scheduler()
    first = _sequence(0, range(9))
    scheduler.add(first)
    scheduler.schedule()
    scheduler.finish(first)
    assert scheduler.count_cached_blocks(_sequence(1, range(9))) == 0


def test_blocks_of_a_finished_sequence_are_reused() -> None:
    scheduler = _scheduler()
    first = _sequence(0, range(9))
    scheduler.add(first)
    _run_step(scheduler)
    scheduler.finish(first)
    assert scheduler.blocks.num_used == 0
    assert scheduler.count_cached_blocks(_sequence(1, range(9))) == 2


def test_blocks_of_a_sequence_in_doubt_are_forgotten() -> None:
    scheduler = _scheduler()
    first = _sequence(0, range(9))
    scheduler.add(first)
    _run_step(scheduler)
    scheduler.finish(first, forget=True)
    assert scheduler.count_cached_blocks(_sequence(1, range(9))) == 0
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def test_the_youngest_is_evicted_when_a_decode_finds_no_block() -> None:
    scheduler = _scheduler(num_blocks=4)
    old, young = _sequence(0, range(4)), _sequence(1, range(50, 53))
    scheduler.add(old)
    scheduler.add(young)
    assert len(_run_step(scheduler).entries) == 2
    preempted: list[Sequence] = []
    for _ in range(8):
        preempted += _run_step(scheduler).preempted
    assert [sequence.order for sequence in preempted] == [1]
    assert scheduler.num_preemptions == 1
    assert len(old.output_token_ids) == 9


def test_an_evicted_sequence_goes_before_those_that_came_later() -> None:
    scheduler = _scheduler(num_blocks=4)
    old, young = _sequence(0, range(4)), _sequence(1, range(50, 53))
    scheduler.add(old)
    scheduler.add(young)
    _run_step(scheduler)
    scheduler.add(_sequence(2, range(70, 74)))
    while young.status is SequenceStatus.RUNNING:
        _run_step(scheduler)
    num_output = len(young.output_token_ids)
    scheduler.finish(old)
    step = _run_step(scheduler)
    assert step.admitted[0] is young
    assert len(young.output_token_ids) == num_output + 1


def test_nothing_is_admitted_while_the_spare_blocks_of_the_running_would_be_taken() -> None:
    scheduler = _scheduler(num_blocks=4)
    scheduler.add(_sequence(0, range(4)))
    _run_step(scheduler)
    scheduler.add(_sequence(1, range(50, 58), max_tokens=4))
    assert not _run_step(scheduler).admitted


def test_a_held_sequence_lets_others_pass_until_it_is_released() -> None:
    scheduler = _scheduler()
    held = _sequence(0, range(4))
    scheduler.add(held, held=True)
    scheduler.add(_sequence(1, range(50, 54)))
    assert _chunks(_run_step(scheduler)) == [(1, 4)]
    scheduler.release_hold(held)
    assert _chunks(_run_step(scheduler)) == [(1, 1), (0, 4)]


def test_restored_blocks_are_imported_and_only_the_rest_is_computed() -> None:
    scheduler = _scheduler()
    sequence = _sequence(0, range(14))
    scheduler.add(sequence, held=True)
    payloads = [b"a", b"b", b"c"]
    scheduler.release_hold(sequence, dict(enumerate(payloads)))
    (entry,) = _run_step(scheduler).entries
    assert entry.imports == tuple(zip(sequence.block_table, payloads, strict=False))
    assert (entry.start, entry.num_tokens) == (12, 2)
    assert (sequence.num_cached_tokens, sequence.num_restored_tokens) == (12, 12)
    assert scheduler.count_cached_blocks(_sequence(1, range(14))) == 3
    assert scheduler.restored_bytes == 0


def test_restored_blocks_continue_the_cached_ones() -> None:
    scheduler = _scheduler()
    scheduler.add(_sequence(0, range(5)))
    _run_step(scheduler)
    sequence = _sequence(1, range(14))
    scheduler.add(sequence, held=True)
    scheduler.release_hold(sequence, {1: b"b", 2: b"c"})
    _run_step(scheduler)
    assert (sequence.num_cached_tokens, sequence.num_restored_tokens) == (12, 8)


def test_restored_blocks_behind_a_gap_are_recomputed() -> None:
    scheduler = _scheduler()
    sequence = _sequence(0, range(14))
    scheduler.add(sequence, held=True)
    scheduler.release_hold(sequence, {1: b"b", 2: b"c"})
    (entry,) = _run_step(scheduler).entries
    assert (entry.imports, entry.start, entry.num_tokens) == ((), 0, 14)


def test_many_restored_blocks_are_imported_over_several_steps() -> None:
    scheduler = _scheduler(max_imports_per_step=2)
    sequence = _sequence(0, range(22))
    scheduler.add(sequence, held=True)
    scheduler.release_hold(sequence, dict.fromkeys(range(5), b"x"))
    assert scheduler.restored_bytes == 5
    steps = [_run_step(scheduler).entries[0] for _ in range(3)]
    assert [len(entry.imports) for entry in steps] == [2, 2, 1]
    assert [entry.num_tokens for entry in steps] == [0, 0, 2]
    assert [entry.samples for entry in steps] == [False, False, True]


def test_a_sequence_that_can_never_fit_the_context_is_refused_with_the_numbers() -> None:
    scheduler = _scheduler(max_model_len=20)
    with pytest.raises(ContextLengthError, match=r"15 tokens.*is 6, together 21.*is 20 tokens"):
        scheduler.add(_sequence(0, range(15), max_tokens=6))
    scheduler.add(_sequence(0, range(15), max_tokens=5))


def test_a_sequence_that_can_never_fit_the_kv_cache_is_refused_with_the_numbers() -> None:
    scheduler = _scheduler(num_blocks=4)
    with pytest.raises(ContextLengthError, match=r"holds 16 tokens \(4 blocks of 4\)"):
        scheduler.add(_sequence(0, range(15), max_tokens=2))


def test_past_the_waiting_limit_requests_are_refused_until_some_are_admitted() -> None:
    scheduler = _scheduler(max_waiting_tokens=10)
    scheduler.check_admission(1000)
    scheduler.add(_sequence(0, range(8)))
    with pytest.raises(OverloadedError, match="8 prompt tokens wait"):
        scheduler.check_admission(3)
    scheduler.check_admission(2)
    _run_step(scheduler)
    scheduler.check_admission(1000)


def _admitted_order(scheduler: Scheduler) -> list[int]:
    """The orders of all that waits, as it is admitted, one a step."""
    order: list[int] = []
    while scheduler.num_waiting:
        step = _run_step(scheduler)
        order += [sequence.order for sequence in step.admitted]
        for entry in step.entries:
            if entry.samples:
                scheduler.finish(entry.sequence)
    return order


def test_the_more_urgent_are_admitted_first_and_equals_in_order_of_arrival() -> None:
    scheduler = _scheduler(max_num_seqs=1)
    for order, priority in enumerate([0, 2, -1, 0, -1]):
        scheduler.add(_sequence(order, [order], priority=priority, arrived_at=order * 0.1))
    assert _admitted_order(scheduler) == [2, 4, 0, 3, 1]


def test_a_request_that_has_waited_long_is_not_overtaken_any_more() -> None:
    scheduler = _scheduler(max_num_seqs=1)
    scheduler.add(_sequence(0, [0], priority=2, arrived_at=0))
    for order in range(1, 10):
        scheduler.add(_sequence(order, [order], priority=0, arrived_at=order * 2 * LEVEL_S / 4.5))
    assert _admitted_order(scheduler) == [1, 2, 3, 4, 0, 5, 6, 7, 8, 9]


def test_a_resumed_request_goes_before_new_ones_of_its_priority_only() -> None:
    scheduler = _scheduler(max_num_seqs=1)
    scheduler.add(_sequence(0, [0], arrived_at=0))
    scheduler.add(_sequence(1, [1], priority=-2, arrived_at=1))
    scheduler.add(_sequence(2, [2], arrived_at=2, is_resumed=True))
    assert _admitted_order(scheduler) == [1, 2, 0]


def test_an_urgent_prompt_does_not_wait_for_the_end_of_a_long_one() -> None:
    scheduler = _scheduler()
    scheduler.add(_sequence(0, range(100)))
    assert _chunks(_run_step(scheduler)) == [(0, 16)]
    scheduler.add(_sequence(1, range(200, 210), priority=-1))
    scheduler.add(_sequence(2, range(300, 310)))
    assert _chunks(_run_step(scheduler)) == [(1, 10), (0, 6)]
    assert _chunks(_run_step(scheduler)) == [(1, 1), (0, 15)]


def test_an_urgent_prompt_takes_nothing_from_streams_that_run() -> None:
    scheduler = _scheduler(max_num_seqs=2, max_num_batched_tokens=4)
    for order in range(2):
        scheduler.add(_sequence(order, [order], priority=8))
    _run_step(scheduler)
    scheduler.add(_sequence(2, range(50, 60), priority=-8))
    assert [_chunks(_run_step(scheduler)) for _ in range(3)] == [[(0, 1), (1, 1)]] * 3


def test_the_least_urgent_is_evicted_and_of_these_the_youngest() -> None:
    scheduler = _scheduler(num_blocks=6)
    for order, priority in enumerate([1, 1, 0]):
        scheduler.add(
            _sequence(order, range(50 * order, 50 * order + 3), priority=priority, max_tokens=21)
        )
    evicted: list[int] = []
    for _ in range(20):
        evicted += [sequence.order for sequence in _run_step(scheduler).preempted]
    assert evicted == [1, 0]


def test_decodes_that_come_back_beside_others_stay_within_the_budget() -> None:
    scheduler = _scheduler(max_num_seqs=4, max_num_batched_tokens=2)
    sequences = [_sequence(order, [order]) for order in range(5)]
    for pair in (sequences[:2], sequences[2:4]):
        for sequence in pair:
            scheduler.add(sequence)
        _run_step(scheduler)
        for sequence in pair:
            scheduler.park(sequence)
    scheduler.add(sequences[4])
    for sequence in sequences:
        scheduler.unpark(sequence)
    assert [_chunks(_run_step(scheduler)) for _ in range(2)] == [[(0, 1), (1, 1)]] * 2
    scheduler.finish(sequences[0])
    scheduler.finish(sequences[1])
    assert _chunks(_run_step(scheduler)) == [(2, 1), (3, 1)]


def test_only_what_is_more_urgent_counts_for_the_predicted_wait() -> None:
    scheduler = _scheduler(max_num_seqs=1, max_ttft_s=10.0)
    scheduler.add(_sequence(0, [0], max_tokens=100))
    for order in range(1, 4):
        scheduler.add(_sequence(order, [order] * 40, priority=1))
    for now in range(6):
        step = ScheduledStep(entries=(), num_moved_tokens=10)
        scheduler.observe_step(step, started_at=now, ended_at=now + 1)
    assert scheduler.queue_tokens_per_s == pytest.approx(10, rel=0.1)
    scheduler.check_admission(1000, now=6.0, priority=0)
    with pytest.raises(OverloadedError, match=r"12[01] prompt tokens are before it") as caught:
        scheduler.check_admission(1, now=6.0, priority=1)
    assert caught.value.details["retry_after_s"] == pytest.approx(2.0, abs=1.2)
    with pytest.raises(OverloadedError):
        scheduler.check_admission(1, now=6.0 + LEVEL_S, priority=0)


@pytest.mark.parametrize("state", ["held", "waiting", "running"])
def test_a_sequence_can_be_taken_out_in_any_state(state: str) -> None:
    scheduler = _scheduler()
    sequence = _sequence(0, range(8))
    scheduler.add(sequence, held=state == "held")
    if state == "running":
        _run_step(scheduler)
    scheduler.finish(sequence)
    scheduler.finish(sequence)
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.waiting_tokens) == (0, 0, 0)
    assert scheduler.blocks.num_used == 0
    assert scheduler.schedule().entries == ()
