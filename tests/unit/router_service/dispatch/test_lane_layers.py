"""Layers that run without Python between them, to fake workers behind real sockets."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from router_service.dispatch.dispatcher import RemoteExperts
from router_service.dispatch.lane_calls import LaneCalls
from router_service.dispatch.lane_layers import MAX_TOKENS
from router_service.dispatch.local_experts import LocalExperts
from router_service.experts import ExpertBackend, StepContext, StepIncidents
from router_service.model.decoder import MixtralDecoder
from services.core.errors import MalformedFrameError
from tests.support.eventually import eventually
from tests.support.fake_workers import FakeWorker, Fault
from tests.support.forward import HandEngine, HandSequence, Part, random_decoder
from tests.support.lane_workers import LaneWorker, lane_transport, lane_workers, remote

NUM_LAYERS = 5
STEPS = (
    ((0, 40), (1, 3)),
    ((0, MAX_TOKENS - 9), (1, 9)),
    ((0, 1), (1, 1)),
    ((1, 1),),
    ((0, MAX_TOKENS), (1, 1)),
    ((0, 1), (1, 1)),
)
"""Of every step the (sequence, number of its next tokens); the fifth has too many."""


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def workers(request: pytest.FixtureRequest) -> Iterator[list[LaneWorker]]:
    with lane_workers(3, num_experts=8, num_layers=NUM_LAYERS, dtype=request.param) as started:
        yield started


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers whose calls Python began."""
    layers: list[int] = []
    begin = LaneCalls.begin

    def counted(self: LaneCalls, layer: int, *arguments: Any) -> Any:
        layers.append(layer)
        return begin(self, layer, *arguments)

    monkeypatch.setattr(LaneCalls, "begin", counted)
    return layers


class Scene:
    """The same steps with the experts in process and on workers."""

    def __init__(self, workers: list[LaneWorker]) -> None:
        self.decoder: MixtralDecoder = random_decoder(workers[0].config, workers[0].dtype)
        self.local = LocalExperts(workers[0].model, {})
        self.tokens = torch.randint(3, 60, (2, 200)).tolist()

    async def forward(
        self, experts: ExpertBackend, context: StepContext | None = None
    ) -> tuple[Tensor, Tensor]:
        """Bits of all tokens' logits, and of the KV cache in the end."""
        engine = HandEngine(self.decoder, experts, num_blocks=128)
        sequences = [HandSequence(token_ids=list(tokens)) for tokens in self.tokens]
        with torch.inference_mode():
            logits = [
                await engine.step(
                    [Part(sequences[index], count, range(count)) for index, count in step], context
                )
                for step in STEPS
            ]
        return bits(torch.cat(logits)), bits(engine.kv_cache.tensor)

    async def check(self, experts: RemoteExperts, context: StepContext | None = None) -> None:
        expected = await self.forward(self.local)
        for found, wanted in zip(await self.forward(experts, context), expected, strict=True):
            assert torch.equal(found, wanted)


def bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32}[values.itemsize])


async def test_they_have_the_bits_and_the_counts_of_layers_one_by_one(
    workers: list[LaneWorker], begun: list[int]
) -> None:
    scene = Scene(workers)
    async with remote(workers) as experts:
        await scene.check(experts)
        assert begun == [0, 0, 0, 0, *range(NUM_LAYERS), 0]
        assert np.array_equal(experts.expert_load(), scene.local.expert_load())
        timings = experts.take_timings()
        assert timings.num_calls == len(STEPS) * NUM_LAYERS
        assert min(timings.pack_ns, timings.wire_ns, timings.combine_ns) > 0


@pytest.mark.parametrize(
    "context",
    [StepContext(num_micro_batches=2), StepContext(micro_batch=1, num_micro_batches=2)],
)
async def test_a_step_that_is_not_alone_goes_layer_by_layer(
    context: StepContext, workers: list[LaneWorker], begun: list[int]
) -> None:
    async with remote(workers) as experts:
        await Scene(workers).check(experts, context)
    assert begun == [*range(NUM_LAYERS)] * len(STEPS)


async def test_where_workers_are_to_be_chosen_python_chooses(begun: list[int]) -> None:
    with lane_workers(2, replicas=2, num_layers=NUM_LAYERS) as workers:
        async with remote(workers) as experts:
            await Scene(workers).check(experts)
    assert begun == [*range(NUM_LAYERS)] * len(STEPS)


@pytest.mark.parametrize("num_without", [1, 3])
async def test_workers_may_be_without_a_lane(num_without: int) -> None:
    with lane_workers(3, num_experts=8, num_layers=NUM_LAYERS) as workers:
        for worker in workers[:num_without]:
            worker.describe = partial(FakeWorker.describe, worker)  # type: ignore[method-assign]
        transport = lane_transport(workers, is_required=False)
        async with remote(workers, transport=transport) as experts:
            await Scene(workers).check(experts)
        served = [worker.server.num_connections > 0 for worker in workers]
        assert served == [False] * num_without + [True] * (3 - num_without)


def fail_some_frames(worker: LaneWorker, fault: Fault) -> None:
    answer, numbers = worker.answer, itertools.count(1)

    def failing(frame: bytes) -> bytes | None:
        if next(numbers) in (4, 12, 13):
            worker.faults.append(fault)
        return answer(frame)

    worker.answer = failing  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", ["break", "draining", "internal", "unknown", "silent"])
async def test_a_frame_that_fails_amid_them_is_sent_again(fault: Fault) -> None:
    with lane_workers(3, num_experts=8, num_layers=NUM_LAYERS) as workers:
        scene = Scene(workers)
        async with remote(workers, call_timeout_s=0.3) as experts:
            for worker in workers:
                fail_some_frames(worker, fault)
            await scene.check(experts)
            assert all(len(worker.requests) > 13 for worker in workers)


async def test_a_slow_worker_holds_up_its_layer_and_no_loop(begun: list[int]) -> None:
    with lane_workers(2, num_layers=NUM_LAYERS) as workers:
        scene, answer = Scene(workers), workers[1].answer

        def slow(frame: bytes) -> bytes | None:
            time.sleep(0.03)
            return answer(frame)

        workers[1].answer = slow  # type: ignore[method-assign]
        async with remote(workers) as experts:
            await scene.check(experts)
    assert begun == [0, 0, 0, 0, *range(NUM_LAYERS), 0]


async def test_a_frame_refused_for_what_it_is_fails_the_step_alone() -> None:
    with lane_workers(1, num_layers=NUM_LAYERS) as workers:
        scene, answer = Scene(workers), workers[0].answer

        def refusing(frame: bytes) -> bytes | None:
            if len(workers[0].requests) == 3:
                workers[0].faults.append("invalid")
            return answer(frame)

        workers[0].answer = refusing  # type: ignore[method-assign]
        async with remote(workers) as experts:
            with pytest.raises(MalformedFrameError, match="refused a frame of layer 3"):
                await scene.forward(experts)
            await scene.check(experts)


async def test_rows_that_lack_an_expert_are_left_behind_amid_them() -> None:
    with lane_workers(8, num_experts=8, num_layers=NUM_LAYERS) as workers:
        scene = Scene(workers)
        async with remote(workers, call_timeout_s=0.3) as experts:
            await scene.check(experts)
            workers[2].kill()
            await eventually(lambda: bool(experts._pool.view.table.missing_slots()))
            incidents = StepIncidents()
            engine = HandEngine(scene.decoder, experts, num_blocks=128)
            parts = [Part(HandSequence(token_ids=[index + 3]), 1, range(1)) for index in range(40)]
            with torch.inference_mode():
                await engine.step(parts, replace(StepContext(), incidents=incidents))
            assert {missing.experts for missing in incidents.missing} == {(2,)}
            assert len(incidents.missing) == NUM_LAYERS


async def test_a_token_that_is_not_finite_disturbs_no_other(workers: list[LaneWorker]) -> None:
    scene = Scene(workers)
    scene.decoder._embedding[2] = float("nan")
    async with remote(workers) as experts:
        rows = []
        for backend in (scene.local, experts):
            engine = HandEngine(scene.decoder, backend, num_blocks=128)
            parts = [Part(HandSequence(token_ids=[token]), 1, range(1)) for token in (5, 2, 7)]
            with torch.inference_mode():
                rows.append(await engine.step(parts, None))
    assert rows[1][1].isnan().all()
    assert torch.equal(bits(rows[0][[0, 2]]), bits(rows[1][[0, 2]]))
