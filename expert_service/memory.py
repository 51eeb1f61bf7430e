"""How much memory further experts may take."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch

from services.core.errors import WorkerMemoryError
from services.core.expert_ffn import PackedExpert

_CGROUPS = Path("/sys/fs/cgroup")
_SHARE_OF_FREE = 0.9
"""Of what is free at start, so much is for further experts when no limit is given."""


class WeightMemory:
    """Counts the bytes of weights against a limit. Used from one event loop.

    Experts that were given up count until the last frame that uses them is computed.
    """

    def __init__(self, limit_bytes: int | None, *, held_bytes: int, device_free_bytes: int) -> None:
        """Without a limit: what is held now, and most of what the device has free now."""
        if limit_bytes is None:
            limit_bytes = held_bytes + int(_SHARE_OF_FREE * device_free_bytes)
        self.limit_bytes = limit_bytes
        self._leaving: list[weakref.ref[PackedExpert]] = []

    def give_up(self, experts: Iterable[PackedExpert]) -> None:
        """Count these on until they are gone."""
        self._leaving += map(weakref.ref, experts)

    def free_bytes(self, held_bytes: int, device_free_bytes: int) -> int:
        left = self.limit_bytes - held_bytes - self._leaving_bytes()
        return max(0, min(left, device_free_bytes))

    def check_room(self, wanted_bytes: int, *, held_bytes: int, device_free_bytes: int) -> None:
        """Raise `WorkerMemoryError` saying what is wanted and what is left."""
        left_bytes = self.free_bytes(held_bytes, device_free_bytes)
        if wanted_bytes > left_bytes:
            raise WorkerMemoryError(
                f"no memory for these slots: they take {wanted_bytes} bytes and {left_bytes} are "
                f"left (limit {self.limit_bytes}, held {held_bytes}, free on the device "
                f"{device_free_bytes}); unload others or raise EXPERTFLEET_WORKER_MEMORY_BYTES",
                wanted_bytes=wanted_bytes,
                left_bytes=left_bytes,
            )

    def _leaving_bytes(self) -> int:
        alive = [(ref, expert.weight_bytes) for ref in self._leaving if (expert := ref())]
        self._leaving = [ref for ref, _ in alive]
        return sum(num_bytes for _, num_bytes in alive)


def device_free_bytes(device: torch.device) -> int:
    """What the device has free for this process: on a CPU also within its control group's limit,
    on a GPU with what torch keeps for reuse."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    available = int(psutil.virtual_memory().available)
    within_group = cgroup_free_bytes(_CGROUPS)
    return available if within_group is None else min(available, within_group)


def cgroup_free_bytes(folder: Path) -> int | None:
    """What a control group (version 2) leaves, counting file pages that can be dropped as free.

    None where it has no limit, or cannot be read.
    """
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        current = int((folder / "memory.current").read_text())
        statistics = dict(
            line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines()
        )
        droppable = int(statistics.get("inactive_file", 0))
        return max(0, int(limit) - current + droppable)
    except (OSError, ValueError):
        return None
