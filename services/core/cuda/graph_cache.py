"""CUDA graphs of small computations, captured when first seen and replayed from then on.

At few rows an expert's FFN is a handful of kernels of a few microseconds each, less than what
launching them one by one costs; a graph launches them together. Where there are no graphs (a CPU),
the same calls compute at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

Compute = Callable[[Tensor], Tensor]
MAX_GRAPHS = 512
PADDED_ROWS = (1, 2, 4, 8, 16, 32)


class Recorded(Protocol):
    """A computation over fixed memory: `output` is written anew by each `replay`."""

    @property
    def output(self) -> Tensor: ...
    def replay(self) -> None: ...


class Recorder(Protocol):
    def __call__(self, compute: Compute, rows: Tensor) -> Recorded: ...


def padded_rows(num_rows: int) -> int | None:
    """The captured row count that `num_rows` is padded to; None where it is computed at once."""
    return next((rows for rows in PADDED_ROWS if 0 < num_rows <= rows), None)


class GraphCache:
    """Graphs by owner and number of rows, used by any thread on one stream.

    All graphs share one memory pool and the buffers of their inputs, so that a graph costs no
    activations of its own. Once `max_graphs` are held, further ones are computed at once: they come
    round in the order of layers, where dropping the oldest would drop each just before its turn.
    """

    def __init__(self, recorder: Recorder | None, *, max_graphs: int = MAX_GRAPHS) -> None:
        """`recorder` None: everything is computed at once."""
        self._recorder = recorder
        self._max_graphs = max_graphs
        self._lock = threading.Lock()
        self._recorded: dict[tuple[Hashable, int], tuple[Recorded, Tensor]] = {}
        self._buffers: dict[tuple[int, int, torch.dtype], Tensor] = {}

    @classmethod
    def of(cls, device: torch.device, *, max_graphs: int = MAX_GRAPHS) -> GraphCache:
        recorder = CudaRecorder(device) if device.type == "cuda" else None
        return cls(recorder, max_graphs=max_graphs)

    @property
    def num_graphs(self) -> int:
        return len(self._recorded)

    def run(self, owner: Hashable, compute: Compute, rows: Tensor, result: Tensor) -> None:
        """Write compute(rows [R, I]) to `result` [R, O].

        An owner has one `compute`, in which rows are independent of each other, and which only
        launches kernels: it neither waits for the device nor looks at values.
        """
        size = padded_rows(len(rows))
        if self._recorder is None or size is None:
            result.copy_(compute(rows))
            return
        # What is launched in between stays together on the stream, whoever launches beside it.
        with self._lock:
            held = self._held(owner, size, compute, rows)
            if held is None:
                result.copy_(compute(rows))
                return
            recorded, buffer = held
            buffer[: len(rows)].copy_(rows)  # rows after them are of an earlier call, and unused
            recorded.replay()
            result.copy_(recorded.output[: len(rows)])

    def drop(self, owner: Hashable) -> None:
        """Forget an owner's graphs, before what they read is freed."""
        with self._lock:
            for key in [key for key in self._recorded if key[0] is owner]:
                del self._recorded[key]

    def _held(
        self, owner: Hashable, size: int, compute: Compute, rows: Tensor
    ) -> tuple[Recorded, Tensor] | None:
        """The graph and its input, recorded if there is room for it."""
        held = self._recorded.get((owner, size))
        if held is None and len(self._recorded) < self._max_graphs:
            assert self._recorder is not None
            buffer = self._buffer(size, rows)
            held = self._recorded[owner, size] = self._recorder(compute, buffer), buffer
        return held

    def _buffer(self, size: int, rows: Tensor) -> Tensor:
        key = (size, rows.shape[1], rows.dtype)
        if key not in self._buffers:
            self._buffers[key] = rows.new_zeros((size, rows.shape[1]))
        return self._buffers[key]


class CudaRecorder:
    """Captures into `torch.cuda.CUDAGraph`s that share one memory pool.

    Sharing is safe because graphs are replayed one after the other on one stream, and an output is
    used up before the next replay. Other threads may go on using the device meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One for all captures: libraries keep a workspace for every stream they were called on.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, compute: Compute, rows: Tensor) -> Recorded:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                compute(rows)  # libraries set themselves up in first calls, which nothing captures
            self._stream.synchronize()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = compute(rows)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return _CudaGraph(graph, output)


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self._graph = graph
        self.output = output

    def replay(self) -> None:
        self._graph.replay()
