"""How many attention shards a load asks for. Pure: the numbers come in, a count goes out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLoad:
    """One shard's engine load: waiting prompt tokens, and KV blocks in use as a share of all."""

    waiting_tokens: float
    kv_use: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingTargets:
    """Load a shard should carry. Between `low` and 1 of it nothing changes (hysteresis)."""

    waiting_tokens: float = 4096.0
    kv_use: float = 0.8
    low: float = 0.5


def desired_shards(
    loads: Sequence[ShardLoad], *, current: int, minimum: int, maximum: int, targets: ScalingTargets
) -> int:
    """Shards wanted so that the mean load per shard meets the targets, within the bounds.

    The load is the larger of waiting tokens and KV use, each as a share of its target; the rule is
    the proportional one of the Kubernetes horizontal autoscaler (current x load / target).
    """
    if not loads or current < 1:
        return max(minimum, current)
    pressure = max(
        sum(load.waiting_tokens for load in loads) / len(loads) / targets.waiting_tokens,
        sum(load.kv_use for load in loads) / len(loads) / targets.kv_use,
    )
    wanted = current
    if pressure > 1:
        wanted = math.ceil(current * pressure)
    elif pressure < targets.low:
        wanted = max(1, math.ceil(current * pressure / targets.low))
    return max(minimum, min(maximum, wanted))
