"""Which (layer, expert) slots a worker is told to hold."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from services.core.errors import ConfigurationError, InvalidRequestError
from services.core.model_config import ModelConfig
from services.core.registry import Slot

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MAX_INDEX = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotGroup:
    """All of `experts` in each of `layers`; None is every layer."""

    experts: tuple[int, ...]
    layers: tuple[int, ...] | None = None


def parse_slots(text: str) -> tuple[SlotGroup, ...]:
    """Groups of "0-3:0,1;5:7": layers, a colon, and the experts of each of these layers.

    Raises `ConfigurationError`. `services.core.placement.format_slots` writes this.
    """
    groups = []
    for part in text.split(";"):
        layers, colon, experts = part.partition(":")
        if not colon:
            raise ConfigurationError(
                f"slots={text!r} cannot be used: {part.strip()!r} is not layers:experts; "
                "write for example 0-3:0,1;5:7",
                setting="slots",
            )
        groups.append(
            SlotGroup(
                experts=parse_indices(experts, setting="slots"),
                layers=parse_indices(layers, setting="slots"),
            )
        )
    return tuple(groups)


def parse_indices(text: str, *, setting: str) -> tuple[int, ...]:
    """Indices of "0,1,4-6", ascending and each once; ends of a range are included.

    Raises `ConfigurationError` naming `setting`.
    """
    indices: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first = int(match[1]) if match else 0
        last = int(match[2] or first) if match else -1
        if not first <= last < _MAX_INDEX:
            raise ConfigurationError(
                f"{setting}={text!r} cannot be used: {part.strip()!r} is no index or range; "
                "write for example 0,1 or 4-7",
                setting=setting,
            )
        indices.update(range(first, last + 1))
    return tuple(sorted(indices))


def select_slots(config: ModelConfig, groups: Sequence[SlotGroup]) -> tuple[Slot, ...]:
    """The slots of all groups, each once, in ascending order.

    Raises `ConfigurationError` when the model has no such expert or layer.
    """
    if not config.is_moe:
        raise ConfigurationError(
            "the model is dense and has no experts to serve; its FFN runs in the attention shard",
            setting="experts",
        )
    slots: set[Slot] = set()
    for group in groups:
        layers = range(config.num_hidden_layers) if group.layers is None else group.layers
        _check("experts", group.experts, config.num_local_experts)
        _check("layers", layers, config.num_hidden_layers)
        slots.update((layer, expert) for layer in layers for expert in group.experts)
    return tuple(sorted(slots))


def check_slots(config: ModelConfig, slots: Collection[Slot]) -> None:
    """Raise `InvalidRequestError` naming the slots that the model does not have."""
    num_layers, num_experts = config.num_hidden_layers, config.num_local_experts
    bad = [s for s in sorted(slots) if not (0 <= s[0] < num_layers and 0 <= s[1] < num_experts)]
    if bad or not slots:
        raise InvalidRequestError(
            f"slots {bad[:8] or 'none'} cannot be served; the model has layers 0 to "
            f"{num_layers - 1} and experts 0 to {num_experts - 1}",
            param="slots",
        )


def _check(setting: str, indices: Sequence[int], count: int) -> None:
    bad = [index for index in indices if not 0 <= index < count]
    if bad or not indices:
        raise ConfigurationError(
            f"{setting}: {bad or 'none'} cannot be served; the model has {setting} 0 to "
            f"{count - 1}",
            setting=setting,
        )
