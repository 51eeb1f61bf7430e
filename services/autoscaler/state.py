"""What the policy remembers between rounds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from services.core.registry import Slot

Condition = tuple[Hashable, ...]
"""Something that is the case, such as ("hot", layer, worker id)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSlots:
    """What a worker held when it was first seen ready: what it holds beyond was loaded later."""

    started_at: float
    slots: frozenset[Slot]
    seen_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyState:
    """Immutable; `decide` returns the next one. Times are those given as `now`.

    `known` are all slots that ever had a replica. `changed_at` tells when a replica of a slot was
    last asked for or given up, `since` since when a condition holds without a break, `scaled_at`
    when a worker was last asked for or sent away, `awaited_since` since when one is awaited,
    `joined_at` when one last came to those that were there, and `leaving_since` when a worker was
    told to end.
    """

    known: frozenset[Slot] = frozenset()
    base: Mapping[str, BaseSlots] = field(default_factory=dict)
    changed_at: Mapping[Slot, float] = field(default_factory=dict)
    since: Mapping[Condition, float] = field(default_factory=dict)
    scaled_at: float | None = None
    awaited_since: float | None = None
    joined_at: float | None = None
    leaving_since: Mapping[str, float] = field(default_factory=dict)
    seen_workers: frozenset[str] = frozenset()
    first_num_workers: int = 0
