"""How many micro-batches a step is split into, chosen from what steps were measured to take.

While one micro-batch waits for its experts, another can do its attention. But experts that are
bound by memory read their weights once per micro-batch, and every frame costs, so a split can also
lose; which it is depends on batch, model, machine and network. Per shape of step the chooser keeps
to one count and now and then tries a neighbouring one for a few steps, in turn with its own, if a
model of the pipeline says that it could win at all; it moves over where that was clearly faster.

Pure: no clock and no random numbers. The same measurements give the same choices.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Final

TRIAL_STEPS: Final = 5
"""Steps of a trial. They alternate with as many of the present count, so that a machine that is
busy with something else slows both."""
WINS: Final = 4
"""In so many of these pairs the new count must be faster, beside the margin of the medians."""
STEPS_BEFORE_TRIAL: Final = 12
"""Steps of the present count between two trials, at least."""
MAX_TRIAL_LOSS: Final = 0.005
"""Share of the time of a shape's steps that trials may cost, beyond the first of each count."""
MARGIN: Final = 0.05
"""A count takes another's place only if a token costs this share less time."""
CHANGE: Final = 0.3
"""A token that costs this share more or less than when counts were last compared makes the chooser
compare them anew, at most every `STEPS_BETWEEN_CHANGES` steps."""
STEPS_BETWEEN_CHANGES: Final = 256
_REMEMBERED_STEPS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What a step computes: sequences with a token at least, and tokens."""

    num_seqs: int
    num_tokens: int

    @property
    def bucket(self) -> tuple[int, int]:
        """Steps of one bucket are compared: sizes up to the same powers of two."""
        return (self.num_seqs - 1).bit_length(), (self.num_tokens - 1).bit_length()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds of one step: in all, and how long the shard's own thread computed in it."""

    step_s: float
    shard_s: float


def fastest_possible_s(*, shard_s: float, experts_s: float, num_micro_batches: int) -> float:
    """Seconds that a step could take at best when it is split.

    `shard_s` and `experts_s` are what the parts take one after the other, unsplit. At best all
    that is not the shard's own work shrinks with the rows, and a micro-batch's way through the
    layers, 1/k of the whole, or the shard's own thread binds.
    """
    return max(shard_s, (shard_s + experts_s) / num_micro_batches)


class MicroBatchChooser:
    """Chooses 1 to `max_count`. One sequence is never split, and no step into more micro-batches
    than it has sequences.

    What trials cost is bounded: `TRIAL_STEPS` steps for the first trial of each count in each
    bucket, and again after a change; beyond that no trial begins while the time lost in trials is
    above `MAX_TRIAL_LOSS` of the bucket's.
    """

    def __init__(self, max_count: int = 3) -> None:
        self._max_count = max_count
        self._buckets: dict[tuple[int, int], _Bucket] = {}

    def choose(self, shape: StepShape) -> int:
        """The count for the next step of this shape; `observe` must follow unless it failed."""
        most = min(self._max_count, shape.num_seqs)
        if most <= 1:
            return 1
        return self._bucket(shape).choose(most)

    def observe(self, shape: StepShape, count: int, cost: StepCost) -> None:
        """A step of this shape was split into `count` and took so long."""
        if min(self._max_count, shape.num_seqs) > 1:
            self._bucket(shape).observe(count, shape.num_tokens, cost)

    def _bucket(self, shape: StepShape) -> _Bucket:
        return self._buckets.setdefault(shape.bucket, _Bucket())


@dataclass(slots=True, kw_only=True)
class _Bucket:
    """Seconds are per token in here, so that steps of a bucket can be compared."""

    count: int = 1
    trial: int | None = None
    trial_s: list[float] = field(default_factory=list)
    beside_s: list[float] = field(default_factory=list)
    """Of the present count's steps during the trial."""
    present_s: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_STEPS))
    shard_s: float = 0.0
    steps_since_trial: int = 0
    tried: set[int] = field(default_factory=set)
    upwards: bool = True
    compared_s: float | None = None
    """What a token cost when counts were last compared."""
    steps_since_change: int = 0
    total_s: float = 0.0
    lost_s: float = 0.0
    """What trials took longer than the present count would have taken."""

    def choose(self, most: int) -> int:
        if self.trial is None and self.steps_since_trial >= STEPS_BEFORE_TRIAL:
            self.steps_since_trial = 0
            self._notice_change()
            candidate = self._candidate(most)
            is_affordable = self.lost_s <= MAX_TRIAL_LOSS * self.total_s
            if candidate is not None and (is_affordable or candidate not in self.tried):
                self.trial = candidate
        is_turn_of_trial = self.trial is not None and len(self.trial_s) < len(self.beside_s)
        return min(self.trial if self.trial and is_turn_of_trial else self.count, most)

    def observe(self, count: int, num_tokens: int, cost: StepCost) -> None:
        seconds = cost.step_s / num_tokens
        self.total_s += cost.step_s
        if count == self.trial:
            self.lost_s += max(0.0, (seconds - self._present()) * num_tokens)
            self.trial_s.append(seconds)
            if len(self.trial_s) == TRIAL_STEPS:
                self._judge(count)
        elif count == self.count:
            if self.trial is not None:
                self.beside_s.append(seconds)
            self.present_s.append(seconds)
            self.shard_s = cost.shard_s / num_tokens
            self.steps_since_trial += 1
            self.steps_since_change += 1

    def _notice_change(self) -> None:
        """Forget what trials showed and cost if steps have become much faster or slower."""
        if self.compared_s is None or self.steps_since_change < STEPS_BETWEEN_CHANGES:
            return
        if abs(self._present() / self.compared_s - 1) > CHANGE:
            self.compared_s = None
            self.steps_since_change = 0
            self.lost_s = 0.0
            self.tried.clear()

    def _candidate(self, most: int) -> int | None:
        """A neighbour of the present count: up and down in turn; None where none can win."""
        self.upwards = not self.upwards if self.count > 1 else True
        candidate = self.count + 1 if self.upwards else self.count - 1
        if candidate > most:
            return None
        if candidate > self.count:
            present_s = self._present()
            # Split already, the unsplit time is not known; then the present one stands for it.
            possible_s = fastest_possible_s(
                shard_s=self.shard_s,
                experts_s=max(0.0, present_s - self.shard_s),
                num_micro_batches=candidate,
            )
            if possible_s > (1 - MARGIN) * present_s:
                return None
        return candidate

    def _judge(self, count: int) -> None:
        """End a trial."""
        self.tried.update((self.count, count))
        pairs = zip(self.trial_s, self.beside_s, strict=True)
        num_wins = sum(1 for mine, present in pairs if mine < present)
        limit_s = (1 - MARGIN) * statistics.median(self.beside_s)
        if num_wins >= WINS and statistics.median(self.trial_s) < limit_s:
            self.count = count
            self.lost_s = 0.0
            self.present_s.clear()
            self.present_s.extend(self.trial_s)
        self.compared_s = self._present()
        self.trial = None
        self.trial_s, self.beside_s = [], []
        self.steps_since_trial = 0

    def _present(self) -> float:
        return statistics.median(self.present_s)
