"""Gateway and shards as the launcher sees them: one child process, or two during a restart."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from router_service.ray_environment import new_ray_token, ray_environment
from services.cli.child import Child
from services.cli.control import ask
from services.cli.startup import (
    fits_beside,
    memory_available,
    resident_bytes,
    wait_until_up,
)
from services.core.listening_socket import ListenerOffer
from services.core.settings import Settings

MakeChild = Callable[[str, Sequence[str], Mapping[str, str]], Child]

_SLACK_S = 5.0
_NAME = "serve"


class Front(ABC):
    """Serves `listener`. Settings given to a restart hold from then on, for later starts too."""

    is_one_process = False
    """Whether restarting the shards restarts the gateway with them."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        run_folder: Path,
        make_child: MakeChild,
        *,
        in_process_experts: bool,
    ) -> None:
        self._listener = listener
        self._offer = ListenerOffer(listener, run_folder / "listen.sock", self._on_taken)
        self._settings = settings.override(listen_socket=run_folder / "listen.sock")
        self._make_child = make_child
        self._in_process_experts = in_process_experts
        self._taken_by: set[int] = set()
        self._child: Child | None = None

    @property
    def children(self) -> list[Child]:
        return [self._child] if self._child is not None else []

    async def start(self, also_needed: Sequence[Child]) -> None:
        """Return once requests are answered; `also_needed` is who must not die meanwhile."""
        self._offer.start()
        self._child = self._make()
        await self._child.start()
        await wait_until_up("gateway", self._answers, [self._child, *also_needed])

    @abstractmethod
    async def restart_shards(self, settings: Settings) -> None:
        """Start the shards anew, one after the other."""

    @abstractmethod
    async def restart_gateway(self, settings: Settings) -> None:
        """Start a new gateway on the same socket, then drain the old one."""

    @abstractmethod
    async def replace(self, settings: Settings) -> None:
        """Start shards and gateway of another model; what was accepted ends on the old ones."""

    async def stop(self, timeout_s: float) -> None:
        # From now on connections are refused as soon as the gateway lets go of the socket.
        await self._offer.close()
        self._listener.close()
        await asyncio.gather(*(child.stop(timeout_s) for child in self.children))

    @abstractmethod
    def _make(self) -> Child: ...

    def _use(self, settings: Settings) -> None:
        self._settings = settings.override(listen_socket=self._settings.listen_socket)

    def _on_taken(self, pid: int) -> None:
        self._taken_by.add(pid)

    async def _answers(self) -> bool:
        host, port, *_ = self._listener.getsockname()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        netloc = f"[{host}]" if ":" in host else host
        async with httpx.AsyncClient(timeout=5) as client:
            response = await client.get(f"http://{netloc}:{port}/readyz")
        return response.is_success


class RayFront(Front):
    """Ray Serve restarts its replicas itself; here it is told to."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        run_folder: Path,
        make_child: MakeChild,
        *,
        in_process_experts: bool,
        min_shards: int,
        max_shards: int,
        num_gpus: int,
    ) -> None:
        super().__init__(
            settings, listener, run_folder, make_child, in_process_experts=in_process_experts
        )
        self._min_shards = min_shards
        self._max_shards = max_shards
        self._num_gpus = num_gpus
        self._ray_dir = run_folder / "ray"
        self._control = run_folder / "serve.sock"
        self._ray_environment = ray_environment(self._ray_dir, token=new_ray_token())

    async def restart_shards(self, settings: Settings) -> None:
        # More than one shard's memory: what Ray itself takes is among it.
        wanted = resident_bytes(self._child.pid if self._child else None) // self._min_shards
        surge = fits_beside(wanted, memory_available())
        await self._tell("restart_shards", settings, surge=surge)

    async def restart_gateway(self, settings: Settings) -> None:
        await self._tell("restart_gateway", settings)

    async def replace(self, settings: Settings) -> None:
        await self._tell("replace", settings)

    async def _tell(self, command: str, settings: Settings, **details: bool) -> None:
        settings = settings.override(
            listen_socket=self._settings.listen_socket, num_threads=self._settings.num_threads
        )
        values = settings.model_dump(mode="json", exclude_none=True)
        await ask(self._control, {"command": command, "settings": values, **details})
        self._use(settings)
        if self._child is not None:
            self._child.spec = self._make().spec

    def _make(self) -> Child:
        command = [sys.executable, "-m", "services.cli.serve_ray"]
        command += ["--min-shards", str(self._min_shards), "--max-shards", str(self._max_shards)]
        command += ["--ray-dir", str(self._ray_dir), "--num-gpus", str(self._num_gpus)]
        command += ["--control-socket", str(self._control)]
        if self._in_process_experts:
            command.append("--in-process-experts")
        environment = self._settings.as_environment() | dict(self._ray_environment)
        return self._make_child(_NAME, command, environment)


class LocalFront(Front):
    """One process is gateway and shard: its successor takes the socket, then it drains."""

    is_one_process = True
    _old: Child | None = None

    @property
    def children(self) -> list[Child]:
        return [child for child in (self._child, self._old) if child is not None]

    async def restart_shards(self, settings: Settings) -> None:
        await self.replace(settings)

    async def restart_gateway(self, settings: Settings) -> None:
        await self.replace(settings)

    async def replace(self, settings: Settings) -> None:
        assert self._child is not None
        before = self._settings
        self._use(settings.override(num_threads=before.num_threads))
        bound_s = self._settings.restart_drain_s + self._settings.drain_timeout_s + _SLACK_S
        new = self._make()
        if self._has_room():
            try:
                await new.start()
                await wait_until_up("the new process", lambda: self._serves(new), [new])
            except BaseException:
                self._settings = before
                await new.stop(1.0)
                raise
            self._child, self._old = new, self._child
            await self._old.stop(bound_s, number=signal.SIGUSR1)
            self._old = None
        else:
            # Connections wait in the socket's queue until the new process takes it.
            await self._child.restart(new.spec, bound_s, number=signal.SIGUSR1)
            child = self._child
            await wait_until_up("the new process", lambda: self._serves(child), [child])

    def _has_room(self) -> bool:
        if self._settings.device not in ("cpu", "auto"):
            return False
        wanted = resident_bytes(self._child.pid if self._child else None)
        return fits_beside(wanted, memory_available())

    async def _serves(self, child: Child) -> bool:
        return child.pid in self._taken_by

    def _make(self) -> Child:
        command = [sys.executable, "-m", "services.cli.serve_local"]
        if self._in_process_experts:
            command.append("--in-process-experts")
        return self._make_child(_NAME, command, self._settings.as_environment())
