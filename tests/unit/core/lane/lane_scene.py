"""A lane server in this process, with random experts, and Python's part of answering played."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from services.core.expert_ffn import PackedExpert, moe_forward
from services.core.kernels.choice import native_kernels_for
from services.core.kernels.library import native_library
from services.core.lane.server import HandedFrame, LaneServer, has_lanes
from services.core.quantization.formats import QuantizedFormat
from services.core.wire import decode_response, encode_request
from tests.support.frames import random_assignments, random_weights

HIDDEN, INTERMEDIATE = 64, 96
EXPERT_IDS = (0, 2, 5, 130)
NUM_LAYERS = 2
MAX_FRAME_BYTES = 1 << 16
HANDED = b"handed to python"
Experts = Mapping[int, Mapping[int, PackedExpert]]


def skip_without_lanes(dtype: torch.dtype = torch.float32) -> None:
    library = native_kernels_for(dtype, torch.device("cpu"))
    if library is None or not has_lanes(library):
        pytest.skip("there are no lanes on this machine")


def random_experts(
    generator: torch.Generator, dtype: torch.dtype, quantized: QuantizedFormat | None = None
) -> Experts:
    def expert() -> PackedExpert:
        return PackedExpert(
            random_weights(generator, hidden=HIDDEN, intermediate=INTERMEDIATE, dtype=dtype),
            dtype=dtype,
            device=torch.device("cpu"),
            quantized=quantized,
        )

    return {layer: {e: expert() for e in EXPERT_IDS} for layer in range(NUM_LAYERS)}


@dataclass(kw_only=True)
class LaneScene:
    """The server's frames for Python are kept in `handed` and answered with `HANDED`, as long as
    `answers` is true."""

    server: LaneServer
    port: int
    handed: list[HandedFrame] = field(default_factory=list)
    answers: bool = True

    def hold(self, experts: Experts, dtype: torch.dtype, *, expert_bytes: int = 1) -> None:
        native = {
            (layer, e): weights.native
            for layer, of_layer in experts.items()
            for e, weights in of_layer.items()
            if weights.native is not None
        }
        assert len(native) == sum(map(len, experts.values()))
        self.server.set_experts(native, dtype=dtype, hidden_size=HIDDEN, expert_bytes=expert_bytes)

    def take_handed(self) -> None:
        while (frame := self.server.next_handed()) is not None:
            self.handed.append(frame)
            if self.answers:
                self.server.reply(frame.connection, HANDED, request_bytes=len(frame.message))


@contextlib.contextmanager
def running_lane(max_frame_bytes: int = MAX_FRAME_BYTES) -> Iterator[LaneScene]:
    library = native_library()
    assert library is not None
    notify_fd = os.eventfd(0, os.EFD_CLOEXEC)
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    port = listener.getsockname()[1]
    scene = LaneScene(server=LaneServer(library, listener, notify_fd, max_frame_bytes), port=port)
    ending = threading.Event()

    def play_python() -> None:
        while not ending.is_set():
            os.eventfd_read(notify_fd)
            if not ending.is_set():
                scene.take_handed()

    player = threading.Thread(target=play_python)
    player.start()
    try:
        yield scene
    finally:
        ending.set()
        os.eventfd_write(notify_fd, 1)
        player.join()
        scene.server.close()
        os.close(notify_fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class SentFrame:
    """A random valid frame, as bytes, and the rows that must come back."""

    call_id: int
    message: bytes
    expected: Tensor
    expert_ids: Sequence[int]
    rows_per_expert: Sequence[int]
    layer: int

    def assert_answered(self, answer: bytes) -> None:
        response = decode_response(answer)
        assert (response.status, response.error) == (0, "")
        assert response.call_id == self.call_id
        assert response.dtype == self.expected.dtype
        assert response.hidden_states is not None
        assert torch.equal(response.hidden_states, self.expected)


def random_frame(
    generator: torch.Generator,
    experts: Experts,
    *,
    dtype: torch.dtype,
    call_id: int = 1,
    num_tokens: int = 3,
    combine: bool = True,
    expert_ids: Sequence[int] = EXPERT_IDS,
    traceparent: str = "",
) -> SentFrame:
    hidden_states = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
    assigned = random_assignments(generator, num_tokens=num_tokens, expert_ids=expert_ids)
    layer = call_id % NUM_LAYERS
    return SentFrame(
        call_id=call_id,
        message=encode_request(
            call_id=call_id,
            layer=layer,
            hidden_states=hidden_states,
            assignments=assigned,
            combine=combine,
            traceparent=traceparent,
        ),
        expected=moe_forward(experts[layer], hidden_states, assigned, combine=combine),
        expert_ids=assigned.expert_ids,
        rows_per_expert=assigned.rows_per_expert,
        layer=layer,
    )
