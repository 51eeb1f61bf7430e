"""How the policy is tuned."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """Bounds and thresholds. Times are seconds, utilisations shares of 1.

    A (layer, worker) is hot when its share of the worker's time exceeds `hot_ratio` times the mean
    of the other workers' in that layer, for `hot_after_s`, on a worker at least `min_utilization`
    busy. A replica is given back when without it that ratio would stay below `cool_ratio` for
    `idle_after_s`. After a change a slot is left alone for `cool_down_s`, and after a worker came
    nothing is loaded for heat as long.

    Where the fleet is `scale_out_utilization` saturated and waits for experts at least
    `min_experts_share` of its steps, or one worker is so busy and no memory is left for what would
    relieve it, for `scale_out_after_s`, a worker is added; as long passes until the next. It is
    waited for `worker_start_timeout_s`. One is removed when without it the others would leave the
    fleet below `scale_in_ratio` of that for `idle_after_s`, and at least `scale_cool_down_s` after
    the last step of either kind. Where no shard tells how saturated it is, it is how busy workers
    are on average.

    With `shadow_copies` spare memory holds a second copy of every slot that has one replica, once
    it had only one for `protect_after_s`. A slot without any is restored after `restore_after_s`,
    which outlasts a store that lost its leases.

    `min_workers` None is the number seen first, `max_workers` None that same number. Without
    `scale_workers` there is nobody to start and end workers.
    """

    min_replicas: int = 1
    max_replicas: int = 4
    min_workers: int | None = None
    max_workers: int | None = None
    scale_workers: bool = True
    hot_ratio: float = 1.3
    cool_ratio: float = 1.15
    hot_after_s: float = 1.0
    min_utilization: float = 0.1
    min_gain: float = 0.05
    cool_down_s: float = 10.0
    idle_after_s: float = 30.0
    scale_out_utilization: float = 0.7
    scale_in_ratio: float = 0.78
    scale_out_after_s: float = 2.0
    min_experts_share: float = 0.25
    scale_cool_down_s: float = 15.0
    worker_start_timeout_s: float = 300.0
    shadow_copies: bool = True
    protect_after_s: float = 5.0
    restore_after_s: float = 1.5
    max_slots_per_action: int = 32

    def __post_init__(self) -> None:
        self._require(self.min_replicas >= 1, "min_replicas", "at least 1")
        self._require(
            self.max_replicas >= self.min_replicas, "max_replicas", "at least min_replicas"
        )
        self._require(1.0 <= self.cool_ratio < self.hot_ratio, "hot_ratio", "above cool_ratio >= 1")
        self._require(
            0 < self.scale_out_utilization <= 1, "scale_out_utilization", "above 0 and at most 1"
        )
        self._require(0 <= self.scale_in_ratio < 1, "scale_in_ratio", "from 0 to below 1")
        self._require(self.max_slots_per_action >= 1, "max_slots_per_action", "at least 1")
        if self.min_workers is not None and self.max_workers is not None:
            self._require(
                1 <= self.min_workers <= self.max_workers, "min_workers", "1 to max_workers"
            )

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise ConfigurationError(
                f"autoscaler: {name}={getattr(self, name)!r} must be {what}", setting=name
            )

    @property
    def scale_in_utilization(self) -> float:
        """Below which a worker fewer is enough."""
        return self.scale_in_ratio * self.scale_out_utilization

    @property
    def wanted_copies(self) -> int:
        """Replicas every slot should have where memory allows."""
        return max(self.min_replicas, 2 if self.shadow_copies else 1)
