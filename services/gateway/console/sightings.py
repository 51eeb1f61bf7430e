"""Who was seen when, and who is lost: a process killed is shown for a minute, not forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from services.core.registry import ShardRecord, WorkerRecord, lease_id

Record = TypeVar("Record", WorkerRecord, ShardRecord)


@dataclass(slots=True, kw_only=True)
class Sighting(Generic[Record]):
    """The last lease of one worker or shard. `seen_at` is when a renewal was last noticed.

    `is_lost`: the lease is overdue, or ran out. `lost_at` is when that last happened, also where
    the process is back.
    """

    record: Record
    seen_at: float
    is_lost: bool = False
    lost_at: float | None = None


class Sightings(Generic[Record]):
    """Give it the leases of every reading with `add`. Times are Unix seconds.

    A lease not renewed for `overdue_s` is lost. One that is gone was removed by its process, which
    ended in good order, if it was draining or renewed within `overdue_s`; else it ran out. Lost
    ones are kept for `kept_s`.
    """

    def __init__(self, *, overdue_s: float, kept_s: float = 60.0) -> None:
        self._overdue_s = overdue_s
        self._kept_s = kept_s
        self._by_id: dict[str, Sighting[Record]] = {}

    def add(self, records: tuple[Record, ...], now: float) -> None:
        for record in records:
            self._see(record, now)
        present = {lease_id(record) for record in records}
        for name in self._by_id.keys() - present:
            self._miss(name, now)
        for each in self._by_id.values():
            if each.lost_at is not None and not each.is_lost and now - each.lost_at > self._kept_s:
                each.lost_at = None

    def all(self) -> list[Sighting[Record]]:
        """In the order of their ids."""
        return [self._by_id[name] for name in sorted(self._by_id)]

    def _see(self, record: Record, now: float) -> None:
        name = lease_id(record)
        known = self._by_id.get(name)
        if known is None:
            self._by_id[name] = Sighting(record=record, seen_at=now)
            return
        if record.started_at != known.record.started_at:
            # Another process under the same name: the one before did not wait for its lease to end.
            if not _is_draining(known.record) and not known.is_lost:
                known.lost_at = now
        elif record.written_at and record.written_at == known.record.written_at:
            if now - known.seen_at > self._overdue_s:
                _lose(known, now)
            return
        known.record, known.seen_at, known.is_lost = record, now, False

    def _miss(self, name: str, now: float) -> None:
        known = self._by_id[name]
        if not known.is_lost:
            if _is_draining(known.record) or now - known.seen_at <= self._overdue_s:
                del self._by_id[name]
                return
            _lose(known, now)
        elif known.lost_at is not None and now - known.lost_at > self._kept_s:
            del self._by_id[name]


def _lose(sighting: Sighting[Record], now: float) -> None:
    if not sighting.is_lost:
        sighting.is_lost, sighting.lost_at = True, now


def _is_draining(record: WorkerRecord | ShardRecord) -> bool:
    return isinstance(record, WorkerRecord) and record.state == "draining"
