"""Dispatch to real worker processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from router_service.dispatch.dispatcher import RemoteExperts
from router_service.dispatch.local_experts import LocalExperts
from router_service.experts import StepContext
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.placement import plan_placement
from services.core.redis_registry import RedisRegistry
from services.core.registry import Registry
from services.core.registry_json import format_ranges
from services.core.static_registry import StaticRegistry
from services.core.store_server import StoreServer
from tests.support.checkpoints import make_checkpoint
from tests.support.eventually import eventually
from tests.support.moe_layers import random_gate
from tests.support.proxy import FaultProxy
from tests.support.redis_server import running_redis
from tests.support.worker_process import WorkerProcess, running_worker

NUM_LAYERS, NUM_EXPERTS = 2, 4

NOTICEABLE_S = 10.0
"""Far above the 0.5 s that `make faults` looks for on a quiet machine, and far below the 30 s
after which a call is given up: only waiting for a lost answer takes as long."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def local(model: Path) -> Iterator[LocalExperts]:
    """The experts in process, computed with as many threads as a worker has."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield LocalExperts.load(
        Checkpoint.open(str(model)), dtype=torch.bfloat16, device=torch.device("cpu")
    )
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with running_redis(tmp_path_factory.mktemp("store")) as server:
        yield server


class Fleet:
    """Starts workers of one fleet in the store; they end with the test."""

    def __init__(self, stack: ExitStack, model: Path, store: StoreServer, name: str) -> None:
        self._stack = stack
        self._model = model
        self._environment = {"REDIS_URL": store.url, "EXPERTFLEET_FLEET": name}
        self.registry = RedisRegistry(store.url, fleet=name)

    def start(self, worker_id: str, experts: str, *arguments: str, **options: Any) -> WorkerProcess:
        return self._stack.enter_context(
            running_worker(
                self._model,
                experts,
                *("--worker-id", worker_id, *arguments),
                environment=self._environment,
                **options,
            )
        )

    def start_all(self, **experts: str) -> list[WorkerProcess]:
        """Start workers at once, by id; return when all are ready."""
        with ThreadPoolExecutor() as pool:
            started = [pool.submit(self.start, *item) for item in experts.items()]
            return [future.result() for future in started]


@pytest.fixture
def fleet(model: Path, store: StoreServer, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    name = "".join(c if c.isalnum() else "-" for c in request.node.name.lower())
    with ExitStack() as stack:
        yield Fleet(stack, model, store, name)


@asynccontextmanager
async def connected(
    model: Path, registry: Registry, **options: Any
) -> AsyncIterator[RemoteExperts]:
    config = Checkpoint.open(str(model)).config
    experts = RemoteExperts(config, registry=registry, dtype=torch.bfloat16, **options)
    try:
        await experts.wait_ready()
        yield experts
    finally:
        await experts.close()


async def check_call(
    remote: RemoteExperts, local: LocalExperts, *, num_tokens: int = 7, micro_batch: int = 0
) -> None:
    """One random call has the bits of the same call in process."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    hidden_states = torch.randn(num_tokens, 64, generator=generator).bfloat16()
    ids, weights = random_gate(generator, num_tokens=num_tokens, num_experts=NUM_EXPERTS, top_k=2)
    layer = int(torch.randint(NUM_LAYERS, (), generator=generator))
    context = StepContext(micro_batch=micro_batch)
    expected = await local.forward(layer, hidden_states, ids, weights, context)
    assert torch.equal(await remote.forward(layer, hidden_states, ids, weights, context), expected)


class Load:
    """Calls one after the other on several streams at once, each checked, until stopped."""

    def __init__(self, remote: RemoteExperts, local: LocalExperts, num_streams: int = 2) -> None:
        self.num_calls = 0
        self.longest_gap_s = 0.0
        self._is_stopping = False
        self._tasks = [
            asyncio.create_task(self._run(remote, local, stream)) for stream in range(num_streams)
        ]

    async def calls(self, count: int, timeout_s: float = 90.0) -> None:
        """Return when so many more calls were answered."""
        goal = self.num_calls + count
        await eventually(
            lambda: self.num_calls >= goal or any(task.done() for task in self._tasks),
            timeout_s=timeout_s,
        )

    async def stop(self) -> None:
        """Raises what any call raised."""
        self._is_stopping = True
        await asyncio.gather(*self._tasks)

    async def _run(self, remote: RemoteExperts, local: LocalExperts, stream: int) -> None:
        while not self._is_stopping:
            started = time.monotonic()
            await check_call(remote, local, micro_batch=stream)
            self.longest_gap_s = max(self.longest_gap_s, time.monotonic() - started)
            self.num_calls += 1


@pytest.mark.parametrize("num_workers", [1, 4])
async def test_real_workers_give_the_bits_of_the_experts_in_process(
    num_workers: int, fleet: Fleet, model: Path, local: LocalExperts
) -> None:
    with ThreadPoolExecutor() as pool:
        for index, part in enumerate(plan_placement(NUM_LAYERS, NUM_EXPERTS, num_workers)):
            experts, layers = format_ranges(part.experts), format_ranges(part.layers)
            pool.submit(fleet.start, f"w{index}", experts, "--layers", layers, wait_ready=False)
    async with connected(model, fleet.registry) as remote:
        for num_tokens in (1, 2, 16, 17, 200):
            for micro_batch in (0, 1):
                await check_call(remote, local, num_tokens=num_tokens, micro_batch=micro_batch)
        await asyncio.gather(*(check_call(remote, local, micro_batch=m) for m in range(4)))
        assert len(remote.slot_digests()) == NUM_LAYERS * NUM_EXPERTS


async def test_workers_of_a_static_list_are_found_without_a_store(
    model: Path, local: LocalExperts
) -> None:
    with (
        running_worker(model, "0,1", wait_ready=False) as first,
        running_worker(model, "2,3", wait_ready=False) as second,
    ):
        registry = StaticRegistry([first.endpoint, second.endpoint, "127.0.0.1:1"])
        async with connected(model, registry) as remote:
            await check_call(remote, local)


async def test_no_call_is_lost_or_wrong_when_an_only_worker_is_killed_and_restarted(
    fleet: Fleet, model: Path, local: LocalExperts
) -> None:
    """Restarted as it was, at another port, and at last under another name."""
    _, killed = fleet.start_all(steady="0,1", killed="2,3")
    port = killed.endpoint.rpartition(":")[2]
    async with connected(model, fleet.registry) as remote:
        load = Load(remote, local)
        for name, arguments in (("killed", ("--port", port)), ("killed", ()), ("new", ())):
            await load.calls(20)
            killed.process.kill()
            killed.process.wait()
            killed = await asyncio.to_thread(fleet.start, name, "2,3", *arguments)
            ready_at = time.monotonic()
            await load.calls(20)
            resumed_s = time.monotonic() - ready_at
            print(f"{name} {arguments}: 20 calls {resumed_s:.3f} s after the worker was ready")
            assert resumed_s < NOTICEABLE_S, killed.log
        await load.stop()


@pytest.fixture(scope="module")
def replicas(model: Path) -> Iterator[tuple[WorkerProcess, WorkerProcess]]:
    """Two workers that hold everything."""
    with (
        running_worker(model, "0-3", wait_ready=False) as faulty,
        running_worker(model, "0-3", wait_ready=False) as steady,
    ):
        for worker in (faulty, steady):
            worker.wait_ready()
        yield faulty, steady


@pytest.mark.parametrize("fault", ["stopped", "slow", "cut", "half-open", "killed"])
async def test_a_fault_of_one_of_two_replicas_costs_a_moment_and_no_call(
    fault: str, replicas: tuple[WorkerProcess, WorkerProcess], model: Path, local: LocalExperts
) -> None:
    faulty, steady = replicas
    host, _, port = faulty.endpoint.rpartition(":")
    proxy = FaultProxy()
    try:
        route = proxy.listen(("127.0.0.1", 0), (host, int(port)))
        registry = StaticRegistry([f"127.0.0.1:{proxy.port_of(route)}", steady.endpoint])
        async with connected(model, registry) as remote:
            await eventually(lambda: len(remote._pool.view.links) == 2)
            load = Load(remote, local)
            await load.calls(100)
            load.longest_gap_s = 0.0
            inject = {
                "stopped": lambda: os.kill(faulty.process.pid, signal.SIGSTOP),
                "slow": lambda: proxy.delay(route, 0.25),
                "cut": lambda: proxy.cut(route, refuse=True),
                "half-open": lambda: proxy.silence(route),
                "killed": faulty.process.kill,
            }[fault]
            inject()
            injected_at = time.monotonic()
            try:
                while time.monotonic() - injected_at < 1.5:
                    await load.calls(20)
            finally:
                if fault == "stopped":
                    os.kill(faulty.process.pid, signal.SIGCONT)
                elif fault != "killed":
                    proxy.restore(route)
            await load.calls(20)
            gap_s = load.longest_gap_s
            await load.stop()
            print(f"{fault}: longest call {gap_s:.3f} s")
            assert gap_s <= NOTICEABLE_S
            assert steady.process.poll() is None
    finally:
        proxy.close()


async def test_a_worker_that_is_drained_under_load_loses_no_call_and_exits_cleanly(
    fleet: Fleet, model: Path, local: LocalExperts
) -> None:
    drained, _ = fleet.start_all(drained="0-3", other="0-3")
    async with connected(model, fleet.registry) as remote:
        await eventually(lambda: len(remote._pool.view.links) == 2)
        load = Load(remote, local)
        await load.calls(20)
        drained.terminate()
        assert await asyncio.to_thread(drained.wait) == 0
        await load.calls(20)
        await load.stop()


async def test_dispatch_outlives_the_store_and_finds_a_restarted_worker_once_it_is_back(
    model: Path, local: LocalExperts, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        first_store = stack.enter_context(running_redis(tmp_path))
        fleet = Fleet(stack, model, first_store, "outlive")
        workers = fleet.start_all(a="0,1", b="2,3")
        async with connected(model, fleet.registry) as remote:
            load = Load(remote, local)
            await load.calls(20)
            first_store.stop()
            await load.calls(20)
            workers[1].process.kill()
            port = workers[1].endpoint.rpartition(":")[2]
            # Same name and address: the link finds it again without the store.
            await asyncio.to_thread(fleet.start, "b", "2,3", "--port", port)
            await load.calls(20)
            await load.stop()
