"""Lanes to real worker processes give what gRPC gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from router_service.dispatch.dispatcher import RemoteExperts
from router_service.dispatch.lane_choice import chosen_transport
from router_service.dispatch.local_experts import LocalExperts
from router_service.experts import StepContext
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.settings import DispatchTransportName
from services.core.static_registry import StaticRegistry
from tests.support.checkpoints import make_checkpoint
from tests.support.eventually import eventually
from tests.support.kernels import built_library
from tests.support.moe_layers import random_gate
from tests.support.worker_process import WorkerProcess, running_worker

NUM_LAYERS, NUM_EXPERTS, HIDDEN_SIZE = 2, 4, 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def workers(model: Path) -> Iterator[list[WorkerProcess]]:
    """Two with two experts each, and a replica of the second."""
    built_library()
    with (
        running_worker(model, "0,1", wait_ready=False) as first,
        running_worker(model, "2,3", wait_ready=False) as second,
        running_worker(model, "2,3", wait_ready=False) as replica,
    ):
        yield [first, second, replica]


async def check_call(
    remote: RemoteExperts, local: LocalExperts, num_tokens: int, context: StepContext
) -> None:
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    hidden_states = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator).bfloat16()
    ids, weights = random_gate(generator, num_tokens=num_tokens, num_experts=NUM_EXPERTS, top_k=2)
    layer = int(torch.randint(NUM_LAYERS, (), generator=generator))
    expected = await local.forward(layer, hidden_states, ids, weights, context)
    assert torch.equal(await remote.forward(layer, hidden_states, ids, weights, context), expected)


@pytest.mark.parametrize("transport", ["lane", "auto", "grpc"])
async def test_every_transport_gives_the_bits_of_the_experts_in_process_and_outlives_a_worker(
    transport: DispatchTransportName, model: Path, workers: list[WorkerProcess]
) -> None:
    checkpoint = Checkpoint.open(str(model))
    local = LocalExperts.load(checkpoint, dtype=torch.bfloat16, device=torch.device("cpu"))
    endpoints = [worker.endpoint for worker in workers if worker.process.poll() is None]
    remote = RemoteExperts(
        checkpoint.config,
        registry=StaticRegistry(endpoints),
        dtype=torch.bfloat16,
        transport=chosen_transport(transport, max_frame_bytes=1 << 20),
    )
    try:
        await remote.wait_ready()
        await eventually(lambda: len(remote._pool.view.links) == len(endpoints))
        for num_tokens in (1, 2, 16, 17, 200, 3000):
            for micro_batch in (0, 1):
                context = StepContext(micro_batch=micro_batch)
                await check_call(remote, local, num_tokens, context)
        if transport == "auto":
            workers[2].process.kill()
            for _ in range(20):
                await check_call(remote, local, 8, StepContext())
            workers[2].process.wait()
    finally:
        await remote.close()
