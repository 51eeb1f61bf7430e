from __future__ import annotations

import pytest

from services.cli.hardware import Hardware


@pytest.mark.parametrize(
    ("num_cores", "num_workers", "expected"),
    [(2, 4, 2), (2, 2, 2), (2, 1, 2), (16, 4, 8), (8, 3, 4), (1, 8, 1)],
)
def test_workers_have_twice_their_share_of_the_cores(
    num_cores: int, num_workers: int, expected: int
) -> None:
    hardware = Hardware(num_cores=num_cores, num_gpus=0)
    assert hardware.worker_threads(num_workers) == expected


def test_without_native_kernels_workers_share_the_cores() -> None:
    hardware = Hardware(num_cores=8, num_gpus=0, has_native_kernels=False)
    assert [hardware.worker_threads(num_workers) for num_workers in (1, 3, 16)] == [8, 2, 1]


@pytest.mark.parametrize(
    ("num_cores", "num_shards", "expected"), [(2, 1, 2), (16, 1, 16), (8, 2, 4), (1, 3, 1)]
)
def test_shards_share_the_cores_too_for_workers_wait_while_they_compute(
    num_cores: int, num_shards: int, expected: int
) -> None:
    assert Hardware(num_cores=num_cores, num_gpus=0).shard_threads(num_shards) == expected


def test_workers_take_the_gpus_that_shards_left_and_then_share() -> None:
    hardware = Hardware(num_cores=8, num_gpus=4)
    devices = [hardware.worker_device(index, 1, "auto") for index in range(5)]
    assert devices == ["cuda:1", "cuda:2", "cuda:3", "cuda:0", "cuda:1"]


def test_without_gpus_auto_is_the_cpu_and_a_named_device_is_kept() -> None:
    hardware = Hardware(num_cores=8, num_gpus=0)
    assert hardware.worker_device(0, 1, "auto") == "cpu"
    assert hardware.worker_device(0, 1, "cuda:1") == "cuda:1"
