"""The experts a worker holds, and how they get into memory."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from services.core.checkpoints.checkpoint import Checkpoint
from services.core.errors import UnknownExpertError
from services.core.expert_ffn import PackedExpert, computed_digest
from services.core.quantization.formats import WeightsSetting, chosen_format
from services.core.quantization.quantized_rows import stored_format
from services.core.registry import Slot

_PROGRESS_EVERY_S = 2.0
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldExperts:
    """`layers` maps layer -> expert -> weights; `digests` has the same slots."""

    layers: Mapping[int, Mapping[int, PackedExpert]]
    digests: Mapping[Slot, bytes]
    dtype: torch.dtype
    device: torch.device
    hidden_size: int

    @property
    def weight_format(self) -> str:
        """What the experts are held as; joined with "+" where that differs between them."""
        formats = {e.weight_format for experts in self.layers.values() for e in experts.values()}
        return "+".join(sorted(formats))

    @property
    def weight_bytes(self) -> int:
        return sum(e.weight_bytes for experts in self.layers.values() for e in experts.values())

    @property
    def slot_bytes(self) -> int:
        """Of the largest slot: they differ where some are stored quantised."""
        return max(e.weight_bytes for experts in self.layers.values() for e in experts.values())

    def check_slots(self, layer: int, expert_ids: Sequence[int]) -> None:
        """Raise `UnknownExpertError` naming what is not held."""
        experts = self.layers.get(layer)
        if experts is None:
            raise UnknownExpertError(
                f"layer {layer} is not held here; this worker has {_ranges(sorted(self.layers))}"
            )
        missing = [expert for expert in expert_ids if expert not in experts]
        if missing:
            raise UnknownExpertError(
                f"experts {missing} of layer {layer} are not held here; this worker has "
                f"{_ranges(sorted(experts))}"
            )

    def with_slots(self, loaded: HeldExperts) -> HeldExperts:
        """These and those of `loaded`, which are taken where a slot is in both."""
        layers = {layer: dict(experts) for layer, experts in self.layers.items()}
        for layer, experts in loaded.layers.items():
            layers.setdefault(layer, {}).update(experts)
        return replace(self, layers=layers, digests={**self.digests, **loaded.digests})

    def without_slots(self, slots: Collection[Slot]) -> HeldExperts:
        """These save `slots`; a layer of which nothing is left is gone."""
        kept = {
            layer: {e: weights for e, weights in experts.items() if (layer, e) not in slots}
            for layer, experts in self.layers.items()
        }
        return replace(
            self,
            layers={layer: experts for layer, experts in kept.items() if experts},
            digests={slot: digest for slot, digest in self.digests.items() if slot not in slots},
        )


def held_together(snapshots: Sequence[HeldExperts]) -> HeldExperts:
    """What computes frames that were accepted while one or another of `snapshots` was held."""
    together, *others = {id(held): held for held in snapshots}.values()
    for held in others:
        together = together.with_slots(held)
    return together


class LoadingCancelledError(Exception):
    """The worker was told to end while it was still loading."""


def load_experts(
    checkpoint: Checkpoint,
    slots: Sequence[Slot],
    *,
    dtype: torch.dtype,
    device: torch.device,
    cancelled: threading.Event,
    expert_weights: WeightsSetting = "auto",
    computed_by: str = "",
) -> HeldExperts:
    """Read, pack and release the slots' tensors one after the other.

    `expert_weights` says what they are held as; auto: as they are stored. `computed_by` names the
    kernels where replicas that round otherwise must not stand in for each other.

    Raises `CheckpointError` naming file and tensor, `UnsupportedModelError`, or
    `LoadingCancelledError` between two experts after `cancelled` was set.
    """
    layers: dict[int, dict[int, PackedExpert]] = {}
    digests: dict[Slot, bytes] = {}
    checkpoint.require(slots=slots, non_expert=False)
    next_log = time.monotonic() + _PROGRESS_EVERY_S
    for done, (layer, expert) in enumerate(slots):
        if cancelled.is_set():
            raise LoadingCancelledError
        weights = checkpoint.expert_rows(layer, expert)
        layers.setdefault(layer, {})[expert] = PackedExpert(
            weights,
            dtype=dtype,
            device=device,
            hidden_act=checkpoint.config.hidden_act,
            quantized=chosen_format(expert_weights, stored_format(weights.w1)),
        )
        stored_digest = checkpoint.slot_digest(layer, expert)
        held_as = layers[layer][expert].weight_format
        digests[layer, expert] = computed_digest(stored_digest, held_as + computed_by)
        if time.monotonic() >= next_log:
            _logger.info(
                "loaded %d of %d experts, %d MB read",
                done + 1,
                len(slots),
                checkpoint.bytes_read // 1_000_000,
            )
            next_log = time.monotonic() + _PROGRESS_EVERY_S
    return HeldExperts(
        layers=layers,
        digests=digests,
        dtype=dtype,
        device=device,
        hidden_size=checkpoint.config.hidden_size,
    )


def _ranges(indices: Sequence[int]) -> str:
    """Ascending indices as text: 0-3,7."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
