from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from torch import Tensor

from protos import experts_pb2
from router_service.dispatch import layer_dispatch, worker_health
from router_service.dispatch.dispatch_timings import DispatchTimings
from router_service.dispatch.dispatcher import RemoteExperts
from router_service.dispatch.local_experts import LocalExperts
from router_service.experts import NothingLeftError, StepContext, StepIncidents, StepTrace
from services.core.errors import ExpertUnavailableError, MalformedFrameError, UnavailableError
from services.core.memory_registry import MemoryRegistry
from services.core.placement import plan_placement
from services.core.registry import FleetSnapshot
from services.core.settings import WireDTypeName
from services.core.telemetry import (
    ATTR_COMPUTE_MS,
    ATTR_LAYER,
    ATTR_NUM_RETRIES,
    ATTR_NUM_TOKENS,
    ATTR_QUEUE_MS,
    ATTR_TOKENS_PER_EXPERT,
    ATTR_WORKER_ID,
    METRIC_DISPATCH,
    METRIC_DISPATCH_EJECTIONS,
    METRIC_DISPATCH_HEDGES,
    METRIC_DISPATCH_RETRIES,
    METRIC_EXPERT_TOKENS,
    METRIC_EXPERT_WAIT,
    METRIC_LOST_WORKERS,
    METRIC_OUTSTANDING_ROWS,
    SPAN_DISPATCH,
    SPAN_LAYER,
)
from services.core.wire_dtype import WireFormat
from tests.support.eventually import eventually
from tests.support.fake_workers import FakeTransport, FakeWorker, Fault, random_model, tiny_config
from tests.support.moe_layers import random_gate

CONTEXT = StepContext()
SOON_S = 20.0
"""Far below a timeout of a minute, and more than a busy machine makes of a moment."""
GRACE_S = 1.5


def make_workers(
    num_workers: int, *, replicas: int = 1, top_k: int = 2, dtype: torch.dtype = torch.float32
) -> list[FakeWorker]:
    """`replicas` workers of each of `num_workers` parts of one model: a0, a1, ..., b0, b1, ..."""
    config = tiny_config(top_k=top_k)
    model = random_model(config, dtype)
    plan = plan_placement(config.num_hidden_layers, config.num_local_experts, num_workers)
    return [
        FakeWorker(
            worker_id=f"{'abc'[copy]}{index}",
            config=config,
            model=model,
            slots=part.slots(),
            dtype=dtype,
        )
        for copy in range(replicas)
        for index, part in enumerate(plan)
    ]


@asynccontextmanager
async def remote(
    workers: Sequence[FakeWorker], *, ready: bool = True, **options: Any
) -> AsyncIterator[RemoteExperts]:
    registry = MemoryRegistry()
    for worker in workers:
        await registry.publish(worker.record, 1e9)
    settings: dict[str, Any] = {"refresh_s": 0.01, "expert_wait_s": 60.0, "call_timeout_s": 60.0}
    experts = RemoteExperts(
        workers[0].config,
        registry=registry,
        dtype=workers[0].dtype,
        transport=FakeTransport(workers),
        **settings | options,
    )
    try:
        if ready:
            await experts.wait_ready()
            await eventually(lambda: len(experts._pool.view.links) == len(workers))
        yield experts
    finally:
        await experts.close()


def random_call(worker: FakeWorker, num_tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    config = worker.config
    hidden_states = torch.randn(num_tokens, config.hidden_size, generator=generator)
    ids, weights = random_gate(
        generator,
        num_tokens=num_tokens,
        num_experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
    )
    return hidden_states.to(worker.dtype), ids, weights


async def check_call(
    experts: RemoteExperts, worker: FakeWorker, *, layer: int = 1, num_tokens: int = 9
) -> None:
    """One random call has the bits of the same call in process."""
    call = random_call(worker, num_tokens)
    before = call[0].clone()
    expected = await LocalExperts(worker.model, {}).forward(layer, *call, CONTEXT)
    assert torch.equal(await experts.forward(layer, *call, CONTEXT), expected)
    assert torch.equal(call[0], before)


@pytest.mark.parametrize("num_workers", [1, 2, 4, 8])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_the_answer_has_the_bits_of_the_same_call_in_process(
    num_workers: int, top_k: int, dtype: torch.dtype
) -> None:
    workers = make_workers(num_workers, top_k=top_k, dtype=dtype)
    async with remote(workers) as experts:
        for layer in (0, 1):
            for num_tokens in (1, 2, 30):
                await check_call(experts, workers[0], layer=layer, num_tokens=num_tokens)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize(
    ("wire_dtype", "dtype"),
    [("int8", torch.bfloat16), ("int8", torch.float32), ("bfloat16", torch.float32)],
)
async def test_a_narrow_wire_rounds_as_in_process_for_any_number_of_workers_and_batch(
    wire_dtype: WireDTypeName, dtype: torch.dtype, top_k: int
) -> None:
    hidden_states, ids, weights = random_call(make_workers(1, top_k=top_k, dtype=dtype)[0], 17)
    wire_format = WireFormat.of(wire_dtype, dtype)
    for num_workers in (1, 2, 4):
        workers = make_workers(num_workers, top_k=top_k, dtype=dtype)
        local = LocalExperts(workers[0].model, {}, wire_format=wire_format)
        expected = await local.forward(1, hidden_states, ids, weights, CONTEXT)
        exact = await LocalExperts(workers[0].model, {}).forward(
            1, hidden_states, ids, weights, CONTEXT
        )
        assert not torch.equal(expected, exact)
        assert (expected - exact).norm() < 0.05 * exact.norm()
        async with remote(workers, wire_dtype=wire_dtype, max_frame_bytes=1 << 13) as experts:
            output = await experts.forward(1, hidden_states, ids, weights, CONTEXT)
            assert torch.equal(output, expected)
            assert output.dtype == dtype


async def test_the_parts_of_a_calls_time_add_up_to_its_whole() -> None:
    workers = make_workers(2)
    async with remote(workers) as experts:
        await check_call(experts, workers[0])
        assert experts.take_timings().num_calls == 1
        started_ns = time.perf_counter_ns()
        for _ in range(3):
            await experts.forward(0, *random_call(workers[0]), CONTEXT)
        elapsed_ns = time.perf_counter_ns() - started_ns
        timings = experts.take_timings()
        parts = dataclasses.asdict(timings)
        assert parts.pop("num_calls") == 3
        assert all(part >= 0 for part in parts.values())
        assert min(timings.pack_ns, timings.wire_ns, timings.combine_ns) > 0
        assert sum(parts.values()) <= elapsed_ns
        assert experts.take_timings() == DispatchTimings()


@pytest.mark.parametrize("fault", ["break", "draining", "internal", "unknown", "short"])
async def test_a_frame_that_fails_is_sent_to_the_other_replica(fault: Fault) -> None:
    workers = make_workers(2, replicas=2)
    async with remote(workers) as experts:
        await check_call(experts, workers[0], num_tokens=30)
        for worker in workers[:2]:
            worker.faults.append(fault)
        started = time.monotonic()
        await check_call(experts, workers[0], num_tokens=30)
        assert time.monotonic() - started < SOON_S


async def test_a_frame_that_is_not_answered_in_time_is_sent_to_the_other_replica() -> None:
    workers = make_workers(2, replicas=2)
    async with remote(workers, call_timeout_s=0.1) as experts:
        workers[0].faults.append("silent")
        await check_call(experts, workers[0], num_tokens=30)


@pytest.mark.parametrize("fault", ["break", "draining", "internal", "unknown", "silent"])
async def test_the_only_worker_of_an_expert_is_tried_again(fault: Fault) -> None:
    workers = make_workers(2)
    async with remote(workers, call_timeout_s=0.2) as experts:
        workers[0].faults.extend([fault] * 3)
        await check_call(experts, workers[0], num_tokens=30)
        assert not workers[0].faults


async def warm_up(experts: RemoteExperts, worker: FakeWorker) -> None:
    """Calls until the pace of every worker is known, and with it their deadlines."""
    for _ in range(40):
        await check_call(experts, worker, num_tokens=30)


async def timed_call(experts: RemoteExperts, worker: FakeWorker) -> float:
    started = time.monotonic()
    await check_call(experts, worker, num_tokens=30)
    return time.monotonic() - started


async def test_a_frame_past_its_deadline_goes_to_the_other_replica_long_before_the_timeout() -> (
    None
):
    workers = make_workers(2, replicas=2)
    metrics = CollectorRegistry()
    async with remote(workers, call_timeout_s=60.0, metrics=metrics) as experts:
        await warm_up(experts, workers[0])
        for worker in workers[:2]:
            worker.faults.append("silent")
        for _ in range(3):
            assert await timed_call(experts, workers[0]) < SOON_S
        assert metrics.get_sample_value(METRIC_DISPATCH_HEDGES) in (1, 2)
        retries = metrics.get_sample_value(METRIC_DISPATCH_RETRIES, {"reason": "late"})
        assert retries == metrics.get_sample_value(METRIC_DISPATCH_HEDGES)


async def test_a_slow_replica_holds_up_no_call_and_its_late_answers_are_accounted() -> None:
    workers = make_workers(1, replicas=2)
    metrics = CollectorRegistry()
    async with remote(workers, call_timeout_s=60.0, metrics=metrics) as experts:
        await warm_up(experts, workers[0])
        workers[0].delay_s = 3600.0
        assert max([await timed_call(experts, workers[0]) for _ in range(10)]) < SOON_S
        workers[0].answer_late()

        def outstanding() -> float | None:
            return metrics.get_sample_value(METRIC_OUTSTANDING_ROWS, {"worker": "a0"})

        await eventually(lambda: outstanding() == 0)
        workers[0].delay_s = 0.0
        before = len(workers[0].requests)

        async def is_used_again() -> bool:
            await check_call(experts, workers[0], num_tokens=30)
            return len(workers[0].requests) > before

        await eventually(is_used_again)


async def test_an_only_worker_that_is_slow_is_waited_for_and_gets_nothing_twice() -> None:
    workers = make_workers(2)
    async with remote(workers, call_timeout_s=60.0) as experts:
        await warm_up(experts, workers[0])
        workers[0].delay_s = 0.5
        before = len(workers[0].requests)
        assert await timed_call(experts, workers[0]) > 0.45
        assert len(workers[0].requests) == before + 1


async def test_an_answer_that_comes_twice_counts_once() -> None:
    workers = make_workers(2)
    async with remote(workers) as experts:
        workers[0].faults.append("twice")
        await check_call(experts, workers[0], num_tokens=30)
        await check_call(experts, workers[0], num_tokens=30)
        assert len(workers[0].requests) == 3


async def test_a_worker_with_several_faults_in_a_row_is_left_alone_and_then_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_health, "_FIRST_EJECTION_S", 3600.0)
    workers = make_workers(1, replicas=2)
    metrics = CollectorRegistry()
    async with remote(workers, metrics=metrics) as experts:
        workers[0].faults.extend(["internal"] * 3)
        while workers[0].faults:
            await check_call(experts, workers[0], num_tokens=30)
        assert metrics.get_sample_value(METRIC_DISPATCH_EJECTIONS) == 1
        seen = len(workers[0].requests)
        for _ in range(10):
            await check_call(experts, workers[0], num_tokens=30)
        assert len(workers[0].requests) == seen
        experts._chooser._health["a0"].retry_at = 0.0  # the hour is over

        async def is_used_again() -> bool:
            await check_call(experts, workers[0], num_tokens=30)
            return len(workers[0].requests) > seen

        await eventually(is_used_again)


@pytest.mark.parametrize("top_k", [1, 2, 4])
async def test_the_rows_of_a_hot_expert_are_shared_by_its_replicas_bit_for_bit(top_k: int) -> None:
    workers = make_workers(1, replicas=2, top_k=top_k)
    async with remote(workers) as experts:
        experts._chooser._shape.expert_rows = 1.0
        hidden_states, ids, weights = random_call(workers[0], 300)
        hot = torch.arange(top_k).expand(300, top_k)
        ids = torch.where(torch.rand(300, 1) < 0.8, hot, ids)
        expected = await LocalExperts(workers[0].model, {}).forward(
            0, hidden_states, ids, weights, CONTEXT
        )
        output = await experts.forward(0, hidden_states, ids, weights, CONTEXT)
        assert torch.equal(output, expected)
        requests = [request for worker in workers for request in worker.requests]
        assert len(requests) == 2
        assert all(0 in request.assignments.expert_ids for request in requests)


async def test_rows_that_need_a_missing_expert_are_left_behind_and_the_others_are_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer_dispatch, "GRACE_S", GRACE_S)
    workers = make_workers(2)
    metrics = CollectorRegistry()
    async with remote(workers, metrics=metrics) as experts:
        workers[1].kill()
        hidden_states, ids, weights = random_call(workers[0], 30)
        ids[0], ids[1] = torch.tensor([0, 1]), torch.tensor([0, 2])
        expected = await LocalExperts(workers[0].model, {}).forward(
            1, hidden_states, ids, weights, CONTEXT
        )
        incidents = StepIncidents()
        started = time.monotonic()
        output = await experts.forward(
            1, hidden_states, ids, weights, StepContext(incidents=incidents)
        )
        assert time.monotonic() - started < SOON_S
        lacks = (ids >= 2).any(1)
        assert torch.equal(output[~lacks], expected[~lacks])
        (missing,) = incidents.missing
        assert missing.layer == 1
        assert set(missing.experts) <= {2, 3}
        assert missing.rows.tolist() == lacks.nonzero()[:, 0].tolist()
        assert incidents.missing_of(0, 1) is None
        assert incidents.missing_of(1, 2) == missing
        waited = metrics.get_sample_value(METRIC_EXPERT_WAIT)
        assert waited is not None
        assert 0 < waited < SOON_S
        # The grace is the outage's, not the call's: the next call does not wait.
        with pytest.raises(NothingLeftError):
            await experts.forward(
                0,
                hidden_states[1:2],
                ids[1:2],
                weights[1:2],
                StepContext(incidents=StepIncidents()),
            )
        waited_again = metrics.get_sample_value(METRIC_EXPERT_WAIT)
        assert waited_again is not None
        assert waited_again - waited < GRACE_S / 2
        assert not experts.is_available([(0, 2)])
        changes: list[bool] = []
        experts.on_change(lambda: changes.append(experts.is_available([(0, 2)])))
        workers[1].is_up = True
        await eventually(lambda: True in changes)


async def test_rows_that_a_hung_only_worker_keeps_are_left_behind_until_it_answers() -> None:
    workers = make_workers(2)
    async with remote(workers, call_timeout_s=60.0) as experts:
        await warm_up(experts, workers[0])
        workers[1].delay_s = 3600.0
        call = random_call(workers[0], 100)
        incidents = StepIncidents()
        started = time.monotonic()
        await experts.forward(1, *call, StepContext(incidents=incidents))
        assert time.monotonic() - started < SOON_S
        lacks = (call[1] >= 2).any(1)
        assert incidents.missing[0].rows.tolist() == lacks.nonzero()[:, 0].tolist()
        assert not experts.is_available([(0, 3)])
        sent = len(workers[1].requests)
        incidents = StepIncidents()
        await experts.forward(0, *call, StepContext(incidents=incidents))
        assert incidents.missing
        workers[1].delay_s = 0.0
        workers[1].answer_late()
        await eventually(lambda: experts.is_available([(0, 3)]))
        assert len(workers[1].requests) == sent + 1
        await check_call(experts, workers[0], num_tokens=30)


async def test_a_call_waits_for_a_killed_worker_to_come_back() -> None:
    workers = make_workers(2)
    async with remote(workers) as experts:
        workers[0].kill()
        call = asyncio.create_task(check_call(experts, workers[0], num_tokens=30))
        await eventually(lambda: bool(experts._pool.view.table.missing_slots()))
        with pytest.raises(UnavailableError, match="expert 0 of layers 0-1, expert 1"):
            experts.check_ready()
        assert not call.done()
        workers[0].is_up = True
        await call
        experts.check_ready()


async def test_a_call_whose_expert_stays_away_fails_and_says_which_and_what_to_do() -> None:
    workers = make_workers(2)
    async with remote(workers, expert_wait_s=0.2) as experts:
        workers[1].kill()
        started = time.monotonic()
        with pytest.raises(ExpertUnavailableError, match="layer 1") as raised:
            await experts.forward(1, *random_call(workers[0], 30), CONTEXT)
        assert 0.15 < time.monotonic() - started < SOON_S
        assert raised.value.details["layer"] == 1
        assert raised.value.details["experts"] == [2, 3]
        assert "expertfleet expert --experts 2,3 --layers 1" in raised.value.message


async def test_a_call_that_needs_none_of_the_missing_experts_goes_on() -> None:
    workers = make_workers(2)
    async with remote(workers, expert_wait_s=0.2) as experts:
        workers[1].kill()
        ids, weights = torch.tensor([[0, 1], [1, 0]]), torch.full((2, 2), 0.5)
        await experts.forward(0, torch.randn(2, 32), ids, weights, CONTEXT)


async def test_a_frame_refused_for_what_it_is_fails_at_once_and_is_not_sent_again() -> None:
    workers = make_workers(1, replicas=2)
    async with remote(workers) as experts:
        for worker in workers:
            worker.faults.append("invalid")
        with pytest.raises(MalformedFrameError, match="refused a frame of layer 1") as raised:
            await experts.forward(1, *random_call(workers[0]), CONTEXT)
        assert raised.value.details["worker_id"] in ("a0", "b0")
        assert sum(len(worker.requests) for worker in workers) <= 2


async def test_frames_above_a_workers_bound_are_split() -> None:
    workers = make_workers(2)
    workers[0].max_frame_bytes = 8192
    async with remote(workers) as experts:
        await check_call(experts, workers[0], num_tokens=200)
        split = [len(request.hidden_states) for request in workers[0].requests]
        assert len(split) > 1
        assert len(workers[1].requests) == 1


async def test_a_lost_piece_of_a_split_frame_is_not_added_twice() -> None:
    workers = make_workers(1)
    workers[0].max_frame_bytes = 8192
    async with remote(workers) as experts:
        workers[0].faults.extend(["internal"])
        await check_call(experts, workers[0], num_tokens=100)


async def test_a_token_that_is_not_finite_comes_back_as_nan_and_disturbs_no_other() -> None:
    workers = make_workers(2)
    async with remote(workers) as experts:
        hidden_states, ids, weights = random_call(workers[0], 12)
        expected = await LocalExperts(workers[0].model, {}).forward(
            0, hidden_states, ids, weights, CONTEXT
        )
        hidden_states[3, 5], weights[7] = float("inf"), float("nan")
        output = await experts.forward(0, hidden_states, ids, weights, CONTEXT)
        is_bad = torch.zeros(12, dtype=torch.bool)
        is_bad[[3, 7]] = True
        assert output[is_bad].isnan().all()
        assert torch.equal(output[~is_bad], expected[~is_bad])
        assert hidden_states[3, 5] == float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "num_layers is 3, this model's is 2"),
        ({"num_experts": 8}, "num_experts is 8"),
        ({"hidden_size": 64}, "hidden_size is 64, this model's is 32"),
        ({"intermediate_size": 1}, "intermediate_size is 1"),
        ({"dtype": experts_pb2.DTYPE_BFLOAT16}, "DTYPE_BFLOAT16, this model's is DTYPE_FLOAT32"),
        ({"max_frame_bytes": 10}, "EXPERTFLEET_MAX_FRAME_BYTES"),
        ({"worker_id": "zed"}, "worker zed answers at that address"),
        ({"slots": [experts_pb2.Slot(layer=9, expert=0)]}, "layer 9, expert 0, which the model"),
        ({"slots": [experts_pb2.Slot(layer=0, expert=0, digest=b"x")]}, "weights of layer 0"),
    ],
)
async def test_a_worker_of_another_model_is_refused_with_the_reason(
    change: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    good, other = make_workers(1, replicas=2)
    described = other.describe()
    for name, value in change.items():
        described.ClearField(name)
        described.MergeFrom(experts_pb2.DescribeResponse(**{name: value}))
    monkeypatch.setattr(other, "describe", lambda: described)
    other.is_up = False
    with caplog.at_level(logging.ERROR):
        async with remote([good, other], ready=False) as experts:
            await experts.wait_ready()
            other.is_up = True
            await eventually(lambda: bool(experts._pool.refusals()))
            await check_call(experts, good)
            assert not other.requests
            good.kill()
            with pytest.raises(UnavailableError, match="b0") as raised:
                experts.check_ready()
            assert message in raised.value.message
    assert sum(message in record.getMessage() for record in caplog.records) == 1


async def test_a_fleet_that_is_not_whole_is_not_ready_and_names_the_missing_slots() -> None:
    workers = make_workers(4)
    async with remote(workers[:2], ready=False, expert_wait_s=0.1) as experts:
        with pytest.raises(UnavailableError, match="expert 2 of layers 0-1, expert 3 of"):
            await experts.wait_ready()


async def test_a_worker_that_is_still_loading_is_waited_for() -> None:
    workers = make_workers(1)
    workers[0].state = experts_pb2.WORKER_STATE_LOADING
    async with remote(workers, ready=False) as experts:
        waiting = asyncio.create_task(experts.wait_ready())
        await eventually(lambda: bool(workers[0].links))
        assert not waiting.done()
        workers[0].state = experts_pb2.WORKER_STATE_READY
        await waiting


async def test_the_digests_of_all_slots_are_known_once_ready() -> None:
    workers = make_workers(2)
    async with remote(workers) as experts:
        assert experts.slot_digests() == {
            (layer, expert): bytes([layer, expert]) for layer in range(2) for expert in range(4)
        }


class FlakyRegistry(MemoryRegistry):
    """A registry whose store can go away, or come back empty."""

    is_away = False
    is_empty = False
    num_reads = 0

    async def snapshot(self) -> FleetSnapshot:
        self.num_reads += 1
        if self.is_away:
            raise UnavailableError("the store is away")
        return FleetSnapshot() if self.is_empty else await super().snapshot()


async def flaky_fleet(
    workers: Sequence[FakeWorker], *, refresh_s: float = 0.01, **options: Any
) -> tuple[FlakyRegistry, RemoteExperts]:
    registry = FlakyRegistry()
    for worker in workers:
        await registry.publish(worker.record, 1e9)
    experts = RemoteExperts(
        workers[0].config,
        registry=registry,
        dtype=torch.float32,
        transport=FakeTransport(workers),
        refresh_s=refresh_s,
        **options,
    )
    await experts.wait_ready()
    return registry, experts


@pytest.mark.parametrize("trouble", ["is_away", "is_empty"])
async def test_dispatch_goes_on_while_the_store_is_away_or_lost_everything(
    trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    workers = make_workers(2)
    registry, experts = await flaky_fleet(workers)
    with caplog.at_level(logging.WARNING):
        setattr(registry, trouble, True)
        reads = registry.num_reads
        await eventually(lambda: registry.num_reads > reads + 5)
        await check_call(experts, workers[0])
        experts.check_ready()
    logged = [r for r in caplog.records if "going on with the last" in r.getMessage()]
    assert len(logged) == (1 if trouble == "is_away" else 0)
    await experts.close()


async def test_a_link_that_breaks_while_its_worker_is_asked_is_not_sent_to() -> None:
    (worker,) = make_workers(1)
    async with remote([worker]) as experts:
        worker.describing = asyncio.Event()
        experts._pool.probe(worker.worker_id)
        (link,) = worker.links
        await asyncio.sleep(0.01)  # it is being asked
        link.break_off("cut")
        worker.describing.set()
        worker.describing = None
        await eventually(lambda: any(link.broken is None for link in experts._pool.view.links))
        async with asyncio.timeout(SOON_S):
            await experts.forward(0, *random_call(worker), CONTEXT)
        assert all(link.broken is None for link in experts._pool.view.links)


async def test_a_call_whose_frames_fail_at_once_every_time_is_not_sent_without_end() -> None:
    workers, metrics = make_workers(1, replicas=2), CollectorRegistry()
    async with remote(workers, expert_wait_s=2.0, metrics=metrics) as experts:
        for worker in workers:
            worker.links[0].broken = "cut"  # and nobody knows
        with pytest.raises(ExpertUnavailableError):
            await experts.forward(0, *random_call(workers[0]), CONTEXT)
    retries = metrics.get_sample_value(METRIC_DISPATCH_RETRIES, {"reason": "broken"})
    assert retries is not None
    assert layer_dispatch._MANY_RETRIES <= retries < 1.5 * layer_dispatch._MANY_RETRIES


async def test_a_worker_whose_lease_is_gone_is_kept_until_its_link_breaks() -> None:
    workers = make_workers(2)
    registry, experts = await flaky_fleet(workers)
    await registry.remove(workers[0].worker_id)
    reads = registry.num_reads
    await eventually(lambda: registry.num_reads > reads + 3)
    await check_call(experts, workers[0])
    workers[0].kill()
    await eventually(lambda: len(experts._pool.view.table.missing_slots()) == 4)
    await eventually(lambda: not workers[0].links)
    await experts.close()


async def test_a_worker_that_drains_by_its_record_gets_nothing_new() -> None:
    workers = make_workers(1, replicas=2)
    registry, experts = await flaky_fleet(workers)
    await eventually(lambda: len(experts._pool.view.links) == 2)
    await registry.publish(replace(workers[0].record, state="draining"), 1e9)
    await eventually(lambda: len(experts._pool.view.links) == 1)
    await check_call(experts, workers[0])
    assert not workers[0].requests
    assert workers[1].requests
    await experts.close()


async def test_slots_that_a_worker_loads_later_are_used() -> None:
    whole, part = make_workers(1, replicas=2)
    part.slots = frozenset({(0, 0)})
    registry, experts = await flaky_fleet([whole, part])
    await eventually(lambda: len(experts._pool.view.table.replicas((0, 0))) == 2)
    part.slots = whole.slots
    await registry.publish(part.record, 1e9)
    await eventually(lambda: len(experts._pool.view.table.replicas((1, 3))) == 2)
    await check_call(experts, whole)
    await experts.close()


async def test_cancelling_a_call_leaves_the_backend_usable() -> None:
    workers = make_workers(2)
    async with remote(workers) as experts:
        workers[0].faults.append("silent")
        call = asyncio.create_task(experts.forward(0, *random_call(workers[0], 30), CONTEXT))
        await eventually(lambda: not workers[0].faults)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await check_call(experts, workers[0])


async def test_assignments_are_counted_by_layer_and_expert_and_scraped() -> None:
    workers = make_workers(2)
    metrics = CollectorRegistry()
    async with remote(workers, metrics=metrics) as experts:
        call = random_call(workers[0], 30)
        for _ in range(3):
            await experts.forward(1, *call, CONTEXT)
        counts = np.bincount(call[1].numpy().ravel(), minlength=4) * 3
        assert experts.expert_load().tolist() == [[0] * 4, counts.tolist()]
        for expert in range(4):
            labels = {"layer": "1", "expert": str(expert)}
            assert metrics.get_sample_value(METRIC_EXPERT_TOKENS, labels) == counts[expert]


async def test_round_trips_and_resends_are_measured_and_series_of_gone_workers_dropped() -> None:
    workers = make_workers(1, replicas=2)
    metrics = CollectorRegistry()
    registry, experts = await flaky_fleet(workers, metrics=metrics)
    await eventually(lambda: len(experts._pool.view.links) == 2)
    workers[0].faults.append("internal")
    await check_call(experts, workers[0], num_tokens=30)
    count = f"{METRIC_DISPATCH}_count"
    assert metrics.get_sample_value(count, {"worker": "b0"}) == 2
    assert metrics.get_sample_value(METRIC_DISPATCH_RETRIES, {"reason": "internal"}) == 1
    await registry.remove("b0")
    workers[1].kill()
    await eventually(lambda: metrics.get_sample_value(count, {"worker": "b0"}) is None)
    await experts.close()


async def test_a_worker_that_goes_without_a_word_is_counted_once_as_lost() -> None:
    workers = make_workers(1, replicas=3)
    metrics = CollectorRegistry()
    registry, experts = await flaky_fleet(workers, metrics=metrics)
    await eventually(lambda: len(experts._pool.view.links) == 3)

    async def num_lost() -> float | None:
        reads = registry.num_reads
        await eventually(lambda: registry.num_reads > reads + 3)
        return metrics.get_sample_value(METRIC_LOST_WORKERS)

    assert await num_lost() == 0
    workers[0].kill()
    await eventually(lambda: len(experts._pool.view.links) == 2)
    assert await num_lost() == 1
    await registry.remove(workers[1].worker_id)
    workers[1].kill()
    await eventually(lambda: len(experts._pool.view.links) == 1)
    assert await num_lost() == 1, "one that takes its lease along has drained"
    await registry.publish(replace(workers[2].record, state="draining"), 1e9)
    await eventually(lambda: not experts._pool.view.links)
    workers[2].kill()
    assert await num_lost() == 1
    workers[0].is_up = True
    await eventually(lambda: len(experts._pool.view.links) == 1)
    workers[0].kill()
    await eventually(lambda: not experts._pool.view.links)
    assert await num_lost() == 2
    await experts.close()


async def test_one_whose_name_another_process_takes_soon_is_counted_as_lost_too() -> None:
    workers = make_workers(1, replicas=2)
    metrics = CollectorRegistry()
    registry, experts = await flaky_fleet(workers, refresh_s=60.0, metrics=metrics)
    await eventually(lambda: len(experts._pool.view.links) == 2)
    workers[0].kill()
    await asyncio.sleep(0.3)
    other = replace(workers[0].record, endpoint="elsewhere:1", state="loading")
    await registry.publish(other, 1e9)
    assert metrics.get_sample_value(METRIC_LOST_WORKERS) == 1
    await experts.close()


async def test_a_sampled_step_shows_the_layer_and_each_frame_under_it() -> None:
    workers = make_workers(2)
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    step = tracer.start_span("step")
    context = StepContext(trace=StepTrace(step))
    async with remote(workers, tracer=tracer) as experts:
        workers[0].faults.append("internal")
        call = random_call(workers[0], 30)
        await experts.forward(1, *call, context)
        await experts.forward(0, *call, CONTEXT)
    spans = exporter.get_finished_spans()
    (layer,) = [span for span in spans if span.name == SPAN_LAYER]
    dispatches = [span for span in spans if span.name == SPAN_DISPATCH]
    assert layer.attributes is not None
    assert layer.attributes[ATTR_LAYER] == 1
    assert layer.attributes[ATTR_NUM_TOKENS] == 30
    assert sum(layer.attributes[ATTR_TOKENS_PER_EXPERT]) == 60  # type: ignore[arg-type]
    assert layer.parent is not None
    assert layer.parent.span_id == step.get_span_context().span_id
    seen = []
    for span in dispatches:
        assert span.attributes is not None
        assert span.parent is not None
        assert span.parent.span_id == layer.context.span_id
        worker_id = span.attributes[ATTR_WORKER_ID]
        seen.append((worker_id, span.attributes[ATTR_NUM_RETRIES], span.status.is_ok))
        if span.status.is_ok:
            assert {ATTR_QUEUE_MS, ATTR_COMPUTE_MS} <= set(span.attributes)
    assert sorted(seen) == [("a0", 0, False), ("a0", 1, True), ("a1", 0, True)]
    parents = {request.traceparent.split("-")[2] for w in workers for request in w.requests[:1]}
    assert parents <= {f"{span.context.span_id:016x}" for span in dispatches}
    assert [request.traceparent for w in workers for request in w.requests[-1:]] == ["", ""]
