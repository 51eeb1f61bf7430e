"""The worker's end of the lanes, native/server.cpp, as a Python object.

A lane carries the frames of the Dispatch call over a bare TCP connection (native/frame.h). Plain
good frames are computed without the interpreter; all others come out of `next_handed`.
"""

from __future__ import annotations

import ctypes
import functools
import socket
from array import array
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from services.core.kernels.library import NativeLibrary
from services.core.kernels.matrix import ACTIVATIONS
from services.core.kernels.moe import NativeExpert
from services.core.registry import Slot

_HEADER_WORDS = 10


class HandedFrame(NamedTuple):
    """A frame for Python to answer. `message` has all of it, unless it is over the bound: then
    `total_bytes` is more, and `message` has the fields after the first one as far as known."""

    connection: int
    total_bytes: int
    message: bytes


class ComputedFrame(NamedTuple):
    """What happened to a frame that was computed natively.

    `position` counts the frames that were computed together, 0 for the first of them. `arrived_ns`
    is of `time.perf_counter_ns`; `traceparent` is the sender's span, empty where there is none.
    """

    layer: int
    expert_ids: tuple[int, ...]
    rows_per_expert: tuple[int, ...]
    position: int
    queue_us: int
    compute_us: int
    batch_rows: int
    num_tokens: int
    arrived_ns: int
    traceparent: str


def has_lanes(library: NativeLibrary) -> bool:
    """False where they were not built, as they need Linux."""
    return hasattr(library.functions, "ef_lane_start")


class LaneServer:
    """Listens from the start, and computes nothing until `set_experts`. Use it from one thread.

    `listener` listens already; it is taken over. `notify_fd`, an eventfd of the caller's, becomes
    readable when there is news from any of the methods that read. Raises `OSError` if the threads
    or descriptors it needs cannot be had.
    """

    def __init__(
        self, library: NativeLibrary, listener: socket.socket, notify_fd: int, max_frame_bytes: int
    ) -> None:
        self._functions = _declared(library)
        listener.setblocking(False)
        self._server: int | None = self._functions.ef_lane_start(
            listener.fileno(), notify_fd, max_frame_bytes
        )
        if self._server is None:
            raise OSError("no threads or file descriptors to serve lanes with")
        listener.detach()

    def set_experts(
        self,
        experts: Mapping[Slot, NativeExpert],
        *,
        dtype: torch.dtype,
        hidden_size: int,
        expert_bytes: int,
    ) -> None:
        """Compute with these from now on, in one dtype, each of about `expert_bytes`; with none,
        hand every frame over. They must live on until `num_tables` is 1 again, 0 without any."""
        words = array("q")
        for (layer, expert), weights in experts.items():
            words.extend((layer, expert, weights.address))
        self._functions.ef_lane_set_experts(
            self._server,
            words.buffer_info()[0],
            len(experts),
            ACTIVATIONS.get(dtype, 0),
            hidden_size,
            expert_bytes,
        )

    def num_tables(self) -> int:
        """How many `set_experts` are still computed with, the current one among them."""
        return int(self._functions.ef_lane_num_tables(self._server))

    def next_handed(self) -> HandedFrame | None:
        connection, total_bytes = ctypes.c_uint64(), ctypes.c_uint64()
        message, num_bytes = ctypes.c_void_p(), ctypes.c_uint64()
        handed = self._functions.ef_lane_next(
            self._server,
            ctypes.byref(connection),
            ctypes.byref(total_bytes),
            ctypes.byref(message),
            ctypes.byref(num_bytes),
        )
        if handed is None:
            return None
        try:
            copied = ctypes.string_at(message, num_bytes.value) if num_bytes.value else b""
            return HandedFrame(connection.value, total_bytes.value, copied)
        finally:
            self._functions.ef_lane_forget(handed)

    def reply(self, connection: int, answer: bytes, *, request_bytes: int) -> None:
        """Answer a handed frame whose message had `request_bytes`. Does nothing if its connection
        is gone."""
        self._functions.ef_lane_reply(self._server, connection, answer, len(answer), request_bytes)

    def is_connected(self, connection: int) -> bool:
        return bool(self._functions.ef_lane_is_connected(self._server, connection))

    def take_computed(self) -> Iterator[ComputedFrame]:
        """The frames computed since the last call. The oldest are kept if they are not asked for
        in time (some ten thousand)."""
        address, num_words = ctypes.c_void_p(), ctypes.c_uint64()
        records = self._functions.ef_lane_records(
            self._server, ctypes.byref(address), ctypes.byref(num_words)
        )
        try:
            words = array("I")
            if num_words.value:
                words.frombytes(ctypes.string_at(address, 4 * num_words.value))
        finally:
            self._functions.ef_lane_forget_records(records)
        return _computed_frames(words)

    def drain(self) -> None:
        """Take no more connections; once all is answered, `is_drained` says so."""
        self._functions.ef_lane_drain(self._server)

    def is_drained(self) -> bool:
        return bool(self._functions.ef_lane_is_drained(self._server))

    def close(self) -> None:
        """Cut the connections and end the threads. Blocks until the batches in hand are done."""
        server, self._server = self._server, None
        if server is not None:
            self._functions.ef_lane_stop(server)


def _computed_frames(words: array[int]) -> Iterator[ComputedFrame]:
    start = 0
    while start < len(words):
        header = words[start : start + _HEADER_WORDS]
        layer, num_experts, position, queue_us, compute_us, batch_rows = header[:6]
        num_tokens, arrived_low, arrived_high, num_bytes = header[6:]
        ids = start + _HEADER_WORDS
        rows = ids + num_experts
        text = rows + num_experts
        start = text + (num_bytes + 3) // 4
        yield ComputedFrame(
            layer=layer,
            expert_ids=tuple(words[ids:rows]),
            rows_per_expert=tuple(words[rows:text]),
            position=position,
            queue_us=queue_us,
            compute_us=compute_us,
            batch_rows=batch_rows,
            num_tokens=num_tokens,
            arrived_ns=arrived_high << 32 | arrived_low,
            traceparent=words[text:start].tobytes()[:num_bytes].decode("ascii"),
        )


@functools.cache
def _declared(library: NativeLibrary) -> ctypes.CDLL:
    functions = library.functions
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    uint32, uint64 = ctypes.c_uint32, ctypes.c_uint64
    signatures = {
        "ef_lane_start": (pointer, [int32, int32, uint64]),
        "ef_lane_stop": (None, [pointer]),
        "ef_lane_set_experts": (None, [pointer, pointer, int64, int32, uint32, uint64]),
        "ef_lane_num_tables": (int64, [pointer]),
        "ef_lane_next": (pointer, [pointer, pointer, pointer, pointer, pointer]),
        "ef_lane_forget": (None, [pointer]),
        "ef_lane_reply": (None, [pointer, uint64, ctypes.c_char_p, uint64, uint64]),
        "ef_lane_is_connected": (int32, [pointer, uint64]),
        "ef_lane_records": (pointer, [pointer, pointer, pointer]),
        "ef_lane_forget_records": (None, [pointer]),
        "ef_lane_drain": (None, [pointer]),
        "ef_lane_is_drained": (int32, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
    return functions
