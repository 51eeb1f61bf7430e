"""One frame of a layer call, from its sending to a good answer, by whatever way that comes.

A frame that fails or is late is sent again as `children`: frames to other workers that together
cover its assignments. It is done when it has an answer itself or all children are done, so the
first answer wins, and no assignment is ever counted twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

from router_service.dispatch.dispatch_plan import PlannedFrame
from router_service.dispatch.dispatch_telemetry import DispatchSpan
from router_service.dispatch.transport import WorkerLink
from services.core.wire import ResponseFrame


class Answered(NamedTuple):
    """A frame with its worker's answer; times are of `time.perf_counter_ns`."""

    frame: PlannedFrame
    response: ResponseFrame
    sent_ns: int
    received_ns: int


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a frame must be sent again. `reason` labels the metric."""

    reason: str
    text: str


class FrameState(IntEnum):
    WAITING = 0
    """Sent; no answer yet."""
    GOOD = 1
    FAILED = 2
    """It must be sent again, from `retry_at` on."""
    LACKING = 3
    """Never sent: its experts have no worker."""
    LEFT = 4
    """Its rows were left behind."""


class AnswerTaker(Protocol):
    def take(self, sent: SentFrame) -> None:
        """The frame was answered, or its link broke: see `response`."""
        ...


class SentFrame:
    """`worker_id` is empty and there is no link where the frame lacks a worker."""

    __slots__ = (
        "_taker",
        "call_id",
        "children",
        "due",
        "expected_s",
        "fault",
        "frame",
        "is_overdue",
        "link",
        "overdue_at",
        "received_ns",
        "response",
        "retry_at",
        "sent_ns",
        "span",
        "state",
        "worker_id",
    )

    def __init__(
        self,
        frame: PlannedFrame,
        worker_id: str,
        link: WorkerLink | None,
        call_id: int,
        span: DispatchSpan | None,
        taker: AnswerTaker,
    ) -> None:
        self.frame = frame
        self.worker_id = worker_id
        self.link = link
        self.call_id = call_id
        self.span = span
        self.state = FrameState.WAITING if link is not None else FrameState.LACKING
        self.sent_ns = time.perf_counter_ns()
        self.expected_s = 0.0
        self.due = 0.0
        """When to look after it if there is no answer, by `time.monotonic`."""
        self.is_overdue = False
        self.overdue_at = 0.0
        self.received_ns = 0
        self.response: ResponseFrame | None = None
        self.fault: Fault | None = None
        self.retry_at = 0.0
        self.children: list[SentFrame] = []
        self._taker = taker

    @property
    def num_experts(self) -> int:
        return len(self.frame.expert_ids)

    @property
    def elapsed_s(self) -> float:
        return (self.received_ns - self.sent_ns) * 1e-9

    @property
    def is_done(self) -> bool:
        if self.state in (FrameState.GOOD, FrameState.LEFT):
            return True
        return bool(self.children) and all(child.is_done for child in self.children)

    def take_answer(self, response: ResponseFrame | None) -> None:
        """An `OnAnswer`."""
        self.received_ns = time.perf_counter_ns()
        self.response = response
        self._taker.take(self)

    def answers(self) -> Iterator[Answered]:
        """What covers its assignments, once it is done; nothing of rows that were left behind."""
        if self.state is FrameState.GOOD:
            assert self.response is not None
            yield Answered(self.frame, self.response, self.sent_ns, self.received_ns)
        else:
            for child in self.children:
                yield from child.answers()

    def unfinished(self) -> Iterator[SentFrame]:
        """Frames whose answer would bring this one nearer to its end."""
        if not self.is_done:
            if not self.children or self.state is FrameState.WAITING:
                yield self
            for child in self.children:
                yield from child.unfinished()

    def everything(self) -> Iterator[SentFrame]:
        yield self
        for child in self.children:
            yield from child.everything()
