"""What a shard knows of each worker's pace: outstanding work, service time, deadlines. Pure.

Work is counted in rows, and `expert_rows` more for every activated expert, whose weights must be
read (see `replica_choice`). All times are in seconds; no clock is read here.
"""

from __future__ import annotations

MIN_DEADLINE_S = 0.1
"""Below this a pause of the scheduler or the collector of either process looks like a fault."""
_DEADLINE_FACTOR = 2.0
_NUM_COLD_ANSWERS = 16
_FIRST_OVERHEAD_S = 5e-4
_FIRST_UNIT_S = 1e-5
_FIRST_TAIL = 4.0
_MAX_TAIL = 8.0
_USUAL_FACTOR = 2.0
_ROWS_BEYOND_SEEN = 4
_LEARNING_RATE = 0.1
_AVOID_S = 1e6
"""Far more than any frame takes: an avoided worker is chosen only where there is no other."""


class WorkShape:
    """How many rows the reading of an expert's weights is worth, learnt from all workers' answers.

    Least squares of compute time = a * experts + b * rows over answers, older ones forgotten,
    each weighted so that its relative error counts; `expert_rows` is a / b.
    """

    __slots__ = ("_ee", "_er", "_ey", "_num_until_fit", "_rr", "_ry", "expert_rows", "max_rows")

    def __init__(self, expert_rows: float = 32.0) -> None:
        self.expert_rows = expert_rows
        self.max_rows = 0
        """Most rows of one frame that was answered."""
        self._ee = self._er = self._rr = self._ey = self._ry = 0.0
        self._num_until_fit = 32

    def work(self, num_rows: int, num_experts: int) -> float:
        return num_rows + self.expert_rows * num_experts

    def observe(self, num_rows: int, num_experts: int, compute_s: float) -> None:
        scale = 1.0 / (num_rows + self.expert_rows * num_experts)
        experts, rows, seconds = num_experts * scale, num_rows * scale, compute_s * scale
        self._ee = 0.995 * self._ee + experts * experts
        self._er = 0.995 * self._er + experts * rows
        self._rr = 0.995 * self._rr + rows * rows
        self._ey = 0.995 * self._ey + experts * seconds
        self._ry = 0.995 * self._ry + rows * seconds
        self._num_until_fit -= 1
        if self._num_until_fit == 0:
            self._num_until_fit = 32
            self._fit()

    def _fit(self) -> None:
        determinant = self._ee * self._rr - self._er * self._er
        if determinant < 1e-3 * self._ee * self._rr:
            return  # always the same mix: nothing to tell the two apart by
        per_expert = self._ey * self._rr - self._ry * self._er
        per_row = self._ry * self._ee - self._ey * self._er
        if per_expert > 0 and per_row > 0:
            fitted = min(512.0, max(1.0, per_expert / per_row))
            self.expert_rows += 0.5 * (fitted - self.expert_rows)


class WorkerBook:
    """One worker, as this shard sees it. Written through `sent` and what must follow each `sent`:
    `answered` or `dropped`. `start_s` and `unit_s` are its `WorkerCost`."""

    __slots__ = (
        "_shape",
        "_tail",
        "num_answers",
        "outstanding_experts",
        "outstanding_rows",
        "overhead_s",
        "penalty_s",
        "start_s",
        "unit_s",
        "worker_id",
    )

    def __init__(self, worker_id: str, shape: WorkShape, like: WorkerBook | None = None) -> None:
        """`like`: a worker whose pace is the first guess."""
        self.worker_id = worker_id
        self._shape = shape
        self.outstanding_rows = 0
        self.outstanding_experts = 0
        self.num_answers = 0
        self.overhead_s: float = like.overhead_s if like else _FIRST_OVERHEAD_S
        """Wire, and waiting behind others' frames."""
        self.unit_s: float = like.unit_s if like else _FIRST_UNIT_S
        self._tail = _FIRST_TAIL
        """A high percentile of time / expected time."""
        self.penalty_s = 0.0
        """Added while the worker should get little: after a fault."""
        self.start_s = self.overhead_s

    def sent(self, num_rows: int, num_experts: int) -> float:
        """Count a frame. Returns the seconds until its answer is expected."""
        expected_s = (
            self.start_s - self.penalty_s + self.unit_s * self._shape.work(num_rows, num_experts)
        )
        self.outstanding_rows += num_rows
        self.outstanding_experts += num_experts
        self._update()
        return expected_s

    def answered(
        self,
        num_rows: int,
        num_experts: int,
        elapsed_s: float,
        *,
        expected_s: float | None = None,
        compute_s: float = 0.0,
    ) -> None:
        """A frame came back good. `compute_s` is the worker's own figure, 0 where it has none."""
        shape = self._shape
        work = shape.work(num_rows, num_experts)
        if expected_s is None:
            expected_s = self.overhead_s + self.unit_s * work
        if compute_s:
            shape.observe(num_rows, num_experts, compute_s)
            rate = 1.0 if not self.num_answers else _LEARNING_RATE
            self.unit_s += rate * (compute_s / work - self.unit_s)
        if num_rows > shape.max_rows:
            shape.max_rows = num_rows
        self.overhead_s = max(0.0, self.overhead_s + _LEARNING_RATE * (elapsed_s - expected_s))
        ratio = elapsed_s / expected_s if expected_s > 0 else 1.0
        if ratio > self._tail:
            # One answer raises it by a quarter at most, whatever held it up.
            raised = self._tail + 0.25 * (min(ratio, 2 * self._tail) - self._tail)
            self._tail = min(raised, _MAX_TAIL)
        else:
            self._tail += 0.0025 * (max(ratio, 1.0) - self._tail)
        self.num_answers += 1
        self.penalty_s *= 0.5
        self.dropped(num_rows, num_experts)

    def dropped(self, num_rows: int, num_experts: int) -> None:
        """A frame that was sent is of no interest any more."""
        self.outstanding_rows -= num_rows
        self.outstanding_experts -= num_experts
        self._update()

    @property
    def is_cold(self) -> bool:
        """Whether too little is known of its pace."""
        return self.num_answers < _NUM_COLD_ANSWERS

    def guessed_deadline_s(
        self, num_rows: int, *, like: WorkerBook, call_timeout_s: float
    ) -> float:
        """The deadline of a frame that a cold worker was just sent: a generous one, of a worker
        whose pace is known."""
        expected_s = like.overhead_s + like.unit_s * self._shape.work(
            self.outstanding_rows, self.outstanding_experts
        )
        if like.is_cold or num_rows > _ROWS_BEYOND_SEEN * self._shape.max_rows:
            return call_timeout_s
        return min(call_timeout_s, MIN_DEADLINE_S + _DEADLINE_FACTOR * _MAX_TAIL * expected_s)

    def deadline_s(
        self, expected_s: float, num_rows: int, *, call_timeout_s: float, usual_overhead_s: float
    ) -> float:
        """How long a frame may take before it is sent elsewhere too: never more than
        `call_timeout_s`, and that much until the worker's pace is known.

        A worker that is slow to answer for what other workers' usual overhead is gets no more time
        than they: they would be faster.
        """
        if self.is_cold or num_rows > _ROWS_BEYOND_SEEN * self._shape.max_rows:
            return call_timeout_s
        usual_s = expected_s - max(0.0, self.overhead_s - _USUAL_FACTOR * usual_overhead_s)
        return min(call_timeout_s, MIN_DEADLINE_S + _DEADLINE_FACTOR * self._tail * usual_s)

    def avoid(self, is_avoided: bool, penalty_s: float = 0.0) -> None:
        """Choose this worker only where there is no other; or as if it were slower by so much."""
        self.penalty_s = _AVOID_S if is_avoided else penalty_s
        self._update()

    def fade(self) -> None:
        """Some time has passed without an answer: what was bad about it may be over."""
        if self.penalty_s < _AVOID_S:
            self.penalty_s *= 0.5
        self.overhead_s = min(self.overhead_s, max(0.7 * self.overhead_s, _FIRST_OVERHEAD_S))
        self._update()

    def _update(self) -> None:
        backlog = self.outstanding_rows + self._shape.expert_rows * self.outstanding_experts
        self.start_s = self.overhead_s + self.penalty_s + self.unit_s * backlog
