"""Layer calls over lanes, to fake workers behind real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from torch import Tensor

from router_service.dispatch.dispatcher import RemoteExperts
from router_service.dispatch.lane_rounds import LaneRounds
from router_service.dispatch.local_experts import LocalExperts
from router_service.experts import StepContext, StepTrace
from services.core.errors import MalformedFrameError
from services.core.telemetry import (
    ATTR_EXPERT_IDS,
    ATTR_NUM_TOKENS,
    ATTR_TOKENS_PER_EXPERT,
    ATTR_WORKER_ID,
    METRIC_DISPATCH,
    SPAN_DISPATCH,
    SPAN_LAYER,
)
from services.core.tracing import ChosenIds
from services.core.wire import encode_response
from tests.support.eventually import eventually
from tests.support.fake_workers import Fault
from tests.support.lane_workers import LaneWorker, lane_workers, remote
from tests.support.moe_layers import random_gate

CONTEXT = StepContext()
NUM_LAYERS = 2


@pytest.fixture(params=["on the loop", "where it stands"])
def waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a call waits for its answers."""
    if request.param == "on the loop":
        defaults = LaneRounds.__init__.__kwdefaults__
        assert defaults is not None
        monkeypatch.setitem(defaults, "blocking_wait_s", 0.0)
    return str(request.param)


def random_call(worker: LaneWorker, num_tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
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
    experts: RemoteExperts,
    worker: LaneWorker,
    *,
    num_tokens: int = 9,
    call: tuple[Tensor, Tensor, Tensor] | None = None,
    context: StepContext = CONTEXT,
) -> None:
    """A call has the bits of the same call in process."""
    layer = int(torch.randint(NUM_LAYERS, ()))
    call = call or random_call(worker, num_tokens)
    before = call[0].clone()
    expected = await LocalExperts(worker.model, {}).forward(layer, *call, context)
    output = await experts.forward(layer, *call, context)
    assert output.dtype == expected.dtype
    assert torch.equal(_bits(output), _bits(expected))
    assert torch.equal(call[0], before)


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int16 if values.itemsize == 2 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [1, 3, 8])
async def test_the_answer_has_the_bits_of_the_same_call_in_process(
    num_workers: int, top_k: int, dtype: torch.dtype, waiting: str
) -> None:
    with lane_workers(num_workers, num_experts=8, top_k=top_k, dtype=dtype) as workers:
        async with remote(workers) as experts:
            for num_tokens in (1, 2, 7, 33, 64):
                await check_call(experts, workers[0], num_tokens=num_tokens)


async def test_rounds_carry_the_common_call_and_its_counts(waiting: str) -> None:
    metrics = CollectorRegistry()
    with lane_workers(2) as workers:
        async with remote(workers, metrics=metrics) as experts:
            call = random_call(workers[0], 30)
            started_ns = time.perf_counter_ns()
            for _ in range(40):
                await experts.forward(1, *call, CONTEXT)
            elapsed_ns = time.perf_counter_ns() - started_ns
            assert all(request.call_id >= 1 << 40 for w in workers for request in w.requests)
            counts = np.bincount(call[1].numpy().ravel(), minlength=4) * 40
            assert experts.expert_load().tolist() == [[0] * 4, counts.tolist()]
            timings = experts.take_timings()
            parts = (timings.pack_ns, timings.wire_ns, timings.combine_ns)
            assert timings.num_calls == 40
            assert min(parts) > 0
            assert sum(parts) <= elapsed_ns
            for worker in workers:
                assert len(worker.requests) == 40
                labels = {"worker": worker.worker_id}
                count = metrics.get_sample_value(f"{METRIC_DISPATCH}_count", labels)
                assert count is not None
                assert count >= 32


async def test_streams_have_connections_of_their_own_and_do_not_mix_their_answers() -> None:
    with lane_workers(2) as workers:
        async with remote(workers) as experts:
            contexts = [StepContext(micro_batch=m, num_micro_batches=3) for m in range(3)]
            for _ in range(10):
                await asyncio.gather(
                    *(check_call(experts, workers[0], context=context) for context in contexts)
                )
            assert [worker.server.num_connections for worker in workers] == [3, 3]


@pytest.mark.parametrize("fault", ["break", "draining", "internal", "unknown", "short", "silent"])
async def test_a_frame_that_fails_is_sent_again_and_the_answer_is_exact(
    fault: Fault, waiting: str
) -> None:
    with lane_workers(2, replicas=2) as workers:
        async with remote(workers, call_timeout_s=0.3) as experts:
            for worker in workers:
                worker.faults.append(fault)
            for _ in range(4):
                await check_call(experts, workers[0], num_tokens=30)


@pytest.mark.parametrize("fault", ["break", "draining", "internal", "unknown", "silent"])
async def test_the_only_worker_of_an_expert_is_tried_again(fault: Fault, waiting: str) -> None:
    with lane_workers(2) as workers:
        async with remote(workers, call_timeout_s=0.3) as experts:
            workers[0].faults.extend([fault] * 2)
            await check_call(experts, workers[0], num_tokens=30)
            assert not workers[0].faults
            await check_call(experts, workers[0], num_tokens=30)


async def test_what_the_others_computed_is_not_asked_for_again(waiting: str) -> None:
    with lane_workers(4) as workers:
        async with remote(workers) as experts:
            workers[2].faults.append("internal")
            await check_call(experts, workers[0], num_tokens=30)
            assert [len(worker.requests) for worker in workers] == [1, 1, 2, 1]


async def test_an_answer_that_comes_after_its_deadline_still_counts(waiting: str) -> None:
    with lane_workers(2) as workers:
        async with remote(workers, call_timeout_s=60.0) as experts:
            for _ in range(40):
                await check_call(experts, workers[0])  # its pace is known, so deadlines are short
            answer, num_requests = workers[0].answer, len(workers[0].requests)

            def late_answer(frame: bytes) -> bytes | None:
                time.sleep(0.6)
                return answer(frame)

            workers[0].answer = late_answer  # type: ignore[method-assign]
            await check_call(experts, workers[0], num_tokens=30)
            assert len(workers[0].requests) == num_requests + 1


async def test_a_frame_refused_for_what_it_is_fails_the_call(waiting: str) -> None:
    with lane_workers(1) as workers:
        async with remote(workers) as experts:
            workers[0].faults.append("invalid")
            with pytest.raises(MalformedFrameError, match="refused a frame of layer 1"):
                await experts.forward(1, *random_call(workers[0]), CONTEXT)
            await check_call(experts, workers[0])


@pytest.mark.parametrize("kind", ["of other rows", "of another dtype", "that is no message"])
async def test_a_worker_that_answers_nonsense_is_not_believed(kind: str, waiting: str) -> None:
    with lane_workers(2, replicas=2) as workers:
        async with remote(workers) as experts:
            answer = workers[0].answer

            def nonsense(frame: bytes) -> bytes | None:
                workers[0].answer = answer  # type: ignore[method-assign]
                answer(frame)
                request = workers[0].requests[-1]
                rows, width = request.hidden_states.shape
                if kind == "of other rows":
                    values = torch.ones(rows + 1, width)
                elif kind == "of another dtype":
                    values = torch.ones(rows, width).bfloat16()
                else:
                    return b"\xff\xff\xff"
                return encode_response(call_id=request.call_id, hidden_states=values)

            workers[0].answer = nonsense  # type: ignore[method-assign]
            for _ in range(4):
                await check_call(experts, workers[0], num_tokens=30)


async def test_a_killed_worker_costs_no_call_and_is_used_again(waiting: str) -> None:
    with lane_workers(2) as workers:
        async with remote(workers) as experts:
            await check_call(experts, workers[0])
            workers[1].kill()
            call = asyncio.create_task(check_call(experts, workers[0], num_tokens=30))
            await eventually(lambda: bool(experts._pool.view.table.missing_slots()))
            assert not call.done()
            workers[1].is_up = True
            await call


async def test_a_token_that_is_not_finite_comes_back_as_nan_and_disturbs_no_other() -> None:
    with lane_workers(2) as workers:
        async with remote(workers) as experts:
            call = random_call(workers[0])
            expected = await LocalExperts(workers[0].model, {}).forward(1, *call, CONTEXT)
            for bad in (float("nan"), float("inf"), float("-inf")):
                hidden_states = call[0].clone()
                hidden_states[4, 7] = bad
                output = await experts.forward(1, hidden_states, *call[1:], CONTEXT)
                assert output[4].isnan().all()
                others = torch.arange(9) != 4
                assert torch.equal(output[others], expected[others])


async def test_frames_above_a_workers_bound_are_split() -> None:
    with lane_workers(2) as workers:
        workers[0].max_frame_bytes = 8192
        async with remote(workers) as experts:
            await check_call(experts, workers[0], num_tokens=200)
            assert len(workers[0].requests) > 1
            assert len(workers[1].requests) == 1


@pytest.mark.parametrize("fault", [None, "internal"])
async def test_a_sampled_step_is_carried_whole_and_its_frames_name_their_spans(
    waiting: str, fault: Fault | None
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(id_generator=ChosenIds())
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    trace = StepTrace(tracer.start_span("step"))
    with lane_workers(2) as workers:
        if fault:
            workers[1].faults.append(fault)
        async with remote(workers, tracer=tracer) as experts:
            began_ns = time.time_ns()
            await check_call(experts, workers[0], context=StepContext(trace=trace), num_tokens=30)
            ended_ns = time.time_ns()
            first = [worker.requests[0] for worker in workers]
            assert all(request.call_id >= 1 << 40 for request in first)
            assert bool(exporter.get_finished_spans()) == bool(fault)
            trace.end(ended_ns)
    spans = exporter.get_finished_spans()
    (layer,) = [span for span in spans if span.name == SPAN_LAYER]
    assert layer.parent is not None
    assert layer.parent.span_id == trace.span.get_span_context().span_id
    assert layer.attributes is not None
    assert sum(layer.attributes[ATTR_TOKENS_PER_EXPERT]) == 60  # type: ignore[arg-type]
    dispatches = {
        f"{span.context.span_id:016x}": span for span in spans if span.name == SPAN_DISPATCH
    }
    assert len(dispatches) == (3 if fault else 2)
    for worker in workers:
        for request in worker.requests:
            span = dispatches[request.traceparent.split("-")[2]]
            assert span.parent is not None
            assert span.parent.span_id == layer.context.span_id
            assert span.attributes is not None
            assert span.attributes[ATTR_WORKER_ID] == worker.worker_id
            assert span.attributes[ATTR_EXPERT_IDS] == request.assignments.expert_ids
            assert span.attributes[ATTR_NUM_TOKENS] == len(request.hidden_states)
    for span in (layer, *dispatches.values()):
        assert span.start_time is not None
        assert span.end_time is not None
        assert began_ns <= span.start_time <= span.end_time <= ended_ns
    assert sum(not span.status.is_ok for span in dispatches.values()) == bool(fault)


async def test_cancelling_a_call_leaves_the_backend_usable(waiting: str) -> None:
    with lane_workers(2) as workers:
        async with remote(workers) as experts:
            workers[0].faults.append("silent")
            call = asyncio.create_task(experts.forward(0, *random_call(workers[0], 30), CONTEXT))
            await eventually(lambda: not workers[0].faults)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            for _ in range(3):
                await check_call(experts, workers[0])


async def test_closing_in_mid_flight_ends_in_an_error_and_leaves_no_descriptor() -> None:
    with lane_workers(2) as workers:
        async with remote(workers, expert_wait_s=0.2) as experts:
            workers[0].faults.append("silent")
            call = asyncio.create_task(experts.forward(0, *random_call(workers[0], 30), CONTEXT))
            await eventually(lambda: not workers[0].faults)
            await experts.close()
            with pytest.raises(Exception, match="no worker computed"):
                await call
            transport = experts._pool._transport
            assert transport.hub._client is None  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _no_stray_sockets(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    yield
    assert not [w for w in recwarn if issubclass(w.category, ResourceWarning)]
