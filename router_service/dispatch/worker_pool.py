"""The workers this shard can send to: joins them, drops them, and keeps the routing table.

The registry says who exists; a worker takes part once it was connected, described itself and was
admitted, and stops taking part the moment its link breaks. What it holds is what it said itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from protos import experts_pb2
from router_service.dispatch.admission import AdmissionRules
from router_service.dispatch.replica_chooser import ReplicaChooser
from router_service.dispatch.transport import ExpertTransport, WorkerLink
from services.core.errors import ConfigurationError, PeerTlsError, UnavailableError
from services.core.registry import FleetSnapshot, Slot, WorkerRecord
from services.core.routing_table import RoutingTable

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 1.0
_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 0.5
_NOT_READY_BACKOFF_S = 0.2
_REFUSED_BACKOFF_S = 2.0
_MAX_REFUSED_BACKOFF_S = 30.0
_MIN_PROBE_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolView:
    """A routing table with what is needed to send to its workers, in the table's order."""

    table: RoutingTable
    links: tuple[WorkerLink, ...]
    max_frame_bytes: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class _Member:
    """A worker of the registry. `slots` is None while it does not take part. `has_broken`: its link
    broke while it did, and the registry was not read since."""

    record: WorkerRecord
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    link: WorkerLink | None = None
    slots: frozenset[Slot] | None = None
    max_frame_bytes: int = 0
    refusal: str = ""
    num_refusals: int = 0
    probed_at: float = 0.0
    has_broken: bool = False


class WorkerPool:
    """Used on one event loop. `view` is replaced, never changed.

    A worker whose record is missing is kept as long as its link holds: the store may have lost the
    record, or take no new ones. The weights of a slot are those first seen; a worker with others is
    refused, for as long as this process lives, because keys and values computed with them may be in
    caches.

    `on_lost` is told of workers that went without a word: their link broke while they took part,
    was not made again at once, and their lease still says that they are ready. One that drains
    takes its lease along. `on_broken` is told of every link that breaks while its worker takes
    part: the registry should be read soon, before another process has the worker's name.
    """

    def __init__(
        self,
        transport: ExpertTransport,
        rules: AdmissionRules,
        *,
        local_host: str | None,
        chooser: ReplicaChooser,
        on_gone: Callable[[str], None],
        on_ejected: Callable[[], None],
        on_lost: Callable[[], None] = lambda: None,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        self._transport = transport
        self._rules = rules
        self._local_host = local_host
        self._chooser = chooser
        self._on_gone = on_gone
        self._on_ejected = on_ejected
        self._on_lost = on_lost
        self._on_link_broken = on_broken
        self._subscribers: dict[object, Callable[[], None]] = {}
        self._missing_since: dict[Slot, float] = {}
        self._members: dict[str, _Member] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._digests: dict[Slot, bytes] = {}
        self._changed = asyncio.Event()
        self._view = PoolView(table=self._build_table(0, ()), links=(), max_frame_bytes=())
        self._chooser.follow(self._view.table)

    @property
    def view(self) -> PoolView:
        return self._view

    @property
    def slot_digests(self) -> Mapping[Slot, bytes]:
        """Of all slots seen so far."""
        return self._digests

    def refusals(self) -> tuple[str, ...]:
        """Why workers of the registry do not take part, where it is not for being away."""
        return tuple(member.refusal for member in self._members.values() if member.refusal)

    async def wait_changed(self, version: int, timeout_s: float) -> None:
        """Return when the table is newer than `version`, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._view.table.version <= version:
                    await self._changed.wait()
        except TimeoutError:
            return

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back whenever workers or slots came or went. Returns what ends that."""
        key = object()
        self._subscribers[key] = callback
        return lambda: self._subscribers.pop(key, None) and None

    def announce(self) -> None:
        """Tell all subscribers that who can be sent to has changed."""
        for callback in tuple(self._subscribers.values()):
            callback()

    def missing_since(self, slot: Slot) -> float:
        """When a slot lost its last replica, by `time.monotonic`; 0 while it has one."""
        return self._missing_since.get(slot, 0.0)

    def probe(self, worker_id: str) -> None:
        """Ask a worker what it holds, if that was not done just now."""
        member, now = self._members.get(worker_id), time.monotonic()
        if member is not None and now - member.probed_at >= _MIN_PROBE_INTERVAL_S:
            member.probed_at = now
            member.wake.set()

    def ejected(self, worker_id: str, reason: str) -> None:
        """The chooser leaves a worker alone for a while."""
        logger.warning("worker %s is left alone for a while: %s", worker_id, reason)
        self._on_ejected()

    def tick(self) -> None:
        """Call every half second or so: probes ejected workers when it is time."""
        for worker_id in self._chooser.tick(time.monotonic()):
            self.probe(worker_id)

    def update(self, snapshot: FleetSnapshot) -> None:
        """Follow the registry."""
        for record in snapshot.workers:
            member = self._members.get(record.worker_id)
            if member is not None and member.has_broken:
                member.has_broken = False
                if record.state == "ready":
                    self._on_lost()
            if member is None:
                self._start(record)
            elif member.record.endpoint != record.endpoint:
                self._stop(member)
                self._start(record)
            else:
                self._refresh(member, record)
        seen = {record.worker_id for record in snapshot.workers}
        for worker_id, member in list(self._members.items()):
            if worker_id not in seen and member.slots is None:
                self._stop(member)
                self._chooser.forget(worker_id)
                self._on_gone(worker_id)

    def mark_draining(self, worker_id: str) -> None:
        """Send a worker nothing more until it says that it is ready."""
        if member := self._members.get(worker_id):
            self._leave(member, "is draining")
            member.wake.set()

    def mark_absent(self, worker_id: str, slots: Iterable[Slot]) -> None:
        """Do not send these slots to a worker that does not know them; ask it what it holds."""
        member = self._members.get(worker_id)
        if member is not None and member.slots is not None:
            member.slots -= frozenset(slots)
            member.wake.set()
            self._rebuild()

    async def close(self) -> None:
        for member in list(self._members.values()):
            self._stop(member)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, record: WorkerRecord) -> None:
        member = self._members[record.worker_id] = _Member(record=record)
        member.task = asyncio.create_task(
            self._keep_joined(member), name=f"worker {record.worker_id}"
        )
        self._tasks.add(member.task)
        member.task.add_done_callback(self._tasks.discard)
        member.task.add_done_callback(log_crash)

    def _stop(self, member: _Member) -> None:
        del self._members[member.record.worker_id]
        if member.task is not None:
            member.task.cancel()
        self._leave(member, "left the registry or moved")

    def _refresh(self, member: _Member, record: WorkerRecord) -> None:
        before, member.record = member.record, record
        if before.slots != record.slots or before.started_at != record.started_at:
            member.wake.set()
        if before.state != record.state:
            member.wake.set()
            self._rebuild()

    async def _keep_joined(self, member: _Member) -> None:
        """Connect, join, wait until the link breaks, and again; ends by being cancelled."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            link = self._transport.open(member.record.endpoint, partial(self._on_broken, member))
            try:
                while link.broken is None:
                    member.wake.clear()
                    wait_s = await self._join(member, link)
                    if wait_s is None:
                        backoff_s = _FIRST_BACKOFF_S
                    await _wait(member.wake, wait_s)
            except PeerTlsError as error:
                if member.refusal != error.message:
                    logger.error("%s", error.message)
                member.refusal = error.message
                self._leave(member, error.message)
            except UnavailableError as error:
                self._leave(member, error.message)
            finally:
                await link.close()
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    def _on_broken(self, member: _Member, reason: str) -> None:
        if member.slots is not None:
            member.has_broken = True
            self._on_link_broken()
        self._leave(member, reason, level=logging.WARNING)
        member.wake.set()

    async def _join(self, member: _Member, link: WorkerLink) -> float | None:
        """Let the worker take part if it may. Returns when to ask it again if nothing happens."""
        record = member.record
        if record.state != "ready":
            self._leave(member, f"is {record.state}")
            return _MAX_BACKOFF_S
        try:
            description = await link.describe(_CONNECT_TIMEOUT_S)
        except UnavailableError:
            if member.slots is None:
                raise
            if self._chooser.is_ejected(record.worker_id):
                self._chooser.probe_failed(record.worker_id, time.monotonic())
                return None
            return _MAX_BACKOFF_S  # a busy worker; if it is a dead one the link breaks
        if link.broken is not None:  # meanwhile; what was told of that has been acted upon
            raise UnavailableError(link.broken)
        if description.state != experts_pb2.WORKER_STATE_READY:
            self._leave(member, "is not ready")
            return _NOT_READY_BACKOFF_S
        try:
            self._rules.check(record, description, self._digests)
        except ConfigurationError as error:
            if member.refusal != error.message:
                logger.error("%s", error.message)
            member.refusal = error.message
            self._leave(member, "was refused")
            member.num_refusals += 1
            return min(
                _REFUSED_BACKOFF_S * 2.0 ** (member.num_refusals - 1), _MAX_REFUSED_BACKOFF_S
            )
        self._take(member, link, description)
        return None

    def _take(
        self, member: _Member, link: WorkerLink, description: experts_pb2.DescribeResponse
    ) -> None:
        slots = frozenset((slot.layer, slot.expert) for slot in description.slots)
        if member.slots is None:
            logger.info("worker %s joined with %d slots", member.record.worker_id, len(slots))
        for slot in description.slots:
            self._digests.setdefault((slot.layer, slot.expert), slot.digest)
        member.refusal, member.num_refusals = "", 0
        is_new = member.slots != slots or member.link is not link
        member.link, member.max_frame_bytes = link, description.max_frame_bytes
        member.has_broken = False
        if self._chooser.is_ejected(member.record.worker_id):
            logger.info("worker %s is used again", member.record.worker_id)
            self._chooser.returned(member.record.worker_id)
        if is_new:
            member.slots = slots
            self._rebuild()

    def _leave(self, member: _Member, reason: str, *, level: int = logging.INFO) -> None:
        if member.slots is not None:
            logger.log(level, "worker %s left: %s", member.record.worker_id, reason)
            member.slots, member.link = None, None
            self._chooser.left(member.record.worker_id)
            self._rebuild()

    def _rebuild(self) -> None:
        joined = [
            member
            for _, member in sorted(self._members.items())
            if member.slots is not None and member.record.state == "ready"
        ]
        records = tuple(
            dataclasses.replace(member.record, slots=member.slots or frozenset())
            for member in joined
        )
        self._view = PoolView(
            table=self._build_table(self._view.table.version + 1, records),
            links=tuple(member.link for member in joined if member.link is not None),
            max_frame_bytes=tuple(member.max_frame_bytes for member in joined),
        )
        self._chooser.follow(self._view.table)
        now = time.monotonic()
        before = self._missing_since
        self._missing_since = {
            slot: before.get(slot, now) for slot in self._view.table.missing_slots()
        }
        self._changed.set()
        self._changed = asyncio.Event()
        self.announce()

    def _build_table(self, version: int, records: tuple[WorkerRecord, ...]) -> RoutingTable:
        return RoutingTable.build(
            FleetSnapshot(workers=records),
            num_layers=self._rules.num_layers,
            num_experts=self._rules.num_experts,
            version=version,
            local_host=self._local_host,
        )


def log_crash(task: asyncio.Task[None]) -> None:
    """Done callback of tasks that only end by being cancelled."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("task %s crashed", task.get_name(), exc_info=error)


async def _wait(event: asyncio.Event, timeout_s: float | None) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
