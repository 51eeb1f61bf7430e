"""Who computes what of a layer call, and the books that this choice is made from.

Without I/O and without a clock: times are arguments, and the same calls give the same choices.
Used on one event loop; it is asked once per layer call, so the common case, in which no expert of
the layer has a choice, is a lookup in the routing table.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from router_service.dispatch.replica_choice import (
    REMOTE_HANDICAP,
    LayerReplicas,
    Share,
    assign_rows,
)
from router_service.dispatch.worker_book import WorkerBook, WorkShape
from router_service.dispatch.worker_health import WorkerHealth
from services.core.registry import Slot
from services.core.routing_table import RoutingTable

_RETURN_PENALTY_S = 0.05


class Choice(NamedTuple):
    """`workers` int64 [E], `NO_WORKER` where there is none; see `Assigned`."""

    workers: NDArray[np.int64]
    shares: tuple[Share, ...] = ()


class WorkerFigures(NamedTuple):
    """What the books say of one worker, for metrics."""

    worker_id: str
    outstanding_rows: int
    deadline_s: float
    is_ejected: bool


class ReplicaChooser:
    """Knows the current routing table (`follow`) and every worker's pace and health.

    Each `sent` must be followed by one `answered`, `failed` or `dropped` of the same size.
    """

    def __init__(self, *, call_timeout_s: float, seed: int = 0) -> None:
        self._call_timeout_s = call_timeout_s
        self._seed = seed
        self._shape = WorkShape()
        self._books: dict[str, WorkerBook] = {}
        self._health: dict[str, WorkerHealth] = {}
        self._num_answers_seen: dict[str, int] = {}
        self.num_stuck = 0
        """Workers that hold up rows now; whoever sees it change tells the pool's subscribers."""
        self._usual_overhead_s = math.inf
        self._table: RoutingTable | None = None
        self._by_index: list[WorkerBook] = []
        self._handicaps: list[float] = []
        self._layers: dict[int, LayerReplicas] = {}

    def follow(self, table: RoutingTable) -> None:
        """Choose from this table from now on."""
        self._table = table
        self._layers = {}
        self._by_index = [self._book(worker.worker_id) for worker in table.workers]
        local = table.local_host
        self._handicaps = [
            1.0 if local is None or worker.host == local else REMOTE_HANDICAP
            for worker in table.workers
        ]
        self._find_usual_overhead()

    def choose(self, layer: int, rows_per_expert: NDArray[np.int64]) -> NDArray[np.int64]:
        """The worker of every expert [E], `NO_WORKER` where there is none; no expert is shared."""
        return self.plan(layer, rows_per_expert, may_split=False).workers

    def plan(
        self,
        layer: int,
        rows_per_expert: NDArray[np.int64],
        *,
        avoid: Collection[str] = (),
        exclude: Collection[str] = (),
        skip_stuck: bool = False,
        may_split: bool = True,
    ) -> Choice:
        """As `choose`, with the rows of hot experts shared. Workers in `avoid` are used only where
        there is no other, those in `exclude`, and with `skip_stuck` those that are stuck, never."""
        table = self._table
        assert table is not None
        skips = skip_stuck and self.num_stuck > 0
        if not (avoid or exclude or skips or table.has_choice[layer]):
            return Choice(table.resolve(layer))
        replicas = self._layers.get(layer)
        if replicas is None:
            replicas = self._layers[layer] = LayerReplicas.of(_replicas(table, layer))
        if avoid or exclude or skips:
            replicas = self._reduced(_replicas(table, layer), avoid, exclude, skips)
        self._seed += 1
        workers, shares = assign_rows(
            rows_per_expert.tolist(),
            replicas,
            self._by_index,
            self._handicaps,
            expert_rows=self._shape.expert_rows,
            seed=self._seed,
            may_split=may_split,
        )
        return Choice(np.array(workers, dtype=np.int64), tuple(shares))

    def has_worker(
        self, layer: int, expert: int, *, exclude: Collection[str] = (), skip_stuck: bool = False
    ) -> bool:
        """Whether a replica may be sent to, beside those in `exclude` and those that are stuck."""
        assert self._table is not None
        for worker_id in self._table.replicas((layer, expert)):
            if worker_id in exclude or (skip_stuck and self._health[worker_id].is_stuck):
                continue
            return True
        return False

    def is_available(self, slots: Iterable[Slot]) -> bool:
        """Whether every slot has a replica that is not stuck."""
        return all(self.has_worker(*slot, skip_stuck=True) for slot in slots)

    # The books

    def sent(self, worker_id: str, num_rows: int, num_experts: int = 1) -> float:
        """A frame is on its way. Returns the seconds until its answer is expected."""
        return self._book(worker_id).sent(num_rows, num_experts)

    def answered(
        self,
        worker_id: str,
        num_rows: int,
        elapsed_s: float,
        num_experts: int = 1,
        *,
        expected_s: float | None = None,
        compute_s: float = 0.0,
        was_overdue: bool = False,
    ) -> None:
        """A good answer. `expected_s` as `sent` returned it, `compute_s` the worker's figure."""
        book = self._books.get(worker_id)
        if book is None:
            return  # it was forgotten meanwhile
        book.answered(num_rows, num_experts, elapsed_s, expected_s=expected_s, compute_s=compute_s)
        health = self._health[worker_id]
        if was_overdue:
            self._no_longer_overdue(worker_id, health)
        elif health.num_faults:
            health.succeeded()
        if health.is_stuck:
            self._unstick(worker_id, health)

    def failed(
        self,
        worker_id: str,
        num_rows: int,
        now: float,
        num_experts: int = 1,
        *,
        was_overdue: bool = False,
    ) -> bool:
        """An error came back, or the link broke. True when the worker is ejected for it."""
        book = self._books.get(worker_id)
        if book is None:
            return False
        book.dropped(num_rows, num_experts)
        health = self._health[worker_id]
        if was_overdue:  # was counted as a fault then
            self._no_longer_overdue(worker_id, health)
            return False
        return self._fault(worker_id, health, now)

    def dropped(
        self, worker_id: str, num_rows: int, num_experts: int = 1, *, was_overdue: bool = False
    ) -> None:
        """Nobody waits for the frame any more, or it was refused for no fault of the worker."""
        book = self._books.get(worker_id)
        if book is None:
            return
        book.dropped(num_rows, num_experts)
        if was_overdue:
            self._no_longer_overdue(worker_id, self._health[worker_id])

    def overdue(self, worker_id: str, now: float) -> bool:
        """A frame is past its deadline; it must still be `answered`, `failed` or `dropped`, with
        `was_overdue`. True when the worker is ejected for it."""
        health = self._health.get(worker_id)
        if health is None:
            return False
        health.num_overdue += 1
        is_ejected = self._fault(worker_id, health, now)
        self._reconsider(worker_id, health)
        return is_ejected

    def stuck(self, worker_id: str) -> None:
        """It holds up rows that no other worker could compute: they are left behind until it
        answers, or none of its frames is overdue any more."""
        health = self._health.get(worker_id)
        if health is not None and not health.is_stuck:
            health.is_stuck = True
            self.num_stuck += 1
            self._reconsider(worker_id, health)

    def deadline_s(
        self,
        worker_id: str,
        num_rows: int = 1,
        num_experts: int = 1,
        expected_s: float | None = None,
    ) -> float:
        """How long such a frame may take before it is sent to another replica too."""
        book = self._book(worker_id)
        if expected_s is None:
            expected_s = book.overhead_s + book.unit_s * self._shape.work(num_rows, num_experts)
        if book.is_cold:
            like = max(self._books.values(), key=_num_answers)
            return book.guessed_deadline_s(num_rows, like=like, call_timeout_s=self._call_timeout_s)
        return book.deadline_s(
            expected_s,
            num_rows,
            call_timeout_s=self._call_timeout_s,
            usual_overhead_s=self._usual_overhead_s,
        )

    # Health

    def tick(self, now: float) -> list[str]:
        """Call every half second or so. Returns the ejected workers that are to be probed."""
        for worker_id, book in self._books.items():
            seen = self._num_answers_seen.get(worker_id)
            if seen == book.num_answers:
                book.fade()
            self._num_answers_seen[worker_id] = book.num_answers
        self._find_usual_overhead()
        return [worker_id for worker_id, health in self._health.items() if health.is_due(now)]

    def is_ejected(self, worker_id: str) -> bool:
        health = self._health.get(worker_id)
        return health is not None and health.is_ejected

    def returned(self, worker_id: str) -> None:
        """An ejected worker answered its probe: it is used again, little at first."""
        health = self._health[worker_id]
        health.returned()
        self._reconsider(worker_id, health, _RETURN_PENALTY_S)

    def probe_failed(self, worker_id: str, now: float) -> None:
        self._health[worker_id].probe_failed(now)

    def left(self, worker_id: str) -> None:
        """The worker takes part no more; frames in flight are told so one by one."""
        health = self._health.get(worker_id)
        if health is not None and health.is_stuck:
            self._unstick(worker_id, health)

    def forget(self, worker_id: str) -> None:
        """The worker is gone for good."""
        self.left(worker_id)
        self._books.pop(worker_id, None)
        self._health.pop(worker_id, None)
        self._num_answers_seen.pop(worker_id, None)

    def figures(self) -> Iterator[WorkerFigures]:
        for worker_id, book in tuple(self._books.items()):
            health = self._health.get(worker_id)
            yield WorkerFigures(
                worker_id,
                book.outstanding_rows,
                self.deadline_s(worker_id),
                health is not None and health.is_ejected,
            )

    def _book(self, worker_id: str) -> WorkerBook:
        book = self._books.get(worker_id)
        if book is None:
            like = max(self._books.values(), key=_num_answers, default=None)
            book = self._books[worker_id] = WorkerBook(worker_id, self._shape, like)
            self._health[worker_id] = WorkerHealth()
        return book

    def _fault(self, worker_id: str, health: WorkerHealth, now: float) -> bool:
        if self._table is None or True not in self._table.has_choice:
            return False  # every worker is the only one of its slots
        is_ejected = health.failed(now)
        if is_ejected:
            self._reconsider(worker_id, health)
        return is_ejected

    def _find_usual_overhead(self) -> None:
        """The lower median over workers whose pace is known."""
        known = sorted(book.overhead_s for book in self._by_index if book.num_answers)
        self._usual_overhead_s = known[(len(known) - 1) // 2] if known else math.inf

    def _no_longer_overdue(self, worker_id: str, health: WorkerHealth) -> None:
        health.num_overdue -= 1
        if health.is_stuck and not health.num_overdue:
            self._unstick(worker_id, health)
        else:
            self._reconsider(worker_id, health)

    def _unstick(self, worker_id: str, health: WorkerHealth) -> None:
        health.is_stuck = False
        self.num_stuck -= 1
        self._reconsider(worker_id, health)

    def _reconsider(self, worker_id: str, health: WorkerHealth, penalty_s: float = 0.0) -> None:
        self._books[worker_id].avoid(health.is_sick, penalty_s)

    def _reduced(
        self,
        replicas: list[list[int]],
        avoid: Collection[str],
        exclude: Collection[str],
        skips_stuck: bool,
    ) -> LayerReplicas:
        ids = [book.worker_id for book in self._by_index]
        reduced = []
        for held in replicas:
            allowed = [
                w
                for w in held
                if ids[w] not in exclude and not (skips_stuck and self._health[ids[w]].is_stuck)
            ]
            reduced.append([w for w in allowed if ids[w] not in avoid] or allowed)
        return LayerReplicas.of(reduced)


def _replicas(table: RoutingTable, layer: int) -> list[list[int]]:
    """The workers that hold each expert, the one the table prefers first."""
    replicas: list[list[int]] = []
    for expert, preferred in enumerate(table.resolve(layer).tolist()):
        held = np.flatnonzero(table.holds[:, layer, expert]).tolist()
        replicas.append([preferred, *(w for w in held if w != preferred)] if held else [])
    return replicas


def _num_answers(book: WorkerBook) -> int:
    return book.num_answers
