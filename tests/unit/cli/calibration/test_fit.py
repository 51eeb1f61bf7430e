"""Constants are recovered from measurements that a machine with known constants would give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from services.cli.calibration.fit import fit_calibration, fit_costs, fit_kernel, fit_line
from services.core.planning.calibration import Calibration, loopback, worker_layout
from services.core.planning.kernels import MeasuredKernel
from services.core.planning.machine import HostCosts
from services.core.planning.model_sizes import PUBLISHED_MODELS, ModelSizes
from services.core.planning.routing import Routing
from services.core.planning.step_model import Batch, StepModel

ROWS = (1, 8, 32, 256)
SIZES = (5_505_024, 22_020_096)
TRUE = Calibration(
    machine="true",
    num_cores=2,
    experts={
        1: MeasuredKernel(
            rows=ROWS, fixed_s=(2e-5, 2e-5, 4e-5, 2e-4), s_per_byte=(6e-11, 6e-11, 9e-11, 5e-10)
        ),
        2: MeasuredKernel(
            rows=ROWS, fixed_s=(3e-5, 3e-5, 4e-5, 1e-4), s_per_byte=(4e-11, 4e-11, 5e-11, 3e-10)
        ),
    },
    attention={
        count: MeasuredKernel(
            rows=ROWS, fixed_s=(1e-4, 1e-4, 2e-4, 1e-3), s_per_byte=(6e-11, 6e-11, 9e-11, 5e-10)
        )
        for count in (1, 2)
    },
    head={
        count: MeasuredKernel(
            rows=ROWS, fixed_s=(1e-5, 1e-5, 1e-5, 1e-5), s_per_byte=(6e-11, 6e-11, 9e-11, 5e-10)
        )
        for count in (1, 2)
    },
    kv_bandwidth=8e9,
    attention_flops=2e11,
    costs=HostCosts(
        layer_s=4e-4,
        frame_s=2.5e-4,
        byte_s=1.5e-9,
        local_layer_s=9e-5,
        step_s=8e-4,
        sequence_s=2e-5,
        sample_s=5e-5,
        logit_s=1e-10,
    ),
)


def _model(width: tuple[int, int], num_workers: int) -> StepModel:
    config = replace(
        PUBLISHED_MODELS["mixtral-8x7b"],
        hidden_size=width[0],
        intermediate_size=width[1],
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=width[0] // 16,
        vocab_size=256,
    )
    return StepModel(
        ModelSizes(config=config), TRUE.machine_for(num_workers), loopback(), Routing(8, 2)
    )


def _measured() -> dict[str, Any]:
    def of(kernels: Any) -> dict[str, Any]:
        return {
            str(threads): [
                {"bytes": size, "seconds": kernel.time_s(size, size / 2, ROWS).tolist()}
                for size in SIZES
            ]
            for threads, kernel in kernels.items()
        }

    width, narrow = (1024, 3584), (64, 64)
    config = PUBLISHED_MODELS["mixtral-8x7b"]
    calls = []
    for num_workers in (1, 2, 4):
        layout = worker_layout(config, num_workers)
        for tokens in (1, 4, 32, 128):
            layer = _model(width, num_workers).step(Batch(num_tokens=tokens, context=1), layout)
            seconds = layer.layer.dispatch_s + layer.layer.expert_s
            calls.append({"num_workers": num_workers, "num_tokens": tokens, "seconds": seconds})
    in_process = worker_layout(config, 0)
    local = [
        _model(width, 0).step(Batch(num_tokens=tokens, context=1), in_process).layer
        for tokens in (1, 8, 32)
    ]
    return {
        "num_cores": 2,
        "expert_rows": ROWS,
        "experts": of(TRUE.experts),
        "attention_rows": ROWS,
        "attention": of(TRUE.attention),
        "head_rows": ROWS,
        "head": of(TRUE.head),
        "context_bytes": 8e6,
        "context_s": [1e-3, 2e-3],
        "chunk_flops": 2e9,
        "chunk_s": [5e-3, 15e-3],
        "dispatch_width": width,
        "dispatch": calls,
        "local_width": width,
        "local_tokens": (1, 8, 32),
        "local_s": [layer.dispatch_s + layer.expert_s for layer in local],
        "engine_width": narrow,
        "engine_sequences": (1, 8, 32),
        "engine_s": [
            _model(narrow, 0).step(Batch(num_tokens=count, context=80), in_process).step_s
            for count in (1, 8, 32)
        ],
        "sampled_rows": (1, 8, 32),
        "sampled_vocab": 32000,
        "sample_s": [5e-5 + 32000 * count * 1e-10 for count in (1, 8, 32)],
    }


def test_a_machine_is_recovered_from_what_it_would_measure() -> None:
    fitted = fit_calibration(_measured())
    for name in ("experts", "attention", "head"):
        for threads, kernel in getattr(fitted, name).items():
            true = getattr(TRUE, name)[threads]
            assert kernel.s_per_byte == pytest.approx(true.s_per_byte)
            assert kernel.fixed_s == pytest.approx(true.fixed_s)
    assert fitted.kv_bandwidth == pytest.approx(TRUE.kv_bandwidth)
    assert fitted.attention_flops == pytest.approx(TRUE.attention_flops)
    for name in HostCosts.__dataclass_fields__:
        seen, true = getattr(fitted.costs, name), getattr(TRUE.costs, name)
        assert seen == pytest.approx(true, rel=1e-3), name


def test_a_kernel_that_is_faster_when_larger_has_no_negative_cost() -> None:
    fitted = fit_kernel(
        (1, 2), {"bytes": 100, "seconds": [3.0, 1.0]}, {"bytes": 200, "seconds": [2.0, 2.5]}
    )
    assert min(fitted.fixed_s) >= 0
    assert min(fitted.s_per_byte) >= 0
    first, second = fitted.time_s(200, 100, [1, 2])
    assert second >= first


def test_costs_are_never_negative() -> None:
    columns = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 4.0]])
    assert fit_costs(columns, [3.0, 5.0, 9.0]) == pytest.approx([1.0, 2.0])
    falling = fit_costs(columns, [9.0, 5.0, 3.0])
    assert (falling >= 0).all()
    assert falling[1] == 0.0


def test_an_error_counts_in_proportion_to_the_whole() -> None:
    # The first is one per cent of a long call, so missing it by far costs little.
    columns = [[1.0], [1.0]]
    assert fit_costs(columns, [1.0, 5.0], of=[100.0, 10.0]) == pytest.approx([5.0], rel=0.02)


def test_a_line_is_fitted_by_relative_error() -> None:
    assert fit_line([1, 10, 1000], [2.0, 11.0, 1001.0]) == pytest.approx((1.0, 1.0))
