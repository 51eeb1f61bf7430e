"""One expert's FFN: the native kernels beside torch's packed products, and int8 and int4 weights.

    python -m benchmarks.experts [--hidden 1024 --intermediate 3584] [--rows 1,8,32,128,512]

Forms of the same expert take turns; several experts are gone through in turn, more than the caches
hold, so that weights come from memory as they do in a model. Prints the least milliseconds of a
call (median), and for native bfloat16 the bytes of weights read and the operations done per second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from services.core.expert_ffn import PackedExpert
from services.core.kernels.choice import set_num_threads
from services.core.quantization.formats import QUANTIZED_FORMATS

CPU = torch.device("cpu")
CACHE_BYTES = 256 << 20
"""Of weights that one form goes through before an expert comes again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """w1 and w3 [F, H], w2 [H, F]."""

    w1: Tensor
    w2: Tensor
    w3: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=3584)
    parser.add_argument("--rows", default="1,8,16,32,64,128,512")
    parser.add_argument("--budget-s", type=float, default=0.4, help="per form, rows and threads")
    options = parser.parse_args()
    forms = _make_forms(options.hidden, options.intermediate)
    cores = len(os.sched_getaffinity(0))
    sys.stdout.write(f"{describe_machine()}\n")
    sys.stdout.write(f"expert of {options.hidden} x {options.intermediate}, bfloat16 rows\n\n")
    sys.stdout.write(f"| threads | rows | {' | '.join(f'{name} ms' for name in forms)} ")
    sys.stdout.write("| torch / native | GB/s | GFLOP/s |\n")
    sys.stdout.write("|---" * (len(forms) + 5) + "|\n")
    matrix_bytes = 6 * options.hidden * options.intermediate
    with torch.inference_mode():
        for num_threads in sorted({1, cores}):
            for num_rows in (int(text) for text in options.rows.split(",")):
                rows = torch.randn(num_rows, options.hidden).to(torch.bfloat16)
                times = _take_turns(forms, rows, num_threads, options.budget_s)
                least = {name: min(seconds) for name, seconds in times.items()}
                cells = [
                    f"{min(seconds) * 1e3:.2f} ({statistics.median(seconds) * 1e3:.2f})"
                    for seconds in times.values()
                ]
                sys.stdout.write(
                    f"| {num_threads} | {num_rows} | {' | '.join(cells)} "
                    f"| {least['torch'] / least['native']:.2f} "
                    f"| {matrix_bytes / least['native'] / 1e9:.1f} "
                    f"| {num_rows * matrix_bytes / least['native'] / 1e9:.0f} |\n"
                )
                sys.stdout.flush()


def _make_forms(hidden: int, intermediate: int) -> dict[str, list[PackedExpert]]:
    """Several experts in every form; those with fewer bytes go through more of them."""
    num_experts = max(2, -(-CACHE_BYTES // (6 * hidden * intermediate)))
    weights = [_random_weights(hidden, intermediate) for _ in range(num_experts)]
    forms = {
        "torch": [PackedExpert(w, dtype=torch.bfloat16, device=CPU, native=False) for w in weights],
        "native": [PackedExpert(w, dtype=torch.bfloat16, device=CPU) for w in weights],
    }
    for quantized in QUANTIZED_FORMATS:
        forms[quantized] = [
            PackedExpert(w, dtype=torch.bfloat16, device=CPU, quantized=quantized) for w in weights
        ]
    return forms


def _random_weights(hidden: int, intermediate: int) -> Weights:
    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape).div_(shape[1] ** 0.5).to(torch.bfloat16)

    return Weights(
        w1=matrix(intermediate, hidden),
        w2=matrix(hidden, intermediate),
        w3=matrix(intermediate, hidden),
    )


def _take_turns(
    forms: Mapping[str, Sequence[PackedExpert]], rows: Tensor, num_threads: int, budget_s: float
) -> dict[str, list[float]]:
    """Seconds of each form's calls."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(3):
        for name, experts in forms.items():
            # torch's own threads would spin on the native pool's cores after an operation.
            set_num_threads(num_threads, is_native=name != "torch")
            until = time.perf_counter() + budget_s / 3
            number = 0
            while time.perf_counter() < until or number <= len(experts):
                started = time.perf_counter()
                experts[number % len(experts)].forward(rows)
                if number:  # the first call finds the caches full of another form
                    times[name].append(time.perf_counter() - started)
                number += 1
    return times


if __name__ == "__main__":
    main()
