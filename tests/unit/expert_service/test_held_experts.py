from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from expert_service.held_experts import HeldExperts, LoadingCancelledError, load_experts
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.errors import UnknownExpertError
from services.core.registry import Slot
from tests.support.checkpoints import make_checkpoint

CPU = torch.device("cpu")
SLOTS = ((0, 1), (0, 3), (1, 1), (1, 2), (1, 3))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def load(model: Path, slots: tuple[Slot, ...], dtype: torch.dtype = torch.float32) -> HeldExperts:
    return load_experts(
        Checkpoint.open(str(model)), slots, dtype=dtype, device=CPU, cancelled=threading.Event()
    )


def test_just_the_slots_asked_for_are_held(model: Path) -> None:
    held = load(model, SLOTS)
    assert {(layer, e) for layer, experts in held.layers.items() for e in experts} == set(SLOTS)
    assert set(held.digests) == set(SLOTS)
    assert len(set(held.digests.values())) == len(SLOTS)
    assert held.weight_bytes == len(SLOTS) * 3 * 64 * 96 * 4


def test_digests_differ_by_the_format_that_is_computed_in(model: Path) -> None:
    full, half = load(model, SLOTS), load(model, SLOTS, torch.bfloat16)
    assert full.digests == load(model, SLOTS).digests
    assert all(full.digests[slot] != half.digests[slot] for slot in SLOTS)


def test_what_is_not_held_is_named_beside_what_is(model: Path) -> None:
    held = load(model, SLOTS)
    held.check_slots(1, (1, 2, 3))
    with pytest.raises(UnknownExpertError, match=r"layer 7 is not held here.*has 0-1"):
        held.check_slots(7, (1,))
    with pytest.raises(UnknownExpertError, match=r"experts \[2\] of layer 0.*has 1,3"):
        held.check_slots(0, (1, 2, 3))


def test_loading_stops_when_it_is_cancelled(model: Path) -> None:
    cancelled = threading.Event()
    cancelled.set()
    checkpoint = Checkpoint.open(str(model))
    with pytest.raises(LoadingCancelledError):
        load_experts(checkpoint, SLOTS, dtype=torch.float32, device=CPU, cancelled=cancelled)
    assert checkpoint.bytes_read == 0


def test_digests_differ_by_the_kernels_where_those_must_agree(model: Path) -> None:
    def digests(computed_by: str) -> Mapping[Slot, bytes]:
        return load_experts(
            Checkpoint.open(str(model)),
            SLOTS,
            dtype=torch.float32,
            device=CPU,
            cancelled=threading.Event(),
            computed_by=computed_by,
        ).digests

    assert digests("") == load(model, SLOTS).digests
    assert digests("native avx2") == digests("native avx2")
    assert not set(digests("native avx2").values()) & set(digests("native amx").values())


def test_slots_are_added_and_taken_from_a_snapshot_that_stays_as_it_is(model: Path) -> None:
    held = load(model, SLOTS)
    more = held.with_slots(load(model, ((0, 2),)))
    less = more.without_slots({(0, 1), (1, 1), (1, 2), (1, 3)})
    assert set(held.digests) == set(SLOTS)
    assert set(more.digests) == {*SLOTS, (0, 2)}
    assert set(less.digests) == {(0, 2), (0, 3)}
    assert {layer: set(experts) for layer, experts in less.layers.items()} == {0: {2, 3}}
    assert less.layers[0][3] is held.layers[0][3]
    with pytest.raises(UnknownExpertError, match="layer 1 is not held here"):
        less.check_slots(1, (1,))
