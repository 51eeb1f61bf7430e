"""Computing frames, and the thread that does it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expert_service.frame_queue import FrameQueue
from expert_service.held_experts import HeldExperts, held_together
from services.core.bit_patterns import bit_patterns, is_all_finite
from services.core.errors import ExpertfleetError, MalformedFrameError
from services.core.expert_ffn import MoeInput, moe_forward_each
from services.core.kernels.choice import set_num_threads
from services.core.wire import RequestFrame

_STOP_TIMEOUT_S = 1.0
_SHORT_BYTES = 256 << 20
"""Of weights: some 25 ms on one core."""
_ROWS_LIKE_READING = 8
"""So many rows through a matrix cost about as much as reading it once."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """A frame to compute."""

    frame: RequestFrame
    held: HeldExperts
    """What the worker held when it accepted the frame: it lives until the frame is computed."""
    arrived_ns: int
    """Of `time.perf_counter_ns`."""
    is_wanted: Callable[[], bool]
    """False once nobody waits for the answer; the frame is then skipped."""
    on_done: Callable[[Outcome], None]
    """Called by whoever `deliver` hands the outcome to."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What became of a job: rows on the CPU, or an error. `batch_rows` counts the assignments
    that were computed together."""

    job: Job
    result: Tensor | ExpertfleetError
    queue_us: int
    compute_us: int
    batch_rows: int


class ComputeThread:
    """Takes jobs from any thread and hands outcomes, a batch at a time, to `deliver`.

    `deliver` is called on the compute thread and must not block. A job that is no longer wanted
    gets no outcome.
    """

    def __init__(
        self,
        *,
        num_threads: int,
        is_native: bool,
        deliver: Callable[[Sequence[Outcome]], None],
    ) -> None:
        self._is_native = is_native
        self._num_threads = num_threads
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._inbox.put(job)

    def stop(self) -> None:
        """End the thread after the batch in hand; what waits is dropped. Blocks 1 s at most."""
        self._inbox.put(None)
        self._thread.join(_STOP_TIMEOUT_S)

    @torch.inference_mode()
    def _run(self) -> None:
        # torch's are this thread's only
        set_num_threads(self._num_threads, is_native=self._is_native)
        waiting: FrameQueue[Job] = FrameQueue()
        while self._receive(waiting):
            self._compute(waiting.take())

    def _compute(self, jobs: Sequence[Job]) -> None:
        """In a call of its own, so that nothing computed is kept while the thread waits."""
        if wanted := [job for job in jobs if job.is_wanted()]:
            self._deliver(compute_jobs(wanted))

    def _receive(self, waiting: FrameQueue[Job]) -> bool:
        """Move everything sent so far into `waiting`; block while there is nothing to do."""
        while len(waiting) == 0 or not self._inbox.empty():
            job = self._inbox.get()
            if job is None:
                return False
            waiting.add(job.frame.layer, job)
        return True


def is_short(held: HeldExperts, frame: RequestFrame) -> bool:
    """Whether a frame of a layer that is held is computed in some milliseconds on one core."""
    experts = held.layers[frame.layer]
    assigned = frame.assignments
    cost_bytes = sum(
        [
            experts[expert].weight_bytes * (1 + num_rows / _ROWS_LIKE_READING)
            for expert, num_rows in zip(assigned.expert_ids, assigned.rows_per_expert, strict=True)
        ]
    )
    return cost_bytes <= _SHORT_BYTES


def compute_jobs(jobs: Sequence[Job]) -> list[Outcome]:
    """Compute frames of one layer together, on the calling thread. At least one."""
    started_ns = time.perf_counter_ns()
    held = held_together([job.held for job in jobs])
    results = _compute_frames(held, [job.frame for job in jobs])
    compute_us = (time.perf_counter_ns() - started_ns) // 1000
    batch_rows = sum([job.frame.num_assignments for job in jobs])
    return [
        Outcome(
            job=job,
            result=result,
            queue_us=(started_ns - job.arrived_ns) // 1000,
            compute_us=compute_us,
            batch_rows=batch_rows,
        )
        for job, result in zip(jobs, results, strict=True)
    ]


def _compute_frames(
    held: HeldExperts, frames: Sequence[RequestFrame]
) -> list[Tensor | ExpertfleetError]:
    """Rows or an error for every frame; one frame's fault is not another's."""
    results: list[Tensor | ExpertfleetError] = [_check_finite(frame) for frame in frames]
    good = [i for i, result in enumerate(results) if isinstance(result, Tensor)]
    try:
        outputs = _moe_forward(held, [frames[i] for i in good])
    except Exception as error:
        if len(good) > 1:
            return [_compute_frames(held, [frame])[0] for frame in frames]
        _logger.exception("layer %d could not be computed", frames[good[0]].layer)
        results[good[0]] = ExpertfleetError(
            f"layer {frames[good[0]].layer} could not be computed: {type(error).__name__}: {error}"
        )
        return results
    # A row that overflowed is answered as it is, as in process: the shard then fails the request
    # it belongs to, and not those beside it in the frame.
    for i, output in zip(good, outputs, strict=True):
        results[i] = output
    return results


def _moe_forward(held: HeldExperts, frames: Sequence[RequestFrame]) -> list[Tensor]:
    if not frames:
        return []
    inputs = [
        MoeInput(
            hidden_states=frame.rows(held.dtype).to(held.device),
            assignments=frame.assignments.to(held.device),
            combine=frame.combine,
        )
        for frame in frames
    ]
    outputs = moe_forward_each(held.layers[frames[0].layer], inputs)
    return [
        output.to("cpu", frame.answer_dtype or held.dtype)
        for frame, output in zip(frames, outputs, strict=True)
    ]


def _check_finite(frame: RequestFrame) -> Tensor | ExpertfleetError:
    rows = frame.hidden_states
    if frame.scales is not None or is_all_finite(bit_patterns(rows), rows.dtype):
        return rows
    bad_rows = (~torch.isfinite(rows)).any(dim=1).nonzero().flatten().tolist()
    return MalformedFrameError(
        f"hidden_states has NaN or infinity in rows {bad_rows[:8]} of layer {frame.layer}"
    )
