from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.core.errors import ConfigurationError
from services.core.planning.calibration import (
    Calibration,
    read_calibration,
    thread_counts,
    worker_layout,
)
from services.core.planning.kernels import MeasuredKernel
from services.core.planning.machine import HostCosts
from services.core.planning.model_sizes import PUBLISHED_MODELS


def kernel(s_per_byte: float) -> MeasuredKernel:
    return MeasuredKernel(
        rows=(1.0, 32.0), fixed_s=(1e-5, 2e-5), s_per_byte=(s_per_byte, 2 * s_per_byte)
    )


CALIBRATION = Calibration(
    machine="a machine",
    num_cores=4,
    experts={1: kernel(1e-10), 4: kernel(5e-11)},
    attention={4: kernel(1e-10)},
    head={4: kernel(1e-10)},
    kv_bandwidth=1e10,
    attention_flops=1e11,
    costs=HostCosts(
        layer_s=1e-4,
        frame_s=1e-4,
        byte_s=1e-9,
        local_layer_s=5e-5,
        step_s=1e-3,
        sequence_s=1e-5,
        sample_s=1e-4,
        logit_s=1e-10,
    ),
)


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(CALIBRATION.to_json())
    assert read_calibration(path) == CALIBRATION


def test_workers_get_kernels_of_the_threads_that_the_launcher_gives_them() -> None:
    in_process, one, two, four = (CALIBRATION.machine_for(count) for count in (0, 1, 2, 4))
    assert in_process.experts == one.experts == two.experts == kernel(5e-11)
    assert four.experts == kernel(1e-10)  # two threads were not measured
    assert two.experts_together == kernel(5e-11)
    assert in_process.attention == two.attention == kernel(1e-10)


@pytest.mark.parametrize(
    ("cores", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_threads_are_measured_in_powers_of_two(cores: int, expected: list[int]) -> None:
    assert thread_counts(cores) == expected


def test_workers_hold_what_the_launcher_gives_them() -> None:
    config = PUBLISHED_MODELS["mixtral-8x7b"]
    assert worker_layout(config, 0).groups == ()
    assert worker_layout(config, 3).groups == ((0, 1, 2), (3, 4, 5), (6, 7))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 0}, "not of version"),
        ({"experts": {}}, "experts is empty"),
        ({"kv_bandwidth": 0}, "kv_bandwidth is 0"),
        ({"costs": {}}, "layer_s"),
        ({"head": {"1": {"rows": [1], "fixed_s": [], "s_per_byte": [1]}}}, "different lengths"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: dict[str, object], text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(json.loads(CALIBRATION.to_json()) | change))
    with pytest.raises(ConfigurationError, match=text):
        read_calibration(path)


def test_no_file_and_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--calibrate"):
        read_calibration(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("not json")
    with pytest.raises(ConfigurationError, match="no calibration"):
        read_calibration(tmp_path / "text.json")
