"""The expert workers of one launcher: started, added, renewed, taken away, watched for hangs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import grpc.aio

from services.cli.child import Child
from services.cli.hang_watch import HangWatch
from services.cli.hardware import Hardware
from services.cli.spare_process import WORKER_COMMAND
from services.cli.startup import fits_beside, memory_available, wait_until_up
from services.core.describe import describe_worker
from services.core.errors import ExpertfleetError, NotFoundError, UnavailableError
from services.core.placement import format_slots
from services.core.redis_registry import RedisRegistry
from services.core.registry import Slot, WorkerRecord
from services.core.settings import Settings
from services.core.tls import PeerTls, open_channel, peer_tls

MakeChild = Callable[[str, Sequence[str], Mapping[str, str]], Child]

_DRAIN_SLACK_S = 3.0
_LOOK_EVERY_S = 1.0
_ANSWER_TIMEOUT_S = 2.0
_logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Worker:
    child: Child
    slots: frozenset[Slot]
    place: int
    fleet: str
    is_serving: bool = False
    record: WorkerRecord | None = None


class FleetWorkers:
    """Workers are called expert-N; a number is never given twice.

    `settings` are those of workers yet to come. `num_planned` is between how many the cores are
    shared out; a worker's place decides its GPU.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        num_planned: int,
        max_shards: int,
        hardware: Hardware,
        make_child: MakeChild,
        say: Callable[[str], None],
    ) -> None:
        self.settings = settings
        self._tls = peer_tls(settings)
        self._num_planned = num_planned
        self._max_shards = max_shards
        self._hardware = hardware
        self._make_child = make_child
        self._say = say
        self._workers: dict[str, _Worker] = {}
        self._next_number = 0
        self._hangs = HangWatch(settings.hang_timeout_s)
        self._changing = asyncio.Lock()

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._workers)

    @property
    def children(self) -> list[Child]:
        return [worker.child for worker in self._workers.values()]

    @property
    def changing(self) -> asyncio.Lock:
        """Held by whoever adds, removes or renews workers in several steps."""
        return self._changing

    def check(self) -> None:
        """Raise what made a worker that has served give up for good."""
        for worker in self._workers.values():
            if worker.is_serving:
                worker.child.check()

    async def start(self, placement: Iterable[Collection[Slot]]) -> list[str]:
        """Start a worker for each set of slots and wait until all serve.

        If one does not come up all of these are ended, and its error is raised.
        """
        started = time.monotonic()
        new_ids = [await self._spawn(frozenset(slots)) for slots in placement]
        waiting = set(new_ids)

        async def all_ready() -> bool:
            for worker_id, record in (await self.ready()).items():
                if worker_id in waiting:
                    waiting.discard(worker_id)
                    self._workers[worker_id].is_serving = True
                    self._say(
                        f"{worker_id}: {len(record.slots)} experts, "
                        f"{record.weight_bytes / 2**20:.0f} MiB on {record.device} "
                        f"({time.monotonic() - started:.1f} s)"
                    )
            return not waiting

        try:
            await wait_until_up("expert workers", all_ready, self._children(new_ids))
        except ExpertfleetError:
            await asyncio.gather(*(self.remove(worker_id) for worker_id in new_ids))
            raise
        return new_ids

    async def add(self, slots: Collection[Slot]) -> str:
        """Start one more worker; returns its id once it serves."""
        (worker_id,) = await self.start([slots])
        return worker_id

    async def remove(self, worker_id: str) -> None:
        """Drain a worker and end it."""
        worker = self._worker(worker_id)
        worker.is_serving = False
        await worker.child.stop(self.settings.drain_timeout_s + _DRAIN_SLACK_S)
        self._workers.pop(worker_id, None)

    async def renew(self, worker_id: str) -> str:
        """Start a worker anew, with the slots it holds now; returns the id of the one that serves.

        Where memory allows, another one takes over before this one drains. Else requests wait.
        """
        worker = self._worker(worker_id)
        record = (await self.ready()).get(worker_id)
        slots = record.slots if record is not None else worker.slots
        if record is not None and fits_beside(record.weight_bytes, _memory_for(record)):
            new_id = await self.add(slots)
            await self.remove(worker_id)
            return new_id
        self._say(f"{worker_id}: no memory for a second one beside it; its requests wait")
        fresh = self._make(worker_id, slots, worker.place)
        worker.slots = slots
        before = worker.child.pid
        await worker.child.restart(fresh.spec, self.settings.drain_timeout_s + _DRAIN_SLACK_S)

        async def serves_again() -> bool:
            again = (await self.ready()).get(worker_id)
            return again is not None and again.pid == worker.child.pid != before

        await wait_until_up(worker_id, serves_again, [worker.child])
        return worker_id

    async def ready(self) -> dict[str, WorkerRecord]:
        """Leases of those that serve, by id. Raises `UnavailableError` when the store is away."""
        return {
            worker_id: record
            for worker_id, record in (await self._records()).items()
            if record.state == "ready"
        }

    def status(self) -> list[dict[str, object]]:
        return [
            {
                "name": worker_id,
                "pid": worker.child.pid,
                "state": worker.child.state if worker.is_serving else "starting or draining",
                "restarts": worker.child.num_restarts,
                "holds": f"{len(worker.slots)} experts",
            }
            for worker_id, worker in self._workers.items()
        ]

    async def watch(self) -> None:
        """For ever: end workers that hang; their supervisor starts them again."""
        while True:
            await self._see_who_lives()
            pids = {
                worker_id: worker.child.pid
                for worker_id, worker in self._workers.items()
                if worker.child.pid is not None
                and worker.child.state == "running"
                and not worker.child.is_stopping
            }
            for worker_id in self._hangs.silent(pids, time.monotonic()):
                self._say(
                    f"{worker_id} (pid {pids[worker_id]}) gave no sign of life for "
                    f"{self.settings.hang_timeout_s:.0f} s or more and is ended"
                )
                self._workers[worker_id].child.kill()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def stop(self, timeout_s: float) -> None:
        await asyncio.gather(*(child.stop(timeout_s) for child in self.children))

    async def _see_who_lives(self) -> None:
        """A lease is a sign of life; who has none, or while the store is away, is asked."""
        try:
            leases = await self._records()
        except UnavailableError:
            leases = {}
        for worker_id, record in leases.items():
            self._workers[worker_id].record = record
            self._hangs.seen(
                worker_id, record.pid, time.monotonic(), is_loading=record.state == "loading"
            )
        unseen = [
            worker.record
            for worker_id, worker in self._workers.items()
            if worker_id not in leases
            and worker.record is not None
            and worker.record.pid == worker.child.pid
        ]
        answers = await asyncio.gather(*(_answers(record, self._tls) for record in unseen))
        for record, is_answered in zip(unseen, answers, strict=True):
            if is_answered:
                self._hangs.seen(record.worker_id, record.pid, time.monotonic())

    async def _records(self) -> dict[str, WorkerRecord]:
        """Leases of the processes that run now."""
        found: dict[str, WorkerRecord] = {}
        for fleet in {worker.fleet for worker in self._workers.values()} or {self.settings.fleet}:
            registry = RedisRegistry(self.settings.redis_url or "", fleet=fleet)
            try:
                snapshot = await registry.snapshot()
            finally:
                await registry.close()
            for record in snapshot.workers:
                worker = self._workers.get(record.worker_id)
                if worker and worker.fleet == fleet and worker.child.pid == record.pid:
                    found[record.worker_id] = record
        return found

    async def _spawn(self, slots: frozenset[Slot]) -> str:
        worker_id = f"expert-{self._next_number}"
        self._next_number += 1
        taken = {worker.place for worker in self._workers.values()}
        place = next(place for place in range(len(taken) + 1) if place not in taken)
        child = self._make(worker_id, slots, place)
        self._workers[worker_id] = _Worker(
            child=child, slots=slots, place=place, fleet=self.settings.fleet
        )
        await child.start()
        return worker_id

    def _make(self, worker_id: str, slots: frozenset[Slot], place: int) -> Child:
        settings = self.settings
        command = [*WORKER_COMMAND, "--worker-id", worker_id]
        command += ["--slots", format_slots(slots)]
        command += ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
        threads = settings.num_threads or self._hardware.worker_threads(self._num_planned)
        device = self._hardware.worker_device(place, self._max_shards, settings.device)
        environment = settings.override(num_threads=threads, device=device).as_environment()
        return self._make_child(worker_id, command, environment)

    def _worker(self, worker_id: str) -> _Worker:
        worker = self._workers.get(worker_id)
        if worker is None:
            raise NotFoundError(f"there is no worker {worker_id}; there are {list(self._workers)}")
        return worker

    def _children(self, worker_ids: Iterable[str]) -> list[Child]:
        return [self._workers[worker_id].child for worker_id in worker_ids]


def _memory_for(record: WorkerRecord) -> int:
    """Bytes that a process with the same device as this worker could take."""
    if record.device.startswith("cuda"):
        return min(record.memory_free_bytes, memory_available())
    return memory_available()


async def _answers(record: WorkerRecord, tls: PeerTls | None) -> bool:
    """Whether a worker answers a call; one that computes does, one that hangs does not."""
    async with open_channel(record.endpoint, tls) as channel:
        try:
            await describe_worker(channel, timeout_s=_ANSWER_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
    return True
