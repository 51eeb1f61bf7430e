"""A shard's side of the lanes: many connections on one epoll descriptor, and rounds over them.

A lane carries the dispatch messages of protos/experts.proto over bare TCP; native code frames,
sends and receives them (native/client.cpp). Everything is called on one thread.

Shapes: T tokens, K experts per token (1 or 2), E experts, W workers, H hidden_size, S shares.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protos import experts_pb2
from services.core.kernels.library import NativeLibrary
from services.core.lane.layers import LayersRequest

DTYPES = {
    torch.float32: int(experts_pb2.DTYPE_FLOAT32),
    torch.bfloat16: int(experts_pb2.DTYPE_BFLOAT16),
}
"""Activation dtypes that rounds are in."""
MAX_TOP_K = 2
TRACEPARENT_BYTES = 55
FIRST_ROUND_CALL_ID = 1 << 40
"""Frames of rounds are numbered from here on; who sends single frames keeps below."""


@dataclass(frozen=True, slots=True)
class Greeted:
    """The worker's greeting came: it speaks this protocol."""

    connection: int


@dataclass(frozen=True, slots=True)
class ConnectionBroke:
    """No further event is of that connection."""

    connection: int
    reason: str


@dataclass(frozen=True, slots=True)
class AnswerCame:
    """An answer that no round waits for: an encoded DispatchResponse."""

    connection: int
    frame: bytes


@dataclass(frozen=True, slots=True)
class RoundSettled:
    """A round that `run_round` had not seen the end of."""

    round_id: int


LaneEvent = Greeted | ConnectionBroke | AnswerCame | RoundSettled


class Refusal(IntEnum):
    """Why `run_round` sent nothing."""

    NOT_FINITE = -1
    NO_WORKER = -2
    TOO_MANY_ROWS = -3
    BAD_REQUEST = -4


class RoundState(IntEnum):
    WAITING = 0
    WHOLE = 1
    FAULTY = 2


UNANSWERED = -1
BROKEN = -2
WRONG_ROWS = -3


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPart:
    """What became of a worker's frame: `outcome` is a `DispatchStatus` or one of the above.

    Times are of `time.perf_counter_ns`; `received_ns` is 0 while there is no answer.
    """

    worker: int
    call_id: int
    sent_ns: int
    received_ns: int
    outcome: int
    answer: bytes | None


class RoundTrip(NamedTuple):
    """A frame of a round, from when it was sent to when its answer was there, by
    `time.perf_counter_ns`."""

    worker: int
    sent_ns: int
    received_ns: int
    num_assignments: int
    num_experts: int
    queue_us: int
    compute_us: int

    @property
    def elapsed_ns(self) -> int:
        return self.received_ns - self.sent_ns


class RoundRequest:
    """A layer call, and what is known of it; see `RoundRequest` of native/client_round.h.

    Tensors are contiguous and on the CPU: hidden_states [T, H] in one of `DTYPES`, topk_ids int64
    [T, K], topk_weights float32 [T, K], output like hidden_states (its own if none is given).
    Arrays are int64:
    worker_of_expert [E], connections [W] (negative: none), max_rows [W], and shares [S * 3]:
    expert, worker and rows of each, those of an expert together and experts ascending.
    `traceparents`: `TRACEPARENT_BYTES` for each worker, of the span that its frame names.

    `rows_per_expert` [E] and `result` (`result_words` of W workers) are its own if none are given.
    """

    __slots__ = ("_held", "_words", "address", "output", "result", "rows_per_expert")

    def __init__(
        self,
        *,
        layer: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        worker_of_expert: NDArray[np.int64],
        connections: array[int],
        max_rows: array[int],
        shares: array[int],
        traceparents: bytes | None = None,
        output: Tensor | None = None,
        rows_per_expert: NDArray[np.int64] | None = None,
        result: NDArray[np.int64] | None = None,
    ) -> None:
        num_tokens, hidden_size = hidden_states.shape
        num_experts, num_workers = len(worker_of_expert), len(connections)
        self.output = torch.empty_like(hidden_states) if output is None else output
        if rows_per_expert is None:
            rows_per_expert = np.empty(num_experts, dtype=np.int64)
        self.rows_per_expert = rows_per_expert
        if result is None:
            result = np.zeros(result_words(num_workers), dtype=np.int64)
        self.result = result.data
        traces = array("B", traceparents or b"")
        self._words = array(
            "q",
            (
                layer,
                DTYPES[hidden_states.dtype],
                num_tokens,
                topk_ids.shape[1],
                hidden_size,
                num_experts,
                num_workers,
                hidden_states.data_ptr(),
                topk_ids.data_ptr(),
                topk_weights.data_ptr(),
                worker_of_expert.ctypes.data,
                connections.buffer_info()[0],
                max_rows.buffer_info()[0],
                self.output.data_ptr(),
                self.rows_per_expert.ctypes.data,
                result.ctypes.data,
                len(shares) // 3,
                shares.buffer_info()[0],
                traces.buffer_info()[0] if traces else 0,
            ),
        )
        self.address = self._words.buffer_info()[0]
        tensors = hidden_states, topk_ids, topk_weights
        self._held = *tensors, worker_of_expert, connections, max_rows, shares, traces

    def resize(self, num_tokens: int) -> None:
        """Make it one of so many tokens, at most as many as its tensors have."""
        self._words[_NUM_TOKENS_WORD] = num_tokens

    @property
    def state(self) -> int:
        """A `RoundState`."""
        return self.result[0]

    def copied_result(self) -> memoryview[int]:
        """For when the request is used again."""
        return memoryview(bytes(self.result)).cast("q")

    @property
    def gate_choice(self) -> tuple[Tensor, Tensor]:
        """topk_ids and topk_weights."""
        return self._held[1], self._held[2]

    @property
    def num_parts(self) -> int:
        """Frames, one to a worker."""
        return self.result[1]

    @property
    def num_events(self) -> int:
        """Left to take when `run_round` returned."""
        return self.result[2]

    def slowest(self) -> memoryview[int]:
        """sent_ns, received_ns, queue_us and compute_us of the frame answered last."""
        return self.result[3:_RESULT_WORDS]

    def parts(self) -> list[RoundPart]:
        """Of a round that is not released; answers are copied."""
        parts = []
        for index in range(self.result[1]):
            start = _RESULT_WORDS + index * _PART_WORDS
            words = self.result[start : start + _PART_WORDS]
            worker, call_id, sent_ns, received_ns, outcome, *_, answer, size = words
            parts.append(
                RoundPart(
                    worker=worker,
                    call_id=call_id,
                    sent_ns=sent_ns,
                    received_ns=received_ns,
                    outcome=outcome,
                    answer=ctypes.string_at(answer, size) if answer else None,
                )
            )
        return parts


def result_words(num_workers: int) -> int:
    return _RESULT_WORDS + num_workers * _PART_WORDS


def round_trips(result: memoryview[int]) -> list[RoundTrip]:
    """Every frame of a `RoundRequest.result`; what answers tell is sensible in a whole round."""
    trips = []
    for start in range(_RESULT_WORDS, _RESULT_WORDS + result[1] * _PART_WORDS, _PART_WORDS):
        worker, _, sent_ns, received_ns, _, *rest = result[start : start + 9]
        trips.append(RoundTrip(worker, sent_ns, received_ns, *rest))
    return trips


class LaneClient:
    """Connections by number. Close it when nothing is in flight, or drop what is."""

    def __init__(self, library: NativeLibrary) -> None:
        """Raises `OSError` where there are no file descriptors left."""
        self._waiting, self._brief = _declared(library)
        self._client: int | None = self._brief.ef_lane_open()
        if self._client is None:
            raise OSError("no file descriptor for a lane client")
        self._event = _EventWords()
        self._event_address = ctypes.addressof(self._event)

    def fileno(self) -> int:
        """Readable when `poll` has something to do."""
        return int(self._brief.ef_lane_fd(self._client))

    def connect(self, address: str, port: int, *, max_message_bytes: int) -> int:
        """Begin to connect to a numeric address and return the connection, which may be sent to at
        once. `Greeted` or `ConnectionBroke` follows."""
        connection: int = self._brief.ef_lane_connect(
            self._client, address.encode(), port, max_message_bytes
        )
        return connection

    def disconnect(self, connection: int) -> bool:
        """Close it: no new event is of it, and rounds that wait for it are faulty. Returns whether
        there are events."""
        return bool(self._brief.ef_lane_disconnect(self._client, connection))

    def send(self, connection: int, frame: bytes) -> bool:
        """Send one message, now or as soon as there is room. Returns whether there are events."""
        return bool(self._brief.ef_lane_send(self._client, connection, frame, len(frame)))

    def run_round(self, request: RoundRequest, *, wait_s: float = 0.0) -> int:
        """Send a frame to each worker of a layer call. Returns its round, or a `Refusal`.

        Waits for the end for up to `wait_s`, less if there are events to take, without the
        interpreter lock. A round that is whole then is over: its output is written. Otherwise
        `RoundSettled` tells when it is, or when it is faulty; then, or when nobody cares any more,
        it must be released, and until then the request must be kept.
        """
        if wait_s > 0:
            return int(
                self._waiting.ef_lane_run_round(self._client, request.address, int(wait_s * 1e6))
            )
        return int(self._brief.ef_lane_run_round(self._client, request.address, 0))

    def run_layers(self, layers: LayersRequest, *, wait_s: float) -> int:
        """Run layer after layer, without the interpreter lock, while their rounds become whole
        within `wait_s` each. `layers.num_whole` says how many did; if not all, returned is what
        `run_round` would have returned for the next."""
        return int(
            self._waiting.ef_lane_run_layers(self._client, layers.address, int(wait_s * 1e6))
        )

    def release_round(self, round_id: int) -> None:
        """Answers that still come are events of their own. Nothing for a round that is no more."""
        self._brief.ef_lane_release_round(self._client, round_id)

    def poll(self) -> bool:
        """Receive and send what can be, without waiting. Returns whether there are events."""
        return bool(self._brief.ef_lane_poll(self._client))

    def take_event(self) -> LaneEvent | None:
        """The next event, None when there is none."""
        if not self._brief.ef_lane_take_event(self._client, self._event_address):
            return None
        event = self._event
        match event.kind:
            case 1:
                return Greeted(event.source)
            case 2:
                return ConnectionBroke(event.source, self._event_bytes().decode(errors="replace"))
            case 3:
                return AnswerCame(event.source, self._event_bytes())
            case _:
                return RoundSettled(event.source)

    def close(self) -> None:
        """Close all connections. No other call may follow."""
        client, self._client = self._client, None
        if client is not None:
            self._brief.ef_lane_close(client)

    def _event_bytes(self) -> bytes:
        return ctypes.string_at(self._event.bytes, self._event.num_bytes)


class _EventWords(ctypes.Structure):
    """`EventWords` of native/client.cpp."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("source", ctypes.c_int64),
        ("bytes", ctypes.c_void_p),
        ("num_bytes", ctypes.c_int64),
    )


_NUM_TOKENS_WORD = 2
_RESULT_WORDS = 7
_PART_WORDS = 11


@functools.cache
def _declared(library: NativeLibrary) -> tuple[ctypes.CDLL, ctypes.PyDLL]:
    """The functions, without and with the interpreter lock held: releasing it for microseconds
    would let another thread keep it for milliseconds."""
    waiting = library.functions
    brief = ctypes.PyDLL(waiting._name)
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    signatures = {
        "ef_lane_open": ((), pointer),
        "ef_lane_close": ((pointer,), None),
        "ef_lane_fd": ((pointer,), int32),
        "ef_lane_connect": ((pointer, ctypes.c_char_p, int32, int64), int64),
        "ef_lane_disconnect": ((pointer, int64), int64),
        "ef_lane_send": ((pointer, int64, ctypes.c_char_p, int64), int64),
        "ef_lane_poll": ((pointer,), int64),
        "ef_lane_take_event": ((pointer, pointer), int32),
        "ef_lane_run_round": ((pointer, pointer, int64), int64),
        "ef_lane_run_layers": ((pointer, pointer, int64), int64),
        "ef_lane_release_round": ((pointer, int64), None),
    }
    for name, (arguments, result) in signatures.items():
        for functions in (waiting, brief):
            function = getattr(functions, name)
            function.argtypes, function.restype = arguments, result
    return waiting, brief
