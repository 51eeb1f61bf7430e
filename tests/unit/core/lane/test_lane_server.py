"""The native end of a lane: bits, faults, bounds, and what it tells Python."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch.testing import assert_close

from protos import experts_pb2
from services.core.errors import ExpertfleetError
from services.core.expert_ffn import moe_forward
from services.core.lane.server import ComputedFrame
from services.core.quantization.formats import QuantizedFormat
from services.core.wire import decode_request, decode_response
from tests.support.checkpoints import fresh_seed
from tests.support.eventually import eventually
from tests.support.lane_socket import LANE_MAGIC, lane_socket
from tests.unit.core.lane.lane_scene import (
    HANDED,
    HIDDEN,
    MAX_FRAME_BYTES,
    Experts,
    LaneScene,
    SentFrame,
    random_experts,
    random_frame,
    running_lane,
    skip_without_lanes,
)

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(fresh_seed())


@pytest.fixture
def experts(generator: torch.Generator) -> Experts:
    skip_without_lanes()
    return random_experts(generator, FLOAT32)


@pytest.fixture
def scene(experts: Experts) -> Iterator[LaneScene]:
    """Holds `experts`, in float32."""
    with running_lane() as scene:
        scene.hold(experts, FLOAT32)
        yield scene


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize(
    ("dtype", "quantized"),
    [(FLOAT32, None), (BFLOAT16, None), (BFLOAT16, "int8"), (BFLOAT16, "int4"), (FLOAT32, "int8")],
)
def test_answers_have_the_bits_of_the_same_layer_in_process(
    generator: torch.Generator,
    dtype: torch.dtype,
    quantized: QuantizedFormat | None,
    combine: bool,
) -> None:
    skip_without_lanes(dtype)
    experts = random_experts(generator, dtype, quantized)
    with running_lane() as scene, lane_socket(scene.port) as lane:
        scene.hold(experts, dtype)
        for call_id, num_tokens in enumerate((1, 2, 17, 100)):
            frame = random_frame(
                generator,
                experts,
                dtype=dtype,
                call_id=call_id,
                num_tokens=num_tokens,
                combine=combine,
            )
            frame.assert_answered(lane.ask(frame.message))
        assert scene.handed == []


def test_a_frame_over_part_of_the_experts_with_a_large_call_id_is_answered(
    scene: LaneScene, experts: Experts, generator: torch.Generator
) -> None:
    frame = random_frame(generator, experts, dtype=FLOAT32, call_id=2**64 - 1, expert_ids=(2, 130))
    with lane_socket(scene.port) as lane:
        frame.assert_answered(lane.ask(frame.message))


@pytest.mark.parametrize("expert_bytes", [1, 1 << 40], ids=["short", "long"])
def test_frames_of_many_connections_at_once_are_answered_each_with_its_own_bits(
    scene: LaneScene, experts: Experts, generator: torch.Generator, expert_bytes: int
) -> None:
    scene.hold(experts, FLOAT32, expert_bytes=expert_bytes)
    frames = [
        [
            random_frame(
                generator, experts, dtype=FLOAT32, call_id=call_id, num_tokens=1 + call_id % 5
            )
            for call_id in range(30)
        ]
        for _ in range(4)
    ]
    failures: list[BaseException] = []

    def exchange(of_connection: list[SentFrame]) -> None:
        try:
            with lane_socket(scene.port) as lane:
                for frame in of_connection:
                    lane.send(frame.message)
                by_call_id = {frame.call_id: frame for frame in of_connection}
                for _ in of_connection:
                    answer = lane.receive()
                    by_call_id.pop(decode_response(answer).call_id).assert_answered(answer)
        except BaseException as failure:
            failures.append(failure)
            raise

    clients = [threading.Thread(target=exchange, args=(f,)) for f in frames]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert not failures
    assert scene.handed == []


async def test_every_computed_frame_leaves_a_record(
    scene: LaneScene, experts: Experts, generator: torch.Generator
) -> None:
    frames = [
        random_frame(generator, experts, dtype=FLOAT32, call_id=call_id, traceparent=traceparent)
        for call_id, traceparent in enumerate(("", TRACEPARENT, TRACEPARENT, "", TRACEPARENT))
    ]
    began_ns = time.perf_counter_ns()
    with lane_socket(scene.port) as lane:
        answers = [decode_response(lane.ask(frame.message)) for frame in frames]
    records: list[ComputedFrame] = []

    def are_all_there() -> bool:
        records.extend(scene.server.take_computed())
        return len(records) == len(frames)

    await eventually(are_all_there)
    for frame, answer, record in zip(frames, answers, records, strict=True):
        assert record.layer == frame.layer
        assert record.expert_ids == frame.expert_ids
        assert record.rows_per_expert == frame.rows_per_expert
        assert record.batch_rows == sum(frame.rows_per_expert)
        assert record.position == 0
        assert (record.queue_us, record.compute_us) == (answer.queue_us, answer.compute_us)
        request = experts_pb2.DispatchRequest.FromString(frame.message)
        assert record.num_tokens == request.num_tokens
        assert record.traceparent == request.traceparent
        assert began_ns <= record.arrived_ns <= time.perf_counter_ns()
        began_ns = record.arrived_ns
    assert list(scene.server.take_computed()) == []


def changed(frame: SentFrame, **changes: object) -> bytes:
    message = experts_pb2.DispatchRequest.FromString(frame.message)
    for name, value in changes.items():
        message.ClearField(name)
        if isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message.SerializeToString()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_tokens": 4},
        {"hidden_size": 32, "num_tokens": 6},
        {"dtype": experts_pb2.DTYPE_BFLOAT16, "num_tokens": 6},
        {"dtype": experts_pb2.DTYPE_INT8, "num_tokens": 12},
        {"dtype": 77},
        {"answer_dtype": experts_pb2.DTYPE_BFLOAT16},
        {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0"},
        {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-\u00e9"},
        {"scales": b"1234"},
        {"layer": 9},
        {"expert_ids": [0, 2, 5, 6]},
        {"expert_ids": [0, 5, 2, 130]},
        {"rows_per_expert": [1]},
        {"rows_per_expert": [0, 1, 1, 1]},
        {"rows_per_expert": [2**32 - 1] * 4},
        {"topk_weights": b""},
        {"topk_weights": struct.pack("<4f", 1, float("nan"), 1, 1)},
        {"token_rows": struct.pack("<4i", 0, 0, 0, 1)},
        {"token_rows": struct.pack("<4i", 0, 0, 0, -1)},
        {"hidden_states": struct.pack("<f", float("inf")) * HIDDEN},
    ],
)
def test_what_is_not_plain_and_good_goes_to_python(
    scene: LaneScene, experts: Experts, generator: torch.Generator, changes: dict[str, object]
) -> None:
    frame = random_frame(generator, experts, dtype=FLOAT32, num_tokens=1)
    message = changed(frame, **changes)
    with lane_socket(scene.port) as lane:
        assert lane.ask(message) == HANDED
        frame.assert_answered(lane.ask(frame.message))
    assert [handed.message for handed in scene.handed] == [message]


def test_a_stock_clients_order_of_fields_is_understood(
    scene: LaneScene, experts: Experts, generator: torch.Generator
) -> None:
    frame = random_frame(generator, experts, dtype=FLOAT32)
    payload_bytes = len(experts_pb2.DispatchRequest.FromString(frame.message).hidden_states)
    head = 1 + (1 if payload_bytes < 128 else 2)
    split = head + payload_bytes
    with lane_socket(scene.port) as lane:
        frame.assert_answered(lane.ask(changed(frame)))
        frame.assert_answered(lane.ask(frame.message[split:] + frame.message[:split]))
        unpacked = frame.message + b"\x38\x05"  # one more expert id, not packed
        assert lane.ask(unpacked) == HANDED


def test_whatever_bytes_come_only_what_python_accepts_too_is_computed(
    scene: LaneScene, experts: Experts, generator: torch.Generator
) -> None:
    """Random damage to good frames: the native verdict and values against the Python decoder's."""
    chance = random.Random(fresh_seed())
    num_computed = 0
    with lane_socket(scene.port) as lane:
        for round_number in range(400):
            frame = random_frame(
                generator, experts, dtype=FLOAT32, call_id=round_number, num_tokens=2
            )
            message = damaged(frame.message, chance)
            answer = lane.ask(message)
            if answer == HANDED:
                continue
            num_computed += 1
            accepted = decode_request(message, max_frame_bytes=MAX_FRAME_BYTES)
            response = decode_response(answer)
            assert response.call_id == accepted.call_id
            assert_close(
                response.hidden_states, in_process(experts, message), rtol=0, atol=0, equal_nan=True
            )
    assert 0 < num_computed < 400


def damaged(message: bytes, chance: random.Random) -> bytes:
    """With bytes changed, cut out, doubled or put in, mostly behind the payload."""
    result = bytearray(message)
    payload_end = 3 + 2 * HIDDEN * 4
    for _ in range(chance.choice((0, 1, 1, 2, 5))):
        at = chance.randrange(len(result)) if chance.random() < 0.2 else payload_end
        at = min(len(result) - 1, at + chance.randrange(max(1, len(result) - payload_end)))
        match chance.randrange(4):
            case 0:
                result[at] = chance.randrange(256)
            case 1:
                del result[at : at + chance.randrange(1, 4)]
            case 2:
                result[at:at] = result[at : at + chance.randrange(1, 12)]
            case _:
                result[at:at] = chance.randbytes(chance.randrange(1, 4))
        if not result:
            break
    return bytes(result)


def in_process(experts: Experts, message: bytes) -> torch.Tensor:
    frame = decode_request(message, max_frame_bytes=MAX_FRAME_BYTES)
    return moe_forward(
        experts[frame.layer], frame.hidden_states, frame.assignments, combine=frame.combine
    )


def test_frames_in_any_pieces_are_put_together(
    scene: LaneScene, experts: Experts, generator: torch.Generator
) -> None:
    chance = random.Random(fresh_seed())
    frames = [
        random_frame(generator, experts, dtype=FLOAT32, call_id=i, num_tokens=1 + 40 * (i % 4))
        for i in range(12)
    ]
    stream = LANE_MAGIC + b"".join(
        struct.pack("<I", len(frame.message)) + frame.message for frame in frames
    )
    with lane_socket(scene.port, greet=False) as lane:
        cuts = sorted({*(chance.randrange(len(stream)) for _ in range(60)), 1, 3, 9, len(stream)})
        start = 0
        for cut in cuts:
            lane.socket.sendall(stream[start:cut])
            start = cut
        assert lane.receive_exactly(len(LANE_MAGIC)) == LANE_MAGIC
        answers = {decode_response(a).call_id: a for a in (lane.receive() for _ in frames)}
    for frame in frames:
        frame.assert_answered(answers[frame.call_id])


def test_who_does_not_speak_the_protocol_is_cut_and_others_are_not_disturbed(
    scene: LaneScene, experts: Experts, generator: torch.Generator
) -> None:
    frame = random_frame(generator, experts, dtype=FLOAT32)
    with lane_socket(scene.port) as good:
        for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b"EFLANE2\n", b"\0" * 100, b"PRI * HTTP/2.0"):
            with lane_socket(scene.port, greet=False) as bad:
                bad.socket.sendall(nonsense)
                assert bad.is_cut()
        for half in (b"EFLA", LANE_MAGIC + b"\x05", LANE_MAGIC + b"\xff\0\0\0abc"):
            with lane_socket(scene.port, greet=False) as bad:
                bad.socket.sendall(half)
        frame.assert_answered(good.ask(frame.message))


def test_a_client_that_leaves_amid_its_frames_disturbs_nobody(
    scene: LaneScene, experts: Experts, generator: torch.Generator
) -> None:
    frame = random_frame(generator, experts, dtype=FLOAT32, num_tokens=100)
    for _ in range(20):
        with lane_socket(scene.port) as lane:
            for _ in range(5):
                lane.send(frame.message)
            lane.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with lane_socket(scene.port) as lane:
        frame.assert_answered(lane.ask(frame.message))


def test_200_connections_are_served(
    scene: LaneScene, experts: Experts, generator: torch.Generator
) -> None:
    frame = random_frame(generator, experts, dtype=FLOAT32)
    sockets = [lane_socket(scene.port) for _ in range(200)]
    lanes = [opened.__enter__() for opened in sockets]
    for lane in lanes:
        lane.send(frame.message)
    for lane in lanes:
        frame.assert_answered(lane.receive())
    for opened in sockets:
        opened.__exit__(None, None, None)


@pytest.mark.parametrize("payload_first", [True, False])
def test_a_frame_over_the_bound_goes_to_python_without_its_payload(
    scene: LaneScene, experts: Experts, generator: torch.Generator, payload_first: bool
) -> None:
    frame = random_frame(generator, experts, dtype=FLOAT32)
    tail = experts_pb2.DispatchRequest(call_id=77, layer=3).SerializeToString()
    payload = experts_pb2.DispatchRequest(hidden_states=bytes(300_000)).SerializeToString()
    message = payload + tail if payload_first else tail + payload
    with lane_socket(scene.port) as lane:
        assert lane.ask(message) == HANDED
        frame.assert_answered(lane.ask(frame.message))
    (handed,) = scene.handed
    assert handed.total_bytes == len(message)
    assert handed.message == (tail if payload_first else b"")


def test_a_client_that_reads_no_answers_is_not_read_and_others_are_served(
    scene: LaneScene, experts: Experts, generator: torch.Generator
) -> None:
    frame = random_frame(generator, experts, dtype=FLOAT32, num_tokens=100)
    framed = struct.pack("<I", len(frame.message)) + frame.message
    with (
        lane_socket(scene.port, receive_buffer=1 << 12) as slow,
        lane_socket(scene.port) as other,
    ):
        slow.socket.setblocking(False)
        sent = num_refused = 0
        while num_refused < 50:  # no more goes out, for as long as 50 frames of another take
            try:
                at = sent % len(framed)
                sent += slow.socket.send(framed[at:])
                num_refused = 0
            except BlockingIOError:
                num_refused += 1
                frame.assert_answered(other.ask(frame.message))
            assert sent < 64 << 20
        slow.socket.settimeout(20)
        for _ in range(sent // len(framed)):
            frame.assert_answered(slow.receive())
        slow.socket.sendall(framed[sent % len(framed) :])
        frame.assert_answered(slow.receive())


async def test_experts_are_replaced_under_traffic_and_the_old_ones_are_let_go(
    scene: LaneScene, experts: Experts, generator: torch.Generator
) -> None:
    fewer = {0: {e: experts[0][e] for e in (0, 2)}, 1: experts[1]}
    frame = random_frame(generator, experts, dtype=FLOAT32, call_id=2)
    num_handed = 0
    with lane_socket(scene.port) as lane:
        for round_number in range(60):
            scene.hold(fewer if round_number % 3 == 0 else experts, FLOAT32)
            answer = lane.ask(frame.message)
            if answer == HANDED:
                num_handed += 1
                assert round_number % 3 == 0
            else:
                frame.assert_answered(answer)
        assert num_handed == 20
        await eventually(lambda: scene.server.num_tables() == 1)
        scene.server.set_experts({}, dtype=FLOAT32, hidden_size=0, expert_bytes=0)
        assert lane.ask(frame.message) == HANDED
        await eventually(lambda: scene.server.num_tables() == 0)


async def test_draining_ends_when_everything_in_hand_is_answered(
    scene: LaneScene, experts: Experts, generator: torch.Generator
) -> None:
    frame = random_frame(generator, experts, dtype=FLOAT32)
    scene.answers = False
    with lane_socket(scene.port) as lane:
        lane.send(changed(frame, layer=9))
        await eventually(lambda: len(scene.handed) == 1)
        scene.server.drain()
        frame.assert_answered(lane.ask(frame.message))
        assert not scene.server.is_drained()
        await eventually(lambda: refuses_connections(scene.port))
        (handed,) = scene.handed
        scene.server.reply(handed.connection, HANDED, request_bytes=len(handed.message))
        assert lane.receive() == HANDED
        await eventually(scene.server.is_drained)
        lane.send(frame.message)  # which nobody reads
        assert lane.is_cut()


def refuses_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


async def test_a_reply_to_a_connection_that_is_gone_is_dropped(scene: LaneScene) -> None:
    scene.answers = False
    with lane_socket(scene.port) as lane:
        lane.send(b"\xff")
        await eventually(lambda: len(scene.handed) == 1)
        connection = scene.handed[0].connection
        assert scene.server.is_connected(connection)
    await eventually(lambda: not scene.server.is_connected(connection))
    scene.server.reply(connection, HANDED, request_bytes=1)
    scene.answers = True
    with lane_socket(scene.port) as lane:
        assert lane.ask(b"\xff") == HANDED


def test_what_python_refuses_is_never_computed(scene: LaneScene) -> None:
    chance = random.Random(fresh_seed())
    with lane_socket(scene.port) as lane:
        for _ in range(100):
            garbage = chance.randbytes(chance.randrange(200))
            assert lane.ask(garbage) == HANDED
            with pytest.raises(ExpertfleetError):
                decode_request(garbage, max_frame_bytes=MAX_FRAME_BYTES)
