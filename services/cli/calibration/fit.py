"""Turns what was measured into constants of the step model. Pure; docs/planning.md derives it."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from services.core.model_config import ModelConfig
from services.core.planning.calibration import Calibration, loopback, worker_layout
from services.core.planning.kernels import MeasuredKernel
from services.core.planning.machine import HostCosts, Machine
from services.core.planning.model_sizes import PUBLISHED_MODELS, ModelSizes
from services.core.planning.routing import Routing
from services.core.planning.step_model import Batch, Layout, StepModel

NO_COSTS = HostCosts(
    layer_s=0.0,
    frame_s=0.0,
    byte_s=0.0,
    local_layer_s=0.0,
    step_s=0.0,
    sequence_s=0.0,
    sample_s=0.0,
    logit_s=0.0,
)


def fit_calibration(measured: dict[str, Any]) -> Calibration:
    """From the union of what the parts printed."""
    short_s, long_s = measured["context_s"]
    chunk_short_s, chunk_long_s = measured["chunk_s"]
    kernels = Calibration(
        machine=f"{platform.machine()}, {measured['num_cores']} cores",
        num_cores=measured["num_cores"],
        experts=_kernels(measured["expert_rows"], measured["experts"]),
        attention=_kernels(measured["attention_rows"], measured["attention"]),
        head=_kernels(measured["head_rows"], measured["head"]),
        kv_bandwidth=_rate(measured["context_bytes"], long_s - short_s),
        attention_flops=_rate(measured["chunk_flops"], chunk_long_s - chunk_short_s),
        costs=NO_COSTS,
    )
    layer_s, frame_s, byte_s = _dispatch_costs(kernels, measured)
    sample_s, logit_s = fit_line(
        np.multiply(measured["sampled_rows"], measured["sampled_vocab"]), measured["sample_s"]
    )
    costs = replace(
        NO_COSTS,
        layer_s=layer_s,
        frame_s=frame_s,
        byte_s=byte_s,
        local_layer_s=_local_layer_s(kernels, measured),
        sample_s=sample_s,
        logit_s=logit_s,
    )
    step_s, sequence_s = _engine_costs(replace(kernels, costs=costs), measured)
    return replace(kernels, costs=replace(costs, step_s=step_s, sequence_s=sequence_s))


def fit_kernel(rows: Sequence[int], small: dict[str, Any], large: dict[str, Any]) -> MeasuredKernel:
    """From seconds at two sizes: t = fixed(r) + bytes x s(r), neither falling with r."""
    first = np.asarray(small["seconds"], dtype=np.float64)
    second = np.asarray(large["seconds"], dtype=np.float64)
    slope = (second - first) / (large["bytes"] - small["bytes"])
    # Without a fixed part a byte costs at most what it does in the larger one.
    s_per_byte = np.maximum.accumulate(np.clip(slope, 0.0, second / large["bytes"]))
    fixed_s = np.maximum.accumulate(np.maximum(second - large["bytes"] * s_per_byte, 0.0))
    return MeasuredKernel(
        rows=tuple(float(count) for count in rows),
        fixed_s=tuple(fixed_s.tolist()),
        s_per_byte=tuple(s_per_byte.tolist()),
    )


def fit_costs(
    columns: ArrayLike, seconds: ArrayLike, *, of: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Coefficients >= 0 that fit `seconds` [N] by `columns` [N, C] with the least squared error in
    proportion to `of` (default: to `seconds`); the best of all subsets of columns, so C is small.
    """
    scale = np.asarray(seconds if of is None else of, dtype=np.float64)
    target = np.asarray(seconds, dtype=np.float64) / scale
    relative = np.asarray(columns, dtype=np.float64) / scale[:, None]
    num_columns = relative.shape[1]
    best, least = np.zeros(num_columns), float((target**2).sum())
    for size in range(1, num_columns + 1):
        for chosen in map(list, itertools.combinations(range(num_columns), size)):
            found = np.linalg.lstsq(relative[:, chosen], target, rcond=None)[0]
            error = float(((relative[:, chosen] @ found - target) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(num_columns), error
                best[chosen] = found
    return best


def fit_line(
    x: ArrayLike, seconds: ArrayLike, *, of: ArrayLike | None = None
) -> tuple[float, float]:
    """Seconds at 0 and per x, both >= 0; `of` as in `fit_costs`."""
    values = np.asarray(x, dtype=np.float64)
    columns = np.stack([np.ones_like(values), values], axis=1)
    fixed_s, slope_s = fit_costs(columns, seconds, of=of)
    return float(fixed_s), float(slope_s)


def _kernels(rows: Sequence[int], measured: dict[str, Any]) -> dict[int, MeasuredKernel]:
    return {int(threads): fit_kernel(rows, *pair) for threads, pair in measured.items()}


def _rate(amount: float, seconds: float) -> float:
    """Per second; where the difference drowned in noise, faster than anything there is."""
    return float(amount / max(seconds, 1e-6))


def _config(width: Sequence[int], *, vocab_size: int = 256) -> ModelConfig:
    """Of `random_weights.random_config`, one layer."""
    hidden_size, intermediate_size = width
    return replace(
        PUBLISHED_MODELS["mixtral-8x7b"],
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=hidden_size // 16,
        vocab_size=vocab_size,
    )


def _model(config: ModelConfig, machine: Machine) -> StepModel:
    routing = Routing(config.num_local_experts, config.num_experts_per_tok)
    return StepModel(ModelSizes(config=config), machine, loopback(), routing)


def _dispatch_costs(kernels: Calibration, measured: dict[str, Any]) -> tuple[float, float, float]:
    """What is left of a layer call when the experts' own time is taken off."""
    config = _config(measured["dispatch_width"])
    columns, rest, whole = [], [], []
    for call in measured["dispatch"]:
        model = _model(config, kernels.machine_for(call["num_workers"]))
        layout = worker_layout(config, call["num_workers"])
        batch = Batch(num_tokens=call["num_tokens"], context=1)
        columns.append([1.0, *model.frames(batch, layout)])
        rest.append(call["seconds"] - model.step(batch, layout).layer.expert_s)
        whole.append(call["seconds"])
    layer_s, frame_s, byte_s = fit_costs(columns, rest, of=whole).tolist()
    return layer_s, frame_s, byte_s


def _local_layer_s(kernels: Calibration, measured: dict[str, Any]) -> float:
    model = _model(_config(measured["local_width"]), kernels.machine_for(0))
    extra = [
        seconds - model.step(Batch(num_tokens=tokens, context=1), Layout(groups=())).layer.expert_s
        for tokens, seconds in zip(measured["local_tokens"], measured["local_s"], strict=True)
    ]
    return max(0.0, float(np.median(extra)))


def _engine_costs(kernels: Calibration, measured: dict[str, Any]) -> tuple[float, float]:
    """What is left of a tiny model's step when its layer, head and sampling are taken off."""
    config = _config(measured["engine_width"])
    model = _model(config, kernels.machine_for(0))
    counts, whole = measured["engine_sequences"], measured["engine_s"]
    in_process = Layout(groups=())
    rest = [
        seconds - model.step(Batch(num_tokens=count, context=80), in_process).step_s
        for count, seconds in zip(counts, whole, strict=True)
    ]
    return fit_line(counts, rest, of=whole)
