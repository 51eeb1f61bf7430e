"""Reads experts from the checkpoint that the settings name, and as they say."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence

import torch

from expert_service.allocator import map_blocks_from
from expert_service.held_experts import HeldExperts, load_experts
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.checkpoints.tensor_names import expert_tensor_names
from services.core.errors import ConfigurationError
from services.core.kernels.choice import kernels_name, native_kernels_for
from services.core.quantization.formats import chosen_format, quantized_bytes
from services.core.registry import Slot
from services.core.settings import Settings
from services.core.tensor_codec import resolve_device, torch_dtype

_LOADING_MAPPED_BYTES = 1 << 20
_SERVING_MAPPED_BYTES = 32 << 20
_logger = logging.getLogger(__name__)


class ExpertLoader:
    """Opens the checkpoint at once, which may download its index. One `load` at a time, on any
    thread. Raises `CheckpointError` or `ConfigurationError`."""

    def __init__(self, settings: Settings) -> None:
        self.checkpoint = Checkpoint.open(settings.model)
        self.config = self.checkpoint.config
        self.device = resolve_device(settings.device)
        dtype = self.config.dtype if settings.dtype == "auto" else settings.dtype
        self.dtype = torch_dtype(dtype)
        self._expert_weights = settings.expert_weights
        self._computed_by = _kernels_to_agree_on(settings, self.dtype, self.device)

    def load(self, slots: Sequence[Slot], cancelled: threading.Event) -> HeldExperts:
        """Read those slots' tensors and nothing else. Blocks.

        Raises `CheckpointError` naming file and tensor, or `LoadingCancelledError`.
        """
        _logger.info("loading %d experts of %s", len(slots), self.checkpoint.name)
        map_blocks_from(_LOADING_MAPPED_BYTES)
        try:
            return load_experts(
                self.checkpoint,
                slots,
                dtype=self.dtype,
                device=self.device,
                cancelled=cancelled,
                expert_weights=self._expert_weights,
                computed_by=self._computed_by,
            )
        finally:
            map_blocks_from(_SERVING_MAPPED_BYTES)

    def weight_bytes(self, slots: Collection[Slot]) -> int:
        """What the slots take once they are loaded, by the names of their tensors alone."""
        return sum(self._slot_bytes(*slot) for slot in slots)

    def _slot_bytes(self, layer: int, expert: int) -> int:
        w1 = expert_tensor_names(layer, expert)[0]
        held_as = chosen_format(self._expert_weights, self.checkpoint.quantized_format(w1))
        hidden, intermediate = self.config.hidden_size, self.config.intermediate_size
        if held_as is None:
            return 3 * hidden * intermediate * self.dtype.itemsize
        gate_or_up = quantized_bytes(held_as, intermediate, hidden)
        return 2 * gate_or_up + quantized_bytes(held_as, hidden, intermediate)


def _kernels_to_agree_on(settings: Settings, dtype: torch.dtype, device: torch.device) -> str:
    """Name of what computes, if answers must be reproducible; else nothing.

    Raises `ConfigurationError` where a row's bits would depend on the rows beside it.
    """
    if not settings.reproducible:
        return ""
    if native_kernels_for(dtype, device) is None:
        raise ConfigurationError(
            f"experts computed by torch in {dtype} on {device} are not reproducible: "
            "use bfloat16 or float32 on a CPU with AVX2, and build the native kernels with "
            "`python -m services.core.kernels.build`; or start without --reproducible",
            setting="reproducible",
        )
    return kernels_name(dtype, device)
