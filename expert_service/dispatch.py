"""The Dispatch call: frames in, answers out, faults told without breaking the stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc.aio
import torch
from grpc.aio import EOF  # type: ignore[attr-defined]

from expert_service.byte_budget import ByteBudget
from expert_service.compute import ComputeThread, Job, Outcome, compute_jobs, is_short
from expert_service.frame_queue import FrameQueue
from expert_service.frame_spans import FrameSpans
from expert_service.held_experts import HeldExperts
from expert_service.worker_stats import WorkerStats
from protos import experts_pb2
from services.core.errors import (
    DrainingError,
    ExpertfleetError,
    FrameTooLargeError,
    MalformedFrameError,
    UnknownExpertError,
)
from services.core.kernels.choice import native_kernels_for, set_num_threads
from services.core.wire import (
    RequestFrame,
    decode_request,
    encode_error,
    encode_response,
    too_large_error,
)

MAX_FRAMES_IN_HAND = 4
"""Times the largest frame: the bytes of requests that all streams together may have in hand."""

_logger = logging.getLogger(__name__)
_STATUS_OF_ERROR: tuple[tuple[type[ExpertfleetError], experts_pb2.DispatchStatus], ...] = (
    (FrameTooLargeError, experts_pb2.DISPATCH_STATUS_TOO_LARGE),
    (UnknownExpertError, experts_pb2.DISPATCH_STATUS_UNKNOWN_EXPERT),
    (DrainingError, experts_pb2.DISPATCH_STATUS_DRAINING),
    (MalformedFrameError, experts_pb2.DISPATCH_STATUS_INVALID_FRAME),
)


class FrameSource(Protocol):
    """Where a frame came from and its answer goes."""

    def is_open(self) -> bool:
        """Whether anybody waits for answers."""
        ...

    def take(self, num_bytes: int) -> None:
        """A frame has come and is in hand until it is answered."""
        ...

    def accept(self, num_bytes: int) -> None:
        """It is going to be computed."""
        ...

    def put_answer(self, answer: Answer) -> None: ...


class Lane(Protocol):
    """What else computes with the experts: see `expert_service.lane.WorkerLane`."""

    def hold(self, experts: HeldExperts | None) -> None: ...
    async def drain(self) -> None: ...
    def close(self) -> None: ...


StreamContext = grpc.aio.ServicerContext[bytes, bytes]


class DispatchService:
    """Serves streams on the event loop; torch runs on the compute thread, and where there is no
    core to spare also on the loop, for frames that are `is_short`.

    Frames are refused until `open`, and from `drain` on. One stream may have the bytes of one
    largest frame in hand, all together `MAX_FRAMES_IN_HAND` of them; past that, streams are not
    read, which the transport's flow control passes on to the sender.
    """

    def __init__(self, *, max_frame_bytes: int, stats: WorkerStats, spans: FrameSpans) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._stats = stats
        self.spans = spans
        """Told of every frame that was computed."""
        self._accepted = ByteBudget(MAX_FRAMES_IN_HAND * max_frame_bytes)
        self._streams: set[_Stream] = set()
        self._experts: HeldExperts | None = None
        self._compute: ComputeThread | None = None
        self._computes_short_frames = False
        self._short_jobs: FrameQueue[Job] = FrameQueue()
        self._is_draining = False
        self._lane: Lane | None = None

    def attach(self, lane: Lane) -> None:
        """Keep `lane` told of what is held, and drain and close it with this. Before `open`."""
        self._lane = lane

    def open(self, experts: HeldExperts, *, num_threads: int) -> None:
        """Take frames from now on. Call on the event loop.

        With one thread on a CPU, short frames are computed on the event loop itself: handing them
        to another thread and back costs more than the loop can do meanwhile. (With more threads,
        OpenMP would keep a pool for each of the two.)
        """
        loop = asyncio.get_running_loop()

        def deliver(outcomes: Sequence[Outcome]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone: so are all streams
                loop.call_soon_threadsafe(self._hand_out, outcomes)

        is_native = native_kernels_for(experts.dtype, experts.device) is not None
        self._compute = ComputeThread(num_threads=num_threads, is_native=is_native, deliver=deliver)
        self._compute.start()
        self._experts = experts
        self._computes_short_frames = num_threads == 1 and experts.device.type == "cpu"
        if self._computes_short_frames:
            set_num_threads(1)
        if self._lane is not None:
            self._lane.hold(experts)

    def replace(self, experts: HeldExperts) -> None:
        """Take frames for these experts from now on; frames in hand are computed with those that
        were held when they came. Call on the event loop, after `open`, with the same dtype and
        device."""
        self._experts = experts
        if self._lane is not None and not self._is_draining:
            self._lane.hold(experts)

    async def drain(self) -> None:
        """Refuse new frames; when everything accepted is answered, end all streams."""
        self._is_draining = True
        if self._lane is not None:
            self._lane.hold(None)
            await self._lane.drain()
        await self._accepted.wait_until_empty()
        for stream in self._streams:
            stream.end_when_answered()

    def close(self) -> None:
        """Stop computing. Blocks until the batch in hand is done, a second at most."""
        if self._lane is not None:
            self._lane.close()
        if self._compute is not None:
            self._compute.stop()
            self._compute = None

    async def dispatch(self, _requests: AsyncIterator[bytes], context: StreamContext) -> None:
        """Handle one stream, until its client ends it or the worker is drained."""
        stream = _Stream(self._max_frame_bytes, self._accepted)
        self._streams.add(stream)
        reading = asyncio.create_task(self._read(context, stream))
        try:
            while (answer := await stream.next_answer()) is not None:
                await context.write(answer.frame)
                stream.release(answer)
            if reading.done():
                reading.result()
        except grpc.aio.InternalError:
            _logger.info("a client left without reading its answers")
        finally:
            stream.close()
            self._streams.discard(stream)
            reading.cancel()

    async def _read(self, context: StreamContext, stream: _Stream) -> None:
        try:
            while True:
                await stream.wait_for_room()
                frame = await context.read()
                if frame is EOF:
                    return
                self.accept(frame, stream)
        finally:
            stream.end_when_answered()

    def accept(self, frame_bytes: bytes, stream: FrameSource) -> None:
        """Have a frame answered, now or when it is computed. Call on the event loop."""
        arrived_ns = time.perf_counter_ns()
        call_id = 0
        stream.take(len(frame_bytes))
        try:
            frame = decode_request(frame_bytes, max_frame_bytes=self._max_frame_bytes)
            call_id = frame.call_id
            experts, compute = self._check(frame)
        except ExpertfleetError as error:
            refusal = self._error_frame(error.details.get("call_id", call_id), error)
            stream.put_answer(Answer(frame=refusal, request_bytes=len(frame_bytes)))
            return
        stream.accept(len(frame_bytes))
        job = Job(
            frame=frame,
            held=experts,
            arrived_ns=arrived_ns,
            is_wanted=stream.is_open,
            on_done=lambda outcome: self._answer(stream, outcome, len(frame_bytes)),
        )
        if self._computes_short_frames and is_short(experts, frame):
            self._short_jobs.add(frame.layer, job)
            # In the loop's next round, so that frames that came together are computed together.
            asyncio.get_running_loop().call_soon(self._compute_short_jobs)
        else:
            compute.submit(job)

    def refuse_too_large(self, num_bytes: int, rest: bytes, stream: FrameSource) -> None:
        """Answer a frame of which only the fields after its payload were kept."""
        error = too_large_error(num_bytes, rest, self._max_frame_bytes)
        refusal = self._error_frame(error.details["call_id"], error)
        stream.put_answer(Answer(frame=refusal, request_bytes=len(rest)))

    def _check(self, frame: RequestFrame) -> tuple[HeldExperts, ComputeThread]:
        """What to compute with and on; raises what the frame asks for in vain."""
        if self._is_draining:
            raise DrainingError("this worker is draining; send the frame to another")
        if self._experts is None or self._compute is None:
            raise UnknownExpertError("this worker is still loading; send the frame to another")
        self._experts.check_slots(frame.layer, frame.assignments.expert_ids)
        check_rows(frame, self._experts.dtype, self._experts.hidden_size)
        return self._experts, self._compute

    @torch.inference_mode()
    def _compute_short_jobs(self) -> None:
        jobs = [job for job in self._short_jobs.take() if job.is_wanted()]
        if jobs:
            self._hand_out(compute_jobs(jobs))

    def _hand_out(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            outcome.job.on_done(outcome)
        # Counted in the loop's next round, after the answers are written.
        asyncio.get_running_loop().call_soon(self._record, outcomes)

    def _answer(self, stream: FrameSource, outcome: Outcome, num_bytes: int) -> None:
        frame, result = outcome.job.frame, outcome.result
        if isinstance(result, ExpertfleetError):
            response = self._error_frame(frame.call_id, result)
        else:
            response = encode_response(
                call_id=frame.call_id,
                hidden_states=result,
                queue_us=outcome.queue_us,
                compute_us=outcome.compute_us,
            )
        stream.put_answer(Answer(frame=response, request_bytes=num_bytes, accepted_bytes=num_bytes))

    def _record(self, outcomes: Sequence[Outcome]) -> None:
        self._stats.record_busy(outcomes[0].compute_us)  # computed together
        for outcome in outcomes:
            if not isinstance(outcome.result, ExpertfleetError):
                self._stats.record_computed(outcome)
                self.spans.record_computed(outcome)

    def _error_frame(self, call_id: int, error: ExpertfleetError) -> bytes:
        status = next(
            (status for kind, status in _STATUS_OF_ERROR if isinstance(error, kind)),
            experts_pb2.DISPATCH_STATUS_INTERNAL,
        )
        self._stats.record_refused(status)
        return encode_error(call_id=call_id, status=status, error=error.message)


def check_rows(frame: RequestFrame, dtype: torch.dtype, hidden_size: int) -> None:
    """Raise `MalformedFrameError` unless rows and answer are of the worker's width, and of dtypes
    that its `dtype` of activations goes with."""
    rows = frame.hidden_states
    may_narrow = dtype == torch.float32
    if not (rows.dtype in (dtype, torch.int8) or (may_narrow and rows.dtype == torch.bfloat16)):
        raise MalformedFrameError(
            f"hidden_states is {rows.dtype}, but this worker computes in {dtype}; send {dtype}, "
            "int8 with scales, or bfloat16 to a worker that computes in float32"
        )
    if rows.shape[1] != hidden_size:
        raise MalformedFrameError(
            f"hidden_size is {rows.shape[1]}, but the model's is {hidden_size}"
        )
    answer = frame.answer_dtype
    if answer not in (None, dtype) and not (
        may_narrow and answer == torch.bfloat16 and not frame.combine
    ):
        raise MalformedFrameError(
            f"answer_dtype is {answer} with combine={frame.combine}, but this worker answers in "
            f"{dtype}; bfloat16 is for workers that compute in float32, without combine"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A response, and the bytes of its request that are in hand until it is written."""

    frame: bytes
    request_bytes: int
    accepted_bytes: int = 0


class _Stream:
    """One client's stream: the bytes it has in hand, and the answers that wait to be written.

    Every frame counts against the stream's own bound, frames accepted for computing also against
    the one that all streams share.
    """

    def __init__(self, max_bytes: int, accepted: ByteBudget) -> None:
        self._in_hand = ByteBudget(max_bytes)
        self._accepted = accepted
        self._accepted_bytes = 0
        self._answers: asyncio.Queue[Answer | None] = asyncio.Queue()
        self._is_open = True
        self._is_ending = False

    def is_open(self) -> bool:
        return self._is_open

    async def wait_for_room(self) -> None:
        await self._in_hand.wait_for_room()
        await self._accepted.wait_for_room()

    def take(self, num_bytes: int) -> None:
        self._in_hand.take(num_bytes)

    def accept(self, num_bytes: int) -> None:
        self._accepted_bytes += num_bytes
        self._accepted.take(num_bytes)

    def put_answer(self, answer: Answer) -> None:
        if self._is_open:
            self._answers.put_nowait(answer)

    async def next_answer(self) -> Answer | None:
        """The next answer to write; None when the stream is to end."""
        return await self._answers.get()

    def release(self, answer: Answer) -> None:
        """The answer is written: its request is no longer in hand."""
        self._in_hand.release(answer.request_bytes)
        self._accepted_bytes -= answer.accepted_bytes
        self._accepted.release(answer.accepted_bytes)
        self._end_if_answered()

    def end_when_answered(self) -> None:
        self._is_ending = True
        self._end_if_answered()

    def close(self) -> None:
        """Drop what is in hand; answers that still come are dropped too."""
        self._is_open = False
        self._accepted.release(self._accepted_bytes)
        self._accepted_bytes = 0

    def _end_if_answered(self) -> None:
        if self._is_ending and not self._in_hand.in_hand_bytes:
            self._answers.put_nowait(None)
