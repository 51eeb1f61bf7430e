"""The started product with a second worker for every expert, reached through a proxy.

`expertfleet up` runs two workers, which its supervisor restarts, and two shards. The scene adds a
replica of each worker, run by itself, that the shards reach at 127.0.0.2 through a proxy: the
network between them can be made to fail. Every fault happens to this one scene.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis

from services.core.kernels.library import native_library
from tests.support.product import REPOSITORY, Product, free_port
from tests.support.proxy import FaultProxy, Route
from tests.support.waiting import wait_until

NUM_WORKERS = 2
NUM_SHARDS = 2
WHOLE_TIMEOUT_S = 180.0
MAX_WAITING_TOKENS = 32768
"""A bound on queued work that 32 streams stay far below and ten times as many do not."""
_PROXIED_HOST = "127.0.0.2"


@dataclass(slots=True, kw_only=True)
class Replica:
    """A worker of the scene's own. `ports`: of gRPC and of its lanes, each behind a route."""

    worker_id: str
    experts: str
    ports: tuple[int, int]
    routes: list[Route]
    process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Scene:
    """Started by `start`, ended by `stop`."""

    def __init__(self, folder: Path, *, num_shards: int = NUM_SHARDS) -> None:
        self.folder = folder
        self.num_shards = num_shards
        self.proxy = FaultProxy()
        self.product = Product(
            folder / "state",
            *("--workers", str(NUM_WORKERS), "--shards", str(num_shards)),
            *(["--reproducible"] if native_library() else ["--dtype", "float32"]),
            environment={"EXPERTFLEET_MAX_WAITING_TOKENS": str(MAX_WAITING_TOKENS)},
        )
        self.replicas: dict[str, Replica] = {}
        self._environment: dict[str, str] = {}

    def start(self) -> Scene:
        atexit.register(self.stop)
        self.product.start()
        # As the product's own workers have it: store, model, numerics, threads.
        self._environment = self.own_worker(0).environ() | {"PYTHONPATH": str(REPOSITORY)}
        for number, worker in enumerate(self.workers()):
            experts = ",".join(map(str, worker["experts"]))
            ports = (free_port(), free_port())
            replica = Replica(
                worker_id=f"replica-{number}",
                experts=experts,
                ports=ports,
                routes=[
                    self.proxy.listen((_PROXIED_HOST, port), ("127.0.0.1", port)) for port in ports
                ],
            )
            self.replicas[replica.worker_id] = replica
            self.start_replica(replica)
        self.wait_whole()
        return self

    def stop(self) -> None:
        atexit.unregister(self.stop)
        for replica in self.replicas.values():
            if replica.process is not None:
                replica.process.kill()
                replica.process.wait()
        if self.product.process is not None:
            self.product.stop()
        self.proxy.close()

    # What there is

    @property
    def url(self) -> str:
        return self.product.url

    def workers(self) -> list[dict[str, Any]]:
        return list(self.product.experts()["workers"])

    def shards(self) -> list[dict[str, Any]]:
        return list(self.product.experts()["shards"])

    def own_worker(self, number: int) -> psutil.Process:
        """One of the product's own workers; their names change when they are replaced."""
        own = [each for each in self.workers() if each["worker_id"] not in self.replicas]
        return psutil.Process(own[number % len(own)]["pid"])

    def store_process(self) -> psutil.Process:
        for process in self.product.family():
            with contextlib.suppress(psutil.Error):
                if "valkey" in process.name() or "redis" in process.name():
                    return process
        raise AssertionError("the store does not run")

    @property
    def store_socket(self) -> Path:
        instance = json.loads((self.product.state_dir / "instance.json").read_text())
        return Path(instance["run_folder"]) / "store.sock"

    @contextlib.contextmanager
    def store(self, socket: Path | None = None) -> Iterator[redis.Redis]:
        client = redis.Redis.from_url(f"unix://{socket or self.store_socket}", socket_timeout=5)
        try:
            yield client
        finally:
            client.close()

    def processes(self) -> dict[int, str]:
        """Role by pid of all processes of the product and the scene's replicas."""
        found = {}
        assert self.product.process is not None
        replicas = {r.process.pid: r.worker_id for r in self.replicas.values() if r.process}
        for process in [psutil.Process(self.product.process.pid), *self.product.family()]:
            with contextlib.suppress(psutil.Error):
                found[process.pid] = _role(process.cmdline(), process.name())
        return found | {pid: name for pid, name in replicas.items() if psutil.pid_exists(pid)}

    # Replicas

    def start_replica(self, replica: Replica) -> None:
        command = [sys.executable, "-m", "tests.faults.shifted_clock", "expert_service"]
        command += ["--worker-id", replica.worker_id, "--experts", replica.experts]
        command += ["--host", "127.0.0.1", "--port", str(replica.ports[0])]
        command += ["--advertised-host", _PROXIED_HOST]
        with (self.folder / f"{replica.worker_id}.log").open("ab") as log:
            replica.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=self._environment | {"EXPERTFLEET_LANE_PORT": str(replica.ports[1])},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def retire_replicas(self) -> None:
        """Drain the scene's own workers and end them: no expert has a replica then."""
        for replica in self.replicas.values():
            if replica.is_running:
                assert replica.process is not None
                replica.process.send_signal(signal.SIGTERM)
                replica.process.wait(timeout=90)

    # Whole

    def wait_whole(self, timeout_s: float = WHOLE_TIMEOUT_S) -> float:
        """Return the seconds it took until every process is back and known to the others."""
        started = time.monotonic()
        for replica in self.replicas.values():
            if not replica.is_running:
                self.start_replica(replica)
        wait_until(self._is_whole, timeout_s=timeout_s, what=f"whole again\n{self.state()}")
        return time.monotonic() - started

    def wait_session_stored(self, session_id: str, timeout_s: float = 90.0) -> None:
        """Return once a session can be kept: the store is used again."""
        body = {"prompt": [11] * 48, "max_tokens": 4, "session_id": session_id}

        def is_stored() -> bool:
            try:
                asked = httpx.post(f"{self.url}/v1/completions", json=body, timeout=30)
                found = httpx.get(f"{self.url}/v1/sessions/{session_id}", timeout=10)
            except httpx.HTTPError:
                return False
            return asked.is_success and found.is_success and found.json()["num_blocks"] >= 1

        wait_until(is_stored, timeout_s=timeout_s, what="a session that is stored")

    def state(self) -> str:
        try:
            experts = self.product.experts()
        except httpx.HTTPError as error:
            return f"/v1/experts: {error}"
        workers = {each["worker_id"]: each["state"] for each in experts["workers"]}
        shards = [each["shard_id"] for each in experts["shards"]]
        return f"workers {workers}, shards {shards}, missing {experts['missing']}"

    def _is_whole(self) -> bool:
        try:
            experts = self.product.experts()
        except (httpx.HTTPError, ValueError):
            return False
        ready = {each["worker_id"] for each in experts["workers"] if each["state"] == "ready"}
        pids = [each["pid"] for each in experts["workers"] + experts["shards"]]
        return (
            len(ready) >= 2 * NUM_WORKERS
            and len(experts["shards"]) == self.num_shards
            and all(psutil.pid_exists(pid) for pid in pids)
            and self.product.is_ready()
        )


def end_on_sigterm() -> None:
    """Let SIGTERM unwind the main thread, so that a scene is stopped and not left behind."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _role(command: list[str], name: str) -> str:
    """ "expert-0", "shard", "gateway", "store" or what the process calls itself."""
    text = " ".join(command)
    if "--worker-id" in command:
        return command[command.index("--worker-id") + 1]
    for part, role in (
        ("expert_service.spare", name if name.startswith("expert-") else "spare"),
        ("AttentionShard", "shard"),
        ("shard_server", "shard"),
        (":Gateway", "gateway"),
        ("services.cli.serve_ray", "serve"),
        ("services.cli up", "launcher"),
        ("valkey", "store"),
        ("redis", "store"),
    ):
        if part in text or part in name:
            return role
    return name
