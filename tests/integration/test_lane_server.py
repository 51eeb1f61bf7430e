"""A worker's lanes beside its Dispatch call: the same frames, the same answers."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.request import urlopen

import grpc
import pytest
import torch

from protos import experts_pb2
from protos.experts_pb2_grpc import ExpertServiceStub
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.expert_ffn import PackedExpert, moe_forward
from services.core.kernels.choice import native_kernels_for
from services.core.lane.server import has_lanes
from services.core.telemetry import SPAN_EXPERT
from services.core.wire import decode_response, encode_request
from tests.support.checkpoints import fresh_seed, make_checkpoint
from tests.support.eventually import eventually
from tests.support.frames import random_assignments
from tests.support.lane_socket import LaneSocket, lane_socket
from tests.support.otlp_collector import running_collector
from tests.support.worker_process import WorkerProcess, run_worker_to_end, running_worker

HIDDEN, NUM_LAYERS, HELD = 64, 2, (1, 2)
MAX_FRAME_BYTES = 1 << 16
BOUND = {"EXPERTFLEET_MAX_FRAME_BYTES": str(MAX_FRAME_BYTES)}
STATUS = experts_pb2.DispatchStatus


@pytest.fixture(scope="module", autouse=True)
def needs_lanes() -> None:
    library = native_kernels_for(torch.float32, torch.device("cpu"))
    if library is None or not has_lanes(library):
        pytest.skip("there are no lanes on this machine")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def worker(model: Path) -> Iterator[WorkerProcess]:
    with running_worker(model, "1-2", environment=BOUND) as worker:
        yield worker


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(fresh_seed())


def describe(worker: WorkerProcess) -> experts_pb2.DescribeResponse:
    with grpc.insecure_channel(worker.endpoint) as channel:
        request = experts_pb2.DescribeRequest()
        described = cast(Any, ExpertServiceStub)(channel).Describe(request, timeout=120)
    return cast(experts_pb2.DescribeResponse, described)


def ask_over_grpc(worker: WorkerProcess, messages: list[bytes]) -> list[bytes]:
    """Each answered before the next is sent."""
    requests = [experts_pb2.DispatchRequest.FromString(message) for message in messages]
    with grpc.insecure_channel(worker.endpoint) as channel:
        stub = cast(Any, ExpertServiceStub)(channel)
        return [
            next(stub.Dispatch(iter([request]), timeout=120)).SerializeToString()
            for request in requests
        ]


def random_message(
    generator: torch.Generator, *, num_rows: int = 3, **changes: Any
) -> experts_pb2.DispatchRequest:
    """Of `num_rows` tokens, with some fields changed."""
    call_id = changes.pop("call_id", 6)
    message = experts_pb2.DispatchRequest.FromString(
        encode_request(
            call_id=call_id,
            layer=call_id % NUM_LAYERS,
            hidden_states=torch.randn(num_rows, HIDDEN, generator=generator),
            assignments=random_assignments(generator, num_tokens=num_rows, expert_ids=HELD),
            combine=changes.pop("combine", True),
        )
    )
    for name, value in changes.items():
        message.ClearField(cast(Any, name))
        if isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


def untimed(answer: bytes) -> experts_pb2.DispatchResponse:
    response = experts_pb2.DispatchResponse.FromString(answer)
    response.ClearField("queue_us")
    response.ClearField("compute_us")
    return response


def tokens_by_slot(worker: WorkerProcess) -> dict[str, float]:
    with urlopen(f"http://{worker.metrics_endpoint}/metrics", timeout=60) as response:
        text = response.read().decode()
    return {
        labels: float(value)
        for labels, value in re.findall(
            r"^expertfleet_worker_(?:tokens|frames)_total\{(.*)\} (\S+)$", text, re.MULTILINE
        )
    }


@pytest.mark.parametrize("arguments", [("--expert-weights", "int8"), ("--dtype", "bfloat16")])
def test_answers_have_the_bits_of_the_dispatch_call(
    model: Path, generator: torch.Generator, arguments: tuple[str, ...]
) -> None:
    in_bfloat16 = "bfloat16" in arguments
    with (
        running_worker(model, "1-2", *arguments) as worker,
        lane_socket(describe(worker).lane_port) as lane,
    ):
        messages = []
        for call_id, num_rows in enumerate((1, 2, 8, 33, 100)):
            message = random_message(
                generator, num_rows=num_rows, call_id=call_id, combine=call_id % 2 == 0
            )
            if in_bfloat16:
                rows = torch.frombuffer(bytearray(message.hidden_states), dtype=torch.float32)
                message.hidden_states = rows.bfloat16().view(torch.uint8).numpy().tobytes()
                message.dtype = experts_pb2.DTYPE_BFLOAT16
            messages.append(message.SerializeToString())
        over_grpc = ask_over_grpc(worker, messages)
        for sent, answer in zip(messages, over_grpc, strict=True):
            assert untimed(lane.ask(sent)) == untimed(answer)
            assert untimed(answer).status == STATUS.DISPATCH_STATUS_OK


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"num_tokens": 4}, STATUS.DISPATCH_STATUS_INVALID_FRAME),
        ({"hidden_size": 32, "num_tokens": 6}, STATUS.DISPATCH_STATUS_INVALID_FRAME),
        (
            {"dtype": experts_pb2.DTYPE_FLOAT16, "num_tokens": 6},
            STATUS.DISPATCH_STATUS_INVALID_FRAME,
        ),
        (
            {"answer_dtype": experts_pb2.DTYPE_BFLOAT16},
            STATUS.DISPATCH_STATUS_INVALID_FRAME,
        ),
        ({"layer": 9}, STATUS.DISPATCH_STATUS_UNKNOWN_EXPERT),
        ({"expert_ids": [1, 3]}, STATUS.DISPATCH_STATUS_UNKNOWN_EXPERT),
        (
            {"hidden_states": struct.pack("<f", float("nan")) * (3 * HIDDEN)},
            STATUS.DISPATCH_STATUS_INVALID_FRAME,
        ),
        ({"rows_per_expert": [1]}, STATUS.DISPATCH_STATUS_INVALID_FRAME),
        ({"hidden_states": bytes(MAX_FRAME_BYTES)}, STATUS.DISPATCH_STATUS_TOO_LARGE),
        (
            {
                "dtype": experts_pb2.DTYPE_INT8,
                "hidden_states": bytes(3 * HIDDEN),
                "scales": struct.pack("<3f", 1, 2, 3),
            },
            STATUS.DISPATCH_STATUS_OK,
        ),
        (
            {"dtype": experts_pb2.DTYPE_BFLOAT16, "hidden_states": bytes(3 * HIDDEN * 2)},
            STATUS.DISPATCH_STATUS_OK,
        ),
    ],
)
def test_what_is_not_computed_natively_is_answered_as_in_the_dispatch_call(
    worker: WorkerProcess, generator: torch.Generator, changes: dict[str, Any], status: int
) -> None:
    message = random_message(generator, **changes).SerializeToString()
    (over_grpc,) = ask_over_grpc(worker, [message])
    with lane_socket(describe(worker).lane_port) as lane:
        answer = untimed(lane.ask(message))
    assert answer == untimed(over_grpc)
    assert answer.status == status


async def test_what_lanes_compute_is_counted_like_the_dispatch_calls_frames(
    worker: WorkerProcess, generator: torch.Generator
) -> None:
    messages = [
        random_message(generator, call_id=call_id, num_rows=5).SerializeToString()
        for call_id in range(6)
    ]
    refused = random_message(generator, layer=9).SerializeToString()
    await asyncio.sleep(0.3)  # whatever other tests had computed is counted by then
    before = tokens_by_slot(worker)
    with lane_socket(describe(worker).lane_port) as lane:
        for message in (*messages, refused):
            lane.ask(message)
    num_rows = sum(
        sum(experts_pb2.DispatchRequest.FromString(message).rows_per_expert) for message in messages
    )

    def counted() -> tuple[float, float, float]:
        now = tokens_by_slot(worker)
        gained = {labels: value - before.get(labels, 0) for labels, value in now.items()}
        return (
            sum(value for labels, value in gained.items() if "expert=" in labels),
            gained['status="ok"'],
            gained['status="unknown_expert"'],
        )

    await eventually(lambda: counted() == (num_rows, 6, 1))


def test_a_frame_of_a_traced_step_leaves_a_span(model: Path, generator: torch.Generator) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    message = random_message(generator, traceparent=traceparent).SerializeToString()
    with running_collector() as collector:
        with (
            running_worker(
                model, "1-2", environment={"EXPERTFLEET_OTLP_ENDPOINT": collector.endpoint}
            ) as worker,
            lane_socket(describe(worker).lane_port) as lane,
        ):
            assert decode_response(lane.ask(message)).status == STATUS.DISPATCH_STATUS_OK
            worker.terminate()
            assert worker.wait() == 0
        (span,) = collector.wait_for_names(SPAN_EXPERT)
    assert span.parent_id == traceparent.split("-")[2]


def test_slots_come_and_go_under_traffic(model: Path, generator: torch.Generator) -> None:
    """Frames are answered with the right bits, or sent elsewhere; none is lost."""
    checkpoint = Checkpoint.open(str(model))
    experts = {
        expert: PackedExpert(
            checkpoint.expert(0, expert), dtype=torch.float32, device=torch.device("cpu")
        )
        for expert in HELD
    }
    rows = torch.randn(3, HIDDEN, generator=generator)
    assigned = random_assignments(generator, num_tokens=3, expert_ids=HELD)
    expected = moe_forward(experts, rows, assigned, combine=True)
    message = encode_request(
        call_id=1, layer=0, hidden_states=rows, assignments=assigned, combine=True
    )
    ending = threading.Event()
    statuses: list[int] = []
    failures: list[BaseException] = []

    def traffic(port: int) -> None:
        try:
            with lane_socket(port) as lane:
                while not ending.is_set():
                    response = decode_response(lane.ask(message))
                    statuses.append(response.status)
                    if response.status == STATUS.DISPATCH_STATUS_OK:
                        assert response.hidden_states is not None
                        assert torch.equal(response.hidden_states, expected)
        except BaseException as failure:  # noqa: BLE001 - told by the test's own thread
            failures.append(failure)

    with running_worker(model, "1-2") as worker:
        clients = [
            threading.Thread(target=traffic, args=(describe(worker).lane_port,)) for _ in range(2)
        ]
        for client in clients:
            client.start()
        slots = [experts_pb2.Slot(layer=0, expert=2)]
        with grpc.insecure_channel(worker.endpoint) as channel:
            stub = cast(Any, ExpertServiceStub)(channel)
            for _ in range(5):
                stub.UnloadSlots(experts_pb2.UnloadSlotsRequest(slots=slots), timeout=120)
                with lane_socket(describe(worker).lane_port) as lane:
                    answer = decode_response(lane.ask(message))
                    assert answer.status == STATUS.DISPATCH_STATUS_UNKNOWN_EXPERT
                stub.LoadSlots(experts_pb2.LoadSlotsRequest(slots=slots), timeout=120)
        ending.set()
        for client in clients:
            client.join()
    assert not failures
    assert set(statuses) == {
        STATUS.DISPATCH_STATUS_OK,
        STATUS.DISPATCH_STATUS_UNKNOWN_EXPERT,
    }


def test_draining_answers_what_was_sent_and_then_cuts_the_lanes(
    model: Path, generator: torch.Generator
) -> None:
    message = random_message(generator).SerializeToString()
    with running_worker(model, "1-2") as worker:
        with lane_socket(describe(worker).lane_port) as lane:
            statuses = {decode_response(lane.ask(message)).status}
            for _ in range(20):
                lane.send(message)
            worker.process.send_signal(signal.SIGTERM)
            statuses |= {decode_response(answer).status for answer in until_cut(lane)}
        assert worker.wait() == 0, worker.log
    assert statuses <= {STATUS.DISPATCH_STATUS_OK, STATUS.DISPATCH_STATUS_DRAINING}


def until_cut(lane: LaneSocket) -> Iterator[bytes]:
    with contextlib.suppress(EOFError):
        while True:
            yield lane.receive()


def test_a_worker_offers_no_lane_when_told_so(model: Path) -> None:
    with running_worker(model, "1", environment={"EXPERTFLEET_DISPATCH_LANE": "false"}) as worker:
        assert describe(worker).lane_port == 0


def test_a_lane_port_in_use_is_named_at_start(model: Path, worker: WorkerProcess) -> None:
    taken = str(describe(worker).lane_port)
    status, log = run_worker_to_end(model, "1", environment={"EXPERTFLEET_LANE_PORT": taken})
    assert status == 2
    assert taken in log
    assert "lane_port" in log
