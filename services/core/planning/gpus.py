"""Graphics cards: what their makers state, and an assumed price.

Memory, bandwidth and dense matmul rates (without sparsity, float32 accumulation) are those of
NVIDIA's data sheets. Prices are assumptions: what an hour of such a card was commonly let for
at the time of writing; `--gpu-price` replaces them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from services.core.errors import ConfigurationError

MATH_TYPES = ("bf16", "fp8", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Rates are peaks: bytes per second, and operations per second where multiply-add is two.
    A rate of 0: the card has no such arithmetic."""

    name: str
    memory_bytes: float
    bandwidth: float
    bf16_flops: float
    fp8_flops: float
    int8_flops: float
    price_per_hour: float

    def flops(self, math: str) -> float:
        """Peak of `math`, one of `MATH_TYPES`. Raises `ConfigurationError` if it has none."""
        rates = {"bf16": self.bf16_flops, "fp8": self.fp8_flops, "int8": self.int8_flops}
        if not rates.get(math):
            has = ", ".join(name for name, rate in rates.items() if rate)
            raise ConfigurationError(
                f"{self.name} has no {math} arithmetic; choose from {has}", setting="math"
            )
        return rates[math]


def _gpu(
    name: str, gigabytes: float, gb_per_s: float, bf16: float, fp8: float, int8: float, price: float
) -> Gpu:
    """Rates in TFLOP/s and TOP/s, price in dollars."""
    return Gpu(
        name=name,
        memory_bytes=gigabytes * 1e9,
        bandwidth=gb_per_s * 1e9,
        bf16_flops=bf16 * 1e12,
        fp8_flops=fp8 * 1e12,
        int8_flops=int8 * 1e12,
        price_per_hour=price,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("l4", 24, 300, 121, 242, 242, 0.70),
        _gpu("a10", 24, 600, 125, 0, 250, 0.75),
        _gpu("rtx-3090", 24, 936, 71, 0, 284, 0.30),
        _gpu("rtx-4090", 24, 1008, 165, 330, 660, 0.45),
        _gpu("l40s", 48, 864, 362, 733, 733, 1.10),
        _gpu("a100-40", 40, 1555, 312, 0, 624, 1.30),
        _gpu("a100-80", 80, 2039, 312, 0, 624, 1.80),
        _gpu("h100", 80, 3350, 989, 1979, 1979, 2.90),
        _gpu("h200", 141, 4800, 989, 1979, 1979, 3.60),
    )
}


def find_gpu(name: str, **changes: float | None) -> Gpu:
    """A card by name, with the given fields replaced (None leaves them).

    "custom" has no figures of its own: all but `fp8_flops` and `int8_flops` must be given. Raises
    `ConfigurationError` with the choices.
    """
    given: dict[str, Any] = {k: value for k, value in changes.items() if value is not None}
    if name in GPUS:
        return replace(GPUS[name], **given)
    if name != "custom":
        raise ConfigurationError(
            f"unknown GPU {name!r}; choose from {', '.join(GPUS)}, or custom with "
            "--gpu-memory, --gpu-bandwidth, --gpu-tflops and --gpu-price",
            setting="gpu",
        )
    fields = {"fp8_flops": 0.0, "int8_flops": 0.0} | given
    flags = {
        "memory_bytes": "--gpu-memory",
        "bandwidth": "--gpu-bandwidth",
        "bf16_flops": "--gpu-tflops",
        "price_per_hour": "--gpu-price",
    }
    if missing := [flag for field, flag in flags.items() if field not in fields]:
        raise ConfigurationError(f"--gpu custom also needs {', '.join(missing)}", setting="gpu")
    return Gpu(name="custom", **fields)
