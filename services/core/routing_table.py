"""Which worker computes which (layer, expert): an immutable, versioned table.

Pure: built from lease records, no I/O, no clock. A logical expert is the model's (layer, expert);
its replicas are the workers that hold a copy of it.

Shapes: W workers, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.core.registry import FleetSnapshot, Slot, WorkerRecord

NO_WORKER = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTable:
    """Workers are numbered by their place in `workers`; arrays hold these numbers.

    A change makes a new table with a higher version; a table in use never changes under its user.
    """

    version: int
    workers: tuple[WorkerRecord, ...]
    local_host: str | None
    holds: NDArray[np.bool_]
    """[W, L, E]: whether worker w holds the slot."""
    chosen: NDArray[np.int64]
    """[L, E]: a worker for each slot, `NO_WORKER` where there is none. Where there are several
    replicas it is the one to prefer while nothing is known of their load."""
    has_choice: tuple[bool, ...]
    """[L]: whether some expert of the layer has several replicas."""
    is_whole: tuple[bool, ...]
    """[L]: whether every expert of the layer has a replica."""

    @staticmethod
    def build(
        snapshot: FleetSnapshot,
        *,
        num_layers: int,
        num_experts: int,
        version: int = 1,
        local_host: str | None = None,
    ) -> RoutingTable:
        """A table of the workers in state ready; draining ones would refuse what they are sent.

        Slots outside the model are ignored. Replicas on `local_host` are preferred.
        """
        workers = tuple(worker for worker in snapshot.workers if worker.state == "ready")
        holds = np.zeros((len(workers), num_layers, num_experts), dtype=np.bool_)
        for index, worker in enumerate(workers):
            for layer, expert in worker.slots:
                if layer < num_layers and expert < num_experts:
                    holds[index, layer, expert] = True
        return RoutingTable._of(version, workers, holds, local_host)

    @staticmethod
    def _of(
        version: int,
        workers: tuple[WorkerRecord, ...],
        holds: NDArray[np.bool_],
        local_host: str | None,
    ) -> RoutingTable:
        is_local = np.array([worker.host == local_host for worker in workers], dtype=np.bool_)
        chosen = choose_replicas(holds, is_local)
        for array in (holds, chosen):
            array.setflags(write=False)
        return RoutingTable(
            version=version,
            workers=workers,
            local_host=local_host,
            holds=holds,
            chosen=chosen,
            has_choice=tuple((holds.sum(axis=0) > 1).any(axis=1).tolist()),
            is_whole=tuple((chosen != NO_WORKER).all(axis=1).tolist()),
        )

    def resolve(self, layer: int) -> NDArray[np.int64]:
        """[E]: the worker of each expert of a layer, `NO_WORKER` where there is none."""
        row: NDArray[np.int64] = self.chosen[layer]
        return row

    def without(self, worker_id: str, slots: Iterable[Slot] | None = None) -> RoutingTable:
        """The next version, in which the worker holds nothing, or none of `slots` if given."""
        holds = self.holds.copy()
        for index, worker in enumerate(self.workers):
            if worker.worker_id != worker_id:
                continue
            if slots is None:
                holds[index] = False
            else:
                for layer, expert in slots:
                    holds[index, layer, expert] = False
        return RoutingTable._of(self.version + 1, self.workers, holds, self.local_host)

    def replicas(self, slot: Slot) -> tuple[str, ...]:
        """Ids of the workers that hold a slot."""
        held = np.flatnonzero(self.holds[:, slot[0], slot[1]])
        return tuple(self.workers[index].worker_id for index in held)

    def missing_slots(self) -> tuple[Slot, ...]:
        """Slots without a replica, in order of layer, then expert."""
        return tuple(
            (int(layer), int(expert)) for layer, expert in np.argwhere(self.chosen == NO_WORKER)
        )


def choose_replicas(holds: NDArray[np.bool_], is_local: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The worker of every slot, [L, E], from holds [W, L, E] and is_local [W].

    A local replica comes before a remote one; then the one with the least to do in this layer (all
    experts of a layer are waited for together), then in the layers before, then the first. Experts
    with few replicas choose first. The same input gives the same answer in every process.
    """
    num_workers, num_layers, num_experts = holds.shape
    chosen = np.full((num_layers, num_experts), NO_WORKER, dtype=np.int64)
    if num_workers == 0:
        return chosen
    # Most slots have one replica: those need no choice.
    num_replicas = holds.sum(axis=0)
    chosen[num_replicas == 1] = holds.argmax(axis=0)[num_replicas == 1]
    total = np.zeros(num_workers, dtype=np.int64)
    for layer in range(num_layers):
        in_layer = np.bincount(chosen[layer][chosen[layer] >= 0], minlength=num_workers)
        for expert in np.argsort(num_replicas[layer], kind="stable"):
            if num_replicas[layer, expert] > 1:
                candidates = np.flatnonzero(holds[:, layer, expert])
                best = min((not is_local[w], in_layer[w], total[w], w) for w in candidates)[-1]
                chosen[layer, expert] = best
                in_layer[best] += 1
        total += in_layer
    return chosen
