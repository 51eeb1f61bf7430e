"""Which (layer, expert) slots a worker is told to hold."""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.core.errors import ConfigurationError
from services.core.model_config import ModelConfig
from services.core.registry import Slot

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MAX_INDEX = 1 << 20


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


def select_slots(
    config: ModelConfig, experts: Sequence[int], layers: Sequence[int] | None
) -> tuple[Slot, ...]:
    """All given experts in all given layers (None: every layer), in ascending order.

    Raises `ConfigurationError` when the model has no such expert or layer.
    """
    if not config.is_moe:
        raise ConfigurationError(
            "the model is dense and has no experts to serve; its FFN runs in the attention shard",
            setting="experts",
        )
    if layers is None:
        layers = range(config.num_hidden_layers)
    _check("experts", experts, config.num_local_experts)
    _check("layers", layers, config.num_hidden_layers)
    return tuple((layer, expert) for layer in sorted(layers) for expert in sorted(experts))


def _check(setting: str, indices: Sequence[int], count: int) -> None:
    bad = [index for index in indices if not 0 <= index < count]
    if bad or not indices:
        raise ConfigurationError(
            f"{setting}: {bad or 'none'} cannot be served; the model has {setting} 0 to "
            f"{count - 1}",
            setting=setting,
        )
