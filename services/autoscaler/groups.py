"""Expert groups of a Kubernetes cluster: one Deployment each, told on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.core.errors import ConfigurationError
from services.core.registry import Slot
from services.core.registry_json import parse_ranges

_GROUP = re.compile(
    r"(?P<name>[a-z0-9]([-a-z0-9.]*[a-z0-9])?)=(?P<experts>[\d,-]+)"
    r"(@(?P<layers>[\d,-]+))?(:(?P<low>\d+)-(?P<high>\d+))?"
)
_POD_SUFFIX = re.compile(r"-[a-z0-9]{1,12}-[a-z0-9]{5}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGroup:
    """The pods of one Deployment all come with these experts, in these layers (None: in all).

    Pods are workers, and worker ids are pod names: `<deployment>-<hash>-<pod>`.
    """

    deployment: str
    experts: frozenset[int]
    layers: frozenset[int] | None
    min_replicas: int
    max_replicas: int

    def holds(self, slot: Slot) -> bool:
        layer, expert = slot
        return expert in self.experts and (self.layers is None or layer in self.layers)

    def has_worker(self, worker_id: str) -> bool:
        return (
            worker_id.startswith(self.deployment)
            and _POD_SUFFIX.fullmatch(worker_id[len(self.deployment) :]) is not None
        )


def parse_group(text: str) -> ExpertGroup:
    """ "expertfleet-experts-0=0,1@0-15:1-4": Deployment, experts, layers (default all), fewest and
    most replicas (default 1-4). Raises `ConfigurationError` for anything else."""
    match = _GROUP.fullmatch(text)
    try:
        if match is None:
            raise ValueError("not of this form")
        low, high = int(match["low"] or 1), int(match["high"] or 4)
        if not 1 <= low <= high:
            raise ValueError(f"replicas {low}-{high}")
        layers = match["layers"]
        return ExpertGroup(
            deployment=match["name"],
            experts=frozenset(parse_ranges(match["experts"])),
            layers=frozenset(parse_ranges(layers)) if layers else None,
            min_replicas=low,
            max_replicas=high,
        )
    except ValueError as error:
        raise ConfigurationError(
            f"--group {text!r} cannot be read ({error}); write DEPLOYMENT=EXPERTS, and if need be "
            "@LAYERS and :MIN-MAX replicas, such as expertfleet-experts-0=0@0-15:1-4",
            setting="group",
        ) from error


def by_coverage(groups: Iterable[ExpertGroup], slots: Sequence[Slot]) -> list[ExpertGroup]:
    """Groups that hold any of the slots, those that hold most of them first."""
    counted = [(sum(map(group.holds, slots)), group) for group in groups]
    counted.sort(key=lambda item: (-item[0], item[1].deployment))
    return [group for count, group in counted if count > 0]
