"""Whether processes use more and more: samples by role, and the growth that a line through them
shows."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

NAMES = ("memory", "threads", "fds", "sockets")
ALLOWED = {"memory": float(64 << 20), "threads": 8.0, "fds": 24.0, "sockets": 16.0}
"""Growth of a role over the time of the samples that counts as flat: allocators and pools of
threads and connections fill up once. Memory may also grow by a tenth."""
WARM_UP_SHARE = 0.25
"""The first part of the samples is left out: caches and heaps are still filling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Sums over a role's processes at one moment; memory is resident, in bytes."""

    at_s: float
    role: str
    num_processes: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """Of one value of a role: the median, and slope times duration of a robust line (Theil-Sen)."""

    role: str
    name: str
    median: float
    grown: float
    allowed: float

    @property
    def is_too_much(self) -> bool:
        return self.grown > self.allowed


def sample_roles(roles: Mapping[int, str], at_s: float) -> list[Sample]:
    """One sample for each role of the processes given by pid; those that vanish are left out."""
    sums: defaultdict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(NAMES, 0.0))
    counts: defaultdict[str, int] = defaultdict(int)
    for pid, role in roles.items():
        try:
            values = _read(psutil.Process(pid))
        except (psutil.Error, OSError):
            continue
        counts[role] += 1
        for name, value in values.items():
            sums[role][name] += value
    return [
        Sample(at_s=at_s, role=role, num_processes=counts[role], values=values)
        for role, values in sums.items()
    ]


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Of every role and value, over samples with the role's usual number of processes."""
    by_role: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_role[sample.role].append(sample)
    found = []
    for role, all_of_role in sorted(by_role.items()):
        usual = statistics.mode(sample.num_processes for sample in all_of_role)
        kept = [sample for sample in all_of_role if sample.num_processes == usual]
        kept = kept[round(len(kept) * WARM_UP_SHARE) :]
        if len(kept) < 4:
            continue
        for name in NAMES:
            points = [(sample.at_s, sample.values[name]) for sample in kept]
            median = statistics.median(value for _, value in points)
            allowed = ALLOWED[name] + (0.1 * median if name == "memory" else 0.0)
            found.append(
                Growth(
                    role=role,
                    name=name,
                    median=median,
                    grown=_slope(points) * (points[-1][0] - points[0][0]),
                    allowed=allowed,
                )
            )
    return found


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """The median of the slopes of all pairs: single peaks do not move it (Sen, 1968)."""
    return statistics.median(
        (later - earlier) / (to_s - from_s)
        for index, (from_s, earlier) in enumerate(points)
        for to_s, later in points[index + 1 :]
        if to_s > from_s
    )


def _read(process: psutil.Process) -> dict[str, float]:
    with process.oneshot():
        return {
            "memory": float(process.memory_info().rss),
            "threads": float(process.num_threads()),
            "fds": float(process.num_fds()),
            "sockets": float(len(process.net_connections("all"))),
        }
