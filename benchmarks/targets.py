"""The ratios that are aimed at, and what was measured of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BOUND = "bound"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`side` / `other` is to be at least `wanted`, by label of the workload."""

    text: str
    side: str
    other: str
    wanted: Mapping[str, float]


TARGETS = (
    Target(
        text="4 workers / in process",
        side="workers4",
        other="inprocess",
        wanted={"decode 8": 0.9, "decode 32": 0.95},
    ),
    Target(
        text="in process / vLLM",
        side="inprocess",
        other="vllm",
        wanted={"prefill 512": 0.8, "decode 1": 1.0, "decode 8": 1.0, "decode 32": 1.0},
    ),
    Target(
        text="4 workers / transformers",
        side="workers4",
        other="transformers",
        wanted={"decode 1": 1.2, "decode 8": 1.4, "decode 32": 1.35},
    ),
    Target(
        text="2 workers / vLLM, 2 processes (TP)",
        side="workers2",
        other="vllm-tp2",
        wanted={"decode 1": 0.9, "decode 8": 0.9, "decode 32": 0.9},
    ),
    Target(
        text="2 workers / transformers, 2 processes (EP)",
        side="workers2",
        other="transformers-ep2",
        wanted={"decode 1": 2.0, "decode 8": 1.7, "decode 32": 1.6},
    ),
    Target(
        text="2 workers / llama.cpp RPC, 2 servers",
        side="workers2",
        other="llamacpp-rpc2",
        wanted={"decode 1": 1.5, "decode 8": 2.0},
    ),
    Target(
        text="4 workers, int8 / llama.cpp q8_0",
        side="workers4-int8",
        other="llamacpp-q8_0",
        wanted={"decode 1": 0.8, "decode 8": 1.35, "decode 32": 2.5},
    ),
    Target(
        text="in process / the bound measured beside it",
        side="inprocess",
        other=BOUND,
        wanted={"decode 1": 0.65, "decode 32": 0.65},
    ),
)

ELSEWHERE = (
    ("two micro-batches / one, with network delay", "python -m benchmarks.delay"),
    ("gateway and Ray / engine called directly", "python -m benchmarks.gateway"),
    ("tracing, checkpoints, metrics / none of them", "python -m benchmarks.steady_cost"),
    ("restoring a session / computing it again", "python -m benchmarks.session_restore"),
    ("memory of a worker, time to its first answer", "python -m benchmarks.wide"),
)
"""Rows of the same table that other commands print."""


def verdict(ratio: float | None, wanted: float | None) -> str:
    """A table cell: the measured ratio, and whether it reaches what was wanted."""
    if ratio is None:
        return "not run" if wanted is not None else ""
    if wanted is None:
        return f"{ratio:.2f}"
    return f"**{ratio:.2f}** of {wanted:g}, {'met' if ratio >= wanted else 'missed'}"
