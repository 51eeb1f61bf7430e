from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from router_service.engine.micro_batch_chooser import (
    MARGIN,
    MAX_TRIAL_LOSS,
    TRIAL_STEPS,
    MicroBatchChooser,
    StepCost,
    StepShape,
    fastest_possible_s,
)

DECODES = StepShape(num_seqs=32, num_tokens=32)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Seconds of an unsplit step's parts; `reread` is the share of the experts' time that every
    further micro-batch costs again, because it reads the same weights."""

    shard_s: float
    experts_s: float
    wire_s: float
    reread: float
    frame_s: float = 0.0

    def step_s(self, count: int) -> float:
        experts_s = self.experts_s * (1 + (count - 1) * self.reread)
        shard_s = self.shard_s + (count - 1) * self.frame_s
        return max(shard_s, experts_s, (shard_s + experts_s) / count + self.wire_s)

    def cost(self, count: int) -> StepCost:
        return StepCost(step_s=self.step_s(count), shard_s=self.shard_s)

    @property
    def best(self) -> int:
        """The fastest; of those that differ by less than the margin the first."""
        limit_s = min(map(self.step_s, (1, 2, 3))) / (1 - MARGIN)
        return next(count for count in (1, 2, 3) if self.step_s(count) < limit_s)


BALANCED = Fleet(shard_s=0.010, experts_s=0.010, wire_s=0.004, reread=0.0)
MEMORY_BOUND = Fleet(shard_s=0.004, experts_s=0.020, wire_s=0.002, reread=0.9)
DEEP = Fleet(shard_s=0.008, experts_s=0.010, wire_s=0.020, reread=0.0)
ONLY_SHARD = Fleet(shard_s=0.020, experts_s=0.0, wire_s=0.0002, reread=0.0)


def drive(
    chooser: MicroBatchChooser,
    cost: Callable[[int], StepCost],
    steps: int,
    shape: StepShape = DECODES,
) -> Iterator[int]:
    for _ in range(steps):
        count = chooser.choose(shape)
        chooser.observe(shape, count, cost(count))
        yield count


@pytest.mark.parametrize("fleet", [BALANCED, MEMORY_BOUND, DEEP, ONLY_SHARD])
def test_it_settles_on_the_count_that_is_fastest(fleet: Fleet) -> None:
    counts = list(drive(MicroBatchChooser(), fleet.cost, 400))
    assert counts[0] == 1
    assert counts[200:].count(fleet.best) > 180


def test_one_sequence_is_never_split_and_two_not_in_three() -> None:
    chooser = MicroBatchChooser()
    alone = StepShape(num_seqs=1, num_tokens=512)
    assert set(drive(chooser, DEEP.cost, 200, alone)) == {1}
    pair = StepShape(num_seqs=2, num_tokens=2)
    assert set(drive(chooser, DEEP.cost, 200, pair)) == {1, 2}


def test_where_the_shard_does_all_the_work_nothing_is_tried() -> None:
    assert set(drive(MicroBatchChooser(), ONLY_SHARD.cost, 300)) == {1}


@pytest.mark.parametrize("seed", range(20))
def test_where_one_is_best_trying_others_costs_little_time(seed: int) -> None:
    """Trials cost at most two for free and MAX_TRIAL_LOSS, plus the one that passes the limit."""
    noise = random.Random(seed)

    def cost(count: int) -> StepCost:
        step_s = MEMORY_BOUND.step_s(count) * noise.uniform(0.9, 1.15)
        return StepCost(step_s=step_s, shard_s=MEMORY_BOUND.shard_s)

    num_steps = 4000
    counts = list(drive(MicroBatchChooser(), cost, num_steps))
    spent_s = sum(MEMORY_BOUND.step_s(count) for count in counts)
    ideal_s = num_steps * MEMORY_BOUND.step_s(1)
    one_trial_s = TRIAL_STEPS * (MEMORY_BOUND.step_s(2) - MEMORY_BOUND.step_s(1))
    assert spent_s - ideal_s <= MAX_TRIAL_LOSS * ideal_s * 1.3 + 3 * one_trial_s
    assert counts.count(1) > 0.985 * num_steps


@pytest.mark.parametrize("seed", range(20))
def test_noise_does_not_make_it_swing(seed: int) -> None:
    noise = random.Random(seed)
    chooser = MicroBatchChooser()

    def cost(count: int) -> StepCost:
        step_s = BALANCED.step_s(count) * noise.uniform(0.85, 1.2)
        return StepCost(step_s=step_s, shard_s=BALANCED.shard_s)

    counts = list(drive(chooser, cost, 3000))[200:]
    assert BALANCED.best == 3
    assert counts.count(3) > 0.85 * len(counts)


@pytest.mark.parametrize("seed", range(20))
def test_a_busy_machine_does_not_talk_it_into_what_is_slower(seed: int) -> None:
    """Steps take up to twice as long, in spells of a few steps."""
    noise = random.Random(seed)
    factor = 1.0

    def cost(count: int) -> StepCost:
        nonlocal factor
        if noise.random() < 0.2:
            factor = noise.uniform(1.0, 2.0)
        step_s = MEMORY_BOUND.step_s(count) * factor * noise.uniform(0.9, 1.1)
        return StepCost(step_s=step_s, shard_s=MEMORY_BOUND.shard_s)

    counts = list(drive(MicroBatchChooser(), cost, 1000))
    assert counts.count(1) > 0.95 * len(counts)


def test_a_gain_within_the_margin_changes_nothing() -> None:
    def cost(count: int) -> StepCost:
        return StepCost(step_s=0.02 * (1 - 0.8 * MARGIN * (count > 1)), shard_s=0.001)

    counts = list(drive(MicroBatchChooser(), cost, 100))
    assert counts[-1] == 1 or counts.count(1) > counts.count(2)


def test_it_follows_a_network_that_becomes_slow_and_fast_again() -> None:
    chooser = MicroBatchChooser()
    near = Fleet(shard_s=0.004, experts_s=0.020, wire_s=0.0, reread=1.0)
    far = Fleet(shard_s=0.020, experts_s=0.018, wire_s=0.005, reread=0.0)
    assert next(reversed(list(drive(chooser, near.cost, 300)))) == 1
    assert list(drive(chooser, far.cost, 600))[-100:].count(far.best) > 80
    assert list(drive(chooser, near.cost, 600))[-100:].count(1) > 80


def test_shapes_are_learnt_apart() -> None:
    chooser = MicroBatchChooser()
    prefill = StepShape(num_seqs=4, num_tokens=512)
    for _ in range(300):
        for shape, fleet in ((DECODES, MEMORY_BOUND), (prefill, BALANCED)):
            count = chooser.choose(shape)
            chooser.observe(shape, count, fleet.cost(count))
    assert (chooser.choose(DECODES), chooser.choose(prefill)) == (1, BALANCED.best)


def test_the_same_measurements_give_the_same_choices() -> None:
    first, second = (list(drive(MicroBatchChooser(), DEEP.cost, 500)) for _ in range(2))
    assert first == second


def test_a_split_can_at_best_hide_what_is_not_the_shard_s() -> None:
    assert fastest_possible_s(shard_s=3.0, experts_s=3.0, num_micro_batches=2) == 3.0
    assert fastest_possible_s(shard_s=1.0, experts_s=8.0, num_micro_batches=3) == 3.0
    assert fastest_possible_s(shard_s=1.0, experts_s=8.0, num_micro_batches=1) == 9.0
