"""A worker as its own process, spoken to by gRPC clients that know nothing but the proto file."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.request import urlopen

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from grpc.aio import EOF  # type: ignore[attr-defined]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from safetensors.torch import load_file, save_file

from protos import experts_pb2
from protos.experts_pb2_grpc import ExpertServiceStub
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.expert_ffn import Assignments, PackedExpert, moe_forward
from services.core.grpc_options import DISPATCH_METHOD, channel_options
from services.core.redis_registry import RedisRegistry
from services.core.registry import WorkerRecord
from services.core.store_server import StoreServer
from services.core.telemetry import ATTR_EXPERT_IDS, ATTR_LAYER, ATTR_WORKER_ID, SPAN_EXPERT
from services.core.wire import ResponseFrame, decode_response, encode_request
from services.core.worker_control import load_slots
from tests.support.checkpoints import fresh_seed, make_checkpoint
from tests.support.eventually import eventually
from tests.support.frames import random_assignments
from tests.support.otlp_collector import OtlpCollector
from tests.support.redis_server import running_redis
from tests.support.worker_process import WorkerProcess, run_worker_to_end, running_worker

HIDDEN, INTERMEDIATE, NUM_LAYERS = 64, 96, 2
HELD = (1, 2)
MAX_FRAME_BYTES = 1 << 16
DispatchCall = grpc.aio.StreamStreamCall[bytes, bytes]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), sharded=True)


@pytest.fixture(scope="module")
def worker(model: Path) -> Iterator[WorkerProcess]:
    with running_worker(
        model, "1-2", environment={"EXPERTFLEET_MAX_FRAME_BYTES": str(MAX_FRAME_BYTES)}
    ) as worker:
        yield worker


@pytest.fixture(scope="module")
def experts(model: Path) -> list[dict[int, PackedExpert]]:
    """The held experts of each layer, in this process."""
    checkpoint = Checkpoint.open(str(model))
    torch.set_num_threads(1)
    return [
        {
            expert: PackedExpert(
                checkpoint.expert(layer, expert), dtype=torch.float32, device=torch.device("cpu")
            )
            for expert in HELD
        }
        for layer in range(NUM_LAYERS)
    ]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(fresh_seed())


class Frame:
    """A random valid frame and what must come back."""

    def __init__(
        self,
        generator: torch.Generator,
        experts: Sequence[dict[int, PackedExpert]],
        *,
        call_id: int,
        num_tokens: int = 3,
        combine: bool = True,
    ) -> None:
        self.call_id = call_id
        self.layer = call_id % NUM_LAYERS
        self.combine = combine
        self.hidden_states = torch.randn(num_tokens, HIDDEN, generator=generator)
        self.assignments: Assignments = random_assignments(
            generator, num_tokens=num_tokens, expert_ids=HELD
        )
        self.expected = moe_forward(
            experts[self.layer], self.hidden_states, self.assignments, combine=combine
        )

    def encode(self, traceparent: str = "") -> bytes:
        return encode_request(
            call_id=self.call_id,
            layer=self.layer,
            hidden_states=self.hidden_states,
            assignments=self.assignments,
            combine=self.combine,
            traceparent=traceparent,
        )

    def stock(self, **changes: Any) -> experts_pb2.DispatchRequest:
        """The same frame as a stock message, with some fields changed."""
        message = experts_pb2.DispatchRequest.FromString(self.encode())
        for name, value in changes.items():
            message.ClearField(cast(Any, name))
            if isinstance(value, list):
                getattr(message, name).extend(value)
            else:
                setattr(message, name, value)
        return message


@contextlib.asynccontextmanager
async def open_stream(endpoint: str) -> AsyncIterator[DispatchCall]:
    options = channel_options(1 << 28)
    async with grpc.aio.insecure_channel(endpoint, options=options) as channel:
        yield cast(Any, channel).stream_stream(DISPATCH_METHOD)()


async def read(call: DispatchCall) -> ResponseFrame:
    return decode_response(cast(bytes, await asyncio.wait_for(call.read(), 120)))


async def ask(call: DispatchCall, frame: bytes) -> ResponseFrame:
    await call.write(frame)
    return await read(call)


def assert_answers(response: ResponseFrame, frame: Frame) -> None:
    assert response.status == experts_pb2.DISPATCH_STATUS_OK, response.error
    assert response.call_id == frame.call_id
    assert response.hidden_states is not None
    assert torch.equal(response.hidden_states, frame.expected)


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 17])
async def test_rows_come_back_with_the_bits_of_this_process(
    worker: WorkerProcess,
    experts: list[dict[int, PackedExpert]],
    generator: torch.Generator,
    num_tokens: int,
    combine: bool,
) -> None:
    async with open_stream(worker.endpoint) as call:
        for call_id in range(4):
            frame = Frame(
                generator, experts, call_id=call_id, num_tokens=num_tokens, combine=combine
            )
            assert_answers(await ask(call, frame.encode()), frame)


async def test_frames_of_many_streams_that_wait_together_are_answered_each_with_its_own_bits(
    worker: WorkerProcess, experts: list[dict[int, PackedExpert]], generator: torch.Generator
) -> None:
    async def stream(frames: Sequence[Frame]) -> None:
        async with open_stream(worker.endpoint) as call:
            for frame in frames:
                await call.write(frame.encode())
            responses = {r.call_id: r for r in [await read(call) for _ in frames]}
            for frame in frames:
                assert_answers(responses[frame.call_id], frame)

    await asyncio.gather(
        *(
            stream(
                [
                    Frame(generator, experts, call_id=call_id, num_tokens=1 + call_id % 5)
                    for call_id in range(40)
                ]
            )
            for _ in range(4)
        )
    )


def test_a_stock_client_is_served(
    worker: WorkerProcess, experts: list[dict[int, PackedExpert]], generator: torch.Generator
) -> None:
    frames = [Frame(generator, experts, call_id=call_id) for call_id in range(3)]
    with grpc.insecure_channel(worker.endpoint) as channel:
        stub = cast(Any, ExpertServiceStub)(channel)
        responses = list(stub.Dispatch(iter([frame.stock() for frame in frames]), timeout=120))
    assert sorted(response.call_id for response in responses) == [0, 1, 2]
    for response in responses:
        expected = frames[response.call_id].expected
        values = np.frombuffer(response.hidden_states, dtype="<f4")
        assert values.tolist() == expected.flatten().tolist()
        assert response.num_rows == len(expected)


INVALID = experts_pb2.DISPATCH_STATUS_INVALID_FRAME
UNKNOWN = experts_pb2.DISPATCH_STATUS_UNKNOWN_EXPERT
NAN_ROWS = np.full((3, HIDDEN), np.nan, dtype="<f4").tobytes()


@pytest.mark.parametrize(
    ("changes", "status", "named"),
    [
        ({"num_tokens": 4}, INVALID, "hidden_states has 768 bytes"),
        ({"hidden_size": 32, "num_tokens": 6}, INVALID, "hidden_size is 32"),
        ({"dtype": experts_pb2.DTYPE_FLOAT16, "num_tokens": 6}, INVALID, "torch.float16"),
        ({"dtype": experts_pb2.DTYPE_INT8, "num_tokens": 12}, INVALID, "scales"),
        ({"answer_dtype": experts_pb2.DTYPE_BFLOAT16}, INVALID, "answer_dtype"),
        ({"dtype": 77}, INVALID, "dtype 77"),
        ({"layer": 9}, UNKNOWN, "layer 9"),
        ({"expert_ids": [1, 3]}, UNKNOWN, r"experts [3]"),
        ({"hidden_states": NAN_ROWS}, INVALID, "NaN or infinity in rows [0, 1, 2]"),
        ({"topk_weights": b""}, INVALID, "topk_weights"),
        ({"rows_per_expert": [1]}, INVALID, "rows_per_expert"),
    ],
)
async def test_a_fault_is_named_and_the_stream_lives_on(
    worker: WorkerProcess,
    experts: list[dict[int, PackedExpert]],
    generator: torch.Generator,
    changes: dict[str, Any],
    status: int,
    named: str,
) -> None:
    frame = Frame(generator, experts, call_id=6)
    async with open_stream(worker.endpoint) as call:
        response = await ask(call, frame.stock(**changes).SerializeToString())
        assert (response.status, response.call_id) == (status, 6)
        assert named in response.error
        assert response.hidden_states is None
        assert_answers(await ask(call, frame.encode()), frame)


async def test_bytes_that_are_no_frame_are_answered_with_call_0_and_the_stream_lives_on(
    worker: WorkerProcess, experts: list[dict[int, PackedExpert]], generator: torch.Generator
) -> None:
    frame = Frame(generator, experts, call_id=1)
    async with open_stream(worker.endpoint) as call:
        for garbage in (b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f", b"", frame.encode()[:-5]):
            response = await ask(call, garbage)
            assert (response.status, response.call_id) == (INVALID, 0)
        assert_answers(await ask(call, frame.encode()), frame)


async def test_a_frame_over_the_bound_is_refused_and_the_stream_lives_on(
    worker: WorkerProcess, experts: list[dict[int, PackedExpert]], generator: torch.Generator
) -> None:
    large = Frame(generator, experts, call_id=5, num_tokens=MAX_FRAME_BYTES // HIDDEN // 4 + 1)
    small = Frame(generator, experts, call_id=6)
    async with open_stream(worker.endpoint) as call:
        response = await ask(call, large.encode())
        assert response.status == experts_pb2.DISPATCH_STATUS_TOO_LARGE
        assert response.call_id == 5
        assert str(MAX_FRAME_BYTES) in response.error
        assert_answers(await ask(call, small.encode()), small)


async def test_an_overflow_in_half_precision_is_answered_as_it_is(model: Path) -> None:
    with running_worker(model, "1", "--dtype", "float16") as worker:
        async with open_stream(worker.endpoint) as call:
            response = await ask(
                call,
                encode_request(
                    call_id=3,
                    layer=1,
                    hidden_states=torch.full((1, HIDDEN), 60000.0, dtype=torch.float16),
                    assignments=Assignments(
                        expert_ids=(1,),
                        rows_per_expert=(1,),
                        token_rows=torch.zeros(1, dtype=torch.int64),
                        topk_weights=torch.ones(1),
                    ),
                    combine=True,
                ),
            )
    assert response.status == experts_pb2.DISPATCH_STATUS_OK
    assert response.hidden_states is not None
    assert not response.hidden_states.isfinite().all()


async def test_a_client_that_does_not_read_holds_up_nobody_else(
    worker: WorkerProcess, experts: list[dict[int, PackedExpert]], generator: torch.Generator
) -> None:
    large = Frame(generator, experts, call_id=0, num_tokens=200)
    small = Frame(generator, experts, call_id=1)
    async with open_stream(worker.endpoint) as stalled, open_stream(worker.endpoint) as call:

        async def flood() -> None:
            for _ in range(2000):
                await stalled.write(large.encode())

        flooding = asyncio.create_task(flood())
        for _ in range(20):
            assert_answers(await ask(call, small.encode()), small)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(flooding), 1.0)
        assert_answers(await ask(call, small.encode()), small)
        flooding.cancel()
        stalled.cancel()


async def test_a_cancelled_stream_disturbs_no_other(
    worker: WorkerProcess, experts: list[dict[int, PackedExpert]], generator: torch.Generator
) -> None:
    frame = Frame(generator, experts, call_id=2)
    for _ in range(3):
        async with open_stream(worker.endpoint) as call:
            for _ in range(20):
                await call.write(frame.encode())
            call.cancel()
    async with open_stream(worker.endpoint) as call:
        assert_answers(await ask(call, frame.encode()), frame)
    assert "Traceback" not in worker.log


def test_describe_tells_slots_digests_and_that_only_their_tensors_were_read(
    worker: WorkerProcess, model: Path
) -> None:
    with grpc.insecure_channel(worker.endpoint) as channel:
        stub = cast(Any, ExpertServiceStub)(channel)
        described = stub.Describe(experts_pb2.DescribeRequest(), timeout=120)
    slots = [(slot.layer, slot.expert) for slot in described.slots]
    assert slots == [(layer, expert) for layer in range(NUM_LAYERS) for expert in HELD]
    assert len({slot.digest for slot in described.slots}) == len(slots)
    assert described.checkpoint_bytes_read == len(slots) * 3 * HIDDEN * INTERMEDIATE * 4
    assert described.weight_bytes == described.checkpoint_bytes_read
    assert (described.hidden_size, described.intermediate_size) == (HIDDEN, INTERMEDIATE)
    assert (described.num_layers, described.num_experts) == (NUM_LAYERS, 4)
    assert described.dtype == experts_pb2.DTYPE_FLOAT32
    assert described.weight_format == "float32"
    assert described.state == experts_pb2.WORKER_STATE_READY
    assert described.model == model.name
    assert described.max_frame_bytes == MAX_FRAME_BYTES


def test_standard_health_and_reflection_answer(worker: WorkerProcess) -> None:
    service = "expertfleet.v1.ExpertService"
    with grpc.insecure_channel(worker.endpoint) as channel:
        for name in ("", service):
            health = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=name), timeout=120
            )
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=120
        )
        names = {listed.name for listed in next(reflected).list_services_response.service}
    assert {service, "grpc.health.v1.Health"} <= names


async def test_prometheus_counts_tokens_per_slot(
    model: Path, experts: list[dict[int, PackedExpert]], generator: torch.Generator
) -> None:
    with running_worker(model, "1,2") as worker:
        frame = Frame(generator, experts, call_id=1)
        async with open_stream(worker.endpoint) as call:
            assert_answers(await ask(call, frame.encode()), frame)
        page = await asyncio.to_thread(scrape, worker.metrics_endpoint)
    for expert, count in zip(HELD, frame.assignments.rows_per_expert, strict=True):
        line = f'expertfleet_worker_tokens_total{{expert="{expert}",layer="1"}} {count}.0'
        assert line in page


def scrape(endpoint: str) -> str:
    with urlopen(f"http://{endpoint}/metrics", timeout=60) as response:
        return cast(bytes, response.read()).decode()


@pytest.mark.parametrize("num_threads", [1, 2])
async def test_sigterm_under_load_loses_no_frame_and_exits_0(
    model: Path,
    experts: list[dict[int, PackedExpert]],
    generator: torch.Generator,
    num_threads: int,
) -> None:
    """Every frame written before the stream ends is answered: computed, or told to go elsewhere.

    With one thread short frames are computed on the event loop, with two on the compute thread.
    """
    frame = Frame(generator, experts, call_id=1, num_tokens=64)
    frame_bytes = frame.encode()
    answered = asyncio.Event()

    async def client(endpoint: str) -> tuple[int, int]:
        num_computed = num_refused = 0
        async with open_stream(endpoint) as call:
            for _ in range(8):
                await call.write(frame_bytes)
            while (response_bytes := await asyncio.wait_for(call.read(), 120)) is not EOF:
                response = decode_response(cast(bytes, response_bytes))
                if response.status == experts_pb2.DISPATCH_STATUS_DRAINING:
                    num_refused += 1
                    continue
                assert_answers(response, frame)
                num_computed += 1
                if num_computed == 100:
                    answered.set()
                if not num_refused:
                    try:
                        await call.write(frame_bytes)
                    except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
                        # Everything was answered and the stream ended just before this frame.
                        return num_computed, num_refused
            assert await call.code() == grpc.StatusCode.OK
        return num_computed, num_refused

    environment = {"EXPERTFLEET_NUM_THREADS": str(num_threads)}
    with running_worker(model, "1,2", environment=environment) as worker:
        clients = [asyncio.create_task(client(worker.endpoint)) for _ in range(4)]
        await asyncio.wait_for(answered.wait(), 120)
        worker.terminate()
        counts = await asyncio.gather(*clients)
        assert await asyncio.to_thread(worker.wait) == 0
    assert all(num_computed > 0 for num_computed, _ in counts)
    assert "Traceback" not in worker.log, worker.log


async def test_an_idle_worker_with_open_streams_exits_0_soon(model: Path) -> None:
    with running_worker(model, "1") as worker:
        async with open_stream(worker.endpoint) as call:
            await call.wait_for_connection()
            worker.terminate()
            assert await asyncio.to_thread(worker.wait) == 0


def test_a_second_signal_ends_the_worker_at_once(model: Path) -> None:
    """The first one cannot end it: a frame that nobody reads the answer of stays in hand."""
    with running_worker(model, "1,2") as worker, stalled_client(worker.endpoint):
        worker.terminate()
        wait_for_log(worker, "draining")
        assert worker.process.poll() is None
        worker.terminate()
        assert worker.wait() == 128 + signal.SIGTERM


@contextlib.contextmanager
def stalled_client(endpoint: str) -> Iterator[None]:
    """Sends frames until flow control stops the answers that it does not read."""
    rows = torch.ones(4096, HIDDEN)
    frame = encode_request(
        call_id=1,
        layer=0,
        hidden_states=rows,
        assignments=Assignments(
            expert_ids=(1,),
            rows_per_expert=(len(rows),),
            token_rows=torch.arange(len(rows)),
            topk_weights=torch.ones(len(rows)),
        ),
        combine=True,
    )
    ended = threading.Event()

    def frames() -> Iterator[bytes]:
        for _ in range(32):
            yield frame
        ended.wait()

    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(endpoint, options=options) as channel:
        call = cast(Any, channel).stream_stream(DISPATCH_METHOD)(frames())
        next(call)
        yield
        ended.set()
        call.cancel()


def wait_for_log(worker: WorkerProcess, text: str) -> None:
    deadline = threading.Event()
    for _ in range(3000):
        if text in worker.log:
            return
        deadline.wait(0.02)
    raise AssertionError(f"{text!r} is not in the log:\n{worker.log}")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("1,9",), "experts: [9]"),
        (("0", "--device", "abacus"), "abacus"),
    ],
)
def test_options_that_cannot_be_used_end_the_worker_with_status_2(
    model: Path, arguments: tuple[str, ...], named: str
) -> None:
    status, log = run_worker_to_end(model, *arguments)
    assert status == 2
    assert named in log
    assert "Traceback" not in log


def test_a_port_in_use_ends_the_worker_with_status_2(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status, log = run_worker_to_end(model, "0", "--port", port)
    assert status == 2
    assert port in log


def test_a_weight_that_is_not_finite_is_refused_naming_file_and_tensor(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name][0, 3] = float("inf")
    save_file(tensors, file)
    status, log = run_worker_to_end(model, "2")
    assert status == 2
    assert file.name in log
    assert name in log


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    status, log = run_worker_to_end(tmp_path, "0")
    assert status == 2
    assert "Traceback" not in log


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with running_redis(tmp_path_factory.mktemp("store")) as server:
        yield server


async def test_the_lease_shows_slots_load_and_state_and_goes_at_the_end(
    model: Path,
    experts: list[dict[int, PackedExpert]],
    generator: torch.Generator,
    store: StoreServer,
) -> None:
    registry = RedisRegistry(store.url, fleet="lease", timeout_s=60.0)
    environment = {
        "REDIS_URL": store.url,
        "EXPERTFLEET_FLEET": "lease",
        "EXPERTFLEET_HEARTBEAT_S": "0.05",
    }

    async def record() -> WorkerRecord | None:
        return next(iter((await registry.snapshot()).workers), None)

    async def has_counted() -> bool:
        seen = await record()
        return seen is not None and sum(seen.tokens.values()) > 0

    with running_worker(model, "1-2", "--worker-id", "w7", environment=environment) as worker:
        frame = Frame(generator, experts, call_id=1)
        async with open_stream(worker.endpoint) as call:
            assert_answers(await ask(call, frame.encode()), frame)
        await eventually(has_counted)
        lease = await record()
        assert lease is not None
        assert (lease.worker_id, lease.state) == ("w7", "ready")
        assert lease.endpoint == worker.endpoint
        assert lease.metrics_endpoint == worker.metrics_endpoint
        assert lease.pid == worker.process.pid
        assert lease.slots == {(layer, expert) for layer in range(NUM_LAYERS) for expert in HELD}
        counts = zip(HELD, frame.assignments.rows_per_expert, strict=True)
        assert dict(lease.tokens) == {(1, expert): count for expert, count in counts}
        assert lease.num_frames == 1
        assert 0 < lease.busy_s < 300
        assert lease.num_threads == 1
        assert lease.slot_bytes * len(lease.slots) == lease.weight_bytes
        left = lease.memory_limit_bytes - lease.weight_bytes
        assert 0 < lease.memory_free_bytes <= left
        await load_slots(worker.endpoint, {(0, 3)}, timeout_s=120)
        told = await record()
        assert told is not None
        assert told.slots == lease.slots | {(0, 3)}  # announced before it was answered
        assert told.weight_bytes == lease.weight_bytes + lease.slot_bytes
        assert told.memory_limit_bytes == lease.memory_limit_bytes
        worker.terminate()
        assert await asyncio.to_thread(worker.wait) == 0
        assert await record() is None
    await registry.close()


async def test_a_worker_serves_while_the_store_is_away(
    model: Path, experts: list[dict[int, PackedExpert]], generator: torch.Generator
) -> None:
    environment = {"REDIS_URL": "redis://127.0.0.1:1", "EXPERTFLEET_HEARTBEAT_S": "0.05"}
    with running_worker(model, "1-2", environment=environment) as worker:
        frame = Frame(generator, experts, call_id=1)
        async with open_stream(worker.endpoint) as call:
            assert_answers(await ask(call, frame.encode()), frame)
        worker.terminate()
        assert worker.wait() == 0
    assert worker.log.count("lease could not be written") == 1


async def test_a_traced_frame_has_a_span_under_its_parent(
    model: Path, experts: list[dict[int, PackedExpert]], generator: torch.Generator
) -> None:
    collector = OtlpCollector()
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    environment = {"EXPERTFLEET_OTLP_ENDPOINT": collector.endpoint}
    try:
        with running_worker(model, "1-2", "--worker-id", "w3", environment=environment) as worker:
            frame = Frame(generator, experts, call_id=1)
            async with open_stream(worker.endpoint) as call:
                assert_answers(await ask(call, frame.encode()), frame)
                traced = frame.encode(traceparent=f"00-{trace_id}-{span_id}-01")
                assert_answers(await ask(call, traced), frame)
            worker.terminate()
            await asyncio.to_thread(worker.wait)
        (span,) = await asyncio.to_thread(collector.wait_for_names, SPAN_EXPERT)
    finally:
        collector.stop()
    assert (span.trace_id, span.parent_id) == (trace_id, span_id)
    assert span.end_ns > span.start_ns
    assert span.attributes[ATTR_WORKER_ID] == "w3"
    assert span.attributes[ATTR_LAYER] == 1
    assert tuple(cast(Sequence[int], span.attributes[ATTR_EXPERT_IDS])) == HELD


def test_sigterm_while_starting_ends_the_worker(model: Path) -> None:
    with running_worker(model, "1-2", wait_ready=False) as worker:
        worker.terminate()
        assert worker.wait() == 0


def test_a_worker_that_could_not_be_reproducible_refuses_to_start(model: Path) -> None:
    environment = {"EXPERTFLEET_REPRODUCIBLE": "true", "EXPERTFLEET_DTYPE": "float16"}
    status, log = run_worker_to_end(model, "0", environment=environment)
    assert status == 2
    assert "not reproducible" in log
    assert "--reproducible" in log
