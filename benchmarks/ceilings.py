"""A side that measures the machine: the best of a few short readings of memory and of a matmul.

    python -m benchmarks.ceilings

Answers each job, whatever is in it, with `read_bytes_per_s` and `flop_per_s`. Memory is read by a
sum and by a matrix-vector product over a buffer on huge pages, several times the size of any cache;
operations are counted in a large bfloat16 product, plain and with a weight packed for oneDNN.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.jobs import Result, claim_results, serve_jobs
from services.core.packed_linear import PackedLinear

BUFFER_BYTES = 1 << 30
COLUMNS = 4096
ROWS, WIDTH = 1024, 4096
REPEATS = 3


def main() -> None:
    results = claim_results()
    probe = Probe(len(os.sched_getaffinity(0)))
    serve_jobs(lambda job: probe.measure(), results)


class Probe:
    """Holds the operands."""

    def __init__(self, cores: int) -> None:
        self._thread_counts = sorted({1, cores})
        # PackedLinear takes its weight in rows.
        weight = torch.randn(WIDTH, WIDTH).to(torch.bfloat16)
        self._plain = weight
        self._packed = PackedLinear(weight, dtype=torch.bfloat16, device=torch.device("cpu"))
        self._rows = torch.randn(ROWS, WIDTH).to(torch.bfloat16)
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._buffer.madvise(mmap.MADV_HUGEPAGE)
        self._values = torch.frombuffer(self._buffer, dtype=torch.float32).fill_(1.0)
        self._vector = torch.ones(COLUMNS)

    def measure(self) -> Result:
        matrix = self._values.view(-1, COLUMNS)
        reads: list[Callable[[], object]] = [self._values.sum, lambda: matrix @ self._vector]
        products: list[Callable[[], object]] = [
            lambda: self._packed(self._rows),
            lambda: F.linear(self._rows, self._plain),
        ]
        operations = 2 * ROWS * WIDTH * WIDTH
        with torch.inference_mode():
            return {
                "read_bytes_per_s": BUFFER_BYTES / min(self._best_s(read) for read in reads),
                "flop_per_s": operations / min(self._best_s(product) for product in products),
            }

    def _best_s(self, action: Callable[[], object]) -> float:
        times = []
        for num_threads in self._thread_counts:
            torch.set_num_threads(num_threads)
            for _ in range(REPEATS):
                started = time.perf_counter()
                action()
                times.append(time.perf_counter() - started)
        return min(times)


if __name__ == "__main__":
    main()
