"""Microseconds of one expert's FFN in each weight format and way of computing it, and of copies.

Each is a fresh process's first use of its kernels: what a card lacks is reported, not fatal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import Ceilings, Deadline, median_us
from benchmarks.gpu_weights import HeldWeights
from services.core.checkpoints.checkpoint import ExpertWeights
from services.core.cuda.expert import CudaExpert
from services.core.cuda.graph_cache import GraphCache
from services.core.cuda.layer import CudaLayer
from services.core.cuda.linears import WEIGHT_FORMATS
from services.core.cuda.staging import StagingBuffers
from services.core.errors import ExpertfleetError
from services.core.expert_ffn import Assignments, MoeInput, PackedExpert
from services.core.model_config import ModelConfig

Row = dict[str, object]


def measure_experts(
    weights: HeldWeights,
    device: torch.device,
    ceilings: Ceilings,
    deadline: Deadline,
    *,
    row_counts: tuple[int, ...],
) -> Iterator[Row]:
    """For each way: µs by rows, the share of the floor, and the error against bf16 in float32."""
    config = weights.config
    expert = weights.expert(0, 0)
    torch.manual_seed(0)
    rows = torch.randn(max(row_counts), config.hidden_size, device=device).bfloat16()
    wanted = _plain(expert, rows[:32])
    for name, make in _ways(expert, device, config.hidden_act):
        if not deadline.allows(f"expert kernels, {name}", needs_s=5):
            continue
        row: Row = {"kernel": name}
        try:
            with torch.inference_mode():
                row |= _times(make(), rows, wanted, row_counts, device, ceilings, config)
        except (RuntimeError, NotImplementedError, ExpertfleetError) as error:
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        yield row


def _times(
    expert: CudaExpert | PackedExpert,
    rows: Tensor,
    wanted: Tensor,
    row_counts: tuple[int, ...],
    device: torch.device,
    ceilings: Ceilings,
    config: ModelConfig,
) -> Row:
    """Figures by rows, and the relative error of the first ones against `wanted`."""
    got = expert.forward(rows[: len(wanted)]).float()
    error = float((got - wanted).norm() / wanted.norm())
    figures: Row = {"weight_bytes": expert.weight_bytes, "error": round(error, 4)}
    for count in row_counts:
        taken_us = median_us(partial(expert.forward, rows[:count]), device)
        flops = 6 * count * config.hidden_size * config.intermediate_size
        floor_us = ceilings.floor_s(expert.weight_bytes, flops) * 1e6
        figures[f"us_{count}"] = round(taken_us, 1)
        figures[f"floor_share_{count}"] = round(floor_us / taken_us, 3)
    return figures


def measure_layers(
    weights: HeldWeights,
    device: torch.device,
    deadline: Deadline,
    *,
    token_counts: tuple[int, ...],
) -> Iterator[Row]:
    """A layer's experts over whole frames: one by one, with graphs, and as a grouped product."""
    for name, grouped_rows, has_graphs in (
        ("experts one by one", None, False),
        ("experts one by one, CUDA graphs", None, True),
        ("grouped product", 1, False),
    ):
        if not deadline.allows(f"layer kernels, {name}", needs_s=5):
            continue
        row: Row = {"kernel": name}
        graphs = GraphCache.of(device) if has_graphs else None
        layer = held_layer(weights, 0, graphs=graphs, grouped_rows=grouped_rows)
        if grouped_rows and not layer.is_grouped:
            yield row | {"failed": "the device has no grouped product"}
            continue
        try:
            with torch.inference_mode():
                for count in token_counts:
                    frame = _random_frame(count, weights, device)
                    taken_us = median_us(partial(layer.forward_frames, [frame]), device)
                    row[f"us_{count}"] = round(taken_us, 1)
        except RuntimeError as error:
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        yield row


def measure_copies(
    hidden_size: int, device: torch.device, *, token_counts: tuple[int, ...]
) -> Iterator[Row]:
    """Rows to the host and back: as `Tensor.cpu` and `Tensor.to` do it, and through staging."""
    staging = StagingBuffers(device)
    for count in token_counts:
        rows = torch.randn(count, hidden_size, device=device).bfloat16()
        host = rows.cpu()
        ways: dict[str, Callable[[], object]] = {
            "cpu_us": rows.cpu,
            "to_us": partial(host.to, device),
            "staged_to_host_us": partial(_to_host, staging, rows),
            "staged_to_device_us": partial(staging.to_device, [host]),
        }
        yield {"rows": count} | {key: round(median_us(way, device), 1) for key, way in ways.items()}


def held_layer(
    weights: HeldWeights,
    layer: int,
    *,
    graphs: GraphCache | None = None,
    grouped_rows: int | None = None,
) -> CudaLayer:
    """A layer's experts over the held weights, none copied."""
    experts = {
        expert: CudaExpert.of_stacked(
            weights.w13[layer][expert], weights.w2[layer][expert], graphs=graphs
        )
        for expert in range(weights.config.num_local_experts)
    }
    return CudaLayer(experts, grouped_rows=grouped_rows)


def _ways(
    expert: ExpertWeights, device: torch.device, hidden_act: str
) -> Iterator[tuple[str, Callable[[], CudaExpert | PackedExpert]]]:
    """Name and maker of each."""
    packing: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "device": device,
        "hidden_act": hidden_act,
    }
    yield "bf16, three products", partial(PackedExpert, expert, **packing)
    for weight_format in WEIGHT_FORMATS:
        make = partial(CudaExpert, expert, weight_format=weight_format, **packing)
        yield f"{weight_format}, w1 and w3 stacked", make
        if device.type == "cuda":
            yield (
                f"{weight_format}, stacked, CUDA graph",
                partial(make, graphs=GraphCache.of(device)),
            )


def _to_host(staging: StagingBuffers, rows: Tensor) -> list[Tensor]:
    return staging.to_host([rows]).wait()


def _plain(expert: ExpertWeights, rows: Tensor) -> Tensor:
    x = rows.float()
    hidden = torch.nn.functional.silu(x @ expert.w1.float().t()) * (x @ expert.w3.float().t())
    result: Tensor = hidden @ expert.w2.float().t()
    return result


def _random_frame(num_tokens: int, weights: HeldWeights, device: torch.device) -> MoeInput:
    """Tokens sent to experts at random, as many to each as a gate of random weights sends."""
    config = weights.config
    scores = torch.rand(num_tokens, config.num_local_experts)
    chosen = scores.topk(config.num_experts_per_tok).indices
    expert_of, order = chosen.flatten().sort(stable=True)
    counts = torch.bincount(expert_of, minlength=config.num_local_experts)
    ids = counts.nonzero().flatten()
    return MoeInput(
        hidden_states=torch.randn(num_tokens, config.hidden_size, device=device).bfloat16(),
        assignments=Assignments(
            expert_ids=tuple(ids.tolist()),
            rows_per_expert=tuple(counts[ids].tolist()),
            token_rows=(order // config.num_experts_per_tok).to(device),
            topk_weights=torch.rand(len(order)).to(device),
        ),
        combine=True,
    )
