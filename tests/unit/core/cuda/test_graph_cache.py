"""The bookkeeping of graphs, with a recorder that runs the computation again on each replay."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from services.core.cuda.expert import CudaExpert
from services.core.cuda.graph_cache import Compute, GraphCache, padded_rows
from tests.unit.core.cuda.oracle import CPU, random_weights


class _Recording:
    """Like a graph: reads the buffer it was recorded on, and writes one output in place."""

    def __init__(self, compute: Compute, rows: Tensor) -> None:
        self._compute, self._rows = compute, rows
        self.output = compute(rows)
        self.num_replays = 0

    def replay(self) -> None:
        self.output.copy_(self._compute(self._rows))
        self.num_replays += 1


class _Recorder:
    def __init__(self) -> None:
        self.recordings: list[_Recording] = []

    def __call__(self, compute: Compute, rows: Tensor) -> _Recording:
        self.recordings.append(_Recording(compute, rows))
        return self.recordings[-1]


def _double(rows: Tensor) -> Tensor:
    return rows * 2


def _run(graphs: GraphCache, owner: Hashable, rows: Tensor) -> Tensor:
    result = torch.full_like(rows, float("nan"))
    graphs.run(owner, _double, rows, result)
    return result


def test_rows_are_padded_to_the_captured_sizes() -> None:
    assert [padded_rows(count) for count in (0, 1, 3, 8, 9, 32, 33)] == [
        None,
        1,
        4,
        8,
        16,
        32,
        None,
    ]


def test_a_graph_is_recorded_once_for_each_owner_and_size() -> None:
    recorder = _Recorder()
    graphs = GraphCache(recorder)
    for owner, count in (("a", 3), ("a", 4), ("b", 3), ("a", 5), ("a", 3)):
        rows = torch.randn(count, 6)
        assert torch.equal(_run(graphs, owner, rows), rows * 2)
    assert graphs.num_graphs == 3
    assert [recording.num_replays for recording in recorder.recordings] == [3, 1, 1]


def test_owners_share_the_buffers_of_their_inputs() -> None:
    recorder = _Recorder()
    graphs = GraphCache(recorder)
    for owner in range(5):
        _run(graphs, owner, torch.randn(2, 6))
    assert len({recording._rows.data_ptr() for recording in recorder.recordings}) == 1


def test_many_rows_are_computed_at_once() -> None:
    graphs = GraphCache(_Recorder())
    rows = torch.randn(33, 6)
    assert torch.equal(_run(graphs, "a", rows), rows * 2)
    assert graphs.num_graphs == 0


def test_past_the_bound_nothing_more_is_recorded_and_results_stay_right() -> None:
    graphs = GraphCache(_Recorder(), max_graphs=2)
    for owner in range(4):
        rows = torch.randn(1, 6)
        assert torch.equal(_run(graphs, owner, rows), rows * 2)
    assert graphs.num_graphs == 2


def test_dropping_an_owner_makes_room() -> None:
    graphs = GraphCache(_Recorder())
    first, second = object(), object()
    for owner in (first, second):
        for count in (1, 2):
            _run(graphs, owner, torch.randn(count, 6))
    graphs.drop(first)
    assert graphs.num_graphs == 2


def test_without_a_recorder_everything_is_computed_at_once() -> None:
    graphs = GraphCache.of(CPU)
    rows = torch.randn(2, 6)
    assert torch.equal(_run(graphs, "a", rows), rows * 2)
    assert graphs.num_graphs == 0


def test_an_expert_hands_out_results_that_later_replays_leave_alone() -> None:
    graphs = GraphCache(_Recorder())
    weights = random_weights(32, 48)
    plain = CudaExpert(weights, dtype=torch.float32, device=CPU)
    expert = CudaExpert(weights, dtype=torch.float32, device=CPU, graphs=graphs)
    batches = [torch.randn(3, 32) for _ in range(3)]
    results = [expert.forward(rows) for rows in batches]
    for rows, result in zip(batches, results, strict=True):
        torch.testing.assert_close(result, plain.forward(rows))
    assert graphs.num_graphs == 1
    expert.release()
    assert graphs.num_graphs == 0
