"""Sequences that wait for experts that are away, while the others go on. Pure: time is an argument.

Such a sequence keeps its blocks and its place; its step was not committed, so that it starts again
from where it was. The scheduler passes it over until its experts are back. It may wait
`expert_wait_s` in all between two steps that bring it forward, then its request fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router_service.experts import ExpertAvailability, MissingExperts, expert_unavailable
from router_service.scheduling.scheduler import Scheduler
from router_service.scheduling.sequence import SequenceStatus
from router_service.scheduling.step_plan import ScheduledSequence
from services.core.errors import ExpertUnavailableError


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftBehind:
    """An entry of a step that could not be finished for want of experts."""

    entry: ScheduledSequence
    missing: MissingExperts


@dataclass(slots=True, kw_only=True)
class _Wait:
    left: LeftBehind
    since: float
    is_parked: bool = True


class ExpertWaits:
    """Of one engine; used on its loop."""

    def __init__(self, experts: ExpertAvailability, scheduler: Scheduler) -> None:
        self._experts = experts
        self._scheduler = scheduler
        self._waits: dict[int, _Wait] = {}

    def __len__(self) -> int:
        return len(self._waits)

    def park(self, left: LeftBehind, now: float) -> None:
        """The sequence is not scheduled until `tend` lets it."""
        sequence = left.entry.sequence
        if sequence.status is SequenceStatus.FINISHED:
            return
        before = self._waits.get(sequence.order)
        since = now if before is None else before.since
        self._waits[sequence.order] = _Wait(left=left, since=since)
        self._scheduler.park(sequence)

    def advanced(self, entries: Sequence[ScheduledSequence], now: float) -> None:
        """These came through a step with all of their experts."""
        for entry in entries:
            wait = self._waits.pop(entry.sequence.order, None)
            if wait is not None:
                self._experts.count_wait(now - wait.since)

    def tend(self, now: float) -> list[tuple[ScheduledSequence, ExpertUnavailableError]]:
        """Let those go on whose experts are back; the errors of those that waited too long."""
        failed = []
        for order, wait in tuple(self._waits.items()):
            sequence, missing = wait.left.entry.sequence, wait.left.missing
            if sequence.status is SequenceStatus.FINISHED:
                del self._waits[order]
            elif now - wait.since >= self._experts.expert_wait_s:
                del self._waits[order]
                self._experts.count_wait(now - wait.since)
                error = expert_unavailable(
                    missing.layer, missing.experts, self._experts.expert_wait_s
                )
                failed.append((wait.left.entry, error))
            elif wait.is_parked and self._experts.is_available(
                (missing.layer, expert) for expert in missing.experts
            ):
                wait.is_parked = False
                self._scheduler.unpark(sequence)
        return failed

    def next_failure(self) -> float | None:
        """When the next one has waited for too long; None while nobody waits."""
        if not self._waits:
            return None
        return min(wait.since for wait in self._waits.values()) + self._experts.expert_wait_s
