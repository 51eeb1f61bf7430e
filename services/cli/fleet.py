"""The processes of one product on one machine: what is started, in which order, and its end.

    store -> expert workers -> gateway and shards (Ray, or one process with --no-ray)

Each waits for those before it, and all are supervised: what dies is started again.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from router_service.ray_environment import new_ray_token, ray_environment
from services.cli.child import Child, ChildSpec
from services.cli.hardware import Hardware
from services.cli.state_folder import StateFolder
from services.core.errors import ExpertfleetError, UnavailableError
from services.core.grpc_options import GRPC_ENVIRONMENT
from services.core.model_config import ModelConfig
from services.core.placement import WorkerSlots, plan_placement
from services.core.redis_registry import RedisRegistry
from services.core.registry import WorkerRecord
from services.core.settings import Settings
from services.core.store_server import server_command

MALLOC_ENVIRONMENT = {
    # Keep large buffers in the heap: a third off a 512 KiB round trip (docs/performance.md).
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
STOP_SERVING_S = 7.0
STOP_WORKERS_S = 3.0
STOP_STORE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """What `expertfleet up` was asked for."""

    num_workers: int
    min_shards: int
    max_shards: int
    use_ray: bool
    store_bytes: int

    @property
    def in_process_experts(self) -> bool:
        return self.num_workers == 0


class Fleet:
    """Start with `start`, then `watch` until it raises or is cancelled, then `stop`."""

    def __init__(
        self,
        settings: Settings,
        plan: FleetPlan,
        config: ModelConfig,
        folder: StateFolder,
        hardware: Hardware,
        say: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._config = config
        self._folder = folder
        self._hardware = hardware
        self._say = say
        self._store: Child | None = None
        self._workers: list[Child] = []
        self._front: Child | None = None
        self._settings = settings.override(state_dir=folder.path)

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self._settings.host == "0.0.0.0" else self._settings.host
        return f"http://{host}:{self._settings.port}"

    async def start(self) -> None:
        """Bring everything up. Raises `ExpertfleetError` with the log of what would not start."""
        if self._settings.redis_url is None:
            await self._start_store()
        if not self._plan.in_process_experts:
            await self._start_workers()
        await self._start_front()
        self._folder.record(url=self.url)

    async def watch(self) -> None:
        """Return never; raise when a process gave up for good."""
        while True:
            for child in self._children():
                child.check()
            await asyncio.sleep(0.5)

    async def stop(self) -> None:
        """End every process within ten seconds, those that take requests first."""
        if self._front is not None:
            await self._front.stop(STOP_SERVING_S)
        await asyncio.gather(*(worker.stop(STOP_WORKERS_S) for worker in self._workers))
        if self._store is not None:
            await self._store.stop(STOP_STORE_S)

    async def _start_store(self) -> None:
        socket = self._folder.run_folder / "store.sock"
        self._store = self._child(
            "store",
            server_command(
                self._folder.run_folder,
                port=None,
                unix_socket=socket,
                maxmemory_bytes=self._plan.store_bytes,
            ),
        )
        self._settings = self._settings.override(redis_url=f"unix://{socket}")
        await self._store.start()
        await self._wait("store", self._store_answers, [self._store], timeout_s=20)

    async def _start_workers(self) -> None:
        started = time.monotonic()
        placement = plan_placement(
            self._config.num_hidden_layers, self._config.num_local_experts, self._plan.num_workers
        )
        for index, slots in enumerate(placement):
            worker = self._child(
                f"expert-{index}", self._worker_command(index, slots), self._worker_settings(index)
            )
            self._workers.append(worker)
            await worker.start()
        ready: set[str] = set()

        async def all_ready() -> bool:
            for record in await self._ready_workers():
                if record.worker_id not in ready:
                    ready.add(record.worker_id)
                    self._say(
                        f"{record.worker_id}: {len(record.slots)} experts, "
                        f"{record.weight_bytes / 2**20:.0f} MiB on {record.device} "
                        f"({time.monotonic() - started:.1f} s)"
                    )
            return len(ready) >= len(placement)

        await self._wait("expert workers", all_ready, self._workers, timeout_s=1800)

    async def _start_front(self) -> None:
        started = time.monotonic()
        self._front = self._child("serve", self._front_command(), self._front_environment())
        await self._front.start()
        children = [self._front, *self._workers]
        await self._wait("gateway", self._gateway_answers, children, timeout_s=1800)
        self._say(f"gateway and shards ready ({time.monotonic() - started:.1f} s)")

    def _front_command(self) -> list[str]:
        plan = self._plan
        module = "services.cli.serve_ray" if plan.use_ray else "services.cli.serve_local"
        command = [sys.executable, "-m", module]
        if plan.in_process_experts:
            command.append("--in-process-experts")
        if plan.use_ray:
            gpus = self._hardware.num_gpus if self._settings.device != "cpu" else 0
            command += ["--min-shards", str(plan.min_shards), "--max-shards", str(plan.max_shards)]
            command += ["--ray-dir", str(self._folder.run_folder / "ray"), "--num-gpus", str(gpus)]
        return command

    def _front_environment(self) -> Mapping[str, str]:
        threads = self._settings.num_threads
        if threads is None:
            threads = self._hardware.shard_threads(self._plan.max_shards)
            if self._plan.in_process_experts:
                threads = max(1, self._hardware.num_cores // self._plan.max_shards)
        environment = self._settings.override(num_threads=threads).as_environment()
        if self._plan.use_ray:
            environment |= ray_environment(self._folder.run_folder / "ray", token=new_ray_token())
        return environment

    def _worker_command(self, index: int, slots: WorkerSlots) -> list[str]:
        command = [sys.executable, "-m", "expert_service", "--worker-id", f"expert-{index}"]
        command += ["--experts", ",".join(map(str, slots.experts))]
        command += ["--layers", f"{slots.layers.start}-{slots.layers.stop - 1}"]
        return [*command, "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]

    def _worker_settings(self, index: int) -> Mapping[str, str]:
        settings = self._settings
        threads = settings.num_threads or self._hardware.worker_threads(self._plan.num_workers)
        device = self._hardware.worker_device(index, self._plan.max_shards, settings.device)
        return settings.override(num_threads=threads, device=device).as_environment()

    def _child(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> Child:
        spec = ChildSpec(
            name=name,
            command=command,
            log_file=self._folder.log_file(name),
            environment=MALLOC_ENVIRONMENT | GRPC_ENVIRONMENT | dict(environment or {}),
        )
        return Child(spec, self._say)

    def _children(self) -> list[Child]:
        return [child for child in (self._store, *self._workers, self._front) if child is not None]

    async def _ready_workers(self) -> list[WorkerRecord]:
        registry = RedisRegistry(self._settings.redis_url or "", fleet=self._settings.fleet)
        try:
            snapshot = await registry.snapshot()
        finally:
            await registry.close()
        return [record for record in snapshot.workers if record.state == "ready"]

    async def _store_answers(self) -> bool:
        await self._ready_workers()
        return True

    async def _gateway_answers(self) -> bool:
        async with httpx.AsyncClient(timeout=5) as client:
            response = await client.get(f"{self.url}/readyz")
        return response.is_success

    async def _wait(
        self,
        what: str,
        condition: Callable[[], Awaitable[bool]],
        children: Sequence[Child],
        timeout_s: float,
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if await condition():
                    return
            except (httpx.HTTPError, ExpertfleetError):
                pass
            for child in children:
                child.check()
                if child.num_restarts > 3:
                    raise UnavailableError(
                        f"{child.spec.name} dies again and again:\n{child.last_words()}\n"
                        f"(log: {child.spec.log_file})"
                    )
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"{what} not ready within {timeout_s:.0f} s; logs: {self._folder.path / 'logs'}"
                )
            await asyncio.sleep(0.1)
