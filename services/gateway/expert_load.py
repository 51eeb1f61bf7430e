"""The load of every logical expert, from leases: totals, shares, imbalance, tokens per second."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.core.registry import FleetSnapshot, ShardRecord, Slot, WorkerRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoad:
    """One layer. `tokens`, `share` and `tokens_per_second` have one entry an expert.

    `imbalance` is the largest count over the mean; 1 is even. It is None before the first token,
    as `tokens_per_second` is before the second reading.
    """

    tokens: list[int]
    share: list[float]
    imbalance: float | None
    tokens_per_second: list[float] | None


def expert_tokens(snapshot: FleetSnapshot) -> dict[Slot, int]:
    """Tokens that the gates sent to each slot, over all shards alive.

    Where no shard reports, what the workers computed since they started stands in for it.
    """
    total: dict[Slot, int] = {}
    for counts in _counts(snapshot).values():
        for slot, count in counts.items():
            total[slot] = total.get(slot, 0) + count
    return total


def imbalance_of(loads: Sequence[float]) -> float | None:
    """The largest over the mean, of one layer's experts; None where there is no load."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else None


def ready_replicas(workers: Iterable[WorkerRecord]) -> Counter[Slot]:
    """How many ready workers hold each slot."""
    return Counter(slot for worker in workers if worker.state == "ready" for slot in worker.slots)


def layer_loads(
    tokens: Mapping[Slot, int],
    rates: Mapping[Slot, float] | None,
    *,
    num_layers: int,
    num_experts: int,
) -> list[LayerLoad]:
    loads: list[LayerLoad] = []
    for layer in range(num_layers):
        slots = [(layer, expert) for expert in range(num_experts)]
        counts = [tokens.get(slot, 0) for slot in slots]
        total = sum(counts)
        loads.append(
            LayerLoad(
                tokens=counts,
                share=[count / total if total else 0.0 for count in counts],
                imbalance=imbalance_of(counts),
                tokens_per_second=None if rates is None else [rates.get(s, 0.0) for s in slots],
            )
        )
    return loads


class LoadHistory:
    """Turns successive snapshots into rates over about the last `window_s` seconds.

    Readings are kept for that long; rates compare the newest with the oldest kept, or with the one
    before it if that is all there is. Readings closer than `min_interval_s` count as one, because
    leases are renewed about once a second.
    """

    def __init__(self, *, window_s: float = 10.0, min_interval_s: float = 1.0) -> None:
        self._window_s = window_s
        self._min_interval_s = min_interval_s
        self._readings: deque[tuple[float, FleetSnapshot]] = deque()

    def rates(self, snapshot: FleetSnapshot, now: float) -> tuple[dict[Slot, float], float] | None:
        """Tokens per second of each slot and the seconds they are taken over; None at first.

        `now` is Unix seconds.
        """
        if not self._readings or now - self._readings[-1][0] >= self._min_interval_s:
            self._readings.append((now, snapshot))
        while len(self._readings) > 2 and now - self._readings[1][0] >= self._window_s:
            self._readings.popleft()
        if len(self._readings) < 2:
            return None
        before_at, before = self._readings[0]
        now_at, after = self._readings[-1]
        elapsed_s = now_at - before_at
        tokens = _tokens_between(before, after, before_at)
        return {slot: count / elapsed_s for slot, count in tokens.items()}, elapsed_s


def _tokens_between(
    before: FleetSnapshot, after: FleetSnapshot, before_at: float
) -> dict[Slot, int]:
    """Tokens per slot between two snapshots, process by process.

    A process that started in between counts whole; one that was merely not seen before does not.
    """
    earlier, total = _counts(before), Counter[Slot]()
    for process, counts in _counts(after).items():
        _, started_at = process
        known = earlier.get(process)
        if known is None and started_at < before_at:
            continue
        for slot, count in counts.items():
            total[slot] += max(0, count - (known.get(slot, 0) if known else 0))
    return dict(total)


def _counts(snapshot: FleetSnapshot) -> dict[tuple[str, float], Mapping[Slot, int]]:
    """Tokens per slot by (process, when it started)."""
    if any(shard.expert_load for shard in snapshot.shards):
        return {(s.shard_id, s.started_at): s.expert_load for s in snapshot.shards}
    return {(w.worker_id, w.started_at): w.tokens for w in snapshot.workers}


def missing_slots(workers: Iterable[WorkerRecord], wanted: Iterable[Slot]) -> list[Slot]:
    """Slots that no ready worker holds."""
    return sorted(set(wanted) - set(ready_replicas(workers)))


def source_of(shards: Sequence[ShardRecord]) -> str:
    """Whose counts `expert_tokens` are: "shards" or "workers"."""
    return "shards" if any(shard.expert_load for shard in shards) else "workers"
