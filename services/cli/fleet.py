"""The processes of one product on one machine: what is started, in which order, and its end.

    store -> expert workers -> gateway and shards (Ray, or one process with --no-ray)

Each waits for those before it, and all are supervised: what dies or hangs is started again.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.autoscaler.options import PolicyOptions
from services.cli.child import Child, ChildSpec
from services.cli.control import ControlServer, Progress
from services.cli.fleet_autoscaler import FleetAutoscaler
from services.cli.fleet_workers import FleetWorkers
from services.cli.front import Front, LocalFront, RayFront
from services.cli.hardware import Hardware
from services.cli.rolling_restart import RollingRestart, parse_what
from services.cli.spare_process import SpareProcess
from services.cli.startup import wait_until_up
from services.cli.state_folder import StateFolder, control_socket
from services.core.errors import InvalidRequestError, UnavailableError
from services.core.grpc_options import GRPC_ENVIRONMENT
from services.core.model_config import ModelConfig
from services.core.placement import plan_placement
from services.core.registry import Slot
from services.core.settings import Settings
from services.core.store_server import server_command

MALLOC_ENVIRONMENT = {
    # Keep large buffers in the heap: a third off a 512 KiB round trip (docs/performance.md).
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
_PROCESS_ENVIRONMENT = MALLOC_ENVIRONMENT | GRPC_ENVIRONMENT
STOP_SERVING_S = 7.0
STOP_WORKERS_S = 3.0
STOP_STORE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """What `expertfleet up` was asked for: each slot in `replicas` of the workers, of which there
    are `num_workers` for each replica. `autoscaling` None leaves it at that.

    `external_workers`: none are started, for others hold the experts and announce it in the store.
    `keeps_spare`: a process is kept ready for the next worker.
    """

    num_workers: int
    min_shards: int
    max_shards: int
    use_ray: bool
    store_bytes: int
    replicas: int = 1
    autoscaling: PolicyOptions | None = None
    external_workers: bool = False
    keeps_spare: bool = True

    @property
    def in_process_experts(self) -> bool:
        return self.num_workers == 0 and not self.external_workers

    @property
    def num_processes(self) -> int:
        return self.num_workers * self.replicas


class Fleet:
    """Start with `start`, then `watch` until it raises or is cancelled, then `stop`.

    The gateway listens on `listener`, which is closed in `stop`.
    """

    def __init__(
        self,
        settings: Settings,
        plan: FleetPlan,
        config: ModelConfig,
        folder: StateFolder,
        hardware: Hardware,
        listener: socket.socket,
        say: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._config = config
        self._folder = folder
        self._hardware = hardware
        self._listener = listener
        self._say = say
        self._settings = settings.override(state_dir=folder.path)
        self._spare = SpareProcess(_PROCESS_ENVIRONMENT, folder.log_file("spare"))
        self._store: Child | None = None
        self._front: Front | None = None
        self._workers = FleetWorkers(
            self._settings,
            num_planned=max(1, plan.num_processes),
            max_shards=plan.max_shards,
            hardware=hardware,
            make_child=self._child,
            say=say,
        )
        self._autoscaler = plan.autoscaling and FleetAutoscaler(self, plan.autoscaling)
        self._is_restarting = False
        self._control = ControlServer(
            control_socket(folder.run_folder),
            {"status": self._status, "restart": self._restart},
        )

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self._settings.host == "0.0.0.0" else self._settings.host
        return f"http://{host}:{self._settings.port}"

    async def start(self) -> None:
        """Bring everything up. Raises `ExpertfleetError` with the log of what would not start."""
        if self._settings.redis_url is None:
            await self._start_store()
        self._workers.settings = self._settings
        if self._plan.num_workers:
            placement = plan_placement(
                self._config.num_hidden_layers,
                self._config.num_local_experts,
                self._plan.num_workers,
            )
            await self._workers.start([part.slots() for part in placement] * self._plan.replicas)
        await self._start_front()
        if self._autoscaler:
            self._autoscaler.start(self._settings)
        if self._plan.num_workers and self._plan.keeps_spare:
            self._spare.start()
        await self._control.start()
        self._folder.record(url=self.url)

    async def watch(self) -> None:
        """Return never; raise when a process gave up for good."""
        watching = asyncio.create_task(self._workers.watch(), name="hangs")
        try:
            while not watching.done():
                self._workers.check()
                for child in (self._store, *(self._front.children if self._front else ())):
                    if child is not None:
                        child.check()
                await asyncio.sleep(0.5)
            await watching
        finally:
            watching.cancel()

    async def add_worker(self, slots: Sequence[Slot]) -> str:
        """Start one more worker with these slots; returns its id once it serves."""
        async with self._workers.changing:
            return await self._workers.add(slots)

    async def remove_worker(self, worker_id: str) -> None:
        """Drain a worker and end it. Raises `NotFoundError`."""
        async with self._workers.changing:
            await self._workers.remove(worker_id)

    async def stop(self) -> None:
        """End every process within ten seconds, those that take requests first."""
        await self._control.close()
        if self._autoscaler:
            await self._autoscaler.stop()
        if self._front is not None:
            await self._front.stop(STOP_SERVING_S)
        self._listener.close()
        await self._spare.stop()
        await self._workers.stop(STOP_WORKERS_S)
        if self._store is not None:
            await self._store.stop(STOP_STORE_S)

    async def _start_store(self) -> None:
        socket_path = self._folder.run_folder / "store.sock"
        self._store = self._child(
            "store",
            server_command(
                self._folder.run_folder,
                port=None,
                unix_socket=socket_path,
                maxmemory_bytes=self._plan.store_bytes,
            ),
        )
        self._settings = self._settings.override(redis_url=f"unix://{socket_path}")
        self._workers.settings = self._settings
        await self._store.start()
        await wait_until_up("store", self._store_answers, [self._store], timeout_s=20)

    async def _store_answers(self) -> bool:
        await self._workers.ready()
        return True

    async def _start_front(self) -> None:
        started = time.monotonic()
        self._front = self._make_front()
        await self._front.start(self._workers.children)
        self._say(f"gateway and shards ready ({time.monotonic() - started:.1f} s)")

    def _make_front(self) -> Front:
        plan, settings = self._plan, self._front_settings()
        run_folder = self._folder.run_folder
        if not plan.use_ray:
            return LocalFront(
                settings,
                self._listener,
                run_folder,
                self._child,
                in_process_experts=plan.in_process_experts,
            )
        return RayFront(
            settings,
            self._listener,
            run_folder,
            self._child,
            in_process_experts=plan.in_process_experts,
            min_shards=plan.min_shards,
            max_shards=plan.max_shards,
            num_gpus=self._hardware.num_gpus if settings.device != "cpu" else 0,
        )

    def _front_settings(self) -> Settings:
        threads = self._settings.num_threads
        if threads is None:
            threads = self._hardware.shard_threads(self._plan.max_shards)
        return self._settings.override(num_threads=threads)

    async def _restart(self, request: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        what, model = parse_what(request.get("what")), request.get("model")
        if model is not None and what != "all":
            raise InvalidRequestError("another model needs `restart all`")
        if self._plan.external_workers and (model is not None or what == "workers"):
            raise InvalidRequestError("the expert workers are not of this launcher")
        if self._is_restarting or self._front is None:
            raise UnavailableError("a restart is under way; wait until it is done")

        def tell(text: str) -> None:
            self._say(f"restart: {text}")
            progress(text)

        started = time.monotonic()
        self._is_restarting = True
        await self._spare.renew()  # the code may have changed
        if self._autoscaler:
            # It would take the second worker of each slot for a replica too many.
            await self._autoscaler.stop()
        try:
            async with self._workers.changing:
                restart = RollingRestart(self._workers, self._front, tell)
                if model is None:
                    await restart.renew(what, self._settings)
                else:
                    self._settings = await restart.change_model(str(model), self._settings)
        finally:
            self._is_restarting = False
            if self._autoscaler:
                self._autoscaler.start(self._settings)
        tell(f"done in {time.monotonic() - started:.1f} s")
        return {"elapsed_s": time.monotonic() - started}

    async def _status(self, _: Mapping[str, Any], __: Progress) -> Mapping[str, Any]:
        front = self._front.children if self._front is not None else []
        return {
            "url": self.url,
            "model": self._settings.model,
            "is_restarting": self._is_restarting,
            "processes": [
                *([_process("store", self._store)] if self._store is not None else []),
                *self._workers.status(),
                *self._spare.status(),
                *(_process("gateway and shards", child) for child in front),
            ],
        }

    def _child(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> Child:
        spec = ChildSpec(
            name=name,
            command=command,
            log_file=self._folder.log_file(name),
            environment=_PROCESS_ENVIRONMENT | dict(environment or {}),
        )
        return Child(spec, self._say, self._spare.spawn)


def _process(name: str, child: Child) -> dict[str, object]:
    return {
        "name": name,
        "pid": child.pid,
        "state": child.state,
        "restarts": child.num_restarts,
        "holds": "",
    }
