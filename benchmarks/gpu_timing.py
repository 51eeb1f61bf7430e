"""Clocks, the run's deadline, and the ceilings of the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_SAMPLES = 5
_SAMPLE_S = 0.004
_MAX_CALLS = 50


class Deadline:
    """`seconds` from construction; what would not end before is left out and named."""

    def __init__(self, seconds: float) -> None:
        self._start = time.monotonic()
        self._end = self._start + seconds
        self.skipped: list[str] = []

    def remaining_s(self) -> float:
        return self._end - time.monotonic()

    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def share(self, num_parts: int) -> Deadline:
        """A deadline after one of `num_parts` equal parts of what is left, noting for itself."""
        return Deadline(self.remaining_s() / num_parts)

    def allows(self, what: str, *, needs_s: float = 0.0) -> bool:
        """Whether so much time is left; notes `what` as skipped if not."""
        if self.remaining_s() >= max(needs_s, 0.0):
            return True
        self.skipped.append(f"{what}: out of time")
        return False


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_us(compute: Callable[[], object], device: torch.device) -> float:
    """Microseconds of a call when calls follow each other; on CUDA by device events.

    A sample is as many calls as take about 4 ms; the median of five.
    """
    for _ in range(2):
        compute()
    synchronize(device)
    started = time.perf_counter()
    compute()
    synchronize(device)
    one_s = max(time.perf_counter() - started, 1e-7)
    num_calls = max(1, min(_MAX_CALLS, int(_SAMPLE_S / one_s)))
    return statistics.median(_sample_us(compute, num_calls, device) for _ in range(_SAMPLES))


def _sample_us(compute: Callable[[], object], num_calls: int, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(num_calls):
            compute()
        return (time.perf_counter() - started) / num_calls * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(num_calls):
        compute()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / num_calls * 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Measured on this device: bytes read per second, bytes read and written by a copy, bf16
    multiply-adds as two operations each."""

    read_bytes_per_s: float
    copy_bytes_per_s: float
    matmul_flops: float

    @property
    def bytes_per_s(self) -> float:
        return max(self.read_bytes_per_s, self.copy_bytes_per_s)

    def floor_s(self, num_bytes: float, num_flops: float) -> float:
        """No step that reads so much and computes so much is faster."""
        return max(num_bytes / self.bytes_per_s, num_flops / self.matmul_flops)


def measure_ceilings(device: torch.device, *, num_bytes: int, matmul_size: int) -> Ceilings:
    """A matrix-vector product (read), a copy, and a square product, all on random data."""
    columns = 8192 if num_bytes >= 1 << 28 else 256
    source = torch.randn(num_bytes // (2 * columns), columns, device=device).bfloat16()
    target = torch.empty_like(source)
    vector = torch.randn(columns, device=device).bfloat16()
    read_us = min(
        median_us(lambda: source @ vector, device),
        median_us(lambda: torch.amax(source), device),
    )
    copy_us = median_us(lambda: target.copy_(source), device)
    num_read = source.nbytes
    left, right = torch.randn(2, matmul_size, matmul_size, device=device).bfloat16()
    product = torch.empty_like(left)
    matmul_us = median_us(lambda: torch.mm(left, right, out=product), device)
    return Ceilings(
        read_bytes_per_s=num_read / read_us * 1e6,
        copy_bytes_per_s=2 * num_read / copy_us * 1e6,
        matmul_flops=2 * matmul_size**3 / matmul_us * 1e6,
    )
