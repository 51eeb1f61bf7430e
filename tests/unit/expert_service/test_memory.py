from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expert_service.memory import WeightMemory, cgroup_free_bytes
from services.core.errors import WorkerMemoryError
from services.core.expert_ffn import PackedExpert
from tests.support.frames import random_weights


def packed_expert() -> PackedExpert:
    weights = random_weights(torch.Generator(), hidden=32, intermediate=48, dtype=torch.float32)
    return PackedExpert(weights, dtype=torch.float32, device=torch.device("cpu"))


def test_free_is_what_the_limit_leaves_and_no_more_than_the_device_has() -> None:
    memory = WeightMemory(1000, held_bytes=400, device_free_bytes=5000)
    assert memory.limit_bytes == 1000
    assert memory.free_bytes(400, 5000) == 600
    assert memory.free_bytes(400, 50) == 50
    assert memory.free_bytes(1200, 5000) == 0


def test_without_a_limit_most_of_what_is_free_at_start_may_be_taken() -> None:
    memory = WeightMemory(None, held_bytes=400, device_free_bytes=1000)
    assert memory.limit_bytes == 1300


def test_a_refusal_says_what_is_wanted_and_what_is_left() -> None:
    memory = WeightMemory(1000, held_bytes=400, device_free_bytes=5000)
    memory.check_room(600, held_bytes=400, device_free_bytes=5000)
    with pytest.raises(WorkerMemoryError, match="take 601 bytes and 600 are left") as raised:
        memory.check_room(601, held_bytes=400, device_free_bytes=5000)
    assert raised.value.details == {"wanted_bytes": 601, "left_bytes": 600}


def test_experts_given_up_count_until_the_last_that_uses_them_is_done() -> None:
    memory = WeightMemory(100_000, held_bytes=0, device_free_bytes=1 << 30)
    first, second = packed_expert(), packed_expert()
    num_bytes = first.weight_bytes
    memory.give_up([first, second])
    assert memory.free_bytes(0, 1 << 30) == 100_000 - 2 * num_bytes
    del first
    assert memory.free_bytes(0, 1 << 30) == 100_000 - num_bytes
    del second
    assert memory.free_bytes(0, 1 << 30) == 100_000


def control_group(folder: Path, *, limit: str) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("700\n")
    (folder / "memory.stat").write_text("anon 300\ninactive_file 250\nactive_file 100\n")
    return folder


def test_a_control_group_leaves_its_limit_less_what_cannot_be_dropped(tmp_path: Path) -> None:
    assert cgroup_free_bytes(control_group(tmp_path, limit="1000")) == 550
    assert cgroup_free_bytes(control_group(tmp_path, limit="100")) == 0


def test_without_a_limit_or_a_control_group_nothing_is_said(tmp_path: Path) -> None:
    assert cgroup_free_bytes(tmp_path) is None
    assert cgroup_free_bytes(control_group(tmp_path, limit="max")) is None
